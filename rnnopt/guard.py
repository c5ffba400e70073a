"""A sense of its own limits: undo a step that ruined the model, and go on carefully.

A torch optimizer does not see the loss, but it sees the gradient at both ends of a step, and so
how far the loss fell or rose on the way, by the trapezoidal rule:
``(g_before + g_after) . step / 2``, exact where the loss is a parabola.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from rnnopt.rule import State, UpdateRule
from rnnopt.sharding import add_up, local, local_gradient

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

    def careful(self) -> UpdateRule:
        """A rule with the same memory whose steps are bounded, such as Adam's."""
        ...


def init_memory(param: Tensor) -> State:
    """No step yet, for this process's part of a parameter."""
    part = local(param)
    return {
        LAST: torch.zeros(part.numel(), dtype=_LAST_DTYPE, device=part.device),
        SLOPE: torch.zeros((), device=part.device),
    }


def rise(work: Work, states: Sequence[State]) -> float:
    """Nats that the loss rose in the last step; waits for the device.

    Args:
        work: (param group, parameter, its gradient after that step).
        states: each parameter's memory, with the last step in it.

    Returns:
        An estimate; infinity if the step left no gradient that is finite.
    """
    rows = []
    for (_, param, grad), state in zip(work, states):
        flat, last = local_gradient(grad, param).reshape(-1), state[LAST]
        finite = torch.isfinite(flat)
        end = (torch.where(finite, flat, 0) * last).sum(dtype=torch.float32)
        counts = last.count_nonzero(), finite.count_nonzero()
        rows.append(torch.stack([(state[SLOPE] + end) / 2, *(count.float() for count in counts)]))
    totals = [cast(Tensor, row).cpu() for row in add_up(rows, [param for _, param, _ in work])]
    change, moved, finite_left = torch.stack(totals).sum(dim=0).tolist()
    return float("inf") if moved and not finite_left else float(change)


@torch.no_grad()
def undo(work: Work, states: Sequence[State]) -> None:
    """Take the last step back, and forget it."""
    for (_, param, _), state in zip(work, states):
        part = local(param)
        part.sub_(state[LAST].view_as(part).to(part.dtype))
        state[LAST].zero_()
        state[SLOPE].zero_()


@torch.no_grad()
def remember(work: Work, states: Sequence[State], before: Sequence[Tensor]) -> None:
    """Keep the step that led from `before`, copies of the parameters' local parts, to here."""
    for (_, param, grad), state, old in zip(work, states, before):
        flat = local_gradient(grad, param).reshape(-1)
        state[LAST].copy_((local(param) - old).reshape(-1))
        state[SLOPE].copy_((torch.where(torch.isfinite(flat), flat, 0) * state[LAST]).sum())
