"""The classical rules are torch's optimizers."""

import pytest
import torch

from rnnopt import SGD, Adam, AdamW, LearnedOptimizer


@pytest.mark.parametrize(
    ("rule", "theirs"),
    [
        (SGD(0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
        (SGD(0.1, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        (Adam(0.01), lambda p: torch.optim.Adam(p, lr=0.01)),
        (
            AdamW(0.01, weight_decay=0.1),
            lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
        ),
    ],
    ids=["sgd", "momentum", "adam", "adamw"],
)
def test_rule_equals_torch_over_20_steps(rule, theirs):
    ours = torch.randn(5, 4).requires_grad_()
    twin = ours.detach().clone().requires_grad_()
    optimizer, reference = LearnedOptimizer([ours], rule), theirs([twin])
    for _ in range(20):
        ours.grad = torch.randn(5, 4)
        twin.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, twin, rtol=0, atol=1e-6)


def test_weight_decay_of_the_optimizer_makes_adam_adamw():
    ours = torch.randn(5, 4, dtype=torch.float64).requires_grad_()
    twin = ours.detach().clone().requires_grad_()
    optimizer = LearnedOptimizer([ours], Adam(0.01), lr=0.5, weight_decay=0.1)
    reference = torch.optim.AdamW([twin], lr=0.005, weight_decay=0.1)
    for _ in range(20):
        ours.grad = torch.randn(5, 4, dtype=torch.float64)
        twin.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, twin, rtol=0, atol=1e-6)
