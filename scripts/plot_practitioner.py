"""Draw accuracy against labels a class, from the results of `benchmark_practitioner.py`.

    python scripts/plot_practitioner.py results.jsonl docs/images/practitioner.svg

A panel for each set that was run with at least two numbers of labels, and a line for each method.
Points are means over the draws, bars their 95 % intervals; a point of one draw has none. Takes
seconds. Last line: `wrote docs/images/practitioner.svg`.
"""

from __future__ import annotations

import argparse
import io
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from practitioner_tables import SETS, read

from rnnopt.evaluation.report.style import COLUMN, HEIGHT, STYLE, line_look
from rnnopt.evaluation.statistics import interval
from rnnopt.storage.files import write_atomically

matplotlib.use("Agg")

import matplotlib.pyplot as plt

NAMES = {"rnnopt": "TextClassifier", "setfit": "SetFit", "logistic": "logistic regression"}
# the same picture gives the same file
STABLE = {"svg.hashsalt": "practitioner", "svg.fonttype": "none"}


def points(lines: list[dict[str, Any]]) -> dict[str, dict[str, dict[int, list[float]]]]:
    """Accuracies of the draws, by set, method and number of labels a class."""
    found: Any = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for line in lines:
        name, shots, method, _ = line["cell"]
        if method in NAMES:
            title = SETS.get(name, name).split(",")[0]
            found[f"{title}, {line['ways']} classes"][method][shots].append(100 * line["accuracy"])
    return {
        name: methods
        for name, methods in sorted(found.items())
        if len(methods.get("rnnopt", ())) > 1
    }


def draw(sets: dict[str, dict[str, dict[int, list[float]]]], path: Path) -> None:
    """Write the SVG file."""
    with plt.rc_context(STYLE | STABLE):
        size = (COLUMN * len(sets), HEIGHT)
        figure, panels = plt.subplots(1, len(sets), figsize=size, squeeze=False)
        for axes, (name, methods) in zip(panels[0], sets.items()):
            for place, method in enumerate(NAMES):
                cells = sorted(methods.get(method, {}).items())
                if not cells:
                    continue
                shots = [count for count, _ in cells]
                means = [float(np.mean(values)) for _, values in cells]
                bars = [
                    interval(np.array(values))["ci95"] if len(values) > 1 else 0.0
                    for _, values in cells
                ]
                axes.errorbar(
                    shots, means, yerr=bars, label=NAMES[method], elinewidth=0.6, **line_look(place)
                )
            counts = sorted({shots for cells in methods.values() for shots in cells})
            axes.set_xscale("log")
            axes.set_xticks(counts, [str(count) for count in counts])
            axes.minorticks_off()
            axes.set(title=name, xlabel="labels a class", ylabel="accuracy (%)")
        panels[0][0].legend(frameon=False, loc="lower right")
        figure.tight_layout()
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    write_atomically(path, file.getvalue())


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    sets = points(read(options.results))
    if not sets:
        parser.error(
            f"{options.results} has no set with two numbers of labels by the method rnnopt; run "
            "benchmark_practitioner.py with --shots 5 10"
        )
    draw(sets, options.picture)
    print(f"wrote {options.picture}")


if __name__ == "__main__":
    main()
