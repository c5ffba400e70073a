"""What the learned rule sees: the gradient and the parameter as well-scaled features.

Shapes: N coordinates of one tensor, F = `COORDINATE_FEATURES`, C = `CONTEXT_FEATURES`.
Every feature has a finite derivative, also at zero, so that second-order meta-gradients are exact;
none needs a value on the host, so nothing waits for a GPU.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

COORDINATE_FEATURES = 5
STATISTICS = 9
_PULL, _MATRIX = 7, 8  # which of them, see `tensor_statistics`
# Of what `model_statistics` puts after those.
_LARGEST, _DECREASE, _MODEL_SIZE = STATISTICS, STATISTICS + 1, STATISTICS + 2
_HEAVIEST, _LEARNED, _WIDE = STATISTICS + 6, STATISTICS + 7, STATISTICS + 8
CONTEXT_FEATURES = 14

# Floors: below these a value carries no information at float32 or at the scale of real models.
_GRAD_FLOOR = 1e-10
_PARAM_FLOOR = 1e-3  # a zero tensor (fresh LoRA factor, bias) must differ from a trained one
RATIO_FLOOR = 1e-3  # of one gradient coordinate to its tensor's RMS
_CONTEXT_PARAM_FLOOR = 1e-4  # of a parameter's RMS where its logarithm is taken
_RATIO_BOUND = 5.0  # on the logarithm of a gradient's size against its peak
_SHARE_BOUND = 8.0  # on the logarithm of a tensor's gradient against the model's largest
# How far a tensor's share of the step follows its gradient's RMS: 0 would move every tensor by as
# much, as Adam does, 1 in proportion to its gradient, as SGD does.
SHARE_EXPONENT = 0.25
# How far all steps follow the model's largest gradient as it falls: 1 would be plain gradient
# descent, 0 keeps a step's promise however little of the loss is left.
ANNEALING_EXPONENT = 0.5
# Of the largest gradients so far, from one step to the next, once the first steps are over: until
# then gradients may begin anywhere, those of a body below a head of zeros at nothing.
_MOST_GROWTH = 4.0
_SETTLED_STEP = 5
# Later steps look like this one: far beyond any horizon of meta-training the rule goes on as it
# does at its end, rather than as a network extrapolates.
_LATEST_STEP = 16.0
# In nats, see `step_scale`: what keeps a model of a few parameters, or a gradient that was clipped
# to next to nothing, from a step without bound.
_DECREASE_FLOOR = 8.0
# What a unit step is taken to promise at least, see `step_scale`: a nat for so many coordinates,
# and so many nats times the cube root of those in wide matrices. LoRA factors promise more by
# themselves, those of an encoder less. The root counts for encoders smaller than MiniLM.
_COORDINATES_A_NAT = 45_000.0
_NATS_A_CUBE_ROOT = 2.29
# What the peaks of gradients keep from a step to the next while nothing has been learned.
_UNLEARNED = 0.5

# See `orthogonalized`; the floor is of a sum of squares of directions, before anything scales them:
# each is about 1 where there is a gradient.
_NEWTON_SCHULZ = 5 * [(3.4445, -4.7750, 2.0315)] + 3 * [(1.5, -0.5, 0.0)]
_STRETCH = 2.0
_DIRECTION_FLOOR = 1e-12

_LEAST_WEIGHT = 1e-30  # of the heaviest matrix, where there is none
_REQUEST = 0.15  # for growth, at which half of it is granted, see `radial_gate`
_MOST_HASTE = 5.0  # see `growth_multiplier`
_PULL_BOUND = 100.0  # on the nats that growth promises, see `context_features`
_PULL_UNIT = 0.125  # nats: about what the margin of a fresh head is after its first step

# Typical value and spread of each context feature on Hugging Face encoders, for inputs near
# [-2, 2]. Of the tensor: log RMS of the parameter, log RMS of the gradient, log of its ratio to the
# largest one before, cos(memory, gradient), log N, 1 / step, log step. Of it in the model: log RMS
# of the gradient against the largest tensor's. Of the model: log of the decrease that a unit step
# promises (see `step_scale`) against the largest before, cos(memory, gradient), log N, log of the
# decrease. Of the tensor again: asinh of the pull, and -cos(parameter, gradient).
_CONTEXT_SHIFT = (-3.0, -7.0, 0.0, 0.0, 9.0, 0.0, 2.0, -2.0, 0.0, 0.0, 12.0, 3.0, 0.0, 0.0)
_CONTEXT_SCALE = (2.0, 3.0, 1.0, 1.0, 3.0, 1.0, 1.5, 2.0, 1.0, 1.0, 4.0, 2.0, 1.5, 0.5)


class RunningMaxima(NamedTuple):
    """The largest values of earlier steps, (...) each, one for each tensor; 0 at the first.

    Attributes:
        grad_rms_max: of the RMS of the tensor's gradient.
        model_grad_rms_max: of the largest RMS of a tensor's gradient in the model.
        decrease_max: of the promised decrease, see `model_statistics`.
        radial_gate_max: of `radial_gate`.
        evidence_max: of the evidence that the model has learned, see `model_statistics`.
    """

    grad_rms_max: Tensor
    model_grad_rms_max: Tensor
    decrease_max: Tensor
    radial_gate_max: Tensor
    evidence_max: Tensor

    def after(self, sums: Tensor, step: Tensor) -> RunningMaxima:
        """Those after a step.

        From `_SETTLED_STEP` on those of gradients grow to at most `_MOST_GROWTH` times what they
        were: an outlier would make all later steps as much smaller as it is larger. Where
        they fade they halve at every step until something is learned: what gradients were before,
        after a first step that was too long for a nearly constant embedding say, is no measure of
        what an encoder has to learn. To a head alone it is: what was too long once is so again.

        Args:
            sums: what `model_statistics` returned, (..., 18).
            step: (...), 1 at the first step.
        """
        rms, _ = root_mean_squares(sums)
        settled = step >= _SETTLED_STEP
        learned = torch.maximum(self.evidence_max, sums[..., _LEARNED])
        keep = _UNLEARNED + (1 - _UNLEARNED) * learned
        return RunningMaxima(
            _grown(keep * self.grad_rms_max, rms, settled),
            _grown(keep * self.model_grad_rms_max, sums[..., _LARGEST], settled),
            _grown(keep * self.decrease_max, sums[..., _DECREASE], settled),
            torch.maximum(self.radial_gate_max, radial_gate(sums)),
            learned,
        )


def tensor_statistics(grad: Tensor, memory: Tensor, param: Tensor, matrix: Tensor) -> Tensor:
    """All that a rule has to know of a tensor as a whole, as sums over its coordinates.

    Sums, so that the pieces of a tensor that is sharded over processes, or the blocks of one that
    is worked on by several threads, can be added up.

    Args:
        grad: (N,).
        memory: Adam's first moment before this step, (N,).
        param: (N,).
        matrix: 0-d, 0 for a vector, 1 for a matrix, 2 for a wide one.

    Returns:
        (9,): N, sum of p^2, of g^2, count of g != 0, sum of m^2, of m g, of |g|, of p g, and
        matrix N.
    """
    one = torch.ones((), dtype=param.dtype, device=param.device)
    return torch.stack(
        [
            one * param.numel(),
            (param * param).sum(),
            (grad * grad).sum(),
            torch.count_nonzero(grad).to(param.dtype),
            (memory * memory).sum(),
            (memory * grad).sum(),
            grad.abs().sum(),
            (param * grad).sum(),
            matrix * param.numel(),
        ]
    )


def model_statistics(sums: Tensor, fading: bool = False) -> Tensor:
    """Tell each tensor what those that are stepped together amount to.

    Args:
        sums: what `tensor_statistics` returned for each of P tensors, (P, 9).
        fading: whether `RunningMaxima` are to fade before anything is learned.

    Returns:
        (P, 18): beside the nine of the tensor, the same in every row: the largest RMS of a
        tensor's gradient; the decrease of the loss, to first order and in nats, that a step of
        (RMS(g) / largest RMS)^SHARE_EXPONENT along each tensor's sign(g) promises; over all coordinates
        N, sum of g^2, of m^2, of m g; the largest weight, see `radial_gate`; how far the
        gradients tell that classes are told apart, from 0 to 1, or 1 where nothing fades: a tensor
        asks for growth, or would bring `_PULL_UNIT` nats by it, as a head does that is right in
        part and too long; and the coordinates of wide matrices that have a gradient, but for those
        of the largest, since a head of many classes is as wide as an encoder's matrices.
    """
    rms, _ = root_mean_squares(sums)
    largest = rms.amax()
    decrease = ((rms / largest) ** SHARE_EXPONENT * sums[:, 6]).sum()
    size, _, grad_square, _, memory_square, product, *_ = sums.sum(dim=0).unbind()
    heaviest = _weights(sums).amax().clamp(min=_LEAST_WEIGHT)
    learned = _learned(sums, heaviest) if fading else torch.ones_like(largest)
    in_wide = sums[:, 3] * (_matrix(sums) - 1).clamp(min=0)
    wide = in_wide.sum() - in_wide.amax()
    shared = torch.stack(
        [largest, decrease, size, grad_square, memory_square, product, heaviest, learned, wide]
    )
    return torch.cat([sums, shared.expand(len(sums), -1)], dim=1)


def step_scale(
    sums: Tensor, peaks: RunningMaxima, after: RunningMaxima, going_on: bool = False
) -> Tensor:
    """How far a coordinate of each tensor moves for each nat that the first step is to bring.

    A model whose gradient is large in many coordinates promises a nat at a small step, a head
    alone at a large one. The largest gradients so far are the measure, so that a model that has
    been fitted, whose gradients vanish, comes to rest::

        scale = (RMS(g) / largest so far)^SHARE_EXPONENT * (largest RMS now / largest so far)^ANNEALING_EXPONENT
            * (1 - request * max(0, cos(m, g)))^2
            / (floor + max(largest decrease so far, N / 45000, 2.29 W^(1/3)))

    with N the model's coordinates and W those of its wide matrices, see `model_statistics`: however
    little each of them promises, all together bend what a whole encoder computes, and below a head
    that is still random a long step goes too far. The rate of Adam falls with an encoder's width as
    its inverse (Yang et al. 2022, arXiv:2203.03466), which would be W^(1/2), and N is far from it
    in small ones: there 1/3 serves best. The request is the largest before this step, see
    `radial_gate`. What has asked for nothing but growth points the right way: a head, at the
    means of its classes. From then on it grows, and steps by what is new in its gradient: much in
    minibatches, little in full batches, where all that would follow is to bend towards the few
    texts that are hardest to fit.

    Args:
        sums: what `model_statistics` returned, (..., 18).
        peaks: before this step.
        after: those after it, see `RunningMaxima.after`.
        going_on: ANNEALING_EXPONENT counts as far only as the tensor has asked for growth, now or before. As soon
            as a head is sure all gradients are small, and the encoder below it, which has more to
            learn, would stay where it is. Adam's direction shrinks with them, which is rest enough.

    Returns:
        (...).
    """
    rms, _ = root_mean_squares(sums)
    size, _, grad_square, _, memory_square, product, *_ = sums.unbind(-1)
    agreement = _cosine(size, grad_square, memory_square, product).clamp(min=0)
    new = (1 - peaks.radial_gate_max * agreement) ** 2
    least = torch.maximum(
        sums[..., _MODEL_SIZE] / _COORDINATES_A_NAT,
        _NATS_A_CUBE_ROOT * sums[..., _WIDE].detach() ** (1 / 3),  # a count, and often 0
    )
    promised = torch.maximum(after.decrease_max, least)
    # an outlier's is beyond its peak
    share, rest = (
        (size / after.model_grad_rms_max).clamp(max=1) for size in (rms, sums[..., _LARGEST])
    )
    asked = after.radial_gate_max if going_on else 1.0
    return (
        new
        * share**SHARE_EXPONENT
        * rest ** (ANNEALING_EXPONENT * asked)
        / (_DECREASE_FLOOR + promised)
    )


def radial_gate(sums: Tensor) -> Tensor:
    """How far a tensor's gradient asks for nothing but that the tensor grows, from 0 to 1; (...).

    ``x^2 / (x^2 + 0.15^2)`` of ``x = max(0, -cos(p, g)) * weight / largest weight``, where a
    matrix's weight is the RMS of its gradient times its norm: neither a few coordinates nor a great
    many small ones make it large. A vector's is 0: a bias that grew would bend every decision
    towards the classes that it favours. Of a head that is small and tells the classes apart x is
    1/2 and more; of pretrained matrices next to nothing, for normalisation makes most of them blind
    to their own size, and the others weigh less than the head.

    Args:
        sums: what `model_statistics` returned, (..., 18).
    """
    return _request(sums, sums[..., _HEAVIEST])


def growth_multiplier(sums: Tensor, unit: float) -> Tensor:
    """How many times as fast a tensor is to grow, from 1 to `_MOST_HASTE`; (...).

    Its pull, see `context_features`, by a unit: a head that tells many classes apart has far to grow
    before it is sure of any, whatever the encoder below it has learned; where there are few, growth
    seldom promises much.

    Args:
        sums: what `model_statistics` returned, (..., 18).
        unit: in nats.
    """
    return (-sums[..., _PULL] / unit).clamp(1, _MOST_HASTE)


def orthogonalized(direction: Tensor) -> Tensor:
    """A matrix's direction with all its singular values alike, as long as it was.

    ``U V^T`` for ``D = U S V^T``, at D's Frobenius norm, as in Muon (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon): the first singular vectors of a gradient are what
    its texts have in common, and along them alone the rest of a LoRA factor would stay where it is.
    By Newton-Schulz iterations on the short side: Muon's five, which bring singular values near 1,
    and cubic ones, which converge. Those that are nothing stay so.

    Args:
        direction: (..., R, C).

    Returns:
        (..., R, C); of zeros zeros.
    """
    tall = direction.shape[-2] > direction.shape[-1]
    wide = direction.mT if tall else direction
    square = (wide * wide).sum(dim=(-2, -1), keepdim=True) + _DIRECTION_FLOOR
    x = wide / torch.sqrt(square)
    for a, b, c in _NEWTON_SCHULZ:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    norm = (x * x).sum(dim=(-2, -1), keepdim=True) + _DIRECTION_FLOOR
    x = x * torch.sqrt(square / norm)
    return x.mT if tall else x


def matrix_gain(radial_gate_max: Tensor, step: Tensor) -> Tensor:
    """How much longer a direction is once it is orthogonalized, from 1 to `_STRETCH`; (...).

    Along singular directions alike, LoRA factors bear longer steps. A head that points where it
    should, and asks for growth, does not; nor does one at the first step, before that is known.

    Args:
        radial_gate_max: see `RunningMaxima`, after this step; (...).
        step: (...), 1 at the first step.
    """
    return torch.where(step > 1, _STRETCH - (_STRETCH - 1) * radial_gate_max, 1)


def root_mean_squares(sums: Tensor) -> tuple[Tensor, Tensor]:
    """RMS of the gradient and of the parameter, each (...) for sums (..., 7 or more).

    The gradient's is taken over coordinates whose gradient is not zero: most rows of an embedding
    get none at all, and counting them would make the same gradient look larger the larger the
    vocabulary.
    """
    size, param_square, grad_square, touched = sums[..., :4].unbind(-1)
    return (
        torch.sqrt(grad_square / touched.clamp(min=1) + _GRAD_FLOOR**2),
        torch.sqrt(param_square / size + _PARAM_FLOOR**2),
    )


def coordinate_features(
    adam: Tensor, normalised: Tensor, relative: Tensor, relative_param: Tensor
) -> Tensor:
    """Per-coordinate inputs, feature-major.

    Directions as in Lv et al. 2017 (arXiv:1703.03633) beside the signed and the logarithmic
    magnitude of Andrychowicz et al. 2016 (arXiv:1606.04474), the latter relative to the tensor so
    that rescaling the loss changes nothing.

    Args:
        adam: m_hat / sqrt(v_hat), (N,).
        normalised: g / sqrt(v_hat), (N,).
        relative: g / RMS(g), (N,).
        relative_param: p / RMS(p), (N,).

    Returns:
        (F, N).
    """
    log_ratio = torch.log(relative * relative + RATIO_FLOOR**2) / 6  # about [-2.3, 1]
    return torch.stack(
        [adam, normalised, torch.asinh(relative), log_ratio, torch.asinh(relative_param)]
    )


def context_features(sums: Tensor, peaks: RunningMaxima, step: Tensor) -> Tensor:
    """What the rule knows of a tensor as a whole, and of its model.

    The RMS of the parameter tells a fresh head or a zero LoRA factor from a pretrained matrix; the
    gradient's share and the size of all that trains tell what kind of training this is. A
    gradient's size against its peak tells how far adaptation has come, or that it went wrong; its
    cosine with the memory tells a step that overshoots. The pull, -sum(p g), is the nats by which
    the loss would fall if the tensor grew by its own size: of a head the margin by which its logits
    favour the right class, weighed by how wrong they are; its cosine, how far the gradient asks for
    nothing but growth.

    Args:
        sums: what `model_statistics` returned, (..., 18); the leading dimensions, if any, are tensors.
        peaks: before this step.
        step: (...), 1 at the first step.

    Returns:
        (..., C), standardised.
    """
    size, param_square, grad_square, _, memory_square, product, _, pull, _ = sums[
        ..., :STATISTICS
    ].unbind(-1)
    largest, decrease, model_size, *model = sums[..., _LARGEST:_HEAVIEST].unbind(-1)
    grad_rms, _ = root_mean_squares(sums)
    share = torch.log(grad_rms / largest)
    step = step.to(sums.dtype).clamp(max=_LATEST_STEP)
    raw = (
        torch.log(param_square / size + _CONTEXT_PARAM_FLOOR**2) / 2,
        torch.log(grad_rms),
        _log_ratio(grad_rms, peaks.grad_rms_max),
        _cosine(size, grad_square, memory_square, product),
        torch.log(size),
        1 / step,
        torch.log(step),
        share.clamp(min=-_SHARE_BOUND),
        _log_ratio(decrease, peaks.decrease_max),
        _cosine(model_size, *model),
        torch.log(model_size),
        torch.log(_DECREASE_FLOOR + decrease),
        torch.asinh(-pull.clamp(-_PULL_BOUND, _PULL_BOUND) / _PULL_UNIT),
        _pull_cosine(sums),
    )
    # scalar by scalar: a tensor of the constants would be copied to the device, and waited for
    return torch.stack(
        [(x - shift) / scale for x, shift, scale in zip(raw, _CONTEXT_SHIFT, _CONTEXT_SCALE)],
        dim=-1,
    )


def _learned(sums: Tensor, heaviest: Tensor) -> Tensor:
    granted = torch.maximum(2 * _request(sums, heaviest), -sums[:, _PULL] / _PULL_UNIT)
    return granted.amax().clamp(0, 1)


def _request(sums: Tensor, heaviest: Tensor) -> Tensor:
    request = (_pull_cosine(sums).clamp(min=0) * _weights(sums) / heaviest) ** 2
    return request / (request + _REQUEST**2)


def _weights(sums: Tensor) -> Tensor:
    """Of a matrix RMS of the gradient times its norm, (...), see `radial_gate`."""
    rms, _ = root_mean_squares(sums)
    return rms * rms * torch.sqrt(sums[..., 3].clamp(min=1)) * _matrix(sums).clamp(max=1)


def _matrix(sums: Tensor) -> Tensor:
    """See `tensor_statistics`, (...)."""
    return sums[..., _MATRIX] / sums[..., 0].clamp(min=1)


def _pull_cosine(sums: Tensor) -> Tensor:
    """-cos(parameter, gradient): 1 where the gradient asks for nothing but growth."""
    size, param_square, grad_square = sums[..., 0], sums[..., 1], sums[..., 2]
    return -_cosine(size, grad_square, param_square, sums[..., _PULL])


def _grown(peak: Tensor, value: Tensor, settled: Tensor) -> Tensor:
    """The larger of both; where settled at most `_MOST_GROWTH` times a peak that there was."""
    bound = torch.where(settled & (peak > 0), _MOST_GROWTH * peak, math.inf)
    return torch.maximum(peak, torch.minimum(value, bound))


def _log_ratio(value: Tensor, peak: Tensor) -> Tensor:
    """Of a size to the largest before; 0 where there was none."""
    ratio = torch.log((value + _GRAD_FLOOR) / peak.clamp(min=_GRAD_FLOOR))
    return torch.where(peak > 0, ratio, 0).clamp(-_RATIO_BOUND, _RATIO_BOUND)


def _cosine(size: Tensor, grad_square: Tensor, other_square: Tensor, product: Tensor) -> Tensor:
    """Between the gradient and another vector; 0 where either is, or there are no coordinates."""
    size = size.clamp(min=1)
    rms = [torch.sqrt(square / size + _GRAD_FLOOR**2) for square in (grad_square, other_square)]
    return product / size / (rms[0] * rms[1])
