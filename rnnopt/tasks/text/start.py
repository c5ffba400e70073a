"""Where adaptation to a task starts: initial values, the task's own head, and what is stepped.

Shapes: B texts, C ways (classes), H the output layer's input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from rnnopt.errors import InputError
from rnnopt.optim.optimizer import LearnedOptimizer
from rnnopt.rules.meta_sgd import MetaSGD
from rnnopt.rules.protocol import UpdateRule
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.tasks import LabelledTexts

Head = Literal["random", "zero", "prototype"]
Adapted = Literal["all", "head"]


@dataclass(frozen=True)
class Start:
    """How every task of a run starts.

    Attributes:
        head: the output layer: drawn (``"random"``), zeros, or made of the support set's class
            means (``"prototype"``, see `prototype_head`).
        adapted: what is stepped: all that trains, or of it only what is outside the encoder (ANIL,
            Raghu et al. 2020, arXiv:1909.09157).
        values: initial values, by name, in place of the pretrained ones; None leaves those.
    """

    head: Head = "random"
    adapted: Adapted = "all"
    values: Mapping[str, Tensor] | None = None

    def begin(self, classifier: Classifier, support: LabelledTexts, ways: int, seed: int) -> None:
        """Put the classifier where this task starts; build the optimizer afterwards.

        Args:
            classifier: see `Classifier.reset`.
            support: the task's texts to adapt on.
            ways: C.
            seed: decides what is drawn.

        Raises:
            InputError: fewer than 2 ways; a prototype head for an output layer without bias.
        """
        classifier.reset(ways, seed)
        output = classifier.output
        with torch.no_grad():
            if self.values is not None:
                for name, param in classifier.trainable():
                    if name in self.values:
                        param.copy_(self.values[name])
            if self.head == "zero":
                for param in output.parameters():
                    param.zero_()
            elif self.head == "prototype":
                made = prototype_head(classifier, support)
                for tensor, value in zip(_with_bias(output), made):
                    tensor.copy_(value)

    def optimizer(
        self, classifier: Classifier, rule: UpdateRule, lr: float = 1.0
    ) -> LearnedOptimizer:
        """The optimizer of this task.

        Args:
            classifier: after `begin`.
            rule: the inner rule.
            lr: multiplies its steps.

        Raises:
            InputError: a `MetaSGD` that doesn't know the classifier's parameters.
        """
        params = self.params(classifier)
        optimizer = LearnedOptimizer(list(params.values()), rule, lr=lr)
        if isinstance(rule, MetaSGD):
            rule.assign(optimizer, params)
        return optimizer

    def params(self, classifier: Classifier) -> dict[str, nn.Parameter]:
        """What is stepped, by name."""
        params = dict(classifier.trainable())
        if self.adapted == "head":
            return {name: params[name] for name in classifier.head_names()}
        return params


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
