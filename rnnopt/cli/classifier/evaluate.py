"""`rnnopt evaluate`: a classifier's folder and a labelled file in, figures out."""

from __future__ import annotations

import json
from dataclasses import asdict

from rnnopt.cli.classifier.labelled import read_known
from rnnopt.cli.classifier.model import read_classifier
from rnnopt.cli.progress import waiting
from rnnopt.cli.settings.classifier import Evaluate


def run(settings: Evaluate) -> None:
    """Judge a classifier by labelled texts."""
    classifier = read_classifier(settings)
    texts, labels = read_known(settings.data, settings, classifier)
    with waiting("judging"):
        figures = classifier.evaluate(texts, labels)
    print(json.dumps(asdict(figures)) if settings.json else figures)
