"""Tables that read well as they are and are Markdown too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rnnopt.data.corpus import listed
from rnnopt.data.splits import PART_NAMES

# Labels beyond which a confusion matrix is too wide to read: then its largest entries are listed.
WIDEST = 12
_LARGEST = 10
NOT_FINITE = "not finite"  # what stands in a table for such a figure


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, columns aligned, those of numbers to the right.

    Args:
        header: the columns' names.
        rows: a cell for each column.
    """
    cells = [[_cell(value) for value in row] for row in (header, *rows)]
    columns = [_column(column) for column in zip(*cells)]
    return "\n".join("| " + " | ".join(row) + " |" for row in zip(*columns))


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


def comparison_table(result: Mapping[str, Any]) -> str:
    """Accuracy and loss of every method at every budget, and what the rule is ahead, as Markdown.

    Args:
        result: what `rnnopt.evaluation.comparison.Comparison.run` returned.
    """
    lines = []
    for metric in ("accuracy", "loss"):
        rows = {name: method[metric] for name, method in result["methods"].items()}
        for name, difference in result["paired"].items():
            rows[f"*learned - {name}, paired*"] = difference[metric]
        budgets = sorted({int(b) for row in rows.values() for b in row})
        lines += [
            f"| {metric} after | " + " | ".join(str(b) for b in budgets) + " |",
            "|---|" + "---|" * len(budgets),
        ]
        for name, row in rows.items():
            sign = "+" if name.startswith("*") else ""
            cells = (row.get(str(b)) for b in budgets)
            figures = (
                f"{cell['mean']:{sign}.3f} ± {cell['ci95']:.3f}" if cell else "" for cell in cells
            )
            lines.append(f"| {name} | " + " | ".join(figures) + " |")
        lines.append("")
    undone = result["methods"]["learned"].get("undone", 0)
    if undone:
        lines += [f"Steps of the rule that its guard took back, in all episodes: {undone}.", ""]
    return "\n".join(lines)


def sources_table(description: Mapping[str, Any]) -> str:
    """One row per source, in Markdown: its weight, domains, classes, texts and duplicates.

    Args:
        description: from `rnnopt.data.sources.describe`.
    """
    rows = [
        [
            source["source"],
            "-" if source["weight"] is None else f"{source['weight']:g}",
            listed(source["domains"], most=3),
            " / ".join(str(source["classes"][part]) for part in PART_NAMES),
            " / ".join(str(source["texts"][part]) for part in PART_NAMES),
            source["duplicates"],
        ]
        for source in description["sources"]
    ]
    header = ["source", "weight", "domains", "classes", "texts", "duplicates dropped"]
    return table(header, rows)


def _column(cells: Sequence[str]) -> list[str]:
    """Cells of one width, with the rule below the first."""
    width = max(3, *map(len, cells))
    if all(map(_is_number, cells[1:])):
        return [cells[0].rjust(width), "-" * (width - 1) + ":"] + [
            c.rjust(width) for c in cells[1:]
        ]
    return [cells[0].ljust(width), "-" * width] + [cell.ljust(width) for cell in cells[1:]]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return cell == NOT_FINITE
    return True


def _cell(value: object) -> str:
    """On one line, and without what ends a cell."""
    return " ".join(str(value).split()).replace("|", "\\|")
