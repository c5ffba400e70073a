"""Meta-training in one call, for anything that has a loss."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

from torch import nn

from rnnopt.errors import InputError
from rnnopt.meta.settings import Init, LearnedSettings, MetaTrainSettings, UnrollSettings
from rnnopt.meta.training import MetaTraining
from rnnopt.rules.protocol import UpdateRule
from rnnopt.tasks.protocol import VALIDATION_TASKS, Learner, Task, TaskSource, as_source
from rnnopt.tasks.start import Start


@dataclass(frozen=True)
class MetaTrained:
    """The result of meta-training.

    Attributes:
        rule: the inner rule with its best weights by validation. The weights are frozen.
        start: how tasks start, with the learned initial values if there are any. Pass it to
            `rnnopt.compare`.
        history: the log records of this call: one of the validation before the first meta-step,
            then one for each meta-step.
    """

    rule: Any
    start: Start
    history: list[dict[str, Any]]


class MetaTrainOptions(TypedDict, total=False):
    """The numbers of `meta_train`; each may be left out.

    `rnnopt.meta.training.MetaTraining` with `rnnopt.meta.settings.MetaTrainSettings` has more.

    Attributes:
        steps: the number of adaptation steps on each task [5].
        order: 1 treats the inner gradients as constants in the meta-gradient. 2 differentiates
            through them, with `higher`, and gives the exact meta-gradient [1].
        meta_steps: the number of steps of the meta-optimizer, which is Adam [500].
        tasks_per_meta_step: the number of tasks whose meta-gradients are averaged [4].
        meta_lr: Adam's learning rate for the rule's weights [5e-3].
        initial_lr: Adam's learning rate for the initial values [1e-3].
        validate_every: the number of meta-steps between two validations [50].
        validation_tasks: the number of tasks of a validation, the same ones each time [8].
        seed: decides everything that is drawn, at least 0 [0].
    """

    steps: int
    order: int
    meta_steps: int
    tasks_per_meta_step: int
    meta_lr: float
    initial_lr: float
    validate_every: int
    validation_tasks: int
    seed: int


_DEFAULTS: MetaTrainOptions = {
    "steps": 5, "order": 1, "meta_steps": 500, "tasks_per_meta_step": 4, "meta_lr": 5e-3,
    "initial_lr": 1e-3, "validate_every": 50, "validation_tasks": 8, "seed": 0,
}  # fmt: skip


def meta_train(
    learner: Learner,
    tasks: Callable[[int], Task] | TaskSource,
    *,
    validation: Callable[[int], Task] | TaskSource | None = None,
    rule: nn.Module | None = None,
    initial: Init = "pretrained",
    start: Start = Start(),  # noqa: B008  # immutable
    folder: str | Path | None = None,
    resume: bool = False,
    report: Callable[[dict[str, Any]], None] = lambda record: None,
    **options: Unpack[MetaTrainOptions],
) -> MetaTrained:
    """Meta-train an update rule, initial values, or both.

    The meta-loss is the mean of the query losses after each step of adaptation (Andrychowicz et
    al. 2016, arXiv:1606.04474). Its gradient in the initial values is that of MAML (Finn et al.
    2017, arXiv:1703.03400).

    Args:
        learner: what adapts to the tasks; back at its initial values when this returns.
        tasks: ``number -> Task``, or a source of tasks. Meta-training uses the numbers from 0 on.
        validation: the tasks that choose the best rule. None takes those of `tasks` from number
            `VALIDATION_TASKS` (1,000,000) on, which no meta-step uses.
        rule: the inner rule, a `torch.nn.Module` that is an `UpdateRule`. Its weights are trained
            in place and frozen at the end. None makes a new `rnnopt.TwoLevelLSTM`.
        initial: ``"maml"`` or ``"reptile"`` also learns the initial values of the parameters that
            train. ``"pretrained"`` leaves them as they are.
        start: which parameters are stepped. ``Start(adapted="head")`` is ANIL.
        folder: gets the log, the checkpoints and the best rule. None keeps none of them.
        resume: continue the run that the folder holds, if it holds one.
        report: called with every log record.
        options: see `MetaTrainOptions`.

    Raises:
        InputError: an option is out of range, there is nothing to learn, `start` brings initial
            values, or the folder holds another run.
        TypeError: there is no option of that name.
    """
    _check_arguments(rule, start, options)
    settings = _settings(initial, start, rule, {**_DEFAULTS, **options})
    train, history = as_source(tasks, learner), list[dict[str, Any]]()

    def keep(record: dict[str, Any]) -> None:
        history.append(record)
        report(record)

    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run"
        run = MetaTraining(
            train, _validation_source(train, validation), settings, Path(folder),
            facts=learner.facts, training={}, resume=resume, rule=rule,
        )  # fmt: skip
        best = run.run(keep)
    learner.begin(train.load(0), settings.seed)
    return MetaTrained(best.requires_grad_(False).eval(), _detached(run.start), history)


def _settings(
    initial: Init, start: Start, rule: object, chosen: MetaTrainOptions
) -> MetaTrainSettings:
    learned = LearnedSettings(
        init=initial,
        init_lr=chosen["initial_lr"],
        start=start,
        inner="lstm" if rule is None else "given",
    )
    return MetaTrainSettings(
        chosen["meta_steps"],
        UnrollSettings(chosen["steps"], order=chosen["order"]),
        tasks_per_meta_step=chosen["tasks_per_meta_step"],
        meta_lr=chosen["meta_lr"],
        learned=learned,
        seed=chosen["seed"],
        validate_every=min(chosen["validate_every"], chosen["meta_steps"]),
        validation_tasks=chosen["validation_tasks"],
    )


def _validation_source(
    train: TaskSource, validation: Callable[[int], Task] | TaskSource | None
) -> TaskSource:
    if validation is None:
        return train.from_number(VALIDATION_TASKS)
    return as_source(validation, train.learner, VALIDATION_TASKS)


def _detached(start: Start) -> Start:
    """The start with copies of its values that don't train."""
    if start.values is None:
        return start
    values = {name: value.detach().clone() for name, value in start.values.items()}
    return replace(start, values=values)


def _check_arguments(rule: object, start: Start, options: Mapping[str, object]) -> None:
    if unknown := options.keys() - _DEFAULTS.keys():
        raise TypeError(f"meta_train has no option {min(unknown)!r}; it has {', '.join(_DEFAULTS)}")
    if rule is not None and not (isinstance(rule, nn.Module) and isinstance(rule, UpdateRule)):
        raise InputError(
            f"rule={rule!r}: must be a torch.nn.Module with step_size, init_state and __call__ "
            "(see rnnopt.UpdateRule); pass an instance, such as rnnopt.SGD(0.01), or leave it out"
        )
    if start.values is not None:
        raise InputError(
            "start has initial values, and meta_train begins with those of the learner: load them "
            "first, module.load_state_dict(start.values, strict=False), make the Learner after "
            "that, and pass replace(start, values=None)"
        )
