"""The fused step of `TwoLevelLSTM` on a CPU, see two_level.c.

Shapes: P pieces, N coordinates of one, H units of the coordinate-wise LSTM, K numbers of context.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rnnopt.optim.kernels.cpu import blocks_of, load, share
from rnnopt.optim.kernels.fused import (
    Around,
    FusedStep,
    Leaves,
    Measured,
    Piece,
    parts_by_size,
    unwatched,
)
from rnnopt.optim.kernels.narrow import narrow_matrices
from rnnopt.rules.protocol import State
from rnnopt.rules.tensor_features import FLOOR, Sums
from rnnopt.rules.two_level import BETAS, BOUND, Decisions, TwoLevelLSTM

SOURCE = Path(__file__).with_name("two_level.c")
# Those that two_level.c adds up, in its order. The other one, `slope`, is a leaf of the state.
ADDED = [i for i, name in enumerate(Sums._fields) if name != "slope"]
_COORDINATE_WISE = ("m", "v", "change", "cell")
_POINTERS = ("param", "grad", *_COORDINATE_WISE, "direction")
_NUMBERS = (
    "m_correction", "v_correction", "last_rate", "begun", "last_rms", "growth", "rate", "adam",
    "gradient", "last", "of_cell", "lr", "decay",
)  # fmt: skip


class TwoLevelStep(FusedStep):
    """The fused step of `TwoLevelLSTM`.

    Args:
        two_level: the rule.
        library: the result of `build_two_level` for its units.
    """

    def __init__(self, two_level: TwoLevelLSTM, library: ctypes.CDLL) -> None:
        self._two_level, self._library = two_level, library
        self._layout = _tensor_layout(two_level.coordinate_units)

    def supports(self, piece: Piece) -> bool:
        """See `FusedStep.supports`."""
        rule, size = self._two_level, piece.param.numel()
        leaves = [piece.state[name] for name in (*_COORDINATE_WISE, *leaf_names(rule))]
        tensors = (piece.param, piece.grad, *leaves)
        return (
            # directions of a matrix are computed for it as a whole
            (piece.transform is None or piece.whole)
            # a kernel trusts its pointers; the plain rule raises where sizes differ
            and piece.grad.shape == piece.param.shape
            and all(piece.state[name].shape == (size,) for name in ("m", "v", "change"))
            and piece.state["cell"].shape in ((0, size), (rule.coordinate_units, size))
            and all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)
            and all(x.is_contiguous() for x in (piece.param, *leaves))
        )

    def measure(self, pieces: Sequence[Piece], leaves: Leaves | None = None) -> Measured:
        """See `FusedStep.measure`; the statistics are `Sums`. The coordinate-wise LSTM advances."""
        leaves = leaves or Leaves()
        shared = leaves.of([piece.state for piece in pieces], leaf_names(self._two_level))
        grads = [piece.grad.contiguous() for piece in pieces]  # kept alive until the step is done
        directions = [
            torch.empty(piece.param.numel() if len(piece.state["cell"]) else 0) for piece in pieces
        ]
        rule, tensors = self._rule_record(), self._table(pieces, grads, directions, shared[1])
        blocks = blocks_of(tuple(piece.param.numel() for piece in pieces))
        partial = np.zeros((len(blocks), len(ADDED)))
        pointers = [array.ctypes.data for array in (rule, tensors, blocks)]
        share(
            lambda first, last: self._library.rnnopt_statistics(
                *pointers, first, last, partial.ctypes.data
            ),
            blocks,
        )
        sums = torch.zeros(len(pieces), len(ADDED), dtype=torch.float64)
        sums.index_add_(0, torch.from_numpy(blocks["tensor"].copy()), torch.from_numpy(partial))
        statistics = torch.zeros(len(pieces), len(Sums._fields))
        statistics[:, ADDED] = sums.float()
        statistics[:, Sums._fields.index("slope")] = shared[1]["slope"]
        kept = (rule, tensors, blocks, grads, directions)
        return Measured(pieces, statistics, (*shared, *kept))

    def context(self, measured: Measured) -> Tensor:
        """See `FusedStep.context`."""
        return context_of(self._two_level, measured.statistics, measured.kept[1])

    def step(
        self, measured: Measured, context: Tensor, rows: Sequence[int] = (),
        around: Around = unwatched,
    ) -> None:  # fmt: skip
        """See `FusedStep.step`; the context is (P, K)."""
        pieces, (matrix, _, *kept) = measured.pieces, measured.kept
        rule, tensors, blocks, grads, directions = kept
        decisions = Decisions(*context[:, : len(Decisions._fields)].unbind(1))
        tensors["growth"] = torch.expm1(decisions.growth).numpy()
        for name in ("rate", "adam", "gradient", "last"):
            tensors[name] = getattr(decisions, name).numpy()
        tensors["of_cell"] = decisions.cell.numpy()
        for matrices in narrow_matrices(pieces):
            if not matrices.units:
                matrices.added_to_last(pieces, grads, decisions)
                tensors["last"][matrices.rows] = 1
                continue
            own = [directions[i] for i in matrices.rows]
            torch._foreach_mul_(own, tensors["of_cell"][matrices.rows].tolist())
            tensors["of_cell"][matrices.rows] = 1
            wide = [matrices.wide(direction) for direction in own]
            for place, values in matrices.added(pieces, grads, decisions):
                torch._foreach_add_([matrix[:, place] for matrix in wide], values.unbind())
        slopes = np.zeros(len(blocks))
        pointers = [array.ctypes.data for array in (rule, tensors, blocks, slopes)]
        for part in parts_by_size(pieces):
            first, last = np.searchsorted(blocks["tensor"], [part.start, part.stop]).tolist()

            def step_blocks(begin: int, end: int, first: int = first) -> None:
                places = (first + begin, first + end)
                self._library.rnnopt_step(*pointers[:3], *places, pointers[3])

            with around(rows[part]):
                share(step_blocks, blocks[first:last])
        sums = torch.zeros(len(pieces), dtype=torch.float64)
        sums.index_add_(0, torch.from_numpy(blocks["tensor"].copy()), torch.from_numpy(slopes))
        keep_leaves(matrix, context, sums.float())
        # autograd did not see the writes; this makes it refuse an older graph, as it does otherwise
        torch.autograd.graph.increment_version([piece.param for piece in pieces])

    def _table(
        self,
        pieces: Sequence[Piece],
        grads: Sequence[Tensor],
        directions: Sequence[Tensor],
        leaves: State,
    ) -> np.ndarray:
        """`Tensor` of two_level.c for each piece, without what depends on the context."""
        rule, tensors = self._two_level, np.zeros(len(pieces), dtype=self._layout)
        tensors["pointers"] = [
            [
                piece.param.data_ptr(), grad.data_ptr(),
                *(piece.state[name].data_ptr() for name in ("m", "v", "change")),
                piece.state["cell"].data_ptr() if len(piece.state["cell"]) else 0,
                direction.data_ptr(),
            ]
            for piece, grad, direction in zip(pieces, grads, directions)
        ]  # fmt: skip
        tensors["count"] = [piece.param.numel() for piece in pieces]
        numbers = numbers_before_step(rule, leaves)
        tensors["gate_shift"][:, :-1] = numbers.pop("gate_shift").numpy()
        for name, values in numbers.items():
            tensors[name] = values.numpy()
        tensors["lr"] = [piece.lr for piece in pieces]
        tensors["decay"] = [p.lr * rule.step_size * p.weight_decay for p in pieces]
        return tensors

    def _rule_record(self) -> np.ndarray:
        """`Rule` of two_level.c in float32; each matrix has a row that is not used."""
        rule, padded = self._two_level, []
        signed = 3 + rule.coordinate_units
        rows: list[tuple[Any, int]] = [(None, 5), (None, signed), (None, 1)]
        if rule.coordinate_units:
            rows = [
                (rule.gates.weight, rule.gates.weight.shape[1]),
                (rule.candidate.weight, signed),
                (rule.coordinate_output.weight, 1),
            ]
        for weight, width in rows:
            own = np.zeros(0) if weight is None else weight.detach().numpy().ravel()
            padded += [own, np.zeros(width)]
        constants = (BETAS[0], 1 - BETAS[0], BETAS[1], 1 - BETAS[1], BOUND)
        return np.concatenate([*padded, constants]).astype(np.float32)


def leaf_names(rule: TwoLevelLSTM) -> tuple[str, ...]:
    """The leaves of tensors as a whole; those that a step changes are the first and the last."""
    return ("slope", *rule.leaves, *rule.vectors)


def context_of(rule: TwoLevelLSTM, statistics: Tensor, leaves: State) -> Tensor:
    """`TwoLevelLSTM.cross_tensor_context` of tensors with these leaves, stacked."""
    known = {name: leaves[name] for name in rule.leaves}
    known |= {name: leaves[name].contiguous() for name in rule.vectors}
    return rule.cross_tensor_context(statistics, known)


def numbers_before_step(rule: TwoLevelLSTM, leaves: State) -> dict[str, Tensor]:
    """What all coordinates of a tensor share before the step, on the device of the state.

    Args:
        rule: the rule.
        leaves: of P tensors, stacked.

    Returns:
        gate_shift (P, 3 H), then (P,) each: m_correction and v_correction, 1 / (1 - beta^t);
        last_rate, 1 / (the last rate + FLOOR); begun, 1 after the first step; and last_rms, the
        logarithm of the RMS of the last gradient + FLOOR.
    """
    step, rms, hidden = leaves["step"], leaves["last_rms"], leaves["hidden"].contiguous()
    shift = hidden[:, :0]
    if rule.coordinate_units:
        shift = F.linear(hidden, rule.gates_context.weight, rule.gates.bias).detach()
    return {
        "gate_shift": shift,
        "m_correction": 1 / (1 - BETAS[0] ** (step + 1)),
        "v_correction": 1 / (1 - BETAS[1] ** (step + 1)),
        "last_rate": 1 / (leaves["last_rate"] + FLOOR),
        "begun": (rms > 0).to(rms.dtype),
        "last_rms": torch.log(rms + FLOOR),
    }


def keep_leaves(matrix: Tensor, context: Tensor, slopes: Tensor) -> None:
    """Write the leaves of the state that belong to whole tensors, and the slopes.

    Args:
        matrix: `leaf_names` of P tensors, see `Leaves.of`.
        context: (P, K); `TwoLevelLSTM.leaves_of` are its last columns, in the matrix's order.
        slopes: the sum of update times gradient of each tensor, (P,).
    """
    new = context[:, len(Decisions._fields) :]
    matrix[:, 0] = slopes
    matrix[:, -new.shape[1] :] = new


def build_two_level(units: int) -> ctypes.CDLL:
    """The kernel for this many units of a coordinate; see `rnnopt.optim.kernels.cpu.load`."""
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    types = [pointer, pointer, pointer, number, number, pointer]
    return load(SOURCE, units, _tensor_layout(units).itemsize, types, types)


@functools.cache
def _tensor_layout(units: int) -> np.dtype[Any]:
    """`Tensor` of two_level.c."""
    return np.dtype(
        [
            ("pointers", np.int64, len(_POINTERS)),
            ("count", np.int64),
            ("gate_shift", np.float32, (3 * units + 1,)),
            *((name, np.float32) for name in _NUMBERS),
        ],
        align=True,
    )
