"""Adaptation by LoRA from a given head, and whether cross-validation speaks for it.

Shapes: B texts, H embedding size, C classes.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rnnopt.errors import InputError
from rnnopt.optim.optimizer import LearnedOptimizer
from rnnopt.rules.protocol import UpdateRule
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
from rnnopt.tasks.text.estimator.objective.protocol import Fold

BATCH = 64  # texts of a step, at most
_PIECE = 16  # texts that are run at once: small enough to be of like length
JUDGED = (1, 2, 3, 5, 10, 20, 40)  # after these steps, and after the last
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
        lora_rank: of the factors.
        seconds: what adaptation may take, cross-validation included; None for no bound.
        seed: decides what is drawn.
    """

    rule: Rule
    steps: int
    lora_rank: int
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
        params: LoRA factors, then the head.
        rule: an `UpdateRule`, the path of a rule file, or None for the rule that ships. Or a
            function that makes another optimizer of the parameters.

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
    return LearnedOptimizer(params, rule)


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

    Cross-validation adapts from each fold's own start and judges the texts held out after several
    numbers of steps. Of those that are no less accurate than the start on the same texts, and whose
    log loss at the best temperature is lower by `ADAPTATION_MARGIN`, the one with the lowest is
    taken, and all texts are adapted to for so many steps. If there is none, the encoder stays as it
    is, to the bit.

    Args:
        encoder: adapted in place where that is kept, LoRA merged.
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
            for step, last in adaptation.run(everything, start.head(data), steps):
                report({"step": step, "fold": 0, "loss": adaptation.loss})
                head = _as_head(last)
            if np.isfinite(head.weight).all():
                verdict = replace(verdict, head=head)
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
    folds = _affordable(adaptation, data, start, plan)
    if isinstance(folds, Verdict):
        return folds
    held = np.concatenate([held for _, held in folds])
    labels, weights = data.labels[held], data.weights[held]
    beginning = Judged.of(start.name, held_out_logits(data, folds, start.fit), labels, weights)
    found: dict[int, list[np.ndarray]] = {}
    for fold, (known, held_out) in enumerate(folds, start=1):
        for step, module in adaptation.run(known, start.head(data.take(known)), plan.steps):
            report({"step": step, "fold": fold, "loss": adaptation.loss})
            if step in JUDGED or step == plan.steps:
                found.setdefault(step, []).append(adaptation.logits(held_out, module))
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


def _affordable(
    adaptation: Adaptation, data: Labelled, start: Start, plan: Plan
) -> list[Fold] | Verdict:
    """As many folds as the time allows."""
    most = objective_of(data.labels).folds(data.labels, MOST_FOLDS, plan.seed)
    if plan.seconds is None:
        return most
    step = adaptation.seconds_per_step(start.fit(data))
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
    """LoRA factors in an encoder, and a head, stepped on labelled texts.

    Args:
        encoder: gets the factors; `end` takes them away again.
        texts: B texts.
        data: their labels and weights.
        plan: how.

    Attributes:
        loss: of the last batch, before its step, in nats.

    Raises:
        InputError: the encoder's layers that take factors aren't known; the rule can't be used.
    """

    def __init__(
        self, encoder: SentenceEncoder, texts: Sequence[str], data: Labelled, plan: Plan
    ) -> None:
        self.loss = math.nan
        self._encoder, self._texts, self._plan = encoder, texts, plan
        self._cache: TokenCache = encoder.tokens()
        self._lengths = self._cache.lengths(texts)
        self._objective = objective_of(data.labels)
        self._labels = torch.from_numpy(data.labels).to(encoder.device)
        self._weights = torch.from_numpy(data.weights).float().to(encoder.device)
        self._end = None if plan.seconds is None else time.monotonic() + _OVERRUN * plan.seconds
        with seeded(plan.seed):
            self._lora = add_lora(encoder.encoder, plan.lora_rank)
        encoder.to(encoder.device)
        self._factors = [p for p in encoder.parameters() if p.requires_grad]
        self._initial = [p.detach().clone() for p in self._factors]

    def run(
        self, rows: np.ndarray, head: LinearHead, steps: int
    ) -> Iterator[tuple[int, nn.Linear]]:
        """Adapt to some of the texts from the encoder's own values and a head.

        Args:
            rows: indices of the texts.
            head: where the head begins.
            steps: optimizer steps.

        Yields:
            The step's number, from 1 on, and the head after it.

        Raises:
            _OutOfTimeError: it takes longer than is allowed.
        """
        module = self._begin(head)
        optimizer = make_optimizer([*self._factors, *module.parameters()], self._plan.rule)
        batches = _batches(rows, self._plan.seed)
        _averaged(optimizer, on=False)
        for step in range(1, steps + 1):
            if self._end is not None and time.monotonic() > self._end:
                raise _OutOfTimeError
            optimizer.zero_grad()
            self._backward(next(batches), module)
            optimizer.step()
            _averaged(optimizer, on=True)
            yield step, module
            _averaged(optimizer, on=False)

    @torch.no_grad()
    def logits(self, rows: np.ndarray, module: nn.Linear) -> np.ndarray:
        """Logits (B, C) of some of the texts, as the encoder stands, in float64."""
        vectors = self._encoder.embed([self._texts[i] for i in rows])
        return _as_head(module).logits(vectors.numpy())

    def seconds_per_step(self, head: LinearHead) -> float:
        """How long a step takes, forward and backward pass included."""
        module = self._begin(head)
        optimizer = make_optimizer([*self._factors, *module.parameters()], self._plan.rule)
        rows = next(_batches(np.arange(len(self._texts)), self._plan.seed))
        _averaged(optimizer, on=False)
        took = []
        for _ in range(2):  # the first pass also allocates
            started = time.perf_counter()
            optimizer.zero_grad()
            self._backward(rows, module)
            optimizer.step()
            took.append(time.perf_counter() - started)
        return min(took)

    def end(self, keep: bool) -> None:
        """Merge the factors into the encoder's weights, or take them out."""
        if keep:
            self._lora.merge_and_unload()
        else:
            self._lora.unload()
        self._encoder.requires_grad_(False)

    def _begin(self, head: LinearHead) -> nn.Linear:
        module = nn.Linear(head.weight.shape[1], len(head.bias), device=self._encoder.device)
        with torch.no_grad():
            for param, value in zip(self._factors, self._initial):
                param.copy_(value)
                param.grad = None
            module.weight.copy_(torch.from_numpy(head.weight))
            module.bias.copy_(torch.from_numpy(head.bias))
        return module

    def _backward(self, rows: np.ndarray, module: nn.Linear) -> None:
        """Add the gradient of the mean loss of the texts, piece by piece."""
        order = sorted(rows, key=lambda i: self._lengths[i])
        total = self._weights[rows].sum()
        self.loss = 0.0
        size = len(order) if self._encoder.device.type == "cuda" else _PIECE
        for first in range(0, len(order), size):
            piece = order[first : first + size]
            batch = self._cache.batch([self._texts[i] for i in piece], self._encoder.device)
            losses: Tensor = self._objective.torch_losses(
                module(self._encoder(batch)), self._labels[piece]
            )
            loss = (self._weights[piece] * losses).sum() / total
            torch.autograd.backward(loss)
            self.loss += float(loss.detach())


def _batches(rows: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """All the rows each time, or where they are many shuffled minibatches."""
    generator = np.random.default_rng(seed)
    while True:
        order = generator.permutation(rows) if len(rows) > BATCH else rows
        # the last, shorter batch is left out: its gradient is noisier than the rest
        for first in range(0, max(len(rows) - BATCH, 0) + 1, BATCH):
            yield order[first : first + BATCH]


def _as_head(module: nn.Linear) -> LinearHead:
    weight, bias = (param.detach().cpu().double().numpy() for param in module.parameters())
    return LinearHead(weight, bias)


def _figures(evidence: Evidence) -> str:
    what = "accuracy" if evidence.micro_f1 is None else "micro F1"
    return f"has {what} {evidence.quality:.3f} and log loss {evidence.log_loss:.3f}"


def _steps(count: int) -> str:
    return "step" if count == 1 else "steps"
