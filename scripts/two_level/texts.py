"""Texts by source and class, with tokens and cached hidden states of the encoder; no command.

`prepare.py` writes them and `tasks.py` draws tasks from them.
Shapes: T texts, S tokens, D hidden units.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rnnopt.errors import InputError

Sources = dict[str, dict[str, list[int]]]  # source -> class -> texts
Labelled = list[tuple[int, int]]  # texts and their labels in a task

SHORT = 24  # tokens of every text whose hidden states are cached
LEAST = 10  # texts of a class
# How often a source is drawn, as against the others, 1 if it isn't named. The root of the number of
# classes gave nearly half of the tasks to intents, which frozen features all but solve: the rule
# learned that a head may grow at once. Domains, whose name begins so, are parts of one source.
SHARES = {"huffpost36": 2.5, "trec28": 2.5, "reuters31": 1.5, "liu54": 0.7, "hwu64": 0.7,
          "amazon16_partial": 0.7, "arsc_domains": 0.7}  # fmt: skip
DOMAINS, RARE = "arsc/", 0.05
# Sources whose classes are words, see `by_word`: their number, how often each is drawn, texts of a
# class, and the tokens of a text in which its word lies.
BY_WORD, BY_WORD_SOURCES, BY_WORD_SHARE = "words/", 4, 0.9
OF_WORD, WITHIN = (16, 400), 12


@dataclass
class Texts:
    """The texts of one split.

    Args:
        sources: the texts of each class of each source.
        tokens: ids with padding, (T, longest text), int32.
        lengths: tokens of each text, (T,).
        hidden: by depth, the outputs of the lowest layers for the first `SHORT` tokens,
            (T, SHORT, D), float16. Empty: they are computed for each task.
        long: texts with more than `SHORT` tokens to draw long tasks from, (L,); what is cached of
            them is cached in full.
        long_hidden: theirs by depth, (L, longest text, D), float16.
        embeddings: mean-pooled, of length 1, (T, D), of the tokens that are cached. Distillation
            needs them.
    """

    sources: Sources
    tokens: Tensor
    lengths: Tensor
    hidden: Mapping[int, Tensor]
    long: Tensor
    long_hidden: Mapping[int, Tensor]
    embeddings: Tensor

    def __post_init__(self) -> None:
        self._place = {int(text): at for at, text in enumerate(self.long.tolist())}
        self._long_sources: Sources = {}
        for source, classes in self.sources.items():
            kept = {name: [t for t in texts if t in self._place] for name, texts in classes.items()}
            kept = {name: texts for name, texts in kept.items() if len(texts) >= LEAST}
            if len(kept) > 1:
                self._long_sources[source] = kept

    def draw(
        self, rng: random.Random, ways: int, shots: int, queries: int, source: str | None = None,
        long: bool = False,
    ) -> tuple[Labelled, Labelled]:  # fmt: skip
        """Support and query texts of one task, ``ways * shots`` and ``ways * queries``.

        Args:
            rng: the source of randomness.
            ways: classes.
            shots: support texts of each class.
            queries: query texts of each class.
            source: where to draw from; None draws the source by `SHARES`.
            long: draw texts with more than `SHORT` tokens only.

        Raises:
            InputError: no source has so many classes with so many texts.
        """
        sources = self._long_sources if long else self.sources
        enough = {
            name: {c: texts for c, texts in classes.items() if len(texts) >= shots + queries}
            for name, classes in sources.items()
        }
        where = [source] if source else list(sources)
        if not any(len(enough.get(name, ())) >= ways for name in where):
            raise InputError(
                f"{source or 'no source'}: fewer than {ways} classes with {shots + queries} texts"
            )
        weights = [_share(name) for name in sources]
        while True:
            drawn = source or rng.choices(list(sources), weights)[0]
            if len(enough[drawn]) >= ways:
                break
        support, query = [], []
        for label, name in enumerate(rng.sample(sorted(enough[drawn]), ways)):
            texts = rng.sample(enough[drawn][name], shots + queries)
            support += [(text, label) for text in texts[:shots]]
            query += [(text, label) for text in texts[shots:]]
        rng.shuffle(support)
        return support, query

    def batch(self, episodes: list[Labelled], length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Texts (B, n), their token ids and mask (B, n, S), and labels (B, n).

        Args:
            episodes: of B tasks, as many texts each.
            length: texts are cut off after so many tokens.
        """
        texts = torch.tensor([[text for text, _ in episode] for episode in episodes])
        labels = torch.tensor([[label for _, label in episode] for episode in episodes])
        lengths = self.lengths[texts].clamp(max=length)
        width = int(lengths.max())
        mask = (torch.arange(width) < lengths[..., None]).float()
        return texts, self.tokens[texts][..., :width], mask, labels

    def cached(self, texts: Tensor, depth: int, length: int, width: int) -> Tensor:
        """Hidden states at a depth, (B, n, width, D); `length` as in `batch`."""
        if length > SHORT:
            places = torch.tensor([[self._place[int(text)] for text in row] for row in texts])
            return self.long_hidden[depth][places][..., :width, :].float()
        return self.hidden[depth][texts][..., :width, :].float()

    def save(self, path: Path) -> None:
        """Write everything to one safetensors file."""
        tensors = {"tokens": self.tokens, "lengths": self.lengths, "long": self.long}
        tensors["embeddings"] = self.embeddings
        tensors |= {f"hidden.{depth}": leaf for depth, leaf in self.hidden.items()}
        tensors |= {f"long_hidden.{depth}": leaf for depth, leaf in self.long_hidden.items()}
        part = path.with_suffix(".part")  # so that a file with the name is complete
        save_file(tensors, part, {"sources": json.dumps(self.sources)})
        part.replace(path)


def _share(source: str) -> float:
    """How often a source is drawn, as against others."""
    for prefix, share in ((DOMAINS, RARE), (BY_WORD, BY_WORD_SHARE)):
        if source.startswith(prefix):
            return share
    return SHARES.get(source, 1.0)


def by_word(texts: Texts) -> Texts:
    """With sources whose classes are the texts that hold a word.

    A sentence encoder tells topics apart, and few sources need anything else: question types, of
    which the training classes are nine. By which words a text holds, tasks of many classes can be
    drawn that need other features, as in Bansal et al. 2020 (SMLMT), arXiv:2009.08445, where the
    word is masked.
    """
    holds: dict[int, list[int]] = {}
    rows, lengths = texts.tokens[:, 1:WITHIN].tolist(), texts.lengths.clamp(max=WITHIN).tolist()
    for text, (row, length) in enumerate(zip(rows, lengths)):
        for token in set(row[: length - 2]):
            holds.setdefault(token, []).append(text)
    least, most = OF_WORD
    words = [word for word, found in sorted(holds.items()) if least <= len(found) <= most]
    sources = dict(texts.sources)
    for number in range(BY_WORD_SOURCES):
        classes, taken = {}, set[int]()
        for word in random.Random(number).sample(words, len(words)):
            left = [text for text in holds[word] if text not in taken]
            taken.update(left)
            if len(left) >= LEAST:
                classes[str(word)] = left
        if len(classes) > 1:
            sources[f"{BY_WORD}{number}"] = classes
    return replace(texts, sources=sources)


def read_texts(path: Path) -> Texts:
    """The texts that `Texts.save` wrote; hidden states stay on the disk until they are used.

    Raises:
        InputError: there is no such file.
    """
    if not path.exists():
        raise InputError(f"{path} is missing; make it with scripts/two_level/prepare.py")
    with safe_open(path, "pt", str(torch.get_default_device())) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        sources = json.loads(file.metadata()["sources"])

    def by_depth(prefix: str) -> dict[int, Tensor]:
        start = prefix + "."
        return {
            int(name.removeprefix(start)): leaf
            for name, leaf in tensors.items()
            if name.startswith(start)
        }

    return Texts(
        sources, tensors["tokens"], tensors["lengths"], by_depth("hidden"), tensors["long"],
        by_depth("long_hidden"), tensors["embeddings"],
    )  # fmt: skip
