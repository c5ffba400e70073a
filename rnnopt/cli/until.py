"""Adaptation until a requirement is met, judged on held-out texts of the user's own labels."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rnnopt.cli.progress import waiting
from rnnopt.cli.settings.commands import Adapt
from rnnopt.data.corpus import Corpus, counted, merge, text_key
from rnnopt.data.files import first_lines, read_corpus
from rnnopt.data.splits import stratified_holdout
from rnnopt.errors import InputError
from rnnopt.evaluation.report.tables import confusion_text, show
from rnnopt.tasks.requirement import DIGITS, Requirement
from rnnopt.tasks.text.adapt import JUDGED, Judgement, judge_texts, label_numbers
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.estimator.figures import wilson_interval

STEPS, MOST_STEPS = 20, 200  # without a requirement, and at most with one; more for more texts
PASSES = 2  # times that every training text is seen by itself
MOST_BY_ITSELF = 1000  # steps, which then take as long as is bearable


def adapt_requirement(settings: Adapt) -> Requirement | None:
    """--until of `rnnopt adapt`.

    Raises:
        InputError: it can't be read; the share held out is none.
    """
    if not 0 < settings.held_out < 1:
        raise InputError(
            f"--held-out {settings.held_out}: must lie between 0 and 1, such as 0.2: the share of "
            "each label's texts to judge by"
        )
    if settings.until is not None and settings.test and not os.path.exists(settings.test):
        raise InputError(f"{settings.test}: no such file; check the path of --test")
    return None if settings.until is None else Requirement.parse(settings.until, JUDGED)


def steps_for(texts: int, batch_size: int, least: int) -> int:
    """The steps that the data wants: `PASSES` times through it, at most `MOST_BY_ITSELF`.

    Args:
        texts: of training.
        batch_size: texts of a step.
        least: the steps that few texts get.
    """
    return max(least, min(math.ceil(PASSES * texts / batch_size), MOST_BY_ITSELF))


def seen_line(texts: int, batch_size: int, steps: int) -> str:
    """How much of the training texts has been seen, for people."""
    batches = f"{steps} steps of {min(batch_size, texts)} texts"
    if batch_size >= texts:
        return f"{batches}: every step saw all training texts"
    if (seen := steps * batch_size) < texts:
        return (
            f"{batches}: {seen} of {texts} training texts were seen, the others never; for all of "
            f"them take --steps {math.ceil(texts / batch_size)} or more, or leave it out"
        )
    return f"{batches}: each of {texts} training texts was seen {seen / texts:.1f} times on average"


class Watch:
    """Judges a classifier after its steps, and says when to stop.

    Args:
        classifier: what is being adapted.
        held_out: texts to judge by.
        labels: (B,), their classes.
        requirement: to be met.
        every: steps between judgements; one more at the last step.
        last: the last step.
        say: prints a line.

    Attributes:
        checks: every judgement: the step and its figures.
        met_step: the step at which the requirement was met; None while it is not.
        kept_step: the step whose values `restore` brings back: the one that met the requirement,
            else the one that came closest to it.
    """

    def __init__(
        self,
        classifier: Classifier,
        held_out: Corpus,
        labels: np.ndarray,
        requirement: Requirement,
        every: int,
        last: int,
        say: Callable[[str], None],
    ) -> None:
        self._classifier, self._texts, self._labels = classifier, held_out.texts, labels
        self._requirement, self._every, self._last = requirement, every, last
        self._say = say
        self._step = 0
        self._rank: tuple[float, ...] = ()
        self._values: list[torch.Tensor] = []
        self.checks: list[dict[str, Any]] = []
        self.met_step: int | None = None
        self.kept_step = 0

    def __call__(self) -> bool:
        """To be called after every step.

        Returns:
            Whether the requirement is met, so that adaptation is to stop.
        """
        self._step += 1
        if self._step % self._every and self._step != self._last:
            return False
        judged = judge_texts(self._classifier, self._texts, self._labels, again=True)
        figures = {name: [value] for name, value in judged.figures().items()}
        self.checks.append({"step": self._step, **judged.figures()})
        rank = self._requirement.rank(figures)
        if rank > self._rank:
            self._rank, self.kept_step = rank, self._step
            self._values = [param.detach().clone() for param in self._params()]
        met = self._requirement.met(figures)
        self.met_step = self._step if met else None
        next_move = "stop" if met else "go on" if self._step < self._last else "out of steps"
        self._say(f"step {self._step}: {self._requirement.words(figures)}, {next_move}")
        return met

    @torch.no_grad()
    def restore(self) -> None:
        """Bring the values of `kept_step` back."""
        for param, value in zip(self._params(), self._values, strict=True):
            param.copy_(value)

    def report(self) -> dict[str, Any]:
        """What happened, JSON-compatible."""
        return {
            "until": str(self._requirement),
            "met": self.met_step is not None,
            "met_step": self.met_step,
            "kept_step": self.kept_step,
            "checks": self.checks,
        }

    def _params(self) -> Sequence[torch.Tensor]:
        return [param for _, param in self._classifier.trainable()]


def user_texts(settings: Adapt) -> tuple[Corpus, Corpus]:
    """What to train on, and what to judge by: held out, or with --test and no --until that file.

    Raises:
        InputError: as `read_corpus` and `stratified_holdout`.
    """
    columns = {"text_column": settings.text_column, "label_column": settings.label_column}
    train = read_corpus(settings.data, **columns)
    if not settings.test or settings.until is not None:
        return stratified_holdout(train, fraction=settings.held_out, seed=settings.seed)
    test = read_corpus(settings.test, **columns, known_labels=train.labels)
    left = _without(
        train, test,
        f"--test {settings.test}: all {len(train)} texts of --data are in it, and none is left "
        "to train on; take another test file, or leave --test out",
    )  # fmt: skip
    if len(left) < len(train):
        print(f"left out of training, since they are in --test: {len(train) - len(left)} texts")
    _require_all_labels(settings, train, left)
    return left, test


def _without(corpus: Corpus, other: Corpus, error: str) -> Corpus:
    """The texts that another corpus lacks.

    Raises:
        InputError: with this text, where none is left.
    """
    known = {text_key(text) for text in other.texts}
    kept = [i for i, text in enumerate(corpus.texts) if text_key(text) not in known]
    if not kept:
        raise InputError(error)
    return replace(corpus.take(kept), dropped=corpus.dropped)


def _require_all_labels(settings: Adapt, train: Corpus, left: Corpus) -> None:
    """Refuse to lose a label because all its texts are in --test."""
    lost = sorted(set(train.labels) - set(left.labels))
    if not lost:
        return
    text = train.texts[train.labels.index(lost[0])]
    here, there = (
        first_lines(str(path), [text], text_column=settings.text_column)[0]
        for path in (settings.data, settings.test)
    )
    others = f" (and {len(lost) - 1} more labels)" if len(lost) > 1 else ""
    raise InputError(
        f"label {lost[0]!r}{others}: all its texts are in --test too, such as line {here} of "
        f"{settings.data}, which is line {there} of {settings.test}, and none is left to train on; "
        "add other texts of the label, or take its texts out of one of the files"
    )


def judge_unseen(
    settings: Adapt, path: str, classifier: Classifier, train: Corpus, held_out: Corpus
) -> tuple[dict[str, Any], str]:
    """Read --test, now that all else is done, and judge by it.

    Returns:
        (what `judged_facts` says, what `data_facts` says).

    Raises:
        InputError: as `read_corpus` and `label_numbers`; no text is left to judge by.
    """
    columns = {"text_column": settings.text_column, "label_column": settings.label_column}
    read = read_corpus(path, **columns, known_labels=train.labels)
    test = _without(
        read, merge([train, held_out]),
        f"{path}: all of its {len(read)} texts are in --data too, none is left to judge by; the "
        "classifier is saved; take other texts",
    )  # fmt: skip
    names, _, labels = label_numbers(train, test)
    if len(test) < len(read):
        print(f"left out of the test, since they are in --data: {len(read) - len(test)} texts")
    with waiting("judging"):
        judged = judge_texts(classifier, test.texts, labels)
    print(judgement_line(judged, "of --test"))
    show(confusion_text(names, judged.matrix))
    return judged_facts(judged, names), data_facts(test)


def judged_facts(judged: Judgement, names: Sequence[str]) -> dict[str, Any]:
    """Figures and confusion matrix for a file."""
    return {
        **judged.figures(),
        "accuracy_interval": [round(end, DIGITS) for end in _accuracy_interval(judged)],
        "texts": int(judged.matrix.sum()),
        "labels": list(names),
        "confusion": judged.matrix.tolist(),
    }


def judgement_line(judged: Judgement, what: str) -> str:
    """The metrics, for people."""
    metrics = judged.metrics
    low, high = _accuracy_interval(judged)
    return (
        f"on {counted(int(judged.matrix.sum()), 'text')} {what}: accuracy "
        f"{metrics.accuracy:.3f} (95 % interval {low:.3f} to {high:.3f}), macro precision "
        f"{metrics.precision:.3f}, recall "
        f"{metrics.recall:.3f}, F1 {metrics.f1:.3f}"
    )


def _accuracy_interval(judged: Judgement) -> tuple[float, float]:
    return wilson_interval(int(judged.matrix.trace()), int(judged.matrix.sum()))


def say_if_no_better(judged: Judgement, names: Sequence[str], say: Callable[[str], None]) -> None:
    """Tell of a classifier that is no better than one that always gives the commonest answer."""
    counts = judged.matrix.sum(axis=1)
    if judged.matrix.trace() <= counts.max():
        say(
            f"WARNING: accuracy {judged.metrics.accuracy:.3f} is no better than always answering "
            f"{names[int(counts.argmax())]!r}, {counts.max() / counts.sum():.3f}: nothing was "
            "learned that these texts show; raise --steps, leave --lr out, or check the labels"
        )


def data_facts(corpus: Corpus) -> str:
    """By what a report names a corpus."""
    return f"{len(corpus)} texts, {len(corpus.classes)} classes, {corpus.fingerprint()}"
