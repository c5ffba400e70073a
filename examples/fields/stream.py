"""A stream whose domain changes without notice: how fast is accuracy back?

    python examples/fields/stream.py --data DATA --encoder all-MiniLM-L6-v2 --output out

DATA holds the folders of --reviews and --topics, each with train, val and test (.jsonl or
.jsonl.gz) of texts, labels and, for reviews, a `domain`, the kind of product. A domain of the
stream is the reviews of one kind of product, or five topics of one set. The principal components of
frozen embeddings go through low-rank factors and one linear layer with an output for every label. A
stream has 50 changes, and 16 steps between two of them. Nothing but the loss tells that a domain
has ended.

A rule keeps its memory over the whole stream, is told to begin again, or notices a change by
itself: the loss of a batch lies far above those before it. Rates of AdamW are chosen by the mean
accuracy over a validation stream. About 10 minutes on two cores; embeddings and rules are kept.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from domains import PARTS, TOPICS, Domain, Streams, embedded, read
from field import Options, command, digest
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import rnnopt
from rnnopt.cli.progress import progress_bar
from rnnopt.evaluation.statistics import interval, with_interval
from rnnopt.rules.files import SHIPPED_RULE, rule_name
from rnnopt.storage.files import write_atomically

STEPS = 16  # of a domain
RANK = 4  # of the factors
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
BUFFER = 200  # earlier texts that are replayed
RECOVERED = 0.9  # of the accuracy of logistic regression on all texts of the domain
MORE = {
    "encoder": {"required": True, "help": "a folder, or a name on the Hugging Face hub"},
    "reviews": {"default": "arsc_sentiment", "help": "folder in DATA, with domains [%(default)s]"},
    "topics": {
        "default": ["clinc150", "stackoverflow20"], "nargs": "+",
        "help": "folders in DATA, with val [%(default)s]",
    },
    "changes": {"default": 50, "type": int, "help": "changes in a stream [%(default)s]"},
}  # fmt: skip


class Model(nn.Module):
    """Logits of frozen embeddings, W (x + B A x) + b."""

    def __init__(self, width: int, labels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, RANK, bias=False), nn.Linear(RANK, width, bias=False)
        self.head = nn.Linear(width, labels)
        for layer in (self.up, self.head):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, labels) of embeddings (B, width)."""
        return self.head(x + self.up(self.down(x)))


class ChangeDetector:
    """Tells from the losses of batches that the domain has changed.

    It keeps exponential averages of the loss and of its rises above the average, begun anew after
    every change, and reports a loss that lies `width` rises and `least` nats above the average.
    """

    def __init__(self, width: float = 4.0, least: float = 0.5) -> None:
        self.width, self.least, self.mean, self.rise = width, least, float("inf"), 0.0

    def changed(self, loss: float) -> bool:
        """Whether this loss is one of another domain."""
        found = loss > self.mean + max(self.least, self.width * self.rise)
        if found or self.mean == float("inf"):
            self.mean, self.rise = loss, 0.0
        else:
            self.rise = 0.7 * self.rise + 0.3 * max(0.0, loss - self.mean)
            self.mean = 0.7 * self.mean + 0.3 * loss
        return found


@dataclass
class Method:
    """What adapts along the stream.

    Attributes:
        optimizer: makes the optimizer.
        begins_again: at a change, "never", when it is "told", or when it "notices".
        replay: whether each batch is joined by as many earlier texts.
    """

    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    begins_again: str = "never"
    replay: bool = False


@dataclass
class Run:
    """What became of a method on streams, a figure for each domain after a change."""

    accuracy: list[float] = field(default_factory=list)  # mean over the steps of the domain
    recovery: list[float] = field(default_factory=list)  # steps to RECOVERED, at most STEPS
    forgetting: list[float] = field(default_factory=list)  # of the domain before it
    noticed: list[bool] = field(default_factory=list)
    false_alarms: int = 0


class Reservoir:
    """A sample of all texts so far, each of them as likely (Vitter 1985)."""

    def __init__(self, drawn: random.Random) -> None:
        self.drawn, self.seen, self.kept = drawn, 0, list[tuple[Tensor, Tensor]]()

    def add(self, x: Tensor, y: Tensor) -> None:
        """Texts that come."""
        for pair in zip(x, y):
            self.seen += 1
            slot = self.drawn.randrange(self.seen)
            if len(self.kept) < BUFFER:
                self.kept.append(pair)
            elif slot < BUFFER:
                self.kept[slot] = pair

    def joined(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """A batch and as many earlier texts."""
        if not self.kept:
            return x, y
        old_x, old_y = zip(*self.drawn.choices(self.kept, k=len(x)))
        return torch.cat([x, torch.stack(old_x)]), torch.cat([y, torch.stack(old_y)])


def follow(method: Method, model: Model, stream: Sequence[Domain], seed: int, run: Run) -> None:
    """Adapt along a stream, judged before each step on texts held out."""
    drawn, params, detector = random.Random(seed), list(model.parameters()), ChangeDetector()
    optimizer, memory, before = method.optimizer(params), Reservoir(random.Random(seed)), 0.0
    for number, domain in enumerate(stream):
        accuracy, noticed = [], False
        if number and method.begins_again == "told":
            optimizer = method.optimizer(params)
        for step in range(STEPS):
            accuracy.append(judged(model, domain))
            x, y = domain.batch(drawn)
            loss = cross_entropy(model(x), y)
            if method.begins_again == "notices" and detector.changed(loss.item()):
                optimizer = method.optimizer(params)
                noticed |= step < STEPS // 4
                run.false_alarms += step >= STEPS // 4 or not number
            if method.replay:
                joined_x, joined_y = memory.joined(x, y)
                loss = cross_entropy(model(joined_x), joined_y)
                memory.add(x, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if number:
            reached = [
                s for s, found in enumerate(accuracy) if found >= RECOVERED * domain.reference
            ]
            run.accuracy.append(float(np.mean(accuracy)))
            run.recovery.append(float(min(reached, default=STEPS)))
            run.forgetting.append(before - judged(model, stream[number - 1]))
            run.noticed.append(noticed)
        before = judged(model, domain)


@torch.no_grad()
def judged(model: Model, domain: Domain) -> float:
    """Held-out accuracy."""
    return float((model(domain.held).argmax(dim=1) == domain.held_labels).float().mean())


class FromStream(rnnopt.Learner):
    """The model, at the values that a stream has left behind before the task."""

    @torch.no_grad()
    def begin(self, task: rnnopt.Task, seed: int) -> None:
        """Put the model where the task starts."""
        super().begin(task, seed)
        for name, param in self.trainable():
            param.copy_(task.start[name])


class AcrossChange(rnnopt.Task):
    """Two domains one after the other, with the change at a step that is drawn.

    The rule keeps its memory through the change, as it does along a stream, so that it can learn to
    notice it.
    """

    def __init__(
        self, domains: tuple[Domain, Domain], start: Mapping[str, Tensor], number: int, steps: int
    ) -> None:
        self.start = start
        change = random.Random(f"change {number}").randrange(steps // 4, steps * 3 // 4 + 1)

        def support(net: nn.Module, step: int) -> Tensor:
            x, y = domains[step >= change].batch(random.Random(f"{number} {step}"))
            return cross_entropy(net(x), y)

        def query(net: nn.Module, step: int) -> Tensor:
            domain = domains[step >= change]
            return cross_entropy(net(domain.held), domain.held_labels)

        super().__init__(support, query, loss_unit=float(np.log(TOPICS)))


def left_behind(model: Model, stream: Sequence[Domain], seed: int) -> list[dict[str, Tensor]]:
    """The model's values at the end of each domain of a stream, along which AdamW adapts."""
    fresh(model, seed)
    optimizer, drawn, found = adamw(1e-2)(list(model.parameters())), random.Random(seed), []
    for domain in stream:
        for _ in range(STEPS):
            x, y = domain.batch(drawn)
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        found.append({name: param.detach().clone() for name, param in model.named_parameters()})
    return found


def meta_trained(streams: Mapping[str, Streams], model: Model, options: Options) -> Any:
    """The shipped rule after meta-training across changes of the training part."""
    steps = 2 if options.small else STEPS
    before = {
        part: left_behind(model, streams[part].stream(12, f"before {part}"), options.seed)
        for part in ("train", "validation")
    }

    def tasks(part: str) -> Callable[[int], AcrossChange]:
        def task(number: int) -> AcrossChange:
            drawn = random.Random(f"{part} {number}")
            domains = streams[part].domain(drawn), streams[part].domain(drawn)
            return AcrossChange(domains, drawn.choice(before[part]), number, steps)

        return task

    rule = rnnopt.load_rule(SHIPPED_RULE)
    facts = {"from": rule_name(rule), "meta_steps": options.meta_steps, "small": options.small}
    facts |= {"tasks": AcrossChange.__name__, "steps": steps}
    facts |= {"seed": options.seed, "texts": float(streams["train"].x.sum()), "more": options.more}
    file = options.output / f"stream-rule-{digest(facts)}.safetensors"
    if file.exists():
        return rnnopt.load_rule(file)
    with progress_bar("meta-train: stream rule", options.meta_steps) as bar:
        found = rnnopt.meta_train(
            FromStream(model), tasks("train"), validation=tasks("validation"),
            rule=rule.requires_grad_(True).train(), steps=steps,
            meta_steps=options.meta_steps, meta_lr=1e-3, tasks_per_meta_step=2,
            validate_every=max(1, options.meta_steps // 5), validation_tasks=6,
            seed=options.seed, report=lambda record: bar.at(record["meta_step"]),
        ).rule  # fmt: skip
    rnnopt.save_rule(found, file, facts)
    return found


def fresh(model: Model, seed: int) -> None:
    """Put the model at its initial values."""
    torch.manual_seed(seed)
    model.load_state_dict(Model(model.head.in_features, model.head.out_features).state_dict())


def run_all(method: Method, model: Model, streams: Sequence[Sequence[Domain]], seed: int) -> Run:
    """A method on several streams, each from the initial values."""
    run = Run()
    for number, stream in enumerate(streams):
        fresh(model, seed)
        follow(method, model, stream, number, run)
    return run


def adamw(rate: float) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """AdamW at a rate."""
    return lambda params: torch.optim.AdamW(params, lr=rate)


def methods_of(rules: Mapping[str, Any]) -> dict[str, Method]:
    """The methods that have nothing to tune."""
    found = {}
    for name, rule in rules.items():
        for begins in ("never", "told", "notices"):
            found[f"{name}, {WORDS[begins]}"] = Method(
                lambda params, rule=rule: rnnopt.LearnedOptimizer(params, rule), begins
            )
    found["AdamW at 0.001"] = Method(adamw(1e-3))
    return found


WORDS = {"never": "keeps its memory", "told": "told to begin again", "notices": "notices changes"}
TUNED = {  # variants of AdamW, each with a rate of its own
    "AdamW, best rate": ("never", False),
    "AdamW, best rate, told to begin again": ("told", False),
    "AdamW, best rate, replay": ("never", True),
}


def table(runs: Mapping[str, Run], rates: Mapping[str, float]) -> tuple[str, dict[str, Any]]:
    """The figures as Markdown and as numbers; differences are from AdamW at its best rate."""
    columns = {"accuracy": 3, "recovery": 1, "forgetting": 3}
    lines = [
        "| method | mean accuracy | steps to recover | forgetting of the domain before |",
        "|---|---:|---:|---:|",
    ]
    figures: dict[str, Any] = {}
    reference = asdict(runs["AdamW, best rate"])
    for name, run in runs.items():
        values = asdict(run)
        figures[name] = {
            "rate": rates.get(name),
            **{column: interval(np.array(values[column])) for column in columns},
            "minus AdamW, best rate": {
                column: interval(np.array(values[column]) - np.array(reference[column]))
                for column in columns
            },
            "noticed": float(np.mean(run.noticed)),
            "false alarms a domain": run.false_alarms / len(run.noticed),
            "values": values,
        }
        mine = figures[name]
        cells = [with_interval(mine[column], digits) for column, digits in columns.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name in runs:
        paired = figures[name]["minus AdamW, best rate"]
        cells = [
            with_interval(paired[column], digits, signed=True) for column, digits in columns.items()
        ]
        if name != "AdamW, best rate":
            lines.append(f"| *{name} - AdamW, best rate, paired* | {' | '.join(cells)} |")
    for name in runs:
        if name.endswith(WORDS["notices"]):
            found = figures[name]
            lines += [
                "",
                f"{name}: noticed {found['noticed']:.0%} of the changes within {STEPS // 4} steps, "
                f"and {found['false alarms a domain']:.2f} times a domain what was none.",
            ]
    return "\n".join(lines) + "\n", figures


def draw(runs: Mapping[str, Run], options: Options) -> None:
    """A picture of accuracy and recovery, as stream.png."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 0.6 + 0.3 * len(runs)), sharey=True)
    for axis, column, words in zip(
        axes, ("accuracy", "recovery"), ("mean accuracy", "steps to recover")
    ):
        found = [interval(np.array(getattr(run, column))) for run in runs.values()]
        axis.barh(list(runs), [one["mean"] for one in found], xerr=[one["ci95"] for one in found])
        axis.set_xlabel(words)
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(options.output / "stream.png", dpi=120)
    plt.close(figure)


def main(options: Options) -> None:
    """Embed, meta-train, tune, and follow the streams."""
    changes = 2 if options.small else options.more["changes"]
    if changes < 2:
        raise rnnopt.InputError(f"--changes {changes}: must be at least 2; 50 is the default")
    texts = read(options)
    x = embedded(texts, options)
    ends = np.cumsum([len(texts[part]) for part in PARTS])
    parts = {
        part: Streams(texts[part], x[end - len(texts[part]) : end])
        for part, end in zip(PARTS, ends)
    }
    model = Model(x.shape[1], max(len(streams.outputs) for streams in parts.values()))
    count = max(2, options.episodes // changes) if not options.small else 1
    report = [parts["test"].stream(changes, f"{options.seed} {i}") for i in range(count)]
    tuning = [parts["validation"].stream(changes, f"{options.seed} tuning")]
    rules = {
        "shipped rule": rnnopt.load_rule(SHIPPED_RULE),
        "shipped rule, meta-trained here": meta_trained(parts, model, options),
    }
    methods, rates = methods_of(rules), {}
    total = len(methods) + len(TUNED) * (1 + len(RATES))
    runs: dict[str, Run] = {}
    with progress_bar("follow streams", total) as bar:
        for name, (begins, replay) in TUNED.items():
            variants = {rate: Method(adamw(rate), begins, replay) for rate in RATES}
            found = {}
            for rate, method in variants.items():
                found[rate] = np.mean(run_all(method, model, tuning, options.seed).accuracy)
                bar.advance(note=name)
            rates[name] = max(found, key=found.__getitem__)
            runs[name] = run_all(variants[rates[name]], model, report, options.seed)
            bar.advance(note=name)
        for name, method in methods.items():
            runs[name] = run_all(method, model, report, options.seed)
            bar.advance(note=name)
    text, figures = table(runs, rates)
    text = f"{count} streams of {changes} changes each\n\n{text}"
    if options.small:
        text = f"These figures mean nothing: they are of --small.\n\n{text}"
    about = {"options": asdict(options), "rule": rule_name(rules["shipped rule"])}
    content = json.dumps({**about, "methods": figures}, indent=1, default=str)
    write_atomically(options.output / "stream.json", content.encode())
    write_atomically(options.output / "stream.md", text.encode())
    print(text)
    draw(runs, options)


if __name__ == "__main__":
    sys.exit(command(__doc__, main, meta_steps=150, episodes=100, more=MORE))
