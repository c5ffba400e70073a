"""torch's own tables of optimizers, schedulers and averages, run against `LearnedOptimizer`.

The generic tests of torch's test_optim.py that apply to an optimizer without `maximize`, `foreach`,
`capturable`, sparse gradients and complex parameters, with the shipped rule, fused and plain.
"""

import copy
import functools
import math

import pytest
import torch
from rule_table import random_lstm
from torch import nn
from torch.optim import lr_scheduler, swa_utils
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
)

from rnnopt import LearnedOptimizer


class PlainOptimizer(LearnedOptimizer):
    """Without a kernel."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, fused=False, **kwargs)


def inputs(device, dtype=None):
    return [
        OptimizerInput(params=None, kwargs={}, desc="default"),
        OptimizerInput(params=None, kwargs={"lr": 0.5}, desc="non-default lr"),
        OptimizerInput(params=None, kwargs={"lr": torch.tensor(0.5)}, desc="tensor lr"),
        OptimizerInput(params=None, kwargs={"lr": torch.tensor([0.5])}, desc="1-element lr"),
        OptimizerInput(params=None, kwargs={"weight_decay": 0.1}, desc="nonzero weight_decay"),
        OptimizerInput(params=None, kwargs={"guard": False}, desc="no guard"),
        OptimizerInput(params=None, kwargs={"rule": random_lstm(seed=1)}, desc="an LSTM"),
    ]


def error_inputs(device, dtype):
    param = nn.Parameter(torch.randn(1, 1, device=device, dtype=dtype))
    return [
        *get_error_inputs_for_all_optims(device, dtype),
        ErrorOptimizerInput(
            OptimizerInput(params=[param], kwargs={"weight_decay": -1}),
            error_type=ValueError,
            error_regex="weight_decay=-1",
        ),
        ErrorOptimizerInput(
            OptimizerInput(params=[param], kwargs={"lr": -1e-2}),
            error_type=ValueError,
            error_regex="lr=-0.01",
        ),
    ]


def info_of(cls):
    return OptimizerInfo(
        cls,
        optim_inputs_func=inputs,
        optim_error_inputs_func=error_inputs,
        scheduler_inputs=(
            [lambda opt: lr_scheduler.StepLR(opt, gamma=0.9, step_size=10)],
            [lambda opt: lr_scheduler.LinearLR(opt, start_factor=0.4, total_iters=4)],
            [
                lambda opt: lr_scheduler.StepLR(opt, gamma=0.9, step_size=10),
                lambda opt: lr_scheduler.ReduceLROnPlateau(opt),
            ],
        ),
        supported_impls=("fused",),
        supports_complex=False,
    )


INFOS = [info_of(LearnedOptimizer), info_of(PlainOptimizer)]
each = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
each_input = pytest.mark.parametrize(
    ("info", "given"),
    [(info, given) for info in INFOS for given in info.optim_inputs_func("cpu")],
    ids=lambda value: getattr(value, "name", None) or value.desc.replace(" ", "-"),
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def kwargs_of(given):
    return {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in given.kwargs.items()
    }


def problem(contiguous=True):
    if contiguous:
        weight, bias = torch.randn(10, 5), torch.randn(10)
    else:
        weight, bias = torch.randn(10, 5, 2)[..., 0], torch.randn(10, 2)[..., 0]
    return nn.Parameter(weight), nn.Parameter(bias), torch.randn(5)


def closure_of(optimizer, weight, bias, vector):
    def closure():
        optimizer.zero_grad()
        loss = (weight.mv(vector) + bias).pow(2).sum()
        loss.backward()
        return loss

    return closure


def run(optimizer, closure, steps):
    for _ in range(steps):
        optimizer.step(closure)


@pytest.mark.parametrize("case", range(len(error_inputs("cpu", torch.float32))))
@each
def test_errors(info, case):
    """Duplicates, of which torch only warns, are refused after its warning."""
    given = info.optim_error_inputs_func("cpu", torch.float32)[case]
    assert given.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    params = given.optimizer_error_input.params
    params = [nn.Parameter(torch.ones(1, 1))] if params is None else params
    make = functools.partial(info.optim_cls, params, **given.optimizer_error_input.kwargs)
    if issubclass(given.error_type, Warning):
        with pytest.warns(given.error_type, match=given.error_regex), pytest.raises(ValueError):
            make()
    else:
        with pytest.raises(given.error_type, match=given.error_regex):
            make()


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("schedulers", [None, *range(3)])
@each_input
def test_goes_right_direction(info, given, schedulers, contiguous):
    weight, bias, vector = problem(contiguous)
    optimizer = info.optim_cls([weight, bias], **kwargs_of(given))
    makers = () if schedulers is None else info.scheduler_inputs[schedulers]
    made = [make(optimizer) for make in makers]
    closure = closure_of(optimizer, weight, bias, vector)
    start = closure().item()
    for _ in range(20):
        loss = optimizer.step(closure).detach()
        for scheduler in made:
            plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
            scheduler.step(loss) if plateau else scheduler.step()
    assert closure().item() < start


@pytest.mark.parametrize("kind", ["lr", "scheduled"])
@each
def test_tensor_lr(info, kind):
    params = [problem()[:2] for _ in range(2)]
    for one, other in zip(*params):
        other.data.copy_(one.data)
    vector = torch.randn(5)
    rates = torch.tensor([0.5]), 0.5
    pair = [info.optim_cls(list(p), lr=lr) for p, lr in zip(params, rates)]
    schedulers = [lr_scheduler.ExponentialLR(one, 0.8) for one in pair]
    for _ in range(6):
        for optimizer, own, scheduler in zip(pair, params, schedulers):
            optimizer.step(closure_of(optimizer, *own, vector))
            if kind == "scheduled":
                scheduler.step()
    assert isinstance(pair[0].param_groups[0]["lr"], torch.Tensor)
    for one, other in zip(*params):
        torch.testing.assert_close(one, other)


@each_input
def test_step_is_noop_when_params_have_no_grad(info, given):
    param = nn.Parameter(torch.randn(5, 1))
    before = param.detach().clone()
    optimizer = info.optim_cls([param], **kwargs_of(given))
    optimizer.step()
    assert torch.equal(param, before)


@each_input
def test_step_is_noop_for_zero_grads(info, given):
    if given.kwargs.get("weight_decay"):
        pytest.skip("weight decay moves parameters without a gradient")
    param = nn.Parameter(torch.randn(5, 1))
    before = param.detach().clone()
    optimizer = info.optim_cls([param], **kwargs_of(given))
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.equal(param, before)
    assert optimizer.state[param]


@each_input
def test_step_is_noop_for_empty_params(info, given):
    param = nn.Parameter(torch.empty(0, 3))
    optimizer = info.optim_cls([param], **kwargs_of(given))
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert param.shape == (0, 3)


@each
def test_param_groups_lr_and_weight_decay(info):
    weight, bias, vector = problem()
    still = bias.detach().clone()
    optimizer = info.optim_cls(
        [{"params": [weight]}, {"params": [bias], "lr": 0.0}], weight_decay=0.01
    )
    closure = closure_of(optimizer, weight, bias, vector)
    start = closure().item()
    run(optimizer, closure, 20)
    assert closure().item() < start
    assert torch.equal(bias, still)


@each_input
def test_state_dict_deterministic(info, given):
    weight, bias, vector = problem()
    optimizer = info.optim_cls([weight, bias], **kwargs_of(given))
    run(optimizer, closure_of(optimizer, weight, bias, vector), 3)
    twins = copy.deepcopy(weight), copy.deepcopy(bias)
    twin = info.optim_cls(twins, **kwargs_of(given))
    saved = copy.deepcopy(optimizer.state_dict())
    again = copy.deepcopy(saved)
    twin.load_state_dict(again)
    torch.testing.assert_close(again, saved, rtol=0, atol=0)  # loading changed nothing
    for _ in range(3):
        run(optimizer, closure_of(optimizer, weight, bias, vector), 1)
        run(twin, closure_of(twin, *twins, vector), 1)
        assert torch.equal(weight, twins[0]) and torch.equal(bias, twins[1])
    torch.testing.assert_close(optimizer.state_dict(), twin.state_dict(), rtol=0, atol=0)
    twin.param_groups.extend(twin.param_groups)  # repeated parameters have the same index
    ours, theirs = optimizer.state_dict(), twin.state_dict()
    torch.testing.assert_close(ours["param_groups"][0], theirs["param_groups"][-1])
    torch.testing.assert_close(ours["state"], theirs["state"], rtol=0, atol=0)


@each_input
def test_save_load_equality_with_weights_only(info, given, tmp_path):
    weight, bias, vector = problem()
    optimizer = info.optim_cls([weight, bias], **kwargs_of(given))
    run(optimizer, closure_of(optimizer, weight, bias, vector), 3)
    saved = optimizer.state_dict()
    torch.save(saved, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.testing.assert_close(loaded, saved, rtol=0, atol=0)
    optimizer.load_state_dict(loaded)


@each_input
def test_load_nontensor_step(info, given):
    weight, bias, vector = problem()
    optimizer = info.optim_cls([weight, bias], **kwargs_of(given))
    closure = closure_of(optimizer, weight, bias, vector)
    run(optimizer, closure, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = state["step"].item()
    optimizer.load_state_dict(saved)
    run(optimizer, closure, 1)
    assert {float(state["step"]) for state in optimizer.state.values()} == {4.0}


@each
def test_can_load_from_to_named_state_dict(info):
    weight, bias, vector = problem()
    for named_from in (False, True):
        for named_to in (False, True):
            params = [[weight, bias], [("weight", weight), ("bias", bias)]]
            source = info.optim_cls(params[named_from])
            run(source, closure_of(source, weight, bias, vector), 2)
            target = info.optim_cls(params[named_to])
            target.load_state_dict(copy.deepcopy(source.state_dict()))
            run(target, closure_of(target, weight, bias, vector), 1)
            names = target.param_groups[0].get("param_names")
            assert names == (["weight", "bias"] if named_from or named_to else None)


@each
def test_state_dict_hooks_run_in_their_order(info):
    optimizer, order = info.optim_cls([nn.Parameter(torch.ones(2, 2))]), []

    def hook(name):
        return lambda *_: order.append(name)

    optimizer.register_state_dict_pre_hook(hook("save before"))
    optimizer.register_state_dict_post_hook(hook("save after"))
    optimizer.register_state_dict_post_hook(hook("save after, first"), prepend=True)
    optimizer.register_load_state_dict_pre_hook(hook("load before"))
    optimizer.register_load_state_dict_pre_hook(hook("load before, first"), prepend=True)
    optimizer.register_load_state_dict_post_hook(hook("load after"))
    optimizer.register_load_state_dict_post_hook(hook("load after, first"), prepend=True)
    optimizer.load_state_dict(optimizer.state_dict())
    assert order == [
        "save before", "save after, first", "save after",
        "load before, first", "load before", "load after, first", "load after",
    ]  # fmt: skip


@each
def test_a_post_hook_of_state_dict_may_replace_it(info):
    optimizer = info.optim_cls([nn.Parameter(torch.ones(2, 2))])
    optimizer.register_state_dict_post_hook(lambda _, found: {**found, "test": True})
    assert optimizer.state_dict()["test"]


@each
def test_step_hooks(info):
    param, seen = nn.Parameter(torch.ones(2, 2)), []
    optimizer = info.optim_cls([param])
    before = optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    after = optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    param.grad = torch.ones_like(param)
    optimizer.step()
    before.remove()
    after.remove()
    optimizer.step()
    assert seen == ["before", "after"]


@each_input
def test_deepcopy_copies_all_public_attrs(info, given):
    optimizer = info.optim_cls([nn.Parameter(torch.ones(2, 2))], **kwargs_of(given))

    def public(thing):
        return {name for name in thing.__dict__ if not name.startswith("_")}

    assert public(optimizer) == public(copy.deepcopy(optimizer))
    assert repr(optimizer) == repr(copy.deepcopy(optimizer))


@each_input
def test_non_empty_state(info, given):
    weight, bias, vector = problem()
    optimizer = info.optim_cls([weight, bias], **kwargs_of(given))
    run(optimizer, closure_of(optimizer, weight, bias, vector), 1)
    assert all(optimizer.state[param] for param in (weight, bias))


# Two of them look for a momentum unless cycle_momentum=False, as with any optimizer without one.
SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.3, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0, 2, cycle_momentum=False),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1.0, 8, cycle_momentum=False),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.3, anneal_epochs=3),
}


def test_no_scheduler_of_torch_is_left_out():
    known = {
        name
        for name, value in vars(lr_scheduler).items()
        if isinstance(value, type) and issubclass(value, lr_scheduler.LRScheduler)
    }
    assert known - {"LRScheduler", "_LRScheduler"} <= SCHEDULERS.keys()


def scheduled(info, name, lr, steps, resume_at=None):
    """The loss after each step of a run, and the rates."""
    torch.manual_seed(0)
    weight, bias, vector = problem()
    optimizer = info.optim_cls([weight, bias], lr=lr)
    scheduler = SCHEDULERS[name](optimizer)
    losses, rates = [], []
    for step in range(steps):
        if step == resume_at:
            saved = copy.deepcopy([optimizer.state_dict(), scheduler.state_dict()])
            optimizer = info.optim_cls([weight, bias], lr=lr)
            scheduler = SCHEDULERS[name](optimizer)
            optimizer.load_state_dict(saved[0])
            scheduler.load_state_dict(saved[1])
        loss = optimizer.step(closure_of(optimizer, weight, bias, vector))
        rates.append(float(optimizer.param_groups[0]["lr"]))
        losses.append(loss.item())
        scheduler.step(losses[-1]) if name == "ReduceLROnPlateau" else scheduler.step()
    return losses, rates


def rates_of_sgd(name, lr, losses):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=lr)
    scheduler, rates = SCHEDULERS[name](optimizer), []
    for loss in losses:
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step(loss) if name == "ReduceLROnPlateau" else scheduler.step()
    return rates


@pytest.mark.parametrize("name", SCHEDULERS)
@each
def test_every_scheduler_sets_the_rate_as_for_torchs_sgd(info, name):
    losses, rates = scheduled(info, name, 1.0, 8)
    assert rates == pytest.approx(rates_of_sgd(name, 1.0, losses))
    assert losses[-1] < losses[0]
    assert len(set(rates)) > 1


@pytest.mark.parametrize("name", SCHEDULERS)
@each
def test_every_scheduler_works_on_a_tensor_and_resumes(info, name):
    losses, rates = scheduled(info, name, 1.0, 8)
    by_tensor, tensor_rates = scheduled(info, name, torch.tensor([1.0]), 8)
    wanted = rates_of_sgd(name, torch.tensor([1.0]), by_tensor)
    assert tensor_rates == pytest.approx(wanted, abs=1e-6)
    # SequentialLR of torch 2.9 writes to a tensor that it has kept: SGD's rates differ from those
    # of a number, too
    if name != "SequentialLR" or wanted == pytest.approx(rates, abs=1e-6):
        assert tensor_rates == pytest.approx(rates, abs=1e-6)
        assert by_tensor == pytest.approx(losses, rel=1e-3, abs=1e-6)
    if name not in ("SequentialLR",):  # torch's own steps once more when it is made anew
        resumed, _ = scheduled(info, name, 1.0, 8, resume_at=4)
        assert resumed == losses


@pytest.mark.parametrize("average", ["swa", "ema"])
@each
def test_averaged_models_average_what_the_optimizer_reached(info, average):
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    optimizer = info.optim_cls(net.parameters())
    decay = 0.5
    options = {} if average == "swa" else {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(decay)}
    averaged = swa_utils.AveragedModel(net, **options)
    scheduler = swa_utils.SWALR(optimizer, 0.3, anneal_epochs=3)
    batches = [torch.randn(16, 4) for _ in range(5)]
    wanted = None
    for count, batch in enumerate(batches):
        optimizer.zero_grad()
        net(batch).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(net)
        scheduler.step()
        reached = [param.detach().clone() for param in net.parameters()]
        share = 1 / (count + 1) if average == "swa" else 1 - decay
        wanted = (
            reached
            if wanted is None
            else [old + share * (new - old) for old, new in zip(wanted, reached)]
        )
    for param, value in zip(averaged.module.parameters(), wanted):
        torch.testing.assert_close(param.detach(), value)
    swa_utils.update_bn(batches, averaged)
    assert all(math.isfinite(float(value.sum())) for value in averaged.module.state_dict().values())
