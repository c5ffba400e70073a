"""`rnnopt fit`: a labelled file in, the folder of a `TextClassifier` out."""

from __future__ import annotations

from rnnopt.cli.classifier.labelled import read_labelled
from rnnopt.cli.progress import waiting
from rnnopt.cli.settings.classifier import Fit
from rnnopt.tasks.text.estimator.folder import check_new
from rnnopt.tasks.text.estimator.text_classifier import TextClassifier

# settings that the classifier lacks
_OURS = ("data", "output", "text_column", "label_column", "label_separator")


def run(settings: Fit) -> None:
    """Fit, tell what was done and why, save."""
    folder = check_new(settings.output)
    found = read_labelled(settings)
    print(found.summary)
    chosen = {name: value for name, value in vars(settings).items() if name not in _OURS}
    chosen["random_state"] = chosen.pop("seed")
    with waiting("fitting"):
        classifier = TextClassifier(**chosen).fit(found.texts, found.labels)
    print(classifier.report_)
    classifier.save(folder)
    print(f'next: rnnopt predict --model {folder} --text "..."')
