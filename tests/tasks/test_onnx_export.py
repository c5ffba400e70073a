"""`TextClassifier.export_onnx`: onnxruntime gives the same logits."""

import json

import numpy as np
import pytest
from encoders import TEXTS, tiny_bert, tiny_distilbert, tiny_roberta

from rnnopt import TextClassifier
from rnnopt.errors import InputError
from rnnopt.tasks.text.encoder.sentence import Layout
from rnnopt.tasks.text.estimator.export import agreement

onnxruntime = pytest.importorskip("onnxruntime")
LABELS = ["a", "b"] * 5


def logits_by_hand(folder, texts, name="model.onnx"):
    """As the page in the folder says, with onnxruntime and tokenizers alone."""
    page = (folder / "README.md").read_text()
    code = page.split("```python\n")[1].split("```")[0].replace('["..."]', "texts")
    for file in ("onnx.json", "tokenizer.json", "model.onnx"):
        code = code.replace(f'"{file}"', f'"{folder}/{name if file == "model.onnx" else file}"')
    names = {"texts": texts}
    exec(code, names)
    return names["logits"], names["answers"]


@pytest.mark.parametrize("make", [tiny_distilbert, tiny_roberta])
def test_other_architectures(make, tmp_path):
    folder = make(tmp_path / "encoder")
    classifier = TextClassifier(folder, steps=0, device="cpu").fit(TEXTS, LABELS)
    report = classifier.export_onnx(tmp_path / "onnx", TEXTS, int8=False)
    assert report.texts == 10 and report.difference < 1e-4 and report.int8_bytes is None
    assert not (tmp_path / "onnx" / "model_int8.onnx").exists()


@pytest.mark.parametrize("layout", [("mean", True), ("cls", True), ("max", False), ("last", False)])
def test_every_pooling(layout, tmp_path):
    tiny_bert(tmp_path / "encoder", TEXTS)
    Layout(*layout, 12, "").write(tmp_path / "encoder", 32)  # cuts some texts off
    classifier = TextClassifier(tmp_path / "encoder", steps=0, device="cpu").fit(TEXTS, LABELS)
    classifier.export_onnx(tmp_path / "onnx", int8=False)
    wanted = classifier.logits(TEXTS)
    for texts in (TEXTS[:1], TEXTS, TEXTS[3:5] * 20):  # batches of several sizes and lengths
        logits, answers = logits_by_hand(tmp_path / "onnx", texts)
        wanted = classifier.logits(texts)
        assert np.abs(logits - wanted).max() < 1e-4
        assert answers == classifier.predict(texts).tolist()


@pytest.fixture(scope="module")
def exported(encoder, texts, tmp_path_factory):
    """A classifier, its folder, and the report."""
    known = [pair for pair in texts if pair[1] in ("food", "music", "work")]
    words, labels = [text for text, _ in known], [label for _, label in known]
    classifier = TextClassifier(encoder, steps=0, device="cpu").fit(words, labels)
    folder = tmp_path_factory.mktemp("export") / "onnx"
    return classifier, folder, classifier.export_onnx(folder, words, labels), words, labels


def test_eight_bits_have_their_accuracy_beside_them(exported):
    classifier, folder, report, words, labels = exported
    assert report.accuracy == classifier.score(words, labels)
    _, answers = logits_by_hand(folder, words, "model_int8.onnx")
    assert report.int8_accuracy == np.mean(np.array(answers) == labels)
    assert report.int8_agreement == np.mean(classifier.predict(words) == answers)
    assert report.int8_difference > report.difference
    assert report.int8_bytes < report.bytes
    assert f"accuracy {report.int8_accuracy:.3f}" in str(report)


def test_the_folder_says_what_it_holds(exported):
    classifier, folder, report, *_ = exported
    facts = json.loads((folder / "onnx.json").read_text())
    assert facts["classes"] == classifier.classes_.tolist() and facts["thresholds"] is None
    assert facts["report"]["difference"] == report.difference < 1e-4
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pkl", ".py")]


def test_several_labels(encoder, tmp_path):
    labels = [["a"], ["a", "b"], ["b"], [], ["a"], ["b"], ["a", "b"], [], ["a"], ["b"]]
    classifier = TextClassifier(encoder, steps=0, device="cpu").fit(TEXTS, labels)
    report = classifier.export_onnx(tmp_path / "onnx", TEXTS, labels, int8=False)
    assert report.accuracy == classifier.score(TEXTS, labels)
    _, answers = logits_by_hand(tmp_path / "onnx", TEXTS)
    assert (
        answers.astype(int) == [[name in row for name in "ab"] for row in classifier.predict(TEXTS)]
    ).all()


# -- what can not be exported


def test_nothing_is_overwritten(exported):
    classifier, folder, *_ = exported
    with pytest.raises(InputError, match="has something in it, and nothing is overwritten"):
        classifier.export_onnx(folder)


def test_other_logits_are_refused_and_leave_nothing(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(agreement, "ABSOLUTE", 0.0)
    monkeypatch.setattr(agreement, "RELATIVE", 0.0)
    with pytest.raises(InputError, match=r"logits differ by up to .*and 0e\+00 is allowed; this"):
        exported[0].export_onnx(tmp_path / "new", int8=False)
    assert list(tmp_path.iterdir()) == []


def test_the_packages_are_named(exported, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r'ONNX needs two packages more: pip install "rnnopt.onnx'):
        exported[0].export_onnx(tmp_path / "new")


def test_texts_to_compare_by_are_checked(exported, tmp_path):
    with pytest.raises(InputError, match="there are 0 texts to compare by"):
        exported[0].export_onnx(tmp_path / "new", [])
    with pytest.raises(InputError, match="label 'sport' is none of the classifier's 3"):
        exported[0].export_onnx(tmp_path / "new", ["a"], ["sport"])
