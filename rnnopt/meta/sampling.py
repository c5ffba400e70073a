"""The coordinates that carry a first-order meta-gradient, and the rule's graph over them.

Shapes: N coordinates of one tensor, n of them sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rnnopt.rules.protocol import MatrixTransform, State, UpdateRule, advance, matrix_transform

# A sample that is smaller than its tensor by this factor is drawn with replacement. Repeats are
# rare then, and a permutation of a large tensor would take as long as a step of it.
_FEW = 16


def draw_samples(
    rule: UpdateRule, tensors: Sequence[Tensor], states: Sequence[State], total: int, seed: int
) -> list[Sample]:
    """Sample about `total` coordinates, at least one of every tensor.

    Each tensor contributes the same number, or all its coordinates if it has fewer. The coordinates
    of a large tensor affect the rule in much the same way, and small tensors, such as a bias or a
    head, must not be left out. A tensor that the rule transforms as a whole is taken in full, in
    addition to the others.

    Args:
        rule: the rule.
        tensors: the parameters.
        states: the rule's state of each parameter, before the first step.
        total: the number of coordinates; all are taken if there are fewer.
        seed: decides which coordinates are sampled.

    Returns:
        One sample for each tensor.
    """
    generator = torch.Generator().manual_seed(seed)
    transforms = [matrix_transform(rule, param) for param in tensors]
    sizes = [0 if transform else param.numel() for param, transform in zip(tensors, transforms)]
    counts = fill(sizes, max(total, len(tensors)))
    return [
        Sample(param, state, param.numel() if transform else count, generator, transform)
        for param, state, count, transform in zip(tensors, states, counts, transforms)
    ]


def fill(sizes: Sequence[int], total: int) -> list[int]:
    """Divide `total` as evenly as the sizes allow: each count is min(size, level) for one level."""
    counts, left = [0] * len(sizes), total
    for rank, index in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        counts[index] = min(sizes[index], left // (len(sizes) - rank))
        left -= counts[index]
    return counts


class Sample:
    """The coordinates of one tensor that carry the meta-gradient, with the rule's state of them.

    Args:
        param: the tensor, of N coordinates.
        state: the rule's state of it, before the first step.
        count: n, the number of coordinates in the sample.
        generator: draws the coordinates.
        transform: see `rnnopt.rules.protocol.matrix_transform`; None unless n = N.
    """

    def __init__(
        self,
        param: Tensor,
        state: State,
        count: int,
        generator: torch.Generator,
        transform: MatrixTransform | None = None,
    ) -> None:
        self._transform = transform
        self._index: Tensor | None = None
        self._weight = 1.0
        # For each pattern of arguments that depend on the rule's weights: which results do, too.
        self._learned: dict[tuple[bool, ...], tuple[bool, ...]] = {}
        if count < param.numel():
            if count * _FEW < param.numel():
                drawn = torch.randint(param.numel(), (count,), generator=generator)
            else:
                drawn = torch.randperm(param.numel(), generator=generator)[:count]
            self._index = drawn.sort().values.to(param.device)
            self._weight = param.numel() / count
        self._state = {
            name: self._pick(leaf) if leaf.dim() else leaf.clone() for name, leaf in state.items()
        }

    def pick(self, param: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of these coordinates of a parameter and of its gradient, (n,) each."""
        return self._pick(param.detach().reshape(-1)), self._pick(grad.reshape(-1))

    def change(
        self,
        rule: UpdateRule,
        group: dict[str, Any],
        param: Tensor,
        grad: Tensor,
        sums: Tensor | None,
    ) -> Tensor:
        """Update the state of these coordinates; return the rule's update, with its graph.

        Args:
            rule: the rule.
            group: the optimizer's param group, with lr and weight_decay.
            param: the values of these coordinates, (n,).
            grad: their gradient, (n,).
            sums: sums over the whole tensor, see `rnnopt.rules.protocol.statistics_of`.

        Returns:
            The update that is added to these coordinates, (n,).
        """
        weights = list(rule.parameters()) if isinstance(rule, nn.Module) else []
        call = _Call(
            rule,
            group["lr"],
            group["weight_decay"],
            sums,
            tuple(self._state),
            weights,
            self._transform,
        )
        given = (param, grad, *self._state.values())
        kind = tuple(tensor.requires_grad for tensor in given)
        if kind not in self._learned:
            self._learned[kind] = call.learned(given)
        results = _Recomputed.apply(call, self._learned[kind], *given, *weights)  # type: ignore[no-untyped-call]
        change, *leaves = results
        self._state = dict(zip(self._state, leaves))
        return cast(Tensor, change)

    def scaled(self, slope: Tensor | None) -> Tensor | None:
        """dL/dtheta of these coordinates, (n,), scaled so that sums over them are unbiased."""
        return None if slope is None else self._weight * self._pick(slope.reshape(-1))

    def cut(self) -> None:
        """Cut the graph here."""
        self._state = {name: leaf.detach() for name, leaf in self._state.items()}

    def _pick(self, leaf: Tensor) -> Tensor:
        """These coordinates of a (..., N) leaf, as a copy."""
        return leaf.clone() if self._index is None else leaf[..., self._index]


@dataclass(frozen=True)
class _Call:
    """`advance` as a function of (parameter, gradient, leaves of the state)."""

    rule: UpdateRule
    lr: float
    weight_decay: float
    sums: Tensor | None
    names: tuple[str, ...]
    weights: list[nn.Parameter]
    transform: MatrixTransform | None

    def __call__(self, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The update, and the leaves of the next state."""
        param, grad, *leaves = given
        state = dict(zip(self.names, leaves))
        change, state = advance(
            self.rule, param, grad, state, self.lr, self.weight_decay, self.sums, self.transform
        )
        return change, *(state[name] for name in self.names)

    def learned(self, given: Sequence[Tensor]) -> tuple[bool, ...]:
        """Which results depend on the rule's weights, found by a call on one coordinate."""
        with torch.enable_grad():
            call = replace(self, transform=None)
            results = call([tensor[..., :1] if tensor.dim() else tensor for tensor in given])
        return tuple(result.requires_grad for result in results)


class _Recomputed(torch.autograd.Function):
    """A `_Call` that keeps its inputs and builds its graph in the backward pass (checkpointing).

    The graph is ten times as large as the inputs. torch.utils.checkpoint does the same, but it
    keeps the nodes of the graph. For many small tensors over many steps, these nodes are as large
    as the tensors that checkpointing saves.
    """

    @staticmethod
    def forward(
        ctx: Any, call: _Call, learned: tuple[bool, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        given = tensors[: len(tensors) - len(call.weights)]
        ctx.call = call
        ctx.save_for_backward(*given)
        results = call(given)
        ctx.mark_non_differentiable(
            *(result for result, depends in zip(results, learned) if not depends)
        )
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        call, needed = ctx.call, ctx.needs_input_grad[2:]
        with torch.enable_grad():
            given = [
                tensor.detach().requires_grad_(need)
                for tensor, need in zip(ctx.saved_tensors, needed)
            ]
            pairs = zip(call(given), slopes)
            results, pulls = zip(*(pair for pair in pairs if pair[0].requires_grad))
        inputs = [*given, *call.weights]
        wanted = [tensor for tensor, need in zip(inputs, needed) if need]
        found = iter(torch.autograd.grad(results, wanted, pulls, allow_unused=True))
        return None, None, *(next(found) if need else None for need in needed)
