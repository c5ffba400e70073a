"""Where a result is from: versions, options and data, kept in its folder as ``provenance.json``."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from argparse import Namespace
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rnnopt import __version__
from rnnopt.storage.files import write_atomically

PROVENANCE_FILE = "provenance.json"
_PACKAGES = ("torch", "transformers", "peft", "higher", "numpy", "safetensors")
_NO_OPTIONS = {"run", "command"}  # what argparse's namespace holds beside options


def versions() -> dict[str, str]:
    """Of rnnopt, Python and the libraries that decide what a run computes; absent ones are left
    out."""
    found = {"rnnopt": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"platform": platform.platform()}


def write_provenance(
    folder: Path, options: Namespace, data: Mapping[str, Any], meta_step: int = 0
) -> None:
    """Write the file, or add to it that the run was taken up again.

    Args:
        folder: of the run.
        options: of the command.
        data: JSON-compatible facts on the data, fingerprints among them.
        meta_step: where this start begins.

    Raises:
        InputError: see `rnnopt.storage.files.write_atomically`.
    """
    path = folder / PROVENANCE_FILE
    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "meta_step": meta_step,
        "versions": versions(),
        "options": {
            name: value for name, value in vars(options).items() if name not in _NO_OPTIONS
        },
    }
    earlier = read_json(path).get("starts", []) if meta_step else []
    about = {"command": options.command, "data": dict(data), "starts": [*earlier, start]}
    write_atomically(path, (json.dumps(about, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is none, or nothing that could be one."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}
