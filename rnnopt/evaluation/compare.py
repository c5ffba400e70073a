"""A comparison in one call, for anything that has a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rnnopt.evaluation.baselines import Baseline
from rnnopt.evaluation.comparison import Comparison, Direct
from rnnopt.evaluation.journal import Journal
from rnnopt.evaluation.report.tables import comparison_table
from rnnopt.meta.meta_train import as_source
from rnnopt.rules.protocol import UpdateRule
from rnnopt.tasks.protocol import TEST_TASKS, VALIDATION_TASKS, Learner, Task, TaskSource
from rnnopt.tasks.start import Start


@dataclass(frozen=True)
class Compared:
    """What a comparison found.

    Attributes:
        figures: see `rnnopt.evaluation.comparison.Comparison.run`.
    """

    figures: dict[str, Any]

    def table(self) -> str:
        """The figures as a Markdown table, with 95 % intervals."""
        return comparison_table(self.figures)


def compare(
    rule: UpdateRule,
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
    tick: Callable[[str], None] = lambda name: None,
) -> Compared:
    """Compare a rule with tuned baselines on the same tasks, from the same initial values.

    Every baseline that has a learning rate gets the best one of its grid for each budget and each
    metric, chosen on other tasks than those that are reported.

    Args:
        rule: the rule; it has nothing to tune.
        learner: what every method adapts; back at its initial values when this returns.
        tasks: ``number -> Task``, or a source of tasks, to report on. A function's tasks are
            taken from number `TEST_TASKS` on, which meta-training never uses.
        tuning: tasks to tune the baselines on; None takes the same function's tasks from number
            `VALIDATION_TASKS` on.
        baselines: names in `rnnopt.evaluation.baselines.BASELINES`, `own_baselines` or `direct`.
        own_baselines: further optimizers by name.
        direct: methods by name that solve a task without steps of an optimizer.
        budgets: numbers of steps to report at.
        episodes: tasks to report on, 2 or more.
        tuning_episodes: tasks to tune on.
        start: where every method starts, for example `MetaTrained.start`.
        journal: file that keeps finished runs, so that a comparison that was stopped goes on.
        tick: called after each run with its name.

    Returns:
        The figures, with 95 % intervals.

    Raises:
        InputError: a baseline that does not exist, or one that needs what is not installed.
    """
    report = as_source(tasks, learner, TEST_TASKS)
    comparison = Comparison(
        learner,
        rule,
        type(rule).__name__,
        as_source(tasks if tuning is None else tuning, learner, VALIDATION_TASKS),
        report,
        budgets,
        [*baselines, *(own_baselines or {}), *(direct or {})],
        None if journal is None else Journal(Path(journal), learner.facts),
        tick,
        start,
        own_baselines=own_baselines,
        direct=direct,
    )
    figures = comparison.run(episodes, tuning_episodes)
    learner.begin(report.load(0), 0)
    return Compared(figures)
