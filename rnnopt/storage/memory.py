"""How much memory is used and free, on this machine or on a GPU."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

_GIB = 2**30


def used_bytes(device: torch.device) -> int | None:
    """Bytes that this process uses on a device; None if the system does not report them."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def free_bytes(device: torch.device) -> int | None:
    """Bytes that are free for this process on a device; None if the system does not report it."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return _told_by_linux("/proc/meminfo", "MemAvailable:")


def peak_bytes(device: torch.device) -> int | None:
    """The most bytes that this process has used on a device, since `forget_peak` if called.

    None if the system does not report them.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # before ru_maxrss, which in a child process starts with the value of its parent
    if (told := _told_by_linux("/proc/self/status", "VmHWM:")) is not None:
        return told
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10


def _told_by_linux(file: str, name: str) -> int | None:
    """The bytes under a name in a file of /proc; None elsewhere."""
    try:
        lines = Path(file).read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) << 10
    except (OSError, ValueError, IndexError, StopIteration):
        return None


def forget_peak(device: torch.device) -> None:
    """Reset `peak_bytes`. Nothing happens on a system that does not support it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.path.exists("/proc/self/clear_refs"):
        Path("/proc/self/clear_refs").write_text("5")


def warn_if_too_large(before: int | None, steps: int, device: torch.device) -> None:
    """Warn if the graph of further steps, each as large as the first one, will not fit.

    Args:
        before: `used_bytes` before the first step. The graph of that step is kept.
        steps: the number of further steps whose graph will be kept.
        device: the device of the graph.

    Warns:
        RuntimeWarning: the graph will not fit.
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
