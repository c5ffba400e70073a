"""Meta-training in one call, for anything that has a loss."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from rnnopt.meta.settings import Init, LearnedSettings, MetaTrainSettings, UnrollSettings
from rnnopt.meta.training import MetaTraining
from rnnopt.tasks.protocol import VALIDATION_TASKS, Learner, Task, TaskSource
from rnnopt.tasks.start import Start


@dataclass(frozen=True)
class MetaTrained:
    """What a run of meta-training learned.

    Attributes:
        rule: the inner rule, the best by validation; its weights are frozen.
        start: how tasks start, with the learned initial values if there are any.
        history: the log records of the run, one for each meta-step.
    """

    rule: Any
    start: Start
    history: list[dict[str, Any]]


def meta_train(
    learner: Learner,
    tasks: Callable[[int], Task] | TaskSource,
    *,
    validation: Callable[[int], Task] | TaskSource | None = None,
    rule: nn.Module | None = None,
    initial: Init = "pretrained",
    steps: int = 5,
    order: int = 1,
    meta_steps: int = 500,
    tasks_per_meta_step: int = 4,
    meta_lr: float = 5e-3,
    initial_lr: float = 1e-3,
    validate_every: int = 50,
    validation_tasks: int = 8,
    seed: int = 0,
    start: Start = Start(),  # noqa: B008  # immutable
    folder: str | Path | None = None,
    report: Callable[[dict[str, Any]], None] = lambda record: None,
) -> MetaTrained:
    """Learn an update rule, initial values, or both, over many tasks.

    The meta-loss is the mean query loss after each step of adaptation (Andrychowicz et al. 2016,
    arXiv:1606.04474); its gradient in the initial values is MAML's (Finn et al. 2017,
    arXiv:1703.03400). Options that are not here are those of
    `rnnopt.meta.settings.MetaTrainSettings`, for `rnnopt.meta.training.MetaTraining`.

    Args:
        learner: what the tasks adapt; back at its initial values when this returns.
        tasks: ``number -> Task``, or a source of tasks.
        validation: tasks that choose the best rule; None takes the same function's tasks from
            number `VALIDATION_TASKS` on, which no meta-step uses.
        rule: the inner rule, whose weights are trained in place; None begins with a new
            `rnnopt.CoordinateLSTM`.
        initial: ``"maml"`` or ``"reptile"`` also learn the initial values of what trains;
            ``"pretrained"`` leaves them as they are.
        steps: steps of adaptation on each task.
        order: of the meta-gradient: 1 takes gradients for constants, 2 is exact (through `higher`).
        meta_steps: steps of the meta-optimizer, Adam.
        tasks_per_meta_step: tasks whose meta-gradients are averaged.
        meta_lr: Adam's learning rate on the rule's weights.
        initial_lr: Adam's learning rate on the initial values.
        validate_every: meta-steps between validations.
        validation_tasks: tasks of one validation.
        seed: of everything random.
        start: how every task starts.
        folder: for log, checkpoints and the best rule; None keeps nothing.
        report: called with every log record.

    Returns:
        The rule, the start, and the log.

    Raises:
        InputError: settings out of range, nothing to learn, or a folder that holds another run.
    """
    learned = LearnedSettings(
        init=initial, init_lr=initial_lr, start=start, inner="lstm" if rule is None else "given"
    )
    settings = MetaTrainSettings(
        meta_steps,
        UnrollSettings(steps, order=order),
        tasks_per_meta_step=tasks_per_meta_step,
        meta_lr=meta_lr,
        learned=learned,
        seed=seed,
        validate_every=min(validate_every, meta_steps),
        validation_tasks=validation_tasks,
    )
    train = as_source(tasks, learner)
    history: list[dict[str, Any]] = []

    def keep(record: dict[str, Any]) -> None:
        history.append(record)
        report(record)

    with ExitStack() as stack:
        path = folder or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run"
        run = MetaTraining(
            train,
            as_source(tasks if validation is None else validation, learner, VALIDATION_TASKS),
            settings,
            Path(path),
            facts=learner.facts,
            training={},
            rule=rule,
        )
        best = run.run(keep)
    learner.begin(train.load(0), seed)
    begins = run.start
    if begins.values is not None:
        fixed = {name: value.detach().clone() for name, value in begins.values.items()}
        begins = replace(begins, values=fixed)
    return MetaTrained(best.requires_grad_(False).eval(), begins, history)


def as_source(
    tasks: Callable[[int], Task] | TaskSource, learner: Learner, first: int = 0
) -> TaskSource:
    """A source of tasks; a function's numbers begin at `first`."""
    return tasks if isinstance(tasks, TaskSource) else TaskSource(tasks, learner, first=first)
