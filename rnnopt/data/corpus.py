"""Labelled texts in memory: for each text its label and its domain.

A *class* is a pair (domain, label), written ``domain/label``. `rnnopt.data.files` reads a corpus
from a file, and `rnnopt.tasks.episodes` draws episodes from a corpus.
"""

from __future__ import annotations

import functools
import hashlib
import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rnnopt.errors import InputError

ClassKey = tuple[str, str]  # (domain, label)
# soft hyphen, zero-width space, marks of direction, word joiner, byte-order mark
_INVISIBLE = dict.fromkeys([0xAD, 0x200B, 0x200E, 0x200F, 0x2060, 0xFEFF])
HASH_BYTES = 6  # 48 bits: among a million texts, two have the same hash with probability 1/500


@dataclass(frozen=True)
class Corpus:
    """Texts with their labels and domains.

    Args:
        texts: the texts.
        labels: the label of each text.
        domains: the domain of each text.
        dropped: how many duplicates were left out when the texts were read.

    Raises:
        InputError: texts, labels and domains differ in number.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    domains: tuple[str, ...]
    dropped: int = 0

    def __post_init__(self) -> None:
        lengths = len(self.texts), len(self.labels), len(self.domains)
        if len(set(lengths)) > 1:
            raise InputError(
                f"{lengths[0]} texts, {lengths[1]} labels and {lengths[2]} domains: "
                "give each text one label and one domain"
            )

    def __len__(self) -> int:
        return len(self.texts)

    @functools.cached_property
    def classes(self) -> dict[ClassKey, np.ndarray]:
        """Class -> sorted indices of its texts (int64, read-only), in the order of first texts."""
        found: dict[ClassKey, list[int]] = {}
        for index, key in enumerate(zip(self.domains, self.labels)):
            found.setdefault(key, []).append(index)
        arrays = {key: np.array(indices, dtype=np.int64) for key, indices in found.items()}
        for array in arrays.values():
            array.setflags(write=False)
        return arrays

    @functools.cached_property
    def class_hashes(self) -> dict[str, set[str]]:
        """Class name -> hashes of its texts, 12 hex digits each, of their `text_key`."""
        hashes: dict[str, set[str]] = {class_name(key): set() for key in self.classes}
        for text, label, domain in zip(self.texts, self.labels, self.domains):
            digest = hashlib.blake2b(
                text_key(text).encode("utf-8", "surrogatepass"), digest_size=HASH_BYTES
            )
            hashes[class_name((domain, label))].add(digest.hexdigest())
        return hashes

    def take(self, indices: Iterable[int]) -> Corpus:
        """The texts at these indices, in this order; `dropped` is 0."""
        rows = [(self.texts[i], self.labels[i], self.domains[i]) for i in indices]
        texts, labels, domains = zip(*rows) if rows else ((), (), ())
        return Corpus(texts, labels, domains)

    def select(self, class_keys: Iterable[ClassKey]) -> Corpus:
        """The texts of these classes, in the order they have here; `dropped` is 0.

        Raises:
            InputError: a class is not in the corpus.
        """
        chosen = list(dict.fromkeys(class_keys))
        for key in chosen:
            if key not in self.classes:
                raise InputError(
                    f"no class {class_name(key)!r} in this corpus of {len(self.classes)} classes: "
                    f"choose from {listed(map(class_name, self.classes))}"
                )
        return self.take(sorted(int(i) for key in chosen for i in self.classes[key]))

    def fingerprint(self) -> str:
        """16 hex digits of the SHA-256 of all texts, labels and domains, in their order."""
        contents = json.dumps([self.texts, self.labels, self.domains])
        return hashlib.sha256(contents.encode()).hexdigest()[:16]


def merge(corpora: Sequence[Corpus]) -> Corpus:
    """One corpus of the texts of several, in their order; its `dropped` is their sum."""
    return Corpus(
        tuple(text for corpus in corpora for text in corpus.texts),
        tuple(label for corpus in corpora for label in corpus.labels),
        tuple(domain for corpus in corpora for domain in corpus.domains),
        sum(corpus.dropped for corpus in corpora),
    )


def class_name(key: ClassKey) -> str:
    r"""The name ``domain/label`` of a class.

    A slash in the domain becomes ``\/``, so that the first plain slash ends the domain and no two
    classes have one name.
    """
    domain, label = key
    escaped = domain.replace("\\", "\\\\").replace("/", "\\/")
    return f"{escaped}/{label}"


def text_key(text: str) -> str:
    """The form in which two texts are compared.

    White space, case, invisible characters and the Unicode composition of accents do not count.
    """
    return readable(text).casefold()


def readable(text: str) -> str:
    """The text with composed accents (NFC), single spaces and no invisible characters.

    Two names that look the same on a screen for one of these reasons become equal. Characters that
    change the look of others, such as the joiners in emoji, stay.
    """
    visible = unicodedata.normalize("NFC", text).translate(_INVISIBLE)
    return " ".join(visible.split())


def summary(corpus: Corpus) -> str:
    """One line to print: numbers of texts and classes, of domains if several, of duplicates."""
    domains = len(set(corpus.domains))
    return (
        f"{counted(len(corpus), 'text')}, {counted(len(corpus.classes), 'class')}"
        + (f", {domains} domains" if domains > 1 else "")
        + dropped_words(corpus.dropped)
    )


def dropped_words(dropped: int) -> str:
    """What a summary says of duplicates at its end; nothing where there are none."""
    return f", {counted(dropped, 'duplicate')} dropped" if dropped else ""


def counted(number: int, noun: str) -> str:
    """``1 text``, ``2 texts``, ``2 classes``."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first names of a list, for a message, and the number of those that are left out."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
