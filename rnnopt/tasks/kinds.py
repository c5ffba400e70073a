"""The kinds of parameters, by their part in a model: embeddings, attention, head and so on."""

from __future__ import annotations

from torch import nn

from rnnopt.tasks.protocol import Learner

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


def tensor_kinds(learner: Learner) -> dict[str, str]:
    """The kind of each trainable parameter, one of `KINDS`, by name and in the module's order.

    ``head``: the parameters that belong to the task, see `Learner.head_names`. ``layer norm``:
    scale and shift of any normalisation. ``other matrix``: for example the feed-forward layers and
    the pooler.
    """
    head = set(learner.head_names())
    return {
        name: "head" if name in head else _kind(name, param, learner.module)
        for name, param in learner.trainable()
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
