"""Meta-training of initial values: it learns, resumes bit for bit, and keeps the best."""

import json
from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import load_file

from rnnopt import SGD, Adam, InputError, MetaSGD, TwoLevelLSTM, load_rule
from rnnopt.data.files import read_corpus
from rnnopt.data.splits import divide_classes
from rnnopt.meta.settings import LearnedSettings, MetaTrainSettings, UnrollSettings
from rnnopt.meta.training import MetaTraining
from rnnopt.tasks.episodes import EpisodeSampler
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.start import TextStart
from rnnopt.tasks.text.tasks import TextTasks

CPU = torch.device("cpu")
# Between them every inner rule, order, head, and way to learn initial values.
VARIANTS = {
    "maml with the lstm": {"init": "maml"},
    "maml, order 2": {"init": "maml", "inner": "sgd", "order": 2, "init_penalty": 0.1},
    "anil": {"init": "maml", "inner": "meta-sgd", "adapted": "head", "head": "prototype"},
    "reptile": {"init": "reptile", "inner": "adam", "head": "zero"},
    "meta-sgd alone": {"inner": "meta-sgd", "head": "prototype"},
}


@pytest.fixture(scope="module")
def sources(encoder, csv_file):
    """Training tasks, validation tasks."""
    splits = divide_classes(read_corpus(csv_file))
    classifier = Classifier.load(
        encoder, tune="lora", lora_rank=2, pooling="mean", ways=2, double_backward=True, device=CPU
    )
    return [
        TextTasks(EpisodeSampler(corpus, ways=2, shots=4, queries=4, seed=0), classifier)
        for corpus in (splits.train, splits.validation)
    ]


def settings(meta_steps=4, order=1, **options):
    chosen = {"validate_every": 2, "validation_tasks": 2, "checkpoint_every": 2, **options}
    start = TextStart(chosen.pop("adapted", "all"), head=chosen.pop("head", "random"))
    chosen["start"] = start
    names = {field.name for field in fields(LearnedSettings)} & chosen.keys()
    learned = LearnedSettings(**{"init_lr": 1e-3, **{name: chosen.pop(name) for name in names}})
    unrolled = UnrollSettings(2, order=order)
    return MetaTrainSettings(meta_steps, unrolled, shortest=1, learned=learned, **chosen)


def training(sources, folder, chosen, resume=False):
    return MetaTraining(*sources, chosen, folder, {"data": "things"}, {"note": 1}, resume)


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(sources, tmp_path, name):
    chosen = settings(5, **VARIANTS[name])
    training(sources, tmp_path / "whole", chosen).run()

    def stop(record):
        if record["meta_step"] == 3:  # one meta-step after the checkpoint
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training(sources, tmp_path / "cut", chosen).run(stop)
    resumed = training(sources, tmp_path / "cut", chosen, resume=True)
    assert resumed.progress.meta_step == 2
    resumed.run()
    whole, cut = (
        load_file(tmp_path / folder / "checkpoint.safetensors") for folder in ("whole", "cut")
    )
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    assert [{**line, "seconds": 0} for line in records(tmp_path / "cut")] == [
        {**line, "seconds": 0} for line in records(tmp_path / "whole")
    ]
    assert any(key.startswith("init.") for key in whole) == ("init" in VARIANTS[name])


@pytest.mark.parametrize("name", VARIANTS)
def test_everything_that_is_learned_moves(sources, tmp_path, name):
    run = training(sources, tmp_path, settings(2, **VARIANTS[name]))
    before = {key: leaf.clone() for key, leaf in run.learned.state_dict().items()}
    for _ in range(2):  # LoRA's A has no gradient before B has moved
        run._meta_step()
    moved = {
        key: not torch.equal(leaf, before[key]) for key, leaf in run.learned.state_dict().items()
    }
    assert moved
    assert all(moved.values()), moved


def test_meta_learned_values_lower_the_validation_loss_and_the_best_are_kept(
    encoder, csv_file, tmp_path
):
    splits = divide_classes(read_corpus(csv_file))
    classifier = Classifier.load(encoder, tune="full", pooling="mean", ways=2, device=CPU)
    sources = [
        TextTasks(EpisodeSampler(corpus, ways=2, shots=4, queries=4, seed=0), classifier)
        for corpus in (splits.train, splits.validation)
    ]
    chosen = settings(
        20, init="maml", inner="sgd", head="prototype", init_lr=5e-3, validate_every=5,
        inner_lr=0.01, validation_tasks=8,
    )  # fmt: skip
    run = training(sources, tmp_path, chosen)
    run.run()
    scores = {
        record["meta_step"]: record["validation"]["score"]
        for record in records(tmp_path)
        if "validation" in record
    }
    # other classes than it learned from: to tell the frames of a sentence from its noun
    assert min(scores.values()) < scores[0] - 0.01
    assert run.progress.best_step == min(scores, key=scores.get) > 0
    saved = TextStart.read(tmp_path, classifier)
    best = load_file(tmp_path / "checkpoint.safetensors")
    for key, value in saved.values.items():
        assert torch.equal(value, best["best.init." + key.replace(".", "/")])
        assert torch.equal(value, run.learned.init.values()[key])


def test_the_initial_gradients_of_tasks_are_averaged_over_their_steps(sources, tmp_path):
    """Two tasks in one meta-step give the mean of their meta-gradients (clipping off)."""
    gradients, steps = [], []
    for tasks, first in ((1, 0), (1, 1), (2, 0)):
        chosen = settings(1, init="maml", tasks_per_meta_step=tasks, clip=1e9, head="prototype")
        chosen = replace(chosen, shortest=None)
        run = training(sources, tmp_path / f"{tasks}{first}", chosen)
        run.progress.meta_step = first
        steps.append(len(run._meta_step()["query_losses"]))
        gradients.append([value.grad.clone() for value in run.learned.init.parameters()])
    for one, other, both in zip(*gradients):
        torch.testing.assert_close(both, (one + other) / 2)


@pytest.mark.parametrize("head", ["random", "prototype"])
def test_reptile_moves_the_values_by_the_displacement_alone(sources, tmp_path, head):
    """No part of it passes through a prototype head: nothing is differentiated."""
    run = training(sources, tmp_path, settings(init="reptile", inner="sgd", head=head))
    result, _ = run._unroll(0)
    for key, value in run.learned.init.values().items():
        assert torch.equal(value.grad, result.initial[key])


def test_rule_and_initial_values_are_clipped_each_by_itself(sources, tmp_path):
    run = training(sources, tmp_path, settings(2, init="maml", clip=1e-6))
    run.run()
    for learned in (run.learned.rule, run.learned.init):
        squares = [weight.grad.square().sum() for weight in learned.parameters()]
        assert 0.9e-6 <= float(torch.stack(squares).sum().sqrt()) <= 1.01e-6


def test_the_learning_rates_of_rule_and_initial_values_fall_side_by_side(sources, tmp_path):
    run = training(sources, tmp_path, settings(3, init="maml", meta_lr=0.01, init_lr=1e-3))
    rates = []
    run.run(lambda record: rates.append([g["lr"] for g in run.meta_optimizer.param_groups]))
    assert rates[1] == pytest.approx([0.01, 1e-3])
    assert rates[2][0] < rates[1][0]
    assert rates[2][1] == pytest.approx(0.1 * rates[2][0])


def test_a_penalty_keeps_the_values_close(sources, tmp_path):
    distances = []
    for penalty in (0.0, 100.0):
        chosen = settings(8, init="maml", inner="sgd", init_penalty=penalty, clip=1e9)
        training(sources, tmp_path / str(penalty), chosen).run()
        distances.append(records(tmp_path / str(penalty))[-1]["init_distance"])
    assert distances[1] < 0.6 * distances[0]


@pytest.mark.parametrize(
    ("inner", "kind"),
    [("lstm", TwoLevelLSTM), ("meta-sgd", MetaSGD), ("sgd", SGD), ("adam", Adam)],
)
def test_the_run_folder_holds_the_inner_rule(sources, tmp_path, inner, kind):
    rate = None if kind is TwoLevelLSTM else 0.02
    chosen = settings(1, init="maml", inner=inner, inner_lr=rate)
    training(sources, tmp_path, chosen).run()
    rule = load_rule(tmp_path)
    assert type(rule) is kind
    assert rate is None or rule.step_size == rate


def test_a_crash_between_the_old_init_and_the_new_one_is_mended(sources, tmp_path):
    chosen = settings(2, init="maml", inner="sgd")
    training(sources, tmp_path, chosen).run()
    values = TextStart.read(tmp_path, sources[0].classifier).values
    (tmp_path / "init").rename(tmp_path / ".init.old")
    training(sources, tmp_path, chosen, resume=True).run()
    again = TextStart.read(tmp_path, sources[0].classifier)
    assert all(torch.equal(again.values[key], value) for key, value in values.items())


def test_one_run_leaves_the_classifier_to_the_next(sources, tmp_path):
    """Its values are put in at the beginning of a task, not into the classifier's own."""
    before = sources[0].classifier.initial_values
    training(sources, tmp_path, settings(2, init="maml")).run()
    after = sources[0].classifier.initial_values
    assert all(torch.equal(before[key], after[key]) for key in before)
    task = sources[0].load(0)
    TextStart().begin(sources[0].classifier, task, seed=0)
    params = dict(sources[0].classifier.trainable())
    assert all(torch.equal(params[key], before[key]) for key in before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": "sgd"}, "--inner sgd with --init pretrained: neither has anything to learn"),
        ({"adapted": "head"}, "--adapt-only head with --init pretrained"),
        ({"init": "reptile", "adapted": "head"}, "--init reptile with --adapt-only head"),
        ({"init": "reptile", "order": 2}, "Reptile.* with order 2"),
        ({"init_lr": 0.0}, "init_lr=0.0: must be positive"),
        ({"inner_lr": -1.0}, "inner_lr=-1.0: must be positive"),
        ({"init_penalty": -1.0}, "init_penalty=-1.0: must be finite and at least 0"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        settings(**options)
