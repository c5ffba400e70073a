"""The settings of the commands of a `rnnopt.TextClassifier`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rnnopt.cli.settings.groups import Device, SeedSettings
from rnnopt.cli.settings.parser import Settings, advanced, option

SEPARATOR = ";"  # of several labels, where no other is named


@dataclass(frozen=True, kw_only=True)
class FileSettings(Settings):
    """Data."""

    data: str = option("Labelled file: CSV, TSV, JSONL, also .gz.", metavar="FILE")
    text_column: str = advanced("Column with the texts.", "text", metavar="NAME")
    label_column: str = advanced("Column with the labels.", "label", metavar="NAME")
    label_separator: str | None = option(
        "What stands between the labels of a text that may have several, such as ';'. Then an "
        "empty label is none.",
        None, metavar="CHARACTERS", shown="a text has one label",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SentenceSettings(Settings):
    """Encoder."""

    encoder: str = option("Hugging Face text model: hub name or folder.", metavar="NAME")
    pooling: Literal["auto", "mean", "cls", "max", "last"] = advanced(
        "How tokens become one vector. auto is what the encoder was trained with.", "auto"
    )
    max_length: int | None = advanced(
        "Tokens of a text at most.", None, metavar="TOKENS", shown="the encoder's own"
    )
    device: Device = option("Where to compute.", "auto")


@dataclass(frozen=True, kw_only=True)
class FitSettings(Settings):
    """Fitting."""

    rule: str | None = option(
        "Rule file of adaptation.", None, metavar="PATH", shown="the rule that ships"
    )
    steps: int = option("Steps of adaptation at most; 0 for none.", 10, metavar="T")
    lora_rank: int | None = advanced(
        "Adapt by LoRA of this rank.", None, metavar="R", shown="none: the weights themselves"
    )
    seconds: float | None = option(
        "What adaptation may take, cross-validation included.", 30.0, metavar="S"
    )
    class_weight: Literal["balanced"] | None = option(
        "balanced: every label counts alike, whatever its texts.", None
    )
    abstain: float | None = option(
        "Learn when to give no label, such that this share of texts of the known labels gets none, "
        "such as 0.05.",
        None, metavar="SHARE",
    )  # fmt: skip
    abstain_below: float | None = option(
        "Give no label where the best one's probability is lower.", None, metavar="P"
    )


@dataclass(frozen=True, kw_only=True)
class Fit(FileSettings, SentenceSettings, FitSettings, SeedSettings):
    """Fit a classifier to a few labelled texts and save it. It starts from frozen embeddings, and
    keeps adaptation only where texts held out speak for it."""

    command: ClassVar = "fit"
    summary: ClassVar = "the best classifier from a few labelled texts"
    home: ClassVar = "rnnopt.cli.classifier"
    takes_config: ClassVar = True

    output: str = option("Folder for the classifier.", metavar="DIR")
    onnx: str | None = option(
        "Folder for files that onnxruntime runs, of 32 and of 8 bits.", None, metavar="DIR"
    )


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """Classifier."""

    model: str = option("Folder that rnnopt fit or TextClassifier.save wrote.", metavar="DIR")
    device: Device = option("Where to compute.", "auto")


@dataclass(frozen=True, kw_only=True)
class Predict(ModelSettings):
    """Classify texts. Every text gives a CSV row: the text, its label, and the label's probability.
    Rows are written as they come."""

    command: ClassVar = "predict"
    summary: ClassVar = "labels and probabilities from a saved classifier"
    home: ClassVar = "rnnopt.cli.classifier"

    data: str | None = option(
        "File with a column of texts: CSV, TSV, JSONL, also .gz. - is standard input, a text a "
        "line.",
        None, metavar="FILE",
    )  # fmt: skip
    text: list[str] | None = option("The texts themselves.", None, metavar="TEXT")
    output: str | None = option(
        "CSV file that appears when all is done.", None, metavar="FILE", shown="standard output"
    )
    all: bool = option("A column for the probability of every label.", False)
    abstain_below: float | None = option(
        "Leave the label empty where its probability is lower.",
        None, metavar="P", shown="as it was fitted",
    )  # fmt: skip
    text_column: str = option("Column with the texts.", "text", metavar="NAME")
    label_separator: str = option(
        "What to put between the labels of a text that may have several.",
        SEPARATOR, metavar="CHARACTERS",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Evaluate(FileSettings, ModelSettings):
    """Judge a classifier by labelled texts that it has not seen: accuracy with its 95 % interval,
    macro F1, log loss, expected calibration error."""

    command: ClassVar = "evaluate"
    summary: ClassVar = "accuracy and calibration of a saved classifier"
    home: ClassVar = "rnnopt.cli.classifier"

    json: bool = option("Print the figures as JSON.", False)


@dataclass(frozen=True, kw_only=True)
class Export(ModelSettings):
    """Write a classifier for another library: onnx for onnxruntime, with a file of 32 and one of 8
    bits; transformers for its text-classification pipelines, where the encoder reads the first
    token. The logits are compared with the classifier's, and may differ by 1e-4."""

    command: ClassVar = "export"
    summary: ClassVar = "a saved classifier for onnxruntime or transformers"
    home: ClassVar = "rnnopt.cli.classifier"

    output: str = option("Folder to write.", metavar="DIR")
    format: Literal["onnx", "transformers"] = option("For which library.", "onnx")
    data: str | None = option(
        "Labelled file to compare by; then the accuracy of both files is told.",
        None, metavar="FILE", shown="a few short texts",
    )  # fmt: skip
    text_column: str = advanced("Column with the texts.", "text", metavar="NAME")
    label_column: str = advanced("Column with the labels.", "label", metavar="NAME")
    label_separator: str | None = advanced(
        "What stands between the labels of a text that may have several.",
        None, metavar="CHARACTERS", shown=SEPARATOR,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Doctor(FileSettings, SentenceSettings, FitSettings, SeedSettings):
    """Check the machine, the encoder, the data and the settings of rnnopt fit, and tell what it
    would do and how long it would take. Nothing is fitted or written. The exit code is 2 where
    something has to be mended first."""

    command: ClassVar = "doctor"
    summary: ClassVar = "check machine, encoder, data and settings before rnnopt fit"
    home: ClassVar = "rnnopt.cli.classifier"
    takes_config: ClassVar = True

    output: str | None = option("Folder that is meant for the classifier.", None, metavar="DIR")
