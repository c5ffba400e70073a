"""Small adapters, small states, a pruned encoder, 8-bit weights: what accuracy costs in bytes.

    python examples/fields/compression.py --data clinc150 --encoder all-MiniLM-L6-v2 --output out

DATA holds train, val and test (.jsonl or .jsonl.gz) of different classes. LoRA factors in the top
layer and an output layer, which begins at the class means, adapt to five classes from five texts
each, in ten steps. That is done with the whole encoder and with every other layer of it, with each
of --ranks, with the shipped rule, and AdamW at the rate that is best on
validation classes. Each has its state in float32 or bfloat16, and in 8 bits; AdamW of bitsandbytes
is a further row where that is installed. Afterwards all matrices of the adapted model are rounded
to 8 bits with a scale for each row. About 10 minutes on two cores.
"""

from __future__ import annotations

import copy
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from field import Options, command
from language import find
from torch import nn
from transformers import AutoModel, AutoTokenizer

import rnnopt
from rnnopt.cli.progress import progress_bar
from rnnopt.data.files import read_corpus
from rnnopt.evaluation.statistics import interval, with_interval
from rnnopt.rules.files import SHIPPED_RULE, rule_name
from rnnopt.storage.files import write_atomically
from rnnopt.tasks.episodes import EpisodeSampler
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.encoder.loading import find_folder, silence
from rnnopt.tasks.text.start import TextStart
from rnnopt.tasks.text.tasks import LabelledTexts, TextTasks, judge

WAYS, SHOTS, QUERY, STEPS = 5, 5, 10, 10
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
MORE = {
    "encoder": {"required": True, "help": "a folder, or a name on the Hugging Face hub"},
    "ranks": {"default": [1, 4], "nargs": "+", "type": int, "help": "of LoRA [1 4]"},
}
Build = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
COLUMNS = ("accuracy", "8-bit accuracy")
BLOCK = 64  # numbers of a state in 8 bits that share a scale; fewer stay as they are
DECADES = 7  # from the largest magnitude of a block to the smallest that is not 0
IN_8_BITS = ", 8-bit state"


def pruned(encoder: str, folder: Path) -> Path:
    """The folder of the encoder with every other layer, as DistilBERT begins (arXiv:1910.01108)."""
    with silence():
        model = AutoModel.from_pretrained(find_folder(encoder), use_safetensors=True)
        try:
            layers = model.encoder.layer
        except AttributeError as error:
            raise rnnopt.InputError(
                f"{encoder} is a {model.config.model_type} model, whose layers are not at "
                "encoder.layer; choose a BERT-like encoder"
            ) from error
        model.encoder.layer = nn.ModuleList(layers[::2])
        model.config.num_hidden_layers = len(model.encoder.layer)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(find_folder(encoder)).save_pretrained(folder)
    return folder


@torch.no_grad()
def in_8_bits(module: nn.Module) -> nn.Module:
    """A copy whose matrices are rounded to 255 levels, with a scale for each row."""
    made = copy.deepcopy(module)
    for param in made.parameters():
        if param.dim() == 2:
            scale = param.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
            param.copy_((param / scale).round() * scale)
    return made


def bytes_of(module: nn.Module) -> tuple[int, int]:
    """The bytes of a module's parameters, in float32 and with matrices in 8 bits."""
    params = list(module.parameters())
    whole = sum(4 * param.numel() for param in params)
    small = sum(
        param.numel() + 4 * len(param) if param.dim() == 2 else 4 * param.numel()
        for param in params
    )
    return whole, small


def rounded_to_8_bits(values: torch.Tensor) -> torch.Tensor:
    """Values as a sign and one of 127 magnitudes, or 0, in blocks that share a scale.

    The magnitudes are in equal ratios, from the largest of the block over `DECADES` decades, as
    second moments need (Dettmers et al. 2022, arXiv:2110.02861). The relative error is below 7 %.
    """
    flat = nn.functional.pad(values.flatten().float(), (0, -values.numel() % BLOCK))
    blocks = flat.view(-1, BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
    level = ((blocks.abs() / scale).log10() * (126 / DECADES)).round()  # 0 to -126
    made = torch.where(level < -126, 0, 10 ** (level * (DECADES / 126))) * scale * blocks.sign()
    return made.flatten()[: values.numel()].view_as(values).to(values.dtype)


def large(leaf: Any) -> bool:
    """Whether a leaf of a state is kept in 8 bits."""
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.numel() >= BLOCK


def with_8_bit_state(build: Build) -> Build:
    """An optimizer whose state is rounded to 8 bits after each step."""

    @torch.no_grad()
    def round_state(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for state in optimizer.state.values():
            for leaf in filter(large, state.values()):
                leaf.copy_(rounded_to_8_bits(leaf))

    def built(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = build(params)
        optimizer.register_step_post_hook(round_state)
        return optimizer

    return built


def state_bytes(optimizer: torch.optim.Optimizer, small: bool = False) -> int:
    """The bytes of the tensors that an optimizer keeps, with the large in 8 bits if `small`."""
    every = [leaf for state in optimizer.state.values() for leaf in state.values()]
    leaves = {id(leaf): leaf for leaf in every}.values()  # some are shared
    return sum(
        leaf.numel() + 4 * -(-leaf.numel() // BLOCK)
        if small and large(leaf)
        else leaf.numel() * leaf.element_size()
        for leaf in leaves
        if isinstance(leaf, torch.Tensor)
    )


def adapted(
    tasks: TextTasks, build: Build, count: int, tick: Callable[[], Any], rounded: bool = True
) -> dict[str, Any]:
    """Accuracies on so many tasks, and the bytes of state and adapter."""
    classifier, found = tasks.classifier, {column: [] for column in COLUMNS}
    for number in range(count):
        task, episode = tasks.load(number), tasks.sampler.sample(number)
        TextStart(head="prototype").begin(classifier, task, number)
        params = [param for _, param in classifier.trainable()]
        optimizer = build(params)
        for step in range(STEPS):
            optimizer.zero_grad()
            task.support_loss(classifier.module, step).backward()
            optimizer.step()
        found["accuracy"].append(task.scores(classifier.module)["accuracy"])
        if rounded:
            texts = [tasks.sampler.corpus.texts[i] for i in episode.query]
            plain = LabelledTexts.read(classifier, texts, episode.query_labels, again=False)
            small = in_8_bits(classifier.module)
            found["8-bit accuracy"].append(judge(classifier, plain, small)["accuracy"])
        tick()
    return {
        **found,
        "state": state_bytes(optimizer),
        "8-bit state": state_bytes(optimizer, small=True),
        "adapter": sum(4 * param.numel() for param in params),
    }


def main(options: Options) -> None:
    """Adapt every variant."""
    corpora = {stem: read_corpus(find(options.data, stem)) for stem in ("val", "test")}
    encoder, ranks = options.more["encoder"], options.more["ranks"]
    encoders = {"whole": encoder, "every other layer": pruned(encoder, options.output / "pruned")}
    rules = {
        "shipped rule": lambda params: rnnopt.LearnedOptimizer(params),
    }
    tuned = {"AdamW": adamw}
    if find_spec("bitsandbytes"):
        tuned["AdamW8bit of bitsandbytes"] = adamw_of_bitsandbytes
    tuning, rates = max(2, options.episodes // 3), RATES[:2] if options.small else RATES
    runs = (2 * len(rules) + 1 + len(tuned)) * options.episodes + len(tuned) * len(rates) * tuning
    rows: list[dict[str, Any]] = []
    with progress_bar("adapt", len(encoders) * len(ranks) * runs) as bar:
        for name, folder in encoders.items():
            for rank in ranks:
                classifier = Classifier.load(
                    folder, tune="lora", lora_rank=rank, top_layers=1, pooling="mean", ways=WAYS,
                    max_length=48, device=torch.device("cpu"), seed=options.seed,
                )  # fmt: skip
                val, test = (
                    TextTasks(
                        EpisodeSampler(
                            corpora[stem], ways=WAYS, shots=SHOTS, queries=QUERY, seed=options.seed
                        ),
                        classifier,
                    )
                    for stem in ("val", "test")
                )
                methods = dict(rules)
                for method, of_rate in tuned.items():
                    best = best_rate(val, of_rate, rates, tuning, bar.advance)
                    methods[f"{method} at {best:g}"] = of_rate(best)
                whole, small = bytes_of(classifier.module)
                about = {"encoder": name, "rank": rank, "model": whole, "8-bit model": small}
                about["ms a text"] = milliseconds(test)
                for method, build in methods.items():
                    found = adapted(test, build, options.episodes, bar.advance)
                    rows.append({**about, "method": method, **found})
                    if method.startswith("AdamW8bit"):
                        continue
                    small_state = with_8_bit_state(build)
                    found = adapted(test, small_state, options.episodes, bar.advance)
                    found["state"] = found["8-bit state"]
                    rows.append({**about, "method": method.split(", ")[0] + IN_8_BITS, **found})
    write(rows, options)


def best_rate(
    tasks: TextTasks, of_rate: Callable[[float], Build], rates: Sequence[float], count: int,
    tick: Callable[[], Any],
) -> float:  # fmt: skip
    """The rate with the highest mean accuracy on so many tasks."""
    scores = {
        rate: np.mean(adapted(tasks, of_rate(rate), count, tick, rounded=False)["accuracy"])
        for rate in rates
    }
    return max(scores, key=scores.__getitem__)


def adamw(rate: float) -> Build:
    """AdamW at a rate."""
    return lambda params: torch.optim.AdamW(params, lr=rate)


def adamw_of_bitsandbytes(rate: float) -> Build:
    """AdamW of bitsandbytes at a rate, with moments in 8 bits (arXiv:2110.02861)."""
    from bitsandbytes.optim import AdamW8bit

    return lambda params: AdamW8bit(params, lr=rate, min_8bit_size=BLOCK)


@torch.no_grad()
def milliseconds(tasks: TextTasks) -> float:
    """The time of one text in a forward pass of all layers."""
    episode = tasks.sampler.sample(0)
    texts = [tasks.sampler.corpus.texts[i] for i in episode.query]
    plain = LabelledTexts.read(tasks.classifier, texts, episode.query_labels, again=False)
    tasks.classifier.reset(WAYS, 0)
    judge(tasks.classifier, plain)  # the first pass also allocates
    started = time.perf_counter()
    judge(tasks.classifier, plain)
    return 1000 * (time.perf_counter() - started) / len(texts)


def write(rows: list[dict[str, Any]], options: Options) -> None:
    """Write compression.json, compression.md and compression.png."""
    lines = [
        "| encoder | rank | method | accuracy | minus AdamW, paired | with 8-bit weights "
        "| state, bytes | adapter, bytes | model, MB | 8-bit model, MB | ms a text |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        (other,) = (
            one
            for one in rows
            if one["method"].startswith("AdamW at")
            and IN_8_BITS not in one["method"]
            and all(one[key] == row[key] for key in ("encoder", "rank"))
        )
        figures = [np.array(row[column]) for column in COLUMNS]
        shown = [figures[0], figures[0] - other["accuracy"], figures[1]]
        cells = [with_interval(interval(one)) for one in shown]
        sizes = f"{row['state']:,} | {row['adapter']:,} | {row['model'] / 1e6:.1f}"
        lines.append(
            f"| {row['encoder']} | {row['rank']} | {row['method']} | {' | '.join(cells)} | {sizes} "
            f"| {row['8-bit model'] / 1e6:.1f} | {row['ms a text']:.1f} |"
        )
    text = "\n".join(lines) + "\n"
    if options.small:
        text = f"These figures mean nothing: they are of --small.\n\n{text}"
    about = {"options": asdict(options), "rule": rule_name(rnnopt.load_rule(SHIPPED_RULE))}
    content = json.dumps({**about, "rows": rows}, indent=1, default=str)
    write_atomically(options.output / "compression.json", content.encode())
    write_atomically(options.output / "compression.md", text.encode())
    print(text)
    draw(rows, options.output / "compression.png")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against the bytes of model, adapter and state together."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    kinds = [re.sub(r" at [\d.e-]+", "", row["method"]) for row in rows]
    for method in dict.fromkeys(kinds):
        mine = [row for row, kind in zip(rows, kinds) if kind == method]
        points = sorted(
            (row[size] + row["adapter"] + row["state"], float(np.mean(row[column])))
            for row in mine
            for size, column in (("model", "accuracy"), ("8-bit model", "8-bit accuracy"))
        )
        axes.plot(*zip(*points), "o-", label=method)
    axes.set(xlabel="bytes of model, adapter and state", ylabel="accuracy", xscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(command(__doc__, main, meta_steps=0, episodes=24, more=MORE))
