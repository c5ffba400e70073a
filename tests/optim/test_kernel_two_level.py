"""The compiled step of `TwoLevelLSTM` is the plain one, to rounding."""

import copy

import pytest
import torch
from rule_table import random_two_level

from rnnopt import LearnedOptimizer
from rnnopt.optim.kernels.choice import fused_step, two_level_kernel
from rnnopt.optim.kernels.two_level import TwoLevelStep
from rnnopt.rules.two_level import WIDEST, TwoLevelLSTM

pytestmark = pytest.mark.skipif(two_level_kernel(4) is None, reason="no C compiler")

# a matrix with orthogonalised directions, one without, a vector, a scalar, an empty tensor, more
# than one block, and a tensor of three dimensions
SHAPES = [(37, 12), (80, 70), (5,), (), (0,), (300, 90), (4, 3, 7)]


def twins(units=4, shapes=SHAPES, **options):
    """The same parameters twice, with a compiled and a plain optimizer."""
    torch.manual_seed(0)
    ours = [(torch.randn(shape) * 0.05).requires_grad_() for shape in shapes]
    theirs = [param.detach().clone().requires_grad_() for param in ours]
    rule = random_two_level(coordinate_units=units)
    fused = LearnedOptimizer(ours, rule, fused=True, **options)
    return fused, LearnedOptimizer(theirs, copy.deepcopy(rule), fused=False, **options)


def params_of(optimizer):
    return optimizer.param_groups[0]["params"]


def walk(optimizers, steps=6, scale=0.1, spoil=lambda grad, step: None):
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for pair in zip(*(params_of(optimizer) for optimizer in optimizers)):
            noise = torch.randn(pair[0].shape, generator=generator)
            grad = scale * (noise + pair[0].detach())
            if grad.dim():
                spoil(grad.view(-1), step)
            for param in pair:
                param.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()


def assert_equal(fused, plain):
    for ours, theirs in zip(params_of(fused), params_of(plain)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
        for name, leaf in plain.state[theirs].items():
            tolerance = {"rtol": 2e-2} if name == "last_step" else {"rtol": 1e-4}  # bfloat16
            torch.testing.assert_close(fused.state[ours][name], leaf, atol=2e-4, **tolerance)


def test_the_kernel_is_chosen_by_itself():
    assert isinstance(fused_step(TwoLevelLSTM()), TwoLevelStep)
    assert fused_step(TwoLevelLSTM().double()) is None

    class Other(TwoLevelLSTM):
        pass

    assert fused_step(Other()) is None


@pytest.mark.parametrize("units", [0, 1, 4])
@pytest.mark.parametrize(
    "options", [{}, {"lr": 0.5, "weight_decay": 0.3}], ids=["plain", "decayed"]
)
def test_steps_of_the_kernel_are_those_of_the_plain_rule(units, options):
    fused, plain = twins(units, **options)

    def spoil(grad, step):
        grad[700:1600] = 0  # never a gradient
        if step == 1:
            grad[-1:], grad[-2:-1] = float("nan"), float("inf")

    walk((fused, plain), spoil=spoil)
    assert_equal(fused, plain)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e6, 1e14])
def test_gradients_of_any_size(scale):
    fused, plain = twins(shapes=[(30, 7), (50,)], guard=False)
    walk((fused, plain), steps=3, scale=scale)
    assert_equal(fused, plain)


def test_wide_matrices_have_no_cell_in_the_kernel_either():
    side = WIDEST + 1
    fused, plain = twins(shapes=[(side, side)], guard=False)
    walk((fused, plain), steps=2)
    assert fused.state[params_of(fused)[0]]["cell"].shape == (0, side * side)
    assert_equal(fused, plain)


def test_what_the_kernel_does_not_take_is_stepped_by_the_rule():
    """Half precision and other strides, beside parameters that the kernel steps."""
    fused, plain = twins(shapes=[(20, 9), (9,)])
    for optimizer in (fused, plain):
        more = torch.ones(6, 8).T.clone(memory_format=torch.preserve_format).requires_grad_()
        half = torch.ones(7, dtype=torch.bfloat16, requires_grad=True)
        optimizer.add_param_group({"params": [more, half]})
    for step in range(3):
        torch.manual_seed(step)
        for ours, theirs in zip(
            *((p for g in o.param_groups for p in g["params"]) for o in (fused, plain))
        ):
            ours.grad = torch.randn(ours.shape, dtype=ours.dtype)
            theirs.grad = ours.grad.clone()
        fused.step()
        plain.step()
    assert_equal(fused, plain)
    for ours, theirs in zip(fused.param_groups[1]["params"], plain.param_groups[1]["params"]):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


def test_the_kernel_repeats_itself_to_the_bit():
    first, second = twins()[0], twins()[0]
    walk((first, second))
    for ours, theirs in zip(params_of(first), params_of(second)):
        assert torch.equal(ours, theirs)
