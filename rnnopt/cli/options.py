"""Command-line options as the objects that they describe."""

from __future__ import annotations

import itertools
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rnnopt.data.corpus import Corpus
from rnnopt.data.embedded import stdlib_splits
from rnnopt.data.sources import parse_sources, weigh
from rnnopt.data.splits import Splits, read_splits
from rnnopt.errors import InputError
from rnnopt.rules.files import SavedRule, load_rule, shipped_rule
from rnnopt.tasks.episodes import EpisodeSampler
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.init_folder import read_init
from rnnopt.tasks.text.start import TextStart

EMBEDDED = "stdlib"


def require_at_least(least: int, options: Namespace, *names: str) -> None:
    """Refuse options below `least`."""
    for name in names:
        if getattr(options, name) < least:
            raise InputError(
                f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least {least}"
            )


def read_data(options: Namespace, *, weighted: bool = False) -> Splits:
    """The splits that --data names, with the weights of its domains.

    Raises:
        InputError: as `read_splits`; a weight that is none, or any where the command has no use
            for weights.
    """
    paths, weights = parse_sources(options.data)
    if weights and not weighted:
        raise InputError(
            f"--data {next(iter(weights))}=...: {options.command} draws from every domain alike; "
            "leave the weight out, only meta-train takes one"
        )
    if paths == [EMBEDDED]:
        return stdlib_splits(options.seed)
    splits = read_splits(
        paths,
        seed=options.seed,
        text_column=options.text_column,
        label_column=options.label_column,
        domain_column=options.domain_column,
        allow_overlap=options.allow_overlap,
    )
    return replace(splits, weights=weigh(splits, weights))


def episode_sampler(
    options: Namespace, corpus: Corpus, weights: Mapping[str, float] | None = None
) -> EpisodeSampler:
    """The episodes that --ways, --shots, --queries, --seed and weights of domains describe."""
    own = set(corpus.domains)
    return EpisodeSampler(
        corpus,
        ways=options.ways,
        shots=options.shots,
        queries=options.queries,
        seed=options.seed,
        domain_weights={name: weight for name, weight in (weights or {}).items() if name in own},
        most_support=getattr(options, "most_support", None),
    )


def load_classifier(options: Namespace, ways: int, device: torch.device, **more: Any) -> Classifier:
    """The classifier that --encoder, --tune and the like describe.

    Args:
        options: of the command.
        ways: classes of its first head.
        device: where it goes.
        more: arguments of `Classifier.load` that stand in for options, or beside them.
    """
    chosen = {
        name: getattr(options, name) for name in ("tune", "lora_rank", "top_layers", "pooling")
    }
    return Classifier.load(
        options.encoder,
        ways=ways,
        max_length=options.max_length,
        device=device,
        seed=options.seed,
        precision=options.precision,
        **{**chosen, **more},
    )


def load_kinds(options: Namespace, device: torch.device) -> list[Classifier]:
    """The classifiers that meta-training draws from: every combination of the values given.

    One for each combination, repeats included, so that a value that is given twice is drawn twice
    as often; the ranks of a kind without LoRA, and the layers of one that trains none, are all the
    same classifier.

    Raises:
        InputError: an exact kind that does not train.
    """
    for tune in options.exact:
        if tune not in options.tune:
            raise InputError(
                f"--exact {tune}: not among --tune {' '.join(options.tune)}, so no task is of "
                "that kind; leave it out, or let it train"
            )
    loaded: dict[tuple[Any, ...], Classifier] = {}
    kinds = []
    for tune, rank, layers, pooling in itertools.product(
        options.tune, options.lora_rank, options.top_layers or [None], options.pooling
    ):
        kind = (tune, rank if tune == "lora" else 8, None if tune == "head" else layers, pooling)
        if kind not in loaded:
            names = ("tune", "lora_rank", "top_layers", "pooling")
            loaded[kind] = load_classifier(
                options,
                max(options.ways),
                device,
                double_backward=options.order == 2 or tune in options.exact,
                **dict(zip(names, kind)),
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


def choose_start(options: Namespace, classifier: Classifier) -> TextStart:
    """Where tasks start: as --init was meta-trained, but for what --head and --adapt-only say."""
    start = TextStart()
    if options.init:
        start = read_init(options.init, classifier)
    return replace(
        start,
        head=options.head or start.head,
        adapted=options.adapt_only or start.adapted,
    )


def choose_rule(options: Namespace, params: Iterable[Tensor]) -> tuple[Path, SavedRule]:
    """--rule, or the shipped one for what trains: its file, and itself on the parameters' device.

    Raises:
        InputError: the file can't be used.
    """
    tensors = list(params)
    file = Path(options.rule) if options.rule else shipped_rule(tensors)
    return file, load_rule(file).to(tensors[0].device)


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
