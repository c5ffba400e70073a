"""Where adaptation to a task starts: the initial values, and the parameters that are stepped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from rnnopt.errors import InputError
from rnnopt.optim.optimizer import LearnedOptimizer
from rnnopt.rules.meta_sgd import MetaSGD
from rnnopt.rules.protocol import UpdateRule
from rnnopt.storage.files import save_tensors
from rnnopt.tasks.protocol import Learner, Task

Adapted = Literal["all", "head"]
VALUES_FILE = "values.safetensors"


def rule_optimizer(
    params: Mapping[str, nn.Parameter], rule: UpdateRule, lr: float = 1.0
) -> LearnedOptimizer:
    """The optimizer that steps parameters by a rule.

    Args:
        params: the parameters by name.
        rule: the rule.
        lr: the factor that multiplies the rule's steps, dimensionless.

    Raises:
        InputError: a `MetaSGD` was made for other parameters.
    """
    optimizer = LearnedOptimizer(list(params.values()), rule, lr=lr)
    if isinstance(rule, MetaSGD):
        rule.assign(optimizer, dict(params))
    return optimizer


@dataclass(frozen=True)
class Start:
    """How adaptation starts on every task of a run.

    Attributes:
        adapted: the parameters that are stepped: ``"all"`` that train, or the ``"head"`` only
            (ANIL, Raghu et al. 2020, arXiv:1909.09157).
        values: initial values by name, which replace those of the learner. A parameter without a
            value here keeps the learner's. None replaces nothing.

    Raises:
        InputError: `adapted` is something else.
    """

    adapted: Adapted = "all"
    values: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.adapted not in get_args(Adapted):
            raise InputError(f"adapted={self.adapted!r}: must be 'all' or 'head'")

    def begin(self, learner: Learner, task: Task, seed: int) -> None:
        """Put the learner where this task starts. Build the optimizer afterwards.

        Args:
            learner: the learner, see `Learner.begin`.
            task: the task.
            seed: decides everything that is drawn.

        Raises:
            InputError: an initial value has another shape than its parameter.
        """
        learner.begin(task, seed)
        with torch.no_grad():
            for name, param in learner.trainable():
                value = None if self.values is None else self.values.get(name)
                if value is None:
                    continue
                if value.shape != param.shape:
                    raise InputError(
                        f"the initial value of {name!r} has shape {tuple(value.shape)}, its "
                        f"parameter {tuple(param.shape)}; take values that were learned for this "
                        "module"
                    )
                param.copy_(value)

    def optimizer(self, learner: Learner, rule: UpdateRule, lr: float = 1.0) -> LearnedOptimizer:
        """The optimizer for this task.

        Args:
            learner: the learner, after `begin`.
            rule: the inner rule.
            lr: the factor that multiplies the rule's steps, dimensionless.

        Raises:
            InputError: a `MetaSGD` was made for other parameters, or there is no head to adapt.
        """
        return rule_optimizer(self.params(learner), rule, lr)

    def params(self, learner: Learner) -> dict[str, nn.Parameter]:
        """The parameters that are stepped, by name.

        Raises:
            InputError: only the head is adapted and the learner has none.
        """
        params = dict(learner.trainable())
        if self.adapted == "all":
            return params
        head = learner.head_names()
        if not head:
            raise InputError(
                "adapted='head': this learner has no head; name its parameters, "
                "Learner(module, head=[...]), or use adapted='all'"
            )
        return {name: params[name] for name in head}

    def gradient_through(
        self, learner: Learner, task: Task, gradient: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The part of the meta-gradient that reaches the initial values through other values.

        A subclass that computes starting values from the initial values, such as a prototype head,
        returns the gradient through that computation.

        Args:
            learner: the learner, at the task's start.
            task: the task.
            gradient: the task's meta-gradient of every starting value, by name.

        Returns:
            The part of the meta-gradient to add, by name. Here it is empty.
        """
        return {}

    def save(self, folder: Path, learner: Learner, training: Mapping[str, Any]) -> None:
        """Write the initial values into a folder, as ``values.safetensors``.

        Args:
            folder: the folder. A file that is already there is replaced.
            learner: the learner whose initial values they are.
            training: JSON-compatible facts on the meta-training.

        Raises:
            InputError: the file can't be written.
        """
        about = {"facts": learner.facts, "adapted": self.adapted, "training": dict(training)}
        save_tensors(folder / VALUES_FILE, dict(self.values or {}), about)
