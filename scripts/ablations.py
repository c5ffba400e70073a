r"""The rule for heads, meta-trained again with one change at a time, on validation classes.

    python scripts/ablations.py --data DATA --encoder MINILM --output ablations

Each variant is the run of scripts/meta_train.py, with its seed and one change; its best rule is
compared with the shipped one on the same episodes, from the same initial values. DATA is a folder
that holds the sources of meta_train.py, and MINILM is all-MiniLM-L6-v2, a hub name or a folder.
--only takes some of the variants. --output keeps what is finished, and the same command goes on
after a stop.

Time: on one core of a server processor 8 minutes for a variant and a minute for its rows, with 20
episodes. Memory: 3 GiB.
Prints a Markdown table: accuracy and query loss (nats) of the shipped rule, and the difference of
each variant to it, paired over the episodes, with 95 % intervals.
Last line: the last variant's row of the last cell.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from meta_train import RECIPE, SOURCES, meta_train

from rnnopt import LearnedOptimizer
from rnnopt.data.splits import read_splits
from rnnopt.evaluation.baselines import Baseline, Build
from rnnopt.evaluation.comparison import LEARNED, Comparison
from rnnopt.evaluation.journal import Journal
from rnnopt.rules.files import SHIPPED_HEAD_RULE, load_rule, rule_fingerprint
from rnnopt.rules.lstm import CoordinateLSTM
from rnnopt.tasks.episodes import EpisodeSampler
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.tasks import TextTasks

CELLS = (("clinc150", 5, 1), ("clinc150", 10, 5), ("huffpost36", 5, 5))  # folder, ways, shots
BUDGETS = (1, 2, 3, 5, 10, 20)
SHOWN = [*(("accuracy", b) for b in BUDGETS), *(("loss", b) for b in (3, 5, 20))]
QUERIES = 8
SEED = 77  # of the episodes
SHIPPED = "as shipped"


class Change(NamedTuple):
    """What a variant does otherwise than the recipe."""

    options: str = ""  # the last of an option counts
    without: str = ""  # an option that the recipe leaves out
    sources: tuple[str, ...] = SOURCES
    hidden_size: int = 8


CHANGES = {
    "first order": Change(without="--exact head"),
    "one source (CLINC150)": Change(sources=SOURCES[:1]),
    "meta-loss on the support set": Change("--query-weight 0 --support-weight 1"),
    "no LSTM": Change(hidden_size=0),
    "hidden size 4": Change(hidden_size=4),
    "hidden size 16": Change(hidden_size=16),
    "hidden size 32": Change(hidden_size=32),
    "8 steps unrolled": Change("--steps 8"),
    "meta-loss not calibrated": Change("--calibrated 0 --sure-from 1"),
    "full batches only": Change("--batch-size 1000"),
    # second order takes all coordinates
    "first order, 256 coordinates": Change("--coordinates 256", without="--exact head"),
}


def changed(change: Change) -> list[str]:
    """The recipe's options with the change.

    Raises:
        ValueError: the recipe lacks what is to be left out.
    """
    recipe = RECIPE.replace("\n", " ")
    if change.without not in recipe:
        raise ValueError(f"the recipe has no {change.without!r} to leave out")
    return [*recipe.replace(change.without, "").split(), *change.options.split()]


def trained(change: Change, data: Path, encoder: str, output: Path) -> CoordinateLSTM:
    """The best rule of a variant's run, which begins, goes on or has ended."""
    output.parent.mkdir(parents=True, exist_ok=True)
    code = meta_train(
        data,
        encoder,
        output,
        resume=True,
        sources=change.sources,
        recipe=changed(change),
        hidden_size=change.hidden_size,
    )
    if code != 0:
        sys.exit(code)
    return cast(CoordinateLSTM, load_rule(output))


def stepped_by(rule: CoordinateLSTM) -> Build:
    """A rule as a method to compare with."""
    return lambda classifier, params, _, steps: LearnedOptimizer(params.values(), rule)


def rows(
    rules: dict[str, CoordinateLSTM], data: Path, encoder: str, episodes: int, output: Path
) -> Iterator[str]:
    """The table, line by line: the shipped rule, and what the others are ahead of it by."""
    header = ["validation classes", "variant", *(f"{metric} at {b}" for metric, b in SHOWN)]
    yield "| " + " | ".join(header) + " |"
    yield "|---" * len(header) + "|"
    classifier = Classifier.load(
        encoder, tune="head", ways=5, max_length=32, device=torch.device("cpu"), precision="fp32"
    )
    shipped = rules[SHIPPED]
    # the name of a run, which is kept, tells its rule
    others = {
        f"{name} {rule_fingerprint(rule)}": rule for name, rule in rules.items() if name != SHIPPED
    }
    for folder, ways, shots in CELLS:
        corpus = read_splits([str(data / folder)]).validation
        sampler = EpisodeSampler(corpus, ways=ways, shots=shots, queries=QUERIES, seed=SEED)
        tasks = TextTasks(sampler, classifier)
        facts = {
            "cell": [folder, ways, shots], "tune": "head", "encoder": classifier.fingerprint,
            "data": corpus.fingerprint(),
        }  # fmt: skip
        result = Comparison(
            classifier,
            shipped,
            rule_fingerprint(shipped),
            tasks,
            tasks,  # nothing is tuned
            BUDGETS,
            list(others),
            Journal(output / f"{folder}-head-{ways}way-{shots}shot.runs", facts),
            own_baselines={
                name: Baseline(stepped_by(rule), (1.0,)) for name, rule in others.items()
            },
        ).run(episodes, 1)
        title = f"{folder}, {ways}-way {shots}-shot, head ({episodes} episodes)"
        yield line(title, SHIPPED, result["methods"][LEARNED], "")
        for name in others:
            yield line("", f"- {name.rpartition(' ')[0]}", result["paired"][name], "+")


def line(title: str, name: str, figures: dict[str, Any], sign: str) -> str:
    """A row of the table."""
    cells = (figures[metric][str(b)] for metric, b in SHOWN)
    shown = [f"{cell['mean']:{sign}.3f} ± {cell['ci95']:.3f}" for cell in cells]
    return "| " + " | ".join([title, name, *shown]) + " |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=tuple(CHANGES), default=tuple(CHANGES))
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in meta_train.py
    rules = {SHIPPED: cast(CoordinateLSTM, load_rule(SHIPPED_HEAD_RULE))}
    for name in options.only:
        folder = options.output / "".join(c if c.isalnum() else "-" for c in name)
        rules[name] = trained(CHANGES[name], options.data, options.encoder, folder)
    for row in rows(rules, options.data, options.encoder, options.episodes, options.output):
        print(row, flush=True)
