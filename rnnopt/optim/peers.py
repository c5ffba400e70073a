"""Processes among which `ZeroRedundancyOptimizer` divides the parameters of a model.

Each has an optimizer of its own part. A rule takes the size of a step from all tensors together, so
the statistics of tensors, and what the guard sums up, are exchanged.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from rnnopt.rules.protocol import State, UpdateRule, cross_tensor_context


class Peers:
    """The processes that step one model together; by default this one alone.

    Args:
        zero: the `ZeroRedundancyOptimizer` that makes the optimizer of this process's part.
    """

    def __init__(self, zero: Any = None) -> None:
        self._group = None if zero is None else zero.process_group
        self.alone = zero is None or zero.world_size == 1

    def contexts(
        self, rule: UpdateRule, statistics: Sequence[Tensor | None], states: Sequence[State]
    ) -> list[Tensor | None]:
        """`cross_tensor_context` of all parts' tensors; those of this process's."""
        if self.alone:
            return cross_tensor_context(rule, statistics, states)
        kept = getattr(rule, "leaves", ()), getattr(rule, "tensor_state", ())
        small = [{n: state[n].cpu() for names in kept for n in names} for state in states]
        rows = [None if row is None else row.cpu() for row in statistics]
        parts = self._gather((rows, small))
        first = sum(len(part[0]) for part in parts[: torch.distributed.get_rank(self._group)])
        contexts = cross_tensor_context(
            rule, [row for part in parts for row in part[0]], [s for part in parts for s in part[1]]
        )
        own = contexts[first : first + len(rows)]
        return [
            context if context is None or row is None else context.to(row.device)
            for context, row in zip(own, statistics)
        ]

    def rows(self, statistics: Sequence[Tensor]) -> list[Tensor]:
        """The statistics of all parts' tensors, on the CPU where there are several parts."""
        if self.alone:
            return list(statistics)
        return [row for part in self._gather([row.cpu() for row in statistics]) for row in part]

    def total(self, numbers: Sequence[float], width: int) -> list[float]:
        """Sums over all parts of `width` numbers; of none where this process has no gradient."""
        every = self._gather(list(numbers) or [0.0] * width)
        return [sum(column) for column in zip(*every)]

    def largest(self, number: float) -> float:
        """The largest of the numbers of all parts."""
        return max(self._gather(number))

    def _gather(self, value: Any) -> list[Any]:
        if self.alone:
            return [value]
        values = [None] * torch.distributed.get_world_size(self._group)
        torch.distributed.all_gather_object(values, value, group=self._group)
        return values


ALONE = Peers()


def find_peers() -> Peers:
    """Those of the `ZeroRedundancyOptimizer` that is making an optimizer now, if one is."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame: FrameType | None = sys._getframe(1)
    for _ in range(8 if module else 0):  # an optimizer is not told who makes it
        if frame is None:
            break
        maker = frame.f_locals.get("self")
        if isinstance(maker, module.ZeroRedundancyOptimizer):  # type: ignore[union-attr]
            return Peers(maker)
        frame = frame.f_back
    return ALONE
