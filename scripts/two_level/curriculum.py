"""What `train.py` trains on: random shapes of tasks, longer as meta-training proceeds; no command.

Half of the batches are of distilled encoders, the others of the encoder itself. On a CPU these are
mostly of its one to three top layers, and a batch takes a second or two of one core. On a GPU more
layers train, unrolls are longer and batches larger; see `Profile`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

from encoder import Encoder
from tasks import Spec
from texts import SHORT

ENCODER_SHARE = 0.5  # of the batches, on the encoder itself
POOLINGS = {"cls": 0.5, "mean": 0.15, "unit": 0.35}
HEADS = ("random", "zero", "prototype", "logistic")
HEAD_SHARES, HEAD_SHARES_CLS = (0.3, 0.15, 0.3, 0.25), (0.85, 0.05, 0.05, 0.05)
WAYS = (2, 2, 3, 4, 5, 5, 5, 8, 10, 10, 15, 20, 40)
SHOTS = (1, 1, 2, 3, 5, 5, 5, 8, 12, 16)
BATCHES: dict[int | None, float] = {None: 0.55, 16: 0.1, 8: 0.15, 4: 0.15, 32: 0.05}
# Of the logarithm of a factor on the pooled outputs, for a quarter of the batches: encoders differ
# in the length of what they give, from 1 to about 20.
SCALED = 0.25
SCALES = {"cls": (-2.0, 3.0), "mean": (-2.0, 3.0), "unit": (-1.5, 3.5)}
PAIRS = 0.25  # of the batches in which an encoder trains: on the loss of pairs
LAST_SHARE = 0.4  # of the query losses' weights
FIRST_STEPS = 6  # the longest unroll at the start
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
        words += ["pairs"] * spec.pairs
        words += ["long"] * self.long
        words += ["all layers"] * (not spec.encoder.distilled and spec.layers > 3)
        return " ".join(words)


def _pick(rng: random.Random, shares: Mapping[Choice, float]) -> Choice:
    return rng.choices(list(shares), list(shares.values()))[0]


class Profile(NamedTuple):
    """What a machine can bear.

    Args:
        kinds: shares of what trains.
        whole: the share of the encoder's own batches in which all of its layers train.
        depths: shares of one to three top layers of the encoder itself.
        last_steps: the longest unroll at the end of the curriculum.
        limits: the longest unroll on the encoder itself, by what trains.
        whole_limits: the same where all layers train.
        long_limit: the same on long texts.
        most_texts: of a support set on the encoder itself.
        most_texts_full: the same where all weights or all layers train.
        tasks: the most of a batch.
        gigabytes: of a batch's graph, an estimate. The number of tasks follows from it.
        largest: coordinates of a tensor through whose coordinate-wise LSTM the graph goes.
    """

    kinds: Mapping[str, float]
    whole: float
    depths: tuple[float, float, float]
    last_steps: int
    limits: Mapping[str, int]
    whole_limits: Mapping[str, int]
    long_limit: int
    most_texts: int
    most_texts_full: int
    tasks: int
    gigabytes: float
    largest: int


CPU = Profile(
    {"lora": 0.55, "full": 0.27, "head": 0.18}, 0.06, (0.6, 0.3, 0.1), 60,
    {"head": 60, "lora": 40, "full": 30}, {"lora": 12, "full": 12}, 8, 50, 24, 8, 1.5, 20_000,
)  # fmt: skip
GPU = Profile(
    {"lora": 0.48, "full": 0.32, "head": 0.2}, 0.35, (0.4, 0.3, 0.3), 60,
    {"head": 60, "lora": 60, "full": 40}, {"lora": 40, "full": 40}, 10, 100, 60, 10, 4.0, 150_000,
)  # fmt: skip


def draw(
    rng: random.Random, encoders: Sequence[Encoder], progress: float, profile: Profile = CPU
) -> Drawn:
    """The shape of the next batch.

    Args:
        rng: the source of randomness.
        encoders: the encoder itself, then the distilled ones.
        progress: of the curriculum, 0 to 1.
        profile: what the machine can bear.
    """
    itself, *distilled = encoders
    own = not distilled or rng.random() < ENCODER_SHARE
    if own:
        encoder = itself
    else:
        narrow = [
            e for e in distilled if e.hidden_size <= NARROW_WIDTH and e.layers >= NARROW_DEPTH
        ]
        encoder = rng.choice([*distilled, *narrow])
    kind = _pick(rng, profile.kinds)
    whole = own and kind != "head" and rng.random() < profile.whole
    long = rng.random() < (0.1 if own else 0.15) and not whole
    pairs = kind != "head" and rng.random() < PAIRS
    layers = _layers(rng, encoder, kind, whole, profile)
    pooling = _pick(rng, POOLINGS)
    shares = HEAD_SHARES_CLS if pooling == "cls" else HEAD_SHARES
    head = rng.choices(HEADS, shares)[0]
    scales = {"prototype": rng.choice([5, 10, 10, 20]), "logistic": rng.choice([1, 10, 10, 50])}
    ways, shots = _size(rng, own, kind, whole, long, profile)
    support = ways * shots
    batch = _pick(rng, BATCHES)
    batch = None if batch and batch >= support else batch
    steps = _steps(rng, own, kind, whole, long, progress, profile)
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
        rescale=rng.choice([0.3, 1.0]) if rng.random() < 0.1 else 0.0,
        words=rng.random() < 0.4,
        feature_scale=math.exp(rng.uniform(*SCALES[pooling])) if rng.random() < SCALED else 1.0,
    )  # fmt: skip
    if pairs:  # as `rnnopt.TextClassifier` has them; two texts of a class make a pair
        spec = replace(
            spec, pairs=True, pooling=rng.choice(["mean", "unit"]), head="prototype",
            head_scale=10, shots=max(2, shots), batch=None, words=False, feature_scale=1.0,
        )  # fmt: skip
    drawn = Drawn(spec, 1, long and own)
    size = int(profile.gigabytes / gigabytes(drawn))
    return drawn._replace(size=max(1, min(profile.tasks, size)))


def gigabytes(drawn: Drawn) -> float:
    """A rough estimate of the memory of one task's graph."""
    spec = drawn.spec
    texts = min(spec.batch or spec.ways * spec.shots, spec.ways * spec.shots)
    judged = spec.queries + spec.shots * spec.pairs
    texts += spec.ways * judged / 6  # half of the steps are judged, without second order
    width, depth = spec.encoder.hidden_size, spec.layers
    hidden = texts * min(spec.length, 18 if spec.length <= SHORT else 90) * depth * width
    trained = width * spec.ways
    if spec.kind == "full":
        trained += 12 * width * width * depth
    elif spec.kind == "lora":
        trained += 2 * width * spec.rank * len(spec.targets) * depth
    else:
        hidden = texts * width
    steps = min(spec.steps, segment(drawn))
    return steps * (220 * hidden + 500 * trained) / 1e9


def cost(drawn: Drawn) -> float:
    """A rough estimate of a batch's time, in any unit."""
    spec = drawn.spec
    tensors = {"head": 0.3, "lora": 1.0, "full": 1.5}[spec.kind]
    return spec.steps * (0.5 + tensors * spec.layers**0.5) + 3 * gigabytes(drawn) * drawn.size


def _layers(rng: random.Random, encoder: Encoder, kind: str, whole: bool, profile: Profile) -> int:
    """How many layers from the top; up to three of the encoder itself have cached inputs."""
    own = not encoder.distilled
    count = 1
    if kind != "head":
        if whole:
            count = encoder.layers
        elif own:
            count = rng.choices([1, 2, 3], profile.depths)[0]
        else:
            count = rng.randint(1, encoder.layers)
    if kind == "full" and own and not whole:
        count = rng.choices([1, 2], [0.85, 0.15])[0]
    return min(count, encoder.layers)


def _size(
    rng: random.Random, own: bool, kind: str, whole: bool, long: bool, profile: Profile
) -> tuple[int, int]:
    """Ways and shots, bounded by what fits into memory and time."""
    most = 40
    if own:
        most = profile.most_texts_full if kind == "full" or whole else profile.most_texts
    if long:
        most //= 3 if own else 2
    ways = min(rng.choice(WAYS), most, 4 if long else 50)
    return ways, max(1, min(rng.choice(SHOTS), most // ways))


def _steps(
    rng: random.Random, own: bool, kind: str, whole: bool, long: bool, progress: float,
    profile: Profile,
) -> int:  # fmt: skip
    """The length of the unroll, uniform on a logarithmic scale."""
    top = FIRST_STEPS + (profile.last_steps - FIRST_STEPS) * progress
    steps = round(math.exp(rng.uniform(math.log(3), math.log(max(top, 8)))))
    steps = min(steps, profile.last_steps)
    if not own:
        return steps
    limits = {**profile.limits, **(profile.whole_limits if whole else {})}
    steps = min(steps, limits[kind])
    return min(steps, profile.long_limit) if long else steps


def judgement(steps: int, rng: random.Random) -> list[float]:
    """The weights of the query losses, which add up to 1: the last step has `LAST_SHARE` of them.

    The others rise in proportion to the step: with equal ones the rule learns heads that are soon
    confident, and an encoder below such a head has no reason left to learn. A random half of the
    steps before the last is left out, to save its cost.
    """
    kept = [steps <= 3 or rng.random() < 0.5 for _ in range(steps - 1)]
    earlier = [(at + 1) * kept[at] for at in range(steps - 1)]
    total = sum(earlier)
    if not total:
        return [0.0] * (steps - 1) + [1.0]
    return [(1 - LAST_SHARE) * weight / total for weight in earlier] + [LAST_SHARE]


def second_order(drawn: Drawn) -> bool:
    """Whether the meta-gradient is of second order: not where all weights of wide layers train."""
    encoder = drawn.spec.encoder
    return drawn.spec.kind != "full" or (encoder.distilled and encoder.hidden_size <= 128)


def segment(drawn: Drawn) -> int:
    """After how many steps the graph is cut."""
    if drawn.spec.encoder.distilled:
        return 20
    return 20 if drawn.spec.layers < 3 else 8
