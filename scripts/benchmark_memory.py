"""Measure the memory of a step of `LearnedOptimizer` beside AdamW's.

    python scripts/benchmark_memory.py [--coordinates 20000000] [--repeats 3] [--json memory.json]

Resident memory above that of parameters and gradients: the most during three steps, and what is
kept after them, in a process of its own for every figure. Each process first steps a small model,
so that libraries and the compiled kernel are loaded before. Linux only.

Time: 3 minutes on one core of a server processor. Memory: 2 GB.
Prints a Markdown table of medians; a range follows where repeats differ by 1 MB or more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from rnnopt import LearnedOptimizer
from rnnopt.storage.files import write_atomically
from rnnopt.storage.memory import forget_peak, peak_bytes, used_bytes

CPU = torch.device("cpu")

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW, one tensor at a time": lambda params: torch.optim.AdamW(params, foreach=False),
    "AdamW, foreach": lambda params: torch.optim.AdamW(params, foreach=True),
    "rnnopt": LearnedOptimizer,
    "rnnopt, guard=False": lambda params: LearnedOptimizer(params, guard=False),
}


def cases(coordinates: int) -> dict[str, list[tuple[int, int]]]:
    """By name the shapes of a model with about so many parameters."""
    side = int((coordinates / 20) ** 0.5)
    narrow, factor = coordinates // 64, coordinates // (8 * 20)
    return {
        f"20 matrices of {side:,} x {side:,}": [(side, side)] * 20,
        f"20 matrices of 8 x {factor:,}": [(8, factor)] * 20,
        f"1 matrix of 64 x {narrow:,}": [(64, narrow)],
        f"1 matrix of {narrow:,} x 64": [(narrow, 64)],
    }


def measure(name: str, shapes: Sequence[Sequence[int]]) -> tuple[float, float]:
    """MB over parameters and gradients in this process: the most in three steps, and those kept."""
    torch.set_num_threads(1)
    _steps(name, _params([(70, 300), (300, 300), (4, 5)]))
    params = _params(shapes)
    forget_peak(CPU)
    before = used_bytes(CPU)
    optimizer = _steps(name, params)
    peak, kept = peak_bytes(CPU), used_bytes(CPU)
    assert len(optimizer.state) == len(params)
    if before is None or peak is None or kept is None:
        raise SystemExit("this system does not report the memory of a process; use Linux")
    return (peak - before) / 1e6, (kept - before) / 1e6


def _params(shapes: Sequence[Sequence[int]]) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.empty(*shape).normal_(std=0.02)) for shape in shapes]
    for param in params:
        param.grad = torch.empty_like(param).normal_(std=1e-3)
    return params


def _steps(name: str, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    optimizer = OPTIMIZERS[name](params)
    for _ in range(3):
        optimizer.step()
    return optimizer


def _shown(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    spread = f" ({low:,.0f} to {high:,.0f})" if high - low >= 1 else ""
    return f"{statistics.median(values):,.0f}{spread}"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every optimizer on every model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--coordinates", type=int, default=20_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        print(json.dumps(measure(options.child[0], json.loads(options.child[1]))))
        return
    rows = []
    for case, shapes in cases(options.coordinates).items():
        for name in OPTIMIZERS:
            command = [sys.executable, __file__, "--child", name, json.dumps(shapes)]
            runs = [
                json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
                for _ in range(options.repeats)
            ]
            peaks, kept = zip(*runs)
            rows.append({"model": case, "optimizer": name, "peak": peaks, "kept": kept})
            print(f"{case}, {name}: {_shown(peaks)} MB", file=sys.stderr)
    print("| parameters | optimizer | most in a step, MB | kept, MB |\n|---|---|---|---|")
    for row in rows:
        shown = _shown(row["peak"]), _shown(row["kept"])
        print(f"| {row['model']} | {row['optimizer']} | {shown[0]} | {shown[1]} |")
    if options.json:
        content = {"coordinates": options.coordinates, "torch": torch.__version__, "rows": rows}
        write_atomically(options.json, json.dumps(content, indent=1).encode())


if __name__ == "__main__":
    main()
