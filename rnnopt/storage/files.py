"""Atomic writes, and safetensors files with facts in JSON. Reading a file never runs code."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

import safetensors
import torch
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialise_tensors
from torch import Tensor

from rnnopt.errors import InputError

_ABOUT = "rnnopt"
_READABLE = 0o644  # a temporary file is private, and a result is for others, too
_CHECK = "fingerprint of tensors"  # files that were written before 0.2 have none
_TEMPORARY = ".tmp-"  # how the names of files begin that are being written


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, which raises ValueError for whatever it can't parse, deep nesting too."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it has the old or the new content at any time, also after a crash.

    Raises:
        InputError: the folder is not writable, or the disk is full.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=_TEMPORARY, delete=False) as file:
            temporary = Path(file.name)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(_READABLE)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise InputError(
            f"can't write {path}: {error.strerror}; choose a folder with space that you may "
            "write to"
        ) from error
    finally:
        if temporary is not None:  # also after Ctrl-C
            temporary.unlink(missing_ok=True)


def let_others_read(folder: Path) -> None:
    """Let other users read the files of a folder.

    safetensors 0.8 writes files that their owner alone can read, so that a service under another
    user would not start.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(_READABLE)


def claim_folder(folder: Path) -> None:
    """Create an output folder, or accept an existing one that is empty.

    What a process has left that was killed during its first write is removed.

    Raises:
        InputError: the folder is not empty, or can't be created, or another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = list(folder.iterdir())
        if found and all(path.name.startswith(_TEMPORARY) for path in found):
            hold_folder(folder)  # so nobody is writing them now
            for path in found:
                path.unlink(missing_ok=True)
        taken = any(folder.iterdir())
    except OSError as error:
        raise InputError(
            f"can't write to {folder}: {error.strerror}; choose another --output"
        ) from error
    if taken:
        raise InputError(f"{folder} is not an empty folder; choose another --output")


# Folders that this process has claimed for itself, by device and inode, as open descriptors. They
# are closed, and so given back, by the system when the process ends, however it ends.
_HELD: dict[tuple[int, int], int] = {}


def hold_folder(folder: Path) -> None:
    """Keep other processes of rnnopt from writing to a folder as long as this one lives.

    Where the file system has no locks, nothing happens.

    Raises:
        InputError: another process holds the folder.
    """
    if fcntl is None:
        return
    try:
        facts = os.stat(folder)
        if (facts.st_dev, facts.st_ino) in _HELD:
            return
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # whoever writes there will say so
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise InputError(
            f"another process writes to {folder} now; wait for its end, or choose another --output"
        ) from error
    except OSError:
        os.close(descriptor)
        return
    _HELD[facts.st_dev, facts.st_ino] = descriptor


def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a safetensors file atomically. The same content always gives the same bytes.

    Args:
        path: the file.
        tensors: the tensors by name.
        about: JSON-compatible facts on the tensors. They form a single entry of the file's
            metadata, because safetensors writes several entries in no particular order.

    Raises:
        InputError: see `write_atomically`.
    """
    contiguous = {name: leaf.detach().cpu().contiguous() for name, leaf in tensors.items()}
    facts = {**about, _CHECK: fingerprint(contiguous)}
    write_atomically(path, serialise_tensors(contiguous, {_ABOUT: json.dumps(facts)}))


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """12 hexadecimal digits that differ between tensors of other names or values."""
    digest = hashlib.sha256()
    for name, leaf in sorted(tensors.items()):
        digest.update(name.encode())
        content = leaf.detach().cpu().contiguous().reshape(-1)
        digest.update(content.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that `save_tensors` wrote.

    Returns:
        The tensors, on the CPU, and the facts, which are empty if the file has none.

    Raises:
        InputError: the file is missing, unreadable, truncated, or not a safetensors file.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror}; check the path") from error
    try:
        tensors = parse_tensors(data)
        (length,) = struct.unpack("<Q", data[:8])
        metadata = parse_json(data[8 : 8 + length]).get("__metadata__", {})
        about = dict(parse_json(metadata.get(_ABOUT, "{}")))
        if about.pop(_CHECK, None) not in (None, fingerprint(tensors)):
            raise ValueError("its tensors are not those that were saved")
    except (safetensors.SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is no complete safetensors file ({error}); it may be truncated or of another "
            "format: make it again, or fetch it again"
        ) from error
    return tensors, about
