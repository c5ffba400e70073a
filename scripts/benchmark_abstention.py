"""Texts that belong to no label: what does `TextClassifier(encoder, abstain=...)` do with them?

    python scripts/benchmark_abstention.py --data DATA --encoder MINILM

`DATA` is a folder that holds `clinc150`, as gzip JSON lines: `test` with 50 classes, and `oos` with
1,200 texts that belong to no class of CLINC150 (Larson et al. 2019, arXiv:1909.02027). Every draw
takes some test classes and some texts of each to fit on; 300 other texts of them, and all that
belong nowhere, judge. "answered" is the share of texts with an answer. The lines of "probability"
bound the largest probability instead of the largest logit, by the same texts held out. `--part
choose` takes validation classes instead, and 500 texts of train classes as those that belong
nowhere: by these the logit was chosen. A draw takes a quarter of a minute of one core, with
`--steps 10` a minute. Last line: the table's last row, of 50 classes with 20 texts each.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from rnnopt import TextClassifier
from rnnopt.data.files import read_corpus
from rnnopt.evaluation.statistics import interval, with_interval
from rnnopt.tasks.text.estimator.evidence import Labelled, choose_start
from rnnopt.tasks.text.estimator.heads import log_softmax

JUDGED = 300  # texts of the known classes to judge by
COLUMNS = ("answered", "answered of no class", "right of the answered", "AUROC")


def texts_of(data: Path, part: str) -> tuple[Any, list[str]]:
    """The corpus of known classes, and texts that belong to none of them."""
    if part == "report":
        return read_corpus(data / "test.jsonl.gz"), list(read_corpus(data / "oos.jsonl.gz").texts)
    others = read_corpus(data / "train.jsonl.gz").texts
    order = np.random.default_rng(0).permutation(len(others))[:500]
    return read_corpus(data / "val.jsonl.gz"), [others[i] for i in order]


def draw(corpus: Any, ways: int, shots: int, seed: int) -> tuple[list[int], list[int]]:
    """Places of texts to fit on, and of texts to judge by."""
    generator = np.random.default_rng([seed, ways, shots])
    keys = sorted(corpus.classes)
    fit: list[int] = []
    judge: list[int] = []
    for place in generator.permutation(len(keys))[:ways]:
        rows = generator.permutation(corpus.classes[keys[place]])
        fit += rows[:shots].tolist()
        judge += rows[shots : shots + JUDGED // ways].tolist()
    return fit, judge


def floors(classifier: TextClassifier, texts: list[str], labels: list[str]) -> dict[str, float]:
    """The smallest largest logit that is answered, and the same for probabilities."""
    classes = {label: place for place, label in enumerate(classifier.classes_.tolist())}
    places = np.array([classes[label] for label in labels])
    embeddings = classifier._fitted().encoder.embed(texts).double().numpy()
    judged = choose_start(Labelled(embeddings, places, np.ones(len(places))), 0).judged
    assert judged is not None
    chances = np.sort(np.exp(log_softmax(judged.logits)).max(axis=1))
    return {"probability": float(chances[int(classifier.abstain * len(chances))])}


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--part", choices=["report", "choose"], default="report")
    parser.add_argument("--ways", nargs="+", type=int, default=[10, 50])
    parser.add_argument("--shots", nargs="+", type=int, default=[5, 10, 20])
    parser.add_argument("--abstain", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--draws", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    corpus, nowhere = texts_of(options.data / "clinc150", options.part)
    print("| classes | texts a class | bound on |", " | ".join(COLUMNS), "|")
    print("|---|---|---|---|---|---|---|")
    for ways, shots in product(options.ways, options.shots):
        found: dict[str, list[list[float]]] = defaultdict(list)
        for seed in range(options.draws):
            fit, judge = draw(corpus, ways, shots, seed)
            texts, labels = [corpus.texts[i] for i in fit], [corpus.labels[i] for i in fit]
            classifier = TextClassifier(
                options.encoder, steps=options.steps, seconds=None, abstain=options.abstain,
                device="cpu",
            ).fit(texts, labels)  # fmt: skip
            wanted = np.array([corpus.labels[i] for i in judge])
            logits = [
                classifier.logits(rows) for rows in ([corpus.texts[i] for i in judge], nowhere)
            ]
            right = classifier.classes_[logits[0].argmax(axis=1)] == wanted
            scores = {"logit": [part.max(axis=1) for part in logits]}
            bounds = {"logit": float(classifier.report_.floor)}
            if options.steps == 0:
                scores["probability"] = [np.exp(log_softmax(part)).max(axis=1) for part in logits]
                bounds |= floors(classifier, texts, labels)
            for name, (known, other) in scores.items():
                answered = known >= bounds[name]
                truth = np.repeat([1, 0], [len(known), len(other)])
                found[name].append(
                    [
                        float(answered.mean()), float((other >= bounds[name]).mean()),
                        float(right[answered].mean()),
                        float(roc_auc_score(truth, np.concatenate([known, other]))),
                    ]
                )  # fmt: skip
        for name, rows in found.items():
            columns = np.array(rows).T
            cells = " | ".join(with_interval(interval(column)) for column in columns)
            print(f"| {ways} | {shots} | {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
