"""Rules, AdamW at several rates and logistic regression on validation classes.

    python scripts/two_level/evaluate.py RUN/rule.safetensors --encoder MINILM --cache CACHE \
        --output results.jsonl --cells A C D --episodes 12 --steps 20

RUN/rule.safetensors is a rule that train.py wrote, one or more; MINILM the folder of
all-MiniLM-L6-v2, and CACHE what prepare.py filled. Cells are those of cells.py: capital letters
take six layers and small ones two, at a third of the time. AdamW (its defaults but for the rate) is
run at each of --rates, and logistic regression with C = 10 on the same frozen embeddings. --free
adds optimizers that claim to need no tuning, at their documented settings (Prodigy, Schedule-Free
AdamW, D-Adaptation; pip install "rnnopt[compare]"). All methods of a cell have the same episodes
and initial values. --without leaves parts of the rules out.

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
import multiprocessing
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cells import CELLS, CORE, Cell
from drawing import reading
from encoder import Encoder, read_encoder
from parts import PARTS, leave_out
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from tasks import Spec, TaskBatch, query_losses
from texts import Texts, read_texts
from torch import Tensor
from unroll import TrainedRule, adapt

from rnnopt.evaluation.baselines import BASELINES
from rnnopt.evaluation.statistics import interval, with_interval
from rnnopt.rules.files import rule_fingerprint
from rnnopt.tasks.adaptation import evaluation_point

JUDGED = (0, 1, 2, 3, 4, 5, 7, 10, 14, 20, 28, 40)  # numbers of steps
SHOWN = (0, 1, 2, 3, 5, 10, 20, 40)  # those in the tables
INVERSE_PENALTY = 10.0  # of logistic regression, whose features have length 1
LOGISTIC = "logistic regression"
FREE = ("prodigy", "schedulefree", "dadapt")

Curves = tuple[Tensor, Tensor]  # query losses and accuracies after steps of `JUDGED`, (J, B)


# AdamW's rates, by what trains
RATES = {
    "head": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "lora": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "full": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
}


def spec_of(cell: Cell, encoder: Encoder, options: argparse.Namespace) -> Spec:
    """The shape of a cell's tasks."""
    return Spec(
        encoder, cell.kind, cell.layers, cell.pooling, cell.head, cell.ways, cell.shots,
        queries=10 if cell.ways <= 5 else 5, length=cell.length, steps=options.steps,
        head_scale=10, batch=options.batch, label_noise=options.label_noise,
        words=cell.kind == "full" and not cell.pairs, pairs=cell.pairs,
    )  # fmt: skip


def adapt_by(make: Callable[[list[Tensor]], torch.optim.Optimizer], tasks: TaskBatch) -> Curves:
    """Any torch optimizer; where it steps another point than it shows, the latter is judged."""
    params = [param.clone().requires_grad_() for param in tasks.start]
    optimizer = make(params)
    losses, accuracies = [], []
    for step in range(tasks.spec.steps + 1):
        if step:
            grads = torch.autograd.grad(tasks.support_loss(params), params)
            for param, grad in zip(params, grads):
                param.grad = grad
            optimizer.step()
        if step not in JUDGED:
            continue
        with torch.no_grad(), evaluation_point(optimizer):
            loss, _, correct = tasks.query_losses(params)
        losses.append(loss)
        accuracies.append(correct)
    return torch.stack(losses), torch.stack(accuracies)


def free(name: str, params: list[Tensor]) -> torch.optim.Optimizer:
    """A baseline of `FREE` as `rnnopt compare` runs it."""
    baseline = BASELINES[name]
    named = {str(number): param for number, param in enumerate(params)}
    return baseline.build(None, named, *baseline.grid, 0)  # type: ignore[arg-type]


def logistic(tasks: TaskBatch) -> Curves:
    """Logistic regression on the frozen embeddings, the same at every step."""
    with torch.no_grad():
        features = [tasks.inputs, tasks.query_inputs]
        if tasks.spec.kind != "head":
            trained, masks = tasks.named(tasks.start), (tasks.mask, tasks.query_mask)
            features = [tasks.features(trained, *each) for each in zip(features, masks)]
            features = [F.normalize(x, dim=-1) for x in features]
    logits = torch.full((*tasks.query_labels.shape, tasks.spec.ways), -1e4)
    for task in range(tasks.size):
        model = LogisticRegression(C=INVERSE_PENALTY, max_iter=1000)
        support, query = (x[task].cpu().numpy() for x in features)
        model.fit(support, tasks.labels[task].cpu().numpy())
        found = torch.from_numpy(model.predict_log_proba(query)).to(logits)
        logits[task][:, torch.tensor(model.classes_)] = found
    loss = query_losses(logits, tasks.query_labels)[0]
    accuracy = (logits.argmax(-1) == tasks.query_labels).float().mean(1)
    count = sum(step <= tasks.spec.steps for step in JUDGED)
    return loss.expand(count, -1), accuracy.expand(count, -1)


def read_rule(path: Path, without: Sequence[str] = ()) -> TrainedRule:
    """A rule of train.py, or any file of its weights alone.

    Args:
        path: the file.
        without: those of `PARTS` that are left out.
    """
    weights = load_file(path, device=str(torch.get_default_device()))
    rule = TrainedRule(coordinate_units=len(weights.get("candidate.weight", ())))
    rule.load_state_dict(weights)
    rule.requires_grad_(False)
    leave_out(rule, without)
    return rule


def methods(options: argparse.Namespace, kind: str) -> dict[str, Callable[[TaskBatch], Curves]]:
    """What is compared, by name; `kind` is what trains."""
    found: dict[str, Callable[[TaskBatch], Curves]] = {}
    left_out = "".join(f", without {part}" for part in options.without)
    for path in options.rules:
        rule = read_rule(path, options.without)
        scaled = "" if options.lr == 1 else f" at lr {options.lr:g}"
        found[f"{path.name} {rule_fingerprint(rule)}{left_out}{scaled}"] = partial(
            adapt, rule, judged=JUDGED, lr=options.lr
        )
    for rate in RATES[kind] if options.rates is None else options.rates:
        found[f"AdamW at {rate:g}"] = partial(adapt_by, partial(torch.optim.AdamW, lr=rate))
    for name in FREE if options.free else ():
        found[name] = partial(adapt_by, partial(free, name))
    return {**found, LOGISTIC: logistic}


def episodes(cell: Cell, spec: Spec, texts: Texts, count: int, together: bool) -> list[TaskBatch]:
    """The cell's tasks, the same for every method; in one batch if `together`, as a GPU likes."""
    drawn = []
    for number in range(count):
        rng = random.Random(7000 + number)
        drawn.append(texts.draw(rng, cell.ways, cell.shots, spec.queries, cell.source))
    if together:
        return [TaskBatch(texts, spec, drawn, 50)]
    return [TaskBatch(texts, spec, [own], 50 + number) for number, own in enumerate(drawn)]


def run(method: Callable[[TaskBatch], Curves], tasks: Sequence[TaskBatch]) -> dict[str, Any]:
    """A method's figures, (J, episodes) each."""
    curves = []
    for number, task in enumerate(tasks):
        task.restart(number)
        curves.append(method(task))
    loss, accuracy = (torch.cat([curve[i] for curve in curves], 1) for i in (0, 1))
    figures = {"loss": loss.tolist(), "accuracy": accuracy.tolist()}
    return {name: [[round(x, 5) for x in at] for at in found] for name, found in figures.items()}


def row(name: str, figures: dict[str, Any]) -> str:
    """A line of the table: accuracies, then losses, with their intervals."""
    cells = [name]
    for metric, digits in (("accuracy", 3), ("loss", 2)):
        values = np.array(figures[metric])
        for found in (interval(x) for step, x in zip(JUDGED, values) if step in SHOWN):
            cells.append(with_interval(found, digits))
    return f"| {' | '.join(cells)} |"


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = reading(__doc__)
    add = parser.add_argument
    add("rules", nargs="*", type=Path, help="rule files")
    add("--output", type=Path, required=True, help="file of the figures, JSON lines")
    add("--cells", nargs="+", choices=[*CELLS, "core"], default=["A", "B", "C", "D"],
        metavar="CELL", help="core: all cells whose name begins so")  # fmt: skip
    add("--split", choices=("val", "test"), default="val", help="of the classes (default: val)")
    add("--episodes", type=int, default=12)
    add("--steps", type=int, default=10)
    add("--rates", nargs="*", type=float, help="of AdamW (default: five, by what trains)")
    add("--lr", type=float, default=1.0, help="factor on the rules' updates (default: 1)")
    add("--free", action="store_true", help="also optimizers that need no tuning")
    add("--batch", type=int, help="texts of a minibatch (default: all)")
    add("--label-noise", type=float, default=0.0, help="share of support labels drawn anew")
    add("--without", nargs="*", choices=PARTS, default=[], help="parts of the rules to leave out")
    add("--device", default="cpu", help="cpu (the default) or cuda, with all episodes at once")
    add("--processes", type=int, default=1, help="that share the cells (default: 1)")
    return parser.parse_args(words)


def figures_of(options: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """The figures of all methods in a cell; those that --output has are taken from there."""
    torch.set_num_threads(1)
    torch.set_default_device(options.device)
    if options.device != "cpu":
        torch.set_float32_matmul_precision("high")
    path, encoder = options.cache / f"{options.split}.safetensors", read_encoder(options.encoder)
    texts = read_texts(path)
    cell = CELLS[name]
    if name in CORE:  # as many ways as the split's classes allow
        cell = cell._replace(ways=min(cell.ways, len(texts.sources.get(cell.source, ()))))
    if not cell.ways:
        print(f"{path} has no {cell.source}: {name} is left out", file=sys.stderr)
        return []
    settings = {
        key: getattr(options, key) for key in ("split", "episodes", "steps", "batch", "label_noise")
    }
    lines = options.output.read_text().splitlines() if options.output.exists() else []
    done, tasks = [json.loads(line) for line in lines], list[TaskBatch]()
    figures = []
    for method, curves in methods(options, cell.kind).items():
        what = {"cell": name, "ways": cell.ways, "method": method, **settings}
        found = next((entry for entry in done if what.items() <= entry.items()), None)
        if found is None:
            spec = spec_of(cell, encoder, options)
            gpu = options.device != "cpu"
            tasks = tasks or episodes(cell, spec, texts, options.episodes, together=gpu)
            found = {**what, **run(curves, tasks)}
            with open(options.output, "a") as file:
                file.write(json.dumps(found) + "\n")
        figures.append(found)
    return figures


def main(words: Sequence[str] | None = None) -> None:
    """Run what is missing and print the tables."""
    options = arguments(words)
    cells = [c for name in options.cells for c in (CORE if name == "core" else [name])]
    shown = [step for step in SHOWN if step <= options.steps]
    heads = [f"{metric}, {step} steps" for metric in ("accuracy", "loss") for step in shown]
    with ExitStack() as stack:
        ran: Iterator[list[dict[str, Any]]] = map(partial(figures_of, options), cells)
        if options.processes > 1:
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(context.Pool(options.processes, maxtasksperchild=4))
            ran = pool.imap(partial(figures_of, options), cells, chunksize=1)
        for name, figures in zip(cells, ran):
            print(
                f"\n| {name}: {CELLS[name]} | {' | '.join(heads)} |\n|{'---|' * (1 + len(heads))}"
            )
            for found in figures:
                print(row(found["method"], found), flush=True)


if __name__ == "__main__":
    main()
