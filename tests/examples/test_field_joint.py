"""One rule for many fields: whose turn it is, and what is left out."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

pytest.importorskip("sacrebleu")

import field
import joint

import rnnopt

X = torch.linspace(-1, 1, 8).unsqueeze(1)


def lines(name, width, seen):
    """A field of lines, whose learner is so wide; `seen` gets the parts that are used."""

    def line(part, number, scored):
        seen.append((name, part))
        y = (number % 3) * X
        return rnnopt.Task(
            lambda net, step: mse_loss(net(X), y), lambda net, step: mse_loss(net(X), y)
        )

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1))
    return field.Field(name, name, rnnopt.Learner(net), line, facts={"width": width})


def test_fields_take_turns_each_with_its_own_learner():
    seen = []
    made = [lines("thin", 2, seen), lines("wide", 4, seen)]
    mixed = joint.Mixed([one.source("train", False) for one in made])
    for number in range(4):
        mixed.load(number)
        assert mixed.learner_of(number) is made[number % 2].learner
    assert seen == [("thin", "train"), ("wide", "train")] * 2


def test_the_joint_rule_learns_from_training_tasks_once(tmp_path):
    seen = []
    made = [lines("thin", 2, seen), lines("wide", 4, seen)]
    options = field.Options(Path(), tmp_path, meta_steps=1, episodes=2, small=True)
    rule = joint.joint_rule(made, options)
    assert set(seen) == {
        (one, part) for one in ("thin", "wide") for part in ("train", "validation")
    }
    seen.clear()
    again = joint.joint_rule(made, options)
    assert seen == []
    for left, right in zip(rule.parameters(), again.parameters()):
        assert torch.equal(left, right)
    more = dataclasses.replace(options, meta_steps=2)
    joint.joint_rule(made, more)
    assert seen


@pytest.mark.parametrize("chosen", [["translation"], ["translation", "chess"]])
def test_fields_that_can_not_be_mixed_exit_with_2(exit_code, capsys, tmp_path, chosen):
    words = ("--data", tmp_path, "--output", tmp_path / "out", "--fields", *chosen)
    assert exit_code(joint, *words) == 2
    assert f"--fields {' '.join(chosen)}: needs at least two of" in capsys.readouterr().err


def test_a_field_that_needs_an_encoder_asks_for_it(exit_code, capsys, tmp_path):
    words = ("--data", tmp_path, "--output", tmp_path / "out", "--fields", "selection", "digits")
    assert exit_code(joint, *words) == 2
    assert "selection needs an encoder; name a folder with --encoder" in capsys.readouterr().err


def test_a_field_is_compared_with_rules_of_all_of_the_others_and_its_own(tmp_path, monkeypatch):
    seen = []
    made = {name: lines(name, width, seen) for name, width in (("thin", 2), ("wide", 4))}
    monkeypatch.setattr(joint, "made_fields", lambda options: made)
    learned = []
    made_rule = joint.joint_rule
    monkeypatch.setattr(
        joint,
        "joint_rule",
        lambda fields, options: (
            learned.append([f.name for f in fields]) or made_rule(fields, options)
        ),
    )
    options = field.Options(Path(), tmp_path, meta_steps=1, episodes=2, small=True)
    joint.main(options)
    assert learned == [["thin", "wide"], ["wide"], ["thin"]]
    figures = json.loads((tmp_path / "joint-thin.json").read_text())
    assert {"field", "joint", "all", "adamw", "learned"} <= set(figures["methods"])
    table = (tmp_path / "joint.md").read_text()
    assert "mean nothing" in table and "meta-trained on all fields" in table
    row = next(line for line in table.splitlines() if line.startswith("| wide (loss) | 2 |"))
    values = json.loads((tmp_path / "joint-wide.json").read_text())["values"]
    pairs = zip(values["all"]["loss"]["2"], values["field"]["loss"]["2"])
    assert f"{sum(a - b for a, b in pairs) / 2:+.3f}" in row.split("|")[-2]
