"""The fast path of `CoordinateLSTM`: one compiled pass over all tensors.

What the kernels have in common. fused_cpu.py and fused_cuda.py have one each, kernels.py chooses.
The plain rule in lstm.py is the source of truth; tests hold both kernels to it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
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
from rnnopt.rules.protocol import MatrixTransform, State

TAKEN = STATISTICS - 1  # by a kernel: the last is known beforehand, see `with_matrices`
_FULL = ("m", "v", "matrix", *RunningMaxima._fields)  # of the state, what is in float32


@dataclass
class Piece:
    """One tensor, or this process's shard of it, and what a step does to it.

    Attributes:
        param: the parameter, changed in place.
        grad: its gradient.
        state: the rule's memory, changed in place.
        lr: multiplies the whole change.
        weight_decay: in units of lr * step_size.
        turn: see `rnnopt.rules.protocol.matrix_transform`, of the tensor of which this is a piece.
        whole: whether it is all of it.
    """

    param: Tensor
    grad: Tensor
    state: State
    lr: float
    weight_decay: float
    turn: MatrixTransform | None = None
    whole: bool = True

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
        """Of the parameter, of its gradient and of the LSTM's memory."""
        return self.param.dtype, self.grad.dtype, self.state["hidden"].dtype

    def fits(self, device: torch.device, dtypes: Collection[torch.dtype]) -> bool:
        """Whether a kernel can work on it: memory in order, all of it on that kernel's device.

        Args:
            device: the kernel's.
            dtypes: what it takes as parameter or gradient.
        """
        leaves, size = self.state.values(), self.param.numel()
        return (
            self.param.dtype in dtypes
            # the parameter's place holds the direction, which is no matter for half precision
            and (self.turn is None or (self.whole and self.param.dtype == torch.float32))
            # a kernel trusts its pointers; where sizes differ the plain way raises
            and self.grad.shape == self.param.shape
            and all(leaf.dim() == 0 or leaf.shape[-1] == size for leaf in leaves)
            and self.grad.dtype in dtypes
            and all(tensor.device == device for tensor in (self.param, self.grad, *leaves))
            and all(tensor.is_contiguous() for tensor in (self.param, *leaves))
            and self.state["hidden"].dtype in (torch.float32, torch.bfloat16)
            and self.state["hidden"].dtype == self.state["cell"].dtype
            and all(self.state[name].dtype == torch.float32 for name in _FULL)
        )


class FusedStep:
    """A step of `rule` over many pieces at once, in place.

    Attributes:
        dtypes: what it takes as parameter or gradient.

    Args:
        rule: its weights are read at every step; the step works on their device.
    """

    dtypes: Collection[torch.dtype] = (torch.float32,)

    def __init__(self, rule: CoordinateLSTM) -> None:
        self._rule = rule

    def takes(self, piece: Piece) -> bool:
        """Whether this step can work on it."""
        return piece.fits(self._rule.gate_weight.device, self.dtypes)

    def measure(self, pieces: Sequence[Piece]) -> Measured:
        """Take the sums over each piece; nothing changes yet.

        Args:
            pieces: `takes` each, and their `Piece.dtypes` are the same.
        """
        raise NotImplementedError

    def take(self, measured: Measured, sums: Tensor) -> None:
        """Step all pieces.

        Args:
            measured: what `measure` returned.
            sums: what the rule's `cross_tensor_context` tells each of the tensors that they are pieces of,
                (pieces, 18).
        """
        pieces = measured.pieces
        context, longer = contexts(self._rule, pieces, sums)
        turning = _Turning(self._rule, pieces, context, longer)
        try:
            self.step(measured, context)
            turning.finish()
        except BaseException:  # Ctrl-C too: what is in their place by now is no parameter
            turning.restore()
            raise
        # what was written behind autograd's back, so that it refuses an older graph as ever
        torch.autograd.graph.increment_version([piece.param for piece in pieces])

    def step(self, measured: Measured, context: dict[str, Tensor]) -> None:
        """The compiled pass: all of a step but what is turned.

        Args:
            measured: see `take`.
            context: see `contexts`.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Measured:
    """Pieces about to be stepped.

    Attributes:
        pieces: P of them.
        sums: over each piece, (P, 9).
        kept: what the kernel will want again: its tables, and the gradients that they point to.
    """

    pieces: Sequence[Piece]
    sums: Tensor
    kept: tuple[Any, ...]


class _Turning:
    """Pieces whose direction is turned as a whole, after a kernel has gone along it.

    A kernel leaves the direction, the other way round, in their parameter's place: growth, scale,
    and what they were are taken from its table here, rate and decay by `describe`.

    Args:
        rule: whose step it is.
        pieces: all that are stepped.
        context: what `contexts` returned for them; of turning pieces growth and keep become 0, and
            scale 1.
        longer: how much longer their direction is once it is turned, (P,).
    """

    def __init__(
        self,
        rule: CoordinateLSTM,
        pieces: Sequence[Piece],
        context: dict[str, Tensor],
        longer: Tensor,
    ) -> None:
        self._rule = rule
        growth, keep, scale = context["growth"], context["keep"], context["scale"]
        self._groups: dict[tuple[int, ...], list[tuple[Piece, Tensor, Tensor, Tensor]]] = {}
        for i, piece in enumerate(pieces):
            if piece.turn is not None:
                along = scale[i] * longer[i]
                kept = piece, piece.param.detach().clone(), growth[i].clone(), along
                self._groups.setdefault(tuple(piece.param.shape), []).append(kept)
                growth[i].zero_()
                keep[i].zero_()
                scale[i].fill_(1)

    def finish(self) -> None:
        """Turn the directions, all of a shape at once, and go there; grow and decay."""
        for shape, kept in self._groups.items():
            pieces, before, growth, along = zip(*kept)
            start = torch.stack(before)  # (B, R, C)
            live = torch.stack([piece.state["v"] for piece in pieces]).view(-1, *shape) > 0
            finite = torch.stack([piece.grad for piece in pieces]).isfinite()
            left = torch.stack([piece.param.detach() for piece in pieces])
            turned = self._rule.transform_matrix(torch.where(live & finite, left, 0))
            grown, far = (
                torch.stack([piece.lr * each for piece, each in zip(pieces, values)]).view(-1, 1, 1)
                for values in (growth, along)
            )
            change = torch.where(live, grown * start + far * turned, 0)
            decays = [_decay(self._rule, piece) for piece in pieces]
            if any(decays):
                change -= torch.stack([d * old for d, old in zip(decays, before)])
            end = torch.where(finite, start + change, start)
            torch._foreach_copy_([piece.param.detach() for piece in pieces], list(end.unbind()))

    def restore(self) -> None:
        """Put back what was there before the step."""
        for kept in self._groups.values():
            for piece, before, *_ in kept:
                piece.param.detach().copy_(before)


def _decay(rule: CoordinateLSTM, piece: Piece) -> float:
    return piece.lr * rule.step_size * piece.weight_decay


def with_matrices(sums: Tensor, pieces: Sequence[Piece]) -> Tensor:
    """Put the last of `rnnopt.rules.features.tensor_statistics` beside those taken; (P, 8) -> (P, 9)."""
    matrix = torch.stack([piece.state["matrix"] for piece in pieces])
    return torch.column_stack([sums, matrix * sums[:, 0]])


def describe(
    rule: CoordinateLSTM, pieces: Sequence[Piece], grads: Sequence[Tensor], layout: np.dtype[Any]
) -> np.ndarray:
    """A kernel's table of tensors, as far as it is known before the sums.

    Args:
        rule: whose step it is.
        pieces: what it steps.
        grads: their gradients, in order.
        layout: with fields pointers, count, rate and decay.
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
    tensors["rate"] = [1.0 if piece.turn else piece.lr for piece in pieces]
    tensors["decay"] = [0.0 if piece.turn else _decay(rule, piece) for piece in pieces]
    return tensors


def contexts(
    rule: CoordinateLSTM, pieces: Sequence[Piece], sums: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """What is common to each tensor's coordinates, by the plain rule's functions; counts the step.

    Args:
        rule: whose step it is.
        pieces: P of them.
        sums: what the rule's `cross_tensor_context` tells the tensors, (P, 18).

    Returns:
        gate_shift (P, 4 H), output_shift (P, 3), and (P,) each: m_debt, v_debt, 1 - beta^t;
        grad_rms, param_rms; scale; growth; keep, see `_Turning`. And (P,) of
        `rnnopt.rules.features.matrix_gain`.
    """
    steps = torch.stack([piece.state["step"] for piece in pieces]).to(sums.dtype) + 1
    peaks = RunningMaxima(
        *(torch.stack([piece.state[name] for piece in pieces]) for name in RunningMaxima._fields)
    )
    grad_rms, param_rms = root_mean_squares(sums)
    gates, outputs, growth = rule.shifts(sums, peaks, steps)
    if any(piece.turn for piece in pieces):
        to_turn = matrix_output_shifts(outputs, steps)
        rows = zip(pieces, outputs, to_turn)
        outputs = torch.stack([new if piece.turn else old for piece, old, new in rows])
    after = peaks.after(sums, steps)
    scale = rule.initial_decrease * step_scale(sums, peaks, after, rule.orthogonalize)
    # all at once: on a GPU every small operation costs as much as a large one
    torch._foreach_copy_([piece.state["step"] for piece in pieces], steps.unbind())
    for name, values in after._asdict().items():
        torch._foreach_copy_([piece.state[name] for piece in pieces], values.unbind())
    context = {
        "gate_shift": gates,
        "output_shift": outputs,
        "m_debt": -torch.expm1(steps * math.log(rule.betas[0])),
        "v_debt": -torch.expm1(steps * math.log(rule.betas[1])),
        "grad_rms": grad_rms,
        "param_rms": param_rms,
        "scale": scale,
        "growth": growth,
        "keep": torch.ones_like(growth),
    }
    return context, matrix_gain(after.radial_gate_max, steps)
