"""The loss of pairs, and how labels say which pairs are alike."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from rnnopt import TextClassifier
from rnnopt.rules.files import SHIPPED_RULE
from rnnopt.tasks.text.encoder.sentence import SentenceEncoder
from rnnopt.tasks.text.estimator import steps as stepping
from rnnopt.tasks.text.estimator.evidence import Labelled
from rnnopt.tasks.text.estimator.objective.choice import ONE_LABEL, SEVERAL_LABELS
from rnnopt.tasks.text.estimator.objective.pairs import pair_loss
from rnnopt.tasks.text.estimator.steps import BATCH, Adaptation, Plan

LABELS = torch.tensor([0, 0, 1, 1, 2])


def sgd(params):
    return torch.optim.SGD(params, 0.1)


def test_it_is_the_mean_of_both_kinds_of_pairs():
    vectors = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    directions = normalize(vectors, dim=1)
    pairs = [(i, j) for i in range(5) for j in range(i)]
    losses = {True: [], False: []}
    for i, j in pairs:
        same = bool(LABELS[i] == LABELS[j])
        losses[same].append((float(same) - float(directions[i] @ directions[j])) ** 2)
    expected = sum(np.mean(found) for found in losses.values()) / 2
    found = pair_loss(vectors, ONE_LABEL.alike(LABELS), torch.ones(5))
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_several_batches_at_once_are_as_each_alone():
    vectors = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.stack([LABELS, LABELS.flip(0)])
    alike = torch.stack([ONE_LABEL.alike(x) for x in labels])
    weights = torch.rand(2, 5)
    each = [pair_loss(*one) for one in zip(vectors, alike, weights)]
    torch.testing.assert_close(pair_loss(vectors, alike, weights), torch.stack(each))


def test_it_is_zero_where_classes_are_orthogonal_and_only_there():
    vectors = 3 * torch.eye(4)[LABELS]
    alike = ONE_LABEL.alike(LABELS)
    assert float(pair_loss(vectors, alike, torch.ones(5))) == pytest.approx(0, abs=1e-12)
    assert float(pair_loss(torch.ones(5, 4), alike, torch.ones(5))) == pytest.approx(0.5)


def test_a_text_twice_is_a_text_of_twice_the_weight_but_for_the_pair_with_itself():
    vectors = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    alike = torch.zeros(3, 3)  # so that the loss is that of texts that are apart
    twice = torch.tensor([0, 1, 2, 2])
    apart = torch.zeros(4, 4)
    apart[2, 3] = apart[3, 2] = 1.0  # the pair with itself counts elsewhere
    found = pair_loss(vectors, alike, torch.tensor([1.0, 1.0, 2.0]))
    assert float(pair_loss(vectors[twice], apart, torch.ones(4))) == pytest.approx(float(found))


@pytest.mark.parametrize("labels", [[0, 1, 2], [0, 0, 0]])
def test_texts_that_are_all_of_one_kind_have_a_gradient(labels):
    vectors = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    pair_loss(vectors, ONE_LABEL.alike(torch.tensor(labels)), torch.ones(3)).backward()
    assert vectors.grad.isfinite().all() and vectors.grad.abs().sum() > 0


def test_several_labels_are_alike_in_part():
    labels = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    third = 1 / 3
    expected = [[1.0, third, 0.0], [third, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert torch.allclose(SEVERAL_LABELS.alike(labels), torch.tensor(expected))


# -- steps on it


@pytest.fixture
def texts_and_labels(texts):
    rows = [(text, label) for text, label in texts if label in ("food", "music", "work")]
    names = sorted({label for _, label in rows})
    return [text for text, _ in rows], np.array([names.index(label) for _, label in rows])


def adaptation_of(encoder, texts, labels, **plan):
    chosen = {"rule": sgd, "steps": 3, "lora_rank": None, "seconds": None, "seed": 0, **plan}
    loaded = SentenceEncoder.load(encoder, torch.device("cpu"))
    data = Labelled(loaded.embed(texts).double().numpy(), labels, np.ones(len(labels)))
    return loaded, Adaptation(loaded, texts, data, Plan(**chosen))


def test_gradients_are_the_same_where_texts_run_twice(encoder, texts_and_labels, monkeypatch):
    texts, labels = texts_and_labels[0][::3], texts_and_labels[1][::3]
    ends = []
    for kept in (10**9, 0):
        monkeypatch.setattr(stepping, "_KEPT_TOKENS", kept)
        loaded, steps = adaptation_of(encoder, texts, labels)
        assert list(steps.run(np.arange(len(texts)), 2)) == [1, 2]
        ends.append((steps.loss, loaded.embed(texts)))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-5)
    assert torch.allclose(ends[0][1], ends[1][1], atol=1e-6)


@pytest.mark.parametrize("rank", [None, 2])
def test_what_is_not_kept_leaves_no_trace(rank, encoder, texts_and_labels):
    texts, labels = texts_and_labels[0][::3], texts_and_labels[1][::3]
    loaded, steps = adaptation_of(encoder, texts, labels, lora_rank=rank)
    before = SentenceEncoder.load(encoder, torch.device("cpu")).state_dict()
    list(steps.run(np.arange(len(texts)), 2))
    steps.end(keep=False)
    after = loaded.state_dict()
    assert after.keys() == before.keys()
    assert all((after[name] == value).all() for name, value in before.items())
    assert not any(param.requires_grad for param in loaded.parameters())


def test_the_rule_draws_texts_of_a_class_together(encoder, texts_and_labels):
    texts, labels = texts_and_labels[0][::3], texts_and_labels[1][::3]
    _, steps = adaptation_of(encoder, texts, labels, rule=SHIPPED_RULE)
    losses = []
    for _ in steps.run(np.arange(len(texts)), 5):
        losses.append(steps.loss)
    assert losses[-1] < 0.8 * losses[0]


def test_in_small_batches_every_text_has_one_of_its_class():
    labels = np.repeat(np.arange(100), 3)
    batches = stepping._batches(np.arange(300), labels, seed=0)
    seen = [next(batches) for _ in range(2 * (300 // BATCH))]
    alone = [np.mean(np.bincount(labels[batch])[labels[batch]] == 1) for batch in seen]
    assert np.mean(alone) < 0.4  # a third of 3 texts a class is alone; by chance half would be
    assert all(len(set(batch)) == BATCH for batch in seen)
    first = np.concatenate(seen[: 300 // BATCH])
    assert len(set(first)) == len(first)  # no text twice before all have had their turn


def test_lora_is_still_to_be_had(encoder, texts_and_labels):
    texts, labels = texts_and_labels[0][::6], texts_and_labels[1][::6]
    made = TextClassifier(encoder, lora_rank=2, steps=2, seconds=None, device="cpu")
    assert made.fit(texts, labels.tolist()).predict(texts).shape == (len(texts),)
