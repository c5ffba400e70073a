"""What the guard sums up and keeps, for all tensors on a GPU at once; see `GuardKernel`.

Two launches before a step and two after it, whatever the number of tensors. The first pass reads
gradient and last step, the second reads gradient and update and writes the step: with float32
gradients 6 and 10 bytes a coordinate.

A row of `table` is one tensor: three pointers (gradient, the step or the update, and where the step
is kept; 0 for none), N, and a word that holds lr.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from rnnopt.optim.kernels.fused import GuardKernel
from rnnopt.optim.kernels.launch import (
    OPTIONS,
    blocks_of,
    current,
    sums_of_blocks,
    to_device,
)
from rnnopt.optim.kernels.two_level_triton import TYPES, _loaded, _stored

_TILE = 2048  # coordinates of a block
_ENDS = 4  # sums of the first pass
_LAYOUT = np.dtype(
    [("pointers", np.int64, 3), ("count", np.int64), ("lr", np.float32), ("unused", np.float32)]
)
_WORDS = tl.constexpr(5)  # in a row of the table
_COUNT, _RATE = tl.constexpr(3), tl.constexpr(4)  # places in it


@triton.jit
def ends_block(
    table, blocks, partial, TILE: tl.constexpr, GRAD: tl.constexpr, MASKED: tl.constexpr
):
    """The sums of `GuardKernel.ends` over a block of coordinates."""
    number = tl.program_id(0)
    row = table + _WORDS * tl.load(blocks + 2 * number).to(tl.int64)
    at = tl.load(blocks + 2 * number + 1).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = at < tl.load(row + _COUNT)
    g = _loaded(row, at, mask, GRAD)
    step = _loaded(row + 1, at, mask, tl.bfloat16)
    finite = mask & (tl.abs(g) < float("inf"))
    if MASKED:
        g = tl.where(finite, g, 0.0)
    out = partial + 4 * number.to(tl.int64)
    tl.store(out, tl.sum(g * step, axis=0))
    tl.store(out + 1, tl.sum(g * g, axis=0))
    tl.store(out + 2, tl.sum((step != 0).to(tl.float32), axis=0))
    tl.store(out + 3, tl.sum(finite.to(tl.float32), axis=0))


@triton.jit
def keep_block(table, blocks, slopes, TILE: tl.constexpr, GRAD: tl.constexpr, MASKED: tl.constexpr):
    """`GuardKernel.keep` for a block of coordinates."""
    number = tl.program_id(0)
    row = table + _WORDS * tl.load(blocks + 2 * number).to(tl.int64)
    at = tl.load(blocks + 2 * number + 1).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = at < tl.load(row + _COUNT)
    g = _loaded(row, at, mask, GRAD)
    lr = tl.load((row + _RATE).to(tl.pointer_type(tl.float32)))
    step = lr * _loaded(row + 1, at, mask, tl.float32)
    if MASKED:
        finite = tl.abs(g) < float("inf")
        g, step = tl.where(finite, g, 0.0), tl.where(finite, step, 0.0)
    _stored(row + 2, at, mask, step, tl.bfloat16)
    tl.store(slopes + number, tl.sum(g * step, axis=0))


class TritonGuard(GuardKernel):
    """See `GuardKernel`.

    Args:
        device: where the tensors are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def supports(self, grad: Tensor, step: Tensor) -> bool:
        """See `GuardKernel.supports`."""
        return (
            grad.dtype in TYPES
            and self._fits(grad, grad.dtype, step)
            and self._fits(step, torch.bfloat16, step)
        )

    def keeps(self, update: Tensor, step: Tensor) -> bool:
        """See `GuardKernel.keeps`."""
        return self._fits(update, torch.float32, step)

    def _fits(self, leaf: Tensor, dtype: torch.dtype, step: Tensor) -> bool:
        return (  # a kernel trusts its pointers
            leaf.dtype == dtype
            and leaf.device == self._device
            and leaf.numel() == step.numel()
            and leaf.is_contiguous()
        )

    def ends(self, grads: Sequence[Tensor], steps: Sequence[Tensor], masked: bool) -> Tensor:
        """See `GuardKernel.ends`."""
        rows = [(x.data_ptr(), y.data_ptr(), 0) for x, y in zip(grads, steps)]
        return self._launch(ends_block, _ENDS, grads, rows, [0.0] * len(rows), masked)

    def keep(
        self, grads: Sequence[Tensor], updates: Sequence[Tensor], steps: Sequence[Tensor],
        rates: Sequence[float], masked: bool,
    ) -> Tensor:  # fmt: skip
        """See `GuardKernel.keep`."""
        rows = [
            (grad.data_ptr(), update.data_ptr(), step.data_ptr())
            for grad, update, step in zip(grads, updates, steps)
        ]
        return self._launch(keep_block, 1, grads, rows, rates, masked).squeeze(1)

    def _launch(
        self, kernel: Any, columns: int, grads: Sequence[Tensor],
        rows: Sequence[tuple[int, ...]], rates: Sequence[float], masked: bool,
    ) -> Tensor:  # fmt: skip
        """The sums of each tensor, (P, columns)."""
        counts = tuple(grad.numel() for grad in grads)
        host = np.zeros(len(grads), dtype=_LAYOUT)
        host["pointers"], host["count"], host["lr"] = rows, counts, rates
        with current(self._device):
            table = to_device(host.view(np.int64).reshape(len(grads), -1), self._device)
            blocks, starts = blocks_of(counts, _TILE, self._device)
            partial = torch.empty(len(blocks), columns, device=self._device, dtype=torch.float32)
            if len(blocks):
                kernel[(len(blocks),)](
                    table, blocks, partial, TILE=_TILE, GRAD=TYPES[grads[0].dtype], MASKED=masked,
                    **OPTIONS,
                )  # fmt: skip
            return sums_of_blocks(partial, starts, len(grads))
