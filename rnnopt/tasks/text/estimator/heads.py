"""Linear heads on frozen embeddings, and the temperature of their probabilities.

Shapes: B texts, H embedding size, C classes. Everything here is float64 on the CPU.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

# The inverse penalty of logistic regression, scikit-learn's C, on embeddings whose mean squared
# distance from their centre is 1, so that the same values suit every encoder. The defaults were
# chosen on validation classes (CLINC150, StackOverflow, TREC) and train classes (HuffPost) with
# all-MiniLM-L6-v2. The first penalty is the best of the five with 2 to 10 labels a class. The
# single ones are for one label a class, where no text can be held out to choose by.
INVERSE_PENALTIES = (3.0, 0.1, 1.0, 10.0, 100.0)
SINGLE_PENALTY, SINGLE_TEMPERATURE = 1.0, 0.08
ITERATIONS, TOLERANCE = 300, 1e-4
TEMPERATURES = np.geomspace(0.02, 50.0, 157)  # 5 % apart


@dataclass(frozen=True)
class LinearHead:
    """``logits = embeddings @ weight.T + bias``.

    Attributes:
        weight: (C, H).
        bias: (C,).
    """

    weight: np.ndarray
    bias: np.ndarray

    def logits(self, embeddings: np.ndarray) -> np.ndarray:
        """(B, C), of embeddings (B, H)."""
        return embeddings.astype(np.float64) @ self.weight.T + self.bias

    def around(self, centre: np.ndarray) -> LinearHead:
        """The head that gives the same logits for embeddings less a centre, (H,).

        In float32 it rounds less: embeddings have much in common, which large weights multiply.
        """
        return LinearHead(self.weight, self.bias + self.weight @ centre)

    def cooled(self, temperature: float) -> LinearHead:
        """The head whose logits are these divided by a temperature."""
        return LinearHead(self.weight / temperature, self.bias / temperature)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithms of the probabilities, (B, C)."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def logistic_head(
    embeddings: np.ndarray, labels: np.ndarray, weights: np.ndarray, inverse_penalty: float
) -> LinearHead:
    """Multinomial logistic regression by scikit-learn.

    Args:
        embeddings: (B, H).
        labels: (B,), 0 to C - 1, each at least once.
        weights: (B,), of each text's loss.
        inverse_penalty: scikit-learn's C, see `INVERSE_PENALTIES`.
    """
    centre, scale = spread(embeddings)
    # With two classes scikit-learn has one weight vector, the difference of the two of a softmax.
    # The same minimum then needs half the penalty: the sum of squares is half of the difference's.
    two = labels.max() == 1
    penalty = 2 * inverse_penalty if two else inverse_penalty
    weight, bias = _logistic_regression((embeddings - centre) / scale, labels, weights, penalty)
    if two:
        weight, bias = np.stack([-weight[0], weight[0]]) / 2, np.array([-bias[0], bias[0]]) / 2
    weight = weight / scale
    return LinearHead(weight, bias - weight @ centre)


def one_vs_rest_head(
    embeddings: np.ndarray, labels: np.ndarray, weights: np.ndarray, inverse_penalty: float
) -> LinearHead:
    """A binary logistic regression by scikit-learn for each class.

    A class that all texts have, or none, has a constant logit, ``log((P + 1/2) / (N + 1/2))`` of P
    texts with it and N without.

    Args:
        embeddings: (B, H).
        labels: (B, C).
        weights: (B,), of each text's loss.
        inverse_penalty: scikit-learn's C.
    """
    centre, scale = spread(embeddings)
    rows = (embeddings - centre) / scale
    weight, bias = np.zeros((labels.shape[1], rows.shape[1])), np.zeros(labels.shape[1])
    for number, column in enumerate(labels.T):
        if column.min() == column.max():
            positive = column.sum()
            bias[number] = np.log((positive + 0.5) / (len(column) - positive + 0.5))
            continue
        coefficients, intercept = _logistic_regression(rows, column, weights, inverse_penalty)
        weight[number], bias[number] = coefficients[0] / scale, intercept[0]
    return LinearHead(weight, bias - weight @ centre)


def _logistic_regression(
    rows: np.ndarray, labels: np.ndarray, weights: np.ndarray, inverse_penalty: float
) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's coefficients and intercepts; for two classes it has one of each."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=inverse_penalty, max_iter=ITERATIONS, tol=TOLERANCE)
    with warnings.catch_warnings():
        # one text a class, which scikit-learn takes for an error
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(rows, labels, sample_weight=weights)
    return model.coef_, model.intercept_


def class_mean_head(embeddings: np.ndarray, labels: np.ndarray) -> LinearHead:
    """Logits that are ``-|x - c_k|^2 / s``, up to what all classes share; c_k is a class's mean.

    The nearest class mean, as in prototypical networks (Snell et al. 2017, arXiv:1703.05175), as a
    linear head (Triantafillou et al. 2020, arXiv:1903.03096); s is the mean squared distance of the
    embeddings from their centre.

    Args:
        embeddings: (B, H).
        labels: (B,), 0 to C - 1, each at least once.
    """
    centre, scale = spread(embeddings)
    members = np.eye(labels.max() + 1)[labels]  # (B, C)
    means = (members.T @ (embeddings - centre)) / members.sum(axis=0)[:, None] / scale  # (C, H)
    weight = 2 * means / scale
    return LinearHead(weight, -np.square(means).sum(axis=1) - weight @ centre)


def best_temperature(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """The temperature at which logits of texts held out have the lowest cross-entropy.

    Temperature scaling, Guo et al. 2017 (arXiv:1706.04599). A few texts that are all right would
    ask for infinite confidence. Targets are therefore smoothed as Platt does (1999, "Probabilistic
    outputs for support vector machines"): of B texts the right class has ``(B + 1) / (B + 2)``.

    Args:
        logits: (B, C).
        labels: (B,).
        weights: (B,).
    """
    count, ways = logits.shape
    rest = 1 / (count + 2)
    targets = np.full((count, ways), rest / (ways - 1))
    targets[np.arange(count), labels] = 1 - rest
    losses = [
        -(weights * (targets * log_softmax(logits / temperature)).sum(axis=1)).sum()
        for temperature in TEMPERATURES
    ]
    return float(TEMPERATURES[int(np.argmin(losses))])


def spread(embeddings: np.ndarray) -> tuple[np.ndarray, float]:
    """The centre (H,) of embeddings, and the root of the mean squared distance from it."""
    centre = embeddings.mean(axis=0)
    scale = float(np.sqrt(np.square(embeddings - centre).sum(axis=1).mean()))
    return centre, scale or 1.0  # texts that are all alike
