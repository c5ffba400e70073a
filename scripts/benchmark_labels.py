"""`TextClassifier` where a text belongs to no label, or to several.

    python scripts/benchmark_labels.py none --data DATA --encoder MINILM
    python scripts/benchmark_labels.py several --data DATA --encoder MINILM

`DATA` is a folder that holds `clinc150` and, for `several`, `stackoverflow20`, as gzip JSON lines.

`none`: `clinc150` has `test` with 50 classes, and `oos` with 1,200 texts that belong to no class of
CLINC150 (Larson et al. 2019, arXiv:1909.02027). Every draw takes some test classes and some texts
of each to fit `TextClassifier(encoder, abstain=...)` on; 300 other texts of them, and all that
belong nowhere, judge. "answered" is the share of texts with an answer. The lines of "probability"
bound the largest probability instead of the largest logit, by the same texts held out. `--part
choose` takes validation classes instead, and 500 texts of train classes as those that belong
nowhere: by these the logit was chosen. A draw takes a quarter of a minute of one core, with
`--steps 10` a minute.

`several`: none of the sets has texts with several labels. They are therefore made, as in MixSNIPS
(Qin et al. 2020, arXiv:2004.10087): a text of one test class, or texts of two or three joined by
"and"; a tenth is of a train class, and has no label. Every draw takes some such texts to fit on,
and 300 made of other texts to judge by, without adaptation. "right" is the share of texts with all
labels right; thresholds of 1/2 stand beside those of the classifier. A draw takes 10 seconds of one
core.

Last line: the table's last row.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
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
from rnnopt.tasks.text.estimator.figures import Figures
from rnnopt.tasks.text.estimator.heads import log_softmax

JUDGED = 300  # texts to judge by
SETS = {"clinc150": 10, "stackoverflow20": 6}  # of `several`, and how many of the test classes
CHANCES = {0: 0.1, 1: 0.5, 2: 0.3, 3: 0.1}  # of a text with so many labels
# What a row says of its setting, and its figures.
COLUMNS = {
    "none": (
        ("classes", "texts a class", "bound on"),
        ("answered", "answered of no class", "right of the answered", "AUROC"),
    ),
    "several": (
        ("set", "texts", "thresholds"),
        ("micro F1", "macro F1", "right", "log loss", "calibration error"),
    ),
}
Rows = dict[tuple[Any, ...], list[list[float]]]  # the setting of a row -> figures of each draw


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


def least_probability(classifier: TextClassifier, texts: list[str], labels: list[str]) -> float:
    """The smallest largest probability that is answered, by the texts that chose the logit's."""
    places = np.searchsorted(classifier.classes_, np.array(labels))
    embeddings = classifier._fitted().encoder.embed(texts).double().numpy()
    judged = choose_start(Labelled(embeddings, places, np.ones(len(places))), 0).judged
    assert judged is not None
    chances = np.sort(np.exp(log_softmax(judged.logits)).max(axis=1))
    return float(chances[int(classifier.abstain * len(chances))])


def no_label(options: argparse.Namespace) -> Iterator[Rows]:
    """Texts of no label among those of known ones."""
    corpus, nowhere = texts_of(options.data / "clinc150", options.part)
    for ways, shots in product(options.ways, options.shots):
        found: Rows = defaultdict(list)
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
                bounds["probability"] = least_probability(classifier, texts, labels)
            for name, (known, other) in scores.items():
                answered = known >= bounds[name]
                truth = np.repeat([1, 0], [len(known), len(other)])
                area = roc_auc_score(truth, np.concatenate([known, other]))
                found[ways, shots, name].append(
                    [answered.mean(), (other >= bounds[name]).mean(), right[answered].mean(), area]
                )
        yield found


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


def several_labels(options: argparse.Namespace) -> Iterator[Rows]:
    """Texts with up to three labels."""
    for name, count in product(SETS, options.texts):
        corpus = read_corpus(options.data / name / "test.jsonl.gz")
        other = list(read_corpus(options.data / name / "train.jsonl.gz").texts)
        found: Rows = defaultdict(list)
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
                got: Any = Figures.of_several(chances, labels, thresholds)
                found[f"{name}, {SETS[name]} labels", count, kind].append(
                    [got.micro_f1, got.macro_f1, got.accuracy, got.log_loss, got.calibration_error]
                )
        yield found


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    none, several = kinds.add_parser("none"), kinds.add_parser("several")
    for kind in (none, several):
        kind.add_argument("--data", type=Path, required=True)
        kind.add_argument("--encoder", required=True)
        kind.add_argument("--draws", type=int, default=5)
    none.add_argument("--part", choices=["report", "choose"], default="report")
    none.add_argument("--ways", nargs="+", type=int, default=[10, 50])
    none.add_argument("--shots", nargs="+", type=int, default=[5, 10, 20])
    none.add_argument("--abstain", type=float, default=0.05)
    none.add_argument("--steps", type=int, default=0)
    several.add_argument("--texts", nargs="+", type=int, default=[50, 200])
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = sum(COLUMNS[options.kind], ())
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for found in (no_label if options.kind == "none" else several_labels)(options):
        for setting, draws in found.items():
            cells = [with_interval(interval(column)) for column in np.array(draws, float).T]
            print(f"| {' | '.join([*map(str, setting), *cells])} |", flush=True)


if __name__ == "__main__":
    main()
