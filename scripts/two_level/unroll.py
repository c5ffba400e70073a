"""A run of steps of the rule of two levels on a batch of tasks, and its meta-gradient; no command.

Shapes: B tasks, T steps, P tensors that train, N coordinates of one of them, M statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tasks import WORDS, TaskBatch
from torch import Tensor

from rnnopt.rules.protocol import State
from rnnopt.rules.tensor_features import Sums
from rnnopt.rules.two_level import Observed, TwoLevelLSTM

CHUNK = 16_384  # coordinates of a large tensor at a time, so that they stay in a core's cache
CHUNK_OF_GPU = 1 << 24  # coordinates of all tensors of a group at a time, so that they fit
# Share of the query loss at its best temperature: what is left pays for confidence, which grows
# fastest in tasks that are all but solved.
CALIBRATED = 0.75
# Of the number of a step, from 1, statistics (B, P, M) and `TENSOR_LEAVES`: the context (B, P, K).
Decide = Callable[[int, Tensor, State], Tensor]
ABOVE_LOWEST = 0.5  # weight of what a query loss exceeds the lowest one before it by
# Leaves of a state that the tensor-wise LSTM reads, those of `cross_tensor_context`.
TENSOR_LEAVES = (*TwoLevelLSTM.leaves, *sorted(TwoLevelLSTM.tensor_state))


class TrainedRule(TwoLevelLSTM):
    """The rule while it is meta-trained: its updates are the same, its graph is smaller.

    The inputs of the coordinate-wise LSTM are constants: second order goes through the rest of the
    rule. In large tensors its outputs are constants too.

    Attributes:
        largest: coordinates of a tensor through whose coordinate-wise LSTM the graph goes.
        skip_large: leave the coordinate-wise LSTM out in tensors of more.
    """

    largest = 20_000
    skip_large = False

    def __init__(self, *sizes: int, **named: int) -> None:
        super().__init__(*sizes, **named)
        self._kept: dict[int, tuple[Tensor, Observed]] = {}

    def observe(self, grad: Tensor, param: Tensor, state: State) -> tuple[Tensor, Observed]:
        """As `TwoLevelLSTM.observe`; `forward` gets what was found for the same state before."""
        kept = self._kept.pop(id(state), None)
        if kept is None:
            kept = self._kept[id(state)] = super().observe(grad, param, state)
        return kept

    def next_cell(
        self, adam: Tensor, score: Tensor, root: Tensor, state: State
    ) -> tuple[Tensor, Tensor]:
        """As `TwoLevelLSTM.next_cell`, of constants."""
        large = adam.shape[-1] > self.largest
        if large and self.skip_large:
            return state["cell"], torch.zeros_like(adam)
        constant = {name: state[name].detach() for name in ("change", "last_rate", "last_rms")}
        seen = {**state, **constant}
        if not large or not state["cell"].shape[-2]:
            return super().next_cell(adam.detach(), score.detach(), root.detach(), seen)
        parts = []
        leading = adam.numel() // adam.shape[-1]
        chunk = max(1, CHUNK_OF_GPU // leading) if adam.is_cuda else CHUNK
        with torch.no_grad():
            for start in range(0, adam.shape[-1], chunk):
                cut = slice(start, start + chunk)
                own = {name: seen[name][..., cut] for name in ("change", "cell")}
                direction, ratio, size = (x[..., cut] for x in (adam, score, root))
                parts.append(super().next_cell(direction, ratio, size, {**seen, **own}))
        cells, directions = zip(*parts)
        return torch.cat(cells, -1), torch.cat(directions, -1)

    def begin_step(self) -> None:
        """Forget what `observe` keeps."""
        self._kept.clear()


def initial_states(rule: TwoLevelLSTM, tasks: TaskBatch) -> list[State]:
    """The states of the tensors that train, for each group of `tasks.alike`: leaves (G, B, ...).

    Word embeddings count as the whole vocabulary, although only the rows that occur are held.
    """
    states = []
    for group in tasks.alike:
        held = whole = tasks.shapes[group[0]]
        if tasks.names[group[0]] == WORDS:
            whole = (tasks.spec.encoder.vocabulary, *held[1:])
        state = rule.init_state(torch.empty(math.prod(held)), whole)
        size = (len(group), tasks.size)
        states.append({leaf: x.expand(*size, *x.shape).clone() for leaf, x in state.items()})
    return states


class Measured(NamedTuple):
    """What `measure` found before a step."""

    statistics: Tensor  # (B, P, M), in the order of `tasks.alike`
    stacked: list[tuple[Tensor, Tensor]]  # gradients and parameters of each group, (G, B, N)


def measure(
    rule: TrainedRule, tasks: TaskBatch, params: Sequence[Tensor], grads: Sequence[Tensor],
    states: Sequence[State],
) -> Measured:  # fmt: skip
    """The statistics of all tensors."""
    rule.begin_step()
    stacked = [
        (torch.stack([grads[i] for i in group]), torch.stack([params[i] for i in group]))
        for group in tasks.alike
    ]
    found = [rule.observe(*pair, state)[0] for pair, state in zip(stacked, states)]
    if WORDS in tasks.names:
        at = next(i for i, group in enumerate(tasks.alike) if tasks.names[group[0]] == WORDS)
        square = Sums._fields.index("p_p")  # of the rows that are held; the others are like them
        factors = torch.ones(len(Sums._fields))
        factors[square] = tasks.spec.encoder.vocabulary / tasks.shapes[tasks.alike[at][0]][0]
        found[at] = found[at] * factors
    return Measured(torch.cat(found).transpose(0, 1), stacked)


def tensor_leaves(states: Sequence[State]) -> State:
    """What the tensor-wise LSTM reads of the states, stacked: (B, P, ...)."""
    return {leaf: torch.cat([s[leaf] for s in states]).transpose(0, 1) for leaf in TENSOR_LEAVES}


def move(
    rule: TrainedRule, tasks: TaskBatch, measured: Measured, states: Sequence[State],
    context: Tensor,
) -> tuple[list[Tensor], list[State]]:  # fmt: skip
    """Updates, (B, N) each, and the next states, by what each tensor does, (B, P, K)."""
    contexts = context.transpose(0, 1).split([len(group) for group in tasks.alike])
    updates: dict[int, Tensor] = {}
    following = []
    for group, (grad, param), state, own in zip(tasks.alike, measured.stacked, states, contexts):
        shape, transform = tasks.shapes[group[0]], None
        if rule.treats_as_matrix(shape) and tasks.names[group[0]] != WORDS:
            transform = _transform(rule, shape)
        update, after = rule(grad, state, param, own, transform)
        updates |= dict(zip(group, update))
        following.append(after)
    return [updates[i] for i in range(len(tasks.names))], following


def step(
    rule: TrainedRule, tasks: TaskBatch, params: Sequence[Tensor], grads: Sequence[Tensor],
    states: Sequence[State],
) -> tuple[list[Tensor], list[State]]:  # fmt: skip
    """One step of the rule: updates, (B, N) each, and the next states."""
    measured = measure(rule, tasks, params, grads, states)
    context = rule.cross_tensor_context(measured.statistics, tensor_leaves(states))
    return move(rule, tasks, measured, states, context)


def _transform(rule: TwoLevelLSTM, shape: Sequence[int]) -> Callable[[Tensor], Tensor]:
    return lambda x: rule.transform_matrix(x.view(*x.shape[:-1], *shape)).flatten(-2)


class Unrolled(NamedTuple):
    """What a run of steps gave."""

    losses: Tensor  # of the query sets in nats, at the start and at the steps that were judged
    accuracies: Tensor  # both (judged + 1, B)
    meta_gradient: list[Tensor]  # of the rule's parameters, in their order


def unroll(
    rule: TrainedRule, tasks: TaskBatch, weights: Sequence[float], order: int, segment: int
) -> Unrolled:
    """Steps of the rule, with the meta-gradient of the weighted query losses over log(classes).

    Args:
        rule: whose parameters are differentiated by.
        tasks: the tasks.
        weights: of the query loss after each step, (T,); 0 leaves a step unjudged.
        order: 2 differentiates through the gradients, 1 takes them as constants.
        segment: the graph is cut after so many steps.
    """
    params, states = [param.clone() for param in tasks.start], initial_states(rule, tasks)
    meta = list(rule.parameters())
    total, terms = [torch.zeros_like(x) for x in meta], list[Tensor]()
    with torch.no_grad():
        lowest, _, correct = tasks.query_losses(params)
    losses, accuracies = [lowest], [correct]
    for at, weight in enumerate(weights):
        attached = order == 2 and params[0].requires_grad
        leaves = params if attached else [x.detach().requires_grad_() for x in params]
        grads = gradients(tasks, leaves, create_graph=order == 2)
        seen = params
        if order == 1:
            seen, grads = [x.detach() for x in params], [g.detach() for g in grads]
        updates, states = step(rule, tasks, seen, grads, states)
        params = [param + update for param, update in zip(params, updates)]
        if weight > 0:
            plain, best, correct = tasks.query_losses(params)
            terms.append(weight * meta_loss_of(plain, best, lowest, tasks.spec.ways))
            lowest = torch.minimum(lowest, plain.detach())
            losses.append(plain.detach())
            accuracies.append(correct)
        last = at + 1 == len(weights)
        if terms and (last or (at + 1) % segment == 0):
            found = torch.autograd.grad(torch.stack(terms).sum(), meta, allow_unused=True)
            total = [x if y is None else x + y for x, y in zip(total, found)]
            params, terms = [x.detach() for x in params], []
            states = [{name: x.detach() for name, x in state.items()} for state in states]
    return Unrolled(torch.stack(losses), torch.stack(accuracies), total)


def adapt(
    rule: TrainedRule, tasks: TaskBatch, judged: Sequence[int] | None = None, lr: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Query losses and accuracies after these numbers of steps, (judged, B) each.

    Args:
        rule: to adapt by.
        tasks: the tasks.
        judged: numbers of steps, from 0; None means all.
        lr: a factor on the updates, as that of `rnnopt.LearnedOptimizer`.
    """
    losses, accuracies = [], []
    with torch.no_grad():
        for at, params in enumerate(adapted(rule, tasks, lr=lr)):
            if judged is None or at in judged:
                loss, _, correct = tasks.query_losses(params)
                losses.append(loss)
                accuracies.append(correct)
    return torch.stack(losses), torch.stack(accuracies)


def adapted(
    rule: TrainedRule, tasks: TaskBatch, decide: Decide | None = None, lr: float = 1.0
) -> Iterator[list[Tensor]]:
    """Parameters at the start and after each step, (B, N) each, without a graph.

    Args:
        rule: to adapt by.
        tasks: the tasks.
        decide: what tensors do in a step, in place of `TwoLevelLSTM.cross_tensor_context`.
        lr: a factor on the updates.
    """
    params, states = list(tasks.start), initial_states(rule, tasks)
    yield params
    for at in range(1, tasks.spec.steps + 1):
        leaves = [x.detach().requires_grad_() for x in params]
        with torch.enable_grad():
            grads = gradients(tasks, leaves, create_graph=False)
        with torch.no_grad():
            measured = measure(rule, tasks, params, grads, states)
        seen = tensor_leaves(states)
        if decide is None:
            context = rule.cross_tensor_context(measured.statistics, seen)
        else:
            context = decide(at, measured.statistics, seen)
        with torch.no_grad():
            updates, states = move(rule, tasks, measured, states, context.detach())
            params = [param + lr * update for param, update in zip(params, updates)]
        yield params


def gradients(tasks: TaskBatch, leaves: list[Tensor], create_graph: bool) -> list[Tensor]:
    """Of the support losses by tensors that train, (B, N) each; clipped task by task if asked."""
    grads = torch.autograd.grad(tasks.support_loss(leaves), leaves, create_graph=create_graph)
    if not tasks.spec.clip:
        return list(grads)
    square = torch.stack([(grad.detach() ** 2).sum(1, keepdim=True) for grad in grads]).sum(0)
    factor = (tasks.spec.clip / torch.sqrt(square + 1e-12)).clamp(max=1.0)
    return [grad * factor for grad in grads]


def meta_loss_of(plain: Tensor, best: Tensor, lowest: Tensor, ways: int) -> Tensor:
    """Of one step, over log(ways); above 1 by its logarithm, so that no task drowns the others."""
    loss = (1 - CALIBRATED) * plain + CALIBRATED * best + ABOVE_LOWEST * F.relu(plain - lowest)
    loss = loss / math.log(ways)
    return torch.where(loss > 1, 1 + torch.log(loss.clamp(min=1)), loss).mean()
