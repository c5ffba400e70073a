"""Texts and labels as users give them, checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from rnnopt.errors import InputError

_KINDS = {bool: "booleans", int: "integers", str: "strings"}


def check_texts(texts: Any) -> list[str]:
    """The texts as a list of strings.

    Args:
        texts: a list, tuple, array, pandas Series, or anything else that can be iterated over.

    Raises:
        InputError: a single string, an element that is no string, or one that no encoder can read.
    """
    if isinstance(texts, str):
        raise InputError(
            f"texts is one string, {_shown(texts)}; a list of texts is needed: put it in [brackets]"
        )
    if not isinstance(texts, Iterable):
        raise InputError(
            f"texts is {_shown(texts)}, of type {type(texts).__name__}; give a list of strings"
        )
    found = list(texts)
    for i, text in enumerate(found):
        if not isinstance(text, str):
            raise InputError(
                f"text {i} is {_shown(text)}, of type {type(text).__name__}; every text must be a "
                "string: fill it in, or leave it out with its label"
            )
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError(
                f"text {i} has half a surrogate pair, which no encoder can read; delete that "
                "character"
            )
    return found


def check_labels(labels: Any, count: int) -> np.ndarray:
    """The labels as an array (B,) of one kind: booleans, integers or strings.

    Args:
        labels: as `check_texts` takes texts.
        count: B, how many there must be.

    Raises:
        InputError: another number of labels, or labels of another kind or of several kinds.
    """
    if isinstance(labels, str) or not isinstance(labels, Iterable):
        raise InputError(
            f"labels is {_shown(labels)}, of type {type(labels).__name__}; give a list, one label "
            "a text"
        )
    found = [label.item() if isinstance(label, np.generic) else label for label in labels]
    if len(found) != count:
        raise InputError(f"{count} texts and {len(found)} labels; give each text one label")
    for i, label in enumerate(found):
        if isinstance(label, list | tuple | set | frozenset | np.ndarray):
            raise InputError(
                f"label {i} is {_shown(label)}; a text has one label here, several labels a text "
                "are not supported: fit one classifier for each label, with True and False"
            )
        if type(label) not in _KINDS:
            raise InputError(
                f"label {i} is {_shown(label)}, of type {type(label).__name__}; labels must be "
                "strings, integers or booleans: convert them, or leave the text out"
            )
        if type(label) is not type(found[0]):
            raise InputError(
                f"label 0 is {_shown(found[0])} and label {i} is {_shown(label)}; all labels must "
                "be of one kind: convert them to strings"
            )
    return np.array(found)


def check_classes(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The classes, sorted, and each text's class by its place among them, (B,).

    Raises:
        InputError: no text, or fewer than two classes.
    """
    if not len(labels):
        raise InputError("there are 0 texts; give at least two, of different labels")
    classes, places = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise InputError(
            f"all {len(labels)} labels are {_shown(classes[0].item())}; a classifier needs texts "
            "of at least 2 labels: add texts of another"
        )
    return classes, places


def kind_of(classes: np.ndarray) -> str:
    """What labels are, in words."""
    return _KINDS[type(classes[0].item())]


def fingerprint(texts: list[str], labels: np.ndarray) -> str:
    """16 hexadecimal digits of the SHA-256 of texts and labels, in their order."""
    contents = json.dumps([texts, labels.tolist()])
    return hashlib.sha256(contents.encode()).hexdigest()[:16]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
