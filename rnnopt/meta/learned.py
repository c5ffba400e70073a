"""What a run of meta-training learns: the inner rule, initial values, or both.

The initial values (of MAML, first-order MAML, ANIL or Reptile) are those in
`Learner.initial_values`. A text classifier's output layer is not among them: its rows are the
classes of a task, whose number and order differ between tasks, so each task starts with an output
layer of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rnnopt.errors import InputError
from rnnopt.meta.settings import InnerRule, LearnedSettings
from rnnopt.meta.unroll import Unrolled
from rnnopt.rules.classical import SGD, Adam
from rnnopt.rules.files import SavedRule, load_rule
from rnnopt.rules.meta_sgd import MetaSGD
from rnnopt.rules.two_level import TwoLevelLSTM
from rnnopt.tasks.protocol import Learner, Task

INNER_LR: dict[InnerRule, float] = {"sgd": 0.1, "meta-sgd": 0.1, "adam": 1e-3}


class Learned(nn.Module):
    """The inner rule and the initial values as one module.

    Args:
        settings: see `LearnedSettings`.
        learner: the learner that adapts to the tasks.
        hidden_size: the number of hidden units of the coordinate-wise LSTM. None takes that of the
            rule that meta-training begins with, or of `TwoLevelLSTM` for a new rule.
        seed: decides the weights of a new rule. The global random state does not change.
        rule: the inner rule, which replaces the one that the settings name.

    Attributes:
        rule: the inner rule.
        init: the initial values; None if they stay the pretrained ones.
        start: how a task starts; its values are the present initial values.

    Raises:
        InputError: there is nothing to learn, or the rule of `LearnedSettings.origin` can't be
            used.
    """

    def __init__(
        self,
        settings: LearnedSettings,
        learner: Learner,
        hidden_size: int | None,
        seed: int,
        rule: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.start = settings.start
        if rule is not None and settings.init == "pretrained" and not _free(rule):
            raise InputError(
                f"{type(rule).__name__} has no weights that take a gradient, and the initial "
                "values stay as they are: there is nothing to learn; give a rule with weights, or "
                'initial="maml" or "reptile"'
            )
        self.rule: Any = self._inner_rule(learner, hidden_size, seed) if rule is None else rule
        self.init = None if settings.init == "pretrained" else InitialValues(learner)
        if self.init is not None:
            self.start = replace(self.start, values=self.init.values())

    def _inner_rule(self, learner: Learner, hidden_size: int | None, seed: int) -> SavedRule:
        inner = self.settings.inner
        if inner == "lstm":
            path = self.settings.origin_path
            if path is not None:
                return self._original(path, hidden_size)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return TwoLevelLSTM(
                    **{} if hidden_size is None else {"coordinate_units": hidden_size}
                )
        lr = INNER_LR[inner] if self.settings.inner_lr is None else self.settings.inner_lr
        if inner == "sgd":
            return SGD(lr)
        if inner == "adam":
            return Adam(lr)
        return MetaSGD(list(self.start.params(learner)), lr)

    def _original(self, path: Path, hidden_size: int | None) -> SavedRule:
        """The rule that meta-training begins with, with trainable weights."""
        rule, origin = load_rule(path), self.settings.origin
        if not isinstance(rule, TwoLevelLSTM):
            raise InputError(f"--from {origin}: holds {type(rule).__name__}, expected an LSTM")
        if hidden_size not in (None, rule.coordinate_units):
            raise InputError(
                f"--from {origin}: has {rule.coordinate_units} hidden units, not {hidden_size}; "
                "leave --hidden-size out"
            )
        return rule.requires_grad_(True).train()

    def groups(self, meta_lr: float) -> list[dict[str, Any]]:
        """The meta-optimizer's param groups, each with its highest learning rate as ``peak``."""
        groups = [{"params": _free(self.rule), "peak": meta_lr}]
        if self.init is not None:
            groups.append({"params": list(self.init.parameters()), "peak": self.settings.init_lr})
        return groups

    def accumulate(self, result: Unrolled, learner: Learner, task: Task) -> None:
        """Add the result of an unroll to the meta-gradient of the initial values.

        Args:
            result: the result of the unroll.
            learner: the learner, at the task's start.
            task: the task.
        """
        if self.init is not None:
            self.init.add(result.initial)
            if self.settings.init == "maml":
                self.init.add(self.start.gradient_through(learner, task, result.initial))

    def clip(self, bound: float) -> float:
        """Clip a task's meta-gradients of the rule and of the initial values, separately.

        Their scales differ. With one norm for both, the larger gradient would shrink the smaller.

        Args:
            bound: the largest norm of either.

        Returns:
            The norm of both together before clipping.
        """
        parts = [self.rule] if self.init is None else [self.rule, self.init]
        norms = [nn.utils.clip_grad_norm_(_free(part), bound) for part in parts]
        return math.hypot(*map(float, norms))

    def add_penalty(self) -> None:
        """Add the penalty on the initial values to the meta-gradient."""
        if self.init is not None and self.settings.init_penalty:
            self.init.add_penalty(self.settings.init_penalty)

    def report(self) -> dict[str, float]:
        """For the log: ``init_distance``, the distance of the values from the pretrained ones."""
        return {} if self.init is None else {"init_distance": self.init.distance()}


class InitialValues(nn.Module):
    """A learner's initial values as parameters of the meta-optimizer.

    Args:
        learner: the learner whose initial values they are at first.

    Raises:
        InputError: the learner has no initial values, because only an output layer trains.
    """

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self._pretrained = learner.initial_values
        if not self._pretrained:
            raise InputError(
                "--init: only the output layer trains, and every task has one of its own: there "
                "are no initial values to learn; use --tune lora or full"
            )
        for name, value in self._pretrained.items():
            self.register_parameter(_key(name), nn.Parameter(value.clone()))

    def values(self) -> dict[str, Tensor]:
        """The parameters by their names in the learner's module."""
        return {name: self.get_parameter(_key(name)) for name in self._pretrained}

    def add(self, gradient: Mapping[str, Tensor]) -> None:
        """Add one task's meta-gradient, by name; see `UnrollSettings.initial`."""
        for name, value in self.values().items():
            if name in gradient:
                _add(value, gradient[name])

    @torch.no_grad()
    def add_penalty(self, strength: float) -> None:
        """Add the gradient of ``strength / 2 * |theta_0 - pretrained|^2``.

        The source is L2-SP (Li, Grandvalet & Davoine 2018, arXiv:1802.01483). The penalty keeps
        what pretraining has learned when the initial values are learned from few classes.
        """
        for name, value in self.values().items():
            _add(value, strength * (value - self._pretrained[name]))

    @torch.no_grad()
    def distance(self) -> float:
        """|theta_0 - pretrained|, the Euclidean norm over all values."""
        return float(norm(value - self._pretrained[name] for name, value in self.values().items()))


def norm(tensors: Iterable[Tensor]) -> Tensor:
    """The Euclidean norm over all elements."""
    norms = [torch.linalg.vector_norm(tensor) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms))


def _add(value: Tensor, gradient: Tensor) -> None:
    value.grad = gradient.clone() if value.grad is None else value.grad + gradient


def _key(name: str) -> str:
    """The name without dots, which torch does not allow in the name of a parameter."""
    return name.replace(".", "/")


def _free(module: nn.Module) -> list[nn.Parameter]:
    """The weights that require a gradient."""
    return [weight for weight in module.parameters() if weight.requires_grad]
