"""Confidence intervals of means over episodes."""

from __future__ import annotations

import numpy as np


def interval(values: np.ndarray) -> dict[str, float]:
    """The mean, and half the width of its 95 % confidence interval by Student's t.

    Args:
        values: (E,), one figure per episode, at least two.

    Returns:
        ``{"mean", "ci95"}``, both in the unit of the values.
    """
    from scipy import stats

    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return {"mean": float(values.mean()), "ci95": float(half)}
