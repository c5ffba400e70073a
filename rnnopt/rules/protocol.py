"""The update-rule protocol, and `advance`, which applies a rule to one parameter tensor.

Shapes: N coordinates (scalars) of one parameter tensor, M statistics of it, K numbers of context.
A rule sees the parameter and its gradient as flat vectors (N,). Parameter-wise state has shape
(N,) or (H, N), with N last; the coordinates of one feature are then contiguous in memory, which
makes matrix products and elementwise operations fast. Tensor-wise state, such as the step count,
is 0-d, or it is named in the rule's attribute `tensor_state`.

Sign: an update is *added* to the parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

State = dict[str, Tensor]
MatrixTransform = Callable[[Tensor], Tensor]  # of a flat direction, (N,) -> (N,)


@runtime_checkable
class UpdateRule(Protocol):
    """A pure function ``(gradient, state, parameter) -> (update, state)``.

    A rule writes to none of its inputs. Its result for one tensor depends on that tensor alone;
    a `TensorAwareRule` may also depend on the other tensors through `cross_tensor_context`.

    Attributes:
        step_size: the learning rate of a classical rule. Decoupled weight decay is multiplied by
            it, so that a rule that is Adam makes the optimizer AdamW.
    """

    step_size: float

    def init_state(self, param: Tensor) -> State:
        """The state before the first step: leaves (..., N) or 0-d, on the parameter's device."""
        ...

    def __call__(self, grad: Tensor, state: State, param: Tensor) -> tuple[Tensor, State]:
        """One step for one tensor.

        Args:
            grad: the gradient, (N,), finite.
            state: the result of `init_state` or of the previous step.
            param: the parameter's value, (N,).

        Returns:
            The update, (N,), to be added to the parameter, and the next state.
        """
        ...


@runtime_checkable
class TensorAwareRule(UpdateRule, Protocol):
    """A rule whose coordinates interact, but only through sums over the tensor.

    A caller that holds only part of a tensor (a shard, or a sample of its coordinates) passes the
    context of the whole tensor. A rule without `statistics` treats every coordinate separately.
    """

    def statistics(self, grad: Tensor, state: State, param: Tensor) -> Tensor:
        """Sums over the coordinates given, (M,). Those of all shards add up to the tensor's.

        Args:
            grad: see `UpdateRule.__call__`.
            state: see `UpdateRule.__call__`.
            param: see `UpdateRule.__call__`.
        """
        ...

    def cross_tensor_context(self, statistics: Tensor) -> Tensor:
        """Each tensor's context, computed from all tensors that are stepped together.

        Args:
            statistics: of P whole tensors, (P, M).

        Returns:
            (P, K), a row for each tensor; the statistics themselves if tensors do not interact.
        """
        ...

    def __call__(
        self, grad: Tensor, state: State, param: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """As `UpdateRule.__call__`.

        Args:
            grad: see `UpdateRule.__call__`.
            state: see `UpdateRule.__call__`.
            param: see `UpdateRule.__call__`.
            context: this tensor's row of `cross_tensor_context`, (K,). None if the arguments are
                the whole tensor and it is the only one.
        """
        ...


@runtime_checkable
class TensorStateRule(TensorAwareRule, Protocol):
    """A rule that keeps a state for each tensor as a whole, and steps it with all tensors at hand.

    Attributes:
        tensor_state: names of the leaves that belong to the tensor as a whole and are not 0-d.
        leaves: names of the 0-d leaves that `cross_tensor_context` reads.
    """

    tensor_state: frozenset[str]
    leaves: tuple[str, ...]

    def cross_tensor_context(self, statistics: Tensor, states: State) -> Tensor:  # type: ignore[override]
        """As `TensorAwareRule.cross_tensor_context`; the context holds the next tensor-wise state.

        Args:
            statistics: of P whole tensors, (P, M).
            states: `leaves` and `tensor_state` of the same tensors, stacked, (P, ...).
        """
        ...


@runtime_checkable
class MatrixRule(TensorAwareRule, Protocol):
    """A rule that transforms the direction of some matrices as a whole, as Muon does."""

    def init_state(self, param: Tensor, *, shape: Sequence[int] | None = None) -> State:
        """As `UpdateRule.init_state`.

        Args:
            param: the parameter, or a shard of it.
            shape: of the whole tensor, if param is a shard.
        """
        ...

    def treats_as_matrix(self, shape: Sequence[int]) -> bool:
        """Whether the rule transforms directions of this shape."""
        ...

    def transform_matrix(self, direction: Tensor) -> Tensor:
        """The transformed directions, (..., R, C) -> (..., R, C)."""
        ...

    def __call__(
        self,
        grad: Tensor,
        state: State,
        param: Tensor,
        context: Tensor | None = None,
        transform: MatrixTransform | None = None,
    ) -> tuple[Tensor, State]:
        """As `TensorAwareRule.__call__`.

        Args:
            grad: see `UpdateRule.__call__`.
            state: see `UpdateRule.__call__`.
            param: see `UpdateRule.__call__`.
            context: see `TensorAwareRule.__call__`.
            transform: the result of `matrix_transform` for this tensor.
        """
        ...


def is_coordinate_wise(rule: UpdateRule, name: str, leaf: Tensor) -> bool:
    """Whether a leaf of the state ends with the tensor's coordinates, (..., N)."""
    return leaf.dim() > 0 and name not in getattr(rule, "tensor_state", ())


def matrix_transform(rule: UpdateRule, param: Tensor) -> MatrixTransform | None:
    """`MatrixRule.transform_matrix` for flat directions of param; None if it does not apply."""
    # getattr, because isinstance with a protocol takes longer than a small step
    applies = getattr(rule, "treats_as_matrix", None)
    if applies is None or not applies(param.shape):
        return None
    transform, shape = cast(MatrixRule, rule).transform_matrix, param.shape
    return lambda direction: transform(direction.view(shape)).reshape(-1)


def advance(
    rule: UpdateRule,
    param: Tensor,
    grad: Tensor,
    state: State,
    lr: float,
    weight_decay: float,
    context: Tensor | None = None,
    transform: MatrixTransform | None = None,
) -> tuple[Tensor, State]:
    """Apply a rule to one parameter tensor of any shape and memory layout.

    ``delta = lr * (rule(grad) - step_size * weight_decay * param)``; the decay is decoupled as in
    Loshchilov & Hutter 2019, arXiv:1711.05101. A coordinate whose gradient is NaN or infinite
    keeps its value and its state. The test is a mask on the device, so nothing waits for the GPU.

    Args:
        rule: the update rule.
        param: the parameter, any shape.
        grad: its gradient, same shape.
        state: the rule's state for this tensor.
        lr: multiplies the whole change; dimensionless, 1.0 = as meta-trained.
        weight_decay: decay per step in units of ``lr * rule.step_size``.
        context: for a `TensorAwareRule` this tensor's row of `cross_tensor_context`, (K,). None if
            it is the only tensor.
        transform: the result of `matrix_transform` for the tensor of which param is a flat shard.
            None if param is the whole tensor.

    Returns:
        The change to add, in param's shape, and the next state. Differentiable in everything.
    """
    if transform is None:
        transform = matrix_transform(rule, param)
    if param.numel() == 0 and transform is None and not hasattr(rule, "tensor_state"):
        return torch.zeros_like(param), state
    flat_param, flat_grad = param.reshape(-1), grad.reshape(-1)  # (N,), in logical order
    finite = torch.isfinite(flat_grad)
    options: dict[str, Any] = {} if context is None else {"context": context}
    if transform is not None:
        options["transform"] = lambda direction: transform(torch.where(finite, direction, 0))
    update, new_state = rule(torch.where(finite, flat_grad, 0), state, flat_param, **options)
    if weight_decay:
        update = update - (rule.step_size * weight_decay) * flat_param
    delta = lr * torch.where(finite, update, 0)
    new_state = {
        name: torch.where(finite, leaf, state[name])
        if is_coordinate_wise(rule, name, leaf)
        else leaf
        for name, leaf in new_state.items()
    }
    return delta.reshape(param.shape), new_state


def cross_tensor_context(
    rule: UpdateRule, statistics: Sequence[Tensor | None], states: Sequence[State] = ()
) -> list[Tensor | None]:
    """The `context` argument of `advance` for each of the tensors that are stepped together.

    Args:
        rule: the rule.
        statistics: the result of `statistics_of` for each tensor, summed over its shards.
        states: the rule's state of each tensor; only a `TensorStateRule` reads it.

    Returns:
        (K,) for each tensor, on the device of its statistics; None for a rule that needs none.
    """
    if not isinstance(rule, TensorAwareRule) or not statistics:
        return list(statistics)
    rows = [cast(Tensor, row) for row in statistics]
    stacked = torch.stack([row.to(rows[0]) for row in rows])
    if hasattr(rule, "tensor_state"):
        keeper = cast(TensorStateRule, rule)
        known = {
            name: torch.stack([state[name].to(rows[0]) for state in states])
            for name in (*keeper.leaves, *keeper.tensor_state)
        }
        context = keeper.cross_tensor_context(stacked, known)
    else:
        context = rule.cross_tensor_context(stacked)
    return [new.to(row) for row, new in zip(rows, context)]


def statistics_of(rule: UpdateRule, param: Tensor, grad: Tensor, state: State) -> Tensor | None:
    """`TensorAwareRule.statistics` of a parameter or a shard, (M,); None if the rule needs none."""
    if not isinstance(rule, TensorAwareRule):
        return None
    flat_grad = grad.reshape(-1)
    finite = torch.where(torch.isfinite(flat_grad), flat_grad, 0)
    return rule.statistics(finite, state, param.reshape(-1))


def arithmetic_dtype(param: Tensor) -> torch.dtype:
    """At least float32: the state of a half-precision parameter has full precision."""
    return torch.promote_types(param.dtype, torch.float32)
