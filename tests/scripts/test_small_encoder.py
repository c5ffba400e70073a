"""The encoder that `scripts/small_encoder.py` trains from nothing."""

import importlib
from pathlib import Path

import pytest
import torch

from rnnopt.tasks.text.classifier import Classifier

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def train(monkeypatch, csv_file, tmp_path, capsys):
    """Runs the script; the folder that it wrote and the loss that it told."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("small_encoder")

    def run(name: str, **settings: int) -> tuple[Path, float]:
        folder = tmp_path / name
        sizes = {"width": 32, "layers": 1, "batch-size": 16, **settings}
        words = {"data": csv_file, "output": folder, **sizes}
        assert (
            script.main([w for key, value in words.items() for w in (f"--{key}", str(value))]) == 0
        )
        line = capsys.readouterr().out.splitlines()[-1]
        assert line.startswith(f"{folder}: ")
        return folder, float(line.split()[1])

    return run


def test_it_learns_its_texts_and_is_an_encoder_like_any_other(train):
    _, begin = train("begin", steps=2)
    folder, end = train("end", steps=300)
    assert end < begin - 1
    classifier = Classifier.load(
        str(folder), tune="full", ways=3, max_length=16, device=torch.device("cpu")
    )
    assert classifier.model.config.hidden_size == 32
    again, _ = train("again", steps=2)
    other, _ = train("other", steps=2, seed=1)
    weights = [
        (path / "model.safetensors").read_bytes()
        for path in (folder.with_name("begin"), again, other)
    ]
    assert weights[0] == weights[1] != weights[2]
