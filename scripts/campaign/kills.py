"""SIGKILL at random moments, also between the writes of one save; then the same command again."""

from __future__ import annotations

import builtins
import functools
import io
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from children import Child, run
from material import Job, Material, half_written, jobs

_FIRST = 5  # the first writes of a job are always among the moments: folders are made there


def part(material: Material, folder: Path, seed: int, small: bool) -> dict[str, Any]:
    """Kill each job at its share of the moments, and let it end.

    Half of the moments are random times, half are writes: a file opened, forced to the disk or
    renamed. These are the first five of a job, and random ones.

    Returns:
        Of each job: the moments, how many ended with the bits of an undisturbed run, and how many
        left a file half written.
    """
    chance, figures = random.Random(seed), {}
    for job in jobs(material):
        count = 2 if small else 30
        figures[job.name] = _job(job, folder / job.name.replace(" ", "-"), count, chance)
    return figures


def _job(job: Job, folder: Path, count: int, chance: random.Random) -> dict[str, Any]:
    (folder / "whole").mkdir(parents=True)
    counter = folder / "events"
    whole = run(job.words(folder / "whole"), before=lambda: _at_event(-1, counter))
    if whole.code:
        raise RuntimeError(f"{job.name} fails undisturbed:\n{whole.text}")
    expected, events = job.result(folder / "whole"), len(counter.read_text())
    same, broken, bad = 0, 0, []
    for moment in range(count):
        place = folder / str(moment)
        place.mkdir()
        if moment % 2:
            told = _kill_at_time(job, place, chance.uniform(0, whole.seconds))
        else:
            write = moment // 2 if moment < 2 * _FIRST else chance.randrange(events)
            told = _kill_at_event(job, place, min(write, events - 1), counter)
            told = f"{told} of {events}"
        halves = half_written(place)
        broken += bool(halves)
        ended = run(job.words(place))
        finished = "not an empty folder" in ended.text or "something in it" in ended.text
        right = (ended.code == 0 or finished) and _result(job, place) == expected
        same += right
        if halves or not right:
            bad.append(f"{told}: half written {halves}, then {ended.code} {ended.text[-300:]}")
    return {"moments": count, "same bits": same, "half written": broken, "bad": bad}


def _result(job: Job, place: Path) -> str:
    try:
        return job.result(place)
    except (OSError, ValueError) as error:
        return f"no result: {error}"


def _kill_at_time(job: Job, place: Path, after: float) -> str:
    child = Child(job.words(place))
    time.sleep(after)
    child.send(signal.SIGKILL)
    child.wait()
    return f"after {after:.2f} s"


def _kill_at_event(job: Job, place: Path, number: int, counter: Path) -> str:
    run(job.words(place), before=lambda: _at_event(number, counter))
    return f"at write {number}"


def _at_event(number: int, counter: Path) -> None:
    """Let this process kill itself at its write of this number; count all writes if negative."""
    seen = [0]
    if number < 0:
        counter.write_text("")
    file = os.open(counter, os.O_WRONLY | os.O_APPEND)

    def event() -> None:
        if seen[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        seen[0] += 1
        if number < 0:
            os.write(file, b".")

    def watched(function: Callable[..., Any], after: bool) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            mode = args[1] if len(args) > 1 else kwargs.get("mode", "r")
            if not after:
                event()
            result = function(*args, **kwargs)
            if after and isinstance(mode, str) and set(mode) & set("wax+"):
                event()  # the file is there, and nothing in it
            return result

        return call

    for name in ("replace", "fsync", "mkdir"):
        setattr(os, name, watched(getattr(os, name), after=False))
    opened = watched(io.open, after=True)
    io.open = builtins.open = opened  # type: ignore[assignment]
