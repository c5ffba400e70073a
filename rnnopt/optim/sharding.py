"""Parameters that are sharded over processes: DTensor, as FSDP2 makes them.

Each process steps its own shard; what a rule wants to know of the whole tensor are sums, and those
are added up over the processes that hold the shards. The direction of a narrow matrix is gathered.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from rnnopt.rules.protocol import MatrixTransform


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


def local_gradient(grad: Tensor, param: Tensor) -> Tensor:
    """The gradient of this process's shard; one that is laid out otherwise is dealt out anew."""
    if is_sharded(param) and is_sharded(grad) and grad.placements != param.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]
    return local(grad)


def on_shards(turn: MatrixTransform | None, param: Tensor) -> MatrixTransform | None:
    """Let a function of a whole tensor's flat direction work on that of this process's shard.

    Every process that holds shards has to call it for the same parameters in the same order.

    Args:
        turn: the function, or None.
        param: an ordinary tensor, for which it is returned as it is, or a DTensor.

    Returns:
        The function for shards; None for None.
    """
    if turn is None or not is_sharded(param):
        return turn
    from torch.distributed.tensor import DTensor, Replicate

    mesh, shape, stride = param.device_mesh, param.shape, param.stride()  # type: ignore[attr-defined]
    placements = param.placements  # type: ignore[attr-defined]
    part = local(param).shape

    def turn_shard(direction: Tensor) -> Tensor:
        shard = DTensor.from_local(
            direction.view(part), mesh, placements, shape=shape, stride=stride
        )
        whole = turn(shard.full_tensor().reshape(-1)).view(shape)
        dealt = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim)
        return dealt.redistribute(mesh, placements).to_local().reshape(-1)

    return turn_shard


def sum_over_shards(sums: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor | None]:
    """Sums over this process's shards -> sums over the whole tensors.

    Every process that holds shards has to call this with the same parameters in the same order: it
    talks to the others once for each group of processes.

    Args:
        sums: (M,) for each parameter, or None for all of them.
        params: ordinary tensors, whose sums stay as they are, and DTensors.

    Returns:
        (M,) for each parameter, or None.

    Raises:
        TypeError: a parameter is a partial sum, not a shard or a replica.
    """
    groups: dict[Any, list[int]] = {}
    for row, param in enumerate(params):
        for group in _shard_groups(param):
            groups.setdefault(group, []).append(row)
    added = list(sums)
    for group, rows in groups.items():
        if added[rows[0]] is None:
            break  # the rule looks at coordinates one by one
        part = torch.stack([cast(Tensor, added[row]) for row in rows])
        torch.distributed.all_reduce(part, group=group)
        for row, total in zip(rows, part):
            added[row] = total
    return added


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
    # strided shards, of tensor parallelism under FSDP, deny that they are shards
    return [
        mesh.get_group(dim)
        for dim, placement in enumerate(placements)
        if not placement.is_replicate()
    ]
