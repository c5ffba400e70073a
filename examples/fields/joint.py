"""Many fields, one rule: meta-train on all fields, on all but one, and on each alone.

    python examples/fields/joint.py --data DATA --encoder MINILM --output out

DATA has the folders and files of `FIELDS`; symbolic links will do. The shipped rule is
meta-trained on the training tasks of all fields, which take turns, for each field on those of the
others, and for each field on its own. All of these rules get as many meta-steps of as many tasks,
and all become rows of each field's own comparison. With the same `--output` as the fields' own
commands, what these have done is used again. Prints a table of all fields. About 15 minutes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib import import_module

from field import NAMES, Field, Options, command, digest, honest_comparison

import rnnopt
from rnnopt.cli.progress import progress_bar
from rnnopt.evaluation.baselines import rule_baseline
from rnnopt.evaluation.compare import Compared
from rnnopt.evaluation.statistics import with_interval
from rnnopt.rules.files import SHIPPED_RULE, SavedRule, rule_name
from rnnopt.storage.files import fingerprint, write_atomically

FIELDS = {  # module: its data in DATA
    "translation": "multi30k",
    "dialogue": "daily_dialogue",
    "selection": "daily_dialogue",
    "speech": "spoken_digits/recordings.zip",
    "digits": "spoken_digits/recordings.zip",
    "recommendation": "Rdata.rdb",
}
DEFAULT = ["selection", "digits", "recommendation"]
RULES = ("learned", "field", "joint", "all")  # columns of the table
MORE = {
    "fields": {"default": DEFAULT, "nargs": "+", "help": f"of {', '.join(FIELDS)} [%(default)s]"},
    "encoder": {"help": "of selection: a folder of transformers'"},
}


class Mixed(rnnopt.TaskSource):
    """The tasks of several sources, which take turns."""

    def __init__(self, sources: Sequence[rnnopt.TaskSource]) -> None:
        super().__init__(self.load, sources[0].learner)
        self._sources = sources

    def load(self, number: int) -> rnnopt.Task:
        turn, source = divmod(number, len(self._sources))
        return self._sources[source].load(turn)

    def learner_of(self, number: int) -> rnnopt.Learner:
        return self._sources[number % len(self._sources)].learner


def joint_rule(fields: Sequence[Field], options: Options) -> SavedRule:
    """The shipped rule after meta-training on several fields, kept as a rule file."""
    rule = rnnopt.load_rule(SHIPPED_RULE)
    about = {
        "fields": {f.name: fingerprint(f.learner.initial_values) for f in fields},
        "facts": [dict(f.facts) for f in fields],
        "meta_steps": options.meta_steps, "seed": options.seed, "from": rule_name(rule),
    }  # fmt: skip
    names = "-".join(f.name for f in fields)
    file = options.output / f"joint-{names}-{digest(about)}.safetensors"
    if file.exists():
        return rnnopt.load_rule(file)
    train = Mixed([f.source("train", False) for f in fields])
    with progress_bar(f"meta-train: {names}", options.meta_steps) as bar:
        found = rnnopt.meta_train(
            train.learner,
            train,
            validation=Mixed([f.source("validation", False) for f in fields]),
            rule=rule.requires_grad_(True).train(),
            steps=2 if options.small else 5,
            meta_steps=options.meta_steps,
            meta_lr=1e-3,
            tasks_per_meta_step=2,
            validate_every=max(1, options.meta_steps // 3),
            validation_tasks=len(fields) if options.small else 6,
            seed=options.seed,
            report=lambda record: bar.at(record["meta_step"]),
        )
    rnnopt.save_rule(found.rule, file, about)
    return rnnopt.load_rule(file)


def summary(found: Mapping[tuple[str, str], tuple[Field, Compared]]) -> str:
    """Markdown tables of all fields: each rule minus AdamW at its best rate, paired.

    Args:
        found: the comparisons, by field and setting. The first table is of the loss, the second of
            the first metric of each field.
    """
    tables = []
    for title in ("loss", "metric"):
        columns = [NAMES[rule].replace("shipped rule", "").strip(", ") for rule in RULES]
        head = ["field", "steps", *(name or "as it ships" for name in columns), "on all - on it"]
        lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
        for (_, setting), (field, compared) in found.items():
            name = "loss" if title == "loss" else next(iter(field.metrics), "loss")
            pairs = [compared.paired(rule, "adamw")[name] for rule in RULES]
            pairs.append(compared.paired("all", "field")[name])
            for budget in pairs[0]:
                cells = (with_interval(pair[budget], signed=True) for pair in pairs)
                what = " ".join(filter(None, (field.name, setting, f"({name})")))
                lines.append(f"| {what} | {budget} | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables) + "\n"


def made_fields(options: Options) -> dict[str, Field]:
    """The chosen fields, each without rows of other meta-learning, for the same meta-steps."""
    chosen = options.more["fields"]
    if len(chosen) < 2 or not FIELDS.keys() >= set(chosen):
        raise rnnopt.InputError(
            f"--fields {' '.join(chosen)}: needs at least two of {', '.join(FIELDS)}, one to leave "
            "out and one to learn from"
        )
    made = {}
    for name in chosen:
        module = import_module(name)
        more = {key: about.get("default") for key, about in module.MORE.items()}
        if "encoder" in more:
            more["encoder"] = options.more.get("encoder")
            if more["encoder"] is None:
                raise rnnopt.InputError(
                    f"--fields {' '.join(chosen)}: {name} needs an encoder; name a folder with "
                    "--encoder, or leave it out of --fields"
                )
        field = module.make_field(replace(options, data=options.data / FIELDS[name], more=more))
        made[name] = replace(field, initial=(), meta_sgd=None, slower=1, steps=5)
    return made


def main(options: Options) -> None:
    """Make all fields; meta-train on all, and on all but each in turn; compare."""
    made = made_fields(options)
    every = rule_baseline(joint_rule(list(made.values()), options))
    found = {}
    for name, field in made.items():
        others = joint_rule([made[other] for other in made if other != name], options)
        rows = {**field.usual, "joint": rule_baseline(others), "all": every}
        for setting in field.settings or [""]:
            compared = honest_comparison(replace(field, usual=rows), options, setting, "joint-")
            found[name, setting] = field, compared
    text = summary(found)
    if options.small:
        text = f"These figures mean nothing: they are of --small.\n\n{text}"
    rule = rule_name(rnnopt.load_rule(SHIPPED_RULE))
    about = {"options": asdict(options), "rule": rule, "fields": list(made)}
    content = json.dumps(about, indent=1, default=str)
    write_atomically(options.output / "joint.json", content.encode())
    write_atomically(options.output / "joint.md", text.encode())
    print(text)


if __name__ == "__main__":
    sys.exit(command(__doc__, main, meta_steps=60, episodes=24, more=MORE))
