"""The guard: undo a step that ruined the model, and continue with a fallback rule.

Learned optimizers with a guard and a fallback: Prémont-Schwarz et al. 2022, arXiv:2201.12426. That
guard compares losses, which a torch optimizer does not see. It sees the gradient before and after
a step, and so the change of the loss by the trapezoidal rule,
``(g_before + g_after) . step / 2``, which is exact for a quadratic loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from rnnopt.optim.sharding import local, local_gradient, sum_over_shards
from rnnopt.rules.protocol import State, UpdateRule

# Nats that the loss may rise above its minimum. On Hugging Face encoders it rises by less than
# half of that where a rule works, and by 3 to 30 where a rule ruins the model.
MAX_RISE = 1.0
# The guard's state of each parameter: the last step, (N,), and the directional derivative of the
# loss along it at its start. Undoing a step need not be exact.
LAST_STEP, LAST_SLOPE = "last_step", "last_slope"
_STEP_DTYPE = torch.bfloat16
# Its state in every param group: the number of steps undone; nats by which the loss has risen since
# its minimum; whether the last batch was skipped because no gradient was finite.
GROUP_STATE = {"undone": 0, "loss_rise": 0.0, "skipped": False}

Work = Sequence[tuple[dict[str, Any], Tensor, Tensor]]  # (param group, parameter, gradient)


@runtime_checkable
class GuardedRule(UpdateRule, Protocol):
    """A rule that has a fallback, and so can be guarded."""

    def fallback(self) -> UpdateRule:
        """A rule with the same state whose steps are bounded, such as Adam's."""
        ...


def init_guard_state(param: Tensor) -> State:
    """The guard's state before the first step, for this process's shard of a parameter.

    ``last_step`` (N,), bfloat16; ``last_slope`` 0-d, float32. Both are zero.
    """
    part = local(param)
    return {
        LAST_STEP: torch.zeros(part.numel(), dtype=_STEP_DTYPE, device=part.device),
        LAST_SLOPE: torch.zeros((), dtype=torch.float32, device=part.device),
    }


def loss_rise(work: Work, states: Sequence[State]) -> tuple[float, bool]:
    """Nats by which the loss rose in the last step. Waits for the device.

    Args:
        work: (param group, parameter, its gradient after the last step).
        states: each parameter's state, with the last step in it.

    Returns:
        The estimate, infinite if no gradient is finite after the step; and whether the gradient is
        finite in every coordinate.
    """
    items = [(local_gradient(grad, param), state) for (_, param, grad), state in zip(work, states)]
    params = [param for _, param, _ in work]
    ends = [_slope(grad, state[LAST_STEP]) for grad, state in items]
    rows = [
        ((state[LAST_SLOPE] + end) / 2).float().reshape(1) for (_, state), end in zip(items, ends)
    ]
    (change,) = _total(sum_over_shards(rows, params))
    if math.isfinite(change):  # then every coordinate is: one that is not makes the sum infinite
        return change, True
    rows = []
    for grad, state in items:
        end = _slope(grad, state[LAST_STEP], masked=True)
        counts = state[LAST_STEP].count_nonzero(), torch.isfinite(grad).count_nonzero()
        rows.append(torch.stack([x.float() for x in ((state[LAST_SLOPE] + end) / 2, *counts)]))
    change, moved, finite = _total(sum_over_shards(rows, params))
    return math.inf if moved and not finite else change, False


def check_last_step(
    work: Work,
    states: Sequence[State],
    groups: Sequence[dict[str, Any]],
    all_states: Mapping[Tensor, State],
) -> tuple[bool, bool]:
    """Undo the last step if the loss has risen too far; skip a batch without a finite gradient.

    Args:
        work: (param group, parameter, its gradient after the last step).
        states: the state of each of these parameters.
        groups: all param groups of the optimizer, with `GROUP_STATE`, which is updated.
        all_states: the state of every parameter.

    Returns:
        Whether to take the next step; and whether the gradient is finite in every coordinate.
    """
    for (_, param, _), state in zip(work, states):
        if LAST_STEP not in state:
            with torch.inference_mode(False):
                state.update(init_guard_state(param))
    (rise, finite), group = loss_rise(work, states), groups[0]
    # One batch without a finite gradient may be the data's fault and is skipped. A second one in a
    # row is the fault of the step before them.
    skipped = math.isinf(rise) and not group["skipped"]
    total = group["loss_rise"] if skipped else max(0.0, group["loss_rise"] + rise)
    ruined = total > MAX_RISE
    for group in groups:
        group["loss_rise"] = 0.0 if ruined else total
        group["undone"] += ruined
        group["skipped"] = skipped
    if ruined:
        for param, state in all_states.items():
            if LAST_STEP in state:
                undo(param, state)
    return not (ruined or skipped), finite


@torch.no_grad()
def undo(param: Tensor, state: State) -> None:
    """Subtract the last step from a parameter, and clear the guard's state."""
    part = local(param)
    part.sub_(state[LAST_STEP].view_as(part).to(part.dtype))
    forget(state)


def forget(state: State) -> None:
    """Clear the guard's state: no step can be undone now."""
    state[LAST_STEP].zero_()
    state[LAST_SLOPE].zero_()


@torch.no_grad()
def remember(
    work: Work,
    states: Sequence[State],
    before: Sequence[Tensor],
    finite: bool,
    all_states: Mapping[Tensor, State],
) -> None:
    """Store the step from `before` to the current values in the guard's state.

    Args:
        work: (param group, parameter, the gradient before the step).
        states: the state of each of these parameters.
        before: copies of their local shards before the step; overwritten.
        finite: whether the gradient is known to be finite in every coordinate.
        all_states: the state of every parameter. Those that have not been stepped now are cleared,
            because their last step is not part of this one.
    """
    for (_, param, grad), state, old in zip(work, states, before):
        torch.sub(local(param), old, out=old)
        state[LAST_STEP].copy_(old.reshape(-1))
        state[LAST_SLOPE].copy_(_slope(local_gradient(grad, param), old, masked=not finite))
    stepped = {param for _, param, _ in work}
    for param, state in all_states.items():
        if LAST_STEP in state and param not in stepped:
            forget(state)


def _slope(grad: Tensor, step: Tensor, masked: bool = False) -> Tensor:
    """``g . step``, 0-d, float32 or wider.

    Masked, it is over the coordinates with a finite gradient, which takes several passes.
    """
    flat = grad.reshape(-1)
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    if masked:
        flat = torch.where(torch.isfinite(flat), flat, 0)
    return torch.dot(flat, step.reshape(-1).to(flat.dtype))


def _total(rows: Sequence[Tensor | None]) -> list[float]:
    """The sum of all rows. Waits once for each device that holds some."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for row in rows:
        by_device.setdefault(cast(Tensor, row).device, []).append(cast(Tensor, row))
    sums = [torch.stack(held).sum(dim=0).cpu() for held in by_device.values()]
    total: list[float] = torch.stack(sums).sum(dim=0).tolist()
    return total
