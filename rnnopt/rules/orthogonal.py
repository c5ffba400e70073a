"""Matrices with equal singular values, as Muon's directions (Jordan et al. 2024).

Shapes: R rows, C columns, r the smaller of both. Leading batch dimensions are allowed everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Coefficients of Muon's Newton-Schulz iterations, https://kellerjordan.github.io/posts/muon
ITERATIONS = ((3.4445, -4.7750, 2.0315),) * 5
# Columns that are converted at once: a copy of a whole matrix would take much memory.
_CHUNK = 1 << 13


def orthogonalized(direction: Tensor, floor: float) -> Tensor:
    """A matrix's direction with about equal singular values and the same Frobenius norm.

    ``U V^T`` for ``D = U S V^T``, scaled to the norm of D. The first singular vectors of a gradient
    are what its examples have in common; without orthogonalisation the rest of a LoRA factor hardly
    moves. Five Newton-Schulz iterations on the short side bring singular values near 1; those of
    zero stay zero.

    Args:
        direction: D, (..., R, C).
        floor: added to squared norms.

    Returns:
        (..., R, C); zeros for zeros.
    """
    tall = direction.shape[-2] > direction.shape[-1]
    wide = direction.mT if tall else direction
    if direction.dtype == torch.float64 or direction.device.type == "mps":  # nothing is wider
        found = _iterated(wide, floor)
    else:
        factor = orthogonalizing_factor(gram_matrix(wide), floor)
        parts = torch.split(wide, _CHUNK, -1)
        found = torch.cat([(factor @ part.double()).to(wide.dtype) for part in parts], -1)
    return found.mT if tall else found


def _iterated(wide: Tensor, floor: float) -> Tensor:
    """The iterations of the matrix itself, for what has no wider dtype: (..., r, C) -> (..., r, C).

    Products of rows hold squares of singular values, and take twice the digits.
    """
    square = (wide * wide).sum(dim=(-2, -1), keepdim=True) + floor
    x = wide / torch.sqrt(square)
    for a, b, c in ITERATIONS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    norm = (x * x).sum(dim=(-2, -1), keepdim=True) + floor
    return x * torch.sqrt(square / norm)


def gram_matrix(wide: Tensor) -> Tensor:
    """Inner products of the rows, (..., r, C) -> (..., r, r), float64."""
    gram = torch.zeros((), dtype=torch.float64, device=wide.device)
    for part in torch.split(wide, _CHUNK, -1):
        rows = part.double()
        gram = gram + rows @ rows.mT
    return gram


def orthogonalizing_factor(gram: Tensor, floor: float) -> Tensor:
    """What the short side of a matrix is multiplied with to orthogonalise it, (..., r, r).

    Every Newton-Schulz iteration ``(a I + b G + c G^2) X`` with ``G = X X^T`` multiplies X from the
    left with a polynomial of G, and G from both sides. So X itself is not needed.

    Args:
        gram: of the matrix, see `gram_matrix`.
        floor: added to squared norms.

    Returns:
        A symmetric matrix, float64.
    """
    size = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    unit = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, x_x = unit, gram / (size + floor)
    for a, b, c in ITERATIONS:
        polynomial = a * unit + b * x_x + c * (x_x @ x_x)
        factor, x_x = polynomial @ factor, polynomial @ x_x @ polynomial
    square = x_x.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    return factor / torch.sqrt(square + floor)
