"""Every example runs, offline, as a user runs it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
CHANCE = 0.2  # of five classes
SLOW = pytest.mark.slow  # half a minute each beside other jobs


@pytest.fixture(autouse=True)
def sources_on_the_path(monkeypatch):
    """Of the processes that are started, also where the package is not installed."""
    paths = (str(EXAMPLES.parent), os.environ.get("PYTHONPATH"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def output_of(*arguments):
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=EXAMPLES,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def accuracies(output, name):
    (row,) = (line for line in output.splitlines() if line.startswith(name))
    return [float(figure) for figure in re.findall(r"\d\.\d{3}", row.removeprefix(name))]


@pytest.mark.parametrize("name", ["drop_in.py", pytest.param("peft_lora.py", marks=SLOW)])
def test_it_adapts_with_nothing_set(name):
    learned = accuracies(output_of(name), "LearnedOptimizer")
    assert learned[0] > CHANCE and learned[-1] > 2 * CHANCE


def losses(output):
    """Of the rows of the learned rule, before meta-training and after; at each number of steps."""
    rows = [line for line in output.splitlines() if line.startswith("| learned")]
    return [[float(figure) for figure in re.findall(r"([\d.]+) ±", row)] for row in rows]


def test_sine_curves_take_four_meta_steps():
    before, after = losses(output_of("-c", "import sine; sine.main(meta_steps=4, episodes=2)"))
    assert len(before) == len(after) == 3 and before != after


@pytest.mark.slow
def test_sine_curves_are_learned():
    """Measured: 3.5 before, 1.3 after, at five steps."""
    before, after = losses(output_of("sine.py"))
    assert all(late < 0.7 * early for early, late in zip(before, after))


@pytest.mark.slow
def test_trainer_adapts_with_it():
    before, after = re.findall(r"0\.\d{3}", output_of("trainer.py").splitlines()[-1])
    assert float(after) > float(before) + 0.1


def test_every_example_is_tested():
    tested = Path(__file__).read_text(encoding="utf-8")
    helpers = {"tiny_encoder.py"}
    names = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert {name for name in names - helpers if name not in tested} == set()


@pytest.mark.slow  # 22 s
def test_the_notebook_runs():
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(EXAMPLES / "first_steps.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}}
    )
    client.execute()
    texts = [
        output.get("text", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]
    assert "steps undone: 0" in "".join(texts)
    pictures = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 1
