"""`CoordinateLSTM`, the learned update rule.

Shapes: N coordinates of one tensor, H hidden units, F coordinate features, C context features,
K units of the context layer. Matrices act from the left on feature-major arrays (features, N).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from rnnopt.errors import InputError
from rnnopt.rules.classical import debias, init_moments, next_moments
from rnnopt.rules.features import (
    CONTEXT_FEATURES,
    COORDINATE_FEATURES,
    RunningMaxima,
    context_features,
    coordinate_features,
    growth_multiplier,
    matrix_gain,
    model_statistics,
    orthogonalized,
    radial_gate,
    root_mean_squares,
    step_scale,
    tensor_statistics,
)
from rnnopt.rules.protocol import MatrixTransform, State

# The learned factor on the step size stays within exp(-4) .. exp(4), about 1/55 .. 55.
LOG_FACTOR_BOUND = 4.0
# Larger gradients overflow float32 once squared and summed over a large tensor.
GRADIENT_BOUND = 1e15
# Coordinates per chunk: their gates fit a core's cache, and a step's memory does not grow with the
# largest tensor.
CHUNK = 16_384
OUTPUTS = 3
# Learned growth is a factor of exp(-1) .. exp(1) a step if the gradient is radial only.
LOG_GROWTH_BOUND = 1.0
# Default of `growth_steps`: a new head has grown enough by then, and further growth compounds.
GROWTH_STEPS = 8
# Rows or columns up to which `orthogonalize` applies: LoRA factors and heads of as many classes.
# For an encoder's own matrices it would cost as much as a gradient.
NARROW = 64
MAX_UNITS = 1024  # far beyond use; keeps a typing error from asking for terabytes


def matrix_output_shifts(outputs: Tensor, step: Tensor) -> Tensor:
    """Output shifts of a tensor whose direction is orthogonalised: at the first step a gradient.

    At the first step Adam's direction is the sign of the gradient, which hides the relative size
    of the coordinates and so the singular vectors. k - 1 and a + 1 replace it by ``g / RMS(g)``.

    Args:
        outputs: shifts of s, k and a, (..., 3), see `CoordinateLSTM.context_shifts`.
        step: (...), 1 at the first step.

    Returns:
        (..., 3).
    """
    first = (step <= 1).to(outputs.dtype)
    return outputs + torch.stack([torch.zeros_like(first), -first, first], dim=-1)


class CoordinateLSTM(nn.Module):
    """A small LSTM that runs on every coordinate, with shared weights and parameter-wise state.

    It modulates Adam's direction (Kingma & Ba 2015) instead of replacing it; the coordinate-wise
    LSTM is that of Andrychowicz et al. 2016, arXiv:1606.04474::

        update = (exp(w) - 1) * p
            - initial_decrease * scale * exp(s) * (
                (1 + k) * m_hat / (sqrt(v_hat) + eps) + a * g / RMS(g)
            )

    - scale is the tensor's step size from its gradients, `rnnopt.rules.features.step_scale`. One
      formula gives a head alone, LoRA factors and a whole encoder suitable first steps.
    - s, k and a are linear in the hidden state and in a small layer over the tensor's context. s is
      bounded smoothly by `LOG_FACTOR_BOUND`. The direction is Adam's for k = a = 0, the gradient's
      for k = -1, a = 1.
    - w is the log growth of the tensor, linear in that layer, bounded smoothly by
      `LOG_GROWTH_BOUND`, multiplied by `rnnopt.rules.features.radial_gate`, and 0 after
      `growth_steps`.

    Growth is a radial update, along the parameter itself. It separates the confidence of a
    classifier from its direction. While a head is small, the encoder below it has to move far to
    fit the support set, and learns features that transfer (the rich regime of Chizat et al. 2019,
    arXiv:1812.07956); a large head fits the support set with the features that exist. So a rule
    can keep the head small while the encoder learns, and grow it afterwards, which hardly changes
    a prediction.

    With zero output weights, the initial values, the rule is Adam with learning rate
    ``initial_decrease * scale``; with `orthogonalize` its direction is orthogonalised and up to
    twice as long (`matrix_output_shifts`, `rnnopt.rules.features.matrix_gain`). A coordinate that
    never had a gradient keeps zero state and gets a zero update.

    The arithmetic runs in the dtype of the rule's weights, on the parameter's device.

    Args:
        hidden_size: H; the state has 2 H + 2 numbers per coordinate. With 0 there is no LSTM: s, k
            and a depend on the tensor's context only, and the state is Adam's.
        context_size: K.
        initial_decrease: first-order decrease of the loss in the first step at zero output, in
            nats: a step size that does not depend on the model.
        betas: Adam's decay rates.
        eps: Adam's epsilon.
        orthogonalize: for models that learn below their head. In matrices of at most `NARROW` rows
            or columns, such as LoRA factors, the direction is orthogonalised
            (`rnnopt.rules.features.orthogonalized`); running maxima decay until there is evidence
            of learning (`rnnopt.rules.features.RunningMaxima`); and only tensors with a radial
            gradient are annealed (`rnnopt.rules.features.step_scale`).
        growth_steps: a tensor may grow in this many first steps.
        growth_threshold: in nats. Where the radial derivative is larger, w is multiplied by their
            ratio, at most 5 (`rnnopt.rules.features.growth_multiplier`). None: w is not multiplied.

    Raises:
        InputError: a size, initial_decrease, eps, a beta, growth_steps or growth_threshold is out
            of range.
    """

    # Only the unit of weight decay: about the learning rate that suits all weights of an encoder.
    step_size = 1e-3

    def __init__(
        self,
        hidden_size: int = 8,
        context_size: int = 16,
        initial_decrease: float = 0.75,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        orthogonalize: bool = False,
        growth_steps: int = GROWTH_STEPS,
        growth_threshold: float | None = None,
    ) -> None:
        super().__init__()
        sizes = (("hidden_size", hidden_size, 0), ("context_size", context_size, 1))
        for name, size, least in sizes:
            if not least <= size <= MAX_UNITS:
                raise InputError(f"{name}={size}: must lie between {least} and {MAX_UNITS}")
        for name, value in (("initial_decrease", initial_decrease), ("eps", eps)):
            if not 0 < value < math.inf:
                raise InputError(f"{name}={value}: must be positive and finite")
        if len(betas) != 2 or not all(0 < beta < 1 for beta in betas):
            raise InputError(f"betas={betas}: two numbers strictly between 0 and 1")
        if growth_steps < 0:
            raise InputError(f"growth_steps={growth_steps}: must be 0 or more")
        if growth_threshold is not None and not 0 < growth_threshold < math.inf:
            raise InputError(
                f"growth_threshold={growth_threshold}: must be positive and finite, or None"
            )
        self.hidden_size = hidden_size
        self.context_size = context_size
        self.initial_decrease = initial_decrease
        self.betas = (float(betas[0]), float(betas[1]))
        self.eps = eps
        self.orthogonalize = orthogonalize
        self.growth_steps = growth_steps
        self.growth_threshold = growth_threshold
        H, K = hidden_size, context_size
        self.context_weight = nn.Parameter(torch.empty(K, CONTEXT_FEATURES))
        self.context_bias = nn.Parameter(torch.empty(K))
        self.gate_weight = nn.Parameter(torch.empty(4 * H, COORDINATE_FEATURES + H))
        self.gate_context = nn.Parameter(torch.empty(4 * H, K))
        self.gate_bias = nn.Parameter(torch.empty(4 * H))
        self.output_weight = nn.Parameter(torch.empty(OUTPUTS, H))
        self.output_context = nn.Parameter(torch.empty(OUTPUTS, K))
        self.output_bias = nn.Parameter(torch.empty(OUTPUTS))
        self.growth_context = nn.Parameter(torch.empty(K))
        self.growth_bias = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot weights, forget gates open (Gers et al. 2000), output at zero: Adam."""
        H = self.hidden_size
        for weight in (self.context_weight, self.gate_weight, self.gate_context):
            if weight.numel():  # torch warns of nothing to initialise
                nn.init.xavier_uniform_(weight)
        nn.init.zeros_(self.context_bias)
        nn.init.zeros_(self.gate_bias)
        nn.init.ones_(self.gate_bias[H : 2 * H])
        self.zero_output()

    @torch.no_grad()
    def zero_output(self) -> None:
        """Make the rule Adam with learning rate ``initial_decrease * scale``."""
        for name, parameter in self.named_parameters():
            if name.startswith(("output_", "growth_")):
                parameter.zero_()

    @torch.no_grad()
    def growth_only(self, **changes: Any) -> CoordinateLSTM:
        """A rule with this rule's growth, and Adam's directions, step sizes and state.

        Only growth and the context layer that it depends on remain trainable.

        Args:
            changes: entries of `config` that differ from this rule's.
        """
        with torch.random.fork_rng(devices=[]):
            rule = CoordinateLSTM(**{**self.config, "hidden_size": 0, **changes})
        rule.to(self.growth_bias)
        for name, parameter in rule.named_parameters():
            if name.startswith(("context_", "growth_")):
                parameter.copy_(self.get_parameter(name))
            else:
                parameter.requires_grad_(False)
        return rule

    def fallback(self) -> CoordinateLSTM:
        """Adam at the model's scale, see `rnnopt.optim.safeguard.GuardedRule.fallback`."""
        twin = copy.deepcopy(self)
        twin.zero_output()
        twin.orthogonalize = False
        return twin

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as plain values."""
        others = {
            "orthogonalize": (self.orthogonalize, False),
            "growth_steps": (self.growth_steps, GROWTH_STEPS),
            "growth_threshold": (self.growth_threshold, None),
        }
        return {
            "hidden_size": self.hidden_size,
            "context_size": self.context_size,
            "initial_decrease": self.initial_decrease,
            "betas": list(self.betas),
            "eps": self.eps,
            **{name: value for name, (value, default) in others.items() if value != default},
        }

    def init_state(
        self,
        param: Tensor,
        state_dtype: torch.dtype | None = None,
        shape: Sequence[int] | None = None,
    ) -> State:
        """The state before the first step. All leaves but ``matrix`` are zero.

        - ``m``, ``v`` (N,): Adam's moments.
        - ``hidden``, ``cell`` (H, N): the LSTM's state.
        - ``step`` 0-d: steps taken.
        - ``matrix`` 0-d: 0 for a vector, 1 for a tensor of two or more dimensions, 2 for a wide
          one, whose rows and columns are both more than `NARROW`.
        - 0-d each: the fields of `rnnopt.rules.features.RunningMaxima`.

        Args:
            param: the parameter, or a shard of it, (N,) when flat.
            state_dtype: of ``hidden`` and ``cell``, which tolerate rounding; Adam's moments, being
                slow averages, do not. None: the dtype of the rule's weights, as all other leaves.
            shape: of the whole tensor, if param is a shard.
        """
        dtype = self.gate_weight.dtype
        size = (self.hidden_size, param.numel())
        hidden = torch.zeros(size, dtype=state_dtype or dtype, device=param.device)
        shape = param.shape if shape is None else shape
        wide = len(shape) > 1 and min(shape[0], math.prod(shape[1:])) > NARROW
        matrix = float(len(shape) > 1) + float(wide)
        return {
            **init_moments(param, dtype),
            "hidden": hidden,
            "cell": hidden.clone(),
            "matrix": torch.tensor(matrix, dtype=dtype, device=param.device),
            **{
                name: torch.zeros((), dtype=dtype, device=param.device)
                for name in RunningMaxima._fields
            },
        }

    def statistics(self, grad: Tensor, state: State, param: Tensor) -> Tensor:
        """(9,), see `rnnopt.rules.features.tensor_statistics`."""
        param = param.to(self.gate_weight.dtype)
        return tensor_statistics(self._bounded(grad), state["m"], param, state["matrix"])

    def cross_tensor_context(self, statistics: Tensor) -> Tensor:
        """(P, 9) -> (P, 18), see `rnnopt.rules.features.model_statistics`."""
        return model_statistics(statistics, decaying=self.orthogonalize)

    def treats_as_matrix(self, shape: Sequence[int]) -> bool:
        """Whether `orthogonalize` applies to a tensor of this shape."""
        return self.orthogonalize and len(shape) == 2 and 0 < min(shape) <= NARROW

    def transform_matrix(self, direction: Tensor) -> Tensor:
        """Orthogonalised directions, (..., R, C), see `rnnopt.rules.features.orthogonalized`."""
        return orthogonalized(direction)

    def forward(
        self,
        grad: Tensor,
        state: State,
        param: Tensor,
        context: Tensor | None = None,
        transform: MatrixTransform | None = None,
    ) -> tuple[Tensor, State]:
        """See `rnnopt.rules.protocol.MatrixRule.__call__`."""
        if context is None:
            context = self.cross_tensor_context(self.statistics(grad, state, param).unsqueeze(0))[0]
        grad, param = self._bounded(grad), param.to(self.gate_weight.dtype)
        moments = next_moments(grad, state, self.betas)
        m_hat, root = debias(moments, self.betas)
        grad_rms, param_rms = root_mean_squares(context)
        maxima = RunningMaxima(*(state[name] for name in RunningMaxima._fields))
        gates, outputs, growth = self.context_shifts(context, maxima, moments["step"])
        if transform is not None:
            outputs = matrix_output_shifts(outputs, moments["step"])
        scale = root + self.eps
        adam, relative = m_hat / scale, grad / grad_rms
        features = coordinate_features(adam, grad / scale, relative, param / param_rms)
        live = (moments["v"] > 0).to(grad.dtype)  # coordinates that have had a gradient
        directions = torch.stack([adam, relative, live])
        lstm_state = tuple(state[name].to(grad.dtype) for name in ("hidden", "cell"))
        shifts = gates.unsqueeze(1), outputs.unsqueeze(1)
        direction, hidden, cell = self._run_cell(shifts, (features, directions, *lstm_state))
        after = maxima.updated(context, moments["step"])
        if transform is not None:
            gain = matrix_gain(after.radial_gate_max, moments["step"])
            direction = gain * transform(direction) * live
        length = self.initial_decrease * step_scale(context, maxima, after, self.orthogonalize)
        update = growth * (param * live) - length * direction
        return update, {
            **moments,
            "hidden": hidden.to(state["hidden"].dtype),
            "cell": cell.to(state["cell"].dtype),
            "matrix": state["matrix"],
            **after._asdict(),
        }

    def _bounded(self, grad: Tensor) -> Tensor:
        return grad.to(self.gate_weight.dtype).clamp(-GRADIENT_BOUND, GRADIENT_BOUND)

    def context_shifts(
        self, context: Tensor, maxima: RunningMaxima, step: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What a tensor's context adds to the LSTM of each of its coordinates, and its growth.

        Args:
            context: see `rnnopt.rules.features.context_features`, (..., 18).
            maxima: before this step.
            step: (...), 1 at the first step.

        Returns:
            Shifts of the gates, (..., 4 H), and of the outputs s, k, a, (..., 3); and the growth
            exp(w) - 1, (...).
        """
        features = context_features(context, maxima, step)
        device = features.device  # parameters of one model may live on several
        weights = {name: weight.to(device) for name, weight in self.named_parameters()}
        layer = torch.tanh(
            linear(features, weights["context_weight"], weights["context_bias"])
        )  # (..., K)
        growth = layer @ weights["growth_context"] + weights["growth_bias"]
        if self.growth_threshold is not None:
            growth = growth * growth_multiplier(context, self.growth_threshold)
        growth = LOG_GROWTH_BOUND * torch.tanh(growth / LOG_GROWTH_BOUND) * radial_gate(context)
        return (
            linear(layer, weights["gate_context"], weights["gate_bias"]),
            linear(layer, weights["output_context"], weights["output_bias"]),
            torch.where(step <= self.growth_steps, torch.expm1(growth), 0),
        )

    def _run_cell(
        self, shifts: tuple[Tensor, Tensor], arrays: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The coordinate-wise part, chunk by chunk; coordinates do not interact in it."""
        size = arrays[0].shape[1]
        if size <= CHUNK:
            return self._cell(shifts, arrays)
        pieces = zip(*(array.chunk(math.ceil(size / CHUNK), dim=1) for array in arrays))
        results = [self._cell(shifts, piece) for piece in pieces]
        direction, hidden, cell = (torch.cat(parts, dim=-1) for parts in zip(*results))
        return direction, hidden, cell

    def _cell(
        self, shifts: tuple[Tensor, Tensor], arrays: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One LSTM step for n coordinates, gates as in Gers et al. 2000.

        Args:
            shifts: of gates and outputs, (4 H, 1) and (3, 1), see `context_shifts`.
            arrays: features (F, n); Adam's direction, g / RMS(g) and whether the coordinate has
                had a gradient, (3, n); hidden and cell state, (H, n) each.

        Returns:
            The direction before scaling, (n,), and the next hidden and cell state, (H, n).
        """
        x, directions, h, c = arrays
        adam, relative, live = directions
        gate_weight = self.gate_weight.to(x.device)
        i, f, g, o = torch.addmm(shifts[0], gate_weight, torch.cat([x, h])).chunk(4)  # (H, n) each
        c = (torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)) * live
        h = torch.sigmoid(o) * torch.tanh(c)
        s, k, a = torch.addmm(shifts[1], self.output_weight.to(x.device), h)  # (n,) each
        factor = torch.exp(LOG_FACTOR_BOUND * torch.tanh(s / LOG_FACTOR_BOUND))
        return factor * ((1 + k) * adam + a * relative), h, c
