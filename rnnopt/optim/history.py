"""Whether an optimizer has had a gradient yet.

`torch.distributed.checkpoint` steps an optimizer with gradients of zero to make it allocate its
state. Such a step is none of training: it must not count as the first one, nor leave a trace in the
state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rnnopt.optim.safeguard import Work, total
from rnnopt.optim.sharding import local_gradient, sum_over_shards
from rnnopt.rules.protocol import State


def has_gradient(
    work: Work, states: Sequence[State], init_state: Callable[[Tensor], State]
) -> bool:
    """Whether some gradient is not zero, now or in the steps that led to these states.

    Every process that holds shards has to call this with the same parameters in the same order.
    Waits for the device.

    Args:
        work: (param group, parameter, its gradient).
        states: the state of each of these parameters.
        init_state: the rule's state of a parameter before the first step.
    """
    params = [param for _, param, _ in work]
    rows = [local_gradient(grad, param).count_nonzero().float() for _, param, grad in work]
    if _any(rows, params):
        return True
    rows = []
    for param, state in zip(params, states):
        fresh = init_state(param)
        changed = sum(not torch.equal(state[name], leaf) for name, leaf in fresh.items())
        rows.append(torch.tensor(float(changed), device=param.device))
    return _any(rows, params)


def _any(counts: Sequence[Tensor], params: Sequence[Tensor]) -> bool:
    (found,) = total(sum_over_shards([count.reshape(1) for count in counts], params))
    return found > 0
