"""`CoordinateLSTM`, the learned update rule.

Shapes: N coordinates of one tensor, H hidden units, F coordinate features, C context features,
K units of the context layer. Matrices act from the left on feature-major arrays (features, N).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from rnnopt.baselines import debias, init_moments, next_moments
from rnnopt.errors import InputError
from rnnopt.preprocess import (
    CONTEXT_FEATURES,
    COORDINATE_FEATURES,
    coordinate_features,
    relative_gradient,
    tensor_context,
)
from rnnopt.rule import State

# The learned factor on the step size stays within exp(-6) .. exp(6), about 1/400 .. 400.
LOG_FACTOR_BOUND = 6.0
# Larger gradients overflow float32 once squared and summed over a large tensor.
GRADIENT_BOUND = 1e15
# Coordinates worked on at once: their gates stay in a core's cache, and the memory of a step does
# not grow with the largest tensor.
CHUNK = 16_384
_OUTPUTS = 3
MOST_UNITS = 1024  # far beyond use; keeps a typing error from asking for terabytes


class CoordinateLSTM(nn.Module):
    """A small LSTM that runs on every coordinate with shared weights and a state of its own.

    It steers Adam's direction rather than replacing it (source: Andrychowicz et al. 2016,
    arXiv:1606.04474, for the coordinate-wise LSTM; Kingma & Ba 2015 for m and v)::

        update = -step_size * exp(s) * (m_hat / (sqrt(v_hat) + eps) + a * g / RMS(g) + b)

    where (s, a, b) are linear in the hidden state and in a small layer over the tensor's context
    (see `rnnopt.preprocess`), and s is bounded smoothly by `LOG_FACTOR_BOUND`. With the output
    weights at zero, as they are initialised, the rule *is* Adam with learning rate step_size. A
    coordinate that never had a gradient keeps a zero state and gets a zero update.

    The arithmetic runs in the dtype of the rule's weights, on the parameter's device.

    Args:
        hidden_size: H; state per coordinate is 2 H + 2 numbers.
        context_size: K.
        step_size: Adam's learning rate at zero output.
        betas: Adam's decay rates.
        eps: Adam's epsilon.

    Raises:
        InputError: a size, step size, eps or beta out of range.
    """

    def __init__(
        self,
        hidden_size: int = 8,
        context_size: int = 16,
        step_size: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        for name, size in (("hidden_size", hidden_size), ("context_size", context_size)):
            if not 1 <= size <= MOST_UNITS:
                raise InputError(f"{name}={size}: must lie between 1 and {MOST_UNITS}")
        for name, value in (("step_size", step_size), ("eps", eps)):
            if not 0 < value < math.inf:
                raise InputError(f"{name}={value}: must be positive and finite")
        if len(betas) != 2 or not all(0 < beta < 1 for beta in betas):
            raise InputError(f"betas={betas}: two numbers strictly between 0 and 1")
        self.hidden_size = hidden_size
        self.context_size = context_size
        self.step_size = step_size
        self.betas = (float(betas[0]), float(betas[1]))
        self.eps = eps
        H, K = hidden_size, context_size
        self.context_weight = nn.Parameter(torch.empty(K, CONTEXT_FEATURES))
        self.context_bias = nn.Parameter(torch.empty(K))
        self.gate_weight = nn.Parameter(torch.empty(4 * H, COORDINATE_FEATURES + H))
        self.gate_context = nn.Parameter(torch.empty(4 * H, K))
        self.gate_bias = nn.Parameter(torch.empty(4 * H))
        self.output_weight = nn.Parameter(torch.empty(_OUTPUTS, H))
        self.output_context = nn.Parameter(torch.empty(_OUTPUTS, K))
        self.output_bias = nn.Parameter(torch.empty(_OUTPUTS))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot weights, forget gates open (Gers et al. 2000), output at zero: Adam."""
        H = self.hidden_size
        for weight in (self.context_weight, self.gate_weight, self.gate_context):
            nn.init.xavier_uniform_(weight)
        nn.init.zeros_(self.context_bias)
        nn.init.zeros_(self.gate_bias)
        nn.init.ones_(self.gate_bias[H : 2 * H])
        self.zero_output()

    @torch.no_grad()
    def zero_output(self) -> None:
        """Make the rule exactly Adam with learning rate step_size."""
        for parameter in (self.output_weight, self.output_context, self.output_bias):
            parameter.zero_()

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as plain values."""
        return {
            "hidden_size": self.hidden_size,
            "context_size": self.context_size,
            "step_size": self.step_size,
            "betas": list(self.betas),
            "eps": self.eps,
        }

    def init_state(self, param: Tensor) -> State:
        """Zeros in the dtype of the rule's weights.

        ``m``, ``v`` (N,): Adam's moments; ``hidden``, ``cell`` (H, N): the LSTM's; ``step`` 0-d:
        steps taken; ``peak`` 0-d: largest RMS of the gradient so far.
        """
        dtype = self.gate_weight.dtype
        memory = torch.zeros(self.hidden_size, param.numel(), dtype=dtype, device=param.device)
        return {
            **init_moments(param, dtype),
            "hidden": memory,
            "cell": memory.clone(),
            "peak": torch.zeros((), dtype=dtype, device=param.device),
        }

    def forward(self, grad: Tensor, state: State, param: Tensor) -> tuple[Tensor, State]:
        """See `rnnopt.rule.UpdateRule.__call__`."""
        dtype = self.gate_weight.dtype
        grad = grad.to(dtype).clamp(-GRADIENT_BOUND, GRADIENT_BOUND)
        param = param.to(dtype)
        moments = next_moments(grad, state, self.betas)
        m_hat, root = debias(moments, self.betas)
        relative, grad_rms = relative_gradient(grad)
        context = tensor_context(grad, grad_rms, state["m"], state["peak"], moments["step"], param)
        scale = root + self.eps
        adam = m_hat / scale
        features = coordinate_features(adam, grad / scale, relative, param)
        directions = torch.stack([adam, relative, (moments["v"] > 0).to(dtype)])
        arrays = (features, directions, state["hidden"], state["cell"])
        update, hidden, cell = self._run_cell(self._shifts(context), arrays)
        peak = torch.maximum(state["peak"], grad_rms)
        return update, {**moments, "hidden": hidden, "cell": cell, "peak": peak}

    def _shifts(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """What the tensor's context adds to every coordinate: gates (4 H, 1), outputs (3, 1)."""
        device = context.device  # parameters of one model may live on several
        view = torch.tanh(
            torch.mv(self.context_weight.to(device), context) + self.context_bias.to(device)
        )  # (K,)
        gates = torch.mv(self.gate_context.to(device), view) + self.gate_bias.to(device)
        outputs = torch.mv(self.output_context.to(device), view) + self.output_bias.to(device)
        return gates.unsqueeze(1), outputs.unsqueeze(1)

    def _run_cell(
        self, shifts: tuple[Tensor, Tensor], arrays: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The coordinate-wise part, chunk by chunk: coordinates do not interact in it."""
        size = arrays[0].shape[1]
        if size <= CHUNK:
            return self._cell(shifts, arrays)
        pieces = zip(*(array.chunk(math.ceil(size / CHUNK), dim=1) for array in arrays))
        results = [self._cell(shifts, piece) for piece in pieces]
        update, hidden, cell = (torch.cat(parts, dim=-1) for parts in zip(*results))
        return update, hidden, cell

    def _cell(
        self, shifts: tuple[Tensor, Tensor], arrays: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One LSTM step for n coordinates, gates as in Gers et al. 2000.

        Args:
            shifts: what `_shifts` returned.
            arrays: features (F, n), directions (3, n), hidden and cell state (H, n).

        Returns:
            The update (n,) and the next hidden and cell state.
        """
        x, directions, h, c = arrays
        adam, relative, live = directions
        gate_weight = self.gate_weight.to(x.device)
        i, f, g, o = torch.addmm(shifts[0], gate_weight, torch.cat([x, h])).chunk(4)  # (H, n) each
        c = (torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)) * live
        h = torch.sigmoid(o) * torch.tanh(c)
        s, a, b = torch.addmm(shifts[1], self.output_weight.to(x.device), h)  # (n,) each
        factor = torch.exp(LOG_FACTOR_BOUND * torch.tanh(s / LOG_FACTOR_BOUND))
        return -self.step_size * factor * (adam + a * relative + b * live), h, c
