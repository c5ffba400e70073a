"""What meta-learning adapts: a `Learner`, the `Task` that it adapts to, and a `TaskSource`.

Anything that has a loss can be adapted. Meta-training, learned initial values and comparison know
these three classes and nothing of texts. For a plain `torch.nn.Module` they are used as they are;
a field of its own, such as text classification, subclasses them.

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

# (the module to run, the step's number from 0) -> mean loss of a set, 0-d
LossFunction = Callable[[nn.Module, int], Tensor]
# Figures of a module on a task's query set by name; "loss" is always among them.
Scores = dict[str, float]

# A run that ended in NaN or beyond counts as this much: JSON has no infinity, and means need one.
DIVERGED_LOSS = 1e3
# Which numbers of a task function belong to which part: no task is used for two purposes.
VALIDATION_TASKS, TEST_TASKS = 1_000_000, 2_000_000


@dataclass(frozen=True)
class Metric:
    """A figure that tasks are judged by.

    Attributes:
        higher_is_better: whether a larger value is a better one.
        tuned_by: the metric by which learning rates are chosen where this one is reported; None
            means this one.
    """

    higher_is_better: bool = False
    tuned_by: str | None = None


class Learner:
    """A module, which of its parameters train, and how a task starts.

    Args:
        module: the module; its values at this moment are its initial values.
        head: names of the parameters that belong to the task rather than to the module, such as an
            output layer. They are adapted in ANIL, where nothing else is.
        trains: names of the parameters that train; None means all that require a gradient.

    Attributes:
        family: names the kind of training; tasks of several families can be mixed.
        facts: JSON-compatible facts that two learners with the same trainable parameters share.

    Raises:
        InputError: nothing trains, or a name is not that of a parameter.
    """

    family: str = "all"

    def __init__(
        self, module: nn.Module, *, head: Sequence[str] = (), trains: Sequence[str] | None = None
    ) -> None:
        self._module, self._head = module, tuple(head)
        params = dict(module.named_parameters())
        for name in [*head, *(trains or ())]:
            if name not in params:
                raise InputError(
                    f"{name!r} is no parameter of this {type(module).__name__}; it has "
                    f"{', '.join(list(params)[:5])}, ..."
                )
        if trains is not None:
            for name, param in params.items():
                param.requires_grad_(name in trains)
        self._initial = {name: param.detach().clone() for name, param in self.trainable()}
        if not self._initial:
            raise InputError(
                f"no parameter of this {type(module).__name__} requires a gradient: there is "
                "nothing to adapt"
            )
        self.facts: dict[str, Any] = {
            "trains": {n: list(v.shape) for n, v in self._initial.items()}
        }

    @property
    def module(self) -> nn.Module:
        """What the losses of a task are computed with."""
        return self._module

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return next(self.module.parameters()).device

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters that train, in the module's order."""
        return [pair for pair in self.module.named_parameters() if pair[1].requires_grad]

    @property
    def initial_values(self) -> dict[str, Tensor]:
        """The values that every task starts from, by name: what MAML can learn."""
        return dict(self._initial)

    def head_names(self) -> list[str]:
        """Names of the parameters that belong to the task rather than to the module."""
        return list(self._head)

    @torch.no_grad()
    def begin(self, task: Task, seed: int) -> None:
        """Put the module where a task starts: initial values, no gradients.

        Args:
            task: the task; fields whose head depends on it read it.
            seed: decides what is drawn. A plain module draws nothing.
        """
        for name, param in self.trainable():
            param.grad = None
            param.copy_(self._initial[name])


class Task:
    """What a learner adapts to: a support loss to descend, and a query loss to be judged by.

    Args:
        support_loss: ``(module, step) -> loss``; the step's number, from 0, lets minibatches take
            turns.
        query_loss: ``(module, step) -> loss`` on examples that are not in the support set.
        metrics: ``module -> {name: value}`` on the query set, beside its loss.

    Attributes:
        loss_unit: the loss of a guess; meta-losses of different tasks are divided by it.
    """

    def __init__(
        self,
        support_loss: LossFunction,
        query_loss: LossFunction,
        metrics: Callable[[nn.Module], Mapping[str, float]] | None = None,
        loss_unit: float = 1.0,
    ) -> None:
        self._support_loss, self._query_loss, self._metrics = support_loss, query_loss, metrics
        self.loss_unit = loss_unit

    def support_loss(self, module: nn.Module, step: int) -> Tensor:
        """The loss that adaptation descends at a step, from 0; 0-d, a mean over examples."""
        return self._support_loss(module, step)

    def query_loss(self, module: nn.Module, step: int, calibrated: float = 0.0) -> Tensor:
        """The loss that judges the module after a step, from 0; 0-d, a mean over examples.

        Args:
            module: the module, or a functional copy.
            step: the step's number.
            calibrated: share of the loss that is taken at the best temperature, 0 to 1; only
                classification has one.

        Raises:
            InputError: a share above 0 where there is no temperature.
        """
        if calibrated:
            raise InputError(
                f"calibrated={calibrated}: {type(self).__name__} has no temperature; leave it at 0"
            )
        return self._query_loss(module, step)

    @torch.no_grad()
    def scores(self, module: nn.Module) -> Scores:
        """Figures of the module as it stands on the query set; "loss" is among them."""
        training = module.training
        module.eval()
        scores = {"loss": bounded_loss(float(self._query_loss(module, 0)))}
        if self._metrics is not None:
            scores |= {name: float(value) for name, value in self._metrics(module).items()}
        module.train(training)
        return scores


class TaskSource:
    """Tasks by number: the same number is always the same task.

    Args:
        make: ``number -> Task``, for numbers from 0 on; a function of the number alone.
        learner: what the tasks adapt.
        metrics: the metrics that the tasks report beside their loss.
        first: the number that number 0 stands for.
    """

    metrics: Mapping[str, Metric] = MappingProxyType({"loss": Metric()})

    def __init__(
        self,
        make: Callable[[int], Task],
        learner: Learner,
        metrics: Mapping[str, Metric] | None = None,
        first: int = 0,
    ) -> None:
        self._make, self._learner, self._first = make, learner, first
        if metrics is not None:
            self.metrics = {**metrics, "loss": Metric()}

    @property
    def learner(self) -> Learner:
        """What the tasks adapt; the first, where there are several."""
        return self._learner

    def learner_of(self, number: int) -> Learner:
        """What task `number` adapts."""
        return self._learner

    def load(self, number: int) -> Task:
        """Task `number`."""
        return self._make(self._first + number)


def bounded_loss(loss: float) -> float:
    """At most `DIVERGED_LOSS`, which stands for NaN too."""
    return min(loss, DIVERGED_LOSS) if loss == loss else DIVERGED_LOSS
