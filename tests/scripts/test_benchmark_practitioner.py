"""`benchmark_practitioner.py` on a set of the tests."""

import gzip
import importlib
import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the script as from a command line; its lines."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("benchmark_practitioner")

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["benchmark_practitioner.py", *map(str, words)])
        capsys.readouterr()
        module.main()
        return capsys.readouterr().out.splitlines()

    return call


def test_every_method_has_its_row_and_a_stopped_run_goes_on(run, texts, encoder, tmp_path):
    (tmp_path / "trec28").mkdir()
    rows = [json.dumps({"text": text, "label": label}) for text, label in texts]
    with gzip.open(tmp_path / "trec28" / "test.jsonl.gz", "wt") as file:
        file.write("\n".join(rows))
    output = tmp_path / "results.jsonl"
    words = "--data", tmp_path, "--encoder", encoder, "--output", output, "--sets", "trec28"
    run(*words, "--shots", 2, "--draws", 1, "--seconds", 0)
    first = output.read_text()
    lines = run(*words, "--shots", 2, "--draws", 2, "--seconds", 0)
    assert output.read_text().startswith(first)
    for method in ("logistic (2)", "nearest mean (2)", "frozen (2)", "rnnopt (2, adapted in 0)"):
        assert any(f"| trec28, 10 classes | 2 | {method} | 0." in line for line in lines)
    run(*words, "--shots", 2, "--draws", 1, "--seconds", 0, "--methods", "adamw 5e-5", "prodigy")
    others = run("--output", output, "--table")
    for method in ("adamw 5e-5 (1, adapted in 0)", "prodigy (1, adapted in 0)"):
        assert any(f"| trec28, 10 classes | 2 | {method} | 0." in line for line in others)
    assert lines[-1].startswith("| mean | | | | nearest mean ")
    assert others[:-1] == [*lines[-7:-1], *others[6:-1]]
