"""Tables: Markdown that is aligned for the eye, and the same drawn on a terminal by rich."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from rnnopt.data.corpus import listed
from rnnopt.data.splits import PART_NAMES
from rnnopt.errors import InputError
from rnnopt.evaluation.statistics import difference, summary, with_interval

if TYPE_CHECKING:
    from rich.table import Table

# A confusion matrix of more labels is too wide to read. Its largest errors are listed instead.
WIDEST = 12
WIDTH = 100  # columns that a printed table takes at most
_LARGEST = 10
NOT_FINITE = "not finite"  # what stands in a table for NaN and infinity


def show(text: str) -> None:
    """Print text with Markdown tables in it. On a terminal the tables are drawn by rich.

    A drawn table is at most 100 columns wide, or as wide as the terminal if that is narrower; long
    cells take several lines. Where the output is a file or a pipe, the text stays as it is.

    Args:
        text: lines, of which those of a table begin with a bar.
    """
    if not sys.stdout.isatty():
        print(text)
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.width = min(console.width, WIDTH)
    for is_table, block in itertools.groupby(text.split("\n"), lambda line: line.startswith("|")):
        lines = list(block)
        if is_table:
            console.print(_drawn(lines))
        else:
            console.print("\n".join(lines), markup=False, soft_wrap=True)


def _drawn(lines: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    header, rule, *rows = (
        [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in lines
    )
    drawn = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for name, dashes in zip(header, rule):
        drawn.add_column(Text(name), justify="right" if dashes.endswith(":") else "left")
    for row in rows:
        name, *rest = row
        emphasised = re.fullmatch(r"\*(.+)\*", name)
        look = "italic" if emphasised else ""
        drawn.add_row(Text(emphasised[1] if emphasised else name, look), *map(Text, rest))
    return drawn


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table with aligned columns. Columns of numbers are aligned to the right.

    Args:
        header: the names of the columns.
        rows: one cell per column, each.
    """
    cells = [[_cell(value) for value in row] for row in (header, *rows)]
    columns = [_column(column) for column in zip(*cells)]
    return "\n".join("| " + " | ".join(row) + " |" for row in zip(*columns))


def confusion_text(labels: Sequence[str], matrix: np.ndarray) -> str:
    """A confusion matrix as a table, or with many labels a list of the most frequent errors.

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


def comparison_table(
    result: Mapping[str, Any],
    metrics: Sequence[str] = ("accuracy", "loss"),
    reference: str | None = None,
    names: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """The metrics of every method at every number of steps, and the paired differences.

    Args:
        result: what `rnnopt.evaluation.comparison.Comparison.run` returned.
        metrics: the metrics to show, if the result has them.
        reference: the differences are each method minus this one. None: learned minus each.
        names: what to call methods.

    Returns:
        Markdown: a table for each metric, means with the half-widths of their 95 % intervals.

    Raises:
        InputError: there is no method of the name `reference`.
    """
    methods, parts = result["methods"], []

    def called(name: str) -> str:
        return names.get(name, name)

    if reference:
        pairs = [(name, reference) for name in methods if name != reference]
    else:
        pairs = [("learned", name) for name in result["paired"]]
    first = next(iter(methods.values()))
    for metric in [name for name in metrics if name in first]:
        rows = {called(name): of[metric] for name, of in methods.items() if metric in of}
        for left, right in pairs:
            found = paired(result, left, right) if reference else result["paired"][right]
            if metric in found:
                rows[f"*{called(left)} - {called(right)}, paired*"] = found[metric]
        budgets = sorted({int(b) for row in rows.values() for b in row})
        cells = [
            [
                name,
                *(
                    with_interval(row[str(b)], signed=name.startswith("*")) if str(b) in row else ""
                    for b in budgets
                ),
            ]
            for name, row in rows.items()
        ]
        lines = [" | ".join(row) for row in ([f"{metric} after", *map(str, budgets)], *cells)]
        lines = [f"| {line} |" for line in lines]
        parts.append("\n".join([lines[0], "|---|" + "---:|" * len(budgets), *lines[1:]]))
    undone = methods["learned"].get("undone", 0)
    if undone:
        parts.append(f"Steps of the rule that its guard took back, in all episodes: {undone}.")
    return "\n\n".join(parts) + "\n"


def paired(result: Mapping[str, Any], method: str, reference: str) -> dict[str, Any]:
    """The differences of two methods of a comparison on the same episodes.

    Args:
        result: see `comparison_table`.
        method: the name of one method.
        reference: the name of the other.

    Returns:
        ``{metric: {budget: {"mean", "ci95"}}}``, the method minus the reference.

    Raises:
        InputError: there is no method of such a name.
    """
    for name in (method, reference):
        if name not in result["values"]:
            raise InputError(
                f"{name!r} is no method of this comparison; choose from "
                f"{', '.join(result['values'])}"
            )
    ours, theirs = (
        {
            metric: {int(budget): np.array(column) for budget, column in by_budget.items()}
            for metric, by_budget in result["values"][name].items()
        }
        for name in (method, reference)
    )
    return summary(difference(ours, theirs))


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
    """The cells, padded to one width, with a line of dashes below the first."""
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
    """The value on one line, with bars escaped, since a bar ends a cell."""
    return " ".join(str(value).split()).replace("|", "\\|")
