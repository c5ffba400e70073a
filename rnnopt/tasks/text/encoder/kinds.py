"""What part of a classifier a parameter is."""

from __future__ import annotations

from torch import nn

from rnnopt.tasks.text.classifier import Classifier

KINDS = (
    "embedding",
    "attention matrix",
    "other matrix",
    "layer norm",
    "bias",
    "LoRA A",
    "LoRA B",
    "head",
)


def tensor_kinds(classifier: Classifier) -> dict[str, str]:
    """Name of each tensor that trains -> one of `KINDS`, in the model's order.

    ``head`` is all that is outside the encoder, ``layer norm`` scale and shift of any
    normalisation, ``other matrix`` the feed-forward layers and the pooler.
    """
    model = classifier.model
    body = {id(param) for param in model.base_model.parameters()}
    return {
        name: _kind(name, param, model) if id(param) in body else "head"
        for name, param in classifier.trainable()
    }


def _kind(name: str, param: nn.Parameter, model: nn.Module) -> str:
    parts = name.split(".")
    for factor in ("A", "B"):  # as peft names them
        if f"lora_{factor}" in parts:
            return f"LoRA {factor}"
    owner = model.get_submodule(".".join(parts[:-1]))
    if isinstance(owner, nn.Embedding):
        return "embedding"
    if "norm" in type(owner).__name__.lower():
        return "layer norm"
    if param.dim() < 2:
        return "bias"
    attention = any("attention" in part or "attn" in part for part in parts)
    return "attention matrix" if attention else "other matrix"
