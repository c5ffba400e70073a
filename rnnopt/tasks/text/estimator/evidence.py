"""What a user's own labels say about a classifier: cross-validation.

Shapes: B texts, H embedding size, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rnnopt.tasks.text.estimator.heads import (
    INVERSE_PENALTIES,
    SINGLE_PENALTY,
    SINGLE_TEMPERATURE,
    LinearHead,
    best_temperature,
    class_mean_head,
    log_softmax,
    logistic_head,
)

MOST_FOLDS = 5
# Standard errors by which something must be better to take the place of a start: another penalty,
# or class means, that of the default; adaptation that of the start. A rule that harms came within
# 0.1 of the start on 20 texts of validation classes, and then lost 18 points on others.
HEAD_MARGIN, ADAPTATION_MARGIN = 2.0, 1.0
_LARGE = 30_000  # texts times classes from which on fewer penalties and folds are tried
Fold = tuple[np.ndarray, np.ndarray]  # indices of the texts to fit on, and of those held out


@dataclass(frozen=True)
class Evidence:
    """How well something classifies texts that were held out from it.

    Attributes:
        name: what was judged.
        accuracy: share of the texts held out; each weighs as in fitting.
        log_loss: mean nats a text, at `temperature`.
        temperature: that suits these texts best, see `best_temperature`.
    """

    name: str
    accuracy: float
    log_loss: float
    temperature: float


@dataclass(frozen=True)
class Judged:
    """Evidence, and what it is made of.

    Attributes:
        evidence: see there.
        losses: (B,), of each text held out, at the temperature, in nats.
        weights: (B,), of the texts.
    """

    evidence: Evidence
    losses: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, name: str, logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> Judged:
        """Judge logits (B, C) of texts held out by their labels (B,), with weights (B,)."""
        temperature = best_temperature(logits, labels, weights)
        losses = -log_softmax(logits / temperature)[np.arange(len(labels)), labels]
        accuracy = float(np.average(logits.argmax(axis=1) == labels, weights=weights))
        loss = float(np.average(losses, weights=weights))
        return cls(Evidence(name, accuracy, loss, temperature), losses, weights)

    def better_than(self, other: Judged, margin: float) -> bool:
        """Whether the log loss on the same texts is lower by so many standard errors.

        A few texts say little, and the lowest of several losses is often so by chance.
        """
        gains = (other.losses - self.losses) * self.weights / self.weights.mean()
        return bool(gains.mean() > margin * gains.std() / np.sqrt(len(gains)))


@dataclass(frozen=True)
class Labelled:
    """What a classifier is fitted on.

    Attributes:
        embeddings: (B, H), float64.
        labels: (B,), 0 to C - 1.
        weights: (B,), of each text's loss; their mean is 1.
    """

    embeddings: np.ndarray
    labels: np.ndarray
    weights: np.ndarray

    def take(self, rows: np.ndarray) -> Labelled:
        """Some of the texts."""
        return Labelled(self.embeddings[rows], self.labels[rows], self.weights[rows])


def weights_of(labels: np.ndarray, class_weight: str | None) -> np.ndarray:
    """Weights (B,): 1, or with ``"balanced"`` in inverse proportion to the class's texts."""
    if class_weight is None:
        return np.ones(len(labels))
    counts = np.bincount(labels)
    return len(labels) / (len(counts) * counts[labels])


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
    return [
        (np.flatnonzero(place != fold), np.flatnonzero(place == fold))
        for fold in range(folds)
        if (place == fold).any()
    ]


def held_out_logits(
    data: Labelled, folds: Sequence[Fold], fit: Callable[[Labelled], LinearHead]
) -> np.ndarray:
    """Logits of the texts held out, fold after fold, by heads fitted on the others."""
    return np.concatenate(
        [fit(data.take(known)).logits(data.embeddings[held]) for known, held in folds]
    )


@dataclass(frozen=True)
class Start:
    """The head that adaptation starts from.

    Attributes:
        name: how it is made.
        fit: makes it.
        evidence: of it; None without a text to hold out.
        tried: all the evidence that was compared.
    """

    name: str
    fit: Callable[[Labelled], LinearHead]
    evidence: Evidence | None
    tried: tuple[Evidence, ...]

    @property
    def temperature(self) -> float:
        """Of its probabilities."""
        return self.evidence.temperature if self.evidence else SINGLE_TEMPERATURE

    def head(self, data: Labelled) -> LinearHead:
        """The head, with probabilities at its temperature."""
        return self.fit(data).cooled(self.temperature)


def choose_start(data: Labelled, seed: int) -> Start:
    """Logistic regression or class means, by the log loss of texts held out.

    It is logistic regression with the first penalty, unless another one or class means are
    better by `HEAD_MARGIN`.

    Args:
        data: all labelled texts.
        seed: of the folds.
    """
    large = len(data.labels) * (data.labels.max() + 1) > _LARGE
    folds = stratified_folds(data.labels, 3 if large else MOST_FOLDS, seed)
    if not folds:
        return Start(_name(SINGLE_PENALTY), _logistic(SINGLE_PENALTY), None, ())
    penalties = INVERSE_PENALTIES[:1] if large else INVERSE_PENALTIES
    makers = {_name(penalty): _logistic(penalty) for penalty in penalties}
    makers["class means"] = lambda part: class_mean_head(part.embeddings, part.labels)
    held = np.concatenate([held for _, held in folds])
    tried = [
        Judged.of(name, held_out_logits(data, folds, fit), data.labels[held], data.weights[held])
        for name, fit in makers.items()
    ]
    better = [judged for judged in tried if judged.better_than(tried[0], HEAD_MARGIN)]
    best = min(better or tried[:1], key=lambda judged: judged.evidence.log_loss).evidence
    return Start(best.name, makers[best.name], best, tuple(judged.evidence for judged in tried))


def _name(penalty: float) -> str:
    return f"logistic regression (C={penalty:g})"


def _logistic(penalty: float) -> Callable[[Labelled], LinearHead]:
    return lambda part: logistic_head(part.embeddings, part.labels, part.weights, penalty)
