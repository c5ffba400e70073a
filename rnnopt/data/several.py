"""Read labelled files in which a text may have several labels, or none."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rnnopt.data.corpus import Names, dropped_words, readable, text_key
from rnnopt.data.files import rows_of, text_of
from rnnopt.errors import InputError


@dataclass(frozen=True)
class SeveralLabels:
    """Texts, each with any number of labels.

    Attributes:
        texts: the texts.
        labels: of each, sorted and distinct.
        dropped: rows that repeat a text; its labels are joined with those of the first.
    """

    texts: list[str]
    labels: list[list[str]]
    dropped: int

    def __str__(self) -> str:
        classes = {label for row in self.labels for label in row}
        given = sum(map(len, self.labels))
        return (
            f"{len(self.texts)} texts, {len(classes)} labels, {given / len(self.texts):.2f} labels "
            f"a text{dropped_words(self.dropped)}"
        )


def read_several(
    path: str | os.PathLike[str],
    separator: str,
    *,
    text_column: str = "text",
    label_column: str = "label",
    known_labels: Iterable[str] = (),
) -> SeveralLabels:
    """Read a file as `rnnopt.data.files.read_corpus` does, with several labels in a row.

    A text that repeats an earlier one is dropped, and its labels go to the first. An empty cell is
    no label.

    Args:
        path: JSON lines, CSV or TSV, plain or gzip.
        separator: between the labels of a row. In JSON lines they may also be a list of strings.
        text_column: the column (or JSON key) of the texts.
        label_column: the column of the labels.
        known_labels: as in `read_corpus`.

    Raises:
        InputError: the file, a line, a value or the separator is unusable.
    """
    if not separator.strip():
        raise InputError(
            f"--label-separator is {separator!r}; it must be a visible character, such as ;"
        )
    path = Path(path)
    found: dict[str, tuple[str, set[str]]] = {}
    count, names = 0, Names(known_labels)
    for line, row in rows_of(path, label_column):
        where = f"{path}, line {line}"
        text = " ".join(text_of(where, row, text_column, "--text-column").split())
        parts = _labels(where, row, label_column, separator)
        labels = [names.of(label, line) for label in parts]
        found.setdefault(text_key(text), (text, set()))[1].update(labels)
        count += 1
    if not found:
        raise InputError(f"{path}: no rows, needs at least one; check that it is the right file")
    names.warn(path)
    texts = [text for text, _ in found.values()]
    return SeveralLabels(texts, [sorted(row) for _, row in found.values()], count - len(found))


def _labels(where: str, row: Mapping[str, object], column: str, separator: str) -> list[str]:
    value = row.get(column)
    if column in row and (value is None or value == "" or value == []):
        return []
    if isinstance(value, list):
        if not all(isinstance(label, str) for label in value):
            raise InputError(
                f"{where}: column {column!r} is a list of more than strings; write every label as "
                "a string"
            )
        parts = value
    else:
        parts = text_of(where, row, column, "--label-column").split(separator)
    return [label.strip() for label in parts if readable(label)]
