"""`rnnopt evaluate`: a classifier's folder and a labelled file in, figures out."""

from __future__ import annotations

import json
from dataclasses import asdict

from rnnopt.cli.classifier.labelled import read_known
from rnnopt.cli.progress import waiting
from rnnopt.cli.settings.classifier import Evaluate
from rnnopt.tasks.text.estimator.text_classifier import TextClassifier


def run(settings: Evaluate) -> None:
    """Judge a classifier by labelled texts."""
    classifier = TextClassifier.load(settings.model, settings.device)
    texts, labels = read_known(settings.data, settings, classifier)
    with waiting("judging"):
        figures = classifier.evaluate(texts, labels)
    print(json.dumps(asdict(figures)) if settings.json else figures)
