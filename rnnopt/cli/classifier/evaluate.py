"""`rnnopt evaluate`: a classifier's folder and a labelled file in, figures out."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict

from rnnopt.cli.classifier.labelled import read_labelled
from rnnopt.cli.classifier.model import read_classifier
from rnnopt.cli.progress import waiting
from rnnopt.cli.settings.classifier import SEPARATOR, Evaluate
from rnnopt.errors import InputError


def run(settings: Evaluate) -> None:
    """Judge a classifier by labelled texts."""
    classifier = read_classifier(settings)
    several = classifier.thresholds_ is not None
    if settings.label_separator is not None and not several:
        raise InputError(
            f"--label-separator is {settings.label_separator!r}, and {settings.model} gives a text "
            "one label; leave it out"
        )
    found = read_labelled(settings, SEPARATOR if several else None)
    named = {str(label): label for label in classifier.classes_.tolist()}
    for label in itertools.chain.from_iterable(found.labels) if several else found.labels:
        if label not in named:
            raise InputError(
                f"{settings.data}: label {label!r} is none of the classifier's {len(named)} (such "
                f"as {next(iter(named))!r}); correct it, or leave its texts out"
            )
    labels = found.labels if several else [named[label] for label in found.labels]
    with waiting("judging"):
        figures = classifier.evaluate(found.texts, labels)
    print(json.dumps(asdict(figures)) if settings.json else figures)
