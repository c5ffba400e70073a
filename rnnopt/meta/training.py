"""The outer loop of meta-training: tasks, meta-loss and meta-step, validation and checkpoints.

Everything random depends only on the seed and the number of the task. A run that was stopped and
resumed therefore ends with the same weights as one that was not, bit for bit on a CPU. Several
processes can share the tasks of a meta-step. Their number changes only the order in which floats
are added.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rnnopt.errors import InputError
from rnnopt.meta.learned import Learned
from rnnopt.meta.processes import Team, check_alike
from rnnopt.meta.settings import MetaTrainSettings
from rnnopt.meta.unroll import Unrolled, unroll
from rnnopt.rules.files import RULE_FILE, can_be_saved, save_rule
from rnnopt.storage.files import save_tensors
from rnnopt.storage.run_folder import INIT_FOLDER, RunFolder
from rnnopt.tasks.adaptation import adapt_and_judge
from rnnopt.tasks.protocol import CALIBRATED, TaskSource
from rnnopt.tasks.requirement import DIGITS

# Validation draws the heads of its tasks with other seeds than meta-training.
_VALIDATION_HEADS = 1_000_000_000


@dataclass
class _Progress:
    """The part of a checkpoint that is not tensors."""

    meta_step: int = 0
    skipped: int = 0
    best_score: float = math.inf
    best_step: int = 0
    seconds: float = 0.0
    checked_step: int = -1  # the meta-step of the last validation; `figures` are its results
    figures: dict[str, list[float | None]] = field(default_factory=dict)


class MetaTraining:
    """One run of meta-training in its folder.

    The folder holds ``rule.safetensors`` (the best rule so far by validation, with its config and
    the facts of `training`), ``init`` (the initial values that belong to that rule, if they are
    learned; see `Start.save`), ``log.jsonl``, ``run.json`` and ``checkpoint.safetensors``. If
    several processes share the run, only the process of rank 0 reads and writes the folder.

    Args:
        train: the meta-training tasks.
        validation: other tasks, which choose the best rule.
        settings: see `MetaTrainSettings`.
        folder: the run's folder, which is created.
        facts: JSON-compatible facts that distinguish this run from others, such as its data and its
            encoder. A run can only be resumed with the same facts.
        training: JSON-compatible facts that are written into the rule file.
        resume: continue the run that the folder holds, if it holds one. Another number of processes
            may have begun it.
        team: the processes that share the tasks. Task k of a meta-step belongs to the process of
            rank k % team.size.
        rule: the inner rule, which replaces the one that the settings name.

    Raises:
        InputError: the folder holds a run and resume is False, or a run with other settings; there
            are fewer tasks in a meta-step than processes; or the processes have different facts or
            kinds of device.
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
        rule: nn.Module | None = None,
    ) -> None:
        self.train, self.validation = train, validation
        self.device = train.learner.device
        self.settings, self.training, self.team = settings, training, team
        self.folder = RunFolder(folder)
        self.learned = Learned(
            settings.learned, train.learner, settings.hidden_size, settings.seed, rule
        ).to(self.device)
        self.rule, self.start = self.learned.rule, self.learned.start
        self.meta_optimizer = torch.optim.Adam(self.learned.groups(settings.meta_lr))
        self.best = {name: leaf.clone() for name, leaf in self.learned.state_dict().items()}
        self.progress = _Progress()
        self._open(json.loads(json.dumps({**asdict(settings), **facts})), resume)

    def run(self, report: Callable[[dict[str, Any]], None] = lambda record: None) -> Any:
        """Meta-train to the end.

        Args:
            report: called with every log record, in the process of rank 0.

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
            # this rule meets the requirement, even if another one had a lower validation loss
            self._keep()
            self._save()
        self.learned.load_state_dict(self.best)
        if self.learned.init is not None and not (self.folder.path / INIT_FOLDER).exists():
            self._save_best()  # an earlier process stopped while it replaced the folder
        return self.rule

    @property
    def met(self) -> bool:
        """Whether the last validation is of the present rule and meets the requirement.

        False if there is no requirement.
        """
        requirement, progress = self.settings.requirement, self.progress
        fresh = progress.checked_step == progress.meta_step
        return requirement is not None and fresh and requirement.met(progress.figures)

    def _meta_step(self) -> dict[str, Any]:
        """Take one step of the meta-optimizer; return its log record.

        A task whose meta-loss or meta-gradient is not finite is left out and counted as skipped.
        """
        settings, progress = self.settings, self.progress
        first = progress.meta_step * settings.tasks_per_meta_step
        shared = self.team.share(settings.tasks_per_meta_step)
        results, terms = zip(*(self._term(first + k) for k in shared))
        # from here on, all processes have the same values and take the same decisions
        meta_loss, norm, finite = self._take(self.team.sum(torch.stack(terms).sum(dim=0)))
        if finite:
            for group in self.meta_optimizer.param_groups:
                group["lr"] = self._meta_lr(group["peak"])
            self.meta_optimizer.step()
        progress.skipped += settings.tasks_per_meta_step - finite
        progress.meta_step += 1
        return {
            "meta_step": progress.meta_step,
            "meta_loss": meta_loss if finite else None,
            "query_losses": finite_or_none(results[0].query_losses.tolist()),
            "gradient_norm": norm if finite else None,
            "skipped": progress.skipped,
            **self.learned.report(),
        }

    def _term(self, number: int) -> tuple[Unrolled, Tensor]:
        """Unroll task `number`; return the unroll, and the task's term in the meta-step's sums.

        The term is a vector (P + 3,): the clipped meta-gradient of all P weights, the meta-loss,
        the norm of the meta-gradient before clipping, and 1, which counts the task. All but the
        last are divided by the number of steps and by the task's `loss_unit`, so that tasks of any
        length and number of classes count alike. The term is 0 if a value is not finite.

        The sums are taken in float64. The order of the terms depends on the number of processes,
        and its effect is almost lost when the sum is rounded to float32.
        """
        self.meta_optimizer.zero_grad()
        result, guess = self._unroll(number)
        # a task that does not depend on the rule has no gradient, which counts as 0
        weights = list(self.learned.parameters())
        unit = len(result.query_losses) * guess
        grads = [torch.zeros_like(w) if w.grad is None else w.grad.div_(unit) for w in weights]
        norm, meta_loss = self.learned.clip(self.settings.clip), result.meta_loss / unit
        gradient = torch.cat([grad.flatten().double() for grad in grads])
        if not (math.isfinite(norm) and math.isfinite(meta_loss)):
            return result, gradient.new_zeros(len(gradient) + 3)
        return result, torch.cat([gradient, gradient.new_tensor([meta_loss, norm, 1.0])])

    def _take(self, total: Tensor) -> tuple[float, float, int]:
        """Set the meta-gradient to the mean over tasks, from the sums of the terms.

        Args:
            total: the sum of the terms, see `_term`.

        Returns:
            The means of the meta-loss and of the norm, and the number of tasks that were finite.
        """
        weights = list(self.learned.parameters())
        *parts, plain = torch.split(total, [*(weight.numel() for weight in weights), 3])
        meta_loss, norm, finite = plain.tolist()
        tasks = max(finite, 1.0)
        for weight, part in zip(weights, parts):
            weight.grad = (part / tasks).view_as(weight).to(weight.dtype)
        self.learned.add_penalty()
        return meta_loss / tasks, norm / tasks, round(finite)

    def _unroll(self, number: int) -> tuple[Unrolled, float]:
        """Unroll task `number`, which adds its meta-gradient; also return its `loss_unit`."""
        settings = self.settings
        task, learner = self.train.load(number), self.train.learner_of(number)
        self.start.begin(learner, task, seed=settings.seed + number)
        longest = settings.unroll.steps
        shortest = longest if settings.shortest is None else settings.shortest
        generator = np.random.default_rng([settings.seed, number])
        steps = int(generator.integers(shortest, longest + 1))
        scale = settings.loss_scale ** generator.uniform(-1, 1)
        unrolled = settings.learned.unrolled(settings.unroll_of(learner)).shortened(steps)
        result = unroll(
            learner.module,
            self.start.optimizer(learner, self.rule),
            lambda module, step: scale * task.support_loss(module, step),
            lambda module, step: task.query_loss(module, step, settings.share(step)),
            unrolled.thinned(settings.query_share, generator),
        )
        self.learned.accumulate(result, learner, task)
        return result, task.loss_unit

    def _meta_lr(self, peak: float) -> float:
        """The learning rate of this meta-step: half a cosine from the peak to a tenth of it."""
        done = self.progress.meta_step / self.settings.meta_steps
        return peak * (0.55 + 0.45 * math.cos(math.pi * done))

    def _validate(self) -> dict[str, Any]:
        """Score the rule on the validation tasks, and keep it if it is the best so far.

        The score is the query loss of meta-training, with its calibrated share, as a mean over all
        steps.

        Returns:
            The part of a log record that describes the validation.
        """
        budgets = range(1, self.settings.unroll.steps + 1)
        metrics = self.validation.metrics
        names = ["loss", *(n for n in metrics if n != "loss" and not metrics[n].tuned_by)]
        # (tasks, budgets, figures): each process fills its own rows, and the sum has all rows
        table = torch.zeros(
            self.settings.validation_tasks, len(budgets), len(names) + 1, dtype=torch.float64
        )
        for number in self.team.share(self.settings.validation_tasks):
            task, learner = self.validation.load(number), self.validation.learner_of(number)
            self.start.begin(learner, task, _VALIDATION_HEADS + number)
            optimizer = self.start.optimizer(learner, self.rule)
            scores = adapt_and_judge(learner, optimizer, task, budgets).scores
            for at_budget in scores.values():
                self.validation.check_scores(at_budget)
            rows = [[scores[b][name] for name in names] for b in budgets]
            tempered = [scores[b].get(CALIBRATED, scores[b]["loss"]) for b in budgets]
            table[number] = torch.tensor([[*r, c] for r, c in zip(rows, tempered)])
        means = self.team.sum(table).mean(dim=0)  # (budgets, figures)
        loss, calibrated = means[:, 0], means[:, -1]
        shares = loss.new_tensor([self.settings.share(b - 1) for b in budgets])
        score = float(torch.lerp(loss, calibrated, shares).mean())
        figures = {name: finite_or_none(means[:, i].tolist()) for i, name in enumerate(names)}
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
        """Record the present rule and initial values as the best."""
        self.progress.best_step = self.progress.meta_step
        self.best = {name: leaf.clone() for name, leaf in self.learned.state_dict().items()}
        self._save_best()

    def _save_best(self) -> None:
        training = {**self.training, "meta_step": self.progress.best_step}
        if self.team.rank == 0:
            file = self.folder.path / RULE_FILE
            if can_be_saved(self.rule):
                save_rule(self.rule, file, training)
            else:  # a rule of the user's own class, which `load_rule` can't build
                save_tensors(file, self.rule.state_dict(), {"training": training})
            if self.learned.init is not None:
                folder = self.folder.path / INIT_FOLDER
                self.start.save(folder, self.train.learner, training)

    # -- the folder

    def _open(self, facts: dict[str, Any], resume: bool) -> None:
        self.team.together(self._check_tasks)
        device = {"device": self.device.type}
        everyone = self.team.gather({**facts, **device})
        self.team.together(lambda: check_alike(everyone))
        checkpoint = self.team.first(lambda: self.folder.open(facts, resume, self._restore))
        if checkpoint and self.team.rank > 0:  # another machine may not see the folder
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
        tensors = dict(self.learned.state_dict())
        tensors |= {f"best.{name}": leaf for name, leaf in self.best.items()}
        for index, state in self.meta_optimizer.state_dict()["state"].items():
            tensors |= {f"meta.{index}.{name}": leaf for name, leaf in state.items()}
        self.folder.save(tensors, asdict(self.progress))

    def _restore(self, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        self.progress = _Progress(**progress)
        self.learned.load_state_dict({name: tensors[name] for name in self.learned.state_dict()})
        self.best = {name: leaf.to(self.device) for name, leaf in _under("best.", tensors).items()}
        state: dict[int, dict[str, Tensor]] = {}
        for name, leaf in _under("meta.", tensors).items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = leaf
        if not all(torch.isfinite(leaf).all() for leaf in tensors.values()):
            raise ValueError("values of the checkpoint are not finite")
        if len({frozenset(leaves) for leaves in state.values()}) > 1:
            raise ValueError("the meta-optimizer's state lacks a part")
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


def finite_or_none(losses: Sequence[float]) -> list[float | None]:
    """Round losses to 5 digits; None replaces NaN and infinity, which JSON does not have."""
    return [round(x, DIGITS) if math.isfinite(x) else None for x in losses]
