"""Tables that read well as they are and are Markdown too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

# Labels beyond which a confusion matrix is too wide to read: then its largest entries are listed.
WIDEST = 12
_LARGEST = 10


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, columns aligned; the first to the left, the others to the right.

    Args:
        header: the columns' names.
        rows: a cell for each column.
    """
    cells = [[_cell(value) for value in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]
    lines = [
        [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ]
        for row in cells
    ]
    rule = ["-" * (width - 1) + ":" if i else "-" * width for i, width in enumerate(widths)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [lines[0], rule, *lines[1:]])


def confusion_text(labels: Sequence[str], matrix: np.ndarray) -> str:
    """A confusion matrix for people; of many labels what is most often confused.

    Args:
        labels: C names.
        matrix: (C, C), counts of texts [actual, predicted].
    """
    if len(labels) <= WIDEST:
        rows = [[label, *row] for label, row in zip(labels, matrix.tolist())]
        return table(["actual \\ predicted", *labels], rows)
    wrong = np.where(np.eye(len(labels), dtype=bool), 0, matrix)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_LARGEST]
    places = [divmod(int(place), len(labels)) for place in order]
    rows = [
        [labels[actual], labels[predicted], wrong[actual, predicted]]
        for actual, predicted in places
        if wrong[actual, predicted]
    ]
    return table(["actual", "predicted", "texts"], rows)


def _cell(value: object) -> str:
    """On one line, and without what ends a cell."""
    return " ".join(str(value).split()).replace("|", "\\|")
