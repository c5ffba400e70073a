"""Finished runs of a comparison, kept in a file as they come."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rnnopt.errors import InputError
from rnnopt.tasks.adaptation import Adaptation
from rnnopt.tasks.protocol import Scores


class Journal:
    """Finished runs in a file: a comparison that was stopped goes on where it was, and one of
    another rule in the same setting finds the baselines' runs done.

    Args:
        path: JSON lines; the first holds `facts`.
        facts: JSON-compatible, all that a run depends on beside its name.

    Raises:
        InputError: the file can't be read or written, or holds runs that depend on other facts.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self.path = path
        self._runs: dict[str, Any] = {}
        head = json.dumps(dict(facts), sort_keys=True)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_text() if path.exists() else ""
            if not content:
                path.write_text(head + "\n")
            elif not content.endswith("\n"):  # a crash cut the last line: the next starts anew
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
        """The run of that name from the file if it has these budgets, else `adapt()`, now kept.

        Raises:
            InputError: the file can't be written.
        """
        known = self._runs.get(name, {"scores": {}})["scores"]
        if not {str(b) for b in budgets} <= known.keys():
            done = adapt()
            entry = {
                "run": name,
                "scores": {str(b): scores for b, scores in done.scores.items()},
                "seconds": done.seconds_per_step,
                "undone": done.undone,
            }
            self._append(json.dumps(entry))
            self._runs[name] = entry
        entry = self._runs[name]
        scores = {int(b): scores for b, scores in entry["scores"].items()}
        # older versions did not keep what was undone
        return Adaptation(scores, entry["seconds"], entry.get("undone", 0))

    def _append(self, line: str) -> None:
        try:
            with self.path.open("a") as file:
                file.write(line + "\n")
        except OSError as error:
            raise InputError(
                f"can't write {self.path}: {error.strerror}; mend it and run the command again: "
                "it goes on from here"
            ) from error

    def _remember(self, line: str) -> None:
        try:
            entry = json.loads(line)
        except ValueError:  # cut off by a crash: its run is done again
            return
        entry["scores"] = {b: _named(scores) for b, scores in entry["scores"].items()}
        self._runs[entry["run"]] = entry


def _named(scores: Any) -> Scores:
    """Figures by name; version 0.1 kept them in this order without names."""
    if isinstance(scores, list):
        scores = dict(zip(("loss", "accuracy", "f1", "calibrated"), scores))
    return {name: value for name, value in dict(scores).items() if value is not None}


def _difference(head: str, facts: Mapping[str, Any]) -> str:
    """What a journal's first line says otherwise than the facts, for a message."""
    try:
        saved = dict(json.loads(head))
    except ValueError:
        return ""
    other = [
        f"{name}: {saved.get(name)!r} there, {facts.get(name)!r} here"
        for name in sorted({*saved, *facts})
        if saved.get(name) != facts.get(name)
    ]
    return f" ({'; '.join(other)})"
