"""BERT encoders as plain functions of their weights, for many tasks at once; no command.

Shapes: B tasks, n texts of each, S tokens of each, D hidden units. A weight that is frozen has its
own shape and is shared by the tasks; one that trains has a leading dimension B.

Weights are named "0.query.weight" for layer 0, and "pooler.weight". A LoRA pair of a matrix
"0.query" is "0.query.A" (B, rank, in) and "0.query.B" (B, out, rank).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rnnopt.errors import InputError

# A layer's parts, and their names in Hugging Face's BERT.
PARTS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}
EPSILON = 1e-12  # of BERT's normalisations
UNITS_PER_HEAD = 32  # of the distilled encoders, as in MiniLM
MASKED = -1e4  # added to the attention scores of padding
POOLINGS = ("cls", "mean", "unit")

Weights = Mapping[str, Tensor]


class Encoder:
    """An encoder's weights.

    Args:
        name: in the log.
        weights: of the layers and the pooler.
        heads: attention heads.
        words: word embeddings, (V, D).
        positions: position embeddings, with those of the token type added, (longest text, D).
        scale: of the normalisation of embeddings, (D,).
        shift: the same.
        vocabulary: V of the whole encoder, where rows of `words` that no text needs are left out.
        distilled: whether `prepare.py` made it. Its first token is not trained, so that pooling
            "cls" gives the pooler the mean instead, and its lower layers are not cached.
    """

    def __init__(
        self, name: str, weights: Weights, heads: int, words: Tensor, positions: Tensor,
        scale: Tensor, shift: Tensor, distilled: bool, vocabulary: int | None = None,
    ) -> None:  # fmt: skip
        self.name, self.weights, self.heads, self.distilled = name, weights, heads, distilled
        self.words, self.positions, self.scale, self.shift = words, positions, scale, shift
        self.vocabulary = vocabulary or len(words)
        self.hidden_size = words.shape[1]
        self.layers = 1 + max(int(key.split(".")[0]) for key in weights if key[0].isdigit())
        self._halves: dict[int, tuple[Tensor, Tensor]] = {}

    def embed(self, tokens: Tensor) -> Tensor:
        """The lowest layer's inputs (..., S, D) of token ids (..., S)."""
        return self.place(F.embedding(tokens.long(), self.words))

    def place(self, words: Tensor) -> Tensor:
        """The lowest layer's inputs of word embeddings, (..., S, D)."""
        words = words + self.positions[: words.shape[-2]]
        return F.layer_norm(words, (self.hidden_size,), self.scale, self.shift, EPSILON)

    def layer_names(self, index: int) -> list[str]:
        """The names of a layer's weights."""
        return [f"{index}.{part}.{kind}" for part in PARTS for kind in ("weight", "bias")]

    def half(self, weight: Tensor) -> Tensor:
        """A frozen matrix in bfloat16, kept: products with it take a third of the time."""
        if id(weight) not in self._halves:
            self._halves[id(weight)] = (weight, weight.bfloat16())
        return self._halves[id(weight)][1]

    def features(
        self, weights: Weights, layers: Sequence[int], pooling: str, hidden: Tensor, mask: Tensor,
        dropout: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """The pooled outputs.

        Args:
            weights: of these layers, and of the pooler for "cls"; LoRA pairs, and ``lora_scale``.
            layers: from the lowest to the last.
            pooling: "cls" (the pooler on the first token), "mean", or "unit" (mean, length 1).
            hidden: the lowest layer's inputs, (B, n, S, D).
            mask: 1 for tokens and 0 for padding, (B, n, S).
            dropout: after the two output matrices of a layer.

        Returns:
            (B, n, D)
        """
        hidden = self.run(weights, layers, hidden, mask, dropout)
        if pooling == "cls" and not self.distilled:
            return torch.tanh(self._linear(weights, "pooler", hidden[:, :, 0]))
        mean = (hidden * mask[..., None]).sum(2) / mask.sum(2, keepdim=True)
        if pooling == "cls":
            return torch.tanh(self._linear(weights, "pooler", mean))
        return F.normalize(mean, dim=-1) if pooling == "unit" else mean

    def run(
        self, weights: Weights, layers: Sequence[int], hidden: Tensor, mask: Tensor,
        dropout: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """The hidden states above these layers, (B, n, S, D); see `features`."""
        tasks, texts, tokens, units = hidden.shape
        bias = (1 - mask).view(tasks * texts, 1, 1, tokens) * MASKED
        x = hidden.flatten(1, 2)

        def split(y: Tensor) -> Tensor:
            return y.view(tasks * texts, tokens, self.heads, -1).transpose(1, 2)

        for index in layers:
            query, key, value = (
                split(self._linear(weights, f"{index}.{part}", x))
                for part in ("query", "key", "value")
            )
            scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + bias
            seen = (torch.softmax(scores, -1) @ value).transpose(1, 2)
            seen = seen.reshape(tasks, texts * tokens, -1)
            seen = self._linear(weights, f"{index}.attention_output", seen, dropout)
            x = _normalised(weights, f"{index}.attention_norm", x + seen)
            wide = F.gelu(self._linear(weights, f"{index}.intermediate", x))
            wide = self._linear(weights, f"{index}.output", wide, dropout)
            x = _normalised(weights, f"{index}.output_norm", x + wide)
        return x.view(tasks, texts, tokens, units)

    def _linear(self, weights: Weights, name: str, x: Tensor, dropout: float = 0.0) -> Tensor:
        """A linear layer, frozen or a task's own, with its LoRA pair; x (B, T, in)."""
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        if weight.dim() == 2:
            y = F.linear(x.bfloat16(), self.half(weight)).float()
        else:
            y = x @ weight.mT
        y = y + (bias if bias.dim() == 1 else bias.unsqueeze(1))
        if f"{name}.A" in weights:
            low = x @ weights[f"{name}.A"].mT
            y = y + low @ weights[f"{name}.B"].mT * weights["lora_scale"]
        return F.dropout(y, dropout) if dropout else y


def _normalised(weights: Weights, name: str, x: Tensor) -> Tensor:
    scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
    if scale.dim() == 1:
        return F.layer_norm(x, (x.shape[-1],), scale, shift, EPSILON)
    plain = F.layer_norm(x, (x.shape[-1],), None, None, EPSILON)
    return plain * scale.unsqueeze(1) + shift.unsqueeze(1)


def read_encoder(folder: Path) -> Encoder:
    """A BERT in a folder of Hugging Face, such as all-MiniLM-L6-v2.

    Raises:
        InputError: the folder lacks a file, or holds another kind of model.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        stored = load_file(folder / "model.safetensors", device=str(torch.get_default_device()))
        stored = {name.removeprefix("bert."): leaf.float() for name, leaf in stored.items()}
        weights = {
            f"{index}.{part}.{kind}": stored[f"encoder.layer.{index}.{theirs}.{kind}"]
            for index in range(config["num_hidden_layers"])
            for part, theirs in PARTS.items()
            for kind in ("weight", "bias")
        }
        for kind in ("weight", "bias"):
            weights[f"pooler.{kind}"] = stored[f"pooler.dense.{kind}"]
        words, positions, types, scale, shift = (
            stored[f"embeddings.{name}"]
            for name in (
                "word_embeddings.weight", "position_embeddings.weight",
                "token_type_embeddings.weight", "LayerNorm.weight", "LayerNorm.bias",
            )
        )  # fmt: skip
    except (OSError, KeyError) as error:
        raise InputError(
            f"{folder} holds no BERT with a pooler in safetensors ({error}); name the folder of "
            "all-MiniLM-L6-v2"
        ) from error
    heads = config["num_attention_heads"]
    return Encoder(
        folder.name, weights, heads, words, positions + types[0], scale, shift, distilled=False,
        vocabulary=config["vocab_size"],
    )  # fmt: skip


def save_small(path: Path, encoder: Encoder, projection: Tensor | None = None) -> None:
    """Write a distilled encoder, its word embeddings in half precision.

    Args:
        path: of the file.
        encoder: the distilled encoder.
        projection: (D of its teacher + 1, D), written in place of its word embeddings, which are
            ``[teacher's, 1] @ projection``.
    """
    own = {"words": encoder.words.half()} if projection is None else {"projection": projection}
    own |= {"positions": encoder.positions}
    own |= {"scale": encoder.scale, "shift": encoder.shift}
    everything = {**encoder.weights, **own}
    part = path.with_suffix(".part")  # so that a file with the name is complete
    tensors = {name: leaf.detach().contiguous() for name, leaf in everything.items()}
    save_file(tensors, part, {"vocabulary": str(encoder.vocabulary)})
    part.replace(path)


def read_small(path: Path, teacher: Encoder) -> Encoder:
    """A distilled encoder that `save_small` wrote."""
    weights = {
        name: leaf.float()
        for name, leaf in load_file(path, device=str(torch.get_default_device())).items()
    }
    with safe_open(path, "pt") as file:
        vocabulary = int((file.metadata() or {}).get("vocabulary", 0))
    if "projection" in weights:
        weights["words"] = F.pad(teacher.words, (0, 1), value=1.0) @ weights.pop("projection")
    words, positions = weights.pop("words"), weights.pop("positions")
    scale, shift = weights.pop("scale"), weights.pop("shift")
    heads = words.shape[1] // UNITS_PER_HEAD
    return Encoder(
        path.stem, weights, heads, words, positions, scale, shift, distilled=True,
        vocabulary=vocabulary or None,
    )  # fmt: skip
