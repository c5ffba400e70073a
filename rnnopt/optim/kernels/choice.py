"""Which kernel takes a rule's steps, if any."""

from __future__ import annotations

import ctypes
import functools
import warnings

import torch

from rnnopt.optim.kernels.cpu import CompiledStep, CompilerError, build
from rnnopt.optim.kernels.fused import FusedStep
from rnnopt.rules.lstm import CoordinateLSTM


def fused_step(rule: object) -> FusedStep | None:
    """The fused step of a rule, or None if there is none for its class, dtype or device.

    Warns:
        RuntimeWarning: once per process, if the kernel can't be compiled.
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
    kernel = c_kernel(rule.hidden_size)
    return None if kernel is None else CompiledStep(rule, kernel)


@functools.cache
def c_kernel(hidden_size: int) -> ctypes.CDLL | None:
    """The C kernel for this many hidden units, or None if it can't be compiled."""
    try:
        return build(hidden_size)
    except CompilerError as error:
        _warn_once(str(error), "install gcc or clang, or name one in the environment variable CC")
    except OSError as error:
        _warn_once(
            str(error), "name a folder that programs may run from in the variable XDG_CACHE_HOME"
        )
    return None


def _triton_step(rule: CoordinateLSTM) -> FusedStep | None:
    """Imports the kernel's module here: Triton takes a second to load, and may not be installed."""
    try:
        from rnnopt.optim.kernels import cuda
    except ImportError as error:
        _warn_once(str(error), "install triton")
        return None
    problem = cuda.problem(rule.hidden_size, rule.gate_weight.device)
    if problem is None:
        return cuda.TritonStep(rule)
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
