"""Tasks, and adaptation that is judged along the way."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from rnnopt import Adam, LearnedOptimizer
from rnnopt.episodes import EpisodeSampler
from rnnopt.files import read_corpus
from rnnopt.metrics import classification_metrics, confusion_matrix
from rnnopt.task import DIVERGED_LOSS, LabelledTexts, TaskSource, adapt_and_judge, judge
from rnnopt.text import Classifier

CPU = torch.device("cpu")


@pytest.fixture
def classifier(encoder):
    return Classifier.load(encoder, tune="full", ways=4, device=CPU)


@pytest.fixture
def task(classifier, csv_file):
    sampler = EpisodeSampler(read_corpus(csv_file), ways=4, shots=3, queries=5, seed=0)
    return TaskSource(sampler, classifier).load(0)


def test_a_task_holds_its_episode(task):
    assert (task.support.count, task.query.count, task.ways) == (12, 20, 4)


def test_each_task_draws_its_classifier_the_same_one_at_every_call(encoder, csv_file):
    sampler = EpisodeSampler(read_corpus(csv_file), ways=4, shots=1, queries=1, seed=0)
    full, head = (
        Classifier.load(encoder, tune=tune, ways=4, device=CPU) for tune in ("full", "head")
    )
    source = TaskSource(sampler, [full, head, head])
    drawn = [source.classifier_of(number) for number in range(300)]
    assert 160 < drawn.count(head) < 240  # it stands there twice: 200 expected, 8 deviation
    assert drawn == [source.classifier_of(number) for number in range(300)]
    assert TaskSource(sampler, head).classifier_of(0) is head


def test_pieces_change_neither_loss_nor_score(classifier, texts):
    """A loss over pieces is the loss over one padded batch."""
    chosen, labels = [text for text, _ in texts[:40]], [i % 4 for i in range(40)]
    pieces = LabelledTexts.read(classifier, chosen, labels)
    assert len(pieces.pieces) > 1
    logits = classifier.logits(classifier.batch(chosen))
    whole = cross_entropy(logits, torch.tensor(labels))
    torch.testing.assert_close(pieces.loss(classifier, classifier.model), whole)
    score = judge(classifier, pieces)
    assert score.loss == pytest.approx(float(whole.detach()), rel=1e-5)
    predicted = logits.argmax(1).numpy()
    metrics = classification_metrics(confusion_matrix(predicted, np.array(labels), 4))
    assert (score.accuracy, score.f1) == (metrics.accuracy, metrics.f1)
    # as many texts of every class
    assert metrics.recall == pytest.approx(score.accuracy) and score.f1 != score.accuracy


def test_adaptation_is_scored_at_each_budget_and_timed(classifier, task):
    optimizer = LearnedOptimizer([p for _, p in classifier.trainable()], Adam(1e-3))
    done = adapt_and_judge(classifier, optimizer, task, (1, 4))
    assert set(done.scores) == {1, 4}
    assert done.seconds_per_step > 0
    assert done.scores[4] == judge(classifier, task.query)


def test_adaptation_lowers_the_support_loss(classifier, task):
    before = judge(classifier, task.support).loss
    optimizer = LearnedOptimizer([p for _, p in classifier.trainable()], Adam(1e-3))
    adapt_and_judge(classifier, optimizer, task, (10,))
    assert judge(classifier, task.support).loss < before


def test_a_diverged_model_has_a_finite_score(classifier, task):
    with torch.no_grad():
        classifier.trainable()[-1][1].fill_(math.nan)
    assert judge(classifier, task.query).loss == DIVERGED_LOSS
