"""Checks of the arguments of `LearnedOptimizer`."""

from __future__ import annotations

import math
import numbers
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rnnopt.rules.files import load_rule
from rnnopt.rules.protocol import UpdateRule

# A smaller multiplier is a learning rate that was left over from another optimizer.
LEAST_LR = 0.01
# A larger one ruins a model, and the safeguard only ends it.
MOST_LR = 10.0


def resolve_rule(rule: UpdateRule | str | os.PathLike[str]) -> UpdateRule:
    """The rule itself, or the one in a file.

    Raises:
        TypeError: the argument is neither a rule nor a path.
        InputError: the rule file can't be used.
    """
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


def as_number(name: str, value: Any) -> float:
    """The value of `lr` or `weight_decay`: a number, or a tensor of one element.

    Schedulers of torch write to the tensor where a group has one.

    Raises:
        TypeError: it is neither a real number nor a tensor of one.
        ValueError: the tensor has more than one element, or none.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"Tensor {name} must be 1-element, and this one has shape {tuple(value.shape)}; "
                "give other values in parameter groups of their own"
            )
        if not value.is_complex() and not value.is_meta:
            return float(value.detach())
    elif isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(f"{name}={value!r}: give a real number, or a tensor of one")


def check_finite(groups: Sequence[Mapping[str, Any]]) -> None:
    """Check before a step what a schedule may have made of lr and weight_decay.

    Raises:
        TypeError: see `as_number`.
        ValueError: one is not finite, or a tensor of several elements.
    """
    for group in groups:
        for name in ("lr", "weight_decay"):
            number = as_number(name, group[name])
            if not math.isfinite(number):
                raise ValueError(
                    f"{name}={number} at a step: must be finite; look for what has set it in "
                    "param_groups"
                )


def as_switch(name: str, value: Any) -> bool | None:
    """The value of `guard` or `fused`: None, True or False.

    Raises:
        TypeError: it is none of these, nor 0 or 1.
    """
    known = isinstance(value, numbers.Integral) or type(value).__name__ in ("bool", "bool_")
    if value is None or (known and value in (0, 1)):
        return None if value is None else bool(value)
    raise TypeError(f"{name}={value!r}: give None, True or False")


def check_numbers(group: Mapping[str, Any]) -> None:
    """Check the `lr` and the `weight_decay` of a param group.

    Raises:
        TypeError: one is no number, see `as_number`.
        ValueError: one is negative or not finite, or a tensor of several elements.
    """
    for name in ("lr", "weight_decay"):
        if not 0 <= as_number(name, group[name]) < math.inf:
            raise ValueError(f"{name}={group[name]}: must be finite and at least 0")


def check_group(group: dict[str, Any]) -> None:
    """Check the values and the parameters of a param group.

    Raises:
        ValueError: lr or weight_decay is negative or not finite, or a parameter occurs twice.
        TypeError: a parameter is complex or integer, or lr or weight_decay is no number.

    Warns:
        UserWarning: lr looks like the learning rate of another optimizer, or is far too large.
    """
    check_numbers(group)
    lr = as_number("lr", group["lr"])
    if 0 < lr < LEAST_LR or lr > MOST_LR:
        end = "next to nothing is learned" if lr < 1 else "steps are so long that they ruin a model"
        warnings.warn(
            f"lr={group['lr']} multiplies the learned step, 1.0 is as meta-trained, and "
            f"with this one {end}; leave lr out",
            stacklevel=5,
        )
    if len(set(group["params"])) < len(group["params"]):
        raise ValueError("a parameter stands in this group twice: give each once")
    for param in group["params"]:
        if not param.is_floating_point():
            raise TypeError(
                f"a parameter of dtype {param.dtype} and shape {tuple(param.shape)}: only "
                "real floating-point parameters can be adapted; leave it out of params"
            )


def refuse_sparse(work: Sequence[tuple[dict[str, Any], Tensor, Tensor]]) -> None:
    """Check that no gradient is sparse.

    Args:
        work: (param group, parameter, its gradient).

    Raises:
        TypeError: one is.
    """
    for _, param, grad in work:
        if grad.is_sparse:
            raise TypeError(
                f"a sparse gradient for a parameter of shape {tuple(param.shape)}: the rule "
                "needs dense gradients; build the embedding with sparse=False"
            )


def refuse_capture() -> None:
    """Check that no CUDA graph is being captured.

    Raises:
        RuntimeError: one is.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "LearnedOptimizer.step in a CUDA graph: its replay would not advance the state; "
            "capture forward and backward, and step outside of the graph"
        )


def first_device(groups: Sequence[dict[str, Any]]) -> torch.device:
    """The device of the first parameter that is not a meta tensor; the CPU if there is none."""
    devices = [param.device for group in groups for param in group["params"]]
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))
