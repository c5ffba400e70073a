"""What all fields share, on lines through 0: rows, kept models, and what a user is told."""

import json
import sys
from pathlib import Path

import field as fields
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import rnnopt

X = torch.linspace(-1, 1, 8).unsqueeze(1)


def lines(drawn=None):
    """A field: lines whose slopes are of the part; `drawn` gets the parts that were used."""
    slopes = {"train": 1, "validation": 2, "test": 3}

    def line(part, number, scored):
        (drawn if drawn is not None else []).append((part, scored))
        y = X * (slopes[part] + number % 4)
        return rnnopt.Task(
            lambda net, step: mse_loss(net(X[::2]), y[::2]),
            lambda net, step: mse_loss(net(X[1::2]), y[1::2]),
            metrics=(lambda net: {"size": float(net[0].weight.norm())}) if scored else None,
        )

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    return fields.Field(
        "lines", "Lines through 0.", rnnopt.Learner(net), line,
        metrics={"size": rnnopt.Metric(higher_is_better=True)},
        usual={"Adam": fields.at_default(torch.optim.Adam)},
        initial=("maml", "reptile"),
    )  # fmt: skip


def options(folder, **changes):
    return fields.Options(
        Path(), folder, **({"meta_steps": 2, "episodes": 2, "small": True} | changes)
    )


def test_every_method_is_a_row_and_a_second_run_repeats_nothing(tmp_path, capsys):
    first = fields.honest_comparison(lines(), options(tmp_path)).figures
    methods = {"learned", "adamw", "Adam", "field", "maml", "reptile"}
    assert first["methods"].keys() == methods
    table = (tmp_path / "lines.md").read_text()
    assert capsys.readouterr().out.strip() == table.strip()
    assert "shipped rule - AdamW, best rate, paired" in table and "size after" in table
    assert json.loads((tmp_path / "lines.json").read_text())["values"].keys() == methods
    assert (tmp_path / "lines.png").stat().st_size > 0
    drawn = []
    assert fields.honest_comparison(lines(drawn), options(tmp_path)).figures == first
    assert {part for part, scored in drawn} == {"test"}  # to put the learner back


def test_meta_training_sees_no_test_task_and_takes_no_scores(tmp_path):
    drawn = []
    fields.honest_comparison(lines(drawn), options(tmp_path))
    assert ("train", True) not in drawn and ("test", False) not in drawn


def test_the_rule_of_the_field_is_a_file_that_the_optimizer_takes(tmp_path):
    fields.honest_comparison(lines(), options(tmp_path))
    (file,) = tmp_path.glob("lines-rule-*.safetensors")
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    rnnopt.LearnedOptimizer([weight], file).step()
    assert not weight.equal(torch.ones(2, 2))


def test_tensors_are_made_once_for_the_same_facts(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"x": X}

    for facts in ({"a": 1}, {"a": 1}, {"a": 2}):
        assert fields.kept(tmp_path, "model", facts, make)["x"].equal(X)
    assert len(made) == 2


def test_input_that_can_not_be_used_exits_with_2(monkeypatch, capsys):
    def main(options):
        raise rnnopt.InputError(f"{options.data}: is empty; choose another --data")

    monkeypatch.setattr(sys, "argv", ["lines.py", "--data", "x", "--output", "y"])
    assert fields.command("Lines.", main, meta_steps=5, episodes=3) == 2
    assert capsys.readouterr().err == "lines.py: x: is empty; choose another --data\n"


@pytest.mark.parametrize("small", [True, False])
def test_small_runs_take_one_meta_step(monkeypatch, small):
    seen = []
    words = ["lines.py", "--data", "x", "--output", "y", *(["--small"] if small else [])]
    monkeypatch.setattr(sys, "argv", words)
    assert fields.command("Lines.", seen.append, meta_steps=50, episodes=30) == 0
    (found,) = seen
    assert (found.meta_steps, found.episodes) == ((1, 2) if small else (50, 30))
