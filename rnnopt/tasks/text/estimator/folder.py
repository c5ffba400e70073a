"""The folder of a saved classifier: a sentence-transformers model, a head, labels and a card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from rnnopt.errors import InputError
from rnnopt.storage.files import (
    let_others_read,
    read_tensors,
    save_tensors,
    write_atomically,
)
from rnnopt.storage.provenance import read_json, versions
from rnnopt.tasks.text.encoder.loading import first_line
from rnnopt.tasks.text.encoder.sentence import SentenceEncoder
from rnnopt.tasks.text.estimator.answers import Decision
from rnnopt.tasks.text.estimator.heads import LinearHead
from rnnopt.tasks.text.estimator.report import Report, card

FACTS_FILE, HEAD_FILE, CARD_FILE = "classifier.json", "head.safetensors", "README.md"
_FORMAT = 2


@dataclass(frozen=True)
class Fitted:
    """All that prediction needs.

    Attributes:
        encoder: as it was adapted.
        head: at its temperature.
        decision: how logits become labels.
        report: see there.
        known: hashes of the texts that it was fitted on, see `text_hashes`.
    """

    encoder: SentenceEncoder
    head: LinearHead
    decision: Decision
    report: Report
    known: frozenset[str]


def check_new(folder: str | Path) -> Path:
    """Refuse a folder with something in it, or one that can't be made, before anything runs.

    Raises:
        InputError: it is a file, holds something, or can't be written.
    """
    target = Path(folder)
    try:
        if target.exists() and any(target.iterdir()):
            raise InputError(
                f"{target} has something in it, and nothing is overwritten; choose another folder"
            )
        above = next(parent for parent in target.absolute().parents if parent.exists())
    except OSError as error:
        raise InputError(
            f"{target} can't be the classifier's folder ({error.strerror}); choose another"
        ) from error
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"{target} can't be made in {above}; choose another folder")
    return target


def save(
    folder: str | Path, fitted: Fitted, settings: dict[str, Any], name: str = "FOLDER"
) -> None:
    """Write a classifier; the folder appears whole or not at all.

    Args:
        folder: absent or empty.
        fitted: the classifier.
        settings: JSON-compatible.
        name: what the model card calls it.

    Raises:
        InputError: a folder with something in it, or one that can't be written.
    """
    with new_folder(folder) as partial:
        _write(partial, fitted, settings, name)


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into, which takes its place when the block has ended without an error.

    Args:
        folder: absent or empty.

    Raises:
        InputError: a folder with something in it, or one that can't be written.
    """
    target = check_new(folder)
    partial = target.parent / f".{target.name}.{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        yield partial
        let_others_read(partial)
        os.replace(partial, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"can't write {target}: {reason}; choose another") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(folder: Path, fitted: Fitted, settings: dict[str, Any], name: str) -> None:
    fitted.encoder.save(folder)
    head = {"weight": fitted.head.weight, "bias": fitted.head.bias}
    save_tensors(folder / HEAD_FILE, {name: torch.from_numpy(v) for name, v in head.items()}, {})
    decision = fitted.decision
    facts = {
        "format": _FORMAT,
        "classes": decision.classes.tolist(),
        "thresholds": None if decision.thresholds is None else decision.thresholds.tolist(),
        "floor": decision.floor,
        "known": sorted(fitted.known),
        "settings": settings,
        "report": fitted.report.facts(),
        "versions": versions(),
    }
    content = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / FACTS_FILE, content.encode("utf-8"))
    labels = [str(label) for label in decision.classes.tolist()]
    page = card(fitted.report, labels, versions(), name)
    write_atomically(folder / CARD_FILE, page.encode("utf-8"))


def load(folder: str | Path, device: torch.device) -> tuple[Fitted, dict[str, Any]]:
    """Read what `save` wrote.

    Returns:
        The classifier and its settings.

    Raises:
        InputError: the folder holds no classifier, or one that can't be read.
    """
    source = Path(folder)
    if not (source / FACTS_FILE).is_file():
        raise InputError(
            f"{source} is no classifier: it has no {FACTS_FILE}; give a folder that "
            "TextClassifier.save or `rnnopt fit` wrote"
        )
    facts = read_json(source / FACTS_FILE)
    if facts.get("format") != _FORMAT:
        raise InputError(
            f"{source / FACTS_FILE} has format {facts.get('format')}, and this rnnopt reads "
            f"{_FORMAT}; fit the classifier again"
        )
    tensors, _ = read_tensors(source / HEAD_FILE)
    encoder = SentenceEncoder.load(source, device)
    try:
        head = LinearHead(tensors["weight"].double().numpy(), tensors["bias"].double().numpy())
        thresholds = facts["thresholds"]
        decision = Decision(
            np.array(facts["classes"]),
            None if thresholds is None else np.array(thresholds, float),
            None if facts["floor"] is None else float(facts["floor"]),
        )
        report = Report.from_facts(facts["report"])
        fitted = Fitted(encoder, head, decision, report, frozenset(facts["known"]))
        settings = dict(facts["settings"])
        fits = head.weight.shape == (len(decision.classes), encoder.width)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{source}: its files do not hold what they should ({error}); fit the classifier again"
        ) from error
    if not fits:
        raise InputError(
            f"{source}: a head of shape {head.weight.shape} for {len(decision.classes)} labels and "
            f"an encoder of width {encoder.width}; the files are not of one classifier: fit again"
        )
    return fitted, settings
