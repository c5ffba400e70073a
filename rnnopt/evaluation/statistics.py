"""Confidence intervals of means over episodes, and of differences on the same episodes.

Shapes: E episodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

# metric -> budget of steps -> (E,), one figure for each episode
Values = dict[str, dict[int, np.ndarray]]


def interval(values: np.ndarray) -> dict[str, float]:
    """The mean, and half the width of its 95 % confidence interval by Student's t.

    Args:
        values: (E,), one figure for each episode, at least two.

    Returns:
        ``{"mean", "ci95"}``, both in the unit of the values.
    """
    from scipy import stats

    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return {"mean": float(values.mean()), "ci95": float(half)}


def with_interval(found: Mapping[str, float], digits: int = 3, signed: bool = False) -> str:
    """An `interval` as a table shows it: ``0.912 ± 0.034``.

    Args:
        found: the result of `interval`.
        digits: behind the point.
        signed: whether a positive mean has its sign, as differences have.
    """
    return f"{found['mean']:{'+' if signed else ''}.{digits}f} ± {found['ci95']:.{digits}f}"


def summary(values: Values) -> dict[str, Any]:
    """The `interval` of each metric at each budget, the budgets as strings."""
    return {
        metric: {str(b): interval(column) for b, column in by_budget.items()}
        for metric, by_budget in values.items()
    }


def difference(ours: Values, theirs: Values) -> Values:
    """Ours minus theirs on each episode, for the metrics and budgets that both have."""
    return {
        metric: {
            b: ours[metric][b] - theirs[metric][b] for b in ours[metric] if b in theirs[metric]
        }
        for metric in ours
        if metric in theirs
    }
