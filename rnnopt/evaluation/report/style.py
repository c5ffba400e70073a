"""The one look of all figures: matplotlib settings, sizes and colours."""

from __future__ import annotations

from typing import Any

COLUMN = 3.4  # width of a column of a two-column paper, in inches; a figure is one or two wide
HEIGHT = 2.5  # of a figure, in inches

# Okabe & Ito 2008, "Color Universal Design": told apart with any common colour blindness. Yellow is
# left out, since it is hard to see on white.
BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, BLACK, GREY = "#E69F00", "#56B4E9", "#000000", "#767676"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)))  # a second and a third round of the colours
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
BAND = 0.18  # opacity of a 95 % interval

STYLE: dict[str, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "figure.titlesize": 8,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3,
    "savefig.dpi": 200,
    "image.cmap": "RdBu",
}


def line_look(index: int) -> dict[str, Any]:
    """Colour, marker and dashes of the line with this number; 19 lines can be told apart.

    Args:
        index: 0 for the line that the figure is about, which has its colour to itself.
    """
    turn, place = divmod(index - 1, len(COLOURS) - 1) if index else (0, -1)
    place += 1
    return {
        "color": COLOURS[place],
        "marker": MARKERS[place],
        "linestyle": DASHES[turn % len(DASHES)],
    }


def spread(wanted: list[float], gap: float) -> list[float]:
    """Positions of labels that keep a distance and stay as near as possible to where they belong.

    Labels that would overlap form a group, which is centred on the mean of its wanted positions and
    moved into the range from 0 to 1 if it fits there.

    Args:
        wanted: where each label belongs, from 0 to 1, in any order.
        gap: the least distance of two labels.

    Returns:
        A position for each label, in the order of `wanted`.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(wanted)), key=lambda i: wanted[i]):
        groups.append([index])
        while len(groups) > 1:
            low, high = (_places(group, wanted, gap) for group in groups[-2:])
            if high[0] - low[-1] >= gap * (1 - 1e-9):
                break
            groups[-2:] = [groups[-2] + groups[-1]]
    found = [0.0] * len(wanted)
    for group in groups:
        for index, place in zip(group, _places(group, wanted, gap)):
            found[index] = place
    return found


def _places(group: list[int], wanted: list[float], gap: float) -> list[float]:
    half = gap * (len(group) - 1) / 2
    middle = sum(wanted[i] for i in group) / len(group)
    middle = min(max(middle, half), 1 - half) if half <= 0.5 else 0.5
    return [middle - half + gap * i for i in range(len(group))]
