"""What the benchmarks share: the model to work on, the clock, the machine's name, the report."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rnnopt.storage.files import write_atomically
from rnnopt.tasks.text.classifier import Classifier, Tune
from rnnopt.tasks.text.encoder.loading import seeded
from rnnopt.tasks.text.encoder.lora import add_lora

LORA_RANK = 8
WAYS = 10
MISSING = "not yet measured"
SETTINGS = (
    "device",
    "threads",
    "repeats",
    "textbook_repeats",
    "textbook_chunk",
    "tiny",
)  # that a file records


@dataclass(frozen=True)
class Shape:
    """Of a BERT, and of the batches that it is given."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocabulary: int
    positions: int
    texts: int
    tokens: int


MINILM = Shape(6, 384, 12, 1536, 30522, 512, texts=50, tokens=32)
BERT_BASE = Shape(12, 768, 12, 3072, 30522, 512, texts=32, tokens=128)
TINY = Shape(1, 16, 2, 32, 100, 64, texts=4, tokens=8)  # for a test that the scripts run


class Workload:
    """A text classifier, what of it trains, and a support and a query batch of random tokens.

    Random tokens touch more rows of the embedding than text does, which repeats its words.

    Args:
        shape: of the model, unless `encoder` is given, and of the batches.
        tune: what trains, as `Classifier.load` has it.
        encoder: a folder with a pretrained encoder; None for random weights.
        device: where all of it goes.
        eager: the attention that can be differentiated twice.
        autocast: run the model in bfloat16.
    """

    def __init__(
        self, shape: Shape, tune: Tune, encoder: str | None = None, *,
        device: str = "cpu", eager: bool = False, autocast: bool = False,
    ) -> None:  # fmt: skip
        self.device, self.autocast = device, autocast
        if encoder is None:
            self.model = _random_model(shape, tune, eager).to(device)
        else:
            self.model = Classifier.load(
                encoder, tune=tune, lora_rank=LORA_RANK, ways=WAYS, double_backward=eager,
                device=torch.device(device),
            ).model  # fmt: skip
        self.params = [param for param in self.model.parameters() if param.requires_grad]
        self.coordinates = sum(param.numel() for param in self.params)
        with seeded(0):
            size = (2, shape.texts, shape.tokens)
            self._ids = torch.randint(5, self.model.config.vocab_size, size).to(device)
        self._labels = (torch.arange(shape.texts) % WAYS).to(device)

    def support_loss(self, module: nn.Module, step: int = 0) -> Tensor:
        """Mean cross-entropy of the support batch, 0-d."""
        return self._loss(module, self._ids[0])

    def query_loss(self, module: nn.Module, step: int = 0) -> Tensor:
        """Mean cross-entropy of the query batch, 0-d."""
        return self._loss(module, self._ids[1])

    def _loss(self, module: nn.Module, ids: Tensor) -> Tensor:
        context = torch.autocast(self.device, torch.bfloat16) if self.autocast else nullcontext()
        with context:
            logits = module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return cross_entropy(logits.float(), self._labels)

    def forward_backward(self) -> None:
        """Fresh gradients of the support loss in all that trains."""
        for param in self.params:
            param.grad = None
        torch.autograd.backward(self.support_loss(self.model))

    def begin(self) -> list[Tensor]:
        """Gradients as they are once adaptation has begun.

        At the start half of LoRA's are zero, since one factor of each product is.
        """
        optimizer = torch.optim.AdamW(self.params, lr=1e-4, weight_decay=0)
        for _ in range(2):
            self.forward_backward()
            optimizer.step()
        self.forward_backward()
        return [param.grad.clone() for param in self.params if param.grad is not None]


def _random_model(shape: Shape, tune: Tune, eager: bool) -> Any:
    config = transformers.BertConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, intermediate_size=shape.intermediate,
        max_position_embeddings=shape.positions, num_labels=WAYS,
    )  # fmt: skip
    with seeded(0):
        model = transformers.AutoModelForSequenceClassification.from_config(
            config, attn_implementation="eager" if eager else "sdpa"
        ).eval()  # no dropout, as in adaptation
        if tune != "full":
            model.base_model.requires_grad_(False)
        if tune == "lora":
            add_lora(model.base_model, LORA_RANK)
    return model


# -- the clock


@dataclass(frozen=True)
class Timing:
    """Seconds of every repeat of one thing."""

    repeats: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.repeats)

    @property
    def quartiles(self) -> tuple[float, float]:
        return quartiles(self.repeats)

    def record(self) -> dict[str, Any]:
        return {"median": self.median, "quartiles": self.quartiles, "repeats": self.repeats}


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, method="inclusive")
    return first, third


def interleave(
    subjects: Mapping[str, Callable[[], object]], repeats: int, warm_ups: int = 2
) -> dict[str, Timing]:
    """Time A B C A B C ..., so that a machine that slows down slows down all of them.

    Args:
        subjects: by name, what to run.
        repeats: rounds that count.
        warm_ups: rounds before them; memory is first touched in those.

    Returns:
        The timing of each subject.
    """
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for round_number in range(warm_ups + repeats):
        for name, run in subjects.items():
            _wait()
            started = time.perf_counter()
            run()
            _wait()
            if round_number >= warm_ups:
                seconds[name].append(time.perf_counter() - started)
    return {name: Timing(values) for name, values in seconds.items()}


def _wait() -> None:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


# -- the report


@dataclass(frozen=True)
class Target:
    """A bound that a figure should keep."""

    limit: float
    at_most: bool = True

    def met(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.limit:g}"


@dataclass
class Report:
    """Figures beside their targets, and all that they were made from.

    Attributes:
        rows: one for each figure: its words, its value, its target and whether it is met.
        timings: by group and subject.
        data: whatever else was measured.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    timings: dict[str, dict[str, Any]] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)

    def add(
        self,
        figure: str,
        value: float | None,
        measured: str = MISSING,
        target: Target | None = None,
        **more: Any,
    ) -> None:
        """A row. A figure without value was not measured; `measured` says why."""
        self.rows.append(
            {
                "figure": figure,
                "value": value,
                "measured": measured,
                "target": None if target is None else str(target),
                "met": None if target is None or value is None else target.met(value),
                **more,
            }
        )

    def ratio(
        self,
        figure: str,
        above: Timing,
        below: Timing,
        target: Target | None = None,
        note: str = "",
    ) -> None:
        """A row with the ratio of two medians; the file has quartiles of the rounds' ratios."""
        value = above.median / below.median
        rounds = [a / b for a, b in zip(above.repeats, below.repeats)]
        words = f"{value:.3g}: {duration(above.median)} / {duration(below.median)}{note}"
        self.add(figure, value, words, target, quartiles=quartiles(rounds))

    def keep(self, group: str, timings: Mapping[str, Timing]) -> None:
        """Record a group of timings; a group may be added to."""
        records = {name: timing.record() for name, timing in timings.items()}
        self.timings.setdefault(group, {}).update(records)

    def table(self) -> str:
        """Markdown."""
        marks = {None: "", True: "", False: " **(missed)**"}
        lines = ["| figure | measured | target |", "|---|---|---|"]
        for row in self.rows:
            cells = (row["figure"], row["measured"] + marks[row["met"]], row["target"] or "")
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def write(self, path: str, settings: Mapping[str, Any]) -> None:
        """All of it as JSON."""
        content = {"machine": machine(), "settings": dict(settings), **asdict(self)}
        write_atomically(Path(path), (json.dumps(content, indent=1) + "\n").encode())


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def mebibytes(size: float) -> str:
    """Three digits or more, and a unit."""
    return f"{size / 2**20:,.0f} MiB"


def machine() -> dict[str, Any]:
    """What a figure depends on beside the code."""
    cuda = torch.cuda.is_available()
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def progress(message: str) -> None:
    """A line for who waits."""
    print(message, file=sys.stderr, flush=True)


def arguments(description: str, repeats: int) -> argparse.ArgumentParser:
    """The options that both scripts have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", required=True, metavar="OUT", help="where all figures go")
    parser.add_argument("--encoder", metavar="FOLDER", help="default: random weights, same shape")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="whose figures; auto: the CPU's, and a GPU's where there is one",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    return parser


def save(report: Report, options: argparse.Namespace) -> None:
    """Write the file with what has been measured so far."""
    report.write(options.json, {k: v for k, v in vars(options).items() if k in SETTINGS})


def finish(report: Report, options: argparse.Namespace) -> None:
    """Print the table, write the file."""
    print(report.table())
    save(report, options)
