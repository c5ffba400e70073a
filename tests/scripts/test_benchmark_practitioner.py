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
    names = (
        "logistic regression",
        "nearest mean",
        "TextClassifier, not adapted",
        "**TextClassifier**",
    )
    for name, row in zip(names, lines[-4:], strict=True):
        assert row.startswith(f"| TREC, 10 classes | 2 | {name} | 2 | 0.")
    others = "adamw 5e-5", "prodigy"
    lines = run(*words, "--shots", 2, "--draws", 1, "--seconds", 0, "--methods", *others)
    for name, row in zip(others, lines[-2:], strict=True):
        assert row.startswith(f"| TREC, 10 classes | 2 | the same by {name} | 1 | 0.")


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
    assert any(line.startswith(f"| NusaX buginese, {classes} classes | 2 |") for line in lines)
    with pytest.raises(SystemExit, match="agnews has no classes to choose by"):
        run(*words, "--sets", "agnews", "--part", "choose")
    with pytest.raises(SystemExit, match="and 99 to fit on leave none to judge by"):
        run(*words, "--sets", "nusax buginese", "--shots", 99)


def test_the_tables_pair_draws_and_unite_families(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("practitioner_tables")
    accuracy = {  # of the draws
        ("nusax buginese", "rnnopt"): [0.8, 0.7], ("nusax english", "rnnopt"): [0.9, 0.6],
        ("nusax buginese", "logistic"): [0.7, 0.6, 0.0], ("nusax english", "logistic"): [0.8, 0.5],
        ("nusax english", "setfit"): [0.95], ("nusax english", "prodigy"): [0.9],
    }  # fmt: skip
    lines = [
        {"cell": [name, 5, method, seed], "ways": 3, "accuracy": value, "log_loss": 1.0,
         "calibration_error": 0.1, "seconds": 20.0}
        for (name, method), values in accuracy.items()
        for seed, value in enumerate(values)
    ]  # fmt: skip
    twice = [{**lines[0], "accuracy": 0.0}]  # of a cell that is there already
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in twice))
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    monkeypatch.setattr(sys, "argv", ["practitioner_tables.py", *files, "--output", str(tmp_path)])
    module.main()
    assert capsys.readouterr().out == "13 rows\n"
    row = (tmp_path / "practitioner-summary.md").read_text().splitlines()[2]
    assert row.startswith("| NusaX, sentiment, 2 languages, 3 classes | 5 | 4 | 0.650 ± ")
    assert "| 0.950 | 0.750 ± " in row  # of SetFit a draw, and the four of TextClassifier
    assert "| +0.100 ± 0.000 | -0.050 | 1.00 (1.00, 1.00) | 0.100 | 20 (20) |" in row
    mean = (tmp_path / "practitioner-means.md").read_text()
    assert "| accuracy, less that of logistic regression | 1 | 0.100 | 0.100 to 0.100 |" in mean
    assert "| log loss, as a share of that of SetFit | 1 | 1.00 | 1.00 to 1.00 |" in mean
    rows = (tmp_path / "practitioner-cells.md").read_text().splitlines()
    assert rows[2].startswith("| NusaX buginese, 3 classes | 5 | logistic regression | 3 | 0.433")
    assert "| +0.100 +0.100 |" in rows[2]  # two draws have no interval
    assert rows[-1].startswith("| NusaX english, 3 classes | 5 | the same by prodigy | 1 | 0.900 |")


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
    assert first == second and "TREC, 10 classes" in first and "TextClassifier" in first
