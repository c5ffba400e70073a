"""The step of `TwoLevelLSTM` on a GPU, in Triton: the arithmetic of two_level.c.

`rnnopt.optim.kernels.two_level_cuda` launches these kernels.

Shapes: P tensors, N coordinates of one of them, H units of the coordinate-wise LSTM. Its cells are
feature-major (H, N), matrices are row-major.

Each pass reads and writes every array of global memory once. Bytes per coordinate, with float32
parameters and gradients (half precision takes 2 in place of 4 for each):

- `measure_block` reads parameter, gradient, m, v and the last update (20) and the cell (4 H), and
  writes the cell (4 H) and its direction (4): 24 + 8 H.
- `step_block` reads parameter, gradient, m, v, the last update and the direction (24), and writes
  parameter, m, v and the update (16): 40.

Together these are 96 for H = 4. A tensor without coordinate-wise LSTM takes 20 + 36, one with
orthogonalised directions 4 more in the second pass. Tiles of coordinates that never had a gradient
take 16 + 12.

A row of `table` is one tensor: eight pointers (parameter, gradient, m, v, last update, cell,
direction, and what orthogonalised directions add to the step; 0 for none), N, and a word that holds
lr and weight decay.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
SUMS = 15  # those of two_level.c, in its order
_SUMS = tl.constexpr(SUMS)
_WORDS = tl.constexpr(10)  # in a row of the table
_SHARED = tl.constexpr(5)  # numbers of a tensor in the first pass beside the shifts of its gates
_COUNT, _RATES = tl.constexpr(8), tl.constexpr(9)  # places in a row of the table
# Units of a coordinate up to which the loop over them is unrolled: longer code would not fit the
# cache for instructions.
_UNROLLED = tl.constexpr(8)
_FLOOR = tl.constexpr(1e-20)  # in logarithms, as in the plain rule
_ROOT_FLOOR = tl.constexpr(1e-30)  # in roots of squared gradients


@triton.jit
def _bounded(x, bound):
    """Within -bound .. bound; NaN stays NaN."""
    x = tl.minimum(x, bound, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(x, -bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _loaded(place, at, mask, TYPE: tl.constexpr):
    """Numbers of the array to which a word of the table points, as float32."""
    values = tl.load(place).to(tl.pointer_type(TYPE))
    return tl.load(values + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _stored(place, at, mask, value, TYPE: tl.constexpr):
    tl.store(tl.load(place).to(tl.pointer_type(TYPE)) + at, value.to(TYPE), mask=mask)


@triton.jit
def _gradient(row, at, mask, bound, GRAD: tl.constexpr):
    """The gradient within bounds, and where it is finite and inside of mask."""
    raw = _loaded(row + 1, at, mask, GRAD)
    finite = mask & (tl.abs(raw) < float("inf"))
    return tl.where(finite, _bounded(raw, bound), 0.0), finite


@triton.jit
def _seen(g, m, v):
    """Whether some coordinate of a tile has had a gradient."""
    return tl.max(((g != 0) | (v != 0) | (m != 0)).to(tl.int32), axis=0) > 0


@triton.jit
def _advanced(
    g, m, v, corrections,
    BETA1: tl.constexpr, GAIN1: tl.constexpr, BETA2: tl.constexpr, GAIN2: tl.constexpr,
):  # fmt: skip
    """As `rnnopt.rules.two_level.advanced_moments`: m, v, v_hat, 1 / sqrt(v_hat), and Adam's
    direction, where v_hat has its floor.
    """
    m = BETA1 * m + GAIN1 * g
    v = BETA2 * v + GAIN2 * (g * g)
    square = v * tl.load(corrections + 1) + _ROOT_FLOOR
    inverse = tl.rsqrt(square)
    return m, v, square, inverse, m * tl.load(corrections) * inverse


@triton.jit
def _falling(x, power):
    """e^-(power x): sigmoid x = 1 / (1 + e) with power 1, tanh x = (1 - e) / (1 + e) with power 2.

    At most 2^40: there both are constant to 12 digits, and a product of three does not overflow.
    """
    x = tl.minimum((-1.4426950408889634 * power) * x, 40.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.exp2(x)


@triton.jit
def _inverse(x):
    """1 / x for x > 0, as a square: a division takes four times the instructions."""
    x = tl.rsqrt(x)
    return x * x


@triton.jit
def _tanh(x):
    """Exactly 0 at 0: a coordinate that never had a gradient keeps a zero cell."""
    e = _falling(x, 2.0)
    return (1.0 - e) * _inverse(1.0 + e)


@triton.jit
def _arsinh(x):
    size = tl.abs(x)
    value = tl.log(size + tl.sqrt(size * size + 1.0))
    return tl.where(x < 0, -value, value)


@triton.jit
def _product(total, weights, inputs, COUNT: tl.constexpr):
    for j in tl.static_range(COUNT):
        total += tl.load(weights + j) * inputs[j]
    return total


@triton.jit
def _unit(old, shifts, weights, candidates, even, signed, HIDDEN: tl.constexpr):
    """A unit's next cell, and what its output gate lets pass of it.

    Args are this unit's: its cell, and the shifts and rows of its first gate, which the others
    follow at a distance of all units.
    """
    SEEN: tl.constexpr = 5 + 2 * HIDDEN
    zero = tl.zeros_like(old)
    enter = _product(zero + tl.load(shifts), weights, even, SEEN)
    keep = _product(zero + tl.load(shifts + HIDDEN), weights + HIDDEN * SEEN, even, SEEN)
    leave = _product(zero + tl.load(shifts + 2 * HIDDEN), weights + 2 * HIDDEN * SEEN, even, SEEN)
    e = _falling(_product(zero, candidates, signed, 3 + HIDDEN), 2.0)
    # quotients share denominators, as in two_level.c
    entering, kept = (1.0 + _falling(enter, 1.0)) * (1.0 + e), 1.0 + _falling(keep, 1.0)
    new = (old * entering + (1.0 - e) * kept) * _inverse(kept * entering)
    e = _falling(new, 2.0)
    return new, (1.0 - e) * _inverse((1.0 + _falling(leave, 1.0)) * (1.0 + e))


@triton.jit
def _direction(
    row, shared, weights, candidates, outputs, at, mask, finite, g, change, square, inverse, adam,
    HIDDEN: tl.constexpr,
):  # fmt: skip
    """`TwoLevelLSTM.next_cell` for a tile: its direction. Writes the next cell."""
    SEEN: tl.constexpr = 5 + 2 * HIDDEN
    WIDTH: tl.constexpr = 3 + HIDDEN
    count = tl.load(row + _COUNT)
    cells = tl.load(row + 5).to(tl.pointer_type(tl.float32)) + at
    common = shared + 3 * HIDDEN  # m and v correction, 1 / last rate, begun, ln last RMS
    score = _arsinh(g * inverse)
    moved = _arsinh(change * tl.load(common + 2))
    size = _bounded(tl.log(square * inverse + _FLOOR) - tl.load(common + 4), 6.0)
    even = (
        tl.abs(adam), tl.abs(score), _tanh(adam * score), _tanh(adam * moved),
        size * (tl.load(common + 3) / 3.0),
    )  # fmt: skip
    signed = (adam, score, moved)
    olds, products = (), ()
    for k in tl.static_range(HIDDEN):
        old = tl.load(cells + k * count, mask=mask, other=0.0)
        was = _tanh(old)
        olds = olds + (old,)  # noqa: RUF005 - Triton has no unpacking
        signed = signed + (was,)  # noqa: RUF005
        even = even + (was * was,)  # noqa: RUF005
        products = products + (was * score,)  # noqa: RUF005
    even = even + products
    direction = tl.zeros_like(adam)
    if HIDDEN <= _UNROLLED:
        for k in tl.static_range(HIDDEN):
            new, passed = _unit(
                olds[k], shared + k, weights + k * SEEN, candidates + k * WIDTH, even, signed,
                HIDDEN,
            )  # fmt: skip
            tl.store(cells + k * count, new, mask=finite)
            direction += tl.load(outputs + k) * passed
    else:
        for k in range(HIDDEN):
            old = tl.load(cells + k * count, mask=mask, other=0.0)  # from the cache
            new, passed = _unit(
                old, shared + k, weights + k * SEEN, candidates + k * WIDTH, even, signed, HIDDEN
            )
            tl.store(cells + k * count, new, mask=finite)
            direction += tl.load(outputs + k) * passed
    return direction


@triton.jit
def _lanes(x, TILE: tl.constexpr, LANES: tl.constexpr):
    """Sums of a tile's numbers that a thread holds, (TILE,) -> (LANES,)."""
    return tl.sum(tl.reshape(x, (TILE // LANES, LANES)), axis=0)


@triton.jit
def measure_block(
    table, blocks, shared, weights, candidates, outputs, partial, bound,
    BETA1: tl.constexpr, GAIN1: tl.constexpr, BETA2: tl.constexpr, GAIN2: tl.constexpr,
    HIDDEN: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
    PARAM: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    """The first pass over a block of coordinates: the statistics, and the coordinate-wise LSTM."""
    number = tl.program_id(0)
    tensor = tl.load(blocks + 2 * number).to(tl.int64)
    row, shared = table + _WORDS * tensor, shared + (3 * HIDDEN + _SHARED) * tensor
    first = tl.load(blocks + 2 * number + 1).to(tl.int64) * (TILE * TILES)
    count = tl.load(row + _COUNT)
    live = tl.zeros((LANES,), dtype=tl.float32)
    nonzero, g_abs, g_g, p_p, p_g, m_m, m_g = live, live, live, live, live, live, live
    u_u, u_g, a_a, a_g, q_q, q_g, q_a = live, live, live, live, live, live, live
    for begin in range(first, tl.minimum(first + TILE * TILES, count), TILE):
        at = begin + tl.arange(0, TILE)
        mask = at < count
        p = _bounded(_loaded(row, at, mask, PARAM), bound)
        g, finite = _gradient(row, at, mask, bound, GRAD)
        m, v = _loaded(row + 2, at, mask, tl.float32), _loaded(row + 3, at, mask, tl.float32)
        p_p += _lanes(p * p, TILE, LANES)
        if _seen(g, m, v):
            u = _loaded(row + 4, at, mask, tl.float32)
            nonzero += _lanes((g != 0).to(tl.float32), TILE, LANES)
            g_abs += _lanes(tl.abs(g), TILE, LANES)
            g_g += _lanes(g * g, TILE, LANES)
            p_g += _lanes(p * g, TILE, LANES)
            m_m += _lanes(m * m, TILE, LANES)
            m_g += _lanes(m * g, TILE, LANES)
            u_u += _lanes(u * u, TILE, LANES)
            u_g += _lanes(u * g, TILE, LANES)
            m, v, square, inverse, adam = _advanced(
                g, m, v, shared + 3 * HIDDEN, BETA1, GAIN1, BETA2, GAIN2
            )
            live += _lanes((v > 0).to(tl.float32), TILE, LANES)
            a_a += _lanes(adam * adam, TILE, LANES)
            a_g += _lanes(adam * g, TILE, LANES)
            if HIDDEN > 0:  # noqa: SIM102 - known when this is compiled
                if tl.load(row + 5) != 0:
                    q = _direction(
                        row, shared, weights, candidates, outputs, at, mask, finite,
                        g, u, square, inverse, adam, HIDDEN,
                    )  # fmt: skip
                    _stored(row + 6, at, mask, q, tl.float32)
                    q_q += _lanes(q * q, TILE, LANES)
                    q_g += _lanes(q * g, TILE, LANES)
                    q_a += _lanes(q * adam, TILE, LANES)
    out = partial + _SUMS * number.to(tl.int64)
    sums = (
        live, nonzero, g_abs, g_g, p_p, p_g, m_m, m_g, u_u, u_g, a_a, a_g, q_q, q_g, q_a,
    )  # fmt: skip
    for i in tl.static_range(_SUMS):
        tl.store(out + i, tl.sum(sums[i], axis=0))


@triton.jit
def added(starts, partial, sums, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Add up the rows of each tensor; one program per tensor fixes the order of addition."""
    number = tl.program_id(0)
    lane, column = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    last = tl.load(starts + number + 1)
    total = tl.zeros((ROWS, WIDTH), dtype=tl.float64)
    for first in range(tl.load(starts + number), last, ROWS):
        at = (first + lane).to(tl.int64)
        mask = (at < last) & (column < COLUMNS)
        total += tl.load(partial + COLUMNS * at + column, mask=mask, other=0.0)
    column = tl.arange(0, WIDTH)
    out = sums + number * COLUMNS + column
    tl.store(out, tl.sum(total, axis=0).to(tl.float32), mask=column < COLUMNS)


@triton.jit
def step_block(
    table, blocks, decided, slopes, bound,
    BETA1: tl.constexpr, GAIN1: tl.constexpr, BETA2: tl.constexpr, GAIN2: tl.constexpr,
    HIDDEN: tl.constexpr, TILE: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    """The second pass over a tile of coordinates: the step."""
    number = tl.program_id(0)
    tensor = tl.load(blocks + 2 * number).to(tl.int64)
    row, decided = table + _WORDS * tensor, decided + 8 * tensor
    at = tl.load(blocks + 2 * number + 1).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = at < tl.load(row + _COUNT)
    rates = (row + _RATES).to(tl.pointer_type(tl.float32))
    lr, decay = tl.load(rates), tl.load(rates + 1)
    g, finite = _gradient(row, at, mask, bound, GRAD)
    m, v = _loaded(row + 2, at, mask, tl.float32), _loaded(row + 3, at, mask, tl.float32)
    slope = 0.0
    if _seen(g, m, v):
        start, u = _loaded(row, at, mask, PARAM), _loaded(row + 4, at, mask, tl.float32)
        m, v, _, _, adam = _advanced(g, m, v, decided, BETA1, GAIN1, BETA2, GAIN2)
        step = tl.load(decided + 4) * adam + tl.load(decided + 5) * g + tl.load(decided + 6) * u
        if HIDDEN > 0:  # noqa: SIM102 - known when this is compiled
            if tl.load(row + 6) != 0:
                step += tl.load(decided + 7) * _loaded(row + 6, at, mask, tl.float32)
        if tl.load(row + 7) != 0:
            step += _loaded(row + 7, at, mask, tl.float32)
        grown = tl.load(decided + 2) * _bounded(start, bound)
        update = tl.where(v > 0, grown - tl.load(decided + 3) * step, 0.0)
        _stored(row, at, finite, start + (lr * update - decay * start), PARAM)
        _stored(row + 2, at, finite, m, tl.float32)
        _stored(row + 3, at, finite, v, tl.float32)
        _stored(row + 4, at, finite, update, tl.float32)
        slope = tl.sum(update * g, axis=0)
    elif decay != 0:  # never had a gradient: no update
        start = _loaded(row, at, mask, PARAM)
        _stored(row, at, finite, start - decay * start, PARAM)
    tl.store(slopes + number, slope)
