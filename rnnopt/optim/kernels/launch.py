"""What the launches of Triton's kernels have in common: tables, blocks, and sums of their sums.

`rnnopt.optim.kernels.choice` imports this module, and with it Triton, when it is first needed.

Shapes: P tensors.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnnopt.optim.kernels.two_level_triton import added

WARPS = 4
OPTIONS: dict[str, Any] = {
    "num_warps": WARPS,
    # Triton's default changes with its version; without it every product is rounded, at twice the
    # instructions
    "enable_fp_fusion": True,
}
_ADDED = 4096  # numbers that are added up at once


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make it CUDA's current device: Triton launches there."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy of the array there, from pinned memory, which torch keeps until the copy is done.

    The host does not wait.
    """
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


@functools.lru_cache(maxsize=32)
def blocks_of(counts: tuple[int, ...], size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Every tensor cut into blocks of `size` coordinates.

    Returns:
        For each block the index of its tensor and its index there, (blocks, 2); for each tensor the
        index of its first block, and the number of all blocks, (P + 1,).
    """
    block_counts = -(-np.array(counts, dtype=np.int64) // size)
    starts = np.concatenate([[0], np.cumsum(block_counts)])
    tensors = np.repeat(np.arange(len(counts)), block_counts)
    blocks = np.stack([tensors, np.arange(starts[-1]) - starts[tensors]], axis=1)
    return to_device(blocks.astype(np.int32), device), to_device(starts.astype(np.int32), device)


def sums_of_blocks(partial: Tensor, starts: Tensor, tensors: int) -> Tensor:
    """The rows of each tensor's blocks added up, (P, columns); deterministic.

    Args:
        partial: a row for each block, (blocks, columns), float32.
        starts: see `blocks_of`.
        tensors: P.
    """
    columns = partial.shape[1]
    width = 1 << (columns - 1).bit_length()
    sums = torch.empty(tensors, columns, device=partial.device, dtype=torch.float32)
    added[(tensors,)](
        starts, partial, sums, COLUMNS=columns, WIDTH=width, ROWS=_ADDED // width, **OPTIONS
    )
    return sums
