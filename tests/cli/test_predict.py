"""`rnnopt fit`, `predict` and `evaluate`: from a CSV file to predictions in two commands."""

import csv
import io
import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest

from rnnopt import TextClassifier
from rnnopt.cli.classifier import predict
from rnnopt.cli.main import main
from rnnopt.cli.progress import Bar

# most tests judge by the texts that the classifier was fitted on, of which it warns
pytestmark = pytest.mark.filterwarnings("ignore:.* stand among those that it was fitted on")


def run(*words):
    return main([str(word) for word in words])


def fails(capsys, *words):
    assert run(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture(scope="module")
def model(csv_file, encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "classifier"
    assert run("fit", "--data", csv_file, "--encoder", encoder, "--output", folder,
               "--steps", 0, "--device", "cpu") == 0  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def known(model):
    return TextClassifier.load(model, device="cpu")


def rows_of(content):
    return list(csv.DictReader(io.StringIO(content)))


def test_two_commands_from_a_file_to_predictions(model, known, capsys):
    assert run("predict", "--model", model, "--text", "tell me about the song") == 0
    (row,) = rows_of(capsys.readouterr().out)
    probabilities = known.predict_proba(["tell me about the song"])
    assert row["label"] == known.predict(["tell me about the song"])[0]
    assert float(row["probability"]) == pytest.approx(probabilities.max(), abs=1e-6)


def test_fit_says_what_it_did_and_why(csv_file, encoder, tmp_path, capsys):
    words = "fit", "--data", csv_file, "--encoder", encoder, "--steps", 0, "--device", "cpu"
    assert run(*words, "--output", tmp_path / "saved", "--abstain-below", 0.4, "--seed", 3) == 0
    out = capsys.readouterr().out
    assert "240 texts, 10 classes" in out and "kept " in out and "rnnopt predict --model" in out
    saved = TextClassifier.load(tmp_path / "saved")
    assert (saved.abstain_below, saved.random_state, saved.steps) == (0.4, 3, 0)
    line = fails(capsys, *words, "--output", csv_file / "saved")
    assert f"saved can't be made in {csv_file}; choose another folder" in line
    assert capsys.readouterr().out == ""  # said before anything was fitted
    line = fails(capsys, *words, "--output", tmp_path / "saved")
    assert "has something in it, and nothing is overwritten; choose another folder" in line


def test_fit_shows_its_steps(csv_file, encoder, tmp_path, monkeypatch):
    notes = []
    monkeypatch.setattr(Bar, "advance", lambda bar, note: notes.append(note))
    words = "fit", "--data", csv_file, "--encoder", encoder, "--device", "cpu", "--seconds", 999
    assert run(*words, "--steps", 1, "--output", tmp_path / "saved") == 0
    assert [note.split(",")[0] for note in notes][:3] == [
        f"adapting to fold {fold}" for fold in range(1, 4)
    ]


@pytest.mark.parametrize("name", ["texts.csv", "texts.jsonl"])
def test_a_file_of_texts(name, model, known, texts, tmp_path, capsys):
    wanted = [text for text, _ in texts][:30] * 2  # repeated rows have their answers, too
    path = tmp_path / name
    if name.endswith(".csv"):
        path.write_text("id,text\n" + "".join(f"{i},{text}\n" for i, text in enumerate(wanted)))
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in wanted))
    output = tmp_path / "predictions.csv"
    assert run("predict", "--model", model, "--data", path, "--output", output, "--all") == 0
    assert capsys.readouterr().out == ""
    rows = rows_of(output.read_text())
    assert [row["text"] for row in rows] == wanted
    assert [row["label"] for row in rows] == known.predict(wanted).tolist()
    columns = [f"probability of {label}" for label in known.classes_]
    found = np.array([[float(row[column]) for column in columns] for row in rows])
    assert np.allclose(found, known.predict_proba(wanted), atol=1e-6)


@pytest.mark.slow  # 13 s
def test_standard_input_is_answered_as_it_comes(model, known):
    """The first answer is there before the second line is."""
    code = "import sys; from rnnopt.cli.main import main; sys.exit(main())"
    words = [sys.executable, "-c", code, "predict", "--model", str(model), "--data", "-"]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ}, text=True
    ) as process:
        assert process.stdout.readline() == "text,label,probability\n"
        for text in ("tell me about the song", "i want a pizza, today"):
            process.stdin.write(f"{text}\n\n")
            process.stdin.flush()
            (answer,) = csv.reader([process.stdout.readline()])
            assert answer[:2] == [text, known.predict([text])[0]]
        process.stdin.write("no line end")
        process.stdin.close()
        assert process.stdout.read().startswith("no line end,")
    assert process.returncode == 0


def test_a_pipe_that_nobody_reads_any_more_ends_it(model, texts, tmp_path, monkeypatch, capsys):
    """As in `rnnopt predict ... | head -1`."""
    path = tmp_path / "texts.csv"
    path.write_text("text\n" + "".join(f"{text}\n" for text, _ in texts))
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert run("predict", "--model", model, "--data", path) == 141
    assert capsys.readouterr().err == ""


def test_an_unlikely_text_has_no_label(model, capsys):
    words = "predict", "--model", model, "--text", "one", "two", "--abstain-below", 1.0
    assert run(*words) == 0
    assert [row["label"] for row in rows_of(capsys.readouterr().out)] == ["", ""]


def test_evaluate_tells_accuracy_with_its_interval(model, known, csv_file, texts, capsys):
    assert run("evaluate", "--model", model, "--data", csv_file) == 0
    wanted = known.evaluate([text for text, _ in texts], [label for _, label in texts])
    assert capsys.readouterr().out == f"{wanted}\n"
    assert run("evaluate", "--model", model, "--data", csv_file, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == wanted.accuracy and found["low"] < found["accuracy"]


def test_evaluate_says_which_texts_it_was_fitted_on(model, texts, tmp_path, capsys):
    path = tmp_path / "test.csv"
    path.write_text(f"text,label\n{texts[0][0].upper()},weather\na text of mine,weather\n")
    with pytest.warns(UserWarning, match="1 of the 2 texts to judge by stand among those that it"):
        assert run("evaluate", "--model", model, "--data", path) == 0
    assert "; it was fitted on 1 of these texts, so that this flatters" in capsys.readouterr().out


def test_a_warning_is_one_line_without_code(model, csv_file, capsys, monkeypatch):
    def show(message, category, filename, line, *_):  # as Python does outside of pytest
        print(end=warnings.formatwarning(message, category, filename, line), file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", show)
        assert run("evaluate", "--model", model, "--data", csv_file) == 0
    said = "rnnopt evaluate: warning: 240 of the 240 texts to judge by stand among those that it "
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)
    assert "warning: " not in warnings.formatwarning("a", UserWarning, "file.py", 1)


def test_a_long_file_shows_how_far_it_is(model, texts, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(predict, "_CHUNK", 100)
    monkeypatch.setattr(Bar, "at", lambda bar, done: told.append((done, bar._total)))
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text, _ in texts))
    assert run("predict", "--model", model, "--data", path, "--output", tmp_path / "out.csv") == 0
    assert told == [(100, 240), (200, 240), (240, 240)]


def test_labels_that_were_integers_are_judged_from_a_file(encoder, tmp_path, capsys):
    TextClassifier(encoder, steps=0).fit(["a song", "a pizza"], [1, 20]).save(tmp_path / "model")
    (tmp_path / "test.csv").write_text("text,label\na song,1\na pizza,20\n")
    assert run("evaluate", "--model", tmp_path / "model", "--data", tmp_path / "test.csv") == 0
    assert "on 2 texts: accuracy 1.000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "a", "--data", "b.csv"], "--data and --text: both are given; give one of them"),
        ([], "--data and --text: neither is given; give one of them, --data - for standard input"),
        (["--data", "no.csv"], "no.csv: no such file; check the path"),
        (["--data", "OTHER"], "no column 'text', the columns are words; name the right one with"),
        (["--text", "a", "--output", "OTHER"], "is there already, and nothing is overwritten"),
        (["--text", "a", "--output", "no/folder/x.csv"], "can't write no/folder/x.csv"),
        (["--text", "a", "--abstain-below", "3"], "abstain_below is 3.0; it is a probability"),
    ],
)
def test_what_can_not_be_predicted(words, message, model, tmp_path, capsys):
    other = tmp_path / "other.csv"
    other.write_text("words\na text\n")
    words = [str(other) if word == "OTHER" else word for word in words]
    assert message in fails(capsys, "predict", "--model", model, *words)
    assert other.read_text() == "words\na text\n"
    assert list(tmp_path.iterdir()) == [other]


def test_a_folder_that_is_no_classifier(encoder, csv_file, capsys):
    line = fails(capsys, "predict", "--model", encoder, "--text", "a")
    assert "is no classifier: it has no classifier.json; give a folder that" in line
    line = fails(capsys, "evaluate", "--model", "nowhere", "--data", csv_file)
    assert "nowhere is no classifier" in line


def test_files_that_can_not_be_judged_or_fitted(model, encoder, tmp_path, capsys):
    path = tmp_path / "labels.csv"
    path.write_text("text,label\na text,unheard\n")
    line = fails(capsys, "evaluate", "--model", model, "--data", path)
    assert "label 'unheard' is none of the classifier's 10" in line and "correct it" in line
    line = fails(capsys, "fit", "--data", path, "--encoder", encoder, "--output", tmp_path / "new")
    assert "all 1 labels are 'unheard'; a classifier needs texts of at least 2 labels" in line
    path.write_text("text,label\n")
    line = fails(capsys, "fit", "--data", path, "--encoder", encoder, "--output", tmp_path / "new")
    assert "no rows, needs at least one" in line
    path.write_text("text,kind\na,b\n")
    line = fails(capsys, "fit", "--data", path, "--encoder", encoder, "--output", tmp_path / "new")
    assert "no column 'label', the columns are text, kind; name the right one" in line
    assert not (tmp_path / "new").exists()


def test_texts_with_several_labels(encoder, tmp_path, capsys):
    path, model = tmp_path / "f.csv", tmp_path / "model"
    rows = [("a song", "music"), ("a pizza", "food"), ("a song and a pizza", "music|food")]
    rows = [(f"{text} {i}", label) for i in range(4) for text, label in [*rows, ("a desk", "")]]
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    words = "fit", "--data", path, "--encoder", encoder, "--output", model, "--steps", 0
    assert run(*words, "--label-separator", "|") == 0
    out = capsys.readouterr().out
    assert "16 texts, 2 labels, 1.00 labels a text" in out and "several labels a text: micro" in out
    known = TextClassifier.load(model)
    assert run("predict", "--model", model, "--data", path) == 0
    found = [row["label"] for row in rows_of(capsys.readouterr().out)]
    assert found == [";".join(row) for row in known.predict([text for text, _ in rows])]
    words = "evaluate", "--model", model, "--data", path
    assert run(*words, "--label-separator", "|") == 0
    assert "all labels right" in capsys.readouterr().out
    assert "label 'music|food' is none of" in fails(
        capsys, *words
    )  # the separator is ; unless said
    words = "predict", "--model", model, "--text", "a", "--label-separator"
    assert "label 'food' holds; choose another" in fails(capsys, *words, "oo")


def test_a_separator_for_a_classifier_of_one_label(model, csv_file, capsys):
    words = "evaluate", "--model", model, "--data", csv_file, "--label-separator", ";"
    assert "gives a text one label; leave it out" in fails(capsys, *words)


def test_export_to_onnx_tells_both_accuracies(model, csv_file, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    words = "export", "--model", model, "--output", tmp_path / "onnx"
    assert run(*words, "--data", csv_file) == 0
    out = capsys.readouterr().out
    assert "model.onnx: " in out and "on 240 texts, accuracy 1.000" in out
    assert "model_int8.onnx: " in out and out.count(", accuracy ") == 2
    assert "nothing is overwritten" in fails(capsys, *words)


def test_fit_exports_what_it_has_fitted(csv_file, encoder, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    words = "fit", "--data", csv_file, "--encoder", encoder, "--steps", 0, "--output"
    line = fails(capsys, *words, tmp_path / "one", "--onnx", tmp_path / "one")
    assert "--output and --onnx are both" in line and not (tmp_path / "one").exists()
    assert run(*words, tmp_path / "one", "--onnx", tmp_path / "two") == 0
    assert "compared on the texts that it was fitted on" in capsys.readouterr().out
    assert (tmp_path / "two" / "model_int8.onnx").exists()


def test_export_to_transformers(model, encoder, csv_file, tmp_path, capsys):
    line = fails(capsys, "export", "--model", model, "--output", tmp_path / "x",
                 "--format", "transformers")  # fmt: skip
    assert "export it to ONNX, or fit with pooling='cls'" in line
    words = "fit", "--data", csv_file, "--encoder", encoder, "--steps", 0, "--pooling", "cls"
    assert run(*words, "--output", tmp_path / "one") == 0
    words = "export", "--model", tmp_path / "one", "--output", tmp_path / "two"
    assert run(*words, "--format", "transformers") == 0
    assert 'pipeline("text-classification", "' in capsys.readouterr().out


def test_fit_learns_when_to_give_no_label(csv_file, encoder, tmp_path, capsys):
    words = "fit", "--data", csv_file, "--encoder", encoder, "--steps", 0, "--output"
    assert run(*words, tmp_path / "model", "--abstain", 0.1) == 0
    assert "no answer where the largest logit is below" in capsys.readouterr().out
    assert run("predict", "--model", tmp_path / "model", "--text", "xyz qqq", "a song") == 0
    found = [row["label"] or None for row in rows_of(capsys.readouterr().out)]
    assert found == TextClassifier.load(tmp_path / "model").predict(["xyz qqq", "a song"]).tolist()
    assert run("evaluate", "--model", tmp_path / "model", "--data", csv_file) == 0
    assert "of them answered, and" in capsys.readouterr().out
