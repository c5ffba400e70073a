"""Transfer to the user's own task: a labelled file in, a classifier folder out."""

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
    """The label names, sorted, and each text's label as its place among them.

    Numbers are sorted by value, so that labels 0 to 11, or 0.0 to 11.0, are the places 0 to 11.

    Raises:
        InputError: fewer than two labels, or a test label that training does not have.
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
            "there, or add training texts for it"
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
    """Steps on minibatches, or on everything where it fits one batch.

    Args:
        classifier: adapted in place.
        optimizer: over its trainable parameters.
        texts: training texts.
        labels: (B,), their classes.
        steps: optimizer steps.
        batch_size: texts a step; batches run through a new shuffle in each epoch.
        seed: of the shuffles.
        tick: called after each step, with its loss; says True to stop.

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
        # the last, shorter batch of an epoch is left out: its gradient is noisier than the rest
        for start in range(0, max(count - batch_size, 0) + 1, batch_size):
            yield order[start : start + batch_size]


def in_batches(
    classifier: Classifier, texts: Sequence[str], labels: np.ndarray, batch_size: int = 64
) -> LabelledTexts:
    """All texts, ready for a classifier in pieces that fit a GPU whatever their number."""
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
    """Logits of each text, (B, C); `again` as in `Classifier.batch`."""
    parts = [
        classifier.logits(classifier.batch(texts[start : start + batch_size], again=again))
        for start in range(0, len(texts), batch_size)
    ]
    return torch.cat(parts)


@dataclass(frozen=True)
class Judgement:
    """A classifier on labelled texts.

    Attributes:
        metrics: see there.
        loss: mean nats per text.
        matrix: (C, C), counts of texts [actual, predicted].
    """

    metrics: Metrics
    loss: float
    matrix: np.ndarray

    def figures(self) -> dict[str, float | None]:
        """Metrics and loss as they are written and compared: to 5 digits, None if not finite."""
        values = {**asdict(self.metrics), "loss": self.loss}
        return {
            name: round(value, DIGITS) if math.isfinite(value) else None
            for name, value in values.items()
        }


JUDGED = (*(field.name for field in fields(Metrics)), "loss")  # what `Judgement.figures` holds


def judge_texts(
    classifier: Classifier, texts: Sequence[str], labels: np.ndarray, *, again: bool = False
) -> Judgement:
    """Judge the classifier as it stands.

    Args:
        classifier: of C classes.
        texts: B texts, 1 or more.
        labels: (B,), their classes.
        again: they are judged by more than once.
    """
    logits = class_logits(classifier, texts, again=again).float().cpu()
    loss = float(cross_entropy(logits, torch.as_tensor(labels)))
    matrix = confusion_matrix(logits.argmax(dim=1).numpy(), labels, classifier.ways)
    return Judgement(classification_metrics(matrix), loss, matrix)
