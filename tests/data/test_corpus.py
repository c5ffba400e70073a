"""What a corpus is, which files it is read from, and when two classes are the same."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rnnopt.data import files as files_module
from rnnopt.data.corpus import Corpus, merge, summary
from rnnopt.data.embedded import stdlib_corpus, stdlib_splits
from rnnopt.data.files import read_corpus
from rnnopt.data.splits import (
    check_disjoint,
    class_sketches,
    divide_classes,
    overlapping_classes,
    read_splits,
    stratified_holdout,
)
from rnnopt.errors import InputError

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data sets are not here")


def make(counts: dict[tuple[str, str], int], prefix: str = "") -> Corpus:
    """A corpus with so many distinct texts per class."""
    rows = [
        (f"{prefix}{domain} {label} {i}", label, domain)
        for (domain, label), count in counts.items()
        for i in range(count)
    ]
    texts, labels, domains = zip(*rows)
    return Corpus(texts, labels, domains)


def of_texts(texts: list[str], name: str = "d/a") -> Corpus:
    domain, label = name.split("/")
    return Corpus(tuple(texts), (label,) * len(texts), (domain,) * len(texts))


def write_jsonl(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": t, "label": c}) + "\n" for t, c in rows))
    return path


def rows_of(labels: str, per_class: int = 3, prefix: str = "") -> list[tuple[str, str]]:
    return [(f"{prefix}{label} {i}", label) for label in labels for i in range(per_class)]


def error(call: object, *args: object, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **options)  # type: ignore[operator]
    return str(caught.value)


# --- Corpus --------------------------------------------------------------------------------------


def test_a_class_is_a_domain_and_a_label() -> None:
    corpus = Corpus(("t", "u", "v", "w"), ("b", "a", "b", "b"), ("y", "y", "x", "y"))
    found = {key: indices.tolist() for key, indices in corpus.classes.items()}
    assert list(found.items()) == [(("y", "b"), [0, 3]), (("y", "a"), [1]), (("x", "b"), [2])]


def test_classes_hold_int64_indices() -> None:
    assert make({("d", "a"): 1}).classes["d", "a"].dtype == np.int64


def test_class_indices_are_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        make({("d", "a"): 2}).classes["d", "a"][0] = 1


def test_unequal_lengths_are_an_error() -> None:
    assert error(Corpus, ("t", "u"), ("a",), ("d", "d")) == (
        "2 texts, 1 labels and 2 domains: give each text one label and one domain"
    )


def test_select_keeps_the_chosen_classes_in_the_order_of_the_corpus() -> None:
    corpus = Corpus(("t", "u", "v", "w"), ("a", "b", "c", "a"), ("d",) * 4)
    chosen = corpus.select([("d", "c"), ("d", "a")])
    assert (chosen.texts, chosen.labels) == (("t", "v", "w"), ("a", "c", "a"))


def test_select_of_an_unknown_class_is_an_error() -> None:
    assert error(make({("d", "a"): 1}).select, [("d", "b")]) == (
        "no class 'd/b' in this corpus of 1 classes: choose from d/a"
    )


def test_select_of_nothing_is_empty() -> None:
    assert len(make({("d", "a"): 1}).select([])) == 0


def test_merge_appends_and_adds_up_what_was_dropped() -> None:
    one, two = Corpus(("t",), ("a",), ("d",), 2), Corpus(("u",), ("b",), ("e",), 3)
    assert merge([one, two]) == Corpus(("t", "u"), ("a", "b"), ("d", "e"), 5)


def test_summary_counts_texts_classes_domains_and_duplicates() -> None:
    corpus = Corpus(("t", "u", "v"), ("a", "b", "a"), ("x", "x", "y"), dropped=4)
    assert summary(corpus) == "3 texts, 3 classes, 2 domains, 4 duplicates dropped"
    assert summary(Corpus(("t",), ("a",), ("x",), dropped=1)) == (
        "1 text, 1 class, 1 duplicate dropped"
    )
    assert summary(corpus.take([0, 1])) == "2 texts, 2 classes"


def test_fingerprint_is_of_the_contents() -> None:
    assert of_texts(["t"]).fingerprint() == of_texts(["t"]).fingerprint()
    assert len(of_texts(["t"]).fingerprint()) == 16


@pytest.mark.parametrize(
    "other",
    [
        Corpus(("t", "v"), ("a", "b"), ("d", "d")),
        Corpus(("t", "u"), ("a", "a"), ("d", "d")),
        Corpus(("t", "u"), ("a", "b"), ("d", "e")),
        Corpus(("u", "t"), ("a", "b"), ("d", "d")),
        Corpus(("t", "ua"), ("", "b"), ("d", "d")),
    ],
)
def test_fingerprint_changes_with_texts_labels_domains_and_order(other: Corpus) -> None:
    corpus = Corpus(("t", "u"), ("a", "b"), ("d", "d"))
    assert corpus.fingerprint() != other.fingerprint()


# --- files that can be read ----------------------------------------------------------------------


FILES = {
    "set.jsonl": '{"text": "one, \\"x\\"", "label": "a"}\n{"text": "two", "label": "b"}\n',
    "set.ndjson": '{"text": "one, \\"x\\"", "label": "a"}\r\n\r\n{"text": "two", "label": "b"}',
    "set.csv": 'label,text\r\na,"one, ""x"""\r\nb,two\r\n',
    "set.tsv": 'text\tlabel\n"one, ""x"""\ta\n\ntwo\tb\n',
    "SET.CSV": '\ufefftext,label,id\n"one, ""x""",a,1\ntwo,b,2\n',
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_every_format_reads_the_same(name: str, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / (name + ".gz" * zipped)
    data = FILES[name].encode()
    path.write_bytes(gzip.compress(data) if zipped else data)
    corpus = read_corpus(path, domain="d")
    assert corpus == Corpus(('one, "x"', "two"), ("a", "b"), ("d", "d"))


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5))
def test_json_lines_give_back_any_text_but_for_white_space(texts: list[str]) -> None:
    texts = [f"{i} {text}" for i, text in enumerate(texts)]
    lines = "\n".join(json.dumps({"text": t, "label": "a"}, ensure_ascii=False) for t in texts)
    rows = files_module._json_rows(Path("x.jsonl"), lines)
    assert [row["text"] for _, row in rows] == texts


def test_line_separators_of_unicode_do_not_end_a_json_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "one\u2028two", "label": "a"}\n', encoding="utf-8")
    assert read_corpus(path).texts == ("one two",)


def test_white_space_is_collapsed_and_labels_are_stripped(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [(" one\n\ttwo\u00a0three ", " a b ")])
    corpus = read_corpus(path)
    assert (corpus.texts, corpus.labels) == (("one two three",), ("a b",))


def test_number_labels_become_strings(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "t", "label": 0}\n{"text": "u", "label": 1}\n')
    assert read_corpus(path).labels == ("0", "1")


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("body,topic,shop\nt,a,books\nu,a,toys\n")
    corpus = read_corpus(path, text_column="body", label_column="topic", domain_column="shop")
    assert corpus == Corpus(("t", "u"), ("a", "a"), ("books", "toys"))


def test_the_domain_is_the_name_of_the_file_without_its_suffixes(tmp_path: Path) -> None:
    path = tmp_path / "intents-v1.2.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "t", "label": "a"}'))
    assert read_corpus(path).domains == ("intents-v1.2",)


def test_repeated_texts_are_dropped_and_counted_and_the_first_stays(tmp_path: Path) -> None:
    rows = [("Hello  there", "a"), ("hello THERE", "b"), ("bye", "b"), ("bye", "b")]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    said = r"1 text again .*, such as in line 2 \('b'\) that of line 1 \('a'\); the first label is"
    with pytest.warns(UserWarning, match=said):
        corpus = read_corpus(path)
    assert read_corpus(write_jsonl(tmp_path / "y.jsonl", rows[2:])).dropped == 1  # of one mind
    assert corpus == Corpus(("Hello there", "bye"), ("a", "b"), ("x", "x"), dropped=2)


def test_a_text_may_stand_in_two_domains(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text,label,domain\nt,a,books\nt,b,toys\n")
    assert len(read_corpus(path, domain_column="domain")) == 2


# --- files that can't be used --------------------------------------------------------------------


GOOD = '{"text": "t", "label": "a"}\n'
BAD_FILES = {
    "empty": ("x.jsonl", b"", "{path}: no rows, needs at least one; check that it is the right"),
    "header only": ("x.csv", b"text,label\n", "{path}: no rows, needs at least one"),
    "unknown extension": (
        "x.json",
        b"[]",
        "{path}: unknown extension; needs .jsonl (one JSON object a line), .ndjson, .csv or .tsv, "
        "each also with .gz: convert or rename it",
    ),
    "JSON": ("x.jsonl", GOOD.encode() + b"\n{", "{path}, line 3: not JSON (Expecting property"),
    "deep JSON": ("x.jsonl", b"[" * 100_000, "{path}, line 1: not JSON ("),
    "no object": (
        "x.jsonl",
        GOOD.encode() + b'["t", "a"]',
        "{path}, line 2: a JSON list, needs an object with text and label; write one JSON object",
    ),
    "no text column": (
        "x.jsonl",
        GOOD.encode() + b'{"body": "t", "label": "a"}',
        "{path}, line 2: no column 'text', the columns are body, label; name the right one with "
        "--text-column",
    ),
    "no label column": (
        "x.csv",
        b"text,a,b,c,d,e\n1,2,3,4,5,6\n",
        "{path}, line 2: no column 'label', the columns are text, a, b, c, d and 1 more; "
        "name the right one with --label-column",
    ),
    "empty text": (
        "x.csv",
        b'text,label\n"two\nlines",a\n" \n",b\n',
        "{path}, line 4: column 'text' is empty, needs some text; fill it in, delete the row, or "
        "name another column with --text-column",
    ),
    "null label": (
        "x.jsonl",
        b'{"text": "t", "label": null}',
        "{path}, line 1: column 'label' is empty, needs some text",
    ),
    "list label": (
        "x.jsonl",
        b'{"text": "t", "label": ["a"]}',
        "{path}, line 1: column 'label' is a list, needs some text",
    ),
    "NaN label": (
        "x.jsonl",
        b'{"text": "t", "label": NaN}',
        "{path}, line 1: column 'label' is empty, needs some text",
    ),
    "number for text": (
        "x.jsonl",
        b'{"text": 7, "label": "a"}',
        "{path}, line 1: column 'text' is a int, needs some text",
    ),
    "half a surrogate pair": (
        "x.jsonl",
        b'{"text": "\\ud800", "label": "a"}',
        "{path}, line 1: column 'text' has half a surrogate pair, which no encoder can read; "
        "delete that character",
    ),
    "Latin-1": (
        "x.csv",
        b"text,label\nt,a\ncaf\xe9,b\n",
        "{path}, line 3: not UTF-8; save the file as UTF-8",
    ),
    "few fields": (
        "x.csv",
        b"text,label\nt,a\nu\n",
        "{path}, line 3: 1 fields where the header has 2; fill in what is missing, quote fields "
        "that hold ','",
    ),
    "semicolons": (
        "x.csv",
        b"text;label\nt;a\n",
        "{path}: its header is one column, 'text;label', and looks divided by ';'; divide the "
        "fields by ',', or name a file that is divided by tabs .tsv",
    ),
    "tabs": ("x.csv", b"text\tlabel\nt\ta\n", "{path}: its header is one column, "),
    "commas": ("x.tsv", b"text,label\nt,a\n", "{path}: its header is one column, "),
    "many fields": ("x.tsv", b"text\tlabel\nt\tu\ta\n", "{path}, line 2: 3 fields where the head"),
    "open quote": (
        "x.csv",
        b'text,label\nt,a\n"u,b\nv,c\n',
        "{path}, line 3: unexpected end of data; double the quotes inside a quoted field, close "
        "open ones, or write the file as .jsonl",
    ),
    "not gzip": (
        "x.jsonl.gz",
        GOOD.encode(),
        "{path}: not a whole gzip file (Not a gzipped file (b'{{\"')); copy or compress it again, "
        "or drop .gz from the name of a plain file",
    ),
    "cut gzip": ("x.jsonl.gz", gzip.compress(GOOD.encode())[:-9], "{path}: not a whole gzip file"),
    "corrupt gzip": (
        "x.jsonl.gz",
        gzip.compress(GOOD.encode())[:10] + b"\xff" * 30,
        "{path}: not a whole gzip file (Error -3",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_cannot_be_used_is_an_error_that_says_where(case: str, tmp_path: Path) -> None:
    name, data, message = BAD_FILES[case]
    path = tmp_path / name
    path.write_bytes(data)
    assert error(read_corpus, path).startswith(message.format(path=path))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "none.csv"
    assert error(read_corpus, path) == f"{path}: no such file; check the path"


def test_a_folder_is_no_corpus(tmp_path: Path) -> None:
    assert error(read_corpus, tmp_path) == (
        f"{tmp_path}: is a folder, a file is needed; name one of the files in it"
    )


def refuse(path: Path) -> None:
    raise PermissionError(13, "Permission denied")


def test_a_file_without_read_permission_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [("t", "a")])
    monkeypatch.setattr(Path, "read_bytes", refuse)  # chmod does not stop a test run by root
    assert error(read_corpus, path) == (
        f"{path}: can't be read (Permission denied); check its rights"
    )


def test_a_folder_without_read_permission_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "iterdir", refuse)
    assert error(read_splits, [tmp_path]) == (
        f"{tmp_path}: can't be listed (Permission denied); check its rights"
    )


def test_a_missing_domain_column_names_its_option(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [("t", "a")])
    assert error(read_corpus, path, domain_column="shop").endswith(
        "no column 'shop', the columns are text, label; name the right one with --domain-column"
    )


# --- splits --------------------------------------------------------------------------------------


def test_a_folder_supplies_its_parts_under_its_own_name(tmp_path: Path) -> None:
    folder = tmp_path / "intents"
    write_jsonl(folder / "train.jsonl", rows_of("ab"))
    write_jsonl(folder / "valid.jsonl", rows_of("cd"))
    write_jsonl(folder / "test.jsonl", rows_of("ef"))
    write_jsonl(folder / "all.jsonl", rows_of("abcdef"))
    (folder / "splits.json").write_text("{}")
    (folder / "README.md").write_text("no data")
    splits = read_splits([folder])
    assert list(splits.train.classes) == [("intents", "a"), ("intents", "b")]
    assert list(splits.validation.classes) == [("intents", "c"), ("intents", "d")]
    assert list(splits.test.classes) == [("intents", "e"), ("intents", "f")]


def test_missing_parts_of_a_folder_are_empty(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x" / "test.jsonl", rows_of("ab"))
    splits = read_splits([tmp_path / "x"])
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [0, 0, 6]


def test_several_sources_add_up(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x" / "train.jsonl", rows_of("ab"))
    file = write_jsonl(tmp_path / "y.jsonl", rows_of("abcdef", prefix="other "))
    train = read_splits([tmp_path / "x", file]).train
    assert Counter(domain for domain, _ in train.classes) == {"x": 2, "y": 2}


def test_a_folder_with_one_data_file_stands_for_that_file(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x" / "all.jsonl", rows_of("abcdef"))
    splits = read_splits([tmp_path / "x"])
    assert {domain for domain, _ in splits.train.classes} == {"x"}
    assert [len(part.classes) for part in (splits.train, splits.validation, splits.test)] == [2] * 3


@pytest.mark.parametrize(
    ("names", "listed"), [([], "0 data files (none)"), (["a", "b"], "2 data files (a.csv, b.csv)")]
)
def test_a_folder_must_have_parts_or_one_file(
    names: list[str], listed: str, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / f"{name}.csv").write_text("text,label\nt,a\n")
    assert error(read_splits, [tmp_path]) == (
        f"{tmp_path}: {listed}, needs train, val and test, or just one; rename them, or name the "
        "files one by one"
    )


def test_a_part_must_not_come_twice(tmp_path: Path) -> None:
    for name in ("val.jsonl", "valid.jsonl"):
        write_jsonl(tmp_path / name, rows_of("ab"))
    assert error(read_splits, [tmp_path]) == (
        f"{tmp_path}: val.jsonl and valid.jsonl are both its validation part, one is needed; "
        "move one away"
    )


def test_two_sources_must_not_share_a_domain(tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "1" / "x.jsonl", rows_of("abcdef"))
    two = write_jsonl(tmp_path / "2" / "x.jsonl", rows_of("ghijkl"))
    assert error(read_splits, [one, two]) == (
        f"domain 'x' comes from {one} and from {two}: a domain needs one source; rename one, or "
        "give the folder that holds its train, val and test"
    )


def test_parts_given_as_single_files_do_not_pass_for_two_sets(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "x" / "train.jsonl", rows_of("abcdef"))
    test = write_jsonl(tmp_path / "x" / "test.jsonl", rows_of("abcdef", prefix="more "))
    assert error(read_splits, [train, test]).startswith("domain 'x' comes from")


def test_a_class_in_two_parts_is_an_error(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x" / "train.jsonl", rows_of("ab"))
    write_jsonl(tmp_path / "x" / "val.jsonl", rows_of("cd"))
    write_jsonl(tmp_path / "y" / "test.jsonl", rows_of("d"))
    assert error(read_splits, [tmp_path / "x", tmp_path / "y"]).startswith(
        "validation and test have classes in common, by name or by their texts (x/d = y/d)"
    )
    assert len(read_splits([tmp_path / "x", tmp_path / "y"], allow_overlap=True).test) == 3


@given(classes=st.integers(6, 40), seed=st.integers(0, 5))
def test_dividing_gives_each_class_to_one_part_60_20_20(classes: int, seed: int) -> None:
    corpus = make({("d", f"{i:02}"): 1 for i in range(classes)})
    splits = divide_classes(corpus, seed)
    parts = [set(part.classes) for part in (splits.train, splits.validation, splits.test)]
    held = max(2, round(classes / 5))
    assert [len(part) for part in parts] == [classes - 2 * held, held, held]
    assert set.union(*parts) == set(corpus.classes)


def test_dividing_depends_on_the_seed_and_not_on_the_order_of_rows() -> None:
    corpus = make({("d", label): 2 for label in "abcdefghij"})
    backwards = corpus.take(range(len(corpus))[::-1])
    one, same, other = (
        set(divide_classes(*arguments).test.classes)
        for arguments in ((corpus, 1), (backwards, 1), (corpus, 2))
    )
    assert one == same != other


def test_dividing_keeps_the_count_of_what_was_dropped() -> None:
    corpus = make({("d", label): 1 for label in "abcdef"})
    corpus = Corpus(corpus.texts, corpus.labels, corpus.domains, dropped=7)
    assert divide_classes(corpus).train.dropped == 7


def test_labels_that_recur_in_every_domain_are_divided_by_domain() -> None:
    corpus = make({(domain, label): 1 for domain in "vwxyz" for label in ("bad", "good")})
    splits = divide_classes(corpus)
    for part, domains in ((splits.train, 3), (splits.validation, 1), (splits.test, 1)):
        assert Counter(Counter(domain for domain, _ in part.classes).values()) == {2: domains}


@pytest.mark.parametrize(
    ("counts", "start"),
    [
        ({("d", label): 1 for label in "abcde"}, "here: 5 classes, at least 6"),
        ({(d, label): 1 for d in "xy" for label in "abc"}, "here: 2 domains, at least 3"),
    ],
)
def test_too_few_to_divide_is_an_error(counts: dict[tuple[str, str], int], start: str) -> None:
    assert error(divide_classes, make(counts), what="here") == (
        f"{start} are needed to divide them into train, validation and test; add some, give a "
        "folder with train, val and test files, or let `rnnopt compare` judge by all with "
        "--report-on all --tuning-data stdlib"
    )


def test_a_negative_seed_is_an_error() -> None:
    corpus = make({("d", label): 2 for label in "abcdef"})
    assert error(divide_classes, corpus, -1) == "seed -1: must be at least 0"
    assert error(stratified_holdout, corpus, seed=-1) == "seed -1: must be at least 0"


# --- holdout -------------------------------------------------------------------------------------


@given(st.lists(st.integers(2, 30), min_size=1, max_size=5), st.floats(0.01, 0.99))
def test_holdout_takes_its_share_of_every_class(counts: list[int], fraction: float) -> None:
    corpus = make({("d", str(i)): count for i, count in enumerate(counts)})
    left, held = stratified_holdout(corpus, fraction)
    assert sorted(left.texts + held.texts) == sorted(corpus.texts)
    for key, indices in corpus.classes.items():
        share = len(held.classes[key])
        assert share == min(max(1, round(fraction * len(indices))), len(indices) - 1)


def test_holdout_depends_on_the_seed() -> None:
    corpus = make({("d", "a"): 50})
    assert stratified_holdout(corpus, seed=1) == stratified_holdout(corpus, seed=1)
    assert stratified_holdout(corpus, seed=1) != stratified_holdout(corpus, seed=2)


def test_holdout_keeps_the_order_of_the_corpus() -> None:
    corpus = make({("d", "a"): 9, ("d", "b"): 9})
    for part in stratified_holdout(corpus, 0.5):
        assert list(part.texts) == sorted(part.texts, key=corpus.texts.index)


def test_holdout_of_a_single_text_is_an_error() -> None:
    assert error(stratified_holdout, make({("d", "a"): 2, ("d", "b"): 1})) == (
        "1 of 2 labels have 1 text (b), at least 2 are needed to hold one out; add texts, leave "
        "the labels out, or judge by a file of its own, with --test"
    )


@pytest.mark.parametrize("fraction", [0.0, 1.0, float("nan")])
def test_holdout_fractions_lie_between_0_and_1(fraction: float) -> None:
    assert error(stratified_holdout, make({("d", "a"): 2}), fraction) == (
        f"fraction {fraction}: must lie between 0 and 1, such as 0.2"
    )


# --- leakage -------------------------------------------------------------------------------------


def test_a_sketch_is_8_hashes_of_12_hex_digits() -> None:
    (sketch,) = class_sketches(make({("d", "a"): 50})).values()
    assert len(set(sketch)) == 8
    assert all(len(digest) == 12 and int(digest, 16) >= 0 for digest in sketch)


def test_a_sketch_is_of_the_smallest_hashes() -> None:
    corpus = make({("d", "a"): 200})
    (sketch,) = class_sketches(corpus).values()
    halves = (corpus.take(range(start, 200, 2)) for start in (0, 1))
    found = sorted(digest for half in halves for digest in class_sketches(half)["d/a"])
    assert sketch == found[:8]


def test_sketches_stay_what_rule_files_hold() -> None:
    # printf 'the text' | b2sum -l 48
    assert class_sketches(of_texts(["The  TEXT"])) == {"d/a": ["ee0a5ad9d005"]}


def test_a_sketch_depends_neither_on_order_nor_case_nor_white_space() -> None:
    texts = [f"text number {i}" for i in range(20)]
    other = [text.upper().replace(" ", "  ") for text in texts[::-1]]
    assert class_sketches(of_texts(texts)) == class_sketches(of_texts(other))


def test_a_seen_class_is_recognised_under_another_name() -> None:
    texts = [f"text {i}" for i in range(100)]
    seen = class_sketches(of_texts(texts, "old/a"))
    assert overlapping_classes(seen, of_texts(texts, "new/b")) == [("old/a", "new/b")]


def test_a_seen_class_is_recognised_in_any_superset() -> None:
    texts = [f"text {i}" for i in range(5000)]
    seen = class_sketches(of_texts(texts[:20], "old/a"))
    assert overlapping_classes(seen, of_texts(texts, "new/b")) == [("old/a", "new/b")]


@pytest.mark.parametrize(("share", "least", "most"), [(50, 90, 100), (25, 50, 76), (1, 0, 2)])
def test_sketches_find_subsets_as_often_as_documented(share: int, least: int, most: int) -> None:
    found = 0
    for trial in range(100):
        texts = [f"{trial} text {i}" for i in range(100)]
        seen = class_sketches(of_texts(texts, "old/a"))
        others = [f"{trial} another {i}" for i in range(share, 100)]
        found += bool(overlapping_classes(seen, of_texts(texts[:share] + others, "new/b")))
    assert least <= found <= most


def test_the_same_name_is_the_same_class_whatever_its_texts() -> None:
    seen = class_sketches(of_texts(["t"], "d/a"))
    assert overlapping_classes(seen, of_texts(["u"], "d/a")) == [("d/a", "d/a")]


def test_the_same_label_in_another_domain_is_another_class() -> None:
    assert check_disjoint(of_texts(["t", "u"], "x/good"), of_texts(["v", "w"], "y/good")) == []


@pytest.mark.parametrize(
    ("shared", "size", "same"), [(1, 30, False), (2, 30, False), (3, 30, True), (1, 1, True)]
)
def test_disjoint_means_fewer_than_2_texts_or_a_tenth_in_common(
    shared: int, size: int, same: bool
) -> None:
    texts = [f"text {i}" for i in range(100)]
    small = texts[:shared] + [f"another {i}" for i in range(size - shared)]
    big, small_corpus = of_texts(texts, "x/a"), of_texts(small, "y/b")
    assert check_disjoint(big, small_corpus, allow_overlap=True) == [("x/a", "y/b")] * same
    assert check_disjoint(small_corpus, big, allow_overlap=True) == [("y/b", "x/a")] * same


def test_one_stock_phrase_in_common_is_no_overlap_even_in_small_classes() -> None:
    assert check_disjoint(of_texts(["ok", "t"], "x/a"), of_texts(["ok", "u"], "y/b")) == []


def test_an_overlap_is_an_error_that_names_the_first_pairs() -> None:
    train = make({("d", label): 2 for label in "abcde"})
    assert error(check_disjoint, train, train, "left and right") == (
        "left and right have classes in common, by name or by their texts (d/a, d/b, d/c and 2 "
        "more), and must have none; remove one of each pair, name the column that tells domains "
        "apart with --domain-column, or accept seen classes with --allow-overlap"
    )


@needs_data
@pytest.mark.filterwarnings("ignore:.*again under another label")
def test_real_splits_with_disjoint_classes_pass() -> None:
    splits = read_splits([DATA / "clinc150"])
    counts = [len(part.classes) for part in (splits.train, splits.validation, splits.test)]
    assert counts == [50, 50, 50]
    assert overlapping_classes(class_sketches(splits.train), splits.test) == []


@needs_data
def test_data_sets_that_share_texts_under_other_names_are_caught() -> None:
    assert "hwu64/alarm/query = liu54/query" in error(read_splits, [DATA / "hwu64", DATA / "liu54"])
    hwu, liu = (read_splits([DATA / name]) for name in ("hwu64", "liu54"))
    found = overlapping_classes(class_sketches(liu.train), hwu.test)
    assert ("liu54/wemo_on", "hwu64/iot/wemo_on") in found


@needs_data
def test_real_domain_tasks_need_the_domain_column() -> None:
    folder = DATA / "arsc_sentiment"
    assert "--domain-column" in error(read_splits, [folder])
    splits = read_splits([folder], domain_column="domain")
    assert (len(splits.train.classes), len(splits.test.classes)) == (38, 8)


# --- the embedded corpus -------------------------------------------------------------------------


def test_the_standard_library_is_a_corpus_of_many_classes() -> None:
    corpus = stdlib_corpus()
    assert len(corpus.classes) >= 40
    assert len(corpus) >= 3000
    assert ("stdlib", "asyncio") in corpus.classes


def test_every_embedded_text_is_distinct_and_long_enough_and_every_class_large_enough() -> None:
    corpus = stdlib_corpus()
    assert max(Counter(text.casefold() for text in corpus.texts).values()) == 1
    assert min(len(text.split()) for text in corpus.texts) == 5
    assert min(map(len, corpus.classes.values())) >= 20


def test_embedded_classes_are_modules_of_the_standard_library() -> None:
    assert set(stdlib_corpus().labels) <= sys.stdlib_module_names


def test_embedded_splits_have_no_class_in_common() -> None:
    splits = stdlib_splits()
    assert check_disjoint(splits.train, merge([splits.validation, splits.test])) == []
    assert len(splits.test.classes) == round(len(stdlib_corpus().classes) / 5)


def fake_stdlib(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root))


def module(name: str, count: int, extra: str = "") -> str:
    functions = [
        f'def f{i}():\n    """{name} does thing number {i}.\n\n    Details."""'
        for i in range(count)
    ]
    return "\n".join([*functions, extra])


def test_other_packages_tests_and_broken_files_beneath_the_library_are_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "json/__init__.py": module("json", 19, "if x:\n  class C:\n    'A class below an if.'"),
        "json/tests/test_x.py": module("a test", 30),
        "json/broken.py": "def (",
        "json/binary.py": "\0",
        "site-packages/shutil.py": module("a package", 30),
        "numpy/__init__.py": module("numpy", 30),
        "six.py": module("six", 30),
        "ast.py": module("small", 19),
    }
    for name, source in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    fake_stdlib(tmp_path, monkeypatch)
    corpus = stdlib_corpus.__wrapped__()
    assert set(corpus.labels) == {"json"}
    assert corpus.texts[0] == "A class below an if."
    assert corpus.texts[1] == "json does thing number 0."
    assert len(corpus) == 20


def test_the_embedded_corpus_is_the_same_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ast", "json", "dis", "pdb"):
        (tmp_path / f"{name}.py").write_text(module(name, 25))
    fake_stdlib(tmp_path, monkeypatch)
    code = (
        "import sys, sysconfig; from rnnopt.data.embedded import stdlib_corpus;"
        "sysconfig.get_path = lambda name: sys.argv[1]; print(stdlib_corpus().fingerprint())"
    )
    root = str(Path(files_module.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == stdlib_corpus.__wrapped__().fingerprint()


def test_a_text_of_two_modules_is_in_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = "def g():\n  'Common to both of these modules.'"
    for name in ("ast", "json"):
        (tmp_path / f"{name}.py").write_text(module(name, 20, shared))
    fake_stdlib(tmp_path, monkeypatch)
    corpus = stdlib_corpus.__wrapped__()
    assert len(corpus) == 40
    assert not any(text.startswith("Common") for text in corpus.texts)


def test_a_python_without_sources_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_stdlib(tmp_path, monkeypatch)
    assert error(stdlib_corpus.__wrapped__) == (
        f"{tmp_path}: no sources of Python's standard library; "
        "use a Python that has them, or a corpus of your own"
    )


def test_a_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text,label,text\na,b,c\n")
    with pytest.raises(InputError, match="column 'text' stands twice in the header; rename one"):
        read_corpus(path)


@pytest.mark.parametrize("pair", [("train", "val"), ("train", "test"), ("val", "test")])
def test_every_two_parts_of_a_source_are_checked_for_common_classes(
    tmp_path: Path, pair: tuple[str, str]
) -> None:
    for part in ("train", "val", "test"):
        labels = [f"{part} a", f"{part} b", *(["common"] if part in pair else [])]
        rows = [f"{label} says {part} {i},{label}" for label in labels for i in range(3)]
        (tmp_path / f"{part}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    names = " and ".join(pair).replace("val", "validation")
    with pytest.raises(InputError, match=f"{names} have classes in common"):
        read_splits([tmp_path])
    assert len(read_splits([tmp_path], allow_overlap=True).train.classes) >= 2


def test_a_gzip_file_that_would_fill_the_memory_is_refused(tmp_path):
    path = tmp_path / "bomb.csv.gz"
    path.write_bytes(gzip.compress(b"text,label\n" + bytes(2**25)))
    message = error(read_corpus, path)
    assert message.startswith(f"{path}: {path.stat().st_size} bytes that unpack to more than")
    assert "check where the file is from" in message


def test_a_label_that_conflicts_leave_without_a_text_is_told(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("text,label\nhi,a\nho,b\nHI,c\n")
    with pytest.warns(UserWarning, match="no text is left of label 'c'"):
        assert set(read_corpus(path).labels) == {"a", "b"}
