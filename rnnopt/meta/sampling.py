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

# A sample this much smaller than its tensor is drawn with repeats, which are rare then: a
# permutation of a large tensor takes as long as a step of it.
_FEW = 16


def draw_samples(
    rule: UpdateRule, tensors: Sequence[Tensor], states: Sequence[State], total: int, seed: int
) -> list[Sample]:
    """Sample about `total` coordinates, at least one of every tensor.

    As many of each tensor, but no more than it has: what a large tensor's coordinates do to the
    rule is much alike, and a bias or a head must not be left out. A tensor that the rule turns as a
    whole is taken as a whole, beside them.

    Args:
        rule: the rule.
        tensors: the parameters.
        states: the rule's memory of each, before the first step.
        total: how many coordinates; all of them if there are no more.
        seed: decides which.
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
    """Divide `total` as evenly as the sizes allow: min(size, level), the level as it must be."""
    counts, left = [0] * len(sizes), total
    for rank, index in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        counts[index] = min(sizes[index], left // (len(sizes) - rank))
        left -= counts[index]
    return counts


class Sample:
    """The coordinates of one tensor that carry the meta-gradient, with the rule's memory of them.

    Args:
        param: the tensor, (N,) when flat.
        state: the rule's memory of it, before the first step.
        count: n.
        generator: draws them.
        transform: see `rnnopt.rules.protocol.matrix_transform`; not None only where n = N.
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
        # by which of the arguments depend on the rule's weights: the first step's don't
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
        """Copies of these coordinates, (n,) each."""
        return self._pick(param.detach().reshape(-1)), self._pick(grad.reshape(-1))

    def change(
        self,
        rule: UpdateRule,
        group: dict[str, Any],
        param: Tensor,
        grad: Tensor,
        sums: Tensor | None,
    ) -> Tensor:
        """What the rule adds to these coordinates, with the rule's graph; steps their memory.

        Args:
            rule: the rule.
            group: of the optimizer, with lr and weight_decay.
            param: these coordinates' value, (n,).
            grad: their gradient, (n,).
            sums: of the whole tensor, see `rnnopt.rules.protocol.statistics_of`.

        Returns:
            (n,).
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
        """dL/dtheta of these coordinates, so that their sum estimates that of all; (n,)."""
        return None if slope is None else self._weight * self._pick(slope.reshape(-1))

    def cut(self) -> None:
        """End the graph here."""
        self._state = {name: leaf.detach() for name, leaf in self._state.items()}

    def _pick(self, leaf: Tensor) -> Tensor:
        """These coordinates of a (..., N) leaf, as a copy."""
        return leaf.clone() if self._index is None else leaf[..., self._index]


@dataclass(frozen=True)
class _Call:
    """`advance` with flat arguments: (parameter, gradient, leaves of the state)."""

    rule: UpdateRule
    lr: float
    weight_decay: float
    sums: Tensor | None
    names: tuple[str, ...]
    weights: list[nn.Parameter]
    transform: MatrixTransform | None

    def __call__(self, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The change and the next leaves."""
        param, grad, *leaves = given
        state = dict(zip(self.names, leaves))
        change, state = advance(
            self.rule, param, grad, state, self.lr, self.weight_decay, self.sums, self.transform
        )
        return change, *(state[name] for name in self.names)

    def learned(self, given: Sequence[Tensor]) -> tuple[bool, ...]:
        """Which of the results depend on the rule's weights: tried on one coordinate."""
        with torch.enable_grad():
            call = replace(self, transform=None)
            results = call([tensor[..., :1] if tensor.dim() else tensor for tensor in given])
        return tuple(result.requires_grad for result in results)


class _Recomputed(torch.autograd.Function):
    """A `_Call` that keeps what goes in; its graph, ten times as large, is made when it is needed.

    torch.utils.checkpoint does the same, but keeps the graph's nodes, which for many small tensors
    over many steps are as large as what they would hold.
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
