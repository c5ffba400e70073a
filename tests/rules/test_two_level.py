"""The rule of two levels: what defines it, each as a property."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_table import random_lstm
from torch import nn
from torch.nn.functional import cross_entropy

from rnnopt import InputError, LearnedOptimizer, load_rule, save_rule
from rnnopt.meta.settings import UnrollSettings
from rnnopt.meta.unroll import unroll
from rnnopt.rules.protocol import advance, cross_tensor_context, statistics_of
from rnnopt.rules.tensor_features import FIRST_DISTANCE
from rnnopt.rules.two_level import LARGEST, WIDEST, Decisions, TwoLevelLSTM

SHAPES = [(6, 20), (6,), (70, 80), (3, 20)]


def tensors(dtype=torch.float32):
    return [torch.randn(shape, dtype=dtype) for shape in SHAPES]


@torch.no_grad()
def walk(rule, params, grads):
    """The parameters after stepping them together, and their last states."""
    states = [rule.init_state(param) for param in params]
    for now in grads:
        rows = [statistics_of(rule, *given) for given in zip(params, now, states)]
        contexts = cross_tensor_context(rule, rows, states)
        stepped = [
            advance(rule, param, grad, state, 1.0, 0.0, context)
            for param, grad, state, context in zip(params, now, states, contexts)
        ]
        params = [param + delta for param, (delta, _) in zip(params, stepped)]
        states = [state for _, state in stepped]
    return params, states


def test_untrained_it_is_adam_whose_first_step_has_one_length_whatever_trains():
    for shapes in (SHAPES, SHAPES[:2]):
        params = [torch.randn(shape) for shape in shapes]
        grads = [torch.randn(shape).sign() for shape in shapes]  # every share is 1
        after, _ = walk(TwoLevelLSTM(), params, [grads])
        moves = [new - old for new, old in zip(after, params)]
        length = torch.cat([move.flatten() for move in moves]).norm()
        assert float(length) == pytest.approx(FIRST_DISTANCE, rel=1e-4)
        for move, grad in zip(moves, grads):
            assert torch.equal(move.sign(), -grad.sign())


@settings(max_examples=15, deadline=None)
@given(exponent=st.integers(-6, 6))
def test_the_scale_of_the_loss_changes_nothing(exponent):
    params, grads = tensors(), [[0.01 * g for g in tensors()] for _ in range(4)]
    rule, factor = random_lstm(), 2.0**exponent
    plain, _ = walk(rule, params, grads)
    scaled, _ = walk(rule, params, [[factor * g for g in now] for now in grads])
    for one, other in zip(plain, scaled):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_mirrored_coordinate_gets_a_mirrored_update():
    """Also by the coordinate-wise LSTM: its gates see magnitudes only."""
    signs = [torch.randn(shape).sign() for shape in SHAPES]
    params, grads = tensors(torch.float64), [tensors(torch.float64) for _ in range(5)]
    rule = random_lstm(torch.float64)
    # orthogonalisation mixes coordinates: mirror whole rows there
    signs = [sign[:, :1].expand_as(sign) if sign.dim() > 1 else sign for sign in signs]
    plain, _ = walk(rule, params, grads)
    mirrored, _ = walk(
        rule,
        [s * p for s, p in zip(signs, params)],
        [[s * g for s, g in zip(signs, now)] for now in grads],
    )
    for sign, one, other in zip(signs, plain, mirrored):
        torch.testing.assert_close(sign * other, one, rtol=1e-9, atol=1e-9)


def test_the_statistics_of_shards_add_up():
    rule, param = random_lstm(torch.float64), torch.randn(40, dtype=torch.float64)
    state = rule.init_state(param)
    for _ in range(3):
        _, state = advance(rule, param, torch.randn_like(param), state, 1.0, 0.0)
    grad = torch.randn_like(param)
    whole = rule.statistics(grad, state, param)
    parts = []
    for cut in (slice(0, 13), slice(13, 40)):
        piece = {
            name: leaf[..., cut] if leaf.dim() and name not in rule.tensor_state else leaf
            for name, leaf in state.items()
        }
        piece["slope"] = (piece["change"] * 0).sum() + state["slope"] * (cut.start == 0)
        parts.append(rule.statistics(grad[cut], piece, param[cut]))
    torch.testing.assert_close(sum(parts), whole)


def test_tensors_hear_of_each_other():
    rule, params = random_lstm(), tensors()
    grads = tensors()
    loud = [grads[0], grads[1], 100 * grads[2], grads[3]]
    one, other = walk(rule, params, [grads])[0], walk(rule, params, [loud])[0]
    assert not torch.equal(one[1], other[1])


def test_the_change_of_the_loss_is_estimated_by_the_trapezoidal_rule():
    """Half the sum of the gradients at both ends of a step, times the step."""
    rule, params, grads = random_lstm(), tensors(), [tensors() for _ in range(2)]
    after, _ = walk(rule, params, grads[:1])
    steps = [new - old for new, old in zip(after, params)]
    change = sum(float(((a + b) * u).sum()) / 2 for a, b, u in zip(*grads, steps))
    _, states = walk(rule, params, grads)
    for state in states:
        assert float(state["fallen"]) == pytest.approx(change, rel=1e-3)


def test_a_coordinate_that_never_had_a_gradient_rests():
    rule, param = random_lstm(), torch.randn(6)
    grads = [torch.randn(6) * (torch.arange(6) != 2) for _ in range(4)]
    (after,), (state,) = walk(rule, [param], [[grad] for grad in grads])
    assert after[2] == param[2]
    assert not state["cell"][:, 2].any()


def test_wide_matrices_keep_no_cell():
    rule = TwoLevelLSTM(coordinate_units=4)
    wide = torch.empty(WIDEST + 1, WIDEST + 1, device="meta")
    with torch.device("meta"):
        twin = copy.deepcopy(rule).to("meta")
        assert twin.init_state(wide)["cell"].shape == (0, wide.numel())
    assert rule.init_state(torch.zeros(3, 5))["cell"].shape == (4, 15)


def test_large_tensors_keep_no_cell_whatever_their_shape():
    """An embedding takes 12 bytes of state a coordinate, by its whole shape also in a shard."""
    with torch.device("meta"):
        rule = copy.deepcopy(TwoLevelLSTM(coordinate_units=4)).to("meta")
        for shape, units in (
            ((LARGEST // 64, 64), 4), ((LARGEST // 64 + 1, 64), 0), ((64, LARGEST // 64 + 1), 0),
            ((30_522, 128), 0), ((LARGEST,), 4), ((LARGEST + 1,), 0),
        ):  # fmt: skip
            state = rule.init_state(torch.empty(shape))
            assert state["cell"].shape == (units, math.prod(shape)), shape
            kept = sum(leaf.nbytes for leaf in state.values() if leaf.dim())
            assert kept // math.prod(shape) == 12 + 4 * units
            assert rule.init_state(torch.empty(5), shape)["cell"].shape == (units, 5)


def test_a_rule_file_holds_it(tmp_path):
    rule = random_lstm(coordinate_units=2)
    save_rule(rule, tmp_path / "rule.safetensors")
    again = load_rule(tmp_path / "rule.safetensors")
    assert again.config == rule.config
    params, grads = tensors(), [tensors() for _ in range(3)]
    assert all(map(torch.equal, walk(rule, params, grads)[0], walk(again, params, grads)[0]))


def test_its_fallback_is_adam_at_the_base_rates():
    params, grads = tensors(), [tensors() for _ in range(3)]
    fallback, untrained = random_lstm().fallback(), TwoLevelLSTM()
    for one, other in zip(walk(fallback, params, grads)[0], walk(untrained, params, grads)[0]):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("units", [{"tensor_units": 0}, {"coordinate_units": -1}])
def test_sizes_out_of_range_are_refused(units):
    with pytest.raises(InputError, match="must lie between"):
        TwoLevelLSTM(**units)


def problem():
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(2, 12, 4, dtype=torch.float64), torch.randint(3, (2, 12))
    losses = [lambda module, step, i=i: cross_entropy(module(x[i]), y[i]) for i in range(2)]
    return net, losses


def test_the_exact_meta_gradient_equals_central_differences_in_every_weight():
    net, losses = problem()
    rule = random_lstm(torch.float64)

    def meta_loss(order):
        optimizer = LearnedOptimizer(net.parameters(), rule, lr=0.1)
        return unroll(net, optimizer, *losses, UnrollSettings(4, order=order)).meta_loss

    meta_loss(2)
    for name, weight in rule.named_parameters():
        gradient = weight.grad.clone()
        direction = gradient / gradient.norm().clamp(min=1e-30)
        values = []
        for offset in (1e-4, -1e-4):
            with torch.no_grad():
                weight.add_(offset * direction)
            twin = copy.deepcopy(rule)  # its gradients go nowhere
            optimizer = LearnedOptimizer(net.parameters(), twin, lr=0.1)
            values.append(unroll(net, optimizer, *losses, UnrollSettings(4, order=2)).meta_loss)
            with torch.no_grad():
                weight.sub_(offset * direction)
        slope = (values[0] - values[1]) / 2e-4
        assert slope == pytest.approx(float(gradient.norm()), rel=1e-5, abs=1e-9), name


def test_first_order_reaches_the_weights_of_both_levels():
    net, losses = problem()
    rule = random_lstm(torch.float64)
    optimizer = LearnedOptimizer(net.parameters(), rule, lr=0.1)
    unroll(net, optimizer, *losses, UnrollSettings(4, order=1))
    first = {name: weight.grad.clone() for name, weight in rule.named_parameters()}
    assert all(float(grad.norm()) > 0 for grad in first.values())
    rule.zero_grad()
    unroll(net, optimizer, *losses, UnrollSettings(4, order=2))
    assert any(not torch.allclose(first[n], w.grad) for n, w in rule.named_parameters())


def test_reptile_returns_how_far_adaptation_went():
    net, losses = problem()
    optimizer = LearnedOptimizer(net.parameters(), random_lstm(torch.float64), lr=0.1)
    found = unroll(net, optimizer, *losses, UnrollSettings(2, initial="displacement")).initial
    start = {name: param.detach().clone() for name, param in net.named_parameters()}
    for step in range(2):
        optimizer.zero_grad()
        losses[0](net, step).backward()
        optimizer.step()
    for name, param in net.named_parameters():
        torch.testing.assert_close(found[name], start[name] - param.detach())


def test_an_empty_parameter_does_not_disturb_the_others():
    params = [torch.zeros(0, 3, requires_grad=True), torch.ones(4, requires_grad=True)]
    optimizer = LearnedOptimizer(params, random_lstm(), fused=False)
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert torch.isfinite(params[1]).all() and (params[1] != 1).all()


def test_normalised_directions_fade_with_the_gradient():
    """At a hundredth of the gradients before; at half of them a step is as long as ever."""
    rule = TwoLevelLSTM().requires_grad_(False)
    with torch.no_grad():
        rule.output.bias[Decisions._fields.index("adam")] = -1  # leaves g / RMS(g) alone
        rule.output.bias[Decisions._fields.index("gradient")] = 1
    param = torch.randn(50)
    grad = torch.randn(50)
    for share, length in ((0.6, 1.0), (0.01, 0.01 / 0.5 / math.sqrt((3 + 1e-4) / 4))):
        state = rule.init_state(param)
        for size in (1.0, 1.0, 1.0, share):
            update, state = rule(size * grad, state, param)
        rate = FIRST_DISTANCE / math.sqrt(50)
        assert update.square().mean().sqrt() == pytest.approx(length * rate, rel=1e-3)


def test_what_the_guard_asks_takes_tensors_of_several_devices():
    """A tensor without values stands for one on another device."""
    rule, params = random_lstm(), tensors()
    states = [rule.init_state(param) for param in params]
    rows = [statistics_of(rule, param, param, state) for param, state in zip(params, states)]
    assert not rule.largest_rise(states).is_meta and not rule.promised(rows).is_meta
    states[0] = {name: leaf.to("meta") for name, leaf in states[0].items()}
    assert rule.largest_rise(states).is_meta
    assert rule.promised([rows[0].to("meta"), *rows[1:]]).is_meta
