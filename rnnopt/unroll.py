"""Unrolled adaptation: T steps of a `LearnedOptimizer`, and the meta-gradient of what they reach.

The meta-loss is the recurrent learner's cumulative loss,
``sum_t weight_t * (query_weight * query_loss(theta_t) + support_weight * support_loss(theta_t))``
over the parameters theta_1 .. theta_T after each step. Its gradient is *added* to ``.grad`` of the
rule's weights, so tasks sum up as they do in ordinary training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from rnnopt.errors import InputError
from rnnopt.optimizer import LearnedOptimizer, trainable
from rnnopt.rule import State, advance

# (the module to run, the step's number from 0) -> mean loss in nats per example, 0-d
LossFunction = Callable[[nn.Module, int], Tensor]


@dataclass(frozen=True)
class UnrollSettings:
    """How an unroll is run and what its meta-loss weighs.

    Attributes:
        steps: T, steps of adaptation.
        order: 1, everything fed to the rule is a constant; 2, exact, through `higher`.
        truncation: steps after which the graph is cut (truncated backpropagation through time);
            None cuts nowhere. Memory grows with the truncation, not with T.
        query_weight: weight of the query loss, what adaptation is for.
        support_weight: weight of the support loss.
        step_weights: weight of each of the T steps; None weighs all by 1.
    """

    steps: int
    order: int = 1
    truncation: int | None = None
    query_weight: float = 1.0
    support_weight: float = 0.0
    step_weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps={self.steps}: at least 1")
        if self.order not in (1, 2):
            raise InputError(f"order={self.order}: 1 or 2")
        if self.truncation is not None and self.truncation < 1:
            raise InputError(f"truncation={self.truncation}: at least 1, or None")
        if self.step_weights is not None and len(self.step_weights) != self.steps:
            raise InputError(
                f"{len(self.step_weights)} step_weights for {self.steps} steps: one for each"
            )
        for name, weights in (
            ("query_weight and support_weight", (self.query_weight, self.support_weight)),
            ("step_weights", self.step_weights or (1.0,)),
        ):
            if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
                raise InputError(
                    f"{name} {tuple(weights)}: must be finite, at least 0, and not all 0"
                )

    def shortened(self, steps: int) -> UnrollSettings:
        """The same with the first `steps` steps only."""
        weights = None if self.step_weights is None else self.step_weights[:steps]
        return replace(self, steps=steps, step_weights=weights)

    def weight(self, step: int) -> float:
        """Weight of the losses after step number `step` (from 0)."""
        return 1.0 if self.step_weights is None else self.step_weights[step]

    def cut_after(self, step: int) -> bool:
        """Whether the graph ends after step number `step` (from 0)."""
        done = step + 1
        return done == self.steps or (self.truncation is not None and done % self.truncation == 0)


@dataclass(frozen=True)
class Unrolled:
    """What an unroll measured.

    Attributes:
        support_losses: (T,) before each step, nats per example.
        query_losses: (T,) after each step; NaN where query_weight is 0.
        meta_loss: the weighted sum that was differentiated.
    """

    support_losses: Tensor
    query_losses: Tensor
    meta_loss: float


def unroll(
    model: nn.Module,
    optimizer: LearnedOptimizer,
    support_loss: LossFunction,
    query_loss: LossFunction,
    settings: UnrollSettings,
) -> Unrolled:
    """Adapt, add the meta-gradient to the rule's ``.grad``, and put everything back.

    Args:
        model: the model, at its initial parameters; back there, bitwise, when this returns.
        optimizer: steps its parameters; its own state is the start and stays as it is.
        support_loss: the loss that adaptation descends.
        query_loss: the loss that judges it.
        settings: see `UnrollSettings`.

    Returns:
        The losses along the way.

    Raises:
        InputError: second order with gradient checkpointing on.
    """
    if settings.order == 2:
        return _second_order(model, optimizer, support_loss, query_loss, settings)
    tensors = [param for _, param in trainable(optimizer)]
    initial = [param.detach().clone() for param in tensors]
    try:
        return _first_order(model, optimizer, support_loss, query_loss, settings)
    finally:
        with torch.no_grad():
            for param, value in zip(tensors, initial):
                param.copy_(value)


def _first_order(
    model: nn.Module,
    optimizer: LearnedOptimizer,
    support_loss: LossFunction,
    query_loss: LossFunction,
    settings: UnrollSettings,
) -> Unrolled:
    """First order without the model's graph.

    With inputs constant, theta_t depends on the rule's weights only through the changes
    delta_0 .. delta_{t-1} that were added, so the meta-gradient is
    ``sum_s < sum_{t > s} dL/dtheta_t , d delta_s / dw >``: every dL/dtheta_t is an ordinary
    gradient whose graph is gone before the next one is made, and only the rule's graph is kept.
    """
    groups, tensors = zip(*trainable(optimizer))
    states: list[State] = [
        dict(optimizer.state.get(param) or optimizer.rule.init_state(param)) for param in tensors
    ]
    segment = _Segment(len(tensors))
    support_losses, query_losses, meta_loss = [], [], 0.0
    for t in range(settings.steps):
        loss = support_loss(model, t)
        grads = torch.autograd.grad(loss, tensors, allow_unused=True)
        support_losses.append(loss.detach())
        changes: list[Tensor | None] = []
        for i, (group, param, grad) in enumerate(zip(groups, tensors, grads)):
            if grad is None:
                changes.append(None)
                continue
            delta, states[i] = advance(
                optimizer.rule,
                param.detach(),
                grad,
                states[i],
                group["lr"],
                group["weight_decay"],
            )
            changes.append(delta)
            with torch.no_grad():
                param.add_(delta)
        judged = _judge(model, tensors, support_loss, query_loss, settings, t)
        query_losses.append(judged.query)
        meta_loss += judged.value
        segment.append(changes, judged.slopes)
        if settings.cut_after(t):
            segment.backward()
            segment = _Segment(len(tensors))
            states = [{k: leaf.detach() for k, leaf in state.items()} for state in states]
    return Unrolled(torch.stack(support_losses), torch.stack(query_losses), meta_loss)


@dataclass(frozen=True)
class _Judgement:
    """The meta-loss's term after one step: its value and its slope in each parameter."""

    value: float
    query: Tensor
    slopes: list[Tensor | None]


def _judge(
    model: nn.Module,
    tensors: Sequence[Tensor],
    support_loss: LossFunction,
    query_loss: LossFunction,
    settings: UnrollSettings,
    t: int,
) -> _Judgement:
    term, query = _meta_term(model, support_loss, query_loss, settings, t)
    slopes = torch.autograd.grad(term, tensors, allow_unused=True)
    return _Judgement(float(term.detach()), query, list(slopes))


def _meta_term(
    model: nn.Module,
    support_loss: LossFunction,
    query_loss: LossFunction,
    settings: UnrollSettings,
    t: int,
) -> tuple[Tensor, Tensor]:
    """The meta-loss's term after step t, and the query loss in it (detached; NaN if unweighted)."""
    terms = []
    query = torch.tensor(float("nan"))
    if settings.query_weight:
        loss = query_loss(model, t)
        query = loss.detach()
        terms.append(settings.query_weight * loss)
    if settings.support_weight:
        terms.append(settings.support_weight * support_loss(model, t))
    return settings.weight(t) * torch.stack(terms).sum(), query


class _Segment:
    """The steps between two cuts: their changes, with the rule's graph, and the slopes."""

    def __init__(self, tensors: int) -> None:
        self._changes: list[list[Tensor | None]] = [[] for _ in range(tensors)]
        self._slopes: list[list[Tensor | None]] = [[] for _ in range(tensors)]

    def append(self, changes: Sequence[Tensor | None], slopes: Sequence[Tensor | None]) -> None:
        for i, (change, slope) in enumerate(zip(changes, slopes)):
            self._changes[i].append(change)
            self._slopes[i].append(slope)

    def backward(self) -> None:
        """Pull the slopes back through the changes into the rule's weights."""
        outputs, pulls = [], []
        for changes, slopes in zip(self._changes, self._slopes):
            pull: Tensor | None = None
            for change, slope in zip(reversed(changes), reversed(slopes)):
                if slope is not None:
                    pull = slope if pull is None else pull + slope
                if change is not None and pull is not None and change.requires_grad:
                    outputs.append(change)
                    pulls.append(pull.to(change.dtype))
        if outputs:
            torch.autograd.backward(outputs, pulls)


def _second_order(
    model: nn.Module,
    optimizer: LearnedOptimizer,
    support_loss: LossFunction,
    query_loss: LossFunction,
    settings: UnrollSettings,
) -> Unrolled:
    """Exact: `higher` keeps the graph of every step between two cuts."""
    from rnnopt.differentiable import higher  # here: first-order users need not have it

    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise InputError(
            "gradient checkpointing is on: `higher` ignores it; call "
            "model.gradient_checkpointing_disable(), or use order 1"
        )
    rule = cast(nn.Module, optimizer.rule)
    weights = [weight for weight in rule.parameters() if weight.requires_grad]
    support_losses, query_losses, meta_loss = [], [], 0.0
    with higher.innerloop_ctx(model, optimizer) as (fmodel, stepper):
        segment: list[Tensor] = []
        for t in range(settings.steps):
            loss = support_loss(fmodel, t)
            support_losses.append(loss.detach())
            stepper.step(loss)
            term, query = _meta_term(fmodel, support_loss, query_loss, settings, t)
            query_losses.append(query)
            meta_loss += float(term.detach())
            segment.append(term)
            if settings.cut_after(t):
                if weights:  # a classical rule has none, and can be unrolled all the same
                    torch.autograd.backward(torch.stack(segment).sum(), inputs=weights)
                segment = []
                _cut(fmodel, stepper)
    return Unrolled(torch.stack(support_losses), torch.stack(query_losses), meta_loss)


def _cut(fmodel: Any, stepper: Any) -> None:
    """End the graph here, and let go of what lies before.

    `higher` keeps every step's parameters in a list of its own; detaching the newest alone frees
    nothing.
    """
    fresh = [param.detach().requires_grad_(param.requires_grad) for param in fmodel.fast_params]
    fmodel._fast_params.clear()
    fmodel.update_params(fresh)
    for states in stepper.state:
        for i, state in states.items():
            states[i] = {name: leaf.detach() for name, leaf in state.items()}
