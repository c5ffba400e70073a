"""Domains of a stream: texts of some labels, as embeddings, that come one batch after another."""

from __future__ import annotations

import functools
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from field import Options, digest, kept
from language import find, rows
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import rnnopt
from rnnopt.cli.progress import progress_bar
from rnnopt.tasks.text.encoder.sentence import SentenceEncoder

BATCH = 10  # texts a step
HELD_OUT = 30  # texts of a domain that judge, in equal parts of its labels
TOPICS = 5  # labels of a domain of topics
PER_LABEL, LABELS = 30, 12  # texts of a label and labels of a set, at most
WIDTH = 96  # principal components of the embeddings that are kept
PARTS = ("train", "validation", "test")
Text = tuple[str, str, str]  # set and domain, label, text


@dataclass
class Domain:
    """Texts of some labels, as embeddings: those that come, and those that judge."""

    keys: set[tuple[str, str]]  # its labels, each with its set
    x: Tensor
    y: Tensor
    held: Tensor
    held_labels: Tensor

    def batch(self, drawn: random.Random) -> tuple[Tensor, Tensor]:
        """A batch of the stream, as many texts of each label."""
        found: list[int] = []
        for label in self.y.unique():
            of_label = (self.y == label).nonzero().flatten().tolist()
            found += drawn.choices(of_label, k=BATCH // len(self.y.unique()))
        return self.x[found], self.y[found]

    @functools.cached_property
    def reference(self) -> float:
        """The held-out accuracy of logistic regression on all texts that come."""
        model = LogisticRegression(C=10, max_iter=1000).fit(self.x.numpy(), self.y.numpy())
        return float(model.score(self.held.numpy(), self.held_labels.numpy()))


def read(options: Options) -> dict[str, list[Text]]:
    """(set and domain, label, text) of each part; a set without a file for a part is left out."""
    found: dict[str, list[Text]] = {part: [] for part in PARTS}
    reviews, topics = options.more["reviews"], options.more["topics"]
    for name in (reviews, *topics):
        for stem, part in (("train", "train"), ("val", "validation"), ("test", "test")):
            try:
                file = find(options.data / name, stem)
            except rnnopt.InputError:
                continue
            for where, row in rows(file):
                text, label = (str(row.get(column) or "").strip() for column in ("text", "label"))
                if not (text and label):
                    raise rnnopt.InputError(
                        f"{where}: text {text!r} and label {label!r}: neither may be empty; fill "
                        "it in or delete the row"
                    )
                domain = f"{name}/{row.get('domain', '')}" if name == reviews else name
                found[part].append((domain, label, text))
    if not found["validation"]:  # of reviews, some kinds of product are to choose by
        raise rnnopt.InputError(
            f"--topics {' '.join(topics)}: none has a file val in {options.data}, and rates are "
            "chosen on it; give one"
        )
    kinds = sorted({domain for domain, *_ in found["train"] if "/" in domain})
    chosen = set(kinds[::4])
    found["validation"] += [row for row in found["train"] if row[0] in chosen]
    found["train"] = [row for row in found["train"] if row[0] not in chosen]
    return {part: few(texts) for part, texts in found.items()}


def few(texts: list[Text]) -> list[Text]:
    """At most PER_LABEL texts of at most LABELS labels of each domain."""
    of: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for domain, label, text in texts:
        of[domain][label].append(text)
    return [
        (domain, label, text)
        for domain, labels in of.items()
        for label in sorted(labels)[:LABELS]
        for text in labels[label][:PER_LABEL]
    ]


class Streams:
    """Streams of the domains of one part."""

    def __init__(self, texts: Sequence[Text], x: Tensor) -> None:
        of: dict[tuple[str, str], list[int]] = defaultdict(list)
        for row, (domain, label, _) in enumerate(texts):
            of[domain, label].append(row)
        names = {key: (key[0].split("/")[0], key[1]) for key in of}
        self.outputs = {name: i for i, name in enumerate(sorted(set(names.values())))}
        found = {key: rows for key, rows in of.items() if len(rows) >= HELD_OUT // 2}
        several = Counter(domain for domain, _ in found)
        self.x, self.rows = x, {key: rows for key, rows in found.items() if several[key[0]] > 1}
        self.labels = {key: self.outputs[names[key]] for key in self.rows}
        self.sets: dict[str, list[str]] = defaultdict(list)
        for domain, _ in self.rows:
            if domain not in self.sets[domain.split("/")[0]]:
                self.sets[domain.split("/")[0]].append(domain)

    def domain(self, drawn: random.Random, before: Domain | None = None) -> Domain:
        """A kind of product, or five topics; other ones than before."""
        keys: list[tuple[str, str]] = []
        while not keys or (before is not None and set(keys) == before.keys):
            name = drawn.choice(self.sets[drawn.choice(sorted(self.sets))])
            keys = sorted(key for key in self.rows if key[0] == name)
            keys = drawn.sample(keys, min(TOPICS, len(keys)))
        parts: list[list[int]] = [[], []]
        labels: list[list[int]] = [[], []]
        for key in keys:
            held = HELD_OUT // (2 if "/" in name else TOPICS)
            held = min(held, len(self.rows[key]) // 2)
            for side, found in enumerate((self.rows[key][held:], self.rows[key][:held])):
                parts[side] += found
                labels[side] += [self.labels[key]] * len(found)
        (x, held_x), (y, held_y) = (
            [self.x[rows] for rows in parts],
            [torch.tensor(found) for found in labels],
        )
        return Domain(set(keys), x, y, held_x, held_y)

    def stream(self, changes: int, seed: str) -> list[Domain]:
        """A stream with so many changes."""
        drawn = random.Random(seed)
        found: list[Domain] = []
        for _ in range(changes + 1):
            found.append(self.domain(drawn, found[-1] if found else None))
        return found


def embedded(texts: Mapping[str, list[Text]], options: Options) -> Tensor:
    """The principal components of the embeddings of all parts, of variance 1 on average."""
    everything = [text for part in PARTS for *_, text in texts[part]]

    def make() -> dict[str, Tensor]:
        encoder = SentenceEncoder.load(options.more["encoder"], torch.device("cpu"), max_length=48)
        found = []
        with progress_bar("embed texts", len(everything)) as bar:
            for at in range(0, len(everything), 64):
                found.append(encoder.embed(everything[at : at + 64]))
                bar.at(at)
        return {"x": torch.cat(found)}

    facts = {"texts": digest({"texts": everything}), "encoder": options.more["encoder"]}
    x = kept(options.output, "stream-embeddings", facts, make)["x"].float()
    mine = x[: len(texts["train"])]
    components = torch.linalg.svd(mine - mine.mean(dim=0), full_matrices=False)[2][:WIDTH]
    x = (x - mine.mean(dim=0)) @ components.T
    return x / x[: len(mine)].std()
