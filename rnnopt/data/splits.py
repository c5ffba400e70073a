"""Train, validation and test classes, and the checks that keep evaluation classes unseen."""

from __future__ import annotations

import functools
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from rnnopt.data.corpus import Corpus, listed, merge
from rnnopt.data.files import read_corpus, stem_and_suffix
from rnnopt.errors import InputError

# Two classes count as the same if they share at least this part of the smaller one's texts, and at
# least two texts. In real data, two different intents of one data set share at most 1 % or a single
# phrase such as "ok, thanks"; the same intent in two data sets shares 10 % or more.
SAME_CLASS_SHARE = 0.1
SAME_CLASS_TEXTS = 2
SKETCH_SIZE = 8

PARTS = {"train": 0, "val": 1, "valid": 1, "validation": 1, "test": 2}
PART_NAMES = ("train", "validation", "test")
PART_SHARE = 0.2  # of a single file's classes go to validation, and as many to test


@dataclass(frozen=True)
class Splits:
    """Three corpora that have no class in common.

    Attributes:
        train: for meta-training.
        validation: for the choice of the best rule and of learning rates.
        test: for the figures that are reported.
        sources: the splits of each file or folder, by its path.
        weights: domain -> how often meta-training draws it, relative to the others; empty if the
            user gave no weights.
    """

    train: Corpus
    validation: Corpus
    test: Corpus
    sources: Mapping[str, Splits] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)


def read_splits(
    paths: Sequence[str | os.PathLike[str]],
    *,
    seed: int = 0,
    text_column: str = "text",
    label_column: str = "label",
    domain_column: str | None = None,
    allow_overlap: bool = False,
) -> Splits:
    """Read files and folders into train, validation and test classes.

    A folder with files called train, val (valid, validation) or test supplies those parts; other
    files in it are ignored. A folder with a single data file stands for that file. The classes of a
    single file are divided by `divide_classes`. Without a domain column, the domain of a source is
    the name of the folder or of the file.

    Args:
        paths: the sources, files or folders.
        seed: of the division of single files.
        text_column: as in `read_corpus`.
        label_column: as in `read_corpus`.
        domain_column: as in `read_corpus`.
        allow_overlap: accept parts that have classes in common.

    Raises:
        InputError: a file is unusable (see `read_corpus`); a folder holds no data file, or several
            of unclear purpose; two sources have the same domain; a single file has too few classes
            to divide; two parts have a class in common.
    """
    parts: tuple[list[Corpus], list[Corpus], list[Corpus]] = ([], [], [])
    owner: dict[str, Path] = {}
    sources: dict[str, Splits] = {}
    for path in map(Path, paths):
        files, domain = source_files(path)
        read = functools.partial(
            read_corpus, text_column=text_column, label_column=label_column,
            domain_column=domain_column, domain=domain,
        )  # fmt: skip
        corpora = {part: read(file) for part, file in files.items() if part != "all"}
        if "all" in files:
            divided = divide_classes(read(files["all"]), seed, what=str(path))
            corpora = {part: getattr(divided, part) for part in PART_NAMES}
        for name in dict.fromkeys(name for corpus in corpora.values() for name in corpus.domains):
            if name in owner:
                raise InputError(
                    f"domain {name!r} comes from {owner[name]} and from {path}: a domain needs one "
                    "source; rename one, or give the folder that holds its train, val and test"
                )
            owner[name] = path
        for part, corpus in corpora.items():
            parts[PART_NAMES.index(part)].append(corpus)
        train, validation, test = (corpora.get(part, merge([])) for part in PART_NAMES)
        sources[str(path)] = Splits(train, validation, test)
    train, validation, test = map(merge, parts)
    splits = Splits(train, validation, test, sources)
    check_disjoint(splits.train, splits.validation, "train and validation", allow_overlap)
    check_disjoint(splits.train, splits.test, "train and test", allow_overlap)
    check_disjoint(splits.validation, splits.test, "validation and test", allow_overlap)
    return splits


def source_files(path: Path) -> tuple[dict[str, Path], str]:
    """Find the data files of a source, and name its domain.

    Args:
        path: a file or a folder.

    Returns:
        ``{"train", "validation" or "test": file}``, or ``{"all": file}`` if there is one file; and
        the domain.

    Raises:
        InputError: the folder can't be listed, holds no data file, or several of unclear purpose.
    """
    if not os.path.isdir(path):
        stem = stem_and_suffix(path)[0]
        # "train" names no domain. The folder's name does, and shows that two parts given as two
        # files belong to one data set.
        return {"all": path}, path.resolve().parent.name if stem.lower() in PARTS else stem
    domain = path.resolve().name
    try:
        entries = sorted(path.iterdir())
    except OSError as error:
        raise InputError(f"{path}: can't be listed ({error.strerror}); check its rights") from error
    data = [file for file in entries if stem_and_suffix(file)[1] and file.name[0] != "."]
    files: dict[str, Path] = {}
    for file in data:
        stem = stem_and_suffix(file)[0].lower()
        if stem in PARTS:
            part = PART_NAMES[PARTS[stem]]
            if part in files:
                raise InputError(
                    f"{path}: {files[part].name} and {file.name} are both its {part} part, one "
                    "is needed; move one away"
                )
            files[part] = file
    if files:
        return files, domain
    if len(data) != 1:
        raise InputError(
            f"{path}: {len(data)} data files ({listed(file.name for file in data) or 'none'}), "
            "needs train, val and test, or just one; rename them, or name the files one by one"
        )
    return {"all": data[0]}, domain


def divide_classes(corpus: Corpus, seed: int = 0, what: str = "the corpus") -> Splits:
    """Divide the classes at random: 60 % for train, 20 % for validation, 20 % for test.

    If every label occurs in several domains (for example good and bad for each kind of product),
    whole domains are divided instead, since a task needs all labels of a domain.

    Args:
        corpus: its classes are divided; the order of its texts does not matter.
        seed: of the division, at least 0.
        what: the name of the corpus in messages.

    Returns:
        The three parts; the `dropped` of the corpus is counted on train.

    Raises:
        InputError: there are fewer than 6 classes, or 3 domains if those are divided.
    """
    keys = sorted(corpus.classes)
    recurring = Counter(label for _, label in keys)
    by_domain = bool(keys) and min(recurring.values()) > 1
    least, kind = (1, "domains") if by_domain else (2, "classes")
    units = sorted({domain for domain, _ in keys}) if by_domain else keys
    if len(units) < 3 * least:
        raise InputError(
            f"{what}: {len(units)} {kind}, at least {3 * least} are needed to divide them into "
            "train, validation and test; add some, give a folder with train, val and test files, "
            "or let `rnnopt compare` judge by all with --report-on all --tuning-data stdlib"
        )
    held = max(least, round(PART_SHARE * len(units)))
    order = _generator(seed).permutation(len(units))
    parts = order[2 * held :], order[:held], order[held : 2 * held]
    train, validation, test = (
        corpus.select(key for key in keys if (key[0] if by_domain else key) in chosen)
        for chosen in ({units[i] for i in part} for part in parts)
    )
    return Splits(replace(train, dropped=corpus.dropped), validation, test)


def stratified_holdout(
    corpus: Corpus, fraction: float = 0.2, seed: int = 0
) -> tuple[Corpus, Corpus]:
    """Hold out a fraction of the texts of each class, at least one and never all.

    Args:
        corpus: each of its classes has at least two texts.
        fraction: of the texts, between 0 and 1.
        seed: of the choice, at least 0.

    Returns:
        (the texts that stay, the texts that are held out), both in the order of the corpus.

    Raises:
        InputError: the fraction is not between 0 and 1, or a class has a single text.
    """
    if not 0 < fraction < 1:
        raise InputError(f"fraction {fraction}: must lie between 0 and 1, such as 0.2")
    generator = _generator(seed)
    single = [label for (_, label), indices in corpus.classes.items() if len(indices) < 2]
    if single:
        raise InputError(
            f"{len(single)} of {len(corpus.classes)} labels have 1 text ({listed(single)}), at "
            "least 2 are needed to hold one out; add texts, leave the labels out, or judge by a "
            "file of its own, with --test"
        )
    held: set[int] = set()
    for key in sorted(corpus.classes):
        indices = corpus.classes[key]
        count = min(max(1, round(fraction * len(indices))), len(indices) - 1)
        held.update(generator.permutation(indices)[:count].tolist())
    left = (index for index in range(len(corpus)) if index not in held)
    # The duplicates belong to the whole file, so only one of the two parts counts them.
    return replace(corpus.take(left), dropped=corpus.dropped), corpus.take(sorted(held))


def _generator(seed: int) -> np.random.Generator:
    if seed < 0:
        raise InputError(f"seed {seed}: must be at least 0")
    return np.random.default_rng(seed)


def class_sketches(corpus: Corpus) -> dict[str, list[str]]:
    """A sketch of each class, by which `overlapping_classes` recognises the class later.

    A sketch is the 8 smallest hashes of the class's texts: a uniform sample of the texts that is
    the same for every copy of the class, whatever its order, its name or its case.

    Returns:
        Class name -> 8 hashes, or fewer if there are fewer texts.
    """
    return {name: sorted(hashes)[:SKETCH_SIZE] for name, hashes in corpus.class_hashes.items()}


def class_pair(pair: Sequence[str]) -> str:
    """The two names of one class as ``name = other name``, or the name alone if they are equal."""
    return " = ".join(dict.fromkeys(pair))


def overlapping_classes(seen: Mapping[str, Sequence[str]], corpus: Corpus) -> list[tuple[str, str]]:
    """Find the classes of a corpus that were seen before, from sketches of the seen ones.

    Two classes count as the same if they have the same name, or if 2 hashes of the seen class's
    sketch occur among all hashes of the other class. The number of such hashes is binomial in the
    share of the seen class's texts that the other class holds. A class is therefore recognised
    always if the other holds all of it, in 96 % of cases if it holds half, in 63 % for a quarter
    and 19 % for a tenth. Classes that share 1 % are taken for the same in 0.3 % of cases. Textbook
    min-hash compares two sketches and would miss classes of very different size. Where both corpora
    are at hand, `check_disjoint` is exact.

    Args:
        seen: from `class_sketches`.
        corpus: its classes are looked for among the seen ones.

    Returns:
        Sorted pairs (seen class, class of the corpus).
    """
    return _same_classes(seen, corpus.class_hashes)


def check_disjoint(
    train: Corpus, other: Corpus, what: str = "train and test", allow_overlap: bool = False
) -> list[tuple[str, str]]:
    """Check that two corpora have no class in common.

    Two classes count as the same if they have the same name, or if they share at least 2 texts and
    at least 10 % of the texts of the smaller one.

    Args:
        train: one corpus.
        other: the other.
        what: their names in the message.
        allow_overlap: return the common classes instead of raising an error.

    Returns:
        Sorted pairs (class of train, class of other); empty if there is none.

    Raises:
        InputError: they have a class in common.
    """
    pairs = _same_classes(train.class_hashes, other.class_hashes)
    if pairs and not allow_overlap:
        shown = listed(map(class_pair, pairs), most=3)
        raise InputError(
            f"{what} have classes in common, by name or by their texts ({shown}), and must have "
            "none; remove one of each pair, name the column that tells domains apart with "
            "--domain-column, or accept seen classes with --allow-overlap"
        )
    return pairs


def _same_classes(
    seen: Mapping[str, Collection[str]], other: Mapping[str, Collection[str]]
) -> list[tuple[str, str]]:
    holders: defaultdict[str, list[str]] = defaultdict(list)
    for name, hashes in seen.items():
        for digest in hashes:
            holders[digest].append(name)
    shared = Counter(
        (name, own)
        for own, hashes in other.items()
        for digest in hashes
        for name in holders.get(digest, ())
    )
    same = {(name, name) for name in seen if name in other}
    for (name, own), count in shared.items():
        smaller = min(len(seen[name]), len(other[own]))
        if count >= max(min(SAME_CLASS_TEXTS, smaller), SAME_CLASS_SHARE * smaller):
            same.add((name, own))
    return sorted(same)
