"""A comparison of a rule with baselines: same tasks, same initial values, same numbers of steps.

The learned rule has nothing to tune. Each baseline that is tuned gets the best learning rate of its
grid on validation tasks. The rate is chosen separately for every budget of steps and every metric,
so that each figure of a baseline is one that it was tuned for. The baselines that need no tuning
run with their documented settings. Direct methods, such as logistic regression on frozen
embeddings, solve a task without any step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from rnnopt.errors import InputError
from rnnopt.evaluation.baselines import BASELINES, Baseline, require_baseline
from rnnopt.evaluation.journal import Journal
from rnnopt.evaluation.statistics import Values, difference, summary
from rnnopt.rules.protocol import UpdateRule
from rnnopt.tasks.adaptation import Adaptation, adapt_and_judge, check_budgets
from rnnopt.tasks.protocol import Learner, Scores, Task, TaskSource
from rnnopt.tasks.start import Start

LEARNED = "learned"
# Tuning and report draw the heads of their tasks with different seeds.
_TUNING_HEADS, _REPORT_HEADS = 2_000_000_000, 3_000_000_000
_NO_STEPS = (0,)  # the budgets of a method that takes no steps

Direct = Callable[[Learner, Task], Scores]  # a method that takes no steps


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
    """A comparison of the rule with baselines on the same tasks.

    Args:
        learner: the learner that every method adapts.
        rule: the learned rule.
        rule_name: a name that distinguishes the rule from others in the journal.
        tuning: validation tasks, on which the baselines' learning rates are chosen.
        report: test tasks, whose figures are reported.
        budgets: the numbers of steps to report at, each at least 1.
        baselines: names in `rnnopt.evaluation.baselines.BASELINES`, `direct` or `own_baselines`.
        journal: keeps finished runs; None keeps none.
        tick: called after each run with its name.
        start: where every method starts on a task, and which parameters it steps.
        tuned_budgets: the budgets of the baselines that are tuned; None takes `budgets`.
        own_baselines: further optimizers by name.
        direct: methods by name that solve a task without steps of an optimizer.

    Attributes:
        planned: the number of runs that `run` makes; an upper bound until everything is tuned.

    Raises:
        InputError: a baseline does not exist or needs a package that is not installed, or a budget
            is below 1.
    """

    def __init__(
        self,
        learner: Learner,
        rule: UpdateRule,
        rule_name: str,
        tuning: TaskSource,
        report: TaskSource,
        budgets: Sequence[int],
        baselines: Sequence[str],
        journal: Journal | None,
        tick: Callable[[str], None] = lambda name: None,
        start: Start = Start(),  # noqa: B008  # immutable
        tuned_budgets: Sequence[int] | None = None,
        own_baselines: Mapping[str, Baseline] | None = None,
        direct: Mapping[str, Direct] | None = None,
    ) -> None:
        check_budgets(budgets)
        own, self._direct = dict(own_baselines or {}), dict(direct or {})
        for name in baselines:
            if name not in self._direct and name not in own:
                require_baseline(name, others=tuple(self._direct))
        self._table = {**BASELINES, **own}
        self.learner, self.rule, self.rule_name = learner, rule, rule_name
        self.tuning, self.report = tuning, report
        self.budgets, self.baselines = budgets, baselines
        self.tuned_budgets = budgets if tuned_budgets is None else tuned_budgets
        self.journal, self.tick, self.start = journal, tick, start
        self.planned = 0

    def run(self, episodes: int, tuning_episodes: int) -> dict[str, Any]:
        """Tune on validation tasks, then run every method on the same test tasks.

        Args:
            episodes: the number of test tasks, at least 2, since one task has no interval.
            tuning_episodes: the number of validation tasks, at least 1.

        Returns:
            ``{"episodes", "tuning_episodes", "methods": {name: {"accuracy": {budget: {"mean",
            "ci95"}}, "loss": ..., "seconds_per_step", "tuned": {"lr": {budget: rate},
            "lr_for_loss": {budget: rate}}}}, "paired": {baseline: {metric: {budget: {"mean",
            "ci95"}}}}, "values": {name: {metric: {budget: [one figure an episode]}}}}``; ``ci95``
            is half the width of a 95 % interval. ``paired`` holds the differences learned minus
            baseline. Only tuned baselines have ``tuned``. Only the rule has ``undone``, the number
            of steps that its guard took back in all episodes together. A direct method has
            ``"frozen": true``, ``"seconds"`` in place of the time of a step, and the same figures
            at every budget.

        Raises:
            InputError: a number of tasks is too small, or a task reports other metrics than its
                source declares.
        """
        self._check_episodes(episodes, tuning_episodes)
        plan = {
            name: self._runs_at_most(name, episodes, tuning_episodes) for name in self.baselines
        }
        self.planned = episodes + sum(plan.values())
        runs = [self._learned(number) for number in range(episodes)]
        values = {LEARNED: self._values(runs, self.budgets)}
        methods: dict[str, dict[str, Any]] = {
            LEARNED: {
                "seconds_per_step": _mean_seconds(runs),
                "undone": sum(run.undone for run in runs),
            }
        }
        for name in sorted(self.baselines, key=plan.__getitem__):  # the shortest first
            judged = self._direct_values if name in self._direct else self._baseline_values
            values[name], methods[name] = judged(name, episodes, tuning_episodes)
        names = [LEARNED, *self.baselines]
        return {
            "episodes": episodes,
            "tuning_episodes": tuning_episodes,
            "methods": {name: {**summary(values[name]), **methods[name]} for name in names},
            "paired": {
                name: summary(difference(values[LEARNED], values[name])) for name in self.baselines
            },
            "values": {
                name: {
                    metric: {str(b): column.tolist() for b, column in by_budget.items()}
                    for metric, by_budget in values[name].items()
                }
                for name in names
            },
        }

    def _check_episodes(self, episodes: int, tuning_episodes: int) -> None:
        if episodes < 2:
            raise InputError(f"episodes={episodes}: must be at least 2, one has no interval")
        if tuning_episodes < 1:
            raise InputError(f"tuning_episodes={tuning_episodes}: must be at least 1")

    @property
    def _tuned_metrics(self) -> list[str]:
        """The metrics that learning rates are chosen for; the first is the main one."""
        return [name for name, metric in self.report.metrics.items() if metric.tuned_by is None]

    def _baseline_values(
        self, name: str, episodes: int, tuning_episodes: int
    ) -> tuple[Values, dict[str, Any]]:
        """The test figures of an optimizer, and the other items of its entry."""
        budgets = self._budgets_of(name)
        chosen = self._tune(name, tuning_episodes, budgets)
        tuned = self._table[name].tuned
        if tuned:
            rates = {lr for by_budget in chosen.values() for lr in by_budget.values()}
            self.planned -= (len(self._table[name].grid) - len(rates)) * episodes
        values, seconds = self._tuned_values(name, chosen, episodes)
        about: dict[str, Any] = {"seconds_per_step": seconds}
        if tuned:
            about["tuned"] = {
                f"lr_for_{metric}" if i else "lr": {str(b): chosen[metric][b] for b in budgets}
                for i, metric in enumerate(self._tuned_metrics)
            }
        return values, about

    def _runs_at_most(self, name: str, episodes: int, tuning_episodes: int) -> int:
        """The number of runs of a baseline if all budgets choose different learning rates."""
        if name in self._direct:
            return episodes
        baseline = self._table[name]
        lengths = len(self.budgets) if baseline.scheduled else 1
        tuning = tuning_episodes if baseline.tuned else 0
        return lengths * len(baseline.grid) * (tuning + episodes)

    def _budgets_of(self, name: str) -> Sequence[int]:
        return self.tuned_budgets if self._table[name].tuned else self.budgets

    def _tune(
        self, name: str, episodes: int, budgets: Sequence[int]
    ) -> dict[str, dict[int, float]]:
        """The best learning rate for each metric at each budget."""
        grid = self._table[name].grid
        if not self._table[name].tuned:
            return {metric: dict.fromkeys(budgets, grid[0]) for metric in self._tuned_metrics}
        scores = {
            lr: self._values(
                [
                    self._baseline(name, lr, number, self.tuning, budgets)
                    for number in range(episodes)
                ],
                budgets,
            )
            for lr in grid
        }

        # equal accuracies are common on few tasks; the lower loss decides then
        def key(metric: str, lr: float, budget: int) -> tuple[float, float]:
            sign = -1 if self.report.metrics[metric].higher_is_better else 1
            mean, loss = (scores[lr][name][budget].mean() for name in (metric, "loss"))
            return sign * mean, loss

        return {
            metric: {b: min(grid, key=lambda lr: key(metric, lr, b)) for b in budgets}
            for metric in self._tuned_metrics
        }

    def _tuned_values(
        self, name: str, chosen: dict[str, dict[int, float]], episodes: int
    ) -> tuple[Values, float]:
        """A baseline's test figures, each at its chosen learning rate, and its time per step."""
        wanted: dict[float, set[int]] = {}  # a rate runs as far as its largest budget only
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
        at = {lr: self._values(runs[lr], sorted(budgets)) for lr, budgets in wanted.items()}
        values = {
            name: {b: at[lr][name][b] for b, lr in chosen[metric.tuned_by or name].items()}
            for name, metric in self.report.metrics.items()
            if all(name in found for found in at.values())
        }
        return values, _mean_seconds([run for column in runs.values() for run in column])

    def _direct_values(
        self, name: str, episodes: int, tuning_episodes: int
    ) -> tuple[Values, dict[str, Any]]:
        """The test figures of a direct method, and the other items of its entry."""

        def solve(task: Task) -> Adaptation:
            started = time.perf_counter()
            score = self._direct[name](self.learner, task)
            return Adaptation({0: score}, time.perf_counter() - started)

        runs = [
            self._run(f"{name} report {number}", number, self.report, _NO_STEPS, solve, self.start)
            for number in range(episodes)
        ]
        found = self._values(runs, _NO_STEPS)
        values = {metric: dict.fromkeys(self.budgets, found[metric][0]) for metric in found}
        return values, {"frozen": True, "seconds": _mean_seconds(runs)}

    def _values(self, runs: Sequence[Adaptation], budgets: Sequence[int]) -> Values:
        return {
            metric: {b: np.array([run.scores[b][metric] for run in runs]) for b in budgets}
            for metric in self.report.metrics
            # a journal may hold runs from before a metric was declared
            if all(metric in run.scores[b] for run in runs for b in budgets)
        }

    def _learned(self, number: int) -> Adaptation:
        return self._adapt(
            f"{LEARNED} {self.rule_name} report {number}",
            number,
            self.report,
            self.budgets,
            lambda: self.start.optimizer(self.learner, self.rule),
            self.start,
        )

    def _baseline(
        self, name: str, lr: float, number: int, source: TaskSource, budgets: Sequence[int]
    ) -> Adaptation:
        part = "tuning" if source is self.tuning else "report"
        baseline = self._table[name]
        known = " ".join(filter(None, (name, baseline.version)))
        run, start = f"{known} {lr:g} {part} {number}", baseline.start or self.start

        def adapt(run: str, budgets: Sequence[int]) -> Adaptation:
            steps = max(budgets)
            return self._adapt(
                run,
                number,
                source,
                budgets,
                lambda: baseline.build(self.learner, self.start.params(self.learner), lr, steps),
                start,
            )

        if not baseline.scheduled:
            return adapt(run, budgets)
        runs = [adapt(f"{run} of {budget} steps", (budget,)) for budget in budgets]
        scores = {budget: done.scores[budget] for budget, done in zip(budgets, runs)}
        return Adaptation(scores, _mean_seconds(runs))

    def _adapt(
        self,
        run: str,
        number: int,
        source: TaskSource,
        budgets: Sequence[int],
        build: Callable[[], torch.optim.Optimizer],
        start: Start,
    ) -> Adaptation:
        """Run one optimizer on one task, from where it starts."""

        def adapt(task: Task) -> Adaptation:
            done = adapt_and_judge(self.learner, build(), task, budgets)
            for scores in done.scores.values():
                source.check_scores(scores)
            return done

        return self._run(run, number, source, budgets, adapt, start)

    def _run(
        self,
        run: str,
        number: int,
        source: TaskSource,
        budgets: Sequence[int],
        method: Callable[[Task], Adaptation],
        start: Start,
    ) -> Adaptation:
        """Run one method on one task, from the starting values of that task."""

        def begin() -> Adaptation:
            task = source.load(number)
            heads = _TUNING_HEADS if source is self.tuning else _REPORT_HEADS
            start.begin(self.learner, task, heads + number)
            return method(task)

        done = begin() if self.journal is None else self.journal.run(run, budgets, begin)
        self.tick(run)
        return done


def _mean_seconds(runs: Sequence[Adaptation]) -> float:
    return float(np.mean([run.seconds_per_step for run in runs]))
