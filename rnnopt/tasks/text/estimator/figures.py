"""How good predicted probabilities are.

Shapes: B texts, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from rnnopt.tasks.metrics import classification_metrics, confusion_matrix

_Z = 1.959963984540054  # of a normal distribution, 95 % between -z and z
_BINS = 10
_LEAST = 1e-15  # probability, so that a log loss is finite


@dataclass(frozen=True)
class Figures:
    """A classifier on labelled texts.

    Attributes:
        texts: B.
        accuracy: share of right answers.
        low, high: 95 % interval of the accuracy, see `wilson_interval`.
        macro_f1: mean F1 of the classes.
        log_loss: mean nats a text.
        calibration_error: see `expected_calibration_error`.
    """

    texts: int
    accuracy: float
    low: float
    high: float
    macro_f1: float
    log_loss: float
    calibration_error: float

    @classmethod
    def of(cls, probabilities: np.ndarray, labels: np.ndarray) -> Figures:
        """Judge probabilities (B, C) by the classes' places (B,); B is 1 or more."""
        predicted = probabilities.argmax(axis=1)
        metrics = classification_metrics(
            confusion_matrix(predicted, labels, probabilities.shape[1])
        )
        low, high = wilson_interval(int((predicted == labels).sum()), len(labels))
        chosen = probabilities[np.arange(len(labels)), labels]
        return cls(
            len(labels), metrics.accuracy, low, high, metrics.f1,
            float(-np.log(chosen.clip(_LEAST)).mean()),
            expected_calibration_error(probabilities, labels),
        )  # fmt: skip

    def __str__(self) -> str:
        return (
            f"on {self.texts} texts: accuracy {self.accuracy:.3f} (95 % interval {self.low:.3f} to "
            f"{self.high:.3f}), macro F1 {self.macro_f1:.3f}, log loss {self.log_loss:.3f} nats, "
            f"expected calibration error {self.calibration_error:.3f}"
        )


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927), which holds for few texts and near 0 and 1, too.

    Args:
        right: of them.
        count: 1 or more.
    """
    share, square = right / count, _Z**2 / count
    middle = (share + square / 2) / (1 + square)
    reach = _Z * math.sqrt(share * (1 - share) / count + square / (4 * count)) / (1 + square)
    return max(middle - reach, 0.0), min(middle + reach, 1.0)


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean distance between confidence and accuracy (Naeini et al. 2015; Guo et al. 2017).

    Texts are put into 10 bins of equal width by the probability of the predicted class.

    Args:
        probabilities: (B, C).
        labels: (B,).
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    places = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = np.bincount(places, weights=right - confidence, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(labels))
