"""Prepare what train.py and evaluate.py read: texts with cached hidden states, distilled encoders.

    python scripts/two_level/prepare.py --data DATA --encoder MINILM --cache CACHE

DATA is a folder that holds those of `TRAIN` and `VALIDATION`, each with train.jsonl.gz and
val.jsonl.gz of disjoint classes, a JSON object with `text` and `label` on each line. A folder that
is missing is left out, with a warning. MINILM is the folder of all-MiniLM-L6-v2. CACHE gets

    train.safetensors  6,325 texts, with the outputs of the lower half of the layers: 690 MB
    val.safetensors    5,598 texts of the validation classes, as tokens: 2 MB
    small_*            five encoders of 64 to 256 units, distilled from MINILM: 60 MB

and what it has is not made again. Test classes are never read.

Time: 6 minutes of one core, 5 of them for the distilled encoders. Memory: 4 GiB.
Last line: "small_256x2: 400 steps, loss 4.03 -> 0.81".
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from encoder import PARTS, UNITS_PER_HEAD, Encoder, read_encoder, save_small
from texts import DOMAINS, LEAST, SHORT, Sources, Texts, read_texts
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

LONGEST = 96  # tokens
CACHED_LAYERS = 3  # from the top: the outputs of the layers below each of them are kept
LONG_TEXTS = 1500  # whose hidden states are kept in full
REVIEWS = "arsc_sentiment"  # a source by product, and every product a source by sentiment
TRAIN = (
    "clinc150", "liu54", "huffpost36", "reuters31", "trec28", "hwu64", "amazon16_partial", REVIEWS,
)  # fmt: skip
VALIDATION = (
    "clinc150", "huffpost36", "stackoverflow20", "trec28", "amazon16_partial", "hwu64",
)  # fmt: skip
TEST = ("clinc150", "huffpost36", "stackoverflow20", "trec28", "amazon16_partial", "hwu64", "liu54")
# Texts kept of a class: by split, of sources with few classes, and of a product's sentiments.
MOST = {"train": 36, "val": 60}
MOST_OF_FEW, FEW_CLASSES, MOST_OF_REVIEWS = 80, "amazon", 25
SMALL = {  # name: units, layers, steps of distillation
    "small_64x4": (64, 4, 1300),
    "small_128x2": (128, 2, 1000),
    "small_192x1": (192, 1, 900),
    "small_96x3": (96, 3, 600),
    "small_256x2": (256, 2, 400),
}
POSITIONS = 512
BATCH = 64  # texts at a time


def collect(
    data: Path, names: Sequence[str], split: str, most: int | None = None
) -> tuple[Sources, list[str]]:
    """The texts of a split's sources by class, a random sample of each class.

    Args:
        data: folder of the sources.
        names: theirs.
        split: the name of the files.
        most: texts kept of a class; None takes `MOST`.

    Returns:
        The texts' numbers by source and class, and the texts.
    """
    rng, sources, texts = random.Random(0), Sources(), list[str]()

    def add(name: str, rows: list[tuple[str, str]], limit: int) -> None:
        classes: dict[str, list[str]] = {}
        for text, label in rows:
            classes.setdefault(label, []).append(text)
        kept = {}
        for label, found in classes.items():
            if len(found) >= LEAST:
                chosen = rng.sample(found, min(limit, len(found)))
                kept[label] = list(range(len(texts), len(texts) + len(chosen)))
                texts.extend(chosen)
        if len(kept) > 1:
            sources[name] = kept

    for name in names:
        path = data / name / f"{split}.jsonl.gz"
        if not path.exists():
            print(f"{path} is missing and left out", file=sys.stderr)
            continue
        rows = list(_rows(path))
        if name == REVIEWS:
            products = [(row["text"], row["domain"]) for row in rows]
            add("arsc_domains", products, most or MOST_OF_REVIEWS)
            for product in sorted({product for _, product in products}):
                own = [(r["text"], str(r["label"])) for r in rows if r["domain"] == product]
                add(DOMAINS + product, own, most or MOST_OF_REVIEWS)
        else:
            few = MOST_OF_FEW if name.startswith(FEW_CLASSES) else MOST.get(split, 0)
            add(name, [(row["text"], str(row["label"])) for row in rows], most or few)
    return sources, texts


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def tokenised(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Ids with padding, (T, LONGEST), and lengths, (T,)."""
    found = tokenizer(texts, padding="max_length", truncation=True, max_length=LONGEST)
    lengths = torch.tensor([sum(mask) for mask in found["attention_mask"]])
    return torch.tensor(found["input_ids"], dtype=torch.int32), lengths


@torch.no_grad()
def outputs(
    encoder: Encoder, tokens: Tensor, lengths: Tensor, width: int
) -> tuple[dict[int, Tensor], Tensor]:
    """Hidden states by depth, (T, width, D) in half precision, and embeddings of length 1, (T, D).

    Args:
        encoder: the encoder.
        tokens: (T, LONGEST).
        lengths: (T,).
        width: texts are cut off after so many tokens.
    """
    exact = _unrounded(encoder)
    depths = [d for d in range(encoder.layers - CACHED_LAYERS, encoder.layers) if d > 0]
    shape = (len(tokens), width, encoder.hidden_size)
    hidden = {depth: torch.zeros(shape, dtype=torch.float16) for depth in depths}
    embeddings = torch.zeros(len(tokens), encoder.hidden_size)
    lengths = lengths.clamp(max=width)
    order = lengths.argsort()
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        longest = int(lengths[rows].max())
        mask = (torch.arange(longest) < lengths[rows, None]).float()[None]
        states = encoder.embed(tokens[rows, :longest])[None]
        for layer in range(encoder.layers):
            states = encoder.run(exact, [layer], states, mask)
            if layer + 1 in hidden:
                hidden[layer + 1][rows, :longest] = states[0].half()
        embeddings[rows] = encoder.features(exact, [], "unit", states, mask)[0]
    return hidden, embeddings


def _unrounded(encoder: Encoder) -> dict[str, Tensor]:
    """Its weights as if they trained, for one task: they are not rounded to half precision."""
    return {name: leaf[None] for name, leaf in encoder.weights.items()}


def train_texts(
    encoder: Encoder, tokenizer: PreTrainedTokenizerBase, sources: Sources, texts: list[str]
) -> Texts:
    """Tokens and cached hidden states of the texts to train on."""
    tokens, lengths = tokenised(tokenizer, texts)
    hidden, embeddings = outputs(encoder, tokens, lengths, SHORT)
    long = torch.nonzero(lengths > SHORT).flatten()
    order = torch.randperm(len(long), generator=torch.Generator().manual_seed(0))
    long = long[order[:LONG_TEXTS]]
    long_hidden, whole = outputs(encoder, tokens[long], lengths[long], LONGEST)
    embeddings[long] = whole
    return Texts(sources, tokens, lengths, hidden, long, long_hidden, embeddings)


def untrained(teacher: Encoder, name: str, units: int, layers: int, seed: int) -> Encoder:
    """A small encoder with random layers, on the main components of the teacher's word embeddings.

    Args:
        teacher: whose vocabulary it has.
        name: its name.
        units: its width.
        layers: its depth.
        seed: of the random weights.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    shapes = {part: (units, units) for part in PARTS if not part.endswith("norm")}
    shapes |= {"intermediate": (4 * units, units), "output": (units, 4 * units)}
    weights = {}
    for layer in range(layers):
        for part in PARTS:
            if part in shapes:
                out, wide = shapes[part]
                weights[f"{layer}.{part}.weight"] = normal(out, wide, scale=0.7 / math.sqrt(wide))
            else:
                out = units
                weights[f"{layer}.{part}.weight"] = torch.ones(units)
            weights[f"{layer}.{part}.bias"] = torch.zeros(out)
    weights["pooler.weight"] = normal(units, units, scale=1 / math.sqrt(units))
    weights["pooler.bias"] = torch.zeros(units)
    centred = teacher.words - teacher.words.mean(0)
    main = torch.linalg.eigh(centred.T @ centred)[1].flip(1)[:, :units]
    words = centred @ main
    positions = normal(POSITIONS, units, scale=0.2)
    ones, zeros = torch.ones(units), torch.zeros(units)
    heads = units // UNITS_PER_HEAD
    return Encoder(name, weights, heads, words / words.std(), positions, ones, zeros, True)


def distil(student: Encoder, texts: Texts, steps: int, seed: int) -> tuple[float, float]:
    """Train a small encoder to imitate the teacher's embeddings and their similarities.

    Args:
        student: trained in place, but for its word embeddings and its pooler.
        texts: with the teacher's embeddings.
        steps: of Adam on 48 texts each.
        seed: of the batches.

    Returns:
        The mean loss of the first and of the last twenty steps.
    """
    generator = torch.Generator().manual_seed(seed)
    width = texts.embeddings.shape[1]
    shape = (width, student.hidden_size)
    project = torch.randn(shape, generator=generator) / math.sqrt(student.hidden_size)
    trained = [leaf for name, leaf in student.weights.items() if not name.startswith("pooler")]
    trained += [student.positions, student.scale, student.shift, project]
    optimizer = torch.optim.Adam([leaf.requires_grad_() for leaf in trained], 2e-3)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, step / 30) * (1 - 0.95 * step / steps)
        rows = torch.randint(0, len(texts.tokens), (48,), generator=generator)
        lengths = texts.lengths[rows].clamp(max=SHORT)
        longest = int(lengths.max())
        mask = (torch.arange(longest) < lengths[:, None]).float()[None]
        states = student.embed(texts.tokens[rows, :longest])[None]
        own = student.features(_unrounded(student), range(student.layers), "mean", states, mask)[0]
        target = texts.embeddings[rows]
        projected, unit = F.normalize(own @ project.T, dim=1), F.normalize(own, dim=1)
        similar = ((unit @ unit.T - target @ target.T) ** 2).mean()
        loss = 2 - 2 * (projected * target).sum(1).mean() + 20 * similar
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for leaf in trained:
        leaf.requires_grad_(False)
    first, last = losses[:20], losses[-20:]
    return sum(first) / len(first), sum(last) / len(last)


def main(words: Sequence[str] | None = None) -> None:
    """Fill the cache."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the sources")
    parser.add_argument("--encoder", type=Path, required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--cache", type=Path, required=True, help="folder to fill")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    options.cache.mkdir(parents=True, exist_ok=True)
    encoder = read_encoder(options.encoder)
    tokenizer = AutoTokenizer.from_pretrained(options.encoder)
    train, validation = (options.cache / f"{name}.safetensors" for name in ("train", "val"))
    if not train.exists():
        sources, found = collect(options.data, TRAIN, "train")
        train_texts(encoder, tokenizer, sources, found).save(train)
        print(f"train: {len(sources)} sources, {len(found)} texts", flush=True)
    if not validation.exists():
        sources, found = collect(options.data, VALIDATION, "val")
        none = torch.zeros(0, dtype=torch.long)
        tokens, lengths = tokenised(tokenizer, found)
        Texts(sources, tokens, lengths, {}, none, {}, torch.zeros(0)).save(validation)
        print(f"val: {len(sources)} sources, {len(found)} texts", flush=True)
    texts = read_texts(train)
    for name, (units, layers, steps) in SMALL.items():
        path = options.cache / f"{name}.safetensors"
        if not path.exists():
            student = untrained(encoder, name, units, layers, seed=units + layers)
            first, last = distil(student, texts, steps, seed=units + layers)
            save_small(path, student)
            print(f"{name}: {steps} steps, loss {first:.2f} -> {last:.2f}", flush=True)


if __name__ == "__main__":
    main()
