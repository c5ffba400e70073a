"""Read labelled text files into a `Corpus`: JSON lines, CSV and TSV, plain or gzip."""

from __future__ import annotations

import gzip
import io
import json
import os
import warnings
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from rnnopt.data.corpus import ClassKey, Corpus, Names, counted, listed, readable, text_key
from rnnopt.data.delimited import table_rows
from rnnopt.errors import InputError

MOST_TIMES = 100  # that a gzip file may grow; texts grow three- to tenfold
_ALWAYS_UNPACKED = 2**24  # bytes

Row = tuple[int, Mapping[str, object]]  # (line number, column -> value)


def read_corpus(
    path: str | os.PathLike[str],
    *,
    text_column: str = "text",
    label_column: str = "label",
    domain_column: str | None = None,
    domain: str | None = None,
    known_labels: Iterable[str] = (),
) -> Corpus:
    """Read one file: JSON lines, CSV or TSV with a header; UTF-8; plain or gzip.

    White space in texts is collapsed. Labels and domains that look alike are one, see
    `rnnopt.data.corpus.Names`. A text that repeats an earlier one of its domain is dropped and
    counted, see `rnnopt.data.corpus.text_key`. Warnings tell which labels were united, which texts
    have conflicting labels, and which rows of a table were left out.

    Args:
        path: ``.jsonl``, ``.ndjson``, ``.csv`` or ``.tsv``, each also with ``.gz``.
        text_column: the column (or JSON key) of the texts.
        label_column: the column of the labels; numbers become their decimal string.
        domain_column: the column of the domains; None if all texts are of one domain.
        domain: the name of that one domain; None for the file's name without its suffixes.
        known_labels: of the file that this one goes with; labels that look like one of them are it.

    Raises:
        InputError: the file, a line or a value is unusable; names file and line.
    """
    path = Path(path)
    stem = stem_and_suffix(path)[0]
    rows = rows_of(path, label_column)
    seen: dict[ClassKey, tuple[int, str]] = {}
    labels_of, domains_of = Names(known_labels), Names()
    kept: list[tuple[str, str, str]] = []
    dropped = 0
    conflicts: list[tuple[int, str, int, str]] = []
    for line, row in rows:
        where = f"{path}, line {line}"
        text = " ".join(text_of(where, row, text_column, "--text-column").split())
        label = labels_of.of(text_of(where, row, label_column, "--label-column"), line)
        name = stem if domain is None else domain
        if domain_column is not None:
            name = domains_of.of(text_of(where, row, domain_column, "--domain-column"), line)
        key = name, text_key(text)
        if key in seen:
            dropped += 1
            if seen[key][1] != label:
                conflicts.append((*seen[key], line, label))
            continue
        seen[key] = line, label
        kept.append((text, label, name))
    if not kept:
        raise InputError(f"{path}: no rows, needs at least one; check that it is the right file")
    labels_of.warn(path)
    _warn_of_conflicts(path, conflicts, {label for _, label, _ in kept})
    texts, labels, domains = zip(*kept)
    return Corpus(texts, labels, domains, dropped)


def read_texts(path: str | os.PathLike[str], *, text_column: str = "text") -> list[str]:
    """Read the texts of a file as `read_corpus` does; each row gives one, repeated ones too.

    Args:
        path: as in `read_corpus`.
        text_column: the column (or JSON key) of the texts; others are ignored.

    Raises:
        InputError: the file, a line or a value is unusable; names file and line.
    """
    path = Path(path)
    return [
        " ".join(text_of(f"{path}, line {line}", row, text_column, "--text-column").split())
        for line, row in rows_of(path, "")
    ]


def first_lines(
    path: str | os.PathLike[str], texts: Sequence[str], *, text_column: str = "text"
) -> list[int]:
    """The lines of a file where texts first stand, for messages.

    Args:
        path: as in `read_corpus`.
        texts: some of those that `read_corpus` has read from this file, compared by `text_key`.
        text_column: as in `read_corpus`.
    """
    lines: dict[str, int] = {}
    for line, row in rows_of(Path(path), ""):
        lines.setdefault(text_key(str(row.get(text_column, ""))), line)
    return [lines[text_key(text)] for text in texts]


def rows_of(path: Path, label_column: str) -> Iterator[Row]:
    """(line number, row) of each row of a file.

    Args:
        path: as in `read_corpus`.
        label_column: the column of labels, by which rows that a quote has joined are found; "" for
            none.

    Raises:
        InputError: the file or a line is unusable.
    """
    content, suffix = _file_text(path), stem_and_suffix(path)[1]
    if suffix in (".jsonl", ".ndjson"):
        return _without_headers(path, _json_rows(path, content))
    return table_rows(path, content, "," if suffix == ".csv" else "\t", label_column)


def _warn_of_conflicts(
    path: Path, conflicts: Sequence[tuple[int, str, int, str]], kept: Collection[str]
) -> None:
    if conflicts:
        first, one, second, other = conflicts[0]
        lost = sorted({label for *_, label in conflicts} - set(kept))
        gone = f"; no text is left of label {listed(map(repr, lost))}" if lost else ""
        warnings.warn(
            f"{path}: {counted(len(conflicts), 'text')} again under another label, such as in line "
            f"{second} ({other!r}) that of line {first} ({one!r}); the first label is kept{gone}",
            stacklevel=3,
        )


def stem_and_suffix(path: Path) -> tuple[str, str]:
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
    if not stem_and_suffix(path)[1]:
        raise InputError(
            f"{path}: unknown extension; needs .jsonl (one JSON object a line), .ndjson, .csv or "
            ".tsv, each also with .gz: convert or rename it"
        )
    try:
        data = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            data = _unpacked(path, data)
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


def _unpacked(path: Path, packed: bytes) -> bytes:
    """Unpack gzip, and stop where it can't be text any more: such a file may fill the memory."""
    most = max(_ALWAYS_UNPACKED, MOST_TIMES * len(packed))
    with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise InputError(
            f"{path}: {len(packed)} bytes that unpack to more than {most}, {MOST_TIMES} times as "
            "many, as labelled texts don't; check where the file is from, or unpack it yourself"
        )
    return data


def _without_headers(path: Path, rows: Iterable[Row]) -> Iterator[Row]:
    """Rows but those that repeat the names of the columns, as tables have them that were joined."""
    repeated = []
    for line, row in rows:
        if len(row) > 1 and all(
            isinstance(value, str) and readable(value).casefold() == readable(name).casefold()
            for name, value in row.items()
        ):
            repeated.append(line)
        else:
            yield line, row
    if repeated:
        warnings.warn(
            f"{path}: left out {counted(len(repeated), 'row')} (line "
            f"{listed(map(str, repeated))}): the names of the columns once more",
            stacklevel=3,
        )


def _json_rows(path: Path, content: str) -> Iterator[Row]:
    # splitlines() would also split at U+2028 and similar characters, which JSON strings may hold.
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


def text_of(where: str, row: Mapping[str, object], column: str, option: str) -> str:
    """The text in a column of a row; a number counts as text but in a column of texts.

    Args:
        where: file and line, for messages.
        row: of `rows_of`.
        column: its name.
        option: that names the column on the command line.

    Raises:
        InputError: there is no such column, or it holds no text.
    """
    if column not in row:
        raise InputError(
            f"{where}: no column {column!r}, the columns are {listed(row)}; "
            f"name the right one with {option}"
        )
    value = row[column]
    if option != "--text-column" and isinstance(value, int | float):
        value = None if value != value else str(value)  # NaN is how pandas writes a missing value
    if not isinstance(value, str) or not readable(value):
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
