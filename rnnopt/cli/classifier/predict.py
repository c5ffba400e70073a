"""`rnnopt predict`: a classifier's folder and texts in, labels and probabilities out."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from rnnopt.cli.progress import progress_bar, waiting
from rnnopt.cli.settings.classifier import Predict
from rnnopt.data.files import read_texts
from rnnopt.errors import InputError
from rnnopt.tasks.text.estimator.text_classifier import TextClassifier

STANDARD_INPUT = "-"
_CHUNK = 1024  # texts that are read, classified and written at a time


def run(settings: Predict) -> None:
    """Classify texts, and write a CSV row for each."""
    chunks, count = _chunks(settings)
    with waiting("reading the classifier"):
        classifier = TextClassifier.load(settings.model, settings.device)
    if settings.abstain_below is not None:
        classifier.set_params(abstain_below=settings.abstain_below)
    _check_separator(settings.label_separator, classifier)
    # rows on a terminal show by themselves how far it is
    hidden = count is None or (settings.output is None and sys.stdout.isatty())
    done = 0
    with _opened(settings.output) as file, progress_bar("text", count, shown=not hidden) as bar:
        writer = csv.writer(file, lineterminator="\n")
        names = [f"probability of {name}" for name in classifier.classes_.tolist()]
        writer.writerow(["text", "label", "probability", *(names if settings.all else [])])
        for texts in chunks:
            answers, probabilities = classifier.answer(texts)
            for text, answer, row in zip(texts, answers, probabilities):
                if isinstance(answer, list):
                    answer = settings.label_separator.join(answer)
                shown = [f"{value:.6f}" for value in (row.max(), *(row if settings.all else []))]
                writer.writerow([text, "" if answer is None else answer, *shown])
            file.flush()
            done += len(texts)
            if not hidden:
                bar.at(done)


def _check_separator(separator: str, classifier: TextClassifier) -> None:
    """Labels that hold the separator could not be told apart.

    Raises:
        InputError: one does.
    """
    if classifier.thresholds_ is None:
        return
    for label in classifier.classes_.tolist():
        if not separator or separator in label:
            raise InputError(
                f"--label-separator is {separator!r}, which label {label!r} holds; choose another"
            )


def _chunks(settings: Predict) -> tuple[Iterator[list[str]], int | None]:
    """The texts that were named, in the order that they came; and how many a file has, else None.

    Raises:
        InputError: neither --data nor --text, or both.
    """
    if (settings.data is None) == (settings.text is None):
        given = "neither is given" if settings.data is None else "both are given"
        raise InputError(
            f"--data and --text: {given}; give one of them, --data - for standard input"
        )
    if settings.text is not None:
        return iter([list(settings.text)]), None
    if settings.data == STANDARD_INPUT:
        return _lines(), None
    texts = read_texts(str(settings.data), text_column=settings.text_column)
    return (texts[i : i + _CHUNK] for i in range(0, len(texts), _CHUNK)), len(texts)


def _lines() -> Iterator[list[str]]:
    """Lines of standard input: those that are there, without waiting for more."""
    left = b""
    while data := os.read(sys.stdin.fileno(), 1 << 16):
        *lines, left = (left + data).split(b"\n")
        if texts := _decoded(lines):
            yield texts
    if texts := _decoded([left]):
        yield texts


def _decoded(lines: list[bytes]) -> list[str]:
    """Lines that are not empty, as text."""
    try:
        texts = [line.decode("utf-8").strip() for line in lines]
    except UnicodeDecodeError as error:
        raise InputError(
            f"standard input: {error.object[:40]!r} is not UTF-8; convert it"
        ) from error
    return [text for text in texts if text]


@contextmanager
def _opened(output: str | None) -> Iterator[IO[str]]:
    """Standard output, or a file that appears when it is complete."""
    if output is None:
        yield sys.stdout
        return
    target = Path(output)
    if target.exists():
        raise InputError(f"{target} is there already, and nothing is overwritten; choose another")
    partial = target.parent / f".{target.name}.{os.getpid()}"
    try:
        with partial.open("w", encoding="utf-8", newline="") as file:
            yield file
        os.replace(partial, target)
    except OSError as error:
        raise InputError(f"can't write {target}: {error.strerror}; choose another") from error
    finally:
        partial.unlink(missing_ok=True)
