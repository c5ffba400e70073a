"""What orthogonalised directions add to a kernel's step, with few copies of a large matrix.

Shapes: P pieces, B matrices of one shape, r their short side and C the long one, N = r C.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rnnopt.optim.kernels.fused import Piece
from rnnopt.rules.orthogonal import gram_matrix, orthogonalizing_factor
from rnnopt.rules.tensor_features import ROOT_FLOOR
from rnnopt.rules.two_level import BOUND, Decisions, advanced_moments

# Coordinates of all matrices of a shape that are worked on at once.
_CHUNK = 1 << 16


@dataclass(frozen=True)
class NarrowMatrices:
    """Matrices of one shape whose directions are orthogonalised.

    Attributes:
        rows: B indices of their pieces.
        shape: of each of them.
        units: of their coordinate-wise LSTMs, 0 without.
    """

    rows: Sequence[int]
    shape: tuple[int, ...]
    units: int

    def wide(self, values: Tensor) -> Tensor:
        """Coordinates (..., N) as (..., r, C), sharing their memory."""
        matrix = values.view(*values.shape[:-1], *self.shape)
        return matrix.mT if self.shape[0] > self.shape[1] else matrix

    def added(
        self, pieces: Sequence[Piece], grads: Sequence[Tensor], decisions: Decisions
    ) -> Iterator[tuple[slice, Tensor]]:
        """What `rnnopt.rules.orthogonal.orthogonalized` directions add to the step.

        Args:
            pieces: P of them, before the step.
            grads: their gradients, contiguous.
            decisions: (P,) each.

        Yields:
            Some of the columns of `wide`, and what is added there, (B, r, columns).
        """
        sources = self._sources(pieces, grads)
        step = torch.stack([pieces[i].state["step"] for i in self.rows])[:, None, None] + 1
        width = max(1, _CHUNK // (min(self.shape) * len(self.rows)))
        places = [slice(at, at + width) for at in range(0, max(self.shape), width)]
        gram = torch.zeros((), dtype=torch.float64, device=step.device)
        for place in places:
            directions = _directions(sources, step, place)
            gram = gram + gram_matrix(directions)
        both = decisions.orthogonal_adam, decisions.orthogonal_gradient
        # stacked, since an index from the host would make it wait for a GPU
        weights = torch.stack([x[i] for x in both for i in self.rows]).view(2, -1, 1, 1)
        factors = orthogonalizing_factor(gram, ROOT_FLOOR) * weights
        for place in places:
            if len(places) > 1:  # a single one is at hand
                directions = _directions(sources, step, place)
            adam, grad = directions.double()
            yield place, torch.baddbmm(factors[0] @ adam, factors[1], grad).to(step.dtype)

    def added_to_last(
        self, pieces: Sequence[Piece], grads: Sequence[Tensor], decisions: Decisions
    ) -> None:
        """Make of the last updates what they and orthogonalised directions add to the step.

        Where no coordinate-wise LSTM has left a direction, a step needs no copy of the matrix then.
        Coordinates that are not stepped keep their last update: those without a finite gradient,
        and those that never had one.

        Args:
            pieces: see `added`; their leaves ``change`` are written.
            grads: see `added`.
            decisions: see `added`.
        """
        sources = self._sources(pieces, grads)
        changes = [self.wide(pieces[i].state["change"]) for i in self.rows]
        for place, values in self.added(pieces, grads, decisions):
            for i, leaves, change, value in zip(self.rows, sources, changes, values):
                grad, m, v = (leaf[:, place] for leaf in leaves)
                stepped = grad.isfinite() & ((grad != 0) | (v != 0) | (m != 0))
                part = change[:, place]
                part.copy_(torch.where(stepped, decisions.last[i] * part + value, part))

    def _sources(self, pieces: Sequence[Piece], grads: Sequence[Tensor]) -> list[list[Tensor]]:
        """Gradient, first and second moment of each matrix, (r, C) each."""
        return [
            [
                self.wide(values.detach().view(-1))
                for values in (grads[i], pieces[i].state["m"], pieces[i].state["v"])
            ]
            for i in self.rows
        ]


def narrow_matrices(pieces: Sequence[Piece]) -> list[NarrowMatrices]:
    """The pieces whose directions are orthogonalised, by shape and units of a coordinate."""
    by_kind: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for i, piece in enumerate(pieces):
        if piece.transform is not None and piece.param.numel():
            kind = tuple(piece.param.shape), len(piece.state["cell"])
            by_kind.setdefault(kind, []).append(i)
    return [NarrowMatrices(rows, shape, units) for (shape, units), rows in by_kind.items()]


def _directions(sources: Sequence[Sequence[Tensor]], step: Tensor, place: slice) -> Tensor:
    """Adam's directions and gradients in some columns, (2, B, r, columns).

    Args:
        sources: gradient, first and second moment of each matrix, (r, C) each.
        step: the number of this step, (B, 1, 1).
        place: the columns.
    """
    grad, m, v = (
        torch.stack([values[:, place].to(step.dtype) for values in kind]) for kind in zip(*sources)
    )
    lost = ~grad.isfinite()
    grad.masked_fill_(lost, 0).clamp_(-BOUND, BOUND)
    adam = advanced_moments(grad, m, v, step)[-1].masked_fill_(lost, 0)
    return torch.stack([adam, grad])
