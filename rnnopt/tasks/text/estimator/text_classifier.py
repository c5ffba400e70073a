"""`TextClassifier`: texts and labels in, a calibrated classifier out."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import NotFittedError

from rnnopt.errors import InputError
from rnnopt.storage.memory import peak_bytes
from rnnopt.tasks.text.encoder.loading import encoder_name
from rnnopt.tasks.text.encoder.sentence import SentenceEncoder
from rnnopt.tasks.text.estimator import folder as folders
from rnnopt.tasks.text.estimator.adaptation import Callback, Verdict, adapt_if_better, ignore
from rnnopt.tasks.text.estimator.answers import Decision, choose_decision, floor_of
from rnnopt.tasks.text.estimator.evidence import Judged, Labelled, Start, choose_start, weights_of
from rnnopt.tasks.text.estimator.export import hub
from rnnopt.tasks.text.estimator.export.exports import Exports
from rnnopt.tasks.text.estimator.figures import Figures
from rnnopt.tasks.text.estimator.inputs.labelled import (
    check_labels,
    check_several,
    check_texts,
    fingerprint,
    kind_of,
    known_labels,
    read_labels,
    text_hashes,
)
from rnnopt.tasks.text.estimator.inputs.settings import (
    check_abstention,
    check_for_several_labels,
    check_settings,
    with_numbers,
)
from rnnopt.tasks.text.estimator.objective.choice import objective_of
from rnnopt.tasks.text.estimator.report import Report
from rnnopt.tasks.text.estimator.steps import Plan, Rule


class NotFittedInputError(InputError, NotFittedError):  # type: ignore[misc]
    """Prediction was asked of a classifier that has not been fitted."""


class TextClassifier(ClassifierMixin, BaseEstimator, Exports):  # type: ignore[misc]
    """A text classifier from a few labelled texts, with the habits of scikit-learn.

    >>> classifier = TextClassifier("sentence-transformers/all-MiniLM-L6-v2").fit(texts, labels)
    >>> classifier.predict(["will it rain tomorrow?"])

    `fit` embeds the texts once with the frozen encoder and takes the better of logistic regression
    and class means, by cross-validation. Then the learned optimizer adapts the encoder, such that
    texts of a class come to lie together, and the head is fitted again. That is kept only where
    texts held out speak for it: by this evidence it is never worse than its own start.
    Probabilities are at the temperature that suits the texts held out.
    `report_` says what was done, and why.

    Args:
        encoder: a folder, or a name on the Hugging Face hub. Safetensors only; no code is run.
        pooling: how tokens become one vector: ``"auto"`` is what the encoder's
            sentence-transformers files say, and the mean where there are none; or ``"mean"``,
            ``"cls"``, ``"max"`` or ``"last"``.
        max_length: longest text in tokens; None for the encoder's own.
        rule: update rule of adaptation: an `UpdateRule`, the path of a rule file, or None for the
            rule of two levels that ships. Or a function that makes a torch optimizer of a list of
            parameters.
        steps: of adaptation at most; 0 for none.
        lora_rank: None adapts the weights of all layers; a number adapts LoRA factors of this rank,
            which takes less memory and is less accurate.
        seconds: what adaptation may take, cross-validation included. A slower machine may hence
            adapt in fewer folds, in fewer steps, or not at all, which `report_` says; None sets no
            bound.
        class_weight: None, or ``"balanced"``: every class counts alike, whatever its texts. Or a
            weight for each label, of which those that are left out weigh 1. Where a text may have
            several labels it has to be None.
        abstain: share of texts of the known classes that may stay without an answer, such as 0.05.
            `predict` then answers None where the largest logit is lower than that of all but this
            share of the texts held out. None always answers.
        abstain_below: `predict` answers None where the probability of the best class is lower; None
            sets no such bound.
        device: ``"auto"`` takes a GPU where there is one; or a name that torch knows.
        random_state: seed of the folds and of LoRA.

    Attributes:
        classes_: the labels, sorted, (C,); of their own kind: strings, integers or booleans.
        report_: a `Report`.
        thresholds_: where a text may have several labels, the probability from which on it has
            each, (C,), chosen by F1 on texts held out; else None.
    """

    def __init__(
        self,
        encoder: str | os.PathLike[str],
        *,
        pooling: str = "auto",
        max_length: int | None = None,
        rule: Rule = None,
        steps: int = 10,
        lora_rank: int | None = None,
        seconds: float | None = 30.0,
        class_weight: Literal["balanced"] | Mapping[Any, float] | None = None,
        abstain: float | None = None,
        abstain_below: float | None = None,
        device: str = "auto",
        random_state: int = 0,
    ) -> None:
        self.encoder = encoder
        self.pooling = pooling
        self.max_length = max_length
        self.rule = rule
        self.steps = steps
        self.lora_rank = lora_rank
        self.seconds = seconds
        self.class_weight = class_weight
        self.abstain = abstain
        self.abstain_below = abstain_below
        self.device = device
        self.random_state = random_state

    def fit(
        self, texts: Sequence[str], labels: Sequence[Any], *, report: Callback = ignore
    ) -> Self:
        """Learn from labelled texts.

        Args:
            texts: B strings; a list, array or Series.
            labels: one for each: all strings, all integers or all booleans. Or, for each, a list of
                strings: its labels, of any number.
            report: called with a dictionary after each step of adaptation, its training loss, and
                for each number of steps that is judged, the figures on texts held out.
                `rnnopt.to_writer` makes one of a TensorBoard writer.

        Returns:
            The classifier itself.

        Raises:
            InputError: texts, labels, the encoder or a setting can't be used.
        """
        started = time.perf_counter()
        settings = with_numbers(self.get_params(deep=False))
        check_settings(settings)
        texts = check_texts(texts)
        named = read_labels(labels, len(texts))
        if named.several:
            check_for_several_labels(settings)
        encoder = SentenceEncoder.load(
            self.encoder, self.torch_device(), self.pooling, self.max_length
        )
        weights = weights_of(named.places, self.class_weight, named.classes.tolist())
        data = Labelled(encoder.embed(texts).double().numpy(), named.places, weights)
        start = choose_start(data, settings["random_state"])
        if self.abstain is not None:
            floor_of(start.judged, self.abstain)  # before anything that takes long
        names = "rule", "steps", "lora_rank", "seconds", "random_state"
        plan = Plan(*(settings[name] for name in names))
        verdict = adapt_if_better(encoder, texts, data, start, plan, report)
        judged = verdict.judged or start.judged
        temperature = judged.evidence.temperature if judged else start.temperature
        head = (verdict.head or start.fit(data)).cooled(temperature)
        decision = choose_decision(named, judged, head.logits(data.embeddings), self.abstain)
        found = self._report(
            encoder, start, verdict, named.places, fingerprint(texts, named.named), started
        )
        found = replace(found, **_abstention(decision, judged))
        known = frozenset(text_hashes(texts))
        self._take(folders.Fitted(encoder, head, decision, found, known))
        return self

    def predict(self, texts: Sequence[str]) -> Any:
        """The label of each text, (B,), with None where it abstains.

        Returns:
            An array; where a text may have several labels, a list of lists.

        Raises:
            NotFittedInputError: before `fit`.
            InputError: texts that can't be used.
        """
        return self.answer(texts)[0]

    def answer(self, texts: Sequence[str]) -> tuple[Any, np.ndarray]:
        """What `predict` and what `predict_proba` return, in one pass."""
        check_abstention(self.get_params(deep=False))
        decision, logits = self._fitted().decision, self.logits(texts)
        found = decision.answers(logits, self.abstain_below)
        return found, decision.objective.probabilities(logits)

    def predict_proba(self, texts: Sequence[str]) -> np.ndarray:
        """Probabilities (B, C), in the order of `classes_`.

        Where a text may have several labels, each column is of its own, and rows do not add up to
        1.

        Raises:
            NotFittedInputError: before `fit`.
            InputError: texts that can't be used.
        """
        return self._fitted().decision.objective.probabilities(self.logits(texts))

    def logits(self, texts: Sequence[str]) -> np.ndarray:
        """Logits (B, C), in the order of `classes_`, at the temperature.

        Raises:
            NotFittedInputError: before `fit`.
            InputError: texts that can't be used.
        """
        fitted = self._fitted()
        return fitted.head.logits(fitted.encoder.embed(check_texts(texts)).numpy())

    def score(
        self,
        X: Sequence[str],
        y: Sequence[Any],
        sample_weight: Any = None,
    ) -> float:
        """Share of texts with the right answer; None is none, and of several labels all count.

        Args:
            X: texts, under scikit-learn's name.
            y: their labels; one that `fit` has not seen is no answer's.
            sample_weight: (B,); None weighs all alike.

        Raises:
            NotFittedInputError: before `fit`.
            InputError: no text, or texts or labels that can't be used.
        """
        answers = self.predict(X)
        if not len(answers):
            raise InputError("there are 0 texts to judge by; give at least one")
        if isinstance(answers, list):
            wanted: Any = check_several(list(y), len(answers))
            right = [found == row for found, row in zip(answers, wanted)]
        else:
            wanted = check_labels(y, len(answers))
            if (given := kind_of(wanted)) != (known := kind_of(self.classes_)):
                raise InputError(f"the labels are {given}, and the classifier's are {known}")
            right = answers == wanted
        return float(np.average(right, weights=sample_weight))

    def evaluate(self, texts: Sequence[str], labels: Sequence[Any]) -> Figures:
        """Accuracy with its interval, macro F1, log loss and calibration on labelled texts.

        It warns of texts that it was fitted on.

        Raises:
            InputError: no text, or a label that `fit` has not seen.
        """
        fitted = self._fitted()
        decision = fitted.decision
        texts = check_texts(texts)
        places = known_labels(labels, len(texts), decision.classes, decision.thresholds is not None)
        if not texts:
            raise InputError("there are 0 texts to judge by; give at least one")
        known = sum(one in fitted.known for one in text_hashes(texts))
        if known:
            warnings.warn(
                f"{known} of the {len(texts)} texts to judge by stand among those that it was "
                "fitted on, so that the figures flatter; leave them out",
                stacklevel=2,
            )
        answers, probabilities = self.answer(texts)
        if decision.thresholds is not None:
            figures = Figures.of_several(probabilities, places, decision.thresholds)
        else:
            figures = Figures.of(probabilities, places)
        if decision.floor is not None or self.abstain_below is not None:
            given = np.array([answer is not None for answer in answers])
            figures = figures.with_answers(given, answers == decision.classes[places])
        return replace(figures, known=known)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | None = None,
        device: str = "auto",
    ) -> Self:
        """Read a classifier from a folder, or from the Hugging Face hub.

        Args:
            name: a folder, or ``owner/name``.
            revision: a branch, a tag or a commit; None for the main branch.
            token: of the hub; None for the one that is logged in.
            device: see the class.

        Raises:
            InputError: there is no such classifier, or it can't be read.
        """
        return cls.load(hub.fetch(name, revision, token), device)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], device: str = "auto") -> Self:
        """Read what `save` wrote: the same probabilities, to the bit.

        Args:
            folder: of the classifier.
            device: see the class.

        Raises:
            InputError: the folder holds no classifier, or one that can't be read.
        """
        made = cls(os.fspath(folder), device=device)
        fitted, settings = folders.load(Path(folder), made.torch_device())
        known = made.get_params(deep=False)
        made.set_params(**{name: value for name, value in settings.items() if name in known})
        made._take(fitted)
        return made

    def _take(self, fitted: folders.Fitted) -> None:
        self._state = fitted
        self.classes_, self.report_ = fitted.decision.classes, fitted.report
        self.thresholds_ = fitted.decision.thresholds

    def _fitted(self) -> folders.Fitted:
        if not hasattr(self, "_state"):
            raise NotFittedInputError(
                "this TextClassifier has not been fitted; call fit(texts, labels) first, or read a "
                "saved one with TextClassifier.load(folder)"
            )
        return self._state

    def _report(
        self, encoder: SentenceEncoder, start: Start, verdict: Verdict, places: np.ndarray,
        data: str, started: float,
    ) -> Report:  # fmt: skip
        counts = objective_of(places).counts(places)
        evidence = verdict.evidence or start.evidence
        return Report(
            kept=verdict.evidence.name if verdict.evidence else start.name,
            reason=verdict.reason,
            encoder=encoder_name(os.fspath(self.encoder)),
            pooling=f"{encoder.layout.pooling} ({encoder.layout.source})",
            texts=len(places),
            classes=len(counts),
            fewest=int(counts.min()),
            most=int(counts.max()),
            folds=verdict.folds,
            accuracy=evidence.accuracy if evidence else None,
            log_loss=evidence.log_loss if evidence else None,
            temperature=evidence.temperature if evidence else start.temperature,
            tried=(*start.tried, *verdict.tried),
            seconds=round(time.perf_counter() - started, 2),
            data=data,
            micro_f1=evidence.micro_f1 if evidence else None,
            macro_f1=evidence.macro_f1 if evidence else None,
            memory=peak_bytes(torch.device("cpu")),
        )

    def torch_device(self) -> torch.device:
        """The device that `device` names.

        Raises:
            InputError: torch can't use it.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            return torch.empty(0, device=self.device).device
        except (RuntimeError, AssertionError) as error:
            raise InputError(
                f"device is {self.device!r}, and torch can't use it; give 'cpu' or 'auto'"
            ) from error


def _abstention(decision: Decision, judged: Judged | None) -> dict[str, Any]:
    """What a report says of texts without an answer."""
    if decision.floor is None or judged is None:
        return {}
    answered = judged.logits.max(axis=1) >= decision.floor
    right = judged.logits.argmax(axis=1) == judged.labels
    return {
        "floor": decision.floor,
        "answered": float(answered.mean()),
        "answered_accuracy": float(right[answered].mean()),
    }
