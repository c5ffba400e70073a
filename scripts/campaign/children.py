"""Commands of rnnopt in forked processes, which start at once, since the parent has the imports."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path


def prepare() -> None:
    """Settings that must hold before torch and tokenizers are imported, and a process is forked."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    import matplotlib
    import torch

    matplotlib.use("agg")
    torch.set_num_threads(1)


def warm(words: Sequence[object]) -> None:
    """Run a command in this process, so that its children have what it imports."""
    from rnnopt.cli.main import main

    with contextlib.redirect_stdout(io.StringIO()):
        if main([str(word) for word in words]):
            raise RuntimeError(f"fails undisturbed: {words}")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a process ended.

    Attributes:
        code: its exit code; negative: the signal that ended it.
        text: what it printed, stdout and stderr.
        seconds: that it ran.
        processor: seconds of a processor that it took, which do not depend on what else runs.
        megabytes: of its resident memory at most, with what it shares with the parent.
        late: whether it was ended because it ran too long.
    """

    code: int
    text: str
    seconds: float
    processor: float
    megabytes: float
    late: bool = False

    @property
    def clear(self) -> bool:
        """Whether it ended well, or with one line that says why."""
        lines = [line for line in self.text.splitlines() if ": error: " in line]
        told = self.code == 2 and len(lines) == 1 and "Traceback" not in self.text
        return (self.code in (0, 3) or told) and not self.late


class Child:
    """A command in a forked process.

    Args:
        words: the command and its options; or a function, whose result is the exit code.
        before: is called in the process first.
        environment: is added to its own.
    """

    def __init__(
        self,
        words: Sequence[object] | Callable[[], int],
        before: Callable[[], object] = lambda: None,
        environment: dict[str, str] | None = None,
    ) -> None:
        descriptor, name = tempfile.mkstemp(prefix="campaign-")
        self._output, self._begun = Path(name), time.monotonic()
        self.pid = os.fork()
        if self.pid:
            os.close(descriptor)
            return
        code = 1
        try:
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.environ |= environment or {}
            before()
            code = words() if callable(words) else _command(words)
        except BaseException:
            traceback.print_exc()
        finally:
            _flush()
            os._exit(code)

    def wait(self, seconds: float = 60.0) -> Outcome:
        """Wait for its end, and end it after so many seconds."""
        late = False
        while True:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() - self._begun > seconds:
                late = True
                os.kill(self.pid, signal.SIGKILL)
                _, status, usage = os.wait4(self.pid, 0)
                break
            time.sleep(0.005)
        text = self._output.read_text(errors="replace")
        self._output.unlink()
        return Outcome(
            os.waitstatus_to_exitcode(status), text, time.monotonic() - self._begun,
            usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, late,
        )  # fmt: skip

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)


def run(words: Sequence[object], seconds: float = 120.0, **options: object) -> Outcome:
    """Run a command to its end."""
    return Child(words, **options).wait(seconds)  # type: ignore[arg-type]


def _command(words: Sequence[object]) -> int:
    from rnnopt.cli.main import main

    try:
        return main([str(word) for word in words])
    except SystemExit as end:
        return int(end.code or 0)


def _flush() -> None:
    import sys

    for stream in (sys.stdout, sys.stderr):
        stream.flush()
