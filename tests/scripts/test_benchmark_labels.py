"""`benchmark_labels.py` on sets of the tests."""

import gzip
import importlib
import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def write(path, pairs):
    path.parent.mkdir(exist_ok=True)
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"text": t, "label": label}) + "\n" for t, label in pairs)


@pytest.fixture
def data(texts, tmp_path):
    """Both sets; the last three classes are train classes, and of no label."""
    known, other = texts[:168], texts[168:]
    for name in ("clinc150", "stackoverflow20"):
        write(tmp_path / name / "test.jsonl.gz", known)
        write(tmp_path / name / "val.jsonl.gz", known)
        write(tmp_path / name / "train.jsonl.gz", other)
        write(tmp_path / name / "oos.jsonl.gz", [(text, "oos") for text, _ in other])
    return tmp_path


def lines_of(monkeypatch, capsys, *words):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("benchmark_labels")
    monkeypatch.setattr(sys, "argv", ["benchmark_labels.py", *map(str, words)])
    module.main()
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("part", ["report", "choose"])
def test_abstention(part, data, encoder, monkeypatch, capsys):
    words = "none", "--data", data, "--encoder", encoder, "--ways", 3, "--shots", 4, "--draws", 2
    lines = lines_of(monkeypatch, capsys, *words, "--abstain", 0.2, "--part", part)
    assert [line.split(" | ")[:3] for line in lines[2:]] == [
        ["| 3", "4", "logit"], ["| 3", "4", "probability"],
    ]  # fmt: skip
    answered, of_no_class, right, area = (
        float(cell.split()[0]) for cell in lines[2].split(" | ")[3:]
    )
    # a random encoder tells classes apart only a little
    assert 0.5 < answered <= 1 and 0 <= of_no_class <= 1 and 0 < right <= 1 and area > 0.5


def test_several_labels(data, encoder, monkeypatch, capsys):
    words = "several", "--data", data, "--encoder", encoder, "--texts", 40, "--draws", 2
    lines = lines_of(monkeypatch, capsys, *words)
    named = [line.split(" | ")[:3] for line in lines[2:]]
    assert [row[2] for row in named] == ["by cross-validation", "1/2"] * 2
    assert [row[0] for row in named[::2]] == [
        "| clinc150, 10 labels",
        "| stackoverflow20, 6 labels",
    ]
