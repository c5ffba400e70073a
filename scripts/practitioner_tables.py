"""The tables of the results of `benchmark_practitioner.py`.

    python scripts/practitioner_tables.py results.jsonl more.jsonl --output OUT
    python scripts/field_tables.py OUT docs/results/practitioner.md

OUT gets, in Markdown,

    practitioner-summary.md  a row for each set and number of labels a class; sets of one family
                             (products, languages) are one row, and each of their draws counts
    practitioner-cells.md    a row for each set, number of labels and method
    practitioner-means.md    means over the rows of the summary with five labels a class or more

Where several lines are of one cell, the first one counts. Differences are those of the accuracy of
`TextClassifier`, draw by draw. Takes a second. Last line: the number of rows.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rnnopt.evaluation.statistics import interval, with_interval
from rnnopt.storage.files import write_atomically

Line = dict[str, Any]
Draws = dict[tuple[str, int], Line]  # of a method: (set, seed) -> its line
OURS = "rnnopt"
NAMES = {
    "logistic": "logistic regression", "nearest mean": "nearest mean",
    "frozen": "TextClassifier, not adapted", "setfit": "SetFit", OURS: "**TextClassifier**",
}  # fmt: skip
SHOWN = {"accuracy": 3, "log_loss": 2, "calibration_error": 3, "seconds": 1}
SETS = {
    "agnews": "AG News", "amazon16_partial": "Amazon, categories", "clinc150": "CLINC150, intents",
    "huffpost36": "HuffPost, headlines", "hwu64": "HWU64, intents", "liu54": "Liu54, intents",
    "nusax": "NusaX, sentiment, {} languages", "reviews": "reviews, sentiment, {} products",
    "stackoverflow20": "StackOverflow, titles", "trec28": "TREC, question types",
}  # fmt: skip


def read(path: Path) -> list[Line]:
    """The lines that are there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def show(values: Iterable[float], digits: int, signed: bool = False) -> str:
    """Mean and 95 % interval; of one or two values themselves, of none nothing."""
    found = list(values)
    if len(found) < 3:
        return " ".join(f"{value:{'+' if signed else ''}.{digits}f}" for value in found)
    return with_interval(interval(np.array(found)), digits, signed)


def cells_of(lines: Iterable[Line], families: bool) -> dict[tuple[str, int], dict[str, Draws]]:
    """Lines by place, a set or a family of sets with a number of labels a class, and method."""
    found: dict[tuple[str, int], dict[str, Draws]] = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        name, shots, method, seed = line["cell"]
        family, *own = name.split()
        title = " ".join([SETS.get(family, family).split(",")[0], *own])
        place = family if families else f"{title}, {line['ways']} classes"
        found[place, shots][method].setdefault((name, seed), line)
    return dict(sorted(found.items()))


def gain(ours: Line, other: Line) -> float:
    """How much more accurate."""
    return float(ours["accuracy"] - other["accuracy"])


def share(key: str, ours: Line, other: Line) -> float:
    """A figure as a share of the other's."""
    return float(ours[key] / other[key])


def paired(ours: Draws, other: Draws, of: Callable[[Line, Line], float]) -> list[float]:
    """A figure of each draw that both have."""
    return [of(ours[draw], other[draw]) for draw in ours if draw in other]


def less(ours: Draws, other: Draws) -> str:
    """How much more accurate, over the draws of both."""
    return show(paired(ours, other, gain), 3, signed=True)


def mean(draws: Draws, key: str) -> str:
    """The mean over the draws; nothing without one."""
    digits = SHOWN[key] if key != "seconds" else 0
    values = [line[key] for line in draws.values()]
    return f"{np.mean(values):.{digits}f}" if values else "-"


def summary(lines: Iterable[Line]) -> list[str]:
    """Rows of `TextClassifier` beside logistic regression and SetFit."""
    rows = [
        "| set | labels a class | draws | logistic regression | SetFit | **TextClassifier** | "
        "less logistic regression | less SetFit | log loss (logistic regression, SetFit) | ECE | "
        "seconds (SetFit) |",
        "|---" * 11 + "|",
    ]
    for (family, shots), methods in cells_of(lines, families=True).items():
        ours = methods.get(OURS, {})
        if not ours:
            continue
        ways = next(iter(ours.values()))["ways"]
        name = SETS.get(family, family).format(len({name for name, _ in ours}))
        # of other methods the same draws only, so that means can be compared
        logistic, setfit = (
            {draw: line for draw, line in methods.get(method, {}).items() if draw in ours}
            for method in ("logistic", "setfit")
        )
        accuracy = (show((x["accuracy"] for x in m.values()), 3) for m in (logistic, setfit, ours))
        losses = ", ".join(mean(draws, "log_loss") for draws in (logistic, setfit))
        cells = [
            f"{name}, {ways} classes", str(shots), str(len(ours)), *accuracy, less(ours, logistic),
            less(ours, setfit), f"{mean(ours, 'log_loss')} ({losses})",
            mean(ours, "calibration_error"),
            f"{mean(ours, 'seconds')} ({mean(setfit, 'seconds')})",
        ]  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def means(lines: Iterable[Line]) -> list[str]:
    """Means over the places of the summary with five labels a class or more."""
    places = [
        (place, methods)
        for place, methods in cells_of(lines, families=True).items()
        if OURS in methods and place[1] >= 5
    ]
    rows = ["| rows with five labels a class or more | rows | mean | range |", "|---|---|---|---|"]

    def add(what: str, other: str, of: Callable[[Line, Line], float], digits: int) -> None:
        draws = [paired(methods[OURS], methods.get(other, {}), of) for _, methods in places]
        found = [float(np.mean(values)) for values in draws if values]
        if found:
            extremes = f"{min(found):.{digits}f} to {max(found):.{digits}f}"
            rows.append(f"| {what} | {len(found)} | {show(found, digits)} | {extremes} |")

    for name, other in (("logistic regression", "logistic"), ("SetFit", "setfit")):
        add(f"accuracy, less that of {name}", other, gain, 3)
        add(f"log loss, as a share of that of {name}", other, partial(share, "log_loss"), 2)
    add("time, as a share of that of SetFit", "setfit", partial(share, "seconds"), 2)
    add("expected calibration error", OURS, lambda ours, _: float(ours["calibration_error"]), 3)
    return rows


def details(lines: Iterable[Line]) -> list[str]:
    """A row for every cell and method."""
    rows = [
        "| set | labels a class | method | draws | accuracy | TextClassifier less that | log loss "
        "| ECE | s |",
        "|---" * 9 + "|",
    ]
    for (name, shots), methods in cells_of(lines, families=False).items():
        order = [*NAMES, *(method for method in sorted(methods) if method not in NAMES)]
        for method in (method for method in order if method in methods):
            draws = methods[method]
            figures = [
                show((line[key] for line in draws.values()), digits)
                for key, digits in SHOWN.items()
            ]
            difference = less(methods.get(OURS, {}), draws) if method != OURS else ""
            figures.insert(1, difference)
            label = NAMES.get(method, f"the same by {method}")
            rows.append(f"| {name} | {shots} | {label} | {len(draws)} | {' | '.join(figures)} |")
    return rows


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    lines = [line for path in options.results for line in read(path)]
    options.output.mkdir(parents=True, exist_ok=True)
    tables = {"summary": summary(lines), "cells": details(lines), "means": means(lines)}
    for name, rows in tables.items():
        path = options.output / f"practitioner-{name}.md"
        write_atomically(path, ("\n".join(rows) + "\n").encode())
    print(f"{sum(len(rows) - 2 for rows in tables.values())} rows")


if __name__ == "__main__":
    main()
