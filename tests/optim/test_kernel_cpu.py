"""The C kernel equals the plain rule to 1e-6; without a kernel the plain rule steps."""

import copy
import subprocess
import sys
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_twins import assert_equal, params_of
from rule_table import random_lstm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rnnopt import LearnedOptimizer, TwoLevelLSTM
from rnnopt.optim.kernels.choice import c_kernel, fused_step
from rnnopt.optim.kernels.two_level import TwoLevelStep
from rnnopt.rules.two_level import WIDEST

needs_compiler = pytest.mark.skipif(c_kernel(4) is None, reason="no C compiler on this machine")
# a matrix with orthogonalised directions, one without, a vector, a scalar, an empty tensor, more
# than one block, and a tensor of three dimensions
SHAPES = [(37, 12), (80, 70), (5,), (), (0,), (300, 90), (4, 3, 7)]


def twins(shapes, rule=None, **options):
    """The same parameters twice, with a fused and a plain optimizer."""
    generator = torch.Generator().manual_seed(1)
    ours = [torch.randn(s, generator=generator).mul_(0.05).requires_grad_() for s in shapes]
    theirs = [param.detach().clone().requires_grad_() for param in ours]
    rule = rule or random_lstm()
    options.setdefault(
        "guard", False
    )  # it sees a rise in random gradients, and undone steps are rounded
    return (
        LearnedOptimizer(ours, rule, fused=True, **options),
        LearnedOptimizer(theirs, rule, fused=False, **options),
    )


def walk(optimizers, steps=20, scale=1e-3, spoil=lambda grad, step: None):
    """Feed all of them the same gradients."""
    generator = torch.Generator().manual_seed(2)
    for step in range(steps):
        for params in zip(*map(params_of, optimizers)):
            grad = torch.randn(params[0].shape, generator=generator) * scale
            spoil(grad.view(-1), step)
            for param in params:
                param.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()


def assert_same(fused, plain, atol):
    for ours, theirs in zip(params_of(fused), params_of(plain)):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=atol)


@needs_compiler
def test_the_kernel_is_chosen_by_itself():
    assert isinstance(fused_step(TwoLevelLSTM()), TwoLevelStep)
    assert fused_step(TwoLevelLSTM().double()) is None

    class Other(TwoLevelLSTM):
        pass

    assert fused_step(Other()) is None


@needs_compiler
@pytest.mark.parametrize("units", [0, 1, 4])
@pytest.mark.parametrize(
    "options", [{}, {"lr": 0.5, "weight_decay": 0.3}], ids=["plain", "decayed"]
)
def test_steps_of_the_kernel_are_those_of_the_plain_rule(units, options):
    fused, plain = twins(SHAPES, random_lstm(coordinate_units=units), **options)

    def spoil(grad, step):
        grad[700:1600] = 0  # never a gradient
        if step == 1:
            grad[-1:], grad[-2:-1] = float("nan"), float("inf")

    walk((fused, plain), spoil=spoil)
    assert_equal(fused, plain)


@needs_compiler
def test_wide_matrices_have_no_cell_in_the_kernel_either():
    side = WIDEST + 1
    fused, plain = twins([(side, side)])
    walk((fused, plain), steps=2)
    assert fused.state[params_of(fused)[0]]["cell"].shape == (0, side * side)
    assert_equal(fused, plain)


@needs_compiler
@pytest.mark.parametrize("chunk", [50, 1 << 16])
def test_large_narrow_matrices_have_no_cell_in_the_kernel_either(chunk, monkeypatch):
    """Beside small ones; and rests, as in the plain rule, where there is no gradient."""
    monkeypatch.setattr("rnnopt.rules.two_level.LARGEST", 300)
    monkeypatch.setattr("rnnopt.optim.kernels.narrow._CHUNK", chunk)
    fused, plain = twins([(8, 40), (40, 8), (8, 30), (8, 40), (400,)], random_lstm())

    def spoil(grad, step):
        flat = grad.view(-1)
        flat[:100] = 0  # never a gradient
        flat[-9:] *= step > 0
        if step == 1:
            flat[100], flat[150], flat[200] = float("nan"), float("inf"), float("nan")

    walk((fused, plain), steps=4, spoil=spoil)
    cells = [len(fused.state[param]["cell"]) for param in params_of(fused)]
    assert cells == [0, 0, 4, 0, 0]
    assert_equal(fused, plain)
    for param in params_of(fused):
        for name in ("m", "v", "change"):
            assert not fused.state[param][name][:100].any()


@needs_compiler
def test_the_kernel_repeats_itself_to_the_bit():
    first, second = twins(SHAPES)[0], twins(SHAPES)[0]
    walk((first, second))
    for ours, theirs in zip(params_of(first), params_of(second)):
        assert torch.equal(ours, theirs)


@needs_compiler
@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=2), min_size=1, max_size=4),
    scale=st.sampled_from([1e-30, 1e-12, 1e-3, 1.0, 1e12, 1e30]),
    cut=st.integers(0, 50),
)
def test_any_shapes_and_sizes_of_gradient(shapes, scale, cut):
    fused, plain = twins(shapes, random_lstm(), lr=0.1)

    def spoil(grad, step):
        flat = grad.view(-1)
        flat[:cut] = 0
        if step == 1:
            flat[-1:] = float("nan")
            flat[-2:-1] = float("inf")

    walk((fused, plain), steps=3, scale=scale, spoil=spoil)
    assert_same(fused, plain, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("width", [48, 7])  # whole vectors of the kernel, and partial ones
def test_rows_that_never_had_a_gradient_keep_value_and_zero_state_exactly(width):
    fused, _ = twins([(40, width)])
    (param,) = params_of(fused)
    before = param.detach().clone()

    def spoil(grad, step):
        grad[width : 30 * width] = 0

    walk((fused,), steps=3, spoil=spoil)
    assert torch.equal(param[1:30], before[1:30])
    assert (param[0] != before[0]).all()
    for name in ("m", "v", "change", "cell"):
        assert not fused.state[param][name].reshape(-1, 40, width)[:, 1:30].any()


@needs_compiler
def test_a_coordinate_without_a_finite_gradient_keeps_value_and_state_exactly():
    fused, _ = twins([(40,)], weight_decay=0.1)
    (param,) = params_of(fused)
    walk((fused,), steps=2)
    before = {name: leaf.clone() for name, leaf in fused.state[param].items()}
    value = param.detach().clone()
    param.grad = torch.randn(40)
    bad = torch.tensor([0, 5, 17, 39])
    param.grad[bad] = torch.tensor([float("nan"), float("inf"), -float("inf"), float("nan")])
    fused.step()
    assert torch.equal(param[bad], value[bad])
    assert param.isfinite().all() and (param != value).sum() == 36
    for name in ("m", "v", "change", "cell"):
        assert torch.equal(fused.state[param][name][..., bad], before[name][..., bad])


@needs_compiler
def test_the_number_of_threads_changes_nothing():
    results = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            fused, _ = twins([(700, 300)])
            walk((fused,), steps=2)
        finally:
            torch.set_num_threads(before)
        results.append(params_of(fused)[0].detach())
    assert torch.equal(*results)


@needs_compiler
def test_an_unsupported_tensor_is_stepped_by_the_plain_rule_beside_the_kernel():
    for make in (
        lambda x: x.to(torch.bfloat16),
        lambda x: x.to(torch.float64),
        lambda x: x.t(),
    ):
        odd, even = make(torch.randn(6, 5)), torch.randn(7)
        results = []
        for fused in (True, False):
            params = [odd.clone().requires_grad_(), even.clone().requires_grad_()]
            optimizer = LearnedOptimizer(params, random_lstm(), lr=0.1, fused=fused)
            for _ in range(3):
                for param in params:
                    param.grad = torch.ones_like(param)
                optimizer.step()
            results.append(params)
        for ours, theirs in zip(*results):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@needs_compiler
def test_a_gradient_in_another_layout_is_read_in_logical_order():
    fused, plain = twins([(6, 5)])
    for optimizer in (fused, plain):
        torch.manual_seed(0)
        params_of(optimizer)[0].grad = torch.randn(5, 6).t()
        optimizer.step()
    assert_same(fused, plain, atol=1e-7)


@needs_compiler
def test_the_step_counts_as_a_change_in_place():
    param = torch.randn(4, requires_grad=True)
    optimizer = LearnedOptimizer([param], random_lstm(), fused=True)
    loss = param.square().sum()
    param.grad = torch.ones(4)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_compiler
def test_a_resumed_run_is_exact():
    fused, _ = twins([(9, 9)])
    walk((fused,), steps=3)
    twin = copy.deepcopy(fused)
    walk((fused,), steps=2)
    other, _ = twins([(9, 9)])
    with torch.no_grad():
        params_of(other)[0].copy_(params_of(twin)[0])
    other.load_state_dict(twin.state_dict())
    walk((other,), steps=2)
    assert twin.fused is True
    assert torch.equal(params_of(fused)[0], params_of(other)[0])


def test_a_required_kernel_that_does_not_exist_is_an_error():
    class Mine(TwoLevelLSTM):
        pass

    with pytest.raises(RuntimeError, match="no kernel for Mine here"):
        LearnedOptimizer([torch.zeros(2)], Mine(), fused=True)


SCRIPT = """
import warnings, torch
from rnnopt import LearnedOptimizer
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(2):
        param = torch.ones(3, requires_grad=True)
        optimizer = LearnedOptimizer([param])
        for _ in range(2):
            param.grad = torch.ones(3)
            optimizer.step()
print(param.tolist(), [str(w.message) for w in seen])
"""


@pytest.mark.parametrize(
    ("compiler", "why"),
    [
        ("absent-cc", "absent-cc is not there"),
        pytest.param("false", "status 1", marks=pytest.mark.slow),
    ],
)
def test_without_a_compiler_it_warns_once_and_the_plain_rule_steps(
    compiler, why, tmp_path, monkeypatch
):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    values, messages = done.stdout.split("] [")
    assert messages.count("could not be compiled") == 1
    assert why in messages and "install gcc or clang" in messages
    param = torch.ones(3, requires_grad=True)
    plain = LearnedOptimizer([param], fused=False)
    for _ in range(2):
        param.grad = torch.ones(3)
        plain.step()
    assert values == str(param.tolist())[:-1]


@needs_compiler
def test_a_cache_folder_that_cannot_be_used_is_named_and_the_kernel_steps(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder can be made in a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    more = "from rnnopt.optim.kernels.choice import c_kernel; print(c_kernel(4) is not None)"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT + more], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("can't be used") == 1 and "XDG_CACHE_HOME" in done.stdout
    assert "compiler" not in done.stdout and done.stdout.endswith("True\n")


@needs_compiler
def test_a_damaged_library_in_the_cache_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    line = "from rnnopt.optim.kernels.choice import c_kernel; assert c_kernel(4)"
    run = [sys.executable, "-W", "error", "-c", line]
    subprocess.run(run, check=True)
    (library,) = (tmp_path / "rnnopt").iterdir()
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 3])
    subprocess.run(run, check=True)
    assert len(library.read_bytes()) == len(whole)


@pytest.mark.slow  # 7 s
@needs_compiler
def test_two_processes_can_compile_it_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    line = "from rnnopt.optim.kernels.choice import c_kernel; assert c_kernel(4)"
    runs = [subprocess.Popen([sys.executable, "-W", "error", "-c", line]) for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    assert [path.suffix for path in (tmp_path / "rnnopt").iterdir()] == [".so"]


@needs_compiler
def test_a_parameter_that_was_enlarged_is_an_error_and_not_a_write_out_of_bounds():
    param = torch.nn.Parameter(torch.randn(8))
    optimizer = LearnedOptimizer([param])
    param.grad = torch.randn(8)
    optimizer.step()
    param.data = torch.cat([param.data, torch.zeros(1000)])
    param.grad = torch.ones(1008)
    with pytest.raises(
        RuntimeError, match=r"tensor \[1008\] and src \[8\] to have the same number"
    ):
        optimizer.step()


@needs_compiler
def test_a_step_can_be_compiled_or_begin_in_inference_mode():
    fused, plain = twins([(5,)])
    (param,), (twin,) = params_of(fused), params_of(plain)
    param.grad, twin.grad = torch.ones(5), torch.ones(5)
    torch.compile(lambda: fused.step(), backend="eager")()
    plain.step()
    assert_same(fused, plain, atol=1e-7)
    begun = LearnedOptimizer([param])
    with torch.inference_mode():
        begun.step()
    begun.step()


@pytest.mark.parametrize("compiler", [pytest.param("", marks=pytest.mark.slow), '"gcc'])
def test_an_invalid_compiler_variable_never_stops_a_step(compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, check=True)


@needs_compiler
def test_an_interrupted_step_leaves_parameters_unchanged(monkeypatch):
    fused, _ = twins([(4, 30), (3, 30)], random_lstm())
    start = [param.detach().clone() for param in params_of(fused)]

    def stopped(gram, floor):
        raise KeyboardInterrupt

    monkeypatch.setattr("rnnopt.optim.kernels.narrow.orthogonalizing_factor", stopped)
    with pytest.raises(KeyboardInterrupt):
        walk((fused,), steps=1)
    assert all(map(torch.equal, params_of(fused), start))


@needs_compiler
@pytest.mark.parametrize("lr", [1e-9, 1e-3, 1e3])
@pytest.mark.filterwarnings("ignore:lr=.* multiplies the learned step")
def test_the_length_of_an_orthogonalized_step_is_proportional_to_lr(lr):
    fused, plain = twins([(8, 384)], random_lstm(), lr=lr)
    for param in (*params_of(fused), *params_of(plain)):
        param.data.zero_()
    walk((fused, plain), steps=3)
    ours, theirs = params_of(fused)[0], params_of(plain)[0]
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


class LiveBytes(TorchDispatchMode):
    """The bytes of tensors made within it, at most at any moment, but for views of those given."""

    def __init__(self, given):
        super().__init__()
        self._alive, self.peak = {leaf.untyped_storage()._cdata: 0 for leaf in given}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._alive:
                    self._alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self._alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self._alive.values()))
        return result


def peak_of(make, shapes):
    params = [torch.randn(shape).requires_grad_() for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = make(params)
    with LiveBytes([*params, *(param.grad for param in params)]) as live:
        for _ in range(3):
            optimizer.step()
    return live.peak


@needs_compiler
@pytest.mark.parametrize(
    "shapes",
    [
        [(1000, 1000)] * 20, [(4000, 1000)], [(2000, 1000), (9,)] * 3,
        [(64, 80_000)], [(80_000, 64)], [(5_000_000,)], [(30_522, 128), (128,)],
    ],
)  # fmt: skip
def test_a_guarded_step_takes_at_most_a_quarter_more_memory_than_adamw(shapes):
    ours = peak_of(LearnedOptimizer, shapes)
    adamw = peak_of(lambda params: torch.optim.AdamW(params, foreach=True), shapes)
    assert ours <= 1.25 * adamw, (ours / 1e6, adamw / 1e6)


@needs_compiler
@pytest.mark.parametrize("shape", [(64, 40_000), (40_000, 64)])
def test_a_narrow_matrix_takes_one_copy_beside_its_state(shape, monkeypatch):
    monkeypatch.setattr("rnnopt.rules.two_level.LARGEST", 64 * 40_000)
    # 30 bytes of state a coordinate with four units and the guard; 4 of a direction
    assert peak_of(LearnedOptimizer, [shape]) < (30 + 4) * 64 * 40_000 + 16e6


@needs_compiler
@pytest.mark.parametrize("units", [0, 4])
def test_directions_of_a_matrix_in_parts_are_those_of_the_matrix(units, monkeypatch):
    monkeypatch.setattr("rnnopt.optim.kernels.narrow._CHUNK", 50)
    shapes = [(3, 40), (40, 3), (3, 40), (5, 33), (7,)]
    pair = fused, plain = twins(shapes, random_lstm(coordinate_units=units))
    walk(pair, steps=4)
    assert_same(fused, plain, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("units", [0, 4])
def test_a_step_in_parts_is_the_step(units, monkeypatch):
    shapes = [(90, 70), (5, 40), (5, 40), (7,), (80, 100), (5, 40), (300,)]
    found = []
    for least in (1 << 20, 500):
        monkeypatch.setattr("rnnopt.optim.kernels.fused._PART", least)
        torch.manual_seed(0)
        params = [torch.randn(shape).requires_grad_() for shape in shapes]
        optimizer = LearnedOptimizer(params, random_lstm(coordinate_units=units), fused=True)
        for _ in range(4):
            for param in params:
                param.grad = param.detach() + torch.randn_like(param)
            optimizer.step()
        found.append(
            [*params, *(leaf for state in optimizer.state.values() for leaf in state.values())]
        )
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("how", ["replaced", "changed in place", "in other memory"])
def test_leaves_that_somebody_changes_count_in_the_next_step(how):
    """The kernel keeps them as views of one matrix from step to step."""
    fused, plain = twins(SHAPES)
    walk((fused, plain), 2)
    for optimizer in (fused, plain):
        for param in params_of(optimizer)[:3]:
            state = optimizer.state[param]
            for name in ("slope", "last_rate", "memory"):
                new = -2 * state[name]
                if how == "replaced":
                    state[name] = new
                elif how == "in other memory":  # as those do who move the state to another device
                    state[name].data = new
                else:
                    state[name].copy_(new)
    walk((fused, plain), 2)
    assert_equal(fused, plain)


def test_tensors_may_join_and_leave_from_step_to_step():
    fused, plain = twins(SHAPES)
    generator = torch.Generator().manual_seed(0)
    for out in (0, 2, 2, 5, 0):
        for i, (ours, theirs) in enumerate(zip(*map(params_of, (fused, plain)))):
            grad = 1e-3 * torch.randn(ours.shape, generator=generator)
            ours.grad, theirs.grad = (None if i == out else grad.clone() for _ in range(2))
        fused.step(), plain.step()
    assert_equal(fused, plain)


def test_a_copy_of_an_optimizer_has_leaves_of_its_own():
    fused, _ = twins(SHAPES[:2])
    walk((fused,), 2)
    twin, saved = copy.deepcopy(fused), copy.deepcopy(fused.state_dict())
    before = copy.deepcopy(saved)
    walk((fused,), 2)
    for ours, theirs in zip(tree_leaves(saved), tree_leaves(before)):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    walk((twin,), 2)
    assert_same(fused, twin, 0)
