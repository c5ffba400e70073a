"""CSV and TSV files as people have them: no row is lost, and what is left out is told."""

import csv
import json
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rnnopt.data.corpus import class_name
from rnnopt.data.files import read_corpus
from rnnopt.data.several import read_several
from rnnopt.errors import InputError

STRAY = [
    ('"It was great', "a"),
    ("fair enough", "b"),
    ("not for me", "a"),
    ('until the end"', "b"),
    ("fine", "a"),
]
plain_texts = st.text(st.sampled_from("ab\"', ."), min_size=1, max_size=9)


def written(path, rows, delimiter="\t"):
    path.write_text("".join(delimiter.join(row) + "\n" for row in [("text", "label"), *rows]))
    return path


def refused(path):
    with pytest.raises(InputError) as caught:
        read_corpus(path)
    return str(caught.value).removeprefix(str(path))


def test_a_tsv_without_quoting_keeps_every_row(tmp_path):
    corpus = read_corpus(written(tmp_path / "x.tsv", STRAY))
    assert list(zip(corpus.texts, corpus.labels)) == STRAY


@given(texts=st.lists(plain_texts, min_size=1, max_size=8))
def test_a_tsv_without_quoting_has_as_many_rows_as_lines(tmp_path_factory, texts):
    rows = [(f"{text} {i} {text}", "a") for i, text in enumerate(texts)]
    corpus = read_corpus(written(tmp_path_factory.mktemp("x") / "x.tsv", rows))
    assert len(corpus) == len(texts)


@given(
    texts=st.lists(st.text(st.sampled_from('a"\n\t,'), max_size=9), min_size=1, max_size=8),
    suffix=st.sampled_from([".csv", ".tsv"]),
)
def test_a_table_that_was_written_with_quotes_comes_back(tmp_path_factory, texts, suffix):
    if suffix == ".tsv":  # a tab in a field of several lines could as well divide rows
        texts = [text.replace("\t", "" if "\n" in text else "\t") for text in texts]
    path = tmp_path_factory.mktemp("x") / f"x{suffix}"
    texts = [f"{i} {text} {i}" for i, text in enumerate(texts)]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="," if suffix == ".csv" else "\t")
        writer.writerows([("text", "label"), *((text, "a") for text in texts)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        corpus = read_corpus(path)
    assert corpus.texts == tuple(" ".join(text.split()) for text in texts)


def test_a_tsv_with_a_short_row_between_stray_quotes_names_that_row(tmp_path):
    path = written(tmp_path / "x.tsv", [*STRAY[:2], ("no label",), *STRAY[2:]])
    assert refused(path).startswith(", line 4: 1 fields where the header has 2")


def test_a_quoted_field_of_a_tsv_may_have_several_lines_or_a_tab(tmp_path):
    path = written(tmp_path / "x.tsv", [('"two\nlines"', "a"), ('"a\ttab"', "b")])
    assert read_corpus(path).texts == ("two lines", "a tab")


def test_rows_of_a_csv_between_stray_quotes_are_told(tmp_path):
    path = written(tmp_path / "x.csv", STRAY, delimiter=",")
    with pytest.warns(UserWarning, match=r"lines 2 to 5 are read as one row, since a quote opens"):
        assert len(read_corpus(path)) == 2


def test_fields_of_several_lines_with_commas_are_no_cause_for_a_warning(tmp_path):
    rows = [('"Nice, really\ngood, I say"', "a"), ("fine", "b")]
    assert len(read_corpus(written(tmp_path / "x.csv", rows, delimiter=","))) == 2


def test_the_line_of_an_error_counts_the_lines_inside_fields(tmp_path):
    path = written(tmp_path / "x.csv", [('"two\nlines"', "a"), ("u",)], delimiter=",")
    assert refused(path).startswith(", line 4: 1 fields")


@pytest.mark.parametrize("again", ["text,label", "Text, label ", "\ufefftext,label"])
def test_repeated_headers_of_joined_files_are_left_out_and_told(again, tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(f"text,label\nhi,a\n{again}\nyo,b\n{again}\n")
    with pytest.warns(UserWarning, match=r"left out 2 rows \(line 3, 5\): the header once"):
        assert read_corpus(path).labels == ("a", "b")


def test_a_repeated_header_in_another_order_is_refused(tmp_path):
    path = written(tmp_path / "x.csv", [("hi", "a"), ("label", "text"), ("b", "yo")], ",")
    assert refused(path) == (
        ", line 3: the header once more, with its columns in another order (label, text); bring "
        "the joined files into one order"
    )


def test_empty_columns_and_rows_of_a_spreadsheet_are_left_out(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("text,label,,\nhi,a,,\n,,,\nyo,b,,,,\n")
    with pytest.warns(UserWarning, match=r"left out 1 row \(line 3\): all fields are empty"):
        assert read_corpus(path).texts == ("hi", "yo")


def test_the_index_that_pandas_writes_is_ignored(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(",text,label\n0,hi,a\n1,yo,b\n")
    assert read_corpus(path).texts == ("hi", "yo")


def test_a_value_beyond_the_named_columns_is_refused(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("text,label,,\nhi,a,,more\n")
    assert refused(path).startswith(", line 2: 4 fields where the header has 2")


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_field_may_be_huge(suffix, tmp_path):
    before = csv.field_size_limit()
    rows = [("x" * 200_000, "a"), ("short", "b")]
    path = written(tmp_path / f"x{suffix}", rows, "," if suffix == ".csv" else "\t")
    assert len(read_corpus(path).texts[0]) == 200_000
    assert csv.field_size_limit() == before


LOOK_ALIKE = {
    "composition": "cafe\u0301",
    "zero width": "ca\u200bf\u00e9",
    "byte-order mark": "\ufeffcaf\u00e9",
    "direction": "caf\u00e9\u200e",
}


@pytest.mark.parametrize("case", LOOK_ALIKE)
def test_labels_that_look_alike_are_one_class_and_told_once(case, tmp_path):
    other = LOOK_ALIKE[case]
    rows = [("s", "b"), ("t", "caf\u00e9"), ("u", other), ("v", other), ("w", "caf\u00e9")]
    path = written(tmp_path / "x.csv", rows, ",")
    with pytest.warns(UserWarning, match="1 label in several spellings") as caught:
        assert read_corpus(path).labels == ("b", *["caf\u00e9"] * 4)
    assert len(caught) == 1
    assert r"such as 'caf\xe9' in line 3 and" in str(caught[0].message)
    assert "in line 4; they count as one label, 'caf\u00e9'" in str(caught[0].message)


def test_white_space_inside_labels_does_not_count(tmp_path):
    path = written(tmp_path / "x.csv", [("t", "a\u00a0b"), ("u", "a  b"), ("v", "a b")], ",")
    with pytest.warns(UserWarning, match="1 label in several spellings"):
        assert set(read_corpus(path).labels) == {"a b"}


@pytest.mark.parametrize("twin", ["cafe\u0301 noir", "CAF\u00c9 noir", "caf\u00e9\u200b noir"])
def test_texts_that_look_alike_are_duplicates(twin, tmp_path):
    corpus = read_corpus(written(tmp_path / "x.csv", [("caf\u00e9 noir", "a"), (twin, "a")], ","))
    assert corpus.dropped == 1


def test_an_invisible_text_is_empty(tmp_path):
    path = written(tmp_path / "x.csv", [("\u200b", "a")], ",")
    assert refused(path).startswith(", line 2: column 'text' is empty")


@given(st.tuples(*[st.text(st.sampled_from("ab/\\"), max_size=4)] * 4))
def test_two_classes_never_have_one_name(parts):
    one, other = parts[:2], parts[2:]
    assert (class_name(one) == class_name(other)) == (one == other)


def test_a_class_is_named_by_its_domain_and_its_label():
    assert class_name(("hwu64", "alarm/query")) == "hwu64/alarm/query"


def test_a_title_before_the_header_is_named(tmp_path):
    for suffix, mark in ((".csv", ","), (".tsv", "\t")):
        path = tmp_path / f"sheet{suffix}"
        path.write_text(f"My texts{mark * 2}\ntext{mark}label{mark}\nhi{mark}a{mark}\n")
        with pytest.raises(InputError, match=r"line 2: this row looks like the header, .*'label'"):
            read_corpus(path)


def test_json_lines_of_joined_tables_lose_the_repeated_names_of_columns(tmp_path):
    rows = [("hi", "a"), ("Text", "label"), ("yo", "b"), ("text", "b")]
    path = tmp_path / "joined.jsonl"
    path.write_text("".join(json.dumps({"text": t, "label": c}) + "\n" for t, c in rows))
    with pytest.warns(UserWarning, match=r"left out 1 row \(line 2\): the names of the columns"):
        corpus = read_corpus(path)
    assert corpus.texts == ("hi", "yo", "text")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ab", "\uff41\uff42"), ("self-care", "self\u2011care"), ("don\u2019t", "don't"),
        ("fin", "\ufb01n"), ("paypal", "p\u0430ypal"), ("\u041e\u041a", "OK"),
    ],
)  # fmt: skip
def test_labels_that_look_alike_are_one_as_first_written(one, other, tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text(f"text,label\nhi,{one}\nyo,{other}\nzo,c\n")
    with pytest.warns(UserWarning, match=r"1 label in several spellings .* in line 2 .* line 3"):
        assert read_corpus(path).labels == (one, one, "c")
    with pytest.warns(UserWarning, match="1 label in several spellings"):
        assert read_several(path, ";").labels == [[one], [one], ["c"]]


def test_labels_that_differ_to_the_eye_stay_apart(tmp_path):
    labels = ["x2", "x\u00b2", "AB", "ab", "A", "\u0410", "caf\u00e9", "cafe", "\u0414\u0410"]
    path = tmp_path / "labels.csv"
    path.write_text("text,label\n" + "".join(f"t{i},{c}\n" for i, c in enumerate(labels)))
    assert read_corpus(path).labels == tuple(labels)


def test_labels_of_a_second_file_are_spelled_as_in_the_first(tmp_path):
    """Of several spellings that are known, each stays as it is."""
    path = tmp_path / "test.csv"
    path.write_text("text,label\nhi,don't\nyo,ok\nzo,new\n")
    with pytest.warns(UserWarning, match=r'1 label spelled otherwise .*"don\'t" in line 2') as told:
        corpus = read_corpus(path, known_labels=["don\u2019t", "ok", "o\u043a"])
    assert corpus.labels == ("don\u2019t", "ok", "new")
    assert len(told) == 1
    with pytest.warns(UserWarning, match="1 label spelled otherwise"):
        several = read_several(path, ";", known_labels=["don\u2019t"])
    assert several.labels == [["don\u2019t"], ["ok"], ["new"]]
