"""Texts and labels as users give them, checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from rnnopt.data.corpus import HASH_BYTES, text_key
from rnnopt.errors import InputError

_KINDS = {bool: "booleans", int: "integers", str: "strings"}


def check_texts(texts: Any) -> list[str]:
    """The texts as a list of strings.

    Args:
        texts: a list, tuple, array, pandas Series, or anything else with an order.

    Raises:
        InputError: a single string, a table, something without an order, an element that is no
            string, or one that no encoder can read.
    """
    if isinstance(texts, str):
        raise InputError(
            f"texts is one string, {_shown(texts)}; a list of texts is needed: put it in [brackets]"
        )
    found = _as_list("texts", texts)
    for i, text in enumerate(found):
        if not isinstance(text, str):
            raise InputError(
                f"text {i} is {_shown(text)}, of type {type(text).__name__}; every text must be a "
                "string: fill it in, or leave it out with its label"
            )
        if _half_surrogate(text):
            raise InputError(
                f"text {i} has half a surrogate pair, which no encoder can read; delete that "
                "character"
            )
    return found


@dataclass(frozen=True)
class Labels:
    """Labels as they were given, and as numbers.

    Attributes:
        classes: the distinct ones, sorted, (C,).
        places: each text's class by its place among them, (B,); or (B, C) zeros and ones where a
            text may have several.
        named: as given, JSON-compatible; several labels of a text are a sorted list.
    """

    classes: np.ndarray
    places: np.ndarray
    named: list[Any]

    @property
    def several(self) -> bool:
        """Whether a text may have several labels."""
        return self.places.ndim == 2


def read_labels(labels: Any, count: int) -> Labels:
    """The labels of a classifier that is to be fitted.

    Args:
        labels: strings, integers or booleans; or a list of strings for each text.
        count: B, how many there must be.

    Raises:
        InputError: as `check_labels` and `check_classes`; or no label tells texts apart.
    """
    labels = _as_list("labels", labels)
    if not is_several(labels):
        found = check_labels(labels, count)
        return Labels(*check_classes(found), found.tolist())
    rows = check_several(labels, count)
    classes = np.array(sorted({label for row in rows for label in row}))
    if all(row == rows[0] for row in rows):
        raise InputError(
            f"all {count} texts have the labels {_shown(rows[0])}; a classifier needs texts of "
            "other labels, or of none: add some"
        )
    return Labels(classes, matrix(rows, classes), rows)


def is_several(labels: Any) -> bool:
    """Whether labels are lists of labels."""
    kinds = (list, tuple, set, frozenset)
    return isinstance(labels, Sequence) and any(isinstance(label, kinds) for label in labels)


def check_several(labels: Sequence[Any], count: int) -> list[list[str]]:
    """The labels of each text as a sorted list of distinct strings; it may be empty.

    Raises:
        InputError: another number of labels, or labels of another kind.
    """
    if len(labels) != count:
        raise InputError(
            f"{count} texts and {len(labels)} lists of labels; give each text one list"
        )
    for i, row in enumerate(labels):
        if not isinstance(row, list | tuple | set | frozenset):
            raise InputError(
                f"label {i} is {_shown(row)}, and others are lists; where a text may have several "
                "labels every text needs a list of strings: put it in [brackets]"
            )
        for label in row:
            if not isinstance(label, str):
                raise InputError(
                    f"label {i} is {_shown(row)}; lists of labels must hold strings: convert them"
                )
            _check_name(i, label)
    return [sorted({str(label) for label in row}) for row in labels]


def matrix(rows: Sequence[Sequence[str]], classes: np.ndarray) -> np.ndarray:
    """Lists of labels as (B, C) zeros and ones, float64."""
    place = {label: number for number, label in enumerate(classes.tolist())}
    made = np.zeros((len(rows), len(classes)))
    for row, labels in zip(made, rows):
        row[[place[label] for label in labels]] = 1
    return made


def known_labels(labels: Any, count: int, classes: np.ndarray, several: bool) -> np.ndarray:
    """Labels to judge by as `Labels.places`, by the classes of a fitted classifier.

    Args:
        labels: as in `read_labels`.
        count: B, how many there must be.
        classes: those of the classifier, (C,).
        several: whether it gives a text several labels.

    Raises:
        InputError: as `check_labels`; or a label is none of the classifier's.
    """
    labels = _as_list("labels", labels)
    known = set(classes.tolist())
    if several:
        rows = check_several([[one] if isinstance(one, str) else one for one in labels], count)
        flat = [label for row in rows for label in row]
    elif is_several(labels):
        raise InputError(
            f"label 0 is {_shown(labels[0])}, and this classifier gives a text one label; give one "
            "label a text"
        )
    else:
        flat = check_labels(labels, count).tolist()
    foreign = [label for label in flat if label not in known]
    if foreign:
        raise InputError(
            f"label {foreign[0]!r} is none of the classifier's {len(known)} "
            f"({kind_of(classes)}, such as {classes[0].item()!r}); correct it, or leave its "
            "texts out"
        )
    return matrix(rows, classes) if several else np.searchsorted(classes, np.array(flat))


def check_labels(labels: Any, count: int) -> np.ndarray:
    """The labels as an array (B,) of one kind: booleans, integers or strings.

    Args:
        labels: as `check_texts` takes texts.
        count: B, how many there must be.

    Raises:
        InputError: another number of labels, or labels of another kind or of several kinds.
    """
    given = _as_list("labels", labels)
    found = [label.item() if isinstance(label, np.generic) else label for label in given]
    if len(found) != count:
        raise InputError(f"{count} texts and {len(found)} labels; give each text one label")
    for i, label in enumerate(found):
        if isinstance(label, np.ndarray):
            raise InputError(
                f"label {i} is {_shown(label)}, an array; where a text has several labels, give it "
                "a list of strings"
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
        if isinstance(label, str):
            _check_name(i, label)
        elif not -(2**63) <= label < 2**63:  # numpy would make floats or objects of them
            raise InputError(f"label {i} is {label}, of more than 64 bits; give labels as strings")
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


def fingerprint(texts: list[str], labels: list[Any]) -> str:
    """16 hexadecimal digits of the SHA-256 of texts and labels, in their order."""
    contents = json.dumps([texts, labels])
    return hashlib.sha256(contents.encode()).hexdigest()[:16]


def text_hashes(texts: Sequence[str]) -> list[str]:
    """12 hexadecimal digits for each text, by what `rnnopt.data.corpus.text_key` keeps of it.

    They tell whether a text is known without telling the text.
    """
    return [
        hashlib.blake2b(text_key(text).encode("utf-8", "surrogatepass"), digest_size=HASH_BYTES)
        .hexdigest()
        for text in texts
    ]  # fmt: skip


def _check_name(place: int, label: str) -> None:
    """Refuse a label that a file or an array of numpy would not keep.

    Raises:
        InputError: it has half a surrogate pair, or a null character at its end.
    """
    if label.endswith("\0") or _half_surrogate(label):
        raise InputError(
            f"label {place} is {_shown(label)}, with half a surrogate pair or a null character at "
            "its end, which can't be saved; delete that character"
        )


def _half_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _as_list(name: str, values: Any) -> list[Any]:
    """Texts or labels as a list.

    Raises:
        InputError: a string, a table, or something without an order, so that texts and labels could
            not be told to belong together.
    """
    kind = type(values).__name__
    if hasattr(values, "columns"):  # going through a DataFrame gives the names of its columns
        named = ", ".join(map(str, values.columns))
        raise InputError(f"{name} is a {kind} with the columns {named}; give one of them, a Series")
    if isinstance(values, str | Mapping | Set) or not isinstance(values, Iterable):
        raise InputError(f"{name} is {_shown(values)}, of type {kind}; give a list of {name}")
    return list(values)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
