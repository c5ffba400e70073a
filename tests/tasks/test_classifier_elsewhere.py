"""A saved classifier in other libraries: sentence-transformers, transformers, the hub."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from encoders import TEXTS, tiny_bert, tiny_distilbert, tiny_roberta
from safetensors.torch import load_file

from rnnopt import TextClassifier
from rnnopt.errors import InputError
from rnnopt.tasks.text.encoder.sentence import Layout
from rnnopt.tasks.text.estimator.export import agreement

LABELS = ["a", "b", "c", "a", "b", "c", "a", "b", "c", "a"]


@pytest.fixture(scope="module")
def fitted(encoder):
    return TextClassifier(encoder, steps=0, device="cpu").fit(TEXTS, LABELS)


# -- sentence-transformers


@pytest.mark.parametrize("layout", [("mean", True), ("cls", False), ("max", True)])
def test_sentence_transformers_and_the_head_give_the_same_logits(layout, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    tiny_bert(tmp_path / "encoder", TEXTS)
    Layout(*layout, 12, "").write(tmp_path / "encoder", 32)
    classifier = TextClassifier(tmp_path / "encoder", steps=0, device="cpu").fit(TEXTS, LABELS)
    classifier.save(tmp_path / "saved")
    model = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    head = load_file(tmp_path / "saved" / "head.safetensors")
    logits = model.encode(TEXTS) @ head["weight"].numpy().T + head["bias"].numpy()
    assert np.allclose(logits, classifier.logits(TEXTS), atol=1e-4)


# -- transformers


@pytest.mark.parametrize("make", [tiny_bert, tiny_distilbert, tiny_roberta])
def test_a_pipeline_gives_the_same_probabilities(make, tmp_path):
    folder = make(tmp_path / "encoder")
    with torch.no_grad():  # as far from the defaults as trained weights are
        model = transformers.AutoModel.from_pretrained(folder)
        for name, param in model.named_parameters():
            if "LayerNorm" in name or "layer_norm" in name:
                param.add_(0.5 * torch.randn_like(param))
        model.save_pretrained(folder)
    classifier = TextClassifier(folder, pooling="cls", steps=0, device="cpu").fit(TEXTS, LABELS)
    assert classifier.export_transformers(tmp_path / "model", TEXTS) < 1e-4
    classify = transformers.pipeline("text-classification", str(tmp_path / "model"), device="cpu")
    for text, row in zip(TEXTS, classifier.predict_proba(TEXTS)):
        found = {one["label"]: one["score"] for one in classify(text, top_k=None, truncation=True)}
        assert [found[name] for name in "abc"] == pytest.approx(row.tolist(), abs=1e-4)


def test_a_pipeline_takes_sigmoids_where_a_text_has_several_labels(encoder, tmp_path):
    labels = [["a"], ["a", "b"], ["b"], [], ["a"], ["b"], ["a", "b"], [], ["a"], ["b"]]
    classifier = TextClassifier(encoder, pooling="cls", steps=0, device="cpu").fit(TEXTS, labels)
    classifier.export_transformers(tmp_path / "model")
    classify = transformers.pipeline("text-classification", str(tmp_path / "model"), device="cpu")
    found = {one["label"]: one["score"] for one in classify(TEXTS[0], top_k=None)}
    assert [found["a"], found["b"]] == pytest.approx(
        classifier.predict_proba(TEXTS[:1])[0].tolist(), abs=1e-4
    )


def test_an_encoder_without_such_a_model_is_refused(fitted, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"pooling 'mean', and transformers' .*export it to ONNX"):
        fitted.export_transformers(tmp_path / "model")
    tiny_bert(tmp_path / "encoder", TEXTS)
    Layout("cls", True, 12, "").write(tmp_path / "encoder", 32)
    scaled = TextClassifier(tmp_path / "encoder", steps=0, device="cpu").fit(TEXTS, LABELS)
    with pytest.raises(InputError, match=r"'cls', scaled to length 1, and transformers'"):
        scaled.export_transformers(tmp_path / "model")
    scaled = scaled.set_params(pooling="cls")
    monkeypatch.setattr(agreement, "ABSOLUTE", 0.0)
    monkeypatch.setattr(agreement, "RELATIVE", 0.0)
    Layout("cls", False, 12, "").write(tmp_path / "encoder", 32)
    plain = TextClassifier(tmp_path / "encoder", steps=0, device="cpu").fit(TEXTS, LABELS)
    with pytest.raises(InputError, match="its logits differ by up to"):
        plain.export_transformers(tmp_path / "model")
    assert not (tmp_path / "model").exists()


# -- the hub

HUB = """
import sys
sys.path.insert(0, {tests!r})
import os
from hub_server import hub
with hub() as (address, files):
    os.environ["HF_ENDPOINT"] = address
    from rnnopt import TextClassifier
    from rnnopt.errors import InputError
    classifier = TextClassifier.load({saved!r}, device="cpu")
    url = classifier.push_to_hub("someone/things", token="hf_right")
    assert url == address + "/someone/things/commit/" + "a" * 40, url
    held = files["someone/things"]
    wanted = {{"model.safetensors", "head.safetensors", "modules.json", "1_Pooling/config.json"}}
    assert wanted <= set(held)
    assert b'TextClassifier.from_pretrained("someone/things")' in held["README.md"]
    again = TextClassifier.from_pretrained("someone/things", device="cpu")
    texts = ["play some jazz", "will it rain"]
    assert (again.predict_proba(texts) == classifier.predict_proba(texts)).all()
    for call, part in (
        (lambda: classifier.push_to_hub("someone/things", token="hf_wrong"), "hf auth login"),
        (lambda: TextClassifier.from_pretrained("someone/nothing"), "neither a folder nor a model"),
    ):
        try:
            call()
        except InputError as error:
            assert part in str(error), error
        else:
            raise AssertionError(part)
"""


@pytest.mark.slow  # 10 s
def test_a_classifier_goes_to_the_hub_and_comes_back(fitted, tmp_path):
    """In a process of its own, since the hub's address and offline mode are read at import."""
    fitted.save(tmp_path / "saved")
    code = HUB.format(tests=os.path.dirname(__file__) + "/..", saved=str(tmp_path / "saved"))
    changed = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **changed}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_from_pretrained_takes_a_folder(fitted, tmp_path):
    fitted.save(tmp_path / "saved")
    again = TextClassifier.from_pretrained(tmp_path / "saved", device="cpu")
    assert (again.predict_proba(TEXTS) == fitted.predict_proba(TEXTS)).all()


def test_names_that_the_hub_can_not_have(fitted):
    with pytest.raises(InputError, match="there is no folder no/such/thing; give one that"):
        TextClassifier.from_pretrained("no/such/thing")
    with pytest.raises(InputError, match="'a b' is no name on the hub; give owner/name"):
        fitted.push_to_hub("a b")
    with pytest.raises(InputError, match=r"neither a folder nor a model .*check its name"):
        TextClassifier.from_pretrained("some/model")  # tests are offline
    with pytest.raises(InputError, match=r"could not be put on the hub .*log in with `hf auth"):
        fitted.push_to_hub("some/model")
