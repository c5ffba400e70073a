"""Adaptation of an encoder by pairs of texts, and whether cross-validation speaks for it.

Shapes: B texts, H embedding size, C classes.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import nn

from rnnopt.errors import InputError
from rnnopt.optim.optimizer import LearnedOptimizer
from rnnopt.rules.files import TWO_LEVEL_RULE
from rnnopt.rules.protocol import UpdateRule
from rnnopt.rules.two_level import TwoLevelLSTM
from rnnopt.tasks.text.encoder.layers import train_layers
from rnnopt.tasks.text.encoder.loading import seeded
from rnnopt.tasks.text.encoder.lora import add_lora
from rnnopt.tasks.text.encoder.sentence import SentenceEncoder
from rnnopt.tasks.text.encoder.tokens import TokenCache
from rnnopt.tasks.text.estimator.evidence import (
    ADAPTATION_MARGIN,
    MOST_FOLDS,
    Evidence,
    Judged,
    Labelled,
    Start,
    held_out_logits,
)
from rnnopt.tasks.text.estimator.heads import LinearHead
from rnnopt.tasks.text.estimator.objective.choice import objective_of
from rnnopt.tasks.text.estimator.objective.pairs import pair_loss
from rnnopt.tasks.text.estimator.objective.protocol import Fold

BATCH = 64  # texts of a step, at most
_PIECE = 16  # texts that are run at once: small enough to be of like length
# Tokens of a step beyond which texts are run a second time for their gradient, since what all of
# them together keep for it may not fit into memory: 4,096 take about 600 MB in MiniLM.
_KEPT_TOKENS = 4096
JUDGED = (2, 5, 10, 20, 40)  # after these steps, and after the last
# The rule of two levels was meta-trained on cross-entropy. Its full steps on the loss of pairs go
# too far: on validation classes a third of them in all weights reaches more than LoRA does.
_PAIRS_LR = 0.3
_OVERRUN = 1.5  # times the seconds allowed, after which adaptation is broken off

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
Rule = UpdateRule | MakeOptimizer | str | os.PathLike[str] | None
Report = Callable[[dict[str, Any]], None]


def ignore(record: dict[str, Any]) -> None:
    """A `report` that does nothing."""


@dataclass(frozen=True)
class Plan:
    """How adaptation is done.

    Attributes:
        rule: the update rule, see `make_optimizer`.
        steps: optimizer steps, at most; cross-validation chooses how many.
        lora_rank: of LoRA's factors; None trains the weights of all layers.
        seconds: what adaptation may take, cross-validation included; None for no bound.
        seed: decides what is drawn.
    """

    rule: Rule
    steps: int
    lora_rank: int | None
    seconds: float | None
    seed: int


@dataclass(frozen=True)
class Verdict:
    """What became of adaptation.

    Attributes:
        reason: why it was kept or not.
        head: the adapted head, not yet at its temperature; None where the start was kept.
        judged: what was kept, on texts held out; None where the start was kept.
        start: the start's evidence on the same folds; None where nothing was compared.
        tried: evidence after each number of steps that was judged.
        folds: how many.
    """

    reason: str
    head: LinearHead | None = None
    judged: Judged | None = None
    start: Evidence | None = None
    tried: tuple[Evidence, ...] = ()
    folds: int = 0

    @property
    def evidence(self) -> Evidence | None:
        """Of what was kept; None where the start was kept."""
        return self.judged.evidence if self.judged else None


class _OutOfTimeError(Exception):
    """Steps take longer than was foreseen."""


def make_optimizer(params: list[nn.Parameter], rule: Rule) -> torch.optim.Optimizer:
    """The optimizer of adaptation: `rnnopt.LearnedOptimizer` with nothing set but the rule.

    Args:
        params: what trains.
        rule: an `UpdateRule`, the path of a rule file, or None for `TWO_LEVEL_RULE`, whose steps do
            not depend on the scale of the loss; those of the rule that `LearnedOptimizer` takes by
            itself do. Or a function that makes another optimizer of the parameters.

    Raises:
        InputError: the function makes no optimizer.
    """
    if callable(rule) and not isinstance(rule, UpdateRule):
        made = rule(params)
        if not isinstance(made, torch.optim.Optimizer):
            raise InputError(
                f"rule made a {type(made).__name__} of the parameters; it must make a "
                "torch.optim.Optimizer, as lambda params: torch.optim.AdamW(params, 1e-3) does"
            )
        return made
    optimizer = LearnedOptimizer(params, TWO_LEVEL_RULE if rule is None else rule)
    if isinstance(optimizer.rule, TwoLevelLSTM):
        optimizer.param_groups[0]["lr"] = _PAIRS_LR
    return optimizer


def _averaged(optimizer: torch.optim.Optimizer, on: bool) -> None:
    """Show the averaged values of an optimizer that keeps some, as Schedule-Free does."""
    switch = getattr(optimizer, "eval" if on else "train", None)
    if callable(switch):
        switch()


def adapt_if_better(
    encoder: SentenceEncoder, texts: Sequence[str], data: Labelled, start: Start, plan: Plan,
    report: Report = ignore,
) -> Verdict:  # fmt: skip
    """Adapt if texts that were held out speak for it; else leave the encoder as it is.

    Adaptation lowers the loss of pairs, see `pair_loss`, and the head is then fitted again, as the
    start was, on the adapted embeddings. Cross-validation does so in each fold and judges the texts
    held out after several numbers of steps. Of those that are no less accurate than the start on
    the same texts, and whose log loss at the best temperature is lower by `ADAPTATION_MARGIN`, the
    one with the lowest is taken, and all texts are adapted to for so many steps. If there is none,
    the encoder stays as it is, to the bit.

    Args:
        encoder: adapted in place where that is kept.
        texts: B texts.
        data: their embeddings, labels and weights.
        start: where adaptation begins.
        plan: how it is done.
        report: called with the training loss after each step, ``{"step", "fold", "loss"}``, and
            with the evidence, ``{"step", "held_out"}``; fold 0 is all texts.
    """
    if plan.steps == 0:
        return Verdict("adaptation was not asked for (steps=0)")
    if start.evidence is None:
        return Verdict("every label has one text, so that none can be held out to judge by")
    try:
        adaptation = Adaptation(encoder, texts, data, plan)
    except InputError as error:
        return Verdict(f"this encoder can't be adapted: {error}")
    verdict = Verdict("")
    try:
        verdict = _cross_validate(adaptation, data, start, plan, report)
        if verdict.evidence is not None:
            everything = np.arange(len(texts))
            steps = int(verdict.evidence.name.split()[0])
            for step in adaptation.run(everything, steps):
                report({"step": step, "fold": 0, "loss": adaptation.loss})
            adapted = adaptation.embedded(everything)
            if np.isfinite(adapted.embeddings).all():
                verdict = replace(verdict, head=start.fit(adapted))
            else:
                verdict = Verdict("adaptation to all texts together diverged")
    except _OutOfTimeError:
        verdict = Verdict(
            f"adaptation took longer than the {plan.seconds:g} s that it may take; give more "
            "seconds"
        )
    finally:
        adaptation.end(keep=verdict.head is not None)
    return verdict


def _cross_validate(
    adaptation: Adaptation, data: Labelled, start: Start, plan: Plan, report: Report
) -> Verdict:
    """The verdict but for the head."""
    folds = _affordable(adaptation, data, plan)
    if isinstance(folds, Verdict):
        return folds
    held = np.concatenate([held for _, held in folds])
    labels, weights = data.labels[held], data.weights[held]
    beginning = Judged.of(start.name, held_out_logits(data, folds, start.fit), labels, weights)
    found: dict[int, list[np.ndarray]] = {}
    for fold, (known, held_out) in enumerate(folds, start=1):
        for step in adaptation.run(known, plan.steps):
            report({"step": step, "fold": fold, "loss": adaptation.loss})
            if step in JUDGED or step == plan.steps:
                found.setdefault(step, []).append(
                    _refitted(start, adaptation.embedded(known), adaptation.embedded(held_out))
                )
    judged = [
        Judged.of(f"{step} {_steps(step)} of adaptation", np.concatenate(rows), labels, weights)
        for step, rows in found.items()
    ]
    for step, one in zip([0, *found], [beginning, *judged]):
        report({"step": step, "held_out": asdict(one.evidence)})
    begun, tried = beginning.evidence, tuple(one.evidence for one in judged)
    better = [
        one
        for one in judged
        if one.evidence.quality >= begun.quality and one.better_than(beginning, ADAPTATION_MARGIN)
    ]
    if better:
        kept = min(better, key=lambda one: one.evidence.log_loss)
        reason = f"{_figures(kept.evidence)} on texts held out, and {start.name} {_figures(begun)}"
        return Verdict(reason, None, kept, begun, tried, len(folds))
    best = min(tried, key=lambda evidence: evidence.log_loss)
    reason = (
        f"{_figures(begun)} on texts held out, and adaptation at its best {_figures(best)} "
        f"({best.name})"
    )
    return Verdict(reason, None, None, begun, tried, len(folds))


def _refitted(start: Start, known: Labelled, held_out: Labelled) -> np.ndarray:
    """Logits (B, C) of texts held out, by a head fitted on adapted embeddings of the others.

    A rule that ruins the encoder makes embeddings that no head can be fitted on: 0 for all then.
    """
    if not np.isfinite(known.embeddings).all() or not np.isfinite(held_out.embeddings).all():
        return np.zeros((len(held_out.labels), objective_of(known.labels).ways(known.labels)))
    return start.fit(known).logits(held_out.embeddings)


def _affordable(adaptation: Adaptation, data: Labelled, plan: Plan) -> list[Fold] | Verdict:
    """As many folds as the time allows."""
    most = objective_of(data.labels).folds(data.labels, MOST_FOLDS, plan.seed)
    if plan.seconds is None:
        return most
    step = adaptation.seconds_per_step()
    count = affordable(len(most), plan, step)
    if count:
        return objective_of(data.labels).folds(data.labels, count, plan.seed)
    needed = 3 * plan.steps * step
    return Verdict(
        f"adaptation would take about {needed:.0f} s, and {plan.seconds:g} s are allowed; give "
        "more seconds, or fewer steps"
    )


def affordable(most: int, plan: Plan, step: float) -> int:
    """How many folds the time allows, at most `most`; 0 if not even two.

    Args:
        most: folds.
        plan: says how many steps, and in what time.
        step: seconds of one.
    """
    if plan.seconds is None:
        return most
    fitting = (n for n in (most, 3, 2) if (n + 1) * plan.steps * step <= plan.seconds)
    return next(fitting, 0)


class Adaptation:
    """Steps of an encoder on pairs of labelled texts.

    Args:
        encoder: whose layers train, or get LoRA's factors, until `end`.
        texts: B texts.
        data: their labels and weights.
        plan: how.

    Attributes:
        loss: of the last batch, before its step, see `pair_loss`.

    Raises:
        InputError: the encoder's layers aren't known; the rule can't be used.
    """

    def __init__(
        self, encoder: SentenceEncoder, texts: Sequence[str], data: Labelled, plan: Plan
    ) -> None:
        self.loss = math.nan
        self._encoder, self._texts, self._data, self._plan = encoder, texts, data, plan
        self._cache: TokenCache = encoder.tokens()
        self._lengths = self._cache.lengths(texts)
        self._alike = objective_of(data.labels).alike
        self._labels = torch.from_numpy(data.labels).to(encoder.device)
        self._weights = torch.from_numpy(data.weights).float().to(encoder.device)
        self._end = None if plan.seconds is None else time.monotonic() + _OVERRUN * plan.seconds
        self._lora = None
        if plan.lora_rank is None:
            train_layers(encoder.encoder)
        else:
            with seeded(plan.seed):
                self._lora = add_lora(encoder.encoder, plan.lora_rank)
            encoder.to(encoder.device)
        self._trained = [p for p in encoder.parameters() if p.requires_grad]
        self._initial = [p.detach().clone() for p in self._trained]

    def run(self, rows: np.ndarray, steps: int) -> Iterator[int]:
        """Adapt to some of the texts from the encoder's own values.

        Args:
            rows: indices of the texts.
            steps: optimizer steps.

        Yields:
            The step's number, from 1 on, after it.

        Raises:
            _OutOfTimeError: it takes longer than is allowed.
        """
        optimizer = self._begin()
        batches = _batches(rows, self._data.labels, self._plan.seed)
        _averaged(optimizer, on=False)
        for step in range(1, steps + 1):
            if self._end is not None and time.monotonic() > self._end:
                raise _OutOfTimeError
            self._step(optimizer, next(batches))
            _averaged(optimizer, on=True)
            yield step
            _averaged(optimizer, on=False)

    def embedded(self, rows: np.ndarray) -> Labelled:
        """Some of the texts, as the encoder stands."""
        vectors = self._encoder.embed([self._texts[i] for i in rows])
        return replace(self._data.take(rows), embeddings=vectors.double().numpy())

    def seconds_per_step(self) -> float:
        """How long a step takes, forward and backward pass included."""
        optimizer = self._begin()
        rows = next(_batches(np.arange(len(self._texts)), self._data.labels, self._plan.seed))
        _averaged(optimizer, on=False)
        took = []
        for _ in range(2):  # the first pass also allocates
            started = time.perf_counter()
            self._step(optimizer, rows)
            took.append(time.perf_counter() - started)
        return min(took)

    def end(self, keep: bool) -> None:
        """Leave the encoder with the values that it has now, or with its own."""
        if self._lora is None:
            if not keep:
                self._restore()
        elif keep:
            self._lora.merge_and_unload()
        else:
            self._lora.unload()
        self._encoder.requires_grad_(False)

    def _begin(self) -> torch.optim.Optimizer:
        self._restore()
        return make_optimizer(self._trained, self._plan.rule)

    @torch.no_grad()
    def _restore(self) -> None:
        for param, value in zip(self._trained, self._initial):
            param.copy_(value)
            param.grad = None

    def _step(self, optimizer: torch.optim.Optimizer, rows: np.ndarray) -> None:
        """A step on the pairs of some texts, which run piece by piece.

        The gradient of many tokens is made as by Gao et al. 2021 (arXiv:2101.06983): vectors first,
        then the loss's gradient in them, then each piece again with its part of that gradient.
        """
        optimizer.zero_grad()
        order = np.array(sorted(rows, key=lambda i: self._lengths[i]))
        size = len(order) if self._encoder.device.type == "cuda" else _PIECE
        pieces = [
            self._cache.batch([self._texts[i] for i in order[first : first + size]],
                              self._encoder.device)
            for first in range(0, len(order), size)
        ]  # fmt: skip
        twice = sum(piece["input_ids"].numel() for piece in pieces) > _KEPT_TOKENS
        with torch.set_grad_enabled(not twice):
            made = [self._encoder(piece) for piece in pieces]
        vectors = torch.cat(made).detach().requires_grad_()
        loss = pair_loss(vectors, self._alike(self._labels[order]), self._weights[order])
        (gradient,) = torch.autograd.grad(loss, vectors)
        self.loss = float(loss.detach())
        for piece, vector, part in zip(pieces, made, torch.split(gradient, size)):
            torch.autograd.backward(self._encoder(piece) if twice else vector, part)
        optimizer.step()


def _batches(rows: np.ndarray, labels: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """All the rows each time, or where they are many shuffled minibatches of pairs.

    The loss of a text needs another one of its class in the batch, which among many classes is rare
    by chance. Texts are therefore shuffled within their classes, or within those of their labels
    that are equal, and follow each other two by two.
    """
    generator = np.random.default_rng(seed)
    if len(rows) <= BATCH:
        yield from repeat(rows)
    groups = np.unique(labels[rows], axis=0, return_inverse=True)[1].reshape(-1)
    while True:
        place = np.empty(len(rows), int)
        for group in range(groups.max() + 1):
            members = np.flatnonzero(groups == group)
            place[members] = generator.permutation(len(members)) // 2
        pairs = np.unique(np.stack([groups, place]), axis=1, return_inverse=True)[1].reshape(-1)
        order = rows[np.argsort(generator.permutation(pairs.max() + 1)[pairs], kind="stable")]
        # the last, shorter batch is left out: its gradient is noisier than the rest
        for first in range(0, len(rows) - BATCH + 1, BATCH):
            yield order[first : first + BATCH]


def _figures(evidence: Evidence) -> str:
    what = "accuracy" if evidence.micro_f1 is None else "micro F1"
    return f"has {what} {evidence.quality:.3f} and log loss {evidence.log_loss:.3f}"


def _steps(count: int) -> str:
    return "step" if count == 1 else "steps"
