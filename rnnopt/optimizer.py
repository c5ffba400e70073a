"""`LearnedOptimizer`: a rule as a `torch.optim.Optimizer`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from rnnopt.checkpoint import SHIPPED_RULE, load_rule
from rnnopt.rule import State, UpdateRule, advance


class LearnedOptimizer(torch.optim.Optimizer):
    """Adapt a model with an update rule, learned or not, in place of AdamW.

    ``p += lr * (rule(p.grad) - rule.step_size * weight_decay * p)``, see `rnnopt.rule.advance`.

    Args:
        params: tensors or param groups, as every torch optimizer takes them.
        rule: an `UpdateRule`; the path of a rule file; or None for the rule that ships with the
            package. Kept as it is, not copied: `rule` of the optimizer is this object.
        lr: multiplies the learned step, per group; dimensionless, 1.0 = as meta-trained. Every
            torch scheduler works on it.
        weight_decay: decoupled decay, per group, in units of ``lr * rule.step_size``: with a rule
            that is Adam this is AdamW's.

    Raises:
        ValueError: lr or weight_decay is negative or not finite.
        TypeError: a parameter is complex or integer, or rule is no rule.
        InputError: the rule file can't be used.
    """

    rule: UpdateRule

    def __init__(
        self,
        params: ParamsT,
        rule: UpdateRule | str | os.PathLike[str] | None = None,
        lr: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        # An attribute, never in param_groups: `higher` deep-copies the groups, and the
        # meta-gradient of a copy is silently None (higher issue #62).
        self.rule = _resolve_rule(rule)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        if rule is not self.rule:  # loaded here, so ours to move: or each step would copy it
            self.rule.to(self.param_groups[0]["params"][0].device)  # type: ignore[attr-defined]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, with this class's checks on values and dtypes."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for name in ("lr", "weight_decay"):
                if not 0 <= float(group[name]) < float("inf"):
                    raise ValueError(f"{name}={group[name]}: must be finite and at least 0")
            for param in group["params"]:
                if not param.is_floating_point():
                    raise TypeError(
                        f"a parameter of dtype {param.dtype} and shape {tuple(param.shape)}: only "
                        "real floating-point parameters can be adapted; leave it out of params"
                    )
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

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
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [
            (group, param)
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None
        ]
        for _, param in work:
            if param.grad.is_sparse:
                raise TypeError(
                    f"a sparse gradient for a parameter of shape {tuple(param.shape)}: the rule "
                    "needs dense gradients; build the embedding with sparse=False"
                )
        for group, param in work:
            state = self.state[param] or self.rule.init_state(param)
            delta, self.state[param] = advance(
                self.rule, param, param.grad, state, group["lr"], group["weight_decay"]
            )
            param.add_(delta)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but the rule's memory keeps its dtype and is checked against the rule.

        torch casts floating state to the parameter's dtype, which would cut the float32 memory of
        a bfloat16 parameter: an exact resume needs the leaves as they were saved.

        Raises:
            ValueError: groups or memory are those of other parameters or of another rule; the
                optimizer is unchanged then.
        """
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        own = [param for group in self.param_groups for param in group["params"]]
        memories = {
            param: _matching_memory(self.rule, param, state_dict["state"][index])
            for index, param in zip(saved, own)
            if state_dict["state"].get(index)
        }
        super().load_state_dict(state_dict)
        self.state.update(memories)

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle keep: torch leaves out every attribute it does not know."""
        return {**super().__getstate__(), "rule": self.rule}


def _resolve_rule(rule: UpdateRule | str | os.PathLike[str] | None) -> UpdateRule:
    if rule is None:
        return load_rule(SHIPPED_RULE)
    if isinstance(rule, (str, os.PathLike)):
        return load_rule(rule)
    if not isinstance(rule, UpdateRule):
        raise TypeError(
            f"rule={rule!r}: expected an UpdateRule (step_size, init_state, __call__), the path of "
            "a rule file, or None for the rule that ships with rnnopt"
        )
    return rule


def _matching_memory(rule: UpdateRule, param: Tensor, saved: State) -> State:
    """The saved memory on the parameter's device, if it is this rule's for this parameter."""
    expected = {name: tuple(leaf.shape) for name, leaf in rule.init_state(param).items()}
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
