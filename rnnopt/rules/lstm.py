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
# Coordinates worked on at once: their gates stay in a core's cache, and the memory of a step does
# not grow with the largest tensor.
CHUNK = 16_384
OUTPUTS = 3
# The learned growth of a tensor by itself is a factor of exp(-1) .. exp(1) a step, where the
# gradient asks for nothing else; and none after so many steps, unless a rule says otherwise: what a
# fresh head needs is done by then, and what is left would compound.
LOG_GROWTH_BOUND = 1.0
GROWTH_STEPS = 8
# Rows or columns of a matrix that `orthogonalize` takes: LoRA factors and heads of up to so many
# classes, where it costs next to nothing; in an encoder's own it would cost as much as a gradient.
NARROW = 64
MAX_UNITS = 1024  # far beyond use; keeps a typing error from asking for terabytes


def matrix_output_shifts(outputs: Tensor, step: Tensor) -> Tensor:
    """The shifts of s, k and a for a tensor whose direction is turned as a whole.

    At the first step Adam's direction is no more than the gradient's sign, and what a coordinate's
    size tells is lost on the singular vectors: there it is the plain gradient's that is turned, as
    long as Adam's would be.

    Args:
        outputs: (..., 3), see `CoordinateLSTM.shifts`.
        step: (...), 1 at the first step.

    Returns:
        (..., 3).
    """
    first = (step <= 1).to(outputs.dtype)
    return outputs + torch.stack([torch.zeros_like(first), -first, first], dim=-1)


class CoordinateLSTM(nn.Module):
    """A small LSTM that runs on every coordinate with shared weights and a state of its own.

    It steers Adam's direction rather than replacing it (source: Andrychowicz et al. 2016,
    arXiv:1606.04474, for the coordinate-wise LSTM; Kingma & Ba 2015 for m and v)::

        update = (exp(w) - 1) * p
            - initial_decrease * scale * exp(s) * ((1 + k) * m_hat / (sqrt(v_hat) + eps) + a * g / RMS(g))

    where (s, k, a) are linear in the hidden state and in a small layer over the tensor's context,
    w in that layer alone; s and w are bounded smoothly by `LOG_FACTOR_BOUND` and
    `LOG_GROWTH_BOUND`, w is weighed by `rnnopt.rules.features.radial_gate` and 0 beyond
    `growth_steps`, and scale is the tensor's, see
    `rnnopt.rules.features.step_scale`: it makes a head alone, LoRA factors and a whole encoder begin
    with steps that suit each. It can go Adam's way (k = a = 0), that of gradient descent (k = -1,
    a = 1), or any between and beyond.

    Growth, the first term, parts how sure a classifier is from what it tells apart. While a head is
    small the encoder below it has to move far to fit the support set, which is how it learns
    features that carry over (the rich regime of Chizat et al. 2019, arXiv:1812.07956); a head that
    is large at once fits it with the features that there are. So a head may stay small while the
    encoder learns, and then grow in the direction that it has, which hardly changes a prediction.

    With the output weights at zero, as they are initialised, the rule *is* Adam with learning rate
    initial_decrease * scale, but where `orthogonalize` turns its direction, see `matrix_output_shifts`, and goes up
    to twice as far, see `rnnopt.rules.features.matrix_gain`. A coordinate that never had a gradient keeps a
    zero state and gets a zero update.

    The arithmetic runs in the dtype of the rule's weights, on the parameter's device.

    Args:
        hidden_size: H; state per coordinate is 2 H + 2 numbers. 0 for none, where what a tensor's
            context tells is enough: Adam's state then.
        context_size: K.
        initial_decrease: nats by which the loss would fall in the first step at zero output, were it linear.
        betas: Adam's decay rates.
        eps: Adam's epsilon.
        orthogonalize: in matrices of at most `NARROW` rows or columns, such as LoRA factors, go
            along all singular directions alike, see `rnnopt.rules.features.orthogonalized`; let what
            gradients were before anything was learned fade, see `rnnopt.rules.features.RunningMaxima`; and let
            only what asks for growth come to rest, see `rnnopt.rules.features.step_scale`. For models
            that learn below their head.
        growth_steps: so many steps from the first on a tensor may grow by itself.
        growth_threshold: in nats: where growth promises more, see `rnnopt.rules.features.growth_multiplier`, w is larger
            by as much; None: w is as learned.

    Raises:
        InputError: a size, initial_decrease, eps, beta or number of steps out of range.
    """

    # The unit of weight decay only: about the learning rate that suits all weights of an encoder.
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
        """Make the rule exactly Adam with learning rate initial_decrease * scale."""
        for name, parameter in self.named_parameters():
            if name.startswith(("output_", "growth_")):
                parameter.zero_()

    @torch.no_grad()
    def growth_only(self, **changes: Any) -> CoordinateLSTM:
        """A rule that grows tensors as this one does, with Adam's directions, step sizes and state.

        Growth, with the context that decides it, is all that is left to learn.

        Args:
            changes: of `config`.
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
        """See `rnnopt.optim.safeguard.GuardedRule.fallback`: Adam, which this is with its output at zero."""
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
        """Zeros. See `rnnopt.rules.protocol.MatrixRule.init_state` for the shape.

        ``m``, ``v`` (N,): Adam's moments; ``hidden``, ``cell`` (H, N): the LSTM's; ``step`` 0-d:
        steps taken; ``matrix`` 0-d: 0 for a vector, 1 for a tensor of two dimensions or more, 2
        for one that is wide, with more than `NARROW` rows and as many columns; and 0-d each what
        `rnnopt.rules.features.RunningMaxima` holds. All in the dtype of the rule's weights, but for the LSTM's
        if `state_dtype` says otherwise: it bears rounding, which Adam's moments, slow averages,
        do not.
        """
        dtype = self.gate_weight.dtype
        size = (self.hidden_size, param.numel())
        memory = torch.zeros(size, dtype=state_dtype or dtype, device=param.device)
        shape = param.shape if shape is None else shape
        wide = len(shape) > 1 and min(shape[0], math.prod(shape[1:])) > NARROW
        matrix = float(len(shape) > 1) + float(wide)
        return {
            **init_moments(param, dtype),
            "hidden": memory,
            "cell": memory.clone(),
            "matrix": torch.tensor(matrix, dtype=dtype, device=param.device),
            **{
                name: torch.zeros((), dtype=dtype, device=param.device)
                for name in RunningMaxima._fields
            },
        }

    def statistics(self, grad: Tensor, state: State, param: Tensor) -> Tensor:
        """See `rnnopt.rules.protocol.TensorAwareRule.statistics`."""
        param = param.to(self.gate_weight.dtype)
        return tensor_statistics(self._bounded(grad), state["m"], param, state["matrix"])

    def cross_tensor_context(self, sums: Tensor) -> Tensor:
        """See `rnnopt.rules.protocol.TensorAwareRule.cross_tensor_context`."""
        return model_statistics(sums, fading=self.orthogonalize)

    def treats_as_matrix(self, shape: Sequence[int]) -> bool:
        """See `rnnopt.rules.protocol.MatrixRule.turns`."""
        return self.orthogonalize and len(shape) == 2 and 0 < min(shape) <= NARROW

    def transform_matrix(self, direction: Tensor) -> Tensor:
        """See `rnnopt.rules.protocol.MatrixRule.transform_matrix`."""
        return orthogonalized(direction)

    def forward(
        self,
        grad: Tensor,
        state: State,
        param: Tensor,
        sums: Tensor | None = None,
        turn: MatrixTransform | None = None,
    ) -> tuple[Tensor, State]:
        """See `rnnopt.rules.protocol.MatrixRule.__call__`."""
        if sums is None:
            sums = self.cross_tensor_context(self.statistics(grad, state, param).unsqueeze(0))[0]
        grad, param = self._bounded(grad), param.to(self.gate_weight.dtype)
        moments = next_moments(grad, state, self.betas)
        m_hat, root = debias(moments, self.betas)
        grad_rms, param_rms = root_mean_squares(sums)
        peaks = RunningMaxima(*(state[name] for name in RunningMaxima._fields))
        gates, outputs, growth = self.shifts(sums, peaks, moments["step"])
        if turn is not None:
            outputs = matrix_output_shifts(outputs, moments["step"])
        scale = root + self.eps
        adam, relative = m_hat / scale, grad / grad_rms
        features = coordinate_features(adam, grad / scale, relative, param / param_rms)
        live = (moments["v"] > 0).to(grad.dtype)
        directions = torch.stack([adam, relative, live])
        memory = tuple(state[name].to(grad.dtype) for name in ("hidden", "cell"))
        shifts = gates.unsqueeze(1), outputs.unsqueeze(1)
        direction, hidden, cell = self._run_cell(shifts, (features, directions, *memory))
        after = peaks.after(sums, moments["step"])
        if turn is not None:
            longer = matrix_gain(after.radial_gate_max, moments["step"])
            direction = longer * turn(direction) * live
        length = self.initial_decrease * step_scale(sums, peaks, after, self.orthogonalize)
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

    def shifts(
        self, sums: Tensor, peaks: RunningMaxima, step: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What a tensor's context adds to each of its coordinates.

        Args:
            sums: see `rnnopt.rules.features.context_features`.
            peaks: see there.
            step: see there.

        Returns:
            To the gates (..., 4 H) and to the outputs (..., 3); and of its own value, (...).
        """
        context = context_features(sums, peaks, step)
        device = context.device  # parameters of one model may live on several
        weights = {name: weight.to(device) for name, weight in self.named_parameters()}
        view = torch.tanh(
            linear(context, weights["context_weight"], weights["context_bias"])
        )  # (..., K)
        growth = view @ weights["growth_context"] + weights["growth_bias"]
        if self.growth_threshold is not None:
            growth = growth * growth_multiplier(sums, self.growth_threshold)
        growth = LOG_GROWTH_BOUND * torch.tanh(growth / LOG_GROWTH_BOUND) * radial_gate(sums)
        return (
            linear(view, weights["gate_context"], weights["gate_bias"]),
            linear(view, weights["output_context"], weights["output_bias"]),
            torch.where(step <= self.growth_steps, torch.expm1(growth), 0),
        )

    def _run_cell(
        self, shifts: tuple[Tensor, Tensor], arrays: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The coordinate-wise part, chunk by chunk: coordinates do not interact in it."""
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
            shifts: what `shifts` returned, as columns (4 H, 1) and (3, 1).
            arrays: features (F, n), directions (3, n), hidden and cell state (H, n).

        Returns:
            The direction (n,), which scale turns into an update, and the next hidden and cell
            state.
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
