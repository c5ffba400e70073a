"""A text classifier for a language that nothing was trained on, from 1 to 50 labels a class.

    python examples/fields/languages.py --data nusax --encoder all-MiniLM-L6-v2 --output out

DATA holds sentiment.train, sentiment.val and sentiment.test (.jsonl or .jsonl.gz) with a text, its
label and its language (`domain`) a line. The encoder is fine-tuned on some languages (multi-task
pretraining). From there LoRA factors and an output layer, which begins at the class means, adapt to
another language. No language of the report is used before it, and none of its texts in any
language: the report has the file `test`, all else the files `train` and `val`.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from field import Field, Options, command, digest, main_of, unadapted
from language import find
from multitask import MultitaskSettings, MultitaskTraining
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, log_loss
from sklearn.pipeline import make_pipeline
from torch import nn

import rnnopt
from rnnopt.cli.progress import progress_bar
from rnnopt.data.corpus import Corpus
from rnnopt.data.files import read_corpus
from rnnopt.evaluation.baselines import BASELINES
from rnnopt.tasks.episodes import EpisodeSampler
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.frozen import judge_frozen
from rnnopt.tasks.text.start import TextStart
from rnnopt.tasks.text.tasks import TEXT_METRICS, TextTask, TextTasks

TRAIN_SHOTS = (1, 5, 10)  # labels a class in meta-training
QUERY = 20  # texts of a class to be judged by
BATCH = 16  # texts of a step, at most
PRETRAINED_ON = 0.6  # share of the training texts; meta-training has the others
MORE = {
    "shots": {
        "default": [1, 5, 50], "nargs": "+", "type": int,
        "help": "labels a class in the report [1 5 50]",
    },
    "encoder": {"required": True, "help": "a folder, or a name on the Hugging Face hub"},
    "test": {
        "default": ["buginese", "madurese", "ngaju", "toba_batak"], "nargs": "+",
        "help": "languages of the report [%(default)s]",
    },
    "validation": {
        "default": ["acehnese", "banjarese"], "nargs": "+",
        "help": "languages that learning rates are chosen on [%(default)s]",
    },
}  # fmt: skip


class LanguageTask(TextTask):
    """A task that knows its texts, for methods that read letters, and may leave its figures out."""

    def __init__(self, made: TextTask, corpus: Corpus, episode: Any, scored: bool) -> None:
        super().__init__(made.classifier, made.batches, made.query, made.ways)
        self.seen = [corpus.texts[i] for i in episode.support], episode.support_labels
        self.asked = [corpus.texts[i] for i in episode.query], episode.query_labels
        self.scored = scored

    def scores(self, module: nn.Module, step: int = 0) -> dict[str, float]:
        """The figures on the query set; in meta-training the loss alone."""
        found = super().scores(module, step)
        return found if self.scored else {"loss": found["loss"]}


def on_letters(learner: Classifier, task: LanguageTask) -> dict[str, float]:
    """Logistic regression on TF-IDF of character n-grams, 1 to 4 letters within words."""
    (texts, labels), (asked, truth) = task.seen, task.asked
    grams = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True)
    model = make_pipeline(grams, LogisticRegression(C=10, max_iter=1000)).fit(texts, labels)
    found = model.predict(asked)
    return {
        "loss": float(log_loss(truth, model.predict_proba(asked), labels=model.classes_)),
        "accuracy": float(np.mean(found == truth)),
        "f1": float(f1_score(truth, found, average="macro")),
    }


def read(options: Options) -> dict[str, Corpus]:
    """The texts of each part: "pretraining", "train", "validation" and "test"."""
    files = {
        stem: read_corpus(find(options.data, f"sentiment.{stem}"), domain_column="domain")
        for stem in ("train", "val", "test")
    }
    test, validation = options.more["test"], options.more["validation"]
    known = set(files["train"].domains)
    for language in (*test, *validation):
        if language not in known:
            raise rnnopt.InputError(
                f"{language!r} is no language of {options.data}: choose --test and --validation "
                f"from {', '.join(sorted(known))}"
            )
    others = sorted(known - {*test, *validation})
    if set(test) & set(validation) or not others:
        raise rnnopt.InputError(
            f"--test {' '.join(test)} --validation {' '.join(validation)}: no language may be in "
            f"both, and some of {', '.join(sorted(known))} must be left to train on"
        )
    # the files have the same texts in each language, in the same order
    rows = list(zip(files["train"].domains, files["train"].labels))
    counts, seen = Counter(rows), Counter[tuple[str, str]]()
    parts: dict[str, list[int]] = {"pretraining": [], "train": []}
    for number, row in enumerate(rows):
        if row[0] in others:
            early = seen[row] < PRETRAINED_ON * counts[row]
            parts["pretraining" if early else "train"].append(number)
            seen[row] += 1
    return {
        **{part: files["train"].take(found) for part, found in parts.items()},
        "validation": _of(validation, files["train"], files["val"]),
        "test": _of(test, files["test"]),
    }


def _of(languages: list[str], *corpora: Corpus) -> Corpus:
    """The texts of some languages."""
    columns = [(c.texts, c.labels, c.domains) for c in corpora]
    rows = [row for column in columns for row in zip(*column) if row[2] in languages]
    return Corpus(*map(tuple, zip(*rows)))


def sampler(corpus: Corpus, shots: int | tuple[int, ...], options: Options) -> EpisodeSampler:
    """Episodes of one language each, of as many ways as there are labels."""
    ways = len(set(corpus.labels))
    return EpisodeSampler(corpus, ways=ways, shots=shots, queries=QUERY, seed=options.seed)


def load(encoder: str | Path, options: Options, ways: int, **what: Any) -> Classifier:
    """A classifier with mean pooling whose top layer adapts."""
    return Classifier.load(
        encoder, pooling="mean", ways=ways, top_layers=1, max_length=64,
        device=torch.device("cpu"), seed=options.seed, **what,
    )  # fmt: skip


def pretrained(corpora: dict[str, Corpus], options: Options) -> Path:
    """The folder of the encoder after fine-tuning on the training languages together.

    Whether that helped is judged by class means in the validation languages.
    """
    joint = corpora["pretraining"]
    joint = Corpus(joint.texts, joint.labels, ("all",) * len(joint))
    ways = len(set(joint.labels))
    encoder = options.more["encoder"]
    trained, judged = (load(encoder, options, ways, tune="full") for _ in range(2))
    steps = 2 if options.small else 120
    settings = MultitaskSettings(
        3e-4, steps, check_every=steps, validation_tasks=4, seed=options.seed
    )
    facts = {"encoder": trained.fingerprint, "texts": digest({"texts": joint.texts})}
    folder = options.output / f"languages-encoder-{digest({**facts, 'steps': steps})}"
    with progress_bar("pretrain", steps) as bar:
        return MultitaskTraining(
            trained, joint, TextTasks(sampler(corpora["validation"], 5, options), judged),
            settings, folder, facts, {},
        ).run(lambda record: bar.at(record["meta_step"]))  # fmt: skip


def make_field(options: Options) -> Field:
    """The field, with the pretrained classifier."""
    corpora = read(options)
    ways = len(set(corpora["test"].labels))
    classifier = load(pretrained(corpora, options), options, ways, tune="lora", lora_rank=4)

    @functools.cache
    def tasks(part: str, shots: int | tuple[int, ...]) -> TextTasks:
        return TextTasks(sampler(corpora[part], shots, options), classifier, batch_sizes=[BATCH])

    def task(shots: int | None, part: str, number: int, scored: bool) -> LanguageTask:
        source = tasks(part, shots or TRAIN_SHOTS)
        episode = source.sampler.sample(number)
        return LanguageTask(source.load(number), corpora[part], episode, scored)

    return Field(
        "languages",
        f"Sentiment in {', '.join(options.more['test'])},",
        classifier,
        functools.partial(task, None),
        metrics=TEXT_METRICS,
        usual={"adamw-default": BASELINES["adamw-default"]},
        settings={
            f"{shots}-shot": functools.partial(task, shots) for shots in options.more["shots"]
        },
        facts={"texts": digest({part: corpus.texts for part, corpus in corpora.items()})},
        direct={
            "none": unadapted,
            "logistic regression on letters": on_letters,
            "logistic regression on embeddings": functools.partial(judge_frozen, "logistic"),
        },
        budgets=(1, 3, 10),
        initial=(),
        start=TextStart(head="prototype"),
    )


main = main_of(make_field)

if __name__ == "__main__":
    sys.exit(command(__doc__, main, meta_steps=60, episodes=16, more=MORE))
