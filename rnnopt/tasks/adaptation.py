"""A run of adaptation to a task, judged along the way."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from rnnopt.tasks.protocol import Learner, Scores, Task


@dataclass(frozen=True)
class Adaptation:
    """What a run of adaptation reached.

    Attributes:
        scores: the figures on the query set at each budget of steps.
        seconds_per_step: forward, backward and step, without judging.
        undone: steps that the optimizer took back, see `LearnedOptimizer.undone`.
    """

    scores: dict[int, Scores]
    seconds_per_step: float
    undone: int = 0


def adapt_and_judge(
    learner: Learner, optimizer: torch.optim.Optimizer, task: Task, budgets: Collection[int]
) -> Adaptation:
    """Take steps on a task's support loss, and judge at each budget of steps.

    Args:
        learner: at its starting values for this task; adapted when this returns.
        optimizer: over the learner's trainable parameters; one that has `eval` and `train` is
            judged in the state of `eval`.
        task: the task.
        budgets: numbers of steps, 1 or more.

    Returns:
        The scores and the time.
    """
    scores, seconds = {}, 0.0
    for step in range(1, max(budgets) + 1):
        started = time.perf_counter()
        optimizer.zero_grad()
        torch.autograd.backward(task.support_loss(learner.module, step - 1))
        optimizer.step()
        if learner.device.type == "cuda":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - started
        if step in budgets:
            with _judged_point(optimizer):
                scores[step] = task.scores(learner.module)
    return Adaptation(scores, seconds / max(budgets), getattr(optimizer, "undone", 0))


@contextmanager
def _judged_point(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let an optimizer show the parameters that it answers for, if it steps from others.

    Schedule-Free optimizers (Defazio et al. 2024, arXiv:2405.15682) take gradients at one point and
    judge another, an average; they switch by `eval` and `train`.
    """
    switches = hasattr(optimizer, "eval") and hasattr(optimizer, "train")
    if switches:
        optimizer.eval()  # type: ignore[attr-defined]
    yield
    if switches:
        optimizer.train()  # type: ignore[attr-defined]
