"""What `transformers.Trainer` has to be told for `LearnedOptimizer`."""

from __future__ import annotations

import copy
import os
from typing import Any

from torch import nn

from rnnopt.errors import InputError
from rnnopt.optim.optimizer import LearnedOptimizer
from rnnopt.rules.protocol import UpdateRule

# Attributes by which attention layers of transformers know their dropout, beside nn.Dropout modules
_RATES = ("attention_dropout", "attention_probs_dropout_prob", "dropout_prob")


def trainer_settings(
    model: nn.Module,
    arguments: Any,
    rule: UpdateRule | str | os.PathLike[str] | None = None,
    *,
    dropout: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Arguments for `transformers.Trainer` that train as a plain loop with the optimizer does.

    >>> trainer = Trainer(**trainer_settings(model, arguments), train_dataset=dataset)

    Gradients are not clipped, since a clipped gradient hides from the safeguard how far the loss
    rises. The schedule is constant: ``lr`` multiplies the learned step, and stays 1. The loss is
    the mean over all that a step has accumulated. Trainer leaves it to a model whose ``forward``
    takes any keyword to divide by the number of accumulated texts, and text classifiers take
    keywords but do not divide: their gradients would be too large by the number of accumulated
    batches, and by the number of processes.

    Args:
        model: that is trained. Its ``accepts_loss_kwargs`` is set to False, and, unless `dropout`
            is set, the rates of its dropout to 0: rules were meta-trained without.
        arguments: `transformers.TrainingArguments`; they are copied, not changed.
        rule: see `LearnedOptimizer`.
        dropout: whether the model's dropout stays as it is.
        options: of `LearnedOptimizer`, such as ``fused`` or ``guard``. Weight decay comes from the
            arguments.

    Returns:
        ``model``, ``args`` and ``optimizer_cls_and_kwargs``.

    Raises:
        InputError: the model is no module, or the arguments are no training arguments, or ask
            for something that the optimizer can't do.
    """
    _check(model, arguments)
    chosen = copy.copy(arguments)
    chosen.max_grad_norm = 0.0
    chosen.lr_scheduler_type = type(arguments.lr_scheduler_type)("constant")
    for part in _base_models(model):
        part.accepts_loss_kwargs = False  # type: ignore[assignment]
    if not dropout:
        _switch_dropout_off(model)
    return {
        "model": model,
        "args": chosen,
        "optimizer_cls_and_kwargs": (LearnedOptimizer, {"rule": rule, **options}),
    }


def _check(model: object, arguments: Any) -> None:
    """Refuse what `trainer_settings` can't use.

    Raises:
        InputError: see there.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model is of type {type(model).__name__}; give the torch.nn.Module that is trained"
        )
    for name in ("max_grad_norm", "lr_scheduler_type", "gradient_accumulation_steps"):
        if not hasattr(arguments, name):
            raise InputError(
                f"arguments is a {type(arguments).__name__}, without {name}; give "
                "transformers.TrainingArguments"
            )
    if getattr(arguments, "deepspeed", None):
        raise InputError(
            "arguments.deepspeed is set, and DeepSpeed shows the optimizer a part of the gradients "
            "at a time; use FSDP2, or leave it out"
        )


def _base_models(model: nn.Module) -> list[nn.Module]:
    """The model, and the one that peft has wrapped, whose attribute Trainer reads."""
    inner = getattr(model, "get_base_model", None)
    return [model, inner()] if callable(inner) else [model]


def _switch_dropout_off(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in _RATES:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
