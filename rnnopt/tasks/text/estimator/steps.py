"""Steps of an encoder on pairs of labelled texts.

Shapes: B texts, H embedding size.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat

import numpy as np
import torch
from torch import nn

from rnnopt.errors import InputError
from rnnopt.optim.optimizer import LearnedOptimizer
from rnnopt.rules.protocol import UpdateRule
from rnnopt.tasks.adaptation import evaluation_point
from rnnopt.tasks.text.encoder.layers import train_layers
from rnnopt.tasks.text.encoder.loading import seeded
from rnnopt.tasks.text.encoder.lora import add_lora
from rnnopt.tasks.text.encoder.sentence import SentenceEncoder
from rnnopt.tasks.text.encoder.tokens import TokenCache
from rnnopt.tasks.text.estimator.evidence import Labelled
from rnnopt.tasks.text.estimator.objective.choice import objective_of
from rnnopt.tasks.text.estimator.objective.pairs import pair_loss

BATCH = 64  # texts of a step, at most
_PIECE = 16  # texts that are run at once: small enough to be of like length
# Tokens of a step beyond which texts are run a second time for their gradient, since what all of
# them together keep for it may not fit into memory: 4,096 take about 600 MB in MiniLM.
_KEPT_TOKENS = 4096
_OVERRUN = 1.5  # times the seconds allowed, after which adaptation is broken off

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
Rule = UpdateRule | MakeOptimizer | str | os.PathLike[str] | None


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


class OutOfTimeError(Exception):
    """Steps take longer than was foreseen."""


def make_optimizer(params: list[nn.Parameter], rule: Rule) -> torch.optim.Optimizer:
    """The optimizer of adaptation: `rnnopt.LearnedOptimizer` with nothing set but the rule.

    Args:
        params: what trains.
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
            OutOfTimeError: it takes longer than is allowed.
        """
        optimizer = self._begin()
        batches = _batches(rows, self._data.labels, self._plan.seed)
        for step in range(1, steps + 1):
            if self._end is not None and time.monotonic() > self._end:
                raise OutOfTimeError
            self._step(optimizer, next(batches))
            with evaluation_point(optimizer):
                yield step

    def embedded(self, rows: np.ndarray) -> Labelled:
        """Some of the texts, as the encoder stands."""
        vectors = self._encoder.embed([self._texts[i] for i in rows])
        return replace(self._data.take(rows), embeddings=vectors.double().numpy())

    def seconds_per_step(self) -> float:
        """How long a step takes on two texts of three, forward and backward pass included."""
        optimizer = self._begin()
        known = np.flatnonzero(np.arange(len(self._texts)) % 3)
        rows = next(_batches(known, self._data.labels, self._plan.seed))
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
        optimizer = make_optimizer(self._trained, self._plan.rule)
        if callable(switch := getattr(optimizer, "train", None)):  # see `evaluation_point`
            switch()
        return optimizer

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
