r"""The head's rule meta-trained anew with one change at a time, on validation classes.

    python scripts/ablations_trained.py --data DATA --encoder MINILM --output ablations-trained

Each variant is the run of scripts/meta_train.py, seed and all, with one thing changed; its best
rule stands against the shipped one in the cells of scripts/ablations.py. DATA is a folder that
holds the sources of meta_train.py. --only takes some of the variants; --output keeps what is
finished, and what was stopped goes on from there.

Time: on one core of a server processor 8 minutes for a variant and a minute for its rows. Prints a
Markdown table like that of ablations.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple, cast

import torch
from ablations import SHIPPED, arguments, rows
from meta_train import RECIPE, SOURCES, meta_train

from rnnopt.rules.files import SHIPPED_HEAD_RULE, load_rule
from rnnopt.rules.lstm import CoordinateLSTM


class Change(NamedTuple):
    """What a variant does otherwise than the recipe."""

    options: str = ""  # the last of an option counts
    without: str = ""  # an option that the recipe leaves out
    sources: tuple[str, ...] = SOURCES
    hidden_size: int = 8


CHANGES = {
    "first order": Change(without="--exact head"),
    "one source (CLINC150)": Change(sources=SOURCES[:1]),
    "meta-loss on the support set": Change("--query-weight 0 --support-weight 1"),
    "no LSTM": Change(hidden_size=0),
    "hidden size 4": Change(hidden_size=4),
    "hidden size 16": Change(hidden_size=16),
    "hidden size 32": Change(hidden_size=32),
    "8 steps unrolled": Change("--steps 8"),
    "meta-loss not calibrated": Change("--calibrated 0 --sure-from 1"),
    "full batches only": Change("--batch-size 1000"),
    # second order takes all coordinates
    "first order, 256 coordinates": Change("--coordinates 256", without="--exact head"),
}


def changed(change: Change) -> list[str]:
    """The recipe's options with the change.

    Raises:
        ValueError: the recipe lacks what is to be left out.
    """
    recipe = RECIPE.replace("\n", " ")
    if change.without not in recipe:
        raise ValueError(f"the recipe has no {change.without!r} to leave out")
    return [*recipe.replace(change.without, "").split(), *change.options.split()]


def trained(change: Change, data: Path, encoder: str, output: Path) -> CoordinateLSTM:
    """The best rule of a variant's run, which begins, goes on or has ended."""
    output.parent.mkdir(parents=True, exist_ok=True)
    code = meta_train(
        data,
        encoder,
        output,
        resume=True,
        sources=change.sources,
        recipe=changed(change),
        hidden_size=change.hidden_size,
    )
    if code != 0:
        sys.exit(code)
    return cast(CoordinateLSTM, load_rule(output))


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="+", choices=tuple(CHANGES), default=tuple(CHANGES))
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in meta_train.py
    rules = {SHIPPED: cast(CoordinateLSTM, load_rule(SHIPPED_HEAD_RULE))}
    for name in options.only:
        folder = options.output / "".join(c if c.isalnum() else "-" for c in name)
        rules[name] = trained(CHANGES[name], options.data, options.encoder, folder)
    table = rows(rules, options.data, options.encoder, "head", options.episodes, options.output)
    for row in table:
        print(row, flush=True)
