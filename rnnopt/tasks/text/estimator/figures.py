"""How good predicted probabilities are.

Shapes: B texts, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from rnnopt.data.corpus import counted
from rnnopt.tasks.metrics import classification_metrics, confusion_matrix
from rnnopt.tasks.text.estimator.objective.several_labels import micro_macro_f1

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
        micro_f1: where a text may have several labels; None where it has one. There a text is
            right if all its labels are, the log loss is added up over the classes, and the
            calibration error is that of every yes or no.
        answered: share of texts with an answer, and `answered_accuracy` the share of right ones
            among those; None where every text has one.
        known: how many of the texts it was fitted on; figures of them flatter.
    """

    texts: int
    accuracy: float
    low: float
    high: float
    macro_f1: float
    log_loss: float
    calibration_error: float
    micro_f1: float | None = None
    answered: float | None = None
    answered_accuracy: float | None = None
    known: int = 0

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

    @classmethod
    def of_several(
        cls, probabilities: np.ndarray, labels: np.ndarray, thresholds: np.ndarray
    ) -> Figures:
        """Judge probabilities (B, C) by zeros and ones (B, C), with thresholds (C,)."""
        answers = probabilities >= thresholds
        right = int((answers == labels).all(axis=1).sum())
        low, high = wilson_interval(right, len(labels))
        micro, macro = micro_macro_f1(answers, labels)
        chosen = np.where(labels > 0, probabilities, 1 - probabilities)
        loss = float(-np.log(chosen.clip(_LEAST)).sum(axis=1).mean())
        flat = probabilities.ravel()
        error = expected_calibration_error(np.stack([1 - flat, flat], axis=1), labels.ravel())
        return cls(len(labels), right / len(labels), low, high, macro, loss, error, micro)

    def with_answers(self, answered: np.ndarray, right: np.ndarray) -> Figures:
        """These figures, and how many texts have an answer.

        Args:
            answered: (B,), whether a text has an answer.
            right: (B,), and whether it is the right one.
        """
        accuracy = float(right[answered].mean()) if answered.any() else 0.0
        return replace(self, answered=float(answered.mean()), answered_accuracy=accuracy)

    def __str__(self) -> str:
        exact, micro, answers = "accuracy", "", ""
        if self.micro_f1 is not None:
            exact, micro = "all labels right", f"micro F1 {self.micro_f1:.3f}, "
        if self.answered is not None:
            answers = (
                f"; {self.answered:.3f} of them answered, and {self.answered_accuracy:.3f} of the "
                "answers right"
            )
        if self.known:
            answers += f"; it was fitted on {self.known} of these texts, so that this flatters"
        return (
            f"on {counted(self.texts, 'text')}: {exact} {self.accuracy:.3f} (95 % interval "
            f"{self.low:.3f} to {self.high:.3f}), {micro}macro F1 {self.macro_f1:.3f}, log loss "
            f"{self.log_loss:.3f} nats, expected calibration error {self.calibration_error:.3f}"
            f"{answers}"
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
