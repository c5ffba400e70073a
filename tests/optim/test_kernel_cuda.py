"""The Triton kernel equals the plain rule to 1e-6; here on a CPU, in Triton's interpreter.

The interpreter is chosen when Triton is first imported, so these tests run in a process of their
own, which the first one starts. For a GPU see test_gpu.py.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from rule_table import random_lstm
from test_kernel_cpu import assert_same, params_of, twins, walk

from rnnopt import LearnedOptimizer
from rnnopt.optim import optimizer
from rnnopt.optim.kernels import choice as kernels
from rnnopt.optim.kernels import fused
from rnnopt.rules.features import RunningMaxima, tensor_statistics

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="runs in a process of its own, with Triton's interpreter"
)
SHAPES = [(23, 29), (5,), (0,)]  # in blocks of 512 coordinates: a whole one, partial ones, none


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_all_of_this_file_passes_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 skipped" in done.stdout


@pytest.fixture
def triton_step(monkeypatch):
    """Make optimizers with `fused` use the Triton kernel, though their tensors are on the CPU."""
    from triton.runtime import interpreter

    from rnnopt.optim.kernels import cuda

    exact = interpreter._convert_float

    def rounded_to_nearest(values, source, target, mode):
        """A GPU rounds to bfloat16 as torch does; the interpreter cuts (triton 3.9)."""
        if target.name != "bf16":
            return exact(values, source, target, mode)
        rounded = torch.from_numpy(values.copy()).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view("uint16")

    monkeypatch.setattr(optimizer, "fused_step", cuda.TritonStep)
    monkeypatch.setattr(interpreter, "_convert_float", rounded_to_nearest)
    return cuda


@interpreted
@pytest.mark.parametrize(
    ("hidden_size", "options", "steps"),
    [
        (8, {}, 20),
        (0, {}, 20),
        (3, {"lr": 0.5, "weight_decay": 0.3}, 20),
        (13, {}, 2),
    ],
    ids=["default size", "no LSTM, orthogonalized", "decayed", "fewer coordinates to a thread"],
)
def test_steps_equal_those_of_the_plain_rule(triton_step, hidden_size, options, steps):
    rule = random_lstm(hidden_size=hidden_size, orthogonalize=hidden_size == 0)
    ours, plain = twins(SHAPES, rule, **options)
    start = [param.detach().clone() for param in params_of(plain)]
    walk((ours, plain), steps)
    assert_same(ours, plain, atol=1e-6)
    moved = [(p - q).abs().max() for p, q in zip(params_of(plain), start) if p.numel()]
    assert min(moved) > 3e-5 * steps
    for one, other in zip(params_of(ours)[:2], params_of(plain)[:2]):
        for name in ("m", "v", "step", *RunningMaxima._fields):
            torch.testing.assert_close(
                ours.state[one][name], plain.state[other][name], rtol=1e-4, atol=1e-9
            )


@interpreted
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_coordinates_without_a_finite_gradient_keep_value_and_state(triton_step, scale):
    ours, plain = twins([(7, 90)], random_lstm(hidden_size=2), lr=0.1, weight_decay=0.1)

    def spoil(grad, step):
        grad[0] = 0
        if step == 1:
            grad[1], grad[2], grad[3] = float("nan"), float("inf"), -float("inf")

    walk((ours, plain), 1, scale, spoil)
    (param,) = params_of(ours)
    before = param.detach().clone(), {k: v.clone() for k, v in ours.state[param].items()}
    walk((ours, plain), 1, scale, lambda grad, step: spoil(grad, 1))
    assert_same(ours, plain, atol=1e-6)
    assert torch.equal(param[1:4], before[0][1:4])
    for name in ("m", "v", "hidden", "cell"):
        now, then = (
            x.reshape(-1, 7, 90)[:, 1:4] for x in (ours.state[param][name], before[1][name])
        )
        assert torch.equal(now, then)
    walk((ours, plain), 2, scale, spoil)
    assert_same(ours, plain, atol=1e-6)


@interpreted
def test_a_nan_parameter_makes_its_tensor_nan_as_in_the_plain_rule(triton_step):
    ours, plain = twins([(9,), (5,)], random_lstm(hidden_size=2))
    with torch.no_grad():
        for each in (ours, plain):
            params_of(each)[0][3] = float("nan")
    walk((ours, plain), 2)
    for one, other in zip(params_of(ours), params_of(plain)):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6, equal_nan=True)
    assert params_of(plain)[0].isnan().all()


@interpreted
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_blocks_that_never_had_a_gradient_are_not_written(triton_step, weight_decay):
    ours, plain = twins([(4, 512)], random_lstm(hidden_size=2), weight_decay=weight_decay)
    params = params_of(ours) + params_of(plain)
    before = params[0].detach().clone()
    for step in range(2):
        for each, param in zip((ours, plain), params):
            param.grad = torch.zeros_like(param)
            param.grad[0] = 1
            each.step()
        hidden = ours.state[params[0]]["hidden"].reshape(2, 4, 512)
        if step == 0:
            hidden[:, 2] = 7.0  # a step that read it would change it
    assert (hidden[:, 2] == 7).all() and not hidden[:, 1].any() and hidden[:, 0].all()
    assert torch.equal(params[0][1:], before[1:]) == (weight_decay == 0)
    assert_same(ours, plain, atol=1e-7)


@interpreted
def test_bfloat16_state_follows_the_plain_rule(triton_step):
    rule = random_lstm(hidden_size=3)
    ours, plain = twins(SHAPES[:1], rule, lr=0.1, state_dtype=torch.bfloat16)
    _, exact = twins(SHAPES[:1], rule, lr=0.1)
    walk((ours, plain, exact), 8)
    (param,), (theirs,), (full,) = (params_of(each) for each in (ours, plain, exact))
    assert ours.state[param]["hidden"].dtype == torch.bfloat16
    assert (param - theirs).norm() / (theirs - full).norm() < 0.3


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_are_rounded_once(triton_step, dtype):
    start = torch.randn(700).to(dtype)
    results = []
    for fused_option in (True, False):
        params = [start.clone().requires_grad_(), start[:3].float().requires_grad_()]
        mine = LearnedOptimizer(params, random_lstm(hidden_size=2), fused=fused_option)
        for step in range(3):
            for param in params:
                param.grad = torch.full_like(param, 0.01 * (step + 1))
            mine.step()
        results.append(params)
    (half, single), (plain_half, plain_single) = results
    # but for a last bit where two almost equal numbers lie on either side of a tie
    assert (half == plain_half).float().mean() > 0.99 and (half != start).any()
    torch.testing.assert_close(single, plain_single, rtol=0, atol=1e-6)


@interpreted
def test_statistics_are_right_and_deterministic(triton_step):
    ours, _ = twins([(3, 1500), (0,), (40,)], random_lstm(hidden_size=2))
    walk((ours,), 1)
    states = [ours.state[param] for param in params_of(ours)]
    pieces = [
        fused.Piece(param.detach(), param.grad, state, 1.0, 0.0)
        for param, state in zip(params_of(ours), states)
    ]
    table = torch.from_numpy(
        fused.tensor_table(
            ours.rule, pieces, [piece.grad for piece in pieces], triton_step.LAYOUT
        ).view("int64")
    )
    counts, types = (4500, 0, 40), [triton_step.TYPES[torch.float32]] * 3
    first, second = (triton_step._statistics(table, counts, types) for _ in range(2))
    expected = torch.stack(
        [
            tensor_statistics(
                piece.grad.flatten(),
                piece.state["m"],
                piece.param.flatten(),
                piece.state["matrix"],
            )
            for piece in pieces
        ]
    )[:, :-1]
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-12)
    assert torch.equal(first, second)


@interpreted
def test_the_reason_why_there_is_no_kernel(triton_step):
    cpu = torch.device("cpu")
    assert triton_step.problem(2, cpu) is None
    assert (
        triton_step.problem(65, cpu) == "hidden_size=65, and the kernel for GPUs takes 64 at most"
    )


def test_without_triton_it_warns_once_and_there_is_no_kernel(monkeypatch):
    import rnnopt

    monkeypatch.setitem(sys.modules, "rnnopt.optim.kernels.cuda", None)
    monkeypatch.delattr(rnnopt.optim.kernels, "cuda", raising=False)
    kernels._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="could not be compiled.*; install triton") as seen:
        assert kernels._triton_step(random_lstm()) is None
        assert kernels._triton_step(random_lstm()) is None
    assert len(seen) == 1


def test_a_kernel_supports_only_tensors_on_its_device():
    param = torch.zeros(3)
    piece = fused.Piece(param, param.clone(), random_lstm().init_state(param), 1.0, 0.0)
    single = (torch.float32,)
    assert piece.fits(torch.device("cpu"), single)
    assert not piece.fits(torch.device("cuda", 0), single)
    piece.grad = param.to("meta")
    assert not piece.fits(torch.device("cpu"), single)
    piece.grad = param.half()
    assert not piece.fits(torch.device("cpu"), single)
    assert piece.fits(torch.device("cpu"), (*single, torch.float16))
