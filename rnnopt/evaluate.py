"""A rule against tuned baselines: same episodes, same initial weights, equal steps, intervals.

The learned rule has nothing to tune. Each baseline gets the learning rate of its grid that does
best on tasks of validation classes, chosen anew for every budget of steps, for accuracy and for
loss separately: every figure it is compared by is one that it was tuned for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnnopt.errors import InputError
from rnnopt.journal import Journal
from rnnopt.rule import UpdateRule
from rnnopt.start import Start
from rnnopt.task import Adaptation, TaskSource, adapt_and_judge
from rnnopt.text import Classifier

LEARNED = "learned"
METRICS = ("accuracy", "loss")
# Heads drawn for tuning and for the report differ, as their tasks do.
_TUNING_HEADS, _REPORT_HEADS = 2_000_000_000, 3_000_000_000


@dataclass(frozen=True)
class Baseline:
    """A classical optimizer and the learning rates it is tuned over.

    Attributes:
        build: (parameters, learning rate) -> optimizer.
        grid: learning rates, from the smallest to the largest.
    """

    build: Callable[[Iterable[Tensor], float], torch.optim.Optimizer]
    grid: tuple[float, ...]


# Half-decades from too small to too large for every kind of parameters that rnnopt tunes: all
# weights of a pretrained encoder want about 3e-4 of AdamW, a head alone about 1e-1.
BASELINES: Mapping[str, Baseline] = {
    "adamw": Baseline(
        lambda params, lr: torch.optim.AdamW(params, lr=lr),
        (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    ),
    "sgd": Baseline(
        lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
        (1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 30.0),
    ),
}


def default_budgets(steps: int) -> tuple[int, ...]:
    """1, 2, 3, 5, 10, 20, 50, 100, ... up to `steps`, and `steps` itself.

    Raises:
        InputError: steps is below 1.
    """
    if steps < 1:
        raise InputError(f"steps={steps}: must be at least 1")
    ladder = [1, 2, 3] + [m * 10**e for e in range(7) for m in (5, 10, 20)]
    return tuple(sorted({b for b in ladder if b < steps} | {steps}))


class Comparison:
    """The rule and the baselines on the same tasks.

    Args:
        classifier: what every method adapts.
        rule: the learned rule.
        rule_name: tells it from other rules in the journal.
        tuning: tasks of validation classes, for the baselines' learning rates.
        report: tasks of test classes.
        budgets: numbers of steps to report at.
        baselines: names in `BASELINES`.
        journal: keeps finished runs.
        tick: called after each run with its name.
        start: where every method starts on a task, and what it steps.

    Raises:
        InputError: a baseline that does not exist.
    """

    def __init__(
        self,
        classifier: Classifier,
        rule: UpdateRule,
        rule_name: str,
        tuning: TaskSource,
        report: TaskSource,
        budgets: Sequence[int],
        baselines: Sequence[str],
        journal: Journal,
        tick: Callable[[str], None] = lambda name: None,
        start: Start = Start(),  # noqa: B008  # immutable
    ) -> None:
        unknown = [name for name in baselines if name not in BASELINES]
        if unknown:
            raise InputError(f"baseline {unknown[0]!r}: choose from {', '.join(BASELINES)}")
        self.classifier, self.rule, self.rule_name = classifier, rule, rule_name
        self.tuning, self.report = tuning, report
        self.budgets, self.baselines = budgets, baselines
        self.journal, self.tick, self.start = journal, tick, start

    def run(self, episodes: int, tuning_episodes: int) -> dict[str, Any]:
        """Tune on validation tasks, then run every method on the same test tasks.

        Args:
            episodes: test tasks, 2 or more: one has no interval.
            tuning_episodes: validation tasks.

        Returns:
            ``{"episodes", "tuning_episodes", "methods": {name: {"accuracy": {budget: {"mean",
            "ci95"}}, "loss": ..., "seconds_per_step", "tuned": {"lr": {budget: rate},
            "lr_for_loss": {budget: rate}}}}, "paired": {baseline: {metric: {budget: {"mean",
            "ci95"}}}}}``; ci95 is half the width of a 95 % interval, paired differences are
            learned minus baseline, loss is in nats per text.
        """
        rates = {name: self._tune(name, tuning_episodes) for name in self.baselines}
        runs = {LEARNED: [self._learned(number) for number in range(episodes)]}
        values = {LEARNED: _values(runs[LEARNED], self.budgets)}
        methods: dict[str, Any] = {LEARNED: _summary(values[LEARNED])}
        methods[LEARNED]["seconds_per_step"] = _mean_seconds(runs[LEARNED])
        paired: dict[str, Any] = {}
        for name, chosen in rates.items():
            values[name], seconds = self._tuned_values(name, chosen, episodes)
            methods[name] = _summary(values[name])
            methods[name]["seconds_per_step"] = seconds
            methods[name]["tuned"] = {
                key: {str(b): chosen[metric][b] for b in self.budgets}
                for key, metric in (("lr", "accuracy"), ("lr_for_loss", "loss"))
            }
            difference = {
                metric: {
                    b: values[LEARNED][metric][b] - values[name][metric][b] for b in self.budgets
                }
                for metric in METRICS
            }
            paired[name] = _summary(difference)
        return {
            "episodes": episodes,
            "tuning_episodes": tuning_episodes,
            "methods": methods,
            "paired": paired,
        }

    def runs_at_most(self, episodes: int, tuning_episodes: int) -> int:
        """How many runs `run` needs if no two budgets choose the same learning rate."""
        grids = sum(len(BASELINES[name].grid) for name in self.baselines)
        return grids * (tuning_episodes + episodes) + episodes

    def _tune(self, name: str, episodes: int) -> dict[str, dict[int, float]]:
        """For each metric, the best learning rate at each budget."""
        grid = BASELINES[name].grid
        scores = {
            lr: _values(
                [
                    self._baseline(name, lr, number, self.tuning, self.budgets)
                    for number in range(episodes)
                ],
                self.budgets,
            )
            for lr in grid
        }
        # equal accuracies are common on few tasks: the lower loss decides
        keys: dict[str, Callable[[float, int], tuple[float, ...]]] = {
            "accuracy": lambda lr, b: (
                -scores[lr]["accuracy"][b].mean(),
                scores[lr]["loss"][b].mean(),
            ),
            "loss": lambda lr, b: (scores[lr]["loss"][b].mean(),),
        }
        return {
            metric: {b: min(grid, key=lambda lr: key(lr, b)) for b in self.budgets}
            for metric, key in keys.items()
        }

    def _tuned_values(
        self, name: str, chosen: dict[str, dict[int, float]], episodes: int
    ) -> tuple[dict[str, dict[int, np.ndarray]], float]:
        """A baseline's test figures, each at the rate chosen for it, and its time per step."""
        wanted: dict[float, set[int]] = {}  # no rate runs longer than it has to
        for by_budget in chosen.values():
            for budget, lr in by_budget.items():
                wanted.setdefault(lr, set()).add(budget)
        runs = {
            lr: [
                self._baseline(name, lr, number, self.report, sorted(budgets))
                for number in range(episodes)
            ]
            for lr, budgets in wanted.items()
        }
        at = {lr: _values(runs[lr], sorted(budgets)) for lr, budgets in wanted.items()}
        values = {
            metric: {b: at[chosen[metric][b]][metric][b] for b in self.budgets}
            for metric in METRICS
        }
        return values, _mean_seconds([run for column in runs.values() for run in column])

    def _learned(self, number: int) -> Adaptation:
        return self._adapt(
            f"{LEARNED} {self.rule_name} report {number}",
            number,
            self.report,
            self.budgets,
            lambda: self.start.optimizer(self.classifier, self.rule),
        )

    def _baseline(
        self, name: str, lr: float, number: int, source: TaskSource, budgets: Sequence[int]
    ) -> Adaptation:
        part = "tuning" if source is self.tuning else "report"
        return self._adapt(
            f"{name} {lr:g} {part} {number}",
            number,
            source,
            budgets,
            lambda: BASELINES[name].build(self.start.params(self.classifier).values(), lr),
        )

    def _adapt(
        self,
        run: str,
        number: int,
        source: TaskSource,
        budgets: Sequence[int],
        build: Callable[[], torch.optim.Optimizer],
    ) -> Adaptation:
        """One method on one task, from the head that belongs to the task."""

        def adapt() -> Adaptation:
            task = source.load(number)
            heads = _TUNING_HEADS if source is self.tuning else _REPORT_HEADS
            self.start.begin(self.classifier, task.support, task.ways, heads + number)
            return adapt_and_judge(self.classifier, build(), task, budgets)

        done = self.journal.run(run, budgets, adapt)
        self.tick(run)
        return done


def interval(values: np.ndarray) -> dict[str, float]:
    """Mean and half the width of its 95 % interval, by Student's t.

    Args:
        values: (E,), one figure an episode, 2 or more.

    Returns:
        ``{"mean", "ci95"}``.
    """
    half = student_quantile(len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return {"mean": float(values.mean()), "ci95": float(half)}


def student_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t with this many degrees of freedom.

    Below 5 from the table, from there on by the Cornish-Fisher series around the normal quantile
    (Abramowitz & Stegun 1964, 26.7.5), exact to 0.2 %.
    """
    if freedom < 5:
        return (12.7062, 4.3027, 3.1824, 2.7764)[freedom - 1]
    z, n = 1.959964, float(freedom)
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


def _values(runs: Sequence[Adaptation], budgets: Sequence[int]) -> dict[str, dict[int, np.ndarray]]:
    return {
        metric: {b: np.array([getattr(run.scores[b], metric) for run in runs]) for b in budgets}
        for metric in METRICS
    }


def _summary(values: dict[str, dict[int, np.ndarray]]) -> dict[str, Any]:
    return {
        metric: {str(b): interval(column) for b, column in by_budget.items()}
        for metric, by_budget in values.items()
    }


def _mean_seconds(runs: Sequence[Adaptation]) -> float:
    return float(np.mean([run.seconds_per_step for run in runs]))
