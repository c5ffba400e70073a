"""What the tensor-wise LSTM of `TwoLevelLSTM` sees: sums over a tensor's coordinates, and numbers
made of them that don't depend on the scale of the loss.

Shapes: P tensors that are stepped together. Leading batch dimensions are allowed everywhere.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rnnopt.rules.protocol import State

FIRST_DISTANCE = 6.0  # Euclidean length of Adam's first step over the whole model, `base_rates`
SHARE_POWER = 0.25  # tensors with small gradients move less: the power of their share
NARROW = 64  # a matrix with a side of at most this has orthogonalised directions as well
FLOOR = 1e-20  # inside roots, whose derivative at 0 is infinite
# Inside roots of squared gradients. Coordinates with gradients of 1e-9 are common; a larger floor
# would make their steps depend on the scale of the loss.
ROOT_FLOOR = 1e-30
TENSOR_FEATURES = 26


class Sums(NamedTuple):
    """Sums over the coordinates of a tensor, (...) each.

    g is the gradient, p the parameter, m Adam's first moment before this step, a Adam's direction,
    u the last update, q the direction of the coordinate-wise LSTM.
    """

    live: Tensor  # coordinates that ever had a gradient
    nonzero: Tensor  # coordinates that have one now
    g_abs: Tensor
    g_g: Tensor
    p_p: Tensor
    p_g: Tensor
    m_m: Tensor
    m_g: Tensor
    u_u: Tensor
    u_g: Tensor
    slope: Tensor  # u times the gradient at the start of that update
    a_a: Tensor
    a_g: Tensor
    q_q: Tensor
    q_g: Tensor
    q_a: Tensor


def tensor_features(
    s: Sums, states: State, unit: Tensor, share: Tensor, rms: Tensor, decrease: Tensor
) -> Tensor:
    """The inputs of the tensor-wise LSTM, (..., P, F); none depends on the loss's scale.

    Args:
        s: of all tensors, (..., P) each.
        states: the tensors' leaves, (..., P) and (..., P, U).
        unit: the largest first-order decrease of a base step so far, (..., 1).
        share: see `base_rates`.
        rms: of each tensor's gradient, (..., P).
        decrease: of the loss to first order, for steps in proportion to the base rates,
            (..., 1).
    """
    rows, columns = states["rows"].clamp(min=1), states["columns"].clamp(min=1)  # of empty ones
    step, n = states["step"] + 1, rows * columns
    whole, ones = Sums(*(x.sum(-1, keepdim=True) for x in s)), torch.ones_like(step)
    matrix = (states["rows"] > 0).to(step.dtype)
    narrow = matrix * (torch.minimum(states["rows"], states["columns"]) <= NARROW)
    first = torch.where(step > 1, states["first_rms"], rms)
    begun = torch.where(step > 1, states["first_decrease"], decrease)
    fall = (step > 1).to(step.dtype) * (whole.u_g + whole.slope) / 2
    own = [
        log(s.p_p / n, 1e-8) / 4 + 1.5, log(s.a_a / s.live.clamp(min=1), 1e-6) / 2,
        log(rms / first, 1e-6).clamp(-5, 5) / 2, _cosine(s.m_g, s.m_m, s.g_g),
        _cosine(s.u_g, s.u_u, s.g_g), (log(n) - 9) / 3, matrix, narrow,
        matrix * log(rows / columns) / 3,
        -2 * _cosine(s.p_g, s.p_p, s.g_g), torch.asinh(-6 * s.p_g / unit) / 1.5,
        log(share, 1e-4) / 3, 1 / step, log(step.clamp(max=64)) - 1.5,
    ]  # fmt: skip
    model = [
        log(decrease / (begun + FLOOR), 1e-6).clamp(-5, 5) / 2,
        _cosine(whole.m_g, whole.m_m, whole.g_g), (log(whole.live) - 12) / 4,
        2 * log(whole.g_abs) - log(whole.g_g) - log(whole.live) + 2,
        torch.asinh(3 * fall / unit), torch.asinh(1.5 * (states["fallen"] + fall) / unit),
        _cosine(whole.u_g, whole.u_u, whole.g_g), ones * math.log(step.shape[-1]) / 3,
    ]  # fmt: skip
    new = [
        _slope_ratio(s), _slope_ratio(whole), _cosine(s.q_g, s.q_q, s.g_g),
        _cosine(s.q_a, s.q_q, s.a_a),
    ]  # fmt: skip
    return torch.stack([x * ones for x in (*own, *model, *new)], -1)


def base_rates(sums: Sums) -> tuple[Tensor, Tensor]:
    """The rate (..., P) that an untrained rule gives each tensor, and the tensor's share.

    ``rate = FIRST_DISTANCE / sqrt(coordinates that ever had a gradient) * share^(1/4)`` with
    ``share = RMS(g) / largest RMS(g) of any tensor``. Entries of Adam's first step have this size,
    so the model as a whole moves by one distance, whatever trains: a head, LoRA factors, an
    encoder.
    """
    rms = torch.sqrt(sums.g_g / sums.nonzero.clamp(min=1) + ROOT_FLOOR)
    share = rms / rms.amax(-1, keepdim=True)
    total = sums.live.sum(-1, keepdim=True).clamp(min=1)
    return FIRST_DISTANCE / torch.sqrt(total) * share**SHARE_POWER, share


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Sums of products over the last dimension; on a CPU without memory for the products."""
    if x.is_cuda:
        return (x * y).sum(-1)
    return (x.unsqueeze(-2) @ y.unsqueeze(-1)).squeeze(-1).squeeze(-1)


def _cosine(product: Tensor, square: Tensor, other: Tensor) -> Tensor:
    """x y / sqrt(x x * y y) of three sums; 0 where one of the vectors is 0."""
    return product / (torch.sqrt(square + FLOOR) * torch.sqrt(other + FLOOR))


def log(x: Tensor, least: float = FLOOR) -> Tensor:
    """Of x + least."""
    return torch.log(x + least)


def inverse_rms(square: Tensor, count: Tensor) -> Tensor:
    """1 / RMS of a sum of squares over so many coordinates; large for 0."""
    return 1 / torch.sqrt(square / count.clamp(min=1) + 1e-12)


def _slope_ratio(sums: Sums) -> Tensor:
    """The slope of the loss at the end of the last update, against both ends, -1 .. 1."""
    # divided first, and by a constant, since nothing depends on it: large squares are infinite
    size = torch.maximum(sums.u_g.abs(), sums.slope.abs()).detach() + 1e-15
    end, start = sums.u_g / size, sums.slope / size
    return -end / torch.sqrt(end**2 + start**2 + (1e-15 / size) ** 2)
