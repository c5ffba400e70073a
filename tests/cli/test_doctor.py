"""`rnnopt doctor`: what `rnnopt fit` would do, before anything runs."""

import re
import time

import pytest

from rnnopt import TextClassifier
from rnnopt.cli.main import main
from rnnopt.rules.classical import Adam
from rnnopt.rules.files import save_rule


def doctor(capsys, *words):
    code = main(["doctor", *map(str, words), "--device", "cpu"])
    captured = capsys.readouterr()
    assert captured.err == ""
    return code, captured.out


@pytest.fixture
def few(texts, tmp_path):
    path = tmp_path / "few.csv"
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in texts[:48:3]))
    return path


def test_it_tells_what_fit_is_going_to_do_and_how_long_it_takes(few, encoder, capsys):
    code, out = doctor(capsys, "--data", few, "--encoder", encoder)
    assert code == 0 and "problem" not in out
    for part in (
        r"^ok +machine: \d+ cores, \d+ threads, ",
        r"^ok +libraries: rnnopt .*torch ",
        r"^ok +settings: rule that ships, seed 0$",
        r"^ok +encoder: tiny, bert of 0\.\d million parameters on cpu; vectors of 32 by",
        r"^ok +data: 16 texts, 2 classes; 8 texts a label$",
        r"^ok +time: [\d.]+ ms a text, .*; peak memory so far \d+ MB$",
        r"^plan +embed 16 texts in about 0\.\d s, .*adapt in 3 folds and once to all",
    ):
        assert re.search(part, out, re.MULTILINE), (part, out)


def test_what_it_foresees_is_what_happens(few, encoder, texts, capsys, tmp_path):
    save_rule(Adam(1e-2), tmp_path / "rule.safetensors")
    words = "--data", few, "--encoder", encoder, "--rule", tmp_path / "rule.safetensors"
    _, out = doctor(capsys, *words, "--steps", 3, "--seconds", 60)
    folds = int(re.search(r"adapt in (\d) folds", out).group(1))
    rows = texts[:48:3]
    started = time.perf_counter()
    classifier = TextClassifier(
        encoder, rule=tmp_path / "rule.safetensors", steps=3, seconds=60, device="cpu"
    ).fit([text for text, _ in rows], [label for _, label in rows])
    assert classifier.report_.folds == folds
    assert time.perf_counter() - started < 60


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--steps", 0], r"leave the encoder as it is \(--steps is 0\)"),
        (["--seconds", 0], r"leave the encoder as it is \(that takes \d+ s or more, and --seconds"),
    ],
)
def test_it_says_why_nothing_is_adapted(words, why, few, encoder, capsys):
    code, out = doctor(capsys, "--data", few, "--encoder", encoder, *words)
    assert code == 0 and re.search(why, out)


def test_it_says_if_there_is_time_for_some_of_the_steps_alone(few, encoder, capsys):
    words = "--data", few, "--encoder", encoder, "--steps", 100_000, "--seconds", 5
    code, out = doctor(capsys, *words)
    allowed = re.search(r"note     time: --seconds 5 allow (\d+) of the 100000 steps; give", out)
    assert code == 0 and f"adapt in 2 folds and once to all texts, {allowed.group(1)} steps" in out


def test_it_notes_what_is_odd_about_the_data(encoder, tmp_path, capsys):
    path = tmp_path / "f.csv"
    rows = [(f"a song number {i} " * (20 if i == 3 else 1), "music") for i in range(12)]
    path.write_text("text,label\n" + "".join(f"{t},{label}\n" for t, label in [*rows, ("x", "y")]))
    code, out = doctor(capsys, "--data", path, "--encoder", encoder, "--max-length", 20)
    assert code == 0
    assert "note     data: 1 of 2 labels have one text, which can't be held out" in out
    assert "--class-weight balanced makes them count alike" in out
    assert "note     data: 1 of 13 texts fill the 20 tokens that are read" in out


def test_one_text_a_label(encoder, tmp_path, capsys):
    path = tmp_path / "f.csv"
    path.write_text("text,label\na song,music\na pizza,food\n")
    code, out = doctor(capsys, "--data", path, "--encoder", encoder)
    assert code == 0 and "(every label has one text, and none can be held out)" in out
    code, out = doctor(capsys, "--data", path, "--encoder", encoder, "--abstain", 0.1)
    assert code == 2 and "--abstain is 0.1, and every label has one text" in out


def test_several_labels(encoder, tmp_path, capsys):
    path = tmp_path / "f.csv"
    path.write_text(
        "text,label\n" + "".join(f"song {i},a;b\npizza {i},a\nx {i},\n" for i in range(5))
    )
    words = "--data", path, "--encoder", encoder, "--label-separator", ";"
    code, out = doctor(capsys, *words)
    assert code == 0 and "15 texts, 2 labels, 1.00 labels a text" in out and "adapt in" in out
    code, out = doctor(capsys, *words, "--class-weight", "balanced")
    assert code == 2 and "class_weight is 'balanced', and texts have several labels" in out


def test_every_problem_is_told_with_its_remedy(tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("x")
    code, out = doctor(
        capsys, "--data", tmp_path / "no.csv", "--encoder", "no/such folder",
        "--output", tmp_path / "taken",
    )  # fmt: skip
    assert code == 2 and out.count("problem  ") == 3
    assert "taken has something in it, and nothing is overwritten" in out
    assert "there is no folder no/such folder; give a folder" in out
    assert "no.csv: no such file; check the path" in out
    assert (tmp_path / "taken" / "file").read_text() == "x"


def test_a_rule_that_can_not_be_used(few, encoder, capsys):
    code, out = doctor(capsys, "--data", few, "--encoder", encoder, "--rule", "no.safetensors")
    assert code == 2 and "problem  settings: " in out and "no.safetensors" in out
