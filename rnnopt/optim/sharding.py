"""Parameters that are sharded over processes: DTensor, as FSDP2 makes them, and those of FSDP1.

Each process steps its own shard. The statistics of a tensor are summed over the processes that
hold its shards. The direction of a matrix that a rule transforms is gathered. Under FSDP1 with
use_orig_params=True a parameter is a flat part of the original one; it may be empty.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import sys
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.utils.weak import WeakTensorKeyDictionary

from rnnopt.rules.protocol import MatrixTransform, State


@dataclasses.dataclass(frozen=True)
class FlatShard:
    """The part of a parameter that FSDP1 leaves to this process.

    Attributes:
        whole: a meta tensor with the shape and the strides of the whole parameter.
        start: the first coordinate of the part, in the order of the whole one's memory.
        group: the processes that hold the other parts.
    """

    whole: Tensor
    start: int
    group: Any


_FSDP1 = "torch.distributed.fsdp._flat_param"
_ORDINARY = (Tensor, torch.nn.Parameter)
# None for a parameter of FSDP1 that is not divided
_flat_shards: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def find_flat_shards(params: Sequence[Tensor]) -> None:
    """Note which of the parameters are parts that FSDP1 has made. Nothing tells an optimizer."""
    module = sys.modules.get(_FSDP1)
    unknown = [p for p in params if is_of_fsdp1(p) and p not in _flat_shards] if module else []
    if not unknown:
        return
    _flat_shards.update(dict.fromkeys(unknown))
    kind = module.FlatParamHandle  # type: ignore[union-attr]
    for handle in [each for each in gc.get_objects() if type(each) is kind]:
        if handle.uses_sharded_strategy:
            _note_parts(handle)


def _note_parts(handle: Any) -> None:
    """Note the parts of one flat parameter."""
    flat, group = handle.flat_param, handle.process_group
    parts = flat._params or ()  # None with use_orig_params=False
    for param, shape, stride, info in zip(
        parts, flat._shapes, flat._strides, flat._shard_param_infos
    ):
        whole = torch.empty_strided(shape, stride, dtype=param.dtype, device="meta")
        _flat_shards[param] = FlatShard(whole, info.intra_param_start_idx or 0, group)
    whole = torch.empty(flat._unpadded_unsharded_size, dtype=flat.dtype, device="meta")
    _flat_shards[flat] = FlatShard(whole, 0, group)


def is_of_fsdp1(tensor: Tensor) -> bool:
    """Whether this is a parameter of a module within FSDP1."""
    return bool(getattr(tensor, "_fsdp_flattened", False))


def mixes_tensors(param: Tensor) -> bool:
    """Whether this is a flat parameter of FSDP1, in which several tensors lie."""
    module = sys.modules.get(_FSDP1)
    return module is not None and isinstance(param, module.FlatParameter)


def flat_shard(tensor: Tensor) -> FlatShard | None:
    """Where this part lies in its parameter, if FSDP1 has made it."""
    if _FSDP1 not in sys.modules:
        return None
    known = cast(dict[Tensor, FlatShard | None], _flat_shards)  # its methods have no types
    return known.get(tensor) if len(known) else None


@_disable_dynamo
def gradients(params: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradient of each parameter. None where no process has one.

    A part of FSDP1 may be empty here, without a gradient, while other processes step theirs; its
    gradient is an empty one then. Every process that holds parts has to call this for the same
    parameters in the same order.
    """
    find_flat_shards(params)  # FSDP1 may have come after the optimizer
    found = [param.grad for param in params]
    for group, rows in _flat_groups(params).items():
        have = torch.tensor([found[row] is not None for row in rows], dtype=torch.int32)
        have = have.to(params[rows[0]].device)
        torch.distributed.all_reduce(have, torch.distributed.ReduceOp.MAX, group=group)
        for row, some in zip(rows, have.tolist()):
            if some and found[row] is None:
                found[row] = torch.zeros_like(params[row])
    return found


def known_to_some(values: Sequence[Any], params: Sequence[Tensor]) -> list[Any]:
    """Where a value is None, that of the first process that has one and steps another part of it.

    For parts of FSDP1 only. Every process that holds parts has to call this for the same parameters
    in the same order.

    Args:
        values: for each parameter something that can be pickled, or None.
        params: the parameters.
    """
    found = list(values)
    for group, rows in _flat_groups(params).items():
        every: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(every, [found[row] for row in rows], group=group)
        for row, given in zip(rows, zip(*every)):
            found[row] = next((value for value in given if value is not None), None)
    return found


def _flat_groups(params: Sequence[Tensor]) -> dict[Any, list[int]]:
    """Process groups of FSDP1, and which of the parameters are divided among each."""
    groups: dict[Any, list[int]] = {}
    for row, param in enumerate(params):
        shard = flat_shard(param)
        if shard is not None:
            groups.setdefault(shard.group, []).append(row)
    return groups


def _is_dtensor(tensor: Tensor) -> bool:
    if type(tensor) in _ORDINARY:  # most are, and each step asks several times for each tensor
        return False
    # without an import of the module there are no DTensors, and importing it takes a while
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor, or a part that FSDP1 has made."""
    return _is_dtensor(tensor) or flat_shard(tensor) is not None


def whole(param: Tensor) -> Tensor:
    """A tensor of the shape of the whole parameter; its values are not to be read."""
    shard = flat_shard(param)
    return param if shard is None else shard.whole


def local(tensor: Tensor) -> Tensor:
    """This process's shard, sharing its memory; an ordinary tensor is returned as it is."""
    if not _is_dtensor(tensor):
        return tensor
    shard: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return shard


def local_gradient(grad: Tensor, param: Tensor) -> Tensor:
    """The gradient of this process's shard; one with other placements is redistributed first."""
    if _is_dtensor(param) and _is_dtensor(grad) and grad.placements != param.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]
    return local(grad)


def like_param(leaf: Tensor, param: Tensor) -> Tensor:
    """A leaf of a parameter's state, (..., N) of this process's shard, as (..., *shape).

    It shares the leaf's memory. For a DTensor parameter it is a DTensor with the same placements,
    so that it can be saved and loaded with any other sharding.
    """
    lead = leaf.shape[:-1]
    part = leaf.view(*lead, *local(param).shape)
    if not _is_dtensor(param):
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
    if _is_dtensor(param):
        from torch.distributed.tensor import Replicate

        mesh, placements = param.device_mesh, _behind(param, len(lead))  # type: ignore[attr-defined]
        if not _is_dtensor(leaf):
            from torch.distributed.tensor import DTensor

            whole = leaf.reshape(*lead, *param.shape).to(local(param).device)
            leaf = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
        leaf = leaf.redistribute(mesh, placements)  # type: ignore[attr-defined]
    elif _is_dtensor(leaf):
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
        param: sharded; for an ordinary tensor the function is returned as it is.

    Returns:
        The function for shards; None for None.
    """
    if transform is None or not is_sharded(param):
        return transform
    flat = flat_shard(param)
    if flat is not None:
        return _on_flat_shards(transform, flat)
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


def _on_flat_shards(transform: MatrixTransform, shard: FlatShard) -> MatrixTransform:
    """`on_shards` under FSDP1: the parts lie in the whole parameter's memory one after another."""
    shape, stride = shard.whole.shape, shard.whole.stride()

    def transform_part(direction: Tensor) -> Tensor:
        here = slice(shard.start, shard.start + direction.numel())
        memory = direction.new_zeros(shape.numel())
        memory[here] = direction
        torch.distributed.all_reduce(memory, group=shard.group)
        matrix = memory.as_strided(shape, stride)
        matrix.copy_(transform(matrix.reshape(-1)).view(shape))
        return memory[here].clone()

    return transform_part


def sum_over_shards(
    statistics: Sequence[Tensor | None], params: Sequence[Tensor]
) -> list[Tensor | None]:
    """Sums over this process's shards -> sums over the whole tensors.

    One all-reduce for each process group and device: some of a model's shards may be offloaded to
    the CPU. Every process that holds shards has to call this with the same parameters in the same
    order.

    Args:
        statistics: (M,) for each parameter, or None for all of them.
        params: ordinary tensors, whose sums are returned as they are, and sharded ones.

    Returns:
        (M,) for each parameter, or None.

    Raises:
        TypeError: a parameter is a partial sum, not a shard or a replica.
    """
    groups: dict[tuple[Any, str], list[int]] = {}
    for row, param in enumerate(params):
        for group in _shard_groups(param):
            groups.setdefault((group, param.device.type), []).append(row)
    totals = list(statistics)
    for (group, _), rows in groups.items():
        if totals[rows[0]] is None:
            break  # the rule treats every coordinate separately
        part = torch.stack([cast(Tensor, totals[row]) for row in rows])
        torch.distributed.all_reduce(part, group=group)
        for row, total in zip(rows, part):
            totals[row] = total
    return totals


def share_out(states: Sequence[State], params: Sequence[Tensor], names: Sequence[str]) -> None:
    """Give each shard an equal share of the leaves that are sums over coordinates, in place.

    What is saved is then the same in every process, see `rnnopt.optim.checkpoint`. Communicates
    where a parameter is sharded, see `sum_over_shards`.

    Args:
        states: of each parameter, with leaves of this process's shard.
        params: the parameters.
        names: of the leaves, 0-d.
    """
    rows = [torch.stack([state[name] for name in names]) for state in states]
    for state, param, total in zip(states, params, sum_over_shards(rows, params)):
        if is_sharded(param):
            for name, value in zip(names, cast(Tensor, total)):
                state[name].copy_(value / shard_count(param))


def shard_count(param: Tensor) -> int:
    """Into how many shards a parameter is divided; 1 if it is not."""
    sizes = [torch.distributed.get_world_size(group) for group in _shard_groups(param)]
    return math.prod(sizes)


def _shard_groups(param: Tensor) -> list[Any]:
    """The process groups over which a parameter is sharded."""
    flat = flat_shard(param)
    if flat is not None:
        return [flat.group]
    if not _is_dtensor(param):
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
