"""A comparison in one call, for anything that has a loss."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rnnopt.errors import InputError
from rnnopt.evaluation.baselines import Baseline
from rnnopt.evaluation.comparison import Comparison, Direct
from rnnopt.evaluation.journal import Journal
from rnnopt.evaluation.report.tables import comparison_table, paired
from rnnopt.optim.arguments import resolve_rule
from rnnopt.rules.files import SHIPPED_RULE, rule_name
from rnnopt.rules.protocol import UpdateRule
from rnnopt.storage.files import fingerprint
from rnnopt.tasks.protocol import (
    TEST_TASKS,
    VALIDATION_TASKS,
    Learner,
    Task,
    TaskSource,
    as_source,
)
from rnnopt.tasks.start import Start


@dataclass(frozen=True)
class Compared:
    """The result of a comparison.

    Attributes:
        figures: see `rnnopt.evaluation.comparison.Comparison.run`.
        metrics: the names of the metrics that the tasks report, the loss last.
    """

    figures: dict[str, Any]
    metrics: Sequence[str] = ("loss",)

    def table(
        self, reference: str | None = None, names: Mapping[str, str] = MappingProxyType({})
    ) -> str:
        """The figures as Markdown, a table for each metric, with 95 % intervals.

        Args:
            reference: the method that the paired differences are from, each method minus this one.
                None: the rule minus each other method.
            names: what to call methods in the table, such as ``{"learned": "shipped rule"}``.

        Raises:
            InputError: there is no method of the name `reference`.
        """
        return comparison_table(self.figures, self.metrics, reference, names)

    def paired(self, method: str, reference: str) -> dict[str, Any]:
        """The differences of two methods on the same episodes.

        Args:
            method: the name of one method.
            reference: the name of the other.

        Returns:
            ``{metric: {budget: {"mean", "ci95"}}}``, the method minus the reference.

        Raises:
            InputError: there is no method of such a name.
        """
        return paired(self.figures, method, reference)

    def plot(
        self, path: str | Path, title: str = "", names: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """Draw every metric of every method against steps into a PNG file; needs matplotlib.

        Args:
            path: the file.
            title: above the figure.
            names: what to call methods.

        Raises:
            InputError: matplotlib is not installed, or the file can't be written.
        """
        try:
            from rnnopt.evaluation.report.plot import plot_comparison
        except ModuleNotFoundError as error:
            raise InputError(
                f"a picture needs {error.name}, which is not installed: pip install 'rnnopt[meta]'"
            ) from error
        plot_comparison(self.figures, title, Path(path), self.metrics, names)


def compare(
    rule: UpdateRule | str | os.PathLike[str] | None,
    learner: Learner,
    tasks: Callable[[int], Task] | TaskSource,
    *,
    tuning: Callable[[int], Task] | TaskSource | None = None,
    baselines: Sequence[str] = ("adamw", "sgd"),
    own_baselines: Mapping[str, Baseline] | None = None,
    direct: Mapping[str, Direct] | None = None,
    budgets: Sequence[int] = (1, 3, 5, 10),
    episodes: int = 100,
    tuning_episodes: int = 10,
    start: Start = Start(),  # noqa: B008  # immutable
    journal: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda done, planned: None,
) -> Compared:
    """Compare a rule with tuned baselines on the same tasks, from the same initial values.

    Every baseline that has a learning rate gets the best one of its grid for each budget and each
    metric. The rates are chosen on other tasks than those that are reported.

    Args:
        rule: an `UpdateRule`, the path of a rule file, or None for the rule that ships.
        learner: what every method adapts; back at its initial values when this returns.
        tasks: ``number -> Task``, or a source of tasks, to report on. The tasks from number
            `TEST_TASKS` on are used, which meta-training never uses; those of a source are used
            from number 0 on if `tuning` is given.
        tuning: the tasks to tune the baselines on. None: those of `tasks` from `VALIDATION_TASKS`.
        baselines: names in `rnnopt.evaluation.baselines.BASELINES`.
        own_baselines: further optimizers by name. `rnnopt.evaluation.baselines.rule_baseline` makes
            one of another rule, and `Baseline.start` gives one initial values of its own.
        direct: methods by name that solve a task without steps of an optimizer.
        budgets: the numbers of steps to report at, each at least 1.
        episodes: the number of tasks to report on, at least 2.
        tuning_episodes: the number of tasks to tune on, at least 1.
        start: where every method starts, such as `MetaTrained.start`.
        journal: a file that keeps finished runs, so that a comparison that was stopped can go on;
            use another file where the tasks or `own_baselines` change.
        progress: called after each run with the number of runs that are done, and of those that
            are planned, which falls when learning rates have been chosen.

    Raises:
        InputError: a baseline does not exist or is not installed, a number is out of range, the
            rule file can't be used, or the initial values of `start` belong to another learner.
        TypeError: `rule` is something else.
    """
    rule = resolve_rule(SHIPPED_RULE if rule is None else rule)
    tuned, report = _sources(learner, tasks, tuning)
    _check_starts([start, *(own.start for own in (own_baselines or {}).values())], learner)
    runs = itertools.count(1)
    comparison = Comparison(
        learner, rule, rule_name(rule), tuned, report, budgets,
        list(dict.fromkeys([*baselines, *(own_baselines or {}), *(direct or {})])),
        None if journal is None else Journal(Path(journal), _facts(learner, start)),
        lambda name: progress(next(runs), comparison.planned), start,
        own_baselines=own_baselines, direct=direct,
    )  # fmt: skip
    figures = comparison.run(episodes, tuning_episodes)
    learner.begin(report.load(0), 0)
    return Compared(figures, (*(name for name in report.metrics if name != "loss"), "loss"))


def _sources(
    learner: Learner,
    tasks: Callable[[int], Task] | TaskSource,
    tuning: Callable[[int], Task] | TaskSource | None,
) -> tuple[TaskSource, TaskSource]:
    """The tasks to tune on, and those to report on."""
    if tuning is None:
        source = as_source(tasks, learner)
        return source.from_number(VALIDATION_TASKS), source.from_number(TEST_TASKS)
    return as_source(tuning, learner, VALIDATION_TASKS), as_source(tasks, learner, TEST_TASKS)


def _check_starts(starts: Sequence[Start | None], learner: Learner) -> None:
    for name in {name for start in starts if start for name in start.values or {}}:
        if name not in learner.initial_values:
            raise InputError(
                f"start has a value for {name!r}, which is none of this learner's initial values; "
                "take the start that was meta-trained with this learner"
            )


def _facts(learner: Learner, start: Start) -> dict[str, Any]:
    """What the runs of a journal depend on, apart from their tasks."""
    values = {**learner.initial_values, **(start.values or {})}
    return {**learner.facts, "adapted": start.adapted, "initial_values": fingerprint(values)}
