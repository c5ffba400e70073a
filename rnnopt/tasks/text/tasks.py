"""Text classification as tasks: episodes that are tokenised for a classifier.

Shapes: B texts, S tokens, C ways.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rnnopt.errors import InputError
from rnnopt.tasks.episodes import EpisodeSampler
from rnnopt.tasks.metrics import classification_metrics, confusion_matrix
from rnnopt.tasks.protocol import Metric, Scores, Task, TaskSource, bounded_loss
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.encoder.tokens import Batch

# A task's episode, classifier and batch size are drawn from separate random streams.
_CLASSIFIER_STREAM = 1
_BATCH_STREAM = 2
# The temperatures that `calibrated_loss` tries. The logits of a head that has hardly been adapted
# differ by hundredths, those of a head after many large steps by hundreds.
_TEMPERATURES = tuple(0.02 * 10 ** (step / 12) for step in range(61))
# Texts in a piece on a CPU: few enough to have similar lengths, enough for fast matrix products.
PIECE = 16
TEXT_METRICS = {
    "accuracy": Metric(higher_is_better=True),
    "loss": Metric(),
    "f1": Metric(higher_is_better=True, tuned_by="accuracy"),
}


@dataclass(frozen=True)
class LabelledTexts:
    """Labelled texts that are tokenised for a classifier, in pieces of texts of similar length.

    On a CPU the time of a forward pass grows with the number of tokens. Padding all texts to the
    length of the longest would double it.

    Attributes:
        pieces: (batch, labels (B,)) of each piece.
        count: the number of texts in all pieces.
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
        """Tokenise texts for a classifier, on its device.

        Args:
            classifier: the classifier that the texts are for.
            texts: B texts.
            labels: their classes, 0 to C - 1.
            again: whether the same texts are used again, see `Classifier.batch`.
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
        """The cross-entropy of a module on these texts, mean nats per text; 0-d.

        Args:
            classifier: the classifier that the texts were tokenised for.
            module: its model, or a functional copy of it.
            calibrated: the share of `calibrated_loss` in the loss, 0 to 1.
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
        calibrated: the share of `calibrated_loss`, 0 to 1.
    """
    plain = cross_entropy(logits, labels)
    if not calibrated:
        return plain
    return (1 - calibrated) * plain + calibrated * calibrated_loss(logits, labels)


def calibrated_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy at the temperature that is best for these logits, mean nats; 0-d.

    Multiplying all logits by a factor does not change this loss, within the range of the
    temperatures that are tried. It measures how well the classes are told apart and not how
    confident the predictions are. Source: temperature scaling, Guo et al. 2017, arXiv:1706.04599.
    The temperature is the best one of a grid. It is treated as a constant; by the envelope theorem
    the gradient is still that of the minimum over temperatures.

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


class TextTask(Task):
    """One episode, tokenised for a classifier.

    Args:
        classifier: the classifier that adapts.
        batches: the support set in minibatches, which the adaptation steps use in turn.
        query: the query set.
        ways: C, the number of classes.
    """

    def __init__(
        self,
        classifier: Classifier,
        batches: tuple[LabelledTexts, ...],
        query: LabelledTexts,
        ways: int,
    ) -> None:
        self.classifier, self.batches, self.query, self.ways = classifier, batches, query, ways
        self.loss_unit = math.log(ways)  # the loss of a guess

    @property
    def support(self) -> LabelledTexts:
        """The whole support set."""
        pieces = tuple(piece for batch in self.batches for piece in batch.pieces)
        return LabelledTexts(pieces, sum(batch.count for batch in self.batches))

    def support_loss(self, module: nn.Module, step: int) -> Tensor:
        """Cross-entropy on the minibatch of this step, mean nats per text; 0-d."""
        return self.batches[step % len(self.batches)].loss(self.classifier, module)

    def query_loss(self, module: nn.Module, step: int, calibrated: float = 0.0) -> Tensor:
        """Cross-entropy on the query set, mean nats per text; 0-d; see `mixed_loss`."""
        return self.query.loss(self.classifier, module, calibrated)

    def scores(self, module: nn.Module, step: int = 0) -> Scores:
        """The figures of a module on the query set, the same at every step; see `judge`."""
        return judge(self.classifier, self.query, module)


class TextTasks(TaskSource):
    """Text classification tasks by number.

    A task depends only on the sampler, the classifiers and the number.

    Args:
        sampler: draws the episodes.
        classifiers: the classifiers that adapt. If there are several, each task draws one of them,
            uniformly; a classifier that is listed more than once is drawn more often.
        batch_sizes: the largest number of support texts in a minibatch. If there are several, each
            task draws one of them. None uses the whole support set in every step.

    Attributes:
        classifier: the first classifier.

    Raises:
        InputError: a batch size below 1.
    """

    metrics = TEXT_METRICS

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

    @property
    def learner(self) -> Classifier:
        """The first classifier."""
        return self.classifier

    def learner_of(self, number: int) -> Classifier:
        """The classifier that adapts to task `number`."""
        generator = np.random.default_rng([self.sampler.seed, number, _CLASSIFIER_STREAM])
        return self._classifiers[generator.integers(len(self._classifiers))]

    def load(self, number: int) -> TextTask:
        """Task `number`."""
        episode = self.sampler.sample(number)
        classifier = self.learner_of(number)
        texts = self.sampler.corpus.texts

        def read(rows: np.ndarray, labels: np.ndarray) -> LabelledTexts:
            return LabelledTexts.read(classifier, [texts[i] for i in rows], labels.tolist())

        pieces = self._pieces(number, len(episode.support))
        batches = zip(  # an episode is shuffled, so that this division is random
            np.array_split(episode.support, pieces), np.array_split(episode.support_labels, pieces)
        )
        return TextTask(
            classifier,
            tuple(read(*batch) for batch in batches),
            read(episode.query, episode.query_labels),
            len(episode.classes),
        )

    def _pieces(self, number: int, texts: int) -> int:
        """The number of minibatches of the support set of task `number`."""
        if self._batch_sizes is None:
            return 1
        generator = np.random.default_rng([self.sampler.seed, number, _BATCH_STREAM])
        size = self._batch_sizes[generator.integers(len(self._batch_sizes))]
        return math.ceil(texts / size)


@torch.no_grad()
def judge(classifier: Classifier, texts: LabelledTexts, module: nn.Module | None = None) -> Scores:
    """The figures of a classifier on labelled texts, without dropout.

    Args:
        classifier: the classifier that the texts were tokenised for.
        texts: the texts, with the classes of its head.
        module: the module to run; None means the classifier's own.

    Returns:
        ``loss``, mean nats per text, at most `DIVERGED_LOSS`; ``accuracy``; ``f1``, macro F1; and
        ``calibrated``, see `calibrated_loss`. Macro recall is not among them, because it equals the
        accuracy: an episode has the same number of query texts in every class.
    """
    model = classifier.model if module is None else module
    training = model.training
    model.eval()
    logits = torch.cat(
        [classifier.forward(model, batch).float() for batch, _ in texts.pieces]
    )  # (B, C)
    model.train(training)
    labels = torch.cat([labels for _, labels in texts.pieces])
    predicted = logits.argmax(dim=1).cpu().numpy()
    metrics = classification_metrics(
        confusion_matrix(predicted, labels.cpu().numpy(), classifier.ways)
    )
    plain, calibrated = (
        bounded_loss(float(loss(logits, labels))) for loss in (cross_entropy, calibrated_loss)
    )
    return {
        "loss": plain,
        "accuracy": metrics.accuracy,
        "f1": metrics.f1,
        "calibrated": calibrated,
    }
