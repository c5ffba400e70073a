"""The classifier that --model names."""

from __future__ import annotations

from rnnopt.cli.settings.classifier import ModelSettings
from rnnopt.tasks.text.estimator.text_classifier import TextClassifier


def read_classifier(settings: ModelSettings) -> TextClassifier:
    """Load it.

    Raises:
        InputError: as `TextClassifier.load`.
    """
    return TextClassifier.load(settings.model, settings.device)
