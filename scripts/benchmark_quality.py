"""A rule against every baseline, cell by cell, by `rnnopt compare`; and the table of it.

    python scripts/benchmark_quality.py --data DATA --encoder MINILM --output quality --rule RULE
    python scripts/benchmark_quality.py --output quality --table
    python scripts/benchmark_quality.py --output quality --fill README.md

A cell is a set of texts, what trains, ways, shots and pooling. DATA holds one folder for each of
the sets below; MINILM is all-MiniLM-L6-v2, a hub name or a folder. --output gets NAME.json,
NAME.png and NAME.json.runs for each cell. Cheap cells come first; a cell that is finished for this
rule is skipped, and one that was stopped goes on, so a run may be cut into pieces with
--time-limit. Another rule reuses the runs of the baselines. Where a set has fewer classes than
ways, all of them are taken, and the table says how many.

Time: on one core of a server processor minutes for a head, hours for each cell of LoRA or all
weights; minutes for each on a GPU. Memory: 2 GiB.
Last line: how many cells are finished.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import json
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark import progress
from quality_table import TRAINS, filled, quality_table, short_table

from rnnopt.cli.main import main as rnnopt
from rnnopt.evaluation.baselines import BASELINES
from rnnopt.rules.files import SHIPPED_HEAD_RULE, SHIPPED_RULE, load_rule, rule_fingerprint
from rnnopt.storage.files import write_atomically
from rnnopt.tasks.text.frozen import FROZEN

INTERRUPTED = 130
SETS = {"clinc150": "CLINC150", "stackoverflow20": "StackOverflow"}  # by their folders
SHAPES = ((5, 1), (10, 5))  # ways, shots
EVERY = (*BASELINES, *FROZEN)
TUNED_STEPS = 40  # of the baselines that are tuned
SAME = ("queries", "steps", "max_length")  # options that a finished cell was run with
# of a step with all weights, by one core
COST = {"head": 0.02, "lora": 0.7, "full": 1.0}


@dataclass(frozen=True)
class Cell:
    """One comparison.

    Attributes:
        group: "core", or "mean" for mean pooling.
        data: a name in `SETS`.
        tune, ways, shots, pooling: as `rnnopt compare` has them.
    """

    group: str
    data: str
    tune: str
    ways: int
    shots: int
    pooling: str

    @property
    def name(self) -> str:
        return f"{self.group}-{self.data}-{self.tune}-{self.ways}way-{self.shots}shot"

    def title(self, result: Mapping[str, Any]) -> str:
        """In the short table."""
        ways = result["setting"].get("ways_used", {"report": self.ways})["report"]
        pooling = ", mean pooling" if self.pooling == "mean" else ""
        return (
            f"{SETS[self.data]}, {TRAINS[self.tune]}{pooling}, {ways}-way {self.shots}-shot "
            f"({result['episodes']} episodes)"
        )

    @property
    def cost(self) -> float:
        """About how long it takes, in no unit."""
        return COST[self.tune] * self.ways * self.shots

    def arguments(self, options: argparse.Namespace) -> list[str]:
        """Of `rnnopt compare`."""
        given = {
            "data": Path(options.data) / self.data, "encoder": options.encoder,
            "rule": self.rule(options),
            "tune": self.tune, "ways": self.ways, "shots": self.shots, "pooling": self.pooling,
            "queries": options.queries, "steps": options.steps,
            "tuned-steps": max(TUNED_STEPS, options.steps),
            "episodes": options.episodes, "tuning-episodes": options.tuning_episodes,
            "baselines": ",".join(options.baselines or EVERY),
            "max-length": options.max_length, "device": options.device,
            "precision": options.precision,
            "json": self.file(options), "plot": self.file(options).with_suffix(".png"),
        }  # fmt: skip
        words = [(f"--{key}", str(value)) for key, value in given.items() if value is not None]
        flags = ["--fewer-ways", *(["--allow-overlap"] if options.allow_overlap else [])]
        return ["compare", *itertools.chain(*words), *flags]

    def file(self, options: argparse.Namespace) -> Path:
        return Path(options.output) / f"{self.name}.json"

    def rule(self, options: argparse.Namespace) -> Path:
        """The rule's file: --rule, or the shipped one for what trains."""
        shipped = SHIPPED_HEAD_RULE if self.tune == "head" else SHIPPED_RULE
        return shipped if options.rule is None else Path(options.rule)

    def finished(self, options: argparse.Namespace) -> bool:
        """Whether its file has all that is asked for, of the rule as it is now."""
        if not self.file(options).exists():
            return False
        result = json.loads(self.file(options).read_text())
        setting = result["setting"]
        return (
            setting["rule"] == rule_fingerprint(load_rule(self.rule(options)))
            and all(setting[name] == getattr(options, name) for name in SAME)
            and result["episodes"] >= options.episodes
            and set(options.baselines or EVERY) <= result["methods"].keys()
        )


def all_cells() -> list[Cell]:
    """Cheap ones first."""
    cells = [
        Cell("core", data, tune, ways, shots, "model")
        for data, tune, (ways, shots) in itertools.product(SETS, COST, SHAPES)
    ]
    cells += [Cell("mean", data, "lora", 10, 5, "mean") for data in SETS]
    return sorted(cells, key=lambda cell: cell.cost)


def run(cells: Sequence[Cell], options: argparse.Namespace) -> int:
    """Run what isn't finished, until the time is up.

    Returns:
        0, also if the time was up; 2 if a cell was refused; 130 after Ctrl-C.
    """
    for file in {cell.rule(options) for cell in cells}:
        load_rule(file)  # one that can't be used is refused before anything runs
    left = [cell for cell in cells if not cell.finished(options)]
    refused: list[str] = []
    with Deadline(options.time_limit) as deadline:
        try:
            _run_all(left, options, refused)
        except KeyboardInterrupt:
            if not deadline.passed:
                return INTERRUPTED
            progress("the time is up; the same command goes on from here")
    finished = sum(cell.finished(options) for cell in cells)
    print(f"{finished} of {len(cells)} cells are finished; refused: {', '.join(refused) or 'none'}")
    return 2 if refused else 0


def _run_all(left: Sequence[Cell], options: argparse.Namespace, refused: list[str]) -> None:
    started, total, done = time.monotonic(), sum(cell.cost for cell in left), 0.0
    for number, cell in enumerate(left, start=1):
        progress(f"cell {number} of {len(left)} to run: {cell.name}")
        code = rnnopt(cell.arguments(options))
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        if code:
            refused.append(cell.name)
        done += cell.cost
        elapsed = time.monotonic() - started
        progress(f"{elapsed / 60:.1f} min, about {elapsed * (total / done - 1) / 60:.0f} left")


class Deadline:
    """Raises KeyboardInterrupt, which every command takes for a stop, once the time is up.

    Where it can't be raised, in a finalizer or a callback of the collector, Python reports it to
    `sys.unraisablehook` and goes on; it is raised again then.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds, self.passed = seconds, False

    def __enter__(self) -> Deadline:
        if self.seconds is not None:
            self.before = signal.signal(signal.SIGALRM, self._stop), sys.unraisablehook
            sys.unraisablehook = self._raise_again
            signal.setitimer(signal.ITIMER_REAL, self.seconds)
        return self

    def __exit__(self, *error: object) -> None:
        if self.seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            handler, sys.unraisablehook = self.before
            signal.signal(signal.SIGALRM, handler)

    def _stop(self, *_: Any) -> None:
        self.passed = True
        raise KeyboardInterrupt

    def _raise_again(self, unraisable: Any) -> None:
        if self.passed and unraisable.exc_type is KeyboardInterrupt:
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        else:
            self.before[1](unraisable)


def tell(cells: Sequence[Cell], options: argparse.Namespace) -> None:
    """Print the table, and fill in the short one.

    Raises:
        ValueError: no cell is finished, or the file to fill has no place for the table.
        OSError: that file can't be read or written.
    """
    files = {cell.name: cell.file(options) for cell in cells}
    results = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    if not results:
        raise ValueError(f"--output {options.output}: no finished cell there; run some first")
    if options.table:
        print(quality_table(results))
    if options.fill:
        titles = {
            cell.name: cell.title(results[cell.name])
            for cell in sorted(cells, key=lambda cell: (list(COST).index(cell.tune), cell.name))
            if cell.name in results
        }
        text = options.fill.read_text(encoding="utf-8")
        write_atomically(options.fill, filled(text, short_table(results, titles)).encode())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="for the cells' files")
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    parser.add_argument(
        "--fill", type=Path, metavar="FILE",
        help="write the short table of core and mean cells between FILE's two comments for it",
    )  # fmt: skip
    parser.add_argument("--data", metavar="FOLDER", help="that holds the folders of the sets")
    parser.add_argument("--encoder", metavar="NAME_OR_PATH")
    parser.add_argument("--rule", help="[the one shipped for what trains]")
    parser.add_argument(
        "--cells", nargs="+", default=["*"], metavar="PATTERN",
        help='names of cells, with wildcards, such as "core-*-head-*" [all]',
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="print the names of the cells")
    parser.add_argument("--episodes", type=int, default=40, help="test episodes a cell [40]")
    parser.add_argument("--tuning-episodes", type=int, default=4, metavar="E", help="[4]")
    parser.add_argument("--queries", type=int, default=5, help="query texts a class [5]")
    parser.add_argument("--steps", type=int, default=20, help="of what is not tuned [20]")
    parser.add_argument("--max-length", type=int, default=64, help="tokens of a text [64]")
    parser.add_argument(
        "--baselines", type=lambda text: tuple(text.split(",")), help="instead of a cell's own"
    )
    for name in ("--device", "--precision"):
        parser.add_argument(name, default="auto", help="as `rnnopt compare` has it [auto]")
    parser.add_argument(
        "--time-limit", type=float, metavar="SECONDS", help="stop after that [none]"
    )
    parser.add_argument(
        "--allow-overlap", action="store_true",
        help="judge by classes that the rule has seen too; the table says so",
    )  # fmt: skip
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    cells = [
        cell
        for cell in all_cells()
        if any(fnmatch.fnmatchcase(cell.name, pattern) for pattern in options.cells)
    ]
    if not cells:
        parser.error(f"--cells {' '.join(options.cells)}: no cell has such a name, see --list")
    if options.list:
        print("\n".join(cell.name for cell in cells))
        return 0
    if options.table or options.fill:
        try:
            tell(cells, options)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        return 0
    if options.data is None or options.encoder is None:
        parser.error("--data and --encoder are needed, unless --table, --fill or --list is given")
    return run(cells, options)


if __name__ == "__main__":
    sys.exit(main())
