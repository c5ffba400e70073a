"""Meta-learning without text: sine curves (Finn et al. 2017, arXiv:1703.03400, section 5.1).

    python examples/sine.py

A task is a curve y = a sin(x + p), of which the network sees ten points. MAML learns initial values
from which five steps of gradient descent fit a new curve. AdamW and SGD start from there too, at
their best learning rates.

Offline, about 20 seconds on one core. Prints the mean square error on new points of new curves.
"""

import math

import torch
from torch import nn
from torch.nn.functional import mse_loss

import rnnopt

net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


def sine(number: int) -> rnnopt.Task:
    """The curve of this number: ten points to adapt on, ten to judge by."""
    drawn = torch.Generator().manual_seed(number)
    height, shift = (torch.rand(2, generator=drawn) * torch.tensor([4.9, math.pi])).unbind()
    x = 10 * torch.rand(20, 1, generator=drawn) - 5
    y = (0.1 + height) * torch.sin(x + shift)
    return rnnopt.Task(
        support_loss=lambda net, step: mse_loss(net(x[:10]), y[:10]),
        query_loss=lambda net, step: mse_loss(net(x[10:]), y[10:]),
    )


def main() -> None:
    torch.manual_seed(0)
    learner = rnnopt.Learner(net)
    trained = rnnopt.meta_train(
        learner, sine, steps=5, meta_steps=200, rule=rnnopt.SGD(0.01), initial="maml"
    )
    result = rnnopt.compare(
        trained.rule,
        learner,
        sine,
        start=trained.start,
        budgets=(1, 5, 10),
        baselines=("adamw", "sgd"),
    )
    print(result.table())


if __name__ == "__main__":
    main()
