"""Compiled steps on a CPU: how a kernel is built, and how its work is shared by threads.

The machine's C compiler builds the kernel on first use, in about a second. The shared library is
kept in the user's cache folder, or for the process alone where that can't be used.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

HEADER = Path(__file__).with_name("vectors.h")
# Coordinates per block, the unit of work of a thread: its arrays (1.2 MB) stay in a core's cache
# between the rows of the state.
BLOCK = 16_384
# Coordinates below which a second thread costs more than it saves.
_MIN_PER_THREAD = 32_768
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_BUILD_SECONDS = 120
_DIGEST_BYTES = hashlib.sha256().digest_size


def load(
    source: Path, units: int, tensor_size: int, statistics: Sequence[Any], step: Sequence[Any]
) -> ctypes.CDLL:
    """A kernel from the cache folder; compiled if necessary.

    Args:
        source: in C.
        units: HIDDEN of the source.
        tensor_size: bytes of its struct Tensor, by numpy's layout.
        statistics: types of the arguments of ``rnnopt_statistics``.
        step: the same of ``rnnopt_step``.

    Raises:
        CompilerError: there is no compiler, or it failed.
        OSError: no folder can be written, or the library can't be loaded.

    Warns:
        RuntimeWarning: the cache folder can't be used; the kernel is compiled for this process.
    """

    def opened(path: Path) -> ctypes.CDLL:
        library = ctypes.CDLL(str(path))
        library.rnnopt_statistics.argtypes, library.rnnopt_step.argtypes = statistics, step
        library.rnnopt_statistics.restype = library.rnnopt_step.restype = None
        library.rnnopt_tensor_size.restype = ctypes.c_int64
        if library.rnnopt_tensor_size() != tensor_size:
            raise OSError(f"{path.name} lays out memory unlike numpy on this machine")
        return library

    command, name = _command(source, units)
    try:
        return opened(_compiled(command, _cache_folder() / name))
    except (OSError, RuntimeError) as error:  # the latter where there is no home folder
        warnings.warn(
            f"the folder for the compiled step can't be used ({error}), and every process compiles "
            "it anew, in a second; name a folder that you may write to in the environment variable "
            "XDG_CACHE_HOME",
            RuntimeWarning,
            stacklevel=2,
        )
    with tempfile.TemporaryDirectory() as scratch:
        return opened(_compiled(command, Path(scratch) / name))


class CompilerError(Exception):
    """There is no C compiler, or it failed."""


def _command(source: Path, units: int) -> tuple[list[str], str]:
    """The compiler's command, and the name of the shared library that it makes."""
    try:
        compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    except ValueError as error:
        raise CompilerError(f"the environment variable CC can't be parsed: {error}") from error
    if shutil.which(compiler[0]) is None:
        raise CompilerError(f"no C compiler: {compiler[0]} is not there")
    command = [*compiler, *_FLAGS, f"-DHIDDEN={units}", str(source)]
    # -march=native: several machines may share a home folder
    code = [source.read_text(), HEADER.read_text()]
    identity = "\n".join(["with digest", *command[:-1], _processor(), *code])
    return command, f"{source.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"


def _compiled(command: list[str], path: Path) -> Path:
    """The path of the shared library, compiled if it does not exist, or not as it was written.

    Its SHA-256 follows the library in the file. To load a library that was cut off would end the
    process.
    """
    if path.exists():
        content = path.read_bytes()
        if hashlib.sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]:
            return path
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        target = Path(scratch) / path.name
        try:
            subprocess.run(
                [*command, "-o", str(target)],
                check=True,
                capture_output=True,
                text=True,
                timeout=_BUILD_SECONDS,
            )
        except subprocess.SubprocessError as error:
            lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            raise CompilerError(lines[0] if lines else str(error)) from error
        with target.open("ab") as file:
            file.write(hashlib.sha256(target.read_bytes()).digest())
        os.replace(target, path)  # two processes may compile at once
    return path


def _cache_folder() -> Path:
    """A folder of the user's own, so that nobody else can put code there that runs here."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "rnnopt"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    return folder


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


@functools.lru_cache(maxsize=16)
def blocks_of(counts: tuple[int, ...]) -> np.ndarray:
    """`Block` of vectors.h: each tensor cut into blocks of `BLOCK` coordinates."""
    rows = [
        (index, begin, min(begin + BLOCK, count))
        for index, count in enumerate(counts)
        for begin in range(0, count, BLOCK)
    ]
    return np.array(rows, dtype=[(name, np.int64) for name in ("tensor", "begin", "end")])


def share(work: Callable[[int, int], None], blocks: np.ndarray) -> None:
    """Run work(first, last) over all blocks, on at most as many threads as torch uses."""
    coordinates = int((blocks["end"] - blocks["begin"]).sum())
    threads = min(torch.get_num_threads(), coordinates // _MIN_PER_THREAD, len(blocks))
    if threads <= 1:
        work(0, len(blocks))
        return
    # several ranges per thread: blocks without a gradient are much cheaper than others
    edges = np.linspace(0, len(blocks), 8 * threads + 1).astype(int)
    list(_pool(os.getpid(), threads).map(work, edges[:-1].tolist(), edges[1:].tolist()))


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """A pool per process, because threads don't survive a fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix="rnnopt")
