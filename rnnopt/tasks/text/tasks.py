"""An episode made ready for a classifier, and a run of adaptation on it.

Shapes: B texts, S tokens, C ways.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rnnopt.errors import InputError
from rnnopt.meta.unroll import LossFunction
from rnnopt.tasks.episodes import EpisodeSampler
from rnnopt.tasks.metrics import classification_metrics, confusion_matrix
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.encoder.tokens import Batch

# A run that ended in NaN or beyond counts as this much; JSON has no infinity, means need one.
DIVERGED_LOSS = 1e3
# Tells the draw of a task's classifier from that of its episode.
_CLASSIFIER_STREAM = 1
# Tells the draw of its batch size from both.
_BATCH_STREAM = 2
# Temperatures tried by `calibrated_loss`: logits of a head that has hardly moved differ by a
# hundredth, those of one that was driven far by hundreds.
_TEMPERATURES = tuple(0.02 * 10 ** (step / 12) for step in range(61))
# Texts to a piece on a CPU: small enough to be of like length, large enough for the matrix units.
PIECE = 16


@dataclass(frozen=True)
class LabelledTexts:
    """Texts ready for a classifier, as pieces of texts of like length, with their labels (B,).

    On a CPU time goes with the number of tokens, and texts differ: padding all of them to the
    longest would double it.
    """

    pieces: tuple[tuple[Batch, Tensor], ...]
    count: int

    @classmethod
    def read(
        cls,
        classifier: Classifier,
        texts: Sequence[str],
        labels: Sequence[int],
        *,
        again: bool = True,
    ) -> LabelledTexts:
        """Tokenise texts for a classifier, onto its device.

        Args:
            classifier: what they are for.
            texts: B texts.
            labels: their classes.
            again: they are read more than once: keep what frozen layers make of them.
        """
        size = len(texts) if classifier.device.type == "cuda" else PIECE
        lengths = classifier.tokens.lengths(texts)
        order = sorted(range(len(texts)), key=lambda i: lengths[i])
        rows = [order[start : start + size] for start in range(0, len(order), size)]
        pieces = tuple(
            (
                classifier.batch([texts[i] for i in row], again=again),
                torch.tensor([int(labels[i]) for i in row], device=classifier.device),
            )
            for row in rows
        )
        return cls(pieces, len(texts))

    def loss(self, classifier: Classifier, module: nn.Module, calibrated: float = 0.0) -> Tensor:
        """Cross-entropy of `module`, mean nats per text; 0-d.

        Args:
            classifier: whose texts these are.
            module: its model, or a functional copy.
            calibrated: share of `calibrated_loss` in it, 0 to 1.
        """
        logits, labels = zip(
            *((classifier.forward(module, batch), labels) for batch, labels in self.pieces)
        )
        return mixed_loss(torch.cat(logits), torch.cat(labels), calibrated)


def mixed_loss(logits: Tensor, labels: Tensor, calibrated: float) -> Tensor:
    """``(1 - calibrated) * cross-entropy + calibrated * calibrated_loss``, mean nats; 0-d.

    Args:
        logits: (B, C).
        labels: (B,).
        calibrated: 0 to 1.
    """
    plain = cross_entropy(logits, labels)
    if not calibrated:
        return plain
    return (1 - calibrated) * plain + calibrated * calibrated_loss(logits, labels)


def calibrated_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy at the temperature that suits these logits best, mean nats; 0-d.

    Confidence alone neither lowers nor raises it, within the range of temperatures tried: what
    counts is how far the classes are told apart. Source: temperature scaling, Guo et al. 2017,
    arXiv:1706.04599. The temperature is the best of a grid and held constant, so that by the
    envelope theorem the gradient is that of the minimum.

    Args:
        logits: (B, C).
        labels: (B,).
    """
    with torch.no_grad():
        tried = torch.tensor(_TEMPERATURES, dtype=logits.dtype, device=logits.device)
        scaled = logits / tried[:, None, None]  # (tried, B, C)
        losses = cross_entropy(
            scaled.flatten(0, 1), labels.repeat(len(tried)), reduction="none"
        ).view(len(tried), -1)
        best = tried[losses.mean(dim=1).argmin()]
    return cross_entropy(logits / best, labels)


@dataclass(frozen=True)
class Task:
    """One episode, ready for a classifier.

    Attributes:
        batches: the support set in minibatches, which the steps of adaptation take in turn.
        query: the query set.
        ways: classes.
    """

    batches: tuple[LabelledTexts, ...]
    query: LabelledTexts
    ways: int

    @property
    def support(self) -> LabelledTexts:
        """The whole support set."""
        pieces = tuple(piece for batch in self.batches for piece in batch.pieces)
        return LabelledTexts(pieces, sum(batch.count for batch in self.batches))

    def support_loss(self, classifier: Classifier) -> LossFunction:
        """The loss that adaptation descends."""
        return lambda module, step: self.batches[step % len(self.batches)].loss(classifier, module)

    def query_loss(
        self, classifier: Classifier, calibrated: Callable[[int], float] = lambda step: 0.0
    ) -> LossFunction:
        """The loss that judges it, see `LabelledTexts.loss`; its share after a step, from 0."""
        return lambda module, step: self.query.loss(classifier, module, calibrated(step))


class TaskSource:
    """Tasks by number: the same sampler, classifiers and number is always the same task.

    Args:
        sampler: draws the episodes.
        classifiers: what the tasks adapt; of several each task draws one, uniformly. One may stand
            there more than once, to be drawn more often.
        batch_sizes: texts of the support set to a minibatch, at most; of several each task draws
            one. None takes all at once.

    Attributes:
        classifier: the first of them.
    """

    def __init__(
        self,
        sampler: EpisodeSampler,
        classifiers: Classifier | Sequence[Classifier],
        batch_sizes: Sequence[int] | None = None,
    ) -> None:
        for size in batch_sizes or ():
            if size < 1:
                raise InputError(f"batch size {size} (--batch-size): must be at least 1")
        self.sampler = sampler
        self._batch_sizes = None if batch_sizes is None else tuple(map(int, batch_sizes))
        self._classifiers = (
            [classifiers] if isinstance(classifiers, Classifier) else list(classifiers)
        )
        self.classifier = self._classifiers[0]

    def classifier_of(self, index: int) -> Classifier:
        """What task number `index` adapts."""
        generator = np.random.default_rng([self.sampler.seed, index, _CLASSIFIER_STREAM])
        return self._classifiers[generator.integers(len(self._classifiers))]

    def load(self, index: int) -> Task:
        """Task number `index`."""
        episode = self.sampler.sample(index)
        classifier = self.classifier_of(index)
        texts = self.sampler.corpus.texts

        def read(rows: np.ndarray, labels: np.ndarray) -> LabelledTexts:
            return LabelledTexts.read(classifier, [texts[i] for i in rows], labels.tolist())

        pieces = self._pieces(index, len(episode.support))
        batches = zip(  # shuffled already, so that any division is random
            np.array_split(episode.support, pieces), np.array_split(episode.support_labels, pieces)
        )
        return Task(
            tuple(read(*batch) for batch in batches),
            read(episode.query, episode.query_labels),
            len(episode.classes),
        )

    def _pieces(self, index: int, texts: int) -> int:
        """How many minibatches the support set of task number `index` is divided into."""
        if self._batch_sizes is None:
            return 1
        generator = np.random.default_rng([self.sampler.seed, index, _BATCH_STREAM])
        size = self._batch_sizes[generator.integers(len(self._batch_sizes))]
        return math.ceil(texts / size)


@dataclass(frozen=True)
class Score:
    """Query loss (mean nats per text, at most `DIVERGED_LOSS`), accuracy, macro F1, and
    `calibrated_loss`.

    Macro recall is the accuracy, since an episode has as many query texts of every class. F1 and
    the calibrated loss are None where they were not taken.
    """

    loss: float
    accuracy: float
    f1: float | None = None
    calibrated: float | None = None


@torch.no_grad()
def judge(classifier: Classifier, texts: LabelledTexts) -> Score:
    """The classifier as it stands, without dropout, on these texts."""
    training = classifier.model.training
    classifier.model.eval()
    logits = torch.cat([classifier.logits(batch).float() for batch, _ in texts.pieces])  # (B, C)
    classifier.model.train(training)
    labels = torch.cat([labels for _, labels in texts.pieces])
    predicted = logits.argmax(dim=1).cpu().numpy()
    metrics = classification_metrics(
        confusion_matrix(predicted, labels.cpu().numpy(), classifier.ways)
    )
    losses = [float(loss(logits, labels)) for loss in (cross_entropy, calibrated_loss)]
    plain, calibrated = (bounded_loss(loss) for loss in losses)
    return Score(plain, metrics.accuracy, metrics.f1, calibrated)


def bounded_loss(loss: float) -> float:
    """At most `DIVERGED_LOSS`, which stands for NaN too."""
    return min(loss, DIVERGED_LOSS) if loss == loss else DIVERGED_LOSS


@dataclass(frozen=True)
class Adaptation:
    """What a run of adaptation reached.

    Attributes:
        scores: the score at each budget of steps.
        seconds_per_step: forward, backward and step, without judging.
        undone: steps that the optimizer took back, see `LearnedOptimizer.undone`.
    """

    scores: dict[int, Score]
    seconds_per_step: float
    undone: int = 0


def adapt_and_judge(
    classifier: Classifier,
    optimizer: torch.optim.Optimizer,
    task: Task,
    budgets: Collection[int],
) -> Adaptation:
    """Steps on the support set's batches in turn, judged on the query set at each budget of steps.

    Args:
        classifier: at its starting values for this task; adapted when this returns.
        optimizer: over the classifier's trainable parameters; one with `eval` and `train` is judged
            in the state of `eval`.
        task: the task.
        budgets: numbers of steps, 1 or more.

    Returns:
        The scores and the time.
    """
    loss_of = task.support_loss(classifier)
    scores, seconds = {}, 0.0
    for step in range(1, max(budgets) + 1):
        started = time.perf_counter()
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(classifier.model, step - 1))
        optimizer.step()
        if classifier.device.type == "cuda":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - started
        if step in budgets:
            with _judged_point(optimizer):
                scores[step] = judge(classifier, task.query)
    return Adaptation(scores, seconds / max(budgets), getattr(optimizer, "undone", 0))


@contextmanager
def _judged_point(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let an optimizer show the parameters that it answers for, if they aren't those it steps from.

    Schedule-Free optimizers (Defazio et al. 2024, arXiv:2405.15682) take gradients at one point and
    judge another, an average; they switch by `eval` and `train`.
    """
    switches = hasattr(optimizer, "eval") and hasattr(optimizer, "train")
    if switches:
        optimizer.eval()  # type: ignore[attr-defined]
    yield
    if switches:
        optimizer.train()  # type: ignore[attr-defined]
