"""Matrices with equal singular values, as Muon's directions (Jordan et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

# Coefficients of Muon's Newton-Schulz iterations, https://kellerjordan.github.io/posts/muon
ITERATIONS = ((3.4445, -4.7750, 2.0315),) * 5


def orthogonalized(direction: Tensor, floor: float) -> Tensor:
    """A matrix's direction with about equal singular values and the same Frobenius norm.

    ``U V^T`` for ``D = U S V^T``, scaled to the norm of D. The first singular vectors of a gradient
    are what its examples have in common; without orthogonalisation the rest of a LoRA factor hardly
    moves. Five Newton-Schulz iterations on the short side bring singular values near 1; those of
    zero stay zero.

    Args:
        direction: (..., R, C).
        floor: added to squared norms.

    Returns:
        (..., R, C); zeros for zeros.
    """
    tall = direction.shape[-2] > direction.shape[-1]
    wide = direction.mT if tall else direction
    square = (wide * wide).sum(dim=(-2, -1), keepdim=True) + floor
    x = wide / torch.sqrt(square)
    for a, b, c in ITERATIONS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    norm = (x * x).sum(dim=(-2, -1), keepdim=True) + floor
    x = x * torch.sqrt(square / norm)
    return x.mT if tall else x
