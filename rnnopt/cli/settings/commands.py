"""The settings of each command."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rnnopt.cli.settings.classifier import Doctor, Evaluate, Export, Fit, Predict
from rnnopt.cli.settings.groups import (
    ColumnSettings,
    DataSettings,
    EpisodeSettings,
    Head,
    KindSettings,
    PoolingSettings,
    RuleSettings,
    SeedSettings,
    TaskSettings,
    Tune,
    TuneSettings,
)
from rnnopt.cli.settings.parser import Settings, advanced, option


@dataclass(frozen=True, kw_only=True)
class MetaLossSettings(Settings):
    """Meta-loss."""

    exact: list[Tune] = advanced(
        "Kinds of --tune whose meta-gradient is exact whatever --order says.", []
    )
    truncation: int | None = advanced(
        "Cut the graph after T steps (truncated backpropagation).", None, metavar="T", shown="never"
    )
    query_weight: float = advanced("Weight of the query loss.", 1.0, metavar="W")
    support_weight: float = advanced("Weight of the support loss.", 0.0, metavar="W")
    step_weights: list[float] | None = advanced(
        "Weight of each step, one for each.", None, metavar="W", shown="1"
    )
    query_share: float = advanced(
        "Share of the steps whose query loss is taken, drawn at random. A smaller share is faster, "
        "and unbiased.",
        1.0, aliases=("--judged",), metavar="P",
    )  # fmt: skip
    calibrated_share: float = advanced(
        "Share of the query loss that is taken at the temperature that suits the logits best. It "
        "rewards right classes rather than confidence.",
        0.0, aliases=("--calibrated",), metavar="P",
    )  # fmt: skip
    confidence_from: int = advanced(
        "Before step T all of the query loss is taken at that temperature, so that confidence "
        "counts from step T on only.",
        1, aliases=("--sure-from",), metavar="T",
    )  # fmt: skip
    loss_scale: float = advanced(
        "Multiply each task's support loss by a factor drawn from 1/X to X. The rule learns to "
        "bear losses of other scales.",
        1.0, metavar="X",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MetaOptimizerSettings(Settings):
    """Meta-training."""

    order: Literal[1, 2] = option("Meta-gradient: 1 first order, 2 exact through higher.", 1)
    meta_steps: int = option(
        "Steps of the meta-optimizer; with --until at most.",
        500, aliases=("--max-meta-steps",), metavar="M",
    )  # fmt: skip
    tasks: int = option("Tasks of a meta-step, shared by torchrun's processes.", 1, metavar="K")
    meta_lr: float = option(
        "Learning rate of the meta-optimizer; it falls along a cosine.", 5e-3, metavar="LR"
    )
    clip: float = advanced(
        "Bound on the norm of each task's meta-gradient, per step.", 1.0, metavar="X"
    )
    until: str | None = option(
        "End at the first validation that meets this, such as 'accuracy@5>=0.85 and loss<1'; @5: "
        "after step 5, else after the last.",
        None, metavar="REQUIREMENT",
    )  # fmt: skip
    validate_every: int = advanced("Meta-steps between validations.", 50, metavar="M")
    validation_tasks: int = advanced("Tasks of a validation.", 8, metavar="E")
    checkpoint_every: int = advanced("Meta-steps between checkpoints.", 10, metavar="M")


@dataclass(frozen=True, kw_only=True)
class LearnSettings(Settings):
    """What is learned."""

    origin: str | None = option(
        "Begin with a rule: its file, a run's folder, or the word shipped.",
        None, flag="--from", metavar="RULE",
    )  # fmt: skip
    inner: Literal["lstm", "sgd", "meta-sgd", "adam"] = advanced(
        "Rule of the inner loop: lstm, meta-sgd, or, with --init, sgd or adam.",
        "lstm", metavar="RULE",
    )  # fmt: skip
    inner_lr: float | None = advanced(
        "Step size that sgd, meta-sgd or adam begins with.",
        None, metavar="LR", shown="adam 1e-3, others 0.1",
    )  # fmt: skip
    hidden_size: int | None = advanced(
        "Hidden units of the coordinate-wise LSTM, 0 for none.",
        None, metavar="H", shown="that of --from, else 4",
    )  # fmt: skip
    init: Literal["pretrained", "maml", "reptile"] = option(
        "Initial values: pretrained, maml or reptile.", "pretrained", metavar="INIT"
    )
    init_lr: float = advanced("Learning rate of the meta-optimizer on them.", 1e-4, metavar="LR")
    init_penalty: float = advanced(
        "Add L/2 times their squared distance from the pretrained values.", 0.0, metavar="L"
    )
    head: Head | None = advanced(
        "How the output layer begins. prototype makes it of class means.", None, shown="random"
    )
    adapt_only: Literal["head"] | None = advanced(
        "Step only what lies outside the encoder (ANIL).", None
    )


@dataclass(frozen=True, kw_only=True)
class MetaTrain(
    DataSettings,
    KindSettings,
    TaskSettings,
    MetaLossSettings,
    MetaOptimizerSettings,
    LearnSettings,
):
    """Learn an update rule, initial values, or both. Train classes are meta-trained on, validation
    classes choose the best. A source PATH=2 is drawn twice as often. Of several values of --tune,
    --ways and the like each task draws one, and one that is given twice is drawn twice as often.
    The exit code is 3 where --until was not met."""

    command: ClassVar = "meta-train"
    summary: ClassVar = "learn an update rule over many tasks"
    takes_config: ClassVar = True

    output: str = option("Folder of the run: rule, report, checkpoint.", metavar="DIR")
    resume: bool = option("Continue the run in the folder.", False)


@dataclass(frozen=True, kw_only=True)
class LabelledSettings(ColumnSettings):
    """Data."""

    data: str = option("Labelled file: CSV, TSV, JSONL, also .gz.", metavar="FILE")
    test: str | None = option(
        "Labelled file to judge by.", None, metavar="FILE", shown="a fifth of --data is held out"
    )
    held_out: float = advanced(
        "Share of each label's texts to judge by, with --until or without --test.",
        0.2, metavar="SHARE",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AdaptationSettings(Settings):
    """Adaptation."""

    steps: int | None = option(
        "Steps of adaptation; with --until at most.",
        None, aliases=("--max-steps",), metavar="T",
        shown="20, or 200 with --until; more for more texts: twice through --data, at most 1000",
    )  # fmt: skip
    batch_size: int = option("Texts of a step.", 64, metavar="B")
    lr: float = option("Multiplies the learned step; 1 is as meta-trained.", 1.0, metavar="X")
    until: str | None = option(
        "Adapt until this is met on texts held out, such as 'accuracy>=0.9 and f1>0.8'; of "
        "accuracy, precision, recall, f1 (macro) and loss. --test is read at the very end.",
        None, metavar="REQUIREMENT",
    )  # fmt: skip
    validate_every: int = advanced("Steps between judgements, with --until.", 1, metavar="T")


@dataclass(frozen=True, kw_only=True)
class Adapt(LabelledSettings, TuneSettings, RuleSettings, AdaptationSettings):
    """Fine-tune a classifier on a labelled file and save a folder that
    transformers.pipeline("text-classification", DIR, truncation=True) loads. The exit code is 3
    where --until was not met."""

    command: ClassVar = "adapt"
    summary: ClassVar = "fine-tune a classifier on your labelled file"
    takes_config: ClassVar = True

    output: str = option("Folder for the classifier.", metavar="DIR")


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings(Settings):
    """Comparison."""

    baselines: str = option(
        "Tuned: adamw, sgd, muon. As documented: adamw-default, muon-default, prodigy, "
        "schedulefree, dadapt. Without steps: nearest-mean, logistic.",
        "adamw,sgd", metavar="NAMES",
    )  # fmt: skip
    episodes: int = option("Test episodes.", 100, metavar="E")
    tuning_episodes: int = advanced("Validation episodes for each learning rate.", 10, metavar="E")
    tuned_steps: int | None = advanced(
        "Steps of the baselines that are tuned.", None, metavar="T", shown="--steps"
    )
    report_on: Literal["test", "val", "all"] = advanced(
        "Whose classes are judged by. val and all need --tuning-data.", "test"
    )
    tuning_data: list[str] | None = advanced(
        "Tune by the validation classes of these.", None, metavar="PATH", shown="--data"
    )
    fewer_ways: bool = advanced(
        "Where there are fewer classes than --ways, take as many as there are.", False
    )


@dataclass(frozen=True, kw_only=True)
class Compare(DataSettings, PoolingSettings, EpisodeSettings, RuleSettings, ComparisonSettings):
    """Compare a rule with tuned baselines on the same episodes and initial weights. Validation
    classes choose each baseline's learning rate for every number of steps; test classes make the
    figures. A comparison that was stopped goes on where it was."""

    command: ClassVar = "compare"
    summary: ClassVar = "a rule against tuned baselines on unseen classes"
    takes_config: ClassVar = True

    json: str = option("File for the figures.", metavar="FILE")
    plot: str | None = option("PNG file for the curves.", None, metavar="FILE")


@dataclass(frozen=True, kw_only=True)
class InspectionSettings(Settings):
    """Inspection."""

    rule: str | None = option(
        "Rule file or folder.", None, metavar="RULE", shown="the rule that ships", positional=True
    )
    kind_of_tensor: str | None = option(
        "Whose update is drawn: embedding, attention matrix, other matrix, layer norm, bias, "
        "LoRA A, LoRA B or head.",
        None, flag="--kind", metavar="KIND", shown="what has most parameters",
    )  # fmt: skip
    at_step: int | None = option("Step that is drawn.", None, metavar="T", shown="the middle one")


@dataclass(frozen=True, kw_only=True)
class Inspect(DataSettings, PoolingSettings, EpisodeSettings, InspectionSettings):
    """Adapt to one task of test classes with a rule. Tell the size of its steps and their distance
    from Adam's direction, by kind of tensor and step, and its update as a function of the gradient
    and m / sqrt(v)."""

    command: ClassVar = "inspect"
    summary: ClassVar = "what a rule has learned: its update by gradient, memory, tensor and step"

    data: list[str] = option(
        "Labelled files, folders with train, val and test files, or stdlib.",
        ["stdlib"], metavar="PATH",
    )  # fmt: skip
    encoder: str | None = option(  # type: ignore[assignment]
        "Hugging Face text model: hub name or folder.",
        None, metavar="NAME", shown="a small BERT with random weights",
    )  # fmt: skip
    output: str | None = option(
        "File: .png for a picture, .json for figures.", None, metavar="FILE"
    )


@dataclass(frozen=True, kw_only=True)
class Report(Settings):
    """Write a run's report and pictures again, from the files that it left."""

    command: ClassVar = "report"
    summary: ClassVar = "write a run's report and pictures again, from the files it left"

    run_path: str = option(
        "Folder of meta-train or adapt, or the JSON file of compare.",
        metavar="RUN", positional=True,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Demo(SeedSettings):
    """Meta-train, adapt and compare on an embedded corpus, with nothing to download."""

    command: ClassVar = "demo"
    summary: ClassVar = "meta-train, adapt and compare on an embedded corpus; no download"

    output: str = option("Folder for report and picture.", "demo", metavar="DIR")


COMMANDS: tuple[type[Settings], ...] = (
    Fit, Predict, Evaluate, Export, Doctor, MetaTrain, Adapt, Compare, Inspect,
    Report, Demo,
)  # fmt: skip
