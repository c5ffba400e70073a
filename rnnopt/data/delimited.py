"""Rows of CSV and TSV files, read so that no row is lost without a word.

The records come from `csv.reader` in strict mode. pandas was tried in its place: its C reader fills
up short rows without a word and its Python reader is `csv.reader` itself, neither knows the line of
a record behind a field of several lines, and both read the rows between two stray quotes as one.
"""

from __future__ import annotations

import csv
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rnnopt.data.corpus import counted, listed, readable
from rnnopt.errors import InputError


@dataclass(frozen=True)
class _Record:
    """The fields of one row, and its first and its last line in the file, counted from 1."""

    first: int
    last: int
    fields: list[str]


@dataclass(frozen=True)
class _Table:
    """The rows of a table, and the lines of the rows that were left out."""

    header: list[str]
    rows: list[_Record]
    repeated_headers: list[int]
    empty: list[int]


def table_rows(
    path: Path, content: str, delimiter: str, label_column: str
) -> Iterator[tuple[int, Mapping[str, str]]]:
    """Read a table that has a header.

    Quotes in a CSV file follow RFC 4180. Many TSV files have no quoting, and a quote in them is a
    part of the text. If each line of a TSV file has as many fields as the header, each line is
    therefore a row, and only fields that are quoted as a whole lose their quotes. If not, RFC 4180
    holds there too. Repeated header rows, as in joined files, and rows whose fields are all empty
    are left out with a warning. Columns without a name are ignored.

    Args:
        path: the file's name, for messages.
        content: the text of the file.
        delimiter: ``","`` or a tab.
        label_column: the column of the labels. A line inside a quoted field that has a known label
            in its place is probably a row, and a warning tells of it.

    Yields:
        (line number, column -> value) of every row.

    Raises:
        InputError: the header is unusable, a row has too few or too many fields, or quotes are not
            balanced; names the line.
    """
    if delimiter == "\t":
        table = _tab_separated(path, content, label_column)
    else:
        table = _table(
            path, _records(path, content, delimiter, csv.QUOTE_MINIMAL), delimiter, label_column
        )
        swallowed = _swallowed(table, content, delimiter, label_column)
        if swallowed is not None:
            _warn(
                f"{path}: lines {swallowed.first} to {swallowed.last} are read as one row, since a "
                "quote opens on the first and closes on the last; if they are rows of their own, "
                "put fields that hold quotes in quotes and double the inner ones"
            )
    if table.repeated_headers:
        _warn(f"{path}: left out {_rows(table.repeated_headers)}: the header once more")
    if table.empty:
        _warn(f"{path}: left out {_rows(table.empty)}: all fields are empty")
    for row in table.rows:
        named = zip(table.header, row.fields)
        yield row.first, {name: value for name, value in named if name}


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def _rows(lines: Sequence[int]) -> str:
    return f"{counted(len(lines), 'row')} (line {listed(map(str, lines))})"


def _tab_separated(path: Path, content: str, label_column: str) -> _Table:
    """Read each line as a row if the fields fit the header, and by RFC 4180 if they do not."""
    plain = [
        _Record(record.first, record.last, [_unquoted(field) for field in record.fields])
        for record in _records(path, content, "\t", csv.QUOTE_NONE)
    ]
    try:
        return _table(path, plain, "\t", label_column)
    except InputError as error:
        if '"' not in content:
            raise
        try:
            table = _table(
                path, _records(path, content, "\t", csv.QUOTE_MINIMAL), "\t", label_column
            )
        except InputError:
            raise error from None
        for row in table.rows:
            # Texts of several lines seldom hold tabs. More likely these lines are rows between two
            # stray quotes, so the line that does not fit the header is the one to report.
            if row.last > row.first and any("\t" in field for field in row.fields):
                raise
        return table


def _unquoted(field: str) -> str:
    """The contents of a field that is quoted as a whole; any other field as it is."""
    quoted = re.fullmatch(r'"((?:[^"]|"")*)"', field)
    return quoted[1].replace('""', '"') if quoted else field


def _records(path: Path, content: str, delimiter: str, quoting: Literal[0, 3]) -> list[_Record]:
    """All records that are not blank lines."""
    # By default a field of more than 131,072 characters is an error. The setting is global.
    limit = csv.field_size_limit()
    csv.field_size_limit(max(limit, len(content)))
    reader = csv.reader(
        io.StringIO(content, newline=""), delimiter=delimiter, quoting=quoting, strict=True
    )
    records, line = [], 1
    try:
        for fields in reader:
            if fields:
                records.append(_Record(line, reader.line_num, fields))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{path}, line {line}: {error}; double the quotes inside a quoted field, close "
            "open ones, or write the file as .jsonl"
        ) from error
    finally:
        csv.field_size_limit(limit)
    return records


def _table(path: Path, records: Sequence[_Record], delimiter: str, label_column: str) -> _Table:
    """Check the header and the number of fields of every row."""
    if not records:
        return _Table([], [], [], [])
    header = [field.strip() for field in records[0].fields]
    _check_header(path, header, delimiter)
    header = _cut(header, 0)
    if label_column and label_column not in header and len(records) > 1:
        _check_first(path, records[1], label_column)
    names = [readable(name).casefold() for name in header]
    table = _Table(header, [], [], [])
    for record in records[1:]:
        fields = _cut(record.fields, len(header))
        values = [readable(field).casefold() for field in fields]
        if not any(map(str.strip, fields)):
            table.empty.append(record.first)
        elif values == names:
            table.repeated_headers.append(record.first)
        elif len(fields) != len(header):
            raise InputError(
                f"{path}, line {record.first}: {len(fields)} fields where the header has "
                f"{len(header)}; fill in what is missing, quote fields that hold {delimiter!r}"
            )
        elif sorted(values) == sorted(names):
            raise InputError(
                f"{path}, line {record.first}: the header once more, with its columns in another "
                f"order ({', '.join(fields)}); bring the joined files into one order"
            )
        else:
            table.rows.append(_Record(record.first, record.last, fields))
    return table


def _check_header(path: Path, header: Sequence[str], delimiter: str) -> None:
    found = [c for c in ";\t," if c != delimiter and c in header[0]]
    if len(header) == 1 and found:
        raise InputError(
            f"{path}: its header is one column, {header[0]!r}, and looks divided by {found[0]!r}; "
            f"divide the fields by {delimiter!r}, or name a file that is divided by tabs .tsv"
        )
    twice = [name for name in header if name and header.count(name) > 1]
    if twice:
        raise InputError(f"{path}: column {twice[0]!r} stands twice in the header; rename one")


def _check_first(path: Path, record: _Record, label_column: str) -> None:
    """Refuse a header that stands behind a title, as spreadsheets have them."""
    if label_column in map(str.strip, record.fields):
        raise InputError(
            f"{path}, line {record.first}: this row looks like the header, since it has a field "
            f"{label_column!r}; delete the lines before it"
        )


def _cut(fields: Sequence[str], least: int) -> list[str]:
    """Without the empty fields at the end that go beyond so many; spreadsheets write them."""
    count = len(fields)
    while count > least and not fields[count - 1].strip():
        count -= 1
    return list(fields[:count])


def _swallowed(table: _Table, content: str, delimiter: str, label_column: str) -> _Record | None:
    """The first record of several lines of which one looks like a row that has a known label."""
    long = [row for row in table.rows if row.last > row.first]
    if not long or label_column not in table.header:
        return None
    place, width = table.header.index(label_column), len(table.header)
    known = {readable(row.fields[place]) for row in table.rows}
    lines = list(io.StringIO(content, newline=""))
    for row in long:
        for line in lines[row.first - 1 : row.last - 1]:
            fields = line.strip("\r\n").split(delimiter)
            if len(fields) == width and readable(fields[place]) in known:
                return row
    return None
