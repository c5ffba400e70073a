"""Groups of settings that several commands share."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, Literal

from rnnopt.cli.settings.parser import Settings, advanced, option

# The same choices as in the rooms below, whose modules load the libraries that --help does not need
Tune = Literal["full", "lora", "head"]
Pooling = Literal["model", "mean"]
Head = Literal["zero", "random", "prototype"]
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "fp32", "bf16"]

_TUNE = "What trains; lora: LoRA and the head."
_LAYERS = "Train only the top K layers; the layers below run once."
_POOLING = "What the head reads: the model's pooler, or the mean of its tokens."


def seed(text: str) -> int:
    """A seed that numpy and torch take."""
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"seed {number}: must lie between 0 and 2**32 - 1")
    return number


def layers(text: str) -> int | None:
    """A number of layers; None for the word all."""
    return None if text == "all" else int(text)


@dataclass(frozen=True, kw_only=True)
class SeedSettings(Settings):
    """General."""

    seed: int = advanced("Seed of everything random.", 0, parse=seed, metavar="S")


@dataclass(frozen=True, kw_only=True)
class ColumnSettings(SeedSettings):
    """Data."""

    text_column: str = advanced("Column with the texts.", "text", metavar="NAME")
    label_column: str = advanced("Column with the labels.", "label", metavar="NAME")
    allow_overlap: bool = advanced(
        "Accept classes that meta-training has seen; the result says so.", False
    )


@dataclass(frozen=True, kw_only=True)
class DataSettings(ColumnSettings):
    """Data."""

    data: list[str] = option(
        "Labelled files (CSV, TSV, JSONL, also .gz), folders with train, val and test files, or "
        "the word stdlib for the embedded corpus.",
        metavar="PATH",
    )  # fmt: skip
    domain_column: str | None = advanced(
        "Column that divides a file into domains. The classes of an episode come from one domain.",
        None, metavar="NAME", shown="the whole file is one",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EncoderSettings(SeedSettings):
    """Encoder."""

    encoder: str = option("Hugging Face text model: hub name or folder.", metavar="NAME")
    max_length: int = advanced("Tokens of a text at most.", 128, metavar="TOKENS")
    device: Device = option("Where to compute.", "auto")
    precision: Precision = advanced(
        "Of the encoder. auto takes bf16 on a GPU that has it. The rule is always fp32.", "auto"
    )


@dataclass(frozen=True, kw_only=True)
class TuneSettings(EncoderSettings):
    """Encoder."""

    tune: Tune = option(_TUNE, "lora")
    lora_rank: int = advanced("Rank of LoRA.", 8, metavar="R")
    top_layers: int | None = advanced(_LAYERS, None, metavar="K", shown="all", parse=layers)

    @property
    def kind(self) -> dict[str, Any]:
        """What trains, as arguments of `rnnopt.tasks.text.classifier.Classifier.load`."""
        # transformers' pipeline could not load a classifier with mean pooling
        pooling = getattr(self, "pooling", "model")
        names = ("tune", "lora_rank", "top_layers")
        return {**{name: getattr(self, name) for name in names}, "pooling": pooling}


@dataclass(frozen=True, kw_only=True)
class PoolingSettings(TuneSettings):
    """Encoder."""

    pooling: Pooling = advanced(_POOLING, "model")


@dataclass(frozen=True, kw_only=True)
class KindSettings(EncoderSettings):
    """Encoder."""

    tune: list[Tune] = option(_TUNE, ["lora"])
    lora_rank: list[int] = advanced("Rank of LoRA.", [8], metavar="R")
    top_layers: list[int | None] | None = advanced(
        _LAYERS, None, metavar="K", shown="all", parse=layers
    )
    pooling: list[Pooling] = advanced(_POOLING, ["model"])


@dataclass(frozen=True, kw_only=True)
class EpisodeSettings(SeedSettings):
    """Episodes."""

    ways: int = option("Classes of an episode.", 5, metavar="N")
    shots: int = option("Support texts of a class.", 5, metavar="K")
    queries: int = option("Query texts of a class.", 5, metavar="Q")
    steps: int = option("Steps of adaptation.", 10, metavar="T")


@dataclass(frozen=True, kw_only=True)
class TaskSettings(SeedSettings):
    """Tasks."""

    ways: list[int] = option("Classes of a task.", [5], metavar="N")
    shots: list[int] = option("Support texts of a class.", [5], metavar="K")
    queries: int = option("Query texts of a class.", 5, metavar="Q")
    steps: int = option("Steps of adaptation.", 10, metavar="T")
    shortest: int | None = advanced(
        "Draw the steps of each task from T to --steps.", None, metavar="T", shown="--steps"
    )
    most_support: int | None = advanced(
        "Support texts of a task at most. Of the shots, those that fit the ways are drawn.",
        None, metavar="M", shown="no bound",
    )  # fmt: skip
    batch_size: list[int] | None = advanced(
        "Texts of a minibatch of the support set.", None, metavar="B", shown="the whole support set"
    )


@dataclass(frozen=True, kw_only=True)
class RuleSettings(Settings):
    """Rule and initial values."""

    rule: str | None = option(
        "Rule file, or folder of a run.", None, metavar="PATH", shown="the rule that ships"
    )
    init: str | None = option(
        "Folder of learned initial values.", None, metavar="DIR", shown="the pretrained values"
    )
    head: Head | None = advanced(
        "How the output layer begins. prototype makes it of class means.",
        None, shown="as --init was meta-trained, else random",
    )  # fmt: skip
    adapt_only: Literal["head"] | None = advanced(
        "Step only what lies outside the encoder (ANIL).", None
    )
