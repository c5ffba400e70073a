"""What the settings name: data, episodes, classifiers, rules, devices."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rnnopt.cli.settings.commands import MetaTrain
from rnnopt.cli.settings.groups import (
    DataSettings,
    EncoderSettings,
    EpisodeSettings,
    RuleSettings,
    TaskSettings,
)
from rnnopt.cli.settings.parser import Settings
from rnnopt.data.corpus import Corpus
from rnnopt.data.embedded import stdlib_splits
from rnnopt.data.sources import parse_sources, weigh
from rnnopt.data.splits import Splits, read_splits
from rnnopt.errors import InputError
from rnnopt.rules.files import SHIPPED_RULE, SavedRule, load_rule, read_training
from rnnopt.tasks.episodes import EpisodeSampler
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.init_folder import read_init_training
from rnnopt.tasks.text.start import TextStart

EMBEDDED = "stdlib"


def require_at_least(least: int, settings: Settings, *names: str) -> None:
    """Refuse settings below `least`; None is none."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be at least {least}")


def read_data(settings: DataSettings, *, weighted: bool = False) -> Splits:
    """The splits that --data names, with the weights of its domains.

    Args:
        settings: of the command.
        weighted: whether domains may have weights.

    Raises:
        InputError: as `read_splits`; a weight that is none, or any where the command has no use
            for weights.
    """
    paths, weights = parse_sources(settings.data)
    if weights and not weighted:
        raise InputError(
            f"--data {next(iter(weights))}=...: {settings.command} draws from every domain alike; "
            "leave the weight out, only meta-train takes one"
        )
    if paths == [EMBEDDED]:
        return stdlib_splits(settings.seed)
    splits = read_splits(
        paths,
        seed=settings.seed,
        text_column=settings.text_column,
        label_column=settings.label_column,
        domain_column=settings.domain_column,
        allow_overlap=settings.allow_overlap,
    )
    return replace(splits, weights=weigh(splits, weights))


def episode_sampler(
    settings: EpisodeSettings | TaskSettings,
    corpus: Corpus,
    weights: Mapping[str, float] | None = None,
    ways: int | None = None,
) -> EpisodeSampler:
    """The episodes that --ways, --shots, --queries and --seed describe.

    Args:
        settings: of the command.
        corpus: what texts and classes are drawn from.
        weights: of domains, others among them.
        ways: instead of --ways.
    """
    own = set(corpus.domains)
    return EpisodeSampler(
        corpus,
        ways=settings.ways if ways is None else ways,
        shots=settings.shots,
        queries=settings.queries,
        seed=settings.seed,
        domain_weights={name: weight for name, weight in (weights or {}).items() if name in own},
        most_support=settings.most_support if isinstance(settings, TaskSettings) else None,
    )


def load_classifier(
    settings: EncoderSettings, ways: int, device: torch.device, kind: Mapping[str, Any], **more: Any
) -> Classifier:
    """The classifier that --encoder and its like describe.

    Args:
        settings: of the command.
        ways: classes of its first head.
        device: where it goes.
        kind: what trains, see `rnnopt.cli.settings.groups.TuneSettings`.
        more: arguments of `Classifier.load` beside them.
    """
    return Classifier.load(
        settings.encoder,
        ways=ways,
        max_length=settings.max_length,
        device=device,
        seed=settings.seed,
        precision=settings.precision,
        **kind,
        **more,
    )


def load_kinds(settings: MetaTrain, device: torch.device) -> list[Classifier]:
    """The classifiers that meta-training draws from: every combination of the values given.

    One for each combination, repeats included, so that a value that is given twice is drawn twice
    as often; the ranks of a kind without LoRA, and the layers of one that trains none, are all the
    same classifier.

    Raises:
        InputError: an exact kind that does not train.
    """
    for tune in settings.exact:
        if tune not in settings.tune:
            raise InputError(
                f"--exact {tune}: not among --tune {' '.join(settings.tune)}, so no task is of "
                "that kind; leave it out, or let it train"
            )
    loaded: dict[tuple[Any, ...], Classifier] = {}
    kinds = []
    for tune, rank, layers, pooling in itertools.product(
        settings.tune, settings.lora_rank, settings.top_layers or [None], settings.pooling
    ):
        kind = (tune, rank if tune == "lora" else 8, None if tune == "head" else layers, pooling)
        if kind not in loaded:
            names = ("tune", "lora_rank", "top_layers", "pooling")
            loaded[kind] = load_classifier(
                settings,
                max(settings.ways),
                device,
                dict(zip(names, kind)),
                double_backward=settings.order == 2 or tune in settings.exact,
            )
        kinds.append(loaded[kind])
    return kinds


def require_one_kind(kinds: Sequence[Classifier]) -> None:
    """Refuse to meta-learn the initial values of several kinds of classifier at once."""
    if any(kind is not kinds[0] for kind in kinds):
        raise InputError(
            "--init learns the initial values of one kind of classifier, and these are "
            f"{len(set(map(id, kinds)))}; give one --tune, --lora-rank, --top-layers and --pooling"
        )


def choose_start(settings: RuleSettings, classifier: Classifier) -> TextStart:
    """Where tasks start: as --init was meta-trained, but for what --head and --adapt-only say."""
    start = TextStart()
    if settings.init:
        start = TextStart.read(settings.init, classifier)
    return replace(
        start,
        head=settings.head or start.head,
        adapted=settings.adapt_only or start.adapted,
    )


def known_to(settings: RuleSettings) -> list[dict[str, Any]]:
    """What the files of the rule and of the initial values say of their meta-training."""
    known = [read_training(settings.rule or SHIPPED_RULE)]
    return known + ([read_init_training(settings.init)] if settings.init else [])


def choose_rule(rule: str | None, device: torch.device) -> tuple[Path, SavedRule]:
    """--rule, or the shipped one: its file, and itself.

    Args:
        rule: a file or a folder; None for the one that ships.
        device: of what trains.

    Raises:
        InputError: the file can't be used.
    """
    file = Path(rule) if rule else SHIPPED_RULE
    return file, load_rule(file).to(device)


def choose_device(name: str) -> torch.device:
    """--device: auto takes a GPU where there is one."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError("--device cuda, but torch finds no CUDA device; use --device cpu or auto")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def own_device(local_rank: int) -> torch.device:
    """The GPU of one of several processes on a machine; made torch's current one."""
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise InputError(
            f"LOCAL_RANK={local_rank}: this machine has {count} GPUs, one for each process; start "
            f"torchrun with --nproc-per-node {count}, or use --device cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
