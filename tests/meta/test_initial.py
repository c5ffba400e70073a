"""Meta-gradients of the initial values: MAML of both orders, ANIL, Reptile, through the head."""

from dataclasses import replace

import pytest
import torch
from encoders import TEXTS, tiny_bert
from rule_table import random_lstm
from torch import nn
from torch.nn.functional import cross_entropy

from rnnopt import SGD, InputError, LearnedOptimizer, MetaSGD
from rnnopt.meta.learned import InitialValues
from rnnopt.meta.settings import UnrollSettings
from rnnopt.meta.unroll import unroll
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.start import TextStart
from rnnopt.tasks.text.tasks import LabelledTexts, TextTask

WEIGHTS = (1.0, 0.5, 2.0)
RATE = 0.3
MAML = UnrollSettings(3, order=2, support_weight=0.5, step_weights=WEIGHTS, initial="gradient")
FIRST_ORDER = replace(MAML, order=1)


def problem():
    """An MLP in float64 with its support and query loss."""
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    inputs = [torch.randn(12, 4, dtype=torch.float64) for _ in range(2)]
    labels = [torch.randint(3, (12,)) for _ in range(2)]
    support, query = (
        lambda module, step, x=x, y=y: cross_entropy(module(x), y) for x, y in zip(inputs, labels)
    )
    return net, support, query


def uneven_rates():
    rule = MetaSGD(["a", "b"], RATE).double()
    with torch.no_grad():
        rule.log_factor.copy_(torch.tensor([0.5, -0.2]))
    return rule


INNER = {
    "sgd": lambda: SGD(RATE),
    "meta-sgd": uneven_rates,
    "lstm": lambda: random_lstm(torch.float64),
}


def head_of(net):
    """The last layer, which alone is stepped in ANIL."""
    return list(net[-1].parameters())


def initial_gradient(net, rule, support, query, settings, params=None):
    optimizer = LearnedOptimizer(params or net.parameters(), rule)
    return unroll(net, optimizer, support, query, settings).initial


def assert_slope(gradient, numeric):
    """`numeric(direction)` is the slope along it; both ways along the gradient and across."""
    for direction in (gradient, torch.randn_like(gradient)):
        direction = direction / direction.norm()
        error = abs(numeric(direction) - float((gradient * direction).sum()))
        assert error < 1e-6 * float(gradient.norm())


def central_difference(at, width):
    """Fourth order; `at(offset)` is the function."""
    return (8 * (at(width) - at(-width)) - (at(2 * width) - at(-2 * width))) / (12 * width)


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("anil", [False, True], ids=["all", "head"])
def test_second_order_equals_central_differences(name, anil):
    net, support, query = problem()
    rule = INNER[name]()
    params = head_of(net) if anil else None
    gradients = initial_gradient(net, rule, support, query, MAML, params)
    assert list(gradients) == [name for name, _ in net.named_parameters()]
    for key, param in net.named_parameters():
        start = param.detach().clone()

        def meta_loss(offset, direction, param=param, start=start):
            with torch.no_grad():
                param.copy_(start + offset * direction)
            optimizer = LearnedOptimizer(params or net.parameters(), rule)
            value = unroll(net, optimizer, support, query, FIRST_ORDER).meta_loss
            with torch.no_grad():
                param.copy_(start)
            return value

        assert_slope(
            gradients[key],
            lambda direction, f=meta_loss: central_difference(lambda x: f(x, direction), 1e-4),
        )


def test_second_order_equals_torch_func():
    net, support, query = problem()
    ours = initial_gradient(net, SGD(RATE), support, query, MAML)

    class Called:
        """The net with other parameters, as the losses call it."""

        def __init__(self, params):
            self.params = params

        def __call__(self, x):
            return torch.func.functional_call(net, self.params, (x,))

    def meta_loss(params):
        total = 0.0
        for weight in WEIGHTS:
            slopes = torch.func.grad(lambda p: support(Called(p), 0))(params)
            params = {key: value - RATE * slopes[key] for key, value in params.items()}
            total = total + weight * (query(Called(params), 0) + 0.5 * support(Called(params), 0))
        return total

    start = {key: param.detach() for key, param in net.named_parameters()}
    for key, expected in torch.func.grad(meta_loss)(start).items():
        assert (ours[key] - expected).norm() < 1e-12 * expected.norm(), key


@pytest.mark.parametrize("anil", [False, True], ids=["all", "head"])
def test_first_order_is_the_sum_of_the_slopes_at_every_step(anil):
    net, support, query = problem()
    params = head_of(net) if anil else list(net.parameters())
    ours = initial_gradient(net, random_lstm(torch.float64), support, query, FIRST_ORDER, params)
    optimizer = LearnedOptimizer(params, random_lstm(torch.float64), fused=False)
    expected = [torch.zeros_like(param) for param in net.parameters()]
    for weight in WEIGHTS:
        optimizer.zero_grad()
        support(net, 0).backward()
        optimizer.step()
        loss = weight * (query(net, 0) + 0.5 * support(net, 0))
        for total, slope in zip(expected, torch.autograd.grad(loss, list(net.parameters()))):
            total += slope
    for (key, gradient), total in zip(ours.items(), expected, strict=True):
        assert (gradient - total).norm() <= 1e-12 * total.norm(), key


def test_the_last_step_alone_is_first_order_maml():
    """Finn et al. 2017, section 5.2: the gradient of the loss at theta_T."""
    net, support, query = problem()
    settings = UnrollSettings(2, step_weights=(0, 1), initial="gradient")
    ours = initial_gradient(net, SGD(RATE), support, query, settings)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    for _ in range(2):
        optimizer.zero_grad()
        support(net, 0).backward()
        optimizer.step()
    expected = torch.autograd.grad(query(net, 0), list(net.parameters()))
    for gradient, slope in zip(ours.values(), expected, strict=True):
        torch.testing.assert_close(gradient, slope, rtol=1e-12, atol=0)


def test_first_order_ignores_truncation_and_second_order_differs_from_it():
    net, support, query = problem()
    first, cut, second = (
        initial_gradient(net, SGD(RATE), support, query, settings)
        for settings in (FIRST_ORDER, replace(FIRST_ORDER, truncation=1), MAML)
    )
    assert all(torch.equal(first[key], cut[key]) for key in first)
    assert all((first[key] - second[key]).norm() > 1e-3 * first[key].norm() for key in first)


def test_reptile_is_where_adaptation_came_from_minus_where_it_went():
    net, support, query = problem()
    start = [param.detach().clone() for param in net.parameters()]
    settings = UnrollSettings(3, initial="displacement")
    ours = initial_gradient(net, SGD(RATE), support, query, settings)
    assert all(map(torch.equal, start, net.parameters()))
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    for _ in range(3):
        optimizer.zero_grad()
        support(net, 0).backward()
        optimizer.step()
    for gradient, before, after in zip(ours.values(), start, net.parameters(), strict=True):
        torch.testing.assert_close(gradient, before - after.detach(), rtol=1e-12, atol=0)


def test_what_the_optimizer_leaves_has_no_displacement():
    net, support, query = problem()
    settings = UnrollSettings(1, initial="displacement")
    ours = initial_gradient(net, SGD(RATE), support, query, settings, head_of(net))
    assert [bool(gradient.any()) for gradient in ours.values()] == [False, False, True, True]


@pytest.mark.parametrize("order", [1, 2])
def test_frozen_parameters_and_unasked_gradients_are_left_out(order):
    net, support, query = problem()
    net[0].bias.requires_grad_(False)
    trained = [param for param in net.parameters() if param.requires_grad]
    settings = replace(MAML, order=order)
    ours = initial_gradient(net, SGD(RATE), support, query, settings, trained)
    assert list(ours) == ["0.weight", "2.weight", "2.bias"]
    plain = replace(settings, initial=None)
    assert initial_gradient(net, SGD(RATE), support, query, plain, trained) == {}


@pytest.mark.parametrize("order", [1, 2])
def test_asking_for_the_initial_gradient_changes_nothing_else(order):
    net, support, query = problem()
    results = []
    for initial in (None, "gradient"):
        rule = random_lstm(torch.float64)
        optimizer = LearnedOptimizer(net.parameters(), rule)
        settings = replace(MAML, order=order, initial=initial)
        result = unroll(net, optimizer, support, query, settings)
        results.append([result.query_losses, *(weight.grad for weight in rule.parameters())])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 2, "truncation": 2, "initial": "gradient"}, "no gradient from the steps after"),
        ({"order": 2, "initial": "displacement"}, "Reptile.* with order 2"),
        ({"initial": "all"}, "initial='all': must be 'gradient', 'displacement' or None"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        UnrollSettings(3, **options)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A 2-layer BERT in float64 whose attention can be differentiated twice."""
    folder = tiny_bert(tmp_path_factory.mktemp("bert"), hidden_size=8, layers=2)
    loaded = Classifier.load(
        folder, tune="lora", lora_rank=2, ways=2, double_backward=True, device=torch.device("cpu")
    )
    loaded.model.double()
    with torch.no_grad():  # as drawn, nothing that is said of a text would depend much on it
        for param in loaded.model.parameters():
            if param.dim() == 2:
                param.mul_(10)
    return loaded


@pytest.fixture
def task(classifier):
    parts = (TEXTS[:4], TEXTS[4:8])
    support, query = (LabelledTexts.read(classifier, part, [0, 1, 0, 1]) for part in parts)
    return TextTask(classifier, (support,), query, 2)


def values_of(classifier):
    """Initial values away from zero: LoRA's B is zero, and then A has no gradient."""
    values = InitialValues(classifier).double()
    with torch.no_grad():
        for value in values.parameters():
            value.add_(0.3 * torch.randn_like(value))
    return values


def meta_loss(classifier, task, start, settings):
    start.begin(classifier, task, seed=0)
    losses = task.support_loss, task.query_loss
    return unroll(classifier.model, start.optimizer(classifier, SGD(0.1)), *losses, settings)


@pytest.mark.parametrize("head", ["random", "zero", "prototype"])
@pytest.mark.parametrize("adapted", ["all", "head"])
def test_maml_of_a_classifier_equals_central_differences_whatever_the_head(
    classifier, task, head, adapted
):
    """With a prototype head the initial values also act through the head."""
    values = values_of(classifier)
    start = TextStart(adapted, values.values(), head)
    result = meta_loss(classifier, task, start, replace(MAML, support_weight=0.0))
    values.add(result.initial)
    values.add(start.gradient_through(classifier, task, result.initial))
    gradient = torch.cat([value.grad.flatten() for value in values.parameters()])
    before = torch.nn.utils.parameters_to_vector(values.parameters()).detach().clone()

    def slope(direction):
        def at(offset):
            torch.nn.utils.vector_to_parameters(before + offset * direction, values.parameters())
            settings = replace(FIRST_ORDER, support_weight=0.0)
            return meta_loss(classifier, task, start, settings).meta_loss

        return central_difference(at, 1e-4)

    assert_slope(gradient, slope)


def test_the_penalty_is_half_the_squared_distance_from_the_pretrained_values(classifier):
    values = values_of(classifier)
    pretrained = classifier.initial_values
    named = values.values()
    half = sum((named[key] - pretrained[key]).square().sum() for key in named) / 2
    expected = torch.autograd.grad(0.7 * half, list(named.values()))
    values.add_penalty(0.7)
    for value, slope in zip(named.values(), expected):
        torch.testing.assert_close(value.grad, slope)
    assert values.distance() == pytest.approx(float(2 * half.detach()) ** 0.5)


def test_a_lone_output_layer_has_no_initial_values_to_learn(tmp_path):
    lone = Classifier.load(tiny_bert(tmp_path), tune="head", ways=2, device=torch.device("cpu"))
    with pytest.raises(InputError, match=r"only the output layer trains.*use --tune lora or full"):
        InitialValues(lone)
