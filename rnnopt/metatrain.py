"""The outer loop: episodes -> meta-loss -> meta-step, with validation, checkpoints and resume.

Everything random is a pure function of (seed, number of the task), so a run that was killed and
resumed ends with the same weights, bit for bit on CPU, as one that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnnopt.checkpoint import (
    RULE_FILE,
    claim_folder,
    read_tensors,
    save_rule,
    save_tensors,
    write_atomically,
)
from rnnopt.errors import InputError
from rnnopt.lstm import CoordinateLSTM
from rnnopt.optimizer import LearnedOptimizer
from rnnopt.task import TaskSource, adapt_and_judge
from rnnopt.text import Classifier
from rnnopt.unroll import Unrolled, UnrollSettings, unroll

CHECKPOINT_FILE = "checkpoint.safetensors"
RUN_FILE = "run.json"
LOG_FILE = "log.jsonl"
# Heads of validation tasks must not repeat those of meta-training tasks.
_VALIDATION_HEADS = 1_000_000_000


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
                raise InputError(f"{name}={getattr(self, name)}: must be at least 1")
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


@dataclass
class _Progress:
    """What a checkpoint holds beside tensors."""

    meta_step: int = 0
    skipped: int = 0
    best_score: float = math.inf
    best_step: int = 0
    seconds: float = 0.0


class MetaTraining:
    """One run of meta-training in its folder.

    The folder gets ``rule.safetensors`` (the best rule so far by validation tasks, with its
    config and `training` facts), ``log.jsonl``, ``run.json`` and ``checkpoint.safetensors``.

    Args:
        classifier: what the tasks adapt.
        train: meta-training tasks.
        validation: tasks of other classes, which choose the rule.
        settings: see `MetaTrainSettings`.
        folder: the run's folder; created.
        facts: JSON-compatible facts that tell this run from others (data, encoder, ...): a
            resumed run must have the same.
        training: JSON-compatible facts kept inside the rule file.
        resume: continue the run in the folder, if there is one.

    Raises:
        InputError: the folder holds a run and resume is False, or a run with other settings.
    """

    def __init__(
        self,
        classifier: Classifier,
        train: TaskSource,
        validation: TaskSource,
        settings: MetaTrainSettings,
        folder: Path,
        facts: dict[str, Any],
        training: dict[str, Any],
        resume: bool = False,
    ) -> None:
        self.classifier, self.train, self.validation = classifier, train, validation
        self.settings, self.folder = settings, folder
        self.training = training
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.rule = CoordinateLSTM(hidden_size=settings.hidden_size)
        self.rule.to(classifier.device)
        self.meta_optimizer = torch.optim.Adam(self.rule.parameters(), lr=settings.meta_lr)
        self.best = {name: leaf.clone() for name, leaf in self.rule.state_dict().items()}
        self.progress = _Progress()
        self._open(json.loads(json.dumps({**asdict(settings), **facts})), resume)

    def run(self, report: Callable[[dict[str, Any]], None] = lambda record: None) -> CoordinateLSTM:
        """Meta-train to the end.

        Args:
            report: called with every log record.

        Returns:
            The best rule by validation.
        """
        started = time.monotonic() - self.progress.seconds
        if self.progress.meta_step == 0:
            self._log({"meta_step": 0, **self._validate()}, report)
        while self.progress.meta_step < self.settings.meta_steps:
            record = self._meta_step()
            done = self.progress.meta_step
            last = done == self.settings.meta_steps
            if last or done % self.settings.validate_every == 0:
                record |= self._validate()
            self.progress.seconds = time.monotonic() - started
            self._log({**record, "seconds": round(self.progress.seconds, 2)}, report)
            if last or done % self.settings.checkpoint_every == 0:
                self._save()
        self.rule.load_state_dict(self.best)
        return self.rule

    def _meta_step(self) -> dict[str, Any]:
        """One step of the meta-optimizer; skipped and counted if anything is not finite."""
        settings, progress = self.settings, self.progress
        self.meta_optimizer.zero_grad()
        first = progress.meta_step * settings.tasks_per_meta_step
        results = [self._unroll(first + k) for k in range(settings.tasks_per_meta_step)]
        scale = 1 / sum(len(result.query_losses) for result in results)
        for weight in self.rule.parameters():
            if weight.grad is not None:
                weight.grad.mul_(scale)
        norm = float(torch.nn.utils.clip_grad_norm_(self.rule.parameters(), settings.clip))
        meta_loss = scale * sum(result.meta_loss for result in results)
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

    def _unroll(self, number: int) -> Unrolled:
        """Unroll task `number`, adding to the rule's meta-gradient."""
        settings = self.settings
        task = self.train.load(number)
        self.classifier.reset(task.ways, seed=settings.seed + number)
        longest = settings.unroll.steps
        shortest = longest if settings.shortest is None else settings.shortest
        generator = np.random.default_rng([settings.seed, number])
        return unroll(
            self.classifier.model,
            LearnedOptimizer(self._params(), self.rule),
            task.support_loss(self.classifier),
            task.query_loss(self.classifier),
            settings.unroll.shortened(int(generator.integers(shortest, longest + 1))),
        )

    def _meta_lr(self) -> float:
        """From meta_lr to a tenth of it along half a cosine."""
        done = self.progress.meta_step / self.settings.meta_steps
        return self.settings.meta_lr * (0.55 + 0.45 * math.cos(math.pi * done))

    def _validate(self) -> dict[str, Any]:
        """Score the rule on the validation tasks: mean query loss over all steps; keep the best."""
        budgets = range(1, self.settings.unroll.steps + 1)
        losses, accuracies = [], []
        for number in range(self.settings.validation_tasks):
            task = self.validation.load(number)
            self.classifier.reset(task.ways, seed=_VALIDATION_HEADS + number)
            optimizer = LearnedOptimizer(self._params(), self.rule)
            scores = adapt_and_judge(self.classifier, optimizer, task, budgets).scores
            losses.append([scores[budget].loss for budget in budgets])
            accuracies.append([scores[budget].accuracy for budget in budgets])
        loss = torch.tensor(losses, dtype=torch.float64).mean(dim=0)
        accuracy = torch.tensor(accuracies, dtype=torch.float64).mean(dim=0)
        score = float(loss.mean())
        if score < self.progress.best_score:
            self.progress.best_score, self.progress.best_step = score, self.progress.meta_step
            self.best = {name: leaf.clone() for name, leaf in self.rule.state_dict().items()}
            self._save_rule()
        return {
            "validation": {
                "score": score,
                "loss": finite_or_none(loss.tolist()),
                "accuracy": finite_or_none(accuracy.tolist()),
                "best_step": self.progress.best_step,
            }
        }

    def _params(self) -> list[Tensor]:
        return [param for _, param in self.classifier.trainable()]

    def _save_rule(self) -> None:
        training = {**self.training, "meta_step": self.progress.best_step}
        save_rule(self.rule, self.folder / RULE_FILE, training)

    # -- the folder

    def _open(self, facts: dict[str, Any], resume: bool) -> None:
        run_file = self.folder / RUN_FILE
        if not run_file.exists():
            claim_folder(self.folder)
            write_atomically(run_file, json.dumps(facts, indent=2).encode())
            return
        if not resume:
            raise InputError(
                f"{self.folder} already holds a run; add --resume to continue it, or choose "
                "another --output"
            )
        try:
            self._check_same_run(dict(json.loads(run_file.read_text())), facts)
            if (self.folder / CHECKPOINT_FILE).exists():
                self._restore()
            self._trim_log()
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise InputError(
                f"{self.folder} can't be resumed, its files are damaged ({error}); choose another "
                "--output"
            ) from error
        write_atomically(run_file, json.dumps(facts, indent=2).encode())

    def _trim_log(self) -> None:
        """Drop the log's lines from after the checkpoint: they will be written again."""
        path = self.folder / LOG_FILE
        begun = self.progress.meta_step > 0
        lines = path.read_text().splitlines(keepends=True) if begun and path.exists() else []
        kept = [line for line in lines if _step_of(line) <= self.progress.meta_step]
        write_atomically(path, "".join(kept).encode())

    def _check_same_run(self, saved: dict[str, Any], facts: dict[str, Any]) -> None:
        # more meta-steps continue the same run, checkpoints may come at any rate
        free = {"meta_steps", "checkpoint_every"}
        other = [
            f"{name}: {saved.get(name)!r} there, {facts.get(name)!r} here"
            for name in sorted({*saved, *facts} - free)
            if saved.get(name) != facts.get(name)
        ]
        if other:
            raise InputError(
                f"{self.folder} holds a run with other settings ({'; '.join(other)}); resume it "
                "with its own, or choose another --output"
            )

    def _save(self) -> None:
        tensors = {f"rule.{name}": leaf for name, leaf in self.rule.state_dict().items()}
        tensors |= {f"best.{name}": leaf for name, leaf in self.best.items()}
        for index, state in self.meta_optimizer.state_dict()["state"].items():
            tensors |= {f"meta.{index}.{name}": leaf for name, leaf in state.items()}
        save_tensors(self.folder / CHECKPOINT_FILE, tensors, asdict(self.progress))

    def _restore(self) -> None:
        tensors, progress = read_tensors(self.folder / CHECKPOINT_FILE)
        self.progress = _Progress(**progress)
        self.rule.load_state_dict(_under("rule.", tensors))
        self.best = {
            name: leaf.to(self.classifier.device) for name, leaf in _under("best.", tensors).items()
        }
        state: dict[int, dict[str, Tensor]] = {}
        for name, leaf in _under("meta.", tensors).items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = leaf
        groups = self.meta_optimizer.state_dict()["param_groups"]
        self.meta_optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _log(self, record: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> None:
        path = self.folder / LOG_FILE
        try:
            with path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise InputError(
                f"can't write {path}: {error.strerror}; mend it, then go on with --resume"
            ) from error
        report(record)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): leaf for name, leaf in tensors.items() if name.startswith(prefix)
    }


def _step_of(line: str) -> float:
    """The meta-step of a log line; a line cut off by a crash belongs to no step."""
    try:
        return float(json.loads(line)["meta_step"])
    except (ValueError, KeyError):
        return math.inf


def finite_or_none(losses: Sequence[float]) -> list[float | None]:
    """Losses to 5 digits for a JSON file, which has no NaN and no infinity."""
    return [round(x, 5) if math.isfinite(x) else None for x in losses]
