"""Labelled texts in memory: for each text its label and its domain.

A *class* is a pair (domain, label), written ``domain/label``. `rnnopt.data.files` reads a corpus
from a file, and `rnnopt.tasks.episodes` draws episodes from a corpus.
"""

from __future__ import annotations

import functools
import hashlib
import json
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rnnopt.errors import InputError

ClassKey = tuple[str, str]  # (domain, label)
# soft hyphen, zero-width space, marks of direction, word joiner, byte-order mark
_INVISIBLE = dict.fromkeys([0xAD, 0x200B, 0x200E, 0x200F, 0x2060, 0xFEFF])
# Hyphens, minus and apostrophes that look like those of a keyboard, and ligatures.
_TYPED = str.maketrans(
    {"\u2010": "-", "\u2011": "-", "\u2212": "-", "\u2019": "'", "\u02bc": "'"}
    | {chr(c): unicodedata.normalize("NFKC", chr(c)) for c in range(0xFB00, 0xFB07)}
)
# Cyrillic and Greek letters beside the Latin ones that they look like.
_LATIN = str.maketrans(
    "\u0410\u0412\u0415\u041a\u041c\u041d\u041e\u0420\u0421\u0422\u0425\u0430\u0435\u043e"
    "\u0440\u0441\u0443\u0445\u0456\u0458\u0455\u0391\u0392\u0395\u0396\u0397\u0399\u039a"
    "\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7\u03bf",
    "ABEKMHOPCTXaeopcyxijsABEZHIKMNOPTYXo",
)
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


@functools.lru_cache(maxsize=1 << 14)
def _look(name: str) -> str:
    """Equal for names that look the same: also full-width characters, and letters of two scripts.

    Of a single letter the script counts, since it may be what a label tells.
    """
    narrow = "".join(
        unicodedata.normalize("NFKC", c)
        if unicodedata.decomposition(c).startswith(("<wide>", "<narrow>"))
        else c
        for c in readable(name).translate(_TYPED)
    )
    return narrow.translate(_LATIN) if len(narrow) > 1 else narrow


class Names:
    """Labels or domains of a file; those that look alike are one, as it is first written.

    Args:
        known: names whose spelling counts, if one looks like them.
    """

    def __init__(self, known: Iterable[str] = ()) -> None:
        self._known = frozenset(known)
        self._first = {_look(name): name for name in sorted(self._known)}
        self._lines: dict[str, dict[str, int]] = {}

    def of(self, spelling: str, line: int) -> str:
        """The name for a spelling that stands in this line."""
        name = readable(spelling)
        if name not in self._known:
            name = self._first.setdefault(_look(spelling), name)
        self._lines.setdefault(name, {}).setdefault(spelling, line)
        return name

    def warn(self, path: object) -> None:
        """Warn of labels that have been united, if there are some."""
        united = {name: lines for name, lines in self._lines.items() if len(lines) > 1}
        spelled = {name: next(iter(lines)) for name, lines in self._lines.items()}
        foreign = [name for name in spelled if name in self._known - {spelled[name], *united}]
        if foreign:
            name, spelling = foreign[0], spelled[foreign[0]]
            warnings.warn(
                f"{path}: {counted(len(foreign), 'label')} spelled otherwise than the one that "
                f"looks like it, such as {spelling!a} in line {self._lines[name][spelling]} for "
                f"{name!a}; it counts as that",
                stacklevel=3,
            )
        if united:
            name, lines = next(iter(united.items()))
            (one, first), (other, second) = list(lines.items())[:2]
            warnings.warn(
                f"{path}: {counted(len(united), 'label')} in several spellings that look alike, "
                f"such as {one!a} in line {first} and {other!a} in line {second}; they count as "
                f"one label, {name!r}",
                stacklevel=3,
            )


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
