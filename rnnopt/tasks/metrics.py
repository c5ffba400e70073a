"""Metrics of a classifier, from its confusion matrix.

Shapes: B texts, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Metrics:
    """Accuracy, and the macro averages over classes of precision, recall and F1."""

    accuracy: float
    precision: float
    recall: float
    f1: float


def confusion_matrix(predicted: np.ndarray, actual: np.ndarray, classes: int) -> np.ndarray:
    """Count the texts of each pair of an actual and a predicted class.

    Args:
        predicted: (B,), the predicted classes, 0 to C - 1.
        actual: (B,), the true classes.
        classes: C.

    Returns:
        (C, C) int64, indexed [actual, predicted].
    """
    # scikit-learn's function takes a hundred times as long, and this runs after every few steps.
    cells = np.bincount(classes * actual + predicted, minlength=classes**2)
    return cells.reshape(classes, classes)


def classification_metrics(confusion: np.ndarray) -> Metrics:
    """Accuracy and macro averages by scikit-learn.

    The precision of a class that is never predicted is 0, and so is the recall of an absent one.

    Args:
        confusion: (C, C), counts of texts [actual, predicted]. A class without a text that is
            also never predicted is left out of the averages.
    """
    from sklearn.metrics import precision_recall_fscore_support

    actual, predicted = np.nonzero(confusion)
    counts = confusion[actual, predicted]
    precision, recall, f1, _ = precision_recall_fscore_support(
        actual, predicted, sample_weight=counts, average="macro", zero_division=0
    )
    accuracy = counts[actual == predicted].sum() / counts.sum()
    return Metrics(float(accuracy), float(precision), float(recall), float(f1))
