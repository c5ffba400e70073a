"""Metrics and minibatches of the user's own task."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rnnopt import InputError
from rnnopt.data.corpus import Corpus
from rnnopt.tasks.text.adapt import (
    _shuffled_batches,
    classification_metrics,
    confusion_matrix,
    label_numbers,
)


def corpus(*labels):
    return Corpus(tuple(f"text {i}" for i in range(len(labels))), labels, ("d",) * len(labels))


def metrics_of(predicted, actual, classes):
    matrix = confusion_matrix(np.array(predicted), np.array(actual), classes)
    return classification_metrics(matrix)


def test_whole_numbers_are_their_own_places():
    numbers = [str(n) for n in (10, 9, -1, 2, 11, 0)]
    names, train, test = label_numbers(corpus(*numbers), corpus("11", "9"))
    assert names == ["-1", "0", "2", "9", "10", "11"]
    assert [names[i] for i in train] == numbers and test.tolist() == [5, 3]
    assert label_numbers(corpus("10", "9", "b"), corpus())[0] == ["10", "9", "b"]
    decimals = [f"{i}.0" for i in range(12)]
    assert label_numbers(corpus(*sorted(decimals)), corpus())[0] == decimals


def test_metrics_of_a_known_case():
    """sklearn.metrics.precision_recall_fscore_support(..., average="macro") gives the same."""
    metrics = metrics_of([0, 0, 1, 2, 2, 2], [0, 1, 1, 2, 2, 0], 3)
    assert metrics.accuracy == pytest.approx(4 / 6)
    assert metrics.precision == pytest.approx((1 / 2 + 1 + 2 / 3) / 3)
    assert metrics.recall == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)
    assert metrics.f1 == pytest.approx((1 / 2 + 2 / 3 + 4 / 5) / 3)


def test_a_class_that_is_never_predicted_counts_as_zero():
    metrics = metrics_of([0, 0], [0, 1], 2)
    assert metrics.precision == pytest.approx(0.25)
    assert metrics.recall == pytest.approx(0.5)


def test_a_class_that_is_nowhere_does_not_count():
    assert metrics_of([0, 1], [0, 1], 5).f1 == 1.0


@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_perfect_predictions_score_one(labels):
    metrics = metrics_of(labels, labels, 5)
    assert metrics.accuracy == metrics.precision == metrics.recall == metrics.f1 == 1.0


@given(count=st.integers(1, 40), size=st.integers(1, 12))
def test_an_epoch_shows_each_text_once_at_most_and_all_full_batches(count, size):
    batches = _shuffled_batches(count, size, seed=0)
    epoch = [next(batches) for _ in range(max(count // size, 1))]
    shown = np.concatenate(epoch)
    assert len(set(shown)) == len(shown) == max(count // size * size, min(count, size))


def test_labels_are_numbered_in_sorted_order():
    names, train, test = label_numbers(corpus("b", "a", "b"), corpus("b"))
    assert names == ["a", "b"]
    assert train.tolist() == [1, 0, 1]
    assert test.tolist() == [1]


def test_one_label_is_refused():
    with pytest.raises(InputError, match=r"1 label \(a\); a classifier needs at least 2"):
        label_numbers(corpus("a", "a"), corpus("a"))


def test_a_foreign_test_label_is_refused():
    with pytest.raises(InputError, match="label 'c' is in the test texts and not in the training"):
        label_numbers(corpus("a", "b"), corpus("c"))
