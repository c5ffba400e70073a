"""Initial values that are meta-learned: MAML, its first-order kind, ANIL and Reptile.

They are those of all that trains, but for the output layer: its rows are a task's classes, which
differ in number and in order from task to task, so each task begins with one of its own, see
`rnnopt.tasks.text.start.Start`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from rnnopt.errors import InputError
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.start import prototype_head
from rnnopt.tasks.text.tasks import Task

Init = Literal["pretrained", "maml", "reptile"]


class InitialValues(nn.Module):
    """A classifier's initial values as parameters of the meta-optimizer.

    Args:
        classifier: whose loaded values they are at first.

    Raises:
        InputError: only the output layer trains.
    """

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self._pretrained = classifier.start
        if not self._pretrained:
            raise InputError(
                "--init: of this classifier only the output layer trains, and every task has one "
                "of its own: there are no initial values to learn; use --tune lora or full"
            )
        for name, value in self._pretrained.items():
            self.register_parameter(_key(name), nn.Parameter(value.clone()))

    def values(self) -> dict[str, Tensor]:
        """The parameters by their names in the classifier."""
        return {name: self.get_parameter(_key(name)) for name in self._pretrained}

    def add(self, gradient: Mapping[str, Tensor]) -> None:
        """Add one task's meta-gradient, by name, see `rnnopt.meta.unroll.UnrollSettings.initial`."""
        for name, value in self.values().items():
            _add(value, gradient[name])

    def add_through_head(
        self, gradient: Mapping[str, Tensor], classifier: Classifier, task: Task
    ) -> None:
        """Add what reaches the initial values through a task's prototype head.

        The head is a function of them, so their meta-gradient has a second part, the head's own
        pulled back through `rnnopt.tasks.text.start.prototype_head`: exactly, whatever the order.

        Args:
            gradient: one task's meta-gradient, by name.
            classifier: at the task's start.
            task: the task.
        """
        names = [f"{classifier.output_name}.{part}" for part in ("weight", "bias")]
        made = prototype_head(classifier, task.support)
        params = [(name, p) for name, p in classifier.trainable() if name in self._pretrained]
        slopes = torch.autograd.grad(
            made, [param for _, param in params], [gradient[name] for name in names],
            allow_unused=True,
        )  # fmt: skip
        for (name, _), slope in zip(params, slopes):
            if slope is not None:
                _add(self.get_parameter(_key(name)), slope)

    @torch.no_grad()
    def add_penalty(self, strength: float) -> None:
        """Add the gradient of ``strength / 2 * |theta_0 - pretrained|^2``.

        L2-SP (Li, Grandvalet & Davoine 2018, arXiv:1802.01483): what few classes teach the initial
        values should not cost what pretraining did.
        """
        for name, value in self.values().items():
            _add(value, strength * (value - self._pretrained[name]))

    @torch.no_grad()
    def distance(self) -> float:
        """|theta_0 - pretrained|, the Euclidean norm over all values."""
        return float(norm(value - self._pretrained[name] for name, value in self.values().items()))


def norm(tensors: Iterable[Tensor]) -> Tensor:
    """The Euclidean norm over all elements."""
    norms = [torch.linalg.vector_norm(tensor) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms))


def _add(value: Tensor, gradient: Tensor) -> None:
    value.grad = gradient.clone() if value.grad is None else value.grad + gradient


def _key(name: str) -> str:
    """A module's parameters may have no dots in their names."""
    return name.replace(".", "/")
