"""The campaign of faults, in its small form."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[2] / "scripts" / "campaign" / "run.py"


def campaign(folder, *words):
    figures = folder / "figures.json"
    done = subprocess.run(
        [sys.executable, str(RUN), *words, "--small", "--figures", str(figures)],
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(figures.read_text())


@pytest.mark.slow  # a minute on an idle core
@pytest.mark.parametrize("part", ["kills", "places", "files", "gradients", "long"])
def test_nothing_goes_wrong_in_the_small_form(part, tmp_path):
    found = campaign(tmp_path, part)
    assert found[part]["figures"]
    assert not any(row["bad"] for row in found[part]["figures"].values())


@pytest.mark.slow  # a process is given up after 45 s
def test_a_killed_a_slow_and_a_hung_process_in_the_small_form(tmp_path):
    rows = campaign(tmp_path, "workers")["workers"]["figures"]
    assert set(rows) == {"killed", "slow", "hung"} and rows["hung"]["longest, s"] < 60


def test_the_page_is_made_of_the_figures(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(RUN.parent))
    import table

    monkeypatch.setattr(table, "PAGE", tmp_path / "page.md")
    row = {"moments": 1000, "same bits": 999, "bad": ["one"]}
    about = {"seconds": 5, "seed": 0, "date": "2026-01-01", "versions": {"torch": "2.5"}}
    table.write({"kills": {"figures": {"fit": row}, **about}})
    assert "| fit | 1,000 | 999 |" in (tmp_path / "page.md").read_text()


def test_an_unknown_part_is_named(tmp_path):
    done = subprocess.run([sys.executable, str(RUN), "floods"], capture_output=True, text=True)
    assert done.returncode == 2 and "floods: no part; choose from kills" in done.stderr
