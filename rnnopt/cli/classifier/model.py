"""The classifier that is to be fitted."""

from __future__ import annotations

from rnnopt.cli.settings.classifier import Doctor, Fit
from rnnopt.tasks.text.estimator.text_classifier import TextClassifier

# settings that the classifier lacks
_OURS = {"data", "output", "text_column", "label_column", "label_separator", "onnx", "seed"}


def unfitted(settings: Fit | Doctor) -> TextClassifier:
    """A classifier with the settings of `rnnopt fit`."""
    chosen = {name: value for name, value in vars(settings).items() if name not in _OURS}
    return TextClassifier(**chosen, random_state=settings.seed)
