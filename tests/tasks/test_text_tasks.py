"""Tasks, and adaptation that is judged along the way."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from rnnopt import Adam, LearnedOptimizer
from rnnopt.data.files import read_corpus
from rnnopt.tasks.adaptation import adapt_and_judge
from rnnopt.tasks.episodes import EpisodeSampler
from rnnopt.tasks.metrics import classification_metrics, confusion_matrix
from rnnopt.tasks.protocol import DIVERGED_LOSS
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.tasks import LabelledTexts, TextTasks, calibrated_loss, judge, mixed_loss

CPU = torch.device("cpu")
TEXTS = [("rain today", 0), ("my song", 1), ("a loan", 2), ("the soup", 3)]


@pytest.fixture
def classifier(encoder):
    return Classifier.load(encoder, tune="full", ways=4, device=CPU)


@pytest.fixture
def task(classifier, csv_file):
    sampler = EpisodeSampler(read_corpus(csv_file), ways=4, shots=3, queries=5, seed=0)
    return TextTasks(sampler, classifier).load(0)


def test_a_task_holds_its_episode(task):
    assert (task.support.count, task.query.count, task.ways) == (12, 20, 4)


def test_each_task_draws_its_classifier_the_same_one_at_every_call(encoder, csv_file):
    sampler = EpisodeSampler(read_corpus(csv_file), ways=4, shots=1, queries=1, seed=0)
    full, head = (
        Classifier.load(encoder, tune=tune, ways=4, device=CPU) for tune in ("full", "head")
    )
    source = TextTasks(sampler, [full, head, head])
    drawn = [source.learner_of(number) for number in range(300)]
    assert 160 < drawn.count(head) < 240  # it stands there twice: 200 expected, 8 deviation
    assert drawn == [source.learner_of(number) for number in range(300)]
    assert TextTasks(sampler, head).learner_of(0) is head


def test_pieces_change_neither_loss_nor_score(classifier, texts):
    """A loss over pieces is the loss over one padded batch."""
    chosen, labels = [text for text, _ in texts[:40]], [i % 4 for i in range(40)]
    pieces = LabelledTexts.read(classifier, chosen, labels)
    assert len(pieces.pieces) > 1
    logits = classifier.logits(classifier.batch(chosen))
    whole = cross_entropy(logits, torch.tensor(labels))
    torch.testing.assert_close(pieces.loss(classifier, classifier.model), whole)
    score = judge(classifier, pieces)
    assert score["loss"] == pytest.approx(float(whole.detach()), rel=1e-5)
    predicted = logits.argmax(1).numpy()
    metrics = classification_metrics(confusion_matrix(predicted, np.array(labels), 4))
    assert (score["accuracy"], score["f1"]) == (metrics.accuracy, metrics.f1)
    # as many texts of every class
    assert metrics.recall == pytest.approx(score["accuracy"]) and score["f1"] != score["accuracy"]


def test_adaptation_is_scored_at_each_budget_and_timed(classifier, task):
    optimizer = LearnedOptimizer([p for _, p in classifier.trainable()], Adam(1e-3))
    done = adapt_and_judge(classifier, optimizer, task, (1, 4))
    assert set(done.scores) == {1, 4}
    assert done.seconds_per_step > 0
    assert done.scores[4] == judge(classifier, task.query)


def test_adaptation_lowers_the_support_loss(classifier, task):
    before = judge(classifier, task.support)["loss"]
    optimizer = LearnedOptimizer([p for _, p in classifier.trainable()], Adam(1e-3))
    adapt_and_judge(classifier, optimizer, task, (10,))
    assert judge(classifier, task.support)["loss"] < before


def test_dropout_makes_steps_noisy_and_no_judgement(encoder, classifier):
    noisy = Classifier.load(encoder, tune="full", ways=4, device=CPU, dropout=True)
    texts, labels = zip(*TEXTS)
    read, plain = (LabelledTexts.read(made, texts, labels) for made in (noisy, classifier))
    assert read.loss(noisy, noisy.model) != read.loss(noisy, noisy.model)
    assert judge(noisy, read) == judge(classifier, plain)
    assert noisy.model.training


def test_a_diverged_model_has_a_finite_score(classifier, task):
    with torch.no_grad():
        classifier.trainable()[-1][1].fill_(math.nan)
    assert judge(classifier, task.query)["loss"] == DIVERGED_LOSS


def some_logits(seed, texts=40, ways=5, known=1.0):
    """Logits that know their labels half of the time or less, and the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(ways, (texts,), generator=generator)
    logits = torch.randn(texts, ways, generator=generator)
    logits[torch.arange(texts), labels] += known
    return logits, labels


@given(
    seed=st.integers(0, 100),
    confidence=st.floats(0.1, 5.0) | st.just(100.0),
    known=st.sampled_from([0.5, 1.0]),
)
def test_confidence_changes_the_calibrated_loss_by_no_more_than_the_grid_is_coarse(
    seed, confidence, known
):
    logits, labels = some_logits(seed, known=known)
    loss = calibrated_loss(logits, labels)
    assert loss <= cross_entropy(logits, labels) + 0.005
    torch.testing.assert_close(
        calibrated_loss(confidence * logits, labels), loss, atol=0.01, rtol=0
    )


def test_the_calibrated_loss_has_the_gradient_of_the_best_temperature_in_closed_form():
    """Two classes, logits +-a that are right with odds 3 to 1: the best temperature makes the
    probability 3/4, the loss its entropy, and no gradient along the logits."""
    logits = torch.tensor([[1.0, -1.0]] * 4, requires_grad=True)
    labels = torch.tensor([0, 0, 0, 1])
    loss = calibrated_loss(logits, labels)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert loss.item() == pytest.approx(entropy, abs=2e-3)
    (slope,) = torch.autograd.grad(loss, logits)
    assert abs((slope * logits).sum().item()) < 0.05  # cross-entropy as it is: 0.26
    # what is wrong still counts: p / temperature / texts, with exp(2 / temperature) = 3
    assert slope[3, 0] == pytest.approx(0.75 * math.log(3) / 2 / 4, rel=0.15)


def test_the_query_loss_mixes_both(classifier, task):
    (logits, labels), share = some_logits(0), 0.3
    mixed = 0.7 * cross_entropy(logits, labels) + 0.3 * calibrated_loss(logits, labels)
    torch.testing.assert_close(mixed_loss(logits, labels, share), mixed)
    losses = [task.query_loss(classifier.model, 0, x).item() for x in (0, share, 1)]
    assert losses[1] == pytest.approx(0.7 * losses[0] + 0.3 * losses[2], rel=1e-5)
    score = judge(classifier, task.query)
    assert (score["loss"], score["calibrated"]) == pytest.approx((losses[0], losses[2]), rel=1e-5)


def test_adaptation_tells_how_many_steps_were_undone(classifier, task):
    class Rash(Adam):
        def fallback(self):
            return Adam(1e-4)

    optimizer = LearnedOptimizer([p for _, p in classifier.trainable()], Rash(1.0))
    done = adapt_and_judge(classifier, optimizer, task, (3,))
    assert done.undone == optimizer.undone > 0
