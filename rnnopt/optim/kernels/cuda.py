"""The fused step on a GPU, see cell_triton.py.

Two launches for the statistics of all tensors and one for the step, whatever their number. The
step reads and writes every number of state once. The host computes nothing and waits for nothing.

`rnnopt.optim.kernels.choice` imports this module, and with it Triton, when it is first needed.

Shapes: P tensors, H hidden units, F coordinate features.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnnopt.optim.kernels.cell_triton import (
    TYPES,
    added_statistics,
    partial_statistics,
    step_block,
)
from rnnopt.optim.kernels.fused import (
    KERNEL_STATISTICS,
    FusedStep,
    Measured,
    Piece,
    append_matrix_statistic,
    tensor_table,
)
from rnnopt.rules.features import COORDINATE_FEATURES, RATIO_FLOOR
from rnnopt.rules.lstm import GRADIENT_BOUND, LOG_FACTOR_BOUND, OUTPUTS, CoordinateLSTM

# Per block of coordinates: four warps hide each other's latency, and four or more such blocks fit a
# multiprocessor.
_WARPS = 4
_THREADS = 32 * _WARPS
# Registers of a thread for the cell's inputs, H + F for each of its coordinates; everything else
# takes about as many. The coordinates of a thread share each load of a weight.
_INPUT_REGISTERS = 64
MAX_UNITS = 64
_OPTIONS: dict[str, Any] = {
    "num_warps": _WARPS,
    # Triton's default changes with its version; without it every product is rounded, at twice the
    # instructions
    "enable_fp_fusion": True,
    # left to itself the compiler takes 168 for H = 8, and three blocks fit instead of four
    **({} if torch.version.hip else {"maxnreg": 128}),
}
# Coordinates per block of the statistics.
_STATISTICS_BLOCK = 2048

# One tensor, 64 bytes: eight words, of which the last holds two float32.
LAYOUT = np.dtype(
    [("pointers", np.int64, 6), ("count", np.int64), ("rate", np.float32), ("decay", np.float32)]
)


class TritonStep(FusedStep):
    """The fused step on a GPU.

    Half-precision parameters and gradients are read as float32. Parameters are rounded once, when
    they are written, as by the plain rule.

    Args:
        rule: see `FusedStep`.
    """

    dtypes: Collection[torch.dtype] = tuple(TYPES)

    def measure(self, pieces: Sequence[Piece]) -> Measured:
        """See `FusedStep.measure`."""
        rule, device = self._rule, self._rule.gate_weight.device
        grads = [piece.grad.contiguous() for piece in pieces]  # kept alive to the last launch
        counts = tuple(piece.param.numel() for piece in pieces)
        types = [TYPES[dtype] for dtype in pieces[0].dtypes]
        with _current(device):
            # Made at every step, because gradients move and rates change, and a check whether any
            # did would take as long. 64 bytes per tensor from pinned memory, which torch keeps
            # until the copy is done, so the host does not wait.
            table = _to_device(tensor_table(rule, pieces, grads, LAYOUT).view(np.int64), device)
            statistics = append_matrix_statistic(_statistics(table, counts, types), pieces)
            return Measured(pieces, statistics, (table, counts, types, grads))

    def launch(self, measured: Measured, constants: dict[str, Tensor], part: slice) -> None:
        """See `FusedStep.launch`."""
        rule, (table, counts, types, _) = self._rule, measured.kept
        with _current(rule.gate_weight.device):
            columns = torch.column_stack(tuple(constants.values()))
            _step(rule, table, columns, counts, types)


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make it CUDA's current device: Triton launches there."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def problem(hidden_size: int, device: torch.device) -> str | None:
    """Why there is no kernel for this many hidden units on this device; None if there is one.

    Compiles the kernel and steps one coordinate with it, so that an old GPU, an old Triton or a
    missing C compiler, which Triton needs, is found here and not during a training run.
    """
    if hidden_size > MAX_UNITS:
        return f"hidden_size={hidden_size}, and the kernel for GPUs takes {MAX_UNITS} at most"
    with torch.random.fork_rng(devices=[]):
        rule = CoordinateLSTM(hidden_size, context_size=1).to(device, torch.float32)
    param = torch.ones(1, device=device, dtype=torch.float32)
    state = rule.init_state(param)
    try:
        with torch.no_grad():
            step = TritonStep(rule)
            measured = step.measure([Piece(param, param.clone(), state, 1.0, 0.0)])
            step.step(measured, rule.cross_tensor_context(measured.statistics))
    except Exception as error:  # Triton's tool chain raises many undocumented classes
        lines = str(error).strip().splitlines()
        return lines[0] if lines else type(error).__name__
    return None


def _statistics(table: Tensor, counts: tuple[int, ...], types: Sequence[Any]) -> Tensor:
    """All but the last of `rnnopt.rules.features.tensor_statistics`, (P, 8); deterministic."""
    blocks, starts = _blocks(counts, _STATISTICS_BLOCK, table.device)
    partial = torch.empty(
        len(blocks), KERNEL_STATISTICS - 1, device=table.device, dtype=torch.float32
    )
    if len(blocks):
        partial_statistics[(len(blocks),)](
            table, blocks, partial, GRADIENT_BOUND,
            BLOCK=_STATISTICS_BLOCK, PARAM=types[0], GRAD=types[1], **_OPTIONS,
        )  # fmt: skip
    statistics = torch.empty(
        len(counts), KERNEL_STATISTICS, device=table.device, dtype=torch.float32
    )
    added_statistics[(len(counts),)](table, starts, partial, statistics, **_OPTIONS)
    return statistics


def _step(
    rule: CoordinateLSTM,
    table: Tensor,
    constants: Tensor,
    counts: tuple[int, ...],
    types: Sequence[Any],
) -> None:
    block = _THREADS * coordinates_per_thread(rule.hidden_size)
    blocks, _ = _blocks(counts, block, table.device)
    if not len(blocks):
        return
    step_block[(len(blocks),)](
        table, blocks, constants,
        rule.gate_weight.detach().contiguous(), rule.output_weight.detach().contiguous(),
        1 - rule.betas[0], rule.betas[1], 1 - rule.betas[1], rule.eps,
        GRADIENT_BOUND, LOG_FACTOR_BOUND, RATIO_FLOOR**2,
        HIDDEN=rule.hidden_size, FEATURES=COORDINATE_FEATURES, OUTPUTS=OUTPUTS,
        BLOCK=block, PARAM=types[0], GRAD=types[1], STATE=types[2], **_OPTIONS,
    )  # fmt: skip


def coordinates_per_thread(hidden_size: int) -> int:
    """4, 2 or 1: as many as keep the inputs of the cell in registers."""
    inputs = COORDINATE_FEATURES + hidden_size
    return next((n for n in (4, 2) if n * inputs <= _INPUT_REGISTERS), 1)


@functools.lru_cache(maxsize=32)
def _blocks(counts: tuple[int, ...], size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Every tensor cut into blocks of `size` coordinates.

    Returns:
        For each block the index of its tensor and its index there, (blocks, 2); for each tensor the
        index of its first block, and the number of all blocks, (P + 1,).
    """
    block_counts = -(-np.array(counts, dtype=np.int64) // size)
    starts = np.concatenate([[0], np.cumsum(block_counts)])
    tensors = np.repeat(np.arange(len(counts)), block_counts)
    blocks = np.stack([tensors, np.arange(starts[-1]) - starts[tensors]], axis=1)
    return _to_device(blocks.astype(np.int32), device), _to_device(starts.astype(np.int32), device)


def _to_device(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
