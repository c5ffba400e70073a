"""What the learned rule sees: the gradient and the parameter as well-scaled features.

Shapes: N coordinates of one tensor, F = `COORDINATE_FEATURES`, C = `CONTEXT_FEATURES`.
Every feature has a finite derivative, also at zero, so that second-order meta-gradients are exact;
none needs a value on the host, so nothing waits for a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

COORDINATE_FEATURES = 5
SUMS = 6
CONTEXT_FEATURES = 7

# Floors: below these a value carries no information at float32 or at the scale of real models.
_GRAD_FLOOR = 1e-10
_PARAM_FLOOR = 1e-3  # a zero tensor (fresh LoRA factor, bias) must differ from a trained one
RATIO_FLOOR = 1e-3  # of one gradient coordinate to its tensor's RMS
_CONTEXT_PARAM_FLOOR = 1e-4  # of a parameter's RMS where its logarithm is taken
_RATIO_BOUND = 5.0  # on the logarithm of the gradient's RMS against its peak

# Typical value and spread of each context feature on Hugging Face encoders, for inputs near
# [-2, 2]; the features are log RMS of the parameter, log RMS of the gradient, log of its ratio to
# the largest one before, cos(memory, gradient), log N, 1 / step, log step.
_CONTEXT_SHIFT = (-3.0, -7.0, 0.0, 0.0, 9.0, 0.0, 2.0)
_CONTEXT_SCALE = (2.0, 3.0, 1.0, 1.0, 3.0, 1.0, 1.5)


def tensor_sums(grad: Tensor, memory: Tensor, param: Tensor) -> Tensor:
    """All that a rule has to know of a tensor as a whole, as sums over its coordinates.

    Sums, so that the pieces of a tensor that is sharded over processes, or the blocks of one that
    is worked on by several threads, can be added up.

    Args:
        grad: (N,).
        memory: Adam's first moment before this step, (N,).
        param: (N,).

    Returns:
        (6,): N, sum of p^2, of g^2, count of g != 0, sum of m^2, of m g.
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
        ]
    )


def root_mean_squares(sums: Tensor) -> tuple[Tensor, Tensor]:
    """RMS of the gradient and of the parameter, each (...) for sums (..., 6).

    The gradient's is taken over coordinates whose gradient is not zero: most rows of an embedding
    get none at all, and counting them would make the same gradient look larger the larger the
    vocabulary.
    """
    size, param_square, grad_square, touched, _, _ = sums.unbind(-1)
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


def tensor_context(sums: Tensor, grad_rms: Tensor, peak: Tensor, step: Tensor) -> Tensor:
    """What the rule knows of a tensor as a whole.

    The RMS of the parameter tells a fresh head or a zero LoRA factor from a pretrained matrix.
    The gradient's RMS against its peak tells how far adaptation has come, or that it went wrong;
    its cosine with the memory tells a step that overshoots.

    Args:
        sums: what `tensor_sums` returned, (..., 6); the leading dimensions, if any, are tensors.
        grad_rms: what `root_mean_squares` returned, (...).
        peak: the largest grad_rms of earlier steps, (...); 0 at the first.
        step: (...), 1 at the first step.

    Returns:
        (..., C), standardised.
    """
    size, param_square, grad_square, _, memory_square, product = sums.unbind(-1)
    memory_rms = torch.sqrt(memory_square / size + _GRAD_FLOOR**2)
    whole_rms = torch.sqrt(grad_square / size + _GRAD_FLOOR**2)
    ratio = torch.where(peak > 0, torch.log(grad_rms / peak.clamp(min=_GRAD_FLOOR)), 0)
    step = step.to(sums.dtype)
    raw = (
        torch.log(param_square / size + _CONTEXT_PARAM_FLOOR**2) / 2,
        torch.log(grad_rms),
        ratio.clamp(-_RATIO_BOUND, _RATIO_BOUND),
        product / size / (memory_rms * whole_rms),
        torch.log(size),
        1 / step,
        torch.log(step),
    )
    # scalar by scalar: a tensor of the constants would be copied to the device, and waited for
    return torch.stack(
        [(x - shift) / scale for x, shift, scale in zip(raw, _CONTEXT_SHIFT, _CONTEXT_SCALE)],
        dim=-1,
    )
