"""`LearnedOptimizer`: an update rule as a `torch.optim.Optimizer`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT

from rnnopt.optim.arguments import (
    as_number,
    as_switch,
    check_finite,
    check_group,
    first_device,
    refuse_capture,
    refuse_sparse,
    resolve_rule,
)
from rnnopt.optim.checkpoint import loading, saving
from rnnopt.optim.history import has_gradient
from rnnopt.optim.kernels.choice import fused_step
from rnnopt.optim.kernels.fused import Around, FusedStep, Leaves, Piece, plain_step, unwatched
from rnnopt.optim.parts import refuse_mixed_tensors, warn_of_parts, watch
from rnnopt.optim.peers import ALONE, find_peers
from rnnopt.optim.safeguard import (
    GROUP_STATE,
    GuardedRule,
    LastStep,
    Work,
    begin_guard,
    check_guard,
    check_last_step,
    taken_by,
    unguarded,
)
from rnnopt.optim.sharding import (
    find_flat_shards,
    gradients,
    is_sharded,
    local,
    local_gradient,
    on_shards,
    share_out,
    sum_over_shards,
    whole,
)
from rnnopt.rules.files import SHIPPED_RULE
from rnnopt.rules.protocol import (
    MatrixRule,
    State,
    UpdateRule,
    matrix_transform,
    statistics_of,
)


class LearnedOptimizer(torch.optim.Optimizer):
    """Adapt a model with an update rule, learned or classical, in place of AdamW.

    ``p += lr * (rule(p.grad) - rule.step_size * weight_decay * p)``, see
    `rnnopt.rules.protocol.advance`.

    A `TwoLevelLSTM`, the kind of rule that ships, steps by a fused kernel on a CPU with a C
    compiler, and on a GPU with Triton if the rule is on the GPU too, see
    `rnnopt.optim.kernels.fused`. DTensor parameters (FSDP2) are stepped shard by
    shard, with the same result as whole tensors; their `state` is that of the shard, and in
    `state_dict` it is a DTensor, too. The rule needs the gradients of all that trains: one
    optimizer for a whole model.

    Args:
        params: tensors or param groups, as in every torch optimizer.
        rule: an `UpdateRule`, kept as it is and not copied; the path of a rule file; or None for
            the rule that ships with the package, `rnnopt.rules.files.SHIPPED_RULE`.
        lr: multiplies the learned step, per group; dimensionless, 1.0 = as meta-trained. A number
            or a tensor of one element. Torch's schedulers work on it (those that cycle momentum
            with cycle_momentum=False).
        weight_decay: decoupled decay, per group, in units of ``lr * rule.step_size``. With a rule
            that is Adam it is AdamW's.
        fused: None uses the kernel where it can; False never does; True requires one. Parameters
            that a kernel does not support (by dtype, device or memory layout) are stepped by the
            plain rule beside it.
        guard: None guards every rule that has a fallback, see `rnnopt.optim.safeguard`: if the
            loss rises too far, the step that caused it is undone and the fallback takes over (for
            the shipped rule Adam at its base rates), with half the step each further time; see
            `undone`. It costs 2 bytes per coordinate and one synchronisation with the device per
            step, and with a rule that does not keep its last update a copy of the trained
            parameters during the step. Clipped gradients hide a rise. False never guards; True
            requires a rule that has a fallback. `apply`, and with it an unroll, has no guard.

    Raises:
        ValueError: lr or weight_decay is negative or not finite.
        ValueError: a parameter occurs twice in a group, or is a flat one of FSDP1 and the rule
            needs whole tensors.
        TypeError: a parameter is complex or integer, lr or weight_decay is no number, fused or
            guard is something else than None, True or False, or rule is not an update rule.
        RuntimeError: `fused` is True and there is no kernel for this rule or machine, or `guard` is
            True and the rule has no fallback.
        InputError: the rule file can't be used.
    """

    rule: UpdateRule
    fused: bool | None = None
    guard: bool | None = None
    _fallback: UpdateRule | None = None
    _peers = ALONE  # processes with the model's other parameters
    _has_gradient = False  # whether a gradient has been seen that was not all zero

    def __init__(
        self,
        params: ParamsT,
        rule: UpdateRule | str | os.PathLike[str] | None = None,
        lr: float = 1.0,
        weight_decay: float = 0.0,
        *,
        fused: bool | None = None,
        guard: bool | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **GROUP_STATE})
        # An attribute, never in param_groups: `higher` deep-copies the groups, and the
        # meta-gradient of a copy is silently None (higher issue #62).
        self._peers = find_peers()
        params = [param for group in self.param_groups for param in group["params"]]
        find_flat_shards(params)
        self.rule = resolve_rule(SHIPPED_RULE if rule is None else rule)
        refuse_mixed_tensors(params, self.rule)
        self.fused = as_switch("fused", fused)
        self.guard = as_switch("guard", guard)
        if rule is not self.rule:  # loaded here: moved once, or each step would copy its weights
            self.rule.to(first_device(self.param_groups))  # type: ignore[attr-defined]
        if self.fused:
            self._kernel(self.rule)
        check_guard(self.guard, self.rule)
        watch(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, with this class's checks on values and dtypes.

        Raises:
            ValueError: see the class.
            TypeError: see the class.
        """
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @property
    def undone(self) -> int:
        """How many steps the guard has undone; kept in state_dict."""
        return max(int(group["undone"]) for group in self.param_groups)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            TypeError: a gradient is sparse; then no parameter has been changed.
            ValueError: lr or weight_decay has become NaN or infinite; then too.
            RuntimeError: a CUDA graph is being captured: its replay would not update the state.
        """
        refuse_capture()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pairs = [(group, param) for group in self.param_groups for param in group["params"]]
        grads = gradients([param for _, param in pairs])
        work = [  # a parameter on the meta device has no value to change
            (group, param, grad)
            for (group, param), grad in zip(pairs, grads)
            if grad is not None and not param.is_meta
        ]
        if not torch.compiler.is_compiling():
            warn_of_parts(self)
        if work or not self._peers.alone:
            self._step_eagerly(work)
        return loss

    # The guard decides by values, and the kernel is compiled already: torch.compile breaks its
    # graph here, and the step is the same as without it.
    @_disable_dynamo
    def _step_eagerly(self, work: Work) -> None:
        refuse_sparse(work)
        check_finite(self.param_groups)
        states = [self._state_of(param) for _, param, _ in work]
        if not self._has_gradient:
            seen = float(has_gradient(work, states, self.init_state))
            self._has_gradient = self._peers.largest(seen) > 0
        if self.guard is not False and isinstance(self.rule, GuardedRule):
            self._guarded_step(work, states)
        else:
            self._apply(work, self._has_gradient)

    def _guarded_step(self, work: Work, states: Sequence[State]) -> None:
        begin_guard(work, states)
        kernel = self._kernel(self.rule)
        guard = None if kernel is None else kernel.guard
        taken = None if guard is None else taken_by(guard, work, states)
        proceed, finite = check_last_step(
            work, states, self.param_groups, self.state, self.rule, self._peers, taken
        )
        if proceed:
            update = getattr(self.rule, "last_update", None)
            last = LastStep(work, states, finite, update, self._active_rule()[1], taken)
            self._apply(work, self._has_gradient, last.recorded)
            last.finish(self.state)

    @torch.no_grad()
    def apply(self, work: Sequence[tuple[dict[str, Any], Tensor, Tensor]]) -> list[Tensor | None]:
        """One step with the gradients given, by the kernel where it can, without the guard.

        Args:
            work: (param group, parameter, its gradient).

        Returns:
            The context of each tensor, see `rnnopt.rules.protocol.cross_tensor_context`.

        Raises:
            TypeError: a gradient is sparse; then no parameter has been changed.
        """
        return self._apply(work)

    def _apply(
        self, work: Work, counts: bool = True, around: Around = unwatched
    ) -> list[Tensor | None]:
        """See `apply`; a step that does not count leaves the state as it is.

        `around` makes a context for each part of the step, from the rows of the work in it.
        """
        refuse_sparse(work)
        rule, multiplier = self._active_rule()
        pieces = self._pieces(rule, work, multiplier)
        kernel = self._kernel(rule) if counts else None
        batches: dict[tuple[torch.dtype, ...], list[int]] = {}
        for i, piece in enumerate(pieces):
            if kernel is not None and kernel.supports(piece):
                batches.setdefault(piece.dtypes, []).append(i)
        leaves: dict[Any, Leaves] = self.__dict__.setdefault("_leaves", {})
        fused = cast(FusedStep, kernel)
        measured = [
            (batch, fused.measure([pieces[i] for i in batch], leaves.setdefault(kind, Leaves())))
            for kind, batch in batches.items()
        ]
        alone = self._peers.alone and all(piece.whole for piece in pieces)
        if alone and [len(batch) for batch, _ in measured] == [len(work)]:
            ((batch, found),) = measured
            context = fused.context(found)
            fused.step(found, context, batch, around)
            return list(context)
        statistics: dict[int, Tensor | None] = {
            i: row for batch, found in measured for i, row in zip(batch, found.statistics)
        }
        plain = [i for i in range(len(work)) if i not in statistics]
        for i in plain:
            pieces[i].state = unguarded(pieces[i].state)
            statistics[i] = statistics_of(rule, pieces[i].param, pieces[i].grad, pieces[i].state)
        # all tensors in order: another process may divide them otherwise between kernel and rule
        rows = [statistics[i] for i in range(len(work))]
        sums = sum_over_shards(rows, [param for _, param, _ in work])
        contexts = self._peers.contexts(rule, sums, [piece.state for piece in pieces])
        for batch, found in measured:
            context = torch.stack([cast(Tensor, contexts[i]) for i in batch])
            fused.step(found, context, batch, around)
        for i in plain:
            with around([i]):
                state = plain_step(rule, pieces[i], contexts[i])
                if counts:
                    self.state[work[i][1]].update(state)
        summed = getattr(rule, "summed", ())
        if counts and summed and any(is_sharded(param) for _, param, _ in work):
            params = [param for _, param, _ in work]
            share_out([self.state[param] for param in params], params, summed)
        return contexts

    def _active_rule(self) -> tuple[UpdateRule, Callable[[float], float]]:
        """The rule that steps now, and what a group's lr becomes for it."""
        if not self.undone or not isinstance(self.rule, GuardedRule):
            return self.rule, float
        if self._fallback is None:
            self._fallback = self.rule.fallback()
        # a larger lr may be what has ruined the model
        return self._fallback, lambda lr: min(lr, 1.0) * 0.5 ** (self.undone - 1)

    def _state_of(self, param: Tensor) -> State:
        """A parameter's state, initialised if it has none."""
        if not self.state[param]:
            with torch.inference_mode(False):  # or no later step outside of it could write to it
                self.state[param] = self.init_state(param)
        state: State = self.state[param]
        return state

    def _pieces(
        self, rule: UpdateRule, work: Work, multiplier: Callable[[float], float]
    ) -> list[Piece]:
        """This process's shard of each parameter, with all that a step needs."""
        rates: dict[int, tuple[float, float]] = {}  # of each group
        pieces = []
        for group, param, grad in work:
            if id(group) not in rates:
                lr, decay = (as_number(name, group[name]) for name in ("lr", "weight_decay"))
                rates[id(group)] = multiplier(lr), decay
            sharded = is_sharded(param)
            transform = matrix_transform(rule, whole(param) if sharded else param)
            if sharded:
                transform = on_shards(transform, param)
            state, (lr, decay) = self._state_of(param), rates[id(group)]
            part = local_gradient(grad, param)
            pieces.append(Piece(local(param), part, state, lr, decay, transform, not sharded))
        return pieces

    def _kernel(self, rule: UpdateRule) -> FusedStep | None:
        """The fused step of a rule, unless there is none or `fused` is False."""
        # compiled code would keep the tables of this step
        if self.fused is False or torch.compiler.is_compiling():
            return None
        kernel = fused_step(rule)
        if self.fused and kernel is None:
            raise RuntimeError(
                f"fused=True, but there is no kernel for {type(rule).__name__} here: it takes "
                "a TwoLevelLSTM with float32 weights, on the CPU and a C compiler, or on a GPU "
                "and Triton"
            )
        return kernel

    def init_state(self, param: Tensor) -> State:
        """The rule's state for a parameter, or for this process's shard of it."""
        if is_sharded(param) and isinstance(self.rule, MatrixRule):
            return self.rule.init_state(local(param), shape=whole(param).shape)
        return self.rule.init_state(local(param))

    def state_dict(self) -> dict[str, Any]:
        """As in torch; leaves of coordinates have the shape and the placements of their parameter.

        Those of ``cell`` have another dimension before them.
        """
        with saving(self, self.rule):
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but the state keeps its dtype and is checked against the rule.

        Raises:
            ValueError: the groups are those of another optimizer, or a state is that of another
                parameter or rule; then this optimizer is unchanged.
            TypeError: an lr or weight_decay is no number; then too.
        """
        with loading(self, self.rule, self.init_state):
            super().load_state_dict(state_dict)
        self._has_gradient = False  # the states tell

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle keep; torch would leave out the attributes of this class."""
        kept = ("rule", "fused", "guard", "_fallback", "_has_gradient")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}


def trainable(optimizer: torch.optim.Optimizer) -> Iterable[tuple[dict[str, Any], Tensor]]:
    """The optimizer's (param group, parameter) pairs that require a gradient, in order."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.requires_grad:
                yield group, param
