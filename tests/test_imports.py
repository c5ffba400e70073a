"""What loads what: a light package, and heavy libraries behind one door each."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rnnopt

PACKAGE = Path(rnnopt.__file__).parent
IMPORTED = "import json, sys; import {}; print(json.dumps(sorted(sys.modules)))"
HEAVY = {"higher", "transformers", "peft", "matplotlib", "tokenizers", "triton"}


def modules_after_importing(name):
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED.format(name)], capture_output=True, text=True, check=True
    )
    return {module.split(".")[0] for module in json.loads(done.stdout)}


def test_importing_rnnopt_loads_neither_higher_nor_transformers():
    assert not HEAVY & modules_after_importing("rnnopt")


def test_the_test_above_can_fail():
    assert "higher" in modules_after_importing("rnnopt.differentiable")
    assert "transformers" in modules_after_importing("rnnopt.text")


def importers(library):
    found = set()
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in getattr(node, "names", [])]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif not isinstance(node, ast.Import):
                continue
            if any(name.split(".")[0] == library for name in names):
                found.add(path.stem)
    return found


@pytest.mark.parametrize(
    ("library", "doors"),
    [
        ("higher", {"differentiable"}),  # unmaintained since 2021, and noisy when compiled
        ("transformers", {"encoder"}),
        ("peft", {"lora"}),
        ("tokenizers", {"encoder"}),
        ("matplotlib", {"plot"}),
        ("triton", {"fused_cuda"}),  # not there on every machine, and only of use on a GPU
    ],
)
def test_a_heavy_library_has_one_door(library, doors):
    assert importers(library) == doors


def test_higher_is_imported_without_a_warning_when_it_is_compiled_afresh(tmp_path):
    """higher 0.2.1 has invalid escapes, which Python reports when there is no bytecode."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    code = "import torch, warnings; warnings.simplefilter('error'); import rnnopt.differentiable"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
