"""Classifiers on frozen embeddings: what a task gives without any fine-tuning.

Features are what the output layer reads before the first step, less the mean of the support set's,
scaled to length 1 (Wang et al. 2019, arXiv:1911.04623, who take the mean of other classes, which a
task hasn't). Shapes: B texts, D features, C ways.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

from rnnopt.tasks.metrics import classification_metrics, confusion_matrix
from rnnopt.tasks.protocol import Scores, bounded_loss
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.encoder.tokens import Batch
from rnnopt.tasks.text.tasks import TextTask

ITERATIONS = 200  # of L-BFGS; the loss is convex and a task small, so it ends long before
PENALTY = 1.0  # of the squared weights against the *sum* of the losses: scikit-learn's C = 1


def nearest_mean(features: Tensor, labels: Tensor, query: Tensor, ways: int) -> Tensor:
    """Logits (B, C): minus the squared distance to each class's mean.

    The softmax of those is a prototypical network's (Snell et al. 2017, arXiv:1703.05175).

    Args:
        features: of the support texts, (B', D).
        labels: their classes, (B',).
        query: features of the query texts, (B, D).
        ways: C.
    """
    members = one_hot(labels, ways).to(features.dtype)  # (B', C)
    means = (members.T @ features) / members.sum(dim=0).unsqueeze(1)  # (C, D)
    return -torch.cdist(query, means).square()


def logistic(features: Tensor, labels: Tensor, query: Tensor, ways: int) -> Tensor:
    """Logits (B, C) of multinomial logistic regression, as in Tian et al. 2020 (arXiv:2003.11539).

    Minimises ``sum cross-entropy + PENALTY / 2 * |weights|**2``, with no penalty on the bias, by
    L-BFGS. Arguments as for `nearest_mean`.
    """
    weight = features.new_zeros(ways, features.shape[1], requires_grad=True)
    bias = features.new_zeros(ways, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        fit = cross_entropy(features @ weight.T + bias, labels, reduction="sum")
        total = fit + PENALTY / 2 * weight.square().sum()
        torch.autograd.backward(total)
        return total

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return (query @ weight.T + bias).detach()


FROZEN: Mapping[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {
    "nearest-mean": nearest_mean,
    "logistic": logistic,
}


def judge_frozen(name: str, classifier: Classifier, task: TextTask) -> Scores:
    """Fit one of `FROZEN` on a task's support texts and judge it on its query texts.

    Args:
        name: which.
        classifier: at its starting values for this task.
        task: the task.
    """
    (features, labels), (query, truth) = (
        _features(classifier, texts.pieces) for texts in (task.support, task.query)
    )
    centre = features.mean(dim=0)
    features, query = (normalize(rows - centre, dim=1) for rows in (features, query))
    logits = FROZEN[name](features, labels, query, task.ways)
    predicted = logits.argmax(dim=1).cpu().numpy()
    metrics = classification_metrics(confusion_matrix(predicted, truth.cpu().numpy(), task.ways))
    loss = bounded_loss(float(cross_entropy(logits, truth)))
    return {"loss": loss, "accuracy": metrics.accuracy, "f1": metrics.f1}


# As a comparison takes them, see `rnnopt.evaluation.comparison.Comparison`.
DIRECT: Mapping[str, Callable[[Any, Any], Scores]] = {
    name: partial(judge_frozen, name) for name in FROZEN
}


@torch.no_grad()
def _features(
    classifier: Classifier, pieces: Sequence[tuple[Batch, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Features (B, D) in float64, and labels (B,)."""
    read = [classifier.features(batch) for batch, _ in pieces]
    labels = torch.cat([labels for _, labels in pieces])
    return torch.cat(read).double(), labels
