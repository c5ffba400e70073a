"""scripts/ablations.py and scripts/ablations_trained.py on a tiny encoder."""

import importlib
import shutil
from pathlib import Path

import pytest
import torch

from rnnopt.rules.files import SHIPPED_HEAD_RULE, SHIPPED_RULE

SCRIPTS = Path(__file__).parents[2] / "scripts"
CHANGED = {  # of each variant: its config, elsewhere as shipped
    "not orthogonalized": {"orthogonalize": False},
    "growth at one speed": {"growth_threshold": None},
    "growth for 8 steps": {"growth_steps": 8},
}
TAKEN_OUT = {  # of each variant: weights by the beginning of their names, and columns of the gates
    "no growth": (("growth_",), ()),
    "not orthogonalized": ((), ()),
    "growth at one speed": ((), ()),
    "growth for 8 steps": ((), ()),
    "no steering": (("output_",), ()),
    "neither: Adam at the model's scale": (("growth_", "output_"), ()),
    "no tensor context": (("context_weight",), ()),
    "no normalised directions": ((), (0, 1)),
    "no gradient against its tensor's": ((), (2, 3)),
    "no memory in the LSTM": ((), (5, 6, 7, 8, 9, 10, 11, 12)),
}


@pytest.fixture
def script(monkeypatch):
    """A script by its name, as a module."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


@pytest.mark.parametrize("tune", ["head", "lora"])
def test_what_is_taken_out_is_at_zero_and_nothing_else(script, tune):
    (_, shipped), *others = script("ablations").variants(tune).items()
    for name, rule in others:
        if name in ("lent: steered as a head is", "growth as learned on heads"):
            continue
        prefixes, columns = TAKEN_OUT[name]
        for option in ("orthogonalize", "growth_steps", "growth_threshold"):
            expected = CHANGED.get(name, {}).get(option, getattr(shipped, option))
            assert getattr(rule, option) == expected, (name, option)
        for part, weight in rule.named_parameters():
            expected = shipped.get_parameter(part).detach().clone()
            if part.startswith(prefixes):
                expected.zero_()
            if part == "gate_weight":
                expected[:, list(columns)] = 0.0
            assert torch.equal(weight, expected), (name, part)


def test_the_second_rule_grows_at_a_share_of_what_was_learned_on_heads(script):
    """And is the first in nothing else: the ablation takes back what meta_train.py did."""
    variants, share = script("ablations").variants("lora"), script("meta_train").SLOWER
    shipped, other = variants["as shipped"], variants["growth as learned on heads"]
    speed = {"growth_steps": 20, "growth_threshold": 0.5}
    assert {**other.config, **speed} == shipped.config
    for name, weight in other.named_parameters():
        if name.startswith(("growth_", "context_")):
            expected = share * weight if name.startswith("growth_") else weight
            assert torch.equal(shipped.get_parameter(name), expected), name
            assert weight.abs().max() > 0


def test_every_variant_gets_a_row(script, monkeypatch, csv_file, encoder, tmp_path):
    ablations = script("ablations")
    monkeypatch.setattr(ablations, "CELLS", ((csv_file.name, 2, 1),))
    rules = ablations.variants("head")

    def table():
        return list(ablations.rows(rules, csv_file.parent, str(encoder), "head", 2, tmp_path))

    lines = table()
    assert len(lines) == 2 + len(rules)
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert table() == lines  # from what it kept


def test_every_change_is_one_to_the_recipe(script):
    trained = script("ablations_trained")
    recipe = trained.Change()
    for name, change in trained.CHANGES.items():
        same = trained.changed(change) == trained.changed(recipe)
        assert not same or change[2:] != recipe[2:], name


def test_a_variant_is_trained_once(script, monkeypatch, csv_file, encoder, tmp_path):
    trained = script("ablations_trained")
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
