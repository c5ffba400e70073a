"""The conditions beyond meta-training, on a tiny encoder."""

import importlib
import json
from pathlib import Path

import pytest

from rnnopt import CoordinateLSTM
from rnnopt.rules.files import save_rule

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def beyond(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("benchmark_beyond")


@pytest.fixture
def options(tmp_path, encoder, csv_file):
    """A small run of a rule that does nothing but Adam's steps."""
    save_rule(CoordinateLSTM(hidden_size=2), tmp_path / "rule.safetensors", {})
    words = {
        "data": csv_file, "encoder": encoder, "output": tmp_path / "out", "tune": "head",
        "rule": tmp_path / "rule.safetensors", "episodes": 2, "tuning-episodes": 1, "queries": 2,
    }  # fmt: skip
    return [word for key, value in words.items() for word in (f"--{key}", str(value))]


def test_a_condition_changes_what_it_says_and_goes_on_where_it_was(
    beyond, options, tmp_path, capsys, monkeypatch
):
    small = {
        "plain": beyond.Condition(ways=2, shots=2, steps=3),
        "half-depth": beyond.Condition(ways=2, shots=2, steps=3, half_depth=True),
        "batch-2": beyond.Condition(ways=2, shots=2, steps=3, batch_size=2),
        "dropout": beyond.Condition(ways=2, shots=2, steps=3, dropout=True),
    }
    monkeypatch.setattr(beyond, "CONDITIONS", small)
    assert beyond.main(options) == 0
    results = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in small}
    figures = [json.dumps(result["values"]["learned"]) for result in results.values()]
    assert len(set(figures)) == len(small)  # each of them differs from the others
    half = json.loads((tmp_path / "out" / "half-depth" / "config.json").read_text())
    assert half["num_hidden_layers"] == 1
    kept = (tmp_path / "out" / "plain.runs").read_text()
    assert beyond.main([*options, "--conditions", "plain"]) == 0
    assert (tmp_path / "out" / "plain.runs").read_text() == kept
    capsys.readouterr()
    assert beyond.main(["--output", str(tmp_path / "out"), "--table"]) == 0
    lines = capsys.readouterr().out.splitlines()
    titles = [line.split("|")[2].strip() for line in lines[2:7]]
    assert titles == ["rnnopt", "- AdamW, tuned", "- lr 0.5", "- lr 2", "- clipped"]
    assert len(lines) == 2 + 5 * len(small)


def test_each_variant_is_the_rule_with_that_setting(beyond, tmp_path):
    import torch

    rule = CoordinateLSTM(hidden_size=2)
    built = {}
    for name, baseline in beyond.variants(rule).items():
        param = torch.nn.Parameter(torch.ones(3))
        optimizer = baseline.build(None, {"w": param}, 1.0, 5)
        param.grad = torch.full((3,), 10.0)
        optimizer.step()
        built[name.rpartition(" ")[0]] = (param.detach() - 1, param.grad)
    torch.testing.assert_close(built["lr 2"][0], 4 * built["lr 0.5"][0])
    assert built["clipped"][1].norm() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--conditions", "none"], "none of plain, ways-2"),
        (["--table"], "nothing finished there"),
        ([], "--data and --encoder are needed"),
    ],
)
def test_what_cannot_run_is_refused(beyond, words, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        beyond.main(["--output", str(tmp_path), *words])
    assert message in capsys.readouterr().err
