"""What a user's own labels say about a classifier: cross-validation.

Shapes: B texts, H embedding size, C classes. Labels are (B,) class numbers, or (B, C) zeros and
ones where a text may have several, see `rnnopt.tasks.text.estimator.objective.protocol`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rnnopt.errors import InputError
from rnnopt.tasks.text.estimator.heads import INVERSE_PENALTIES, LinearHead
from rnnopt.tasks.text.estimator.objective.choice import objective_of
from rnnopt.tasks.text.estimator.objective.protocol import Fold, MakeHead

MOST_FOLDS = 5
# Standard errors by which something must be better to take the place of a start: another penalty,
# or class means, that of the default; adaptation that of the start. A rule that harms came within
# 0.1 of the start on 20 texts of validation classes, and then lost 18 points on others.
HEAD_MARGIN, ADAPTATION_MARGIN = 2.0, 1.0
_LARGE = 30_000  # texts times classes from which on fewer penalties and folds are tried


@dataclass(frozen=True)
class Evidence:
    """How well something classifies texts that were held out from it.

    Attributes:
        name: what was judged.
        accuracy: share of the texts held out; each weighs as in fitting. Where a text may have
            several labels, all of them have to be right.
        log_loss: mean nats a text, at `temperature`.
        temperature: that suits these texts best.
        micro_f1, macro_f1: where a text may have several labels; else None. The thresholds were
            chosen on other texts.
    """

    name: str
    accuracy: float
    log_loss: float
    temperature: float
    micro_f1: float | None = None
    macro_f1: float | None = None

    @property
    def quality(self) -> float:
        """What must not fall for adaptation to be kept: accuracy, or micro F1 where there is one.

        That all labels of a text are right is rare where there are many, and says little.
        """
        return self.accuracy if self.micro_f1 is None else self.micro_f1


@dataclass(frozen=True)
class Judged:
    """Evidence, and what it is made of.

    Attributes:
        evidence: see there.
        losses: (B,), of each text held out, at the temperature, in nats.
        weights: (B,), of the texts.
        logits: (B, C), of the texts, at the temperature.
        labels: of the texts.
    """

    evidence: Evidence
    losses: np.ndarray
    weights: np.ndarray
    logits: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, name: str, logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> Judged:
        """Judge logits (B, C) of texts held out by their labels, with weights (B,)."""
        objective = objective_of(labels)
        temperature = objective.temperature(logits, labels, weights)
        cooled = logits / temperature
        losses = objective.losses(cooled, labels)
        accuracy = float(np.average(objective.right(cooled, labels), weights=weights))
        loss = float(np.average(losses, weights=weights))
        f1 = objective.f1(cooled, labels) or (None, None)
        evidence = Evidence(name, accuracy, loss, temperature, *f1)
        return cls(evidence, losses, weights, cooled, labels)

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
        labels: (B,), 0 to C - 1; or (B, C), zeros and ones.
        weights: (B,), of each text's loss; their mean is 1.
    """

    embeddings: np.ndarray
    labels: np.ndarray
    weights: np.ndarray

    def take(self, rows: np.ndarray) -> Labelled:
        """Some of the texts."""
        return Labelled(self.embeddings[rows], self.labels[rows], self.weights[rows])


def weights_of(
    labels: np.ndarray,
    class_weight: Literal["balanced"] | Mapping[Any, float] | None,
    classes: Sequence[Any] = (),
) -> np.ndarray:
    """Weights (B,) of texts, whose mean is 1.

    Args:
        labels: (B,), 0 to C - 1; or (B, C), of which each text weighs the same.
        class_weight: None weighs all texts alike, ``"balanced"`` in inverse proportion to the
            class's texts. Or the weight of each class; one that is not named has the weight 1.
        classes: the names of the classes in `class_weight`, (C,).

    Raises:
        InputError: `class_weight` names a class that is not there.
    """
    if class_weight is None:
        return np.ones(len(labels))
    if class_weight == "balanced":
        counts = np.bincount(labels)
        return len(labels) / (len(counts) * counts[labels])
    if foreign := [name for name in class_weight if name not in set(classes)]:
        raise InputError(
            f"class_weight names {foreign[0]!r}, which is none of the {len(classes)} labels (such "
            f"as {classes[0]!r}); correct it, or leave it out"
        )
    weights = np.array([float(class_weight.get(name, 1)) for name in classes])[labels]
    return weights / weights.mean()


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
        make: makes it, of embeddings, labels and weights.
        judged: on texts held out; None without a text to hold out.
        tried: all the evidence that was compared.
        single_temperature: of the probabilities where nothing is judged.
    """

    name: str
    make: MakeHead
    judged: Judged | None
    tried: tuple[Evidence, ...]
    single_temperature: float

    @property
    def evidence(self) -> Evidence | None:
        """Of what was judged."""
        return self.judged.evidence if self.judged else None

    @property
    def temperature(self) -> float:
        """Of its probabilities."""
        return self.judged.evidence.temperature if self.judged else self.single_temperature

    def fit(self, data: Labelled) -> LinearHead:
        """The head, before its temperature."""
        return self.make(data.embeddings, data.labels, data.weights)


def choose_start(data: Labelled, seed: int) -> Start:
    """Logistic regression or class means, by the log loss of texts held out.

    It is logistic regression with the first penalty, unless another one or class means are
    better by `HEAD_MARGIN`.

    Args:
        data: all labelled texts.
        seed: of the folds.
    """
    objective = objective_of(data.labels)
    large = len(data.labels) * objective.ways(data.labels) > _LARGE
    folds = objective.folds(data.labels, 3 if large else MOST_FOLDS, seed)
    if not folds:
        penalty = objective.single_penalty
        make, temperature = objective.logistic(penalty), objective.single_temperature
        return Start(_name(penalty), make, None, (), temperature)
    penalties = INVERSE_PENALTIES[:1] if large else INVERSE_PENALTIES
    makers = {
        **{_name(penalty): objective.logistic(penalty) for penalty in penalties},
        **objective.others(),
    }
    held = np.concatenate([held for _, held in folds])
    labels, weights = data.labels[held], data.weights[held]
    tried = [
        Judged.of(name, held_out_logits(data, folds, _fitting(make)), labels, weights)
        for name, make in makers.items()
    ]
    better = [judged for judged in tried if judged.better_than(tried[0], HEAD_MARGIN)]
    best = min(better or tried[:1], key=lambda judged: judged.evidence.log_loss)
    name, evidence = best.evidence.name, tuple(judged.evidence for judged in tried)
    return Start(name, makers[name], best, evidence, objective.single_temperature)


def _name(penalty: float) -> str:
    return f"logistic regression (C={penalty:g})"


def _fitting(make: MakeHead) -> Callable[[Labelled], LinearHead]:
    return lambda part: make(part.embeddings, part.labels, part.weights)
