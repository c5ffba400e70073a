"""Learners, tasks and sources of a plain module, and adaptation to one task."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from rnnopt import SGD, InputError, Learner, Metric, Task, TaskSource
from rnnopt.tasks.adaptation import adapt_and_judge
from rnnopt.tasks.protocol import DIVERGED_LOSS, as_source
from rnnopt.tasks.start import Start

X = torch.linspace(-1, 1, 8).unsqueeze(1)


def net():
    return nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))


def line(number, **options):
    """The line through 0 with slope `number`."""
    return Task(
        lambda module, step: mse_loss(module(X[::2]), number * X[::2]),
        lambda module, step: mse_loss(module(X[1::2]), number * X[1::2]),
        **options,
    )


def values_of(module):
    return {name: leaf.clone() for name, leaf in module.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def adapt(learner, task, start=Start(), budgets=(3,)):  # noqa: B008  # immutable
    start.begin(learner, task, 0)
    return adapt_and_judge(learner, start.optimizer(learner, SGD(0.1)), task, budgets)


def test_a_task_starts_at_the_initial_values_and_buffers():
    module = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    learner, before = Learner(module), values_of(module)
    adapt(learner, line(2))
    assert not same(values_of(module), before)
    learner.begin(line(2), 0)
    assert same(values_of(module), before)
    assert all(param.grad is None for param in module.parameters())


def test_adaptation_lowers_the_loss_and_scores_it_at_each_budget():
    done = adapt(Learner(net()), line(2), budgets=(1, 20))
    assert list(done.scores) == [1, 20]
    assert done.scores[20]["loss"] < done.scores[1]["loss"]


def test_minibatches_take_turns_by_the_number_of_the_step():
    seen = []

    def support(module, step):
        seen.append(step)
        rows = slice(step % 2, None, 2)
        return mse_loss(module(X[rows]), X[rows])

    adapt(Learner(net()), Task(support, support), budgets=(3,))
    assert seen[:3] == [0, 1, 2]


def test_only_the_head_is_stepped_in_anil():
    module = net()
    learner, before = Learner(module, head=["2.weight", "2.bias"]), values_of(module)
    adapt(learner, line(2), Start("head"))
    changed = [name for name, leaf in module.state_dict().items() if not leaf.equal(before[name])]
    assert changed == ["2.weight", "2.bias"]


def test_trains_freezes_all_other_parameters():
    learner = Learner(net(), trains=["2.bias"])
    assert [name for name, _ in learner.trainable()] == ["2.bias"]
    assert list(learner.initial_values) == ["2.bias"]


def test_scores_hold_loss_and_metrics_and_restore_each_mode():
    module = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5))
    module[1].eval()
    modes = []
    task = line(0, metrics=lambda m: modes.append(m.training) or {"error": torch.tensor(0.25)})
    scores = task.scores(module)
    assert scores["error"] == 0.25
    assert scores["loss"] == pytest.approx(float(module(X[1::2]).square().mean().detach()))
    assert modes == [False]
    assert (module.training, module[1].training) == (True, False)


def test_scores_are_of_the_query_set_after_the_step():
    """Validation and comparison judge a task whose query set changes as meta-training does."""
    seen = []

    def query(module, step):
        seen.append(step)
        return module(X).mean() * 0 + step

    task = Task(lambda m, step: m(X).square().mean(), query)
    learner = Learner(net())
    optimizer = torch.optim.SGD(learner.module.parameters(), 0.1)
    scores = adapt_and_judge(learner, optimizer, task, (1, 3)).scores
    assert {step: found["loss"] for step, found in scores.items()} == {1: 0.0, 3: 2.0}
    assert seen == [0, 2]


def test_a_loss_that_is_not_finite_counts_as_diverged():
    task = Task(lambda m, step: m(X).mean(), lambda m, step: m(X).mean() * math.nan)
    assert task.scores(net())["loss"] == DIVERGED_LOSS


def test_a_source_counts_from_another_number_on():
    numbers = []
    source = TaskSource(lambda n: numbers.append(n) or line(n), Learner(net()), first=10)
    source.load(1)
    source.from_number(100).load(2)
    assert numbers == [11, 112]


def test_a_metric_is_declared_and_reported_or_an_error():
    learner = Learner(net())
    plain = TaskSource(line, learner)
    with pytest.raises(InputError, match="metric 'error', which its source does not declare"):
        plain.check_scores({"loss": 1.0, "error": 0.5})
    plain.check_scores({"loss": 1.0, "calibrated": 0.5})
    declared = TaskSource(line, learner, {"error": Metric()})
    with pytest.raises(InputError, match="metric 'error', which a task does not report"):
        declared.check_scores({"loss": 1.0})
    with pytest.raises(InputError, match="'f1' is tuned by 'accuracy': choose from loss"):
        TaskSource(line, learner, {"f1": Metric(tuned_by="accuracy")})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Learner(3), "module is of type int: it must be a torch.nn.Module"),
        (lambda: Learner(nn.ReLU()), "no parameter of this ReLU requires a gradient"),
        (lambda: Learner(net(), trains=[]), "no parameter of this Sequential requires a gradient"),
        (lambda: Learner(net(), head=["3.bias"]), "'3.bias' is no parameter of this Sequential"),
        (lambda: Learner(net(), head=["2.bias"], trains=["0.bias"]), "'2.bias' belongs to the he"),
        (lambda: Task(torch.tensor(1.0), None), "support_loss is of type Tensor: it must be a fun"),
        (lambda: line(1, loss_unit=0.0), "loss_unit=0.0: must be positive"),
        (lambda: TaskSource([line(1)], Learner(net())), "tasks is of type list: it must be a fun"),
        (lambda: as_source(line, net()), "learner is of type Sequential: it must be a Learner"),
        (lambda: TaskSource(lambda n: n, Learner(net())).load(7), "returned int for number 7"),
        (lambda: as_source(TaskSource(line, Learner(net())), Learner(net())), "another learner"),
        (lambda: Start("body"), "adapted='body': must be 'all' or 'head'"),
        (lambda: adapt(Learner(net()), line(1), Start("head")), "this learner has no head"),
        (lambda: adapt(Learner(net()), line(1), budgets=()), r"budgets=\(\): give at least one"),
        (lambda: adapt(Learner(net()), line(1), budgets=(0, 2)), r"budgets=\(0, 2\): give at"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("support", "message"),
    [
        (lambda m, step: m(X), r"support_loss returned a tensor of shape \(8, 1\): a loss must be"),
        (lambda m, step: 0.5, "support_loss returned a value of type float"),
        (lambda m, step: m(X).mean().detach(), "does not depend on a trainable parameter"),
    ],
)
def test_a_loss_that_can_not_be_descended_is_refused(support, message):
    with pytest.raises(InputError, match=message):
        adapt(Learner(net()), Task(support, support))


def test_a_plain_task_has_no_temperature():
    with pytest.raises(InputError, match=r"calibrated=0.5: Task has no temperature"):
        line(1).query_loss(net(), 0, 0.5)


def test_initial_values_of_another_shape_are_refused():
    start = Start(values={"2.bias": torch.zeros(2)})
    with pytest.raises(InputError, match=r"'2.bias' has shape \(2,\), its parameter \(1,\)"):
        start.begin(Learner(net()), line(1), 0)
