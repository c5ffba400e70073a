"""What a run of meta-training learns: the inner rule, initial values, or both.

Initial values (MAML, its first-order kind, ANIL, Reptile) are those of all that trains but the
output layer of a classifier: its rows are a task's classes, which differ in number and in order
from task to task. Each task begins with an output layer of its own, see `Start`.
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
from rnnopt.rules.lstm import CoordinateLSTM
from rnnopt.rules.meta_sgd import MetaSGD
from rnnopt.tasks.protocol import Learner, Task

HIDDEN_SIZE = 8  # of a new LSTM
INNER_LR: dict[InnerRule, float] = {"lstm": 0.75, "sgd": 0.1, "meta-sgd": 0.1, "adam": 1e-3}


class Learned(nn.Module):
    """The inner rule and the initial values as one module.

    Args:
        settings: see `LearnedSettings`.
        learner: what tasks adapt.
        hidden_size: of the LSTM; None: that of the rule that it begins with, else 8.
        seed: of its weights; the global random state is left alone.
        rule: the inner rule itself, in place of the one that the settings name.

    Attributes:
        rule: the inner rule.
        init: the initial values, or None where they stay the pretrained ones.
        start: how a task starts, from these values as they are at the moment.

    Raises:
        InputError: initial values are to be learned and there are none.
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
        if settings.learn == "growth" and isinstance(self.rule, CoordinateLSTM):
            self.rule = self.rule.growth_only()
        self.init = None if settings.init == "pretrained" else InitialValues(learner)
        if self.init is not None:
            self.start = replace(self.start, values=self.init.values())

    def _inner_rule(self, learner: Learner, hidden_size: int | None, seed: int) -> SavedRule:
        inner = self.settings.inner
        lr = INNER_LR[inner] if self.settings.inner_lr is None else self.settings.inner_lr
        if inner == "sgd":
            return SGD(lr)
        if inner == "adam":
            return Adam(lr)
        if inner == "meta-sgd":
            return MetaSGD(list(self.start.params(learner)), lr)
        path = self.settings.origin_path(learner)
        if path is not None:
            return self._original(path, hidden_size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            units = HIDDEN_SIZE if hidden_size is None else hidden_size
            return CoordinateLSTM(hidden_size=units, initial_decrease=lr)

    def _original(self, path: Path, hidden_size: int | None) -> SavedRule:
        """The rule to begin with, ready to be trained."""
        rule, origin = load_rule(path), self.settings.origin
        if not isinstance(rule, CoordinateLSTM):
            raise InputError(f"--from {origin}: holds {type(rule).__name__}, expected an LSTM")
        if hidden_size not in (None, rule.hidden_size):
            raise InputError(
                f"--from {origin}: has {rule.hidden_size} hidden units, not {hidden_size}; leave "
                "--hidden-size out"
            )
        return rule.requires_grad_(True).train()

    def groups(self, meta_lr: float) -> list[dict[str, Any]]:
        """The meta-optimizer's groups, each with its highest learning rate as ``peak``."""
        groups = [{"params": _free(self.rule), "peak": meta_lr}]
        if self.init is not None:
            groups.append({"params": list(self.init.parameters()), "peak": self.settings.init_lr})
        return groups

    def accumulate(self, result: Unrolled, learner: Learner, task: Task) -> None:
        """Add what an unroll says of the initial values to their meta-gradient.

        Args:
            result: of the unroll.
            learner: at the task's start.
            task: the task.
        """
        if self.init is not None:
            self.init.add(result.initial)
            if self.settings.init == "maml":
                self.init.add(self.start.gradient_through(learner, task, result.initial))

    def clip(self, bound: float) -> float:
        """Bound a task's meta-gradient of rule and values, each by itself.

        Their scales differ: one bound on both would let the larger silence the smaller.

        Args:
            bound: on either norm.

        Returns:
            The norm of all of it before.
        """
        parts = [self.rule] if self.init is None else [self.rule, self.init]
        norms = [nn.utils.clip_grad_norm_(_free(part), bound) for part in parts]
        return math.hypot(*map(float, norms))

    def add_penalty(self) -> None:
        """Add the penalty on the initial values to the meta-gradient."""
        if self.init is not None and self.settings.init_penalty:
            self.init.add_penalty(self.settings.init_penalty)

    def report(self) -> dict[str, float]:
        """For the log: ``init_distance``, how far the values are from the pretrained ones."""
        return {} if self.init is None else {"init_distance": self.init.distance()}


class InitialValues(nn.Module):
    """A learner's initial values as parameters of the meta-optimizer.

    Args:
        learner: whose values they are at first.

    Raises:
        InputError: nothing trains but what belongs to each task.
    """

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self._pretrained = learner.initial_values
        if not self._pretrained:
            raise InputError(
                "--init: of this classifier only the output layer trains, and every task has one "
                "of its own: there are no initial values to learn; use --tune lora or full"
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

        L2-SP (Li, Grandvalet & Davoine 2018, arXiv:1802.01483): what few classes teach the initial
        values should not cost what pretraining did.
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
    """A module's parameters may have no dots in their names."""
    return name.replace(".", "/")


def _free(module: nn.Module) -> list[nn.Parameter]:
    """The weights that are learned."""
    return [weight for weight in module.parameters() if weight.requires_grad]
