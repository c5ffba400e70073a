"""One label a text: softmax and cross-entropy.

Shapes: B texts, H embedding size, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from rnnopt.tasks.text.estimator.heads import (
    SINGLE_PENALTY,
    SINGLE_TEMPERATURE,
    best_temperature,
    class_mean_head,
    log_softmax,
    logistic_head,
)
from rnnopt.tasks.text.estimator.objective.protocol import Fold, MakeHead


class OneLabel:
    """See `rnnopt.tasks.text.estimator.objective.protocol.Objective`."""

    single_penalty = SINGLE_PENALTY
    single_temperature = SINGLE_TEMPERATURE

    def ways(self, labels: np.ndarray) -> int:
        """C."""
        return int(labels.max()) + 1

    def counts(self, labels: np.ndarray) -> np.ndarray:
        """How many texts each class has, (C,)."""
        return np.bincount(labels)

    def folds(self, labels: np.ndarray, most: int, seed: int) -> list[Fold]:
        """See `stratified_folds`."""
        return stratified_folds(labels, most, seed)

    def logistic(self, inverse_penalty: float) -> MakeHead:
        """Multinomial logistic regression."""
        return lambda rows, labels, weights: logistic_head(rows, labels, weights, inverse_penalty)

    def others(self) -> Mapping[str, MakeHead]:
        """Class means."""
        return {"class means": lambda rows, labels, weights: class_mean_head(rows, labels)}

    def temperature(self, logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
        """See `best_temperature`."""
        return best_temperature(logits, labels, weights)

    def losses(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Cross-entropy of each text, (B,), in nats."""
        return -log_softmax(logits)[np.arange(len(labels)), labels]

    def alike(self, labels: Tensor) -> Tensor:
        """1 for two texts of one class, (B, B), else 0."""
        return (labels[:, None] == labels).float()

    def right(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Whether the likeliest class is the label, (B,)."""
        return logits.argmax(axis=1) == labels

    def f1(self, logits: np.ndarray, labels: np.ndarray) -> tuple[float, float] | None:
        """None: accuracy says enough."""
        return None

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Softmax, (B, C)."""
        return np.exp(log_softmax(logits))


def stratified_folds(labels: np.ndarray, folds: int, seed: int) -> list[Fold]:
    """Folds that hold out every text of a class with two texts or more once.

    The only text of a class is always fitted on, so that each fold knows every class.

    Args:
        labels: (B,).
        folds: at most so many; fewer if no class has so many texts.
        seed: of the division.

    Returns:
        No fold at all if every class has one text.
    """
    generator = np.random.default_rng(seed)
    counts = np.bincount(labels)
    folds = min(folds, int(counts.max()))
    place = np.full(len(labels), -1)
    dealt = 0
    for label in np.flatnonzero(counts > 1):
        rows = generator.permutation(np.flatnonzero(labels == label))
        # dealt on from where the last class ended, so that folds are of one size
        place[rows] = (dealt + np.arange(len(rows))) % folds
        dealt += len(rows)
    return folds_of(place)


def folds_of(place: np.ndarray) -> list[Fold]:
    """The folds that are not empty.

    Args:
        place: (B,), the fold that holds each text out; -1 for none.
    """
    return [
        (np.flatnonzero(place != fold), np.flatnonzero(place == fold))
        for fold in range(place.max() + 1)
    ]
