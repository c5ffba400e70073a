"""Multi-task pre-training: what it learns, what it leaves alone, that it goes on where it was."""

import json
import math

import numpy as np
import pytest
import torch
from multitask import MultitaskSettings, MultitaskTraining

from rnnopt import InputError
from rnnopt.data.splits import read_splits
from rnnopt.tasks.episodes import EpisodeSampler
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.start import TextStart
from rnnopt.tasks.text.tasks import TextTasks

DEVICE = torch.device("cpu")


@pytest.fixture(scope="module")
def splits(csv_file):
    return read_splits([csv_file])


@pytest.fixture
def training(encoder, splits, tmp_path):
    """A run in a folder; `more` are settings."""

    def make(folder="run", corpus=splits.train, tune="lora", **more):
        settings = {"lr": 3e-3, "steps": 30, "check_every": 10, "validation_tasks": 4, **more}
        sampler = EpisodeSampler(splits.validation, ways=2, shots=2, queries=5, seed=0)
        validation = TextTasks(sampler, Classifier.load(encoder, tune=tune, ways=2, device=DEVICE))
        classifier = Classifier.load(encoder, tune=tune, ways=2, device=DEVICE)
        return MultitaskTraining(
            classifier, corpus, validation, MultitaskSettings(**settings),
            tmp_path / folder, {"encoder": "tiny"}, {"classes": {}},
        )  # fmt: skip

    return make


def log_of(run):
    return [json.loads(line) for line in (run.folder.path / "log.jsonl").read_text().splitlines()]


def test_the_loss_over_all_classes_falls_and_the_best_values_are_kept(training, splits):
    run = training(tune="full", steps=150, check_every=50, lr=3e-3)
    pretrained = run.classifier.initial_values
    folder = run.run()
    log = log_of(run)
    assert [record["meta_step"] for record in log] == [0, 50, 100, 150]
    assert run.classifier.ways == len(splits.train.classes) == 6
    assert log[-1]["loss"] < 0.6 * math.log(6)  # that of a guess
    assert run.best_score == max(record["validation"]["score"] for record in log)
    start = TextStart.read(folder, run.validation.classifier)
    assert start.values.keys() == pretrained.keys()
    moved = any(not torch.equal(start.values[n], value) for n, value in pretrained.items())
    kept = json.loads((folder / "init.json").read_text())["training"]["step"]
    assert moved == (kept > 0)
    first = max(log, key=lambda record: record["validation"]["score"])
    assert kept == first["meta_step"]


def test_a_run_that_was_stopped_ends_with_the_same_weights(training):
    whole = training("whole")
    whole.run()
    stopped = training("stopped")

    def stop(record):
        if record["meta_step"] == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped.run(stop)
    resumed = training("stopped")
    resumed.run()
    assert log_of(resumed) == log_of(whole)
    ours, theirs = (dict(run.classifier.trainable()) for run in (resumed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert resumed.best_score == whole.best_score


def test_batches_count_classes_alike_whatever_their_size_and_the_rate(training, splits):
    # one class keeps two of its texts, all others theirs
    keys = sorted(splits.train.classes)
    rows = [
        *splits.train.classes[keys[0]][:2],
        *(i for k in keys[1:] for i in splits.train.classes[k]),
    ]
    few = splits.train.take(rows)
    run, other = training("a", few, batch_size=600), training("b", few, batch_size=600, lr=1e-4)
    texts, labels = run.draw(7)
    assert (texts, labels) == other.draw(7) and texts != run.draw(8)[0]
    counts = np.bincount(labels, minlength=6)
    assert counts.min() > 60 and len(counts) == 6  # 100 each, give or take 4 deviations
    for text, label in zip(texts, labels):
        assert few.labels[few.texts.index(text)] == keys[label][1]


def test_what_cannot_be_trained_is_refused(training, encoder):
    with pytest.raises(InputError, match=r"only the output layer trains.*use tune 'lora'"):
        training(tune="head")
    run = training()
    with pytest.raises(InputError, match="load the same kind of classifier twice"):
        MultitaskTraining(
            run.validation.classifier, run.corpus, run.validation, run.settings,
            run.folder.path / "other", {}, {},
        )  # fmt: skip
    with pytest.raises(InputError, match=r"lr: 0\.003 there, 0\.01 here"):
        training(lr=1e-2)


@pytest.mark.parametrize("setting", [{"steps": 0}, {"lr": 0.0}, {"batch_size": 0}])
def test_settings_out_of_range_are_refused(setting):
    (name,) = setting
    with pytest.raises(InputError, match=rf"{name}=.*must be"):
        MultitaskSettings(**{"lr": 1e-3, "steps": 1, **setting})
