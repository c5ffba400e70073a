"""What depends on whether a text has one label or several.

Shapes: B texts, H embedding size, C classes. Labels are (B,) class numbers where a text has one
label, and (B, C) of zeros and ones where it may have several or none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
from torch import Tensor

from rnnopt.tasks.text.estimator.heads import LinearHead

Fold = tuple[np.ndarray, np.ndarray]  # indices of the texts to fit on, and of those held out
MakeHead = Callable[[np.ndarray, np.ndarray, np.ndarray], LinearHead]


class Objective(Protocol):
    """A loss, its probabilities, and how held-out texts are drawn and judged.

    Attributes:
        single_penalty, single_temperature: of logistic regression where no text can be held out.
    """

    single_penalty: float
    single_temperature: float

    def ways(self, labels: np.ndarray) -> int:
        """C."""
        ...

    def counts(self, labels: np.ndarray) -> np.ndarray:
        """How many texts each class has, (C,)."""
        ...

    def folds(self, labels: np.ndarray, most: int, seed: int) -> list[Fold]:
        """At most so many folds that hold out every text once that can be held out."""
        ...

    def logistic(self, inverse_penalty: float) -> MakeHead:
        """A function of embeddings, labels and weights that fits logistic regression."""
        ...

    def others(self) -> Mapping[str, MakeHead]:
        """Heads other than logistic regression that may be a start, by name."""
        ...

    def temperature(self, logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
        """The temperature that suits logits (B, C) of texts held out."""
        ...

    def losses(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Nats of each text, (B,)."""
        ...

    def alike(self, labels: Tensor) -> Tensor:
        """How much two texts have their labels in common, (B, B), from 0 to 1."""
        ...

    def right(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Whether each text's answer is right, (B,)."""
        ...

    def f1(self, logits: np.ndarray, labels: np.ndarray) -> tuple[float, float] | None:
        """Micro and macro F1 of texts held out; None where accuracy says enough."""
        ...

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Of each class, (B, C)."""
        ...
