"""Classifiers on frozen embeddings, against what they must be by definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rnnopt.data.files import read_corpus
from rnnopt.tasks.episodes import EpisodeSampler
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.frozen import (
    FROZEN,
    PENALTY,
    _features,
    judge_frozen,
    logistic,
    nearest_mean,
)
from rnnopt.tasks.text.tasks import TextTask, TextTasks


def drawn(seed, ways=3, shots=4, width=5):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(ways * shots) % ways
    centres = 3 * torch.randn(ways, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(ways * shots, width, generator=generator, dtype=torch.float64)
    return centres[labels] + noise, labels, centres


@settings(deadline=None)
@given(st.integers(0, 1000))
def test_nearest_mean_chooses_the_nearest_mean(seed):
    features, labels, query = drawn(seed)
    means = torch.stack([features[labels == c].mean(dim=0) for c in range(3)])
    logits = nearest_mean(features, labels, query, 3)
    for row, text in zip(logits, query):
        torch.testing.assert_close(row, -((means - text) ** 2).sum(dim=1))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000))
def test_logistic_regression_is_at_the_minimum_of_its_loss(seed):
    """Its gradient there is zero: sum (p - y) x + PENALTY w = 0, and sum (p - y) = 0."""
    features, labels, _ = drawn(seed)
    probes = torch.cat([torch.zeros(1, 5), torch.eye(5)]).double()
    found = logistic(features, labels, probes, 3)  # (6, 3): the bias, then bias and one weight
    bias, weight = found[0], (found[1:] - found[0]).T
    error = (features @ weight.T + bias).softmax(dim=1)
    error[torch.arange(len(labels)), labels] -= 1
    assert (error.T @ features + PENALTY * weight).abs().max() < 1e-3
    assert error.sum(dim=0).abs().max() < 1e-3


def test_logistic_regression_of_two_classes_is_at_the_minimum_of_the_same_loss():
    features, labels, _ = drawn(0, ways=2)
    probes = torch.cat([torch.zeros(1, 5), torch.eye(5)]).double()
    found = logistic(features, labels, probes, 2)
    bias, weight = found[0], (found[1:] - found[0]).T
    error = (features @ weight.T + bias).softmax(dim=1)
    error[torch.arange(len(labels)), labels] -= 1
    assert (error.T @ features + PENALTY * weight).abs().max() < 1e-3


def test_logistic_regression_of_many_classes_with_one_text_each_is_quiet():
    features, labels, centres = drawn(0, ways=25, shots=1, width=30)
    assert logistic(features, labels, centres, 25).argmax(dim=1).tolist() == list(range(25))


@pytest.mark.parametrize("name", FROZEN)
@pytest.mark.parametrize("tune", ["head", "lora"])
def test_a_task_is_judged_by_its_embeddings_and_nothing_is_changed(name, tune, encoder, csv_file):
    classifier = Classifier.load(
        encoder, tune=tune, ways=3, pooling="mean", device=torch.device("cpu")
    )
    sampler = EpisodeSampler(read_corpus(csv_file), ways=3, shots=5, queries=5, seed=0)
    task = TextTasks(sampler, classifier).load(0)
    before = {key: value.clone() for key, value in classifier.model.state_dict().items()}
    score = judge_frozen(name, classifier, task)
    for key, value in classifier.model.state_dict().items():
        assert torch.equal(value, before[key])
    assert 0 < score["loss"] < 2
    assert score["accuracy"] * 15 == pytest.approx(round(score["accuracy"] * 15))
    seen = judge_frozen(name, classifier, TextTask(task.classifier, task.batches, task.support, 3))
    assert seen["accuracy"] > 0.6  # chance is 1 / 3
    assert seen["loss"] < score["loss"]
    assert all(param.grad is None for _, param in classifier.trainable())


def test_features_are_taken_from_the_mean_of_the_support_set_and_have_length_1(encoder, csv_file):
    """A [CLS] vector has a large part that all texts share."""
    classifier = Classifier.load(encoder, tune="head", ways=3, device=torch.device("cpu"))
    sampler = EpisodeSampler(read_corpus(csv_file), ways=3, shots=3, queries=3, seed=0)
    task = TextTasks(sampler, classifier).load(0)
    (features, labels), (query, truth) = (
        _features(classifier, texts.pieces) for texts in (task.support, task.query)
    )
    centred = [rows - features.mean(dim=0) for rows in (features, query)]
    features, query = (rows / rows.norm(dim=1, keepdim=True) for rows in centred)
    logits = nearest_mean(features, labels, query, 3)
    expected = torch.nn.functional.cross_entropy(logits, truth)
    assert judge_frozen("nearest-mean", classifier, task)["loss"] == pytest.approx(float(expected))


def test_features_are_what_the_output_layer_reads(encoder):
    classifier = Classifier.load(encoder, tune="head", ways=3, device=torch.device("cpu"))
    batch = classifier.batch(["play a song", "book a hotel in rome"])
    with torch.no_grad():
        features = classifier.features(batch)
        torch.testing.assert_close(
            classifier.model.classifier(features), classifier.logits(batch), rtol=1e-5, atol=1e-6
        )
