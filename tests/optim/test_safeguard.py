"""The guard: steps that overshoot are undone, and the fallback takes over."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_table import random_lstm
from torch import nn
from torch.nn.functional import cross_entropy

from rnnopt import Adam, LearnedOptimizer
from rnnopt.optim.safeguard import loss_rise
from rnnopt.rules.two_level import MAX_RISE


class TooLongSteps(Adam):
    """Adam at a learning rate that ruins the model; its fallback has one that does not."""

    def fallback(self):
        return Adam(self.step_size / 1000)


def bowl(param):
    """A quadratic with its minimum at 1; 50 nats at 0."""
    return 50 * (param - 1).square().sum()


def descend(param, optimizer, steps, loss=bowl):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(param)
        value.backward()
        losses.append(float(value.detach()))
        optimizer.step()
    return losses


def test_a_step_that_overshot_is_undone_and_the_fallback_takes_over():
    param = torch.zeros(1, requires_grad=True)
    optimizer = LearnedOptimizer([param], TooLongSteps(100.0))
    losses = descend(param, optimizer, 2)
    assert losses == [50.0, pytest.approx(50 * 99**2, rel=1e-3)]
    assert optimizer.undone == 1
    assert abs(param.item()) < 0.01 * 100  # 8 bits of the step are kept
    start = param.item()
    descend(param, optimizer, 1)
    assert 0.05 < abs(param.item() - start) < 0.101  # Adam's step is at most its rate, 100 / 1000
    assert optimizer.undone == 1


def test_every_further_undone_step_halves_the_step():
    param = torch.zeros(1, requires_grad=True)
    optimizer = LearnedOptimizer([param], TooLongSteps(1e6))
    moves = []
    for _ in range(60):
        before, undone = param.item(), optimizer.undone
        descend(param, optimizer, 1)
        if undone and optimizer.undone == undone:
            moves.append((undone, abs(param.item() - before)))
    first = {}
    for undone, move in moves:
        first.setdefault(undone, move)
    assert len(first) >= 3
    for undone, move in first.items():
        assert move <= 1.01e3 * 0.5 ** (undone - 1)


def test_without_a_guard_nothing_is_undone():
    param = torch.zeros(1, requires_grad=True)
    optimizer = LearnedOptimizer([param], TooLongSteps(100.0), guard=False)
    descend(param, optimizer, 5)
    assert optimizer.undone == 0
    assert "last_step" not in optimizer.state[param]


def test_a_step_after_which_no_gradient_is_finite_is_undone():
    param = torch.full((4,), 3.0, requires_grad=True)
    optimizer = LearnedOptimizer([param], TooLongSteps(0.5))
    optimizer.zero_grad()
    param.grad = torch.ones(4)
    optimizer.step()
    assert (param < 2.6).all()
    param.grad = torch.full((4,), float("nan"))
    optimizer.step()
    assert optimizer.undone == 0 and (param < 2.6).all()  # one may be the batch's fault
    optimizer.step()
    torch.testing.assert_close(param, torch.full((4,), 3.0), rtol=0, atol=0.01)
    assert optimizer.undone == 1
    optimizer.step()  # nothing is left to undo
    assert optimizer.undone == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_batch_without_finite_gradient_is_skipped(value):
    param, twin = (torch.zeros(3, requires_grad=True) for _ in range(2))
    ours, theirs = (
        LearnedOptimizer([param], TooLongSteps(0.1)),
        LearnedOptimizer([twin], TooLongSteps(0.1)),
    )
    for _ in range(3):
        descend(param, ours, 1)
        descend(twin, theirs, 1)
        param.grad = torch.full((3,), value)
        ours.step()
    assert ours.undone == 0
    assert torch.equal(param, twin)


def test_one_coordinate_without_finite_gradient_undoes_nothing():
    param = torch.full((4,), 3.0, requires_grad=True)
    optimizer = LearnedOptimizer([param], TooLongSteps(0.5))
    for _ in range(3):
        param.grad = torch.tensor([float("nan"), 1.0, 1.0, 1.0])
        optimizer.step()
    assert optimizer.undone == 0


def test_a_parameter_without_a_gradient_now_is_undone_too():
    first, second = (torch.zeros(1, requires_grad=True) for _ in range(2))
    optimizer = LearnedOptimizer([first, second], TooLongSteps(100.0))
    (bowl(first) + bowl(second)).backward()
    optimizer.step()
    assert first.item() == second.item() > 90
    optimizer.zero_grad()
    bowl(first).backward()
    optimizer.step()
    assert optimizer.undone == 1
    assert max(abs(first.item()), abs(second.item())) < 0.01 * 100


def test_only_the_last_step_of_a_parameter_counts():
    """A parameter whose gradient comes back."""
    first, second = (torch.zeros(1, requires_grad=True) for _ in range(2))
    optimizer = LearnedOptimizer([first, second], TooLongSteps(0.01))
    for grads in ((1.0, 1.0), *[(1.0, None)] * 3, (1.0, -1000.0)):
        for param, grad in zip((first, second), grads):
            param.grad = None if grad is None else torch.tensor([grad])
        optimizer.step()
    assert optimizer.undone == 0


def test_a_rule_does_not_see_the_state_of_the_guard():
    seen = []

    class Watched(TooLongSteps):
        def __call__(self, grad, state, param):
            seen.append(set(state))
            return super().__call__(grad, state, param)

    param = torch.zeros(1, requires_grad=True)
    descend(param, LearnedOptimizer([param], Watched(0.01)), 3)
    assert seen == [{"m", "v", "step"}] * 3


@pytest.mark.parametrize("how", ["step", "function"])
def test_a_compiled_step_is_guarded_as_the_plain_one(how):
    """guard=True too."""
    params = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    compiled, plain = (LearnedOptimizer([p], TooLongSteps(100.0), guard=True) for p in params)
    step = compiled.step if how == "step" else lambda: compiled.step()
    step = torch.compile(step, backend="aot_eager")
    for _ in range(4):
        for param, optimizer, go in zip(params, (compiled, plain), (step, plain.step)):
            optimizer.zero_grad()
            bowl(param).backward()
            go()
    assert compiled.undone == plain.undone == 1
    assert torch.equal(*params)


def test_a_required_guard_needs_a_rule_with_a_fallback():
    param = torch.zeros(1, requires_grad=True)
    with pytest.raises(RuntimeError, match="guard=True, but Adam has no fallback"):
        LearnedOptimizer([param], Adam(0.1), guard=True)
    descend(param, LearnedOptimizer([param], Adam(0.1)), 1)


@pytest.mark.parametrize("masked", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_rise_is_that_of_a_parabola(dtype, masked):
    """With a coordinate whose gradient is not finite, that of the others."""
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(50, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    optimizer = LearnedOptimizer([param], TooLongSteps(0.25))
    values = []
    for _ in range(2):
        param.grad = param.detach().clone()
        values.append(float(param.detach()[masked:].double().square().sum() / 2))
        if masked:
            param.grad[0] = float("nan")
        optimizer.step()
    param.grad = param.detach().clone()
    if masked:
        param.grad[0] = float("inf")
    now = float(param.detach()[masked:].double().square().sum() / 2)
    work = [(optimizer.param_groups[0], param, param.grad)]
    change, finite, _ = loss_rise(work, [optimizer.state[param]])
    assert change == pytest.approx(now - values[1], rel=0.03 if dtype == torch.bfloat16 else 0.01)
    assert finite == (not masked)


def test_a_resumed_run_undoes_what_the_first_would_have():
    def start():
        param = torch.zeros(3, requires_grad=True)
        return param, LearnedOptimizer([param], TooLongSteps(100.0))

    param, optimizer = start()
    descend(param, optimizer, 1)
    saved, value = copy.deepcopy(optimizer.state_dict()), param.detach().clone()
    descend(param, optimizer, 4)
    fresh, resumed = start()
    with torch.no_grad():
        fresh.copy_(value)
    resumed.load_state_dict(saved)
    descend(fresh, resumed, 4)
    assert resumed.undone == optimizer.undone > 0
    assert torch.equal(fresh, param)


def test_the_fallback_is_adam_and_leaves_the_rule_as_it_is():
    rule = random_lstm()
    weights = copy.deepcopy(rule.state_dict())
    fallback = rule.fallback()
    assert not fallback.output.weight.any() and not fallback.output.bias.any()
    assert all(torch.equal(weights[name], leaf) for name, leaf in rule.state_dict().items())


@pytest.mark.filterwarnings("ignore:lr=30.0 multiplies")
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), steep=st.floats(0.1, 300), lr=st.sampled_from([0.5, 1.0, 30.0]))
def test_no_rule_ends_far_above_where_it_started(seed, steep, lr):
    """Whatever its weights: 40 steps end little more above the start than first steps promised."""
    rule = random_lstm(seed=seed).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    param = torch.randn(20, generator=generator).requires_grad_()
    curvature = steep * torch.rand(20, generator=generator)
    optimizer = LearnedOptimizer([param], rule, lr=lr)

    def loss(x):
        return (curvature * x.square()).sum() / 2

    losses = descend(param, optimizer, 41, loss)
    unit = float(optimizer.state[param]["unit"])
    assert (
        min(losses[-2:]) < losses[0] + 1.1 * MAX_RISE * unit
    )  # the last may be about to be undone


@pytest.mark.filterwarnings("ignore:lr=.* multiplies")
@pytest.mark.parametrize(
    ("depth", "lr", "fused"),
    [(1, 20.0, None), (1, 60.0, None), (1, 60.0, False), (3, 60.0, None), (3, 300.0, None)],
)
def test_steps_that_are_far_too_long_are_undone_before_they_ruin_a_network(depth, lr, fused):
    """Gradients vanish where units of tanh are saturated, and steps far beyond tell little."""
    for seed in (1, 2):
        torch.manual_seed(seed)
        layers = [nn.Linear(8, 32), nn.Tanh()]
        for _ in range(depth - 1):
            layers += [nn.Linear(32, 32), nn.Tanh()]
        net = nn.Sequential(*layers, nn.Linear(32, 3))
        inputs = torch.randn(64, 8)
        labels = inputs[:, :3].argmax(1)
        optimizer = LearnedOptimizer(net.parameters(), lr=lr, fused=fused)
        for _ in range(15):
            optimizer.zero_grad()
            cross_entropy(net(inputs), labels).backward()
            optimizer.step()
        assert optimizer.undone == 1, seed
        assert cross_entropy(net(inputs), labels) < 1.5, seed


@pytest.mark.parametrize("factor", [1e4, 1e15, 1e30])
def test_one_gradient_that_is_far_larger_than_all_before_is_skipped(factor):
    param = torch.ones(4, requires_grad=True)
    optimizer = LearnedOptimizer([param], random_lstm(), guard=True)
    twin = torch.ones(4, requires_grad=True)
    untroubled = LearnedOptimizer([twin], random_lstm(), guard=True)
    for scale in (1.0, factor, 1.0, 1.0):
        param.grad = scale * torch.tensor([1.0, -2.0, 3.0, 4.0])
        optimizer.step()
        if scale == 1.0:
            twin.grad = param.grad.clone()
            untroubled.step()
    assert torch.equal(param, twin) and optimizer.undone == 0


def test_a_second_large_gradient_in_a_row_is_the_new_scale():
    param = torch.ones(4, requires_grad=True)
    optimizer = LearnedOptimizer([param], random_lstm(), guard=True)
    for scale in (1e-9, 1.0, 1.0):
        before = param.detach().clone()
        param.grad = scale * torch.tensor([1.0, -2.0, 3.0, 4.0])
        optimizer.step()
    assert (param != before).all()


def test_after_an_undone_step_the_rate_is_at_most_one():
    param = torch.zeros(1, requires_grad=True)
    with pytest.warns(UserWarning, match="lr=40.0"):
        optimizer = LearnedOptimizer([param], TooLongSteps(10.0), lr=40.0)
    descend(param, optimizer, 2)
    start = param.item()
    descend(param, optimizer, 1)
    assert optimizer.undone == 1 and abs(param.item() - start) < 0.011  # 10 / 1000, not 40 times it
