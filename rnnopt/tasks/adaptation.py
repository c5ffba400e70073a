"""Adaptation to a task, with scores on its query set along the way."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from rnnopt.errors import InputError
from rnnopt.tasks.protocol import Learner, Scores, Task


@dataclass(frozen=True)
class Adaptation:
    """The result of one adaptation.

    Attributes:
        scores: the figures on the query set, by the number of steps after which they were taken.
        seconds_per_step: mean time of forward pass, backward pass and step, without the scoring.
        undone: the number of steps that the optimizer took back, see `LearnedOptimizer.undone`.
    """

    scores: dict[int, Scores]
    seconds_per_step: float
    undone: int = 0


def adapt_and_judge(
    learner: Learner, optimizer: torch.optim.Optimizer, task: Task, budgets: Collection[int]
) -> Adaptation:
    """Take steps on a task's support loss, and score the module on the query set at each budget.

    Args:
        learner: the learner, at its starting values for this task. It is adapted in place.
        optimizer: the optimizer of the parameters to adapt. If it has `eval` and `train`, as
            Schedule-Free optimizers do, the module is scored in the state of `eval`.
        task: the task.
        budgets: the numbers of steps to score at, each at least 1.

    Returns:
        The scores and the time.

    Raises:
        InputError: there is no budget, or one is below 1.
    """
    check_budgets(budgets)
    scores, seconds = {}, 0.0
    for step in range(1, max(budgets) + 1):
        started = time.perf_counter()
        optimizer.zero_grad()
        torch.autograd.backward(task.support_loss(learner.module, step - 1))
        optimizer.step()
        if learner.device.type == "cuda":
            torch.cuda.synchronize(learner.device)
        seconds += time.perf_counter() - started
        if step in budgets:
            with evaluation_point(optimizer):
                scores[step] = task.scores(learner.module, step - 1)
    return Adaptation(scores, seconds / max(budgets), getattr(optimizer, "undone", 0))


def check_budgets(budgets: Collection[int]) -> None:
    """Check the numbers of steps to score at.

    Raises:
        InputError: there is none, or one is below 1.
    """
    if not budgets or min(budgets) < 1:
        raise InputError(
            f"budgets={tuple(budgets)}: give at least one number of steps, each at least 1"
        )


@contextmanager
def evaluation_point(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Switch an optimizer that has a separate evaluation point to it, and back.

    Schedule-Free optimizers (Defazio et al. 2024, arXiv:2405.15682) take gradients at one point and
    are evaluated at another, an average. Their `eval` and `train` switch between the two.
    """
    switches = hasattr(optimizer, "eval") and hasattr(optimizer, "train")
    if switches:
        optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if switches:
            optimizer.train()  # type: ignore[attr-defined]
