"""How much memory is used and free, to say beforehand that a graph will not fit."""

from __future__ import annotations

import os
import resource
import warnings
from pathlib import Path

import torch

_GIB = 2**30


def used_bytes(device: torch.device) -> int | None:
    """Memory that this process holds on a device; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def free_bytes(device: torch.device) -> int | None:
    """Memory that this process may still take on a device; None where the system does not tell."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return (
            next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) << 10
        )
    except (OSError, ValueError, IndexError, StopIteration):
        return None


def peak_bytes(device: torch.device) -> int:
    """The most that this process has held on a device, since `forget_peak` if that was called."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # not ru_maxrss: that of a child process starts at what its parent had
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) << 10
    except (OSError, ValueError, IndexError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def forget_peak(device: torch.device) -> None:
    """Let `peak_bytes` begin anew; where the system has no way to, nothing happens."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.path.exists("/proc/self/clear_refs"):
        Path("/proc/self/clear_refs").write_text("5")


def warn_if_too_large(before: int | None, steps: int, device: torch.device) -> None:
    """Say so if `steps` more steps of an unroll, each as large as the first, will not fit.

    Args:
        before: `used_bytes` before the first step, whose graph is being kept.
        steps: that are still to be kept beside it.
        device: where the graph is.

    Warns:
        RuntimeWarning: they will not fit.
    """
    after, free = used_bytes(device), free_bytes(device)
    if before is None or after is None or free is None:
        return
    needed = (after - before) * steps
    if needed > free:
        warnings.warn(
            f"second order keeps the graph of every step: {steps} more steps will take about "
            f"{needed / _GIB:.1f} GiB, and {free / _GIB:.1f} GiB are free; lower --steps or "
            "--truncation, train fewer parameters or texts, or take --order 1, whose memory is "
            "flat",
            RuntimeWarning,
            stacklevel=2,
        )
