"""The labelled file that --data names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rnnopt.cli.settings.classifier import FileSettings
from rnnopt.data.corpus import summary
from rnnopt.data.files import read_corpus
from rnnopt.data.several import read_several


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


def read_labelled(settings: FileSettings, separator: str | None = None) -> LabelledTexts:
    """Read it.

    Args:
        settings: name the file, its columns and the separator of labels.
        separator: where the settings name none and a text may have several labels.

    Raises:
        InputError: the file can't be used.
    """
    separator = settings.label_separator or separator
    columns = {"text_column": settings.text_column, "label_column": settings.label_column}
    if separator is not None:
        several = read_several(settings.data, separator, **columns)
        return LabelledTexts(several.texts, several.labels, str(several))
    corpus = read_corpus(settings.data, **columns)
    return LabelledTexts(corpus.texts, corpus.labels, summary(corpus))
