"""Find factors on the rule's steps that do better, and teach the rule to take them by itself.

    python scripts/two_level/improve.py --encoder MINILM --cache CACHE --output RUN \
        --resume scripts/two_level/checkpoint.safetensors

The meta-gradient of a task is noisy, and moves a rule slowly out of a habit that all tasks share:
in heads that begin at random, of steps that are several times too long. This goes on in two parts.
First, for each kind of task, it runs the rule with its steps multiplied by factors, one for the
head at the first step, one for the head later, and one for all else, and keeps those with the
lowest meta-loss on training tasks. Then it trains the tensor-wise LSTM to decide by itself what the
rule decides with these factors, on tasks of all kinds that the LSTM in training runs through (Ross
et al. 2011, arXiv:1011.0686). Training goes on from RUN with `train.py --resume RUN`.

RUN/factors.json gets the factors. With it there, the first part is left out: factors of one's own
are {"lora cls cold all texts": {"first": 0.8, "later": 0.3, "body": 1.0}}, see `KINDS`.
Time: 20 minutes of a core for each part. Last line: where the state was written.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from curriculum import CPU, Drawn, draw
from encoder import Encoder
from tasks import TaskBatch
from texts import Texts
from torch import Tensor
from train import STATE_FILE, Draw, MetaTraining, drawing, material
from unroll import (
    TrainedRule,
    gradients,
    initial_states,
    measure,
    meta_loss_of,
    move,
    tensor_leaves,
)

from rnnopt.rules.two_level import LOG_RATE_BOUND, Decisions, TwoLevelLSTM
from rnnopt.storage.files import write_atomically

RATE, GROWTH = (Decisions._fields.index(name) for name in ("rate", "growth"))
# in the context, which has no rows and columns
LAST_RATE = len(Decisions._fields) + TwoLevelLSTM.leaves.index("last_rate") - 2
TRIED = {  # one after the other, each with the best of those before
    "later": (0.15, 0.35, 2.0),
    "first": (0.5, 2.0),
    "body": (0.5, 2.0),
}
MOST_STEPS = 16
JUDGED = (1, 2, 3, 5, 10)  # numbers of steps besides the last
# Tasks as users have them: of the encoder itself, two or three layers. Without second order they
# take little memory. The curriculum's are mostly smaller, and a head may grow faster in them.
USUAL = CPU._replace(depths=(0.1, 0.5, 0.4), whole=0.0, tasks=3, gigabytes=12.0)
# Of the batches by which the rule is taught: as users have them, and of kinds with factors.
OF_USUAL, ASKED = 0.8, 0.6
META_LR, LAST_META_LR = 6e-3, 4e-4
COORDINATES = 0.1  # weight of what the coordinate-wise LSTM is told


class Factors(NamedTuple):
    """On what the rule does to the head at the first step and later, and to all else."""

    first: float = 1.0
    later: float = 1.0
    body: float = 1.0

    def of(self, tasks: TaskBatch, step: int) -> Tensor:
        """For each tensor, in the order of `tasks.alike`, (P,)."""
        head = self.first if step == 1 else self.later
        names = [tasks.names[i] for group in tasks.alike for i in group]
        return torch.tensor([head if name.startswith("head") else self.body for name in names])


def kind_of(drawn: Drawn) -> str:
    """The kind of task that has factors of its own."""
    spec = drawn.spec
    if spec.pairs:
        return f"{spec.kind} pairs"
    start = "cold" if spec.head in ("random", "zero") else "warm"
    pooling = "cls" if spec.pooling == "cls" else "mean"
    return f"{spec.kind} {pooling} {start} {'minibatches' if spec.batch else 'all texts'}"


KINDS = [
    *(f"{kind} {start} {batch}" for batch in ("all texts", "minibatches")
      for kind in ("lora", "full", "head") for start in ("cls cold", "mean warm", "mean cold")),
    "lora pairs", "full pairs",
]  # fmt: skip


def multiplied(context: Tensor, factors: Tensor) -> Tensor:
    """What tensors do, with their steps and growth multiplied; (..., P, K) and (P,)."""
    columns = torch.ones(context.shape[-1], len(factors))
    columns[[RATE, GROWTH, LAST_RATE]] = factors
    return context * columns.T


def meta_loss(rule: TrainedRule, tasks: TaskBatch, factors: Factors) -> Tensor:
    """The weighted query losses with these factors, the mean over tasks, 0-d; for `no_grad`."""
    params, states = list(tasks.start), initial_states(rule, tasks)
    steps = tasks.spec.steps
    judged = [step for step in JUDGED if step < steps]
    weights = {step: 0.6 * step / sum(judged) for step in judged} | {steps: 0.4}
    total = torch.zeros(())
    lowest = tasks.query_losses(params)[0]
    for step in range(1, steps + 1):
        leaves = [x.detach().requires_grad_() for x in params]
        with torch.enable_grad():
            grads = gradients(tasks, leaves, create_graph=False)
        measured = measure(rule, tasks, params, grads, states)
        context = rule.cross_tensor_context(measured.statistics, tensor_leaves(states))
        context = multiplied(context, factors.of(tasks, step))
        updates, states = move(rule, tasks, measured, states, context)
        params = [param + update for param, update in zip(params, updates)]
        if step in weights:
            plain, best, _ = tasks.query_losses(params)
            total = total + weights[step] * meta_loss_of(plain, best, lowest, tasks.spec.ways)
            lowest = torch.minimum(lowest, plain)
    return total


def batches_of(kind: str, texts: Texts, encoders: list[Encoder], count: int) -> list[TaskBatch]:
    """Batches of tasks of a kind as users have them, with 8 to `MOST_STEPS` steps."""
    found, number = list[TaskBatch](), 0
    make = drawing(texts, encoders[:1], USUAL)
    while len(found) < count:
        seed, number = f"{kind} {number}", number + 1
        if kind_of(draw(random.Random(seed), encoders[:1], 1.0, USUAL)) != kind:
            continue  # before its texts are drawn, which takes longer
        drawn, task = make(random.Random(seed), 1.0)
        spec = drawn.spec
        fitting = spec.steps >= 8 and not drawn.long and not spec.clip and not spec.rescale
        if kind_of(drawn) == kind and fitting:
            tasks = task()
            tasks.spec = replace(spec, steps=min(MOST_STEPS, spec.steps))
            found.append(tasks)
    return found


def search(kind: str, state: Path, options: argparse.Namespace) -> tuple[str, Factors, list[str]]:
    """The best factors for a kind of task."""
    torch.set_num_threads(1)
    texts, encoders = material(options)
    rule = training(state, texts, encoders).rule.requires_grad_(False)
    tasks = batches_of(kind, texts, encoders, options.batches)

    def judge(factors: Factors) -> Tensor:
        losses = []
        for number, batch in enumerate(tasks):
            batch.restart(number)
            torch.manual_seed(number)  # of dropout
            with torch.no_grad():
                losses.append(meta_loss(rule, batch, factors))
        return torch.stack(losses)

    best, least = Factors(), judge(Factors())
    lines = [f"{kind}: {float(least.mean()):.4f} as it is, {sum(b.size for b in tasks)} tasks"]
    for part, values in TRIED.items():
        if (part == "body" and kind.startswith("head")) or (part != "body" and "pairs" in kind):
            continue
        tried = best
        for value in values:
            factors = tried._replace(**{part: value})
            loss = judge(factors)
            gain = float((least - loss).mean())
            lines.append(f"  {factors}: {float(loss.mean()):.4f}")
            if gain > 0:
                best, least = factors, loss
    return kind, best, lines


def training(state: Path, texts: Texts, encoders: list[Encoder]) -> MetaTraining:
    """The run so far, with its averaged weights."""
    run = MetaTraining(TrainedRule(), drawing(texts, encoders))
    run.restore(state)
    run.rule.load_state_dict(run.average)
    return run


class Pupil(NamedTuple):
    """A rule whose decisions are compared, and the outputs behind the latest ones."""

    rule: TrainedRule
    outputs: list[Tensor]

    @classmethod
    def of(cls, rule: TrainedRule) -> Pupil:
        """Keep what the rule's output layer gives."""
        outputs = list[Tensor]()
        rule.output.register_forward_hook(lambda _, __, output: outputs.append(output))
        return cls(rule, outputs)


def aimed_at(output: Tensor, factors: Tensor) -> Tensor:
    """The outputs that make a rule decide what it decides with the factors; (..., P, D)."""
    aim = output.clone()
    moved = torch.tanh(output[..., RATE] / LOG_RATE_BOUND) + factors.log() / LOG_RATE_BOUND
    aim[..., RATE] = LOG_RATE_BOUND * torch.atanh(moved.clamp(-0.98, 0.98))
    aim[..., GROWTH] = torch.atanh((torch.tanh(output[..., GROWTH]) * factors).clamp(-0.98, 0.98))
    return aim


def difference(pupil: Pupil, teacher: Pupil, tasks: TaskBatch, factors: Factors) -> Tensor:
    """How far a rule's outputs are from its teacher's with the factors, where the rule goes."""
    params, states = list(tasks.start), initial_states(pupil.rule, tasks)
    units = pupil.rule.tensor_units
    own: dict[str, Tensor] = {}
    other: dict[str, Tensor] = {}
    losses = []
    for step in range(1, tasks.spec.steps + 1):
        leaves = [x.detach().requires_grad_() for x in params]
        grads = gradients(tasks, leaves, create_graph=False)
        with torch.no_grad():
            measured = measure(pupil.rule, tasks, params, grads, states)
            seen = tensor_leaves(states)
            aim = teacher.rule.cross_tensor_context(measured.statistics, {**seen, **other})
            other = {"hidden": aim[..., -2 * units : -units], "memory": aim[..., -units:]}
        context = pupil.rule.cross_tensor_context(measured.statistics, {**seen, **own})
        own = {"hidden": context[..., -2 * units : -units], "memory": context[..., -units:]}
        target = aimed_at(teacher.outputs.pop(), factors.of(tasks, step))
        losses.append((pupil.outputs.pop() - target).square().mean())
        to_coordinates = teacher.rule.gates_context.weight
        told = (own["hidden"] - other["hidden"]) @ to_coordinates.T
        losses.append(COORDINATES * told.square().mean())
        with torch.no_grad():
            updates, states = move(pupil.rule, tasks, measured, states, context.detach())
            params = [param + update for param, update in zip(params, updates)]
    return torch.stack(losses).sum() / tasks.spec.steps


def teach(run: MetaTraining, usual: Draw, factors: dict[str, Factors], updates: int) -> None:
    """Train the tensor-wise LSTM, in place.

    Args:
        run: whose rule is both the pupil and, as it is now, the teacher.
        usual: draws tasks as users have them, for which the factors hold.
        factors: by kind of task; others are to stay as they are.
        updates: of the weights, a batch each.
    """
    teacher = TrainedRule(**run.rule.config)
    teacher.load_state_dict(run.rule.state_dict())
    pupil, shown = Pupil.of(run.rule), Pupil.of(teacher.requires_grad_(False))
    trained = [p for n, p in run.rule.named_parameters()
               if n.split(".")[0] in ("tensor_cell", "message", "output")]  # fmt: skip
    optimizer = torch.optim.Adam(trained, META_LR)
    recent = list[float]()
    for number in range(updates):
        optimizer.param_groups[0]["lr"] = META_LR * (LAST_META_LR / META_LR) ** (number / updates)
        rng = random.Random(f"teach {number}")
        as_usual, changed = rng.random() < OF_USUAL, rng.random() < ASKED
        drawn, make = (usual if as_usual else run.draw_batch)(rng, 1.0)
        while changed and factors.get(kind_of(drawn), Factors()) == Factors():
            drawn, make = usual(rng, 1.0)
        as_usual |= changed
        tasks = make()
        tasks.spec = replace(drawn.spec, steps=min(drawn.spec.steps, MOST_STEPS))
        asked = factors.get(kind_of(drawn), Factors()) if as_usual else Factors()
        loss = difference(pupil, shown, tasks, asked)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        recent = [*recent[-49:], float(loss.detach())]
        if (number + 1) % 50 == 0:
            print(f"{number + 1} updates: difference {sum(recent) / len(recent):.4f}", flush=True)
    run.average = {name: param.detach().clone() for name, param in run.params.items()}


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--encoder", type=Path, required=True, help="folder of all-MiniLM-L6-v2")
    add("--cache", type=Path, required=True, help="folder that prepare.py filled")
    add("--resume", type=Path, required=True, help="a state.safetensors")
    add("--output", type=Path, required=True, help="folder of the run")
    add("--batches", type=int, default=3, help="of each kind of task (default: 3)")
    add("--updates", type=int, default=300, help="of the second part (default: 300)")
    add("--processes", type=int, default=1, help="of the first part (default: 1)")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Search, teach, and write the state."""
    options = arguments(words)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "factors.json"
    if not path.exists():
        found = {}
        with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
            job = partial(search, state=options.resume, options=options)
            for kind, factors, lines in pool.imap(job, KINDS, chunksize=1):
                found[kind] = factors._asdict()
                print("\n".join(lines), flush=True)
        write_atomically(path, json.dumps(found, indent=1).encode())
    torch.set_num_threads(1)
    texts, encoders = material(options)
    run = training(options.resume, texts, encoders)
    factors = {kind: Factors(**values) for kind, values in json.loads(path.read_text()).items()}
    teach(run, drawing(texts, encoders[:1], USUAL), factors, options.updates)
    run.save(options.output)
    print(f"{options.output / STATE_FILE}: {run.counts()}")


if __name__ == "__main__":
    main()
