"""Tables that are Markdown, and confusion matrices that can be read."""

import io
import re
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rnnopt.evaluation.report.tables import WIDEST, comparison_table, confusion_text, show, table

cells = st.lists(st.text(max_size=12), min_size=3, max_size=3)


@given(header=cells, rows=st.lists(cells, max_size=5))
def test_every_line_has_every_column_and_the_same_width(header, rows):
    lines = table(header, rows).split("\n")
    assert len(lines) == 2 + len(rows)
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 4 for line in lines)
    assert len(set(map(len, lines))) == 1


def test_numbers_stand_on_the_right():
    assert table(["a", "n"], [["x", 1], ["y", 10.5]]) == (
        "| a   |    n |\n| --- | ---: |\n| x   |    1 |\n| y   | 10.5 |"
    )


def test_a_confusion_matrix_is_read_row_by_row():
    text = confusion_text(["yes", "no"], np.array([[5, 2], [1, 7]]))
    assert text.split("\n")[2:] == [
        "| yes                |   5 |   2 |",
        "| no                 |   1 |   7 |",
    ]


def test_of_many_labels_the_most_confused_pairs_are_listed():
    count = WIDEST + 1
    matrix = np.diag(np.full(count, 9))
    matrix[3, 5], matrix[5, 3] = 2, 4
    text = confusion_text([f"l{i}" for i in range(count)], matrix)
    assert [line.split() for line in text.split("\n")[2:]] == [
        ["|", "l5", "|", "l3", "|", "4", "|"],
        ["|", "l3", "|", "l5", "|", "2", "|"],
    ]


def test_a_comparison_has_a_row_for_each_method_and_each_paired_difference():
    cell = {"mean": 0.5, "ci95": 0.01}
    methods = {"learned": {m: {"1": cell, "20": cell} for m in ("accuracy", "loss")}}
    methods["adamw"] = {m: {"20": cell} for m in ("accuracy", "loss")}
    paired = {"adamw": {m: {"20": cell} for m in ("accuracy", "loss")}}
    text = comparison_table({"methods": methods, "paired": paired})
    assert text.split("\n")[:5] == [
        "| accuracy after | 1 | 20 |",
        "|---|---:|---:|",
        "| learned | 0.500 ± 0.010 | 0.500 ± 0.010 |",
        "| adamw |  | 0.500 ± 0.010 |",
        "| *learned - adamw, paired* |  | +0.500 ± 0.010 |",
    ]


WIDE = table(["name", "n", "text"], [["a | b [red]", 10, "word " * 40], ["*c*", 2, "x"]])
TEXT = f"before [bold] and a line of its own\n\n{WIDE}\nafter"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, columns):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    show(TEXT)
    return re.sub(r"\x1b\[[0-9;]*m", "", sys.stdout.getvalue())


@pytest.mark.parametrize("columns", [60, 100, 200])
def test_a_table_on_a_terminal_is_at_most_100_columns_wide_and_loses_nothing(monkeypatch, columns):
    text = shown(monkeypatch, columns)
    assert max(len(line.rstrip()) for line in text.split("\n")) <= min(columns, 100)
    assert text.count("word") == 40
    assert "a | b [red]" in text and "before [bold] and a line of its own\n" in text
    assert "\\|" not in text and "*c*" not in text
    assert text.rstrip().endswith("after")


def test_a_table_in_a_pipe_stays_markdown(capsys):
    show(TEXT)
    assert capsys.readouterr().out == TEXT + "\n"
