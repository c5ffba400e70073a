"""A rule's step as a compiled pass over all tensors: what the kernels have in common.

`two_level` has one for CPUs; `choice` selects. The rule itself defines the arithmetic, and tests
compare the kernels with it.

Shapes: P pieces, M statistics, K numbers of context.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rnnopt.rules.protocol import MatrixTransform, State, UpdateRule, advance

# Coordinates in one part of a step, at least: smaller parts would take longer.
_PART = 1 << 20
_MOST_PARTS = 16
# A context for a part of a step, made from the rows of the work that are in it.
Around = Callable[[Sequence[int]], contextlib.AbstractContextManager[None]]


def unwatched(rows: Sequence[int]) -> contextlib.AbstractContextManager[None]:
    """No context."""
    return contextlib.nullcontext()


@dataclass
class Piece:
    """One tensor, or this process's shard of it, and the settings of its step.

    Attributes:
        param: the parameter, changed in place.
        grad: its gradient.
        state: the rule's state, changed in place.
        lr: multiplies the whole change.
        weight_decay: in units of lr * step_size.
        transform: see `rnnopt.rules.protocol.matrix_transform`, for a direction of this piece.
        whole: whether the piece is the whole tensor.
    """

    param: Tensor
    grad: Tensor
    state: State
    lr: float
    weight_decay: float
    transform: MatrixTransform | None = None
    whole: bool = True

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of the parameter and of its gradient."""
        return self.param.dtype, self.grad.dtype


def plain_step(rule: UpdateRule, piece: Piece, context: Tensor | None) -> State:
    """Step one piece by the rule itself; returns its next state."""
    param, grad = piece.param, piece.grad
    if not piece.whole:  # a shard's own shape is not the tensor's
        param, grad = param.reshape(-1), grad.reshape(-1)
        if not param.numel() and piece.transform is None:  # the step count is that of all parts
            return rule(
                grad, piece.state, param, **({} if context is None else {"context": context})
            )[1]
    delta, state = advance(
        rule, param, grad, piece.state, piece.lr, piece.weight_decay, context, piece.transform
    )
    piece.param.add_(delta.view(piece.param.shape))
    return state


class Leaves:
    """The small leaves of many tensors as views of one matrix: a step reads and writes it at once.

    L is the sum of the leaves' sizes.
    """

    def __init__(self) -> None:
        self._matrix: Tensor | None = None
        self._columns: dict[str, Tensor] = {}
        self._views: list[tuple[Tensor, ...]] = []  # of each tensor
        self._places: list[int] = []  # where the first of them lie

    def of(self, states: Sequence[State], names: Sequence[str]) -> tuple[Tensor, State]:
        """Gather leaves, which are views afterwards; nothing is to do if they already are.

        Args:
            states: of P tensors; leaves that have been replaced since the last call are taken anew.
            names: of leaves that are 0-d or (U,), on one device.

        Returns:
            The matrix, (P, L), with the leaves in this order, and its columns by their names, (P,)
            or (P, U) each.
        """
        if self._matrix is None or not self._are_kept(states, names):
            with torch.inference_mode(False), torch.no_grad():  # a later step writes to it
                stacks = [torch.stack([state[name] for state in states]) for name in names]
                widths = [stack[0].numel() for stack in stacks]
                self._matrix = torch.cat([stack.view(len(states), -1) for stack in stacks], 1)
                parts = torch.split(self._matrix, widths, 1)
                columns = [part.view_as(stack) for part, stack in zip(parts, stacks)]
            self._columns = dict(zip(names, columns))
            self._views = list(zip(*(column.unbind() for column in columns)))
            self._places = [views[0].data_ptr() for views in self._views]
            for state, views in zip(states, self._views):
                state.update(zip(names, views))
        return self._matrix, self._columns

    def _are_kept(self, states: Sequence[State], names: Sequence[str]) -> bool:
        return len(states) == len(self._views) and all(
            all(map(operator.is_, map(state.__getitem__, names), views))
            and views[0].data_ptr() == place  # nobody has exchanged its memory
            for state, views, place in zip(states, self._views, self._places)
        )


@dataclass(frozen=True)
class Measured:
    """Pieces that are about to be stepped.

    Attributes:
        pieces: P of them.
        statistics: of each piece, (P, M).
        kept: what the kernel needs again: its tables, and the gradients that they point to.
    """

    pieces: Sequence[Piece]
    statistics: Tensor
    kept: tuple[Any, ...]


class GuardKernel(Protocol):
    """What `rnnopt.optim.safeguard` sums up and keeps, for many tensors at once.

    Products are in float32. Masked means that coordinates without a finite gradient count as zeros.
    """

    def supports(self, grad: Tensor, step: Tensor) -> bool:
        """Whether the kernel takes a gradient and a kept step, (N,)."""
        ...

    def keeps(self, update: Tensor, step: Tensor) -> bool:
        """Whether the kernel takes an update, (N,), beside a step that it supports."""
        ...

    def ends(self, grads: Sequence[Tensor], steps: Sequence[Tensor], masked: bool) -> Tensor:
        """Sums over the coordinates of each tensor, (P, 4).

        These are gradient times step, gradient squared, and how many coordinates of the step are
        not zero and how many of the gradient are finite.

        Args:
            grads: supported, and all of one dtype.
            steps: what was kept of the last step, (N,) each.
            masked: see the class.
        """
        ...

    def keep(
        self,
        grads: Sequence[Tensor],
        updates: Sequence[Tensor],
        steps: Sequence[Tensor],
        rates: Sequence[float],
        masked: bool,
    ) -> Tensor:
        """Write rate times update to `steps`; returns gradient times that, summed up, (P,).

        Args:
            grads: supported, and all of one dtype.
            updates: (N,) each.
            steps: (N,) each, written.
            rates: of each tensor.
            masked: see the class.
        """
        ...


class FusedStep(Protocol):
    """A step of a rule over many pieces at once, in place.

    Attributes:
        guard: what the guard uses beside it, if there is something.
    """

    guard: GuardKernel | None = None

    def supports(self, piece: Piece) -> bool:
        """Whether the kernel can step this piece."""
        ...

    def measure(self, pieces: Sequence[Piece], leaves: Leaves | None = None) -> Measured:
        """The statistics of each piece, of which the context of their tensors is made.

        Args:
            pieces: supported, and all of the same `Piece.dtypes`.
            leaves: those of the last step of the same pieces, to be used again.
        """
        ...

    def context(self, measured: Measured) -> Tensor:
        """The context (P, K) where these pieces are all that is stepped, and whole tensors."""
        ...

    def step(
        self,
        measured: Measured,
        context: Tensor,
        rows: Sequence[int] = (),
        around: Around = unwatched,
    ) -> None:
        """Step all pieces.

        Args:
            measured: the result of `measure`.
            context: of the tensors that the pieces belong to, (P, K), see
                `rnnopt.rules.protocol.cross_tensor_context`.
            rows: what `around` calls each piece.
            around: a context for each part of the step.
        """
        ...


def parts_by_size(pieces: Sequence[Piece]) -> list[slice]:
    """Parts of at least `_PART` coordinates, and not many more than `_MOST_PARTS` of them."""
    sizes = [piece.param.numel() for piece in pieces]
    least = max(_PART, sum(sizes) // _MOST_PARTS)
    edges, size = [0], 0
    for end, count in enumerate(sizes, 1):
        size += count
        if size >= least and end < len(sizes):
            edges.append(end)
            size = 0
    return [slice(a, b) for a, b in itertools.pairwise([*edges, len(sizes)])]
