"""The unrolls that benchmark_unroll.py compares, and how their peak memory is taken."""

from __future__ import annotations

import importlib.util
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from benchmark import Workload
from torch import Tensor, nn

from rnnopt import LearnedOptimizer
from rnnopt.meta.differentiable import higher
from rnnopt.meta.settings import UnrollSettings
from rnnopt.meta.unroll import unroll
from rnnopt.tasks.text.classifier import Tune

ALL = 10**12  # coordinates: more than any model here has
ROOM = 0.85  # of the free memory may be taken
TORCHOPT = importlib.util.find_spec("torchopt") is not None


class Config(NamedTuple):
    """One meta-step.

    Attributes:
        method: whose unroll.
        tune: what trains.
        steps: T.
        coordinates: that carry the meta-gradient, see `UnrollSettings`; ours only.
        device: where.
    """

    method: str
    tune: Tune
    steps: int
    coordinates: int | None
    device: str


def meta_step(work: Workload, config: Config) -> Callable[[], None]:
    """What makes one meta-step of the shipped rule: an unroll, and a step of Adam on its weights.

    `torchopt` has no learned rule: there Adam is unrolled, and the gradient goes to where it began.
    """
    rule: Any = LearnedOptimizer(work.params).rule
    rule.requires_grad_(True)  # it is shipped frozen
    meta = torch.optim.Adam(rule.parameters(), lr=1e-4)
    unrolls: dict[str, Callable[[], object]] = {
        "ours": lambda: unroll(
            work.model,
            LearnedOptimizer(work.params, rule),
            work.support_loss,
            work.query_loss,
            UnrollSettings(config.steps, coordinates=config.coordinates),
        ),
        "higher, first order": lambda: _by_higher(work, rule, config.steps, first_order=True),
        "higher, second order": lambda: _by_higher(work, rule, config.steps, first_order=False),
        "torchopt": lambda: _by_torchopt(work, config.steps),
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


def _by_torchopt(work: Workload, steps: int) -> None:
    """A differentiable Adam of the same length."""
    import torchopt  # type: ignore[import-not-found,unused-ignore]

    names = [name for name, param in work.model.named_parameters() if param.requires_grad]
    start = {n: p.detach().clone().requires_grad_() for n, p in zip(names, work.params)}
    params: dict[str, Tensor] = start
    optimizer = torchopt.adam(lr=1e-3, eps_root=1e-12)
    state = optimizer.init(params)

    def module(**batch: Tensor) -> Any:
        return torch.func.functional_call(work.model, params, (), batch)

    total = torch.zeros((), device=work.device)
    for t in range(steps):
        loss = work.support_loss(cast(nn.Module, module), t)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        updates, state = optimizer.update(dict(zip(params, grads)), state, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
        total = total + work.query_loss(cast(nn.Module, module), t)
    torch.autograd.backward(total, inputs=list(start.values()))


def peak(work: Workload, config: Config) -> dict[str, float]:
    """Bytes and seconds of one meta-step, after one gradient of the model.

    Returns:
        ``process``, the whole process at its largest; ``baseline``, it after that gradient;
        ``increase``, the largest since then less the baseline; ``seconds``. On a CUDA device the
        bytes are those of the GPU.
    """
    run = meta_step(work, config)
    work.forward_backward()
    loading = _largest(config.device)
    _forget_largest(config.device)
    baseline = _now(config.device)
    started = time.perf_counter()
    run()
    if config.device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    largest = _largest(config.device)
    return {
        "process": max(loading, largest),
        "baseline": baseline,
        "increase": largest - baseline,
        "seconds": seconds,
    }


def _status(name: str) -> int:
    """A size in /proc/self/status, in bytes; 0 where there is none.

    Not ru_maxrss: that of a child starts at what its parent had.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    sizes = (int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
    return 1024 * next(sizes, 0)


def _largest(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM") or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _now(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else _status("VmRSS")


def _forget_largest(device: str) -> None:
    """Start anew on the peak; where the system has no way to, it stays that of loading."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif os.path.exists("/proc/self/clear_refs"):
        Path("/proc/self/clear_refs").write_text("5")


def free_memory(device: str) -> int:
    """Bytes that a new process could take."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
