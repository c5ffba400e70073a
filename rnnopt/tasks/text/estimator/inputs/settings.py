"""The settings of a `rnnopt.TextClassifier`, checked."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np

from rnnopt.errors import InputError
from rnnopt.rules.files import load_rule

# and the least that they may be
_INTEGERS = (("steps", 0), ("lora_rank", 1), ("max_length", 1), ("random_state", 0))
_OPTIONAL = ("lora_rank", "max_length")
_FOR_ONE_LABEL = {
    "class_weight": "thresholds are chosen by F1, which rare labels count in",
    "abstain": "a text that no label is likely for gets an empty list",
    "abstain_below": "a text that no label is likely for gets an empty list",
}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings that `fit` can't use.

    Raises:
        InputError: one is of another kind, or out of range; the rule file can't be read.
    """
    encoder, rule = settings["encoder"], settings["rule"]
    if not isinstance(encoder, str | os.PathLike):
        raise InputError(
            f"encoder is {encoder!r}; give a folder that save_pretrained wrote, or a model's name "
            "on huggingface.co"
        )
    if not (rule is None or callable(rule) or isinstance(rule, str | os.PathLike)):
        raise InputError(
            f"rule is {rule!r}; give an rnnopt.UpdateRule, the path of a rule file, a function "
            "that makes a torch.optim.Optimizer of parameters, or None for the rule that ships"
        )
    if isinstance(rule, str | os.PathLike):
        load_rule(rule)  # each adaptation reads it again, on the encoder's device
    weight = settings["class_weight"]
    given = weight.values() if isinstance(weight, Mapping) else ()
    if not (given or weight in (None, "balanced")) or not all(map(_is_positive, given)):
        raise InputError(
            f"class_weight is {weight!r}; use None, 'balanced', or a positive number for each label"
        )
    for name, least in _INTEGERS:
        value = settings[name]
        if value is None and name in _OPTIONAL:
            continue
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise InputError(f"{name} is {value!r}; it must be an integer of at least {least}")
    seconds = settings["seconds"]
    if seconds is not None and not (isinstance(seconds, Real) and 0 <= float(seconds) < math.inf):
        raise InputError(f"seconds is {seconds!r}; it must be at least 0, or None for no bound")
    check_abstention(settings)


def _is_positive(number: object) -> bool:
    return isinstance(number, Real) and 0 < float(number) < math.inf


def check_abstention(settings: Mapping[str, Any]) -> None:
    """Refuse bounds of answers that are no shares.

    Raises:
        InputError: one is out of range.
    """
    least, share = settings["abstain_below"], settings["abstain"]
    if least is not None and not (isinstance(least, Real) and 0 <= float(least) <= 1):
        raise InputError(f"abstain_below is {least!r}; it is a probability, between 0 and 1")
    if share is not None and not (isinstance(share, Real) and 0 <= float(share) < 1):
        raise InputError(
            f"abstain is {share!r}; it is the share of texts of the known classes that may stay "
            "without an answer, at least 0 and below 1, and 0.05 is usual"
        )


def check_for_several_labels(settings: Mapping[str, Any]) -> None:
    """Refuse settings that have no meaning where a text may have several labels.

    Raises:
        InputError: one is given.
    """
    for name, remedy in _FOR_ONE_LABEL.items():
        if settings[name] is not None:
            raise InputError(
                f"{name} is {settings[name]!r}, and texts have several labels here; leave it at "
                f"None: {remedy}"
            )


def with_numbers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with Python's numbers in place of numpy's, which torch and JSON don't take."""
    return {k: v.item() if isinstance(v, np.generic) else v for k, v in settings.items()}


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a folder keeps: those that are JSON, without encoder and device."""
    kinds = bool | int | float | str
    kept: dict[str, Any] = {
        name: value
        for name, value in with_numbers(settings).items()
        if name not in ("encoder", "device") and (value is None or isinstance(value, kinds))
    }
    weight = settings["class_weight"]
    if isinstance(weight, Mapping) and all(isinstance(label, str) for label in weight):
        kept["class_weight"] = {label: float(number) for label, number in weight.items()}
    return kept
