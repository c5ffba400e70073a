"""Text classifiers as what an episode adapts.

A `Classifier` is a pretrained encoder and a head. Every episode starts from the same values:
`Classifier.reset` restores the parameters that train and draws a new output layer. Reading models
of Hugging Face is the task of `rnnopt.tasks.text.encoder.loading`. The outputs of frozen layers are
kept by `rnnopt.tasks.text.encoder.prefix`.

Shapes: B batch, S sequence (tokens), C ways (classes).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from rnnopt.errors import InputError
from rnnopt.tasks.protocol import Learner
from rnnopt.tasks.text.encoder.layers import freeze_below, top_and_lower
from rnnopt.tasks.text.encoder.loading import (
    MeanPooled,
    Pooling,
    encoder_fingerprint,
    first_line,
    position_limit,
    read_encoder,
    seeded,
)
from rnnopt.tasks.text.encoder.lora import add_lora
from rnnopt.tasks.text.encoder.prefix import Prefix, find_prefix
from rnnopt.tasks.text.encoder.tokens import Batch, TokenCache
from rnnopt.tasks.text.head import adopt_values, head_layers, output_layer
from rnnopt.tasks.text.saving import save_classifier, save_initial_values

Tune = Literal["full", "lora", "head"]
Precision = Literal["auto", "fp32", "bf16"]


class Classifier(Learner):
    """An encoder with a head: what an episode adapts. Made by `Classifier.load`.

    What doesn't train must keep its values: its work on a text is done once.

    Attributes:
        fingerprint: 12 hexadecimal digits that tell one encoder from another.
        model: the module; its parameters keep their identity, but for an output layer whose
            number of ways changes.
        tokens: the `TokenCache` of its tokenizer.
        ways: C, the classes of the current head.
        precision: ``"fp32"`` or ``"bf16"``, of the encoder's arithmetic.
        family: what trains, the argument `tune` of `load`.
        facts: JSON-compatible facts that two classifiers with the same trainable parameters share.
    """

    def __init__(
        self, model: Any, tokenizer: Any, absent: set[str], *, tune: Tune, lora_rank: int,
        top_layers: int | None, ways: int, max_length: int, device: torch.device, seed: int,
        dropout: bool, precision: Precision,
    ) -> None:  # fmt: skip
        self.model, self.ways, self._device = model.eval(), ways, device
        self.precision = choose_precision(precision, device)
        names = inspect.signature(model.base_model.forward).parameters
        limit = min(max_length, position_limit(model))
        self.tokens = TokenCache(tokenizer, limit, list(names))
        if model.config.pad_token_id is None:
            # GPT-2 and its kind find a text's last token by looking for padding
            model.config.pad_token_id = tokenizer.pad_token_id
        head = head_layers(model)
        self._output = output_layer(head, ways)
        self._fresh = [
            name
            for name, layer in head.items()
            if name == self._output
            or all(f"{name}.{key}" in absent for key, _ in layer.named_parameters(recurse=False))
        ]
        self.fingerprint = encoder_fingerprint(model.base_model, tokenizer)
        self.family = tune
        self.facts = {
            "encoder_weights": self.fingerprint,
            "pooling": "mean" if isinstance(model, MeanPooled) else "model",
            "tune": tune,
            "lora_rank": lora_rank if tune == "lora" else None,
            "top_layers": top_layers,
        }
        self._prefix: Prefix | None = None
        self._choose_what_trains(tune, lora_rank, top_layers)
        self._start = {
            name: param.detach().clone()
            for name, param in self.trainable()
            if name.rpartition(".")[0] != self._output
        }
        self.reset(ways, seed)
        if not dropout:  # with it a layer's output is never the same twice
            self._prefix = find_prefix(model, self.tokens, device)
        model.train(dropout)

    @classmethod
    def load(
        cls,
        encoder: str | Path,
        *,
        tune: Tune = "lora",
        lora_rank: int = 8,
        top_layers: int | None = None,
        pooling: Pooling = "model",
        ways: int,
        double_backward: bool = False,
        max_length: int = 128,
        device: torch.device,
        seed: int = 0,
        dropout: bool = False,
        precision: Precision = "auto",
    ) -> Classifier:
        """Load an encoder in float32 and give it a head. Reads safetensors only, runs no code.

        Args:
            encoder: a folder, or a name on the Hugging Face hub (the local cache comes first).
            tune: what trains: ``"full"`` all, ``"head"`` what is outside the encoder, ``"lora"``
                that and low-rank factors (Hu et al. 2021, arXiv:2106.09685) of the attention's
                query and value.
            lora_rank: rank of the factors; their product is added unscaled.
            top_layers: with ``"full"`` or ``"lora"``: of the encoder's layers only so many, counted
                from the top, train, and what lies above; None trains them all.
            pooling: what the head reads: ``"model"``, what the architecture's own classifier
                reads (BERT: the [CLS] pooler), or ``"mean"``, see `MeanPooled`.
            ways: C, the classes of the first head.
            double_backward: use the attention that can be differentiated twice; slower.
            max_length: longest text in tokens; cut to what the encoder takes.
            device: where the model goes.
            seed: decides all that is drawn: head, LoRA factors, layers the files lack. The
                global random state is left alone.
            dropout: keep the encoder's dropout on; off, a step is a function of its batch.
            precision: ``"bf16"`` runs the encoder under autocast, parameters and gradients stay
                float32; ``"auto"`` does so on a CUDA device that can.

        Raises:
            InputError: an argument out of range, or an encoder that can't be found or used.
        """
        _check_arguments(tune, pooling, precision, lora_rank, ways)
        _check_top_layers(tune, top_layers)
        exact = choose_precision(precision, device)
        # the fused attention has no second derivative, and on a CPU its backward pass in bfloat16
        # takes twice as long as that of plain matrix products
        plain = double_backward or (exact == "bf16" and device.type == "cpu")
        attention = "eager" if plain else None
        with seeded(seed):
            model, tokenizer, absent = read_encoder(encoder, pooling, ways, attention)
            return cls(
                model, tokenizer, absent, tune=tune, lora_rank=lora_rank, top_layers=top_layers,
                ways=ways, max_length=max_length, device=device, seed=seed, dropout=dropout,
                precision=exact,
            )  # fmt: skip

    def forward(self, module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits (B, C), in the parameters' dtype.

        Args:
            module: `model` itself or what `higher` made of it.
            batch: what `batch` returned.
        """
        source, states = getattr(batch, "kept", None) or (None, None)
        # what another classifier made of the texts has no use here
        mine = source is self._prefix and not module.training
        with self._autocast():
            if self._prefix is not None and states is not None and mine:
                logits = self._prefix.logits(module, batch, states)
            else:
                logits = module(**batch).logits
        return logits.float() if self.precision == "bf16" else logits

    def batch(self, texts: Sequence[str], *, again: bool = True) -> Batch:
        """`TokenCache.batch` on the classifier's device, with what frozen layers make of it.

        Args:
            texts: B texts.
            again: they come more than once, or meet more than one step; if not, nothing is kept.
        """
        batch = self.tokens.batch(texts, self.device)
        if again and self._prefix is not None:
            with self._autocast():
                batch.kept = self._prefix, self._prefix.read(batch, texts)
        return batch

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits (B, C) of a batch."""
        return self.forward(self.model, batch)

    def features(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What the output layer reads of each text, (B, H), differentiable."""
        # the output layer hands on its input: what becomes of the logits later on, the choice of
        # a decoder's last token, say, happens to the features
        hook = self.output.register_forward_hook(lambda layer, args, output: args[0])
        try:
            return self.logits(batch)
        finally:
            hook.remove()

    @property
    def output(self) -> nn.Linear:
        """The layer that makes the logits; `reset` to other ways gives it new parameters."""
        return cast(nn.Linear, self.model.get_submodule(self._output))

    @property
    def output_name(self) -> str:
        """Of the output layer, in the model."""
        return self._output

    @property
    def module(self) -> nn.Module:
        """The model."""
        return cast(nn.Module, self.model)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._device

    @property
    def initial_values(self) -> dict[str, Tensor]:
        """The values that `reset` restores, by name: of all that trains but the output layer."""
        return dict(self._start)

    def head_names(self) -> list[str]:
        """Names of the parameters that train outside the encoder, output layer included."""
        body = {id(param) for param in self.model.base_model.parameters()}
        return [name for name, param in self.trainable() if id(param) not in body]

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters that train, in the model's order."""
        return [pair for pair in self.model.named_parameters() if pair[1].requires_grad]

    def begin(self, task: Any, seed: int) -> None:
        """See `reset`, with the ways of a `rnnopt.tasks.text.tasks.TextTask`."""
        self.reset(task.ways, seed)

    def reset(self, ways: int, seed: int) -> None:
        """Start an episode: starting values for all that trains, and a fresh head.

        The output layer, and other head layers that the encoder's files lack, are drawn on the
        CPU by the model's own initialisation: the result is a function of the loaded model, ways
        and seed, to the bit. Gradients are dropped. Build the optimizer afterwards: an output
        layer of another shape is made of new parameters.

        Args:
            ways: C, the classes of the new head.
            seed: decides the new head; the global random state is left alone.

        Raises:
            InputError: fewer than 2 ways.
        """
        _check_ways(ways)
        with torch.no_grad(), seeded(seed):
            for name, param in self.model.named_parameters():
                param.grad = None
                if name in self._start:
                    param.copy_(self._start[name])
            for name in self._fresh:
                layer = self.model.get_submodule(name)
                drawn = copy.deepcopy(layer).cpu()
                if name == self._output:
                    drawn = nn.Linear(layer.in_features, ways, bias=layer.bias is not None)
                    layer.out_features = ways
                self.model._init_weights(drawn)
                adopt_values(layer, drawn)
        self.ways = self.model.num_labels = self.model.config.num_labels = ways

    def save(self, folder: str | Path, label_names: Sequence[str]) -> None:
        """Write the folder of a finished classifier; see `saving.save_classifier`."""
        save_classifier(self, Path(folder), label_names)

    def save_start(self, folder: Path, values: Mapping[str, Tensor]) -> None:
        """Write the model with other initial values; see `saving.save_initial_values`."""
        save_initial_values(self, folder, values)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "fp32":
            return nullcontext()  # what a caller has set stays
        return torch.autocast(self.device.type, torch.bfloat16)

    def _choose_what_trains(self, tune: Tune, lora_rank: int, top_layers: int | None) -> None:
        body = self.model.base_model
        top, lower = top_and_lower(body, top_layers) if top_layers else ([], [])
        if tune != "full":
            body.requires_grad_(False)
        self.adapter = add_lora(body, lora_rank, lower) if tune == "lora" else None
        self.model.to(self.device)
        if tune == "full" and top:
            freeze_below(self.model, top[0], self.batch(["probe"]))
        self._freeze_unused()

    def _freeze_unused(self) -> None:
        """Stop what doesn't reach the logits from training: BERT's pooler under mean pooling.

        Its gradient would be None at every step. It also proves the model usable, now.
        """
        params = [param for _, param in self.trainable()]
        try:
            logits = self.logits(self.batch(["probe"]))
            grads = torch.autograd.grad(logits.sum(), params, allow_unused=True)
        except Exception as error:  # whatever an architecture unlike the others may raise
            kind = self.model.config.model_type
            raise InputError(
                f"a {kind} model can't classify a text: {first_line(error)}; "
                "choose another encoder, or the other --pooling"
            ) from error
        for param, grad in zip(params, grads):
            param.requires_grad_(grad is not None)


def choose_precision(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """Autocast's bfloat16 or float32 for a device.

    Raises:
        InputError: bfloat16 on a CUDA device without.
    """
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        return "bf16" if fast else "fp32"
    if precision == "bf16" and device.type == "cuda" and not fast:
        raise InputError("precision is bf16: this CUDA device has none; use --precision fp32")
    return precision


def _check_arguments(tune: str, pooling: str, precision: str, lora_rank: int, ways: int) -> None:
    for name, value, allowed in (
        ("tune", tune, get_args(Tune)),
        ("pooling", pooling, get_args(Pooling)),
        ("precision", precision, get_args(Precision)),
    ):
        if value not in allowed:
            raise InputError(f"{name} is {value!r}; use one of {', '.join(allowed)}")
    if lora_rank < 1:
        raise InputError(f"lora_rank is {lora_rank}; it must be at least 1, and 8 is usual")
    _check_ways(ways)


def _check_top_layers(tune: Tune, top_layers: int | None) -> None:
    if top_layers is None:
        return
    if tune == "head":
        raise InputError(
            f"top_layers is {top_layers}, and with tune 'head' no layer trains; leave --top-layers "
            "out, or use --tune lora or full"
        )
    if top_layers < 1:
        raise InputError(
            f"top_layers is {top_layers}; it must be at least 1: for none, use --tune head"
        )


def _check_ways(ways: int) -> None:
    if ways < 2:
        raise InputError(f"ways is {ways}; a classifier needs at least 2 classes")
