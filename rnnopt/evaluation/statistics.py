"""Intervals of means over episodes."""

from __future__ import annotations

import math

import numpy as np


def interval(values: np.ndarray) -> dict[str, float]:
    """Mean and half the width of its 95 % interval, by Student's t.

    Args:
        values: (E,), one figure an episode, 2 or more.

    Returns:
        ``{"mean", "ci95"}``.
    """
    half = student_quantile(len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return {"mean": float(values.mean()), "ci95": float(half)}


def student_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t with this many degrees of freedom.

    Below 5 from the table, from there on by the Cornish-Fisher series around the normal quantile
    (Abramowitz & Stegun 1964, 26.7.5), exact to 0.2 %.
    """
    if freedom < 5:
        return (12.7062, 4.3027, 3.1824, 2.7764)[freedom - 1]
    z, n = 1.959964, float(freedom)
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )
