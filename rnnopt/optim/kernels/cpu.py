"""The fused step on a CPU, see cell.c.

The machine's C compiler builds the kernel on first use, in about a second, and it is kept in the
user's cache folder.
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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnnopt.optim.kernels.fused import TAKEN, FusedStep, Measured, Piece, describe, with_matrices
from rnnopt.rules.features import RATIO_FLOOR
from rnnopt.rules.lstm import GRADIENT_BOUND, LOG_FACTOR_BOUND, OUTPUTS, CoordinateLSTM

SOURCE = Path(__file__).with_name("cell.c")
# Coordinates to a block, what one thread takes at a time: its arrays (1.2 MB) stay in a core's
# cache between the rows of the state.
BLOCK = 16_384
# Coordinates below which a second thread costs more than it saves.
_WORTH_A_THREAD = 32_768
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_BUILD_SECONDS = 120


class CompiledStep(FusedStep):
    """The step on a CPU.

    Args:
        rule: see `FusedStep`.
        kernel: what `build` returned for its hidden size.
    """

    def __init__(self, rule: CoordinateLSTM, kernel: ctypes.CDLL) -> None:
        super().__init__(rule)
        self._kernel = kernel
        self._layout = _tensor_layout(rule.hidden_size)

    def measure(self, pieces: Sequence[Piece]) -> Measured:
        """See `FusedStep`."""
        rule = np.frombuffer(_rule_record(self._rule).tobytes(), dtype=np.uint8)
        grads = [piece.grad.contiguous() for piece in pieces]  # kept alive to the end of the step
        tensors = describe(self._rule, pieces, grads, self._layout)
        blocks = _blocks(tuple(piece.param.numel() for piece in pieces))
        partial = np.zeros((len(blocks), TAKEN))
        pointers = [array.ctypes.data for array in (rule, tensors, blocks)]
        _share(
            lambda first, last: self._kernel.rnnopt_sums(
                *pointers, first, last, partial.ctypes.data
            ),
            blocks,
        )
        sums = torch.zeros(len(pieces), TAKEN, dtype=torch.float64)
        sums.index_add_(0, torch.from_numpy(blocks["tensor"].copy()), torch.from_numpy(partial))
        return Measured(pieces, with_matrices(sums.float(), pieces), (rule, tensors, blocks, grads))

    def step(self, measured: Measured, context: dict[str, Tensor]) -> None:
        """See `FusedStep`."""
        pieces, (rule, tensors, blocks, _) = measured.pieces, measured.kept
        for name, value in context.items():
            tensors[name] = value.numpy()
        pointers = [array.ctypes.data for array in (rule, tensors, blocks)]
        is_half = int(pieces[0].state["hidden"].dtype == torch.bfloat16)
        _share(
            lambda first, last: self._kernel.rnnopt_step(*pointers, first, last, is_half), blocks
        )


def build(hidden_size: int) -> ctypes.CDLL:
    """The kernel for this many hidden units, from the cache folder or compiled.

    Raises:
        OSError: no compiler, or no place to keep the kernel.
        RuntimeError: no home folder.
        ValueError: the environment variable CC can't be read.
        subprocess.SubprocessError: the compiler failed.
    """
    return _load(_compiled(hidden_size), hidden_size)


def _compiled(hidden_size: int) -> Path:
    """The shared library's path; compiled if it is not there."""
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    command = [*compiler, *_FLAGS, f"-DHIDDEN={hidden_size}"]
    if shutil.which(compiler[0]) is None:
        raise OSError(f"no C compiler: {compiler[0]} is not there")
    # -march=native: a home folder that several machines share must not mix them up
    identity = "\n".join([*command, _processor(), SOURCE.read_text()])
    name = f"cell-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    folder = _cache_folder()
    if not (folder / name).exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            target = Path(scratch) / name
            subprocess.run(
                [*command, str(SOURCE), "-o", str(target)],
                check=True,
                capture_output=True,
                text=True,
                timeout=_BUILD_SECONDS,
            )
            os.replace(target, folder / name)  # two processes may build at once
    return folder / name


def _cache_folder() -> Path:
    """The user's own: nobody else may put code there that we would run."""
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


def _load(path: Path, hidden_size: int) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.rnnopt_sums.argtypes = [pointer, pointer, pointer, number, number, pointer]
    library.rnnopt_step.argtypes = [pointer, pointer, pointer, number, number, ctypes.c_int]
    library.rnnopt_sums.restype = library.rnnopt_step.restype = None
    library.rnnopt_tensor_size.restype = number
    if library.rnnopt_tensor_size() != _tensor_layout(hidden_size).itemsize:
        raise OSError(f"{path.name} lays out memory unlike numpy on this machine")
    return library


@functools.cache
def _tensor_layout(hidden_size: int) -> np.dtype[Any]:
    """`Tensor` of cell.c."""
    numbers = (
        "m_debt", "v_debt", "grad_rms", "param_rms", "scale", "growth", "keep", "rate", "decay",
    )  # fmt: skip
    return np.dtype(
        [
            ("pointers", np.int64, 6),
            ("count", np.int64),
            ("gate_shift", np.float32, (4 * hidden_size,)),
            ("output_shift", np.float32, OUTPUTS),
            *((name, np.float32) for name in numbers),
        ],
        align=True,
    )


def _rule_record(rule: CoordinateLSTM) -> np.ndarray:
    """`Rule` of cell.c: float32 all through."""
    constants = (
        # 1 - beta in double: from a beta in float32 the difference would be off
        1 - rule.betas[0], rule.betas[1], 1 - rule.betas[1], rule.eps,
        LOG_FACTOR_BOUND, GRADIENT_BOUND, RATIO_FLOOR**2,
    )  # fmt: skip
    return np.concatenate(
        [
            rule.gate_weight.detach().numpy().ravel(),
            rule.output_weight.detach().numpy().ravel(),
            np.array(constants, dtype=np.float32),
        ]
    )


@functools.lru_cache(maxsize=16)
def _blocks(counts: tuple[int, ...]) -> np.ndarray:
    """`Block` of cell.c: every tensor in blocks of like length."""
    rows = [
        (index, begin, min(begin + BLOCK, count))
        for index, count in enumerate(counts)
        for begin in range(0, count, BLOCK)
    ]
    return np.array(rows, dtype=[(name, np.int64) for name in ("tensor", "begin", "end")])


def _share(work: Callable[[int, int], None], blocks: np.ndarray) -> None:
    """Run work(first, last) over all blocks, on as many threads as torch uses."""
    coordinates = int((blocks["end"] - blocks["begin"]).sum())
    threads = min(torch.get_num_threads(), coordinates // _WORTH_A_THREAD, len(blocks))
    if threads <= 1:
        work(0, len(blocks))
        return
    # several shares a thread, since untouched rows make some much cheaper than others
    edges = np.linspace(0, len(blocks), 8 * threads + 1).astype(int)
    list(_pool(os.getpid(), threads).map(work, edges[:-1].tolist(), edges[1:].tolist()))


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: those of its parent don't survive a fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix="rnnopt")
