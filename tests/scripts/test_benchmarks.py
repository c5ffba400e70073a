"""The benchmark scripts run and write what their figures are read from; a tiny model stands in."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    """Import a script as `python scripts/NAME.py` would."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


def assert_complete(content):
    assert {"machine", "settings", "rows", "timings", "data"} <= content.keys()
    assert {"processor", "threads", "gpu", "torch"} <= content["machine"].keys()
    for row in content["rows"]:
        assert {"figure", "value", "measured", "target", "met"} <= row.keys()
    for group in content["timings"].values():
        for timing in group.values():
            assert {"median", "quartiles", "repeats"} == timing.keys()


def test_benchmark_step_measures_every_figure(script, tmp_path, capsys):
    options = ["--tiny", "--device", "cpu", "--repeats", "2", "--textbook-repeats", "1"]
    script("benchmark_step").main([*options, "--json", str(tmp_path / "out.json")])
    content = json.loads((tmp_path / "out.json").read_text())
    assert_complete(content)
    assert {"full", "lora", "full, textbook", "lora, textbook"} == content["timings"].keys()
    memory = content["data"]["full: bytes a coordinate"]
    # m, v, the last update, 4 units and 2 of the guard; and 60 numbers of each small tensor
    assert memory["step of the shipped rule"] == pytest.approx(30, abs=2)
    missing = [row["figure"] for row in content["rows"] if row["value"] is None]
    assert len(missing) == 4 and all("GPU" in figure for figure in missing)
    assert capsys.readouterr().out.startswith("| figure | measured | target |")


def test_benchmark_unroll_measures_every_figure(script, tmp_path):
    options = ["--tiny", "--device", "cpu", "--repeats", "1", "--plot", str(tmp_path / "out.png")]
    script("benchmark_unroll").main([*options, "--json", str(tmp_path / "out.json")])
    content = json.loads((tmp_path / "out.json").read_text())
    assert_complete(content)
    assert "higher, first order" in content["timings"]["LoRA, T = 2"]
    assert all(row["process"] > 0 for row in content["data"]["peaks"])
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow  # 6 s
def test_a_peak_is_that_of_a_process_of_its_own():
    config = json.dumps(["ours", "head", 1, "cpu"])
    command = [sys.executable, SCRIPTS / "benchmark_unroll.py", "--tiny", "--json", "-"]
    done = subprocess.run(
        [*command, "--threads", "1", "--child", config], capture_output=True, text=True, check=True
    )
    assert {"process", "baseline", "increase", "seconds"} == json.loads(done.stdout).keys()
