"""The layers of an encoder: finding them, and freezing those below a layer.

Shapes: B batch, S sequence (tokens), D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rnnopt.errors import InputError
from rnnopt.tasks.text.encoder.tokens import Batch


def top_and_lower(encoder: Any, top_layers: int) -> tuple[list[nn.Module], list[nn.Module]]:
    """Divide the encoder's layers into the top ones and those below them.

    Args:
        encoder: a `transformers` model without a head.
        top_layers: the number of top layers.

    Returns:
        The top layers and the lower layers, each from the lowest to the highest.

    Raises:
        InputError: the encoder has fewer layers, or its layers can't be identified.
    """
    layers = layer_stack(encoder)
    if layers is None:
        raise InputError(
            f"top_layers is {top_layers}: the layers of {encoder.config.model_type} models can't "
            "be identified; leave --top-layers out"
        )
    if top_layers > len(layers):
        raise InputError(
            f"top_layers is {top_layers}: the encoder has {len(layers)} layers; give at most that"
        )
    split = len(layers) - top_layers
    return list(layers[split:]), list(layers[:split])


def layer_stack(encoder: Any) -> nn.ModuleList | None:
    """The encoder's layers, from the lowest to the highest; None if they can't be identified.

    ALBERT runs one layer many times, and an encoder-decoder has two stacks of layers.
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


def train_layers(encoder: nn.Module) -> None:
    """Make everything train but tables of tokens and positions.

    A few texts hold few of the tokens, and the tables are half of a small encoder.
    """
    encoder.requires_grad_(True)
    for module in encoder.modules():
        if isinstance(module, nn.Embedding):
            module.requires_grad_(False)


def freeze_below(model: Any, layer: nn.Module, batch: Batch) -> None:
    """Freeze the parameters that the input of a layer depends on.

    Args:
        model: a text classifier.
        layer: a layer of its encoder.
        batch: any batch. A forward pass on it shows which parameters the input depends on.
    """

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise Reached(args[0] if args else kwargs["hidden_states"])

    params = [param for param in model.parameters() if param.requires_grad]
    states = reach(model, batch, layer.register_forward_pre_hook(stop, with_kwargs=True))
    grads = torch.autograd.grad(states.sum(), params, allow_unused=True)
    for param, grad in zip(params, grads):
        param.requires_grad_(grad is None)


class Reached(Exception):
    """Ends a forward pass as soon as the wanted value is known, and holds that value."""


def reach(model: Any, batch: Batch, hook: Any) -> Any:
    """Run the model until a hook raises `Reached`; return the value that it holds.

    Args:
        model: the model.
        batch: its input.
        hook: the handle of the hook, which is removed.
    """
    try:
        model(**batch)
    except Reached as reached:
        return reached.args[0]
    finally:
        hook.remove()
    raise RuntimeError("the layer did not run")
