"""The fast path of `CoordinateLSTM`: one compiled pass over all tensors.

On a CPU the kernel is cell.c. The machine's C compiler builds it on first use, in about a second,
and it is kept in the user's cache folder. On a GPU it is Triton's, see fused_cuda.py. The plain
rule in lstm.py is the source of truth; tests hold both to it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnnopt.lstm import GRADIENT_BOUND, LOG_FACTOR_BOUND, OUTPUTS, CoordinateLSTM
from rnnopt.preprocess import (
    RATIO_FLOOR,
    SUMS,
    root_mean_squares,
    tensor_context,
)
from rnnopt.rule import State

SOURCE = Path(__file__).with_name("cell.c")
# Coordinates to a block, what one thread takes at a time: its arrays (1.2 MB) stay in a core's
# cache between the rows of the state.
BLOCK = 16_384
# Coordinates below which a second thread costs more than it saves.
_WORTH_A_THREAD = 32_768
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_BUILD_SECONDS = 120


@dataclass
class Piece:
    """One tensor, or this process's shard of it, and what a step does to it.

    Attributes:
        param: the parameter, changed in place.
        grad: its gradient.
        state: the rule's memory, changed in place.
        lr: multiplies the whole change.
        weight_decay: in units of lr * step_size.
    """

    param: Tensor
    grad: Tensor
    state: State
    lr: float
    weight_decay: float

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
        """Of the parameter, of its gradient and of the LSTM's memory."""
        return self.param.dtype, self.grad.dtype, self.state["hidden"].dtype

    def fits(self, device: torch.device, dtypes: Collection[torch.dtype]) -> bool:
        """Whether a kernel can work on it: memory in order, all of it on that kernel's device.

        Args:
            device: the kernel's.
            dtypes: what it takes as parameter or gradient.
        """
        leaves = self.state.values()
        return (
            self.param.dtype in dtypes
            and self.grad.dtype in dtypes
            and all(tensor.device == device for tensor in (self.param, self.grad, *leaves))
            and all(tensor.is_contiguous() for tensor in (self.param, *leaves))
            and self.state["hidden"].dtype in (torch.float32, torch.bfloat16)
            and self.state["hidden"].dtype == self.state["cell"].dtype
            and all(self.state[name].dtype == torch.float32 for name in ("m", "v", "peak"))
        )


class FusedStep:
    """A step of `rule` over many pieces at once, in place.

    Attributes:
        dtypes: what it takes as parameter or gradient.

    Args:
        rule: its weights are read at every step; the step works on their device.
    """

    dtypes: Collection[torch.dtype] = (torch.float32,)

    def __init__(self, rule: CoordinateLSTM) -> None:
        self._rule = rule

    def takes(self, piece: Piece) -> bool:
        """Whether this step can work on it."""
        return piece.fits(self._rule.gate_weight.device, self.dtypes)

    def __call__(self, pieces: Sequence[Piece], total: Callable[[Tensor], Tensor]) -> Tensor:
        """Step all pieces.

        Args:
            pieces: `takes` each, and their `Piece.dtypes` are the same.
            total: sums (pieces, 6) of the pieces -> sums of the tensors that they are pieces of.

        Returns:
            The sums of the tensors, (pieces, 6), of before the step.
        """
        raise NotImplementedError


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

    def __call__(self, pieces: Sequence[Piece], total: Callable[[Tensor], Tensor]) -> Tensor:
        """See `FusedStep`."""
        rule = np.frombuffer(_rule_record(self._rule).tobytes(), dtype=np.uint8)
        grads = [piece.grad.contiguous() for piece in pieces]  # kept alive to the end of the step
        tensors = describe(self._rule, pieces, grads, self._layout)
        blocks = _blocks(tuple(piece.param.numel() for piece in pieces))
        partial = np.zeros((len(blocks), SUMS))
        pointers = [array.ctypes.data for array in (rule, tensors, blocks)]
        _share(
            lambda first, last: self._kernel.rnnopt_sums(
                *pointers, first, last, partial.ctypes.data
            ),
            blocks,
        )
        sums = torch.zeros(len(pieces), SUMS, dtype=torch.float64)
        sums.index_add_(0, torch.from_numpy(blocks["tensor"].copy()), torch.from_numpy(partial))
        sums = total(sums.float())
        for name, value in contexts(self._rule, pieces, sums).items():
            tensors[name] = value.numpy()
        is_half = int(pieces[0].state["hidden"].dtype == torch.bfloat16)
        _share(
            lambda first, last: self._kernel.rnnopt_step(*pointers, first, last, is_half), blocks
        )
        # what was written behind autograd's back, so that it refuses an older graph as ever
        torch.autograd.graph.increment_version([piece.param for piece in pieces])
        return sums


def describe(
    rule: CoordinateLSTM, pieces: Sequence[Piece], grads: Sequence[Tensor], layout: np.dtype[Any]
) -> np.ndarray:
    """A kernel's table of tensors, as far as it is known before the sums.

    Args:
        rule: whose step it is.
        pieces: what it steps.
        grads: their gradients, in order.
        layout: with fields pointers, count, rate and decay.
    """
    tensors = np.zeros(len(pieces), dtype=layout)
    tensors["pointers"] = [
        [
            piece.param.data_ptr(),
            grad.data_ptr(),
            *(piece.state[name].data_ptr() for name in ("m", "v", "hidden", "cell")),
        ]
        for piece, grad in zip(pieces, grads)
    ]
    tensors["count"] = [piece.param.numel() for piece in pieces]
    tensors["rate"] = [piece.lr for piece in pieces]
    tensors["decay"] = [piece.lr * rule.step_size * piece.weight_decay for piece in pieces]
    return tensors


def contexts(rule: CoordinateLSTM, pieces: Sequence[Piece], sums: Tensor) -> dict[str, Tensor]:
    """What is common to each tensor's coordinates, by the plain rule's functions; counts the step.

    Args:
        rule: whose step it is.
        pieces: P of them.
        sums: of the whole tensors, (P, 6).

    Returns:
        gate_shift (P, 4 H), output_shift (P, 3), and (P,) each: m_debt, v_debt, 1 - beta^t;
        grad_rms, param_rms.
    """
    steps = torch.stack([piece.state["step"] for piece in pieces]).to(sums.dtype) + 1
    peaks = torch.stack([piece.state["peak"] for piece in pieces])
    grad_rms, param_rms = root_mean_squares(sums)
    gates, outputs = rule.shifts(tensor_context(sums, grad_rms, peaks, steps))
    # all at once: on a GPU every small operation costs as much as a large one
    torch._foreach_copy_([piece.state["step"] for piece in pieces], steps.unbind())
    torch._foreach_copy_(
        [piece.state["peak"] for piece in pieces], torch.maximum(peaks, grad_rms).unbind()
    )
    return {
        "gate_shift": gates,
        "output_shift": outputs,
        "m_debt": -torch.expm1(steps * math.log(rule.betas[0])),
        "v_debt": -torch.expm1(steps * math.log(rule.betas[1])),
        "grad_rms": grad_rms,
        "param_rms": param_rms,
    }


def fused_step(rule: object) -> FusedStep | None:
    """The fast path of a rule, or None if it has none: another kind, dtype or device, no compiler.

    Warns:
        RuntimeWarning: once a process, where there is no compiler.
    """
    if type(rule) is not CoordinateLSTM:
        return None  # also of a subclass, whose arithmetic may differ
    weight = rule.gate_weight
    if weight.dtype != torch.float32:
        return None
    if weight.is_cuda:
        return _triton_step(rule)
    if not weight.is_cpu:
        return None
    kernel = build(rule.hidden_size)
    return None if kernel is None else CompiledStep(rule, kernel)


@functools.cache
def build(hidden_size: int) -> ctypes.CDLL | None:
    """The kernel for this many hidden units, from the cache folder or compiled; None if neither."""
    try:
        return _load(_compiled(hidden_size), hidden_size)
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        _warn_once(
            detail.strip().splitlines()[0] if detail.strip() else type(error).__name__,
            "install gcc or clang, or name one in the environment variable CC",
        )
        return None


def _triton_step(rule: CoordinateLSTM) -> FusedStep | None:
    """Its module is imported here only: Triton takes a second to load, and may not be there."""
    try:
        from rnnopt import fused_cuda
    except ImportError as error:
        _warn_once(str(error), "install triton")
        return None
    problem = fused_cuda.problem(rule.hidden_size, rule.gate_weight.device)
    if problem is None:
        return fused_cuda.TritonStep(rule)
    _warn_once(problem, "install a recent triton")
    return None


@functools.cache
def _warn_once(detail: str, remedy: str) -> None:
    warnings.warn(
        "the fast step could not be compiled, and the plain one, several times slower, is used: "
        f"{detail}; {remedy}",
        RuntimeWarning,
        stacklevel=2,
    )


def _compiled(hidden_size: int) -> Path:
    """The shared library's path; compiled if it is not there."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
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


def _tensor_layout(hidden_size: int) -> np.dtype[Any]:
    """`Tensor` of cell.c."""
    numbers = ("m_debt", "v_debt", "grad_rms", "param_rms", "rate", "decay")
    return np.dtype(
        [
            ("pointers", np.int64, 6),
            ("count", np.int64),
            ("gate_shift", np.float32, 4 * hidden_size),
            ("output_shift", np.float32, OUTPUTS),
            *((name, np.float32) for name in numbers),
        ],
        align=True,
    )


def _rule_record(rule: CoordinateLSTM) -> np.ndarray:
    """`Rule` of cell.c: float32 all through."""
    constants = (
        *rule.betas, rule.eps, rule.step_size, LOG_FACTOR_BOUND, GRADIENT_BOUND, RATIO_FLOOR**2,
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
