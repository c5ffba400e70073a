"""Progress on a terminal; where stderr is none, a plain line a minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

_SILENCE = 60.0  # seconds between plain lines


class Bar:
    """How far a loop is.

    Args:
        progress: of rich.
        unit: what is counted.
        total: of them; None while it is not known.
        done: before the first call.
    """

    def __init__(self, progress: Progress, unit: str, total: int | None, done: int) -> None:
        self._progress, self._unit, self._done, self._total = progress, unit, done, total
        self._task = progress.add_task(unit, total=total, completed=done, note="")
        self._told = time.monotonic()

    def at(self, done: int, total: int | None = None, note: str = "") -> None:
        """Show that so many are done.

        Args:
            done: of the units.
            total: a new one, where it has changed.
            note: to stand behind the bar.
        """
        self._done, self._total = done, total or self._total
        self._progress.update(self._task, completed=done, total=self._total, note=note)
        if self._progress.disable and time.monotonic() - self._told > _SILENCE:
            self._told = time.monotonic()
            of = "" if self._total is None else f" of {self._total}"
            print(f"{self._unit} {done}{of} {note}".rstrip(), file=sys.stderr)

    def advance(self, total: int | None = None, note: str = "") -> None:
        """Show that one more is done; see `at`."""
        self.at(self._done + 1, total, note)


def _progress(*columns: ProgressColumn, gone_at_end: bool = False, shown: bool = True) -> Progress:
    return Progress(
        *columns,
        console=Console(stderr=True),
        disable=not (shown and sys.stderr.isatty()),
        redirect_stdout=sys.stdout.isatty(),  # a pipe gets its lines itself
        transient=gone_at_end,
    )


@contextmanager
def progress_bar(
    unit: str, total: int | None = None, done: int = 0, shown: bool = True
) -> Iterator[Bar]:
    """A bar on stderr for what takes long; what is printed meanwhile stands above it.

    Args:
        unit: what is counted.
        total: of them; None while it is not known.
        done: at the start.
        shown: whether there is one to see.
    """
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with _progress(*columns, shown=shown) as progress:
        yield Bar(progress, unit, total, done)


@contextmanager
def waiting(what: str, shown: bool = True) -> Iterator[None]:
    """A sign on a terminal that something goes on whose end is not known.

    Args:
        what: goes on.
        shown: whether this process speaks.
    """
    columns = SpinnerColumn(), TextColumn("{task.description}")
    with _progress(*columns, gone_at_end=True, shown=shown) as progress:
        progress.add_task(what, total=None)
        yield
