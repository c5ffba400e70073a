"""What `train.py` trains on: random shapes of tasks, longer as meta-training proceeds; no command.

Half of the batches are of distilled encoders and hold up to eight tasks; the others are of the
encoder itself, mostly of one to three top layers above cached hidden states. The numbers are those
that fit into a second or two of one core for each batch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

from encoder import Encoder
from tasks import Spec

ENCODER_SHARE = 0.5  # of the batches, on the encoder itself
KINDS = {"lora": 0.56, "full": 0.17, "head": 0.27}
POOLINGS = {"cls": 0.3, "mean": 0.2, "unit": 0.5}
HEADS = ("random", "zero", "prototype", "logistic")
HEAD_SHARES, HEAD_SHARES_CLS = (0.3, 0.15, 0.3, 0.25), (0.7, 0.1, 0.1, 0.1)
WAYS = (2, 2, 3, 4, 5, 5, 5, 8, 10, 10, 15, 20, 40)
SHOTS = (1, 1, 2, 3, 5, 5, 8, 12, 16)
BATCHES: dict[int | None, float] = {None: 0.55, 16: 0.12, 8: 0.14, 4: 0.12, 32: 0.07}
FIRST_STEPS, LAST_STEPS = 6, 40  # the longest unroll at the start and at the end
# Narrow encoders are drawn twice as often: they hold more tasks.
NARROW_WIDTH, NARROW_DEPTH = 96, 3


Choice = TypeVar("Choice")


class Drawn(NamedTuple):
    """A batch of tasks to be made."""

    spec: Spec
    size: int
    long: bool  # drawn from long texts, which are cached in full

    @property
    def name(self) -> str:
        """The kind of batch, for the log."""
        spec = self.spec
        words = ["distilled" if spec.encoder.distilled else "encoder", spec.kind]
        words += ["long"] * self.long
        words += ["all layers"] * (not spec.encoder.distilled and spec.layers > 3)
        return " ".join(words)


def _pick(rng: random.Random, shares: Mapping[Choice, float]) -> Choice:
    return rng.choices(list(shares), list(shares.values()))[0]


def draw(rng: random.Random, encoders: Sequence[Encoder], progress: float) -> Drawn:
    """The shape of the next batch.

    Args:
        rng: the source of randomness.
        encoders: the encoder itself, then the distilled ones.
        progress: of the curriculum, 0 to 1.
    """
    itself, *distilled = encoders
    own = rng.random() < ENCODER_SHARE
    if own:
        encoder = itself
    else:
        narrow = [
            e for e in distilled if e.hidden_size <= NARROW_WIDTH and e.layers >= NARROW_DEPTH
        ]
        encoder = rng.choice([*distilled, *narrow])
    kind = _pick(rng, KINDS)
    whole = own and kind != "head" and rng.random() < 0.07
    long = rng.random() < (0.1 if own else 0.15)
    layers = _layers(rng, encoder, kind, whole)
    long = long and not whole
    pooling = _pick(rng, POOLINGS)
    shares = HEAD_SHARES_CLS if pooling == "cls" else HEAD_SHARES
    head = rng.choices(HEADS, shares)[0]
    scales = {"prototype": rng.choice([5, 10, 10, 20]), "logistic": rng.choice([1, 10, 10, 50])}
    ways, shots = _size(rng, own, kind, whole, long)
    support = ways * shots
    batch = _pick(rng, BATCHES)
    batch = None if batch and batch >= support else batch
    steps = _steps(rng, own, kind, whole, long, progress)
    noise = rng.choice([0.05, 0.1, 0.2]) if shots >= 3 and rng.random() < 0.25 else 0.0
    rank = rng.choice([1, 2, 4, 8, 8, 8, 16, 32])
    lora_scale = rng.choice([0.5, 1, 2, 2, 2, 4])
    targets = rng.choice(["qv", "qv", "qv", "qkv", "qkvo"])
    lengths = [48, 96] if long else [12, 16, 20, 24] if own else [8, 12, 16, 24]
    length = rng.choice(lengths)
    spec = Spec(
        encoder, kind, layers, pooling, head, ways, shots, min(5, max(2, 50 // ways)), length,
        steps, scales.get(head, 1), rank, lora_scale, targets, batch, noise,
        dropout=0.1 if rng.random() < 0.15 and kind != "head" else 0.0,
        clip=rng.choice([0.1, 1.0]) if rng.random() < 0.07 else 0.0,
        rescale=rng.choice([0.3, 1.0]) if rng.random() < 0.07 else 0.0,
        words=rng.random() < 0.4,
    )  # fmt: skip
    size = max(1, min(1 if kind == "full" else 8, int(600 / (support * length))))
    if own:
        size = 4 if kind == "head" else 1
    return Drawn(spec, size, long and own)


def _layers(rng: random.Random, encoder: Encoder, kind: str, whole: bool) -> int:
    """How many layers from the top; up to three of the encoder itself have cached inputs."""
    own = not encoder.distilled
    count = 1
    if kind != "head":
        if whole:
            count = encoder.layers
        elif own:
            count = rng.choices([1, 2, 3], [0.6, 0.3, 0.1])[0]
        else:
            count = rng.randint(1, encoder.layers)
    if kind == "full" and own and not whole:
        count = rng.choices([1, 2], [0.85, 0.15])[0]
    return count


def _size(rng: random.Random, own: bool, kind: str, whole: bool, long: bool) -> tuple[int, int]:
    """Ways and shots, bounded by what fits into memory and time."""
    most = (24 if kind == "full" or whole else 50) if own else 40
    if long:
        most //= 3 if own else 2
    ways = min(rng.choice(WAYS), most, 4 if long else 50)
    return ways, max(1, min(rng.choice(SHOTS), most // ways))


def _steps(
    rng: random.Random, own: bool, kind: str, whole: bool, long: bool, progress: float
) -> int:
    """The length of the unroll, uniform on a logarithmic scale."""
    top = FIRST_STEPS + (LAST_STEPS - FIRST_STEPS) * progress
    steps = round(math.exp(rng.uniform(math.log(3), math.log(max(top, 8)))))
    steps = min(steps, LAST_STEPS)
    if own:
        limits = {"head": 40, "lora": 12, "full": 6}
        if whole:
            limits |= {"lora": 5, "full": 4}
        steps = min(steps, limits[kind])
        return min(steps, 5) if long else steps
    return min(steps, 12) if kind == "full" else steps


def judgement(steps: int, rng: random.Random) -> list[float]:
    """The weights of the query losses, which add up to 1; later steps count a little more.

    A random half of the steps before the last is left out, to save its cost.
    """
    weights = [0.7 + 0.6 * (at + 1) / steps for at in range(steps)]
    if steps > 3:
        weights = [
            weight if rng.random() < 0.5 or at + 1 == steps else 0.0
            for at, weight in enumerate(weights)
        ]
    return [weight / sum(weights) for weight in weights]


def second_order(drawn: Drawn) -> bool:
    """Whether the meta-gradient is of second order: not where all weights of wide layers train."""
    encoder = drawn.spec.encoder
    return drawn.spec.kind != "full" or (encoder.distilled and encoder.hidden_size <= 128)


def segment(drawn: Drawn) -> int:
    """After how many steps the graph is cut."""
    if drawn.spec.encoder.distilled:
        return 10
    return 8 if drawn.spec.layers < 3 else 4
