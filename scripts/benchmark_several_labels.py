"""Texts with several labels: `TextClassifier` with its thresholds, beside a threshold of 1/2.

    python scripts/benchmark_several_labels.py --data DATA --encoder MINILM

`DATA` is a folder that holds `clinc150` and `stackoverflow20`, as gzip JSON lines. None of these
sets has texts with several labels. They are therefore made, as in MixSNIPS (Qin et al. 2020,
arXiv:2004.10087): a text of one test class, or texts of two or three joined by "and"; a tenth is of
a train class, and has no label. Every draw takes some such texts to fit on, and 300 made of other
texts to judge by, without adaptation. "right" is the share of texts with all labels right. A draw
takes 10 seconds of one core. Last line: the table's last row.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rnnopt import TextClassifier
from rnnopt.data.files import read_corpus
from rnnopt.evaluation.statistics import interval, with_interval
from rnnopt.tasks.text.estimator.figures import Figures

SETS = {"clinc150": 10, "stackoverflow20": 6}  # and how many of the test classes
JUDGED = 300
CHANCES = {0: 0.1, 1: 0.5, 2: 0.3, 3: 0.1}  # of a text with so many labels
COLUMNS = ("micro F1", "macro F1", "right", "log loss", "calibration error")


def joined(
    parts: list[list[str]], other: list[str], count: int, generator: np.random.Generator
) -> tuple[list[str], list[list[str]]]:
    """Texts of some classes, and the labels of each.

    Args:
        parts: texts of each class.
        other: texts of no class.
        count: of texts to make.
        generator: draws them.
    """
    texts, labels = [], []
    for size in generator.choice(list(CHANCES), size=count, p=list(CHANCES.values())):
        chosen = generator.permutation(len(parts))[:size]
        pieces = [parts[i][generator.integers(len(parts[i]))] for i in chosen]
        texts.append(" and ".join(pieces) or other[generator.integers(len(other))])
        labels.append([f"label {i}" for i in chosen])
    return texts, labels


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--texts", nargs="+", type=int, default=[50, 200])
    parser.add_argument("--draws", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| set | texts | thresholds |", " | ".join(COLUMNS), "|")
    print("|---|---|---|---|---|---|---|---|")
    for name, count in product(SETS, options.texts):
        corpus = read_corpus(options.data / name / "test.jsonl.gz")
        other = list(read_corpus(options.data / name / "train.jsonl.gz").texts)
        found: dict[str, list[list[float]]] = defaultdict(list)
        for seed in range(options.draws):
            generator = np.random.default_rng([seed, count])
            keys = sorted(corpus.classes)
            chosen = [keys[i] for i in generator.permutation(len(keys))[: SETS[name]]]
            rows = [[corpus.texts[i] for i in corpus.classes[key]] for key in chosen]
            halves = [(part[::2], part[1::2]) for part in rows]
            fit = joined([half[0] for half in halves], other[::2], count, generator)
            judge = joined([half[1] for half in halves], other[1::2], JUDGED, generator)
            classifier = TextClassifier(options.encoder, steps=0, device="cpu").fit(*fit)
            known = classifier.classes_.tolist()
            labels = np.array([[label in row for label in known] for row in judge[1]], float)
            chances = classifier.predict_proba(judge[0])
            for kind, thresholds in (
                ("by cross-validation", classifier.thresholds_),
                ("1/2", np.full(len(known), 0.5)),
            ):
                figures: Any = Figures.of_several(chances, labels, thresholds)
                found[kind].append(
                    [
                        figures.micro_f1, figures.macro_f1, figures.accuracy, figures.log_loss,
                        figures.calibration_error,
                    ]
                )  # fmt: skip
        for kind, lines in found.items():
            columns = np.array(lines).T
            cells = " | ".join(with_interval(interval(column)) for column in columns)
            print(f"| {name}, {SETS[name]} labels | {count} | {kind} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
