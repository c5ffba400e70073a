"""A file that keeps the finished runs of a comparison."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rnnopt.errors import InputError
from rnnopt.storage.files import parse_json, write_atomically
from rnnopt.tasks.adaptation import Adaptation

_CHECK = "check"


class Journal:
    """A file that keeps the finished runs of a comparison.

    A comparison that was stopped continues after its last finished run. A comparison of another
    rule in the same setting uses the baselines' runs that are already in the file.

    Args:
        path: the file, in JSON lines. Its first line holds `facts`.
        facts: JSON-compatible facts, all that a run depends on beside its name.

    Raises:
        InputError: the file can't be read or written, or its runs depend on other facts.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self.path = path
        self._runs: dict[str, Any] = {}
        head = json.dumps(dict(facts), sort_keys=True)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_text() if path.exists() else ""
            if head.startswith(content):  # new, or its first line was cut off
                write_atomically(path, f"{head}\n".encode())
                content = ""
            elif not content.endswith("\n"):  # a crash cut the last line off
                self._append("")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"can't use {path}: {error}; choose another --json") from error
        lines = content.splitlines()
        if lines and lines[0] != head:
            raise InputError(
                f"{path} holds the runs of another comparison{_difference(lines[0], facts)}; "
                "choose another --json, or delete the file"
            )
        for line in lines[1:]:
            self._remember(line)

    def run(self, name: str, budgets: Sequence[int], adapt: Callable[[], Adaptation]) -> Adaptation:
        """Return a run from the file, or run `adapt` and add its result to the file.

        Args:
            name: the name of the run.
            budgets: the numbers of steps that the run must have scores at.
            adapt: makes the run if the file lacks it.

        Raises:
            InputError: the file can't be written.
        """
        scored = self._runs.get(name, {"scores": {}})["scores"]
        if not {str(b) for b in budgets} <= scored.keys():
            done = adapt()
            entry = {
                "run": name,
                "scores": {str(b): scores for b, scores in done.scores.items()},
                "seconds": done.seconds_per_step,
                "undone": done.undone,
            }
            self._append(json.dumps({**entry, _CHECK: _check(entry)}))
            self._runs[name] = entry
        entry = self._runs[name]
        scores = {int(b): scores for b, scores in entry["scores"].items()}
        return Adaptation(scores, entry["seconds"], entry["undone"])

    def _append(self, line: str) -> None:
        try:
            with self.path.open("a") as file:
                file.write(line + "\n")
        except OSError as error:
            raise InputError(
                f"can't write {self.path}: {error.strerror}; solve this and run the command again, "
                "which continues from here"
            ) from error

    def _remember(self, line: str) -> None:
        try:
            entry = dict(parse_json(line))
            if entry.pop(_CHECK) != _check(entry):
                return
            name, seconds = str(entry["run"]), float(entry["seconds"])
            scores = {
                str(int(b)): {metric: float(value) for metric, value in figures.items()}
                for b, figures in entry["scores"].items()
            }
            self._runs[name] = {
                "scores": scores, "seconds": seconds, "undone": int(entry["undone"])
            }  # fmt: skip
        except (ValueError, TypeError, KeyError, AttributeError):
            return  # a crash cut the line off, or a disk changed it: its run is repeated


def _check(entry: Mapping[str, Any]) -> int:
    """A checksum of a run: a disk may change a digit without a word."""
    return zlib.crc32(json.dumps(entry).encode())


def _difference(head: str, facts: Mapping[str, Any]) -> str:
    """How the first line of a journal differs from the facts, as text for an error."""
    try:
        saved = dict(parse_json(head))
    except (ValueError, TypeError):
        return ""
    other = [
        f"{name}: {saved.get(name)!r} there, {facts.get(name)!r} here"
        for name in sorted({*saved, *facts})
        if saved.get(name) != facts.get(name)
    ]
    return f" ({'; '.join(other)})"
