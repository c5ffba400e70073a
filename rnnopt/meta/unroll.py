"""Unrolled adaptation: T steps of a `LearnedOptimizer`, and the gradient of the meta-loss.

The meta-loss is a weighted sum of losses after each step (Andrychowicz et al. 2016,
arXiv:1606.04474), where theta_t are the parameters after t steps:
``sum_t weight_t * (query_weight * query_loss(theta_t) + support_weight * support_loss(theta_t))``.
Its gradient is *added* to ``.grad`` of the rule's weights, so that the gradients of several tasks
add up, as those of batches do in ordinary training. The gradient with respect to the initial
parameters theta_0, which MAML needs, is returned on request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rnnopt.errors import InputError
from rnnopt.meta.rule_graph import RuleGraph
from rnnopt.meta.settings import UnrollSettings
from rnnopt.optim.optimizer import LearnedOptimizer, trainable
from rnnopt.rules.protocol import State, UpdateRule
from rnnopt.storage.memory import used_bytes, warn_if_too_large
from rnnopt.tasks.protocol import LossFunction


@dataclass(frozen=True)
class Unrolled:
    """The result of an unroll.

    Attributes:
        query_losses: (T,), after each step, in the unit of the loss; NaN if query_weight or the
            weight of the step is 0.
        meta_loss: the weighted sum that was differentiated.
        initial: for each parameter name, what `UnrollSettings.initial` asks for.
    """

    query_losses: Tensor
    meta_loss: float
    initial: dict[str, Tensor] = field(default_factory=dict)


def unroll(
    model: nn.Module,
    optimizer: LearnedOptimizer,
    support_loss: LossFunction,
    query_loss: LossFunction,
    settings: UnrollSettings,
) -> Unrolled:
    """Adapt, add the meta-gradient to the rule's ``.grad``, and put everything back.

    Args:
        model: the model, at its initial parameters. It has the same parameters, bit for bit, when
            this function returns.
        optimizer: the optimizer that steps its parameters. The steps begin with a copy of its
            state; the state itself does not change.
        support_loss: the loss that adaptation descends.
        query_loss: the loss after each step.
        settings: see `UnrollSettings`.

    Returns:
        The losses, and the gradient or displacement of the initial parameters.

    Raises:
        InputError: gradient checkpointing is on with second order, the rule's weights are frozen,
            or no parameter trains.

    Warns:
        RuntimeWarning: the graph of second order will not fit into memory. The warning comes after
            the first step.
    """
    _check_weights(optimizer.rule)
    if not any(True for _ in trainable(optimizer)):
        raise InputError("no parameter of the optimizer has requires_grad: nothing to adapt")
    if settings.order == 2:
        # torch's fused attention has no second derivative, and its plain one has
        with sdpa_kernel(SDPBackend.MATH):
            return _through_higher(model, optimizer, support_loss, query_loss, settings)
    tensors = [param for _, param in trainable(optimizer)]
    initial = [param.detach().clone() for param in tensors]
    try:
        result = _first_order(model, optimizer, support_loss, query_loss, settings)
        if settings.initial == "displacement":
            moved = dict(zip(map(id, tensors), initial))
            for name, param in _named(model).items():
                result.initial[name] = moved.get(id(param), param.detach()) - param.detach()
        return result
    finally:
        with torch.no_grad():
            for param, value in zip(tensors, initial):
                param.copy_(value)


def _named(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that require a gradient, by name."""
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def _check_weights(rule: UpdateRule) -> None:
    """Refuse a rule whose weights are all frozen; a classical rule has none and is accepted."""
    weights = list(rule.parameters()) if isinstance(rule, nn.Module) else []
    if weights and not any(weight.requires_grad for weight in weights):
        raise InputError(
            "the rule's weights are frozen, as load_rule returns them, and would get no "
            "meta-gradient; call rule.requires_grad_()"
        )


def _first_order(
    model: nn.Module,
    optimizer: LearnedOptimizer,
    support_loss: LossFunction,
    query_loss: LossFunction,
    settings: UnrollSettings,
) -> Unrolled:
    """First order, without the graph of the model.

    The inputs of the rule are constants. theta_t then depends on the rule's weights w only through
    the updates delta_0 .. delta_{t-1} that were added, and the meta-gradient is
    ``sum_s < sum_{t > s} dL/dtheta_t , d delta_s / dw >``. Each dL/dtheta_t is an ordinary
    gradient, whose graph is freed before the next one is computed. Only the inputs of the rule are
    kept, from which its graph is built again.
    """
    groups, tensors = zip(*trainable(optimizer))
    graph = RuleGraph(optimizer.rule, [_memory(optimizer, param) for param in tensors])
    before = used_bytes(device := tensors[0].device)
    segment = _Segment(len(tensors))
    initial = _InitialGradient(model, tensors, settings)
    query_losses, meta_loss = [], 0.0
    for t in range(settings.steps):
        grads = torch.autograd.grad(support_loss(model, t), tensors, allow_unused=True)
        changes = _step(graph, groups, tensors, grads)
        if t == 0:
            warn_if_too_large(before, settings.kept_steps - 1, device)
        judged = _judge(model, initial.tensors, support_loss, query_loss, settings, t)
        query_losses.append(judged.query)
        meta_loss += judged.value
        initial.add(judged.slopes)
        segment.append(changes, judged.slopes[: len(tensors)])
        if settings.cut_after(t):
            segment.backward()
            segment = _Segment(len(tensors))
            graph.cut()
    return Unrolled(torch.stack(query_losses), meta_loss, initial.named())


class _InitialGradient:
    """The first-order meta-gradient of the initial values: the sum of dL/dtheta_t over steps.

    Attributes:
        tensors: the parameters for which dL/dtheta_t is computed: those that are stepped, and
            after them, if the initial gradient is requested, the other parameters of the model.
    """

    def __init__(
        self, model: nn.Module, stepped: Sequence[Tensor], settings: UnrollSettings
    ) -> None:
        self._named = _named(model) if settings.initial == "gradient" else {}
        already = set(map(id, stepped))
        self.tensors = [
            *stepped,
            *(param for param in self._named.values() if id(param) not in already),
        ]
        self._sums = [torch.zeros_like(param) for param in self.tensors if self._named]

    def add(self, slopes: Sequence[Tensor | None]) -> None:
        for total, slope in zip(self._sums, slopes):
            if slope is not None:
                total += slope

    def named(self) -> dict[str, Tensor]:
        sums = dict(zip(map(id, self.tensors), self._sums))
        return {name: sums[id(param)].detach() for name, param in self._named.items()}


def _step(
    graph: RuleGraph,
    groups: Sequence[dict[str, Any]],
    tensors: Sequence[Tensor],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Step the tensors that have a gradient; return their updates, with the rule's graph."""
    touched = [i for i, grad in enumerate(grads) if grad is not None]
    updates = graph.step(
        touched,
        [tensors[i] for i in touched],
        [cast(Tensor, grads[i]) for i in touched],
        [groups[i] for i in touched],
    )
    changes: list[Tensor | None] = [None] * len(tensors)
    with torch.no_grad():
        for i, update in zip(touched, updates):
            changes[i] = update
            tensors[i].add_(update)
    return changes


def _memory(optimizer: LearnedOptimizer, param: Tensor) -> State:
    """A copy of the rule's state of a parameter, without what the guard keeps beside it."""
    kept = optimizer.state.get(param) or {}
    return {
        name: kept.get(name, leaf).clone() for name, leaf in optimizer.init_state(param).items()
    }


@dataclass(frozen=True)
class _Judgement:
    """The meta-loss's term after one step, and its gradient in each parameter (``slopes``)."""

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
    if not settings.weight(t):
        return _Judgement(0.0, torch.tensor(float("nan")), [None] * len(tensors))
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
    """The meta-loss's term after step t, and its query loss, detached; NaN without a weight."""
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
    """The steps between two cuts: the updates, with the rule's graph, and dL/dtheta_t."""

    def __init__(self, tensors: int) -> None:
        self._changes: list[list[Tensor | None]] = [[] for _ in range(tensors)]
        self._slopes: list[list[Tensor | None]] = [[] for _ in range(tensors)]

    def append(self, changes: Sequence[Tensor | None], slopes: Sequence[Tensor | None]) -> None:
        for i, (change, slope) in enumerate(zip(changes, slopes)):
            self._changes[i].append(change)
            self._slopes[i].append(slope)

    def backward(self) -> None:
        """Backpropagate dL/dtheta_t through the updates into the rule's weights."""
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


def _through_higher(
    model: nn.Module,
    optimizer: LearnedOptimizer,
    support_loss: LossFunction,
    query_loss: LossFunction,
    settings: UnrollSettings,
) -> Unrolled:
    """`higher` keeps the graph of every step between two cuts; the meta-gradient is exact."""
    from rnnopt.meta.differentiable import higher  # heavy, and not always needed

    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise InputError(
            "gradient checkpointing is on: `higher` ignores it; call "
            "model.gradient_checkpointing_disable(), or use order 1"
        )
    rule = cast(nn.Module, optimizer.rule)
    weights = [weight for weight in rule.parameters() if weight.requires_grad]
    query_losses, meta_loss = [], 0.0
    before = used_bytes(device := next(model.parameters()).device)
    with higher.innerloop_ctx(model, optimizer) as (fmodel, stepper):
        segment: list[Tensor] = []
        # `higher` keeps its parameters in the model's order
        initial = {
            name: start
            for (name, _), start in zip(model.named_parameters(), fmodel.fast_params)
            if settings.initial and start.requires_grad
        }
        inputs = [*weights, *initial.values()]
        for t in range(settings.steps):
            stepper.step(support_loss(fmodel, t))
            query = torch.tensor(float("nan"))
            if settings.weight(t):
                term, query = _meta_term(fmodel, support_loss, query_loss, settings, t)
                meta_loss += float(term.detach())
                segment.append(term)
            query_losses.append(query)
            if t == 0:
                warn_if_too_large(before, settings.kept_steps - 1, device)
            if settings.cut_after(t):
                # a classical rule has no weights, so there may be no inputs
                if inputs and segment:
                    torch.autograd.backward(torch.stack(segment).sum(), inputs=inputs)
                segment = []
                _cut(fmodel, stepper)
        gradient = {
            name: torch.zeros_like(start) if start.grad is None else start.grad
            for name, start in initial.items()
        }
        if settings.initial == "displacement":
            ends = dict(zip(dict(model.named_parameters()), fmodel.fast_params))
            gradient = {name: (start - ends[name]).detach() for name, start in initial.items()}
    return Unrolled(torch.stack(query_losses), meta_loss, gradient)


def _cut(fmodel: Any, stepper: Any) -> None:
    """Cut the graph here and free the part before it.

    `higher` keeps the parameters of every step in a list. Detaching the newest ones alone would
    free nothing.
    """
    fresh = [param.detach().requires_grad_(param.requires_grad) for param in fmodel.fast_params]
    fmodel._fast_params.clear()
    fmodel.update_params(fresh)
    for states in stepper.state:
        for i, state in states.items():
            states[i] = {name: leaf.detach() for name, leaf in state.items()}
