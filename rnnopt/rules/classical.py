"""Classical optimizers as update rules: controls with a known result, and baselines.

They obey the protocol of the learned rule (see `rnnopt.rules.protocol` for shapes), so any test,
plot or unroll can exchange one for another.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from rnnopt.rules.protocol import State, arithmetic_dtype


class SGD(nn.Module):
    """Stochastic gradient descent with heavy-ball momentum, as `torch.optim.SGD`.

    ``b = momentum * b + g;  update = -step_size * b``

    Args:
        step_size: the learning rate.
        momentum: decay rate of the velocity; 0 keeps no state.
    """

    def __init__(self, step_size: float, momentum: float = 0.0) -> None:
        super().__init__()
        self.step_size = step_size
        self.momentum = momentum

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as plain values."""
        return {"step_size": self.step_size, "momentum": self.momentum}

    def init_state(self, param: Tensor) -> State:
        """``momentum``: (N,), zeros; absent without momentum."""
        if not self.momentum:
            return {}
        return {"momentum": torch.zeros_like(param, dtype=arithmetic_dtype(param)).reshape(-1)}

    def forward(self, grad: Tensor, state: State, param: Tensor) -> tuple[Tensor, State]:
        """See `rnnopt.rules.protocol.UpdateRule.__call__`."""
        direction = grad.to(arithmetic_dtype(param))
        if self.momentum:
            direction = self.momentum * state["momentum"] + direction
            state = {"momentum": direction}
        return -self.step_size * direction, state


class AdamW(nn.Module):
    """Adam (Kingma & Ba 2015, arXiv:1412.6980) with decoupled decay, as `torch.optim.AdamW`.

    ``update = -step_size * (m_hat / (sqrt(v_hat) + eps) + weight_decay * param)``

    Args:
        step_size: the learning rate.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled; 0 is plain Adam.
    """

    def __init__(
        self,
        step_size: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__()
        self.step_size = step_size
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay

    def init_state(self, param: Tensor) -> State:
        """``m``, ``v``: (N,), zeros; ``step``: 0-d float32, zero."""
        return init_moments(param, arithmetic_dtype(param))

    def forward(self, grad: Tensor, state: State, param: Tensor) -> tuple[Tensor, State]:
        """See `rnnopt.rules.protocol.UpdateRule.__call__`."""
        grad = grad.to(arithmetic_dtype(param))
        state = next_moments(grad, state, self.betas)
        m_hat, root = debias(state, self.betas)
        direction = m_hat / (root + self.eps) + self.weight_decay * param
        return -self.step_size * direction, state


class Adam(AdamW):
    """`AdamW` without decay, as `torch.optim.Adam`."""

    def __init__(
        self, step_size: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(step_size, betas, eps, weight_decay=0.0)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as plain values."""
        return {"step_size": self.step_size, "betas": list(self.betas), "eps": self.eps}


def init_moments(param: Tensor, dtype: torch.dtype) -> State:
    """Adam's state before the first step: ``m``, ``v`` (N,) and ``step`` (0-d), all zero."""
    zeros = torch.zeros(param.numel(), dtype=dtype, device=param.device)
    step = torch.zeros((), dtype=torch.float32, device=param.device)
    return {"m": zeros, "v": zeros.clone(), "step": step}


def next_moments(grad: Tensor, state: State, betas: tuple[float, float]) -> State:
    """Exponential averages of the gradient and of its square, before bias correction."""
    return {
        "m": torch.lerp(state["m"], grad, 1 - betas[0]),
        # not lerp: where a gradient's square overflows it makes NaN of an infinite v
        "v": betas[1] * state["v"] + (1 - betas[1]) * (grad * grad),
        "step": state["step"] + 1,
    }


def debias(state: State, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Bias-corrected ``m_hat`` and ``sqrt(v_hat)``, (N,) each; Kingma & Ba 2015, algorithm 1.

    Where v is zero the root is zero and so is its derivative. The true derivative is infinite
    there and would make a second-order meta-gradient NaN at every coordinate without a gradient.
    """
    # 1 - beta**step as expm1: in float32 the plain difference is off by 1e-5 at the first step,
    # and fetching the step to the host would make the GPU wait
    step = state["step"].to(state["v"].dtype)
    m_correction, v_correction = (-torch.expm1(step * math.log(beta)) for beta in betas)
    touched = state["v"] > 0
    root = torch.where(touched, torch.sqrt(torch.where(touched, state["v"] / v_correction, 1)), 0)
    return state["m"] / m_correction, root
