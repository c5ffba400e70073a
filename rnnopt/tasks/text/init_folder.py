"""The folder of meta-learned initial values: an encoder or an adapter, and ``init.json``."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rnnopt.errors import InputError
from rnnopt.storage.files import fingerprint, parse_json, read_tensors, write_atomically
from rnnopt.storage.run_folder import INIT_FOLDER
from rnnopt.tasks.start import Start
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.encoder.loading import Pooling, read_encoder
from rnnopt.tasks.text.encoder.lora import ADAPTER_FILE, adapter_key

INIT_FILE = "init.json"
_FORMAT = "rnnopt.init.1"


def save_init(
    folder: Path, classifier: Classifier, start: Start, head: str, training: Mapping[str, Any]
) -> None:
    """Write initial values as a folder that `transformers` or `peft` loads, and ``init.json``.

    `rnnopt.tasks.text.saving.save_initial_values` describes the other files. An existing folder is
    replaced as a whole: a reader finds the old folder or the new one, or no folder for a moment.

    Args:
        folder: the folder to write.
        classifier: the classifier whose initial values they are.
        start: how tasks started in meta-training: the values, and what is adapted.
        head: how their output layer began, see `rnnopt.tasks.text.start.TextStart`.
        training: JSON-compatible facts on the meta-training.

    Raises:
        InputError: the folder can't be written.
    """
    values = start.values or {}
    partial, old = (folder.with_name(f".{folder.name}.{end}") for end in ("new", "old"))
    for stale in (partial, old):
        shutil.rmtree(stale, ignore_errors=True)
    classifier.save_start(partial, values)
    facts = {
        "format": _FORMAT,
        **classifier.facts,
        "head": head,
        "adapted": start.adapted,
        "values": fingerprint(values),
        "training": dict(training),
    }
    write_atomically(partial / INIT_FILE, (json.dumps(facts, indent=2) + "\n").encode())
    try:
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
    except OSError as error:
        raise InputError(
            f"can't write {folder}: {error.strerror}; choose another --output"
        ) from error
    shutil.rmtree(old, ignore_errors=True)


def read_init(path: str | os.PathLike[str], classifier: Classifier) -> tuple[Start, str]:
    """Read meta-learned initial values from a folder.

    Args:
        path: the folder, or the folder of the meta-training run that holds it.
        classifier: the classifier that will start from the values.

    Returns:
        The start that meta-training used, with its values on the classifier's device, and how
        the head begins.

    Raises:
        InputError: the folder does not exist or is damaged, or its values belong to another
            encoder, LoRA rank or choice of trainable parameters. The message names both.
    """
    folder, facts = _facts(path)
    other = [
        f"{name}: {facts.get(name)!r} there, {value!r} here"
        for name, value in classifier.facts.items()
        if facts.get(name) != value
    ]
    if other:
        raise InputError(
            f"the initial values in {folder} are those of another classifier ({'; '.join(other)}); "
            "give the --encoder, --tune, --lora-rank, --top-layers and --pooling (`adapt` has "
            "--pooling model only) that they were meta-trained with, or leave --init out"
        )
    values = _values(folder, classifier)
    if fingerprint(values) != facts.get("values"):
        raise InputError(
            f"{folder}: the values are not those that {INIT_FILE} was written for; the folder was "
            "altered: meta-train again"
        )
    on_device = {name: value.to(classifier.device) for name, value in values.items()}
    return Start(facts["adapted"], on_device), facts["head"]


def read_init_training(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the facts on the meta-training from a folder of initial values.

    Raises:
        InputError: the folder does not exist or is damaged.
    """
    return dict(_facts(path)[1].get("training", {}))


def _facts(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """The folder that a path stands for, and the content of its ``init.json``."""
    folder = Path(path)
    if (folder / INIT_FOLDER / INIT_FILE).exists():
        folder = folder / INIT_FOLDER
    remedy = "name a folder that `rnnopt meta-train --init maml` wrote with this version"
    try:
        facts = dict(parse_json((folder / INIT_FILE).read_text()))
    except OSError as error:
        raise InputError(f"--init {path}: no {INIT_FILE} ({error.strerror}); {remedy}") from error
    except (ValueError, TypeError) as error:
        raise InputError(f"{folder / INIT_FILE} is damaged ({error}); {remedy}") from error
    if facts.get("format") != _FORMAT:
        raise InputError(
            f"{folder / INIT_FILE} holds {facts.get('format')!r}, expected {_FORMAT!r}; {remedy}"
        )
    lacking = [name for name in ("head", "adapted", "values") if name not in facts]
    if lacking:
        raise InputError(f"{folder / INIT_FILE} is damaged (no {', '.join(lacking)}); {remedy}")
    return folder, facts


def _values(folder: Path, classifier: Classifier) -> dict[str, Tensor]:
    """The values by name, on the CPU."""
    names = {name: name for name in classifier.initial_values}
    if classifier.facts["tune"] == "lora":
        found = read_tensors(folder / ADAPTER_FILE)[0]
        names = {name: adapter_key(name) for name in names}
    else:
        pooling: Pooling = "mean" if classifier.facts["pooling"] == "mean" else "model"
        model, _, absent = read_encoder(folder, pooling, classifier.ways, None)
        found = {name: leaf for name, leaf in model.named_parameters() if name not in absent}
    lost = [key for key in names.values() if key not in found]
    if lost:
        raise InputError(
            f"{folder} lacks {len(lost)} of {len(names)} initial values, {lost[0]} for one; the "
            "folder was altered: meta-train again"
        )
    return {name: found[key].detach().to(torch.float32) for name, key in names.items()}
