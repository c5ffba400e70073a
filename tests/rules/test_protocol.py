"""The contract of every rule, and of `advance`, where a rule meets a parameter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_table import RULES

from rnnopt.rules.protocol import UpdateRule, advance, is_coordinate_wise

each_rule = pytest.mark.parametrize("make", RULES.values(), ids=RULES.keys())
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def steps(rule, param, grads, lr=1.0, weight_decay=0.0):
    """The parameter after each step, and the last state."""
    state, values = rule.init_state(param), []
    for grad in grads:
        delta, state = advance(rule, param, grad, state, lr, weight_decay)
        param = param + delta
        values.append(param)
    return values, state


@each_rule
def test_every_rule_obeys_the_protocol(make):
    assert isinstance(make(), UpdateRule)


@each_rule
@settings(max_examples=30, deadline=None)
@given(shape=shapes, seed=st.integers(0, 9))
def test_change_and_state_have_the_documented_shapes(make, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    param, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    rule = make()
    delta, state = advance(rule, param, grad, rule.init_state(param), 1.0, 0.0)
    assert delta.shape == param.shape
    assert all(
        leaf.shape[-1] == param.numel()
        for name, leaf in state.items()
        if is_coordinate_wise(rule, name, leaf)
    )
    assert {k: v.shape for k, v in state.items()} == {
        k: v.shape for k, v in rule.init_state(param).items()
    }


@each_rule
def test_a_rule_writes_to_none_of_its_inputs(make):
    rule, param, grad = make(), torch.randn(7), torch.randn(7)
    _, state = advance(rule, param, torch.randn(7), rule.init_state(param), 1.0, 0.1)
    before = [param.clone(), grad.clone(), *(leaf.clone() for leaf in state.values())]
    advance(rule, param, grad, state, 1.0, 0.1)
    assert all(map(torch.equal, before, [param, grad, *state.values()]))


@each_rule
def test_permuted_coordinates_get_permuted_updates(make):
    param, grads = torch.randn(50), [torch.randn(50) for _ in range(4)]
    order = torch.randperm(50)
    values, _ = steps(make(), param, grads)
    permuted, _ = steps(make(), param[order], [grad[order] for grad in grads])
    # only a sum over the tensor depends on the order, in its last bits
    tolerance = 1e-6 if "hidden" in make().init_state(param) else 0.0
    torch.testing.assert_close(permuted[-1], values[-1][order], rtol=tolerance, atol=tolerance)


@each_rule
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x[:, ::2],
        lambda x: x[0, 0, 0, 0],
    ],
    ids=["transposed", "channels_last", "strided", "0-d"],
)
def test_the_memory_layout_changes_nothing(make, layout):
    param, grad = layout(torch.randn(3, 4, 2, 5)), layout(torch.randn(3, 4, 2, 5))
    rule = make()
    ours, _ = advance(rule, param, grad, rule.init_state(param), 1.0, 0.1)
    twin = param.contiguous()
    theirs, _ = advance(rule, twin, grad.contiguous(), rule.init_state(twin), 1.0, 0.1)
    assert torch.equal(ours, theirs)


@each_rule
@settings(max_examples=30, deadline=None)
@given(
    bad=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    where=st.integers(0, 5),
    decay=st.sampled_from([0.0, 0.5]),
)
def test_a_coordinate_without_a_finite_gradient_keeps_value_and_state(make, bad, where, decay):
    rule, param, grad = make(), torch.randn(6), torch.randn(6)
    _, state = advance(rule, param, torch.randn(6), rule.init_state(param), 1.0, decay)
    grad[where] = bad
    delta, after = advance(rule, param, grad, state, 1.0, decay)
    assert delta[where] == 0
    assert torch.isfinite(delta).all()
    assert delta.count_nonzero() == 5
    for name, leaf in after.items():
        if is_coordinate_wise(rule, name, leaf):
            assert torch.equal(leaf[..., where], state[name][..., where])
        assert torch.isfinite(leaf).all()


@each_rule
def test_finite_coordinates_do_not_depend_on_a_non_finite_one(make):
    rule, param, grad = make(), torch.randn(6), torch.randn(6)
    grad[2] = float("nan")
    zeroed = torch.where(torch.isfinite(grad), grad, 0)
    ours, _ = advance(rule, param, grad, rule.init_state(param), 1.0, 0.0)
    theirs, _ = advance(rule, param, zeroed, rule.init_state(param), 1.0, 0.0)
    kept = torch.isfinite(grad)
    assert torch.equal(ours[kept], theirs[kept])


@each_rule
def test_lr_multiplies_the_change(make):
    rule, param, grad = make(), torch.randn(6), torch.randn(6)
    whole, _ = advance(rule, param, grad, rule.init_state(param), 1.0, 0.1)
    half, _ = advance(rule, param, grad, rule.init_state(param), 0.5, 0.1)
    assert torch.equal(half, whole * 0.5)


@each_rule
def test_half_precision_parameters_have_full_precision_state(make):
    param = torch.randn(6, dtype=torch.bfloat16)
    state = make().init_state(param)
    assert all(leaf.dtype == torch.float32 for leaf in state.values())


@pytest.mark.parametrize("name", ["adam", "adamw", "lstm"])
def test_one_huge_gradient_breaks_no_adaptive_rule(name):
    """Its square overflows; torch's Adam no longer moves after it, and this one must not either."""
    values, _ = steps(RULES[name](), torch.zeros(3), [torch.full((3,), 1e30)] * 3)
    assert values[-1].abs().max() < 1e3
