"""The outer loop: episodes -> meta-loss -> meta-step, with validation, checkpoints and resume.

Everything random is a pure function of (seed, number of the task), so a run that was killed and
resumed ends with the same weights, bit for bit on CPU, as one that was not. Several processes
share the tasks out; their number changes only the order in which floats are summed.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from rnnopt.checkpoint import RULE_FILE, save_rule
from rnnopt.errors import InputError
from rnnopt.folder import RunFolder
from rnnopt.lstm import CoordinateLSTM
from rnnopt.optimizer import LearnedOptimizer
from rnnopt.requirement import DIGITS, Requirement
from rnnopt.task import TaskSource, adapt_and_judge
from rnnopt.team import Team
from rnnopt.unroll import Unrolled, UnrollSettings, unroll

# Heads of validation tasks must not repeat those of meta-training tasks.
_VALIDATION_HEADS = 1_000_000_000
VALIDATED = ("accuracy", "loss")  # the metrics of a validation, after each step


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
        clip: bound on the norm of the meta-gradient (per step and task).
        hidden_size: of the rule.
        seed: of everything random.
        validate_every: meta-steps between validations; one more at the end.
        validation_tasks: tasks of one validation, always the same ones.
        checkpoint_every: meta-steps between checkpoints.
        until: the run ends at the first validation that meets this requirement, of accuracy and
            loss after some step, see `rnnopt.requirement`; None: after all meta-steps.
    """

    meta_steps: int
    unroll: UnrollSettings
    shortest: int | None = None
    tasks_per_meta_step: int = 1
    meta_lr: float = 5e-3
    clip: float = 1.0
    hidden_size: int = 8
    seed: int = 0
    validate_every: int = 50
    validation_tasks: int = 8
    checkpoint_every: int = 10
    until: str | None = None

    def __post_init__(self) -> None:
        for name in (
            "meta_steps",
            "tasks_per_meta_step",
            "hidden_size",
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
        _ = self.requirement  # raises where it can't be read

    @property
    def requirement(self) -> Requirement | None:
        """`until`, read."""
        if self.until is None:
            return None
        return Requirement.parse(self.until, VALIDATED, self.unroll.steps)


@dataclass
class _Progress:
    """What a checkpoint holds beside tensors."""

    meta_step: int = 0
    skipped: int = 0
    best_score: float = math.inf
    best_step: int = 0
    seconds: float = 0.0
    checked_step: int = -1  # the meta-step of the last validation, and its figures
    figures: dict[str, list[float | None]] = field(default_factory=dict)


class MetaTraining:
    """One run of meta-training in its folder.

    The folder gets ``rule.safetensors`` (the best rule so far by validation tasks, with its
    config and `training` facts), ``log.jsonl``, ``run.json`` and ``checkpoint.safetensors``. Of a
    team's processes rank 0 alone reads and writes it.

    Args:
        train: meta-training tasks.
        validation: tasks of other classes, which choose the rule.
        settings: see `MetaTrainSettings`.
        folder: the run's folder; created.
        facts: JSON-compatible facts that tell this run from others (data, encoder, ...): a
            resumed run must have the same.
        training: JSON-compatible facts kept inside the rule file.
        resume: continue the run in the folder, if there is one; also one that another number of
            processes began.
        team: the processes that share the tasks; task k of a meta-step belongs to rank
            k % team.size.

    Raises:
        InputError: the folder holds a run and resume is False, or a run with other settings; fewer
            tasks in a meta-step than processes; the processes differ in facts or kind of device.
    """

    def __init__(
        self,
        train: TaskSource,
        validation: TaskSource,
        settings: MetaTrainSettings,
        folder: Path,
        facts: dict[str, Any],
        training: dict[str, Any],
        resume: bool = False,
        team: Team = Team(),  # noqa: B008  # immutable
    ) -> None:
        self.train, self.validation = train, validation
        self.device = train.classifier.device
        self.settings, self.training, self.team = settings, training, team
        self.folder = RunFolder(folder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.rule = CoordinateLSTM(hidden_size=settings.hidden_size)
        self.rule.to(self.device)
        self.meta_optimizer = torch.optim.Adam(self.rule.parameters(), lr=settings.meta_lr)
        self.best = {name: leaf.clone() for name, leaf in self.rule.state_dict().items()}
        self.progress = _Progress()
        self._open(json.loads(json.dumps({**asdict(settings), **facts})), resume)

    def run(self, report: Callable[[dict[str, Any]], None] = lambda record: None) -> CoordinateLSTM:
        """Meta-train to the end.

        Args:
            report: called with every log record, on rank 0.

        Returns:
            The best rule by validation.
        """
        started = time.monotonic() - self.progress.seconds
        if self.progress.meta_step == 0:
            self._log({"meta_step": 0, **self._validate()}, report)
        while not self.met and self.progress.meta_step < self.settings.meta_steps:
            record = self._meta_step()
            done = self.progress.meta_step
            last = done == self.settings.meta_steps
            if last or done % self.settings.validate_every == 0:
                record |= self._validate()
            self.progress.seconds = time.monotonic() - started
            self._log({**record, "seconds": round(self.progress.seconds, 2)}, report)
            if last or done % self.settings.checkpoint_every == 0:
                self._save()
        if self.met:
            # what meets the requirement is what was asked for, be its loss over all steps higher
            self._keep()
            self._save()
        self.rule.load_state_dict(self.best)
        return self.rule

    @property
    def met(self) -> bool:
        """Whether the rule as it stands was validated and meets the requirement; False without."""
        requirement, progress = self.settings.requirement, self.progress
        fresh = progress.checked_step == progress.meta_step
        return requirement is not None and fresh and requirement.met(progress.figures)

    def _meta_step(self) -> dict[str, Any]:
        """One step of the meta-optimizer; skipped and counted if anything is not finite."""
        settings, progress = self.settings, self.progress
        first = progress.meta_step * settings.tasks_per_meta_step
        shared = self.team.share(settings.tasks_per_meta_step)
        results, terms = zip(*(self._term(first + k) for k in shared))
        meta_loss, steps = self._take(self.team.sum(torch.stack(terms).sum(dim=0)))
        # all that follows, a skip too, depends on pooled values only: everyone decides alike
        for weight in self.rule.parameters():
            cast(Tensor, weight.grad).mul_(1 / steps)
        norm = float(torch.nn.utils.clip_grad_norm_(self.rule.parameters(), settings.clip))
        meta_loss *= 1 / steps
        finite = math.isfinite(norm) and math.isfinite(meta_loss)
        if finite:
            for group in self.meta_optimizer.param_groups:
                group["lr"] = self._meta_lr()
            self.meta_optimizer.step()
        else:
            progress.skipped += 1
        progress.meta_step += 1
        return {
            "meta_step": progress.meta_step,
            "meta_loss": meta_loss if math.isfinite(meta_loss) else None,
            "query_losses": finite_or_none(results[0].query_losses.tolist()),
            "gradient_norm": norm if math.isfinite(norm) else None,
            "skipped": progress.skipped,
        }

    def _term(self, number: int) -> tuple[Unrolled, Tensor]:
        """Unroll task `number`; what it adds to the sums of the meta-step.

        These are the meta-gradient of all P weights, the meta-loss and the number of steps:
        (P + 2,), float64, so that their order, which the number of processes decides, is all but
        lost in rounding to float32.
        """
        self.meta_optimizer.zero_grad()
        result = self._unroll(number)
        # a task that doesn't depend on the rule leaves no gradient, which is one of zero
        grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in self.rule.parameters()]
        plain = torch.tensor([result.meta_loss, len(result.query_losses)], dtype=torch.float64)
        vectors = [*(grad.flatten().double() for grad in grads), plain.to(grads[0].device)]
        return result, torch.cat(vectors)

    def _take(self, total: Tensor) -> list[float]:
        """Take the meta-gradient from the sums (see `_term`); the other two."""
        weights = list(self.rule.parameters())
        *parts, plain = torch.split(total, [*(weight.numel() for weight in weights), 2])
        for weight, part in zip(weights, parts):
            weight.grad = part.view_as(weight).to(weight.dtype)
        return plain.tolist()

    def _unroll(self, number: int) -> Unrolled:
        """Unroll task `number`, adding to the rule's meta-gradient."""
        settings = self.settings
        task, classifier = self.train.load(number), self.train.classifier_of(number)
        classifier.reset(task.ways, seed=settings.seed + number)
        longest = settings.unroll.steps
        shortest = longest if settings.shortest is None else settings.shortest
        generator = np.random.default_rng([settings.seed, number])
        return unroll(
            classifier.model,
            LearnedOptimizer([param for _, param in classifier.trainable()], self.rule),
            task.support_loss(classifier),
            task.query_loss(classifier),
            settings.unroll.shortened(int(generator.integers(shortest, longest + 1))),
            seed=number,
        )

    def _meta_lr(self) -> float:
        """From meta_lr to a tenth of it along half a cosine."""
        done = self.progress.meta_step / self.settings.meta_steps
        return self.settings.meta_lr * (0.55 + 0.45 * math.cos(math.pi * done))

    def _validate(self) -> dict[str, Any]:
        """Score the rule on the validation tasks: mean query loss over all steps; keep the best."""
        budgets = range(1, self.settings.unroll.steps + 1)
        # (tasks, budgets, loss and accuracy): everyone fills rows of its own, the sum fills all
        table = torch.zeros(self.settings.validation_tasks, len(budgets), 2, dtype=torch.float64)
        for number in self.team.share(self.settings.validation_tasks):
            task, classifier = self.validation.load(number), self.validation.classifier_of(number)
            classifier.reset(task.ways, seed=_VALIDATION_HEADS + number)
            params = [param for _, param in classifier.trainable()]
            optimizer = LearnedOptimizer(params, self.rule)
            scores = adapt_and_judge(classifier, optimizer, task, budgets).scores
            table[number] = torch.tensor([astuple(scores[b]) for b in budgets], dtype=table.dtype)
        loss, accuracy = self.team.sum(table).mean(dim=0).unbind(dim=1)  # (budgets,) each
        score = float(loss.mean())
        figures = {
            "loss": finite_or_none(loss.tolist()),
            "accuracy": finite_or_none(accuracy.tolist()),
        }
        self.progress.checked_step, self.progress.figures = self.progress.meta_step, figures
        if score < self.progress.best_score:
            self.progress.best_score = score
            self._keep()
        return {
            "validation": {
                "score": score,
                **figures,
                "best_step": self.progress.best_step,
                **({} if self.settings.until is None else {"met": self.met}),
            }
        }

    def _keep(self) -> None:
        """Take the rule as it stands for the best."""
        self.progress.best_step = self.progress.meta_step
        self.best = {name: leaf.clone() for name, leaf in self.rule.state_dict().items()}
        self._save_rule()

    def _save_rule(self) -> None:
        training = {**self.training, "meta_step": self.progress.best_step}
        if self.team.rank == 0:
            save_rule(self.rule, self.folder.path / RULE_FILE, training)

    # -- the folder

    def _open(self, facts: dict[str, Any], resume: bool) -> None:
        self.team.together(self._check_tasks)
        device = {"device": self.device.type}
        everyone = self.team.gather({**facts, **device})
        self.team.together(lambda: _check_alike(everyone))
        checkpoint = self.team.first(lambda: self.folder.open(facts, resume, self._restore))
        if checkpoint and self.team.rank > 0:  # the folder may not be on this machine
            self._restore(*checkpoint)

    def _check_tasks(self) -> None:
        tasks, size = self.settings.tasks_per_meta_step, self.team.size
        if tasks < size:
            raise InputError(
                f"--tasks {tasks}: must be at least {size}, the number of processes, which share "
                f"the tasks of a meta-step; raise it, or start {tasks} or fewer"
            )

    def _save(self) -> None:
        if self.team.rank > 0:
            return
        tensors = {f"rule.{name}": leaf for name, leaf in self.rule.state_dict().items()}
        tensors |= {f"best.{name}": leaf for name, leaf in self.best.items()}
        for index, state in self.meta_optimizer.state_dict()["state"].items():
            tensors |= {f"meta.{index}.{name}": leaf for name, leaf in state.items()}
        self.folder.save(tensors, asdict(self.progress))

    def _restore(self, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        self.progress = _Progress(**progress)
        self.rule.load_state_dict(_under("rule.", tensors))
        self.best = {name: leaf.to(self.device) for name, leaf in _under("best.", tensors).items()}
        state: dict[int, dict[str, Tensor]] = {}
        for name, leaf in _under("meta.", tensors).items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = leaf
        groups = self.meta_optimizer.state_dict()["param_groups"]
        self.meta_optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _log(self, record: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> None:
        if self.team.rank == 0:
            self.folder.log(record)
            report(record)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): leaf for name, leaf in tensors.items() if name.startswith(prefix)
    }


def _check_alike(everyone: Sequence[dict[str, Any]]) -> None:
    """Refuse processes that would not work on the same run; given by rank."""
    for rank, facts in enumerate(everyone):
        other = [
            f"{name}: {everyone[0].get(name)!r} in process 0, {facts.get(name)!r} in process {rank}"
            for name in sorted({*everyone[0], *facts})
            if everyone[0].get(name) != facts.get(name)
        ]
        if other:
            raise InputError(
                f"the processes of this run differ ({'; '.join(other)}); give all the same "
                "command, data, encoder and kind of device"
            )


def finite_or_none(losses: Sequence[float]) -> list[float | None]:
    """Losses to 5 digits for a JSON file, which has no NaN and no infinity."""
    return [round(x, DIGITS) if math.isfinite(x) else None for x in losses]
