"""Texts as an encoder's input: each is tokenised once, and padded again in every batch.

Shapes: B batch, S sequence (tokens), D hidden size, R rows of a text that
`rnnopt.tasks.text.encoder.prefix` keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rnnopt.errors import InputError


class Batch(dict[str, Tensor]):
    """An encoder's input by name.

    Attributes:
        kept: the `rnnopt.tasks.text.encoder.prefix.Prefix` that computed the outputs of the frozen
            layers, and these outputs, (B, R, D); None if they were not computed. This is an
            attribute and not an item, so that ``module(**batch)`` runs any module on the texts
            themselves.
    """

    kept: tuple[object, Tensor] | None = None


class TokenCache:
    """Tokenises each distinct text once, keeps the tokens, and pads them to batches.

    Args:
        tokenizer: a Hugging Face tokenizer. If it has no pad token, its end-of-text token is used.
        max_length: the longest text in tokens, with special tokens. Longer texts are truncated.
        names: the names of the inputs that the encoder accepts; None means the tokenizer's.

    Raises:
        InputError: max_length leaves no room for text, or the tokenizer has no token to pad with.
    """

    def __init__(
        self, tokenizer: Any, max_length: int = 128, names: Sequence[str] | None = None
    ) -> None:
        least = tokenizer.num_special_tokens_to_add() + 1
        if max_length < least:
            raise InputError(
                f"max_length is {max_length}: this tokenizer needs at least {least}; raise it"
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token is None:
            raise InputError("the tokenizer has no pad token and no end-of-text token; set one")
        self.tokenizer = tokenizer
        self.max_length = min(max_length, tokenizer.model_max_length)
        self._pad = {
            "input_ids": tokenizer.pad_token_id,
            "attention_mask": 0,
            "token_type_ids": tokenizer.pad_token_type_id,
        }
        wanted = tokenizer.model_input_names if names is None else names
        self._names = [name for name in self._pad if name in wanted]
        self._rows: dict[str, dict[str, list[int]]] = {}

    def batch(self, texts: Sequence[str], device: torch.device | str = "cpu") -> Batch:
        """The encoder's input for these texts, padded to the longest of them.

        Args:
            texts: B texts.
            device: the device of the tensors.

        Returns:
            ``input_ids``, ``attention_mask`` and, if the encoder accepts them, ``token_type_ids``;
            int64, (B, S).

        Raises:
            InputError: there are no texts.
        """
        if not texts:
            raise InputError("a batch of 0 texts; give at least one")
        self._read([text for text in dict.fromkeys(texts) if text not in self._rows])
        rows = [self._rows[text] for text in texts]
        length = max(len(row["input_ids"]) for row in rows)
        padded = {
            name: [self._stretch(row[name], self._pad[name], length) for row in rows]
            for name in rows[0]
        }
        return Batch({name: torch.tensor(ids, device=device) for name, ids in padded.items()})

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text."""
        self._read([text for text in dict.fromkeys(texts) if text not in self._rows])
        return [len(self._rows[text]["input_ids"]) for text in texts]

    def _stretch(self, ids: list[int], pad: int, length: int) -> list[int]:
        padding = [pad] * (length - len(ids))
        return padding + ids if self.tokenizer.padding_side == "left" else ids + padding

    def _read(self, texts: list[str]) -> None:
        if not texts:
            return
        encoded = self.tokenizer(texts, truncation=True, max_length=self.max_length)
        for i, text in enumerate(texts):
            row = {name: encoded[name][i] for name in self._names if name in encoded}
            if not row["input_ids"]:
                # GPT-2 makes no token of an empty text, and an encoder needs at least one
                row = {name: [self._pad[name]] for name in row} | {"attention_mask": [1]}
            self._rows[text] = row
