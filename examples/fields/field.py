"""What the examples of `examples/fields` share: options, kept models, and one honest comparison.

A field brings a learner and a function that makes its tasks. Every method adapts to the same test
tasks from the same initial values. What is tuned is tuned on validation tasks, for each number of
steps, and what is meta-trained sees training tasks only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

import rnnopt
from rnnopt.cli.progress import progress_bar
from rnnopt.evaluation.baselines import BASELINES, Baseline, rule_baseline
from rnnopt.evaluation.compare import Compared
from rnnopt.evaluation.comparison import Direct
from rnnopt.rules.files import SHIPPED_RULE, rule_name
from rnnopt.storage.files import fingerprint, read_tensors, save_tensors, write_atomically
from rnnopt.tasks.start import Start

NAMES = {
    "none": "not adapted",
    "learned": "shipped rule",
    "field": "shipped rule, meta-trained here",
    "joint": "shipped rule, meta-trained on other fields",
    "all": "shipped rule, meta-trained on all fields",
    "meta-sgd": "a rate for each tensor, meta-trained here",
    "adamw": "AdamW, best rate",
    "adam-default": "Adam, default rate",
    "maml": "MAML's initial values, SGD, best rate",
    "reptile": "Reptile's initial values, SGD, best rate",
}
SMALL = {"meta_steps": 1, "episodes": 2}  # what --small runs
RATES = (1e-3, 1e-2)  # what --small chooses from


@dataclass(frozen=True)
class Options:
    """The options that all fields have.

    Attributes:
        data: the folder or file of the field's data.
        output: the folder of figures and models. A model that it holds is used again.
        meta_steps: the number of meta-steps of everything that is meta-trained.
        episodes: the number of test tasks.
        seed: decides everything that is drawn.
        small: a run of some seconds that shows that everything works; its figures mean nothing.
        more: the options that a field adds.
    """

    data: Path
    output: Path
    meta_steps: int
    episodes: int
    seed: int = 0
    small: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Field:
    """A field: what adapts, to which tasks, and what its users take today.

    Attributes:
        name: what the files in the output folder are called.
        title: above the table and the picture.
        learner: what adapts.
        task: ``(part, number, scored) -> Task``, for the parts "train", "validation" and "test",
            which share no class, topic, language, speaker or user. A task that is not scored
            reports its loss only, which saves time in meta-training.
        metrics: what scored tasks report beside the loss.
        usual: the optimizers that the field takes, each at its default rate.
        initial: which initial values are learned as further rows, of "maml" and "reptile".
        budgets: the numbers of steps to report at.
        steps: the number of steps of meta-training.
        settings: further functions like `task` by name, to compare on in place of `task`, such as
            one for each number of examples.
        facts: JSON-compatible facts that the tasks depend on, beside the options.
        direct: methods by name that solve a task without steps of an optimizer.
        meta_sgd: the first learning rate of `rnnopt.MetaSGD`, which is meta-trained as a further
            row. None: there is no such row.
        slower: how many times longer a meta-step of the rule takes than one of MAML;
            it gets so many times fewer, so that each takes as long.
        start: where every method starts, such as the output layer of a text classifier. Those with
            learned initial values start there with these.
    """

    name: str
    title: str
    learner: rnnopt.Learner
    task: Callable[[str, int, bool], rnnopt.Task]
    metrics: Mapping[str, rnnopt.Metric] = field(default_factory=dict)
    usual: Mapping[str, Baseline] = field(default_factory=dict)
    initial: Sequence[str] = ("maml",)
    budgets: Sequence[int] = (1, 5, 20)
    steps: int = 5
    settings: Mapping[str, Callable[[str, int, bool], rnnopt.Task]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    direct: Mapping[str, Direct] = field(default_factory=dict)
    meta_sgd: float | None = None
    slower: int = 1
    start: Start = Start()  # noqa: RUF009  # immutable

    def source(self, part: str, scored: bool, setting: str = "") -> rnnopt.TaskSource:
        """The tasks of a part by number."""
        task = self.settings[setting] if setting else self.task
        return rnnopt.TaskSource(
            lambda number: task(part, number, scored),
            self.learner,
            self.metrics if scored else None,
        )


def command(
    about: str,
    main: Callable[[Options], None],
    *,
    meta_steps: int,
    episodes: int,
    more: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> int:
    """Read the options, run a field, and tell the user what can't be used.

    Args:
        about: what `--help` says.
        main: runs the field.
        meta_steps: the default of `--meta-steps`.
        episodes: the default of `--episodes`.
        more: further options by name, each with the arguments of `argparse`'s `add_argument`.

    Returns:
        The exit code: 2 if the user gave something that can't be used.
    """
    parser = argparse.ArgumentParser(description=about.strip().split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data")
    parser.add_argument("--output", type=Path, required=True, help="for figures and models")
    parser.add_argument("--meta-steps", type=int, default=meta_steps, help="[%(default)s]")
    parser.add_argument("--episodes", type=int, default=episodes, help="test tasks [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="[%(default)s]")
    parser.add_argument("--small", action="store_true", help="seconds; the figures mean nothing")
    for name, about_it in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **about_it)
    found = vars(parser.parse_args())
    found["more"] = {name: found.pop(name) for name in more}
    try:
        main(Options(**(found | (SMALL if found["small"] else {}))))
    except rnnopt.InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2
    return 0


def kept(
    folder: Path, name: str, facts: Mapping[str, Any], make: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Tensors from a file in the output folder, or made now and written there.

    Args:
        folder: the output folder.
        name: what the tensors are.
        facts: JSON-compatible facts that the tensors depend on; with others they are made anew.
        make: makes them.
    """
    file = folder / f"{name}-{digest(facts)}.safetensors"
    if not file.exists():
        save_tensors(file, make(), dict(facts))
    return read_tensors(file)[0]


def digest(facts: Mapping[str, Any]) -> str:
    """8 hexadecimal digits that differ between facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:8]


def at_default(build: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Baseline:
    """An optimizer with its default settings, as a row of the table."""
    return Baseline(lambda learner, params, lr, steps: build(list(params.values())), (0.0,))


def unadapted(learner: rnnopt.Learner, task: rnnopt.Task) -> dict[str, float]:
    """The figures without any step, as a direct method of a field."""
    return task.scores(learner.module)


def honest_comparison(
    field: Field, options: Options, setting: str = "", prefix: str = ""
) -> Compared:
    """Compare the rules with the field's optimizers, and write table, figures and picture.

    The rule that ships has nothing set. The rule "field" begins with it and is meta-trained on the
    training tasks. AdamW, and gradient descent from learned initial values,
    have the best rate for each number of steps, found on validation tasks.

    Args:
        field: the field.
        options: the options of the command.
        setting: one of the field's settings, which is added to the name of the files.
        prefix: what the names of table, figures and picture begin with.

    Returns:
        The comparison. The output folder has its figures (``<prefix><name>.json``), its table
        (``.md``) and its picture (``.png``).
    """
    facts = {**field.facts, "field": field.name, "seed": options.seed, "small": options.small}
    facts["start"] = fingerprint(field.learner.initial_values)
    learned = {**facts, "meta_steps": options.meta_steps, "steps": field.steps}
    own = dict(field.usual)
    rules = {"field": rnnopt.load_rule(SHIPPED_RULE)}
    if field.meta_sgd is not None:
        names = [name for name, _ in field.learner.trainable()]
        rules["meta-sgd"] = rnnopt.MetaSGD(names, field.meta_sgd)
    for method, rule in rules.items():
        own[method] = rule_baseline(_meta_trained(field, options, learned, method, rule))
    tuned = {name: BASELINES[name] for name in ("adamw", "sgd")}
    if options.small:
        tuned = {name: replace(baseline, grid=RATES) for name, baseline in tuned.items()}
    own["adamw"] = tuned["adamw"]
    for method in field.initial:
        start = _start(field, options, learned, method)
        version = fingerprint(start.values or {})
        own[method] = replace(tuned["sgd"], start=start, version=version)
    name = "-".join(filter(None, (field.name, setting)))
    with progress_bar(f"compare: {name}") as bar:
        compared = rnnopt.compare(
            None,  # the rule that ships
            field.learner,
            field.source("test", True, setting),
            tuning=field.source("validation", True, setting),
            baselines=(),
            own_baselines=own,
            direct=field.direct,
            start=field.start,
            budgets=(1, 2) if options.small else field.budgets,
            episodes=options.episodes,
            tuning_episodes=1 if options.small else max(3, options.episodes // 3),
            journal=options.output / f"{name}-{digest(facts)}.jsonl",
            progress=lambda done, planned: bar.at(done, planned),
        )
    _write(f"{prefix}{name}", " ".join(filter(None, (field.title, setting))), options, compared)
    return compared


def main_of(make_field: Callable[[Options], Field]) -> Callable[[Options], None]:
    """The `main` of a field, for `command`: an `honest_comparison` on each of its settings."""

    def main(options: Options) -> None:
        field = make_field(options)
        for setting in field.settings:
            honest_comparison(field, options, setting)

    return main


def _meta_trained(
    field: Field, options: Options, facts: Mapping[str, Any], method: str, rule: Any
) -> Any:
    """A rule after meta-training on the field, kept as a rule file."""
    what = {"field": "rule"}.get(method, method)
    if method == "field":
        options = replace(options, meta_steps=max(1, options.meta_steps // field.slower))
    about = {**facts, "meta_steps": options.meta_steps, "from": rule_name(rule)}
    file = options.output / f"{field.name}-{what}-{digest(about)}.safetensors"
    if not file.exists():
        found = _train(field, options, what, rule=rule.requires_grad_(True).train())
        rnnopt.save_rule(found.rule, file, about)
    return rnnopt.load_rule(file)


def _start(field: Field, options: Options, facts: Mapping[str, Any], method: Any) -> Start:
    """The initial values that MAML or Reptile learns, with steps of gradient descent."""

    def make() -> dict[str, Tensor]:
        found = _train(field, options, method, rule=rnnopt.SGD(0.1), initial=method)
        return dict(found.start.values or {})

    return replace(field.start, values=kept(options.output, f"{field.name}-{method}", facts, make))


def _train(field: Field, options: Options, what: str, **learned: Any) -> Any:
    with progress_bar(f"meta-train: {field.name} {what}", options.meta_steps) as bar:
        return rnnopt.meta_train(
            field.learner,
            field.source("train", False),
            validation=field.source("validation", False),
            steps=2 if options.small else field.steps,
            meta_steps=options.meta_steps,
            meta_lr=3e-2 if what == "meta-sgd" else 1e-3,
            tasks_per_meta_step=2,
            validate_every=max(1, options.meta_steps // 3),
            validation_tasks=1 if options.small else 4,
            seed=options.seed,
            start=field.start,
            report=lambda record: bar.at(record["meta_step"]),
            **learned,
        )


def _write(name: str, title: str, options: Options, compared: Compared) -> None:
    text = f"{title}\n\n{compared.table('adamw', NAMES)}"
    if options.small:
        text = f"These figures mean nothing: they are of --small.\n\n{text}"
    rule = rule_name(rnnopt.load_rule(SHIPPED_RULE))
    figures = {"options": asdict(options), "rule": rule, **compared.figures}
    at = options.output / name
    content = json.dumps(figures, indent=1, default=str)
    write_atomically(at.with_name(f"{name}.json"), content.encode())
    write_atomically(at.with_name(f"{name}.md"), text.encode())
    print(text)
    try:
        compared.plot(at.with_name(f"{name}.png"), title, NAMES)
    except rnnopt.InputError as error:  # all else is done, and a picture must not cost it
        print(error, file=sys.stderr)
