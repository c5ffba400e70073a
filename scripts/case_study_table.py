"""The results of `case_study_news.py` as Markdown and one figure, held to what was hoped for.

Hoped for, of the learned rule from the learned initial values or of the rule alone: ten points of
accuracy over conventional fine-tuning (`adamw`) at 5 steps on every set, and at no number of steps
behind the best of all baselines.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from rnnopt.evaluation.report.tables import table
from rnnopt.evaluation.statistics import interval
from rnnopt.storage.files import write_atomically

matplotlib.use("Agg")  # no window system is needed, or looked for

from matplotlib import pyplot as plt

Result = Mapping[str, Any]  # of one set, as `case_study_news.py` writes it

OURS = ("rule", "init-rule")
BY_PRODUCTS = ("multitask-rule", "maml-as-trained", "meta-sgd-as-trained")
CONVENTIONAL, HOPED, HOPED_AT = "adamw", 0.10, "5"
SHOWN = {"accuracy": "accuracy, which is macro recall,", "f1": "macro F1"}


def write_case_study(results: Mapping[str, Result], path: Path) -> str:
    """Write the table to `path` and the figure beside it, with the ending .png.

    Returns:
        The table.
    """
    text = case_study_table(results)
    write_atomically(path, f"{text}\n".encode())
    write_atomically(path.with_suffix(".png"), _figure(results))
    return text


def case_study_table(results: Mapping[str, Result]) -> str:
    """Figures with 95 % intervals and the time of a task for each set; then what was hoped for."""
    parts = []
    for name, result in results.items():
        setting = result["setting"]
        parts.append(
            f"**{name}**: {setting['ways']}-way {setting['shots']}-shot, "
            f"{result['episodes']} episodes of {len(setting['classes'])} classes, "
            f"{setting['encoder']}, {setting['tune']}, head {setting['head']}"
        )
        parts += [_figures(result, metric) for metric in SHOWN]
    rows = [
        [name, ours, *_hoped(result, ours)] for name, result in results.items() for ours in OURS
    ]
    header = [
        "set", "method", f"ahead of {CONVENTIONAL} at {HOPED_AT} steps",
        "furthest behind the best baseline",
    ]  # fmt: skip
    return "\n\n".join([*parts, table(header, rows)])


def _figures(result: Result, metric: str) -> str:
    methods = result["methods"]
    budgets = list(methods[CONVENTIONAL][metric])
    header = [f"{SHOWN[metric]} after", *budgets, f"seconds a task, {budgets[-1]} steps"]
    rows = []
    for name, entry in methods.items():
        cells = [f"{c['mean']:.3f} ± {c['ci95']:.3f}" for c in entry[metric].values()]
        if "frozen" in entry:  # one figure, without steps
            cells, seconds = [cells[0], *[""] * (len(cells) - 1)], entry["seconds"]
        else:
            seconds = entry["seconds_per_step"] * int(budgets[-1])
        rows.append([name, *cells, f"{seconds:.3g}"])
    return table(header, rows)


def _hoped(result: Result, ours: str) -> tuple[str, str]:
    """What was hoped for and what came out, as paired differences in accuracy."""
    values = result["values"]

    def ahead(other: str, budget: str) -> dict[str, float]:
        mine, theirs = (np.array(values[n]["accuracy"][budget]) for n in (ours, other))
        return interval(mine - theirs)

    first = "not run so far"
    if HOPED_AT in values[ours]["accuracy"]:
        gap = ahead(CONVENTIONAL, HOPED_AT)
        met = gap["mean"] >= HOPED
        first = _words(gap, "met" if met else f"**missed by {HOPED - gap['mean']:.3f}**")
    baselines = [name for name in values if name not in (*OURS, *BY_PRODUCTS)]
    gaps = {
        (name, budget): ahead(name, budget)
        for name in baselines
        for budget in values[ours]["accuracy"]
    }
    name, budget = min(gaps, key=lambda key: gaps[key]["mean"])
    met = gaps[name, budget]["mean"] >= 0
    verdict = "met" if met else f"**missed**, {name} at {budget}"
    return first, _words(gaps[name, budget], verdict)


def _words(gap: Mapping[str, float], verdict: str) -> str:
    return f"{gap['mean']:+.3f} ± {gap['ci95']:.3f}, {verdict}"


def _figure(results: Mapping[str, Result]) -> bytes:
    """Accuracy against steps, a panel for each set; PNG."""
    figure, panels = plt.subplots(
        1, len(results), figsize=(4.2 * len(results), 4.2), layout="constrained", squeeze=False,
        sharey=True,
    )  # fmt: skip
    for axes, (name, result) in zip(panels[0], results.items()):
        for method, entry in result["methods"].items():
            if method in BY_PRODUCTS:
                continue
            budgets = [int(b) for b in entry["accuracy"]]
            mean, half = (
                np.array([cell[key] for cell in entry["accuracy"].values()])
                for key in ("mean", "ci95")
            )
            style = {"linestyle": "--"} if "frozen" in entry else {"marker": "o", "markersize": 3}
            (line,) = axes.plot(budgets, mean, label=method, **style)
            axes.fill_between(budgets, mean - half, mean + half, color=line.get_color(), alpha=0.1)
        axes.set_xscale("log")
        axes.set_xticks(budgets, [str(b) for b in budgets])
        axes.minorticks_off()
        axes.set(xlabel="steps", title=name)
        axes.grid(alpha=0.3)
    panels[0, 0].set_ylabel("accuracy on query texts")
    panels[0, -1].legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()
