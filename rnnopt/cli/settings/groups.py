"""Groups of settings that several commands share."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, Literal

from rnnopt.cli.settings.parser import Settings, option

# The same choices as in the rooms below, whose modules load the libraries that --help does not need
Tune = Literal["full", "lora", "head"]
Pooling = Literal["model", "mean"]
Head = Literal["zero", "random", "prototype"]
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "fp32", "bf16"]

_TUNE = "What trains; lora: LoRA and the head."
_LAYERS = "Train only the top K layers; the layers below run once."
_POOLING = "What the head reads: the model's pooler, or the mean of its tokens."
_DRAWN = " Several: each task draws one."


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

    seed: int = option("Seed of everything random.", 0, parse=seed, metavar="S", advanced=True)


@dataclass(frozen=True, kw_only=True)
class ColumnSettings(SeedSettings):
    """Data."""

    text_column: str = option("Column with the texts.", "text", metavar="NAME", advanced=True)
    label_column: str = option("Column with the labels.", "label", metavar="NAME", advanced=True)
    allow_overlap: bool = option(
        "Accept classes that meta-training has seen; the result says so.", False, advanced=True
    )


@dataclass(frozen=True, kw_only=True)
class DataSettings(ColumnSettings):
    """Data."""

    data: list[str] = option(
        "Labelled files (CSV, TSV, JSONL, also .gz), folders with train, val and test files, or "
        "the word stdlib for the embedded corpus.",
        metavar="PATH",
    )
    domain_column: str | None = option(
        "Column that divides a file into domains. The classes of an episode come from one domain.",
        None,
        metavar="NAME",
        shown="the whole file is one",
        advanced=True,
    )


@dataclass(frozen=True, kw_only=True)
class EncoderSettings(SeedSettings):
    """Encoder."""

    encoder: str = option("Hugging Face text model: hub name or folder.", metavar="NAME")
    max_length: int = option("Tokens of a text at most.", 128, metavar="TOKENS", advanced=True)
    device: Device = option("Where to compute.", "auto")
    precision: Precision = option(
        "Of the encoder. auto takes bf16 on a GPU that has it. The rule is always fp32.",
        "auto",
        advanced=True,
    )


@dataclass(frozen=True, kw_only=True)
class TuneSettings(EncoderSettings):
    """Encoder."""

    tune: Tune = option(_TUNE, "lora")
    lora_rank: int = option("Rank of LoRA.", 8, metavar="R", advanced=True)
    top_layers: int | None = option(
        _LAYERS, None, metavar="K", shown="all", parse=layers, advanced=True
    )

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

    pooling: Pooling = option(_POOLING, "model", advanced=True)


@dataclass(frozen=True, kw_only=True)
class KindSettings(EncoderSettings):
    """Encoder."""

    tune: list[Tune] = option(_TUNE + _DRAWN, ["lora"])
    lora_rank: list[int] = option("Rank of LoRA." + _DRAWN, [8], metavar="R", advanced=True)
    top_layers: list[int | None] | None = option(
        _LAYERS + _DRAWN, None, metavar="K", shown="all", parse=layers, advanced=True
    )
    pooling: list[Pooling] = option(_POOLING + _DRAWN, ["model"], advanced=True)


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

    ways: list[int] = option("Classes of a task." + _DRAWN, [5], metavar="N")
    shots: list[int] = option("Support texts of a class." + _DRAWN, [5], metavar="K")
    queries: int = option("Query texts of a class.", 5, metavar="Q")
    steps: int = option("Steps of adaptation.", 10, metavar="T")
    shortest: int | None = option(
        "Draw the steps of each task from T to --steps.",
        None, metavar="T", shown="--steps", advanced=True,
    )  # fmt: skip
    most_support: int | None = option(
        "Support texts of a task at most. Of the shots, those that fit the ways are drawn.",
        None, metavar="M", shown="no bound", advanced=True,
    )  # fmt: skip
    batch_size: list[int] | None = option(
        "Texts of a minibatch of the support set." + _DRAWN,
        None, metavar="B", shown="the whole support set", advanced=True,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RuleSettings(Settings):
    """Rule and initial values."""

    rule: str | None = option(
        "Rule file, or folder of a run.", None, metavar="PATH", shown="the rule that ships"
    )
    init: str | None = option(
        "Folder of learned initial values.", None, metavar="DIR", shown="the pretrained values"
    )
    head: Head | None = option(
        "How the output layer begins. prototype makes it of class means.",
        None, shown="as --init was meta-trained, else random", advanced=True,
    )  # fmt: skip
    adapt_only: Literal["head"] | None = option(
        "Step only what lies outside the encoder (ANIL).", None, advanced=True
    )
