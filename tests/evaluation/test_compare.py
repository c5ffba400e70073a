"""`rnnopt.compare` on lines through 0: a rule beside baselines, from the same initial values."""

import re

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from rnnopt import SGD, InputError, Learner, Metric, Task, TaskSource, compare, load_rule, save_rule
from rnnopt.evaluation.baselines import Baseline, rule_baseline
from rnnopt.rules.files import SHIPPED_RULE
from rnnopt.tasks.protocol import TEST_TASKS, VALIDATION_TASKS
from rnnopt.tasks.start import Start

SMALL = {"budgets": (1, 2), "episodes": 3, "tuning_episodes": 2}
X = torch.linspace(-1, 1, 8).unsqueeze(1)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))


def line(number, metrics=None):
    """A line through 0 of a slope that the number decides."""
    y = X * (1 + number % 5)
    return Task(
        lambda module, step: mse_loss(module(X[step % 2 :: 2]), y[step % 2 :: 2]),
        lambda module, step: mse_loss(module(X), y),
        metrics,
    )


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_the_table_names_the_baselines_and_gives_intervals():
    learner = Learner(net())
    before = {name: leaf.clone() for name, leaf in learner.module.state_dict().items()}
    result = compare(SGD(0.1), learner, line, **SMALL)
    table = result.table()
    for name in ("learned", "adamw", "sgd"):
        assert re.search(rf"\b{name}\b.*\d ± \d", table), table
    assert set(result.figures["methods"]) == {"learned", "adamw", "sgd"}
    assert result.figures["methods"]["sgd"]["tuned"]["lr"].keys() == {"1", "2"}
    assert same(before, dict(learner.module.state_dict()))


def test_the_same_comparison_gives_the_same_bits():
    first, second = (compare(SGD(0.1), Learner(net()), line, **SMALL) for _ in range(2))
    assert first.figures["values"] == second.figures["values"]


def test_the_learned_values_are_where_every_method_starts():
    learner = Learner(net())
    start = Start(values={name: 0 * value for name, value in learner.initial_values.items()})
    none = Baseline(lambda learner, params, lr, steps: torch.optim.SGD(params.values(), lr=0), (0,))
    result = compare(
        SGD(0.0), learner, line, start=start, baselines=(), own_baselines={"none": none}, **SMALL
    )
    values = result.figures["values"]
    assert values["learned"] == values["none"]
    slopes = [1 + (TEST_TASKS + number) % 5 for number in range(3)]
    expected = [float((slope * X).square().mean()) for slope in slopes]
    assert values["none"]["loss"]["1"] == pytest.approx(expected)


def test_reported_tasks_tune_nothing():
    numbers = set()

    def numbered(number):
        numbers.add(number)
        return line(number)

    expected = {*range(VALIDATION_TASKS, VALIDATION_TASKS + 2), *range(TEST_TASKS, TEST_TASKS + 3)}
    learner = Learner(net())
    for tasks in (numbered, TaskSource(numbered, learner)):
        numbers.clear()
        compare(SGD(0.1), learner, tasks, baselines=("sgd",), **SMALL)
        assert numbers == expected
    numbers.clear()
    report, tuning = TaskSource(numbered, learner), TaskSource(numbered, learner, first=50)
    compare(SGD(0.1), learner, report, tuning=tuning, baselines=("sgd",), **SMALL)
    assert numbers == {0, 1, 2, 50, 51}


def test_a_learning_rate_is_chosen_for_each_metric_in_its_direction():
    """A large rate makes weights large, which is better by `size` and worse by the loss."""

    def measured(number):
        return line(number, lambda module: {"size": module[0].weight.detach().norm()})

    grid = Baseline(
        lambda learner, params, lr, steps: torch.optim.SGD(params.values(), lr=lr), (0.1, 30.0)
    )
    learner = Learner(net())
    source = TaskSource(measured, learner, {"size": Metric(higher_is_better=True)})
    result = compare(SGD(0.1), learner, source, baselines=(), own_baselines={"own": grid}, **SMALL)
    assert result.figures["methods"]["own"]["tuned"] == {
        "lr": {"1": 30.0, "2": 30.0},
        "lr_for_loss": {"1": 0.1, "2": 0.1},
    }
    assert re.findall(r"(\w+) after", result.table()) == ["size", "loss"]


def test_only_the_head_is_stepped_where_the_start_says_so():
    module = net()
    learner = Learner(module, head=["2.weight", "2.bias"])
    bodies = []

    def watched(number):
        return line(number, lambda module: bodies.append(module[0].weight.clone()) or {"m": 0.0})

    source = TaskSource(watched, learner, {"m": Metric()})
    compare(SGD(0.1), learner, source, start=Start("head"), baselines=("sgd",), **SMALL)
    assert bodies
    assert all(body.equal(learner.initial_values["0.weight"]) for body in bodies)


def test_a_journal_keeps_the_baselines_and_knows_a_rule_by_its_weights(tmp_path):
    options = {"journal": tmp_path / "runs", "baselines": ("sgd",), **SMALL}
    runs = [compare(SGD(lr), Learner(net()), line, **options).figures for lr in (0.1, 0.2)]
    for index, lr in enumerate((0.1, 0.2)):
        again = compare(SGD(lr), Learner(net()), line, **options).figures
        assert again == runs[index]
    assert runs[0]["values"]["learned"] != runs[1]["values"]["learned"]
    assert runs[0]["values"]["sgd"] == runs[1]["values"]["sgd"]
    other = Learner(nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)))
    with pytest.raises(InputError, match=r"holds the runs of another comparison \(initial_values"):
        compare(SGD(0.1), other, line, **options)


def test_a_direct_method_takes_no_steps():
    result = compare(
        SGD(0.1), Learner(net()), line, baselines=(),
        direct={"zero": lambda learner, task: {"loss": 1.5}}, **SMALL,
    )  # fmt: skip
    assert result.figures["values"]["zero"]["loss"] == {"1": [1.5] * 3, "2": [1.5] * 3}
    assert "| zero | 1.500 ± 0.000 | 1.500 ± 0.000 |" in result.table()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baselines": ("adam",)}, "baseline 'adam': choose from adamw, sgd"),
        ({"budgets": ()}, r"budgets=\(\): give at least one"),
        ({"budgets": (0,)}, r"budgets=\(0,\): give at least one"),
        ({"episodes": 1}, "episodes=1: must be at least 2"),
        ({"tuning_episodes": 0}, "tuning_episodes=0: must be at least 1"),
        ({"tasks": [line(0)]}, "tasks is of type list: it must be a function"),
        ({"tuning": lambda number: 5}, "returned int for number 1000000"),
        ({"start": Start(values={"x": X})}, "start has a value for 'x', which is none of this"),
        ({"tasks": lambda n: line(n, lambda m: {"r2": 0.0})}, "metric 'r2', which its source"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(options, message):
    options = {"tasks": line, **SMALL, **options}
    with pytest.raises(InputError, match=message):
        compare(SGD(0.1), Learner(net()), **options)


def test_another_rule_is_a_row_that_a_journal_knows_by_its_weights(tmp_path):
    found = [
        compare(
            SGD(0.1), Learner(net()), line, baselines=(),
            own_baselines={"rule": rule_baseline(SGD(lr))}, journal=tmp_path / "runs", **SMALL,
        ).figures["values"]
        for lr in (0.1, 0.2)
    ]  # fmt: skip
    assert found[0]["rule"] == found[0]["learned"] == found[1]["learned"] != found[1]["rule"]


def test_a_baseline_may_start_elsewhere():
    learner = Learner(net())
    nothing = {name: 0 * value for name, value in learner.initial_values.items()}
    own = {
        "pretrained": rule_baseline(SGD(0.0)),
        "nothing": rule_baseline(SGD(0.0), Start(values=nothing)),
    }
    result = compare(SGD(0.0), learner, line, baselines=(), own_baselines=own, **SMALL)
    values = {name: of["loss"]["2"] for name, of in result.figures["values"].items()}
    slopes = [1 + (TEST_TASKS + number) % 5 for number in range(3)]
    assert values["learned"] == values["pretrained"]
    assert values["nothing"] == pytest.approx(
        [float((slope * X).square().mean()) for slope in slopes]
    )
    own = {"x": rule_baseline(SGD(0.0), Start(values={"x": X}))}
    with pytest.raises(InputError, match="start has a value for 'x'"):
        compare(SGD(0.0), learner, line, own_baselines=own, **SMALL)


def test_the_differences_are_from_the_method_that_is_named():
    result = compare(SGD(0.1), Learner(net()), line, **SMALL)
    table = result.table("adamw", {"learned": "mine", "adamw": "Adam"})
    assert re.findall(r"^\| (\S.*?) \|", table, re.M) == [
        "loss after", "mine", "Adam", "sgd", "*mine - Adam, paired*", "*sgd - Adam, paired*",
    ]  # fmt: skip
    there, back = result.paired("sgd", "learned"), result.figures["paired"]["sgd"]
    assert there["loss"]["2"]["mean"] == -back["loss"]["2"]["mean"]
    with pytest.raises(InputError, match="'x' is no method of this comparison; choose from learn"):
        result.table("x")


def test_a_rule_may_be_a_file_or_the_one_that_ships(tmp_path):
    save_rule(SGD(0.1), str(tmp_path / "rule.safetensors"))
    options = {"baselines": (), **SMALL}
    found, given, shipped, none = (
        compare(rule, Learner(net()), line, **options).figures["values"]
        for rule in (str(tmp_path), SGD(0.1), load_rule(SHIPPED_RULE), None)
    )
    assert found == given and shipped == none and shipped != given
    with pytest.raises(TypeError, match="expected an UpdateRule"):
        compare(SGD, Learner(net()), line, **options)


def test_progress_ends_with_all_runs_that_are_planned():
    seen = []
    compare(SGD(0.1), Learner(net()), line, progress=lambda *at: seen.append(at), **SMALL)
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert seen[-1][0] == seen[-1][1]


def test_any_metric_is_drawn(tmp_path):
    def measured(number):
        return line(number, lambda module: {"size": module[0].weight.detach().norm()})

    learner = Learner(net())
    source = TaskSource(measured, learner, {"size": Metric()})
    result = compare(SGD(0.1), learner, source, baselines=(), **SMALL)
    result.plot(tmp_path / "lines.png", "Lines", {"learned": "mine"})
    assert (tmp_path / "lines.png").stat().st_size > 0
