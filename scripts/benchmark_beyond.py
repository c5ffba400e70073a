"""The rule where it was hardly, or never, meta-trained: other horizons, shapes, encoders, settings.

    python scripts/benchmark_beyond.py --data DATA/clinc150 --encoder MINILM --output beyond
    python scripts/benchmark_beyond.py --output beyond --table

Each condition differs from a plain one, 5-way 5-shot, full batch, in what its name says, and sets
the rule beside AdamW, tuned on validation classes under the same condition for every budget of
steps. Three more rows are the rule itself with `lr` 0.5 and 2 and with gradients clipped to norm 1.
DATA is a folder with train, val and test files of disjoint classes; MINILM a BERT, a hub name or a
folder, of which `half-depth` keeps the lower half of the layers. Everything goes on where it was
stopped, and another rule reuses AdamW's runs.

Time, on one core of a server processor: with --tune head a minute a condition, with --tune lora ten
minutes, but for `long` an hour. Last line: how many conditions are finished.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmark import progress
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from rnnopt import LearnedOptimizer
from rnnopt.cli.settings.loading import choose_device, choose_rule
from rnnopt.data.corpus import Corpus
from rnnopt.data.splits import read_splits
from rnnopt.evaluation.baselines import Baseline, Build
from rnnopt.evaluation.comparison import LEARNED, Comparison, default_budgets
from rnnopt.evaluation.journal import Journal
from rnnopt.rules.files import SavedRule, rule_fingerprint
from rnnopt.storage.files import write_atomically
from rnnopt.tasks.episodes import EpisodeSampler
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.encoder.loading import encoder_name
from rnnopt.tasks.text.tasks import TextTasks

TUNED = "adamw"
SHOWN = (1, 3, 5, 10, 20, 200)
CLIPPED_TO = 1.0


@dataclass(frozen=True)
class Condition:
    """One thing that differs; what isn't named is as in the plain one."""

    ways: int = 5
    shots: int = 5
    batch_size: int | None = None
    steps: int = 20
    lora_rank: int = 8
    half_depth: bool = False
    dropout: bool = False


CONDITIONS = {
    "plain": Condition(),
    "ways-2": Condition(ways=2),
    "ways-30": Condition(ways=30, shots=1),
    "shots-50": Condition(shots=50),
    "batch-4": Condition(batch_size=4),
    "batch-128": Condition(shots=50, batch_size=128),
    "rank-2": Condition(lora_rank=2),
    "rank-64": Condition(lora_rank=64),
    "dropout": Condition(dropout=True),
    "half-depth": Condition(half_depth=True),
    "long": Condition(shots=50, batch_size=16, steps=200),
}


def variants(rule: SavedRule) -> dict[str, Baseline]:
    """The rule with something else set, as methods to compare it with."""

    def multiplied(lr: float) -> Build:
        return lambda classifier, params, _, steps: LearnedOptimizer(params.values(), rule, lr=lr)

    def clipped(
        classifier: Classifier, params: Any, lr: float, steps: int
    ) -> torch.optim.Optimizer:
        def clip(*_: Any) -> None:
            clip_grad_norm_(list(params.values()), CLIPPED_TO)

        optimizer = LearnedOptimizer(params.values(), rule)
        optimizer.register_step_pre_hook(clip)
        return optimizer

    name = rule_fingerprint(rule)  # in the name of a run, which is kept
    builds = {"lr 0.5": multiplied(0.5), "lr 2": multiplied(2.0), "clipped": clipped}
    return {f"{variant} {name}": Baseline(build, (1.0,)) for variant, build in builds.items()}


def half_encoder(encoder: str, folder: Path) -> Path:
    """Keep the lower half of an encoder's layers, in a folder."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    path = folder / "half-depth"
    layers = AutoConfig.from_pretrained(encoder).num_hidden_layers // 2
    model = AutoModel.from_pretrained(encoder, num_hidden_layers=layers, use_safetensors=True)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(path)
    model.save_pretrained(path)
    return path


def compare(name: str, condition: Condition, options: argparse.Namespace) -> dict[str, Any]:
    """The rule, its variants and AdamW under a condition, as `rnnopt.evaluation.comparison` has it."""
    splits = read_splits([options.data])
    encoder = options.encoder
    if condition.half_depth:
        encoder = half_encoder(encoder, Path(options.output))
    classifier = Classifier.load(
        encoder, tune=options.tune, lora_rank=condition.lora_rank, ways=condition.ways,
        dropout=condition.dropout, max_length=options.max_length, precision=options.precision,
        device=choose_device(options.device),
    )  # fmt: skip

    _, rule = choose_rule(options.rule, [param for _, param in classifier.trainable()])

    def source(corpus: Corpus) -> TextTasks:
        sampler = EpisodeSampler(
            corpus, ways=condition.ways, shots=condition.shots, queries=options.queries, seed=0
        )
        sizes = None if condition.batch_size is None else [condition.batch_size]
        return TextTasks(sampler, classifier, sizes)

    facts = {
        "condition": str(condition), "encoder": encoder_name(options.encoder),
        "encoder_weights": classifier.fingerprint, "tune": options.tune,
        "queries": options.queries, "max_length": options.max_length,
        "precision": classifier.precision, "device": classifier.device.type,
        "tuning_episodes": options.tuning_episodes,
        "data": [splits.validation.fingerprint(), splits.test.fingerprint()],
    }  # fmt: skip
    own = variants(rule)
    bar = tqdm(unit="run", desc=name)
    comparison = Comparison(
        classifier,
        rule,
        rule_fingerprint(rule),
        source(splits.validation),
        source(splits.test),
        default_budgets(condition.steps),
        [TUNED, *own],
        Journal(Path(options.output) / f"{name}.runs", facts),
        tick=lambda run: bar.update() and None,
        own_baselines=own,
    )
    result = comparison.run(options.episodes, options.tuning_episodes)
    bar.close()
    return {"facts": {**facts, "rule": rule_fingerprint(rule)}, **result}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Accuracy of the rule, and what it is ahead of AdamW and of its variants, as Markdown."""
    header = ["condition", "accuracy", *(str(b) for b in SHOWN), "undone"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name, result in results.items():
        rows = {"rnnopt": result["methods"][LEARNED]["accuracy"]}
        for other, paired in result["paired"].items():
            known = other.rpartition(" ")[0] or other  # a variant's name ends with the rule's
            rows[f"- {known if other != TUNED else 'AdamW, tuned'}"] = paired["accuracy"]
        for title, row in rows.items():
            cells = (row.get(str(b)) for b in SHOWN)
            sign = "+" if title.startswith("-") else ""
            figures = [f"{c['mean']:{sign}.3f} ± {c['ci95']:.3f}" if c else "" for c in cells]
            undone = "" if sign else str(result["methods"][LEARNED]["undone"])
            shown = "" if sign else f"{name} ({result['episodes']} episodes)"
            lines.append("| " + " | ".join([shown, title, *figures, undone]) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, metavar="FOLDER")
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    parser.add_argument("--data", metavar="FOLDER")
    parser.add_argument("--encoder", metavar="NAME_OR_PATH")
    parser.add_argument("--rule", help="[the one shipped for what trains]")
    parser.add_argument("--tune", choices=("head", "lora", "full"), default="lora", help="[lora]")
    parser.add_argument(
        "--conditions", nargs="+", default=["*"], metavar="PATTERN",
        help=f"of {', '.join(CONDITIONS)} [all]",
    )  # fmt: skip
    parser.add_argument("--episodes", type=int, default=20, help="test episodes each [20]")
    parser.add_argument("--tuning-episodes", type=int, default=4, metavar="E", help="[4]")
    parser.add_argument("--queries", type=int, default=5, help="query texts a class [5]")
    parser.add_argument("--max-length", type=int, default=64, help="tokens of a text [64]")
    for name in ("--device", "--precision"):
        parser.add_argument(name, default="auto", help="as `rnnopt compare` has it [auto]")
    options = parser.parse_args(arguments)
    chosen = {
        name: condition
        for name, condition in CONDITIONS.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in options.conditions)
    }
    if not chosen:
        parser.error(
            f"--conditions {' '.join(options.conditions)}: none of {', '.join(CONDITIONS)}"
        )
    files = {name: Path(options.output) / f"{name}.json" for name in chosen}
    if options.table:
        found = {name: json.loads(f.read_text()) for name, f in files.items() if f.exists()}
        if not found:
            parser.error(f"--output {options.output}: nothing finished there; run some first")
        print(table(found))
        return 0
    if options.data is None or options.encoder is None:
        parser.error("--data and --encoder are needed, unless --table is given")
    for number, (name, condition) in enumerate(chosen.items(), start=1):
        result = compare(name, condition, options)
        write_atomically(files[name], (json.dumps(result, indent=1) + "\n").encode())
        progress(f"{number} of {len(chosen)} conditions are finished")
    return 0


if __name__ == "__main__":
    sys.exit(main())
