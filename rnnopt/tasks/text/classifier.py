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
    """A pretrained encoder with a head, which an episode adapts. `Classifier.load` makes it.

    Frozen parameters must keep their values, since the outputs of frozen layers are computed once
    for each text and kept.

    Attributes:
        fingerprint: 12 hexadecimal digits that differ between encoders.
        model: the module. Its parameters stay the same objects, except for an output layer whose
            number of classes changes.
        tokens: the `TokenCache` of its tokenizer.
        ways: C, the number of classes of the current head.
        precision: the precision of the encoder's arithmetic, ``"fp32"`` or ``"bf16"``.
        family: the argument `tune` of `load`.
        adapter: peft's object for the LoRA factors; None without LoRA.
        facts: JSON-compatible facts that are the same for two classifiers with the same trainable
            parameters.
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
            # models like GPT-2 find a text's last token by looking for padding
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
        if not dropout:  # with dropout, a layer's output for a text differs each time
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
        """Load an encoder in float32 and give it a head.

        Only safetensors files are read, and no code of the model's is run.

        Args:
            encoder: a folder, or a name on the Hugging Face hub (the local cache comes first).
            tune: which parameters train. ``"full"``: all. ``"head"``: the layers outside the
                encoder. ``"lora"``: those layers, and low-rank factors (Hu et al. 2021,
                arXiv:2106.09685) of the query and value projections of the attention.
            lora_rank: the rank of the factors. Their product is added unscaled.
            top_layers: with ``"full"`` or ``"lora"``, the number of encoder layers that train,
                counted from the top. Everything above them trains, too. None trains all layers.
            pooling: the input of the head. ``"model"``: the one of the architecture's own
                classifier (for BERT, the [CLS] pooler). ``"mean"``: see `MeanPooled`.
            ways: C, the number of classes of the first head.
            double_backward: use an attention that can be differentiated twice; it is slower.
            max_length: the longest text in tokens, at most as long as the encoder accepts.
            device: the device that the model is put on.
            seed: decides everything that is drawn: the head, the LoRA factors, and layers that the
                files lack. The global random state does not change.
            dropout: whether the encoder's dropout is on. Without it, the loss depends on nothing
                but the parameters and the batch.
            precision: ``"bf16"`` runs the encoder under autocast; parameters and gradients stay in
                float32. ``"auto"`` chooses bf16 on a CUDA device that supports it, else fp32.

        Raises:
            InputError: an argument is out of range, or the encoder can't be found or used.
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
            module: `model` itself, or a functional copy of it that `higher` made.
            batch: the result of `batch`.
        """
        source, states = getattr(batch, "kept", None) or (None, None)
        # outputs that the layers of another classifier made are of no use here
        mine = source is self._prefix and not module.training
        with self._autocast():
            if self._prefix is not None and states is not None and mine:
                logits = self._prefix.logits(module, batch, states)
            else:
                logits = module(**batch).logits
        return logits.float() if self.precision == "bf16" else logits

    def batch(self, texts: Sequence[str], *, again: bool = True) -> Batch:
        """Tokenise texts on the classifier's device, with the outputs of the frozen layers.

        Args:
            texts: B texts.
            again: whether the same texts are used again, in this batch or in later ones. If not,
                the outputs of the frozen layers are neither looked up nor kept.
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
        """The input of the output layer for each text, (B, H), differentiable."""
        # The output layer returns its input, so that everything that the model does to its logits
        # afterwards, such as choosing a decoder's last token, is done to the features.
        hook = self.output.register_forward_hook(lambda layer, args, output: args[0])
        try:
            return self.logits(batch)
        finally:
            hook.remove()

    @property
    def output(self) -> nn.Linear:
        """The layer that computes the logits. `reset` to other ways gives it new parameters."""
        return cast(nn.Linear, self.model.get_submodule(self._output))

    @property
    def output_name(self) -> str:
        """The name of the output layer in the model."""
        return self._output

    @property
    def module(self) -> nn.Module:
        """The model."""
        return cast(nn.Module, self.model)

    @property
    def device(self) -> torch.device:
        """The device that the model is on."""
        return self._device

    @property
    def initial_values(self) -> dict[str, Tensor]:
        """The values that `reset` restores, by name. The output layer has none."""
        return dict(self._start)

    def head_names(self) -> list[str]:
        """Names of the trainable parameters outside the encoder, with the output layer."""
        body = {id(param) for param in self.model.base_model.parameters()}
        return [name for name, param in self.trainable() if id(param) not in body]

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters that train, in the model's order."""
        return [pair for pair in self.model.named_parameters() if pair[1].requires_grad]

    def begin(self, task: Any, seed: int) -> None:
        """Call `reset` with the ways of a `rnnopt.tasks.text.tasks.TextTask`."""
        self.reset(task.ways, seed)

    def reset(self, ways: int, seed: int) -> None:
        """Start an episode: restore the initial values, and draw a new output layer.

        The output layer, and other head layers that the encoder's files lack, are drawn on the CPU
        by the model's own initialisation. The result depends only on the loaded model, the ways
        and the seed, bit for bit. Gradients are dropped. Build the optimizer afterwards, because an
        output layer of another shape has new parameters.

        Args:
            ways: C, the number of classes of the new output layer.
            seed: decides the new values. The global random state does not change.

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
            return nullcontext()  # an autocast of the caller stays in force
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
        """Freeze parameters that don't affect the logits, such as BERT's pooler with mean pooling.

        Their gradient would be None at every step. The trial run also shows at once whether the
        model can be used.
        """
        params = [param for _, param in self.trainable()]
        try:
            logits = self.logits(self.batch(["probe"]))
            grads = torch.autograd.grad(logits.sum(), params, allow_unused=True)
        except Exception as error:  # other architectures raise errors of any type
            kind = self.model.config.model_type
            raise InputError(
                f"a {kind} model can't classify a text: {first_line(error)}; "
                "choose another encoder, or the other --pooling"
            ) from error
        for param, grad in zip(params, grads):
            param.requires_grad_(grad is not None)


def choose_precision(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """Choose between autocast to bfloat16 and float32.

    Args:
        precision: ``"auto"`` chooses bf16 on a CUDA device that supports it, else fp32.
        device: the device that the model runs on.

    Raises:
        InputError: the precision is bf16 and the CUDA device does not support it.
    """
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        return "bf16" if fast else "fp32"
    if precision == "bf16" and device.type == "cuda" and not fast:
        raise InputError("precision is bf16: this CUDA device has no bf16; use --precision fp32")
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
