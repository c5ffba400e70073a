"""Which kernel takes a rule's steps, if any."""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable

import torch

from rnnopt.optim.kernels.cpu import CompilerError
from rnnopt.optim.kernels.fused import FusedStep
from rnnopt.optim.kernels.two_level import TwoLevelStep, build_two_level
from rnnopt.rules.two_level import TwoLevelLSTM


def fused_step(rule: object) -> FusedStep | None:
    """The fused step of a rule, or None if there is none for its class, dtype or device.

    Warns:
        RuntimeWarning: once per process, if the kernel can't be compiled.
    """
    # `type`, because the arithmetic of a subclass may differ
    if type(rule) is not TwoLevelLSTM or rule.output.weight.dtype != torch.float32:
        return None
    if rule.output.weight.is_cuda:
        return _triton_step(rule)
    library = c_kernel(rule.coordinate_units) if rule.output.weight.is_cpu else None
    return None if library is None else TwoLevelStep(rule, library)


def c_kernel(units: int) -> ctypes.CDLL | None:
    """The C kernel for this many units of a coordinate, or None if it can't be compiled."""
    return _built(build_two_level, units)


@functools.cache
def _built(make: Callable[[int], ctypes.CDLL], units: int) -> ctypes.CDLL | None:
    try:
        return make(units)
    except CompilerError as error:
        _warn_once(str(error), "install gcc or clang, or name one in the environment variable CC")
    except OSError as error:
        _warn_once(
            str(error), "name a folder that programs may run from in the variable XDG_CACHE_HOME"
        )
    return None


def _triton_step(rule: TwoLevelLSTM) -> FusedStep | None:
    """Imports the kernel's module here: Triton takes a second to load, and may not be installed."""
    try:
        from rnnopt.optim.kernels import two_level_cuda
    except ImportError as error:
        _warn_once(str(error), "install triton")
        return None
    problem = two_level_cuda.problem(rule.coordinate_units, rule.output.weight.device)
    if problem is None:
        return two_level_cuda.TritonStep(rule)
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
