"""Gradient descent with a learned learning rate for every tensor."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from rnnopt import InputError, LearnedOptimizer, MetaSGD
from rnnopt.meta.settings import UnrollSettings
from rnnopt.meta.unroll import unroll

NAMES = ["weight", "bias"]


def rule_of(*factors):
    rule = MetaSGD(NAMES, 0.1)
    with torch.no_grad():
        rule.log_factor.copy_(torch.tensor(factors))
    return rule


def assigned(layer, rule):
    optimizer = LearnedOptimizer(layer.parameters(), rule)
    rule.assign(optimizer, dict(layer.named_parameters()))
    return optimizer


def losses(layer):
    x, y = torch.randn(7, 3), torch.randn(7, 2)
    return lambda module, step: mse_loss(module(x), y)


def test_each_tensor_steps_at_its_own_rate():
    layer, rule = nn.Linear(3, 2), rule_of(math.log(2.0), math.log(0.5))
    twin = copy.deepcopy(layer)
    groups = [{"params": [twin.weight], "lr": 0.2}, {"params": [twin.bias], "lr": 0.05}]
    loss = losses(layer)
    pairs = ((layer, assigned(layer, rule)), (twin, torch.optim.SGD(groups)))
    for _ in range(3):
        for module, optimizer in pairs:
            optimizer.zero_grad()
            loss(module, 0).backward()
            optimizer.step()
    for ours, theirs in zip(layer.parameters(), twin.parameters()):
        torch.testing.assert_close(ours, theirs)


def test_a_tensor_without_an_index_takes_the_geometric_mean():
    param, rule = nn.Parameter(torch.zeros(4)), rule_of(math.log(8.0), math.log(2.0))
    optimizer = LearnedOptimizer([param], rule)
    param.grad = torch.ones(4)
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full((4,), -0.4))


@pytest.mark.parametrize("order", [1, 2])
def test_a_rate_gets_the_meta_gradient_of_its_own_tensor(order):
    """One step from theta: d L(theta - r g) / d log r = -r <g, L'(theta - r g)>, either order."""
    layer, rule = nn.Linear(3, 2), rule_of(0.3, -0.7)
    support, query = losses(layer), losses(layer)
    unroll(layer, assigned(layer, rule), support, query, UnrollSettings(1, order=order))
    grads = torch.autograd.grad(support(layer, 0), list(layer.parameters()))
    rates = 0.1 * rule.log_factor.detach().exp()
    with torch.no_grad():
        for param, grad, rate in zip(layer.parameters(), grads, rates):
            param.sub_(rate * grad)
    slopes = torch.autograd.grad(query(layer, 0), list(layer.parameters()))
    expected = [-rate * (g * s).sum() for g, s, rate in zip(grads, slopes, rates)]
    torch.testing.assert_close(rule.log_factor.grad, torch.stack(expected))


def test_a_copy_of_the_optimizer_keeps_the_index_of_each_tensor():
    layer = nn.Linear(3, 2)
    optimizer = copy.deepcopy(assigned(layer, rule_of(0.1, 0.2)))
    assert [int(state["number"]) for state in optimizer.state.values()] == [0, 1]


def test_a_tensor_without_a_rate_is_refused():
    layer = nn.Linear(3, 2)
    optimizer = LearnedOptimizer(layer.parameters(), MetaSGD(NAMES))
    message = r"learned rates for 2 tensors \(weight, ...\), and none for scale, one of 1"
    with pytest.raises(InputError, match=message):
        MetaSGD(NAMES).assign(optimizer, {"weight": layer.weight, "scale": layer.bias})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "MetaSGD without names of tensors"),
        ((NAMES, 0.0), "step_size=0.0: must be positive"),
        ((NAMES, math.inf), "step_size=inf"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        MetaSGD(*arguments)
