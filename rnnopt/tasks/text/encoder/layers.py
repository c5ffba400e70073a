"""An encoder's layers: which there are, and which of them train.

Shapes: B batch, S sequence (tokens), D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rnnopt.errors import InputError
from rnnopt.tasks.text.encoder.tokens import Batch


def top_and_lower(encoder: Any, top_layers: int) -> tuple[list[nn.Module], list[nn.Module]]:
    """The encoder's top layers, so many, and those below; the lowest first.

    Raises:
        InputError: more than there are, or layers that can't be told apart.
    """
    layers = layer_stack(encoder)
    if layers is None:
        raise InputError(
            f"top_layers is {top_layers}: the layers of {encoder.config.model_type} models can't "
            "be told apart; leave --top-layers out"
        )
    if top_layers > len(layers):
        raise InputError(
            f"top_layers is {top_layers}: the encoder has {len(layers)} layers; give at most that"
        )
    split = len(layers) - top_layers
    return list(layers[split:]), list(layers[:split])


def layer_stack(encoder: Any) -> nn.ModuleList | None:
    """The encoder's layers, the lowest first; None where they can't be told apart.

    ALBERT runs one layer many times, and an encoder-decoder has two stacks.
    """
    count = getattr(encoder.config, "num_hidden_layers", None)
    stacks = [
        module
        for module in encoder.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and len({type(layer) for layer in module}) == 1
    ]
    return stacks[0] if len(stacks) == 1 else None


def freeze_below(model: Any, layer: nn.Module, batch: Batch) -> None:
    """Stop from training what the input of this layer is made from.

    Args:
        model: a text classifier.
        layer: one of its encoder's.
        batch: any; it shows what comes before what.
    """

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise Reached(args[0] if args else kwargs["hidden_states"])

    params = [param for param in model.parameters() if param.requires_grad]
    states = reach(model, batch, layer.register_forward_pre_hook(stop, with_kwargs=True))
    grads = torch.autograd.grad(states.sum(), params, allow_unused=True)
    for param, grad in zip(params, grads):
        param.requires_grad_(grad is None)


class Reached(Exception):
    """Ends a forward pass where its result is known; holds the result."""


def reach(model: Any, batch: Batch, hook: Any) -> Any:
    """What the hook that raises `Reached` saw."""
    try:
        model(**batch)
    except Reached as reached:
        return reached.args[0]
    finally:
        hook.remove()
    raise RuntimeError("the layer did not run")
