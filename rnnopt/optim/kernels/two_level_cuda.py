"""The fused step of `TwoLevelLSTM` on a GPU, see two_level_triton.py.

Two launches for the statistics of all tensors, and two for the step and its slopes, whatever the
number of tensors. The host reads nothing from the GPU and waits for nothing.

`rnnopt.optim.kernels.choice` imports this module, and with it Triton, when it is first needed.

Shapes: P tensors, H units of the coordinate-wise LSTM, M statistics, K numbers of context.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnnopt.optim.kernels.fused import Around, FusedStep, Leaves, Measured, Piece, unwatched
from rnnopt.optim.kernels.guard_triton import TritonGuard
from rnnopt.optim.kernels.launch import (
    OPTIONS,
    WARPS,
    blocks_of,
    current,
    sums_of_blocks,
    to_device,
)
from rnnopt.optim.kernels.narrow import narrow_matrices
from rnnopt.optim.kernels.two_level import (
    context_of,
    keep_leaves,
    leaf_names,
    numbers_before_step,
)
from rnnopt.optim.kernels.two_level_triton import (
    SUMS,
    TYPES,
    measure_block,
    step_block,
)
from rnnopt.rules.tensor_features import Sums
from rnnopt.rules.two_level import BETAS, BOUND, Decisions, TwoLevelLSTM

MAX_UNITS = 32
_LANES = 32 * WARPS
# With so many units at most, a thread has two coordinates in the first pass, which share each load
# of a weight. The inputs of more would not fit the registers.
_PAIRED_UNITS = 4
_TILES = 8  # of a block in the first pass: its 15 sums across threads take as long as half a tile
_STEP_TILE = 4 * _LANES
_CONSTANTS: dict[str, Any] = {
    "BETA1": BETAS[0], "GAIN1": 1 - BETAS[0], "BETA2": BETAS[1], "GAIN2": 1 - BETAS[1],
}  # fmt: skip

# A row of the table of two_level_triton.py.
LAYOUT = np.dtype(
    [("pointers", np.int64, 8), ("count", np.int64), ("lr", np.float32), ("decay", np.float32)]
)
_EXTRA = 7  # place of its pointer


class TritonStep(FusedStep):
    """The fused step of `TwoLevelLSTM` on a GPU.

    Half-precision parameters and gradients are read as float32. Parameters are rounded once, when
    they are written, as by the plain rule.

    Args:
        two_level: the rule; the step runs on its device.
    """

    guard: TritonGuard

    def __init__(self, two_level: TwoLevelLSTM) -> None:
        self._two_level = two_level
        # kept, since looking up a module's weight takes longer than all checks of a tensor
        self._units, self._device = two_level.coordinate_units, two_level.output.weight.device
        self.guard = TritonGuard(self._device)

    def supports(self, piece: Piece) -> bool:
        """See `FusedStep.supports`."""
        param, grad, state, device = piece.param, piece.grad, piece.state, self._device
        m, v, change, cell = (state[name] for name in ("m", "v", "change", "cell"))
        size = (param.numel(),)
        for leaf in (m, v, change, cell):
            if leaf.dtype != torch.float32 or leaf.device != device or not leaf.is_contiguous():
                return False
        return (
            # directions of a matrix are computed for it as a whole
            (piece.transform is None or piece.whole)
            # a kernel trusts its pointers; the plain rule raises where sizes differ
            and grad.shape == param.shape
            and m.shape == v.shape == change.shape == size
            and cell.shape in ((self._units, *size), (0, *size))
            and param.dtype in TYPES
            and grad.dtype in TYPES
            and param.device == device
            and grad.device == device
            and param.is_contiguous()
        )

    def measure(self, pieces: Sequence[Piece], leaves: Leaves | None = None) -> Measured:
        """See `FusedStep.measure`; the statistics are `Sums`. The coordinate-wise LSTM advances."""
        rule, device = self._two_level, self._device
        grads = [piece.grad.contiguous() for piece in pieces]  # kept alive to the last launch
        counts = tuple(piece.param.numel() for piece in pieces)
        types = [TYPES[dtype] for dtype in pieces[0].dtypes]
        leaves = leaves or Leaves()
        with current(device):
            matrix, known = leaves.of([piece.state for piece in pieces], leaf_names(rule))
            sizes = [
                count if piece.state["cell"].numel() else 0 for piece, count in zip(pieces, counts)
            ]
            directions = torch.empty(sum(sizes), device=device, dtype=torch.float32)
            # Made at every step, because gradients move and rates change, and a check whether any
            # did would take as long. 80 bytes per tensor.
            rows = _table(rule, pieces, grads, directions, sizes).view(np.int64)
            table = to_device(rows.reshape(len(pieces), -1), device)
            numbers = numbers_before_step(rule, known)
            shared = torch.column_stack(tuple(numbers.values()))
            sums = _sums(rule, table, shared, counts, types)
            place = Sums._fields.index("slope")
            slopes = known["slope"].unsqueeze(1)
            statistics = torch.cat([sums[:, :place], slopes, sums[:, place:]], 1)
        kept = (matrix, known, table, numbers, counts, types, grads, directions)
        return Measured(pieces, statistics, kept)

    def context(self, measured: Measured) -> Tensor:
        """See `FusedStep.context`."""
        return context_of(self._two_level, measured.statistics, measured.kept[1])

    def step(
        self, measured: Measured, context: Tensor, rows: Sequence[int] = (),
        around: Around = unwatched,
    ) -> None:  # fmt: skip
        """See `FusedStep.step`; the context is (P, K). All pieces are one part."""
        rule, pieces = self._two_level, measured.pieces
        matrix, _, table, numbers, counts, types, grads, _ = measured.kept
        d = Decisions(*context[:, : len(Decisions._fields)].unbind(1))
        with current(table.device):
            extra = _orthogonal_directions(pieces, grads, d)  # alive to the last launch
            if extra:
                pointers = [extra[i].data_ptr() if i in extra else 0 for i in range(len(pieces))]
                table[:, _EXTRA] = to_device(np.array(pointers), table.device)
            decided = (
                numbers["m_correction"], numbers["v_correction"], torch.expm1(d.growth), d.rate,
                d.adam, d.gradient, d.last, d.cell,
            )  # fmt: skip
            with around(rows):
                slopes = _step(rule, table, torch.stack(decided, 1), counts, types)
        keep_leaves(matrix, context, slopes)
        # autograd did not see the writes; this makes it refuse an older graph, as it does otherwise
        torch.autograd.graph.increment_version([piece.param for piece in pieces])


def _orthogonal_directions(
    pieces: Sequence[Piece], grads: Sequence[Tensor], decisions: Decisions
) -> dict[int, Tensor]:
    """What orthogonalised directions add to the step of matrices.

    Returns:
        By the index of the piece (N,) each.
    """
    extra: dict[int, Tensor] = {}
    for matrices in narrow_matrices(pieces):
        like = pieces[matrices.rows[0]].state["m"]
        found = like.new_empty(len(matrices.rows), len(like))
        for place, values in matrices.added(pieces, grads, decisions):
            matrices.wide(found)[..., place].copy_(values)
        extra.update(zip(matrices.rows, found.unbind()))
    return extra


@functools.cache
def problem(units: int, device: torch.device) -> str | None:
    """Why there is no kernel for this many units of a coordinate on this device; None if there is.

    Compiles the kernels and steps one coordinate with them, so that an old GPU, an old Triton or a
    missing C compiler, which Triton needs, is found here and not during a training run.
    """
    if units > MAX_UNITS:
        return f"coordinate_units={units}, and the kernel for GPUs takes {MAX_UNITS} at most"
    with torch.random.fork_rng(devices=[]):
        rule = TwoLevelLSTM(1, units, 1).to(device, torch.float32)
    param = torch.ones(1, device=device, dtype=torch.float32)
    piece = Piece(param, param.clone(), rule.init_state(param), 1.0, 0.0)
    try:
        with torch.no_grad():
            step = TritonStep(rule)
            measured = step.measure([piece])
            step.step(measured, step.context(measured))
            kept = torch.zeros_like(param, dtype=torch.bfloat16)
            for masked in (False, True):
                step.guard.keep([param], [param], [kept], [1.0], masked)
                step.guard.ends([param], [kept], masked)
    except Exception as error:  # Triton's tool chain raises many undocumented classes
        lines = str(error).strip().splitlines()
        return lines[0] if lines else type(error).__name__
    return None


def _table(
    rule: TwoLevelLSTM,
    pieces: Sequence[Piece],
    grads: Sequence[Tensor],
    directions: Tensor,
    sizes: Sequence[int],
) -> np.ndarray:
    """`LAYOUT` for each piece; its directions follow each other, 0 numbers without an LSTM."""
    table = np.zeros(len(pieces), dtype=LAYOUT)
    starts = directions.data_ptr() + directions.element_size() * np.cumsum([0, *sizes])
    table["pointers"] = [
        (
            piece.param.data_ptr(), grad.data_ptr(), state["m"].data_ptr(), state["v"].data_ptr(),
            state["change"].data_ptr(), state["cell"].data_ptr() if size else 0,
            start if size else 0, 0,
        )
        for piece, grad, start, size in zip(pieces, grads, starts.tolist(), sizes)
        for state in [piece.state]
    ]  # fmt: skip
    table["count"] = [piece.param.numel() for piece in pieces]
    table["lr"] = [piece.lr for piece in pieces]
    table["decay"] = [piece.lr * rule.step_size * piece.weight_decay for piece in pieces]
    return table


def _sums(
    rule: TwoLevelLSTM, table: Tensor, shared: Tensor, counts: tuple[int, ...], types: Sequence[Any]
) -> Tensor:
    """The first pass: `Sums` without ``slope``, (P, 15); deterministic."""
    units = rule.coordinate_units
    weights = [shared, shared, shared]
    if units:
        linear = (rule.gates, rule.candidate, rule.coordinate_output)
        weights = [layer.weight.detach().contiguous() for layer in linear]
    paired = units <= _PAIRED_UNITS
    tile = (2 if paired else 1) * _LANES
    # left to itself the compiler takes so many registers that fewer blocks run at once
    limit = {} if torch.version.hip else {"maxnreg": 96 if paired else 128}
    blocks, starts = blocks_of(counts, _TILES * tile, table.device)
    partial = torch.empty(len(blocks), SUMS, device=table.device, dtype=torch.float32)
    if len(blocks):
        measure_block[(len(blocks),)](
            table, blocks, shared, *weights, partial, BOUND, **_CONSTANTS, HIDDEN=units,
            LANES=_LANES, TILE=tile, TILES=_TILES, PARAM=types[0], GRAD=types[1],
            **OPTIONS, **limit,
        )  # fmt: skip
    return sums_of_blocks(partial, starts, len(counts))


def _step(
    rule: TwoLevelLSTM,
    table: Tensor,
    decided: Tensor,
    counts: tuple[int, ...],
    types: Sequence[Any],
) -> Tensor:
    """The second pass: the slopes, the sums of update times gradient, (P,); deterministic."""
    blocks, starts = blocks_of(counts, _STEP_TILE, table.device)
    slopes = torch.empty(len(blocks), 1, device=table.device, dtype=torch.float32)
    if len(blocks):
        step_block[(len(blocks),)](
            table, blocks, decided, slopes, BOUND, **_CONSTANTS, HIDDEN=rule.coordinate_units,
            TILE=_STEP_TILE, PARAM=types[0], GRAD=types[1], **OPTIONS,
        )  # fmt: skip
    return sums_of_blocks(slopes, starts, len(counts)).squeeze(1)
