"""scripts/ablations.py on a tiny encoder, and what scripts/meta_train.py ships."""

import importlib
import shutil
from pathlib import Path

import pytest
import torch

from rnnopt.rules.files import SHIPPED_HEAD_RULE, SHIPPED_RULE, load_rule

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    """A script by its name, as a module."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


def test_every_variant_gets_a_row(script, monkeypatch, csv_file, encoder, tmp_path):
    ablations = script("ablations")
    monkeypatch.setattr(ablations, "CELLS", ((csv_file.name, 2, 1),))
    shipped, other = (load_rule(SHIPPED_HEAD_RULE) for _ in range(2))
    with torch.no_grad():
        other.growth_bias.zero_()
    rules = {ablations.SHIPPED: shipped, "no growth": other}

    def table():
        return list(ablations.rows(rules, csv_file.parent, str(encoder), 2, tmp_path))

    lines = table()
    assert len(lines) == 2 + len(rules)
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert table() == lines  # from what it kept


def test_every_change_is_one_to_the_recipe(script):
    trained = script("ablations")
    recipe = trained.Change()
    for name, change in trained.CHANGES.items():
        same = trained.changed(change) == trained.changed(recipe)
        assert not same or change[2:] != recipe[2:], name


def test_a_variant_is_trained_once(script, monkeypatch, csv_file, encoder, tmp_path):
    trained = script("ablations")
    short = "--tune head --exact head --ways 2 --shots 1 --queries 1 --steps 2 --meta-steps 2"
    monkeypatch.setattr(trained, "RECIPE", f"{short} --validate-every 1 --device cpu")
    change = trained.Change(without="--exact head", sources=(csv_file.name,), hidden_size=3)
    folder = tmp_path / "run"
    rule = trained.trained(change, csv_file.parent, str(encoder), folder)
    assert rule.hidden_size == 3
    log = (folder / "log.jsonl").read_bytes()
    again = trained.trained(change, csv_file.parent, str(encoder), folder)
    assert (folder / "log.jsonl").read_bytes() == log
    for name, weight in rule.named_parameters():
        assert torch.equal(weight, again.get_parameter(name))


def test_what_ships_is_made_from_the_heads_rule_alone(script, tmp_path):
    """To the byte, so that whoever has the run's rule can make both files again."""
    shutil.copy(SHIPPED_HEAD_RULE, tmp_path / "rule.safetensors")
    script("meta_train").ship(tmp_path)
    for shipped in (SHIPPED_HEAD_RULE, SHIPPED_RULE):
        assert (tmp_path / "shipped" / shipped.name).read_bytes() == shipped.read_bytes()
