"""Where adaptation of a classifier starts: initial values, and the task's own head.

Shapes: B texts, C ways (classes), H the output layer's input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from rnnopt.errors import InputError
from rnnopt.tasks.protocol import Learner, Task
from rnnopt.tasks.start import Start
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.tasks import LabelledTexts, TextTask

Head = Literal["random", "zero", "prototype"]


@dataclass(frozen=True)
class TextStart(Start):
    """How every task of a run starts: initial values, and the task's own head.

    Attributes:
        head: the output layer: drawn (``"random"``), zeros, or made of the support set's class
            means (``"prototype"``, see `prototype_head`).
    """

    head: Head = "random"

    def begin(self, learner: Learner, task: Task, seed: int) -> None:
        """As `Start.begin`.

        Raises:
            InputError: fewer than 2 ways; a prototype head for an output layer without bias.
        """
        super().begin(learner, task, seed)
        classifier, task = cast(Classifier, learner), cast(TextTask, task)
        output = classifier.output
        with torch.no_grad():
            if self.head == "zero":
                for param in output.parameters():
                    param.zero_()
            elif self.head == "prototype":
                made = prototype_head(classifier, task.support)
                for tensor, value in zip(_with_bias(output), made):
                    tensor.copy_(value)

    def gradient_through(
        self, learner: Learner, task: Task, gradient: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What reaches the initial values through a task's prototype head.

        The head is a function of them, so their meta-gradient has a second part, the head's own
        pulled back through `prototype_head`: exactly, whatever the order.
        """
        if self.head != "prototype":
            return {}
        classifier, task = cast(Classifier, learner), cast(TextTask, task)
        names = [f"{classifier.output_name}.{part}" for part in ("weight", "bias")]
        made = prototype_head(classifier, task.support)
        initial = classifier.initial_values
        params = [(name, p) for name, p in classifier.trainable() if name in initial]
        slopes = torch.autograd.grad(
            made, [param for _, param in params], [gradient[name] for name in names],
            allow_unused=True,
        )  # fmt: skip
        return {name: slope for (name, _), slope in zip(params, slopes) if slope is not None}

    def save(self, folder: Path, learner: Learner, training: Mapping[str, Any]) -> None:
        """Write them as a folder that `transformers` or `peft` loads; see `save_init`."""
        from rnnopt.tasks.text.init_folder import save_init  # which reads starts, too

        save_init(folder, cast(Classifier, learner), self, training)


def prototype_head(classifier: Classifier, support: LabelledTexts) -> tuple[Tensor, Tensor]:
    """An output layer whose logits are ``-|x - c_k|^2 / s``, up to what all classes share.

    Triantafillou et al. 2020 (Proto-MAML, arXiv:1903.03096): ``W_k = 2 c_k, b_k = -|c_k|^2`` with
    the class means c_k. Two changes. The mean of the class means, m, is taken off W, which changes
    no probability: ``W_k = 2 (c_k - m) / s, b_k = -(c_k - m)(c_k + m) / s``. And s, the mean of
    ``|c_k - m|^2``, makes the head the same at every scale of the features: with s = 1 a wide
    encoder's logits lie so far apart that the first steps have no gradient to go by.

    Args:
        classifier: at its initial values; no dropout.
        support: texts of every class.

    Returns:
        Weight (C, H) and bias (C,), differentiable.

    Raises:
        InputError: the output layer has no bias.
    """
    _with_bias(classifier.output)
    features = torch.cat([classifier.features(batch) for batch, _ in support.pieces])  # (B, H)
    labels = torch.cat([labels for _, labels in support.pieces])
    chosen = one_hot(labels, classifier.ways).to(features.dtype)  # (B, C)
    # a matrix product and no scatter: it adds in the same order at every run, on a GPU too
    means = (chosen.T @ features) / chosen.sum(dim=0).unsqueeze(1)  # (C, H)
    middle = means.mean(dim=0)
    spread = (means - middle).square().sum(dim=1).mean()
    spread = spread.clamp_min(torch.finfo(spread.dtype).tiny)  # texts that are all alike
    weight = 2 * (means - middle) / spread
    bias = -((means - middle) * (means + middle)).sum(dim=1) / spread
    return weight, bias


def _with_bias(output: nn.Linear) -> tuple[Tensor, Tensor]:
    if output.bias is None:
        raise InputError(
            "head 'prototype': this encoder's output layer has no bias to hold the prototypes' "
            "lengths; use --head zero or random"
        )
    return output.weight, output.bias
