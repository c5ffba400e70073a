"""The same on a CUDA device; run with ``-m gpu`` where there is one."""

import copy

import pytest
import torch
from rule_table import RULES, random_lstm
from torch import nn

from rnnopt import LearnedOptimizer
from rnnopt.cli.main import main
from rnnopt.meta.settings import UnrollSettings
from rnnopt.meta.unroll import unroll

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def train(net, optimizer, steps=5):
    generator = torch.Generator().manual_seed(0)
    device = next(net.parameters()).device
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(16, 4, generator=generator).to(device)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("make", RULES.values(), ids=RULES.keys())
def test_the_device_does_not_matter(make):
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    twin = copy.deepcopy(net).cuda()
    train(net, LearnedOptimizer(net.parameters(), make(), lr=0.1))
    train(twin, LearnedOptimizer(twin.parameters(), make(), lr=0.1))  # the rule stays on the CPU
    for ours, theirs in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(theirs.cpu(), ours, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("order", [1, 2])
def test_meta_gradients_equal_those_of_the_cpu(order):
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    inputs = torch.randn(12, 4, dtype=torch.float64)
    gradients = []
    for device in ("cpu", "cuda"):
        module, rule = net.to(device), random_lstm(torch.float64).to(device)
        x = inputs.to(device)
        unroll(
            module,
            LearnedOptimizer(module.parameters(), rule),
            lambda f, step, x=x: f(x).square().mean(),
            lambda f, step, x=x: f(x).cos().mean(),
            UnrollSettings(steps=3, order=order),
        )
        gradients.append([weight.grad.cpu() for weight in rule.parameters()])
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(theirs, ours, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("order", ["1", "2"])
def test_meta_train_runs(csv_file, encoder, tmp_path, order):
    arguments = [
        "meta-train", "--data", csv_file, "--encoder", encoder, "--ways", 2, "--shots", 2,
        "--queries", 3, "--steps", 2, "--tune", "lora", "--meta-steps", 4, "--order", order,
        "--device", "cuda", "--output", tmp_path / "run",
    ]  # fmt: skip
    assert main([str(argument) for argument in arguments]) == 0
