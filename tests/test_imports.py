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
HEAVY = {
    "higher", "transformers", "peft", "matplotlib", "tokenizers", "triton",
    "sklearn", "scipy", "rich",
}  # fmt: skip


def modules_after_importing(name):
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED.format(name)], capture_output=True, text=True, check=True
    )
    return {module.split(".")[0] for module in json.loads(done.stdout)}


def test_importing_rnnopt_loads_neither_higher_nor_transformers():
    assert not HEAVY & modules_after_importing("rnnopt")


def test_reading_files_loads_no_heavy_library():
    loaded = modules_after_importing("rnnopt.data.files")
    assert not (HEAVY | {"pandas"}) & loaded


@pytest.mark.slow
def test_the_test_above_can_fail():
    assert "higher" in modules_after_importing("rnnopt.meta.differentiable")
    assert "transformers" in modules_after_importing("rnnopt.tasks.text.classifier")


def test_help_and_version_load_no_torch():
    code = (
        "import sys; from rnnopt.cli.main import main\ntry: main([{!r}])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    for flag in ("--help", "--version"):
        subprocess.run([sys.executable, "-c", code.format(flag)], check=True, capture_output=True)


def test_every_public_name_is_found_where_it_is_said_to_be():
    assert {*rnnopt._HOME_OF, "__version__"} == {*rnnopt.__all__}
    for name in rnnopt.__all__:
        assert getattr(rnnopt, name) is not None
    assert {*rnnopt.__all__} <= {*dir(rnnopt)}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        rnnopt.nothing  # noqa: B018


def imports_of(path, package="rnnopt"):
    """Modules of a package that a source file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in getattr(node, "names", [])]
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.module == "rnnopt" or (node.module or "").endswith("kernels"):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif not isinstance(node, ast.Import):
            continue
        found |= {name for name in names if name.split(".")[0] == package}
    return found


def importers(library):
    return {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if imports_of(path, library)
    }


@pytest.mark.parametrize(
    ("library", "doors"),
    [
        ("higher", {"meta/differentiable.py"}),  # unmaintained since 2021, noisy when compiled
        ("transformers", {"tasks/text/encoder/loading.py"}),
        ("peft", {"tasks/text/encoder/lora.py"}),
        ("tokenizers", {"tasks/text/encoder/loading.py"}),
        ("matplotlib", {"evaluation/report/plot.py"}),
        (
            "sklearn",
            {
                "tasks/metrics.py",
                "tasks/text/frozen.py",
                "tasks/text/estimator/heads.py",
                "tasks/text/estimator/text_classifier.py",
            },
        ),
        ("scipy", {"evaluation/statistics.py"}),
        ("onnxruntime", {"tasks/text/estimator/export/onnx.py"}),
        (
            "huggingface_hub",
            {"tasks/text/encoder/loading.py", "tasks/text/estimator/export/hub.py"},
        ),
        ("rich", {"cli/progress.py", "evaluation/report/tables.py"}),
        ("pandas", set()),  # see rnnopt.data.delimited
        # of use on a GPU only
        ("triton", {f"optim/kernels/{name}_triton.py" for name in ("two_level", "guard")}),
    ],
)
def test_a_heavy_library_has_one_door(library, doors):
    assert importers(library) == doors


# Each room and the rooms that it may import, from the ground up. A room stands for all below it,
# unless one below it has a line of its own.
ROOMS = {
    "errors": set(),
    "storage": {"errors"},
    "rules": {"errors", "storage"},
    "optim": {"errors", "rules"},
    "data": {"errors", "storage"},
    "tasks": {"errors", "storage", "rules", "optim", "data"},
    "tasks.text": {"errors", "storage", "rules", "optim", "data", "tasks"},
    "meta": {"errors", "storage", "rules", "optim", "tasks"},
    "evaluation": {"errors", "storage", "rules", "optim", "data", "tasks", "meta"},
    "cli": {
        "errors", "storage", "rules", "optim", "data", "tasks", "tasks.text", "meta", "evaluation",
    },
}  # fmt: skip


def room_of(module):
    name = module.removeprefix("rnnopt.")
    return max((room for room in ROOMS if f"{name}.".startswith(f"{room}.")), key=len, default=None)


def wrong_arrows(package):
    """(file, module) of every import that leaves a room for one that it may not know."""
    found = []
    for path in sorted(package.rglob("*.py")):
        module = path.relative_to(package).with_suffix("").as_posix().replace("/", ".")
        here = room_of(module.removesuffix(".__init__"))
        if here is None:  # the face of the package, and its command
            continue
        allowed = ROOMS[here] | {here}
        found += [
            (path.relative_to(package).as_posix(), name)
            for name in sorted(imports_of(path))
            if room_of(name) not in allowed and name != "rnnopt.__version__"
        ]
    return found


def test_imports_point_one_way():
    assert wrong_arrows(PACKAGE) == []


def test_a_wrong_arrow_is_found(tmp_path):
    for room in ("rules", "optim", "tasks/text", "meta"):
        (tmp_path / room).mkdir(parents=True)
    (tmp_path / "rules" / "one.py").write_text("from rnnopt.optim.optimizer import X\n")
    (tmp_path / "meta" / "two.py").write_text("def f():\n    import rnnopt.tasks.text.start\n")
    (tmp_path / "meta" / "three.py").write_text("from rnnopt.tasks.protocol import Task\n")
    assert wrong_arrows(tmp_path) == [
        ("meta/two.py", "rnnopt.tasks.text.start"),
        ("rules/one.py", "rnnopt.optim.optimizer"),
    ]


def test_test_files_have_names_of_their_own():
    """pytest imports a test file by its name alone, whatever its folder."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_the_house_is_small():
    """At most nine entries at the top, nine files in a room, 250 code lines in a module."""
    entries = {path.name for path in PACKAGE.iterdir()} - {
        "__init__.py", "__main__.py", "__pycache__", "errors.py", "py.typed",
    }  # fmt: skip
    assert len(entries) <= 9
    for room in [path for path in PACKAGE.rglob("*") if path.is_dir()]:
        assert len([file for file in room.glob("*.py") if file.name != "__init__.py"]) <= 9, room


@pytest.mark.slow
def test_higher_is_imported_without_a_warning_when_it_is_compiled_afresh(tmp_path):
    """higher 0.2.1 has invalid escapes, which Python reports when there is no bytecode."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    code = (
        "import torch, warnings; warnings.simplefilter('error'); import rnnopt.meta.differentiable"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
