"""Labelled text: files in, classes out, and the checks that keep evaluation classes unseen.

A *class* is the pair (domain, label), written ``domain/label``. A corpus says nothing about
episodes; `rnnopt.episodes` draws those.
"""

from __future__ import annotations

import ast
import csv
import functools
import gzip
import hashlib
import io
import json
import os
import re
import sys
import sysconfig
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rnnopt.errors import InputError

ClassKey = tuple[str, str]  # (domain, label)
Row = tuple[int, Mapping[str, object]]  # (line number, column -> value)

# Two classes are taken for one when they share this part of the smaller one's texts, and two
# texts at least: real, distinct intents of one data set share a stock phrase or 1 % ("ok, thanks"),
# the same intent in two data sets shares 10 % and more.
SAME_CLASS_SHARE = 0.1
SAME_CLASS_TEXTS = 2
SKETCH_SIZE = 8
HASH_BYTES = 6  # 48 bits: a million texts collide with odds of 1 in 500

PARTS = {"train": 0, "val": 1, "valid": 1, "validation": 1, "test": 2}
PART_NAMES = ("train", "validation", "test")
PART_SHARE = 0.2  # of a single file's classes, to validation and to test each

STDLIB_LEAST_WORDS = 5
STDLIB_LEAST_TEXTS = 20
# Beside the library itself: what distributions install there, and tests, whose docstrings
# describe bugs rather than modules.
STDLIB_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Corpus:
    """Texts with their labels and domains, in parallel.

    Args:
        texts: the texts.
        labels: the label of each text.
        domains: the domain of each text.
        dropped: how many duplicates were left out on the way here.

    Raises:
        InputError: the three differ in length.
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
        """Class -> sorted indices of its texts (int64, read-only); in order of appearance."""
        found: dict[ClassKey, list[int]] = {}
        for index, key in enumerate(zip(self.domains, self.labels)):
            found.setdefault(key, []).append(index)
        arrays = {key: np.array(indices, dtype=np.int64) for key, indices in found.items()}
        for array in arrays.values():
            array.setflags(write=False)
        return arrays

    @functools.cached_property
    def class_hashes(self) -> dict[str, set[str]]:
        """Class name -> hashes of its texts (12 hex digits); white space and case do not count."""
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
                    f"choose from {_listed(map(class_name, self.classes))}"
                )
        return self.take(sorted(int(i) for key in chosen for i in self.classes[key]))

    def fingerprint(self) -> str:
        """16 hex digits of the SHA-256 of texts, labels and domains, in order."""
        contents = json.dumps([self.texts, self.labels, self.domains])
        return hashlib.sha256(contents.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Splits:
    """Three corpora without a class in common: train on one, choose on one, report on one."""

    train: Corpus
    validation: Corpus
    test: Corpus


def merge(corpora: Sequence[Corpus]) -> Corpus:
    """One corpus of all their texts, in order; `dropped` adds up."""
    return Corpus(
        tuple(text for corpus in corpora for text in corpus.texts),
        tuple(label for corpus in corpora for label in corpus.labels),
        tuple(domain for corpus in corpora for domain in corpus.domains),
        sum(corpus.dropped for corpus in corpora),
    )


def class_name(key: ClassKey) -> str:
    """``domain/label``."""
    return "/".join(key)


def text_key(text: str) -> str:
    """What makes two texts the same: white space and case do not count."""
    return " ".join(text.split()).casefold()


def summary(corpus: Corpus) -> str:
    """One line for people: texts, classes, domains, duplicates dropped."""
    return (
        f"{len(corpus)} texts, {len(corpus.classes)} classes, "
        f"{len(set(corpus.domains))} domains, {corpus.dropped} duplicates dropped"
    )


# --- files ---------------------------------------------------------------------------------------


def read_corpus(
    path: str | os.PathLike[str],
    *,
    text_column: str = "text",
    label_column: str = "label",
    domain_column: str | None = None,
    domain: str | None = None,
) -> Corpus:
    """Read one file: JSON lines, CSV or TSV with a header; UTF-8; plain or gzip.

    White space in texts is collapsed. A text that repeats an earlier one of its domain, but for
    case, is dropped and counted, even where the labels conflict.

    Args:
        path: ``.jsonl``, ``.ndjson``, ``.csv`` or ``.tsv``, each also with ``.gz``.
        text_column: the column (or JSON key) of the texts.
        label_column: the column of the labels; numbers become their decimal string.
        domain_column: the column of the domains; None where the file is one domain.
        domain: that one domain's name; None for the file's name without its suffixes.

    Raises:
        InputError: the file, a line or a value can't be used; names file and line.
    """
    path = Path(path)
    content = _file_text(path)
    stem, suffix = _stem_and_suffix(path)
    rows = _json_rows if suffix in (".jsonl", ".ndjson") else _table_rows
    seen: set[ClassKey] = set()
    kept: list[tuple[str, str, str]] = []
    dropped = 0
    for line, row in rows(path, content):
        where = f"{path}, line {line}"
        text = " ".join(_value(where, row, text_column, "--text-column").split())
        label = _value(where, row, label_column, "--label-column")
        name = stem if domain is None else domain
        if domain_column is not None:
            name = _value(where, row, domain_column, "--domain-column")
        key = name, text_key(text)
        if key in seen:
            dropped += 1
            continue
        seen.add(key)
        kept.append((text, label, name))
    if not kept:
        raise InputError(f"{path}: no rows, needs at least one; check that it is the right file")
    texts, labels, domains = zip(*kept)
    return Corpus(texts, labels, domains, dropped)


def _stem_and_suffix(path: Path) -> tuple[str, str]:
    """("intents", ".csv") for intents.csv.gz; ("", "") where the extension is unknown."""
    name = path.name[:-3] if path.name.lower().endswith(".gz") else path.name
    stem, suffix = os.path.splitext(name)
    known = suffix.lower() in (".jsonl", ".ndjson", ".csv", ".tsv")
    return (stem, suffix.lower()) if known else ("", "")


def _file_text(path: Path) -> str:
    if os.path.isdir(path):
        raise InputError(f"{path}: is a folder, a file is needed; name one of the files in it")
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file; check the path")
    if not _stem_and_suffix(path)[1]:
        raise InputError(
            f"{path}: unknown extension; needs .jsonl (one JSON object a line), .ndjson, .csv or "
            ".tsv, each also with .gz: convert or rename it"
        )
    try:
        data = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            data = gzip.decompress(data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(
            f"{path}: not a whole gzip file ({error}); copy or compress it again, or drop .gz "
            "from the name of a plain file"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}); check its rights") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from error


def _json_rows(path: Path, content: str) -> Iterator[Row]:
    # Not splitlines(): JSON strings may hold U+2028 and its like as they are.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{where}: not JSON ({error}); write one JSON object a line"
            ) from error
        if not isinstance(row, dict):
            raise InputError(
                f"{where}: a JSON {type(row).__name__}, needs an object with text and label; "
                "write one JSON object a line"
            )
        yield number, row


def _table_rows(path: Path, content: str) -> Iterator[Row]:
    delimiter = "," if _stem_and_suffix(path)[1] == ".csv" else "\t"
    # strict: a stray quote would otherwise swallow the rows up to the next one, silently.
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    first_line = 1
    try:
        for fields in reader:
            line, first_line = first_line, reader.line_num + 1
            if not fields:
                continue
            if header is None:
                header = [field.strip() for field in fields]
                continue
            if len(fields) != len(header):
                raise InputError(
                    f"{path}, line {line}: {len(fields)} fields where the header has "
                    f"{len(header)}; fill in what is missing, quote fields that hold {delimiter!r}"
                )
            yield line, dict(zip(header, fields))
    except csv.Error as error:
        raise InputError(
            f"{path}, line {first_line}: {error}; double the quotes inside a quoted field, close "
            "open ones, or write the file as .jsonl"
        ) from error


def _value(where: str, row: Mapping[str, object], column: str, option: str) -> str:
    if column not in row:
        raise InputError(
            f"{where}: no column {column!r}, the columns are {_listed(row)}; "
            f"name the right one with {option}"
        )
    value = row[column]
    if option != "--text-column" and isinstance(value, int | float):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        shown = "empty" if value is None or isinstance(value, str) else f"a {type(value).__name__}"
        raise InputError(
            f"{where}: column {column!r} is {shown}, needs some text; "
            f"fill it in, delete the row, or name another column with {option}"
        )
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise InputError(
            f"{where}: column {column!r} has half a surrogate pair, which no encoder can read; "
            "delete that character"
        )
    return value.strip()


def _listed(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# --- train, validation, test ---------------------------------------------------------------------


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

    A folder with files called train, val (valid, validation) or test supplies those parts, and
    its other files are ignored. A folder with one data file stands for that file. A single
    file's classes are divided, see `divide_classes`. Without a domain column, a source's
    domain is the name of the folder, or of the file.

    Args:
        paths: the sources.
        seed: for dividing the classes of single files.
        text_column, label_column, domain_column: as in `read_corpus`.
        allow_overlap: skip the check that no two parts share a class.

    Raises:
        InputError: as `read_corpus`; a folder without data or with too much; two sources with one
            domain; too few classes to divide; a class that stands in two parts.
    """
    parts: tuple[list[Corpus], list[Corpus], list[Corpus]] = ([], [], [])
    owner: dict[str, Path] = {}
    for path in map(Path, paths):
        files, domain = _source(path)
        read = functools.partial(
            read_corpus,
            text_column=text_column,
            label_column=label_column,
            domain_column=domain_column,
            domain=domain,
        )
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
    splits = Splits(*map(merge, parts))
    check_disjoint(splits.train, splits.validation, "train and validation", allow_overlap)
    check_disjoint(splits.train, splits.test, "train and test", allow_overlap)
    check_disjoint(splits.validation, splits.test, "validation and test", allow_overlap)
    return splits


def _source(path: Path) -> tuple[dict[str, Path], str]:
    """({part or "all": its file}, domain) of a file or a folder."""
    if not os.path.isdir(path):
        stem = _stem_and_suffix(path)[0]
        # train.jsonl is no name for a domain, and two parts of one set must not pass for two sets.
        return {"all": path}, path.resolve().parent.name if stem.lower() in PARTS else stem
    domain = path.resolve().name
    try:
        listed = sorted(path.iterdir())
    except OSError as error:
        raise InputError(f"{path}: can't be listed ({error.strerror}); check its rights") from error
    data = [file for file in listed if _stem_and_suffix(file)[1] and file.name[0] != "."]
    files: dict[str, Path] = {}
    for file in data:
        stem = _stem_and_suffix(file)[0].lower()
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
            f"{path}: {len(data)} data files ({_listed(file.name for file in data) or 'none'}), "
            "needs train, val and test, or just one; rename them, or name the files one by one"
        )
    return {"all": data[0]}, domain


def divide_classes(corpus: Corpus, seed: int = 0, what: str = "the corpus") -> Splits:
    """Deal classes out, 60/20/20 %, to train, validation and test; the seed decides.

    Where every label recurs in several domains (sentiment by product, say) whole domains are
    dealt out instead: half a domain's labels are no task. `dropped` is counted on train.

    Args:
        corpus: what to divide; the order of its texts does not matter.
        seed: at least 0.
        what: the name for messages.

    Raises:
        InputError: fewer than 6 classes (or 3 domains, where those are dealt out).
    """
    keys = sorted(corpus.classes)
    recurring = Counter(label for _, label in keys)
    by_domain = bool(keys) and min(recurring.values()) > 1
    least, kind = (1, "domains") if by_domain else (2, "classes")
    units = sorted({domain for domain, _ in keys}) if by_domain else keys
    if len(units) < 3 * least:
        raise InputError(
            f"{what}: {len(units)} {kind}, at least {3 * least} are needed to divide them into "
            "train, validation and test; add some, or give a folder with train, val and test files"
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
    """Hold out a fraction of every class, at least one text and never all.

    Returns:
        (what is left, what is held out), each in the corpus's order.

    Raises:
        InputError: the fraction is not between 0 and 1, or a class has a single text.
    """
    if not 0 < fraction < 1:
        raise InputError(f"fraction {fraction}: must lie between 0 and 1, such as 0.2")
    generator = _generator(seed)
    held: set[int] = set()
    for key in sorted(corpus.classes):
        indices = corpus.classes[key]
        if len(indices) < 2:
            raise InputError(
                f"class {class_name(key)!r} has 1 text, at least 2 are needed to hold one out; "
                "add texts or leave the class out"
            )
        count = min(max(1, round(fraction * len(indices))), len(indices) - 1)
        held.update(generator.permutation(indices)[:count].tolist())
    left = (index for index in range(len(corpus)) if index not in held)
    return corpus.take(left), corpus.take(sorted(held))


def _generator(seed: int) -> np.random.Generator:
    if seed < 0:
        raise InputError(f"seed {seed}: must be at least 0")
    return np.random.default_rng(seed)


# --- leakage -------------------------------------------------------------------------------------


def class_sketches(corpus: Corpus) -> dict[str, list[str]]:
    """Class name -> its 8 smallest 48-bit text hashes (hex), by which to know it again.

    The smallest hashes are a uniform sample of the class's texts, and the same sample in every
    copy of it, whatever its order, names or case.
    """
    return {name: sorted(hashes)[:SKETCH_SIZE] for name, hashes in corpus.class_hashes.items()}


def overlapping_classes(seen: Mapping[str, Sequence[str]], corpus: Corpus) -> list[tuple[str, str]]:
    """Which classes of the corpus were seen before.

    Two classes are the same if their names are, or if 2 hashes of the seen one's sketch are among
    *all* hashes of the other. That needs a sketch on one side only, and where 8 sketched texts
    are a sample, the hits are binomial in the share q of the seen class that the other holds: a
    class is recognised from the whole or any superset always, from half of it in 96 % of cases,
    from a quarter in 63 %, from a tenth in 19 %; and unrelated classes that share 1 % in 0.3 %.
    (The 8 smallest hashes of the union, as in textbook min-hash, would find neither subsets nor
    supersets of very different size.) With both corpora at hand use `check_disjoint`: exact.

    Args:
        seen: what `class_sketches` gave.
        corpus: the corpus in question.

    Returns:
        Sorted pairs (seen class, class of the corpus).
    """
    return _same_classes(seen, corpus.class_hashes)


def check_disjoint(
    train: Corpus, other: Corpus, what: str = "train and test", allow_overlap: bool = False
) -> list[tuple[str, str]]:
    """Make sure that no class stands on both sides, by name or by its texts.

    Classes are the same by their texts if they share 2 texts and 10 % of the smaller one.

    Args:
        train, other: the two sides.
        what: both sides' names, for the message.
        allow_overlap: return the pairs rather than raise.

    Returns:
        Sorted pairs (class of train, class of other); empty if all is well.

    Raises:
        InputError: there are such pairs.
    """
    pairs = _same_classes(train.class_hashes, other.class_hashes)
    if pairs and not allow_overlap:
        shown = _listed((" = ".join(dict.fromkeys(pair)) for pair in pairs), most=3)
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


# --- the embedded corpus -------------------------------------------------------------------------


@functools.cache
def stdlib_corpus() -> Corpus:
    """Docstrings of this Python's standard library: a text corpus that every machine has.

    A text is a docstring's first paragraph, of 5 words at least; its label is the top-level
    module or package; labels with fewer than 20 texts are left out. Sources are parsed, never
    imported. A text that stands in several modules is dropped from all: it tells none of
    them from the others, and to keep the first would let the alphabet label it.

    Raises:
        InputError: this Python comes without its sources.
    """
    found: dict[str, tuple[str, set[str]]] = {}
    root = Path(sysconfig.get_path("stdlib"))
    for path in _stdlib_sources(root):
        label = path.relative_to(root).parts[0].removesuffix(".py")
        for text in _first_paragraphs(path):
            found.setdefault(text_key(text), (text, set()))[1].add(label)
    texts: defaultdict[str, list[str]] = defaultdict(list)
    for text, labels in found.values():
        if len(labels) == 1:
            texts[min(labels)].append(text)
    rows = [
        (text, label)
        for label in sorted(texts)
        if len(texts[label]) >= STDLIB_LEAST_TEXTS
        for text in sorted(texts[label])
    ]
    if not rows:
        raise InputError(
            f"{root}: no sources of Python's standard library; "
            "use a Python that has them, or a corpus of your own"
        )
    return Corpus(
        tuple(text for text, _ in rows), tuple(label for _, label in rows), ("stdlib",) * len(rows)
    )


def stdlib_splits(seed: int = 0) -> Splits:
    """`stdlib_corpus`, its modules divided by `divide_classes`."""
    return divide_classes(stdlib_corpus(), seed, what="the standard library")


def _stdlib_sources(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - STDLIB_SKIPPED)
        if Path(folder) == root:
            # Some systems and users install other packages right here.
            folders[:] = [name for name in folders if name in sys.stdlib_module_names]
            files = [name for name in files if name.removesuffix(".py") in sys.stdlib_module_names]
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def _first_paragraphs(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in sources that are not ours
            pending: list[ast.AST] = [ast.parse(path.read_bytes())]
    except (OSError, SyntaxError, ValueError, RecursionError):
        return  # templates and the like: one file less
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False) or ""
            words = re.split(r"\n\s*\n", docstring.strip())[0].split()
            if len(words) >= STDLIB_LEAST_WORDS:
                yield " ".join(words)
        # Definitions stand below statements only; expressions are nine tenths of the tree.
        pending += [
            child
            for child in ast.iter_child_nodes(node)
            if isinstance(child, ast.stmt | ast.ExceptHandler)
        ]
