"""The shipped rules with parts of what they learned taken out, on validation classes.

    python scripts/ablations.py --data DATA --encoder MINILM --tune head > head.md
    python scripts/ablations.py --data DATA --encoder MINILM --tune lora --episodes 6

DATA is a folder that holds clinc150 and huffpost36. Every variant starts from the same values on
the same episodes; a row is the mean over episodes of accuracy, then of query loss (nats). "lent" is
the rule of the other kind.

Time: on one core of a server processor 2 minutes for a head with 20 episodes, 20 minutes for LoRA
with 6. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from rnnopt import LearnedOptimizer
from rnnopt.checkpoint import SHIPPED_HEAD_RULE, SHIPPED_RULE, load_rule
from rnnopt.episodes import EpisodeSampler
from rnnopt.lstm import CoordinateLSTM
from rnnopt.splits import read_splits
from rnnopt.start import Start
from rnnopt.task import TaskSource, adapt_and_judge
from rnnopt.text import Classifier, Tune

CELLS = (("clinc150", 5, 1), ("clinc150", 10, 5), ("huffpost36", 5, 5))  # folder, ways, shots
BUDGETS = (1, 2, 3, 5, 10, 20)
QUERIES = 8
SEED = 77  # of the episodes
HEADS = 5_000_000  # the seed of the first episode's head


def without(path: Path, *prefixes: str) -> CoordinateLSTM:
    """The rule in a file with the weights of these names at zero."""
    rule = load_rule(path)
    if not isinstance(rule, CoordinateLSTM):
        raise TypeError(f"{path} holds {type(rule).__name__}")
    with torch.no_grad():
        for name, weight in rule.named_parameters():
            if name.startswith(prefixes):
                weight.zero_()
    return rule


def variants(tune: str) -> dict[str, CoordinateLSTM]:
    """Name -> rule; the shipped one first."""
    own, other = SHIPPED_RULE, SHIPPED_HEAD_RULE
    if tune == "head":
        own, other = other, own
    found = {"as shipped": without(own), "no growth": without(own, "growth_")}
    if tune == "head":
        found["no steering"] = without(own, "output_")
        found["neither: Adam at the model's scale"] = without(own, "output_", "growth_")
    else:
        found["lent: steered as a head is"] = without(other)
    return found


def rows(data: Path, encoder: str, tune: Tune, episodes: int) -> Iterator[str]:
    """The table, line by line."""
    yield (
        "| validation classes | variant | "
        + " | ".join(map(str, BUDGETS))
        + " | loss at 3 | 5 | 20 |"
    )
    yield "|---|---|" + "---|" * (len(BUDGETS) + 3)
    classifier = Classifier.load(
        encoder, tune=tune, ways=5, max_length=32, device=torch.device("cpu"), precision="fp32"
    )
    for folder, ways, shots in CELLS:
        sampler = EpisodeSampler(
            read_splits([str(data / folder)]).validation,
            ways=ways, shots=shots, queries=QUERIES, seed=SEED,
        )  # fmt: skip
        tasks = TaskSource(sampler, classifier)
        for name, rule in variants(tune).items():
            table = torch.zeros(episodes, len(BUDGETS), 2)
            for number in range(episodes):
                task = tasks.load(number)
                Start().begin(classifier, task.support, task.ways, HEADS + number)
                params = [param for _, param in classifier.trainable()]
                scores = adapt_and_judge(
                    classifier, LearnedOptimizer(params, rule), task, BUDGETS
                ).scores
                table[number] = torch.tensor(
                    [(scores[b].accuracy, scores[b].loss) for b in BUDGETS]
                )
            accuracy, loss = table.mean(dim=0).unbind(dim=1)
            cells = [f"{x:.3f}" for x in accuracy] + [
                f"{loss[BUDGETS.index(b)]:.2f}" for b in (3, 5, 20)
            ]
            yield (
                f"| {folder}, {ways}-way {shots}-shot, {tune} | {name} | "
                + " | ".join(cells)
                + " |"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--tune", choices=("head", "lora", "full"), default="head")
    parser.add_argument("--episodes", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for line in rows(options.data, options.encoder, options.tune, options.episodes):
        print(line, flush=True)
