"""scripts/ablations.py on a tiny encoder."""

import importlib
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def ablations(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("ablations")


@pytest.mark.parametrize("tune", ["head", "lora"])
def test_what_is_taken_out_is_at_zero_and_nothing_else(ablations, tune):
    (_, shipped), *others = ablations.variants(tune).items()
    for name, rule in others:
        if name.startswith("lent"):
            continue
        both = name.startswith("neither")
        for part, weight in rule.named_parameters():
            gone = (part.startswith("growth_") and (both or name == "no growth")) or (
                part.startswith("output_") and (both or name == "no steering")
            )
            kept = (weight == shipped.get_parameter(part)).all()
            assert not weight.any() if gone else kept, (name, part)


def test_every_variant_gets_a_row(ablations, monkeypatch, csv_file, encoder, tmp_path):
    monkeypatch.setattr(ablations, "CELLS", ((csv_file.name, 2, 1),))
    lines = list(ablations.rows(csv_file.parent, str(encoder), "head", 2, tmp_path))
    assert len(lines) == 2 + len(ablations.variants("head"))
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert list(ablations.rows(csv_file.parent, str(encoder), "head", 2, tmp_path)) == lines
