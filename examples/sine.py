"""Meta-learning without text: sine curves (Finn et al. 2017, arXiv:1703.03400, section 5.1).

    python examples/sine.py

A task is a curve y = a sin(x + p), of which the network sees ten points. MAML learns initial values
from which five steps of gradient descent come close to a new curve.

Offline, about 30 seconds on one core; the paper's figures take 60,000 meta-steps, see
tests/meta/test_sine_regression.py. Prints the mean square error on new points of new curves, from
ordinary initial values and from the learned ones. The row "learned" is gradient descent; AdamW runs
at its best learning rate for each number of steps.
"""

import math

import torch
from torch import nn
from torch.nn.functional import mse_loss

import rnnopt


def sine(number: int) -> rnnopt.Task:
    """The curve of this number: ten points to adapt on, ten to judge by."""
    drawn = torch.Generator().manual_seed(number)
    height, shift = torch.rand(2, generator=drawn) * torch.tensor([4.9, math.pi])
    x = 10 * torch.rand(20, 1, generator=drawn) - 5
    y = (0.1 + height) * torch.sin(x + shift)
    return rnnopt.Task(
        support_loss=lambda net, step: mse_loss(net(x[:10]), y[:10]),
        query_loss=lambda net, step: mse_loss(net(x[10:]), y[10:]),
    )


def main(meta_steps: int = 400, episodes: int = 50) -> None:
    """Learn initial values, and print what they bring."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    learner, rule = rnnopt.Learner(net), rnnopt.SGD(0.03)
    shown = {"budgets": (1, 5, 10), "baselines": ("adamw",), "episodes": episodes}
    print(rnnopt.compare(rule, learner, sine, **shown).table())
    trained = rnnopt.meta_train(
        learner, sine, rule=rule, initial="maml", initial_lr=5e-3, steps=5, meta_steps=meta_steps
    )
    print(rnnopt.compare(trained.rule, learner, sine, start=trained.start, **shown).table())


if __name__ == "__main__":
    main()
