"""Where adaptation to a task starts: the head, the initial values, what is stepped."""

import pytest
import torch
import transformers
from encoders import TEXTS, tiny_bert, tiny_distilbert, tiny_encoder
from hypothesis import given
from hypothesis import strategies as st

from rnnopt import SGD, InputError, MetaSGD
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.start import TextStart, prototype_head
from rnnopt.tasks.text.tasks import LabelledTexts, TextTask

CPU = torch.device("cpu")
LABELS = [0, 1, 2, 0, 1, 2, 0, 1, 2, 1]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return Classifier.load(
        tiny_bert(tmp_path_factory.mktemp("bert")), tune="lora", lora_rank=2, ways=3, device=CPU
    )


@pytest.fixture(scope="module")
def support(classifier):
    return LabelledTexts.read(classifier, TEXTS, LABELS)


def task_of(classifier, support):
    return TextTask(classifier, (support,), support, 3)


def logits(classifier):
    with torch.no_grad():
        return classifier.logits(classifier.batch(TEXTS))


def test_a_random_head_is_that_of_reset(classifier, support):
    TextStart().begin(classifier, task_of(classifier, support), seed=5)
    ours = [param.detach().clone() for param in classifier.model.parameters()]
    classifier.reset(3, seed=5)
    assert all(map(torch.equal, ours, classifier.model.parameters()))


def test_a_zero_head_says_nothing(classifier, support):
    TextStart(head="zero").begin(classifier, task_of(classifier, support), seed=5)
    assert not logits(classifier).any()


@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_a_prototype_head_is_minus_the_squared_distance_from_the_class_means(tmp_path, pooling):
    """By softmax; and s is the mean squared distance of the class means from their mean."""
    loaded = Classifier.load(tiny_bert(tmp_path), tune="full", pooling=pooling, ways=3, device=CPU)
    texts = LabelledTexts.read(loaded, TEXTS, LABELS)
    TextStart(head="prototype").begin(loaded, task_of(loaded, texts), seed=0)
    with torch.no_grad():
        x = loaded.features(loaded.batch(TEXTS)).double()  # (B, H)
        means = torch.stack([x[torch.tensor(LABELS) == k].mean(dim=0) for k in range(3)])
        spread = (means - means.mean(dim=0)).square().sum(dim=1).mean()
        expected = -torch.cdist(x, means).square() / spread
    found = logits(loaded).softmax(1).double()
    torch.testing.assert_close(found, expected.softmax(1), rtol=1e-3, atol=1e-4)


@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-3, 3))
def test_a_prototype_head_depends_on_no_scale_and_shift_of_the_features(scale, shift):
    class Features:
        """What `prototype_head` asks of a classifier."""

        ways, output = 2, torch.nn.Linear(3, 2)

        def __init__(self, change):
            self.change = change

        def features(self, batch):
            return self.change(batch)

    x = torch.tensor([[1.0, 0, 2], [0, 1, 2], [3, 1, 0], [1, 1, 1]], dtype=torch.float64)
    pieces = (x[:3], torch.tensor([0, 1, 0])), (x[3:], torch.tensor([1]))
    texts = LabelledTexts(pieces, 4)
    plain, moved = (
        [change(x) @ weight.T + bias for weight, bias in [prototype_head(Features(change), texts)]]
        for change in (lambda x: x, lambda x: scale * (x + shift))
    )
    torch.testing.assert_close(moved[0].softmax(1), plain[0].softmax(1), rtol=1e-6, atol=1e-9)


def test_texts_that_are_all_alike_make_a_finite_head(classifier):
    alike = LabelledTexts.read(classifier, ["play a song"] * 4, [0, 1, 2, 0])
    TextStart(head="prototype").begin(classifier, task_of(classifier, alike), seed=0)
    assert torch.isfinite(logits(classifier)).all()


def test_an_output_layer_without_bias_takes_no_prototypes(tmp_path):
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=500)
    loaded = Classifier.load(tiny_encoder(tmp_path, config), tune="full", ways=3, device=CPU)
    texts = LabelledTexts.read(loaded, TEXTS, LABELS)
    assert loaded.features(loaded.batch(TEXTS)).shape == (len(TEXTS), 32)
    with pytest.raises(InputError, match=r"output layer has no bias.*use --head zero or random"):
        TextStart(head="prototype").begin(loaded, task_of(loaded, texts), seed=0)


def test_learned_values_replace_the_pretrained_ones_at_every_beginning(tmp_path):
    """Also those of head layers that would be drawn for each task."""
    loaded = Classifier.load(tiny_distilbert(tmp_path), tune="lora", ways=3, device=CPU)
    assert any("pre_classifier" in name for name in loaded.initial_values)
    values = {name: torch.randn_like(value) for name, value in loaded.initial_values.items()}
    texts = LabelledTexts.read(loaded, TEXTS, LABELS)
    for seed in (1, 2):
        TextStart(values=values).begin(loaded, task_of(loaded, texts), seed)
        params = dict(loaded.trainable())
        assert all(torch.equal(params[name], value) for name, value in values.items())
        with torch.no_grad():
            params[next(iter(values))].zero_()
    loaded.reset(3, seed=1)
    params = dict(loaded.trainable())
    drawn = {name for name in values if "pre_classifier" in name}
    assert all(torch.equal(params[n], loaded.initial_values[n]) for n in set(values) - drawn)


def test_adapting_the_head_only_leaves_the_encoder(classifier, support):
    start = TextStart(adapted="head")
    start.begin(classifier, task_of(classifier, support), seed=0)
    assert list(start.params(classifier)) == ["classifier.weight", "classifier.bias"]
    before = {name: param.detach().clone() for name, param in classifier.trainable()}
    optimizer = start.optimizer(classifier, SGD(0.5))
    support.loss(classifier, classifier.model).backward()
    optimizer.step()
    moved = {n for n, param in classifier.trainable() if not torch.equal(param, before[n])}
    assert moved == {"classifier.weight", "classifier.bias"}


def test_a_meta_sgd_is_told_the_names_and_the_multiplier(classifier, support):
    start = TextStart(adapted="head")
    start.begin(classifier, task_of(classifier, support), seed=0)
    rule = MetaSGD(["classifier.bias", "classifier.weight"])
    optimizer = start.optimizer(classifier, rule, lr=0.5)
    assert [int(state["number"]) for state in optimizer.state.values()] == [1, 0]
    assert optimizer.param_groups[0]["lr"] == 0.5
