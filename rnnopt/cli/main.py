"""The `rnnopt` command: reads its options, runs one command, tells mistakes in one line."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from importlib import import_module

from rnnopt.cli.settings.commands import COMMANDS
from rnnopt.cli.settings.files import with_config
from rnnopt.cli.settings.parser import Parser, Settings, build_parser
from rnnopt.errors import InputError, ToldElsewhereError
from rnnopt.storage.version import __version__

_EXTRAS = (
    "higher",
    "matplotlib",
    "peft",
    "rich",
    "sklearn",
    "transformers",
    "yaml",
)  # the extra `meta`
# the last two are what a shell reports for Ctrl-C, and for a pipe that nobody reads any more
_MISTAKE, _INTERRUPTED, _UNREAD = 2, 130, 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; 2 for what the user can mend (one line on stderr, of one process where several share
        the mistake; no traceback); 3 where --until was not met; 130 for Ctrl-C; 141 where whoever
        read the output has had enough, as in ``rnnopt predict ... | head``.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with _plain_warnings(words):
            return run(parse(words))
    except ToldElsewhereError:
        return _MISTAKE
    except InputError as error:
        _tell(words, f"error: {error}")
        return _MISTAKE
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        _tell(words, f'error: {error.name} is missing: pip install "rnnopt[meta]"')
        return _MISTAKE
    except KeyboardInterrupt:
        _tell(words, "interrupted")
        return _INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at its end
        return _UNREAD


def parse(words: Sequence[str]) -> Settings:
    """The settings of a command line.

    Args:
        words: the command and its options.

    Raises:
        InputError: the file of --config can't be used.
        SystemExit: with 2, options can't be used; with 0, only help was asked for.
    """
    parser = build_parser(
        COMMANDS,
        everything="--help-all" in words,
        prog="rnnopt",
        description="A learned optimizer for few-shot text classification.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    found, unknown = parser.parse_known_args(with_config(words, COMMANDS))
    if unknown:
        Parser(prog=f"rnnopt {found.command}").error(f"unrecognized arguments: {' '.join(unknown)}")
    kind: type[Settings] = found.settings
    return kind(**{item.name: getattr(found, item.name) for item in fields(kind)})


def run(settings: Settings) -> int:
    """Run the command that settings belong to, which brings the libraries that it needs.

    Returns:
        The exit code.
    """
    if settings.command != "meta-train":
        from rnnopt.meta.processes import require_alone

        require_alone(settings.command)
    module = import_module(f"{settings.home}.{settings.command.replace('-', '_')}")
    return int(module.run(settings) or 0)


@contextmanager
def _plain_warnings(words: Sequence[str]) -> Iterator[None]:
    """Within it a warning is one line, without the place in the code that gave it."""
    usual = warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"rnnopt {words[0]}: warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _tell(words: Sequence[str], what: str) -> None:
    print(f"rnnopt {words[0]}: {what}", file=sys.stderr)
