"""What a run of meta-training learns: the inner rule, initial values, or both."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from rnnopt.errors import InputError
from rnnopt.meta.initial import Init, InitialValues
from rnnopt.meta.unroll import Unrolled, UnrollSettings
from rnnopt.rules.classical import SGD, Adam
from rnnopt.rules.files import SavedRule, load_rule, shipped_rule
from rnnopt.rules.lstm import CoordinateLSTM
from rnnopt.rules.meta_sgd import MetaSGD
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.start import Adapted, Head, Start
from rnnopt.tasks.text.tasks import Task

InnerRule = Literal["lstm", "sgd", "meta-sgd", "adam"]
Learn = Literal["all", "growth"]
SHIPPED = "shipped"  # the word for the shipped rule of what trains, as the origin of a new one
HIDDEN_SIZE = 8  # of a new LSTM
INNER_LR: dict[InnerRule, float] = {"lstm": 0.75, "sgd": 0.1, "meta-sgd": 0.1, "adam": 1e-3}


@dataclass(frozen=True)
class LearnedSettings:
    """What is learned, and how tasks start.

    Attributes:
        inner: the inner rule; the LSTM and Meta-SGD are meta-trained, SGD and Adam have no weights.
        inner_lr: its step size, at first (of the LSTM its initial_decrease); None for `INNER_LR`.
        learn: ``"growth"`` leaves directions and step sizes Adam's and learns the growth of tensors
            alone, see `rnnopt.rules.lstm.CoordinateLSTM`.
        origin: the LSTM that meta-training begins with, a rule file, a run's folder or `SHIPPED`;
            None for a fresh one.
        init: which initial values: pretrained ones, or such as are meta-learned, see
            `rnnopt.meta.initial`; ``"maml"`` by their meta-gradient of either order, ``"reptile"`` by
            Reptile's, which the meta-optimizer takes for one, as Nichol et al. 2018 propose.
        init_lr: the meta-optimizer's learning rate on them.
        init_penalty: see `rnnopt.meta.initial.InitialValues.add_penalty`.
        head: how each task's output layer begins, see `rnnopt.tasks.text.start.Start`.
        adapted: what the inner loop steps, see there.
    """

    inner: InnerRule = "lstm"
    inner_lr: float | None = None
    learn: Learn = "all"
    origin: str | None = None
    init: Init = "pretrained"
    init_lr: float = 1e-4
    init_penalty: float = 0.0
    head: Head = "random"
    adapted: Adapted = "all"

    def __post_init__(self) -> None:
        for name in ("inner_lr", "init_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name}={value}: must be positive and finite")
        if not 0 <= self.init_penalty < math.inf:
            raise InputError(f"init_penalty={self.init_penalty}: must be finite and at least 0")
        if self.origin is not None and (self.inner != "lstm" or self.inner_lr is not None):
            raise InputError(
                f"--from {self.origin} with --inner or --inner-lr: a rule brings both; leave them "
                "out, or --from"
            )
        if self.learn == "growth" and self.inner != "lstm":
            raise InputError(f"--learn growth with --inner {self.inner}: of the LSTM only")
        if self.init == "pretrained" and self.inner in ("sgd", "adam"):
            raise InputError(
                f"--inner {self.inner} with --init pretrained: neither has anything to learn; "
                "use --inner lstm or meta-sgd, or --init maml or reptile"
            )
        if self.init == "pretrained" and self.adapted == "head":
            raise InputError(
                "--adapt-only head with --init pretrained: nothing but the head would ever "
                "move; use --tune head, or --init maml"
            )
        if self.init == "reptile" and self.adapted == "head":
            raise InputError(
                "--init reptile with --adapt-only head: it moves initial values to where "
                "adaptation ends, and those would stay where they are; use --init maml"
            )

    def unrolled(self, unroll: UnrollSettings) -> UnrollSettings:
        """An unroll's settings with what the initial values need.

        Raises:
            InputError: an order or a truncation that they can't be learned with.
        """
        kinds: dict[str, Literal["gradient", "displacement"] | None] = {
            "pretrained": None, "maml": "gradient", "reptile": "displacement",
        }  # fmt: skip
        return replace(unroll, initial=kinds[self.init])

    @property
    def start(self) -> Start:
        """How tasks start, from the pretrained values."""
        return Start(self.head, self.adapted)

    def origin_path(self, classifier: Classifier) -> Path | None:
        """The rule file that `origin` means where this classifier is adapted."""
        if self.origin == SHIPPED:
            return shipped_rule(self.start.params(classifier).values())
        return None if self.origin is None else Path(self.origin)


class Learned(nn.Module):
    """The inner rule and the initial values as one module.

    Args:
        settings: see `LearnedSettings`.
        classifier: what tasks adapt.
        hidden_size: of the LSTM; None: that of the rule that it begins with, else 8.
        seed: of its weights; the global random state is left alone.

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
        classifier: Classifier,
        hidden_size: int | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.start = settings.start
        self.rule = self._inner_rule(classifier, hidden_size, seed)
        if settings.learn == "growth" and isinstance(self.rule, CoordinateLSTM):
            self.rule = self.rule.growth_only()
        self.init = None if settings.init == "pretrained" else InitialValues(classifier)
        if self.init is not None:
            self.start = replace(self.start, values=self.init.values())

    def _inner_rule(self, classifier: Classifier, hidden_size: int | None, seed: int) -> SavedRule:
        inner = self.settings.inner
        lr = INNER_LR[inner] if self.settings.inner_lr is None else self.settings.inner_lr
        if inner == "sgd":
            return SGD(lr)
        if inner == "adam":
            return Adam(lr)
        if inner == "meta-sgd":
            return MetaSGD(list(self.start.params(classifier)), lr)
        path = self.settings.origin_path(classifier)
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

    def accumulate(self, result: Unrolled, classifier: Classifier, task: Task) -> None:
        """Add what an unroll says of the initial values to their meta-gradient.

        Args:
            result: of the unroll.
            classifier: at the task's start.
            task: the task.
        """
        if self.init is not None:
            self.init.add(result.initial)
            if self.settings.init == "maml" and self.settings.head == "prototype":
                self.init.add_through_head(result.initial, classifier, task)

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


def _free(module: nn.Module) -> list[nn.Parameter]:
    """The weights that are learned."""
    return [weight for weight in module.parameters() if weight.requires_grad]
