"""Where adaptation of a classifier starts: the initial values, and the task's own output layer.

Shapes: B texts, C ways (classes), H input size of the output layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

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
    """How adaptation of a classifier starts on every task of a run.

    Attributes:
        head: the output layer: drawn at random (``"random"``), all zeros (``"zero"``), or computed
            from the class means of the support set (``"prototype"``, see `prototype_head`).

    Raises:
        InputError: `adapted` or `head` is something else.
    """

    head: Head = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head not in get_args(Head):
            raise InputError(f"head={self.head!r}: choose from {', '.join(get_args(Head))}")

    def begin(self, learner: Learner, task: Task, seed: int) -> None:
        """Put the classifier where this task starts, see `Start.begin`.

        Raises:
            InputError: the task has fewer than 2 ways, or the head is a prototype head and the
                output layer has no bias.
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
        """The part of the meta-gradient that reaches the initial values through a prototype head.

        A prototype head is a function of the initial values. Their meta-gradient therefore has a
        second part: the head's meta-gradient, multiplied by the Jacobian of `prototype_head`. This
        part is exact for either order.
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
        """Write the initial values as a folder that `transformers` or `peft` loads.

        See `rnnopt.tasks.text.init_folder.save_init`.
        """
        from rnnopt.tasks.text.init_folder import save_init  # it imports this module

        save_init(folder, cast(Classifier, learner), self, training)


def prototype_head(classifier: Classifier, support: LabelledTexts) -> tuple[Tensor, Tensor]:
    """An output layer whose logits are ``-|x - c_k|^2 / s``, up to a term that all classes share.

    Proto-MAML (Triantafillou et al. 2020, arXiv:1903.03096) sets ``W_k = 2 c_k, b_k = -|c_k|^2``,
    where c_k is the mean of the features of class k. This function makes two changes. It subtracts
    the mean m of the class means, which changes no probability, and divides by s, the mean of
    ``|c_k - m|^2``: ``W_k = 2 (c_k - m) / s, b_k = -(c_k - m)(c_k + m) / s``. The division makes
    the head independent of the scale of the features. With s = 1 the logits of a wide encoder are
    so far apart that the first steps have almost no gradient.

    Args:
        classifier: the classifier, at its initial values and without dropout.
        support: the support set, with texts of every class.

    Returns:
        Weight (C, H) and bias (C,), differentiable.

    Raises:
        InputError: the output layer has no bias.
    """
    _with_bias(classifier.output)
    features = torch.cat([classifier.features(batch) for batch, _ in support.pieces])  # (B, H)
    labels = torch.cat([labels for _, labels in support.pieces])
    chosen = one_hot(labels, classifier.ways).to(features.dtype)  # (B, C)
    # A matrix product adds in the same order in every run, on a GPU as well; a scatter does not.
    means = (chosen.T @ features) / chosen.sum(dim=0).unsqueeze(1)  # (C, H)
    middle = means.mean(dim=0)
    spread = (means - middle).square().sum(dim=1).mean()
    spread = spread.clamp_min(torch.finfo(spread.dtype).tiny)  # 0 if all texts are alike
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
