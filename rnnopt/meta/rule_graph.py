"""The graph of a rule over several steps, without the graph of the model.

Shapes: N coordinates of one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rnnopt.rules.protocol import (
    State,
    UpdateRule,
    advance,
    cross_tensor_context,
    matrix_transform,
    statistics_of,
)


class RuleGraph:
    """Steps of a rule whose updates keep their graph; parameters and gradients are constants.

    A step keeps its inputs and builds its graph in the backward pass (checkpointing), because the
    graph is ten times as large as the inputs. torch.utils.checkpoint does the same, but it keeps
    the nodes of the graph. For many small tensors over many steps, these nodes are as large as the
    tensors that checkpointing saves.

    Args:
        rule: the rule.
        states: its state of each parameter, before the first step.
    """

    def __init__(self, rule: UpdateRule, states: Sequence[State]) -> None:
        self.rule, self._states = rule, list(states)
        self.weights = list(rule.parameters()) if isinstance(rule, nn.Module) else []
        self._learned = _learned_leaves(rule) if self.weights else frozenset()

    def step(
        self,
        places: Sequence[int],
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        groups: Sequence[dict[str, Any]],
    ) -> list[Tensor]:
        """One step of some parameters.

        Args:
            places: which ones, as numbers in the states.
            params: their values, which are copied.
            grads: their gradients.
            groups: the param group of each, with lr and weight_decay.

        Returns:
            The update of each, in its shape.
        """
        call = _Call(self.rule, [self._states[i] for i in places], groups)
        params = [param.detach().clone() for param in params]
        given = [*params, *(grad.detach() for grad in grads)]
        given += [leaf for i in places for leaf in self._states[i].values()]
        if self.weights:
            arguments = (call, self._learned, *given, *self.weights)
            results = _Recomputed.apply(*arguments)  # type: ignore[no-untyped-call]
        else:
            results = call(given)
        changes, left = list(results[: len(places)]), iter(results[len(places) :])
        for i in places:
            self._states[i] = {name: next(left) for name in self._states[i]}
        return changes

    def cut(self) -> None:
        """Cut the graph here."""
        self._states = [
            {name: leaf.detach() for name, leaf in state.items()} for state in self._states
        ]


class _Call:
    """One step of all tensors as a function of parameters, gradients and leaves of the states."""

    def __init__(
        self, rule: UpdateRule, states: Sequence[State], groups: Sequence[dict[str, Any]]
    ) -> None:
        self._rule = rule
        self._numbers = [(float(g["lr"]), float(g["weight_decay"])) for g in groups]
        self._names = [tuple(state) for state in states]
        self.leaves = [name for names in self._names for name in names]
        self.size = 2 * len(states) + len(self.leaves)  # how many tensors it is given

    def __call__(self, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The updates, and then the leaves of the next states, in the order of `leaves`."""
        count, rule = len(self._names), self._rule
        params, grads, rest = given[:count], given[count : 2 * count], iter(given[2 * count :])
        states = [{name: next(rest) for name in names} for names in self._names]
        sums = [statistics_of(rule, *each) for each in zip(params, grads, states)]
        contexts = cross_tensor_context(rule, sums, states)
        changes, leaves = [], list[Tensor]()
        for param, grad, state, context, names, numbers in zip(
            params, grads, states, contexts, self._names, self._numbers
        ):
            transform = matrix_transform(rule, param)
            lr, decay = numbers
            change, after = advance(rule, param, grad, state, lr, decay, context, transform)
            changes.append(change)
            leaves += [after[name] for name in names]
        return *changes, *leaves


def _learned_leaves(rule: UpdateRule) -> frozenset[str]:
    """Names of the leaves that depend on the rule's weights, found by two steps of a vector."""
    param = torch.ones(2, device=next(cast(nn.Module, rule).parameters()).device)
    state = rule.init_state(param)
    with torch.enable_grad():
        for _ in range(2):
            _, state = rule(param, state, param)
    return frozenset(name for name, leaf in state.items() if leaf.requires_grad)


class _Recomputed(torch.autograd.Function):
    """A `_Call` that keeps its inputs and builds its graph in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, learned: frozenset[str], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        given, ctx.weights = tensors[: call.size], tensors[call.size :]
        ctx.call = call
        ctx.save_for_backward(*given)
        results = call(given)
        leaves = results[len(results) - len(call.leaves) :]
        ctx.mark_non_differentiable(
            *(leaf for leaf, name in zip(leaves, call.leaves) if name not in learned)
        )
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        with torch.enable_grad():
            given = [
                tensor.detach().requires_grad_(need)
                for tensor, need in zip(ctx.saved_tensors, needed)
            ]
            pairs = zip(ctx.call(given), slopes)
            results, pulls = zip(*(pair for pair in pairs if pair[0].requires_grad))
        inputs = [*given, *ctx.weights]
        wanted = [tensor for tensor, need in zip(inputs, needed) if need]
        found = iter(torch.autograd.grad(results, wanted, pulls, allow_unused=True))
        return None, None, *(next(found) if need else None for need in needed)
