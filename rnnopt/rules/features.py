"""The inputs of the learned rule: the gradient and the parameter as well-scaled features.

Shapes: N coordinates of one tensor, P tensors that are stepped together,
F = `COORDINATE_FEATURES`, C = `CONTEXT_FEATURES`. ``...`` stands for any leading dimensions, which
index tensors.

Two terms recur. The *radial derivative* of a tensor is ``-<p, g>``: the nats by which the loss
falls, to first order, if the tensor grows by its own size. The *first-order decrease* of a step is
the decrease of the loss if the loss were linear.

Every feature has a finite derivative, also at zero, so that second-order meta-gradients are exact.
None needs a value on the host, so nothing waits for a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

COORDINATE_FEATURES = 5
CONTEXT_FEATURES = 14
STATISTICS = 9
# Columns of `tensor_statistics`, and of what `model_statistics` appends to them.
_PARAM_DOT_GRAD, _MATRIX = 7, 8
_MODEL_GRAD_RMS, _DECREASE, _MODEL_SIZE = STATISTICS, STATISTICS + 1, STATISTICS + 2
_LARGEST_SCORE, _EVIDENCE, _WIDE_SIZE = STATISTICS + 6, STATISTICS + 7, STATISTICS + 8

# Floors: smaller values carry no information at float32, or at the scale of real models.
_GRAD_FLOOR = 1e-10
_PARAM_FLOOR = 1e-3  # a zero tensor (fresh LoRA factor, bias) must differ from a trained one
RATIO_FLOOR = 1e-3  # of one gradient coordinate to its tensor's RMS
_CONTEXT_PARAM_FLOOR = 1e-4  # of a parameter's RMS where its logarithm is taken
_RATIO_BOUND = 5.0  # on the logarithm of a gradient's size relative to its running maximum
_SHARE_BOUND = 8.0  # on the logarithm of a tensor's gradient relative to the model's largest
# Exponents of `step_scale`. 0 gives every tensor the same step size, as Adam does; 1 a step
# proportional to its gradient's RMS, as SGD does.
SHARE_EXPONENT = 0.25
# 0 does not anneal; 1 anneals in proportion to the model's largest gradient.
ANNEALING_EXPONENT = 0.5
# Running maxima of gradients grow at most by this factor a step, from this step on. Before, they
# are unlimited: gradients below a zero head start at zero.
_MAX_GROWTH = 4.0
_FIRST_LIMITED_STEP = 5
# Later steps have the features of this one, since meta-training does not go far beyond it.
_LAST_DISTINCT_STEP = 16.0
# Nats, see `step_scale`: bounds the step of a model of a few parameters, or of a gradient that was
# clipped to almost nothing.
_DECREASE_FLOOR = 8.0
# Lower bounds on the first-order decrease in `step_scale`: a nat per so many coordinates, and so
# many nats times the cube root of the coordinates of wide matrices. LoRA factors exceed them, an
# encoder does not. The cube root matters for encoders smaller than MiniLM.
_COORDINATES_PER_NAT = 45_000.0
_NATS_PER_CUBE_ROOT = 2.29
# Factor a step on the running maxima of gradients before the model has learned anything.
_UNLEARNED_DECAY = 0.5

# See `orthogonalized`. The floor is of a sum of squares of directions, each of which is about 1.
_NEWTON_SCHULZ = 5 * [(3.4445, -4.7750, 2.0315)] + 3 * [(1.5, -0.5, 0.0)]
_MATRIX_GAIN = 2.0
_DIRECTION_FLOOR = 1e-12

_SCORE_FLOOR = 1e-30  # of the largest score, for a model without matrices
_GATE_THRESHOLD = 0.15  # where `radial_gate` is 1/2
_MAX_GROWTH_MULTIPLIER = 5.0
_RADIAL_BOUND = 100.0  # nats, on the radial derivative in `context_features`
_RADIAL_UNIT = 0.125  # nats: about the radial derivative of a new head after its first step

# Typical value and spread of each context feature (in the order of `context_features`) on Hugging
# Face encoders: they bring the inputs of the rule near [-2, 2].
_CONTEXT_SHIFT = (-3.0, -7.0, 0.0, 0.0, 9.0, 0.0, 2.0, -2.0, 0.0, 0.0, 12.0, 3.0, 0.0, 0.0)
_CONTEXT_SCALE = (2.0, 3.0, 1.0, 1.0, 3.0, 1.0, 1.5, 2.0, 1.0, 1.0, 4.0, 2.0, 1.5, 0.5)


class RunningMaxima(NamedTuple):
    """Running maxima over the steps so far: tensor-wise state, (...) each, 0 before the first.

    Attributes:
        grad_rms_max: of the RMS of the tensor's gradient.
        model_grad_rms_max: of the largest gradient RMS of any tensor in the model.
        decrease_max: of the model's first-order decrease, see `model_statistics`.
        radial_gate_max: of `radial_gate`.
        evidence_max: of the evidence that the model has learned, see `model_statistics`.
    """

    grad_rms_max: Tensor
    model_grad_rms_max: Tensor
    decrease_max: Tensor
    radial_gate_max: Tensor
    evidence_max: Tensor

    def updated(self, context: Tensor, step: Tensor) -> RunningMaxima:
        """The maxima after a step.

        The first three are limited and may decay. From `_FIRST_LIMITED_STEP` on they grow at most
        by `_MAX_GROWTH`, because an outlier would shrink all later steps. While there is no
        evidence of learning they halve at every step, because early gradients (after a first step
        that was too long, for example) say little about what an encoder has to learn.

        Args:
            context: the result of `model_statistics`, (..., 18).
            step: (...), 1 at the first step.
        """
        rms, _ = root_mean_squares(context)
        limited = step >= _FIRST_LIMITED_STEP
        evidence = torch.maximum(self.evidence_max, context[..., _EVIDENCE])
        keep = _UNLEARNED_DECAY + (1 - _UNLEARNED_DECAY) * evidence
        return RunningMaxima(
            _limited_maximum(keep * self.grad_rms_max, rms, limited),
            _limited_maximum(
                keep * self.model_grad_rms_max, context[..., _MODEL_GRAD_RMS], limited
            ),
            _limited_maximum(keep * self.decrease_max, context[..., _DECREASE], limited),
            torch.maximum(self.radial_gate_max, radial_gate(context)),
            evidence,
        )


def tensor_statistics(grad: Tensor, momentum: Tensor, param: Tensor, matrix: Tensor) -> Tensor:
    """What the rule has to know of a tensor as a whole, as sums over its coordinates.

    Sums can be added over the shards of a tensor, or over the blocks of several threads.

    Args:
        grad: (N,).
        momentum: Adam's first moment m before this step, (N,).
        param: (N,).
        matrix: 0-d; 0 for a vector, 1 for a matrix, 2 for a wide matrix.

    Returns:
        (9,): N; the sums of p^2, of g^2, of (g != 0), of m^2, of m g, of |g| and of p g; matrix N.
    """
    one = torch.ones((), dtype=param.dtype, device=param.device)
    return torch.stack(
        [
            one * param.numel(),
            (param * param).sum(),
            (grad * grad).sum(),
            torch.count_nonzero(grad).to(param.dtype),
            (momentum * momentum).sum(),
            (momentum * grad).sum(),
            grad.abs().sum(),
            (param * grad).sum(),
            matrix * param.numel(),
        ]
    )


def model_statistics(statistics: Tensor, decaying: bool = False) -> Tensor:
    """Append statistics of the whole model to those of each tensor.

    Args:
        statistics: the result of `tensor_statistics` for each tensor, (P, 9).
        decaying: whether `RunningMaxima` decay while there is no evidence of learning.

    Returns:
        (P, 18). The last nine columns are the same in every row:

        - the largest gradient RMS of any tensor;
        - the first-order decrease, in nats, of a step of (RMS(g) / largest RMS)^SHARE_EXPONENT
          along each tensor's sign(g);
        - N, sum of g^2, of m^2 and of m g over all coordinates;
        - the largest gradient score, see `radial_gate`;
        - the evidence that the model has learned, from 0 to 1: large if some tensor's gradient is
          mostly radial, or if its radial derivative reaches `_RADIAL_UNIT`; 1 unless decaying;
        - coordinates with a gradient in all wide matrices but the largest. A head of many classes
          is wide too, and does not count.
    """
    rms, _ = root_mean_squares(statistics)
    largest = rms.amax()
    decrease = ((rms / largest) ** SHARE_EXPONENT * statistics[:, 6]).sum()
    size, _, grad_square, _, momentum_square, product, *_ = statistics.sum(dim=0).unbind()
    largest_score = _gradient_scores(statistics).amax().clamp(min=_SCORE_FLOOR)
    evidence = _evidence(statistics, largest_score) if decaying else torch.ones_like(largest)
    in_wide = statistics[:, 3] * (_matrix(statistics) - 1).clamp(min=0)
    wide = in_wide.sum() - in_wide.amax()
    shared = torch.stack(
        [
            largest, decrease, size, grad_square, momentum_square, product,
            largest_score, evidence, wide,
        ]
    )  # fmt: skip
    return torch.cat([statistics, shared.expand(len(statistics), -1)], dim=1)


def step_scale(
    context: Tensor, maxima: RunningMaxima, after: RunningMaxima, gated_annealing: bool = False
) -> Tensor:
    """The step size of each tensor per nat of first-order decrease that the first step should have.

    ::

        scale = (RMS(g) / G)^SHARE_EXPONENT * (largest RMS(g) / G)^ANNEALING_EXPONENT
            * (1 - gate * max(0, cos(m, g)))^2 / (8 + max(D, N / 45000, 2.29 W^(1/3)))

    with the running maxima G of the largest gradient RMS, D of the first-order decrease and gate
    of `radial_gate` (before this step); N the model's coordinates; W those of its wide matrices.

    - A model with a large gradient in many coordinates takes small steps, a head alone large ones.
    - Steps anneal as gradients vanish.
    - N and W bound the step of a whole encoder, where many small changes add up. Adam's learning
      rate falls with the width as its inverse, W^(-1/2) (Yang et al. 2022, arXiv:2203.03466);
      W^(-1/3) fits small encoders better.
    - A tensor whose gradient was radial only has the right direction already. Then it steps by the
      part of its gradient that is new: small in full batches, where a long step would overfit the
      hardest texts.

    Args:
        context: the result of `model_statistics`, (..., 18).
        maxima: before this step.
        after: after this step, see `RunningMaxima.updated`.
        gated_annealing: multiply ANNEALING_EXPONENT by the gate. Gradients vanish as soon as a
            head is confident; this lets the encoder below it go on learning.

    Returns:
        (...).
    """
    rms, _ = root_mean_squares(context)
    size, _, grad_square, _, momentum_square, product, *_ = context.unbind(-1)
    agreement = _cosine(size, grad_square, momentum_square, product).clamp(min=0)
    new = (1 - maxima.radial_gate_max * agreement) ** 2
    least = torch.maximum(
        context[..., _MODEL_SIZE] / _COORDINATES_PER_NAT,
        # detached: it is a count, often 0, where the root has no derivative
        _NATS_PER_CUBE_ROOT * context[..., _WIDE_SIZE].detach() ** (1 / 3),
    )
    decrease = torch.maximum(after.decrease_max, least)
    share, annealing = (  # clamped, because an outlier exceeds its limited maximum
        (size / after.model_grad_rms_max).clamp(max=1)
        for size in (rms, context[..., _MODEL_GRAD_RMS])
    )
    gate = after.radial_gate_max if gated_annealing else 1.0
    exponent = ANNEALING_EXPONENT * gate
    return new * share**SHARE_EXPONENT * annealing**exponent / (_DECREASE_FLOOR + decrease)


def radial_gate(context: Tensor) -> Tensor:
    """How far a matrix's gradient only asks the matrix to grow, from 0 to 1; (...).

    ``x^2 / (x^2 + 0.15^2)`` with ``x = max(0, -cos(p, g)) * score / largest score`` and the
    gradient score ``RMS(g) * |g|`` of a matrix. Neither a few coordinates nor very many small ones
    give a large score. Vectors have score 0: a bias that grew would favour some classes in every
    decision. For a small head that separates the classes x is 1/2 or more. For pretrained matrices
    it is almost 0: normalisation makes most of them invariant to scale, and the score of the
    others is below the head's.

    Args:
        context: the result of `model_statistics`, (..., 18).
    """
    return _gate(context, context[..., _LARGEST_SCORE])


def growth_multiplier(context: Tensor, threshold: float) -> Tensor:
    """A factor on a tensor's log growth: radial derivative / threshold, clamped to [1, 5]; (...).

    A head that separates many classes has to grow far before it is confident of any. With few
    classes the radial derivative is seldom above the threshold.

    Args:
        context: the result of `model_statistics`, (..., 18).
        threshold: in nats.
    """
    return (-context[..., _PARAM_DOT_GRAD] / threshold).clamp(1, _MAX_GROWTH_MULTIPLIER)


def orthogonalized(
    direction: Tensor,
    iterations: Sequence[tuple[float, float, float]] | None = None,
    floor: float | None = None,
) -> Tensor:
    """A matrix's direction with equal singular values and the same Frobenius norm.

    ``U V^T`` for ``D = U S V^T``, scaled to the norm of D, as in Muon (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon). The first singular vectors of a gradient are what
    its examples have in common; without orthogonalisation the rest of a LoRA factor hardly moves.
    Newton-Schulz iterations on the short side: the five of Muon, which bring singular values near
    1, then three cubic ones, which converge. Singular values of zero stay zero.

    Args:
        direction: (..., R, C).
        iterations: coefficients (a, b, c) of ``a X + (b X X^T + c (X X^T)^2) X``; None means those.
        floor: added to squared norms.

    Returns:
        (..., R, C); zeros for zeros.
    """
    iterations = _NEWTON_SCHULZ if iterations is None else iterations
    floor = _DIRECTION_FLOOR if floor is None else floor
    tall = direction.shape[-2] > direction.shape[-1]
    wide = direction.mT if tall else direction
    square = (wide * wide).sum(dim=(-2, -1), keepdim=True) + floor
    x = wide / torch.sqrt(square)
    for a, b, c in iterations:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    norm = (x * x).sum(dim=(-2, -1), keepdim=True) + floor
    x = x * torch.sqrt(square / norm)
    return x.mT if tall else x


def matrix_gain(radial_gate_max: Tensor, step: Tensor) -> Tensor:
    """A factor on the length of an orthogonalised direction, from 1 to `_MATRIX_GAIN`; (...).

    LoRA factors tolerate longer steps along an orthogonalised direction. A head with a radial
    gradient does not, and at the first step the gate is not known yet.

    Args:
        radial_gate_max: see `RunningMaxima`, after this step; (...).
        step: (...), 1 at the first step.
    """
    return torch.where(step > 1, _MATRIX_GAIN - (_MATRIX_GAIN - 1) * radial_gate_max, 1)


def root_mean_squares(statistics: Tensor) -> tuple[Tensor, Tensor]:
    """RMS of the gradient and of the parameter, each (...).

    The gradient's is over coordinates with a nonzero gradient: most rows of an embedding have none,
    and counting them would make the same gradient smaller in a larger vocabulary.

    Args:
        statistics: the result of `tensor_statistics` or `model_statistics`, (..., 4 or more).
    """
    size, param_square, grad_square, nonzero = statistics[..., :4].unbind(-1)
    return (
        torch.sqrt(grad_square / nonzero.clamp(min=1) + _GRAD_FLOOR**2),
        torch.sqrt(param_square / size + _PARAM_FLOOR**2),
    )


def coordinate_features(
    adam: Tensor, normalised: Tensor, relative: Tensor, relative_param: Tensor
) -> Tensor:
    """Parameter-wise inputs, feature-major.

    Directions as in Lv et al. 2017 (arXiv:1703.03633), with the signed and the logarithmic
    magnitude of Andrychowicz et al. 2016 (arXiv:1606.04474). The latter is relative to the tensor,
    so that it does not depend on the scale of the loss.

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


def context_features(context: Tensor, maxima: RunningMaxima, step: Tensor) -> Tensor:
    """Tensor-wise inputs, standardised.

    Of the tensor: log RMS of the parameter (a new head or a zero LoRA factor differs from a
    pretrained matrix); log RMS of the gradient; log of its ratio to its running maximum (how far
    adaptation has come); cos(m, g) (negative after a step that overshoots); log N; 1 / step; log
    step; log of its gradient RMS relative to the model's largest. Of the model: log of the
    first-order decrease relative to its running maximum; cos(m, g); log N; log of the first-order
    decrease. Of the tensor: asinh of the radial derivative, and -cos(p, g).

    Args:
        context: the result of `model_statistics`, (..., 18).
        maxima: before this step.
        step: (...), 1 at the first step.

    Returns:
        (..., C).
    """
    size, param_square, grad_square, _, momentum_square, product, _, param_dot_grad, _ = context[
        ..., :STATISTICS
    ].unbind(-1)
    largest, decrease, model_size, *model = context[..., _MODEL_GRAD_RMS:_LARGEST_SCORE].unbind(-1)
    grad_rms, _ = root_mean_squares(context)
    share = torch.log(grad_rms / largest)
    step = step.to(context.dtype).clamp(max=_LAST_DISTINCT_STEP)
    raw = (
        torch.log(param_square / size + _CONTEXT_PARAM_FLOOR**2) / 2,
        torch.log(grad_rms),
        _log_ratio(grad_rms, maxima.grad_rms_max),
        _cosine(size, grad_square, momentum_square, product),
        torch.log(size),
        1 / step,
        torch.log(step),
        share.clamp(min=-_SHARE_BOUND),
        _log_ratio(decrease, maxima.decrease_max),
        _cosine(model_size, *model),
        torch.log(model_size),
        torch.log(_DECREASE_FLOOR + decrease),
        torch.asinh(-param_dot_grad.clamp(-_RADIAL_BOUND, _RADIAL_BOUND) / _RADIAL_UNIT),
        _radial_cosine(context),
    )
    # one at a time, because a tensor of the constants would be copied to the device at every step
    return torch.stack(
        [(x - shift) / scale for x, shift, scale in zip(raw, _CONTEXT_SHIFT, _CONTEXT_SCALE)],
        dim=-1,
    )


def _evidence(statistics: Tensor, largest_score: Tensor) -> Tensor:
    """See `model_statistics`, 0-d."""
    radial = -statistics[:, _PARAM_DOT_GRAD] / _RADIAL_UNIT
    return torch.maximum(2 * _gate(statistics, largest_score), radial).amax().clamp(0, 1)


def _gate(statistics: Tensor, largest_score: Tensor) -> Tensor:
    """See `radial_gate`, (...)."""
    cosine = _radial_cosine(statistics).clamp(min=0)
    square = (cosine * _gradient_scores(statistics) / largest_score) ** 2
    return square / (square + _GATE_THRESHOLD**2)


def _gradient_scores(statistics: Tensor) -> Tensor:
    """``RMS(g) * |g|`` of matrices, 0 of vectors; (...)."""
    rms, _ = root_mean_squares(statistics)
    nonzero = statistics[..., 3].clamp(min=1)
    return rms * rms * torch.sqrt(nonzero) * _matrix(statistics).clamp(max=1)


def _matrix(statistics: Tensor) -> Tensor:
    """The argument `matrix` of `tensor_statistics`, (...)."""
    return statistics[..., _MATRIX] / statistics[..., 0].clamp(min=1)


def _radial_cosine(statistics: Tensor) -> Tensor:
    """-cos(p, g), (...): 1 if gradient descent would only make the tensor grow."""
    size, param_square, grad_square = statistics[..., 0], statistics[..., 1], statistics[..., 2]
    return -_cosine(size, grad_square, param_square, statistics[..., _PARAM_DOT_GRAD])


def _limited_maximum(maximum: Tensor, value: Tensor, limited: Tensor) -> Tensor:
    """The larger of both; if limited, at most `_MAX_GROWTH` times a maximum that is not zero."""
    bound = torch.where(limited & (maximum > 0), _MAX_GROWTH * maximum, math.inf)
    return torch.maximum(maximum, torch.minimum(value, bound))


def _log_ratio(value: Tensor, maximum: Tensor) -> Tensor:
    """Log of a value relative to its running maximum; 0 if the maximum is zero."""
    ratio = torch.log((value + _GRAD_FLOOR) / maximum.clamp(min=_GRAD_FLOOR))
    return torch.where(maximum > 0, ratio, 0).clamp(-_RATIO_BOUND, _RATIO_BOUND)


def _cosine(size: Tensor, grad_square: Tensor, other_square: Tensor, product: Tensor) -> Tensor:
    """Cosine between the gradient and another vector; 0 if one is zero or empty."""
    size = size.clamp(min=1)
    rms = [torch.sqrt(square / size + _GRAD_FLOOR**2) for square in (grad_square, other_square)]
    return product / size / (rms[0] * rms[1])
