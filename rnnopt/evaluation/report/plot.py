"""Figures of runs, as PNG files in the style of `rnnopt.evaluation.report.style`.

Only this module imports matplotlib. A figure is as wide as one or two columns of a paper. Each line
carries its name at its right end, so that no figure needs a legend.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib
import numpy as np

from rnnopt.evaluation.inspection import Inspection
from rnnopt.evaluation.report.style import (
    BAND,
    BLUE,
    COLUMN,
    GREY,
    HEIGHT,
    STYLE,
    VERMILLION,
    line_look,
    spread,
)
from rnnopt.storage.files import write_atomically

matplotlib.use("Agg")  # files only: no window system is needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, ScalarFormatter

_AXIS = {"accuracy": "accuracy on query texts (%)", "loss": "query loss (nats per text)"}
_LABEL_HEIGHT = 8.5  # points from one label to the next
_MARKED = 60  # points of a line that get a marker each; of more they would touch
_LOG_RATIO = 20  # losses that differ by more than this factor get a logarithmic axis

Ends = list[tuple[float, float, str, str]]  # x and y of the last point of a line, its name, colour


def plot_learning(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot the meta-loss, raw and smoothed, and the validation score against meta-steps.

    Args:
        records: the lines of a run's log.
        path: the PNG file to write.
    """
    losses = [(r["meta_step"], r["meta_loss"]) for r in records if r.get("meta_loss") is not None]
    checks = [(r["meta_step"], r["validation"]["score"]) for r in records if "validation" in r]
    with plt.rc_context(STYLE):
        figure, (axes,) = _panels(1, 1.3)
        ends: Ends = []
        if losses:
            steps, values = zip(*losses)
            axes.plot(steps, values, color=BLUE, alpha=0.25, linewidth=0.6)
            smoothed = _smooth(values)
            axes.plot(steps, smoothed, color=BLUE)
            ends.append((steps[-1], smoothed[-1], "training tasks\n(smoothed)", BLUE))
        if checks:
            axes.plot(*zip(*checks), color=VERMILLION, marker="o")
            ends.append((*checks[-1], "validation\nclasses", VERMILLION))
        axes.set(xlabel="meta-steps", ylabel="mean loss over the steps\n(nats per text)")
        axes.set_ylim(bottom=0)
        _name_lines(figure, axes, ends, lines=2)
        _write(figure, path)


def plot_comparison(
    result: Mapping[str, Any],
    title: str,
    path: Path,
    metrics: Sequence[str] = ("accuracy", "loss"),
    names: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Plot the metrics of every method against steps, with 95 % intervals as bands.

    Args:
        result: what `rnnopt.evaluation.comparison.Comparison.run` returned.
        title: above the figure.
        path: the PNG file to write.
        metrics: the metrics to draw, one panel each.
        names: what to call methods.
    """
    methods, columns = result["methods"], len(metrics)
    with plt.rc_context(STYLE):
        height = max(HEIGHT, 0.7 + 0.13 * len(methods))
        figure, panels = _panels(columns, columns, height=height)
        for axes, metric in zip(panels, metrics):
            ends = _compared(axes, methods, metric, names)
            marks = sorted({int(b) for method in methods.values() for b in method[metric]})
            axes.set_xscale("log")
            axes.set_xticks(marks, [str(b) for b in marks])
            axes.minorticks_off()
            name = _AXIS.get(metric, metric) if "accuracy" in metrics else metric
            axes.set(xlabel="steps", ylabel=name)
            if metric == "accuracy":
                axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
            _name_lines(figure, axes, ends)
        notes = "bands: 95 % intervals"
        if any("tuned" in method for method in methods.values()):
            notes += "; *: learning rate tuned for each number of steps"
        if any("frozen" in method for method in methods.values()):
            notes += "; dashed grey: no steps, frozen features"
        figure.suptitle(f"{title}\n{notes}", x=0.01, ha="left")
        _write(figure, path)


def _compared(
    axes: Axes, methods: Mapping[str, Any], metric: str, names: Mapping[str, str]
) -> Ends:
    ends: Ends = []
    stepping = 1
    top = max(cell["mean"] for method in methods.values() for cell in method[metric].values())
    low = min(cell["mean"] for method in methods.values() for cell in method[metric].values())
    logarithmic = metric == "loss" and 0 < low * _LOG_RATIO < top
    for name, method in methods.items():
        if "frozen" in method:
            look: dict[str, Any] = {"color": GREY, "linestyle": (0, (4, 2)), "linewidth": 0.8}
        else:
            number = 0 if name == "learned" else stepping
            look = line_look(number) | {"linewidth": 1.1 if number else 2.0}
            stepping += name != "learned"
        budgets = [int(b) for b in method[metric]]
        mean = np.array([cell["mean"] for cell in method[metric].values()])
        half = np.array([cell["ci95"] for cell in method[metric].values()])
        axes.plot(budgets, mean, zorder=3 if name == "learned" else 2, **look)
        below = np.maximum(mean - half, low / 2) if logarithmic else mean - half
        axes.fill_between(budgets, below, mean + half, color=look["color"], alpha=BAND, linewidth=0)
        if len(budgets) == 1:  # a band has no width there
            axes.vlines(budgets, below, mean + half, color=look["color"], linewidth=0.8)
        shown = names.get(name, name) + ("*" if "tuned" in method else "")
        ends.append((budgets[-1], float(mean[-1]), shown, look["color"]))
    if logarithmic:
        axes.set_yscale("log")
    return ends


def plot_losses(
    losses: Sequence[float | None], path: Path, checks: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Plot the training loss of one adaptation against steps, and metrics on held-out texts.

    Args:
        losses: before each step, nats per text; None for one that is not finite.
        path: the PNG file to write.
        checks: the step and the metrics of each evaluation, see `rnnopt.cli.until.Watch`.
    """
    with plt.rc_context(STYLE):
        figure, panels = _panels(2 if checks else 1, 2 if checks else 1)
        values = [math.nan if loss is None else loss for loss in losses]
        marker = "o" if len(values) <= _MARKED else ""
        panels[0].plot(range(len(values)), values, color=BLUE, marker=marker, markersize=2)
        panels[0].set(xlabel="steps", ylabel="training loss (nats per text)")
        panels[0].set_ylim(bottom=0)
        if checks:
            steps = [check["step"] for check in checks]
            ends: Ends = []
            for i, name in enumerate(sorted(checks[0].keys() - {"step", "loss"})):
                figures = [math.nan if check[name] is None else check[name] for check in checks]
                panels[1].plot(steps, figures, **line_look(i))
                colour = line_look(i)["color"]
                ends.append((steps[-1], figures[-1], name.replace("f1", "F1"), colour))
            panels[1].set(xlabel="steps", ylabel="on held-out texts (%)", ylim=(0, 1.02))
            panels[1].yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
            _name_lines(figure, panels[1], ends)
        _write(figure, path)


def plot_inspection(found: Inspection, title: str, path: Path) -> None:
    """Plot a rule's update over gradient and memory, its step size and its distance from Adam.

    Args:
        found: what `rnnopt.evaluation.inspection.inspect_rule` returned.
        title: above the figure.
        path: the PNG file to write.
    """
    with plt.rc_context(STYLE):
        figure, (left, middle, right) = _panels(3, 2.2)
        surface = found.surface
        left.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        update = np.array(surface.update, dtype=float)  # (G, U); None becomes NaN
        most = np.nanmax(np.abs(update), initial=0) or 1.0
        mesh = left.pcolormesh(
            surface.ratios, surface.gradients, update, vmin=-most, vmax=most, rasterized=True
        )
        left.grid(False)
        left.set_facecolor("#d9d9d9")  # no coordinate of the model is there
        left.set(
            xlabel="m / √v before the step",
            ylabel="gradient / RMS of its tensor",
            title=f"update of {surface.kind}, step {surface.step}",
        )
        powers = ScalarFormatter()
        powers.set_powerlimits((-1, 2))
        bar = figure.colorbar(
            mesh, ax=left, aspect=30, label="update (parameter units)", format=powers
        )
        bar.outline.set_visible(False)
        steps = range(1, len(found.losses) + 1)
        sizes_end: Ends = []
        distances_end: Ends = []
        for i, (kind, sizes) in enumerate(found.step_size.items()):
            size = [s or math.nan for s in sizes]
            distance = [math.nan if d is None else d for d in found.adam_distance[kind]]
            middle.plot(steps, size, **line_look(i))
            right.plot(steps, distance, **line_look(i))
            colour = line_look(i)["color"]
            sizes_end.append((steps[-1], size[-1], kind, colour))
            distances_end.append((steps[-1], distance[-1], kind, colour))
        middle.set(xlabel="steps", yscale="log", ylabel="RMS update (parameter units)")
        right.set(xlabel="steps", ylim=(0, None), ylabel="1 - cosine with Adam's update")
        _name_lines(figure, middle, sizes_end)
        _name_lines(figure, right, distances_end)
        figure.suptitle(title, x=0.01, ha="left")
        _write(figure, path)


def _panels(count: int, columns: float, height: float = HEIGHT) -> tuple[Figure, list[Axes]]:
    """A figure of some panels side by side, so many columns wide, `height` inches high."""
    figure, axes = plt.subplots(
        1, count, figsize=(COLUMN * columns, height), layout="constrained", squeeze=False
    )
    for panel in axes[0]:
        panel.xaxis.set_major_locator(
            MaxNLocator(6, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
        )
    return figure, list(axes[0])


def _name_lines(figure: Figure, axes: Axes, ends: Ends, lines: int = 1) -> None:
    """Write the name of each line beside its right end, apart from the other names.

    Args:
        figure: of the axes.
        axes: what the lines are drawn in; its limits are settled here.
        ends: of the lines; one that does not end in a finite value stands at the bottom.
        lines: of text in a name.
    """
    figure.draw_without_rendering()  # settles limits and sizes
    points = axes.get_window_extent().height / figure.dpi * 72
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = []
    for x, y, _, _ in ends:
        height = float(to_axes.transform((x, y))[1]) if math.isfinite(y) else 0.0
        wanted.append(min(max(height, 0.0), 1.0))
    places = spread(wanted, lines * _LABEL_HEIGHT / points)
    for (x, _, name, colour), end, place in zip(ends, wanted, places):
        start = float(to_axes.transform((x, axes.get_ylim()[1]))[0])
        axes.annotate(
            name,
            xy=(start, end),
            xytext=(1.06, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=colour,
            fontsize=7,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 2,
                "relpos": (0, 0.5),
            },
        )  # fmt: skip


def _smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start at zero."""
    average, out = 0.0, []
    for i, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        out.append(average / (1 - weight**i))
    return out


def _write(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    write_atomically(path, buffer.getvalue())
