"""What a rule has learned, measured along a real adaptation.

Shapes: T steps, N coordinates of a tensor, G values of the gradient, U bins of m / sqrt(v).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from rnnopt.errors import InputError
from rnnopt.optim.optimizer import LearnedOptimizer
from rnnopt.rules.classical import Adam
from rnnopt.rules.protocol import State, UpdateRule, advance, is_coordinate_wise, matrix_transform
from rnnopt.tasks.kinds import KINDS, tensor_kinds
from rnnopt.tasks.protocol import Learner, Task

GRADIENTS = tuple(np.linspace(-3, 3, 25).round(2).tolist())  # in units of the gradient's RMS
RATIOS = tuple(np.linspace(-1, 1, 21).round(2).tolist())  # centres of the bins
SAMPLE = 8192  # number of coordinates that a surface is computed from


@dataclass(frozen=True)
class Surface:
    """The rule's update as a function of the present gradient and of the earlier gradients.

    For each coordinate, only its gradient is varied. Its value, its state, and the rule's
    information on all other coordinates are those of the adaptation.

    Attributes:
        kind: the kind of the tensors, see `rnnopt.tasks.kinds`.
        step: the step of the adaptation, from 1.
        gradients: (G,), in units of the RMS of the tensor's gradient.
        ratios: (U,), m / sqrt(v) before the step, both with bias correction (Kingma & Ba 2015) and
            with beta 0.9 and 0.999; 0 before the first step.
        update: (G, U), the mean update over the coordinates in a bin; None if the bin is empty.
    """

    kind: str
    step: int
    gradients: Sequence[float]
    ratios: Sequence[float]
    update: list[list[float | None]]


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect_rule`.

    Attributes:
        coordinates: the number of coordinates of each kind of tensor.
        step_size: the RMS of the update at each step, (T,), for each kind.
        adam_distance: 1 - cosine between the update and Adam's direction for the same gradients at
            each step, (T,), for each kind. 0 is Adam's direction, 1 is orthogonal to it, and 2 is
            opposite to it. None means that there was no update.
        losses: the support loss before each step, (T,), in the unit of the loss.
        surface: the update at one step as a function of the gradients.
    """

    coordinates: dict[str, int]
    step_size: dict[str, list[float]]
    adam_distance: dict[str, list[float | None]]
    losses: list[float]
    surface: Surface


def inspect_rule(
    rule: UpdateRule,
    learner: Learner,
    task: Task,
    steps: int,
    kind: str | None = None,
    at_step: int | None = None,
) -> Inspection:
    """Adapt to a task and measure every update, without the optimizer's guard.

    Args:
        rule: any rule, on the learner's device.
        learner: the learner, at its starting values for this task. It is adapted in place.
        task: the task.
        steps: T, the number of steps.
        kind: the kind of the tensors whose surface is computed. None takes the kind with the most
            coordinates.
        at_step: the step at which the surface is computed, from 1. None takes the one in the
            middle.

    Raises:
        InputError: no tensor of that kind trains, the step is not taken, or tensors of that kind
            have no gradient at that step.
    """
    members = _members(learner)
    sizes = {one: sum(param.numel() for param in params) for one, params in members.items()}
    kind, at_step = _checked_place(sizes, steps, kind, at_step)
    params: list[Tensor] = [param for _, param in learner.trainable()]
    optimizer, shadow = LearnedOptimizer(params, rule), _Shadow(params)
    found = Inspection(
        sizes, {one: [] for one in sizes}, {one: [] for one in sizes}, [],
        Surface(kind, at_step, GRADIENTS, RATIOS, []),
    )  # fmt: skip
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = task.support_loss(learner.module, step - 1)
        torch.autograd.backward(loss)
        found.losses.append(float(loss.detach()))
        seen = _seen(optimizer, members[kind], shadow) if step == at_step else []
        before = {param: param.detach().clone() for param in params}
        context = _apply(optimizer, params)
        if step == at_step:
            found.surface.update.extend(_binned(rule, seen, context))
        shadow.step(params)
        for one, its in members.items():
            updates = [param.detach() - before[param] for param in its]
            _record(found, one, updates, [-shadow.ratios[param] for param in its])
    return found


def _checked_place(
    sizes: Mapping[str, int], steps: int, kind: str | None, at_step: int | None
) -> tuple[str, int]:
    """The kind of tensors whose surface is computed, and the step."""
    kind = max(sizes, key=sizes.__getitem__) if kind is None else kind
    if kind not in sizes:
        raise InputError(f"--kind {kind!r}: no such tensor trains; choose from {', '.join(sizes)}")
    at_step = (steps + 1) // 2 if at_step is None else at_step
    if not 1 <= at_step <= steps:
        raise InputError(f"--at-step {at_step}: must lie between 1 and the last step, {steps}")
    return kind, at_step


def _members(learner: Learner) -> dict[str, list[Tensor]]:
    """The trainable parameters of each kind, in the order of `KINDS`."""
    kinds = tensor_kinds(learner)
    members: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    for name, param in learner.trainable():
        members[kinds[name]].append(param)
    return {kind: params for kind, params in members.items() if params}


def _record(
    found: Inspection, kind: str, updates: Sequence[Tensor], adams: Sequence[Tensor]
) -> None:
    square = _dot(updates, updates)
    found.step_size[kind].append(math.sqrt(square / found.coordinates[kind]))
    lengths = math.sqrt(square * _dot(adams, adams))
    found.adam_distance[kind].append(1 - _dot(updates, adams) / lengths if lengths else None)


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(left, right))


def _binned(
    rule: UpdateRule, seen: Sequence[_Seen], context: Mapping[Tensor, Tensor | None]
) -> list[list[float | None]]:
    """Mean update for each of `GRADIENTS` over the coordinates nearest to each of `RATIOS`."""
    update = torch.cat([one.responses(rule, context[one.owner]) for one in seen], dim=1)  # (G, n)
    ratio = torch.cat([one.ratio for one in seen])  # (n,)
    width = RATIOS[1] - RATIOS[0]
    bins = ((ratio - RATIOS[0]) / width).round().long().clamp(0, len(RATIOS) - 1)  # (n,)
    counts = torch.bincount(bins, minlength=len(RATIOS))  # (U,)
    sums = torch.zeros(len(update), len(RATIOS), dtype=torch.float64, device=update.device)
    sums.index_add_(1, bins, update.double())  # (G, U)
    return [
        [total / count if count else None for total, count in zip(row, counts.tolist())]
        for row in sums.tolist()
    ]


def _apply(optimizer: LearnedOptimizer, params: Sequence[Tensor]) -> dict[Tensor, Tensor | None]:
    """Take one step; return the rule's context for each tensor with a gradient, see `apply`."""
    (group,) = optimizer.param_groups
    work = [(group, param, param.grad) for param in params if param.grad is not None]
    return dict(zip([param for _, param, _ in work], optimizer.apply(work)))


class _Shadow:
    """Adam's state on the gradients of another optimizer's run; it changes no parameter.

    Attributes:
        ratios: m / sqrt(v) of each tensor after the last step, which is the negative of Adam's
            direction; zeros before the first step.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._rule = Adam(1.0)
        self._states = {param: self._rule.init_state(param) for param in params}
        self.ratios = {param: torch.zeros_like(param) for param in params}

    @torch.no_grad()
    def step(self, params: Sequence[Tensor]) -> None:
        """Update the state with the gradients of these parameters."""
        for param in params:
            grad = torch.zeros_like(param) if param.grad is None else param.grad
            direction, self._states[param] = advance(
                self._rule, param, grad, self._states[param], 1.0, 0.0
            )
            self.ratios[param] = -direction


@dataclass(frozen=True)
class _Seen:
    """A sample of n of the N coordinates of a tensor, as they were before a step.

    Attributes:
        owner: the tensor itself.
        param: the values of the coordinates, (n,).
        ratio: m / sqrt(v), (n,).
        scale: the RMS of the whole tensor's gradient, 0-d.
        state: the rule's state of the coordinates.
    """

    owner: Tensor
    param: Tensor
    ratio: Tensor
    scale: Tensor
    state: State

    @torch.no_grad()
    def responses(self, rule: UpdateRule, context: Tensor | None) -> Tensor:
        """The update of each coordinate for each of `GRADIENTS`, (G, n).

        A transform of the whole matrix, see `matrix_transform`, is left out.
        """
        grads = [torch.ones_like(self.param) * value * self.scale for value in GRADIENTS]
        as_it_is = (
            None if matrix_transform(rule, self.owner) is None else lambda direction: direction
        )
        rest = 1.0, 0.0, context, as_it_is
        steps = [advance(rule, self.param, g, self.state, *rest)[0] for g in grads]
        return torch.stack(steps)


def _seen(optimizer: LearnedOptimizer, params: Sequence[Tensor], shadow: _Shadow) -> list[_Seen]:
    """About `SAMPLE` coordinates, evenly spaced, of the tensors that have a gradient."""
    reached = [param for param in params if param.grad is not None and param.grad.any()]
    if not reached:
        raise InputError(
            "the gradient of these tensors is 0 at this step (that of one factor of LoRA is 0 at "
            "the first step); choose another --at-step or --kind"
        )
    stride = math.ceil(sum(param.numel() for param in reached) / SAMPLE)
    return [_seen_of(optimizer, param, stride, shadow.ratios[param]) for param in reached]


def _seen_of(optimizer: LearnedOptimizer, param: Tensor, stride: int, ratios: Tensor) -> _Seen:
    memory = optimizer.state[param] or optimizer.init_state(param)
    grad = cast(Tensor, param.grad)
    # the last axis of a parameter-wise leaf is the coordinates, see rnnopt.rules.protocol
    state = {
        name: (
            leaf[..., ::stride] if is_coordinate_wise(optimizer.rule, name, leaf) else leaf
        ).clone()
        for name, leaf in memory.items()
    }
    return _Seen(
        param,
        param.detach().reshape(-1)[::stride].clone(),
        ratios.reshape(-1)[::stride],
        grad.square().mean().sqrt(),
        state,
    )


def inspection_text(found: Inspection) -> str:
    """Tables for a terminal: step size and distance by kind and step, and part of the surface."""
    steps = range(1, len(found.losses) + 1)
    parts = [
        _table(f"RMS of the update; support loss {found.losses[0]:.3f} to {found.losses[-1]:.3f} "
               "before the first and last step", steps, found.step_size, "{:.1e}"),
        _table("distance from Adam's direction, 1 - cosine", steps, found.adam_distance, "{:.2f}"),
    ]  # fmt: skip
    surface = found.surface
    filled = [j for j, value in enumerate(surface.update[0]) if value is not None]
    columns = [filled[i] for i in np.linspace(0, len(filled) - 1, min(6, len(filled))).astype(int)]
    rows = {
        f"g = {surface.gradients[i]:+.1f} RMS": [surface.update[i][j] for j in columns]
        for i in range(0, len(surface.gradients), 4)
    }
    title = f"update of {surface.kind} at step {surface.step}, by m / sqrt(v)"
    parts.append(_table(title, [surface.ratios[j] for j in columns], rows, "{:+.1e}"))
    return "\n\n".join(parts)


def _table(
    title: str,
    columns: Sequence[float],
    rows: Mapping[str, Sequence[float | None]],
    form: str,
) -> str:
    width = max(map(len, rows))
    lines = [title, " " * width + "".join(f"{column:>10g}" for column in columns)]
    for name, values in rows.items():
        cells = ["-" if value is None else form.format(value) for value in values]
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)
