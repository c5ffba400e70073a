"""Batches of tasks from what prepare.py or pack.py left; no command."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from curriculum import CPU, Drawn, Profile, draw
from encoder import Encoder, read_encoder, read_small
from tasks import TaskBatch
from texts import Texts, by_word, read_texts

from rnnopt.errors import InputError

TRIES = 1000  # of shapes that no source has enough texts for

# Of a random generator and the progress of the curriculum: a batch's shape, and what makes it.
Draw = Callable[[random.Random, float], tuple[Drawn, Callable[[], TaskBatch]]]


def reading(description: str | None) -> argparse.ArgumentParser:
    """A parser with the folders that the scripts read."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--encoder", type=Path, required=True, help="folder of all-MiniLM-L6-v2")
    add("--cache", type=Path, required=True, help="folder that prepare.py or pack.py filled")
    return parser


def material(options: argparse.Namespace) -> tuple[Texts, list[Encoder]]:
    """Training texts, and the encoders, the encoder itself first."""
    encoders = [read_encoder(options.encoder)]
    small = sorted(options.cache.glob("small_*.safetensors"))
    encoders += [read_small(path, encoders[0]) for path in small]
    return by_word(read_texts(options.cache / "train.safetensors")), encoders


def drawing(texts: Texts, encoders: Sequence[Encoder], profile: Profile = CPU) -> Draw:
    """Batches from these texts and encoders, the encoder itself first; see `curriculum.draw`."""

    def draw_batch(rng: random.Random, progress: float) -> tuple[Drawn, Callable[[], TaskBatch]]:
        for _ in range(TRIES):
            drawn = draw(rng, encoders, progress, profile)
            spec = drawn.spec
            try:
                episodes = [
                    texts.draw(rng, spec.ways, spec.shots, spec.queries, long=drawn.long)
                    for _ in range(drawn.size)
                ]
            except InputError:  # with few sources some shapes can't be had
                continue
            return drawn, partial(TaskBatch, texts, spec, episodes, rng.randrange(1 << 30))
        raise InputError("no task fits the texts in the cache: prepare it with more sources")

    return draw_batch
