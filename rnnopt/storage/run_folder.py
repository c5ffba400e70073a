"""The folder of a run of meta-training: its settings, its log and its checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from rnnopt.errors import InputError
from rnnopt.storage.files import (
    claim_folder,
    hold_folder,
    parse_json,
    read_tensors,
    save_tensors,
    write_atomically,
)

CHECKPOINT_FILE = "checkpoint.safetensors"
RUN_FILE = "run.json"
LOG_FILE = "log.jsonl"
INIT_FOLDER = "init"  # learned initial values, beside the rule

# tensors, on the CPU, and JSON-compatible facts with the key "meta_step"
Checkpoint: TypeAlias = tuple[dict[str, Tensor], dict[str, Any]]


class RunFolder:
    """The files of one run: ``run.json``, ``log.jsonl`` and ``checkpoint.safetensors``.

    Args:
        path: the folder. Nothing is read or written before `open`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(
        self,
        facts: dict[str, Any],
        resume: bool,
        restore: Callable[[dict[str, Tensor], dict[str, Any]], None],
    ) -> Checkpoint | None:
        """Begin a run in the folder, or resume the one that it holds.

        Args:
            facts: JSON-compatible facts that distinguish this run from others.
            resume: continue the run in the folder, if there is one.
            restore: called with the checkpoint, if there is one.

        Returns:
            The checkpoint; None if there is none.

        Raises:
            InputError: another process writes to the folder; it holds a run and resume is False;
                it holds a run with other facts or a damaged run; or it holds other files.
        """
        facts = dict(json.loads(json.dumps(facts)))
        run_file = self.path / RUN_FILE
        checkpoint = None
        if not run_file.exists():
            claim_folder(self.path)
        hold_folder(self.path)
        if run_file.exists():
            if not resume:
                raise InputError(
                    f"{self.path} already holds a run; add --resume to continue it (in Python "
                    "resume=True), or choose another --output"
                )
            checkpoint = self._take_up(facts, restore)
        write_atomically(run_file, json.dumps(facts, indent=2).encode())
        return checkpoint

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a line to the log.

        Raises:
            InputError: the log can't be written to.
        """
        path = self.path / LOG_FILE
        try:
            with path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise InputError(
                f"can't write {path}: {error.strerror}; solve this, then continue with --resume"
            ) from error

    def save(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Replace the checkpoint.

        Raises:
            InputError: see `rnnopt.storage.files.write_atomically`.
        """
        save_tensors(self.path / CHECKPOINT_FILE, tensors, about)

    def _take_up(
        self,
        facts: dict[str, Any],
        restore: Callable[[dict[str, Tensor], dict[str, Any]], None],
    ) -> Checkpoint | None:
        checkpoint = None
        try:
            self._check_same_run(dict(parse_json((self.path / RUN_FILE).read_text())), facts)
            if (self.path / CHECKPOINT_FILE).exists():
                checkpoint = read_tensors(self.path / CHECKPOINT_FILE)
                restore(*checkpoint)
            self._trim_log(checkpoint[1]["meta_step"] if checkpoint else 0)
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise InputError(
                f"{self.path} can't be resumed, its files are damaged ({error}); choose another "
                "--output"
            ) from error
        return checkpoint

    def _trim_log(self, meta_step: int) -> None:
        """Remove the lines of the log after the checkpoint, which will be written again."""
        path = self.path / LOG_FILE
        begun = meta_step > 0
        lines = path.read_text().splitlines(keepends=True) if begun and path.exists() else []
        kept = [line for line in lines if _step_of(line) <= meta_step]
        write_atomically(path, "".join(kept).encode())

    def _check_same_run(self, saved: dict[str, Any], facts: dict[str, Any]) -> None:
        # these settings may change when a run is resumed
        free = {"meta_steps", "checkpoint_every", "until"}
        other = [
            f"{name}: {saved.get(name)!r} there, {facts.get(name)!r} here"
            for name in sorted({*saved, *facts} - free)
            if saved.get(name) != facts.get(name)
        ]
        if other:
            raise InputError(
                f"{self.path} holds a run with other settings ({'; '.join(other)}); resume it "
                "with its own, or choose another --output"
            )


def _step_of(line: str) -> float:
    """The meta-step of a line of the log; infinity for a line that a crash cut off."""
    try:
        return float(parse_json(line)["meta_step"])
    except (ValueError, KeyError):
        return math.inf
