"""Changes to what the rule decides, by the kind of task, which improve.py finds; no command.

Shapes: B tasks, P tensors in the order of `TaskBatch.alike`, K numbers of context, D decisions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from curriculum import Drawn
from tasks import TaskBatch
from torch import Tensor

from rnnopt.rules.tensor_features import FLOOR, Sums, base_rates
from rnnopt.rules.two_level import LOG_RATE_BOUND, Decisions, TwoLevelLSTM

RATE, GROWTH, ADAM = (Decisions._fields.index(name) for name in ("rate", "growth", "adam"))
# in the context, which has no rows and columns
LAST_RATE = len(Decisions._fields) + TwoLevelLSTM.leaves.index("last_rate") - 2
TOP = 3  # layers, at most: those of a cache
EARLY = 10  # steps, see `Changes`
GROWN = 0.1  # weight of growth in steps
LENGTHS = {"cls": 1.0, "unit": 1.0, "mean": 6.0}  # of MiniLM's features, about
MOST = 0.98  # of a bound, which an output reaches at infinity only


class Asked(NamedTuple):
    """Of every tensor of a task in a step, (P,) each."""

    rate: Tensor  # factors on the rule's rate and growth
    growth: Tensor
    adam: Tensor  # 0, or the rate of an AdamW step in place of the rule's own


class Changes(NamedTuple):
    """To what the rule does in the head, and to all else.

    Args:
        first: factor on the head's first step.
        later: factor on its later ones.
        body: factor on the steps of all else.
        growth: factor on what all else grows, beside that.
        adam: if above 0, all but the head takes AdamW's steps at this rate.
        head_adam: if above 0, the head does, for features of length 1.
        early: factor on `adam` at the first step, which falls to 1 within `EARLY` steps.
        head_early: the same for `head_adam`, within half as many.
    """

    first: float = 1.0
    later: float = 1.0
    body: float = 1.0
    growth: float = 1.0
    adam: float = 0.0
    head_adam: float = 0.0
    early: float = 1.0
    head_early: float = 1.0

    def of(self, tasks: TaskBatch, step: int) -> Asked:
        """What is asked of each tensor in a step, which counts from 1."""
        names = [tasks.names[i] for group in tasks.alike for i in group]
        of_head = self.first if step == 1 else self.later
        length = tasks.spec.feature_scale * LENGTHS[tasks.spec.pooling]
        head_adam = self.head_adam / length * _falling(self.head_early, step, EARLY / 2)
        head = of_head, of_head, head_adam
        adam = self.adam * _falling(self.early, step, EARLY)
        body = self.body, self.body * self.growth, adam
        asked = zip(*(head if name.startswith("head") else body for name in names))
        return Asked(*(torch.tensor(values) for values in asked))


def _falling(factor: float, step: int, steps: float) -> float:
    """From a factor at the first step to 1 after so many."""
    return factor ** max(0.0, 1 - (step - 1) / steps)


def kind_of(drawn: Drawn) -> str:
    """The kind of task that has changes of its own."""
    spec = drawn.spec
    depth = "all layers" if spec.layers > TOP else "top layers"
    if spec.pairs:
        return f"{spec.kind} pairs, {depth}"
    start = "cold" if spec.head in ("random", "zero") else "warm"
    name = f"{spec.kind} {'cls' if spec.pooling == 'cls' else 'mean'} {start}"
    if spec.batch:
        return f"{name}, minibatches"
    return name if spec.kind == "head" else f"{name}, {depth}"


_STARTS = ("cls cold", "mean warm", "mean cold")
KINDS = [
    *(f"{kind} pairs, {depth} layers" for depth in ("all", "top") for kind in ("full", "lora")),
    *(f"{kind} {start}, {depth} layers" for depth in ("all", "top")
      for kind in ("lora", "full") for start in _STARTS),
    *(f"head {start}" for start in _STARTS),
    *(f"{kind} {start}, minibatches" for kind in ("lora", "full", "head") for start in _STARTS),
]  # fmt: skip


def changed(context: Tensor, asked: Asked) -> Tensor:
    """What tensors do, (B, P, K), as asked."""
    columns = torch.ones(context.shape[-1], len(asked.rate))
    columns[[RATE, LAST_RATE]], columns[GROWTH] = asked.rate, asked.growth
    as_adam = torch.zeros(len(asked.adam), context.shape[-1])
    as_adam[:, ADAM] = 1
    as_adam[:, [RATE, LAST_RATE]] = asked.adam.unsqueeze(-1)
    replaced = torch.zeros(as_adam.shape, dtype=torch.bool)
    replaced[:, [*range(len(Decisions._fields)), LAST_RATE]] = asked.adam.unsqueeze(-1) > 0
    return torch.where(replaced, as_adam, context * columns.T)


def aimed_at(output: Tensor, asked: Asked, statistics: Tensor) -> Tensor:
    """The outputs by which a rule decides as asked, (B, P, D).

    Args:
        output: those by which it decides otherwise.
        asked: what is asked.
        statistics: of the tensors, (B, P, M).
    """
    aim = output.clone()
    rate = torch.tanh(output[..., RATE] / LOG_RATE_BOUND) + asked.rate.log() / LOG_RATE_BOUND
    growth = torch.tanh(output[..., GROWTH]) * asked.growth
    base = base_rates(Sums(*statistics.unbind(-1)))[0]
    as_adam = asked.adam > 0
    aim = torch.where(as_adam.unsqueeze(-1), 0, aim)
    of_adam = torch.log(asked.adam / base) / LOG_RATE_BOUND  # -inf where it is not asked for
    within = of_adam.abs() < MOST  # not where a tensor has no gradient yet
    rate = torch.where(as_adam & within, of_adam, rate)
    aim[..., RATE] = LOG_RATE_BOUND * torch.atanh(rate.clamp(-MOST, MOST))
    aim[..., GROWTH] = torch.where(as_adam, 0, torch.atanh(growth.clamp(-MOST, MOST)))
    return aim


def missed(output: Tensor, aim: Tensor, statistics: Tensor) -> Tensor:
    """How far outputs are from what is aimed at, 0-d.

    The mean square, and for growth also how it compares with the step that is aimed at: in a wide
    matrix growing by a hundredth is many times a step.

    Args:
        output: (B, P, D).
        aim: of the same shape.
        statistics: of the tensors, (B, P, M).
    """
    s = Sums(*statistics.unbind(-1))
    rate = base_rates(s)[0] * torch.exp(
        LOG_RATE_BOUND * torch.tanh(aim[..., RATE] / LOG_RATE_BOUND)
    )
    steps = torch.sqrt(s.p_p / s.live.clamp(min=1)) / (rate + FLOOR)  # of growing by 1
    grown = torch.tanh(output[..., GROWTH]) - torch.tanh(aim[..., GROWTH])
    steps = torch.where(s.g_g > 0, steps, 0)  # what never had a gradient does not move
    return (output - aim).square().mean() + GROWN * torch.log1p((grown * steps).square()).mean()
