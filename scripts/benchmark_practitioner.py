"""What would a practitioner pick? `TextClassifier` beside logistic regression, with few labels.

    python scripts/benchmark_practitioner.py --data DATA --encoder MINILM --output results.jsonl
    python scripts/practitioner_tables.py results.jsonl --output OUT

`DATA` is a folder with the labelled sets, each a folder of gzip JSON lines. Every draw takes all
classes of a set's test part (HuffPost has none: its validation part), some texts of each to fit on,
and up to 300 others to judge by. AG News and the languages of NusaX are in no part of
meta-training. All methods see the same texts and the same encoder:

- logistic: scikit-learn's logistic regression, C = 10, on the frozen, unit-length embeddings;
- nearest mean: softmax of minus the squared distance to the class means of the same embeddings;
- frozen: `TextClassifier(encoder, steps=0)`, that is without adaptation;
- rnnopt: `TextClassifier(encoder)` with nothing set, but for --seconds;
- adamw RATE, schedulefree, prodigy: the same with that optimizer in place of the rule. AdamW's
  usual rate is 5e-5; the best of the four rates on `--part choose` is "AdamW, tuned". Schedule-Free
  has the rate 0.0025 of its documentation, Prodigy 1. They need `pip install "rnnopt[compare]"`;
- setfit: SetFit (Tunstall et al. 2022, arXiv:2209.11055) at its defaults, by the package `setfit`.

The last two lines are run only where `--methods` names them.

Seconds are those of one core for fitting, embedding included. With --seconds -1 adaptation has no
bound on its time, so that figures do not depend on the machine. `--part choose` takes other classes
(of NusaX, other texts), to choose by. A run that was stopped goes on. A draw takes 5 minutes of a
core. Last line: a row of the table of all cells, see practitioner_tables.py.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from practitioner_tables import details, read
from sklearn.linear_model import LogisticRegression

from rnnopt import TextClassifier
from rnnopt.data.files import read_corpus
from rnnopt.tasks.text.encoder.sentence import SentenceEncoder
from rnnopt.tasks.text.estimator.figures import Figures
from rnnopt.tasks.text.estimator.heads import log_softmax


class Part(NamedTuple):
    """Where a set's texts lie below DATA, without ``.jsonl.gz``."""

    report: str
    choose: str = ""  # "" where there is nothing to choose by
    domain: str = ""  # the texts of this domain only; "" for all


SETS = {
    **{
        name: Part(f"{name}/test", f"{name}/val")
        for name in ("clinc150", "stackoverflow20", "trec28", "hwu64", "liu54", "amazon16_partial")
    },
    "huffpost36": Part("huffpost36/val", "huffpost36/train"),
    "agnews": Part("agnews_test/all"),
    **{
        f"reviews {product}": Part("arsc_sentiment/test", "", product)
        for product in ("books", "dvd", "electronics", "kitchen_housewares")
    },
    **{
        f"nusax {language}": Part("nusax/sentiment.test", "nusax/sentiment.val", language)
        for language in (
            "acehnese", "balinese", "banjarese", "buginese", "english", "indonesian", "javanese",
            "madurese", "minangkabau", "ngaju", "sundanese", "toba_batak",
        )
    },
}  # fmt: skip
SHORT_SETS = ("clinc150", "stackoverflow20", "trec28", "huffpost36")
JUDGED = 300  # texts to judge by, at most, as many of every class
USUAL = ("logistic", "nearest mean", "frozen", "rnnopt")
ADAMW_RATES = ("5e-5", "1e-4", "3e-4", "1e-3")
OTHERS = (*(f"adamw {rate}" for rate in ADAMW_RATES), "schedulefree", "prodigy")
METHODS = (*USUAL, *OTHERS, "setfit")
Texts = tuple[list[str], np.ndarray]


def draw(path: Path, shots: int, seed: int, domain: str = "") -> tuple[Texts, Texts]:
    """Texts to fit on, `shots` of each class, and others to judge by; of `domain`, if named."""
    corpus = read_corpus(path, domain_column="domain" if domain else None)
    if domain:
        corpus = corpus.take(i for i, name in enumerate(corpus.domains) if name == domain)
    judged = JUDGED // len(corpus.classes)
    generator = np.random.default_rng([seed, shots])
    fit: Texts = ([], np.array([], int))
    judge: Texts = ([], np.array([], int))
    for number, ((_, label), rows) in enumerate(sorted(corpus.classes.items())):
        if len(rows) <= shots:
            raise SystemExit(
                f"{path}: {label} has {len(rows)} texts, and {shots} to fit on leave none to judge "
                "by; ask for fewer with --shots, or leave the set out of --sets"
            )
        order = generator.permutation(rows)
        parts = order[:shots], order[shots : shots + judged]
        fit, judge = (
            (texts + [corpus.texts[i] for i in part], np.append(labels, [number] * len(part)))
            for (texts, labels), part in zip((fit, judge), parts)
        )
    return fit, judge


def on_embeddings(method: str, rows: np.ndarray, labels: np.ndarray, query: np.ndarray) -> Any:
    """Probabilities of the query texts by a classical method."""
    if method == "logistic":
        return LogisticRegression(C=10, max_iter=1000).fit(rows, labels).predict_proba(query)
    means = np.stack([rows[labels == label].mean(axis=0) for label in range(labels.max() + 1)])
    return np.exp(log_softmax(-np.square(query[:, None] - means).sum(axis=2)))


def embedded(encoder: SentenceEncoder, fit: Texts, judge: Texts) -> Any:
    """Embeddings of both, and the seconds that those to fit on took."""
    started = time.process_time()
    rows = encoder.embed(fit[0]).double().numpy()
    seconds = time.process_time() - started
    return rows, encoder.embed(judge[0]).double().numpy(), seconds


def judged(classifier: TextClassifier, fit: Texts, judge: Texts) -> Any:
    """Probabilities by a `TextClassifier`, the seconds that fitting took, and what it kept."""
    started = time.process_time()
    classifier.fit(*fit)
    seconds = time.process_time() - started
    return classifier.predict_proba(judge[0]), seconds, classifier.report_.kept


def optimizer_of(method: str) -> Callable[[Any], torch.optim.Optimizer]:
    """A function that makes the optimizer of a method of the parameters."""
    if method == "schedulefree":
        from schedulefree import AdamWScheduleFree

        return lambda params: AdamWScheduleFree(params, lr=0.0025)
    if method == "prodigy":
        from prodigyopt import Prodigy

        return lambda params: Prodigy(params)
    rate = float(method.removeprefix("adamw "))
    return lambda params: torch.optim.AdamW(params, rate, weight_decay=0.0)


def by_setfit(encoder: str, fit: Texts, judge: Texts) -> Any:
    """Probabilities by SetFit at its defaults, the seconds that fitting took, and its name."""
    import builtins

    import pyarrow

    # dill, by which datasets takes fingerprints, looks for this type where pyarrow says that it is
    builtins.MonthDayNano = pyarrow.lib.MonthDayNano  # type: ignore[attr-defined]
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments

    started = time.process_time()
    model = SetFitModel.from_pretrained(encoder)
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, report_to="none", show_progress_bar=False, save_strategy="no"
        )
        rows = Dataset.from_dict({"text": fit[0], "label": fit[1].tolist()})
        Trainer(model=model, args=arguments, train_dataset=rows).train()
    seconds = time.process_time() - started
    return np.asarray(model.predict_proba(judge[0])), seconds, "setfit"


def measure(options: argparse.Namespace) -> None:
    """Append a line for every set, number of labels, draw and method."""
    torch.set_num_threads(1)
    encoder = SentenceEncoder.load(options.encoder, torch.device("cpu"))
    bound = None if options.seconds < 0 else options.seconds
    classifiers = {
        "frozen": TextClassifier(options.encoder, steps=0, device="cpu"),
        "rnnopt": TextClassifier(options.encoder, rule=options.rule, seconds=bound, device="cpu"),
    }
    for method in set(options.methods) & set(OTHERS):
        classifiers[method] = TextClassifier(
            options.encoder, rule=optimizer_of(method), seconds=bound, device="cpu"
        )
    done = {tuple(line["cell"]) for line in read(options.output)}
    for seed, name, shots in product(range(options.draws), options.sets, options.shots):
        methods = [m for m in options.methods if (name, shots, m, seed) not in done]
        part = SETS[name]
        place = getattr(part, options.part)
        if not place:
            raise SystemExit(f"{name} has no classes to choose by: leave it out of --sets")
        fit, judge = draw(Path(options.data, f"{place}.jsonl.gz"), shots, seed, part.domain)
        vectors: Any = None
        for method in methods:
            kept = method
            if method in classifiers:
                chances, seconds, kept = judged(classifiers[method], fit, judge)
            elif method == "setfit":
                chances, seconds, kept = by_setfit(options.encoder, fit, judge)
            else:
                vectors = vectors or embedded(encoder, fit, judge)
                started = time.process_time()
                chances = on_embeddings(method, vectors[0], fit[1], vectors[1])
                seconds = time.process_time() - started + vectors[2]
            line = {
                "cell": [name, shots, method, seed],
                "ways": int(fit[1].max()) + 1,
                **asdict(Figures.of(chances, judge[1])),
                "seconds": seconds,
                "kept": kept,
            }
            with options.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(line["cell"], f"{line['accuracy']:.3f} {kept}", flush=True)


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data")
    parser.add_argument("--encoder")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SHORT_SETS))
    parser.add_argument("--shots", nargs="+", type=int, default=[1, 5, 10])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(USUAL))
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--part", choices=["report", "choose"], default="report")
    parser.add_argument("--rule")
    parser.add_argument("--seconds", type=float, default=30.0)
    options = parser.parse_args()
    measure(options)
    print("\n".join(details(read(options.output))))


if __name__ == "__main__":
    main()
