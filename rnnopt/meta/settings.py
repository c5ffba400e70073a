"""The settings of meta-training: the unroll, what is learned, and the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from rnnopt.errors import InputError
from rnnopt.rules.files import SHIPPED_RULE
from rnnopt.tasks.protocol import Learner
from rnnopt.tasks.requirement import Requirement
from rnnopt.tasks.start import Start

Init = Literal["pretrained", "maml", "reptile"]
InnerRule = Literal["lstm", "sgd", "meta-sgd", "adam", "given"]
VALIDATED = ("accuracy", "loss")  # the metrics of a validation, after each step
SHIPPED = "shipped"  # the value of `LearnedSettings.origin` that stands for the shipped rule


@dataclass(frozen=True)
class UnrollSettings:
    """How an unroll is run, and how its meta-loss is weighted.

    Attributes:
        steps: T, the number of adaptation steps.
        order: 1 treats everything that the rule is fed as a constant in the meta-gradient. 2
            differentiates through it with `higher` and gives the exact meta-gradient.
        truncation: the number of steps after which the graph is cut (truncated backpropagation
            through time); None never cuts it. Memory grows with the truncation and not with T.
        query_weight: the weight of the query loss in the meta-loss.
        support_weight: the weight of the support loss in the meta-loss.
        step_weights: the weight of each of the T steps; None gives every step the weight 1.
        initial: what an unroll returns for the initial values theta_0. These are the values of all
            parameters of the model that require a gradient, including those that the optimizer does
            not step (ANIL, Raghu et al. 2020). ``"gradient"``: the meta-gradient. With order 2 it
            is exact (MAML, Finn et al. 2017, arXiv:1703.03400). With order 1 it is the sum over
            steps of the meta-loss's gradient at theta_t, where d theta_t / d theta_0 is taken to be
            the identity; this is first-order MAML if only the last step has a weight.
            ``"displacement"``: theta_0 - theta_T (Reptile, Nichol et al. 2018, arXiv:1803.02999),
            which is 0 for parameters that the optimizer does not step. None: nothing.
    """

    steps: int
    order: int = 1
    truncation: int | None = None
    query_weight: float = 1.0
    support_weight: float = 0.0
    step_weights: Sequence[float] | None = None
    initial: Literal["gradient", "displacement"] | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps={self.steps}: must be at least 1")
        if self.order not in (1, 2):
            raise InputError(f"order={self.order}: must be 1 or 2")
        if self.truncation is not None and self.truncation < 1:
            raise InputError(f"truncation={self.truncation}: must be at least 1, or None")
        if self.initial not in (None, "gradient", "displacement"):
            raise InputError(
                f"initial={self.initial!r}: must be 'gradient', 'displacement' or None"
            )
        if self.initial == "displacement" and self.order == 2:
            raise InputError(
                "initial='displacement' (Reptile) with order 2: Reptile takes no derivative of a "
                "step; use order 1"
            )
        if self.initial == "gradient" and self.order == 2 and self.kept_steps < self.steps:
            raise InputError(
                f"truncation={self.truncation} of {self.steps} steps: with order 2 the "
                "initial values would get no gradient from the steps after a cut; leave truncation "
                "out, or use order 1"
            )
        if self.step_weights is not None and len(self.step_weights) != self.steps:
            raise InputError(
                f"{len(self.step_weights)} step_weights for {self.steps} steps: give one for each "
                "step"
            )
        for name, weights in (
            ("query_weight and support_weight", (self.query_weight, self.support_weight)),
            ("step_weights", self.step_weights or (1.0,)),
        ):
            if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
                raise InputError(
                    f"{name} {tuple(weights)}: must be finite, at least 0, and not all 0"
                )

    def shortened(self, steps: int) -> UnrollSettings:
        """The same with the first `steps` steps only."""
        weights = None if self.step_weights is None else self.step_weights[:steps]
        return replace(self, steps=steps, step_weights=weights)

    def thinned(self, share: float, generator: np.random.Generator) -> UnrollSettings:
        """The same with the meta-loss taken after a random share of the steps only.

        The weights of the chosen steps are divided by the share, so that the meta-loss keeps its
        expected value. The last step is always among them, with its own weight.

        Args:
            share: probability that a step is chosen, above 0 and at most 1.
            generator: draws the steps.
        """
        if share == 1:
            return self
        drawn = generator.random(self.steps - 1) < share
        weights = [self.weight(t) * float(kept) / share for t, kept in enumerate(drawn)]
        return replace(self, step_weights=[*weights, self.weight(self.steps - 1)])

    def weight(self, step: int) -> float:
        """Weight of the losses after step number `step` (from 0)."""
        return 1.0 if self.step_weights is None else self.step_weights[step]

    @property
    def kept_steps(self) -> int:
        """The longest run of steps whose graph is held at once."""
        return min(self.truncation or self.steps, self.steps)

    def cut_after(self, step: int) -> bool:
        """Whether the graph ends after step number `step` (from 0)."""
        done = step + 1
        return done == self.steps or (self.truncation is not None and done % self.truncation == 0)


@dataclass(frozen=True)
class LearnedSettings:
    """What is learned, and how tasks start.

    Attributes:
        inner: the inner rule. The LSTM and Meta-SGD are meta-trained; SGD and Adam have no weights.
            ``"given"`` stands for a rule object that is passed to the run.
        inner_lr: the step size that SGD, Adam or Meta-SGD begins with. None takes the rule's entry
            in `rnnopt.meta.learned.INNER_LR`. The LSTM has none.
        origin: the LSTM that meta-training begins with: a rule file, the folder of a run, or
            `SHIPPED`. None begins with a new one.
        init: the initial values. ``"pretrained"`` keeps those of the learner. ``"maml"`` learns
            them with their meta-gradient, of either order. ``"reptile"`` learns them with the
            displacement of Reptile in place of a gradient, as Nichol et al. 2018 propose. See
            `rnnopt.meta.learned.InitialValues`.
        init_lr: the meta-optimizer's learning rate for the initial values.
        init_penalty: strength of the penalty on their distance from the pretrained values, see
            `rnnopt.meta.learned.InitialValues.add_penalty`.
        start: how every task starts, from the learner's own initial values.
    """

    inner: InnerRule = "lstm"
    inner_lr: float | None = None
    origin: str | None = None
    init: Init = "pretrained"
    init_lr: float = 1e-4
    init_penalty: float = 0.0
    start: Start = field(default_factory=Start)

    def __post_init__(self) -> None:
        for name, allowed in (("inner", InnerRule), ("init", Init)):
            if getattr(self, name) not in get_args(allowed):
                raise InputError(
                    f"{name}={getattr(self, name)!r}: choose from {', '.join(get_args(allowed))}"
                )
        for name in ("inner_lr", "init_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name}={value}: must be positive and finite")
        if not 0 <= self.init_penalty < math.inf:
            raise InputError(f"init_penalty={self.init_penalty}: must be finite and at least 0")
        if self.origin is not None and self.inner != "lstm":
            raise InputError(
                f"--from {self.origin} with --inner {self.inner}: the rule of --from is an LSTM; "
                "leave --inner out, or leave --from out"
            )
        if self.inner_lr is not None and self.inner == "lstm":
            raise InputError(
                f"--inner-lr {self.inner_lr} with --inner lstm: the LSTM decides its own steps; "
                "leave --inner-lr out, or choose another --inner"
            )
        if self.init == "pretrained" and self.inner in ("sgd", "adam"):
            raise InputError(
                f"--inner {self.inner} with --init pretrained: neither has anything to learn; "
                "use --inner lstm or meta-sgd, or --init maml or reptile"
            )
        if self.init == "pretrained" and self.start.adapted == "head":
            raise InputError(
                "--adapt-only head with --init pretrained: only the head would ever "
                "change; use --tune head, or --init maml"
            )
        if self.init == "reptile" and self.start.adapted == "head":
            raise InputError(
                "--init reptile with --adapt-only head: Reptile moves the initial values towards "
                "the adapted ones, and only the head is adapted; use --init maml"
            )

    def unrolled(self, unroll: UnrollSettings) -> UnrollSettings:
        """The settings of an unroll that also returns what the initial values are learned from.

        Raises:
            InputError: initial values can't be learned with this order or truncation.
        """
        kinds: dict[str, Literal["gradient", "displacement"] | None] = {
            "pretrained": None, "maml": "gradient", "reptile": "displacement",
        }  # fmt: skip
        return replace(unroll, initial=kinds[self.init])

    @property
    def origin_path(self) -> Path | None:
        """The rule file that `origin` stands for."""
        if self.origin == SHIPPED:
            return SHIPPED_RULE
        return None if self.origin is None else Path(self.origin)


@dataclass(frozen=True)
class MetaTrainSettings:
    """The settings of a run of meta-training, without its data and its learner.

    Attributes:
        meta_steps: the number of steps of the meta-optimizer.
        unroll: the inner loop and its meta-loss.
        shortest: the number of adaptation steps of each task is drawn from
            shortest .. unroll.steps. None gives every task unroll.steps. A rule that was trained
            with a single number of steps works well with that number only.
        tasks_per_meta_step: the number of tasks whose meta-gradients are averaged.
        meta_lr: Adam's learning rate for the rule's weights. It falls along half a cosine to a
            tenth.
        clip: the bound on the norm of each task's meta-gradient, per step. A task on which the rule
            fails has a gradient a hundred times as large as the others and would outweigh them all.
        query_share: the share of the steps after which the query loss is computed, above 0 and at
            most 1. The steps are drawn for each task, the last step is always among them, and the
            losses are weighted so that the expected meta-loss stays the same. A share of 0.5 saves
            a third of the time of a first-order meta-step.
        loss_scale: each task's support loss is multiplied by a factor that is drawn log-uniformly
            from 1 / loss_scale .. loss_scale. The rule then learns to work with clipped gradients
            and with losses on other scales.
        calibrated_share: the share of the query loss that is taken at the best temperature, 0 to 1.
            A rule can lower plain cross-entropy by confidence alone, with a head that fits the
            support set at once and an encoder that hardly changes. It lowers the loss at the best
            temperature only if the classes are told apart better.
        confidence_from: the first step after which `calibrated_share` counts; before that step the
            share is 1. The rule then learns to tell classes apart first and to become confident
            later, so that the head stays small while the encoder below it learns.
        second_order_for: families of learners (see `Learner.family`) whose meta-gradient is of
            second order whatever `unroll` says. Only second order takes into account how a step
            changes the gradients of later steps. It costs little more if few coordinates train.
        hidden_size: the rule's number of hidden units, see `rnnopt.meta.learned.Learned`.
        learned: the inner rule, the initial values, and how tasks start.
        seed: decides everything that is drawn, at least 0.
        validate_every: the number of meta-steps between validations; the last meta-step is always
            followed by one.
        validation_tasks: the number of tasks of a validation, the same ones each time.
        checkpoint_every: the number of meta-steps between checkpoints.
        until: a requirement on accuracy and loss after some step, see `rnnopt.tasks.requirement`.
            The run ends at the first validation that meets it. None runs all meta-steps.
    """

    meta_steps: int
    unroll: UnrollSettings
    shortest: int | None = None
    tasks_per_meta_step: int = 1
    meta_lr: float = 5e-3
    clip: float = 1.0
    query_share: float = 1.0
    loss_scale: float = 1.0
    calibrated_share: float = 0.0
    confidence_from: int = 1
    second_order_for: tuple[str, ...] = ()
    hidden_size: int | None = None
    learned: LearnedSettings = field(default_factory=LearnedSettings)
    seed: int = 0
    validate_every: int = 50
    validation_tasks: int = 8
    checkpoint_every: int = 10
    until: str | None = None

    def __post_init__(self) -> None:
        for name in (
            "meta_steps",
            "tasks_per_meta_step",
            "validate_every",
            "validation_tasks",
            "checkpoint_every",
        ):
            if getattr(self, name) < 1:
                option = " (--tasks)" if name == "tasks_per_meta_step" else ""
                raise InputError(f"{name}={getattr(self, name)}{option}: must be at least 1")
        if self.seed < 0:
            raise InputError(f"seed={self.seed}: must be at least 0")
        if self.shortest is not None and not 1 <= self.shortest <= self.unroll.steps:
            raise InputError(
                f"shortest unroll of {self.shortest} steps: must lie between 1 and the longest, "
                f"{self.unroll.steps}"
            )
        weights = self.unroll.step_weights
        if weights is not None and not any(weights[: self.shortest]):
            raise InputError(
                f"step_weights {tuple(weights)} are all 0 within the shortest unroll of "
                f"{self.shortest} steps: nothing to learn from"
            )
        for name in ("meta_lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name}={getattr(self, name)}: must be positive and finite")
        if not 0 < self.query_share <= 1:
            raise InputError(
                f"query_share={self.query_share}: must be a share of the steps, above 0 and at "
                "most 1"
            )
        if not 1 <= self.loss_scale < math.inf:
            raise InputError(f"loss_scale={self.loss_scale}: must be finite and at least 1")
        if not 0 <= self.calibrated_share <= 1:
            raise InputError(
                f"calibrated_share={self.calibrated_share}: must be a share, from 0 to 1"
            )
        if not 1 <= self.confidence_from <= self.unroll.steps:
            raise InputError(
                f"confidence_from={self.confidence_from}: must lie between 1 and the last step, "
                f"{self.unroll.steps}"
            )
        self.learned.unrolled(self.unroll)  # raises now what the first unroll would raise
        if self.second_order_for:
            self.learned.unrolled(self._second_order())
        _ = self.requirement  # raises if it can't be parsed

    def unroll_of(self, learner: Learner) -> UnrollSettings:
        """The unroll settings for the tasks of a learner."""
        if learner.family not in self.second_order_for:
            return self.unroll
        return self._second_order()

    def share(self, step: int) -> float:
        """The calibrated share of the query loss after step number `step` (from 0)."""
        return self.calibrated_share if step + 1 >= self.confidence_from else 1.0

    def _second_order(self) -> UnrollSettings:
        return replace(self.unroll, order=2)

    @property
    def requirement(self) -> Requirement | None:
        """The parsed `until`."""
        if self.until is None:
            return None
        return Requirement.parse(self.until, VALIDATED, self.unroll.steps)
