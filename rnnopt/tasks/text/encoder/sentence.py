"""Encoders as sentence-transformers uses them: one vector a text, pooled as in their training.

Shapes: B texts, S tokens, H hidden size.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from rnnopt.errors import InputError
from rnnopt.storage.files import parse_json, write_atomically
from rnnopt.tasks.text.encoder.loading import (
    MeanPooled,
    find_folder,
    position_limit,
    read_encoder,
    seeded,
    silence,
)
from rnnopt.tasks.text.encoder.tokens import TokenCache

SentencePooling = Literal["mean", "cls", "max", "last"]

# sentence-transformers' names, in 1_Pooling/config.json
_MODES: dict[SentencePooling, tuple[str, str]] = {
    "mean": ("pooling_mode_mean_tokens", "mean"),
    "cls": ("pooling_mode_cls_token", "cls"),
    "max": ("pooling_mode_max_tokens", "max"),
    "last": ("pooling_mode_lasttoken", "lasttoken"),
}
_POOLING_FILE = Path("1_Pooling") / "config.json"
_MODULES = "sentence_transformers.models."
_LONGEST = 256  # tokens of a text, where the encoder's files do not say
_BATCH = {"cpu": 32, "cuda": 256}  # on a CPU, texts of like length matter more than large batches


@dataclass(frozen=True)
class Layout:
    """How the hidden states of a text become one vector.

    Attributes:
        pooling: ``"mean"`` of all tokens, the first token (``"cls"``), the largest value of each
            unit (``"max"``), or the last token.
        normalized: whether vectors are scaled to length 1.
        max_length: longest text in tokens; the rest is cut off.
        source: where this is from, for a report.
    """

    pooling: SentencePooling
    normalized: bool
    max_length: int
    source: str

    @classmethod
    def read(cls, folder: Path) -> Layout:
        """What the sentence-transformers files of a folder say.

        Without those files it is the mean of all tokens, which is what sentence-transformers does
        with such an encoder, too.

        Raises:
            InputError: the files ask for something that is not supported.
        """
        modules = [m for m in _json(folder / "modules.json", []) if isinstance(m, dict)]
        kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
        longest = _longest(folder)
        if not modules:
            return cls("mean", False, longest, "the encoder's files name none")
        if unknown := sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"}):
            raise InputError(
                f"{folder}: its modules.json has a module {unknown[0]}, and only Transformer, "
                "Pooling and Normalize are supported; give pooling='mean', or another encoder"
            )
        normalized = "Normalize" in kinds
        config = _json(folder / _POOLING_FILE, {})
        if not config:
            return cls("mean", normalized, longest, f"{_POOLING_FILE} is not there")
        # from sentence-transformers 6 on a single entry, before that a switch for each kind
        named = config.get("pooling_mode") or [
            key for key in config if key.startswith("pooling_mode_") and config[key]
        ]
        chosen = [mode for mode, keys in _MODES.items() if named in (*keys, [keys[0]])]
        if not chosen:
            raise InputError(
                f"{folder / _POOLING_FILE} asks for the pooling {named}, and one of mean, cls, max "
                "and last is supported; give pooling='mean', or another encoder"
            )
        return cls(chosen[0], normalized, longest, f"the encoder's {_POOLING_FILE}")

    def write(self, folder: Path, width: int) -> None:
        """Write it as sentence-transformers reads it.

        Args:
            folder: of the encoder.
            width: H.
        """
        kinds = ["Transformer", "Pooling", *(["Normalize"] if self.normalized else [])]
        modules = [
            {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": _MODULES + kind}
            for i, kind in enumerate(kinds)
        ]
        modes = {keys[0]: mode == self.pooling for mode, keys in _MODES.items()}
        for path, content in (
            (Path("modules.json"), modules),
            (_POOLING_FILE, {"word_embedding_dimension": width, **modes}),
            (
                Path("sentence_bert_config.json"),
                {"max_seq_length": self.max_length, "do_lower_case": False},
            ),
        ):
            write_atomically(folder / path, (json.dumps(content, indent=2) + "\n").encode())
        if self.normalized:
            (folder / "2_Normalize").mkdir()


class SentenceEncoder(nn.Module):
    """An encoder that makes one vector of a text.

    Args:
        encoder: a model as `transformers.AutoModel` loads it.
        tokenizer: its own.
        layout: how vectors are made.

    Attributes:
        layout: the same, with a length that the encoder takes.
    """

    def __init__(self, encoder: Any, tokenizer: Any, layout: Layout) -> None:
        super().__init__()
        self.encoder, self.tokenizer = encoder, tokenizer
        longest = min(layout.max_length, position_limit(encoder), tokenizer.model_max_length)
        self.layout = Layout(layout.pooling, layout.normalized, longest, layout.source)
        self._names = list(inspect.signature(encoder.forward).parameters)

    @classmethod
    def load(
        cls,
        encoder: str | os.PathLike[str],
        device: torch.device,
        pooling: str = "auto",
        max_length: int | None = None,
    ) -> SentenceEncoder:
        """Load an encoder in float32, frozen. Reads safetensors only, runs no code.

        Args:
            encoder: a folder, or a name on the Hugging Face hub (the local cache comes first).
            device: where it goes.
            pooling: ``"auto"`` for what the encoder was trained with, or one of `Layout`'s.
            max_length: longest text in tokens; None for what the encoder was trained with.

        Raises:
            InputError: it can't be found or used.
        """
        allowed = ("auto", *get_args(SentencePooling))
        if pooling not in allowed:
            raise InputError(f"pooling is {pooling!r}; use one of {', '.join(allowed)}")
        if max_length is not None and max_length < 1:
            raise InputError(f"max_length is {max_length}; it must be at least 1, and 128 is usual")
        folder = find_folder(os.fspath(encoder))
        if pooling == "auto":
            layout = Layout.read(folder)
        else:
            kinds = str(_json(folder / "modules.json", []))
            layout = Layout(pooling, "Normalize" in kinds, _longest(folder), "as asked")  # type: ignore[arg-type]
        if max_length is not None:
            layout = Layout(layout.pooling, layout.normalized, max_length, layout.source)
        with seeded(0):
            model, tokenizer, _ = read_encoder(folder, "mean", 2, None)
        made = cls(cast(MeanPooled, model).encoder, tokenizer, layout)
        made.requires_grad_(False)
        return made.to(device).eval()

    @property
    def device(self) -> torch.device:
        """Where it is."""
        device: torch.device = next(self.encoder.parameters()).device
        return device

    @property
    def width(self) -> int:
        """H."""
        return int(self.encoder.config.hidden_size)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Vectors (B, H) of what `tokens` made, differentiable."""
        states = self.encoder(**batch).last_hidden_state.float()  # (B, S, H)
        mask = batch["attention_mask"]  # (B, S)
        rows = torch.arange(mask.shape[0], device=mask.device)
        if self.layout.pooling == "mean":
            weights = mask.unsqueeze(-1).to(states.dtype)
            pooled = (states * weights).sum(dim=1) / weights.sum(dim=1)
        elif self.layout.pooling == "max":
            pooled = states.masked_fill(mask.unsqueeze(-1) == 0, -torch.inf).amax(dim=1)
        elif self.layout.pooling == "cls":
            pooled = states[rows, mask.argmax(dim=1)]
        else:
            pooled = states[rows, mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)]
        return normalize(pooled, dim=1) if self.layout.normalized else pooled

    def tokens(self) -> TokenCache:
        """A fresh cache of tokenised texts, which makes batches for `forward`."""
        return TokenCache(self.tokenizer, self.layout.max_length, self._names)

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Vectors (B, H) of texts, on the CPU, without gradients.

        Texts are sorted by length, so that little is padded, and then by content, so that a text's
        vector does not depend on the order of the others, to the bit.
        """
        cache = self.tokens()
        lengths = cache.lengths(texts)
        order = sorted(range(len(texts)), key=lambda i: (lengths[i], texts[i]))
        size = _BATCH.get(self.device.type, 32)
        made = torch.empty(len(texts), self.width)
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            batch = cache.batch([texts[i] for i in rows], self.device)
            made[rows] = self(batch).cpu()
        return made

    def save(self, folder: Path) -> None:
        """Write a folder that sentence-transformers loads, and `load`."""
        with silence():
            self.encoder.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        self.layout.write(folder, self.width)


def _longest(folder: Path) -> int:
    """Tokens of a text at most, by the encoder's sentence-transformers files."""
    found = _json(folder / "sentence_bert_config.json", {}).get("max_seq_length")
    return found if isinstance(found, int) and found > 0 else _LONGEST


def _json(path: Path, absent: Any) -> Any:
    """What a JSON file holds; `absent` if it can't be read or is of another kind."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return absent
    return found if isinstance(found, type(absent)) else absent
