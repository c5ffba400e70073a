"""The baselines of a comparison: each is what its authors say it is."""

import importlib.util
import sys

import pytest
import torch

from rnnopt import InputError
from rnnopt.data.files import read_corpus
from rnnopt.evaluation.baselines import BASELINES, require_baseline
from rnnopt.tasks.adaptation import adapt_and_judge
from rnnopt.tasks.episodes import EpisodeSampler
from rnnopt.tasks.kinds import KINDS, tensor_kinds
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.tasks import TextTasks, judge


def installed(name):
    package = BASELINES[name].package
    return package is None or importlib.util.find_spec(package) is not None


BASELINE = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(not installed(name), reason=f"{name}'s package isn't installed"),
    )
    for name in BASELINES
]


@pytest.fixture(scope="module")
def classifier(encoder):
    return Classifier.load(encoder, tune="full", ways=3, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def task(classifier, csv_file):
    sampler = EpisodeSampler(read_corpus(csv_file), ways=3, shots=2, queries=2, seed=0)
    return TextTasks(sampler, classifier).load(0)


def values(classifier):
    return {name: param.detach().clone() for name, param in classifier.trainable()}


def run(classifier, task, optimizer, steps):
    adapt_and_judge(classifier, optimizer, task, (steps,))
    return values(classifier)


@pytest.mark.parametrize("name", BASELINE)
def test_every_baseline_moves_every_tensor_that_has_a_gradient(name, classifier, task):
    classifier.reset(3, seed=0)
    before = values(classifier)
    baseline = BASELINES[name]
    after = run(
        classifier,
        task,
        baseline.build(classifier, dict(classifier.trainable()), baseline.grid[0], 5),
        5,
    )
    for key, value in after.items():
        gradient = classifier.model.get_parameter(key).grad
        assert torch.isfinite(value).all()
        if gradient.abs().max() > 1e-4:  # BERT's attention has no use for a bias of its keys
            assert not torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", BASELINE)
def test_a_run_is_a_function_of_its_start(name, classifier, task):
    runs = []
    for _ in range(2):
        classifier.reset(3, seed=0)
        baseline = BASELINES[name]
        runs.append(
            run(
                classifier,
                task,
                baseline.build(classifier, dict(classifier.trainable()), baseline.grid[0], 3),
                3,
            )
        )
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])


def test_what_is_tuned_has_five_rates_or_more_and_the_rest_one():
    assert {name for name, baseline in BASELINES.items() if baseline.tuned} == {
        "adamw",
        "sgd",
        "muon",
    }
    for baseline in BASELINES.values():
        assert list(baseline.grid) == sorted(baseline.grid)
        assert len(baseline.grid) >= 5 or not baseline.tuned


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_usual_adamw_decays_linearly_over_the_steps_of_its_run(steps, classifier):
    """As transformers' linear schedule: step k of T has (1 - (k - 1) / T) of the first's rate."""
    classifier.reset(3, seed=0)
    optimizer = BASELINES["adamw-default"].build(
        classifier, dict(classifier.trainable()), 5e-5, steps
    )
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        for _, param in classifier.trainable():
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert rates == pytest.approx([5e-5 * (1 - k / steps) for k in range(steps)])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ["muon", "muon-default"])
def test_muon_takes_matrices_and_adamw_embeddings_and_the_rest(name, classifier):
    classifier.reset(3, seed=0)
    muon, adamw = BASELINES[name].build(classifier, dict(classifier.trainable()), 0.02, 5).parts
    kinds = tensor_kinds(classifier)
    owners = {
        id(param): part
        for part in (muon, adamw)
        for g in part.param_groups
        for param in g["params"]
    }
    for key, param in classifier.trainable():
        matrix = param.dim() == 2 and kinds[key] != "embedding"
        assert owners[id(param)] is (muon if matrix else adamw), key
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    # one rate serves both where it is tuned; untuned, torch's documentation gives each its own
    assert adamw.param_groups[0]["lr"] == (0.02 if name == "muon" else 3e-4)


def test_tuned_muon_steps_as_large_as_adamw(classifier):
    """0.2 of the rate, RMS, for a gradient of full rank: what Liu et al. see AdamW do."""
    classifier.reset(3, seed=0)
    before = values(classifier)
    optimizer = BASELINES["muon"].build(classifier, dict(classifier.trainable()), 1e-2, 1)
    for _, param in classifier.trainable():
        param.grad = torch.randn_like(param)
    optimizer.step()
    kinds = tensor_kinds(classifier)
    for key, value in values(classifier).items():
        if kinds[key].endswith("matrix"):  # square ones, tall ones, wide ones
            rms = (value - before[key]).square().mean().sqrt()
            assert 0.6 < rms / (0.2 * 1e-2) < 1.4, key


@pytest.mark.skipif(not installed("schedulefree"), reason="schedulefree isn't installed")
def test_schedule_free_is_judged_at_its_average_and_descends_from_the_other_point(classifier, task):
    """The reference steps without ever being judged; its `eval` point makes the score."""
    build, lr = BASELINES["schedulefree"].build, 0.03
    classifier.reset(3, seed=0)
    done = adapt_and_judge(
        classifier, build(classifier, dict(classifier.trainable()), lr, 3), task, (1, 2, 3)
    )
    here = values(classifier)

    classifier.reset(3, seed=0)
    optimizer = build(classifier, dict(classifier.trainable()), lr, 3)
    for _ in range(3):
        optimizer.zero_grad()
        task.support_loss(classifier.model, 0).backward()
        optimizer.step()
    for key, value in values(classifier).items():
        torch.testing.assert_close(value, here[key], rtol=0, atol=1e-4)
    descending = judge(classifier, task.query)["loss"]
    optimizer.eval()
    averaged = judge(classifier, task.query)["loss"]
    assert done.scores[3]["loss"] == pytest.approx(averaged, abs=1e-4)
    assert abs(descending - averaged) > 1e-2  # or this test could not tell the two


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    for name, baseline in BASELINES.items():
        if baseline.package:
            monkeypatch.setitem(sys.modules, baseline.package, None)
            with pytest.raises(InputError, match=rf"{baseline.package}, which is not installed"):
                require_baseline(name)


def test_every_kind_of_tensor_is_told(encoder):
    full, lora = (
        tensor_kinds(Classifier.load(encoder, tune=tune, ways=3, device=torch.device("cpu")))
        for tune in ("full", "lora")
    )
    assert set(full.values()) | set(lora.values()) == set(KINDS)
    assert full["bert.embeddings.word_embeddings.weight"] == "embedding"
    assert full["bert.embeddings.LayerNorm.bias"] == "layer norm"
    assert full["bert.encoder.layer.0.attention.self.query.weight"] == "attention matrix"
    assert full["bert.encoder.layer.0.attention.self.query.bias"] == "bias"
    assert full["bert.encoder.layer.1.output.dense.weight"] == "other matrix"
    assert full["classifier.bias"] == "head"
    assert set(lora.values()) == {"LoRA A", "LoRA B", "head"}
