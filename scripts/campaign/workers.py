"""Four processes of one meta-training: one is killed, one is slow, one hangs."""

from __future__ import annotations

import random
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from children import Child, Outcome, run
from material import Job, Material, jobs

PROCESSES = 4
LONGEST = 60.0  # seconds until the others have ended and one says why


def part(material: Material, folder: Path, seed: int, small: bool) -> dict[str, Any]:
    """Each accident, then the same run with fewer processes.

    Returns:
        Of each accident: the cases, how many ended as they should, the longest time until the
        others had ended, and what went wrong.
    """
    chance = random.Random(seed)
    job = jobs(material)[0]
    job = Job(job.name, lambda place: [*job_words(material, place)], job.result)
    (folder / "whole").mkdir(parents=True)
    run(job.words(folder / "whole"))
    expected = job.result(folder / "whole")
    figures: dict[str, dict[str, Any]] = {}
    for name, accident in {"killed": _killed, "slow": _slow, "hung": _hung}.items():
        count = 1 if small or name == "hung" else 3
        seconds, bad = [0.0], []
        for case in range(count):
            place = folder / f"{name}-{case}"
            place.mkdir()
            took, wrong = accident(job, place, expected, chance)
            seconds.append(took)
            bad += [f"{case}: {wrong}"] if wrong else []
        figures[name] = {
            "cases": count, "right": count - len(bad), "longest, s": round(max(seconds), 1),
            "bad": bad,
        }  # fmt: skip
    return figures


def job_words(material: Material, place: Path) -> list[object]:
    """Meta-training whose tasks are shared out."""
    return [
        "meta-train", "--data", material.data, "--encoder", material.encoder, "--ways", 2,
        "--shots", 2, "--queries", 3, "--steps", 2, "--tune", "head", "--meta-steps", 12,
        "--tasks", 12, "--validate-every", 6, "--validation-tasks", 4, "--checkpoint-every", 1,
        "--output", place / "run", "--resume",
    ]  # fmt: skip


def _team(words: list[object], size: int) -> list[Child]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        Child(
            words,
            environment={
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            },
        )
        for rank in range(size)
    ]  # fmt: skip


def _underway(place: Path) -> None:
    """Wait for the first checkpoint."""
    begun = time.monotonic()
    while not (place / "run" / "checkpoint.safetensors").exists():
        if time.monotonic() - begun > 120:
            raise RuntimeError("the run does not begin")
        time.sleep(0.05)


def _after(
    job: Job, place: Path, chance: random.Random, do: Callable[[Child], None], others: int
) -> tuple[float, list[Outcome], int]:
    """Do something to one process.

    Returns:
        (the seconds until the others have ended, all ends with its own last, its rank).
    """
    children = _team(job.words(place), PROCESSES)
    _underway(place)
    victim = chance.randrange(PROCESSES)
    begun = time.monotonic()
    do(children[victim])
    left = [child for rank, child in enumerate(children) if rank != victim]
    ends = [child.wait(600) for child in left[:others]]
    seconds = time.monotonic() - begun
    if others == PROCESSES - 1:
        children[victim].send(signal.SIGKILL)
    ends.append(children[victim].wait(600))
    return seconds, ends, victim


def _stopped_well(
    job: Job, place: Path, expected: str, seconds: float, ends: list[Outcome], says: str
) -> str:
    told = sum(says in end.text and ": error: " in end.text for end in ends[:-1])
    if any(end.code not in (2, -6) for end in ends[:-1]) or not told:
        return f"ends {[(end.code, end.text[-300:]) for end in ends]}"
    if seconds > LONGEST:
        return f"{seconds:.0f} s until the others ended"
    ends = [child.wait(300) for child in _team(job.words(place), PROCESSES - 1)]
    if any(end.code for end in ends):
        return f"resumed: {[(end.code, end.text[-300:]) for end in ends]}"
    return ""  # sums over three processes round otherwise, so its bits are its own


def _killed(job: Job, place: Path, expected: str, chance: random.Random) -> tuple[float, str]:
    seconds, ends, _ = _after(job, place, chance, lambda c: c.send(signal.SIGKILL), 3)
    return seconds, _stopped_well(job, place, expected, seconds, ends, "was lost")


def _hung(job: Job, place: Path, expected: str, chance: random.Random) -> tuple[float, str]:
    seconds, ends, victim = _after(job, place, chance, lambda c: c.send(signal.SIGSTOP), 3)
    return seconds, _stopped_well(job, place, expected, seconds, ends, f"process {victim} of 4")


def _slow(job: Job, place: Path, expected: str, chance: random.Random) -> tuple[float, str]:
    def pause(child: Child) -> None:
        for _ in range(4):
            child.send(signal.SIGSTOP)
            time.sleep(2)
            child.send(signal.SIGCONT)
            time.sleep(0.2)

    children = _team(job.words(place), PROCESSES)
    _underway(place)
    begun = time.monotonic()
    pause(chance.choice(children))
    ends = [child.wait(600) for child in children]
    wrong = [f"exit {end.code}: {end.text[-300:]}" for end in ends if end.code]
    return time.monotonic() - begun, "; ".join(wrong)
