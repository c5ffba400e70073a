"""Warnings of an optimizer that sees a part of what trains: its rule would take wrong step sizes.

The shipped rules take the size of a step from the gradients of all tensors that train together.
"""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from rnnopt.optim.sharding import mixes_tensors
from rnnopt.rules.protocol import TensorAwareRule, UpdateRule


@dataclasses.dataclass
class _Watch:
    """The ids of an optimizer's last backward passes, and whether a warning has been given."""

    backward: int = -1
    stepped: int = -1
    warned: bool = False


_watched: weakref.WeakKeyDictionary[torch.optim.Optimizer, _Watch] = weakref.WeakKeyDictionary()


def watch(optimizer: torch.optim.Optimizer) -> None:
    """Note the backward passes that reach the optimizer's last parameter."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    reached = [param for param in params if param.requires_grad and param.is_leaf]
    if reached:
        seen, reference = _Watch(), weakref.ref(optimizer)

        def note(_: Tensor) -> None:
            if reference() is not None:
                seen.backward = torch._C._current_graph_task_id()

        _watched[optimizer] = seen
        hook = reached[-1].register_post_accumulate_grad_hook(note)
        weakref.finalize(optimizer, hook.remove).atexit = False


def warn_of_parts(optimizer: torch.optim.Optimizer) -> None:
    """To be called at a step.

    Warns:
        UserWarning: another optimizer has stepped other parameters with gradients of the same
            backward pass. Once for each set of optimizers.
    """
    own = _watched.get(optimizer)
    if own is None or own.backward < 0:
        return
    own.stepped = own.backward
    if own.warned or len(_watched) < 2:
        return
    beside = [
        seen
        for other, seen in list(_watched.items())
        if seen.stepped == own.backward and other is not optimizer and _disjoint(other, optimizer)
    ]
    if not beside:
        return
    own.warned = True
    if not any(seen.warned for seen in beside):
        warnings.warn(
            "two LearnedOptimizers train parts of one model, and the rule takes the size of a step "
            "from all gradients: make one LearnedOptimizer, with a parameter group for each part",
            stacklevel=5,  # past this, `step` and the two wrappers that torch puts around it
        )


def refuse_mixed_tensors(params: Sequence[Tensor], rule: UpdateRule) -> None:
    """Check that a rule whose steps depend on whole tensors can see them.

    Raises:
        ValueError: FSDP1 has put several tensors into one parameter.
    """
    if isinstance(rule, TensorAwareRule) and any(map(mixes_tensors, params)):
        raise ValueError(
            "FullyShardedDataParallel(use_orig_params=False) puts several tensors into one flat "
            f"parameter, and {type(rule).__name__} takes the size of a step from each tensor: pass "
            "use_orig_params=True, or shard with FSDP2 (torch.distributed.fsdp.fully_shard)"
        )


def _disjoint(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> bool:
    ids = [{id(p) for group in o.param_groups for p in group["params"]} for o in (one, other)]
    return not ids[0] & ids[1]
