"""`rnnopt.meta_train` on sine curves (Finn et al. 2017, arXiv:1703.03400, section 5.1)."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import rnnopt
from rnnopt import SGD, InputError, Learner, Metric, Task, TaskSource, meta_train
from rnnopt.tasks.adaptation import adapt_and_judge
from rnnopt.tasks.protocol import TEST_TASKS, VALIDATION_TASKS
from rnnopt.tasks.start import Start


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))


def sine(number, metrics=None):
    """Curve `number`: ten points to adapt to, ten others to score on."""
    drawn = torch.Generator().manual_seed(number)
    height, shift = (torch.rand(2, generator=drawn) * torch.tensor([4.9, math.pi])).unbind()
    x = 10 * torch.rand(20, 1, generator=drawn) - 5
    y = (0.1 + height) * torch.sin(x + shift)
    return Task(
        lambda module, step: mse_loss(module(x[:10]), y[:10]),
        lambda module, step: mse_loss(module(x[10:]), y[10:]),
        metrics,
    )


def few(learner, tasks=sine, **options):
    """Meta-train with few small meta-steps, unless told otherwise."""
    small = {"steps": 2, "meta_steps": 2, "tasks_per_meta_step": 2, "validation_tasks": 2}
    options = {**small, **options}
    return meta_train(learner, tasks, **options)


def values_of(module):
    return {name: leaf.clone() for name, leaf in module.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def loss_after_one_step(learner, start, tasks=10):
    total = 0.0
    for number in range(TEST_TASKS, TEST_TASKS + tasks):
        task = sine(number)
        start.begin(learner, task, number)
        done = adapt_and_judge(learner, start.optimizer(learner, SGD(0.02)), task, (1,))
        total += done.scores[1]["loss"]
    return total / tasks


class Momentum(nn.Module):
    """A rule of a user: gradient descent with a learned rate and momentum."""

    step_size = 1.0

    def __init__(self):
        super().__init__()
        self.log_lr = nn.Parameter(torch.tensor(-5.0))
        self.decay = nn.Parameter(torch.tensor(0.0))

    def init_state(self, param):
        return {"average": torch.zeros_like(param).reshape(-1)}

    def __call__(self, grad, state, param):
        average = self.decay.sigmoid() * state["average"] + grad
        return -self.log_lr.exp() * average, {"average": average}


@pytest.mark.parametrize("order", [1, 2])
def test_maml_lowers_the_loss_after_one_step(order):
    learner = Learner(net())
    before = values_of(learner.module)
    trained = meta_train(
        learner, sine, rule=SGD(0.02), initial="maml", steps=1, order=order, meta_steps=25,
        initial_lr=3e-2, validate_every=25, validation_tasks=4,
    )  # fmt: skip
    assert same(values_of(learner.module), before)
    plain = loss_after_one_step(learner, Start())
    assert loss_after_one_step(learner, trained.start) < 0.9 * plain


@pytest.mark.parametrize("options", [{}, {"initial": "reptile"}, {"rule": True}])
def test_the_same_seed_gives_the_same_bits(options):
    runs = []
    for seed in (0, 0, 1):
        chosen = {**options, "rule": Momentum()} if "rule" in options else options
        trained = few(Learner(net()), seed=seed, **chosen)
        losses = [record.get("meta_loss") for record in trained.history]
        runs.append((losses, {**values_of(trained.rule), **(trained.start.values or {})}))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])
    if "rule" not in options:  # a plain module and a given rule draw nothing
        assert not same(runs[0][1], runs[2][1]) or options == {"initial": "reptile"}


def test_a_rule_of_the_users_own_is_meta_trained():
    def line(number):
        x = torch.linspace(-1, 1, 8).unsqueeze(1)
        loss = lambda module, step: mse_loss(module(x), (1 + number % 3) * x)  # noqa: E731
        return Task(loss, loss)

    rule = Momentum()
    trained = few(Learner(net()), line, rule=rule, steps=3, meta_steps=10, meta_lr=0.3)
    scores = [r["validation"]["score"] for r in trained.history if "validation" in r]
    assert trained.rule is rule
    assert min(scores) < 0.9 * scores[0]
    assert float(rule.log_lr) > -5.0
    assert not any(weight.requires_grad for weight in rule.parameters())


def test_no_task_is_used_for_two_purposes():
    numbers = set()

    def numbered(number):
        numbers.add(number)
        return sine(number)

    few(Learner(net()), numbered)
    training = set(range(4))
    validation = set(range(VALIDATION_TASKS, VALIDATION_TASKS + 2))
    assert numbers == training | validation
    numbers.clear()
    learner = Learner(net())
    few(learner, TaskSource(numbered, learner))
    assert numbers == training | validation


def test_anil_learns_initial_values_and_adapts_the_head_only():
    learner = Learner(net(), head=["2.weight", "2.bias"])
    trained = few(learner, rule=SGD(0.02), initial="maml", start=Start("head"))
    assert trained.start.adapted == "head"
    trained.start.begin(learner, sine(0), 0)
    before = values_of(learner.module)
    assert not same(before, learner.initial_values)
    adapt_and_judge(learner, trained.start.optimizer(learner, SGD(0.02)), sine(0), (2,))
    changed = [n for n, leaf in learner.module.state_dict().items() if not leaf.equal(before[n])]
    assert changed == ["2.weight", "2.bias"]


def test_a_run_in_a_folder_is_resumed_to_the_same_bits(tmp_path):
    options = {"rule": SGD(0.02), "initial": "maml", "validate_every": 1}
    whole = few(Learner(net()), folder=tmp_path / "whole", **options)
    again = few(Learner(net()), folder=tmp_path / "whole", resume=True, **options)
    assert same(whole.start.values, again.start.values)
    with pytest.raises(InputError, match="already holds a run; add --resume"):
        few(Learner(net()), folder=tmp_path / "whole", **options)


def test_declared_metrics_are_validated():
    learner = Learner(net())
    source = TaskSource(
        lambda number: sine(number, lambda module: {"half": 0.5}), learner, {"half": Metric(True)}
    )
    history = few(learner, source).history
    assert history[0]["validation"]["half"] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"order": 3}, "order=3: must be 1 or 2"),
        ({"meta_steps": 0}, "meta_steps=0: must be at least 1"),
        ({"seed": -1}, "seed=-1: must be at least 0"),
        ({"initial": "random"}, "init='random': choose from pretrained, maml, reptile"),
        ({"rule": SGD}, "must be a torch.nn.Module with step_size"),
        ({"rule": nn.Linear(1, 1)}, "must be a torch.nn.Module with step_size"),
        ({"rule": SGD(0.1)}, "SGD has no weights that take a gradient"),
        ({"start": Start(values={})}, "start has initial values"),
        ({"tasks": sine(0)}, "tasks is of type Task: it must be a function number -> Task"),
        ({"validation": lambda number: None}, "returned NoneType for number 1000000"),
        ({"tasks": lambda n: sine(n, lambda m: {"r2": 0.0})}, "metric 'r2', which its source"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(options, message):
    with pytest.raises(InputError, match=message):
        few(Learner(net()), **options)


def test_a_module_in_place_of_a_learner_is_named():
    with pytest.raises(InputError, match="learner is of type Sequential: it must be a Learner"):
        few(net())


def test_learned_values_can_be_loaded_to_go_on_from():
    module = net()
    trained = few(Learner(module), rule=SGD(0.02), initial="maml")
    module.load_state_dict(trained.start.values, strict=False)
    further = few(Learner(module), start=replace(trained.start, values=None))
    assert isinstance(further.rule, rnnopt.TwoLevelLSTM)
