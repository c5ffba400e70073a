"""The guard: undo a step that ruined the model, and continue with a fallback rule.

Learned optimizers with a guard and a fallback: Prémont-Schwarz et al. 2022, arXiv:2201.12426. That
guard compares losses, which a torch optimizer does not see. It sees the gradient before and after
a step, and so the change of the loss by the trapezoidal rule,
``(g_before + g_after) . step / 2``, which is exact for a quadratic loss.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from rnnopt.optim.arguments import MOST_LR, as_number
from rnnopt.optim.kernels.fused import GuardKernel
from rnnopt.optim.peers import ALONE, Peers
from rnnopt.optim.sharding import local, local_gradient, sum_over_shards
from rnnopt.rules.protocol import State, UpdateRule, statistics_of

# Nats that the loss may rise above its minimum. On Hugging Face encoders it rises by less than
# half of that where a rule works, and by 3 to 30 where a rule ruins the model.
MAX_RISE = 1.0
# The guard's state of each parameter: the last step, (N,), and the directional derivative of the
# loss along it at its start. Undoing a step need not be exact.
LAST_STEP, LAST_SLOPE = "last_step", "last_slope"
_STEP_DTYPE = torch.bfloat16
# Coordinates that are converted at once: a copy of a whole tensor would take much memory. On a GPU
# each operation costs a launch, and few coordinates are done in less time than that.
_CHUNK, _CHUNK_ELSEWHERE = 1 << 16, 1 << 23
# Its state in every param group: the number of steps undone; nats by which the loss has risen since
# its minimum; whether the last batch was skipped; the norm of the largest gradient stepped by.
GROUP_STATE = {"undone": 0, "loss_rise": 0.0, "skipped": False, "largest_gradient": 0.0}
# A gradient so many times larger than any before is an accident of one batch: Adam's second moment
# would remember it for thousands of steps. Between batches norms differ tenfold at most.
_OUTLIER = 1000.0
# Steps of an lr above `MOST_LR` reach far beyond what two gradients tell: the estimate of a rise is
# too small, and the gradients of the ruined model raise the limit. So it is a third there.
_SHARE_IF_LONG = 1 / 3

Work = Sequence[tuple[dict[str, Any], Tensor, Tensor]]  # (param group, parameter, gradient)


@runtime_checkable
class GuardedRule(UpdateRule, Protocol):
    """A rule that has a fallback, and so can be guarded."""

    def fallback(self) -> UpdateRule:
        """A rule with the same state whose steps are bounded, such as Adam's."""
        ...


@runtime_checkable
class ScaleFreeRule(GuardedRule, Protocol):
    """A guarded rule whose steps do not depend on a constant factor of the loss.

    Gradients of accumulated batches, or of several processes, may arrive too large by a constant. A
    bound in nats would undo good steps then, and without a bound in nats the guard is as free of
    scale as the rule.
    """

    def largest_rise(self, states: Sequence[State]) -> Tensor:
        """What the loss may rise above its minimum by what the states have seen, 0-d.

        Args:
            states: of the parameters that are stepped together.
        """
        ...

    def promised(self, statistics: Sequence[Tensor]) -> Tensor:
        """What the fallback's next step promises to first order, 0-d: the loss may rise by that.

        Where the first gradients were very small, this alone tells a harmless rise from a ruin.

        Args:
            statistics: of the parameters that are stepped together, at their present gradients.
        """
        ...


class Taken(NamedTuple):
    """The tensors of a step that a kernel takes.

    Attributes:
        kernel: the kernel.
        batches: rows of the work; gradients of a batch have one dtype.
    """

    kernel: GuardKernel
    batches: list[list[int]]


def taken_by(kernel: GuardKernel, work: Work, states: Sequence[State]) -> Taken:
    """The tensors that the kernel supports; their states have the guard's leaves."""
    batches: dict[torch.dtype, list[int]] = {}
    for row, ((_, param, grad), state) in enumerate(zip(work, states)):
        part = local_gradient(grad, param)
        if kernel.supports(part, state[LAST_STEP]):
            batches.setdefault(part.dtype, []).append(row)
    return Taken(kernel, list(batches.values()))


def begin_guard(work: Work, states: Sequence[State]) -> None:
    """Give the states the guard's leaves where they have none."""
    for (_, param, _), state in zip(work, states):
        if LAST_STEP not in state:
            with torch.inference_mode(False):
                state.update(init_guard_state(param))


def check_guard(guard: bool | None, rule: UpdateRule) -> None:
    """Check that a required guard can be had.

    Raises:
        RuntimeError: the rule has no fallback.
    """
    if guard and not isinstance(rule, GuardedRule):
        raise RuntimeError(
            f"guard=True, but {type(rule).__name__} has no fallback (no method `fallback`); leave "
            "guard out"
        )


def init_guard_state(param: Tensor) -> State:
    """The guard's state before the first step, for this process's shard of a parameter.

    ``last_step`` (N,), bfloat16; ``last_slope`` 0-d, float32, of the whole parameter. Both are
    zero.
    """
    part = local(param)
    return {
        LAST_STEP: torch.zeros(part.numel(), dtype=_STEP_DTYPE, device=part.device),
        LAST_SLOPE: torch.zeros((), dtype=torch.float32, device=part.device),
    }


def loss_rise(
    work: Work,
    states: Sequence[State],
    peers: Peers = ALONE,
    taken: Taken | None = None,
) -> tuple[float, bool, float]:
    """Nats by which the loss rose in the last step. Waits for the device.

    Args:
        work: (param group, parameter, its gradient after the last step).
        states: each parameter's state, with the last step in it.
        peers: the processes with the model's other parameters.
        taken: the tensors that a kernel takes.

    Returns:
        The estimate, infinite if no gradient is finite after the step; whether the gradient is
        finite in every coordinate; and the norm of the finite ones.
    """
    grads = [local_gradient(grad, param) for _, param, grad in work]
    params, steps = [param for _, param, _ in work], [state[LAST_STEP] for state in states]
    slopes = [state[LAST_SLOPE] for state in states]

    def summed(masked: bool) -> list[float]:
        rows = sum_over_shards(_ends(grads, steps, masked, taken), params)
        return peers.total(total(rows, slopes), 4 if masked else 2)

    change, square = summed(masked=False)
    if math.isfinite(change):  # then every coordinate is: one that is not makes the sum infinite
        return change, True, math.sqrt(square)
    change, square, moved, finite = summed(masked=True)
    return math.inf if moved and not finite else change, False, math.sqrt(square)


def _ends(
    grads: Sequence[Tensor], steps: Sequence[Tensor], masked: bool, taken: Taken | None
) -> list[Tensor]:
    """The first two sums of `GuardKernel.ends` for each tensor; masked, all four."""
    rows: dict[int, Tensor] = {}
    if taken is not None:
        for held in taken.batches:
            found = taken.kernel.ends([grads[i] for i in held], [steps[i] for i in held], masked)
            rows.update(zip(held, (found if masked else found[:, :2]).unbind()))
    for i, (grad, step) in enumerate(zip(grads, steps)):
        if i not in rows:
            clean = torch.where(torch.isfinite(grad), grad, 0) if masked else grad
            sums = [_slope(grad, step, masked), _slope(clean, clean)]
            if masked:
                counts = step.count_nonzero(), torch.isfinite(grad).count_nonzero()
                sums += [count.to(sums[0]) for count in counts]
            rows[i] = torch.stack(sums)
    return [rows[i] for i in range(len(grads))]


def check_last_step(
    work: Work,
    states: Sequence[State],
    groups: Sequence[dict[str, Any]],
    all_states: Mapping[Tensor, State],
    rule: UpdateRule,
    peers: Peers = ALONE,
    taken: Taken | None = None,
) -> tuple[bool, bool]:
    """Undo the last step if the loss has risen too far; skip a batch without a usable gradient.

    Usable is a gradient that is finite, and not thousands of times larger than any before.

    Args:
        work: (param group, parameter, its gradient after the last step).
        states: the state of each of these parameters.
        groups: all param groups of the optimizer, with `GROUP_STATE`, which is updated.
        all_states: the state of every parameter.
        rule: the optimizer's, which may say what rise is too far.
        peers: the processes with the model's other parameters.
        taken: see `loss_rise`.

    Returns:
        Whether to take the next step; and whether the gradient is finite in every coordinate.
    """
    (rise, finite, norm), group = loss_rise(work, states, peers, taken), groups[0]
    largest = group["largest_gradient"]
    # One batch without a finite gradient may be the data's fault and is skipped. A second one in a
    # row is the fault of the step before them; a second gradient that is far larger than all before
    # has come to stay.
    skipped = math.isinf(rise) and not group["skipped"]
    total = group["loss_rise"] if skipped else max(0.0, group["loss_rise"] + rise)
    ruined = _is_ruined(total, work, states, groups, rule, peers)
    if not (ruined or skipped or group["skipped"]) and 0 < _OUTLIER * largest < norm:
        skipped, total = True, group["loss_rise"]
    if not (ruined or skipped):
        largest = max(largest, norm)
    for group in groups:
        group["largest_gradient"] = largest
        group["loss_rise"] = 0.0 if ruined else total
        group["undone"] += ruined
        group["skipped"] = skipped
    if ruined:
        for param, state in all_states.items():
            if LAST_STEP in state:
                undo(param, state)
    return not (ruined or skipped), finite


def _is_ruined(
    rise: float,
    work: Work,
    states: Sequence[State],
    groups: Sequence[dict[str, Any]],
    rule: UpdateRule,
    peers: Peers,
) -> bool:
    """Whether the loss has risen too far above its minimum."""
    if math.isinf(rise) or not isinstance(rule, ScaleFreeRule):
        return rise > MAX_RISE
    limit = peers.largest(float(rule.largest_rise(states)) if states else 0.0)
    if not groups[0]["undone"] and rise > _SHARE_IF_LONG * limit and _is_long(groups):
        return True
    if rise <= limit:
        return False
    rows = [
        statistics_of(rule, local(param), local_gradient(grad, param), state)
        for (_, param, grad), state in zip(work, states)
    ]
    sums = sum_over_shards(rows, [param for _, param, _ in work])
    return rise > float(rule.promised(peers.rows(cast(list[Tensor], sums))))


def _is_long(groups: Sequence[dict[str, Any]]) -> bool:
    """Whether steps are far longer than the rule was meta-trained for."""
    return max(as_number("lr", group["lr"]) for group in groups) > MOST_LR


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


def unguarded(state: State) -> State:
    """A state without what the guard keeps in it."""
    return {name: leaf for name, leaf in state.items() if name not in (LAST_STEP, LAST_SLOPE)}


class LastStep:
    """Stores a step in the guard's state, in parts: the copy of all parameters would be large.

    Args:
        work: (param group, parameter, the gradient before the step).
        states: the state of each of these parameters.
        finite: whether the gradient is known to be finite in every coordinate.
        update: the leaf in which the rule keeps its last update, if it keeps it; no copy is needed
            then.
        rate: what a group's lr becomes in this step.
        taken: the tensors that a kernel takes.
    """

    def __init__(
        self,
        work: Work,
        states: Sequence[State],
        finite: bool,
        update: str | None = None,
        rate: Callable[[float], float] = float,
        taken: Taken | None = None,
    ) -> None:
        self._work, self._states, self._finite = work, states, finite
        self._update, self._rate, self._taken = update, rate, taken
        # all in order: processes may step their parts in another order, and this may communicate
        self._grads = [local_gradient(grad, param) for _, param, grad in work]
        self._slopes: list[Tensor] = [state[LAST_SLOPE] for state in states]

    @contextlib.contextmanager
    def recorded(self, rows: Sequence[int]) -> Iterator[None]:
        """Within it these rows of the work, and no others, are stepped."""
        if self._update is not None:
            yield
            kept = self._keep_by_kernel(rows, self._update)
            for row in rows:
                if row not in kept:
                    self._slopes[row] = self._keep_update(row, self._update)
            return
        before = [local(self._work[row][1]).clone() for row in rows]
        yield
        for row, old in zip(rows, before):
            torch.sub(local(self._work[row][1]), old, out=old)
            self._states[row][LAST_STEP].copy_(old.reshape(-1))
            self._slopes[row] = _slope(self._grads[row], old, masked=not self._finite)

    def _keep_by_kernel(self, rows: Sequence[int], leaf: str) -> set[int]:
        """As `_keep_update`, of the rows that the kernel takes; returns these."""
        done: set[int] = set()
        if self._taken is None:
            return done
        kernel, wanted = self._taken.kernel, set(rows)
        for batch in self._taken.batches:
            held = [
                row for row in batch
                if row in wanted
                and kernel.keeps(self._states[row][leaf], self._states[row][LAST_STEP])
            ]  # fmt: skip
            if held:
                slopes = kernel.keep(
                    [self._grads[row] for row in held],
                    [self._states[row][leaf] for row in held],
                    [self._states[row][LAST_STEP] for row in held],
                    [self._lr(row) for row in held],
                    not self._finite,
                )
                for row, slope in zip(held, slopes.unbind()):
                    self._slopes[row] = slope
            done.update(held)
        return done

    def _lr(self, row: int) -> float:
        return self._rate(as_number("lr", self._work[row][0]["lr"]))

    def _keep_update(self, row: int, leaf: str) -> Tensor:
        """Store lr times the rule's update, chunk by chunk; weight decay is left out.

        Returns:
            The slope along it, 0-d.
        """
        state, lr, slopes = self._states[row], self._lr(row), []
        leaves = self._grads[row].reshape(-1), state[leaf], state[LAST_STEP]
        for grad, update, kept in zip(*(torch.split(x, _chunk(x)) for x in leaves)):
            step = lr * update
            if not self._finite:  # coordinates without a finite gradient kept their values
                step = torch.where(torch.isfinite(grad), step, 0)
            kept.copy_(step)
            slopes.append(_slope(grad, step, masked=not self._finite))
        return torch.stack(slopes).sum()

    def finish(self, all_states: Mapping[Tensor, State]) -> None:
        """To be called after all rows have been recorded.

        Args:
            all_states: the state of every parameter. Those that have not been stepped now are
                cleared, because their last step is not part of this one.
        """
        params = [param for _, param, _ in self._work]
        by_device: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
        for state, slope in zip(self._states, sum_over_shards(self._slopes, params)):
            old, new = by_device.setdefault(state[LAST_SLOPE].device, ([], []))
            old.append(state[LAST_SLOPE])
            new.append(cast(Tensor, slope).float())
        for old, new in by_device.values():
            torch._foreach_copy_(old, new)
        if len(all_states) > len(params):
            stepped = set(params)
            for param, state in all_states.items():
                if LAST_STEP in state and param not in stepped:
                    forget(state)


def _slope(grad: Tensor, step: Tensor, masked: bool = False) -> Tensor:
    """``g . step``, 0-d, float32 or wider.

    Masked, it is over the coordinates with a finite gradient, which takes several passes.
    """
    dtype, parts = torch.promote_types(grad.dtype, torch.float32), []
    for flat, move in zip(*(torch.split(x.reshape(-1), _chunk(x)) for x in (grad, step))):
        part = flat.to(dtype)
        if masked:
            part = torch.where(torch.isfinite(part), part, 0)
        parts.append(torch.dot(part, move.to(dtype)))
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def _chunk(tensor: Tensor) -> int:
    """How many coordinates to convert at once."""
    return _CHUNK if tensor.is_cpu else _CHUNK_ELSEWHERE


def total(rows: Sequence[Tensor | None], starts: Sequence[Tensor] | None = None) -> list[float]:
    """The sum of all rows. Waits once for each device that holds some.

    Args:
        rows: (M,) for each tensor.
        starts: slopes at the start of the last step, 0-d, where rows begin with those at its end:
            then they begin with the change of the loss instead.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, row in enumerate(rows):
        known = cast(Tensor, row)
        kinds.setdefault((known.device, known.dtype), []).append(i)
    sums = []
    for held in kinds.values():
        found = torch.stack([cast(Tensor, rows[i]) for i in held])
        if starts is not None:
            found[:, 0] = (torch.stack([starts[i] for i in held]) + found[:, 0]) / 2
        sums.append(found.float().sum(dim=0).cpu())
    together: list[float] = torch.stack(sums).sum(dim=0).tolist() if sums else []
    return together
