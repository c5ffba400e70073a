"""`LearnedOptimizer`: a rule as a `torch.optim.Optimizer`."""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from rnnopt.optim.kernels.choice import fused_step
from rnnopt.optim.kernels.fused import FusedStep, Piece
from rnnopt.optim.safeguard import (
    LAST,
    MOST_RISE,
    SLOPE,
    GuardedRule,
    Work,
    forget,
    init_memory,
    remember,
    rise,
    undo,
)
from rnnopt.optim.sharding import is_sharded, local, local_gradient, on_shards, sum_over_shards
from rnnopt.rules.files import SHIPPED_HEAD_RULE, load_rule, shipped_rule
from rnnopt.rules.protocol import (
    MatrixRule,
    State,
    UpdateRule,
    advance,
    cross_tensor_context,
    matrix_transform,
    statistics_of,
)

# What the guard keeps in each group.
_GUARD = {"undone": 0, "climbed": 0.0, "lost": False}
# Below it a multiplier is a learning rate left over from another optimizer.
_LEAST_LR = 0.01


class LearnedOptimizer(torch.optim.Optimizer):
    """Adapt a model with an update rule, learned or not, in place of AdamW.

    ``p += lr * (rule(p.grad) - rule.step_size * weight_decay * p)``, see `rnnopt.rules.protocol.advance`. On
    a CPU with a C compiler, and on a GPU with Triton where the rule is on the GPU too, the shipped
    kind of rule takes its steps by a fused kernel, see `rnnopt.optim.kernels.fused`. DTensor parameters (FSDP2)
    are stepped shard by shard, with the same result as whole ones; their memory in `state` is that
    of the shard.

    Args:
        params: tensors or param groups, as every torch optimizer takes them.
        rule: an `UpdateRule`; the path of a rule file; or None for the rule that ships with the
            package, see `rnnopt.rules.files.shipped_rule`. Kept as it is, not copied: `rule` of the
            optimizer is this object.
        lr: multiplies the learned step, per group; dimensionless, 1.0 = as meta-trained. Every
            torch scheduler works on it (those that cycle momentum with cycle_momentum=False).
        weight_decay: decoupled decay, per group, in units of ``lr * rule.step_size``: with a rule
            that is Adam this is AdamW's.
        state_dtype: of the memory that bears rounding (the LSTM's; never Adam's moments):
            torch.bfloat16 makes 40 bytes a coordinate of an LSTM's 72. None: as the rule's weights.
            Memory that is loaded keeps the dtype that it was saved in.
        fused: None takes the kernel where it can; False never; True wants one to be there.
            Parameters that a kernel can't take (another dtype or device than it knows, or memory
            out of order) are stepped plainly beside it.
        guard: None watches, where the rule knows a careful one, whether the loss climbs by a nat:
            the step that made it is undone, the careful rule takes over (for the shipped rule: Adam
            at a scale of its own), and every further time halves the step; see `rnnopt.optim.safeguard` and
            `undone`. Costs 2 bytes a coordinate, a copy of what trains during the step, and one
            wait for the device a step. The loss is to be a mean in nats, and gradients are not to
            be clipped, which hides a rise. False never; True wants a rule that knows one. `apply`,
            and with it the unroll, has no guard.

    Raises:
        ValueError: lr or weight_decay is negative or not finite.
        ValueError: a parameter stands in a group twice.
        TypeError: a parameter is complex or integer, rule is no rule, or one that can't have
            `state_dtype`.
        RuntimeError: `fused` is True and there is no kernel for this rule or machine, or `guard` is
            True and the rule knows no careful one.
        InputError: the rule file can't be used.
    """

    rule: UpdateRule
    state_dtype: torch.dtype | None = None
    fused: bool | None = None
    guard: bool | None = None
    _fallback: UpdateRule | None = None
    _for_a_head = False  # the rule, chosen here for a head alone

    def __init__(
        self,
        params: ParamsT,
        rule: UpdateRule | str | os.PathLike[str] | None = None,
        lr: float = 1.0,
        weight_decay: float = 0.0,
        *,
        state_dtype: torch.dtype | None = None,
        fused: bool | None = None,
        guard: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "weight_decay": weight_decay, **_GUARD},
        )
        # An attribute, never in param_groups: `higher` deep-copies the groups, and the
        # meta-gradient of a copy is silently None (higher issue #62).
        chosen = shipped_rule(_choosing(self.param_groups)) if rule is None else rule
        self._for_a_head = rule is None and chosen == SHIPPED_HEAD_RULE
        self.rule = _resolve_rule(chosen)
        self.state_dtype = _checked_state_dtype(self.rule, state_dtype)
        self.fused = fused
        self.guard = guard
        if rule is not self.rule:  # loaded here, so ours to move: or each step would copy it
            self.rule.to(_first_device(self.param_groups))  # type: ignore[attr-defined]
        if fused:
            self._kernel(self.rule)
        if guard and not isinstance(self.rule, GuardedRule):
            raise RuntimeError(
                f"guard=True, but {type(self.rule).__name__} knows no careful rule to hand over to "
                "(it has no method `careful`); leave guard out"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, with this class's checks on values and dtypes."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for name in ("lr", "weight_decay"):
                if not 0 <= float(group[name]) < float("inf"):
                    raise ValueError(f"{name}={group[name]}: must be finite and at least 0")
            if 0 < float(group["lr"]) < _LEAST_LR:
                warnings.warn(
                    f"lr={group['lr']} multiplies the learned step, 1.0 is as meta-trained, and "
                    "with this one next to nothing is learned; leave lr out",
                    stacklevel=4,
                )
            if len(set(group["params"])) < len(group["params"]):
                raise ValueError("a parameter stands in this group twice: give each once")
            for param in group["params"]:
                if not param.is_floating_point():
                    raise TypeError(
                        f"a parameter of dtype {param.dtype} and shape {tuple(param.shape)}: only "
                        "real floating-point parameters can be adapted; leave it out of params"
                    )
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @property
    def undone(self) -> int:
        """How many steps were undone since they made the loss climb; kept in state_dict."""
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
            TypeError: a gradient is sparse; no parameter has been changed then.
            RuntimeError: a CUDA graph is being captured: its replay would not advance the memory.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "LearnedOptimizer.step in a CUDA graph: its replay would not advance the memory; "
                "capture forward and backward, and step outside of the graph"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [
            (group, param, param.grad)
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None
        ]
        if self._for_a_head and len(work) > 2:
            self._for_a_head = False
            warnings.warn(
                f"{len(work)} tensors train with the rule that ships for a linear head alone; it "
                "ruins an encoder: make a new LearnedOptimizer of all that trains now",
                stacklevel=4,  # past the two wrappers that torch puts around a step
            )
        if work and self._guards():
            self._guarded_step(work)
        else:
            self.apply(work)
        return loss

    def _guards(self) -> bool:
        watched = self.guard is not False and isinstance(self.rule, GuardedRule)
        return watched and not torch.compiler.is_compiling()

    def _guarded_step(self, work: Work) -> None:
        _refuse_sparse(work)
        states = [self._memory(param) for _, param, _ in work]
        for (_, param, _), state in zip(work, states):
            if LAST not in state:
                with torch.inference_mode(False):
                    state.update(init_memory(param))
        (risen, finite), first = rise(work, states), self.param_groups[0]
        # One batch without a finite gradient says nothing of the step before it: it is passed
        # over. A second one in a row says that the step left none.
        lost = math.isinf(risen) and not first["lost"]
        climbed = first["climbed"] if lost else max(0.0, first["climbed"] + risen)
        ruined = climbed > MOST_RISE
        for group in self.param_groups:
            group["climbed"] = 0.0 if ruined else climbed
            group["undone"] += ruined
            group["lost"] = lost
        if ruined:
            for param, state in self._remembered():
                undo(param, state)
        if ruined or lost:
            return
        before = [local(param).clone() for _, param, _ in work]
        self.apply(work)
        remember(work, states, before, finite)
        stepped = {param for _, param, _ in work}
        for param, state in self._remembered():
            if param not in stepped:  # what it did is no part of this step
                forget(state)

    def _remembered(self) -> list[tuple[Tensor, State]]:
        """Parameters of which the guard keeps a step, with their memory."""
        return [(param, state) for param, state in self.state.items() if LAST in state]

    @torch.no_grad()
    def apply(self, work: Sequence[tuple[dict[str, Any], Tensor, Tensor]]) -> list[Tensor | None]:
        """One step with gradients that are handed in: by the kernel at once, or one by one.

        Args:
            work: (param group, parameter, its gradient).

        Returns:
            What the rule knew of each tensor as a whole, see `rnnopt.rules.protocol.cross_tensor_context`.

        Raises:
            TypeError: a gradient is sparse; no parameter has been changed then.
        """
        _refuse_sparse(work)
        rule, trust = self._acting()
        pieces = [self._piece(rule, *item, trust) for item in work]
        kernel = self._kernel(rule)
        batches: dict[tuple[torch.dtype, ...], list[int]] = {}
        for i, piece in enumerate(pieces):
            if kernel is not None and kernel.takes(piece):
                batches.setdefault(piece.dtypes, []).append(i)
        measured = [
            (batch, cast(FusedStep, kernel).measure([pieces[i] for i in batch]))
            for batch in batches.values()
        ]
        sums: dict[int, Tensor | None] = {
            i: row for batch, found in measured for i, row in zip(batch, found.sums)
        }
        plain = [i for i in range(len(work)) if i not in sums]
        for i in plain:
            sums[i] = statistics_of(rule, pieces[i].param, pieces[i].grad, pieces[i].state)
        # by whichever way each is stepped here: other processes may choose otherwise
        known = cross_tensor_context(
            rule,
            sum_over_shards([sums[i] for i in range(len(work))], [param for _, param, _ in work]),
        )
        for batch, found in measured:
            rows = torch.stack([cast(Tensor, known[i]) for i in batch])
            cast(FusedStep, kernel).take(found, rows)
        for i in plain:
            self.state[work[i][1]].update(_take_plainly(rule, pieces[i], known[i]))
        return known

    def _acting(self) -> tuple[UpdateRule, float]:
        """The rule that steps now, and what it is trusted with."""
        if not self.undone or not isinstance(self.rule, GuardedRule):
            return self.rule, 1.0
        if self._fallback is None:
            self._fallback = self.rule.fallback()
        return self._fallback, 0.5 ** (self.undone - 1)

    def _memory(self, param: Tensor) -> State:
        """A parameter's memory, made if there is none."""
        if not self.state[param]:
            with torch.inference_mode(False):  # or no later step outside could write to it
                self.state[param] = self.init_state(param)
        memory: State = self.state[param]
        return memory

    def _piece(
        self, rule: UpdateRule, group: dict[str, Any], param: Tensor, grad: Tensor, trust: float
    ) -> Piece:
        """This process's part of a parameter, as a step sees it."""
        memory = self._memory(param)
        known = {name: leaf for name, leaf in memory.items() if name not in (LAST, SLOPE)}
        return Piece(
            local(param), local_gradient(grad, param), known, trust * group["lr"],
            group["weight_decay"], on_shards(matrix_transform(rule, param), param), not is_sharded(param),
        )  # fmt: skip

    def _kernel(self, rule: UpdateRule) -> FusedStep | None:
        """The fast path of a rule, if there is one and it is wanted."""
        # what is compiled would hold on to the tables of this step
        if self.fused is False or torch.compiler.is_compiling():
            return None
        kernel = fused_step(rule)
        if self.fused and kernel is None:
            raise RuntimeError(
                f"fused=True, but there is no kernel for {type(rule).__name__} here: it takes "
                "a CoordinateLSTM with float32 weights, on the CPU and a C compiler, or on a GPU "
                "and Triton"
            )
        return kernel

    def init_state(self, param: Tensor) -> State:
        """The rule's memory for a parameter, or for this process's shard of it."""
        known: dict[str, Any] = {}
        if self.state_dtype is not None:
            known["state_dtype"] = self.state_dtype
        if is_sharded(param) and isinstance(self.rule, MatrixRule):
            known["shape"] = param.shape
        return self.rule.init_state(local(param), **known)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but the rule's memory keeps its dtype and is checked against the rule.

        torch casts floating state to the parameter's dtype, which would cut the float32 memory of
        a bfloat16 parameter: an exact resume needs the leaves as they were saved.

        Raises:
            ValueError: groups or memory are those of other parameters or of another rule; the
                optimizer is unchanged then.
        """
        for group in state_dict["param_groups"]:
            if missing := {"lr", "weight_decay", *_GUARD} - group.keys():
                raise ValueError(
                    f"a saved group has {sorted(group)} and no {sorted(missing)}: it is not of a "
                    "LearnedOptimizer of this version; load the state of one"
                )
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        own = [param for group in self.param_groups for param in group["params"]]
        memories = {
            param: _matching_memory(self, param, state_dict["state"][index])
            for index, param in zip(saved, own)
            if state_dict["state"].get(index)
        }
        super().load_state_dict(state_dict)
        self.state.update(memories)

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle keep: torch leaves out every attribute it does not know."""
        kept = ("rule", "state_dtype", "fused", "guard", "_fallback", "_for_a_head")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}


def _refuse_sparse(work: Work) -> None:
    for _, param, grad in work:
        if grad.is_sparse:
            raise TypeError(
                f"a sparse gradient for a parameter of shape {tuple(param.shape)}: the rule "
                "needs dense gradients; build the embedding with sparse=False"
            )


def _take_plainly(rule: UpdateRule, piece: Piece, sums: Tensor | None) -> State:
    param, grad = piece.param, piece.grad
    if not piece.whole:  # a shard's own shape says nothing of the tensor's
        param, grad = param.reshape(-1), grad.reshape(-1)
    delta, state = advance(
        rule, param, grad, piece.state, piece.lr, piece.weight_decay, sums, piece.turn
    )
    piece.param.add_(delta.view(piece.param.shape))
    return state


def _first_device(groups: Sequence[dict[str, Any]]) -> torch.device:
    """Of the first parameter that has memory; a rule's weights must not go where they are lost."""
    devices = [param.device for group in groups for param in group["params"]]
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def _choosing(groups: Sequence[dict[str, Any]]) -> list[Tensor]:
    """What trains, by which the shipped rule is chosen; everything where nothing does yet."""
    params = [param for group in groups for param in group["params"]]
    return [param for param in params if param.requires_grad] or params


def _resolve_rule(rule: UpdateRule | str | os.PathLike[str]) -> UpdateRule:
    if isinstance(rule, (str, os.PathLike)):
        return load_rule(rule)
    if isinstance(rule, float | int):
        raise TypeError(
            f"rule={rule!r}: the second argument is a rule; the multiplier of its steps is "
            f"lr={rule!r}, and 1.0, the default, is as meta-trained"
        )
    if not isinstance(rule, UpdateRule):
        raise TypeError(
            f"rule={rule!r}: expected an UpdateRule (step_size, init_state, __call__), the path of "
            "a rule file, or None for the rule that ships with rnnopt"
        )
    return rule


def _checked_state_dtype(rule: UpdateRule, dtype: torch.dtype | None) -> torch.dtype | None:
    if dtype is None:
        return None
    if not dtype.is_floating_point:
        raise TypeError(f"state_dtype={dtype}: a floating-point dtype, such as torch.bfloat16")
    if "state_dtype" not in inspect.signature(rule.init_state).parameters:
        raise TypeError(
            f"state_dtype={dtype}, but {type(rule).__name__} keeps its memory in one precision "
            "only (its init_state takes no state_dtype); leave state_dtype out"
        )
    return dtype


def _matching_memory(optimizer: LearnedOptimizer, param: Tensor, saved: State) -> State:
    """The saved memory on the parameter's device, if it is this rule's for this parameter."""
    expected = {name: tuple(leaf.shape) for name, leaf in optimizer.init_state(param).items()}
    if LAST in saved:
        expected |= {name: tuple(leaf.shape) for name, leaf in init_memory(param).items()}
    found = {name: tuple(leaf.shape) for name, leaf in saved.items()}
    if expected != found:
        raise ValueError(
            f"the saved state of a parameter of shape {tuple(param.shape)} is {found}, but this "
            f"optimizer's rule keeps {expected}; load it with the rule that it was saved with"
        )
    return {name: leaf.to(param.device, copy=True) for name, leaf in saved.items()}


def trainable(optimizer: torch.optim.Optimizer) -> Iterable[tuple[dict[str, Any], Tensor]]:
    """The optimizer's groups and parameters that take a gradient, in order."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.requires_grad:
                yield group, param
