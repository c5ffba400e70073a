"""What a rule has learned, made visible along a real adaptation.

Shapes: T steps, N coordinates of a tensor, G values of the gradient, U bins of the memory's ratio.
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

GRADIENTS = tuple(np.linspace(-3, 3, 25).round(2).tolist())  # in units of the tensor's RMS
RATIOS = tuple(np.linspace(-1, 1, 21).round(2).tolist())  # middles of the bins
SAMPLE = 8192  # coordinates that a surface is made from


@dataclass(frozen=True)
class Surface:
    """The update as a function of the gradient and of what the memory says.

    Everything but the gradient of the one coordinate is as it was in the adaptation: its memory,
    its value, and all that the rule knows of the other coordinates.

    Attributes:
        kind: of the tensors, see `rnnopt.tasks.kinds`.
        step: of the adaptation, from 1.
        gradients: (G,), in units of the RMS of the tensor's gradient.
        ratios: (U,), m / sqrt(v) before the step, both debiased (Kingma & Ba 2015), beta 0.9 and
            0.999; 0 before the first.
        update: G rows of U, mean over the coordinates of a bin; None where a bin has none.
    """

    kind: str
    step: int
    gradients: Sequence[float]
    ratios: Sequence[float]
    update: list[list[float | None]]


@dataclass(frozen=True)
class Inspection:
    """What `inspect_rule` found.

    Attributes:
        coordinates: how many, by kind of tensor.
        step_size: RMS of the update by kind, (T,): what the rule's effective step is.
        adam_distance: 1 - cosine between the update and Adam's direction on the same gradients, by
            kind, (T,): 0 is Adam's own direction, 1 orthogonal, 2 against it; None where there is
            no update.
        losses: support loss before each step, (T,), nats per text.
        surface: the update at one step.
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
    """Adapt to a task, full batch, and look at every update. The optimizer's guards are left out.

    Args:
        rule: any rule; on the learner's device.
        learner: at its starting values for this task; adapted when this returns.
        task: the task.
        steps: T.
        kind: of the tensors whose surface is drawn; None takes the one with most coordinates.
        at_step: from 1, where it is drawn; None takes the one in the middle.

    Raises:
        InputError: nothing of that kind trains, a step that isn't taken, or one at which no
            gradient reaches that kind.
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
        known = _apply(optimizer, params)
        if step == at_step:
            found.surface.update.extend(_binned(rule, seen, known))
        shadow.step(params)
        for one, its in members.items():
            updates = [param.detach() - before[param] for param in its]
            _record(found, one, updates, [-shadow.ratios[param] for param in its])
    return found


def _checked_place(
    sizes: Mapping[str, int], steps: int, kind: str | None, at_step: int | None
) -> tuple[str, int]:
    """Whose surface is drawn, and at which step."""
    kind = max(sizes, key=sizes.__getitem__) if kind is None else kind
    if kind not in sizes:
        raise InputError(
            f"--kind {kind!r}: what trains here is {', '.join(sizes)}; choose from that"
        )
    at_step = (steps + 1) // 2 if at_step is None else at_step
    if not 1 <= at_step <= steps:
        raise InputError(f"--at-step {at_step}: must lie between 1 and the last step, {steps}")
    return kind, at_step


def _members(learner: Learner) -> dict[str, list[Tensor]]:
    """What trains, by kind, in the order of `KINDS`."""
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
    rule: UpdateRule, seen: Sequence[_Seen], known: Mapping[Tensor, Tensor | None]
) -> list[list[float | None]]:
    """Mean update for each of `GRADIENTS` over the coordinates nearest to each of `RATIOS`."""
    update = torch.cat([one.responses(rule, known[one.owner]) for one in seen], dim=1)  # (G, n)
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
    """One step; what the rule knew of each tensor that has a gradient, see `apply`."""
    (group,) = optimizer.param_groups
    work = [(group, param, param.grad) for param in params if param.grad is not None]
    return dict(zip([param for _, param, _ in work], optimizer.apply(work)))


class _Shadow:
    """Adam on the gradients of another optimizer's run, moving nothing.

    Attributes:
        ratios: m / sqrt(v) of each tensor after the last step, minus Adam's direction; zeros before
            the first.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._rule = Adam(1.0)
        self._states = {param: self._rule.init_state(param) for param in params}
        self.ratios = {param: torch.zeros_like(param) for param in params}

    @torch.no_grad()
    def step(self, params: Sequence[Tensor]) -> None:
        """Take in the gradients of these."""
        for param in params:
            grad = torch.zeros_like(param) if param.grad is None else param.grad
            direction, self._states[param] = advance(
                self._rule, param, grad, self._states[param], 1.0, 0.0
            )
            self.ratios[param] = -direction


@dataclass(frozen=True)
class _Seen:
    """Coordinates of a tensor as the rule saw them before a step: n of its N.

    Attributes:
        owner: the tensor itself.
        param: values, (n,).
        ratio: m / sqrt(v), (n,).
        scale: RMS of the whole tensor's gradient, 0-d.
        state: memory.
    """

    owner: Tensor
    param: Tensor
    ratio: Tensor
    scale: Tensor
    state: State

    @torch.no_grad()
    def responses(self, rule: UpdateRule, known: Tensor | None) -> Tensor:
        """The update of each coordinate for each of `GRADIENTS`, (G, n), before it is turned."""
        grads = [torch.ones_like(self.param) * value * self.scale for value in GRADIENTS]
        as_it_is = (
            None if matrix_transform(rule, self.owner) is None else lambda direction: direction
        )
        told = 1.0, 0.0, known, as_it_is
        steps = [advance(rule, self.param, g, self.state, *told)[0] for g in grads]
        return torch.stack(steps)


def _seen(optimizer: LearnedOptimizer, params: Sequence[Tensor], shadow: _Shadow) -> list[_Seen]:
    """What a surface is made from: of the tensors that have a gradient, evenly, about `SAMPLE`."""
    reached = [param for param in params if param.grad is not None and param.grad.any()]
    if not reached:
        raise InputError(
            "no gradient reaches what is to be drawn at this step (one factor of LoRA has none at "
            "the first); choose another --at-step or --kind"
        )
    stride = math.ceil(sum(param.numel() for param in reached) / SAMPLE)
    return [_seen_of(optimizer, param, stride, shadow.ratios[param]) for param in reached]


def _seen_of(optimizer: LearnedOptimizer, param: Tensor, stride: int, ratios: Tensor) -> _Seen:
    memory = optimizer.state[param] or optimizer.init_state(param)
    grad = cast(Tensor, param.grad)
    # leaves that belong to coordinates end with them, see rnnopt.rules.protocol
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


# -- for people


def inspection_text(found: Inspection) -> str:
    """Tables for a terminal: step size and distance by kind and step, and the surface in short."""
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
