"""Pictures of runs, as PNG files. The only importer of matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from rnnopt.evaluation.inspection import Inspection
from rnnopt.storage.files import write_atomically

matplotlib.use("Agg")  # no window system is needed, or looked for

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

_LABELS = {"accuracy": "accuracy on query texts", "loss": "query loss (nats per text)"}


def plot_learning(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The meta-loss, smoothed, and the validation score against meta-steps.

    Args:
        records: the lines of a run's log.
        path: the PNG file to write.
    """
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    losses = [(r["meta_step"], r["meta_loss"]) for r in records if r.get("meta_loss") is not None]
    checks = [(r["meta_step"], r["validation"]["score"]) for r in records if "validation" in r]
    if losses:
        steps, values = zip(*losses)
        axes.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smooth(values), color="tab:blue", label="meta-training tasks (smoothed)")
    if checks:
        axes.plot(*zip(*checks), color="tab:orange", marker="o", label="validation classes")
    axes.set(xlabel="meta-steps", ylabel="meta-loss, mean over the steps (nats per text)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    _write(figure, path)


def plot_comparison(result: Mapping[str, Any], title: str, path: Path) -> None:
    """Accuracy and query loss of every method against steps, with 95 % bands.

    Args:
        result: what `rnnopt.evaluation.comparison.Comparison.run` returned.
        title: above the picture.
        path: the PNG file to write.
    """
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, metric in zip(panels, ("accuracy", "loss")):
        for name, method in result["methods"].items():
            budgets = [int(b) for b in method[metric]]
            mean = [cell["mean"] for cell in method[metric].values()]
            half = [cell["ci95"] for cell in method[metric].values()]
            label = f"{name}, learning rate tuned per budget" if "tuned" in method else name
            style = {"linestyle": "--"} if "frozen" in method else {"marker": "o", "markersize": 3}
            (line,) = axes.plot(budgets, mean, label=label, **style)
            low = [m - h for m, h in zip(mean, half)]
            high = [m + h for m, h in zip(mean, half)]
            axes.fill_between(budgets, low, high, color=line.get_color(), alpha=0.2)
        marks = sorted({int(b) for method in result["methods"].values() for b in method[metric]})
        axes.set_xscale("log")
        axes.set_xticks(marks, [str(b) for b in marks])
        axes.minorticks_off()
        axes.set(xlabel="steps", ylabel=_LABELS[metric])
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize="small")
    figure.suptitle(title)
    _write(figure, path)


def plot_losses(
    losses: Sequence[float | None], path: Path, checks: Sequence[Mapping[str, Any]] = ()
) -> None:
    """The training loss of one adaptation against steps, and figures on held-out texts.

    Args:
        losses: before each step, nats per text; None for what is not finite.
        path: the PNG file to write.
        checks: the step and the figures of each judgement, see `rnnopt.cli.until.Watch`.
    """
    size = (10, 3.5) if checks else (5, 3.5)
    figure, panels = plt.subplots(
        1, 2 if checks else 1, figsize=size, layout="constrained", squeeze=False
    )
    axes = panels[0, 0]
    axes.plot(range(len(losses)), losses, marker="o", markersize=3)
    axes.set(xlabel="steps", ylabel="training loss (nats per text)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if checks:
        axes = panels[0, 1]
        steps = [check["step"] for check in checks]
        for name in sorted(checks[0].keys() - {"step", "loss"}):
            values = [check[name] for check in checks]
            axes.plot(steps, values, marker="o", markersize=3, label=name)
        axes.set(xlabel="steps", ylabel="on texts held out", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        axes.legend()
    _write(figure, path)


def plot_inspection(found: Inspection, title: str, path: Path) -> None:
    """A rule's update over gradient and memory, its step size and its distance from Adam.

    Args:
        found: what `rnnopt.evaluation.inspection.inspect_rule` returned.
        title: above the picture.
        path: the PNG file to write.
    """
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    surface = found.surface
    update = np.array(surface.update, dtype=float)  # (G, U); None becomes NaN
    most = np.nanmax(np.abs(update), initial=0) or 1.0
    mesh = left.pcolormesh(
        surface.ratios, surface.gradients, update, cmap="RdBu", vmin=-most, vmax=most
    )
    left.set_facecolor("lightgray")  # where no coordinate is
    left.set(
        xlabel="m / sqrt(v) before the step",
        ylabel="gradient / RMS of the tensor's",
        title=f"update of {surface.kind} at step {surface.step}",
    )
    figure.colorbar(mesh, ax=left)
    steps = range(1, len(found.losses) + 1)
    for kind, sizes in found.step_size.items():
        distances = [math.nan if d is None else d for d in found.adam_distance[kind]]
        middle.plot(steps, [s or math.nan for s in sizes], marker="o", markersize=3, label=kind)
        right.plot(steps, distances, marker="o", markersize=3, label=kind)
    middle.set(xlabel="step", yscale="log", title="RMS of the update")
    right.set(xlabel="step", ylim=(0, None), title="distance from Adam's direction, 1 - cosine")
    for axes in (middle, right):
        axes.grid(alpha=0.3)
    middle.legend(fontsize="small")
    figure.suptitle(title)
    _write(figure, path)


def _smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential average, debiased."""
    average, out = 0.0, []
    for i, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        out.append(average / (1 - weight**i))
    return out


def _write(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    write_atomically(path, buffer.getvalue())
