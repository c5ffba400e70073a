"""What meta-learning adapts: a `Learner`, the `Task` that it adapts to, and a `TaskSource`.

Anything that has a loss can be adapted. Meta-training, learned initial values and comparison use
these three classes only and know nothing of text. A plain `torch.nn.Module` uses the classes as
they are. A field with needs of its own, such as text classification, subclasses them.

>>> net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 1))
>>> def line(number):
...     x = torch.linspace(-1, 1, 20).unsqueeze(1)
...     y = number % 7 * x
...     return Task(lambda net, step: mse_loss(net(x[::2]), y[::2]),
...                 lambda net, step: mse_loss(net(x[1::2]), y[1::2]))
>>> source = TaskSource(line, Learner(net))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from rnnopt.errors import InputError

# (the module to run, the number of the step from 0) -> the mean loss over a set, 0-d
LossFunction = Callable[[nn.Module, int], Tensor]
# The figures of a module on a task's query set, by name. "loss" is always among them.
Scores = dict[str, float]

# A loss above this, or NaN, counts as this: JSON has no infinity, and a mean needs a number.
DIVERGED_LOSS = 1e3
# A task function serves three purposes, and no task is used for two of them: meta-training uses
# the numbers from 0 on, validation and comparison those from these numbers on.
VALIDATION_TASKS, TEST_TASKS = 1_000_000, 2_000_000
# The score that holds the query loss at the best temperature; only classification has it.
CALIBRATED = "calibrated"


@dataclass(frozen=True)
class Metric:
    """A figure that tasks report on their query set.

    Attributes:
        higher_is_better: whether a larger value is a better one.
        tuned_by: the metric that chooses the learning rates at which this one is reported. None
            means that this metric has learning rates of its own.
    """

    higher_is_better: bool = False
    tuned_by: str | None = None


class Learner:
    """A module, the parameters of it that train, and the values that every task starts from.

    Args:
        module: the module. The values that it has now are its initial values. Its mode (`train` or
            `eval`) is left as it is.
        head: names of parameters that belong to the task rather than to the module, such as those
            of an output layer. ANIL adapts these parameters only.
        trains: names of the parameters that train; the others are frozen, in place. None means
            all parameters that require a gradient.

    Attributes:
        family: the kind of training. Tasks of learners of several families can be mixed.
        facts: JSON-compatible facts that are the same for two learners with the same trainable
            parameters.

    Raises:
        InputError: the module is not a `torch.nn.Module`, no parameter trains, a name is not that
            of a parameter, or a parameter of the head does not train.
    """

    family: str = "all"

    def __init__(
        self, module: nn.Module, *, head: Sequence[str] = (), trains: Sequence[str] | None = None
    ) -> None:
        if not isinstance(module, nn.Module):
            raise InputError(
                f"module is of type {type(module).__name__}: it must be a torch.nn.Module; pass "
                "the module itself"
            )
        self._module, self._head = module, tuple(head)
        kind, params = type(module).__name__, dict(module.named_parameters())
        for name in [*head, *(trains or ())]:
            if name not in params:
                raise InputError(
                    f"{name!r} is no parameter of this {kind}; choose from "
                    f"{', '.join(list(params)[:5])}{', ...' if len(params) > 5 else ''}"
                )
        if trains is not None:
            for name, param in params.items():
                param.requires_grad_(name in trains)
        self._initial = {name: param.detach().clone() for name, param in self.trainable()}
        if not self._initial:
            raise InputError(
                f"no parameter of this {kind} requires a gradient: there is nothing to adapt; "
                "name the parameters that train with trains=, or call requires_grad_() on them"
            )
        for name in head:
            if name not in self._initial:
                raise InputError(
                    f"{name!r} belongs to the head and is frozen: the head must train; let it "
                    "require a gradient, or leave it out of head="
                )
        self._buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        self.facts: dict[str, Any] = {
            "trains": {n: list(v.shape) for n, v in self._initial.items()}
        }

    @property
    def module(self) -> nn.Module:
        """The module that a task's losses are computed with."""
        return self._module

    @property
    def device(self) -> torch.device:
        """The device that the module is on."""
        return next(self.module.parameters()).device

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters that train, in the module's order."""
        return [pair for pair in self.module.named_parameters() if pair[1].requires_grad]

    @property
    def initial_values(self) -> dict[str, Tensor]:
        """The values that every task starts from, by name. MAML and Reptile learn them."""
        return {name: value.to(self.device) for name, value in self._initial.items()}

    def head_names(self) -> list[str]:
        """Names of the parameters that belong to the task rather than to the module."""
        return list(self._head)

    @torch.no_grad()
    def begin(self, task: Task, seed: int) -> None:
        """Put the module where a task starts: initial values and buffers, and no gradients.

        Args:
            task: the task. A learner whose head depends on the task reads it.
            seed: decides everything that is drawn. A plain module draws nothing.
        """
        for name, param in self.trainable():
            param.grad = None
            param.copy_(self._initial[name])
        for name, buffer in self.module.named_buffers():  # such as batch normalisation's averages
            buffer.copy_(self._buffers[name])


class Task:
    """What a learner adapts to: a support loss that it descends, and a query loss that scores it.

    Both functions must compute the loss with the module that they are called with, since second
    order passes a functional copy of the learner's module.

    Args:
        support_loss: ``(module, step) -> loss``, 0-d, a mean over examples. The number of the step,
            from 0, selects a minibatch where there are several.
        query_loss: ``(module, step) -> loss``, 0-d, on examples that are not in the support set.
        metrics: ``module -> {name: value}``, further figures on the query set. The `TaskSource`
            must declare their names.
        loss_unit: the loss of an uninformed guess, above 0. Meta-training divides each task's
            meta-loss by it, so that tasks on different scales count alike.

    Raises:
        InputError: a loss is not a function, or loss_unit is not a positive number.
    """

    def __init__(
        self,
        support_loss: LossFunction,
        query_loss: LossFunction,
        metrics: Callable[[nn.Module], Mapping[str, float]] | None = None,
        loss_unit: float = 1.0,
    ) -> None:
        for name, loss in (("support_loss", support_loss), ("query_loss", query_loss)):
            if not callable(loss):
                raise InputError(
                    f"{name} is of type {type(loss).__name__}: it must be a function (module, "
                    "step) -> loss; pass the function and not its result"
                )
        if not 0 < loss_unit < float("inf"):
            raise InputError(f"loss_unit={loss_unit}: must be positive and finite; 1 is neutral")
        self._support_loss, self._query_loss, self._metrics = support_loss, query_loss, metrics
        self.loss_unit = loss_unit

    def support_loss(self, module: nn.Module, step: int) -> Tensor:
        """The loss that adaptation descends at a step, from 0; 0-d, a mean over examples.

        Raises:
            InputError: the function returned no 0-d tensor, or one without a gradient.
        """
        loss = _checked_loss(self._support_loss(module, step), "support_loss")
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise InputError(
                "support_loss returned a loss that does not depend on a trainable parameter; "
                "compute it with the module that the function is called with, without no_grad()"
            )
        return loss

    def query_loss(self, module: nn.Module, step: int, calibrated: float = 0.0) -> Tensor:
        """The loss that scores the module after a step, from 0; 0-d, a mean over examples.

        Args:
            module: the learner's module, or a functional copy of it.
            step: the number of the step.
            calibrated: the share of the loss that is taken at the best temperature, 0 to 1. Only
                classification has a temperature.

        Raises:
            InputError: the share is above 0 and the task has no temperature, or the function
                returned no 0-d tensor.
        """
        if calibrated:
            raise InputError(
                f"calibrated={calibrated}: {type(self).__name__} has no temperature; leave it at 0"
            )
        return _checked_loss(self._query_loss(module, step), "query_loss")

    @torch.no_grad()
    def scores(self, module: nn.Module, step: int = 0) -> Scores:
        """The figures of the module on the query set, in `eval` mode; "loss" is among them.

        Args:
            module: the learner's module.
            step: the number of the step that it has just taken, from 0, as `query_loss` gets it.
        """
        modes = {part: part.training for part in module.modules()}
        module.eval()
        try:
            metrics = {} if self._metrics is None else self._metrics(module)
            scores = {name: float(value) for name, value in metrics.items()}
            return scores | {"loss": bounded_loss(float(self.query_loss(module, step)))}
        finally:
            for part, training in modes.items():
                part.training = training


class TaskSource:
    """Tasks by number: the same number is always the same task.

    Args:
        make: ``number -> Task``, for numbers from 0 on. The task depends on the number alone.
        learner: the learner that adapts to the tasks.
        metrics: the metrics that the tasks report beside their loss, by name.
        first: the number that `make` gets for number 0.

    Raises:
        InputError: `make` is not a function, `learner` is not a `Learner`, or a metric is tuned by
            one that has no learning rates of its own.
    """

    metrics: Mapping[str, Metric] = MappingProxyType({"loss": Metric()})

    def __init__(
        self,
        make: Callable[[int], Task],
        learner: Learner,
        metrics: Mapping[str, Metric] | None = None,
        first: int = 0,
    ) -> None:
        if not callable(make):
            raise InputError(
                f"tasks is of type {type(make).__name__}: it must be a function number -> Task, "
                "or a TaskSource; for a list of tasks write lambda number: tasks[number % "
                "len(tasks)]"
            )
        require_learner(learner)
        self._make, self._learner, self._first = make, learner, first
        if metrics is not None:
            self.metrics = {**metrics, "loss": Metric()}
        own = [name for name, metric in self.metrics.items() if metric.tuned_by is None]
        for name, metric in self.metrics.items():
            if metric.tuned_by not in (None, *own):
                raise InputError(
                    f"metric {name!r} is tuned by {metric.tuned_by!r}: choose from {', '.join(own)}"
                )

    @property
    def learner(self) -> Learner:
        """The learner that adapts to the tasks, or the first one if there are several."""
        return self._learner

    def learner_of(self, number: int) -> Learner:
        """The learner that adapts to task `number`."""
        return self._learner

    def load(self, number: int) -> Task:
        """Task `number`.

        Raises:
            InputError: the function returned something other than a `Task`.
        """
        task = self._make(self._first + number)
        if not isinstance(task, Task):
            raise InputError(
                f"the task function returned {type(task).__name__} for number "
                f"{self._first + number}: it must return a Task; write return "
                "rnnopt.Task(support_loss, query_loss)"
            )
        return task

    def from_number(self, first: int) -> TaskSource:
        """The same tasks, counted from number `first` on."""
        return _Renumbered(self, first)

    def check_scores(self, scores: Scores) -> None:
        """Make sure that a task reports the metrics that this source declares.

        Raises:
            InputError: a declared metric is missing, or a reported one is not declared.
        """
        for name in scores:
            if name not in self.metrics and name != CALIBRATED:
                raise InputError(
                    f"a task reports the metric {name!r}, which its source does not declare "
                    f"({', '.join(self.metrics)}); declare it: TaskSource(make, learner, "
                    f"metrics={{{name!r}: Metric(higher_is_better=...)}})"
                )
        for name in self.metrics:
            if name not in scores:
                raise InputError(
                    f"the source declares the metric {name!r}, which a task does not report "
                    f"({', '.join(scores)}); return it from Task(metrics=...), or leave it out"
                )


class _Renumbered(TaskSource):
    """The tasks of another source, counted from another number on."""

    def __init__(self, source: TaskSource, first: int) -> None:
        super().__init__(source.load, source.learner, source.metrics, first)
        self._source = source

    def learner_of(self, number: int) -> Learner:
        return self._source.learner_of(self._first + number)


def as_source(
    tasks: Callable[[int], Task] | TaskSource, learner: Learner, first: int = 0
) -> TaskSource:
    """Make a source of a task function; a source is returned as it is.

    Args:
        tasks: ``number -> Task``, or a source.
        learner: the learner that adapts to the tasks.
        first: the number at which the tasks of a function begin.

    Raises:
        InputError: `tasks` is neither, or it is a source of another learner.
    """
    require_learner(learner)
    if not isinstance(tasks, TaskSource):
        return TaskSource(tasks, learner, first=first)
    if tasks.learner is not learner:
        raise InputError(
            "tasks is a TaskSource of another learner than the one that is given; pass the "
            "source's own: source.learner"
        )
    return tasks


def require_learner(learner: object) -> None:
    """Make sure that an argument is a `Learner` and not, for example, its module.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(learner, Learner):
        raise InputError(
            f"learner is of type {type(learner).__name__}: it must be a Learner; write "
            "rnnopt.Learner(module)"
        )


def bounded_loss(loss: float) -> float:
    """The loss, or `DIVERGED_LOSS` if it is larger or NaN."""
    return min(loss, DIVERGED_LOSS) if loss == loss else DIVERGED_LOSS


def _checked_loss(loss: object, name: str) -> Tensor:
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        found = (
            f"a tensor of shape {tuple(loss.shape)}"
            if isinstance(loss, Tensor)
            else f"a value of type {type(loss).__name__}"
        )
        raise InputError(
            f"{name} returned {found}: a loss must be a 0-d tensor, a mean over examples; take "
            "its .mean()"
        )
    return loss
