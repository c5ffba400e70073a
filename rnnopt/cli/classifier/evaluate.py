"""`rnnopt evaluate`: a classifier's folder and a labelled file in, figures out."""

from __future__ import annotations

import json
from dataclasses import asdict

from rnnopt.cli.classifier.model import read_classifier
from rnnopt.cli.progress import waiting
from rnnopt.cli.settings.classifier import Evaluate
from rnnopt.data.files import read_corpus
from rnnopt.errors import InputError


def run(settings: Evaluate) -> None:
    """Judge a classifier by labelled texts."""
    classifier = read_classifier(settings)
    corpus = read_corpus(
        settings.data, text_column=settings.text_column, label_column=settings.label_column
    )
    named = {str(label): label for label in classifier.classes_.tolist()}
    for label in corpus.labels:
        if label not in named:
            raise InputError(
                f"{settings.data}: label {label!r} is none of the classifier's {len(named)} (such "
                f"as {next(iter(named))!r}); correct it, or leave its texts out"
            )
    with waiting("judging"):
        figures = classifier.evaluate(corpus.texts, [named[label] for label in corpus.labels])
    print(json.dumps(asdict(figures)) if settings.json else figures)
