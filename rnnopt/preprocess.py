"""What the learned rule sees: the gradient and the parameter as well-scaled features.

Shapes: N coordinates of one tensor, F = `COORDINATE_FEATURES`, C = `CONTEXT_FEATURES`.
Every feature has a finite derivative, also at zero, so that second-order meta-gradients are exact;
none needs a value on the host, so nothing waits for a GPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

COORDINATE_FEATURES = 5
CONTEXT_FEATURES = 7

# Floors: below these a value carries no information at float32 or at the scale of real models.
_GRAD_FLOOR = 1e-10
_PARAM_FLOOR = 1e-3  # a zero tensor (fresh LoRA factor, bias) must differ from a trained one
_RATIO_FLOOR = 1e-3  # of one gradient coordinate to its tensor's RMS
_CONTEXT_PARAM_FLOOR = 1e-4  # of a parameter's RMS where its logarithm is taken
_RATIO_BOUND = 5.0  # on the logarithm of the gradient's RMS against its peak

# Typical value and spread of each context feature on Hugging Face encoders, for inputs near
# [-2, 2]; the features are log RMS of the parameter, log RMS of the gradient, log of its ratio to
# the largest one before, cos(memory, gradient), log N, 1 / step, log step.
_CONTEXT_SHIFT = (-3.0, -7.0, 0.0, 0.0, 9.0, 0.0, 2.0)
_CONTEXT_SCALE = (2.0, 3.0, 1.0, 1.0, 3.0, 1.0, 1.5)


def relative_gradient(grad: Tensor) -> tuple[Tensor, Tensor]:
    """``g / RMS(g)`` and RMS(g), the RMS taken over coordinates whose gradient is not zero.

    Most rows of an embedding get no gradient at all; counting them would make the same gradient
    look larger the larger the vocabulary.

    Args:
        grad: (N,).

    Returns:
        The relative gradient (N,) and the RMS (0-d), at least `_GRAD_FLOOR`.
    """
    count = torch.count_nonzero(grad).clamp(min=1)
    rms = torch.sqrt((grad * grad).sum() / count + _GRAD_FLOOR**2)
    return grad / rms, rms


def coordinate_features(
    adam: Tensor, normalised: Tensor, relative: Tensor, param: Tensor
) -> Tensor:
    """Per-coordinate inputs, feature-major.

    Directions as in Lv et al. 2017 (arXiv:1703.03633) beside the signed and the logarithmic
    magnitude of Andrychowicz et al. 2016 (arXiv:1606.04474), the latter relative to the tensor so
    that rescaling the loss changes nothing.

    Args:
        adam: m_hat / sqrt(v_hat), (N,).
        normalised: g / sqrt(v_hat), (N,).
        relative: g / RMS(g), (N,).
        param: (N,).

    Returns:
        (F, N).
    """
    param_rms = torch.sqrt((param * param).mean() + _PARAM_FLOOR**2)
    log_ratio = torch.log(relative * relative + _RATIO_FLOOR**2) / 6  # about [-2.3, 1]
    return torch.stack(
        [adam, normalised, torch.asinh(relative), log_ratio, torch.asinh(param / param_rms)]
    )


def tensor_context(
    grad: Tensor, grad_rms: Tensor, memory: Tensor, peak: Tensor, step: Tensor, param: Tensor
) -> Tensor:
    """What the rule knows of the tensor as a whole.

    The RMS of the parameter tells a fresh head or a zero LoRA factor from a pretrained matrix.
    The gradient's RMS against its peak tells how far adaptation has come, or that it went wrong;
    its cosine with the memory tells a step that overshoots.

    Args:
        grad: (N,).
        grad_rms: 0-d.
        memory: Adam's first moment before this step, (N,).
        peak: the largest grad_rms of earlier steps, 0-d; 0 at the first.
        step: 0-d, 1 at the first step.
        param: (N,).

    Returns:
        (C,), standardised.
    """
    size = param.numel()
    memory_rms = torch.sqrt((memory * memory).mean() + _GRAD_FLOOR**2)
    whole_rms = torch.sqrt((grad * grad).mean() + _GRAD_FLOOR**2)
    ratio = torch.where(peak > 0, torch.log(grad_rms / peak.clamp(min=_GRAD_FLOOR)), 0)
    one = torch.ones_like(grad_rms)
    raw = (
        torch.log((param * param).mean() + _CONTEXT_PARAM_FLOOR**2) / 2,
        torch.log(grad_rms),
        ratio.clamp(-_RATIO_BOUND, _RATIO_BOUND),
        (memory * grad).mean() / (memory_rms * whole_rms),
        one * math.log(size),
        one / step,
        torch.log(step.to(one.dtype)),
    )
    # scalar by scalar: a tensor of the constants would be copied to the device, and waited for
    return torch.stack(
        [(x - shift) / scale for x, shift, scale in zip(raw, _CONTEXT_SHIFT, _CONTEXT_SCALE)]
    )
