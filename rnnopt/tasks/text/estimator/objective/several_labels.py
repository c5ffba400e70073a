"""Several labels a text, or none: a sigmoid, and a yes or no, for each class.

Shapes: B texts, H embedding size, C classes; labels are (B, C), zeros and ones, float64.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from rnnopt.tasks.text.estimator.heads import TEMPERATURES, one_vs_rest_head
from rnnopt.tasks.text.estimator.objective.one_label import folds_of
from rnnopt.tasks.text.estimator.objective.protocol import Fold, MakeHead

_CANDIDATES = np.linspace(0.02, 0.98, 49)  # thresholds
# A class's threshold is chosen by its own texts and by so many more that are like the average of
# all classes: a handful of texts say little of where a threshold should be.
_SHARED = 5.0
_PARTS = 5  # F1 is of thresholds that were chosen on the other parts


class SeveralLabels:
    """See `rnnopt.tasks.text.estimator.objective.protocol.Objective`."""

    single_penalty = 3.0
    single_temperature = 1.0

    def ways(self, labels: np.ndarray) -> int:
        """C."""
        return int(labels.shape[1])

    def counts(self, labels: np.ndarray) -> np.ndarray:
        """How many texts each class has, (C,)."""
        return labels.sum(axis=0).astype(int)

    def folds(self, labels: np.ndarray, most: int, seed: int) -> list[Fold]:
        """See `iterative_folds`."""
        return iterative_folds(labels, most, seed)

    def logistic(self, inverse_penalty: float) -> MakeHead:
        """A logistic regression for each class."""
        return lambda rows, labels, weights: one_vs_rest_head(
            rows, labels, weights, inverse_penalty
        )

    def others(self) -> Mapping[str, MakeHead]:
        """None."""
        return {}

    def temperature(self, logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
        """The temperature with the lowest cross-entropy, one for all classes.

        Targets are smoothed as Platt does (1999): ``(P + 1) / (P + 2)`` for the P that are 1,
        ``1 / (N + 2)`` for the N that are 0.
        """
        positive = labels.sum()
        high, low = (positive + 1) / (positive + 2), 1 / (labels.size - positive + 2)
        targets = np.where(labels > 0, high, low)
        losses = [
            (weights * _cross_entropy(logits / temperature, targets).sum(axis=1)).sum()
            for temperature in TEMPERATURES
        ]
        return float(TEMPERATURES[int(np.argmin(losses))])

    def losses(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Binary cross-entropy of each text, (B,), in nats, added up over the classes."""
        return _cross_entropy(logits, labels).sum(axis=1)

    def alike(self, labels: Tensor) -> Tensor:
        """Labels in common over labels of either, (B, B): Jaccard's index; 0 without a label."""
        common = labels @ labels.T
        counts = labels.sum(dim=1)
        return (common / (counts[:, None] + counts - common).clamp_min(1)).float()

    def right(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Whether all of a text's labels are right, (B,), by thresholds of the other texts."""
        return (self._answers(logits, labels) == labels).all(axis=1)

    def f1(self, logits: np.ndarray, labels: np.ndarray) -> tuple[float, float] | None:
        """Micro and macro F1 of texts held out, by thresholds of the other texts."""
        return micro_macro_f1(self._answers(logits, labels), labels)

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """A sigmoid for each class, (B, C)."""
        return np.exp(-np.logaddexp(0, -logits))

    def _answers(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Yes or no (B, C); the thresholds of a fifth are chosen on the other four."""
        chances, part = self.probabilities(logits), np.arange(len(labels)) % _PARTS
        answers = np.zeros(labels.shape, bool)
        for fold in np.unique(part):
            others = part != fold if (part != fold).any() else part == fold
            answers[part == fold] = chances[part == fold] >= best_thresholds(
                chances[others], labels[others]
            )
        return answers


def _cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, logits) - targets * logits


def iterative_folds(labels: np.ndarray, folds: int, seed: int) -> list[Fold]:
    """Folds in which every class has its share (Sechidis et al. 2011, iterative stratification).

    The class with the fewest texts left is dealt first, each text to the fold that lacks most texts
    of the class. The only text of a class is always fitted on.

    Args:
        labels: (B, C).
        folds: at most so many; fewer if no class has so many texts.
        seed: of the division.

    Returns:
        No fold at all if no text can be held out.
    """
    generator = np.random.default_rng(seed)
    counts = labels.sum(axis=0)
    free = np.array(~(labels[:, counts == 1] > 0).any(axis=1))
    folds = min(folds, int(counts.max()))
    if free.sum() < 2 or folds < 2:
        return []
    place = np.full(len(labels), -1)
    left = free.copy()
    wanted = np.tile(labels[free].sum(axis=0) / folds, (folds, 1))  # (folds, C)
    room = np.full(folds, free.sum() / folds)
    while left.any():
        remaining = labels[left].sum(axis=0)
        if remaining.any():
            rarest = int(np.where(remaining > 0, remaining, np.inf).argmin())
            rows = np.flatnonzero(left & (labels[:, rarest] > 0))
            need = wanted[:, rarest]
        else:
            rows, need = np.flatnonzero(left), room
        for row in generator.permutation(rows):
            fold = int(np.lexsort((room, need))[-1])
            place[row] = fold
            wanted[fold] -= labels[row]
            room[fold] -= 1
            left[row] = False
    return [fold for fold in folds_of(place) if len(fold[1])]


def best_thresholds(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The thresholds (C,) with the highest F1 on texts held out.

    The counts of a class are joined with the average of all classes, which weighs as much as
    `_SHARED` texts of the class. Of thresholds that are equally good the middle one is taken.

    Args:
        probabilities: (B, C).
        labels: (B, C).
    """
    hits, named = (np.empty((len(_CANDIDATES), labels.shape[1])) for _ in range(2))
    for row, threshold in enumerate(_CANDIDATES):
        yes = probabilities >= threshold
        hits[row], named[row] = (yes & (labels > 0)).sum(axis=0), yes.sum(axis=0)
    false = named - hits
    positive = labels.sum(axis=0)
    missed = positive - hits
    share = _SHARED / max(positive.sum(), 1.0)
    joined = [part + share * part.sum(axis=1, keepdims=True) for part in (hits, false, missed)]
    scores = 2 * joined[0] / np.maximum(2 * joined[0] + joined[1] + joined[2], 1e-12)
    best = scores >= scores.max(axis=0) - 1e-12
    return np.array([np.median(_CANDIDATES[column]) for column in best.T])


def middle_thresholds(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Thresholds (C,) where no text can be held out: halfway between texts with and without.

    Args:
        probabilities: (B, C), of the texts that were fitted on.
        labels: (B, C).
    """
    with_it = (probabilities * labels).sum(axis=0) / np.maximum(labels.sum(axis=0), 1)
    without = (probabilities * (1 - labels)).sum(axis=0) / np.maximum((1 - labels).sum(axis=0), 1)
    return np.clip((with_it + without) / 2, 0.0, 1.0)


def micro_macro_f1(answers: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """F1 of all decisions together, and the mean of the classes' F1; 0 of a class without any.

    Args:
        answers: (B, C), zeros and ones.
        labels: the same.
    """
    hits = ((answers > 0) & (labels > 0)).sum(axis=0)
    both = (answers > 0).sum(axis=0) + (labels > 0).sum(axis=0)
    named = both > 0
    micro = 2 * hits.sum() / max(int(both.sum()), 1)
    macro = float((2 * hits[named] / both[named]).mean()) if named.any() else 0.0
    return float(micro), macro
