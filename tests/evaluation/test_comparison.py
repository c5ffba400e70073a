"""The comparison: tuned where it should be, paired, resumable, and fair."""

import json
import math
import zlib

import numpy as np
import pytest
import torch

from rnnopt import SGD, Adam, InputError
from rnnopt.data.files import read_corpus
from rnnopt.data.splits import divide_classes
from rnnopt.evaluation.baselines import BASELINES
from rnnopt.evaluation.comparison import Comparison, default_budgets
from rnnopt.evaluation.journal import Journal
from rnnopt.evaluation.report.tables import comparison_table
from rnnopt.evaluation.statistics import interval
from rnnopt.tasks.adaptation import Adaptation
from rnnopt.tasks.episodes import EpisodeSampler
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.frozen import DIRECT
from rnnopt.tasks.text.tasks import TextTasks


@pytest.fixture(scope="module")
def sources(encoder, csv_file):
    splits = divide_classes(read_corpus(csv_file))
    classifier = Classifier.load(encoder, tune="head", ways=2, device=torch.device("cpu"))
    return classifier, *(
        TextTasks(EpisodeSampler(corpus, ways=2, shots=2, queries=4, seed=0), classifier)
        for corpus in (splits.validation, splits.test)
    )


def comparison(sources, journal, rule=None, baselines=("adamw", "sgd"), tick=lambda name: None):
    classifier, tuning, report = sources
    return Comparison(
        classifier,
        rule or SGD(0.5),
        "rule",
        tuning,
        report,
        (1, 3),
        baselines,
        journal,
        tick,
        direct=DIRECT,
    )


def test_the_result_has_the_promised_shape(sources, tmp_path):
    result = comparison(sources, Journal(tmp_path / "j", {})).run(3, 2)
    json.dumps(result, allow_nan=False)
    assert result["episodes"] == 3
    assert set(result["methods"]) == {"learned", "adamw", "sgd"}
    for name, method in result["methods"].items():
        for metric in ("accuracy", "loss"):
            assert set(method[metric]) == {"1", "3"}
            assert set(method[metric]["1"]) == {"mean", "ci95"}
        assert method["seconds_per_step"] > 0
        assert ("tuned" in method) == (name != "learned")
    for name in ("adamw", "sgd"):
        assert set(result["methods"][name]["tuned"]["lr"].values()) <= set(BASELINES[name].grid)
        assert set(result["paired"][name]["accuracy"]) == {"1", "3"}


def test_every_method_sees_the_same_tasks_from_the_same_weights(sources, tmp_path):
    """SGD as the rule and SGD as the baseline, at the same rate, score the same on each task."""
    _, _, report = sources
    run = comparison(sources, Journal(tmp_path / "j", {}), SGD(0.1, momentum=0.9), ["sgd"])
    for number in range(3):
        ours, theirs = run._learned(number), run._baseline("sgd", 0.1, number, report, (1, 3))
        for budget in (1, 3):
            assert ours.scores[budget]["loss"] == pytest.approx(
                theirs.scores[budget]["loss"], rel=1e-5
            )


def test_the_rate_is_chosen_on_validation_tasks_for_each_budget_and_metric(sources, tmp_path):
    journal = Journal(tmp_path / "j", {})
    run = comparison(sources, journal, baselines=["sgd"])
    result = run.run(2, 3)
    runs = [json.loads(line) for line in (tmp_path / "j").read_text().splitlines()[1:]]
    for budget in ("1", "3"):
        mean = {
            lr: np.mean(
                [
                    r["scores"][budget]["loss"]
                    for r in runs
                    if r["run"].startswith(f"sgd {lr:g} tuning")
                ]
            )
            for lr in BASELINES["sgd"].grid
        }
        tuned = result["methods"]["sgd"]["tuned"]["lr_for_loss"][budget]
        assert tuned == min(mean, key=mean.get)
        reported = np.mean(
            [
                r["scores"][budget]["loss"]
                for r in runs
                if r["run"].startswith(f"sgd {tuned:g} report")
            ]
        )
        assert result["methods"]["sgd"]["loss"][budget]["mean"] == pytest.approx(reported)


def test_each_metric_has_the_rate_that_is_best_for_it(sources, tmp_path, monkeypatch):
    run = comparison(sources, Journal(tmp_path / "j", {}), baselines=["sgd"])
    _, accurate, cautious, *_ = BASELINES["sgd"].grid

    def made(name, lr, number, source, budgets):
        loss, accuracy = 0.5 if lr == cautious else 1.0, 0.8 if lr == accurate else 0.5
        score = {"loss": loss, "accuracy": accuracy}
        return Adaptation(dict.fromkeys(budgets, score), 0.1)

    monkeypatch.setattr(run, "_baseline", made)
    chosen = run._tune("sgd", 2, (1, 3))
    assert chosen["accuracy"] == {1: accurate, 3: accurate}
    assert chosen["loss"] == {1: cautious, 3: cautious}


def test_paired_differences_are_learned_minus_baseline(sources, tmp_path):
    result = comparison(sources, Journal(tmp_path / "j", {})).run(3, 2)
    for name in ("adamw", "sgd"):
        for metric in ("accuracy", "loss"):
            means = [result["methods"][m][metric]["3"]["mean"] for m in ("learned", name)]
            assert result["paired"][name][metric]["3"]["mean"] == pytest.approx(means[0] - means[1])


def test_a_stopped_comparison_goes_on_where_it_was(sources, tmp_path):
    whole = comparison(sources, Journal(tmp_path / "whole", {"a": 1})).run(2, 2)
    seen = []

    def stop(name):
        seen.append(name)
        if len(seen) == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        comparison(sources, Journal(tmp_path / "cut", {"a": 1}), tick=stop).run(2, 2)
    with (tmp_path / "cut").open("a") as file:
        file.write('{"run": "cut off by a cra')
    kept = Journal(tmp_path / "cut", {"a": 1})
    assert len(kept._runs) == 10
    resumed = comparison(sources, kept).run(2, 2)
    strip = lambda result: json.dumps(result["paired"])  # noqa: E731  times differ
    assert strip(resumed) == strip(whole)


def test_a_run_is_done_again_for_budgets_that_it_lacks(tmp_path):
    journal, calls = Journal(tmp_path / "j", {}), []

    def adapt(budgets):
        calls.append(budgets)
        return Adaptation({b: {"loss": 1.0, "accuracy": 0.5} for b in budgets}, 0.1, undone=2)

    for budgets in ([1], [1], [1, 3], [3]):
        journal.run("x", budgets, lambda budgets=budgets: adapt(budgets))
    assert calls == [[1], [1, 3]]
    kept = Journal(tmp_path / "j", {}).run("x", [3], lambda: pytest.fail("it is there"))
    assert kept == Adaptation({b: {"loss": 1.0, "accuracy": 0.5} for b in (1, 3)}, 0.1, undone=2)


def test_f1_is_told_at_the_rate_of_the_accuracy_and_left_out_where_it_was_not_kept(
    sources, tmp_path
):
    result = comparison(sources, Journal(tmp_path / "j", {})).run(2, 1)
    runs = Journal(tmp_path / "j", {})._runs
    for budget, lr in result["methods"]["sgd"]["tuned"]["lr"].items():
        kept = [runs[f"sgd {lr:g} report {number}"]["scores"][budget] for number in range(2)]
        assert result["values"]["sgd"]["f1"][budget] == [row["f1"] for row in kept]
    head, *lines = (tmp_path / "j").read_text().splitlines()
    old = [json.loads(line) for line in lines]
    for run in old:  # as if the metric had been declared later
        del run["check"]
        for row in run["scores"].values():
            del row["f1"]
        run["check"] = zlib.crc32(json.dumps(run).encode())
    (tmp_path / "old").write_text("\n".join([head, *map(json.dumps, old)]) + "\n")
    again = comparison(sources, Journal(tmp_path / "old", {})).run(2, 1)
    assert (tmp_path / "old").read_text().count("\n") == len(lines) + 1
    assert "f1" not in again["methods"]["sgd"]
    for metric in ("accuracy", "loss"):
        assert again["values"]["sgd"][metric] == result["values"]["sgd"][metric]


class Rash(Adam):
    """Adam that must be taken back, once."""

    def fallback(self):
        return Adam(1e-5)


def test_what_the_guard_took_back_is_told(sources, tmp_path):
    result = comparison(sources, Journal(tmp_path / "j", {}), Rash(100.0), ["sgd"]).run(3, 1)
    assert result["methods"]["learned"]["undone"] >= 3
    assert f"took back, in all episodes: {result['methods']['learned']['undone']}." in (
        comparison_table(result)
    )
    assert "took back" not in comparison_table(
        comparison(sources, Journal(tmp_path / "k", {}), baselines=["sgd"]).run(3, 1)
    )


def test_a_baseline_of_ones_own_is_tuned_like_the_others(sources, tmp_path):
    classifier, tuning, report = sources
    own = {"mine": BASELINES["sgd"]}
    result = Comparison(
        classifier, SGD(0.5), "rule", tuning, report, (1, 3), ("mine", "sgd"),
        Journal(tmp_path / "j", {}), own_baselines=own,
    ).run(2, 1)  # fmt: skip
    mine, theirs = (result["methods"][name] for name in ("mine", "sgd"))
    assert mine["tuned"] == theirs["tuned"] and mine["accuracy"] == theirs["accuracy"]


def test_a_journal_of_other_facts_is_refused_and_kept(tmp_path):
    Journal(tmp_path / "j", {"a": 1, "b": 2})
    before = (tmp_path / "j").read_bytes()
    with pytest.raises(InputError, match=r"another comparison \(a: 1 there, 2 here\); choose"):
        Journal(tmp_path / "j", {"a": 2, "b": 2})
    assert (tmp_path / "j").read_bytes() == before


def test_a_line_cut_by_a_crash_costs_that_run_only(tmp_path):
    one = Adaptation({1: {"loss": 1.0, "accuracy": 0.5}}, 0.1)
    Journal(tmp_path / "j", {}).run("a", [1], lambda: one)
    with (tmp_path / "j").open("a") as file:
        file.write('{"run": "cut off by a cra')
    Journal(tmp_path / "j", {}).run("b", [1], lambda: one)
    assert set(Journal(tmp_path / "j", {})._runs) == {"a", "b"}


def test_a_file_that_is_no_journal_is_refused(tmp_path):
    (tmp_path / "j").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"can't use .*; choose another --json"):
        Journal(tmp_path / "j", {})


def test_an_unknown_baseline_is_refused(sources, tmp_path):
    with pytest.raises(InputError, match="baseline 'lion': choose from adamw, sgd"):
        comparison(sources, Journal(tmp_path / "j", {}), baselines=["lion"])


@pytest.mark.parametrize(
    ("steps", "budgets"),
    [(1, (1,)), (4, (1, 2, 3, 4)), (10, (1, 2, 3, 5, 10)), (40, (1, 2, 3, 5, 10, 20, 40))],
)
def test_budgets(steps, budgets):
    assert default_budgets(steps) == budgets


def test_no_steps_are_refused():
    with pytest.raises(InputError, match="steps=0: must be at least 1"):
        default_budgets(0)


def test_an_interval_is_that_of_a_textbook():
    """10 figures, mean 5.5, deviation 3.028; the quantile for 9 degrees of freedom is 2.262."""
    cell = interval(np.arange(1.0, 11.0))
    assert cell["mean"] == 5.5
    assert cell["ci95"] == pytest.approx(2.262157 * 3.027650 / math.sqrt(10), rel=1e-6)


def test_equal_figures_have_an_interval_of_no_width():
    assert interval(np.full(5, 0.25)) == {"mean": 0.25, "ci95": 0.0}


def test_an_interval_covers_the_mean_95_times_in_100():
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        cell = interval(generator.normal(3.0, 2.0, size=8))
        inside += abs(cell["mean"] - 3.0) <= cell["ci95"]
    assert abs(inside / 2000 - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 2000)


def test_what_needs_no_tuning_is_run_once_and_a_schedule_for_every_budget(sources, tmp_path):
    journal = Journal(tmp_path / "j", {})
    names = ("muon-default", "adamw-default", "nearest-mean", "logistic")
    run = comparison(sources, journal, baselines=names)
    ticks = []
    run.tick = ticks.append
    result = run.run(3, 2)
    # nothing is tuned: the rule, muon and the two references 3 runs each, the schedule 3 of each
    assert len(ticks) == run.planned == 3 * 4 + 3 * 2
    assert not any("tuning" in name for name in ticks)
    assert [name for name in ticks if name.startswith("adamw-default 5e-05 report 2")] == [
        "adamw-default 5e-05 report 2 of 1 steps",
        "adamw-default 5e-05 report 2 of 3 steps",
    ]
    assert list(result["methods"]) == ["learned", *names]
    assert not any("tuned" in result["methods"][name] for name in names)
    for name in ("nearest-mean", "logistic"):
        method = result["methods"][name]
        assert method["frozen"] and method["seconds"] > 0
        assert method["accuracy"]["1"] == method["accuracy"]["3"]


def test_tuned_baselines_may_have_a_longer_horizon(sources, tmp_path):
    classifier, tuning, report = sources
    result = Comparison(
        classifier, SGD(0.5), "rule", tuning, report, (1, 2), ["sgd", "muon-default"],
        Journal(tmp_path / "j", {}), tuned_budgets=(1, 2, 4),
    ).run(2, 2)  # fmt: skip
    assert list(result["methods"]["sgd"]["loss"]) == ["1", "2", "4"]
    assert list(result["methods"]["sgd"]["tuned"]["lr"]) == ["1", "2", "4"]
    assert list(result["methods"]["muon-default"]["loss"]) == ["1", "2"]
    assert list(result["paired"]["sgd"]["loss"]) == ["1", "2"]


def test_the_plan_ends_at_the_runs_that_were_needed(sources, tmp_path):
    run, plans = comparison(sources, Journal(tmp_path / "j", {})), []
    run.tick = lambda name: plans.append(run.planned)
    run.run(2, 1)
    assert len(plans) == plans[-1]
    assert plans == sorted(plans, reverse=True) and plans[0] > plans[-1]


def test_figures_of_every_episode_are_kept_and_pair(sources, tmp_path):
    result = comparison(sources, Journal(tmp_path / "j", {})).run(3, 1)
    values = result["values"]
    for name in ("adamw", "sgd"):
        for metric in ("accuracy", "loss"):
            difference = np.subtract(values["learned"][metric]["3"], values[name][metric]["3"])
            assert len(difference) == 3
            assert result["paired"][name][metric]["3"] == pytest.approx(interval(difference))


@pytest.mark.parametrize("change", ["a digit", "cut", "nested", "other keys", "a list"])
def test_a_run_that_the_disk_has_changed_is_made_again(tmp_path, change):
    def run():
        made.append(1)
        return Adaptation({1: {"loss": 0.25, "accuracy": 0.5}}, 0.1)

    made = []
    Journal(tmp_path / "j", {"a": 1}).run("x", [1], run)
    head, line = (tmp_path / "j").read_text().splitlines()
    line = {
        "a digit": line.replace("0.25", "0.35"),
        "cut": line[:40],
        "nested": line.replace("0.25", "[" * 100_000),
        "other keys": line.replace("scores", "score"),
        "a list": "[1, 2]",
    }[change]
    (tmp_path / "j").write_text(f"{head}\n{line}\n")
    assert Journal(tmp_path / "j", {"a": 1}).run("x", [1], run).scores[1]["loss"] == 0.25
    assert made == [1, 1]


@pytest.mark.parametrize("content", ["null", "[]", "7", "[1, 2]"])
def test_a_file_that_is_no_journal_is_left_alone(tmp_path, content):
    (tmp_path / "j").write_text(f"{content}\n")
    with pytest.raises(InputError, match="holds the runs of another comparison"):
        Journal(tmp_path / "j", {"a": 1})
    assert (tmp_path / "j").read_text() == f"{content}\n"


def test_a_journal_whose_first_line_was_cut_off_begins_again(tmp_path):
    Journal(tmp_path / "j", {"a": 1})
    whole = (tmp_path / "j").read_text()
    for end in (0, 3, len(whole) - 1):
        (tmp_path / "j").write_text(whole[:end])
        Journal(tmp_path / "j", {"a": 1})
        assert (tmp_path / "j").read_text() == whole
