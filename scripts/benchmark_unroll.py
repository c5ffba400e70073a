"""Memory and time of a meta-step, beside unrolls that keep the model's graph.

    python scripts/benchmark_unroll.py --json unroll.json [--encoder MINILM] [--plot unroll.png]

MINILM is a folder with all-MiniLM-L6-v2; without it a model of the same shape with random weights
is made, which takes as long. Tokens are random. Each peak of memory is that of a fresh process that
loads the model, makes one gradient, and then a meta-step; a GPU's memory is counted by torch, and
there one process does all of them. What is timed runs in turns in one process.

Time: about 25 minutes on one core of a server processor. Memory: 4 GiB of our own; the others get
85 % of what is free, and where that is too little, fewer steps.
Prints a Markdown table; the file holds every repeat, and until the end what there is so far.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from benchmark import (
    MINILM,
    MISSING,
    TINY,
    Report,
    Target,
    Workload,
    arguments,
    duration,
    finish,
    interleave,
    mebibytes,
    progress,
    save,
)

from rnnopt import LearnedOptimizer
from rnnopt.meta.differentiable import higher
from rnnopt.meta.settings import UnrollSettings
from rnnopt.meta.unroll import unroll
from rnnopt.storage.memory import forget_peak, free_bytes, peak_bytes, used_bytes
from rnnopt.tasks.text.classifier import Tune

OURS, FIRST, SECOND = "ours", "higher, first order", "higher, second order"
LENGTH = 10  # steps of what is timed
ROOM = 0.85  # of the free memory may be taken


class Config(NamedTuple):
    """One meta-step.

    Attributes:
        method: whose unroll.
        tune: what trains.
        steps: T.
        device: where.
    """

    method: str
    tune: Tune
    steps: int
    device: str


def meta_step(work: Workload, config: Config) -> Callable[[], None]:
    """What makes one meta-step of the shipped rule: an unroll and a step of Adam on its weights."""
    rule: Any = LearnedOptimizer(work.params).rule
    rule.requires_grad_(True)  # it is shipped frozen
    meta = torch.optim.Adam(rule.parameters(), lr=1e-4)
    unrolls: dict[str, Callable[[], object]] = {
        OURS: lambda: unroll(
            work.model,
            LearnedOptimizer(work.params, rule),
            work.support_loss,
            work.query_loss,
            UnrollSettings(config.steps),
        ),
        FIRST: lambda: _by_higher(work, rule, config.steps, first_order=True),
        SECOND: lambda: _by_higher(work, rule, config.steps, first_order=False),
    }

    def run() -> None:
        meta.zero_grad()
        unrolls[config.method]()
        meta.step()

    return run


def _by_higher(work: Workload, rule: Any, steps: int, first_order: bool) -> None:
    """As one writes it with `higher`: query losses add up, one backward pass at the end."""
    optimizer = LearnedOptimizer(work.params, rule)
    with higher.innerloop_ctx(work.model, optimizer) as (fmodel, stepper):
        stepper.first_order = first_order
        total = torch.zeros((), device=work.device)
        for t in range(steps):
            stepper.step(work.support_loss(fmodel, t))
            total = total + work.query_loss(fmodel, t)
        torch.autograd.backward(total, inputs=list(rule.parameters()))


def peak(work: Workload, config: Config) -> dict[str, float]:
    """Bytes and seconds of one meta-step, after one gradient of the model.

    Returns:
        ``process``, the whole process at its largest; ``baseline``, it after that gradient;
        ``increase``, the largest since then less the baseline; ``seconds``. On a CUDA device the
        bytes are those of the GPU.
    """
    run = meta_step(work, config)
    work.forward_backward()
    device = torch.device(config.device)
    loading = peak_bytes(device) or 0
    forget_peak(device)
    baseline = used_bytes(device) or 0
    started = time.perf_counter()
    run()
    if config.device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    largest = peak_bytes(device) or 0
    return {
        "process": max(loading, largest),
        "baseline": baseline,
        "increase": largest - baseline,
        "seconds": seconds,
    }


class Bench:
    """Measures peaks, each once, and keeps them.

    Args:
        options: the command line.
        report: where peaks are recorded.
    """

    def __init__(self, options: argparse.Namespace, report: Report) -> None:
        self.options, self.report = options, report
        self.device = "cuda" if options.device == "cuda" else "cpu"
        self._peaks: dict[Config, dict[str, float]] = {}
        self._longest: dict[tuple[str, int], int] = {}

    def work(self, config: Config) -> Workload:
        """The model for a method."""
        shape = TINY if self.options.tiny else MINILM
        eager = config.method != OURS
        return Workload(shape, config.tune, self.options.encoder, device=config.device, eager=eager)

    def peak(self, method: str, steps: int, tune: Tune = "lora") -> dict[str, float]:
        """Bytes and seconds of one meta-step in a process of its own; see `peak`."""
        config = Config(method, tune, steps, self.device)
        if config not in self._peaks:
            progress(f"memory: {config}")
            here = self.options.tiny or self.device == "cuda"
            found = (self._here if here else self._child)(config)
            self._peaks[config] = found
            self.report.data.setdefault("peaks", []).append({**config._asdict(), **found})
            save(self.report, self.options)
        return self._peaks[config]

    def _here(self, config: Config) -> dict[str, float]:
        gc.collect()  # unrolls leave cycles of references, and in them tensors
        work = self.work(config)
        forget_peak(torch.device(config.device))  # that of the meta-step before
        return peak(work, config)

    def _child(self, config: Config) -> dict[str, float]:
        command = [sys.executable, __file__, "--child", json.dumps(config), "--json", "-"]
        command += ["--encoder", self.options.encoder] if self.options.encoder else []
        command += ["--threads", str(torch.get_num_threads())]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found

    def longest(self, method: str, wanted: int) -> int:
        """The most steps up to `wanted` for which there is memory, from two short unrolls."""
        if (method, wanted) in self._longest:
            return self._longest[method, wanted]
        few = min(3, wanted)
        start, end = self.peak(method, 1)["process"], self.peak(method, few)["process"]
        slope = max((end - start) / max(few - 1, 1), 1.0)
        more = int(max(ROOM * (free_bytes(torch.device(self.device)) or 0) - end, 0) / slope)
        self._longest[method, wanted] = min(wanted, few + more)
        return self._longest[method, wanted]

    def stretched(self, method: str, wanted: int, what: str) -> tuple[float, str]:
        """Bytes at `wanted` steps, extrapolated linearly where they would not fit; and a note."""
        most = self.longest(method, wanted)
        while True:
            try:
                end = self.peak(method, most)[what]
                break
            # killed: somebody else took the memory
            except (subprocess.CalledProcessError, torch.OutOfMemoryError):
                if most <= 3:
                    raise
                most = self._longest[method, wanted] = most * 3 // 4
        if most == wanted:
            return end, ""
        start = self.peak(method, 1)[what]
        value = start + (end - start) / (most - 1) * (wanted - 1)
        return value, f" (extrapolated from T = {most}, the most that fits)"


def memory_rows(report: Report, bench: Bench, lengths: Sequence[int], compared: int) -> None:
    """Peaks against T, against the graph-keeping unrolls, and of all parameters."""
    first, last = lengths[0], lengths[-1]
    for what, target in (("process", Target(1.3)), ("increase", None)):
        short, long = (bench.peak(OURS, steps)[what] for steps in (first, last))
        report.add(
            f"peak memory ({_WHAT[what]}) of a meta-step over LoRA, T = {last} / T = {first}",
            long / max(short, 1),
            f"{long / max(short, 1):.3g}: {mebibytes(long)} / {mebibytes(short)}",
            target,
        )
    for what, limit in (("process", 0.25), ("increase", None)):
        for method in (FIRST, SECOND):
            ours = bench.peak(OURS, compared)[what]
            figure = f"peak memory ({_WHAT[what]}), ours / {method}, LoRA, T = {compared}"
            target = Target(limit) if limit and method == FIRST else None
            theirs, note = bench.stretched(method, compared, what)
            theirs = max(theirs, 1)
            words = f"{ours / theirs:.3g}: {mebibytes(ours)} / {mebibytes(theirs)}{note}"
            report.add(figure, ours / theirs, words, target)
    full = bench.peak(OURS, min(LENGTH, last), "full")
    figure = f"meta-step over all parameters, T = {min(LENGTH, last)}: peak memory in GiB"
    size = full["process"] / 2**30
    report.add(figure, size, f"{size:.2f}; {duration(full['seconds'])}", Target(6))


_WHAT = {"process": "whole process", "increase": "beyond the model with one gradient made"}


def time_rows(report: Report, bench: Bench, length: int, repeats: int) -> None:
    """Meta-steps a second: ours, and the graph-keeping unrolls."""
    methods = [m for m in (FIRST, SECOND) if bench.longest(m, length) == length]
    configs = {m: Config(m, "lora", length, bench.device) for m in (OURS, *methods)}
    work = {name: bench.work(config) for name, config in configs.items()}
    subjects: dict[str, Callable[[], object]] = {
        name: meta_step(work[name], config) for name, config in configs.items()
    }
    subjects["gradient"] = work[OURS].forward_backward
    progress(f"time: {', '.join(subjects)}")
    timings = interleave(subjects, repeats, warm_ups=0 if length > 5 else 1)
    report.keep(f"LoRA, T = {length}", timings)
    for method in (FIRST, SECOND):
        figure = f"meta-steps/s, ours / {method}, LoRA, T = {length}"
        target = Target(3, at_most=False) if method == FIRST else None
        if method in timings:
            report.ratio(figure, timings[method], timings[OURS], target)
        else:
            report.add(figure, None, "does not fit", target)
    share = timings[OURS].median / (2 * length * timings["gradient"].median)
    report.add(f"meta-step over LoRA / the {2 * length} gradients in it", share, f"{share:.3g}")
    spent = timings[OURS].median
    words = f"{1 / spent:.3g} ({duration(spent)})"
    report.add(f"meta-steps/s, LoRA, T = {length}", 1 / spent, words)


def gpu_row(report: Report, bench: Bench, length: int, repeats: int, wanted: bool) -> None:
    """Meta-steps a second on a CUDA device and on this machine's CPU."""
    figure = f"meta-steps/s, GPU / CPU, LoRA, T = {length}"
    if not wanted:
        report.add(figure, None, MISSING)
        return
    progress("time: GPU and CPU")
    configs = [Config(OURS, "lora", length, device) for device in ("cuda", "cpu")]
    subjects = {c.device: meta_step(bench.work(c), c) for c in configs}
    timings = interleave(subjects, repeats, warm_ups=1)
    report.keep("gpu", timings)
    report.ratio(figure, timings["cpu"], timings["cuda"])


def sweep(bench: Bench, lengths: Sequence[int], tunes: Sequence[Tune]) -> None:
    """Peaks against T for each choice of what trains."""
    for tune in tunes:
        for steps in lengths:
            bench.peak(OURS, steps, tune)


def draw(peaks: Sequence[Mapping[str, Any]], path: str) -> None:
    """Memory against T."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    lines: dict[str, dict[int, float]] = {}
    for row in peaks:
        label = f"{row['method']}, {row['tune']}"
        # a process that held more before shows no increase, which a logarithm does not bear
        lines.setdefault(label, {})[row["steps"]] = max(row["increase"], 1) / 2**20
    for label, points in lines.items():
        style = "-" if label.startswith(OURS) else "--"
        axes.plot(*zip(*sorted(points.items())), marker="o", markersize=3, ls=style, label=label)
    axes.set(xlabel="steps T", ylabel="peak memory beyond the model (MiB)", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the options ask for."""
    parser = arguments(__doc__ or "", repeats=3)
    parser.add_argument("--plot", metavar="PNG")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    report = Report()
    bench = Bench(options, report)
    if options.child:
        config = Config(*json.loads(options.child))
        print(json.dumps(peak(bench.work(config), config)))
        return
    lengths, compared = ((1, 2), 2) if options.tiny else ((5, 10, 20, 40), 20)
    length = min(LENGTH, lengths[-1])
    memory_rows(report, bench, lengths, compared)
    time_rows(report, bench, length, options.repeats)
    save(report, options)
    gpu = options.device != "cpu" and torch.cuda.is_available()
    gpu_row(report, bench, length, options.repeats, gpu)
    if not options.tiny or options.plot:
        sweep(bench, lengths, ("lora", "head", "full"))
    if options.plot:
        draw(report.data["peaks"], options.plot)
    finish(report, options)


if __name__ == "__main__":
    main()
