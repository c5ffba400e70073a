"""A sense of its own limits: undo a step that ruined the model, and go on carefully.

A torch optimizer does not see the loss, but it sees the gradient at both ends of a step, and so
how far the loss fell or rose on the way, by the trapezoidal rule:
``(g_before + g_after) . step / 2``, exact where the loss is a parabola.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from rnnopt.optim.sharding import local, local_gradient, sum_over_shards
from rnnopt.rules.protocol import State, UpdateRule

# Nats that the loss may rise above its lowest. Where a rule works it rises by less than half of
# that on Hugging Face encoders, where it ruins the model by 3 to 30.
MOST_RISE = 1.0
# Kept for each parameter: the last step, (N,), and the gradient's slope along it where it began.
# Going back by it need not be exact.
LAST, SLOPE = "last", "slope"
_LAST_DTYPE = torch.bfloat16

Work = Sequence[tuple[dict[str, Any], Tensor, Tensor]]


@runtime_checkable
class GuardedRule(UpdateRule, Protocol):
    """A rule that knows a careful one to hand over to."""

    def fallback(self) -> UpdateRule:
        """A rule with the same memory whose steps are bounded, such as Adam's."""
        ...


def init_memory(param: Tensor) -> State:
    """No step yet, for this process's part of a parameter."""
    part = local(param)
    return {
        LAST: torch.zeros(part.numel(), dtype=_LAST_DTYPE, device=part.device),
        SLOPE: torch.zeros((), dtype=torch.float32, device=part.device),
    }


def rise(work: Work, states: Sequence[State]) -> tuple[float, bool]:
    """Nats that the loss rose in the last step; waits for the device.

    Args:
        work: (param group, parameter, its gradient after that step).
        states: each parameter's memory, with the last step in it.

    Returns:
        An estimate, infinity if the step left no gradient that is finite; and whether each
        coordinate's is.
    """
    items = [(local_gradient(grad, param), state) for (_, param, grad), state in zip(work, states)]
    params = [param for _, param, _ in work]
    ends = [_slope(grad, state[LAST]) for grad, state in items]
    rows = [((state[SLOPE] + end) / 2).float().reshape(1) for (_, state), end in zip(items, ends)]
    (change,) = _total(sum_over_shards(rows, params))
    if math.isfinite(change):  # one coordinate that is not would have made the total so
        return change, True
    rows = []
    for grad, state in items:
        end = _slope(grad, state[LAST], masked=True)
        counts = state[LAST].count_nonzero(), torch.isfinite(grad).count_nonzero()
        rows.append(torch.stack([x.float() for x in ((state[SLOPE] + end) / 2, *counts)]))
    change, moved, finite_left = _total(sum_over_shards(rows, params))
    return math.inf if moved and not finite_left else change, False


@torch.no_grad()
def undo(param: Tensor, state: State) -> None:
    """Take a parameter's last step back, and forget it."""
    part = local(param)
    part.sub_(state[LAST].view_as(part).to(part.dtype))
    forget(state)


def forget(state: State) -> None:
    """No step any more."""
    state[LAST].zero_()
    state[SLOPE].zero_()


@torch.no_grad()
def remember(work: Work, states: Sequence[State], before: Sequence[Tensor], finite: bool) -> None:
    """Keep the step that led from `before` to here.

    Args:
        work: (param group, parameter, the gradient that it was made of).
        states: each parameter's memory.
        before: copies of the parameters' local parts; overwritten.
        finite: whether every coordinate's gradient is known to be.
    """
    for (_, param, grad), state, old in zip(work, states, before):
        torch.sub(local(param), old, out=old)
        state[LAST].copy_(old.reshape(-1))
        state[SLOPE].copy_(_slope(local_gradient(grad, param), old, masked=not finite))


def _slope(grad: Tensor, step: Tensor, masked: bool = False) -> Tensor:
    """Of the loss along a step, 0-d, float32 or wider.

    Masked it is that of the coordinates whose gradient is finite, which takes several passes.
    """
    flat = grad.reshape(-1)
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    if masked:
        flat = torch.where(torch.isfinite(flat), flat, 0)
    return torch.dot(flat, step.reshape(-1).to(flat.dtype))


def _total(rows: Sequence[Tensor | None]) -> list[float]:
    """The sum of all rows; waits once for each device that holds some."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for row in rows:
        by_device.setdefault(cast(Tensor, row).device, []).append(cast(Tensor, row))
    sums = [torch.stack(held).sum(dim=0).cpu() for held in by_device.values()]
    total: list[float] = torch.stack(sums).sum(dim=0).tolist()
    return total
