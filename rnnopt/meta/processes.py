"""The processes of one run: a single one, or those that torchrun started on one or more machines.

Each process does the same work on its share of the tasks. Results are summed or gathered over all
processes: sums of tensors use NCCL on GPUs, and everything else uses gloo.
"""

from __future__ import annotations

import itertools
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rnnopt.errors import InputError, ToldElsewhereError

_T = TypeVar("_T")
# How long a process waits for the slowest one. A process that ended is noticed at once, because its
# connections close, and one that hangs by its pulse. The time must be longer than any work that one
# process may do alone, such as a long task or a download of the encoder.
_LONGEST_WAIT = timedelta(minutes=10)
# Seconds between two signs of life of a process, and without one until it is given up.
_BEAT, _SILENCE = 5.0, 45.0


class _LostError(InputError):
    """Another process of the run ended or is out of reach."""


@dataclass(frozen=True)
class Team:
    """This process as one of the `size` processes of a run; by default it is the only one.

    A team is a context manager, which leaves torch's process group at the end.

    Attributes:
        rank: the number of this process, 0 .. size - 1. Process 0 writes files and prints.
        size: the number of processes.
        local_rank: the number of this process on its machine, and of its GPU.
        pulse: shows the other processes that this one lives; None if nobody looks.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    pulse: Pulse | None = field(default=None, compare=False, repr=False)

    @classmethod
    def join(cls, lost: Callable[[str], None] | None = None) -> Team:
        """Join the processes that torchrun's environment variables describe; wait for all of them.

        Args:
            lost: called in a thread of every process that is alive, when another has hung, which
                the process itself may never learn, since it waits for that one. The message is
                empty in all processes but one.

        Raises:
            InputError: the variables are incomplete, or other processes can't be reached.
        """
        size = _variable("WORLD_SIZE", 1)
        if size == 1:
            return cls()
        # without this, NCCL ends this process without a message when another one is lost
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            dist.init_process_group(backend, timeout=_LONGEST_WAIT)
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"can't join the {size} processes of this run ({_reason(error)}); start them "
                "all with torchrun, at one rendezvous"
            ) from error
        pulse = None if lost is None else Pulse(dist.get_rank(), size, lost)
        return cls(dist.get_rank(), size, _variable("LOCAL_RANK", 0), pulse)

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.pulse is not None:
            self.pulse.stop()
        # if another process is lost, leaving the group could wait for it; this process ends anyway
        if self.size > 1 and not isinstance(error, _LostError):
            dist.destroy_process_group()

    def share(self, count: int) -> range:
        """The numbers among 0 .. count - 1 that belong to this process."""
        return range(self.rank, count, self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum the tensors of all processes, in place.

        Raises:
            InputError: a process is lost.
        """
        if self.size > 1:
            with _collective():
                dist.all_reduce(tensor)
        return tensor

    def gather(self, value: _T) -> list[_T]:
        """The values of all processes, by rank. They must be picklable.

        Raises:
            InputError: a process is lost.
        """
        values: list[Any] = [value] * self.size
        if self.size > 1:
            with _collective():
                dist.all_gather_object(values, value)
        return values

    def together(self, action: Callable[[], _T]) -> _T:
        """Run `action` in every process; return its result if it succeeded in all of them.

        Raises:
            InputError: `action` raised an InputError in some process. Every process raises it, and
                rank 0 prints it.
        """
        if self.size == 1:
            return action()
        result: list[_T] = []
        message = None
        try:
            result.append(action())
        except InputError as error:
            message = str(error)
        for rank, refusal in enumerate(self.gather(message)):
            if refusal is not None:
                raise (ToldElsewhereError if self.rank else InputError)(
                    f"process {rank}: {refusal}" if rank else refusal
                )
        return result[0]

    def first(self, action: Callable[[], _T]) -> _T:
        """Run `action` in the process of rank 0 only; return its result in every process.

        Raises:
            InputError: see `together`.
        """
        result = self.together(lambda: None if self.rank else action())
        return self.gather(result)[0]  # type: ignore[return-value]  # the value of rank 0 is not None


class Pulse:
    """Signs of life of the processes of a run, in the store where they have met.

    A process that is stopped, or whose machine is out of reach, closes no connection, and the
    others would wait for it. A thread of each process writes a number every few seconds and reads
    those of the others. A second thread looks at the clock, because the first waits for ever where
    the process that keeps the store hangs.

    Args:
        rank: of this process.
        size: the number of processes.
        lost: see `Team.join`.
    """

    def __init__(self, rank: int, size: int, lost: Callable[[str], None]) -> None:
        self._rank, self._size, self._lost = rank, size, lost
        self._over = threading.Event()
        self._store = self._connect()
        self._store.set(self._key(rank), "0")
        dist.barrier()  # now all have begun
        self._answered = time.monotonic()  # when the store has answered last
        self._signs = [("", self._answered)] * size  # each process's number, and since when
        for work in (self._beat, self._watch):
            threading.Thread(target=work, name="rnnopt pulse", daemon=True).start()

    def stop(self) -> None:
        """Look for no more signs, and tell the others that this process has ended."""
        self._over.set()

    def _beat(self) -> None:
        for beat in itertools.count(1):
            over = self._over.wait(_BEAT)
            try:
                self._store.set(self._key(self._rank), _ENDED if over else str(beat))
                if over:
                    return
                now = [self._store.get(self._key(rank)).decode() for rank in range(self._size)]
            except RuntimeError:
                return  # the process that keeps the store has ended, and so will this one
            self._answered = time.monotonic()
            self._signs = [
                (new, self._answered) if new in (_ENDED, "") or new != old else (old, since)
                for new, (old, since) in zip(now, self._signs)
            ]

    def _watch(self) -> None:
        while not self._over.wait(1.0):
            now = time.monotonic()
            silent = [r for r, (_, since) in enumerate(self._signs) if now - since > _SILENCE]
            if now - self._answered > _SILENCE:
                silent = [0]  # which keeps the store, and all the numbers
            if silent:
                self._give_up(silent)
                return

    def _give_up(self, silent: Sequence[int]) -> None:
        alive = min(rank for rank in range(self._size) if rank not in silent)
        names = ", ".join(map(str, silent))
        self._lost(
            f"process {names} of {self._size} has given no sign of life for {_SILENCE:.0f} s; see "
            "what it or its machine does, then go on with --resume"
            if alive == self._rank
            else ""
        )

    @staticmethod
    def _key(rank: int) -> str:
        return f"rnnopt/pulse/{rank}"

    @staticmethod
    def _connect() -> Any:
        """A connection of its own to the store that torchrun's variables name."""
        address, port = os.environ["MASTER_ADDR"], _variable("MASTER_PORT", 0)
        return dist.TCPStore(address, port, is_master=False)  # type: ignore[attr-defined]


_ENDED = "ended"


def check_alike(everyone: Sequence[dict[str, Any]]) -> None:
    """Make sure that all processes work on the same run.

    Args:
        everyone: the facts that each process has on the run, by rank.

    Raises:
        InputError: the facts of two processes differ.
    """
    for rank, facts in enumerate(everyone):
        other = [
            f"{name}: {everyone[0].get(name)!r} in process 0, {facts.get(name)!r} in process {rank}"
            for name in sorted({*everyone[0], *facts})
            if everyone[0].get(name) != facts.get(name)
        ]
        if other:
            raise InputError(
                f"the processes of this run differ ({'; '.join(other)}); give all the same "
                "command, data, encoder and kind of device"
            )


def require_alone(command: str) -> None:
    """Refuse to run a command in several processes, which would all do the same work.

    Args:
        command: the name of the command.

    Raises:
        InputError: torchrun started several processes.
    """
    size = _variable("WORLD_SIZE", 1)
    if size > 1:
        raise (ToldElsewhereError if _variable("RANK", 0) else InputError)(
            f"WORLD_SIZE={size}: only meta-train runs in several processes; start `rnnopt "
            f"{command}` without torchrun"
        )


@contextmanager
def _collective() -> Iterator[None]:
    """Translate torch's communication errors."""
    try:
        yield
    except RuntimeError as error:
        raise _LostError(
            f"a process of this run was lost, or is out of reach ({_reason(error)}); go on "
            "with --resume"
        ) from error


def _variable(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise InputError(
            f"{name}={text!r}: must be a whole number; torchrun sets it, else unset it"
        )
    return int(text)


def _reason(error: Exception) -> str:
    """The first sentence of torch's message, without the position in its source code."""
    sentence = re.split(r"\n|\. ", str(error).strip())[0]
    return re.sub(r"^\[[^]]*:\d+\] ", "", sentence)
