"""The Triton kernels of `TwoLevelLSTM` equal the plain rule, to rounding.

Every test stands twice: on a CPU in Triton's interpreter, and on a GPU with the marker `gpu`. The
interpreter is chosen when Triton is first imported, so its tests run in a process of their own,
which the first one starts.
"""

import copy
import importlib.util
import os
import subprocess
import sys
import warnings

import pytest
import torch
from kernel_twins import assert_equal, params_of
from rule_table import random_lstm
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from rnnopt import LearnedOptimizer
from rnnopt.optim import optimizer as optimizer_module
from rnnopt.optim import safeguard
from rnnopt.optim.kernels import choice
from rnnopt.optim.kernels.fused import Piece
from rnnopt.optim.safeguard import LAST_STEP, LastStep, init_guard_state, loss_rise, taken_by
from rnnopt.rules.two_level import WIDEST

# the interpreter computes with numpy, which warns where a GPU makes a NaN
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="runs in a process of its own, with Triton's interpreter"
)
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICES = [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=on_gpu)]
everywhere = pytest.mark.parametrize("device", DEVICES, indirect=True)
gpu_only = pytest.mark.parametrize("device", DEVICES[1:], indirect=True)

# a narrow matrix, which has orthogonalised directions; one without, in more than one block; a
# vector, a scalar, an empty tensor, and a tensor of three dimensions
SHAPES = [(37, 12), (65, 66), (5,), (), (0,), (4, 3, 7)]


@pytest.mark.slow  # 15 s
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
    assert " passed" in done.stdout and "skipped" not in done.stdout


@pytest.fixture
def device(request, monkeypatch):
    """The device's name; optimizers with `fused` use the Triton kernels on it."""
    if request.param == "cpu":
        from triton.runtime import interpreter

        from rnnopt.optim.kernels import two_level_cuda
        from rnnopt.optim.kernels.two_level_triton import measure_block

        exact = interpreter._convert_float

        def rounded_to_nearest(values, source, target, mode):
            """A GPU rounds to bfloat16 as torch does; the interpreter cuts (triton 3.8)."""
            if target.name != "bf16":
                return exact(values, source, target, mode)
            rounded = torch.from_numpy(values.copy()).to(torch.bfloat16)
            return rounded.view(torch.int16).numpy().view("uint16")

        monkeypatch.setattr(interpreter, "_convert_float", rounded_to_nearest)
        called = interpreter.InterpretedFunction.__call__

        def call(function, *args, **options):
            """A function that a kernel calls patches Triton once more: half of the time."""
            if function.fn.__module__ != measure_block.fn.__module__:
                return called(function, *args, **options)
            return function.rewrite()(*args, **options)

        monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
        launched = interpreter.GridExecutor.__call__

        def launch(*args, **options):
            with _disable_current_modes():  # a launch is none of torch's operations
                return launched(*args, **options)

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
        # every operation takes the interpreter as long, whatever its size; two tiles to a block
        for name, value in {"_LANES": 1024, "_TILES": 2, "_STEP_TILE": 1024}.items():
            monkeypatch.setattr(two_level_cuda, name, value)
        monkeypatch.setattr(optimizer_module, "fused_step", two_level_cuda.TritonStep)
    return request.param


def twins(device, units=2, shapes=SHAPES, dtype=torch.float32, **options):
    """The same parameters twice, with a fused and a plain optimizer."""
    torch.manual_seed(0)
    ours = [(torch.randn(shape) * 0.05).to(device, dtype).requires_grad_() for shape in shapes]
    theirs = [param.detach().clone().requires_grad_() for param in ours]
    rule = random_lstm(coordinate_units=units).to(device)
    options.setdefault("guard", False)
    fused = LearnedOptimizer(ours, rule, fused=True, **options)
    return fused, LearnedOptimizer(theirs, copy.deepcopy(rule), fused=False, **options)


def walk(optimizers, steps=3, scale=0.1, spoil=lambda grad, step: None):
    """Feed all of them the same gradients."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for params in zip(*map(params_of, optimizers)):
            noise = torch.randn(params[0].shape, generator=generator)
            grad = scale * (noise + params[0].detach().float().cpu())
            spoil(grad.reshape(-1), step)
            for param in params:
                param.grad = grad.to(param.device, param.dtype)
        for optimizer in optimizers:
            optimizer.step()


@everywhere
@pytest.mark.parametrize(
    ("units", "options"),
    [(4, {}), (1, {"lr": 0.5, "weight_decay": 0.3, "guard": True}), (0, {}), (9, {})],
    ids=["as shipped", "decayed, guarded", "no LSTM", "more units"],
)
def test_steps_of_the_kernel_are_those_of_the_plain_rule(device, units, options):
    shapes = SHAPES if units < 9 else SHAPES[:1]
    fused, plain = twins(device, units, shapes, **options)

    def spoil(grad, step):
        grad[300:1600] = 0  # never a gradient
        if step == 1:
            grad[-1:], grad[-2:-1], grad[-3:-2] = float("nan"), float("inf"), -float("inf")

    start = [param.detach().clone() for param in params_of(plain)]
    walk((fused, plain), spoil=spoil)
    assert_equal(fused, plain)
    moved = [(p - q).abs().max() for p, q in zip(params_of(plain), start) if p.numel()]
    assert min(moved) > 1e-3  # so that the tolerance is strict


@everywhere
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e14])
def test_gradients_of_any_size(device, scale):
    fused, plain = twins(device, shapes=[(30, 7)])
    walk((fused, plain), steps=2, scale=scale)
    assert_equal(fused, plain)


@everywhere
def test_coordinates_without_a_finite_gradient_keep_value_and_state_exactly(device):
    fused, _ = twins(device, shapes=[(7, 90)], weight_decay=0.1)
    walk((fused,), 1)
    (param,) = params_of(fused)
    before = param.detach().clone(), {k: v.clone() for k, v in fused.state[param].items()}

    def spoil(grad, step):
        grad[90:180], grad[180:270], grad[270:360] = float("nan"), float("inf"), -float("inf")

    walk((fused,), 1, spoil=spoil)
    assert torch.equal(param[1:4], before[0][1:4])
    assert (param[4:] != before[0][4:]).any()
    for name in ("m", "v", "change", "cell"):
        now, then = (x.reshape(-1, 7, 90) for x in (fused.state[param][name], before[1][name]))
        assert torch.equal(now[:, 1:4], then[:, 1:4])
        assert (now[:, 4:] != then[:, 4:]).any()


@everywhere
def test_gradients_that_are_all_zero_move_nothing(device):
    fused, plain = twins(device, shapes=[(9, 9), (5,)])

    def spoil(grad, step):
        if step == 1 or len(grad) == 5:
            grad.zero_()

    walk((fused, plain), 3, spoil=spoil)
    assert_equal(fused, plain)
    still = params_of(fused)[1]
    assert not any(fused.state[still][name].any() for name in ("m", "v", "change", "cell"))


@everywhere
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_tiles_that_never_had_a_gradient_are_not_written(device, weight_decay):
    fused, plain = twins(device, shapes=[(4, 2048)], weight_decay=weight_decay)
    (param,) = params_of(fused)
    before = param.detach().clone()

    def spoil(grad, step):
        grad[2048:] = 0
        if step == 1:
            cell = fused.state[param]["cell"].view(2, 4, 2048)
            cell[:, 2] = 7.0  # a step that read it would change it

    walk((fused,), 2, spoil=spoil)
    cell = fused.state[param]["cell"].view(2, 4, 2048)
    assert (cell[:, 2] == 7).all() and not cell[:, 1].any() and cell[:, 0].all()
    walk((plain,), 2, spoil=lambda grad, step: grad[2048:].zero_())
    torch.testing.assert_close(param, params_of(plain)[0], rtol=0, atol=2e-6)
    assert torch.equal(param[1:], before[1:]) == (weight_decay == 0)


@everywhere
def test_wide_matrices_have_no_cell_in_the_kernel_either(device, monkeypatch):
    monkeypatch.setattr("rnnopt.rules.two_level.WIDEST", 60)  # the interpreter is slow
    assert WIDEST > 60
    fused, plain = twins(device, shapes=[(65, 66), (9,)])
    walk((fused, plain), 2)
    assert fused.state[params_of(fused)[0]]["cell"].shape == (0, 65 * 66)
    assert_equal(fused, plain)


@everywhere
def test_a_nan_parameter_makes_its_model_nan_as_in_the_plain_rule(device):
    fused, plain = twins(device, shapes=[(9,), (5,)])
    with torch.no_grad():
        for each in (fused, plain):
            params_of(each)[0][3] = float("nan")
    walk((fused, plain), 2)
    for ours, theirs in zip(params_of(fused), params_of(plain)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6, equal_nan=True)
    assert params_of(plain)[0].isnan().all()


@everywhere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_are_rounded_once(device, dtype):
    """Beside parameters in full precision, which another launch takes."""
    fused, plain = twins(device, shapes=[(30, 20), (7,)], dtype=dtype)
    single = [torch.ones(3, device=device, requires_grad=True) for _ in range(2)]
    for optimizer, more in zip((fused, plain), single):
        optimizer.add_param_group({"params": [more]})
        more.grad = torch.full_like(more, 0.01)
    start = params_of(fused)[0].detach().clone()
    walk((fused, plain), 2)
    ours, theirs = params_of(fused)[0], params_of(plain)[0]
    # but for a last bit where two almost equal numbers lie on either side of a tie
    assert (ours == theirs).float().mean() > 0.99 and (ours != start).any()
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(*single, rtol=1e-4, atol=1e-5)
    assert all(leaf.dtype == torch.float32 for leaf in fused.state[ours].values())


@everywhere
def test_the_kernel_repeats_itself_to_the_bit(device):
    first, second = (twins(device, shapes=SHAPES[:2])[0] for _ in range(2))
    walk((first, second), 2)
    for ours, theirs in zip(params_of(first), params_of(second)):
        assert torch.equal(ours, theirs)


@everywhere
def test_the_statistics_are_those_of_the_plain_rule(device):
    from rnnopt.optim.kernels.two_level_cuda import TritonStep

    fused, _ = twins(device, shapes=[(3, 1500), (0,), (40,)])
    walk((fused,), 1)
    pieces = [
        Piece(param.detach(), param.grad, fused.state[param], 1.0, 0.0)
        for param in params_of(fused)
    ]
    expected = [fused.rule.statistics(p.grad.flatten(), p.state, p.param.flatten()) for p in pieces]
    found = TritonStep(fused.rule).measure(pieces).statistics
    torch.testing.assert_close(found, torch.stack(expected), rtol=2e-5, atol=1e-6)


def guarded(device, dtype, spoilt):
    """Work of the guard, with a last step and an update, and what of it its kernel takes."""
    from rnnopt.optim.kernels.guard_triton import TritonGuard

    generator = torch.Generator().manual_seed(0)
    work, states = [], []
    for shape in [(5000,), (2048,), (), (0,), (3, 7)]:
        param = torch.zeros(shape, device=device, dtype=dtype)
        grad, step, update = (torch.randn(shape, generator=generator).flatten() for _ in range(3))
        if spoilt:
            grad[-1:], grad[:3], step[1:2] = float("nan"), float("inf"), 0.0
        state = init_guard_state(param) | {"change": update.to(device)}
        state[LAST_STEP].copy_(step)
        state["last_slope"].fill_(0.5)
        work.append(({"lr": 0.3 + len(work)}, param, grad.view(shape).to(param)))
        states.append(state)
    single = torch.zeros(4, device=device, dtype=torch.float64)  # no kernel takes it
    work.append(({"lr": 1.0}, single, torch.ones_like(single)))
    states.append(init_guard_state(single) | {"change": single + 2})
    taken = taken_by(TritonGuard(work[0][1].device), work, states)
    assert taken.batches == [[0, 1, 2, 3, 4]]
    return work, states, taken


@everywhere
@pytest.mark.parametrize("spoilt", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_rise_by_the_kernel_is_that_without_it(device, dtype, spoilt):
    work, states, taken = guarded(device, dtype, spoilt)
    ours, theirs = (loss_rise(work, states, taken=each) for each in (taken, None))
    assert ours[1] == theirs[1] == (not spoilt)
    assert (ours[0], ours[2]) == pytest.approx((theirs[0], theirs[2]), rel=1e-4, abs=1e-3)


@everywhere
def test_without_a_finite_gradient_the_rise_is_infinite_by_the_kernel_too(device):
    work, states, taken = guarded(device, torch.float32, True)
    for _, _, grad in work:
        grad.fill_(float("nan"))
    assert loss_rise(work, states, taken=taken) == (float("inf"), False, 0.0)


@everywhere
@pytest.mark.parametrize("spoilt", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_step_that_the_kernel_keeps_is_that_without_it(device, dtype, spoilt):
    kept = []
    for with_kernel in (True, False):
        work, states, taken = guarded(device, dtype, spoilt)
        last = LastStep(
            work, states, not spoilt, "change", lambda lr: lr / 2, taken if with_kernel else None
        )
        for rows in ([4, 0, 3], [1, 2, 5]):
            with last.recorded(rows):
                pass
        last.finish({})
        kept.append(states)
    for ours, theirs in zip(*kept):
        assert torch.equal(ours[LAST_STEP], theirs[LAST_STEP])
        torch.testing.assert_close(ours["last_slope"], theirs["last_slope"], rtol=1e-4, atol=1e-3)


@everywhere
def test_the_guard_takes_tensors_by_its_kernel_where_the_step_has_one(device, monkeypatch):
    from rnnopt.optim.kernels.guard_triton import TritonGuard

    fused, plain = twins(device, shapes=[(40, 30), (5,)], guard=True)
    walk((fused, plain), 2)
    called = []
    for name in ("ends", "keep"):
        method = getattr(TritonGuard, name)
        monkeypatch.setattr(
            TritonGuard, name, lambda *a, _m=method, _n=name: called.append(_n) or _m(*a)
        )
    walk((plain,), 1)
    assert called == []
    walk((fused,), 1)
    assert called == ["ends", "keep"]


class Operations(TorchDispatchMode):
    """Counts torch's operations."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def operations_of(optimizer):
    """How many operations of torch its next step takes; launches of kernels do not count."""
    with Operations() as seen:
        optimizer.step()
    return seen.count


@everywhere
@pytest.mark.parametrize("guard", [False, True])
def test_a_step_has_as_many_operations_whatever_the_size_of_a_tensor(device, guard, monkeypatch):
    for name in ("_CHUNK", "_CHUNK_ELSEWHERE"):
        monkeypatch.setattr(safeguard, name, 1000)
    counts = []
    for size in (10, 10_000):
        fused, _ = twins(device, shapes=[(size,)], guard=guard)
        walk((fused,), 2)
        counts.append(operations_of(fused))
    assert counts[0] == counts[1]


@everywhere
@pytest.mark.parametrize("guard", [False, True])
def test_a_step_has_as_many_operations_whatever_the_number_of_tensors(device, guard):
    counts = []
    for tensors in (2, 8):
        fused, _ = twins(device, shapes=[(4, 3), *[(9,)] * tensors], guard=guard)
        walk((fused,), 2)
        counts.append(operations_of(fused))
    assert counts[0] == counts[1]


@everywhere
def test_a_step_that_ruins_the_model_is_undone_by_the_kernel_as_without_it(device):
    fused, plain = twins(device, shapes=[(40, 30), (5,)], guard=True, lr=10.0)
    for _ in range(4):
        for optimizer in (fused, plain):
            for param in params_of(optimizer):
                param.grad = 100.0 * param.detach()
            optimizer.step()
        assert fused.undone == plain.undone
        for ours, theirs in zip(params_of(fused), params_of(plain)):
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)  # of steps of 2
    assert fused.undone > 0


@everywhere
def test_it_takes_what_its_pointers_can_bear(device):
    from rnnopt.optim.kernels.two_level_cuda import TritonStep

    rule, param = random_lstm().to(device), torch.zeros(8, 9, device=device)
    step, state = TritonStep(rule), rule.init_state(param)
    assert step.supports(Piece(param, param.half(), state, 1.0, 0.0))
    assert step.supports(Piece(param, param, {**state, "cell": state["cell"][:0]}, 1.0, 0.0))
    wrong = [
        Piece(param.double(), param, state, 1.0, 0.0),
        Piece(param, param.to("meta"), state, 1.0, 0.0),
        Piece(param, param.T, state, 1.0, 0.0),
        Piece(param.T, param.T, state, 1.0, 0.0),
        Piece(param, param, {**state, "m": state["m"].half()}, 1.0, 0.0),
        Piece(param, param, {**state, "m": state["m"][1:]}, 1.0, 0.0),
        Piece(param, param, {**state, "cell": state["cell"][1:]}, 1.0, 0.0),
        Piece(param, param, state, 1.0, 0.0, transform=lambda x: x, whole=False),
    ]
    assert not any(step.supports(piece) for piece in wrong)


@everywhere
def test_the_reason_why_there_is_no_kernel(device):
    from rnnopt.optim.kernels.two_level_cuda import problem

    where = torch.device(device)
    assert problem(2, where) is None and problem(0, where) is None
    assert problem(33, where) == "coordinate_units=33, and the kernel for GPUs takes 32 at most"


def test_without_triton_it_warns_once_and_there_is_no_kernel(monkeypatch):
    import rnnopt

    monkeypatch.setitem(sys.modules, "rnnopt.optim.kernels.two_level_cuda", None)
    monkeypatch.delattr(rnnopt.optim.kernels, "two_level_cuda", raising=False)
    choice._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="could not be compiled.*; install triton") as seen:
        assert choice._triton_step(random_lstm()) is None
        assert choice._triton_step(random_lstm()) is None
    assert len(seen) == 1
    choice._warn_once.cache_clear()


@gpu_only
def test_the_kernel_is_chosen_by_itself(device):
    from rnnopt.optim.kernels.two_level_cuda import TritonStep

    assert isinstance(choice.fused_step(random_lstm().to(device)), TritonStep)
    assert choice.fused_step(random_lstm(torch.float64).to(device)) is None


@gpu_only
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_without_a_guard_does_not_wait_for_the_gpu(device, fused):
    optimizer = twins(device)[not fused]
    walk((optimizer,), 2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        try:
            torch.cuda.set_sync_debug_mode("error")
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@gpu_only
def test_large_tensors_of_20_steps_are_those_of_the_plain_rule(device):
    shapes = [(1100, 1031), (3000, 700), (3, 11_000), (768,), (1,), (0,), (200_001,)]
    fused, plain = twins(device, shapes=shapes, weight_decay=0.1)

    def spoil(grad, step):
        grad[700:16_000] = 0
        if step == 1:
            grad[-1:], grad[-2:-1] = float("nan"), float("inf")

    walk((fused, plain), 20, spoil=spoil)
    for ours, theirs in zip(params_of(fused), params_of(plain)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


@gpu_only
@pytest.mark.parametrize("guard", [False, True])
def test_beside_its_state_a_step_takes_four_bytes_a_coordinate(device, guard):
    fused, _ = twins(device, shapes=[(4_000_000,)], guard=guard)
    fused.param_groups[0]["params"][0].grad = torch.ones(4_000_000, device=device)
    for _ in range(2):
        fused.step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        fused.step()
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() - before < 4 * 4_000_000 + 2**20


@gpu_only
def test_a_rule_on_the_cpu_steps_parameters_on_the_gpu_plainly(device):
    params = [torch.ones(5, device=device, requires_grad=True), torch.ones(5, requires_grad=True)]
    for rule in (random_lstm(), random_lstm().to(device)):
        optimizer = LearnedOptimizer(params, rule)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    torch.testing.assert_close(params[0].cpu(), params[1], rtol=0, atol=2e-6)
