"""Time one step of `LearnedOptimizer` beside what surrounds it and what it competes with.

The step is that of the shipped rule, over LoRA and over all weights.

    python scripts/benchmark_step.py --json step.json [--encoder MINILM]

MINILM is a folder with all-MiniLM-L6-v2; without it a model of the same shape with random weights
is made, which takes as long. Tokens are random. All that is compared runs in turns in one process,
and medians are compared.

Time: about 6 minutes on one core of a server processor. Memory: 12 GiB, most of it the textbook
LSTM's state; 4 GiB until then.
Prints a Markdown table; the file holds every repeat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from benchmark import (
    BERT_BASE,
    MINILM,
    MISSING,
    TINY,
    Report,
    Shape,
    Target,
    Timing,
    Workload,
    arguments,
    finish,
    interleave,
    progress,
)
from torch import Tensor, nn

from rnnopt import LearnedOptimizer
from rnnopt.optim.kernels.choice import fused_step
from rnnopt.rules.two_level import TwoLevelLSTM
from rnnopt.tasks.text.classifier import Tune

# The textbook's hyperparameters are those of Andrychowicz et al. 2016, arXiv:1606.04474, app. A.
TEXTBOOK_UNITS = 20
TEXTBOOK_P = 10.0
TEXTBOOK_SCALE = 0.1
# Coordinates to a call, at which it is fastest, twice as fast as with 2^18; over the word embedding
# at once, as published, its gates alone would take 3.7 GB a buffer.
TEXTBOOK_CHUNK = 2**13
COPY_BYTES = 2**30
SHIPPED = "step of the shipped rule"
NAMES: dict[Tune, str] = {"full": "all parameters", "lora": "LoRA rank 8 + head"}
STEP_LIMITS: dict[Tune, float] = {"full": 1.0, "lora": 0.05}


class Textbook:
    """The coordinate-wise LSTM as published: two layers of `torch.nn.LSTMCell`, full precision.

    320 bytes of state a coordinate.

    Args:
        params: with gradients.
        chunk: one call a tensor, or for every so many coordinates of a larger one.
    """

    def __init__(self, params: Sequence[Tensor], chunk: int = TEXTBOOK_CHUNK) -> None:
        units = TEXTBOOK_UNITS
        self._cells = nn.LSTMCell(2, units), nn.LSTMCell(units, units)
        self._output = nn.Linear(units, 1)
        self._params = params
        self._chunk = chunk
        self._state = [
            [
                [torch.zeros(len(piece), units) for _ in range(4)]
                for piece in torch.split(param.detach().view(-1), self._chunk)
            ]
            for param in params
        ]

    @torch.no_grad()
    def step(self) -> None:
        """One step of every parameter."""
        for param, memories in zip(self._params, self._state):
            assert param.grad is not None
            pieces = (torch.split(x.reshape(-1), self._chunk) for x in (param.detach(), param.grad))
            for place, grad, memory in zip(*pieces, memories):
                h1, c1, h2, c2 = memory
                h1, c1 = self._cells[0](_textbook_inputs(grad), (h1, c1))
                h2, c2 = self._cells[1](h1, (h2, c2))
                place.add_(self._output(h2).squeeze(1), alpha=TEXTBOOK_SCALE)
                memory[:] = h1, c1, h2, c2


def _textbook_inputs(grad: Tensor) -> Tensor:
    """log|g| / p and sign g, or -1 and e^p g where |g| < e^-p; (N, 2)."""
    edge = torch.tensor(-TEXTBOOK_P).exp()
    large = grad.abs() >= edge
    log = torch.where(large, grad.abs().clamp_min(edge).log() / TEXTBOOK_P, -1.0)
    return torch.stack([log, torch.where(large, grad.sign(), grad / edge)], dim=1)


def copies(params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[nn.Parameter]:
    """The same parameters for another optimizer; the gradients are shared, nobody writes them."""
    fresh = [nn.Parameter(param.detach().clone()) for param in params]
    for param, grad in zip(fresh, grads):
        param.grad = grad
    return fresh


def bytes_a_coordinate(optimizer: torch.optim.Optimizer) -> float:
    """Of the optimizer's memory, as it is."""
    coordinates = sum(param.numel() for param in optimizer.state)
    leaves = (leaf for state in optimizer.state.values() for leaf in state.values())
    return sum(leaf.nbytes for leaf in leaves) / coordinates


def measure_steps(report: Report, work: Workload, tune: Tune, repeats: int) -> None:
    """Rows for one set of parameters on the CPU: everything but the textbook."""
    progress(f"steps over {NAMES[tune]}")
    grads = work.begin()
    dense = [1e-3 * torch.randn_like(grad) for grad in grads]

    optimizers: dict[str, torch.optim.Optimizer] = {
        SHIPPED: LearnedOptimizer(copies(work.params, grads)),
        f"{SHIPPED}, dense": LearnedOptimizer(copies(work.params, dense)),
        f"{SHIPPED}, plain": LearnedOptimizer(copies(work.params, grads), fused=False),
        "AdamW, foreach": torch.optim.AdamW(copies(work.params, grads), lr=1e-5, foreach=True),
        "AdamW, fused": torch.optim.AdamW(copies(work.params, grads), lr=1e-5, fused=True),
    }
    subjects: dict[str, Callable[[], object]] = {"forward + backward": work.forward_backward}
    timings = interleave(subjects | {k: o.step for k, o in optimizers.items()}, repeats)
    report.keep(tune, timings)
    memory = {name: bytes_a_coordinate(optimizer) for name, optimizer in optimizers.items()}
    report.data[f"{tune}: bytes a coordinate"] = memory
    report.data[f"{tune}: coordinates"] = work.coordinates
    report.data[f"{tune}: coordinates with a gradient"] = sum(int((g != 0).sum()) for g in grads)
    _step_rows(report, tune, timings)
    report.add(
        f"{SHIPPED}, {NAMES[tune]}: bytes a coordinate", memory[SHIPPED], f"{memory[SHIPPED]:.1f}"
    )


def _step_rows(report: Report, tune: Tune, timings: dict[str, Timing]) -> None:
    whose, model = NAMES[tune], timings["forward + backward"]
    step, dense, plain = (timings[f"{SHIPPED}{kind}"] for kind in ("", ", dense", ", plain"))
    report.ratio(
        f"{SHIPPED} / (forward + backward), {whose}", step, model, Target(STEP_LIMITS[tune])
    )
    report.ratio(f"the same, no gradient zero (worst case), {whose}", dense, model)
    report.ratio(f"{SHIPPED}, plain / fused, {whose}", plain, step, Target(4, at_most=False))
    for name in ("AdamW, foreach", "AdamW, fused"):
        report.ratio(f"{SHIPPED} / {name}, {whose}", step, timings[name])


def measure_textbook(report: Report, work: Workload, tune: Tune, repeats: int, chunk: int) -> None:
    """Rows on the textbook LSTM; apart, because of its memory."""
    progress(f"textbook LSTM over {NAMES[tune]}")
    grads = work.begin()
    dense = [1e-3 * torch.randn_like(grad) for grad in grads]
    subjects: dict[str, Callable[[], object]] = {
        "textbook": Textbook(copies(work.params, grads), chunk).step,
        SHIPPED: LearnedOptimizer(copies(work.params, grads)).step,
        f"{SHIPPED}, dense": LearnedOptimizer(copies(work.params, dense)).step,
    }
    timings = interleave(subjects, repeats, warm_ups=1)
    report.keep(f"{tune}, textbook", timings)
    whose = NAMES[tune]
    note = f"; its calls take {chunk:,} coordinates at most"
    for name, target in ((SHIPPED, Target(20, at_most=False)), (f"{SHIPPED}, dense", None)):
        figure = f"textbook LSTM / {name}, {whose}"
        report.ratio(figure, timings["textbook"], timings[name], target, note)


def bytes_moved(rule: TwoLevelLSTM, param: Tensor, state: Mapping[str, Tensor]) -> int:
    """What the kernel's two passes read and write for a tensor with a dense gradient.

    Summed up as in `rnnopt.optim.kernels.two_level_triton`.
    """
    assert param.grad is not None
    cell, single = state["cell"].nbytes, state["m"].nbytes
    both = 2 * (param.nbytes + param.grad.nbytes + 3 * single)  # m, v, last update
    direction = 2 * single if cell else 0
    orthogonal = single if rule.treats_as_matrix(param.shape) else 0
    return both + 2 * cell + direction + orthogonal + param.nbytes + 3 * single


def measure_gpu(report: Report, shape: Shape, repeats: int, wanted: bool) -> None:
    """Rows for a CUDA device: BERT-base, all parameters, bfloat16 autocast."""
    figures = {
        f"{SHIPPED} / whole training iteration, BERT-base on a GPU": Target(0.25),
        f"{SHIPPED}: bandwidth / copy bandwidth, BERT-base on a GPU": Target(0.6, at_most=False),
        f"{SHIPPED}, plain / fused, both without guard, BERT-base on a GPU": None,
        f"{SHIPPED}, no guard / AdamW, fused, BERT-base on a GPU": None,
    }
    if not wanted:
        for figure, target in figures.items():
            report.add(figure, None, MISSING, target)
        return
    progress("steps on the GPU")
    work = Workload(shape, "full", device="cuda", autocast=True)
    optimizer = LearnedOptimizer(work.params)

    def iteration() -> None:
        work.forward_backward()
        optimizer.step()

    iteration()
    # no gradient zero, so that no block is skipped; and no guard, which copies what it may undo
    dense = [1e-3 * torch.randn_like(param) for param in work.params]
    kernel, plain = (
        LearnedOptimizer(copies(work.params, dense), guard=False, fused=fused)
        for fused in (None, False)
    )
    adamw = torch.optim.AdamW(copies(work.params, dense), lr=1e-5, fused=True)
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device="cuda")
    sink = torch.empty_like(source)
    subjects: dict[str, Callable[[], object]] = {
        "iteration": iteration, "step": optimizer.step, "no guard": kernel.step,
        "no guard, plain": plain.step, "AdamW, fused": adamw.step,
        "copy": lambda: sink.copy_(source),
    }  # fmt: skip
    timings = interleave(subjects, repeats, warm_ups=5)
    report.keep("gpu", timings)
    names, step = list(figures), timings["no guard"]
    report.ratio(names[0], timings["step"], timings["iteration"], figures[names[0]])
    rule = cast(TwoLevelLSTM, kernel.rule)
    traffic = sum(bytes_moved(rule, param, state) for param, state in kernel.state.items())
    report.data["gpu: bytes that a step moves"] = traffic
    bandwidth, copied = traffic / step.median, 2 * COPY_BYTES / timings["copy"].median
    words = f"{bandwidth / copied:.3g}: {bandwidth / 1e9:,.0f} / {copied / 1e9:,.0f} GB/s"
    report.add(names[1], bandwidth / copied, words, figures[names[1]])
    report.ratio(names[2], timings["no guard, plain"], step)
    report.ratio(names[3], step, timings["AdamW, fused"])
    _kernel_rows(report, kernel, traffic, copied, repeats)


def _kernel_rows(
    report: Report, optimizer: LearnedOptimizer, traffic: int, copied: float, repeats: int
) -> None:
    """The same bandwidth for the kernels' own time, without what Python does before them."""
    optimizer.step()
    activity = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as profile:
        for _ in range(repeats):
            optimizer.step()
        torch.cuda.synchronize()
    passes = {"measure_block": 0.0, "step_block": 0.0, "added": 0.0}
    for event in profile.key_averages():
        for name in passes:  # some versions of Triton append something to it
            if event.key.startswith(name):
                passes[name] += event.self_device_time_total * 1e-6 / repeats
    report.data["gpu: seconds of each kernel"] = passes
    seconds = sum(passes.values())
    share = traffic / seconds / copied if seconds else None
    figure = f"{SHIPPED}: bandwidth of its kernels / copy bandwidth, BERT-base on a GPU"
    words = MISSING if share is None else f"{share:.3g}: {1e3 * seconds:.3g} ms in kernels"
    report.add(figure, share, words, Target(0.6, at_most=False))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the options ask for."""
    parser = arguments(__doc__ or "", repeats=11)
    parser.add_argument("--textbook-repeats", type=int, default=3)
    parser.add_argument("--textbook-chunk", type=int, default=TEXTBOOK_CHUNK)
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    report, shape = Report(), TINY if options.tiny else MINILM
    for tune in NAMES if options.device != "cuda" else ():
        work = Workload(shape, tune, options.encoder)
        measure_steps(report, work, tune, options.repeats)
        measure_textbook(report, work, tune, options.textbook_repeats, options.textbook_chunk)
    rule = LearnedOptimizer([nn.Parameter(torch.zeros(1))]).rule
    report.data["fused"] = fused_step(rule) is not None
    gpu = options.device != "cpu" and torch.cuda.is_available()
    measure_gpu(report, TINY if options.tiny else BERT_BASE, options.repeats, gpu)
    finish(report, options)


if __name__ == "__main__":
    main()
