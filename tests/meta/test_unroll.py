"""Meta-gradients: exact, and the same whichever way they are made."""

import gc
import weakref

import pytest
import torch
from encoders import TEXTS, tiny_bert
from rule_table import RULES, random_lstm
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from rnnopt import InputError, LearnedOptimizer, TwoLevelLSTM
from rnnopt.meta import unroll as unroll_module
from rnnopt.meta.differentiable import higher
from rnnopt.meta.settings import UnrollSettings
from rnnopt.meta.unroll import unroll
from rnnopt.storage import memory as memory_module
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.tasks import LabelledTexts


def problem(seed=0, dtype=torch.float64):
    """An MLP with its support and query losses."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
        inputs = [torch.randn(12, 4, dtype=dtype) for _ in range(2)]
        labels = [torch.randint(3, (12,)) for _ in range(2)]
    support, query = (
        lambda module, step, x=x, y=y: cross_entropy(module(x), y) for x, y in zip(inputs, labels)
    )
    return net, support, query


def meta_gradient(net, rule, support, query, settings, **options):
    rule.zero_grad()
    optimizer = LearnedOptimizer(net.parameters(), rule, **options)
    result = unroll(net, optimizer, support, query, settings)
    return result, {name: weight.grad.clone() for name, weight in rule.named_parameters()}


def central_difference(weight, direction, meta_loss, width):
    """Fourth-order central difference of the meta-loss along a direction of one weight tensor."""

    start = weight.detach().clone()

    def at(offset):
        weight.data.copy_(start + offset * direction)
        value = meta_loss()
        weight.data.copy_(start)
        return value

    return (8 * (at(width) - at(-width)) - (at(2 * width) - at(-2 * width))) / (12 * width)


def plain_meta_loss(net, rule, support, query, settings):
    """The meta-loss by ordinary steps: no gradient reaches the rule, which is much cheaper."""
    start = [param.detach().clone() for param in net.parameters()]
    optimizer = LearnedOptimizer(net.parameters(), rule, fused=False, guard=False)
    total = 0.0
    for t in range(settings.steps):
        optimizer.zero_grad()
        support(net, t).backward()
        optimizer.step()
        with torch.no_grad():
            term = query(net, t) + settings.support_weight * support(net, t)
            total += settings.weight(t) * float(term)
    with torch.no_grad():
        for param, value in zip(net.parameters(), start):
            param.copy_(value)
    return total


def assert_exact(net, rule, support, query, width):
    """Every tensor's second-order meta-gradient over 5 steps equals central differences to 1e-6.

    Each is compared along its own direction and a random one at once: their sum of unit length.
    """
    settings = UnrollSettings(steps=5, order=2, support_weight=0.5)
    result, exact = meta_gradient(net, rule, support, query, settings)
    rule.requires_grad_(False)
    value = plain_meta_loss(net, rule, support, query, settings)
    assert value == pytest.approx(result.meta_loss, rel=1e-12)
    for name, weight in rule.named_parameters():
        gradient = exact[name]
        noise = torch.randn_like(gradient)
        noise *= torch.sign((noise * gradient).sum())  # or both may cancel out
        direction = gradient / gradient.norm() + noise / noise.norm()
        direction = direction / direction.norm()
        numeric = central_difference(
            weight, direction, lambda: plain_meta_loss(net, rule, support, query, settings), width
        )
        error = abs(numeric - float((gradient * direction).sum()))
        assert error < 1e-6 * float(gradient.norm()), name


def test_second_order_equals_central_differences_on_an_mlp():
    net, support, query = problem()
    (slope,) = torch.autograd.grad(support(net, 0), net[2].weight)
    net[2].weight.data.copy_(-slope)  # small, and right: its gradient asks for growth
    rule = random_lstm(torch.float64)
    assert_exact(net, rule, support, query, width=1e-5)


@pytest.mark.slow  # 20 s; a small net is below
def test_second_order_equals_central_differences_on_a_bert(tmp_path):
    folder = tiny_bert(tmp_path, hidden_size=8, layers=2)
    classifier = Classifier.load(
        folder, tune="full", ways=2, double_backward=True, device=torch.device("cpu")
    )
    classifier.model.double()
    parts = (TEXTS[:4], TEXTS[4:8])
    support, query = (LabelledTexts.read(classifier, part, [0, 1, 0, 1]).loss for part in parts)
    assert_exact(
        classifier.model,
        random_lstm(torch.float64, coordinate_units=3),
        lambda module, step: support(classifier, module),
        lambda module, step: query(classifier, module),
        width=1e-4,
    )


class Containers(nn.Module):
    """Runs through parts of every container that torch has: as slices, or one at a time."""

    def __init__(self, sliced):
        super().__init__()
        self.sliced = sliced
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.chain = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.scales = nn.ParameterList(nn.Parameter(torch.rand(4)) for _ in range(3))

    def forward(self, inputs):
        layers, scales = self.layers, self.scales
        for layer in layers[:2] if self.sliced else (layers[0], layers[1]):
            inputs = inputs + layer(inputs)
        for scale in scales[1:] if self.sliced else (scales[1], scales[2]):
            inputs = inputs * scale
        return self.chain[:2](inputs) if self.sliced else self.chain[1](self.chain[0](inputs))


def test_second_order_is_the_same_through_slices_of_containers():
    inputs, labels = torch.randn(8, 4), torch.randint(4, (8,))
    whole = Containers(sliced=False)
    sliced = Containers(sliced=True)
    sliced.load_state_dict(whole.state_dict())
    rule = random_lstm()
    settings = UnrollSettings(steps=3, order=2)
    expected, found = (
        meta_gradient(
            net,
            rule,
            lambda module, step: cross_entropy(module(inputs), labels),
            lambda module, step: cross_entropy(module(-inputs), labels),
            settings,
        )[1]
        for net in (whole, sliced)
    )
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


class Attention(nn.Module):
    """Attention over the rows of a batch: torch's function, whose kernels have no second derivative
    on a CPU, or its formula."""

    def __init__(self, fused):
        super().__init__()
        # a bias of keys would have a gradient of rounding errors alone
        self.fused, self.project = fused, nn.Linear(4, 12, bias=False)

    def forward(self, inputs):
        q, k, v = self.project(inputs).view(1, 1, -1, 12).chunk(3, -1)
        if self.fused:
            return scaled_dot_product_attention(q, k, v)[0, 0]
        return (torch.softmax(q @ k.mT / 2, -1) @ v)[0, 0]


def test_second_order_goes_through_fused_attention():
    inputs, labels = torch.randn(8, 4), torch.randint(4, (8,))
    fused, plain = Attention(fused=True), Attention(fused=False)
    fused.load_state_dict(plain.state_dict())
    rule = random_lstm()
    found, expected = (
        meta_gradient(
            net,
            rule,
            lambda module, step: cross_entropy(module(inputs), labels),
            lambda module, step: cross_entropy(module(-inputs), labels),
            UnrollSettings(steps=2, order=2),
        )[1]
        for net in (fused, plain)
    )
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


def test_first_order_equals_the_graph_of_detached_gradients():
    net, support, query = problem()
    rule = random_lstm(torch.float64)
    settings = UnrollSettings(steps=5, support_weight=0.5, step_weights=(1, 2, 0.5, 1, 3))
    result, ours = meta_gradient(net, rule, support, query, settings, weight_decay=0.3)
    optimizer = LearnedOptimizer(net.parameters(), rule, weight_decay=0.3)
    with higher.innerloop_ctx(net, optimizer) as (fmodel, stepper):
        stepper.first_order = True
        total = 0.0
        for t in range(5):
            stepper.step(support(fmodel, t))
            total = total + settings.weight(t) * (query(fmodel, t) + 0.5 * support(fmodel, t))
        reference = torch.autograd.grad(total, list(rule.parameters()))
    assert result.meta_loss == pytest.approx(float(total.detach()), rel=1e-12)
    for (name, gradient), expected in zip(ours.items(), reference):
        assert (gradient - expected).norm() <= 1e-10 * expected.norm(), name


def test_first_and_second_order_differ():
    net, support, query = problem()
    rule = random_lstm(torch.float64)
    first, second = (
        meta_gradient(net, rule, support, query, UnrollSettings(steps=3, order=order))[1]
        for order in (1, 2)
    )
    assert all((first[name] - second[name]).norm() > 1e-6 * first[name].norm() for name in first)


@pytest.mark.parametrize("make", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"lr": 0.3, "weight_decay": 0.1}], ids=["plain", "scaled"])
def test_torch_path_equals_differentiable_path_bitwise_over_8_steps(make, dtype, options):
    net, support, _ = problem(dtype=dtype)
    rule = make()
    start = LearnedOptimizer(net.parameters(), rule, **options)
    with higher.innerloop_ctx(net, start) as (fmodel, stepper):
        for t in range(8):
            stepper.step(support(fmodel, t))
        theirs = [param.detach().clone() for param in fmodel.parameters()]
    optimizer = LearnedOptimizer(net.parameters(), rule, fused=False, **options)
    for t in range(8):
        optimizer.zero_grad()
        support(net, t).backward()
        optimizer.step()
    assert all(map(torch.equal, net.parameters(), theirs))


@pytest.mark.parametrize("make", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("order", [1, 2])
def test_any_rule_can_be_unrolled(make, order):
    net, support, query = problem(dtype=torch.float32)
    optimizer = LearnedOptimizer(net.parameters(), make(), lr=0.1)
    result = unroll(net, optimizer, support, query, UnrollSettings(steps=2, order=order))
    assert result.meta_loss == pytest.approx(float(result.query_losses.sum()), rel=1e-6)


@pytest.mark.parametrize("order", [1, 2])
def test_both_orders_walk_the_way_of_the_torch_optimizer(order):
    net, support, query = problem(dtype=torch.float32)
    rule = random_lstm()
    optimizer = LearnedOptimizer(net.parameters(), rule, fused=False)
    result = unroll(net, optimizer, support, query, UnrollSettings(steps=4, order=order))
    losses = []
    for t in range(4):
        optimizer.zero_grad()
        support(net, t).backward()
        optimizer.step()
        losses.append(query(net, t).detach())
    assert torch.equal(result.query_losses, torch.stack(losses))


@pytest.mark.parametrize("order", [1, 2])
def test_steps_of_no_weight_are_not_judged(order):
    net, support, query = problem()
    judged = []

    def counted(module, step):
        judged.append(step)
        return query(module, step)

    settings = UnrollSettings(4, order=order, truncation=1, step_weights=[0, 2, 0, 1])
    result, _ = meta_gradient(net, random_lstm(), support, counted, settings)
    assert judged == [1, 3]
    assert result.query_losses.isnan().tolist() == [True, False, True, False]
    _, second, _, last = result.query_losses.tolist()
    assert result.meta_loss == pytest.approx(2 * second + last)


@pytest.mark.parametrize("order", [1, 2])
def test_model_and_optimizer_are_as_before_afterwards(order):
    net, support, query = problem()
    optimizer = LearnedOptimizer(net.parameters(), random_lstm(torch.float64))
    support(net, 0).backward()
    optimizer.step()
    before = [param.detach().clone() for param in net.parameters()]
    memory = [{k: v.clone() for k, v in s.items()} for s in optimizer.state.values()]
    unroll(net, optimizer, support, query, UnrollSettings(steps=3, order=order))
    assert all(map(torch.equal, before, net.parameters()))
    for saved, state in zip(memory, optimizer.state.values()):
        assert all(torch.equal(leaf, state[name]) for name, leaf in saved.items())


def test_the_model_is_put_back_when_a_loss_raises():
    net, support, _ = problem()
    before = [param.detach().clone() for param in net.parameters()]

    def broken(module, step):
        raise RuntimeError("no query")

    with pytest.raises(RuntimeError, match="no query"):
        optimizer = LearnedOptimizer(net.parameters(), random_lstm(torch.float64))
        unroll(net, optimizer, support, broken, UnrollSettings(steps=3))
    assert all(map(torch.equal, before, net.parameters()))


@pytest.mark.parametrize("order", [1, 2])
def test_meta_gradients_of_tasks_add_up(order):
    net, support, query = problem()
    rule = random_lstm(torch.float64)
    settings = UnrollSettings(steps=2, order=order)
    _, once = meta_gradient(net, rule, support, query, settings)
    unroll(net, LearnedOptimizer(net.parameters(), rule), support, query, settings)
    for name, weight in rule.named_parameters():
        torch.testing.assert_close(weight.grad, 2 * once[name])


@pytest.mark.parametrize("order", [1, 2])
def test_truncation_is_the_sum_of_its_segments(order):
    """Cut after 2 of 4 steps: the first half, plus the second half from where the first ended."""
    net, support, query = problem()
    rule = random_lstm(torch.float64)
    settings = UnrollSettings(steps=4, order=order, truncation=2)
    _, cut = meta_gradient(net, rule, support, query, settings)
    half = UnrollSettings(steps=2, order=order)
    _, first = meta_gradient(net, rule, support, query, half)
    optimizer = LearnedOptimizer(net.parameters(), rule)
    for t in range(2):
        optimizer.zero_grad()
        support(net, t).backward()
        optimizer.step()
    rule.zero_grad()
    unroll(net, optimizer, support, query, half)
    for name, weight in rule.named_parameters():
        torch.testing.assert_close(cut[name], first[name] + weight.grad, rtol=1e-9, atol=1e-12)


class Watch:
    """A loss function that knows for how many of its calls the graph is still held."""

    def __init__(self, loss):
        self.loss, self.calls, self.most = loss, [], 0

    def __call__(self, module, step):
        gc.collect()
        self.most = max(self.most, sum(ref() is not None for ref in self.calls))

        class Saved:
            """Stands for the tensors that this call's graph saves."""

        saved = Saved()
        self.calls.append(weakref.ref(saved))
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (saved, tensor), lambda pair: pair[1]
        )
        with hooks:
            return self.loss(module, step)


def most_graphs_held(settings):
    net, support, query = problem()
    gc.collect()
    gc.freeze()  # or every call would go through all that the libraries have made
    watch = Watch(query)
    optimizer = LearnedOptimizer(net.parameters(), random_lstm(torch.float64))
    try:
        unroll(net, optimizer, support, watch, settings)
    finally:
        gc.unfreeze()
    return watch.most


def test_first_order_holds_no_graph_of_the_model():
    assert most_graphs_held(UnrollSettings(steps=6)) == 0


def test_second_order_holds_the_graphs_up_to_the_cut():
    assert most_graphs_held(UnrollSettings(steps=6, order=2)) == 5
    assert most_graphs_held(UnrollSettings(steps=6, order=2, truncation=3)) == 2
    assert most_graphs_held(UnrollSettings(steps=6, order=2, truncation=1)) == 0


def test_gradient_checkpointing_at_second_order_is_refused(tmp_path):
    """`higher` would ignore it in silence."""
    classifier = Classifier.load(
        tiny_bert(tmp_path), tune="head", ways=2, double_backward=True, device=torch.device("cpu")
    )
    for module in classifier.model.modules():
        if hasattr(module, "gradient_checkpointing"):  # what transformers' switch sets
            module.gradient_checkpointing = True
    optimizer = LearnedOptimizer(classifier.model.parameters(), random_lstm())

    def unused(module, step):
        raise AssertionError

    with pytest.raises(InputError, match="gradient checkpointing is on"):
        unroll(classifier.model, optimizer, unused, unused, UnrollSettings(steps=1, order=2))


@pytest.mark.parametrize("order", [1, 2])
def test_frozen_and_unused_parameters_are_left_alone(order):
    net, support, query = problem()
    net[0].bias.requires_grad_(False)
    net.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    trained = [param for param in net.parameters() if param.requires_grad]
    rule = random_lstm(torch.float64)
    optimizer = LearnedOptimizer(trained, rule)
    unroll(net, optimizer, support, query, UnrollSettings(steps=3, order=order))
    assert all(weight.grad.any() for weight in rule.parameters() if weight.numel() > 3)


def test_meta_training_by_these_gradients_lowers_the_meta_loss():
    net, support, _ = problem(dtype=torch.float32)
    rule = TwoLevelLSTM()
    meta = torch.optim.Adam(rule.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        meta.zero_grad()
        optimizer = LearnedOptimizer(net.parameters(), rule)
        losses.append(unroll(net, optimizer, support, support, UnrollSettings(steps=5)).meta_loss)
        meta.step()
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"steps": 1, "order": 3}, "order=3: must be 1 or 2"),
        ({"steps": 1, "truncation": 0}, "truncation=0: must be at least 1, or None"),
        ({"steps": 2, "step_weights": (1,)}, "1 step_weights for 2 steps: give one for each step"),
        ({"steps": 1, "step_weights": (float("nan"),)}, r"step_weights \(nan,\): must be finite"),
        ({"steps": 1, "query_weight": 0}, "must be finite, at least 0, and not all 0"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        UnrollSettings(**options)


def test_a_graph_that_will_not_fit_is_announced_after_the_first_step(monkeypatch):
    net, support, query = problem()
    optimizer = LearnedOptimizer(net.parameters(), random_lstm(torch.float64))
    used = iter([2**30, 3 * 2**30])  # before and after the first step
    monkeypatch.setattr(unroll_module, "used_bytes", lambda device: next(used))
    monkeypatch.setattr(memory_module, "used_bytes", lambda device: next(used))
    monkeypatch.setattr(memory_module, "free_bytes", lambda device: 5 * 2**30)
    with pytest.warns(RuntimeWarning, match=r"3 more steps will take about 6.0 GiB, and 5.0 GiB"):
        unroll(net, optimizer, support, query, UnrollSettings(steps=4, order=2))


def test_memory_is_read_from_this_system():
    device, held = torch.device("cpu"), memory_module.used_bytes(torch.device("cpu"))
    if held is None:
        pytest.skip("this system does not tell how much memory a process holds")
    block = torch.ones(2**24)  # 64 MiB
    assert memory_module.used_bytes(device) - held > 0.9 * block.nbytes
    assert memory_module.free_bytes(device) > 0


def test_the_peak_of_memory_outlives_what_was_held_until_it_is_forgotten():
    device = torch.device("cpu")
    memory_module.forget_peak(device)
    before = memory_module.peak_bytes(device)
    block = torch.ones(2**24)  # 64 MiB
    size = block.nbytes
    del block
    assert memory_module.peak_bytes(device) - before > 0.9 * size
    memory_module.forget_peak(device)
    assert memory_module.peak_bytes(device) - before < 0.5 * size


@pytest.mark.parametrize("order", [1, 2])
def test_frozen_weights_are_refused(order):
    net, support, query = problem(dtype=torch.float32)
    optimizer = LearnedOptimizer(net.parameters())  # the shipped rule
    with pytest.raises(InputError, match=r"frozen, .* call rule.requires_grad_\(\)"):
        unroll(net, optimizer, support, query, UnrollSettings(steps=1, order=order))


class Delayed(nn.Module):
    """Its memory depends on the weights from the second step on only."""

    step_size = 1.0

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def init_state(self, param):
        zeros = torch.zeros(param.numel(), dtype=param.dtype)
        return {"h": zeros, "before": zeros.clone()}

    def forward(self, grad, state, param):
        h = self.weight * (state["h"] + grad)
        return -0.1 * (h + state["before"]), {"h": h, "before": state["h"]}


def test_memory_that_depends_on_the_weights_later_on_has_its_part_in_the_meta_gradient():
    net, support, query = problem()
    _, ours = meta_gradient(net, Delayed(), support, query, UnrollSettings(steps=4))
    rule = Delayed()
    with higher.innerloop_ctx(net, LearnedOptimizer(net.parameters(), rule)) as (fmodel, stepper):
        stepper.first_order = True
        total = 0
        for t in range(4):
            stepper.step(support(fmodel, t))
            total = total + query(fmodel, t)
        total.backward()
    assert ours["weight"].item() == pytest.approx(rule.weight.grad.item(), rel=1e-10)
