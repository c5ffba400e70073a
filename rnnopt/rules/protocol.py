"""What an update rule is, and the one place where a rule meets a parameter.

Shapes: N is the number of coordinates (scalars) of one parameter tensor. Rules see a parameter
and its gradient as flat vectors (N,), and every state leaf that belongs to coordinates *ends*
with N: ``(N,)`` or ``(H, N)``. Feature-major memory keeps the coordinates of one feature side by
side, which is what makes the matrix products and the elementwise passes fast. A 0-d leaf belongs
to the tensor as a whole (its step count, say).

Sign: an update is *added* to the parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

State = dict[str, Tensor]
MatrixTransform = Callable[[Tensor], Tensor]  # of a direction, (N,) -> (N,)


@runtime_checkable
class UpdateRule(Protocol):
    """The pure function ``(gradient, state, parameter) -> (update, state)``.

    A rule writes to none of its inputs. What it computes for one tensor depends on that tensor
    alone, but for what `TensorAwareRule.cross_tensor_context` tells it of the others.

    Attributes:
        step_size: what a classical optimizer calls its learning rate; the unit in which decoupled
            weight decay is counted, so that a rule that is Adam makes the optimizer AdamW.
    """

    step_size: float

    def init_state(self, param: Tensor) -> State:
        """The state before the first step: flat, leaves ``(..., N)`` or 0-d, on param's device."""
        ...

    def __call__(self, grad: Tensor, state: State, param: Tensor) -> tuple[Tensor, State]:
        """One step for one tensor.

        Args:
            grad: finite gradient, (N,).
            state: what `init_state` or the previous step returned.
            param: the parameter's value, (N,).

        Returns:
            The update, (N,), to be added to the parameter, and the next state.
        """
        ...


@runtime_checkable
class TensorAwareRule(UpdateRule, Protocol):
    """A rule in which coordinates of one tensor feel one another, but only through sums.

    Where a caller holds a piece of the tensor only (a shard, a sample of the coordinates), it
    passes the sums of the whole. Tensors that are stepped together may feel one another as well,
    through `cross_tensor_context`. A rule without `statistics` is taken to treat each coordinate by itself.
    """

    def statistics(self, grad: Tensor, state: State, param: Tensor) -> Tensor:
        """Sums over this piece, (M,): those of all pieces add up to the tensor's.

        Arguments as in `__call__`.
        """
        ...

    def cross_tensor_context(self, sums: Tensor) -> Tensor:
        """What each tensor is told, of itself and of those that are stepped together with it.

        Args:
            sums: of P whole tensors, (P, M).

        Returns:
            (P, K), a row for each; the sums themselves where tensors do not feel one another.
        """
        ...

    def __call__(
        self, grad: Tensor, state: State, param: Tensor, sums: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """As `UpdateRule.__call__`.

        Args:
            grad: finite gradient, (N,).
            state: what `init_state` or the previous step returned.
            param: the parameter's value, (N,).
            sums: this tensor's row of `cross_tensor_context`, (K,); None if what is given is the whole tensor,
                and no other is stepped.
        """
        ...


@runtime_checkable
class MatrixRule(TensorAwareRule, Protocol):
    """A rule that turns the direction of some matrices as a whole, before it goes there.

    There coordinates feel one another through more than sums.
    """

    def init_state(self, param: Tensor, *, shape: Sequence[int] | None = None) -> State:
        """As `UpdateRule.init_state`.

        Args:
            param: see there.
            shape: of the whole tensor, where param is a shard of it.
        """
        ...

    def treats_as_matrix(self, shape: Sequence[int]) -> bool:
        """Whether it does so to a tensor of this shape."""
        ...

    def transform_matrix(self, direction: Tensor) -> Tensor:
        """What becomes of directions, (..., R, C)."""
        ...

    def __call__(
        self,
        grad: Tensor,
        state: State,
        param: Tensor,
        sums: Tensor | None = None,
        turn: MatrixTransform | None = None,
    ) -> tuple[Tensor, State]:
        """As `TensorAwareRule.__call__`.

        Args:
            grad: see there.
            state: see there.
            param: see there.
            sums: see there.
            turn: what `matrix_transform` returned for the tensor.
        """
        ...


def matrix_transform(rule: UpdateRule, param: Tensor) -> MatrixTransform | None:
    """The rule's `transform_matrix` for flat directions of this parameter; None if it leaves them alone."""
    turns = getattr(
        rule, "treats_as_matrix", None
    )  # isinstance, of a protocol, takes longer than a small step
    if turns is None or not turns(param.shape):
        return None
    turned, shape = cast(MatrixRule, rule).transform_matrix, param.shape
    return lambda direction: turned(direction.view(shape)).reshape(-1)


def advance(
    rule: UpdateRule,
    param: Tensor,
    grad: Tensor,
    state: State,
    lr: float,
    weight_decay: float,
    sums: Tensor | None = None,
    turn: MatrixTransform | None = None,
) -> tuple[Tensor, State]:
    """Apply a rule to one parameter tensor, whatever its shape and layout.

    ``delta = lr * (rule(grad) - step_size * weight_decay * param)``; the decay is decoupled as in
    Loshchilov & Hutter 2019, arXiv:1711.05101. A coordinate whose gradient is NaN or infinite
    stays as it is, and so does its memory; the test is a mask on the device, so nothing waits
    for the GPU.

    Args:
        rule: the update rule.
        param: the parameter, any shape.
        grad: its gradient, same shape.
        state: the rule's memory for this tensor.
        lr: multiplies the whole change; dimensionless, 1.0 = as meta-trained.
        weight_decay: decay per step in units of ``lr * rule.step_size``.
        sums: for a `TensorAwareRule` what `cross_tensor_context` tells this tensor; None if it is alone.
        turn: `matrix_transform` the tensor of which param, flat, is a piece; None if it is the whole tensor.

    Returns:
        The change to add, in param's shape, and the next state. Differentiable in everything.
    """
    if turn is None:
        turn = matrix_transform(rule, param)
    if param.numel() == 0 and turn is None:
        return torch.zeros_like(param), state
    flat_param, flat_grad = param.reshape(-1), grad.reshape(-1)  # (N,), in logical order
    finite = torch.isfinite(flat_grad)
    known: dict[str, Any] = {} if sums is None else {"sums": sums}
    if turn is not None:
        known["turn"] = lambda direction: turn(torch.where(finite, direction, 0))
    update, new_state = rule(torch.where(finite, flat_grad, 0), state, flat_param, **known)
    if weight_decay:
        update = update - (rule.step_size * weight_decay) * flat_param
    delta = lr * torch.where(finite, update, 0)
    new_state = {
        name: torch.where(finite, leaf, state[name]) if leaf.dim() else leaf
        for name, leaf in new_state.items()
    }
    return delta.reshape(param.shape), new_state


def cross_tensor_context(rule: UpdateRule, sums: Sequence[Tensor | None]) -> list[Tensor | None]:
    """What `advance` wants for each of the tensors that are stepped together.

    Args:
        rule: the rule.
        sums: what `statistics_of` returned for each, added up over its pieces.

    Returns:
        (K,) for each, on the device of its sums; None where the rule needs none.
    """
    if not isinstance(rule, TensorAwareRule) or not sums:
        return list(sums)
    rows = [cast(Tensor, row) for row in sums]
    told = rule.cross_tensor_context(torch.stack([row.to(rows[0]) for row in rows]))
    return [new.to(row) for row, new in zip(rows, told)]


def statistics_of(rule: UpdateRule, param: Tensor, grad: Tensor, state: State) -> Tensor | None:
    """The sums over a piece of this parameter; None if the rule needs none."""
    if not isinstance(rule, TensorAwareRule):
        return None
    flat_grad = grad.reshape(-1)
    finite = torch.where(torch.isfinite(flat_grad), flat_grad, 0)
    return rule.statistics(finite, state, param.reshape(-1))


def arithmetic_dtype(param: Tensor) -> torch.dtype:
    """At least float32: half-precision parameters keep their memory in full precision."""
    return torch.promote_types(param.dtype, torch.float32)
