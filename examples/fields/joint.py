"""Many fields, one rule: meta-train on all fields but one, and compare on the one left out.

    python examples/fields/joint.py --data DATA --output out

DATA has the folders of `FIELDS`. For each field in turn, the rule of two levels is meta-trained on
the training tasks of the other fields, which take turns, and becomes a row of that field's own
comparison. With the same `--output` as the fields' own commands, everything that these have done is
used again. Several minutes a field on two cores, where the fields' own commands have run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module

from field import Field, Options, command, digest, honest_comparison

import rnnopt
from rnnopt.cli.progress import progress_bar
from rnnopt.evaluation.baselines import rule_baseline
from rnnopt.rules.files import TWO_LEVEL_RULE, SavedRule, rule_name
from rnnopt.storage.files import fingerprint

FIELDS = {"translation": "multi30k", "dialogue": "daily_dialogue"}  # module: folder of its data
MORE = {"fields": {"default": list(FIELDS), "nargs": "+", "help": "of those here [%(default)s]"}}


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


def joint_rule(others: Sequence[Field], options: Options) -> SavedRule:
    """The rule of two levels after meta-training on several fields, kept as a rule file."""
    rule = rnnopt.load_rule(TWO_LEVEL_RULE)
    about = {
        "fields": {f.name: fingerprint(f.learner.initial_values) for f in others},
        "facts": [dict(f.facts) for f in others],
        "meta_steps": options.meta_steps, "seed": options.seed, "from": rule_name(rule),
    }  # fmt: skip
    names = "-".join(f.name for f in others)
    file = options.output / f"joint-{names}-{digest(about)}.safetensors"
    if file.exists():
        return rnnopt.load_rule(file)
    train = Mixed([f.source("train", False) for f in others])
    with progress_bar(f"meta-train: {names}", options.meta_steps) as bar:
        found = rnnopt.meta_train(
            train.learner,
            train,
            validation=Mixed([f.source("validation", False) for f in others]),
            rule=rule.requires_grad_(True).train(),
            steps=2 if options.small else 5,
            meta_steps=options.meta_steps,
            meta_lr=1e-3,
            tasks_per_meta_step=max(2, len(others)),
            validate_every=max(1, options.meta_steps // 5),
            validation_tasks=len(others) if options.small else 6,
            seed=options.seed,
            report=lambda record: bar.at(record["meta_step"]),
        )
    rnnopt.save_rule(found.rule, file, about)
    return rnnopt.load_rule(file)


def main(options: Options) -> None:
    """Make all fields; leave each out in turn."""
    chosen = options.more["fields"]
    if len(chosen) < 2 or not FIELDS.keys() >= set(chosen):
        raise rnnopt.InputError(
            f"--fields {' '.join(chosen)}: needs at least two of {', '.join(FIELDS)}, one to leave "
            "out and one to learn from"
        )
    made = {}
    for name in chosen:
        module = import_module(name)
        defaults = {key: about["default"] for key, about in module.MORE.items()}
        made[name] = module.make_field(
            replace(options, data=options.data / FIELDS[name], more=defaults)
        )
    for name, left_out in made.items():
        rule = joint_rule([field for other, field in made.items() if other != name], options)
        field = replace(left_out, usual={**left_out.usual, "joint": rule_baseline(rule)})
        for setting in field.settings or [""]:
            honest_comparison(field, options, setting)


if __name__ == "__main__":
    sys.exit(command(__doc__, main, meta_steps=40, episodes=12, more=MORE))
