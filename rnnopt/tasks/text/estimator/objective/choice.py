"""Which objective labels ask for."""

from __future__ import annotations

import numpy as np

from rnnopt.tasks.text.estimator.objective.one_label import OneLabel
from rnnopt.tasks.text.estimator.objective.protocol import Objective
from rnnopt.tasks.text.estimator.objective.several_labels import SeveralLabels

ONE_LABEL, SEVERAL_LABELS = OneLabel(), SeveralLabels()


def objective_of(labels: np.ndarray) -> Objective:
    """`OneLabel` for labels (B,), `SeveralLabels` for labels (B, C)."""
    return ONE_LABEL if labels.ndim == 1 else SEVERAL_LABELS
