"""The demo, shortened: the whole way on the embedded corpus, and what it leaves."""

import json

import pytest

from rnnopt import InputError, load_rule
from rnnopt.cli import demo as demo_module
from rnnopt.cli.demo import demo
from rnnopt.rules.files import read_training


def test_the_demo_leaves_report_picture_and_rule(tmp_path, monkeypatch, capsys):
    for name, short in (("META_STEPS", 2), ("STEPS", 2), ("EPISODES", 3), ("TUNING_EPISODES", 1)):
        monkeypatch.setattr(demo_module, name, short)
    folder = tmp_path / "demo"
    demo(folder)
    report = (folder / "report.md").read_text()
    assert "| learned |" in report
    assert "| adamw |" in report
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    load_rule(folder / "run")
    assert json.loads((folder / "run" / "log.jsonl").read_text().splitlines()[-1])["meta_step"] == 2
    assert all(name.startswith("stdlib/") for name in read_training(folder / "run")["classes"])
    assert "on modules never seen" in capsys.readouterr().out
    # the second process has run AdamW, and nothing was run twice
    lines = (folder / "comparison.runs.jsonl").read_text().splitlines()[1:]
    runs = [json.loads(line)["run"] for line in lines]
    assert len(set(runs)) == len(runs)
    assert [name.startswith("learned demo") for name in runs] == [False] * (len(runs) - 3) + [
        True
    ] * 3
    assert any(name.startswith("adamw") for name in runs)


def test_the_demo_overwrites_nothing(tmp_path):
    (tmp_path / "kept").write_text("")
    with pytest.raises(InputError, match="is not an empty folder; choose another --output"):
        demo(tmp_path)
