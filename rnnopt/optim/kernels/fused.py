"""The fused step of `CoordinateLSTM`: one compiled pass over all tensors.

This module has what the kernels share; `cpu` and `cuda` have one kernel each, `choice` selects one.
`rnnopt.rules.lstm` defines the arithmetic, and tests compare both kernels with it.

Shapes: P pieces, H hidden units.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnnopt.rules.features import (
    STATISTICS,
    RunningMaxima,
    matrix_gain,
    root_mean_squares,
    step_scale,
)
from rnnopt.rules.lstm import CoordinateLSTM, matrix_output_shifts
from rnnopt.rules.protocol import MatrixTransform, State, UpdateRule, advance

# Coordinates in one part of a step, at least: smaller parts would take longer.
_PART = 1 << 20
_MOST_PARTS = 16
# A context for a part of a step, made from the rows of the work that are in it.
Around = Callable[[Sequence[int]], contextlib.AbstractContextManager[None]]

KERNEL_STATISTICS = STATISTICS - 1  # the last is computed here, see `append_matrix_statistic`
_FLOAT32_LEAVES = ("m", "v", "matrix", *RunningMaxima._fields)


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
    def dtypes(self) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
        """Of the parameter, of its gradient and of the LSTM's state."""
        return self.param.dtype, self.grad.dtype, self.state["hidden"].dtype

    def fits(self, device: torch.device, dtypes: Collection[torch.dtype]) -> bool:
        """Whether a kernel can step this piece: its memory is contiguous and on the right device.

        Args:
            device: the kernel's.
            dtypes: that the kernel supports for parameter and gradient.
        """
        leaves, size = self.state.values(), self.param.numel()
        return (
            self.param.dtype in dtypes
            # the kernel writes the direction over the parameter, which half precision would round
            and (self.transform is None or (self.whole and self.param.dtype == torch.float32))
            # a kernel trusts its pointers; the plain rule raises where sizes differ
            and self.grad.shape == self.param.shape
            and all(leaf.dim() == 0 or leaf.shape[-1] == size for leaf in leaves)
            and self.grad.dtype in dtypes
            and all(tensor.device == device for tensor in (self.param, self.grad, *leaves))
            and all(tensor.is_contiguous() for tensor in (self.param, *leaves))
            and self.state["hidden"].dtype in (torch.float32, torch.bfloat16)
            and self.state["hidden"].dtype == self.state["cell"].dtype
            and all(self.state[name].dtype == torch.float32 for name in _FLOAT32_LEAVES)
        )


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


class FusedStep:
    """A step of a rule over many pieces at once, in place.

    Attributes:
        dtypes: that the kernel supports for parameter and gradient.

    Args:
        rule: its weights are read at every step; the step runs on their device.
    """

    dtypes: Collection[torch.dtype] = (torch.float32,)

    def __init__(self, rule: CoordinateLSTM) -> None:
        self._rule = rule

    def supports(self, piece: Piece) -> bool:
        """Whether the kernel can step this piece."""
        return piece.fits(self._rule.gate_weight.device, self.dtypes)

    def measure(self, pieces: Sequence[Piece]) -> Measured:
        """Compute the statistics of each piece; changes nothing.

        Args:
            pieces: supported, and all of the same `Piece.dtypes`.
        """
        raise NotImplementedError

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
            context: of the tensors that the pieces belong to, (P, 18), see
                `CoordinateLSTM.cross_tensor_context`.
            rows: what `around` calls each piece.
            around: a context for each part of the step.
        """
        pieces = measured.pieces
        constants, gain = tensor_constants(self._rule, pieces, context)
        for part in self.parts(pieces):
            with around(rows[part]):
                shares = {name: values[part] for name, values in constants.items()}
                matrices = _TransformedPieces(self._rule, pieces[part], shares, gain[part])
                try:
                    self.launch(measured, constants, part)
                    matrices.apply()
                except BaseException:  # Ctrl-C too: the kernel may have overwritten parameters
                    matrices.restore()
                    raise
        # autograd did not see the writes; this makes it refuse an older graph, as it does otherwise
        torch.autograd.graph.increment_version([piece.param for piece in pieces])

    def parts(self, pieces: Sequence[Piece]) -> list[slice]:
        """Parts of the pieces that one `launch` each steps, in order; here all at once."""
        return [slice(0, len(pieces))]

    def launch(self, measured: Measured, constants: dict[str, Tensor], part: slice) -> None:
        """Run the compiled pass: the whole step but for transformed directions.

        Args:
            measured: see `step`.
            constants: see `tensor_constants`.
            part: the pieces to step, one of `parts`.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Measured:
    """Pieces that are about to be stepped.

    Attributes:
        pieces: P of them.
        statistics: of each piece, (P, 9).
        kept: what the kernel needs again: its tables, and the gradients that they point to.
    """

    pieces: Sequence[Piece]
    statistics: Tensor
    kept: tuple[Any, ...]


class _TransformedPieces:
    """Pieces whose direction is transformed as a whole, after the kernel has computed it.

    For these the kernel writes minus the direction over the parameter. Their constants for it are
    growth 0, keep 0 and scale 1, and `tensor_table` gives it rate 1 and decay 0.

    Args:
        rule: the rule.
        pieces: all that are stepped.
        constants: the result of `tensor_constants`; changed here for the transformed pieces.
        gain: factor on the length of the transformed directions, (P,).
    """

    def __init__(
        self,
        rule: CoordinateLSTM,
        pieces: Sequence[Piece],
        constants: dict[str, Tensor],
        gain: Tensor,
    ) -> None:
        self._rule = rule
        growth, keep, scale = constants["growth"], constants["keep"], constants["scale"]
        self._groups: dict[tuple[int, ...], list[tuple[Piece, Tensor, Tensor, Tensor]]] = {}
        for i, piece in enumerate(pieces):
            if piece.transform is not None:
                length = scale[i] * gain[i]
                kept = piece, piece.param.detach().clone(), growth[i].clone(), length
                self._groups.setdefault(tuple(piece.param.shape), []).append(kept)
                growth[i].zero_()
                keep[i].zero_()
                scale[i].fill_(1)

    def apply(self) -> None:
        """Transform the directions, all of a shape at once, and write the next parameters."""
        for shape, kept in self._groups.items():
            pieces, before, growth, length = zip(*kept)
            start = stacked(before)  # (B, R, C)
            dead = stacked([piece.state["v"] for piece in pieces]).view(-1, *shape) <= 0
            lost = ~stacked([piece.grad for piece in pieces]).isfinite()
            # in place: of a matrix of millions of coordinates every copy counts
            left = stacked([piece.param.detach() for piece in pieces])  # minus the direction
            end = self._rule.transform_matrix(left.masked_fill_(dead | lost, 0))
            growths, lengths = (
                torch.stack([piece.lr * each for piece, each in zip(pieces, values)]).view(-1, 1, 1)
                for values in (growth, length)
            )
            end.mul_(lengths).addcmul_(start, growths).masked_fill_(dead, 0)
            for piece, row, old in zip(pieces, end, before):
                if decay := _decay(self._rule, piece):
                    row.sub_(old, alpha=decay)
            end.masked_fill_(lost, 0).add_(start)
            torch._foreach_copy_([piece.param.detach() for piece in pieces], list(end.unbind()))

    def restore(self) -> None:
        """Write back the parameters from before the step."""
        for kept in self._groups.values():
            for piece, before, *_ in kept:
                piece.param.detach().copy_(before)


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.stack`, which copies also a single tensor, without that copy."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def _decay(rule: CoordinateLSTM, piece: Piece) -> float:
    return piece.lr * rule.step_size * piece.weight_decay


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


def append_matrix_statistic(statistics: Tensor, pieces: Sequence[Piece]) -> Tensor:
    """Append the last of `rnnopt.rules.features.tensor_statistics`; (P, 8) -> (P, 9)."""
    matrix = torch.stack([piece.state["matrix"] for piece in pieces])
    return torch.column_stack([statistics, matrix * statistics[:, 0]])


def tensor_table(
    rule: CoordinateLSTM, pieces: Sequence[Piece], grads: Sequence[Tensor], layout: np.dtype[Any]
) -> np.ndarray:
    """A kernel's table of tensors, with the fields that do not depend on statistics.

    Args:
        rule: the rule.
        pieces: that are stepped.
        grads: their gradients, contiguous.
        layout: a dtype with fields pointers, count, rate and decay.

    Returns:
        (P,) of that dtype.
    """
    tensors = np.zeros(len(pieces), dtype=layout)
    tensors["pointers"] = [
        [
            piece.param.data_ptr(),
            grad.data_ptr(),
            *(piece.state[name].data_ptr() for name in ("m", "v", "hidden", "cell")),
        ]
        for piece, grad in zip(pieces, grads)
    ]
    tensors["count"] = [piece.param.numel() for piece in pieces]
    tensors["rate"] = [1.0 if piece.transform else piece.lr for piece in pieces]
    tensors["decay"] = [0.0 if piece.transform else _decay(rule, piece) for piece in pieces]
    return tensors


def tensor_constants(
    rule: CoordinateLSTM, pieces: Sequence[Piece], context: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """What all coordinates of a tensor share, by the plain rule's functions.

    Updates the tensor-wise state: the step count and the running maxima.

    Args:
        rule: the rule.
        pieces: P of them.
        context: of their tensors, (P, 18).

    Returns:
        A dict of gate_shift (P, 4 H), output_shift (P, 3), and (P,) each: the bias corrections
        m_correction and v_correction, 1 - beta^t; grad_rms; param_rms; scale; growth; keep, 1, see
        `_TransformedPieces`. And the factor `rnnopt.rules.features.matrix_gain`, (P,).
    """
    steps = torch.stack([piece.state["step"] for piece in pieces]).to(context.dtype) + 1
    maxima = RunningMaxima(
        *(torch.stack([piece.state[name] for piece in pieces]) for name in RunningMaxima._fields)
    )
    grad_rms, param_rms = root_mean_squares(context)
    gates, outputs, growth = rule.context_shifts(context, maxima, steps)
    if any(piece.transform for piece in pieces):
        rows = zip(pieces, outputs, matrix_output_shifts(outputs, steps))
        outputs = torch.stack([new if piece.transform else old for piece, old, new in rows])
    after = maxima.updated(context, steps)
    scale = rule.initial_decrease * step_scale(context, maxima, after, rule.orthogonalize)
    # all at once: on a GPU every small operation costs as much as a large one
    torch._foreach_copy_([piece.state["step"] for piece in pieces], steps.unbind())
    for name, values in after._asdict().items():
        torch._foreach_copy_([piece.state[name] for piece in pieces], values.unbind())
    constants = {
        "gate_shift": gates,
        "output_shift": outputs,
        "m_correction": -torch.expm1(steps * math.log(rule.betas[0])),
        "v_correction": -torch.expm1(steps * math.log(rule.betas[1])),
        "grad_rms": grad_rms,
        "param_rms": param_rms,
        "scale": scale,
        "growth": growth,
        "keep": torch.ones_like(growth),
    }
    return constants, matrix_gain(after.radial_gate_max, steps)
