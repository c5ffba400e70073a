"""What meta-training is told: the unroll, what is learned, and the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from rnnopt.errors import InputError
from rnnopt.rules.files import shipped_rule
from rnnopt.tasks.protocol import Learner
from rnnopt.tasks.requirement import Requirement
from rnnopt.tasks.start import Start

Init = Literal["pretrained", "maml", "reptile"]
InnerRule = Literal["lstm", "sgd", "meta-sgd", "adam", "given"]
Learn = Literal["all", "growth"]
VALIDATED = ("accuracy", "loss")  # the metrics of a validation, after each step
SHIPPED = "shipped"  # the word for the shipped rule of what trains, as the origin of a new one


@dataclass(frozen=True)
class UnrollSettings:
    """How an unroll is run and what its meta-loss weighs.

    Attributes:
        steps: T, steps of adaptation.
        order: 1, everything fed to the rule is a constant; 2, exact, through `higher`.
        truncation: steps after which the graph is cut (truncated backpropagation through time);
            None cuts nowhere. Memory grows with the truncation, not with T.
        coordinates: first order only: how many coordinates carry the meta-gradient, a random
            sample stratified over tensors, while all are updated; the estimate is unbiased. None
            takes all where the rule's graph stays within `GRAPH_BYTES`, and else as many as do.
            What the rule turns as a whole (`rnnopt.rules.protocol.MatrixRule`) is taken beside them.
        query_weight: weight of the query loss, what adaptation is for.
        support_weight: weight of the support loss.
        step_weights: weight of each of the T steps; None weighs all by 1.
        initial: what an unroll returns of theta_0, the values of all parameters of the model that
            take a gradient, also of those that the optimizer leaves as they are (ANIL, Raghu et al.
            2020). ``"gradient"``: the meta-gradient; with order 2 exact (MAML, Finn et al. 2017,
            arXiv:1703.03400); with order 1 the sum over steps of the meta-loss's slope at theta_t,
            d theta_t / d theta_0 being taken for the identity (first-order MAML, where the last
            step alone has a weight). ``"displacement"``: theta_0 - theta_T (Reptile, Nichol et al.
            2018, arXiv:1803.02999), 0 for what the optimizer leaves. None: nothing.
    """

    steps: int
    order: int = 1
    truncation: int | None = None
    coordinates: int | None = None
    query_weight: float = 1.0
    support_weight: float = 0.0
    step_weights: Sequence[float] | None = None
    initial: Literal["gradient", "displacement"] | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps={self.steps}: at least 1")
        if self.order not in (1, 2):
            raise InputError(f"order={self.order}: 1 or 2")
        for name in ("truncation", "coordinates"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}={value}: at least 1, or None")
        if self.initial not in (None, "gradient", "displacement"):
            raise InputError(f"initial={self.initial!r}: 'gradient', 'displacement' or None")
        if self.initial == "displacement" and self.order == 2:
            raise InputError(
                "initial='displacement' (Reptile) with order 2: it differentiates through nothing; "
                "use order 1"
            )
        if self.coordinates is not None and self.order == 2:
            raise InputError(
                f"coordinates={self.coordinates} with order 2: second order needs all of them, "
                "since the model connects them; leave coordinates out"
            )
        if self.initial == "gradient" and self.order == 2 and self.kept_steps < self.steps:
            raise InputError(
                f"truncation={self.truncation} of {self.steps} steps: with order 2 nothing from "
                "beyond a cut would reach the initial values; leave truncation out, or use order 1"
            )
        if self.step_weights is not None and len(self.step_weights) != self.steps:
            raise InputError(
                f"{len(self.step_weights)} step_weights for {self.steps} steps: one for each"
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
        inner: the inner rule; the LSTM and Meta-SGD are meta-trained, SGD and Adam have no weights;
            ``"given"`` is an object that the run is handed.
        inner_lr: its step size, at first (of the LSTM its reach); None for `INNER_LR`.
        learn: ``"growth"`` leaves directions and step sizes Adam's and learns the growth of tensors
            alone, see `rnnopt.rules.lstm.CoordinateLSTM`.
        origin: the LSTM that meta-training begins with, a rule file, a run's folder or `SHIPPED`;
            None for a fresh one.
        init: which initial values: pretrained ones, or such as are meta-learned, see
            `rnnopt.meta.learned.InitialValues`; ``"maml"`` by their meta-gradient of either order, ``"reptile"`` by
            Reptile's, which the meta-optimizer takes for one, as Nichol et al. 2018 propose.
        init_lr: the meta-optimizer's learning rate on them.
        init_penalty: see `rnnopt.meta.learned.InitialValues.add_penalty`.
        start: how every task starts, from the learner's own initial values.
    """

    inner: InnerRule = "lstm"
    inner_lr: float | None = None
    learn: Learn = "all"
    origin: str | None = None
    init: Init = "pretrained"
    init_lr: float = 1e-4
    init_penalty: float = 0.0
    start: Start = field(default_factory=Start)

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
        if self.init == "pretrained" and self.start.adapted == "head":
            raise InputError(
                "--adapt-only head with --init pretrained: nothing but the head would ever "
                "move; use --tune head, or --init maml"
            )
        if self.init == "reptile" and self.start.adapted == "head":
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

    def origin_path(self, learner: Learner) -> Path | None:
        """The rule file that `origin` means where this learner is adapted."""
        if self.origin == SHIPPED:
            return shipped_rule(self.start.params(learner).values())
        return None if self.origin is None else Path(self.origin)


@dataclass(frozen=True)
class MetaTrainSettings:
    """What a run of meta-training does, apart from its data and its classifier.

    Attributes:
        meta_steps: steps of the meta-optimizer.
        unroll: the inner loop and its meta-loss.
        shortest: each task's number of steps is drawn from shortest .. unroll.steps; None for
            always the latter. A rule that has seen one horizon only counts on it.
        tasks_per_meta_step: tasks whose meta-gradients are averaged.
        meta_lr: Adam's learning rate on the rule's weights, falling to a tenth along a cosine.
        clip: bound on the norm of each task's meta-gradient (per step): tasks that a
            rule ruins have gradients a hundred times as large, and would drown all others.
        judged: share of the steps whose query loss is taken, drawn for each task, weighted so that
            the sum stays what it is on average; the last is always among them. 0.5 saves a third
            of a first-order meta-step.
        loss_scale: each task's support loss is multiplied by a factor drawn log-uniformly from
            1 / loss_scale .. loss_scale, as clipped gradients and odd losses do later on.
        calibrated: share of the query loss that is taken at the best temperature:
            a rule can win plain cross-entropy by confidence, with a head that fits the support set
            at once and leaves the encoder as it was; this it can win by telling classes apart only.
        sure_from: the first step at which the rest of that share counts; before it the share is 1:
            a rule is to tell classes apart at once and may be sure of them later, which lets a head
            stay small while an encoder learns below it.
        exact: families of learners (see `Learner.family`) whose meta-gradient is of
            second order whatever `unroll` says. Only that order sees what a step does to the
            gradients of later ones, and where few coordinates train it costs little more.
        hidden_size: of the rule, see `rnnopt.meta.learned.Learned`.
        learned: the inner rule, the initial values, and how tasks start.
        seed: of everything random.
        validate_every: meta-steps between validations; one more at the end.
        validation_tasks: tasks of one validation, always the same ones.
        checkpoint_every: meta-steps between checkpoints.
        until: the run ends at the first validation that meets this requirement, of accuracy and
            loss after some step, see `rnnopt.tasks.requirement`; None: after all meta-steps.
    """

    meta_steps: int
    unroll: UnrollSettings
    shortest: int | None = None
    tasks_per_meta_step: int = 1
    meta_lr: float = 5e-3
    clip: float = 1.0
    judged: float = 1.0
    loss_scale: float = 1.0
    calibrated: float = 0.0
    sure_from: int = 1
    exact: tuple[str, ...] = ()
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
        if not 0 < self.judged <= 1:
            raise InputError(f"judged={self.judged}: a share of the steps, above 0 and at most 1")
        if not 1 <= self.loss_scale < math.inf:
            raise InputError(f"loss_scale={self.loss_scale}: must be finite and at least 1")
        if not 0 <= self.calibrated <= 1:
            raise InputError(f"calibrated={self.calibrated}: a share, from 0 to 1")
        if not 1 <= self.sure_from <= self.unroll.steps:
            raise InputError(
                f"sure_from={self.sure_from}: must lie between 1 and the last step, "
                f"{self.unroll.steps}"
            )
        self.learned.unrolled(self.unroll)  # or its refusal would wait for the first unroll
        if self.exact:
            self.learned.unrolled(self._exactly())
        _ = self.requirement  # raises where it can't be read

    def unroll_of(self, learner: Learner) -> UnrollSettings:
        """How the tasks of a learner are unrolled."""
        if learner.family not in self.exact:
            return self.unroll
        return self._exactly()

    def share(self, step: int) -> float:
        """The calibrated share of the query loss after step number `step` (from 0)."""
        return self.calibrated if step + 1 >= self.sure_from else 1.0

    def _exactly(self) -> UnrollSettings:
        return replace(self.unroll, order=2, coordinates=None)

    @property
    def requirement(self) -> Requirement | None:
        """`until`, read."""
        if self.until is None:
            return None
        return Requirement.parse(self.until, VALIDATED, self.unroll.steps)
