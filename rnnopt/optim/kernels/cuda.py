"""The step of `CoordinateLSTM` on a GPU: the arithmetic of cell.c in Triton.

Two launches for the sums over all tensors and one for the step, whatever their number. The step
reads and writes every number of state once; in between it stays in registers. The host computes
nothing and waits for nothing.

Shapes: P tensors, N coordinates of one of them, H hidden units, F coordinate features. States are
feature-major (H, N), matrices row-major. `kernels.py` imports this module, and with it Triton, when
it is first needed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from rnnopt.optim.kernels.fused import TAKEN, FusedStep, Measured, Piece, describe, with_matrices
from rnnopt.rules.features import COORDINATE_FEATURES, RATIO_FLOOR
from rnnopt.rules.lstm import GRADIENT_BOUND, LOG_FACTOR_BOUND, OUTPUTS, CoordinateLSTM

# Threads to a block of coordinates: four warps hide each other's waiting, and four or more such
# blocks fit a multiprocessor.
_WARPS = 4
_THREADS = 32 * _WARPS
# Registers of a thread for the cell's inputs, H + F for each of its coordinates; about as many go
# to everything else. More coordinates to a thread share each load of a weight.
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
# Coordinates to a block of the pass that sums.
_SUM_BLOCK = 2048
# Of those blocks, how many are added up at once.
_LANES = tl.constexpr(256)
_MEASURED = tl.constexpr(TAKEN - 1)  # the first sum is N, which is known

# One tensor, 64 bytes: eight words, of which the last holds two float32.
_LAYOUT = np.dtype(
    [("pointers", np.int64, 6), ("count", np.int64), ("rate", np.float32), ("decay", np.float32)]
)
_WORDS = tl.constexpr(_LAYOUT.itemsize // 8)
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class TritonStep(FusedStep):
    """The step on a GPU.

    Parameters and gradients in half precision are read as float32, and rounded once when they are
    written, as the plain rule does.

    Args:
        rule: see `FusedStep`.
    """

    dtypes: Collection[torch.dtype] = tuple(_TYPES)

    def measure(self, pieces: Sequence[Piece]) -> Measured:
        """See `FusedStep`."""
        rule, device = self._rule, self._rule.gate_weight.device
        grads = [piece.grad.contiguous() for piece in pieces]  # kept alive to the last launch
        counts = tuple(piece.param.numel() for piece in pieces)
        types = [_TYPES[dtype] for dtype in pieces[0].dtypes]
        with _current(device):
            # Made anew at every step, for gradients move and rates change; to find out whether
            # anything did would take as long. 64 bytes a tensor, from pinned memory, which torch
            # keeps until the copy is done: nobody waits.
            table = _to_device(describe(rule, pieces, grads, _LAYOUT).view(np.int64), device)
            sums = with_matrices(_sums(table, counts, types), pieces)
            return Measured(pieces, sums, (table, counts, types, grads))

    def step(self, measured: Measured, context: dict[str, Tensor]) -> None:
        """See `FusedStep`."""
        rule, (table, counts, types, _) = self._rule, measured.kept
        with _current(rule.gate_weight.device):
            columns = torch.column_stack(tuple(context.values()))
            _step(rule, table, columns, counts, types)


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make it CUDA's current device: Triton launches there."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def problem(hidden_size: int, device: torch.device) -> str | None:
    """Why there is no kernel for this many hidden units on this device; None if there is one.

    It is compiled and tried on one coordinate: an old GPU, an old Triton or the lack of the C
    compiler that Triton wants come out here and not in the middle of a training run.
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
            step.take(measured, rule.cross_tensor_context(measured.sums))
    except Exception as error:  # a kind for every part of Triton's tool chain, none documented
        lines = str(error).strip().splitlines()
        return lines[0] if lines else type(error).__name__
    return None


def _sums(table: Tensor, counts: tuple[int, ...], types: Sequence[Any]) -> Tensor:
    """All but the last of `rnnopt.rules.features.tensor_statistics`: (P, 8), the same bits at every call."""
    blocks, starts = _blocks(counts, _SUM_BLOCK, table.device)
    partial = torch.empty(len(blocks), _MEASURED.value, device=table.device, dtype=torch.float32)
    if len(blocks):
        _partial_sums[(len(blocks),)](
            table, blocks, partial, GRADIENT_BOUND,
            BLOCK=_SUM_BLOCK, PARAM=types[0], GRAD=types[1], **_OPTIONS,
        )  # fmt: skip
    sums = torch.empty(len(counts), TAKEN, device=table.device, dtype=torch.float32)
    _added_sums[(len(counts),)](table, starts, partial, sums, **_OPTIONS)
    return sums


def _step(
    rule: CoordinateLSTM,
    table: Tensor,
    context: Tensor,
    counts: tuple[int, ...],
    types: Sequence[Any],
) -> None:
    block = _THREADS * coordinates_per_thread(rule.hidden_size)
    blocks, _ = _blocks(counts, block, table.device)
    if not len(blocks):
        return
    _step_block[(len(blocks),)](
        table, blocks, context,
        rule.gate_weight.detach().contiguous(), rule.output_weight.detach().contiguous(),
        1 - rule.betas[0], rule.betas[1], 1 - rule.betas[1], rule.eps,
        GRADIENT_BOUND, LOG_FACTOR_BOUND, RATIO_FLOOR**2,
        HIDDEN=rule.hidden_size, FEATURES=COORDINATE_FEATURES, OUTPUTS=OUTPUTS,
        BLOCK=block, PARAM=types[0], GRAD=types[1], MEMORY=types[2], **_OPTIONS,
    )  # fmt: skip


def coordinates_per_thread(hidden_size: int) -> int:
    """4, 2 or 1: as many as leave the inputs of the cell in registers."""
    inputs = COORDINATE_FEATURES + hidden_size
    return next((n for n in (4, 2) if n * inputs <= _INPUT_REGISTERS), 1)


@functools.lru_cache(maxsize=32)
def _blocks(counts: tuple[int, ...], size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Every tensor cut into blocks of `size` coordinates.

    Returns:
        For each block its tensor and its number there, (blocks, 2); for each tensor the number of
        its first block, and at the end that of all blocks, (P + 1,).
    """
    numbers = -(-np.array(counts, dtype=np.int64) // size)
    starts = np.concatenate([[0], np.cumsum(numbers)])
    tensors = np.repeat(np.arange(len(counts)), numbers)
    blocks = np.stack([tensors, np.arange(starts[-1]) - starts[tensors]], axis=1)
    return _to_device(blocks.astype(np.int32), device), _to_device(starts.astype(np.int32), device)


def _to_device(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


# -- kernels


@triton.jit
def _bounded(grads, at, mask, bound):
    """The gradient as the rule gets it, and where it is finite (nowhere outside of mask)."""
    raw = tl.load(grads + at, mask=mask, other=0.0).to(tl.float32)
    finite = mask & (tl.abs(raw) < float("inf"))
    return tl.where(finite, tl.minimum(tl.maximum(raw, -bound), bound), 0.0), finite


@triton.jit
def _partial_sums(
    table, blocks, partial, bound,
    BLOCK: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    row = table + _WORDS * tl.load(blocks + 2 * number).to(tl.int64)
    at = tl.load(blocks + 2 * number + 1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < tl.load(row + 6)
    params = tl.load(row).to(tl.pointer_type(PARAM))
    grads = tl.load(row + 1).to(tl.pointer_type(GRAD))
    ms = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    g, _ = _bounded(grads, at, mask, bound)
    p = tl.load(params + at, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(ms + at, mask=mask, other=0.0)
    out = partial + _MEASURED * number.to(tl.int64)
    tl.store(out, tl.sum(p * p, axis=0))
    tl.store(out + 1, tl.sum(g * g, axis=0))
    tl.store(out + 2, tl.sum((g != 0).to(tl.float32), axis=0))
    tl.store(out + 3, tl.sum(m * m, axis=0))
    tl.store(out + 4, tl.sum(m * g, axis=0))
    tl.store(out + 5, tl.sum(tl.abs(g), axis=0))
    tl.store(out + 6, tl.sum(p * g, axis=0))


@triton.jit
def _added_sums(table, starts, partial, sums):
    """One program to a tensor, so that the order of addition never changes."""
    number = tl.program_id(0)
    lane, column = tl.arange(0, _LANES)[:, None], tl.arange(0, 8)[None, :]
    last = tl.load(starts + number + 1)
    total = tl.zeros((_LANES, 8), dtype=tl.float64)
    for first in range(tl.load(starts + number), last, _LANES):
        at = (first + lane).to(tl.int64)
        mask = (at < last) & (column < _MEASURED)
        total += tl.load(partial + _MEASURED * at + column, mask=mask, other=0.0)
    out, column = sums + number * (_MEASURED + 1), tl.arange(0, 8)
    tl.store(out, tl.load(table + _WORDS * number + 6).to(tl.float32))
    tl.store(out + 1 + column, tl.sum(total, axis=0).to(tl.float32), mask=column < _MEASURED)


@triton.jit
def _exp(x):
    """Above the bound what it is used for is constant to 12 digits, and a product of three does
    not overflow. NaN stays NaN."""
    return tl.exp(tl.minimum(x, 28.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _arsinh(x):
    size = tl.abs(x)
    value = tl.log(size + tl.sqrt(size * size + 1.0))
    return tl.where(x < 0, -value, value)


@triton.jit
def _gate(inputs, weights, shift, INPUTS: tl.constexpr):
    total = tl.load(shift) + tl.load(weights) * inputs[0]
    for j in tl.static_range(1, INPUTS):
        total += tl.load(weights + j) * inputs[j]
    return total


@triton.jit
def _cell(
    inputs, row, context, gate_weight, output_weight, at, mask, finite, live,
    HIDDEN: tl.constexpr, FEATURES: tl.constexpr, MEMORY: tl.constexpr,
):  # fmt: skip
    """`CoordinateLSTM._cell` for a block, from its features to s, k (here `more`) and a; moves the
    memory."""
    INPUTS: tl.constexpr = FEATURES + HIDDEN
    count = tl.load(row + 6)
    hidden = tl.load(row + 4).to(tl.pointer_type(MEMORY)) + at
    cell = tl.load(row + 5).to(tl.pointer_type(MEMORY)) + at
    for k in tl.static_range(HIDDEN):
        x = tl.load(hidden + k * count, mask=mask, other=0.0).to(tl.float32)
        inputs = inputs + (x,)  # noqa: RUF005 - Triton knows no unpacking
    s = tl.load(context + 4 * HIDDEN) + tl.zeros_like(inputs[0])
    more = tl.load(context + 4 * HIDDEN + 1) + tl.zeros_like(s)
    a = tl.load(context + 4 * HIDDEN + 2) + tl.zeros_like(s)
    for k in range(HIDDEN):  # a loop, or the code would not fit the cache for instructions
        old = tl.load(cell + k * count, mask=mask, other=0.0).to(tl.float32)
        weights, shift = gate_weight + k * INPUTS, context + k
        # over common denominators, as in cell.c: two divisions where there would be five
        i = 1.0 + _exp(-_gate(inputs, weights, shift, INPUTS))
        weights, shift = weights + HIDDEN * INPUTS, shift + HIDDEN
        f = 1.0 + _exp(-_gate(inputs, weights, shift, INPUTS))
        weights, shift = weights + HIDDEN * INPUTS, shift + HIDDEN
        e = _exp(-2.0 * _gate(inputs, weights, shift, INPUTS))
        weights, shift = weights + HIDDEN * INPUTS, shift + HIDDEN
        o = 1.0 + _exp(-_gate(inputs, weights, shift, INPUTS))
        ig = i * (1.0 + e)
        c = tl.where(live, (old * ig + (1.0 - e) * f) / (f * ig), 0.0)
        e = _exp(-2.0 * c)
        h = (1.0 - e) / (o * (1.0 + e))
        s += tl.load(output_weight + k) * h
        more += tl.load(output_weight + HIDDEN + k) * h
        a += tl.load(output_weight + 2 * HIDDEN + k) * h
        tl.store(cell + k * count, c.to(MEMORY), mask=finite)
        tl.store(hidden + k * count, h.to(MEMORY), mask=finite)
    return s, more, a


@triton.jit
def _step_live(
    row, context, gate_weight, output_weight, at, mask, finite, params, g, v,
    m_gain, eps, log_bound, ratio_floor, decay,
    HIDDEN: tl.constexpr, FEATURES: tl.constexpr, OUTPUTS: tl.constexpr,
    PARAM: tl.constexpr, MEMORY: tl.constexpr,
):  # fmt: skip
    """The step of a block in which some coordinate has had a gradient; v is the next one."""
    ms = tl.load(row + 2).to(tl.pointer_type(tl.float32)) + at
    m = tl.load(ms, mask=mask, other=0.0)
    p = tl.load(params, mask=mask, other=0.0).to(tl.float32)
    m += m_gain * (g - m)
    tl.store(ms, m, mask=finite)
    common = context + 4 * HIDDEN + OUTPUTS  # m_debt, v_debt, RMS of g and p, scale, growth, keep
    live = v > 0
    scale = tl.sqrt(v / tl.load(common + 1)) + eps
    adam = m / tl.load(common) / scale
    relative = g / tl.load(common + 2)
    log_ratio = tl.log(relative * relative + ratio_floor) / 6.0
    relative_param = _arsinh(p / tl.load(common + 3))
    s, more, a = _cell(
        (adam, g / scale, _arsinh(relative), log_ratio, relative_param), row, context,
        gate_weight, output_weight, at, mask, finite, live, HIDDEN, FEATURES, MEMORY,
    )  # fmt: skip
    e = _exp(-2.0 / log_bound * s)
    factor = tl.exp(log_bound * (1.0 - e) / (1.0 + e))
    direction = (1.0 + more) * adam + a * relative
    rate = tl.load((row + 7).to(tl.pointer_type(tl.float32)))
    grown = tl.where(live, tl.load(common + 5) * p, 0.0)
    change = rate * (grown - tl.load(common + 4) * factor * direction) - decay * p
    tl.store(params, (tl.load(common + 6) * p + change).to(PARAM), mask=finite)


@triton.jit
def _step_block(
    table, blocks, context, gate_weight, output_weight,
    m_gain, v_keep, v_gain, eps, grad_bound, log_bound, ratio_floor,
    HIDDEN: tl.constexpr, FEATURES: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MEMORY: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    tensor = tl.load(blocks + 2 * number).to(tl.int64)
    row = table + _WORDS * tensor
    at = tl.load(blocks + 2 * number + 1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < tl.load(row + 6)
    grads = tl.load(row + 1).to(tl.pointer_type(GRAD))
    vs = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    g, finite = _bounded(grads, at, mask, grad_bound)
    v = tl.load(vs + at, mask=mask, other=0.0)
    params = tl.load(row).to(tl.pointer_type(PARAM)) + at
    decay = tl.load((row + 7).to(tl.pointer_type(tl.float32)) + 1)
    if tl.max(((g != 0) | (v != 0)).to(tl.int32), axis=0) > 0:
        v = v_keep * v + v_gain * (g * g)
        tl.store(vs + at, v, mask=finite)
        _step_live(
            row, context + (4 * HIDDEN + OUTPUTS + 7) * tensor, gate_weight, output_weight,
            at, mask, finite, params, g, v,
            m_gain, eps, log_bound, ratio_floor, decay,
            HIDDEN, FEATURES, OUTPUTS, PARAM, MEMORY,
        )  # fmt: skip
    elif decay != 0:  # never had a gradient: no update, no memory
        p = tl.load(params, mask=mask, other=0.0).to(tl.float32)
        tl.store(params, (p - decay * p).to(PARAM), mask=finite)
