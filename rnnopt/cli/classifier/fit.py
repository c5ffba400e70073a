"""`rnnopt fit`: a labelled file in, the folder of a `TextClassifier` out."""

from __future__ import annotations

from rnnopt.cli.progress import waiting
from rnnopt.cli.settings.classifier import Fit
from rnnopt.data.corpus import summary
from rnnopt.data.files import read_corpus
from rnnopt.tasks.text.estimator.folder import check_new
from rnnopt.tasks.text.estimator.text_classifier import TextClassifier

_OURS = ("data", "output", "text_column", "label_column")  # settings that the classifier lacks


def run(settings: Fit) -> None:
    """Fit, tell what was done and why, save."""
    folder = check_new(settings.output)
    corpus = read_corpus(
        settings.data, text_column=settings.text_column, label_column=settings.label_column
    )
    print(summary(corpus))
    chosen = {name: value for name, value in vars(settings).items() if name not in _OURS}
    chosen["random_state"] = chosen.pop("seed")
    with waiting("fitting"):
        classifier = TextClassifier(**chosen).fit(corpus.texts, corpus.labels)
    print(classifier.report_)
    classifier.save(folder)
    print(f'next: rnnopt predict --model {folder} --text "..."')
