"""A full disk, a read-only folder, two runs in one folder, a clock set back, a folder moved."""

from __future__ import annotations

import ctypes
import functools
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from children import Child, Outcome, run
from material import Job, Material, half_written, jobs


def part(material: Material, folder: Path, seed: int, small: bool) -> dict[str, Any]:
    """Each job under each condition.

    Returns:
        Of each condition: the cases, how many ended with the right bits or one clear line, and
        what went wrong in the others.
    """
    chosen = jobs(material)[:2] if small else jobs(material)
    figures: dict[str, dict[str, Any]] = {}
    for job in chosen:
        base = folder / job.name
        base.mkdir(parents=True)
        whole = run(job.words(base))
        expected = job.result(base)
        for name, trial in TRIALS.items():
            counts = figures.setdefault(name, {"cases": 0, "right": 0, "bad": []})
            place = folder / f"{job.name}-{name}".replace(" ", "-")
            place.mkdir()
            for wrong in trial(job, place, expected, whole.seconds, random.Random(seed)):
                counts["cases"] += 1
                counts["right"] += not wrong
                counts["bad"] += [f"{job.name}: {wrong}"] if wrong else []
    return figures


def _right(job: Job, place: Path, expected: str, ended: Outcome) -> str:
    """What is wrong with a run that should have ended well; empty if nothing is."""
    if ended.code:
        return f"exit {ended.code}: {ended.text[-400:]}"
    return "" if job.result(place) == expected else "other bits"


def _clear(ended: Outcome, place: Path) -> str:
    if not ended.clear:
        return f"exit {ended.code}: {ended.text[-400:]}"
    return f"half written: {halves}" if (halves := half_written(place)) else ""


def _full_disk(
    job: Job, place: Path, expected: str, seconds: float, chance: random.Random
) -> list[str]:
    """Files can't grow beyond a size; then they can, and the command goes on."""
    wrong = []
    for size in (100, 3_000, 12_000):
        here = place / str(size)
        here.mkdir()
        ended = run(job.words(here), before=functools.partial(_files_at_most, size))
        halves = half_written(here)
        known = ended.code in (0, 2)
        again = run(job.words(here))
        finished = "not an empty folder" in again.text or "something in it" in again.text
        told = "" if known and not halves else f"exit {ended.code} with {size} bytes, {halves}"
        wrong.append(told or ("" if finished else _right(job, here, expected, again)))
    return wrong


def _files_at_most(size: int) -> None:
    """Let no file of this process grow beyond so many bytes."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)  # what is printed goes to a file as well, and would meet the limit first
    os.dup2(null, 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _read_only(
    job: Job, place: Path, expected: str, seconds: float, chance: random.Random
) -> list[str]:
    place.chmod(0o555)
    ended = run(job.words(place), before=_obey_permissions)
    place.chmod(0o755)
    return [_clear(ended, place) if ended.code else "wrote where it must not"]


def _obey_permissions() -> None:
    """Give up what lets root write anywhere: capset(2) without CAP_DAC_OVERRIDE and its kin."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, data)
    data[0] &= ~0b1110
    libc.capset(header, data)


def _two_at_once(
    job: Job, place: Path, expected: str, seconds: float, chance: random.Random
) -> list[str]:
    children = [Child(job.words(place)) for _ in range(2)]
    ends = [child.wait(120) for child in children]
    if all(end.clear for end in ends):
        last = run(job.words(place))  # takes up what both have left
        finished = "not an empty folder" in last.text or "something in it" in last.text
        if last.code == 0 or finished:
            return ["" if job.result(place) == expected else "other bits"]
        return [f"exit {last.code}: {last.text[-300:]}"]
    return [next(f"exit {end.code}: {end.text[-400:]}" for end in ends if not end.clear)]


def _stopped(job: Job, place: Path, seconds: float, chance: random.Random) -> None:
    child = Child(job.words(place))
    time.sleep(chance.uniform(0.3, 0.9) * seconds)
    child.send(signal.SIGKILL)
    child.wait()


def _clock_back(
    job: Job, place: Path, expected: str, seconds: float, chance: random.Random
) -> list[str]:
    _stopped(job, place, seconds, chance)
    for path in place.rglob("*"):  # as if they came from tomorrow
        os.utime(path, (time.time() + 86_400,) * 2)
    ended = run(job.words(place), before=_yesterday)
    finished = "not an empty folder" in ended.text or "something in it" in ended.text
    return ["" if finished else _right(job, place, expected, ended)]


def _yesterday() -> None:
    """Set this process's clock back by a day, and let it stand still at times."""
    now, steps = time.time, iter(range(10**9))
    time.time = lambda: now() - 86_400 - next(steps) % 7


def _moved(
    job: Job, place: Path, expected: str, seconds: float, chance: random.Random
) -> list[str]:
    (place / "here").mkdir()
    _stopped(job, place / "here", seconds, chance)
    shutil.move(place / "here", place / "there")
    ended = run(job.words(place / "there"))
    finished = "not an empty folder" in ended.text or "something in it" in ended.text
    return ["" if finished else _right(job, place / "there", expected, ended)]


TRIALS: dict[str, Callable[[Job, Path, str, float, random.Random], list[str]]] = {
    "full disk": _full_disk,
    "read-only folder": _read_only,
    "two runs at once": _two_at_once,
    "clock set back": _clock_back,
    "folder moved": _moved,
}
