"""The same on a CUDA device; run with ``-m gpu`` where there is one."""

import copy
import warnings

import pytest
import torch
from rnnopt.rules.features import RunningMaxima
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


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_without_a_safeguard_does_not_wait_for_the_gpu(fused):
    net, rule = nn.Linear(4, 4).cuda(), random_lstm().cuda()
    optimizer = LearnedOptimizer(net.parameters(), rule, fused=fused, guard=False)
    train(net, optimizer, 1)
    net(torch.ones(1, 4, device="cuda")).sum().backward()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        try:
            torch.cuda.set_sync_debug_mode("error")
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


SHAPES = [(37, 53), (5,), (1,), (512,), (0,), (3, 11_000)]


def twins(dtype=torch.float32, hidden_size=8, **options):
    """The same parameters twice on the GPU, with a fused and a plain optimizer."""
    ours = [(torch.randn(s) * 0.05).cuda().to(dtype).requires_grad_() for s in SHAPES]
    theirs = [param.detach().clone().requires_grad_() for param in ours]
    rule = random_lstm(coordinate_units=hidden_size).cuda()
    return (
        LearnedOptimizer(ours, rule, fused=True, guard=False, **options),
        LearnedOptimizer(theirs, rule, fused=False, guard=False, **options),
    )


def params_of(optimizer):
    return optimizer.param_groups[0]["params"]


def walk(optimizers, steps=20, spoil=lambda grad, step: None):
    generator = torch.Generator("cuda").manual_seed(2)
    for step in range(steps):
        for params in zip(*map(params_of, optimizers)):
            grad = 1e-3 * torch.randn(params[0].shape, generator=generator, device="cuda")
            spoil(grad.view(-1), step)
            for param in params:
                param.grad = grad.to(param.dtype)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("hidden_size", [0, 1, 8, 13, 64])
@pytest.mark.parametrize(
    "options", [{}, {"lr": 0.5, "weight_decay": 0.3}], ids=["plain", "decayed"]
)
def test_20_steps_of_the_kernel_are_those_of_the_plain_rule(hidden_size, options):
    fused, plain = twins(hidden_size=hidden_size, **options)

    def spoil(grad, step):
        grad[700:1600] = 0
        if step == 1:
            grad[-1:], grad[-2:-1] = float("nan"), float("inf")

    walk((fused, plain), spoil=spoil)
    for ours, theirs in zip(params_of(fused), params_of(plain)):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        for name in ("m", "v", "step", *RunningMaxima._fields):
            one, other = fused.state[ours][name], plain.state[theirs][name]
            if ours.numel():
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_are_rounded_once_by_the_kernel(dtype):
    fused, plain = twins(dtype, lr=10.0)
    walk((fused, plain), steps=3)
    for ours, theirs in zip(params_of(fused), params_of(plain)):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4)
    big = params_of(fused)[-1], params_of(plain)[-1]
    assert (big[0] == big[1]).float().mean() > 0.99  # but for ties, see test_kernel_cuda.py


def test_the_kernel_keeps_bfloat16_state_as_the_plain_rule_does():
    fused, plain = twins(lr=0.1, state_dtype=torch.bfloat16)
    _, exact = twins(lr=0.1)
    with torch.no_grad():
        for ours, theirs in zip(params_of(plain), params_of(exact)):
            theirs.copy_(ours)
    exact.rule = plain.rule
    walk((fused, plain, exact))
    ours, theirs, full = (params_of(each)[-1] for each in (fused, plain, exact))
    assert fused.state[ours]["cell"].dtype == torch.bfloat16
    assert (ours - theirs).norm() / (theirs - full).norm() < 0.3


def test_rows_that_never_had_a_gradient_do_not_change_on_the_gpu():
    fused, _ = twins()
    param = params_of(fused)[-1]
    before = param.detach().clone()

    def spoil(grad, step):
        grad[1000:] = 0

    walk((fused,), 3, spoil)
    assert torch.equal(param.view(-1)[1000:], before.view(-1)[1000:])
    assert not fused.state[param]["cell"][:, 1000:].any()


def test_the_kernel_repeats_itself_to_the_bit():
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(twins(lr=0.1)[0])
    walk(runs, 5)
    for ours, theirs in zip(*map(params_of, runs)):
        assert torch.equal(ours, theirs)


def test_the_kernel_allocates_nothing_that_stays_or_grows_with_the_model():
    param = torch.zeros(8_000_000, device="cuda", requires_grad=True)
    optimizer = LearnedOptimizer([param], random_lstm().cuda(), fused=True, guard=False)
    param.grad = torch.ones_like(param)
    for _ in range(2):
        optimizer.step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        optimizer.step()
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() - before < 2**20  # the plain rule takes 100 times it


def test_a_rule_on_the_cpu_steps_parameters_on_the_gpu_plainly():
    params = [torch.ones(5, device="cuda", requires_grad=True), torch.ones(5, requires_grad=True)]
    for rule in (random_lstm(), random_lstm().cuda()):
        optimizer = LearnedOptimizer(params, rule)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    torch.testing.assert_close(params[0].cpu(), params[1], rtol=0, atol=1e-6)


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
