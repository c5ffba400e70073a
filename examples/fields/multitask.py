"""Conventional multi-task pre-training: AdamW and one joint head over all meta-training classes.

It is the baseline that meta-learning has to beat (Chen et al. 2019, arXiv:1904.04232; Tian et al.
2020, arXiv:2003.11539). Fine-tuning begins at the values that it reaches, as it does with MAML.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnnopt.data.corpus import Corpus
from rnnopt.errors import InputError
from rnnopt.storage.run_folder import INIT_FOLDER, RunFolder
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.frozen import judge_frozen
from rnnopt.tasks.text.start import TextStart
from rnnopt.tasks.text.tasks import LabelledTexts, TextTasks

# The method that scores a validation, a key of `rnnopt.tasks.text.frozen.FROZEN`. It has neither a
# learning rate nor a number of steps to choose.
JUDGED_BY = "nearest-mean"


@dataclass(frozen=True)
class MultitaskSettings:
    """The settings of a run of multi-task pre-training.

    Attributes:
        lr: AdamW's first learning rate. It falls linearly to 0.
        steps: the number of steps.
        batch_size: the number of texts in a batch. For each text a class is drawn uniformly, then
            one of its texts, so that the classes of small and large sources count alike.
        check_every: the number of steps between validations. A checkpoint is written after each
            validation, and the last step is always followed by one.
        validation_tasks: the number of tasks of a validation, the same ones each time.
        seed: decides the joint head and the batches.
    """

    lr: float
    steps: int
    batch_size: int = 32
    check_every: int = 100
    validation_tasks: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "check_every", "validation_tasks"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 0 < self.lr < math.inf:
            raise InputError(f"lr={self.lr}: must be positive and finite")


class MultitaskTraining:
    """One run of multi-task pre-training in its folder.

    A validation measures the accuracy of nearest class means on the features of validation tasks.
    Whenever it is the best so far, the values are written to the folder ``init``, see
    `rnnopt.tasks.text.init_folder`. The first validation is that of the pretrained values.
    ``log.jsonl``, ``run.json`` and the checkpoint are those of `rnnopt.storage.run_folder`.

    Args:
        classifier: the classifier that is trained. It gets the joint head.
        corpus: the meta-training classes.
        validation: tasks of other classes, with a second classifier of the same kind.
        settings: see `MultitaskSettings`.
        folder: the run's folder. It is created, or the run in it is resumed.
        facts: JSON-compatible facts that distinguish this run from others.
        training: JSON-compatible facts that are written beside the values.

    Attributes:
        best_score: the score of the best validation so far.

    Raises:
        InputError: only the output layer trains; the two classifiers are the same object, or differ
            in their trainable parameters; or the folder holds a run with other settings.
    """

    def __init__(
        self,
        classifier: Classifier,
        corpus: Corpus,
        validation: TextTasks,
        settings: MultitaskSettings,
        folder: Path,
        facts: dict[str, Any],
        training: dict[str, Any],
    ) -> None:
        if not classifier.initial_values:
            raise InputError(
                "multi-task pre-training: only the output layer trains, and every task has one "
                "of its own; use tune 'lora' or 'full'"
            )
        if classifier is validation.classifier or classifier.facts != validation.classifier.facts:
            raise InputError(
                f"multi-task pre-training: tasks of {validation.classifier.facts} can't judge "
                f"{classifier.facts} in training; load the same kind of classifier twice"
            )
        self.classifier, self.corpus, self.validation = classifier, corpus, validation
        self.settings, self.training = settings, training
        self._members = [corpus.classes[key] for key in sorted(corpus.classes)]
        classifier.reset(len(self._members), settings.seed)
        self._params = dict(classifier.trainable())
        self._optimizer = torch.optim.AdamW(self._params.values(), lr=settings.lr)
        self._step, self.best_score = 0, -math.inf
        self.folder = RunFolder(folder)
        self.folder.open({**asdict(settings), **facts}, True, self._restore)

    def run(self, report: Callable[[dict[str, Any]], None] = lambda record: None) -> Path:
        """Train to the end.

        Args:
            report: called with every log record.

        Returns:
            The folder of the best values by validation.
        """
        settings = self.settings
        if self._step == 0:
            self._check(None, report)
        while self._step < settings.steps:
            loss = self._train()
            if self._step % settings.check_every == 0 or self._step == settings.steps:
                self._check(loss, report)
        return self.folder.path / INIT_FOLDER

    def draw(self, step: int) -> tuple[list[str], list[int]]:
        """Draw the batch of a step: its texts, and the indices of their classes.

        The batch depends on the seed and the step only.
        """
        generator = np.random.default_rng([self.settings.seed, step])
        labels = generator.integers(len(self._members), size=self.settings.batch_size).tolist()
        rows = [generator.choice(self._members[label]) for label in labels]
        return [self.corpus.texts[row] for row in rows], labels

    def _train(self) -> float:
        """Take one step of AdamW; return the loss before it, nats per text."""
        settings = self.settings
        texts, labels = self.draw(self._step)
        batch = LabelledTexts.read(self.classifier, texts, labels, again=False)
        self._optimizer.param_groups[0]["lr"] = settings.lr * (1 - self._step / settings.steps)
        self._optimizer.zero_grad()
        loss = batch.loss(self.classifier, self.classifier.model)
        torch.autograd.backward(loss)
        self._optimizer.step()
        self._step += 1
        return float(loss.detach())

    def _check(self, loss: float | None, report: Callable[[dict[str, Any]], None]) -> None:
        """Validate, write the values if they are the best so far, and write a checkpoint."""
        names = self.classifier.initial_values
        values = {name: p.detach() for name, p in self._params.items() if name in names}
        start, judged = TextStart(values=values), self.validation.classifier
        scores = []
        for number in range(self.settings.validation_tasks):
            task = self.validation.load(number)
            start.begin(judged, task, number)
            scores.append(judge_frozen(JUDGED_BY, judged, task)["accuracy"])
        score = float(np.mean(scores))
        if score > self.best_score:
            self.best_score = score
            training = {**self.training, "step": self._step}
            start.save(self.folder.path / INIT_FOLDER, self.classifier, training)
        # a run folder calls the steps of every kind of run meta-steps
        finite = loss if loss is not None and math.isfinite(loss) else None
        record = {"meta_step": self._step, "loss": finite, "validation": {"score": score}}
        self.folder.log(record)
        report(record)
        tensors = dict(self._params)
        for index, state in self._optimizer.state_dict()["state"].items():
            tensors |= {f"adamw.{index}.{name}": leaf for name, leaf in state.items()}
        self.folder.save(tensors, {"meta_step": self._step, "best_score": self.best_score})

    def _restore(self, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        self._step, self.best_score = progress["meta_step"], progress["best_score"]
        with torch.no_grad():
            for name, param in self._params.items():
                param.copy_(tensors[name])
        state: dict[int, dict[str, Tensor]] = {}
        for key, leaf in tensors.items():
            if key.startswith("adamw."):
                _, index, name = key.split(".")
                state.setdefault(int(index), {})[name] = leaf
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
