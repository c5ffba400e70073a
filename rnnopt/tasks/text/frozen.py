"""Classifiers on frozen embeddings, which solve a task without fine-tuning.

The features are the inputs of the output layer before the first step. The mean of the support set
is subtracted, and each vector is scaled to length 1. Wang et al. 2019 (arXiv:1911.04623) subtract
the mean of other classes, which a single task does not have.

Shapes: B texts, D features, C ways.
"""

from __future__ import annotations

import warnings
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

PENALTY = 1.0  # L2 penalty on the weights, against the *sum* of the losses: 1 / C of scikit-learn
_ITERATIONS, _TOLERANCE = (
    1000,
    1e-6,
)  # the problem is convex and small: L-BFGS converges long before


def nearest_mean(features: Tensor, labels: Tensor, query: Tensor, ways: int) -> Tensor:
    """Classify by the nearest class mean, as a prototypical network does.

    The softmax of the logits is the model of Snell et al. 2017 (arXiv:1703.05175). scikit-learn's
    `NearestCentroid` divides by the deviation within the classes, which one-shot tasks lack.

    Args:
        features: of the support texts, (B', D).
        labels: their classes, (B',); each class has at least one text.
        query: features of the query texts, (B, D).
        ways: C.

    Returns:
        Logits (B, C): minus the squared distance to the mean of each class.
    """
    members = one_hot(labels, ways).to(features.dtype)  # (B', C)
    means = (members.T @ features) / members.sum(dim=0).unsqueeze(1)  # (C, D)
    return -torch.cdist(query, means).square()


def logistic(features: Tensor, labels: Tensor, query: Tensor, ways: int) -> Tensor:
    """Classify by multinomial logistic regression, as Tian et al. 2020 do (arXiv:2003.11539).

    scikit-learn minimises ``sum cross-entropy + PENALTY / 2 * |weights|**2``. The bias has no
    penalty. The arguments are those of `nearest_mean`.

    Returns:
        Logits (B, C).
    """
    from sklearn.linear_model import LogisticRegression

    # With two classes scikit-learn has one weight vector, the difference of the two of a softmax.
    # The same minimum then needs half the penalty: the sum of squares is half of the difference's.
    penalty = PENALTY / 2 if ways == 2 else PENALTY
    model = LogisticRegression(C=1 / penalty, max_iter=_ITERATIONS, tol=_TOLERANCE)
    with warnings.catch_warnings():
        # In one-shot tasks every text is a class of its own, which scikit-learn takes for an error.
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
        model.fit(features.cpu().numpy(), labels.cpu().numpy())
    logits = torch.from_numpy(model.decision_function(query.cpu().numpy())).to(query)
    return torch.stack([-logits, logits], dim=1) / 2 if ways == 2 else logits


FROZEN: Mapping[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {
    "nearest-mean": nearest_mean,
    "logistic": logistic,
}


def judge_frozen(name: str, classifier: Classifier, task: TextTask) -> Scores:
    """Fit a classifier on the features of the support texts and score it on the query texts.

    Args:
        name: a key of `FROZEN`.
        classifier: at its starting values for this task; it stays as it is.
        task: the task.

    Returns:
        Loss in nats per text, accuracy and macro F1 on the query texts.
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


# The same as functions of learner and task, for `rnnopt.evaluation.comparison.Comparison`.
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
