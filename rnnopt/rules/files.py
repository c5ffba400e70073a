"""Rule files: weights and config in safetensors, written atomically. Reading one runs no code."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import nn

from rnnopt.errors import InputError
from rnnopt.rules.classical import SGD, Adam
from rnnopt.rules.meta_sgd import MetaSGD
from rnnopt.rules.two_level import TwoLevelLSTM
from rnnopt.storage.files import fingerprint, read_tensors, save_tensors

RULE_FILE = "rule.safetensors"
SHIPPED_RULE = Path(__file__).parent / "weights" / RULE_FILE
# The rules that a file can hold. A format's number rises when the arithmetic or the config changes.
SavedRule: TypeAlias = TwoLevelLSTM | MetaSGD | SGD | Adam
_KINDS: dict[str, Callable[..., SavedRule]] = {
    "rnnopt.TwoLevelLSTM.2": TwoLevelLSTM,
    **{f"rnnopt.{kind.__name__}.1": kind for kind in (MetaSGD, SGD, Adam)},
}


def save_rule(
    rule: SavedRule, path: str | os.PathLike[str], training: Mapping[str, Any] | None = None
) -> None:
    """Write a rule, its config and facts on its meta-training to one file.

    Args:
        rule: the rule.
        path: the file to write.
        training: JSON-compatible facts on its meta-training.

    Raises:
        InputError: the file can't be written, or the rule is of a class that a file can't hold.
    """
    format_ = next((name for name, kind in _KINDS.items() if kind is type(rule)), None)
    if format_ is None:
        raise InputError(
            f"a rule of type {type(rule).__name__} can't be saved, only one of "
            f"{', '.join(kind.__name__ for kind in _KINDS.values())}; keep its state_dict yourself"
        )
    about = {"format": format_, "config": rule.config, "training": dict(training or {})}
    save_tensors(Path(path), rule.state_dict(), about)


def can_be_saved(rule: object) -> bool:
    """Whether `save_rule` takes a rule of this type."""
    return type(rule) in _KINDS.values()


def load_rule(path: str | os.PathLike[str]) -> SavedRule:
    """Read a rule. No code in the file is executed.

    Args:
        path: a rule file, or a folder that holds ``rule.safetensors``.

    Returns:
        The rule in the dtype in which it was saved, on the CPU, without gradients, in evaluation
        mode.

    Raises:
        InputError: the file is missing, corrupt, truncated, or holds no rule of a known format.
    """
    file = rule_path(path)
    tensors, about = read_tensors(file)
    format_ = about.get("format")
    if format_ not in _KINDS:
        raise InputError(
            f"{file} holds {format_ or 'no rnnopt rule'!r}, expected "
            f"{' or '.join(map(repr, _KINDS))}; name a file that `rnnopt meta-train` wrote with "
            "this version"
        )
    try:
        rule = _KINDS[format_](**about["config"])
        for dtype in {leaf.dtype for leaf in tensors.values()}:
            rule.to(dtype)
        rule.load_state_dict(tensors)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{file}: weights and config do not fit together ({str(error).splitlines()[0]}); the "
            "file was altered or made by another version: meta-train again"
        ) from error
    if not all(torch.isfinite(leaf).all() for leaf in tensors.values()):
        raise InputError(f"{file} holds weights that are not finite; meta-train again")
    return rule.requires_grad_(False).eval()


def read_training(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The facts on a rule's meta-training that `save_rule` wrote; empty if there are none.

    Raises:
        InputError: the file is missing, unreadable, truncated, or no safetensors file.
    """
    return dict(read_tensors(rule_path(path))[1].get("training", {}))


def rule_fingerprint(rule: SavedRule) -> str:
    """A hash of a rule's weights and config, 12 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(rule.config).encode())
    for weight in rule.parameters():
        exact = torch.float32 if weight.dtype == torch.bfloat16 else weight.dtype  # numpy has none
        digest.update(weight.detach().to("cpu", exact).numpy().tobytes())
    return digest.hexdigest()[:12]


def rule_name(rule: object) -> str:
    """The kind of a rule and a fingerprint, which differs between rules of other weights."""
    if can_be_saved(rule):
        about = rule_fingerprint(cast(SavedRule, rule))
    else:
        about = fingerprint(rule.state_dict()) if isinstance(rule, nn.Module) else repr(rule)
    return f"{type(rule).__name__} {about}"


def rule_path(path: str | os.PathLike[str]) -> Path:
    """The rule file at a path: the file itself, or ``rule.safetensors`` in a folder."""
    file = Path(path)
    return file / RULE_FILE if file.is_dir() else file
