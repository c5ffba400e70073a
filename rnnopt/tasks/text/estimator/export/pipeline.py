"""A fitted classifier as a model of `transformers`, for its pipelines, where the model allows.

A classifier of `transformers` reads the first token, and has a layer between it and the output,
with tanh or ReLU. Such a layer can be made to hand values on unchanged: tanh is the identity near
0, ReLU is above 0. So vectors of the first token that are not scaled to length 1 have a model of
`transformers` with the same logits; means of tokens have none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rnnopt.errors import InputError
from rnnopt.tasks.text.encoder.loading import make_sequence_classifier, read_encoder, silence
from rnnopt.tasks.text.estimator.export.agreement import require_agreement
from rnnopt.tasks.text.estimator.folder import Fitted, new_folder
from rnnopt.tasks.text.estimator.heads import LinearHead

_SMALL = 2.0**-13  # tanh(x * this) is x * this to 1e-6 for x up to 10, and the product is exact
_TEXTS = ("a", "two words", "this text is longer than the others, so that they are padded", "")


def _through_tanh(
    dense: nn.Linear, output: nn.Linear, head: LinearHead, centre: np.ndarray
) -> None:
    head = head.around(centre)
    dense.weight.copy_(_SMALL * torch.eye(len(dense.weight)))
    dense.bias.copy_(torch.from_numpy(-_SMALL * centre))
    output.weight.copy_(torch.from_numpy(head.weight / _SMALL))
    output.bias.copy_(torch.from_numpy(head.bias))


def _bert(model: Any, head: LinearHead, centre: np.ndarray) -> None:
    _through_tanh(model.base_model.pooler.dense, model.classifier, head, centre)


def _roberta(model: Any, head: LinearHead, centre: np.ndarray) -> None:
    _through_tanh(model.classifier.dense, model.classifier.out_proj, head, centre)


def _distilbert(model: Any, head: LinearHead, centre: np.ndarray) -> None:
    last = model.base_model.transformer.layer[-1].output_layer_norm
    # no output of layer normalisation is larger: its input has the mean square 1
    bound = (math.sqrt(len(last.weight)) * last.weight.abs() + last.bias.abs()).max().item()
    model.pre_classifier.weight.copy_(torch.eye(len(model.pre_classifier.weight)))
    model.pre_classifier.bias.fill_(bound)
    model.classifier.weight.copy_(torch.from_numpy(head.weight))
    shifted = head.around(np.full(len(last.weight), -bound))
    model.classifier.bias.copy_(torch.from_numpy(shifted.bias))


_KINDS: Mapping[str, Callable[[Any, LinearHead, np.ndarray], None]] = {
    "bert": _bert,
    "camembert": _roberta,
    "distilbert": _distilbert,
    "roberta": _roberta,
    "xlm-roberta": _roberta,
}


def export(fitted: Fitted, folder: str | Path, texts: Sequence[str] | None) -> float:
    """Write a folder for ``transformers.pipeline("text-classification", folder)``.

    It appears whole or not at all, and only if its logits are the classifier's within what
    `require_agreement` allows.

    Args:
        fitted: the classifier.
        folder: absent or empty.
        texts: to compare by; None for a few of several lengths.

    Returns:
        The largest difference of a logit.

    Raises:
        InputError: the folder can't be written, or this encoder has no such model.
    """
    layout = fitted.encoder.layout
    config = fitted.encoder.encoder.config
    scaled = ", scaled to length 1" if layout.normalized else ""
    if layout.pooling != "cls" or layout.normalized or config.model_type not in _KINDS:
        raise InputError(
            f"this {config.model_type} encoder has vectors of the pooling {layout.pooling!r}"
            f"{scaled}, and transformers' classifiers read the first token as it is, of "
            f"{', '.join(_KINDS)}; save it for TextClassifier.load, or export it to ONNX, or fit "
            "with pooling='cls' an encoder without a Normalize module"
        )
    names = [str(label) for label in fitted.decision.classes.tolist()]
    several = fitted.decision.thresholds is not None
    texts = [*_TEXTS, *names[:28]] if texts is None else list(texts)
    with new_folder(folder) as partial:
        with silence(), torch.no_grad():
            model = make_sequence_classifier(fitted.encoder.encoder, names, several)
            centre = fitted.encoder.embed(texts).double().numpy().mean(axis=0)
            _KINDS[config.model_type](model, fitted.head, centre)
            model.save_pretrained(partial)
            tokenizer = fitted.encoder.tokenizer
            tokenizer.model_max_length = layout.max_length
            tokenizer.save_pretrained(partial)
        return _compared(fitted, partial, texts)


@torch.no_grad()
def _compared(fitted: Fitted, folder: Path, texts: Sequence[str]) -> float:
    """The largest difference of a logit from what the folder holds."""
    model, _, _ = read_encoder(folder, "model", len(fitted.head.bias), None)
    cache = fitted.encoder.tokens()
    found = [model.eval()(**cache.batch([text])).logits for text in texts]
    wanted = fitted.head.logits(fitted.encoder.embed(texts).numpy())
    kind = fitted.encoder.encoder.config.model_type
    return require_agreement(torch.cat(found).double().numpy(), wanted, kind)
