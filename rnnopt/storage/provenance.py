"""The origin of a result: versions, options and data, in ``provenance.json`` of its folder."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rnnopt.storage.files import parse_json, write_atomically
from rnnopt.storage.version import __version__

PROVENANCE_FILE = "provenance.json"
_PACKAGES = ("torch", "transformers", "peft", "higher", "numpy", "safetensors")


def versions() -> dict[str, str]:
    """The versions of rnnopt, Python and the libraries that affect the results of a run.

    Libraries that are not installed are left out.
    """
    found = {"rnnopt": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"platform": platform.platform()}


def write_provenance(
    folder: Path,
    command: str,
    options: Mapping[str, Any],
    data: Mapping[str, Any],
    meta_step: int = 0,
) -> None:
    """Write ``provenance.json``, or add an entry to it if the run is resumed.

    Args:
        folder: the folder of the run.
        command: the name of the command.
        options: its options.
        data: JSON-compatible facts on the data, with its fingerprints.
        meta_step: the meta-step at which the run is started or resumed.

    Raises:
        InputError: see `rnnopt.storage.files.write_atomically`.
    """
    path = folder / PROVENANCE_FILE
    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "meta_step": meta_step,
        "versions": versions(),
        "options": dict(options),
    }
    earlier = read_json(path).get("starts", []) if meta_step else []
    about = {"command": command, "data": dict(data), "starts": [*earlier, start]}
    write_atomically(path, (json.dumps(about, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no file, or if it holds no JSON object."""
    try:
        return dict(parse_json(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}
