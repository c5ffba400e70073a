"""Parameters that are sharded over processes: DTensor, as FSDP2 makes them.

Each process steps its own shard. The statistics of a tensor are summed over the processes that
hold its shards. The direction of a matrix that a rule transforms is gathered.
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
    # without an import of the module there are no DTensors, and importing it takes a while
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's shard, sharing its memory; an ordinary tensor is returned as it is."""
    if not is_sharded(tensor):
        return tensor
    shard: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return shard


def local_gradient(grad: Tensor, param: Tensor) -> Tensor:
    """The gradient of this process's shard; one with other placements is redistributed first."""
    if is_sharded(param) and is_sharded(grad) and grad.placements != param.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]
    return local(grad)


def like_param(leaf: Tensor, param: Tensor) -> Tensor:
    """A leaf of a parameter's state, (..., N) of this process's shard, as (..., *shape).

    It shares the leaf's memory. For a DTensor parameter it is a DTensor with the same placements,
    so that it can be saved and loaded with any other sharding.
    """
    lead = leaf.shape[:-1]
    part = leaf.view(*lead, *local(param).shape)
    if not is_sharded(param):
        return part
    from torch.distributed.tensor import DTensor

    shape = torch.Size((*lead, *param.shape))
    stride = torch.empty(shape, device="meta").stride()
    mesh = param.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(
        part, mesh, _behind(param, len(lead)), run_check=False, shape=shape, stride=stride
    )


def of_shard(leaf: Tensor, param: Tensor, lead: Sequence[int]) -> Tensor:
    """The inverse of `like_param`, also of a leaf with other placements or of a whole tensor.

    Every process that holds shards has to call this for the same leaves in the same order.

    Args:
        leaf: (*lead, *shape of the whole parameter), or (*lead, N).
        param: the parameter.
        lead: sizes of the leaf's own dimensions.

    Returns:
        (*lead, N), N coordinates in this process's shard; may share the leaf's memory.
    """
    if is_sharded(param):
        from torch.distributed.tensor import Replicate

        mesh, placements = param.device_mesh, _behind(param, len(lead))  # type: ignore[attr-defined]
        if not is_sharded(leaf):
            from torch.distributed.tensor import DTensor

            whole = leaf.reshape(*lead, *param.shape).to(local(param).device)
            leaf = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
        leaf = leaf.redistribute(mesh, placements)  # type: ignore[attr-defined]
    elif is_sharded(leaf):
        leaf = leaf.full_tensor()  # type: ignore[attr-defined]
    return local(leaf).reshape(*lead, local(param).numel())


def _behind(param: Tensor, lead: int) -> list[Any]:
    """The placements of a DTensor with this many dimensions before the parameter's."""
    moved = []
    for placement in param.placements:  # type: ignore[attr-defined]
        if lead and not placement.is_replicate():
            # strided shards, of tensor parallelism under FSDP, have a second argument
            options = {k: getattr(placement, k) for k in ("split_factor",) if hasattr(placement, k)}
            placement = type(placement)(placement.dim + lead, **options)
        moved.append(placement)
    return moved


def on_shards(transform: MatrixTransform | None, param: Tensor) -> MatrixTransform | None:
    """Make a function of a whole tensor's flat direction a function of this process's shard.

    The result gathers the direction, so every process that holds shards has to call it for the
    same parameters in the same order.

    Args:
        transform: the function, or None.
        param: a DTensor; for an ordinary tensor the function is returned as it is.

    Returns:
        The function for shards; None for None.
    """
    if transform is None or not is_sharded(param):
        return transform
    from torch.distributed.tensor import DTensor, Replicate

    mesh, shape, stride = param.device_mesh, param.shape, param.stride()  # type: ignore[attr-defined]
    placements = param.placements  # type: ignore[attr-defined]
    part = local(param).shape

    def transform_shard(direction: Tensor) -> Tensor:
        shard = DTensor.from_local(
            direction.view(part), mesh, placements, shape=shape, stride=stride
        )
        whole = transform(shard.full_tensor().reshape(-1)).view(shape)
        replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim)
        return replicated.redistribute(mesh, placements).to_local().reshape(-1)

    return transform_shard


def sum_over_shards(
    statistics: Sequence[Tensor | None], params: Sequence[Tensor]
) -> list[Tensor | None]:
    """Sums over this process's shards -> sums over the whole tensors.

    One all-reduce for each process group. Every process that holds shards has to call this with
    the same parameters in the same order.

    Args:
        statistics: (M,) for each parameter, or None for all of them.
        params: ordinary tensors, whose sums are returned as they are, and DTensors.

    Returns:
        (M,) for each parameter, or None.

    Raises:
        TypeError: a parameter is a partial sum, not a shard or a replica.
    """
    groups: dict[Any, list[int]] = {}
    for row, param in enumerate(params):
        for group in _shard_groups(param):
            groups.setdefault(group, []).append(row)
    totals = list(statistics)
    for group, rows in groups.items():
        if totals[rows[0]] is None:
            break  # the rule treats every coordinate separately
        part = torch.stack([cast(Tensor, totals[row]) for row in rows])
        torch.distributed.all_reduce(part, group=group)
        for row, total in zip(rows, part):
            totals[row] = total
    return totals


def _shard_groups(param: Tensor) -> list[Any]:
    """The process groups over which a parameter is sharded."""
    if not is_sharded(param):
        return []
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    for placement in placements:
        if placement.is_partial():
            raise TypeError(
                f"a parameter of placements {placements}: a partial sum can't be stepped; "
                "redistribute it to Shard or Replicate"
            )
    # is_shard() is false for the strided shards of tensor parallelism under FSDP
    return [
        mesh.get_group(dim)
        for dim, placement in enumerate(placements)
        if not placement.is_replicate()
    ]
