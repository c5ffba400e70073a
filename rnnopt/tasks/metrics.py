"""What a confusion matrix says of a classifier.

Shapes: B texts, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Metrics:
    """Accuracy, and precision, recall and F1 averaged over classes, each class alike (macro)."""

    accuracy: float
    precision: float
    recall: float
    f1: float


def confusion_matrix(predicted: np.ndarray, actual: np.ndarray, classes: int) -> np.ndarray:
    """Counts of texts [actual, predicted], (classes, classes) int64."""
    confusion = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(confusion, (actual, predicted), 1)
    return confusion


def classification_metrics(confusion: np.ndarray) -> Metrics:
    """Metrics as scikit-learn defines them with ``average="macro", zero_division=0``.

    Args:
        confusion: (C, C), counts of texts [actual, predicted]; classes in neither are left out of
            the averages.
    """
    hits = np.diag(confusion).astype(float)
    claimed, present = confusion.sum(axis=0), confusion.sum(axis=1)
    seen = (claimed + present) > 0
    precision = hits[seen] / np.maximum(claimed[seen], 1)
    recall = hits[seen] / np.maximum(present[seen], 1)
    f1 = 2 * hits[seen] / (claimed + present)[seen]
    return Metrics(
        accuracy=float(hits.sum() / confusion.sum()),
        precision=float(precision.mean()),
        recall=float(recall.mean()),
        f1=float(f1.mean()),
    )
