"""Save and load the state of a `LearnedOptimizer`: the leaves' shapes, dtypes and placements.

In the optimizer a leaf that belongs to coordinates is flat, (..., N) of this process's shard. In a
state_dict it has the shape of its parameter, (..., *shape), as the state of torch's optimizers
does, and the placements of a DTensor parameter.

FSDP1 gathers leaves (N,) of one dtype only, and takes the others from one process as they are:
of its parameters a leaf (H, N) is saved as H leaves, and a tensor's own leaf as a list. And it
gathers a leaf of all parameters or of none: those with a smaller H are filled up with zeros.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rnnopt.optim.arguments import check_numbers
from rnnopt.optim.safeguard import GROUP_STATE, LAST_SLOPE, LAST_STEP, init_guard_state
from rnnopt.optim.sharding import (
    flat_shard,
    is_sharded,
    known_to_some,
    like_param,
    of_shard,
    shard_count,
)
from rnnopt.rules.protocol import State, UpdateRule

Groups = Sequence[dict[str, Any]]


@contextlib.contextmanager
def saving(optimizer: torch.optim.Optimizer, rule: UpdateRule) -> Iterator[None]:
    """Within it `torch.optim.Optimizer.state_dict` gives coordinate-wise leaves their shape.

    Args:
        optimizer: the optimizer that is saved.
        rule: its rule.
    """
    hook = optimizer.register_state_dict_post_hook(
        lambda _, found: _shaped(found, optimizer.param_groups, rule), prepend=True
    )
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def loading(
    optimizer: torch.optim.Optimizer, rule: UpdateRule, init_state: Callable[[Tensor], State]
) -> Iterator[None]:
    """Within it `torch.optim.Optimizer.load_state_dict` checks the states and keeps their dtypes.

    Args:
        optimizer: the optimizer that loads.
        rule: its rule.
        init_state: `LearnedOptimizer.init_state`, for the leaves that the rule expects.

    Raises:
        ValueError: see `LearnedOptimizer.load_state_dict`.
        TypeError: see there.
    """
    states: dict[Tensor, State] = {}

    def check(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        _check_groups(given, {"lr", "weight_decay", *GROUP_STATE})
        states.update(_loaded(given, optimizer.param_groups, rule, init_state))
        return {**given, "state": _others(given)}

    # after all hooks of the user that change what is loaded, before those that see the result
    hooks = [
        optimizer.register_load_state_dict_pre_hook(check),
        optimizer.register_load_state_dict_post_hook(
            lambda _: optimizer.state.update(states), prepend=True
        ),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _shaped(state_dict: Mapping[str, Any], groups: Groups, rule: UpdateRule) -> dict[str, Any]:
    """A state_dict whose coordinate-wise leaves have the shape of their parameter.

    Args:
        state_dict: as torch makes it, with leaves (..., N) of this process's shards.
        groups: the optimizer's own param groups.
        rule: the optimizer's.
    """
    states = dict(state_dict["state"])
    most = _most_rows(states.values(), rule)
    for index, param in _pairs(state_dict, groups):
        if index in states:
            state = _of_whole(state_dict["state"][index], param, rule)
            states[index] = (
                _flat_parts(state, rule, most)
                if flat_shard(param)
                else {
                    name: like_param(leaf, param) if _is_coordinate_wise(rule, name, leaf) else leaf
                    for name, leaf in state.items()
                }
            )
    return {**state_dict, "state": states}


def _loaded(
    state_dict: Mapping[str, Any],
    groups: Groups,
    rule: UpdateRule,
    init_state: Callable[[Tensor], State],
) -> dict[Tensor, State]:
    """The state of each parameter that has one in a state_dict.

    torch casts floating-point state to the parameter's dtype, which would round the float32 state
    of a bfloat16 parameter: an exact resume needs the leaves as they were saved.

    Args:
        state_dict: of a `LearnedOptimizer`.
        groups: param groups of the optimizer that loads it.
        rule: the optimizer's.
        init_state: `LearnedOptimizer.init_state`, for the leaves that the rule expects.

    Returns:
        Copies of the saved leaves, on the parameters' devices.

    Raises:
        ValueError: a saved state is that of another rule or of another parameter, or the parameter
            is on the meta device.
    """
    states = state_dict["state"]
    pairs = _pairs(state_dict, groups)
    loaded = {
        param: _matching(param, states[index], rule, init_state(param))
        for index, param in pairs
        if states.get(index)
    }
    # FSDP1 gives no state to a process whose part of the parameter is empty
    params = [param for _, param in pairs]
    own = [_of_tensor(rule, loaded[param]) if param in loaded else None for param in params]
    for param, leaves in zip(params, known_to_some(own, params)):
        if param not in loaded and leaves:
            guard = init_guard_state(param) if LAST_SLOPE in leaves else {}
            fresh = init_state(param) | guard
            loaded[param] = fresh | {k: v.to(fresh[k].device) for k, v in leaves.items()}
    return loaded


def _of_whole(state: State, param: Tensor, rule: UpdateRule) -> State:
    """A state with the sums of the whole parameter in place of this shard's equal shares."""
    summed = getattr(rule, "summed", ()) if is_sharded(param) else ()
    return state | {name: state[name] * shard_count(param) for name in summed if name in state}


def _of_tensor(rule: UpdateRule, state: State) -> State:
    """The leaves that belong to the tensor as a whole, on the CPU."""
    return {k: v.cpu() for k, v in state.items() if not _is_coordinate_wise(rule, k, v)}


def _most_rows(states: Iterable[Any], rule: UpdateRule) -> dict[str, int]:
    """H of the leaves (H, N), by their names: the largest of all parameters."""
    most: dict[str, int] = {}
    for state in states:
        for name, leaf in state.items():
            if _is_coordinate_wise(rule, name, leaf):
                most[name] = max(most.get(name, 0), math.prod(leaf.shape[:-1]))
    return most


def _flat_parts(state: State, rule: UpdateRule, most: Mapping[str, int]) -> dict[str, Any]:
    """A state as FSDP1 takes it, see above; `most` is the result of `_most_rows`."""
    own = {name: leaf for name, leaf in state.items() if _is_coordinate_wise(rule, name, leaf)}
    dtype = functools.reduce(
        torch.promote_types, (leaf.dtype for leaf in own.values()), torch.bfloat16
    )
    parts: dict[str, Any] = {}
    for name, leaf in state.items():
        if name not in own:
            parts[name] = leaf.tolist() if leaf.dim() else leaf
        elif leaf.dim() == 1:
            parts[name] = leaf.to(dtype)
        else:
            rows = leaf.new_zeros(most[name], leaf.shape[-1], dtype=dtype)
            held = math.prod(leaf.shape[:-1])
            rows[:held] = leaf.reshape(held, leaf.shape[-1])
            parts |= {f"{name}.{i}": row for i, row in enumerate(rows)}
    return parts


def _joined(parts: Mapping[str, Any], rule: UpdateRule, expected: State) -> dict[str, Any]:
    """The inverse of `_flat_parts`, in the dtypes of the leaves that are expected."""
    state = dict(parts)
    for name, leaf in expected.items():
        rows = math.prod(leaf.shape[:-1])
        names = [f"{name}.{i}" for i in range(rows)]
        if isinstance(state.get(name), list):
            state[name] = torch.tensor(state[name], dtype=leaf.dtype)
        elif _is_coordinate_wise(rule, name, leaf) and leaf.dim() > 1 and name not in state:
            if all(isinstance(state.get(each), Tensor) for each in names):
                taken = [state.pop(each).to(leaf.dtype) for each in names]
                state[name] = torch.stack(taken).reshape(leaf.shape) if taken else leaf
                filling = [key for key in state if key.startswith(f"{name}.")]
                for key in filling:
                    del state[key]
        elif isinstance(state.get(name), Tensor):
            state[name] = state[name].to(leaf.dtype)
    return state


def _others(state_dict: Mapping[str, Any]) -> dict[Any, Any]:
    """What a state_dict holds beside the parameters' states; torch keeps it as it is."""
    known = {index for group in state_dict["param_groups"] for index in group["params"]}
    return {key: value for key, value in state_dict["state"].items() if key not in known}


def _check_groups(state_dict: Mapping[str, Any], expected: set[str]) -> None:
    """Check that every saved param group has these entries, and their numbers.

    Raises:
        ValueError: one has not, since it was saved by another optimizer; or its lr or weight_decay
            is negative or not finite.
        TypeError: its lr or weight_decay is no number.
    """
    for group in state_dict["param_groups"]:
        if missing := expected - group.keys():
            raise ValueError(
                f"the saved groups have no {sorted(missing)}, so they are not of a "
                "LearnedOptimizer of this version; load the state_dict of one"
            )
        check_numbers(group)


def _pairs(state_dict: Mapping[str, Any], groups: Groups) -> list[tuple[Any, Tensor]]:
    """(index in the state_dict, parameter); none where the groups differ, which torch refuses."""
    saved = [group["params"] for group in state_dict["param_groups"]]
    own = [group["params"] for group in groups]
    if [len(params) for params in saved] != [len(params) for params in own]:
        return []
    return [pair for rows in zip(saved, own) for pair in zip(*rows)]


def _is_coordinate_wise(rule: UpdateRule, name: str, leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and name not in _tensor_state(rule)


def _tensor_state(rule: UpdateRule) -> Sequence[str]:
    """Names of leaves that belong to the tensor as a whole and are not 0-d."""
    names: Sequence[str] = getattr(rule, "tensor_state", ())
    return names


def _matching(param: Tensor, saved: State, rule: UpdateRule, expected: State) -> State:
    if param.is_meta:
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} is on the meta device, which keeps no "
            "values: give the model its memory (model.to_empty) before its optimizer loads a state"
        )
    if not isinstance(saved, Mapping):
        raise ValueError(
            f"the saved state of a parameter of shape {tuple(param.shape)} is a "
            f"{type(saved).__name__}, not a dict of tensors; load the state_dict of a "
            "LearnedOptimizer"
        )
    if LAST_STEP in saved:
        expected = expected | init_guard_state(param)
    if flat_shard(param):
        saved = _joined(saved, rule, expected)
    # a plain number is what torch's optimizers take for a step count, too
    leaves = {
        name: torch.tensor(float(leaf)) if isinstance(leaf, int | float) else leaf
        for name, leaf in saved.items()
    }
    fitting = {
        name: [(*leaf.shape[:-1], *param.shape), (*leaf.shape[:-1], param.numel())]
        if _is_coordinate_wise(rule, name, leaf)
        else [tuple(leaf.shape)]
        for name, leaf in expected.items()
    }
    fits = leaves.keys() == expected.keys() and all(
        isinstance(leaf, Tensor) and tuple(leaf.shape) in fitting[name]
        for name, leaf in leaves.items()
    )
    if not fits:
        raise ValueError(
            f"the saved state of a parameter of shape {tuple(param.shape)} is {_shapes(saved)}, "
            f"but this optimizer's rule keeps { ({k: v[0] for k, v in fitting.items()}) }; load it "
            "with the rule, and the version of rnnopt, that it was saved with"
        )
    return {name: _own(leaves[name], name, param, rule, leaf) for name, leaf in expected.items()}


def _own(leaf: Tensor, name: str, param: Tensor, rule: UpdateRule, expected: Tensor) -> Tensor:
    """A copy of a saved leaf, in the layout that the optimizer keeps."""
    if _is_coordinate_wise(rule, name, expected):
        leaf = of_shard(leaf, param, expected.shape[:-1])
    elif hasattr(leaf, "full_tensor"):
        leaf = leaf.full_tensor()
    if name in getattr(rule, "summed", ()) and is_sharded(param):
        leaf = leaf / shard_count(param)
    return leaf.detach().to(expected.device, copy=True, memory_format=torch.contiguous_format)


def _shapes(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(getattr(leaf, "shape", ())) for name, leaf in state.items()}
