"""Rules, AdamW at several rates and logistic regression on validation classes.

    python scripts/two_level/evaluate.py RUN/rule.safetensors --encoder MINILM --cache CACHE \
        --output results.jsonl --cells A C D --episodes 12 --steps 20

RUN/rule.safetensors is a rule that train.py wrote, one or more; MINILM the folder of
all-MiniLM-L6-v2, and CACHE what prepare.py filled. Cells are those of `CELLS`: capital letters take
six layers and small ones two, at a third of the time. AdamW (its defaults but for the rate) is run
at each of --rates, and logistic regression with C = 10 on the same frozen embeddings. All methods
of a cell have the same episodes and initial values. --without leaves parts of the rules out.

--output gets a JSON object for each cell and method with the figures of every episode, and what it
has with the same settings is not run again: more cells and rules go into the same file.

Prints a Markdown table for each cell: accuracy and query loss (nats) at some numbers of steps,
with 95 % intervals over the episodes.
Time: with 12 episodes of 20 steps on one core, for each method, 20 s for heads, 1 minute for LoRA
of two layers, 5 minutes for LoRA of six. Memory: 2 GiB.
Last line: logistic regression's row of the last cell.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from encoder import Encoder, read_encoder
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from tasks import Spec, TaskBatch, query_losses
from texts import Texts, read_texts
from torch import Tensor
from unroll import TrainedRule, adapt

from rnnopt.evaluation.statistics import interval
from rnnopt.rules.files import rule_fingerprint
from rnnopt.rules.two_level import Decisions

SHOWN = (0, 1, 2, 3, 5, 10, 20, 40)  # numbers of steps
INVERSE_PENALTY = 10.0  # of logistic regression, whose features have length 1
LOGISTIC = "logistic regression"
PARTS = ("coordinate-lstm", "message", "memory")

Curves = tuple[Tensor, Tensor]  # query losses and accuracies by the number of steps, (T + 1, B)


class Cell(NamedTuple):
    """A setting."""

    source: str
    ways: int
    shots: int
    kind: str
    layers: int
    pooling: str
    head: str
    length: int = 24

    def __str__(self) -> str:
        layers = f", {self.layers} layers" if self.kind != "head" else ""
        task = f"{self.source}, {self.ways}-way {self.shots}-shot"
        return f"{task}, {self.kind}{layers}, pooling {self.pooling}, {self.head} head"


_INTENTS, _TYPES, _HEADLINES = ("clinc150", 10, 5), ("trec28", 5, 5), ("huffpost36", 5, 5)
_TITLES, _ONE_SHOT = ("stackoverflow20", 4, 5), ("clinc150", 5, 1)
_MEAN, _CLS = ("unit", "prototype"), ("cls", "random")
CELLS = {
    "A": Cell(*_INTENTS, "lora", 6, *_MEAN),
    "B": Cell(*_INTENTS, "lora", 6, *_CLS),
    "C": Cell(*_TYPES, "lora", 6, *_MEAN),
    "D": Cell(*_HEADLINES, "lora", 6, *_MEAN),
    "E": Cell(*_TITLES, "lora", 6, *_MEAN),
    "F": Cell(*_INTENTS, "full", 6, *_MEAN),
    "G": Cell(*_INTENTS, "full", 6, *_CLS),
    "H": Cell(*_INTENTS, "head", 1, *_MEAN),
    "I": Cell(*_ONE_SHOT, "lora", 6, *_MEAN),
    "J": Cell(*_TYPES, "lora", 6, *_CLS),
    "K": Cell("amazon16_partial", 2, 5, "lora", 6, *_MEAN, length=96),
    "L": Cell(*_INTENTS, "head", 1, *_CLS),
    "M": Cell(*_TYPES, "full", 6, *_MEAN),
    "N": Cell(*_HEADLINES, "lora", 6, "unit", "logistic"),
    "O": Cell(*_HEADLINES, "lora", 6, *_CLS),
    "P": Cell(*_TITLES, "lora", 6, *_CLS),
    "Q": Cell(*_HEADLINES, "full", 6, *_MEAN),
    "R": Cell(*_TYPES, "head", 1, *_MEAN),
    "S": Cell(*_ONE_SHOT, "lora", 6, *_CLS),
    "T": Cell("huffpost36", 5, 1, "lora", 6, *_MEAN),
}
CELLS |= {name.lower(): CELLS[name]._replace(layers=2) for name in "ABCDEIJO"}
CELLS |= {
    "f": Cell("clinc150", 5, 5, "full", 2, *_MEAN),
    "g": Cell("clinc150", 5, 5, "full", 2, *_CLS),
    "m": Cell(*_TYPES, "full", 2, *_MEAN),
    "x": Cell("clinc150", 5, 5, "lora", 2, *_CLS),
}


def spec_of(cell: Cell, encoder: Encoder, options: argparse.Namespace) -> Spec:
    """The shape of a cell's tasks."""
    return Spec(
        encoder, cell.kind, cell.layers, cell.pooling, cell.head, cell.ways, cell.shots,
        queries=10 if cell.ways <= 5 else 5, length=cell.length, steps=options.steps,
        head_scale=10, batch=options.batch, label_noise=options.label_noise,
        words=cell.kind == "full",
    )  # fmt: skip


def adamw(rate: float, tasks: TaskBatch) -> Curves:
    """AdamW with PyTorch's defaults but for the rate."""
    params = [param.clone().requires_grad_() for param in tasks.start]
    optimizer = torch.optim.AdamW(params, rate)
    losses, accuracies = [], []
    for step in range(tasks.spec.steps + 1):
        if step:
            grads = torch.autograd.grad(tasks.support_loss(params), params)
            for param, grad in zip(params, grads):
                param.grad = grad
            optimizer.step()
        with torch.no_grad():
            logits = tasks.query_logits(params)
        losses.append(query_losses(logits, tasks.query_labels)[0])
        accuracies.append((logits.argmax(-1) == tasks.query_labels).float().mean(1))
    return torch.stack(losses), torch.stack(accuracies)


def logistic(tasks: TaskBatch) -> Curves:
    """Logistic regression on the frozen embeddings of one task, the same at every step."""
    with torch.no_grad():
        features = [tasks.inputs, tasks.query_inputs]
        if tasks.spec.kind != "head":
            trained, masks = tasks.named(tasks.start), (tasks.mask, tasks.query_mask)
            features = [tasks.features(trained, *each) for each in zip(features, masks)]
            features = [F.normalize(x, dim=-1) for x in features]
    model = LogisticRegression(C=INVERSE_PENALTY, max_iter=1000)
    model.fit(features[0][0].numpy(), tasks.labels[0].numpy())
    logits = torch.full((1, tasks.query_labels.shape[1], tasks.spec.ways), -1e4)
    found = torch.from_numpy(model.predict_log_proba(features[1][0].numpy())).float()
    logits[0, :, torch.from_numpy(model.classes_)] = found
    loss = query_losses(logits, tasks.query_labels)[0]
    accuracy = (logits.argmax(-1) == tasks.query_labels).float().mean(1)
    steps = tasks.spec.steps + 1
    return loss.expand(steps, -1), accuracy.expand(steps, -1)


def read_rule(path: Path, without: Sequence[str] = ()) -> TrainedRule:
    """A rule of train.py, or any file of its weights alone.

    Args:
        path: the file.
        without: those of `PARTS` that are left out, by weights that are set to zero.
    """
    weights = load_file(path)
    rule = TrainedRule(coordinate_units=len(weights.get("candidate.weight", ())))
    rule.load_state_dict(weights)
    rule.requires_grad_(False)
    if "coordinate-lstm" in without:
        index = Decisions._fields.index("cell")
        rule.output.weight[index], rule.output.bias[index] = 0, 0
    if "message" in without:
        rule.message.weight.zero_()
        rule.message.bias.zero_()
    if "memory" in without:
        rule.tensor_cell.weight_hh.zero_()
    return rule


def methods(options: argparse.Namespace) -> dict[str, Callable[[TaskBatch], Curves]]:
    """What is compared, by name."""
    found: dict[str, Callable[[TaskBatch], Curves]] = {}
    left_out = "".join(f", without {part}" for part in options.without)
    for path in options.rules:
        rule = read_rule(path, options.without)
        found[f"{path.name} {rule_fingerprint(rule)}{left_out}"] = partial(adapt, rule)
    for rate in options.rates:
        found[f"AdamW at {rate:g}"] = partial(adamw, rate)
    return {**found, LOGISTIC: logistic}


def episodes(cell: Cell, spec: Spec, texts: Texts, count: int) -> list[TaskBatch]:
    """The cell's tasks, the same for every method."""
    made = []
    for number in range(count):
        rng = random.Random(7000 + number)
        episode = texts.draw(rng, cell.ways, cell.shots, spec.queries, cell.source)
        made.append(TaskBatch(texts, spec, [episode], 50 + number))
    return made


def run(method: Callable[[TaskBatch], Curves], tasks: Sequence[TaskBatch]) -> dict[str, Any]:
    """A method's figures, (T + 1, episodes) each."""
    curves = []
    for number, task in enumerate(tasks):
        task.restart(number)
        curves.append(method(task))
    loss, accuracy = (torch.cat([curve[i] for curve in curves], 1).tolist() for i in (0, 1))
    return {"loss": loss, "accuracy": accuracy}


def row(name: str, figures: dict[str, Any]) -> str:
    """A line of the table: accuracies, then losses, with their intervals."""
    cells = [name]
    for metric, digits in (("accuracy", 3), ("loss", 2)):
        values = np.array(figures[metric])
        for step in (step for step in SHOWN if step < len(values)):
            found = interval(values[step])
            cells.append(f"{found['mean']:.{digits}f} ± {found['ci95']:.{digits}f}")
    return f"| {' | '.join(cells)} |"


def main(words: Sequence[str] | None = None) -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("rules", nargs="*", type=Path, help="rule files")
    add("--encoder", type=Path, required=True, help="folder of all-MiniLM-L6-v2")
    add("--cache", type=Path, required=True, help="folder that prepare.py filled")
    add("--output", type=Path, required=True, help="file of the figures, JSON lines")
    add("--cells", nargs="+", choices=CELLS, default=["A", "B", "C", "D"], metavar="CELL")
    add("--episodes", type=int, default=12)
    add("--steps", type=int, default=10)
    add("--rates", nargs="*", type=float, default=[1e-3, 3e-3, 1e-2, 3e-2], help="of AdamW")
    add("--batch", type=int, help="texts of a minibatch (default: all)")
    add("--label-noise", type=float, default=0.0, help="share of support labels drawn anew")
    add("--without", nargs="*", choices=PARTS, default=[], help="parts of the rules to leave out")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    texts, encoder = read_texts(options.cache / "val.safetensors"), read_encoder(options.encoder)
    settings = {
        name: getattr(options, name) for name in ("episodes", "steps", "batch", "label_noise")
    }
    lines = options.output.read_text().splitlines() if options.output.exists() else []
    done = [json.loads(line) for line in lines]
    for letter in options.cells:
        cell, tasks = CELLS[letter], list[TaskBatch]()
        shown = [step for step in SHOWN if step <= options.steps]
        heads = [f"{metric}, {step} steps" for metric in ("accuracy", "loss") for step in shown]
        print(f"\n| {letter}: {cell} | {' | '.join(heads)} |\n|{'---|' * (1 + len(heads))}")
        for name, method in methods(options).items():
            what = {"cell": letter, "method": name, **settings}
            found = next((entry for entry in done if what.items() <= entry.items()), None)
            if found is None:
                tasks = tasks or episodes(
                    cell, spec_of(cell, encoder, options), texts, options.episodes
                )
                found = {**what, **run(method, tasks)}
                with open(options.output, "a") as file:
                    print(json.dumps(found), file=file)
            print(row(name, found), flush=True)


if __name__ == "__main__":
    main()
