"""Adaptation to a user's own labelled texts, and the metrics of the adapted classifier."""

from __future__ import annotations

import decimal
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rnnopt.data.corpus import Corpus
from rnnopt.errors import InputError
from rnnopt.tasks.metrics import Metrics, classification_metrics, confusion_matrix
from rnnopt.tasks.requirement import DIGITS
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.tasks import LabelledTexts


def label_numbers(train: Corpus, test: Corpus) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Number the labels: sort their names, and give each text the index of its label.

    Labels that are numbers are sorted by value, so that labels 0 to 11, or 0.0 to 11.0, get the
    indices 0 to 11.

    Args:
        train: the training texts; their labels are the classes.
        test: the test texts.

    Returns:
        The label names, the training labels (B,) and the test labels (B',), as indices of names.

    Raises:
        InputError: the training texts have fewer than two labels, or the test texts have a label
            that the training texts lack.
    """
    names = sorted(set(train.labels))
    if all(re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", name) for name in names):
        names.sort(key=decimal.Decimal)
    if len(names) < 2:
        raise InputError(
            f"the training texts have {len(names)} label ({', '.join(names)}); a classifier needs "
            "at least 2: check --label-column"
        )
    foreign = sorted(set(test.labels) - set(names))
    if foreign:
        raise InputError(
            f"label {foreign[0]!r} is in the test texts and not in the training texts; drop it "
            "from the test texts, or add training texts for it"
        )
    number = {name: i for i, name in enumerate(names)}
    return (
        names,
        np.array([number[label] for label in train.labels]),
        np.array([number[label] for label in test.labels]),
    )


def fit(
    classifier: Classifier,
    optimizer: torch.optim.Optimizer,
    texts: Sequence[str],
    labels: np.ndarray,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    tick: Callable[[float], bool | None] = lambda loss: None,
) -> list[float]:
    """Adapt a classifier to labelled texts, in minibatches or in one batch if all texts fit.

    Args:
        classifier: the classifier; it is adapted in place.
        optimizer: the optimizer of its trainable parameters.
        texts: B training texts.
        labels: (B,), their classes.
        steps: the number of optimizer steps.
        batch_size: the number of texts in a step. The texts are shuffled anew in each epoch.
        seed: decides the shuffles.
        tick: called after each step with its loss; adaptation stops if it returns True.

    Returns:
        The loss before each step, mean nats per text.
    """
    batches = _shuffled_batches(len(texts), batch_size, seed)
    again = steps * batch_size > len(texts)
    losses = []
    for _ in range(steps):
        chosen = next(batches)
        batch = LabelledTexts.read(
            classifier, [texts[i] for i in chosen], labels[chosen], again=again
        )
        optimizer.zero_grad()
        loss = batch.loss(classifier, classifier.model)
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
        if tick(losses[-1]):
            break
    return losses


def _shuffled_batches(count: int, batch_size: int, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(count) if count > batch_size else np.arange(count)
        # the last, shorter batch of an epoch is left out, since its gradient is noisier
        for start in range(0, max(count - batch_size, 0) + 1, batch_size):
            yield order[start : start + batch_size]


def in_batches(
    classifier: Classifier, texts: Sequence[str], labels: np.ndarray, batch_size: int = 64
) -> LabelledTexts:
    """Tokenise texts for a classifier, in batches that fit a GPU however many texts there are.

    Args:
        classifier: the classifier that the texts are for.
        texts: B texts.
        labels: (B,), their classes.
        batch_size: the number of texts that are run through the classifier together.
    """
    parts = [
        LabelledTexts.read(
            classifier,
            texts[start : start + batch_size],
            labels[start : start + batch_size].tolist(),
            again=False,
        )
        for start in range(0, len(texts), batch_size)
    ]
    return LabelledTexts(tuple(piece for part in parts for piece in part.pieces), len(texts))


@torch.no_grad()
def class_logits(
    classifier: Classifier, texts: Sequence[str], batch_size: int = 64, *, again: bool = False
) -> Tensor:
    """The logits of texts, (B, C).

    Args:
        classifier: the classifier.
        texts: B texts, 1 or more.
        batch_size: the number of texts that are run through the classifier together.
        again: whether the same texts will be classified again, see `Classifier.batch`.
    """
    parts = [
        classifier.logits(classifier.batch(texts[start : start + batch_size], again=again))
        for start in range(0, len(texts), batch_size)
    ]
    return torch.cat(parts)


@dataclass(frozen=True)
class Judgement:
    """The performance of a classifier on labelled texts.

    Attributes:
        metrics: accuracy, and macro precision, recall and F1.
        loss: cross-entropy, mean nats per text.
        matrix: the confusion matrix, (C, C), counts of texts [actual, predicted].
    """

    metrics: Metrics
    loss: float
    matrix: np.ndarray

    def figures(self) -> dict[str, float | None]:
        """Metrics and loss by name, rounded to 5 digits; None if a value is not finite."""
        values = {**asdict(self.metrics), "loss": self.loss}
        return {
            name: round(value, DIGITS) if math.isfinite(value) else None
            for name, value in values.items()
        }


JUDGED = (*(field.name for field in fields(Metrics)), "loss")  # the keys of `Judgement.figures`


def judge_texts(
    classifier: Classifier, texts: Sequence[str], labels: np.ndarray, *, again: bool = False
) -> Judgement:
    """Measure a classifier's performance on labelled texts.

    Args:
        classifier: the classifier, of C classes.
        texts: B texts, 1 or more.
        labels: (B,), their classes.
        again: whether the same texts will be classified again, see `Classifier.batch`.
    """
    logits = class_logits(classifier, texts, again=again).float().cpu()
    loss = float(cross_entropy(logits, torch.as_tensor(labels)))
    matrix = confusion_matrix(logits.argmax(dim=1).numpy(), labels, classifier.ways)
    return Judgement(classification_metrics(matrix), loss, matrix)
