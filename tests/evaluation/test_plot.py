"""Figures that a paper could print: axes with units, names beside lines, intervals as bands."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.image import imread

from rnnopt.evaluation.inspection import Inspection, Surface
from rnnopt.evaluation.report import plot
from rnnopt.evaluation.report.style import COLOURS, line_look, spread

BUDGETS = ("1", "5", "20")


def method(mean, **facts):
    cells = {b: {"mean": mean + i / 10, "ci95": 0.02} for i, b in enumerate(BUDGETS)}
    return {"accuracy": cells, "loss": cells, **facts}


METHODS = {
    "learned": method(0.5),
    "adamw": method(0.4, tuned={}),
    "sgd": method(0.395),
    "logistic": method(0.3, frozen=True),
}
INSPECTION = Inspection(
    coordinates={"head": 8, "lora": 16},
    step_size={"head": [1e-3, 2e-3], "lora": [0.0, 1e-4]},
    adam_distance={"head": [0.0, 0.1], "lora": [None, 0.2]},
    losses=[1.0, 0.5],
    surface=Surface(
        "head", 1, [-1.0, 0.0, 1.0], [0.0, 1.0], [[0.1, None], [0.0, 0.0], [None, -0.1]]
    ),
)
CHECKS = [
    {"step": s, "accuracy": s / 9, "f1": s / 10, "loss": None if s > 5 else 0.4} for s in (0, 4, 8)
]
RECORDS = [
    {"meta_step": 1, "meta_loss": 1.5},
    {"meta_step": 2, "meta_loss": None},
    {"meta_step": 3, "meta_loss": 1.0, "validation": {"score": 1.2}},
]
DRAWINGS = {
    "learning": lambda path: plot.plot_learning(RECORDS, path),
    "comparison": lambda path: plot.plot_comparison({"methods": METHODS}, "5-way", path),
    "losses": lambda path: plot.plot_losses([1.0, None, 0.5], path),
    "checks": lambda path: plot.plot_losses([1.0, None, 0.5], path, CHECKS),
    "inspection": lambda path: plot.plot_inspection(INSPECTION, "5-way", path),
}


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws by name, and gives back the figure and its file."""

    def draw(name):
        figures = []
        monkeypatch.setattr(plot.plt, "close", figures.append)
        DRAWINGS[name](tmp_path / "x.png")
        monkeypatch.undo()
        plot.plt.close(figures[0])
        return figures[0], tmp_path / "x.png"

    return draw


@pytest.mark.parametrize("name", DRAWINGS)
def test_every_axis_is_named_and_no_figure_has_a_legend(name, drawn):
    figure, path = drawn(name)
    for axes in figure.axes:
        assert axes.get_ylabel()
        assert axes.get_xlabel() or axes.get_label() == "<colorbar>"
        assert axes.get_legend() is None
    assert imread(path).shape[1] <= 1800


def names_of(axes):
    return {text.get_text(): text for text in axes.texts}


def test_each_method_is_named_beside_its_line_in_its_colour(drawn):
    figure, _ = drawn("comparison")
    for axes in figure.axes:
        names = names_of(axes)
        assert list(names) == ["learned", "adamw*", "sgd", "logistic"]
        for line, text in zip(axes.lines, names.values()):
            assert to_hex(line.get_color()) == to_hex(text.get_color())


def test_names_beside_lines_do_not_overlap(drawn):
    figure, _ = drawn("comparison")
    renderer = FigureCanvasAgg(figure).get_renderer()
    for axes in figure.axes:
        boxes = sorted(
            (text.get_window_extent(renderer) for text in axes.texts), key=lambda box: box.y0
        )
        for low, high in itertools.pairwise(boxes):
            assert low.y1 <= high.y0 + 1.5


def test_a_band_covers_the_interval(drawn):
    figure, _ = drawn("comparison")
    (band, *_) = figure.axes[0].collections
    corners = {(round(x), round(y, 6)) for x, y in band.get_paths()[0].vertices}
    assert {(1, 0.48), (1, 0.52), (20, 0.68), (20, 0.72)} <= corners


def test_a_loss_that_grew_beyond_all_others_gets_a_logarithmic_axis(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plot.plt, "close", figures.append)
    far = {**METHODS, "sgd": method(500.0)}
    plot.plot_comparison({"methods": far}, "", tmp_path / "x.png")
    assert [axes.get_yscale() for axes in figures[0].axes] == ["linear", "log"]


def test_the_first_line_has_its_colour_to_itself_and_all_looks_differ():
    looks = [line_look(i) for i in range(19)]
    assert [look["color"] for look in looks].count(COLOURS[0]) == 1
    assert len({str(look) for look in looks}) == len(looks)


@given(st.lists(st.floats(0, 1), max_size=12), st.floats(0.01, 0.08))
def test_labels_keep_their_distance_order_and_range(wanted, gap):
    found = spread(wanted, gap)
    order = np.argsort(wanted, kind="stable")
    assert all(
        b - a >= gap * 0.999 for a, b in zip(np.array(found)[order], np.array(found)[order][1:])
    )
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in found)


def test_labels_with_room_stay_where_they_belong():
    assert spread([0.9, 0.1, 0.5], 0.1) == pytest.approx([0.9, 0.1, 0.5])
    assert spread([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    assert math.isclose(sum(spread([0.4, 0.41, 0.42], 0.1)), 1.23)
