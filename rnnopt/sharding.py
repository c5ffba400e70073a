"""Parameters that are sharded over processes: DTensor, as FSDP2 makes them.

Each process steps its own shard; what a rule wants to know of the whole tensor are sums, and those
are added up over the processes that hold the shards.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor."""
    # where nobody has imported the module there are no DTensors, and importing it takes a while
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's shard, the same memory; an ordinary tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    shard: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return shard


def add_up(sums: Tensor, params: Sequence[Tensor]) -> Tensor:
    """Sums over this process's shards -> sums over the whole tensors.

    Every process that holds a shard has to call this, with the same parameters in the same order.

    Args:
        sums: (len(params), M).
        params: ordinary tensors, whose rows stay as they are, and DTensors.

    Returns:
        (len(params), M).

    Raises:
        TypeError: a parameter is a partial sum, not a shard or a replica.
    """
    groups: dict[Any, list[int]] = {}
    for row, param in enumerate(params):
        for group in _shard_groups(param):
            groups.setdefault(group, []).append(row)
    for group, rows in groups.items():
        part = sums[rows]
        torch.distributed.all_reduce(part, group=group)
        sums = sums.index_copy(0, torch.tensor(rows, device=sums.device), part)
    return sums


def _shard_groups(param: Tensor) -> list[Any]:
    """The process groups along which a parameter is divided."""
    if not is_sharded(param):
        return []
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    for placement in placements:
        if placement.is_partial():
            raise TypeError(
                f"a parameter of placements {placements}: a partial sum can't be stepped; "
                "redistribute it to Shard or Replicate"
            )
    return [mesh.get_group(dim) for dim, placement in enumerate(placements) if placement.is_shard()]
