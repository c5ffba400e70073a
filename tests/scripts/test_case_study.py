"""The case study of news, with a tiny encoder and made-up sets: once, stopped, resumed, told."""

import importlib
import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from conftest import FRAMES, THINGS

from rnnopt.data.corpus import text_key
from rnnopt.data.files import read_corpus
from rnnopt.errors import InputError
from rnnopt.rules.files import SHIPPED_RULE

SCRIPTS = Path(__file__).parents[2] / "scripts"
SETS = ("bbcsport5", "reuters31", "agnews_test", "tnews15_zh")


@pytest.fixture
def script(monkeypatch):
    """Import a script as `python scripts/NAME.py` would."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


def write(path, mark, labels):
    """A file of the texts of these classes, which no other mark has."""
    rows = [
        {"text": f"{mark} {frame.format(noun)}", "label": label}
        for label in labels
        for noun in THINGS[label]
        for frame in FRAMES
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The five sets, a few classes each."""
    folder, names = tmp_path_factory.mktemp("news"), list(THINGS)
    write(folder / "bbcsport5" / "all.jsonl", "sports", names[:5])
    write(folder / "reuters31" / "train.jsonl", "finance", names[:4])
    write(folder / "reuters31" / "val.jsonl", "finance", names[4:6])
    write(folder / "reuters31" / "test.jsonl", "finance", names[6:9])
    write(folder / "huffpost36" / "train.jsonl", "head", names[:3])
    write(folder / "huffpost36" / "val.jsonl", "head", names[3:6])
    write(folder / "agnews_test" / "all.jsonl", "ag", names[:4])
    write(folder / "tnews15_zh" / "all.jsonl", "far", names[5:])
    return folder


@pytest.fixture
def study(script, data, encoder):
    """Run `case_study_news.py` on few tasks."""

    def run(output, *more):
        options = {
            "--data": data, "--encoder": encoder, "--output": output, "--episodes": 2,
            "--tuning-episodes": 1, "--shots": 1, "--queries": 2, "--steps": 2, "--unroll": 2,
            "--meta-steps": 2, "--pretrain-steps": 3, "--tries": 1,
        }  # fmt: skip
        words = [str(word) for pair in options.items() for word in pair]
        return script("case_study_news").main([*words, *map(str, more)])

    return run


def results_of(output):
    return {name: json.loads((output / f"{name}.json").read_text()) for name in SETS}


# the time may be up between a file's opening and its `with`, which then leaves it to the collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_study_runs_once_goes_on_and_makes_table_and_figure(
    study, script, data, tmp_path, capsys
):
    output = tmp_path / "study"
    # stopped at once, and then somewhere in the middle
    assert study(output, "--time-limit", "0.02") == 0
    assert "the time is up" in capsys.readouterr().err
    assert study(output, "--time-limit", "3") == 0
    assert study(output) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "4 of 4 sets are finished"
    results = results_of(output)
    methods = list(script("case_study_news").METHODS)
    for result in results.values():
        assert list(result["methods"]) == methods
        for name, entry in result["methods"].items():
            assert {"accuracy", "f1", "loss"} <= entry.keys()
            assert list(entry["accuracy"]) == ["1", "2"]
            assert all(len(column) == 2 for column in result["values"][name]["f1"].values())
    ways = {name: result["setting"]["ways"] for name, result in results.items()}
    assert ways == {"bbcsport5": 2, "reuters31": 3, "agnews_test": 4, "tnews15_zh": 5}
    # values that were trained are what the methods that have them start from
    trained = results["agnews_test"]["setting"]["chosen"]
    for start in ("multitask", "maml", "meta-sgd", "init-rule"):
        runs = (output / "runs" / f"agnews_test-{start}.runs").read_text().splitlines()
        saved = json.loads((output / "trained" / trained[start] / "init" / "init.json").read_text())
        assert json.loads(runs[0])["init"] == saved["values"]
    # finished: nothing is written again; one more episode adds to what is there
    before = {path: path.stat().st_mtime_ns for path in output.glob("*.json")}
    assert study(output) == 0
    assert before == {path: path.stat().st_mtime_ns for path in output.glob("*.json")}
    assert study(output, "--episodes", "3") == 0
    for name, result in results_of(output).items():
        for method, column in results[name]["values"].items():
            more = result["values"][method]["loss"]["1"]
            assert len(more) == 3 and more[:2] == column["loss"]["1"]
    assert study(output, "--table", tmp_path / "table.md") == 0
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert "**bbcsport5**: 2-way 1-shot, 3 episodes of 2 classes" in table
    assert table.count("| accuracy, which is macro recall, after") == 4
    assert table.count("| macro F1 after") == 4
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    # another rule: what doesn't depend on it stays
    assert study(output, "--rule", SHIPPED_RULE) == 0
    for name, result in results_of(output).items():
        same = [m for m, v in result["values"].items() if v == results[name]["values"][m]]
        assert set(methods) - set(same) == {"rule", "multitask-rule"}


def test_classes_that_are_judged_were_not_learned_from(script, data, tmp_path):
    module = script("case_study_news")
    options = Namespace(data=data, output=tmp_path, seed=0, rule=None, device="cpu")
    study = module.CaseStudy(options)
    learned = {*study.splits.train.class_hashes, *study.splits.validation.class_hashes}
    for corpus in study.judged.values():
        assert not learned & corpus.class_hashes.keys()
    sports = {name for name in learned if name.startswith("bbcsport5/")}
    held = set(study.judged["bbcsport5"].class_hashes)
    assert (len(sports), len(held), len(sports | held)) == (3, 2, 5)
    texts = read_corpus(data / "bbcsport5" / "all.jsonl").texts
    copied = [
        text
        for part in ("train", "test")
        for text in read_corpus(tmp_path / "sources" / "bbcsport5" / f"{part}.jsonl").texts
    ]
    assert sorted(map(text_key, copied)) == sorted(map(text_key, texts))


def test_a_new_set_that_was_learned_from_is_refused(study, data, tmp_path, capsys):
    copy = tmp_path / "data"
    for path in data.glob("*/*"):
        (copy / path.parent.name).mkdir(parents=True, exist_ok=True)
        (copy / path.parent.name / path.name).write_bytes(path.read_bytes())
    stolen = copy / "huffpost36" / "train.jsonl"
    (copy / "agnews_test" / "all.jsonl").write_bytes(stolen.read_bytes())
    assert study(tmp_path / "out", "--data", copy) == 2
    assert "the classes learned from and agnews_test have classes in common" in (
        capsys.readouterr().err
    )


def test_too_few_sports_are_refused(script, tmp_path):
    write(tmp_path / "few" / "all.jsonl", "sports", list(THINGS)[:3])
    with pytest.raises(InputError, match="3 classes, at least 4 are needed to hold out 2"):
        script("case_study_news").hold_out_sports(tmp_path / "few", tmp_path, 0)


def entry(by_budget):
    return {b: {"mean": value, "ci95": 0.0} for b, value in by_budget.items()}


def test_what_was_hoped_for_is_computed_from_the_figures(script):
    figures = {
        "adamw": {"1": 0.5, "5": 0.7},
        "maml": {"1": 0.65, "5": 0.7},
        "rule": {"1": 0.6, "5": 0.75},
        "init-rule": {"1": 0.7, "5": 0.82},
        "maml-as-trained": {"1": 0.9, "5": 0.9},
    }
    result = {
        "setting": {
            "ways": 5, "shots": 1, "classes": ["a"], "encoder": "e", "tune": "lora", "head": "zero",
        },
        "episodes": 3,
        "methods": {
            name: {"accuracy": entry(f), "f1": entry(f), "seconds_per_step": 0.5}
            for name, f in figures.items()
        },
        "values": {
            name: {"accuracy": {b: [value] * 3 for b, value in f.items()}}
            for name, f in figures.items()
        },
    }  # fmt: skip
    text = script("case_study_table").case_study_table({"made": result})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[-2:]]
    assert rows == [
        ["made", "rule", "+0.050 ± 0.000, **missed by 0.050**",
         "-0.050 ± 0.000, **missed**, maml at 1"],
        ["made", "init-rule", "+0.120 ± 0.000, met", "+0.050 ± 0.000, met"],
    ]  # fmt: skip
    assert " 2.5 |" in text  # seconds for 5 steps


def test_a_factor_multiplies_the_steps_of_a_rule(script, encoder):
    import torch

    from rnnopt.rules.classical import SGD
    from rnnopt.tasks.text.classifier import Classifier
    from rnnopt.tasks.text.start import Start

    classifier = Classifier.load(encoder, ways=2, device=torch.device("cpu"))
    start, rule = Start(), SGD(0.1)
    moved = []
    for factor in (1.0, 3.0):
        classifier.reset(2, 0)
        build = script("case_study_news").tuned_factor(start, rule).build
        optimizer = build(classifier, start.params(classifier), factor, 1)
        before = classifier.output.bias.detach().clone()
        for param in start.params(classifier).values():
            param.grad = torch.ones_like(param)
        optimizer.step()
        moved.append((classifier.output.bias.detach() - before).numpy())
    assert np.allclose(moved[1], 3 * moved[0]) and np.abs(moved[0]).min() > 0
