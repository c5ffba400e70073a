"""Find changes to the rule's steps that do better, and teach the rule to take them by itself.

    python scripts/two_level/improve.py --encoder MINILM --cache CACHE --output RUN \
        --resume scripts/two_level/checkpoint.safetensors

The meta-gradient of a task is noisy, and moves a rule slowly out of a habit that all tasks share:
in heads that begin at random, of steps that are several times too long. This goes on in two parts.
First, for each kind of task, it runs the rule with changes, and keeps those with the lowest
meta-loss less accuracy on training tasks: factors on its steps, one for the head at the first step,
one for the head later, and one for all else, or AdamW's steps at one of several rates in place of
its own. Then it trains the tensor-wise LSTM to decide by itself what the rule decides with these
changes, on tasks of all kinds that the LSTM in training runs through (Ross et al. 2011,
arXiv:1011.0686). Training goes on from RUN with `train.py --resume RUN`.

RUN/changes.json gets the changes. Kinds that it has are not searched for again, and changes of
one's own are {"lora cls cold, top layers": {"later": 0.3, "adam": 0.001}}, see changes.py. Kinds
with {} are drawn as often, to stay as they are, and so are those where the search found nothing;
those with {"body": 1.0} follow --teacher as it is.
Time: 3 minutes of a core for a kind, 10 with all layers; 10 to 30 minutes for the second part.
Last line: where the state was written.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from changes import KINDS, Changes, changed, kind_of
from curriculum import CPU, GPU, Drawn, Profile, draw
from drawing import Draw, drawing, material, reading
from encoder import Encoder
from lessons import MOST_STEPS, teach
from tasks import TaskBatch
from texts import Texts
from torch import Tensor
from train import STATE_FILE, MetaTraining
from unroll import TrainedRule, adapted, meta_loss_of

from rnnopt.rules.protocol import State
from rnnopt.storage.files import write_atomically

# The values tried of each change, one after the other, each with the best of those before; rates by
# what trains.
TRIED = {"later": (0.15, 0.35, 2.0), "first": (0.5, 2.0), "body": (0.5, 2.0), "growth": (0.0,),
         "early": (2.0, 5.0), "head_early": (3.0,)}  # fmt: skip
RATES = {
    "head": (3e-3, 1e-2, 3e-2), "lora": (5e-4, 1e-3, 2e-3, 4e-3), "full": (5e-5, 1e-4, 2e-4, 4e-4),
}  # fmt: skip
# What meta-loss and accuracy count for: the loss alone prefers heads that are soon confident, even
# where slower ones end with more right answers.
GAIN = (-1.0, 1.0)
JUDGED = (1, 2, 3, 5, 10)  # numbers of steps besides the last
# Tasks as users have them: of the encoder itself, two or three layers. Without second order they
# take little memory. The curriculum's are mostly smaller, and a head may grow faster in them.
USUAL = CPU._replace(depths=(0.1, 0.5, 0.4), whole=0.2, tasks=3, gigabytes=12.0)
USUAL_ON_GPU = GPU._replace(depths=(0.1, 0.5, 0.4), whole=0.5, tasks=8, gigabytes=400.0)


def judged_with(rule: TrainedRule, tasks: TaskBatch, changes: Changes) -> Tensor:
    """The meta-loss with these changes, and the accuracy weighed in the same way; for `no_grad`.

    Returns:
        Both as means over the tasks, (2,).
    """
    steps = tasks.spec.steps
    judged = [step for step in JUDGED if step < steps]
    weights = {step: 0.6 * step / sum(judged) for step in judged} | {steps: 0.4}
    total = torch.zeros(2)
    lowest = tasks.query_losses(tasks.start)[0]

    def decide(step: int, statistics: Tensor, seen: State) -> Tensor:
        return changed(rule.cross_tensor_context(statistics, seen), changes.of(tasks, step))

    for step, params in enumerate(adapted(rule, tasks, decide)):
        if step in weights:
            plain, best, correct = tasks.query_losses(params)
            loss = meta_loss_of(plain, best, lowest, tasks.spec.ways)
            total = total + weights[step] * torch.stack([loss, correct.mean()])
            lowest = torch.minimum(lowest, plain)
    return total


def usual(options: argparse.Namespace) -> Profile:
    """Of tasks as users have them."""
    return USUAL if options.device == "cpu" else USUAL_ON_GPU


def batches_of(
    kind: str, texts: Texts, encoders: list[Encoder], profile: Profile, count: int
) -> list[TaskBatch]:
    """Batches of tasks of a kind as users have them, with 8 to `MOST_STEPS` steps."""
    found, rng = list[TaskBatch](), random.Random(kind)
    make = drawing_of(kind, texts, encoders, profile)
    while len(found) < count:
        drawn, task = make(rng, 1.0)
        spec = drawn.spec
        if spec.steps >= 8 and not drawn.long and not spec.clip and not spec.rescale:
            tasks = task()
            tasks.spec = replace(spec, steps=min(MOST_STEPS, spec.steps))
            found.append(tasks)
    return found


def drawing_of(kind: str, texts: Texts, encoders: list[Encoder], profile: Profile) -> Draw:
    """Draws tasks of a kind, of the encoder itself."""
    whole = 1.0 if "all layers" in kind else 0.0 if "top layers" in kind else profile.whole
    profile = profile._replace(whole=whole)
    make = drawing(texts, encoders[:1], profile)

    def draw_batch(rng: random.Random, progress: float) -> tuple[Drawn, Callable[[], TaskBatch]]:
        while True:
            seed = rng.random()
            if kind_of(draw(random.Random(seed), encoders[:1], progress, profile)) != kind:
                continue  # before its texts are drawn, which takes longer
            drawn, task = make(random.Random(seed), progress)
            if kind_of(drawn) == kind:
                return drawn, task

    return draw_batch


def tries(kind: str) -> dict[str, Sequence[float]]:
    """The values of each change that are tried in tasks of a kind."""
    trains, found = kind.split()[0], dict[str, Sequence[float]]()
    if "pairs" not in kind:
        found |= {"later": TRIED["later"], "first": TRIED["first"], "head_adam": RATES["head"],
                  "head_early": TRIED["head_early"]}  # fmt: skip
    if trains != "head":
        found |= {name: TRIED[name] for name in ("body", "growth")} | {"adam": RATES[trains]}
    if trains == "full":
        found["early"] = TRIED["early"]  # with the rate that was best
    return found


def search(kind: str, options: argparse.Namespace) -> tuple[str, Changes, list[str]]:
    """The best changes for a kind of task."""
    prepare(options)
    texts, encoders = material(options)
    rule = training(options.resume, texts, encoders).rule.requires_grad_(False)
    tasks = batches_of(kind, texts, encoders, usual(options), options.batches)

    def judge(changes: Changes) -> Tensor:
        found = []
        for number, batch in enumerate(tasks):
            batch.restart(number)
            torch.manual_seed(number)  # of dropout
            with torch.no_grad():
                found.append(judged_with(rule, batch, changes))
        return torch.stack(found)

    def said(found: Tensor) -> str:
        loss, accuracy = found.mean(0).tolist()
        return f"meta-loss {loss:.4f}, accuracy {accuracy:.4f}"

    best, most = Changes(), judge(Changes())
    lines = [f"{kind}: {said(most)} as it is, {sum(batch.size for batch in tasks)} tasks"]
    for part, values in tries(kind).items():
        tried = best
        if {"early": best.adam, "head_early": best.head_adam}.get(part) == 0:
            continue  # a factor on nothing
        for value in values:
            changes = tried._replace(**{part: value})
            found = judge(changes)
            gains = (found - most) @ found.new_tensor(GAIN)
            better = int((gains > 0).sum())
            lines.append(f"  {changes}: {said(found)}, better in {better} batches")
            if gains.mean() > 0:
                best, most = changes, found
    return kind, best, lines


def prepare(options: argparse.Namespace) -> None:
    """Threads and device of this process."""
    torch.set_num_threads(1)
    torch.set_default_device(options.device)
    if options.device != "cpu":
        torch.set_float32_matmul_precision("high")


def training(state: Path, texts: Texts, encoders: list[Encoder]) -> MetaTraining:
    """The run so far, with its averaged weights."""
    run = MetaTraining(TrainedRule(), drawing(texts, encoders))
    run.restore(state)
    run.rule.load_state_dict(run.average)
    return run


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = reading(__doc__)
    add = parser.add_argument
    add("--resume", type=Path, required=True, help="a state.safetensors")
    add("--output", type=Path, required=True, help="folder of the run")
    add("--teacher", type=Path,
        help="a state whose decisions, changed, are taught (default: --resume)")  # fmt: skip
    add("--batches", type=int, default=3, help="of each kind of task (default: 3)")
    add("--updates", type=int, default=300, help="of the second part (default: 300)")
    add("--processes", type=int, default=1, help="of the first part (default: 1)")
    add("--kinds", nargs="*", choices=KINDS, default=KINDS, metavar="KIND",
        help="kinds of task to search for, see changes.py (default: all)")  # fmt: skip
    add("--device", default="cpu", help="cpu (the default) or cuda")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Search, teach, and write the state."""
    options = arguments(words)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "changes.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        missing = [kind for kind in options.kinds if kind not in found]
        for kind, best, lines in pool.imap_unordered(partial(search, options=options), missing):
            found[kind] = best._asdict() if best != Changes() else {}
            print("\n".join(lines), flush=True)
            write_atomically(path, json.dumps(found, indent=1).encode())
    prepare(options)
    texts, encoders = material(options)
    run = training(options.resume, texts, encoders)
    teacher = training(options.teacher or options.resume, texts, encoders).rule
    profile = usual(options)
    kinds = {
        kind: (Changes(**values) if values else None, drawing_of(kind, texts, encoders, profile))
        for kind, values in found.items()
    }
    teach(run, teacher, drawing(texts, encoders[:1], profile), kinds, options.updates)
    run.save(options.output)
    print(f"{options.output / STATE_FILE}: {run.counts()}")


if __name__ == "__main__":
    main()
