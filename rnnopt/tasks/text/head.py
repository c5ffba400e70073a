"""The head of a text classifier: the layers that lie outside its encoder."""

from __future__ import annotations

from typing import Any

from torch import nn

from rnnopt.errors import InputError


def head_layers(model: Any) -> dict[str, Any]:
    """The layers outside the encoder that hold parameters, by name, in the model's order."""
    body = {id(param) for param in model.base_model.parameters()}
    return {
        name: layer
        for name, layer in model.named_modules()
        if any(id(param) not in body for param in layer.parameters(recurse=False))
    }


def output_layer(head: dict[str, Any], ways: int) -> str:
    """The name of the layer that makes the logits.

    Args:
        head: what `head_layers` returned.
        ways: C, the number of classes that the model was loaded for.

    Raises:
        InputError: the head has no linear layer with C outputs.
    """
    linear = [
        name
        for name, layer in head.items()
        if isinstance(layer, nn.Linear) and layer.out_features == ways
    ]
    if not linear:
        raise InputError(
            f"the classifier's head ({', '.join(head) or 'none'}) has no linear layer with "
            f"{ways} outputs; use --pooling mean"
        )
    return linear[-1]


def adopt_values(layer: nn.Module, drawn: nn.Module) -> None:
    """Copy the parameters of one layer into another.

    A parameter of the same shape stays the same object; one of another shape is replaced.

    Args:
        layer: receives the values.
        drawn: holds them.
    """
    for name, value in drawn.named_parameters(recurse=False):
        param = layer.get_parameter(name)
        if param.shape == value.shape:
            param.copy_(value)
        else:
            fresh = nn.Parameter(value.to(param.device), requires_grad=param.requires_grad)
            setattr(layer, name, fresh)
