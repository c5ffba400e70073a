"""Meta-train the rule of two levels on few-shot text classification.

    python scripts/two_level/prepare.py --data DATA --encoder MINILM --cache CACHE
    python scripts/two_level/train.py --encoder MINILM --cache CACHE --output RUN --minutes 60 \
        --resume scripts/two_level/checkpoint.safetensors

DATA is a folder of labelled sets and MINILM the folder of all-MiniLM-L6-v2, see prepare.py, which
has to run once. `checkpoint.safetensors`, beside this file, is where meta-training stands: with it
as --resume a run goes on from there, and without --resume it begins at Adam. RUN gets

    state.safetensors  everything that a run needs to go on, every 50 meta-steps: --resume RUN
    rule.safetensors   the averaged weights, a rule file: LearnedOptimizer(rule=load_rule(RUN))
    log.txt            a line every 10 meta-steps

A run that is stopped and resumed with the same --seed and --horizon ends with the same weights, bit
for bit on one machine. To hand the work on, copy state.safetensors over checkpoint.safetensors.

Each meta-step takes --tasks batches of tasks, see curriculum.py. The meta-gradient of a batch is
clipped to a norm of 0.05. A batch with a loss or a meta-gradient that is not finite is skipped,
counted and written to the log. The unrolls grow until --horizon meta-steps, and the learning rate
falls to a quarter of --meta-lr meanwhile.

Time: 5 to 8 s of one core for a meta-step of two batches, about 7 tasks; 12 to 18 minutes for 1,000
tasks, and three fifths of that --without second-order.
Memory: 5 GiB.
Last line: "end: meta-step 2000, 9100 tasks, 0 batches skipped", or other counts.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from curriculum import CPU, GPU, Drawn, cost, judgement, second_order, segment
from drawing import Draw, drawing, material, reading
from parts import LEFT_OUT, leave_out
from safetensors import safe_open
from tasks import TaskBatch
from torch import Tensor, distributed
from unroll import TrainedRule, unroll

from rnnopt.errors import InputError
from rnnopt.rules.files import save_rule
from rnnopt.rules.two_level import TwoLevelLSTM
from rnnopt.storage.files import read_tensors, save_tensors

STATE_FILE, RULE_FILE, LOG_FILE = "state.safetensors", "rule.safetensors", "log.txt"
LARGEST_NORM = 0.05  # of a batch's meta-gradient
BETAS = (0.9, 0.995)  # of the meta-optimizer, Adam
WARM_UP = 30  # meta-steps until the learning rate is whole
LAST_RATE = 0.25  # share of it at the end of the curriculum
MEMORY = 0.99  # decay of the averaged weights
LARGE_SKIPPED = 0.7  # of the batches leave the coordinate-wise LSTM out in large tensors
LOGGED, SAVED = 10, 50  # meta-steps
RECENT = 50  # meta-steps that a line of the log averages over
COUNTS = 5  # numbers of a batch behind its meta-gradient


class MetaTraining:
    """The rule, its meta-optimizer, and the averaged weights.

    Args:
        rule: to train.
        draw_batch: a batch of tasks, of a random generator and the progress of the curriculum.
        seed: every meta-step draws from a generator of its own, by this and its number.
        meta_lr: the highest learning rate.
        horizon: meta-steps of the curriculum and of the learning rate's fall.
        without: what is left out, see parts.py.

    Attributes:
        steps: meta-steps so far.
        tasks: seen so far, without those skipped.
        skipped: batches so far that were not finite.
        average: the averaged weights.
    """

    def __init__(
        self, rule: TrainedRule, draw_batch: Draw, seed: int = 1, meta_lr: float = 2e-3,
        horizon: int = 600, without: Collection[str] = (),
    ) -> None:  # fmt: skip
        self.rule, self.draw_batch = rule, draw_batch
        self.seed, self.meta_lr, self.horizon = seed, meta_lr, horizon
        self.without = without
        leave_out(rule, without)
        self.params = dict(rule.named_parameters())
        self.average = {name: param.detach().clone() for name, param in self.params.items()}
        self.optimizer = torch.optim.Adam(rule.parameters(), meta_lr, BETAS)
        self.steps = self.tasks = self.skipped = self.updates = 0
        self.averaged = 0  # meta-steps since the average began
        # means over the batches: query loss over log(classes), share of steps above the start, norm
        self.recent: list[list[float]] = []

    def rate(self) -> float:
        """The learning rate of the present meta-step."""
        progress = min(1.0, self.steps / self.horizon)
        fall = (1 + LAST_RATE) / 2 + (1 - LAST_RATE) / 2 * math.cos(math.pi * progress)
        return self.meta_lr * min(1.0, self.steps / WARM_UP + 0.1) * fall

    def meta_step(self, batches: int, say: Callable[[str], None]) -> int:
        """One step of the meta-optimizer.

        Several processes share the batches, the costliest first, and sum up what they found.

        Args:
            batches: whose clipped meta-gradients are averaged.
            say: takes lines for the log.

        Returns:
            How many of the batches were finite; with none, the weights stay.
        """
        progress, ready = min(1.0, (self.steps + 1) / self.horizon), []
        for number in range(batches):
            rng = random.Random(f"{self.seed} {self.steps} {number}")
            ready.append((*self.draw_batch(rng, progress), rng))
        self.steps += 1
        self.averaged += 1
        sums = torch.zeros(sum(x.numel() for x in self.params.values()) + COUNTS)
        for number in self._own([cost(drawn) for drawn, _, _ in ready]):
            drawn, make, rng = ready[number]
            torch.manual_seed(rng.randrange(1 << 30))  # of dropout
            found = self._meta_gradient(rng, drawn, make)
            if found is None:
                say(f"skipped, as it is not finite or too large: {drawn.spec}")
            else:
                sums += found
        if distributed.is_initialized():
            sums = sums.cpu()
            distributed.all_reduce(sums)
        *figures, tasks, finite = sums[-COUNTS:].tolist()
        self.skipped += batches - round(finite)
        if finite:
            self.tasks += round(tasks)
            self.recent = [*self.recent[1 - RECENT :], [x / finite for x in figures]]
            self._update(sums[:-COUNTS] / finite)
        return round(finite)

    @staticmethod
    def _own(costs: Sequence[float]) -> list[int]:
        """The batches of this process: each goes to the one with the least to do so far."""
        if not distributed.is_initialized():
            return list(range(len(costs)))
        loads: list[tuple[float, list[int]]] = [
            (0.0, []) for _ in range(distributed.get_world_size())
        ]
        for number in sorted(range(len(costs)), key=lambda i: -costs[i]):
            rank = min(range(len(loads)), key=lambda i: loads[i][0])
            load, own = loads[rank]
            loads[rank] = (load + costs[number], [*own, number])
        return loads[distributed.get_rank()][1]

    def _meta_gradient(
        self, rng: random.Random, drawn: Drawn, make: Callable[[], TaskBatch]
    ) -> Tensor | None:
        """The clipped meta-gradient of a batch, its figures, tasks and 1; None if not finite."""
        self.rule.skip_large = rng.random() < LARGE_SKIPPED
        weights = judgement(drawn.spec.steps, rng)
        try:
            tasks = make()
            second = second_order(drawn) and "second-order" not in self.without
            run = unroll(self.rule, tasks, weights, 1 + second, segment(drawn))
        except torch.OutOfMemoryError:  # of a GPU: its size was an estimate
            torch.cuda.empty_cache()
            return None
        gradient = torch.cat([x.flatten() for x in run.meta_gradient])
        norm = float(gradient.norm())
        if not math.isfinite(norm) or not torch.isfinite(run.losses).all():
            return None
        later = run.losses[1:]
        loss = float(later.mean()) / math.log(drawn.spec.ways)
        above = float((later > run.losses[0] + 0.01).float().mean())
        counts = torch.tensor([loss, above, norm, tasks.size, 1.0])
        return torch.cat([gradient * min(1.0, LARGEST_NORM / (norm + 1e-9)), counts])

    def _update(self, gradient: Tensor) -> None:
        sizes = [param.numel() for param in self.params.values()]
        for param, grad in zip(self.params.values(), gradient.split(sizes)):
            param.grad = grad.view_as(param).to(param)
        self.optimizer.param_groups[0]["lr"] = self.rate()
        self.optimizer.step()
        self.optimizer.zero_grad()
        leave_out(self.rule, self.without)
        self.updates += 1
        decay = min(MEMORY, 1 - 1 / (self.averaged + 10))
        for name, param in self.params.items():
            self.average[name] = decay * self.average[name] + (1 - decay) * param.detach()

    def report(self) -> str:
        """A line on the latest batches."""
        means = [sum(column) / len(column) for column in zip(*self.recent)] or [math.nan] * 3
        return (
            f"meta-step {self.steps}, {self.tasks} tasks: "
            f"query loss / log(classes) {means[0]:.4f}, above the start {means[1]:.3f}, "
            f"norm of the meta-gradient {means[2]:.2f}, {self.skipped} batches skipped"
        )

    def counts(self) -> dict[str, int]:
        """What the files say of the meta-training so far."""
        names = ("steps", "tasks", "skipped", "updates")
        return {name: getattr(self, name) for name in names}

    def save(self, folder: Path) -> None:
        """Write the state and the rule of the averaged weights."""
        tensors = {}
        for name, param in self.params.items():
            moments = self.optimizer.state.get(param, {})
            tensors[f"weights.{name}"], tensors[f"average.{name}"] = param, self.average[name]
            for letter, moment in (("m", "exp_avg"), ("v", "exp_avg_sq")):
                tensors[f"{letter}.{name}"] = moments.get(moment, torch.zeros_like(param))
        tensors = {name: leaf.detach().cpu() for name, leaf in tensors.items()}
        about = {**self.counts(), "averaged": self.averaged, "without": list(self.without)}
        save_tensors(folder / STATE_FILE, tensors, {**about, **self.rule.config})
        with torch.device("cpu"):
            rule = TwoLevelLSTM(**self.rule.config)
            rule.load_state_dict(self.average)
            save_rule(rule, folder / RULE_FILE, self.counts())

    def restore(self, path: Path) -> None:
        """Go on from a state that `save` wrote.

        Raises:
            InputError: the file can't be read, or holds a state of a rule with other sizes.
        """
        tensors, about = read_tensors(path)
        device = torch.get_default_device()
        tensors = {name: leaf.to(device) for name, leaf in tensors.items()}
        if not about:  # of the first runs: each fact an entry of its own
            with safe_open(path, "pt") as file:
                about = {name: int(value) for name, value in (file.metadata() or {}).items()}
        try:
            self.steps, self.tasks = about["steps"], about["tasks"]
            self.skipped = about.get("skipped", 0)
            self.updates = about.get("updates", self.steps)
            self.rule.load_state_dict({name: tensors[f"weights.{name}"] for name in self.params})
            for name, param in self.params.items():
                self.average[name] = tensors[f"average.{name}"]
                self.optimizer.state[param] = {
                    "step": torch.tensor(float(self.updates), device="cpu"),
                    "exp_avg": tensors[f"m.{name}"],
                    "exp_avg_sq": tensors[f"v.{name}"],
                }
        except (KeyError, RuntimeError) as error:
            raise InputError(
                f"{path} holds no state of a run with this rule ({error}); name the "
                f"{STATE_FILE} that train.py wrote"
            ) from error
        self.averaged = about.get("averaged", self.steps)
        if about.get("without", []) != list(self.without):  # the average is that of another rule
            leave_out(self.rule, self.without)
            self.average = {name: leaf.detach().clone() for name, leaf in self.params.items()}
            self.averaged = 0


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = reading(__doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of the run; what it holds is replaced")
    add("--resume", type=Path, help="a state.safetensors, or a run's folder")
    add("--minutes", type=float, default=60, help="begin no meta-step after so many (default: 60)")
    add("--meta-steps", type=int, help="end after so many of this run")
    add("--tasks", type=int, default=2, help="batches of tasks for a meta-step (default: 2)")
    add("--meta-lr", type=float, default=2e-3, help="highest learning rate (default: 2e-3)")
    add("--horizon", type=int, default=1200, help="meta-steps of the curriculum (default: 1200)")
    add("--seed", type=int, default=1)
    add("--without", nargs="*", choices=LEFT_OUT, default=[], help="to leave out, see parts.py")
    add("--kinds", nargs="+", choices=list(CPU.kinds), help="of what trains (default: all)")
    add("--device", default="cpu", help="cpu (the default) or cuda, with larger batches")
    add("--processes", type=int, default=1, help="that share a meta-step's batches (default: 1)")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Meta-train for a while."""
    options = arguments(words)
    if options.processes == 1:
        meta_train(0, options, None)
        return
    with TemporaryDirectory() as folder:
        spawn = torch.multiprocessing.spawn
        spawn(meta_train, (options, Path(folder) / "meeting"), nprocs=options.processes)


def meta_train(rank: int, options: argparse.Namespace, meeting: Path | None) -> None:
    """One process of a run; the first one writes.

    Args:
        rank: its number.
        options: of the command line.
        meeting: a file by which the processes find each other; None for a single one.
    """
    begun = time.monotonic()
    torch.set_num_threads(1)
    torch.set_default_device(options.device)
    torch.manual_seed(options.seed)
    if meeting is not None:
        distributed.init_process_group(
            "gloo", f"file://{meeting}", rank=rank, world_size=options.processes
        )
    gpu = options.device != "cpu"
    if gpu:
        torch.set_float32_matmul_precision("high")
        torch.cuda.set_per_process_memory_fraction(0.95 / options.processes)
    (texts, encoders), profile = material(options), GPU if gpu else CPU
    if options.kinds:
        profile = profile._replace(kinds={kind: profile.kinds[kind] for kind in options.kinds})
    rule = TrainedRule()
    rule.largest = profile.largest
    training = MetaTraining(
        rule,
        drawing(texts, encoders, profile),
        options.seed,
        options.meta_lr,
        options.horizon,
        options.without,
    )
    if options.resume:
        resume = options.resume
        training.restore(resume / STATE_FILE if resume.is_dir() else resume)
    options.output.mkdir(parents=True, exist_ok=True)
    with open(options.output / LOG_FILE, "a") as log:

        def say(line: str) -> None:
            print(line, flush=True)
            print(line, file=log, flush=True)

        first = training.steps
        while _in_time(begun, options.minutes):
            if options.meta_steps is not None and training.steps - first >= options.meta_steps:
                break
            training.meta_step(options.tasks, say)
            if rank == 0 and training.steps % LOGGED == 0:
                say(f"{time.monotonic() - begun:.0f} s, {training.report()}")
            if rank == 0 and training.steps % SAVED == 0:
                training.save(options.output)
        if rank == 0:
            training.save(options.output)
            say(
                f"end: meta-step {training.steps}, {training.tasks} tasks, "
                f"{training.skipped} batches skipped"
            )
    if meeting is not None:
        distributed.destroy_process_group()


def _in_time(begun: float, minutes: float) -> bool:
    """Whether the minutes are not over, by the clock of the first process."""
    go = torch.tensor([float(time.monotonic() - begun < 60 * minutes)], device="cpu")
    if distributed.is_initialized():
        distributed.broadcast(go, 0)
    return bool(go)


if __name__ == "__main__":
    main()
