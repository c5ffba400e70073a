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


def test_a_language_is_a_set_and_a_set_with_nothing_to_choose_by_says_so(
    run, texts, encoder, tmp_path
):
    (tmp_path / "nusax").mkdir()
    rows = [
        json.dumps({"text": f"{text} {domain}", "label": label, "domain": domain})
        for domain in ("buginese", "english")
        for text, label in texts[: 40 if domain == "buginese" else None]
    ]
    with gzip.open(tmp_path / "nusax" / "sentiment.test.jsonl.gz", "wt") as file:
        file.write("\n".join(rows))
    words = "--data", tmp_path, "--encoder", encoder, "--output", tmp_path / "results.jsonl"
    words += "--shots", 2, "--draws", 1, "--methods", "logistic"
    lines = run(*words, "--sets", "nusax buginese")
    classes = len({label for _, label in texts[:40]})
    assert any(line.startswith(f"| nusax buginese, {classes} classes | 2 |") for line in lines)
    with pytest.raises(SystemExit, match="agnews has no classes to choose by"):
        run(*words, "--sets", "agnews", "--part", "choose")


def test_the_picture_is_the_same_for_the_same_results(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("plot_practitioner")
    results, pictures = tmp_path / "results.jsonl", [tmp_path / name for name in ("a.svg", "b.svg")]

    def call(picture):
        monkeypatch.setattr(sys, "argv", ["plot_practitioner.py", str(results), str(picture)])
        module.main()

    lines = [
        {"cell": ["trec28", shots, method, seed], "ways": 10, "accuracy": 0.5 + shots / 40}
        for shots in (1, 5, 10)
        for method in ("logistic", "rnnopt")
        for seed in range(1 + (shots > 1))  # a single draw has no interval
    ]
    results.write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    with pytest.raises(SystemExit):
        call(pictures[0])
    assert "run benchmark_practitioner.py with --shots 5 10" in capsys.readouterr().err
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for picture in pictures:
        call(picture)
    first, second = (picture.read_text() for picture in pictures)
    assert first == second and "trec28, 10 classes" in first and "TextClassifier" in first
