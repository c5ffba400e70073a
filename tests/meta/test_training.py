"""Meta-training: it learns, it can be killed at any moment, and it goes on to the same weights."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from rule_table import random_lstm
from safetensors.torch import load_file

from rnnopt import InputError, load_rule
from rnnopt.cli.main import main
from rnnopt.data.files import read_corpus
from rnnopt.data.splits import divide_classes
from rnnopt.meta.settings import MetaTrainSettings, UnrollSettings
from rnnopt.meta.training import MetaTraining
from rnnopt.rules.files import read_training
from rnnopt.tasks.episodes import EpisodeSampler
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.tasks import TextTask, TextTasks

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sources(encoder, csv_file):
    """Classifier, training tasks, validation tasks."""
    splits = divide_classes(read_corpus(csv_file))
    classifier = Classifier.load(encoder, tune="head", pooling="mean", ways=2, device=CPU)
    return classifier, *(
        TextTasks(EpisodeSampler(corpus, ways=2, shots=12, queries=8, seed=0), classifier)
        for corpus in (splits.train, splits.validation)
    )


def settings(meta_steps=6, **options):
    unrolled = UnrollSettings(
        options.pop("steps", 3), step_weights=options.pop("step_weights", None)
    )
    chosen = {"validate_every": 3, "validation_tasks": 2, "checkpoint_every": 2, **options}
    return MetaTrainSettings(meta_steps, unrolled, **chosen)


def training(sources, folder, chosen, resume=False):
    return MetaTraining(*sources[1:], chosen, folder, {"data": "things"}, {"note": 1}, resume)


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same_files(one, other):
    a, b = (load_file(folder / "checkpoint.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_meta_training_lowers_the_validation_loss_and_keeps_the_best_rule(sources, tmp_path):
    run = training(sources, tmp_path, settings(40, meta_lr=0.02, steps=5, validate_every=10))
    rule = run.run()
    scores = {
        record["meta_step"]: record["validation"]["score"]
        for record in records(tmp_path)
        if "validation" in record
    }
    assert scores[40] < scores[0]  # a random encoder allows little; a wrong sign allows nothing
    assert run.progress.best_step == min(scores, key=scores.get)
    saved = load_rule(tmp_path)
    assert all(map(torch.equal, rule.parameters(), saved.parameters()))
    assert read_training(tmp_path) == {"note": 1, "meta_step": run.progress.best_step}


def test_the_log_has_a_line_for_every_meta_step(sources, tmp_path):
    training(sources, tmp_path, settings(4)).run()
    lines = records(tmp_path)
    assert [line["meta_step"] for line in lines] == [0, 1, 2, 3, 4]
    assert all(len(line["query_losses"]) == 3 for line in lines[1:])
    assert [line["meta_step"] for line in lines if "validation" in line] == [0, 3, 4]


def test_the_same_seed_gives_the_same_weights_and_another_does_not(sources, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        training(sources, tmp_path / name, settings(2, seed=seed)).run()
    assert same_files(tmp_path / "a", tmp_path / "b")
    assert not same_files(tmp_path / "a", tmp_path / "c")


def test_a_run_that_was_stopped_ends_as_one_that_was_not(sources, tmp_path):
    training(sources, tmp_path / "whole", settings(7)).run()

    def stop(record):
        if record["meta_step"] == 5:  # one meta-step after the checkpoint
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training(sources, tmp_path / "cut", settings(7)).run(stop)
    resumed = training(sources, tmp_path / "cut", settings(7), resume=True)
    assert resumed.progress.meta_step == 4
    resumed.run()
    assert same_files(tmp_path / "whole", tmp_path / "cut")
    for line, expected in zip(records(tmp_path / "cut"), records(tmp_path / "whole"), strict=True):
        assert {**line, "seconds": 0} == {**expected, "seconds": 0}


def test_a_stop_before_the_first_checkpoint_begins_again(sources, tmp_path):
    def stop(record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training(sources, tmp_path, settings(2)).run(stop)
    training(sources, tmp_path, settings(2), resume=True).run()
    assert [line["meta_step"] for line in records(tmp_path)] == [0, 1, 2]


def test_a_log_line_cut_by_a_crash_is_dropped(sources, tmp_path):
    training(sources, tmp_path, settings(2)).run()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"meta_step": 3, "meta_')
    training(sources, tmp_path, settings(4), resume=True).run()
    assert [line["meta_step"] for line in records(tmp_path)] == [0, 1, 2, 3, 4]


def test_more_meta_steps_continue_a_finished_run(sources, tmp_path):
    training(sources, tmp_path, settings(2)).run()
    longer = training(sources, tmp_path, settings(4), resume=True)
    assert longer.progress.meta_step == 2
    longer.run()
    assert longer.progress.meta_step == 4


def test_what_meets_the_requirement_is_kept_be_another_better_over_all_steps(sources, tmp_path):
    training(sources, tmp_path, settings(3)).run()
    again = training(sources, tmp_path, settings(3, until="loss<1000"), resume=True)
    again.progress.best_step = 1
    again.best = {name: leaf + 1 for name, leaf in again.best.items()}
    last = [weight.clone() for weight in again.rule.parameters()]
    rule = again.run()
    assert again.met
    assert all(map(torch.equal, rule.parameters(), last))
    assert all(map(torch.equal, load_rule(tmp_path).parameters(), last))
    assert read_training(tmp_path)["meta_step"] == 3
    resumed = training(sources, tmp_path, settings(3), resume=True)
    assert resumed.progress.best_step == 3
    assert not resumed.met  # nothing is asked


def test_a_requirement_is_met_by_a_fresh_validation_only(sources, tmp_path):
    """A rule that moved on since the last validation has not been judged."""

    def stop(record):
        if record["meta_step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training(sources, tmp_path, settings(9)).run(stop)  # validated at 3, checkpoint at 4
    resumed = training(sources, tmp_path, settings(9, until="loss<1000"), resume=True)
    assert not resumed.met
    resumed.run()
    assert resumed.met
    assert records(tmp_path)[-1]["meta_step"] == 6


class InfiniteTask(TextTask):
    """A task whose query loss is infinite."""

    def query_loss(self, module, step, calibrated=0.0):
        return super().query_loss(module, step, calibrated) * float("inf")


class SecondIsInfinite(TextTasks):
    def load(self, index):
        task = super().load(index)
        return (
            InfiniteTask(task.classifier, task.batches, task.query, task.ways)
            if index == 1
            else task
        )


def test_a_non_finite_meta_loss_skips_the_meta_step_and_is_counted(sources, tmp_path):
    classifier, train, validation = sources
    broken = SecondIsInfinite(train.sampler, classifier)
    run = training((classifier, broken, validation), tmp_path, settings(3))
    weights = []
    run.run(lambda record: weights.append([weight.clone() for weight in run.rule.parameters()]))
    lines = records(tmp_path)
    assert [line["skipped"] for line in lines[1:]] == [0, 1, 1]
    assert lines[2]["meta_loss"] is None
    assert all(map(torch.equal, weights[1], weights[2]))
    assert not all(map(torch.equal, weights[2], weights[3]))


def test_the_meta_gradient_is_clipped_and_the_meta_lr_falls_to_a_tenth(sources, tmp_path):
    run = training(sources, tmp_path, settings(5, clip=1e-6, meta_lr=0.01))
    rates = []
    run.run(lambda record: rates.append(run.meta_optimizer.param_groups[0]["lr"]))
    squares = [weight.grad.square().sum() for weight in run.rule.parameters()]
    assert float(torch.stack(squares).sum().sqrt()) <= 1.01e-6
    assert rates[1] == 0.01
    assert rates[1:] == sorted(rates[1:], reverse=True)
    run.progress.meta_step = 5
    assert run._meta_lr(0.01) == pytest.approx(0.001)


def test_the_shortest_unroll_draws_lengths_between(sources, tmp_path):
    training(sources, tmp_path, settings(12, shortest=1)).run()
    lengths = {len(line["query_losses"]) for line in records(tmp_path)[1:]}
    assert lengths == {1, 2, 3}


def test_the_calibrated_share_judges_training_and_validation(sources, tmp_path):
    runs = {}
    for share in (0.0, 0.5, 1.0):
        chosen = settings(2, meta_lr=1e-12, validate_every=1, calibrated_share=share)
        training(sources, tmp_path / str(share), chosen).run()
        runs[share] = records(tmp_path / str(share))
    scores = {share: lines[0]["validation"]["score"] for share, lines in runs.items()}
    assert scores[1.0] < scores[0.5] < scores[0.0]
    assert scores[0.5] == pytest.approx((scores[0.0] + scores[1.0]) / 2, rel=1e-5)
    losses = {share: lines[1]["meta_loss"] for share, lines in runs.items()}
    assert losses[0.5] == pytest.approx((losses[0.0] + losses[1.0]) / 2, rel=1e-5)


def test_before_it_may_be_sure_a_rule_is_judged_by_the_calibrated_loss_alone(sources, tmp_path):
    scores, losses = {}, {}
    for name, options in {
        "calibrated": {"calibrated_share": 1.0},
        "sure from 3": {"confidence_from": 3},
        "plain": {},
    }.items():
        chosen = settings(2, meta_lr=1e-12, validate_every=1, **options)
        training(sources, tmp_path / name, chosen).run()
        lines = records(tmp_path / name)
        scores[name] = lines[0]["validation"]["score"]
        losses[name] = lines[1]["query_losses"]
    assert len(losses["plain"]) == 3
    assert losses["sure from 3"] == [*losses["calibrated"][:2], losses["plain"][2]]
    assert scores["calibrated"] < scores["sure from 3"] < scores["plain"]


def test_exact_kinds_are_unrolled_in_second_order(sources, tmp_path):
    plain = settings(2)
    runs = {
        "first": plain,
        "exact": replace(plain, second_order_for=("head",)),
        "second": replace(plain, unroll=replace(plain.unroll, order=2)),
        "other kind": replace(plain, second_order_for=("full",)),
    }
    for name, chosen in runs.items():
        training(sources, tmp_path / name, chosen).run()
    assert same_files(tmp_path / "exact", tmp_path / "second")
    assert same_files(tmp_path / "other kind", tmp_path / "first")
    assert not same_files(tmp_path / "exact", tmp_path / "first")


def test_tasks_of_a_meta_step_are_averaged(sources, tmp_path):
    """Two tasks in one meta-step give the mean of their meta-gradients (clipping off)."""
    gradients = []
    for tasks, first in ((1, 0), (1, 1), (2, 0)):
        chosen = settings(1, tasks_per_meta_step=tasks, clip=1e9)
        run = training(sources, tmp_path / f"{tasks}{first}", chosen)
        run.rule.load_state_dict(random_lstm().state_dict())
        run.progress.meta_step = first
        run._meta_step()
        gradients.append([weight.grad.clone() for weight in run.rule.parameters()])
    for one, other, both in zip(*gradients):
        torch.testing.assert_close(both, (one + other) / 2)


def test_a_folder_with_a_run_is_not_overwritten(sources, tmp_path):
    training(sources, tmp_path, settings(1)).run()
    before = (tmp_path / "rule.safetensors").read_bytes()
    with pytest.raises(InputError, match="already holds a run; add --resume to continue it"):
        training(sources, tmp_path, settings(1))
    assert (tmp_path / "rule.safetensors").read_bytes() == before


def test_a_folder_with_something_else_is_left_alone(sources, tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(InputError, match="is not an empty folder; choose another --output"):
        training(sources, tmp_path, settings(1))


def test_a_damaged_run_is_refused(sources, tmp_path):
    training(sources, tmp_path, settings(2)).run()
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match="can't be resumed, its files are damaged"):
        training(sources, tmp_path, settings(2), resume=True)


def test_a_lost_log_starts_anew(sources, tmp_path):
    training(sources, tmp_path, settings(2)).run()
    (tmp_path / "log.jsonl").unlink()
    training(sources, tmp_path, settings(4), resume=True).run()
    assert [line["meta_step"] for line in records(tmp_path)] == [3, 4]


def test_resuming_with_other_settings_is_refused_and_names_them(sources, tmp_path):
    training(sources, tmp_path, settings(2, meta_lr=0.01)).run()
    with pytest.raises(InputError, match=r"other settings \(meta_lr: 0.01 there, 0.02 here\)"):
        training(sources, tmp_path, settings(2, meta_lr=0.02), resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"meta_steps": 0}, "meta_steps=0: must be at least 1"),
        ({"meta_lr": 0.0}, "meta_lr=0.0: must be positive and finite"),
        ({"clip": float("nan")}, "clip=nan: must be positive and finite"),
        ({"step_weights": (0, 0, 1), "shortest": 1}, "all 0 within the shortest unroll of 1"),
        ({"until": "accuracy@4>0.5"}, "budget @4 must lie between 1 and 3"),
        ({"query_share": 0.0}, "query_share=0.0: must be a share of the steps, above 0"),
        ({"loss_scale": 0.5}, "loss_scale=0.5: must be finite and at least 1"),
        ({"calibrated_share": 1.1}, "calibrated_share=1.1: must be a share, from 0 to 1"),
        ({"confidence_from": 4}, "confidence_from=4: must lie between 1 and the last step, 3"),
        ({"shortest": 4}, "shortest unroll of 4 steps: must lie between 1 and the longest, 3"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        settings(**options)


def command(folder, csv_file, encoder, *more):
    return [
        "meta-train", "--data", str(csv_file),
        "--encoder", str(encoder), "--ways", "2", "--shots", "2", "--queries", "3",
        "--steps", "3", "--tune", "lora", "--lora-rank", "2", "--meta-steps", "12",
        "--validate-every", "5", "--validation-tasks", "2", "--checkpoint-every", "3",
        "--device", "cpu", "--output", str(folder), *more,
    ]  # fmt: skip


def test_a_killed_process_resumes_to_the_same_weights_bit_for_bit(tmp_path, csv_file, encoder):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    victim = subprocess.Popen(
        [sys.executable, "-m", "rnnopt", *command(cut, csv_file, encoder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not (cut / "checkpoint.safetensors").exists():
        assert victim.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(victim.pid, signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    assert 3 <= records(cut)[-1]["meta_step"] < 12
    # this process ends what the other one began, as any process would
    assert main(command(cut, csv_file, encoder, "--resume")) == 0
    assert main(command(whole, csv_file, encoder)) == 0
    assert same_files(whole, cut)
    assert (whole / "rule.safetensors").read_bytes() == (cut / "rule.safetensors").read_bytes()


def test_numpy_streams_behind_the_unroll_lengths_are_pinned():
    """A changed stream would silently change what a seed means."""
    assert np.random.default_rng([0, 5]).integers(1, 11) == 7
