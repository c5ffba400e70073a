"""Classifiers written to a folder: a finished one, or a model with learned initial values."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from rnnopt.errors import InputError
from rnnopt.storage.files import claim_folder, let_others_read
from rnnopt.tasks.text.encoder.loading import MeanPooled, first_line, silence
from rnnopt.tasks.text.encoder.lora import save_adapter


class Saveable(Protocol):
    """What is written of a `rnnopt.tasks.text.classifier.Classifier`."""

    model: Any
    adapter: Any
    tokens: Any
    ways: int

    @property
    def output_name(self) -> str:
        """Name of the output layer in the model."""
        ...


def save_classifier(classifier: Saveable, folder: Path, label_names: Sequence[str]) -> None:
    """Write a folder for `transformers.pipeline("text-classification", folder, truncation=True)`.

    The tokenizer in the folder truncates, where that is asked for, to the length that was trained
    on; without it, texts longer than the encoder's positions fail. LoRA factors are merged into the
    weights that are written. The folder appears as a whole or not at all. The classifier itself
    stays as it is.

    Args:
        classifier: the classifier to write.
        folder: absent or empty.
        label_names: one name for each class, in the order of the logits.

    Raises:
        InputError: the classifier uses mean pooling, the label names don't fit its classes, the
            folder is not empty, or it can't be written.
    """
    _check_saveable(classifier, label_names)
    claim_folder(folder)
    model, adapter = copy.deepcopy((classifier.model, classifier.adapter))
    if adapter is not None:
        adapter.merge_and_unload()
    model.config.id2label = dict(enumerate(label_names))
    model.config.label2id = {name: i for i, name in enumerate(label_names)}
    partial = folder.parent / f".{folder.name}.{os.getpid()}"
    try:
        with silence():
            model.eval().save_pretrained(partial)
            tokenizer = copy.deepcopy(classifier.tokens.tokenizer)
            tokenizer.model_max_length = classifier.tokens.max_length
            tokenizer.save_pretrained(partial)
        let_others_read(partial)
        os.replace(partial, folder)
    except BaseException as error:
        folder.rmdir()  # still empty
        if isinstance(error, OSError | SafetensorError):
            raise _cannot_write(folder, error) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_initial_values(classifier: Saveable, folder: Path, values: Mapping[str, Tensor]) -> None:
    """Write the model with other initial values, as an encoder that can be loaded again.

    With LoRA the folder holds the factors and the head layers that train, in the format that peft's
    `PeftModel.from_pretrained(model, folder)` loads. Otherwise it holds the whole model, which
    `AutoModelForSequenceClassification.from_pretrained(folder)` loads (`AutoModel` with mean
    pooling). The output layer is not written, since every task has its own.

    Args:
        classifier: the classifier whose model is written; it stays as it is.
        folder: absent or empty.
        values: the initial values by name, as in `Classifier.initial_values`.

    Raises:
        InputError: the folder is not empty, or it can't be written.
    """
    claim_folder(folder)
    try:
        with silence():
            if classifier.adapter is not None:
                save_adapter(classifier.adapter, classifier.model, folder, values)
            else:
                _save_whole(classifier, folder, values)
            classifier.tokens.tokenizer.save_pretrained(folder)
        let_others_read(folder)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(folder, error) from error


def _save_whole(classifier: Saveable, folder: Path, values: Mapping[str, Tensor]) -> None:
    model = copy.deepcopy(classifier.model)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name in values:
                param.copy_(values[name])
    model = model.encoder if isinstance(model, MeanPooled) else model
    kept = {
        name: leaf
        for name, leaf in model.state_dict().items()
        if name.rpartition(".")[0] != classifier.output_name
    }
    model.eval().save_pretrained(folder, state_dict=kept)


def _check_saveable(classifier: Saveable, label_names: Sequence[str]) -> None:
    if isinstance(classifier.model, MeanPooled):
        raise InputError(
            "a classifier with pooling 'mean' can't be saved: transformers' text classifiers "
            "have no mean pooling; use --pooling model"
        )
    ways = classifier.ways
    if len(label_names) != ways or len(set(label_names)) != ways:
        raise InputError(
            f"label names are {list(label_names)}: the classifier has {ways} classes; "
            "give one distinct name for each"
        )


def _cannot_write(folder: Path, error: Exception) -> InputError:
    return InputError(f"can't write {folder}: {first_line(error)}; choose another --output")
