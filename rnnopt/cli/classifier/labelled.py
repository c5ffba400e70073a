"""The labelled file that --data names."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rnnopt.cli.settings.classifier import SEPARATOR, Doctor, Evaluate, Export, Fit
from rnnopt.data.corpus import summary
from rnnopt.data.files import read_corpus
from rnnopt.data.several import read_several
from rnnopt.errors import InputError
from rnnopt.tasks.text.estimator.text_classifier import TextClassifier

Named = Fit | Doctor | Evaluate | Export  # settings that name columns


@dataclass(frozen=True)
class LabelledTexts:
    """What a file holds.

    Attributes:
        texts: the texts.
        labels: a string for each, or with --label-separator a list of strings.
        summary: a line to print.
    """

    texts: Sequence[str]
    labels: Sequence[Any]
    summary: str


def read_labelled(
    path: str, settings: Named, separator: str | None = None, known_labels: Iterable[str] = ()
) -> LabelledTexts:
    """Read a file.

    Args:
        path: its name.
        settings: name its columns and the separator of labels.
        separator: where the settings name none and a text may have several labels.
        known_labels: see `rnnopt.data.files.read_corpus`.

    Raises:
        InputError: the file can't be used.
    """
    separator = settings.label_separator or separator
    columns = {"text_column": settings.text_column, "label_column": settings.label_column}
    if separator is not None:
        several = read_several(path, separator, **columns, known_labels=known_labels)
        return LabelledTexts(several.texts, several.labels, str(several))
    corpus = read_corpus(path, **columns, known_labels=known_labels)
    return LabelledTexts(corpus.texts, corpus.labels, summary(corpus))


def read_known(
    path: str, settings: Evaluate | Export, classifier: TextClassifier
) -> tuple[list[str], list[Any]]:
    """Texts of a file, and their labels as the classifier has them.

    Raises:
        InputError: the file can't be used, or has a label that the classifier lacks.
    """
    several = classifier.thresholds_ is not None
    if settings.label_separator is not None and not several:
        raise InputError(
            f"--label-separator is {settings.label_separator!r}, and {settings.model} gives a text "
            "one label; leave it out"
        )
    named = {str(label): label for label in classifier.classes_.tolist()}
    found = read_labelled(path, settings, SEPARATOR if several else None, named)
    for label in itertools.chain.from_iterable(found.labels) if several else found.labels:
        if label not in named:
            raise InputError(
                f"{path}: label {label!r} is none of the classifier's {len(named)} (such as "
                f"{next(iter(named))!r}); correct it, or leave its texts out"
            )
    if several:
        return list(found.texts), list(found.labels)
    return list(found.texts), [named[label] for label in found.labels]
