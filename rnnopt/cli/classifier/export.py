"""`rnnopt export`: a classifier's folder in, files for another library out."""

from __future__ import annotations

from rnnopt.cli.classifier.labelled import read_known
from rnnopt.cli.progress import waiting
from rnnopt.cli.settings.classifier import Export
from rnnopt.tasks.text.estimator.folder import check_new
from rnnopt.tasks.text.estimator.text_classifier import TextClassifier


def run(settings: Export) -> None:
    """Write the files, and tell how far they agree with the classifier."""
    folder = check_new(settings.output)
    classifier = TextClassifier.load(settings.model, settings.device)
    known = None
    if settings.data is not None:
        known = read_known(settings.data, settings, classifier)
    texts, labels = known or (None, None)
    with waiting("exporting"):
        if settings.format == "onnx":
            said = str(classifier.export_onnx(folder, texts, labels))
        else:
            difference = classifier.export_transformers(folder, texts)
            said = (
                f'logits within {difference:.1e}; pipeline("text-classification", "{folder}") runs '
                "it"
            )
    print(f"{folder}: {said}")
