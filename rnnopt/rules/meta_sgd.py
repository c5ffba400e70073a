"""`MetaSGD`: gradient descent with a learned rate for every tensor.

Shapes: N coordinates of one tensor, M tensors that have a rate of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rnnopt.errors import InputError
from rnnopt.rules.protocol import State, arithmetic_dtype


class MetaSGD(nn.Module):
    """Stochastic gradient descent whose learning rates are meta-learned, one for each tensor.

    ``update = -step_size * exp(log_factor[tensor]) * g``. Li et al. 2017 (Meta-SGD,
    arXiv:1707.09835) learn a rate of any sign for each coordinate; one positive rate a tensor, as
    in Antoniou et al. 2019 (arXiv:1810.09502), takes M numbers instead of as many as the model has.

    A rule is not told which tensor it steps, so the tensor's index is part of its state; `assign`
    writes it. A tensor without an index takes the geometric mean of all rates.

    Args:
        names: the names of the M tensors.
        step_size: the initial learning rate of all of them.

    Raises:
        InputError: there are no names, or the step size is not positive and finite.
    """

    def __init__(self, names: Sequence[str], step_size: float = 0.1) -> None:
        super().__init__()
        if not names:
            raise InputError("MetaSGD without names of tensors: give at least one")
        if not 0 < step_size < math.inf:
            raise InputError(f"step_size={step_size}: must be positive and finite")
        self.names = list(names)
        self.step_size = step_size
        self.log_factor = nn.Parameter(torch.zeros(len(self.names)))

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as plain values."""
        return {"names": self.names, "step_size": self.step_size}

    def assign(self, optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor]) -> None:
        """Write each tensor's index to the state of an optimizer that has taken no step.

        Args:
            optimizer: a `LearnedOptimizer` with this rule.
            params: its parameters by name.

        Raises:
            InputError: this rule has no rate for one of the names.
        """
        foreign = [name for name in params if name not in self.names]
        if foreign:
            raise InputError(
                f"the rule has learned rates for {len(self.names)} tensors ({self.names[0]}, ...), "
                f"and none for {foreign[0]}, one of {len(foreign)} such here; train what it was "
                "meta-trained on (--encoder, --tune, --lora-rank, --top-layers), or take another "
                "--rule"
            )
        for name, param in params.items():
            optimizer.state[param] = {"number": _number(self.names.index(name), param)}

    def init_state(self, param: Tensor) -> State:
        """``number``: the tensor's index, 0-d float32; before `assign` it is M, no tensor's."""
        return {"number": _number(len(self.names), param)}

    def forward(self, grad: Tensor, state: State, param: Tensor) -> tuple[Tensor, State]:
        """See `rnnopt.rules.protocol.UpdateRule.__call__`."""
        factors = self.log_factor.to(grad.device)
        factors = torch.cat([factors, factors.mean(dim=0, keepdim=True)])  # (M + 1,)
        # indexing by a tensor of one element and not by a number: nothing waits for a GPU
        rate = self.step_size * torch.exp(factors[state["number"].long().reshape(1)])  # (1,)
        return -rate.to(arithmetic_dtype(param)) * grad.to(arithmetic_dtype(param)), state


def _number(number: int, param: Tensor) -> Tensor:
    """A float, as all state of a rule is."""
    return torch.tensor(float(number), dtype=torch.float32, device=param.device)
