"""Adaptation until a requirement is met, judged on held-out texts of the user's own labels."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rnnopt.cli.progress import waiting
from rnnopt.cli.settings.commands import Adapt
from rnnopt.data.corpus import Corpus, merge, text_key
from rnnopt.data.files import read_corpus
from rnnopt.data.splits import stratified_holdout
from rnnopt.errors import InputError
from rnnopt.evaluation.report.tables import confusion_text, show
from rnnopt.tasks.requirement import Requirement
from rnnopt.tasks.text.adapt import JUDGED, Judgement, judge_texts, label_numbers
from rnnopt.tasks.text.classifier import Classifier

STEPS, MOST_STEPS = 20, 200  # without a requirement, and at most with one


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
    test = read_corpus(settings.test, **columns)
    judged = {text_key(text) for text in test.texts}
    kept = [i for i, text in enumerate(train.texts) if text_key(text) not in judged]
    if not kept:
        raise InputError(
            f"--test {settings.test}: all {len(train)} texts of --data are in it, and none is left "
            "to train on; take another test file, or leave --test out"
        )
    if len(kept) < len(train):
        print(f"left out of training, since they are in --test: {len(train) - len(kept)} texts")
    return replace(train.take(kept), dropped=train.dropped), test


def judge_unseen(
    settings: Adapt, path: str, classifier: Classifier, train: Corpus, held_out: Corpus
) -> tuple[dict[str, Any], str]:
    """Read --test, now that all else is done, and judge by it.

    Returns:
        (what `judged_facts` says, what `data_facts` says).

    Raises:
        InputError: as `unseen_texts` and `label_numbers`.
    """
    columns = {"text_column": settings.text_column, "label_column": settings.label_column}
    test, left_out = unseen_texts(path, merge([train, held_out]), **columns)
    names, _, labels = label_numbers(train, test)
    if left_out:
        print(f"left out of the test, since they are in --data: {left_out} texts")
    with waiting("judging"):
        judged = judge_texts(classifier, test.texts, labels)
    print(judgement_line(judged, "of the test"))
    show(confusion_text(names, judged.matrix))
    return judged_facts(judged, names), data_facts(test)


def unseen_texts(path: str, known: Corpus, **columns: str) -> tuple[Corpus, int]:
    """The texts of a test file that adaptation has not seen, to be read when all else is done.

    Args:
        path: the file.
        known: what was trained on, or chosen by.
        columns: as in `read_corpus`.

    Returns:
        (the texts, how many were left out).

    Raises:
        InputError: as `read_corpus`; no text is left.
    """
    test = read_corpus(path, **columns)
    seen = {text_key(text) for text in known.texts}
    kept = [i for i, text in enumerate(test.texts) if text_key(text) not in seen]
    if not kept:
        raise InputError(
            f"{path}: all of its {len(test)} texts are in --data too, none is left to judge by; "
            "the classifier is saved; take other texts"
        )
    return replace(test.take(kept), dropped=test.dropped), len(test) - len(kept)


def judged_facts(judged: Judgement, names: Sequence[str]) -> dict[str, Any]:
    """Figures and confusion matrix for a file."""
    return {
        **judged.figures(),
        "texts": int(judged.matrix.sum()),
        "labels": list(names),
        "confusion": judged.matrix.tolist(),
    }


def judgement_line(judged: Judgement, what: str) -> str:
    """The metrics, for people."""
    metrics = judged.metrics
    return (
        f"on {judged.matrix.sum()} texts {what}: accuracy {metrics.accuracy:.3f}, macro precision "
        f"{metrics.precision:.3f}, recall {metrics.recall:.3f}, F1 {metrics.f1:.3f}"
    )


def data_facts(corpus: Corpus) -> str:
    """By what a report names a corpus."""
    return f"{len(corpus)} texts, {len(corpus.classes)} classes, {corpus.fingerprint()}"
