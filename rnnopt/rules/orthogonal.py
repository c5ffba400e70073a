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
    gram = gram_matrix(direction.mT if tall else direction)
    factor = orthogonalizing_factor(gram, floor).to(direction.dtype)
    return direction @ factor if tall else factor @ direction


def gram_matrix(wide: Tensor) -> Tensor:
    """Inner products of the rows, (..., r, C) -> (..., r, r).

    In float64 where the device has it, since squares of small singular values are lost otherwise.
    """
    dtype = wide.dtype if wide.device.type == "mps" else torch.float64
    parts = (part.to(dtype) for part in torch.split(wide, _CHUNK, -1))
    gram = torch.zeros((), dtype=dtype, device=wide.device)
    for part in parts:
        gram = gram + part @ part.mT
    return gram


def orthogonalizing_factor(gram: Tensor, floor: float) -> Tensor:
    """What the short side of a matrix is multiplied with to orthogonalise it, (..., r, r).

    Every Newton-Schulz iteration ``(a I + b G + c G^2) X`` with ``G = X X^T`` multiplies X from the
    left with a polynomial of G, and G from both sides. So X itself is not needed.

    Args:
        gram: of the matrix, see `gram_matrix`.
        floor: added to squared norms.

    Returns:
        A symmetric matrix.
    """
    size = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    unit = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, x_x = unit, gram / (size + floor)
    for a, b, c in ITERATIONS:
        polynomial = a * unit + b * x_x + c * (x_x @ x_x)
        factor, x_x = polynomial @ factor, polynomial @ x_x @ polynomial
    square = x_x.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    return factor / torch.sqrt(square + floor)
