"""Where adaptation to a task starts: its initial values, and what of the learner is stepped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rnnopt.optim.optimizer import LearnedOptimizer
from rnnopt.rules.meta_sgd import MetaSGD
from rnnopt.rules.protocol import UpdateRule
from rnnopt.storage.files import save_tensors
from rnnopt.tasks.protocol import Learner, Task

Adapted = Literal["all", "head"]
VALUES_FILE = "values.safetensors"


@dataclass(frozen=True)
class Start:
    """How every task of a run starts.

    Attributes:
        adapted: what is stepped: all that trains, or of it only the head (ANIL, Raghu et al. 2020,
            arXiv:1909.09157).
        values: initial values, by name, in place of the learner's own; None leaves those.
    """

    adapted: Adapted = "all"
    values: Mapping[str, Tensor] | None = None

    def begin(self, learner: Learner, task: Task, seed: int) -> None:
        """Put the learner where this task starts; build the optimizer afterwards.

        Args:
            learner: see `Learner.begin`.
            task: the task.
            seed: decides what is drawn.
        """
        learner.begin(task, seed)
        with torch.no_grad():
            if self.values is not None:
                for name, param in learner.trainable():
                    if name in self.values:
                        param.copy_(self.values[name])

    def optimizer(self, learner: Learner, rule: UpdateRule, lr: float = 1.0) -> LearnedOptimizer:
        """The optimizer of this task.

        Args:
            learner: after `begin`.
            rule: the inner rule.
            lr: multiplies its steps.

        Raises:
            InputError: a `MetaSGD` that doesn't know the learner's parameters.
        """
        params = self.params(learner)
        optimizer = LearnedOptimizer(list(params.values()), rule, lr=lr)
        if isinstance(rule, MetaSGD):
            rule.assign(optimizer, params)
        return optimizer

    def params(self, learner: Learner) -> dict[str, nn.Parameter]:
        """What is stepped, by name."""
        params = dict(learner.trainable())
        if self.adapted == "head":
            return {name: params[name] for name in learner.head_names()}
        return params

    def gradient_through(
        self, learner: Learner, task: Task, gradient: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What reaches the initial values through values that the start makes out of them.

        Args:
            learner: at the task's start.
            task: the task.
            gradient: the task's meta-gradient of every starting value, by name.

        Returns:
            The part of the meta-gradient to add, by name; empty where the start makes nothing.
        """
        return {}

    def save(self, folder: Path, learner: Learner, training: Mapping[str, Any]) -> None:
        """Write the initial values into a folder, as safetensors.

        Args:
            folder: where to; replaced if it is there.
            learner: whose values they are.
            training: JSON-compatible facts on the meta-training.

        Raises:
            InputError: it can't be written.
        """
        about = {"facts": learner.facts, "adapted": self.adapted, "training": dict(training)}
        save_tensors(folder / VALUES_FILE, dict(self.values or {}), about)
