"""`LearnedOptimizer` is a true `torch.optim.Optimizer`."""

import copy
import gc
import io
import itertools
import math
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_table import RULES, random_lstm
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from rnnopt import SGD, Adam, InputError, LearnedOptimizer, save_rule
from rnnopt.optim.safeguard import GROUP_STATE
from rnnopt.rules.files import (
    SHIPPED_RULE,
)

each_rule = pytest.mark.parametrize("make", RULES.values(), ids=RULES.keys())


def model(dtype=torch.float32):
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def loss_of(net, seed):
    generator = torch.Generator().manual_seed(seed)
    dtype = next(net.parameters()).dtype
    return net(torch.randn(16, 4, generator=generator).to(dtype)).float().square().mean()


def train(net, optimizer, steps):
    for seed in steps:
        optimizer.zero_grad()
        loss_of(net, seed).backward()
        optimizer.step()


def values(net):
    return [param.detach().clone() for param in net.parameters()]


@each_rule
def test_steps_lower_the_loss_of_a_small_network(make):
    net = model()
    before = float(loss_of(net, 0).detach())
    train(net, LearnedOptimizer(net.parameters(), make(), lr=0.01), [0] * 30)
    assert float(loss_of(net, 0).detach()) < before


@settings(max_examples=20, deadline=None)
@given(cuts=st.sets(st.integers(1, 3)), make=st.sampled_from(list(RULES.values())))
def test_grouping_changes_nothing(cuts, make):
    net = model()
    twin = copy.deepcopy(net)
    params = list(twin.parameters())
    edges = [0, *sorted(cuts), len(params)]
    groups = [{"params": params[a:b]} for a, b in itertools.pairwise(edges)]
    train(net, LearnedOptimizer(net.parameters(), make()), range(3))
    train(twin, LearnedOptimizer(groups, make()), range(3))
    assert all(map(torch.equal, values(net), values(twin)))


def test_lr_and_weight_decay_belong_to_the_group():
    frozen, moved = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = LearnedOptimizer(
        [{"params": [frozen], "lr": 0.0}, {"params": [moved], "weight_decay": 2.0}], Adam(0.1)
    )
    frozen.grad = moved.grad = torch.zeros(3)
    optimizer.step()
    assert torch.equal(frozen, torch.ones(3))
    torch.testing.assert_close(moved.detach(), torch.full((3,), 0.8))


def test_closure_is_called_with_gradients_on_and_its_loss_returned():
    net = model()
    optimizer = LearnedOptimizer(net.parameters(), random_lstm())
    before = values(net)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(net, 0)
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    assert not any(map(torch.equal, before, values(net)))


def test_parameters_without_a_gradient_stay():
    net = model()
    net[0].weight.requires_grad_(False)
    before = net[0].weight.clone()
    train(net, LearnedOptimizer(net.parameters(), random_lstm(), weight_decay=1.0), range(2))
    assert torch.equal(net[0].weight, before)


def test_the_gradient_is_read_only():
    net = model()
    loss_of(net, 0).backward()
    before = [param.grad.clone() for param in net.parameters()]
    LearnedOptimizer(net.parameters(), random_lstm()).step()
    assert all(map(torch.equal, before, (param.grad for param in net.parameters())))


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,)])
def test_small_tensors_step(shape):
    param = torch.ones(shape, requires_grad=True)
    optimizer = LearnedOptimizer([param], random_lstm())
    for _ in range(2):
        param.grad = torch.ones(shape)
        optimizer.step()
    assert param.shape == shape
    assert torch.isfinite(param).all()


@each_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_resume_is_exact_in_the_middle_of_an_adaptation(make, dtype):
    net = model(dtype)
    optimizer = LearnedOptimizer(net.parameters(), make(), lr=0.5, weight_decay=0.01)
    train(net, optimizer, range(3))
    buffer = io.BytesIO()
    torch.save([net.state_dict(), optimizer.state_dict()], buffer)
    train(net, optimizer, range(3, 6))

    buffer.seek(0)
    weights, state = torch.load(buffer, weights_only=True)
    resumed = model(dtype)
    resumed.load_state_dict(weights)
    fresh = LearnedOptimizer(resumed.parameters(), make())
    fresh.load_state_dict(state)
    train(resumed, fresh, range(3, 6))
    assert all(map(torch.equal, values(net), values(resumed)))


def test_loading_keeps_the_dtype_of_the_state():
    net = model(torch.bfloat16)
    optimizer = LearnedOptimizer(net.parameters(), random_lstm())
    train(net, optimizer, range(1))
    fresh = LearnedOptimizer(net.parameters(), random_lstm())
    fresh.load_state_dict(optimizer.state_dict())
    for state in fresh.state.values():
        assert state.pop("last_step").dtype == torch.bfloat16  # the guard's
    assert {leaf.dtype for state in fresh.state.values() for leaf in state.values()} == {
        torch.float32
    }


def test_a_loaded_state_shares_no_memory_with_its_source():
    net = model()
    optimizer = LearnedOptimizer(net.parameters(), random_lstm())
    train(net, optimizer, range(1))
    saved = optimizer.state_dict()
    fresh = LearnedOptimizer(net.parameters(), random_lstm())
    fresh.load_state_dict(saved)
    saved["state"][0]["m"].fill_(7)
    assert not (fresh.state[net[0].weight]["m"] == 7).any()


def test_the_state_of_another_rule_is_refused_and_nothing_changes():
    net = model()
    small = LearnedOptimizer(net.parameters(), random_lstm(coordinate_units=4))
    train(net, small, range(1))
    large = LearnedOptimizer(net.parameters(), random_lstm(coordinate_units=8))
    with pytest.raises(ValueError, match="load it with the rule, and the version of rnnopt,"):
        large.load_state_dict(small.state_dict())
    assert not large.state


def test_the_state_of_a_version_that_gave_large_tensors_a_cell_is_refused(monkeypatch):
    net = model()
    earlier = LearnedOptimizer(net.parameters(), random_lstm())
    train(net, earlier, range(1))
    monkeypatch.setattr("rnnopt.rules.two_level.LARGEST", 1)
    now = LearnedOptimizer(net.parameters(), random_lstm())
    with pytest.raises(ValueError, match=r"and the version of rnnopt, that it was saved with"):
        now.load_state_dict(earlier.state_dict())
    assert not now.state


def test_groups_of_another_optimizer_are_refused_and_nothing_changes():
    net = model()
    ours = LearnedOptimizer(net.parameters(), random_lstm(), lr=0.5)
    with pytest.raises(
        ValueError,
        match=r"no \['largest_gradient', 'loss_rise', 'skipped', 'undone'\].*of a Learned",
    ):
        ours.load_state_dict(torch.optim.AdamW(net.parameters()).state_dict())
    assert ours.param_groups[0]["lr"] == 0.5
    train(net, ours, range(1))


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_has_the_rule_and_steps_alike(copied):
    net = model()
    optimizer = LearnedOptimizer(net.parameters(), random_lstm())
    train(net, optimizer, range(2))
    twin, twin_optimizer = copied((net, optimizer))
    train(net, optimizer, range(2, 4))
    train(twin, twin_optimizer, range(2, 4))
    assert all(map(torch.equal, values(net), values(twin)))


def test_the_rule_is_the_object_that_was_given_and_not_in_param_groups():
    rule = random_lstm()
    optimizer = LearnedOptimizer(model().parameters(), rule)
    assert optimizer.rule is rule
    assert set(optimizer.param_groups[0]) == {"params", "lr", "weight_decay", *GROUP_STATE}
    assert all(isinstance(value, float | int) for value in GROUP_STATE.values())


@pytest.mark.parametrize(("lr", "end"), [(0.001, "next to nothing"), (60.0, "ruin a model")])
def test_a_rate_that_can_not_be_meant_is_warned_of(lr, end):
    with pytest.warns(UserWarning, match=f"lr={lr} multiplies the learned step.*{end}"):
        LearnedOptimizer(model().parameters(), random_lstm(), lr=lr)


def test_a_step_leaves_no_graph_and_no_gradient_on_the_rule():
    net, rule = model(), random_lstm()
    optimizer = LearnedOptimizer(net.parameters(), rule)
    train(net, optimizer, range(2))
    assert all(weight.grad is None for weight in rule.parameters())
    assert not any(leaf.requires_grad for s in optimizer.state.values() for leaf in s.values())


def test_schedulers_scale_the_step():
    param = torch.zeros(1, requires_grad=True)
    optimizer = LearnedOptimizer([param], Adam(0.1))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    moves = []
    for _ in range(3):
        before = float(param.detach())
        param.grad = torch.ones(1)
        optimizer.step()
        scheduler.step()
        moves.append(before - float(param.detach()))
    torch.testing.assert_close(moves, [0.1, 0.05, 0.025], rtol=1e-5, atol=0)


def test_grad_scaler_changes_nothing():
    net = model()
    twin = copy.deepcopy(net)
    optimizer = LearnedOptimizer(net.parameters(), random_lstm())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(loss_of(net, 0)).backward()
    scaler.step(optimizer)
    scaler.update()
    train(twin, LearnedOptimizer(twin.parameters(), random_lstm()), [0])
    assert all(map(torch.equal, values(net), values(twin)))


def test_grad_scaler_skips_a_step_that_overflowed():
    net = model()
    optimizer = LearnedOptimizer(net.parameters(), random_lstm())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = values(net)
    scaler.scale(loss_of(net, 0) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(map(torch.equal, before, values(net)))
    assert scaler.get_scale() == 4.0


def test_clipped_gradients_are_what_the_rule_sees():
    net = model()
    optimizer = LearnedOptimizer(net.parameters(), SGD(1.0))
    before = values(net)
    loss_of(net, 0).backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 0.01)
    optimizer.step()
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, values(net))])
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-4)


def test_add_param_group_after_the_first_step():
    net, late = model(), torch.ones(2, requires_grad=True)
    optimizer = LearnedOptimizer(net.parameters(), random_lstm())
    train(net, optimizer, range(1))
    optimizer.add_param_group({"params": [late], "lr": 2.0})
    late.grad = torch.ones(2)
    optimizer.step()
    assert (late != 1).all()


def test_a_rule_may_come_from_a_file(tmp_path):
    rule = random_lstm()
    save_rule(rule, tmp_path / "rule.safetensors")
    for path in (tmp_path / "rule.safetensors", tmp_path, str(tmp_path)):
        loaded = LearnedOptimizer(model().parameters(), path).rule
        assert all(map(torch.equal, rule.parameters(), loaded.parameters()))


def test_without_a_rule_a_shipped_one_is_loaded():
    assert SHIPPED_RULE.stat().st_size <= 200_000
    net = model()
    train(net, LearnedOptimizer(net.parameters()), range(2))
    assert all(torch.isfinite(value).all() for value in values(net))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr=-1.0: must be finite and at least 0"),
        ({"lr": float("nan")}, ValueError, "lr=nan: must be finite"),
        ({"lr": "1"}, TypeError, "lr='1': give a real number, or a tensor of one"),
        ({"lr": None}, TypeError, "lr=None: give a real number"),
        ({"lr": [1.0]}, TypeError, r"lr=\[1.0\]: give a real number"),
        ({"lr": 1j}, TypeError, "lr=1j: give a real number"),
        ({"lr": torch.tensor(-1.0)}, ValueError, "lr=-1.0: must be finite and at least 0"),
        ({"lr": torch.ones(2)}, ValueError, r"Tensor lr must be 1-element, .* shape \(2,\)"),
        ({"lr": torch.ones(1, device="meta")}, TypeError, "give a real number, or a tensor"),
        ({"weight_decay": "0"}, TypeError, "weight_decay='0': give a real number"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay=-0.1: must be finite and at least 0"),
        ({"guard": "off"}, TypeError, "guard='off': give None, True or False"),
        ({"fused": 2}, TypeError, "fused=2: give None, True or False"),
        ({"rule": object()}, TypeError, "expected an UpdateRule"),
        ({"rule": 1e-3}, TypeError, r"the multiplier of its steps is lr=0.001, and 1.0"),
        ({"rule": Path("nowhere")}, InputError, "can't read nowhere"),
    ],
)
def test_bad_arguments_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        LearnedOptimizer(model().parameters(), **{"rule": random_lstm(), **options})


def test_a_warning_for_the_learning_rate_of_another_optimizer(recwarn):
    net = model()
    LearnedOptimizer(net.parameters(), lr=0.01)
    LearnedOptimizer(net.parameters(), lr=0.0)
    assert not recwarn
    with pytest.warns(
        UserWarning, match="lr=2e-05 multiplies the learned step.*leave lr out"
    ) as seen:
        LearnedOptimizer(net.parameters(), lr=2e-5)
    assert seen[0].filename == __file__


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_complex_and_integer_parameters_are_refused(dtype):
    optimizer = LearnedOptimizer(model().parameters(), random_lstm())
    with pytest.raises(TypeError, match=f"dtype {dtype}.*only real floating-point"):
        optimizer.add_param_group({"params": [torch.zeros(2, dtype=dtype)]})
    assert len(optimizer.param_groups) == 1


@each_rule
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("lr", [torch.tensor(0.5), torch.tensor([0.5])])
def test_a_rate_may_be_a_tensor_as_in_torch(make, fused, lr):
    net = model()
    twin = copy.deepcopy(net)
    train(net, LearnedOptimizer(net.parameters(), make(), lr=lr, fused=fused), range(3))
    train(twin, LearnedOptimizer(twin.parameters(), make(), lr=0.5, fused=fused), range(3))
    assert all(map(torch.equal, values(net), values(twin)))


def test_a_rate_that_stops_being_a_number_is_named_at_the_step():
    net = model()
    optimizer = LearnedOptimizer(net.parameters())
    optimizer.param_groups[0]["lr"] = "1"
    before = values(net)
    with pytest.raises(TypeError, match="lr='1': give a real number"):
        train(net, optimizer, range(1))
    assert all(map(torch.equal, before, values(net)))


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@pytest.mark.parametrize("value", [math.nan, math.inf, torch.tensor(math.nan)])
def test_a_rate_that_a_schedule_made_infinite_is_refused_before_anything_moves(name, value):
    net = model()
    optimizer = LearnedOptimizer(net.parameters())
    train(net, optimizer, range(2))
    before = values(net)
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"{name}=(nan|inf) at a step: must be finite"):
        train(net, optimizer, range(1))
    assert all(map(torch.equal, before, values(net)))
    optimizer.param_groups[0][name] = 1.0
    train(net, optimizer, range(1))


@pytest.mark.parametrize("off", [False, 0, np.bool_(False)])
def test_whatever_is_false_turns_the_guard_and_the_kernel_off(off):
    optimizer = LearnedOptimizer(model().parameters(), guard=off, fused=off)
    assert optimizer.guard is False and optimizer.fused is False


def test_a_saved_rate_that_is_no_number_is_refused_at_loading_and_nothing_changes():
    net = model()
    optimizer = LearnedOptimizer(net.parameters())
    saved = optimizer.state_dict()
    for wrong, error in (("1", TypeError), (float("nan"), ValueError)):
        saved["param_groups"][0]["lr"] = wrong
        with pytest.raises(error, match="lr="):
            optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 1.0
    train(net, optimizer, range(1))


def test_a_saved_step_count_may_be_a_plain_number():
    net = model()
    optimizer = LearnedOptimizer(net.parameters(), Adam(0.1))
    train(net, optimizer, range(2))
    saved = copy.deepcopy([net.state_dict(), optimizer.state_dict()])
    for state in saved[1]["state"].values():
        state["step"] = float(state["step"])
    twin = model()
    twin.load_state_dict(saved[0])
    resumed = LearnedOptimizer(twin.parameters(), Adam(0.1))
    resumed.load_state_dict(saved[1])
    train(net, optimizer, range(2, 4))
    train(twin, resumed, range(2, 4))
    assert all(map(torch.equal, values(net), values(twin)))


@pytest.mark.parametrize("wrong", [{"m": "text"}, {"m": None}, [1.0], 3.0, {"m": torch.ones(7)}])
def test_a_saved_state_that_is_none_of_this_optimizer_is_refused_with_a_sentence(wrong):
    net = model()
    optimizer = LearnedOptimizer(net.parameters(), Adam(0.1))
    train(net, optimizer, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0] = {**saved["state"][0], **wrong} if isinstance(wrong, dict) else wrong
    before = optimizer.state[net[0].weight]["m"].clone()
    with pytest.raises(ValueError, match=r"the saved state of a parameter of shape \(8, 4\) is"):
        optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[net[0].weight]["m"], before)


@pytest.mark.parametrize("fused", [None, False])
def test_parameters_without_values_step_as_in_torch_and_load_no_state(fused):
    net = model()
    optimizer = LearnedOptimizer(net.parameters(), fused=fused)
    train(net, optimizer, range(1))
    empty = model().to("meta")
    twin = LearnedOptimizer(empty.parameters(), fused=fused)
    for param in empty.parameters():
        param.grad = torch.zeros_like(param)
    twin.step()
    assert all(param.is_meta for param in empty.parameters())
    with pytest.raises(ValueError, match=r"on the meta device.*to_empty"):
        twin.load_state_dict(optimizer.state_dict())


def test_saved_leaves_have_the_shape_of_their_parameter_and_flat_ones_load_too():
    net = model()
    optimizer = LearnedOptimizer(net.parameters(), random_lstm(coordinate_units=2))
    train(net, optimizer, range(2))
    saved = optimizer.state_dict()
    for index, param in enumerate(net.parameters()):
        assert saved["state"][index]["m"].shape == param.shape
        assert saved["state"][index]["cell"].shape == (2, *param.shape)
    flat = copy.deepcopy(saved)
    for state in flat["state"].values():
        for name in ("m", "v", "last_step"):
            state[name] = state[name].reshape(-1)
        state["cell"] = state["cell"].flatten(1)
    resumed = LearnedOptimizer(net.parameters(), random_lstm(coordinate_units=2))
    resumed.load_state_dict(flat)
    for param, state in optimizer.state.items():
        assert all(torch.equal(leaf, resumed.state[param][name]) for name, leaf in state.items())


def test_a_hook_before_loading_maps_the_state_by_name_as_in_torch():
    net = model()
    optimizer = LearnedOptimizer(net.named_parameters())
    train(net, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    backwards = LearnedOptimizer(reversed(list(net.named_parameters())))

    def by_name(loading, state_dict):
        (group,), (given,) = loading.param_groups, state_dict["param_groups"]
        index = dict(zip(given["param_names"], given["params"]))
        states = [state_dict["state"][index[name]] for name in group["param_names"]]
        names = {"param_names": group["param_names"]}
        return {"state": dict(enumerate(states)), "param_groups": [{**given, **names}]}

    backwards.register_load_state_dict_pre_hook(by_name)
    backwards.load_state_dict(saved)
    for param, state in optimizer.state.items():
        assert all(torch.equal(leaf, backwards.state[param][name]) for name, leaf in state.items())


def test_a_hook_after_loading_sees_and_may_change_what_was_loaded():
    net = model()
    optimizer = LearnedOptimizer(net.parameters())
    train(net, optimizer, range(2))
    saved, seen = optimizer.state_dict(), []

    def after(loading):
        for state in loading.state.values():
            seen.append(float(state["step"]))
            state["m"].fill_(7)

    fresh = LearnedOptimizer(net.parameters())
    fresh.register_load_state_dict_post_hook(after)
    for _ in range(2):
        fresh.load_state_dict(saved)
    assert seen == [2.0] * 8
    assert all((state["m"] == 7).all() for state in fresh.state.values())


def test_hooks_of_state_dict_see_leaves_in_the_shape_in_which_they_are_saved():
    net, shapes = model(), []
    optimizer = LearnedOptimizer(net.parameters())
    train(net, optimizer, range(1))
    optimizer.register_state_dict_post_hook(
        lambda _, found: shapes.append(found["state"][0]["m"].shape)
    )
    optimizer.state_dict()
    assert shapes == [net[0].weight.shape]


@each_rule
@pytest.mark.parametrize("guard", [None, False])
def test_steps_without_any_gradient_before_the_first_leave_no_trace(make, guard):
    net = model()
    twin = copy.deepcopy(net)
    ours = LearnedOptimizer(net.parameters(), make(), guard=guard)
    theirs = LearnedOptimizer(twin.parameters(), make(), guard=guard)
    get_optimizer_state_dict(net, ours)  # steps with zeros
    if make is RULES["adamw"]:  # which decays without a gradient, too
        ours.param_groups[0]["lr"] = 0.0
    for _ in range(2):
        for param in net.parameters():
            param.grad = torch.zeros_like(param)
        ours.step()
    ours.param_groups[0]["lr"] = 1.0
    train(net, ours, range(4))
    train(twin, theirs, range(4))
    assert all(map(torch.equal, values(net), values(twin)))


def test_steps_without_a_gradient_count_once_there_was_one_also_after_loading():
    net = model()
    optimizer = LearnedOptimizer(net.parameters(), Adam(0.1))
    train(net, optimizer, range(1))
    resumed = LearnedOptimizer(net.parameters(), Adam(0.1))
    resumed.load_state_dict(optimizer.state_dict())
    for one in (optimizer, resumed):
        for param in net.parameters():
            param.grad = torch.zeros_like(param)
        one.step()
        assert {float(state["step"]) for state in one.state.values()} == {2.0}


def test_a_sparse_gradient_is_refused_before_anything_moves():
    dense, table = torch.ones(2, requires_grad=True), nn.Embedding(5, 2, sparse=True)
    optimizer = LearnedOptimizer([dense, table.weight], random_lstm())
    (dense.sum() + table(torch.tensor([1])).sum()).backward()
    with pytest.raises(TypeError, match="build the embedding with sparse=False"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(2))


def test_a_compiled_model_is_stepped_as_the_plain_one():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    twin = copy.deepcopy(plain)
    compiled = torch.compile(twin, backend="aot_eager")  # a real graph, no C++ needed
    for model, module in ((plain, plain), (compiled, twin)):
        optimizer = LearnedOptimizer(module.parameters(), random_lstm())
        for step in range(5):
            optimizer.zero_grad()
            model(torch.full((2, 4), float(step))).square().mean().backward()
            optimizer.step()
    for one, other in zip(plain.parameters(), twin.parameters()):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_the_first_group_may_have_no_parameters():
    param = torch.ones(3, requires_grad=True)
    optimizer = LearnedOptimizer([{"params": []}, {"params": [param]}])
    param.grad = torch.ones(3)
    optimizer.step()
    assert (param != 1).all()


def test_a_parameter_given_twice_is_refused():
    param = torch.ones(3, requires_grad=True)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="in this group twice"):
        LearnedOptimizer([param, param])


def test_a_pickle_without_the_newer_options_steps():
    param = torch.ones(3, requires_grad=True)
    optimizer = LearnedOptimizer([param], random_lstm())
    state = optimizer.__getstate__()
    older = {name: value for name, value in state.items() if name not in ("fused", "guard")}
    revived = LearnedOptimizer.__new__(LearnedOptimizer)
    revived.__setstate__(older)
    param.grad = torch.ones(3)
    revived.step()
    assert (param != 1).all()


@pytest.mark.parametrize("how", ["by module", "in backward"])
def test_a_warning_if_two_optimizers_train_parts_of_one_model(how):
    net = model()
    parts = [net[0], net[2]] if how == "by module" else list(net.parameters())
    optimizers = [
        LearnedOptimizer([part] if isinstance(part, torch.Tensor) else part.parameters())
        for part in parts
    ]
    if how == "in backward":
        for param, optimizer in zip(parts, optimizers):

            def step(_, optimizer=optimizer):
                optimizer.step()
                optimizer.zero_grad()

            param.register_post_accumulate_grad_hook(step)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for seed in range(3):
            loss_of(net, seed).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    (said,) = heard  # once
    assert "make one LearnedOptimizer, with a parameter group for each part" in str(said.message)
    assert said.filename == __file__


def test_no_warning_for_optimizers_of_two_models_or_of_the_same_parameters():
    nets = [model(), model()]
    optimizers = [LearnedOptimizer(net.parameters()) for net in nets]
    again = LearnedOptimizer(nets[0].parameters())
    for seed in range(3):  # a warning is an error here
        for net, optimizer in zip(nets, optimizers):
            train(net, optimizer, [seed])
        train(nets[0], again, [seed])
        for net in nets:
            loss_of(net, seed).backward()
        for optimizer in optimizers:
            optimizer.step()


def test_an_optimizer_that_is_gone_leaves_nothing_on_the_model():
    net = model()
    for _ in range(3):
        train(net, LearnedOptimizer(net.parameters()), range(1))
    gc.collect()
    assert not any(param._post_accumulate_grad_hooks for param in net.parameters())


def test_a_watched_model_can_be_copied_and_pickled():
    net = model()
    LearnedOptimizer(net.parameters())
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        train(twin, LearnedOptimizer(twin.parameters()), range(1))


def test_zero_redundancy_in_one_process_is_the_optimizer_itself(tmp_path):
    """Two processes are in tests/data_parallel_steps.py."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        nets = [net := model(), copy.deepcopy(net)]
        zero = ZeroRedundancyOptimizer(nets[0].parameters(), optimizer_class=LearnedOptimizer)
        train(nets[0], zero, range(3))
        train(nets[1], LearnedOptimizer(nets[1].parameters()), range(3))
        for ours, theirs in zip(*(net.parameters() for net in nets)):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)  # another order of sums
    finally:
        torch.distributed.destroy_process_group()
