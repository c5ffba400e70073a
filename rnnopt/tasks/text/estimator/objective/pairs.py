"""The loss of pairs of texts, which draws texts of a class together and others apart.

Shapes: B texts, H embedding size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def pair_loss(vectors: Tensor, alike: Tensor, weights: Tensor) -> Tensor:
    """The cosine-similarity loss of SetFit (Tunstall et al. 2022, arXiv:2209.11055), (...).

    The cosine of two texts should be 1 where they are alike and 0 where they are not: half the mean
    of ``(1 - cosine)**2`` over the former and half that of ``cosine**2`` over the latter. All pairs
    of the batch count, where SetFit draws some; it too draws as many of either kind. A pair that is
    partly alike counts in part as either.

    Args:
        vectors: (..., B, H), of any length.
        alike: (..., B, B), from 0 to 1, how much two texts have their labels in common.
        weights: (..., B), of the texts; a pair weighs their product.
    """
    directions = normalize(vectors, dim=-1)
    cosines = directions @ directions.mT
    others = 1 - torch.eye(weights.shape[-1], dtype=weights.dtype, device=weights.device)
    pairs = weights.unsqueeze(-1) * weights.unsqueeze(-2) * others  # no text with itself
    least = torch.finfo(vectors.dtype).tiny  # of a batch where no two texts are alike

    def mean(losses: Tensor, share: Tensor) -> Tensor:
        return (share * losses).sum((-2, -1)) / share.sum((-2, -1)).clamp_min(least)

    together = mean((1 - cosines).square(), pairs * alike)
    apart = mean(cosines.square(), pairs * (1 - alike))
    return (together + apart) / 2
