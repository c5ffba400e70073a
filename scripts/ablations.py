r"""The shipped rules with parts of what they learned taken out, on validation classes.

    python scripts/ablations.py --data DATA --encoder MINILM --output ablations --tune head
    python scripts/ablations.py --data DATA --encoder MINILM --output ablations --tune lora \
        --episodes 6

DATA is a folder that holds clinc150, huffpost36 and trec28. Every variant starts from the same
values on the same episodes; "lent" is the rule of the other kind. --output keeps finished runs, so
that what was stopped goes on.

Time: on one core of a server processor 2 minutes for a head with 20 episodes, 20 minutes for LoRA
with 6. Prints a Markdown table: accuracy and query loss (nats) as shipped, and that minus each
variant's, paired over the episodes, with 95 % intervals.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rnnopt import LearnedOptimizer
from rnnopt.data.splits import read_splits
from rnnopt.evaluation.baselines import Baseline, Build
from rnnopt.evaluation.comparison import LEARNED, Comparison
from rnnopt.evaluation.journal import Journal
from rnnopt.rules.features import COORDINATE_FEATURES
from rnnopt.rules.files import SHIPPED_HEAD_RULE, SHIPPED_RULE, load_rule, rule_fingerprint
from rnnopt.rules.lstm import GROWTH_STEPS, CoordinateLSTM
from rnnopt.tasks.episodes import EpisodeSampler
from rnnopt.tasks.text.classifier import Classifier, Tune
from rnnopt.tasks.text.tasks import TextTasks

CELLS = (("clinc150", 5, 1), ("clinc150", 10, 5), ("huffpost36", 5, 5))  # folder, ways, shots
# Where the encoder has to learn, beside those: classes that it hardly tells apart.
LEARNING_CELLS = (*CELLS, ("trec28", 5, 5))
BUDGETS = (1, 2, 3, 5, 10, 20)
SHOWN = [*(("accuracy", b) for b in BUDGETS), *(("loss", b) for b in (3, 5, 20))]
QUERIES = 8
SEED = 77  # of the episodes
SHIPPED = "as shipped"


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


def unseen(path: Path, *inputs: int) -> CoordinateLSTM:
    """The rule in a file, blind to these of its coordinate features, see `coordinate_features`."""
    rule = without(path)
    with torch.no_grad():
        rule.gate_weight[:, list(inputs)] = 0.0
    return rule


def variants(tune: str) -> dict[str, CoordinateLSTM]:
    """Name -> rule; the shipped one first."""
    own, other = SHIPPED_RULE, SHIPPED_HEAD_RULE
    if tune == "head":
        own, other = other, own
    found = {SHIPPED: without(own), "no growth": without(own, "growth_")}
    if tune == "head":
        found["no steering"] = without(own, "output_")
        found["neither: Adam at the model's scale"] = without(own, "output_", "growth_")
        found["no tensor context"] = without(own, "context_weight")
        found["no normalised directions"] = unseen(own, 0, 1)
        found["no gradient against its tensor's"] = unseen(own, 2, 3)
        found["no memory in the LSTM"] = unseen(
            own, *range(COORDINATE_FEATURES, COORDINATE_FEATURES + found[SHIPPED].hidden_size)
        )
    else:
        found["growth at one speed"] = without(own)
        found["growth at one speed"].growth_threshold = None
        found["growth for 8 steps"] = without(own)
        found["growth for 8 steps"].growth_steps = GROWTH_STEPS
        found["growth as learned on heads"] = without(other).growth_only(orthogonalize=True)
        found["not orthogonalized"] = without(own)
        found["not orthogonalized"].orthogonalize = False
        found["lent: steered as a head is"] = without(other)
    return found


def stepped_by(rule: CoordinateLSTM) -> Build:
    """A rule as a method to compare with."""
    return lambda classifier, params, _, steps: LearnedOptimizer(params.values(), rule)


def rows(
    rules: dict[str, CoordinateLSTM],
    data: Path,
    encoder: str,
    tune: Tune,
    episodes: int,
    output: Path,
) -> Iterator[str]:
    """The table, line by line: `SHIPPED` among the rules, and what the others are behind it."""
    header = ["validation classes", "variant", *(f"{metric} at {b}" for metric, b in SHOWN)]
    yield "| " + " | ".join(header) + " |"
    yield "|---" * len(header) + "|"
    classifier = Classifier.load(
        encoder, tune=tune, ways=5, max_length=32, device=torch.device("cpu"), precision="fp32"
    )
    shipped = rules[SHIPPED]
    # the name of a run, which is kept, tells its rule
    others = {
        f"{name} {rule_fingerprint(rule)}": rule for name, rule in rules.items() if name != SHIPPED
    }
    for folder, ways, shots in CELLS if tune == "head" else LEARNING_CELLS:
        corpus = read_splits([str(data / folder)]).validation
        sampler = EpisodeSampler(corpus, ways=ways, shots=shots, queries=QUERIES, seed=SEED)
        tasks = TextTasks(sampler, classifier)
        facts = {
            "cell": [folder, ways, shots], "tune": tune, "encoder": classifier.fingerprint,
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
            Journal(output / f"{folder}-{tune}-{ways}way-{shots}shot.runs", facts),
            own_baselines={
                name: Baseline(stepped_by(rule), (1.0,)) for name, rule in others.items()
            },
        ).run(episodes, 1)
        title = f"{folder}, {ways}-way {shots}-shot, {tune} ({episodes} episodes)"
        yield line(title, SHIPPED, result["methods"][LEARNED], "")
        for name in others:
            yield line("", f"- {name.rpartition(' ')[0]}", result["paired"][name], "+")


def line(title: str, name: str, figures: dict[str, Any], sign: str) -> str:
    """A row of the table."""
    cells = (figures[metric][str(b)] for metric, b in SHOWN)
    shown = [f"{cell['mean']:{sign}.3f} ± {cell['ci95']:.3f}" for cell in cells]
    return "| " + " | ".join([title, name, *shown]) + " |"


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What `rows` has to know."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--episodes", type=int, default=20)
    return parser


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--tune", choices=("head", "lora", "full"), default="head")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rules = variants(options.tune)
    table = rows(
        rules, options.data, options.encoder, options.tune, options.episodes, options.output
    )
    for row in table:
        print(row, flush=True)
