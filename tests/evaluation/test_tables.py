"""Tables that are Markdown, and confusion matrices that can be read."""

import re

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rnnopt.evaluation.report.tables import WIDEST, confusion_text, table

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
