"""`TwoLevelLSTM`: a learned rule with an LSTM for every coordinate and one for every tensor.

Shapes: N coordinates of one tensor, H units of the coordinate-wise LSTM, U units of the tensor-wise
one, P tensors that are stepped together, M statistics, K numbers of context. Leading batch
dimensions are allowed everywhere, (..., N) for (N,).

One step of a model:

1. `statistics` measures each tensor, or each shard of it: sums over coordinates of products of
   gradient, parameter and state.
2. `cross_tensor_context` takes the statistics of all tensors. It advances the tensor-wise LSTMs,
   which see an average of each other's messages, and returns what each tensor does.
3. `forward` turns that into the update of each coordinate and advances the coordinate-wise LSTM.

The rule does not depend on the scale of the loss: multiply every gradient by one constant and the
updates stay as they were, but for the floors that keep roots away from 0.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnnopt.errors import InputError
from rnnopt.rules.orthogonal import orthogonalized
from rnnopt.rules.protocol import MatrixTransform, State
from rnnopt.rules.tensor_features import (
    FLOOR,
    NARROW,
    ROOT_FLOOR,
    SHARE_POWER,
    TENSOR_FEATURES,
    Sums,
    base_rates,
    dot,
    inverse_rms,
    tensor_features,
)

# The constants that are not learned, each with its reason.
BETAS = (0.9, 0.999)  # Adam's decay rates
LOG_RATE_BOUND = 4.0  # a learned factor on the rate lies within exp(-4) .. exp(4)
# A matrix with both sides above this has no coordinate-wise LSTM: 12 bytes of state a coordinate in
# place of 28, and a fifth of the time. LoRA factors, heads, biases and small encoders have one.
WIDEST = 256
# Nor has a tensor of more coordinates, such as word embeddings of 30,522 x 128: its state would
# take most of the memory of a step.
LARGEST = 1 << 20
# Directions that are divided by their own size fade once a tensor's gradient is below this share of
# its root mean square so far, as Adam's does by its second moment; they would shake a model whose
# gradients have vanished.
FADE = 0.5
BOUND = 1e15  # of gradients and parameters: larger ones overflow float32 once squared
# The loss may rise by so many times the first-order decrease of a base step: on heads, LoRA factors
# and all weights of MiniLM that is 0.6 to 30 nats.
MAX_RISE = 3.0

SIGNED, EVEN = 3, 5  # inputs of the coordinate-wise LSTM besides its own cell
# Scalar leaves of the tensor-wise state that every step replaces, in the order of the context.
_SCALARS = (
    "step", "first_rms", "last_rms", "mean_square", "last_rate", "first_decrease", "unit", "fallen",
)  # fmt: skip
_SIZES = {"tensor_units": 1, "coordinate_units": 0, "message_units": 1}  # and the least of each
_VECTORS = ("hidden", "memory")  # of the tensor-wise LSTM, (U,)


class Decisions(NamedTuple):
    """What a tensor does in this step, (...) each; see `TwoLevelLSTM.forward`."""

    rate: Tensor
    growth: Tensor
    adam: Tensor
    gradient: Tensor
    orthogonal_adam: Tensor
    orthogonal_gradient: Tensor
    last: Tensor
    cell: Tensor


class Observed(NamedTuple):
    """A tensor's coordinates after the moments and the coordinate-wise LSTM have advanced."""

    moment: Tensor
    square: Tensor
    cell: Tensor
    adam: Tensor
    direction: Tensor


class TwoLevelLSTM(nn.Module):
    """A small LSTM for every coordinate and one for every tensor, with shared weights each.

    The update of a tensor is ::

        (exp(w) - 1) p - rate (k_a a + k_g g / RMS(g) + k_u u + k_q q + o_a orth(a) + o_g orth(g))

    with a Adam's direction, u the last update and q the direction of the coordinate-wise LSTM, the
    latter two scaled to an RMS of 1, and orth as in Muon (Jordan et al. 2024), for narrow matrices
    only. The tensor-wise LSTM decides w, rate and the k and o at every step. Coordinate-wise LSTMs
    are those of Andrychowicz et al. 2016, arXiv:1606.04474; tensor-wise ones with messages are
    those of Metz et al. 2022 (VeLO), arXiv:2211.09760.

    With its output layer at zero, as it is made, the rule is Adam at the rates of `base_rates`.

    Args:
        tensor_units: U.
        coordinate_units: H; with 0 there is no coordinate-wise LSTM.
        message_units: length of the message that is averaged over tensors.

    Raises:
        InputError: a size is out of range.
    """

    step_size = 1e-3  # the unit of decoupled weight decay
    # Leaves that belong to a tensor as a whole and are not 0-d.
    tensor_state = frozenset(_VECTORS)
    vectors = _VECTORS  # the same in the order of the context
    # Leaves that are sums over coordinates, see `rnnopt.optim.sharding.share_out`.
    summed = ("slope",)
    last_update = "change"  # the leaf that holds it, see `rnnopt.optim.safeguard.LastStep`

    def __init__(
        self, tensor_units: int = 24, coordinate_units: int = 4, message_units: int = 8
    ) -> None:
        super().__init__()
        sizes = (tensor_units, coordinate_units, message_units)
        for (name, least), size in zip(_SIZES.items(), sizes):
            if not least <= size <= 1024:
                raise InputError(f"{name}={size}: must lie between {least} and 1024")
        self.tensor_units, self.coordinate_units = tensor_units, coordinate_units
        self.message_units = message_units
        self.tensor_cell = nn.LSTMCell(TENSOR_FEATURES + message_units, tensor_units)
        self.message = nn.Linear(tensor_units + TENSOR_FEATURES, message_units)
        self.output = nn.Linear(tensor_units, len(Decisions._fields))
        H = coordinate_units
        if H:
            self.gates = nn.Linear(EVEN + 2 * H, 3 * H)  # input, forget and output gate
            self.gates_context = nn.Linear(tensor_units, 3 * H, bias=False)
            self.candidate = nn.Linear(SIGNED + H, H, bias=False)
            self.coordinate_output = nn.Linear(H, 1, bias=False)
            self.gates.bias.data[H : 2 * H] += torch.linspace(0, 3, H)  # short and long memory
            self.candidate.weight.data.abs_()
            self.coordinate_output.weight.data.fill_(1 / H)
        self.zero_output()

    @torch.no_grad()
    def zero_output(self) -> None:
        """Make the rule Adam at the rates of `base_rates`."""
        self.output.weight.zero_()
        self.output.bias.zero_()

    def fallback(self) -> TwoLevelLSTM:
        """Adam at the base rates; see `rnnopt.optim.safeguard.GuardedRule.fallback`."""
        twin = copy.deepcopy(self)
        twin.zero_output()
        return twin

    def largest_rise(self, states: Sequence[State]) -> Tensor:
        """`MAX_RISE` base steps' decrease; see `rnnopt.optim.safeguard.ScaleFreeRule`."""
        return MAX_RISE * _stacked([state["unit"] for state in states]).max()

    def promised(self, statistics: Sequence[Tensor]) -> Tensor:
        """The first-order decrease of a base step, 0-d."""
        sums = Sums(*_stacked(statistics).unbind(-1))
        return (base_rates(sums)[0] * sums.g_abs).sum()

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as plain values."""
        return {name: getattr(self, name) for name in _SIZES}

    def treats_as_matrix(self, shape: Sequence[int]) -> bool:
        """Whether directions of this shape are orthogonalised: matrices with a narrow side."""
        return len(shape) == 2 and 0 < min(shape) <= NARROW

    def transform_matrix(self, direction: Tensor) -> Tensor:
        """See `rnnopt.rules.orthogonal.orthogonalized`; (..., R, C)."""
        return orthogonalized(direction, ROOT_FLOOR)

    def units_of(self, shape: Sequence[int]) -> int:
        """H in a tensor of this shape, or 0 if it has no coordinate-wise LSTM.

        Args:
            shape: of the whole tensor, also where a shard of it is stepped.
        """
        wide = len(shape) > 1 and min(shape[0], math.prod(shape[1:])) > WIDEST
        return 0 if wide or math.prod(shape) > LARGEST else self.coordinate_units

    def init_state(self, param: Tensor, shape: Sequence[int] | None = None) -> State:
        """The state before the first step. All leaves but ``rows`` and ``columns`` are zero.

        - ``m``, ``v``, ``change`` (N,): Adam's moments and the last update.
        - ``cell`` (H, N): the coordinate-wise LSTM's, with the H of `units_of`.
        - ``slope`` 0-d: the last update times the gradient before it; of a shard its share of it.
        - ``rows``, ``columns`` 0-d: the tensor's shape; 0 rows mark a vector.
        - ``hidden``, ``memory`` (U,): the tensor-wise LSTM's.
        - 0-d each: step count, RMS of the first and last gradient, average of its square, last
          rate, first-order decrease of the first step, the largest so far (``unit``), and the
          estimated fall of the loss.

        Args:
            param: the parameter, or a shard of it, (N,) when flat.
            shape: of the whole tensor, if param is a shard.
        """
        shape = tuple(param.shape if shape is None else shape)
        matrix = len(shape) > 1
        rows, columns = (shape[0], math.prod(shape[1:])) if matrix else (0, math.prod(shape))

        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=self.output.weight.dtype, device=param.device)

        state = {name: zeros(param.numel()) for name in ("m", "v", "change")}
        state |= {"cell": zeros(self.units_of(shape), param.numel()), "slope": zeros()}
        state |= {"rows": zeros() + rows, "columns": zeros() + columns}
        state |= {name: zeros() for name in _SCALARS}
        return state | {name: zeros(self.tensor_units) for name in _VECTORS}

    def statistics(self, grad: Tensor, state: State, param: Tensor) -> Tensor:
        """`Sums` over a tensor or a shard of it, (..., M); those of its shards add up."""
        return self.observe(self._cast(grad), self._cast(param), state)[0]

    def observe(self, grad: Tensor, param: Tensor, state: State) -> tuple[Tensor, Observed]:
        """The statistics (..., M), and the coordinates with their state advanced."""
        step = state["step"].unsqueeze(-1) + 1
        moment, square, root, adam = advanced_moments(grad, state["m"], state["v"], step)
        cell, direction = self.next_cell(adam, grad / root, root, state)
        last, m = state["change"], state["m"]
        pairs = (
            (grad, grad), (param, param), (param, grad), (m, m), (m, grad), (last, last),
            (last, grad), (adam, adam), (adam, grad), (direction, direction), (direction, grad),
            (direction, adam),
        )  # fmt: skip
        g_g, p_p, p_g, m_m, m_g, u_u, u_g, a_a, a_g, q_q, q_g, q_a = (dot(x, y) for x, y in pairs)
        live, nonzero = ((x != 0).to(grad.dtype).sum(-1) for x in (square, grad))
        found = Sums(
            live, nonzero, grad.abs().sum(-1), g_g, p_p, p_g, m_m, m_g, u_u, u_g,
            state["slope"], a_a, a_g, q_q, q_g, q_a,
        )  # fmt: skip
        return torch.stack(found, -1), Observed(moment, square, cell, adam, direction)

    def next_cell(
        self, adam: Tensor, score: Tensor, root: Tensor, state: State
    ) -> tuple[Tensor, Tensor]:
        """One step of the coordinate-wise LSTM.

        An LSTM with peepholes (Gers & Schmidhuber 2000). Its gates see magnitudes only, and its
        candidate is linear in signed quantities: if a coordinate changes its sign, its direction
        does. With x the signed inputs (Adam's direction, g / sqrt(v), the last update over its
        rate) and e the even ones::

            i, f, o = sigmoid(W [e, tanh(c)^2, tanh(c) g / sqrt(v)] + V hidden of the tensor + b)
            c = f c + i tanh(R [x, tanh(c)]);    q = w . (o tanh(c))

        Each unit is a momentum whose decay is decided for every coordinate and step. A coordinate
        that never had a gradient keeps a zero cell, and q = 0.

        Returns:
            The next cell, (..., H, N), and the direction q, (..., N).
        """
        cell = state["cell"]
        if not cell.shape[-2]:
            return cell, torch.zeros_like(adam)
        score = torch.asinh(score)
        moved = torch.asinh(state["change"] / (state["last_rate"].unsqueeze(-1) + FLOOR))
        begun = (state["last_rms"] > 0).to(adam.dtype).unsqueeze(-1)
        size = torch.log((root + FLOOR) / (state["last_rms"].unsqueeze(-1) + FLOOR))
        even = (
            adam.abs(), score.abs(), torch.tanh(adam * score), torch.tanh(adam * moved),
            begun * size.clamp(-6, 6) / 3,
        )  # fmt: skip
        was = torch.tanh(cell)
        seen = torch.cat([torch.stack(even, -2), was * was, was * score.unsqueeze(-2)], -2)
        signed = torch.cat([torch.stack((adam, score, moved), -2), was], -2)
        bias, gate, of_tensor, candidate, output = (
            weight.to(adam.device)
            for weight in (
                self.gates.bias, self.gates.weight, self.gates_context.weight,
                self.candidate.weight, self.coordinate_output.weight,
            )
        )  # fmt: skip
        context = F.linear(state["hidden"], of_tensor, bias)
        gates = torch.sigmoid(gate @ seen + context.unsqueeze(-1))
        enter, keep, leave = gates.chunk(3, -2)
        cell = keep * cell + enter * torch.tanh(candidate @ signed)
        direction = output @ (leave * torch.tanh(cell))
        return cell, direction.squeeze(-2)

    def cross_tensor_context(self, statistics: Tensor, states: State) -> Tensor:
        """What each tensor does, and its tensor-wise state after this step.

        Args:
            statistics: of P whole tensors that are stepped together, (..., P, M).
            states: their tensor-wise leaves, stacked: (..., P), and (..., P, U) for the LSTM's.

        Returns:
            (..., P, K): `Decisions`, the scalar leaves, and the LSTM's leaves, on the device of the
            rule's weights.
        """
        device = self.output.weight.device
        statistics = statistics.to(device)
        states = {name: leaf.to(device) for name, leaf in states.items()}
        s = Sums(*statistics.unbind(-1))
        step = states["step"] + 1
        rates, share = base_rates(s)
        promised = (rates * s.g_abs).sum(-1, keepdim=True)
        unit = torch.maximum(states["unit"].amax(-1, keepdim=True), promised) + FLOOR
        square = s.g_g / s.nonzero.clamp(min=1)
        rms = torch.sqrt(square + ROOT_FLOOR)
        mean_square = BETAS[1] * states["mean_square"] + (1 - BETAS[1]) * square
        usual = torch.sqrt(mean_square / (1 - BETAS[1] ** step) + ROOT_FLOOR)
        fade = (rms / (FADE * usual)).clamp(max=1)
        decrease = (share**SHARE_POWER * s.g_abs).sum(-1, keepdim=True)
        seen = tensor_features(s, states, unit, share, rms, decrease)
        said = torch.tanh(self.message(torch.cat([states["hidden"], seen], -1)))
        said = said.mean(-2, keepdim=True)
        x = torch.cat([seen, said.expand(*seen.shape[:-1], -1)], -1)
        flat = [y.reshape(-1, y.shape[-1]) for y in (x, states["hidden"], states["memory"])]
        hidden, memory = (
            y.view(*x.shape[:-1], -1) for y in self.tensor_cell(flat[0], (flat[1], flat[2]))
        )
        out = Decisions(*self.output(hidden).unbind(-1))
        rates = rates * torch.exp(LOG_RATE_BOUND * torch.tanh(out.rate / LOG_RATE_BOUND))
        decisions = Decisions(
            rates, fade * torch.tanh(out.growth), 1 + out.adam, fade * out.gradient / rms,
            fade * out.orthogonal_adam, fade * out.orthogonal_gradient / rms,
            -fade * out.last * inverse_rms(s.u_u, s.live),
            fade * out.cell * inverse_rms(s.q_q, s.live),
        )  # fmt: skip
        fall = (s.u_g + s.slope).sum(-1, keepdim=True) / 2
        first = step <= 1
        scalars = (
            step, torch.where(first, rms, states["first_rms"]), rms, mean_square, rates,
            torch.where(first, decrease, states["first_decrease"]), unit.expand_as(step),
            states["fallen"] + torch.where(first, 0, fall),
        )  # fmt: skip
        return torch.cat([torch.stack([*decisions, *scalars], -1), hidden, memory], -1)

    def forward(
        self,
        grad: Tensor,
        state: State,
        param: Tensor,
        context: Tensor | None = None,
        transform: MatrixTransform | None = None,
    ) -> tuple[Tensor, State]:
        """As `rnnopt.rules.protocol.MatrixRule.__call__`; the update is that of the class."""
        grad, param = self._cast(grad), self._cast(param)
        statistics, seen = self.observe(grad, param, state)
        if context is None:
            alone = {name: state[name].unsqueeze(0) for name in (*self.leaves, *_VECTORS)}
            context = self.cross_tensor_context(statistics.unsqueeze(0), alone)[0]
        chosen = context[..., : len(Decisions._fields)]
        d = Decisions(*(x.unsqueeze(-1) for x in chosen.unbind(-1)))
        step = d.adam * seen.adam + d.gradient * grad + d.last * state["change"]
        step = step + d.cell * seen.direction
        if transform is not None:
            step = step + d.orthogonal_adam * transform(seen.adam)
            step = step + d.orthogonal_gradient * transform(grad)
        live = (seen.square > 0).to(grad.dtype)
        update = live * (torch.expm1(d.growth) * param - d.rate * step)
        return update, {
            "m": seen.moment, "v": seen.square, "change": update, "cell": seen.cell,
            "slope": (update * grad).sum(-1), "rows": state["rows"], "columns": state["columns"],
            **self.leaves_of(context),
        }  # fmt: skip

    def leaves_of(self, context: Tensor) -> State:
        """The leaves of a tensor as a whole after the step of this context, (..., K)."""
        count, units = len(Decisions._fields), self.tensor_units
        scalars = context[..., count : count + len(_SCALARS)].unbind(-1)
        hidden, memory = context[..., -2 * units : -units], context[..., -units:]
        return {**dict(zip(_SCALARS, scalars)), "hidden": hidden, "memory": memory}

    # 0-d leaves that `cross_tensor_context` reads, beside those of the LSTM
    leaves = ("rows", "columns", *_SCALARS)

    def _cast(self, tensor: Tensor) -> Tensor:
        """In the dtype of the rule's weights, within bounds whose squares can be summed."""
        return tensor.to(self.output.weight.dtype).clamp(-BOUND, BOUND)


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    """Rows of tensors that may lie on several devices, on that of the first."""
    return torch.stack([row.to(rows[0]) for row in rows])


def advanced_moments(
    grad: Tensor, m: Tensor, v: Tensor, step: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Adam's moments after they have seen the gradient, sqrt(v_hat), and Adam's direction.

    Args:
        grad: (..., N).
        m: the first moment before, (..., N).
        v: the second one, (..., N).
        step: the number of this step, from 1, (..., 1).
    """
    moment = BETAS[0] * m + (1 - BETAS[0]) * grad
    square = BETAS[1] * v + (1 - BETAS[1]) * grad * grad
    root = torch.sqrt(square / (1 - BETAS[1] ** step) + ROOT_FLOOR)
    return moment, square, root, moment / (1 - BETAS[0] ** step) / root
