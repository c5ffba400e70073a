"""Folders of initial values: loaded by others' libraries, and refused where they don't fit."""

import json
import os

import peft
import pytest
import torch
import transformers
from encoders import TEXTS, tiny_bert, tiny_distilbert
from safetensors.torch import load_file

from rnnopt import InputError
from rnnopt.meta.learned import InitialValues
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.init_folder import read_init_training
from rnnopt.tasks.text.start import TextStart
from rnnopt.tasks.text.tasks import LabelledTexts, TextTask

CPU = torch.device("cpu")
LABELS = [0, 1, 2, 0, 1, 2, 0, 1, 2, 1]


def load(encoder, **options):
    chosen = {"tune": "lora", "lora_rank": 2, "ways": 3, "device": CPU, **options}
    return Classifier.load(encoder, **chosen)


def learned(classifier, seed=0):
    """Initial values as meta-training might leave them."""
    values = InitialValues(classifier).values()
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (value + 0.1 * torch.randn(value.shape, generator=generator)).detach()
        for name, value in values.items()
    }


def begun(classifier, start):
    texts = LabelledTexts.read(classifier, TEXTS, LABELS)
    start.begin(classifier, TextTask(classifier, (texts,), texts, 3), seed=0)
    with torch.no_grad():
        return classifier.logits(classifier.batch(TEXTS))


def theirs(model, folder, output):
    """Logits of a transformers model with our output layer."""
    tokens = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokens(TEXTS, return_tensors="pt", padding=True)
    model.eval()
    layer = model.get_submodule("classifier")
    layer.load_state_dict(output.state_dict())
    with torch.no_grad():
        return model(**batch).logits


def test_a_full_init_is_a_text_classifier_of_transformers(tmp_path):
    classifier = load(tiny_bert(tmp_path / "bert"), tune="full")
    start = TextStart(values=learned(classifier))
    start.save(tmp_path / "init", classifier, {"note": 1})
    assert not any("classifier" in key for key in load_file(tmp_path / "init/model.safetensors"))
    expected = begun(classifier, start)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "init", num_labels=3
    )
    torch.testing.assert_close(theirs(model, tmp_path / "init", classifier.output), expected)


# peft asks transformers by an old name
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("make", [tiny_bert, tiny_distilbert])
def test_a_lora_init_is_an_adapter_of_peft(tmp_path, make):
    """DistilBERT's head has a layer that trains beside the factors."""
    encoder = make(tmp_path / "encoder")
    classifier = load(encoder)
    start = TextStart(values=learned(classifier))
    start.save(tmp_path / "init", classifier, {})
    config = json.loads((tmp_path / "init" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == (["pre_classifier"] if make is tiny_distilbert else None)
    expected = begun(classifier, start)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=3)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "init")
    merged = model.merge_and_unload()
    torch.testing.assert_close(theirs(merged, tmp_path / "init", classifier.output), expected)


def test_an_init_under_mean_pooling_is_an_encoder(tmp_path):
    classifier = load(tiny_bert(tmp_path / "bert"), tune="full", pooling="mean")
    start = TextStart(values=learned(classifier))
    start.save(tmp_path / "init", classifier, {})
    again = load(tmp_path / "init", tune="head", pooling="mean")
    torch.testing.assert_close(
        begun(again, TextStart(head="zero")), begun(classifier, TextStart(head="zero"))
    )
    body = dict(again.model.named_parameters())
    assert all(torch.equal(body[name], value) for name, value in start.values.items())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tune": "full"},
        {"tune": "full", "pooling": "mean"},
        {"tune": "full", "top_layers": 1},
        {"top_layers": 1},
    ],
    ids=str,
)
def test_values_head_and_what_is_adapted_come_back(tmp_path, options):
    encoder = tiny_bert(tmp_path / "bert")
    classifier = load(encoder, **options)
    start = TextStart(head="prototype", adapted="head", values=learned(classifier))
    run = tmp_path / "run"
    run.mkdir()
    start.save(run / "init", classifier, {"note": 1})
    for path in (run, run / "init"):
        found = TextStart.read(path, load(encoder, seed=3, **options))
        assert (found.head, found.adapted) == ("prototype", "head")
        assert found.values.keys() == start.values.keys()
        assert all(torch.equal(found.values[n], value) for n, value in start.values.items())
        assert read_init_training(path) == {"note": 1}


def test_a_later_init_takes_the_place_of_an_earlier_one(tmp_path):
    classifier = load(tiny_bert(tmp_path / "bert"))
    (tmp_path / ".init.new").mkdir()
    (tmp_path / ".init.new" / "left").write_text("by a crash")
    for seed in (0, 1):
        values = learned(classifier, seed)
        TextStart(values=values).save(tmp_path / "init", classifier, {})
    found = TextStart.read(tmp_path, classifier).values
    assert all(torch.equal(found[name], value) for name, value in values.items())
    assert sorted(os.listdir(tmp_path)) == ["bert", "init"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A LoRA init of rank 2 for a BERT."""
    folder = tmp_path_factory.mktemp("saved")
    classifier = load(tiny_bert(folder / "bert"))
    TextStart(values=learned(classifier)).save(folder / "init", classifier, {})
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": 4}, r"\(lora_rank: 2 there, 4 here\); give the --encoder"),
        ({"tune": "full"}, r"lora_rank: 2 there, None here|tune: 'lora' there, 'full' here"),
        ({"top_layers": 1}, "top_layers: None there, 1 here"),
        ({"pooling": "mean"}, "pooling: 'model' there, 'mean' here"),
    ],
)
def test_an_init_for_another_classifier_is_refused(saved, options, message):
    with pytest.raises(InputError, match=message):
        TextStart.read(saved, load(saved / "bert", **options))


def test_an_init_for_another_encoder_is_refused(saved, tmp_path):
    other = load(tiny_bert(tmp_path, TEXTS[:5]))
    with pytest.raises(InputError, match=f"encoder_weights: .* there, '{other.fingerprint}' here"):
        TextStart.read(saved, other)


def test_no_init_and_a_damaged_one_are_refused(saved, tmp_path):
    classifier = load(saved / "bert")
    with pytest.raises(InputError, match=r"no init.json .*; name a folder that `rnnopt meta-train"):
        TextStart.read(tmp_path, classifier)
    (tmp_path / "init.json").write_text("{")
    with pytest.raises(InputError, match=r"init\.json is damaged"):
        TextStart.read(tmp_path, classifier)
    (tmp_path / "init.json").write_text('{"format": "rnnopt.init.0"}')
    with pytest.raises(InputError, match=r"holds 'rnnopt\.init\.0', expected 'rnnopt\.init\.1'"):
        TextStart.read(tmp_path, classifier)
    (tmp_path / "init.json").write_text('{"format": "rnnopt.init.1", "adapted": "all"}')
    with pytest.raises(InputError, match=r"init\.json is damaged \(no head, values\)"):
        TextStart.read(tmp_path, classifier)
    start = TextStart(values=learned(classifier))
    start.save(tmp_path / "init", classifier, {})
    facts = json.loads((tmp_path / "init" / "init.json").read_text())
    changed = json.dumps({**facts, "values": "0" * 12})
    (tmp_path / "init" / "init.json").write_text(changed)
    with pytest.raises(InputError, match=r"values are not those that init\.json was written for"):
        TextStart.read(tmp_path / "init", classifier)
    peft_file = tmp_path / "init" / "adapter_model.safetensors"
    peft_file.write_bytes(peft_file.read_bytes()[:50])
    with pytest.raises(InputError, match="no complete safetensors file"):
        TextStart.read(tmp_path / "init", classifier)
