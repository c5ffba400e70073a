"""The step of `CoordinateLSTM` on a GPU, in Triton: the arithmetic of cell.c.

`rnnopt.optim.kernels.cuda` launches these kernels.

Shapes: P tensors, N coordinates of one of them, H hidden units, F coordinate features. The LSTM's
state is feature-major (H, N), matrices are row-major.

A row of `table` is one tensor: six pointers (parameter, gradient, m, v, hidden, cell), N, and a
word that holds rate and decay.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rnnopt.optim.kernels.fused import KERNEL_STATISTICS

# Blocks whose sums are added up at once.
_LANES = tl.constexpr(256)
_COMPUTED = tl.constexpr(KERNEL_STATISTICS - 1)  # the first statistic is N, which is known
_WORDS = tl.constexpr(8)  # in a row of the table
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _bounded(grads, at, mask, bound):
    """The bounded gradient, and where it is finite and inside of mask."""
    raw = tl.load(grads + at, mask=mask, other=0.0).to(tl.float32)
    finite = mask & (tl.abs(raw) < float("inf"))
    return tl.where(finite, tl.minimum(tl.maximum(raw, -bound), bound), 0.0), finite


@triton.jit
def partial_statistics(
    table, blocks, partial, bound,
    BLOCK: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    """All statistics but N and the last, for one block of coordinates."""
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
    out = partial + _COMPUTED * number.to(tl.int64)
    tl.store(out, tl.sum(p * p, axis=0))
    tl.store(out + 1, tl.sum(g * g, axis=0))
    tl.store(out + 2, tl.sum((g != 0).to(tl.float32), axis=0))
    tl.store(out + 3, tl.sum(m * m, axis=0))
    tl.store(out + 4, tl.sum(m * g, axis=0))
    tl.store(out + 5, tl.sum(tl.abs(g), axis=0))
    tl.store(out + 6, tl.sum(p * g, axis=0))


@triton.jit
def added_statistics(table, starts, partial, statistics):
    """Add up the blocks of each tensor; one program per tensor fixes the order of addition."""
    number = tl.program_id(0)
    lane, column = tl.arange(0, _LANES)[:, None], tl.arange(0, 8)[None, :]
    last = tl.load(starts + number + 1)
    total = tl.zeros((_LANES, 8), dtype=tl.float64)
    for first in range(tl.load(starts + number), last, _LANES):
        at = (first + lane).to(tl.int64)
        mask = (at < last) & (column < _COMPUTED)
        total += tl.load(partial + _COMPUTED * at + column, mask=mask, other=0.0)
    out, column = statistics + number * (_COMPUTED + 1), tl.arange(0, 8)
    tl.store(out, tl.load(table + _WORDS * number + 6).to(tl.float32))
    tl.store(out + 1 + column, tl.sum(total, axis=0).to(tl.float32), mask=column < _COMPUTED)


@triton.jit
def _exp(x):
    """e^min(x, 28): beyond 28 sigmoid and tanh are constant to 12 digits, and a product of three
    does not overflow. NaN stays NaN."""
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
    inputs, row, constants, gate_weight, output_weight, at, mask, finite, live,
    HIDDEN: tl.constexpr, FEATURES: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """`CoordinateLSTM._cell` for a block: from its features to s, k (here `more`) and a.

    Writes the next hidden and cell state.
    """
    INPUTS: tl.constexpr = FEATURES + HIDDEN
    count = tl.load(row + 6)
    hidden = tl.load(row + 4).to(tl.pointer_type(STATE)) + at
    cell = tl.load(row + 5).to(tl.pointer_type(STATE)) + at
    for k in tl.static_range(HIDDEN):
        x = tl.load(hidden + k * count, mask=mask, other=0.0).to(tl.float32)
        inputs = inputs + (x,)  # noqa: RUF005 - Triton has no unpacking
    s = tl.load(constants + 4 * HIDDEN) + tl.zeros_like(inputs[0])
    more = tl.load(constants + 4 * HIDDEN + 1) + tl.zeros_like(s)
    a = tl.load(constants + 4 * HIDDEN + 2) + tl.zeros_like(s)
    for k in range(HIDDEN):  # a loop, or the code would not fit the cache for instructions
        old = tl.load(cell + k * count, mask=mask, other=0.0).to(tl.float32)
        weights, shift = gate_weight + k * INPUTS, constants + k
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
        tl.store(cell + k * count, c.to(STATE), mask=finite)
        tl.store(hidden + k * count, h.to(STATE), mask=finite)
    return s, more, a


@triton.jit
def _step_live(
    row, constants, gate_weight, output_weight, at, mask, finite, params, g, v,
    m_gain, eps, log_bound, ratio_floor, decay,
    HIDDEN: tl.constexpr, FEATURES: tl.constexpr, OUTPUTS: tl.constexpr,
    PARAM: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """The step of a block with some coordinate that has had a gradient; v is the next value."""
    ms = tl.load(row + 2).to(tl.pointer_type(tl.float32)) + at
    m = tl.load(ms, mask=mask, other=0.0)
    p = tl.load(params, mask=mask, other=0.0).to(tl.float32)
    m += m_gain * (g - m)
    tl.store(ms, m, mask=finite)
    # m_correction, v_correction, RMS of g and p, scale, growth, keep
    common = constants + 4 * HIDDEN + OUTPUTS
    live = v > 0
    scale = tl.sqrt(v / tl.load(common + 1)) + eps
    adam = m / tl.load(common) / scale
    relative = g / tl.load(common + 2)
    log_ratio = tl.log(relative * relative + ratio_floor) / 6.0
    relative_param = _arsinh(p / tl.load(common + 3))
    s, more, a = _cell(
        (adam, g / scale, _arsinh(relative), log_ratio, relative_param), row, constants,
        gate_weight, output_weight, at, mask, finite, live, HIDDEN, FEATURES, STATE,
    )  # fmt: skip
    e = _exp(-2.0 / log_bound * s)
    factor = tl.exp(log_bound * (1.0 - e) / (1.0 + e))
    direction = (1.0 + more) * adam + a * relative
    rate = tl.load((row + 7).to(tl.pointer_type(tl.float32)))
    grown = tl.where(live, tl.load(common + 5) * p, 0.0)
    change = rate * (grown - tl.load(common + 4) * factor * direction) - decay * p
    tl.store(params, (tl.load(common + 6) * p + change).to(PARAM), mask=finite)


@triton.jit
def step_block(
    table, blocks, constants, gate_weight, output_weight,
    m_gain, v_keep, v_gain, eps, grad_bound, log_bound, ratio_floor,
    HIDDEN: tl.constexpr, FEATURES: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """The step of one block of coordinates."""
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
            row, constants + (4 * HIDDEN + OUTPUTS + 7) * tensor, gate_weight, output_weight,
            at, mask, finite, params, g, v,
            m_gain, eps, log_bound, ratio_floor, decay,
            HIDDEN, FEATURES, OUTPUTS, PARAM, STATE,
        )  # fmt: skip
    elif decay != 0:  # never had a gradient: no update, zero state
        p = tl.load(params, mask=mask, other=0.0).to(tl.float32)
        tl.store(params, (p - decay * p).to(PARAM), mask=finite)
