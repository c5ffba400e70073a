"""The settings of a `rnnopt.TextClassifier`, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rnnopt.errors import InputError

_INTEGERS = (("steps", 0), ("lora_rank", 1), ("random_state", 0))  # and the least that they may be
_OPTIONAL = ("lora_rank",)
_FOR_ONE_LABEL = {
    "class_weight": "thresholds are chosen by F1, which rare labels count in",
    "abstain": "a text that no label is likely for gets an empty list",
    "abstain_below": "a text that no label is likely for gets an empty list",
}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings that `fit` can't use.

    Raises:
        InputError: one is of another kind, or out of range.
    """
    if settings["class_weight"] not in (None, "balanced"):
        raise InputError(f"class_weight is {settings['class_weight']!r}; use None or 'balanced'")
    for name, least in _INTEGERS:
        value = settings[name]
        if value is None and name in _OPTIONAL:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(f"{name} is {value!r}; it must be an integer of at least {least}")
    seconds = settings["seconds"]
    if seconds is not None and not 0 <= seconds < math.inf:
        raise InputError(f"seconds is {seconds!r}; it must be at least 0, or None for no bound")
    check_abstention(settings)


def check_abstention(settings: Mapping[str, Any]) -> None:
    """Refuse bounds of answers that are no shares.

    Raises:
        InputError: one is out of range.
    """
    least, share = settings["abstain_below"], settings["abstain"]
    if least is not None and not 0 <= least <= 1:
        raise InputError(f"abstain_below is {least!r}; it is a probability, between 0 and 1")
    if share is not None and not 0 <= share < 1:
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


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a folder keeps: those that are JSON, without encoder and device."""
    kinds = bool | int | float | str
    return {
        name: value
        for name, value in settings.items()
        if name not in ("encoder", "device") and (value is None or isinstance(value, kinds))
    }
