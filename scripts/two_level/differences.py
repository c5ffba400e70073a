"""A table of paired differences between rules that evaluate.py measured on the same episodes.

    python scripts/two_level/differences.py figures.jsonl --of nothing.safetensors

figures.jsonl is --output of evaluate.py, one file or more, and --of the beginning of the name of
the rule that the others are compared with. For each other rule and setting: query loss in nats and
accuracy after some steps, less those of --of, with 95 % intervals over the episodes.

Time: a second. Prints Markdown; last line: "12 settings of 4 rules", or other counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cells import CELLS
from core_table import Figures, entries
from evaluate import JUDGED

from rnnopt.evaluation.statistics import interval, with_interval

METRICS = ("loss", "accuracy")
SETTINGS = ("cell", "split", "batch", "label_noise")
Rows = dict[tuple[Any, ...], dict[str, Figures]]


def read(paths: Sequence[Path]) -> Rows:
    """The figures of rules by setting and file, those of later lines last; (J, episodes) each."""
    found: Rows = {}
    for path in paths:
        for entry, own in entries(path):
            if ".safetensors" in entry["method"]:
                setting = tuple(entry[name] for name in SETTINGS)
                found.setdefault(setting, {})[entry["method"]] = own
    return found


def shown(setting: Sequence[Any]) -> str:
    """A setting in words."""
    cell, split, batch, noise = setting
    words = f"{CELLS[cell]}, {split} classes"
    words += f", minibatches of {batch}" if batch else ""
    return words + (f", {noise:.0%} of the labels wrong" if noise else "")


def lines(rows: Rows, base: str, steps: Sequence[int]) -> list[str]:
    """The table's lines, without settings in which the rule to compare with was not measured."""
    heads = [f"{name}, {step} steps" for name in METRICS for step in steps]
    table = [f"| rule | setting | {' | '.join(heads)} |", "|---|---|" + "---|" * len(heads)]
    for setting, rules in rows.items():
        own = next((found for name, found in rules.items() if name.startswith(base)), None)
        if own is None:
            continue
        for name, found in rules.items():
            cells = [
                _cell(found[metric], own[metric], JUDGED.index(step))
                for metric in METRICS
                for step in steps
            ]
            table.append(f"| {name.split('.')[0]} | {shown(setting)} | {' | '.join(cells)} |")
    return table


def _cell(found: np.ndarray, own: np.ndarray, place: int) -> str:
    """A rule's mean less that of the one that it is compared with; of the latter its mean."""
    if place >= min(len(found), len(own)):
        return "-"
    if found is own:
        return f"{own[place].mean():.3f}"
    return with_interval(interval(found[place] - own[place]), signed=True)


def main(words: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figures", nargs="+", type=Path, help="--output of evaluate.py")
    parser.add_argument("--of", required=True, help="beginning of the name of a rule")
    parser.add_argument(
        "--steps", nargs="+", type=int, choices=JUDGED, default=[10, 20], metavar="STEP"
    )
    options = parser.parse_args(words)
    rows = read(options.figures)
    print("\n".join(lines(rows, options.of, options.steps)))
    print(f"\n{len(rows)} settings of {len({name for own in rows.values() for name in own})} rules")


if __name__ == "__main__":
    main()
