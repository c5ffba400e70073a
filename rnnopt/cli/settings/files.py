"""Settings in files: a run's own, written into its folder, and recipes that a user writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from rnnopt.cli.settings.parser import Parser, Settings, flag_of, grouped, option_of
from rnnopt.errors import InputError

SETTINGS_FILE = "settings.yaml"
_MOST_VALUES = 10_000
_NOT_KEPT = ("resume",)  # of one start alone


def write_settings(path: Path, settings: Settings) -> None:
    """Write what a command did, defaults included, so that ``--config`` does it again.

    Args:
        path: of the file.
        settings: of the command.

    Raises:
        InputError: the file can't be written.
    """
    import yaml

    from rnnopt.storage.files import write_atomically

    parts = [f"# rnnopt {settings.command} --config THIS_FILE does it again.", ""]
    parts.append(f"command: {settings.command}")
    for title, items in grouped(type(settings)).items():
        values = {
            _key(item): getattr(settings, item.name) for item in items if item.name not in _NOT_KEPT
        }
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        parts += ["", f"# {title}", text.rstrip()]
    write_atomically(path, ("\n".join(parts) + "\n").encode())


def chosen(settings: Settings, *names: str) -> dict[str, Any]:
    """Some of the settings, by name."""
    return {name: getattr(settings, name) for name in names}


def with_config(words: Sequence[str], commands: Sequence[type[Settings]]) -> list[str]:
    """A command line with the options of its ``--config`` before its own, which override them.

    Raises:
        InputError: no such file, no YAML, another command's, or no option of this command.
    """
    command = next((c for c in commands if words and c.command == words[0]), None)
    if command is None or not command.takes_config:
        return list(words)
    finder = Parser(prog=f"rnnopt {command.command}")
    finder.add_argument("--config")
    path = finder.parse_known_args(words[1:])[0].config
    if path is None:
        return list(words)
    return [words[0], *_options(path, command), *words[1:]]


def _options(path: str, command: type[Settings]) -> list[str]:
    values = _read(path)
    if (made_for := values.pop("command", command.command)) != command.command:
        raise InputError(
            f"--config {path}: settings of rnnopt {made_for}, and this is rnnopt "
            f"{command.command}; take a file of this command"
        )
    flags = {_key(item): flag_of(item) for item in fields(command)}
    flags |= {_word(flag): flag for item in fields(command) for flag in option_of(item).aliases}
    words = []
    for key, value in values.items():
        flag = flags.get(str(key).replace("-", "_"))
        if flag is None:
            raise InputError(
                f"--config {path}: rnnopt {command.command} has no option {key!r}; see "
                f"rnnopt {command.command} --help-all"
            )
        words += _words(flag, value)
    return words


def _key(item: Field[Any]) -> str:
    return _word(flag_of(item))


def _word(flag: str) -> str:
    return flag[2:].replace("-", "_")


def _words(flag: str, value: Any) -> list[str]:
    """A value of a file as it would be typed; nothing where it is a default of that kind."""
    if value is None or value is False or value == []:
        return []
    if value is True:
        return [flag]
    if isinstance(value, list):
        # --top-layers alone has None among its values, and calls it all
        return [flag, *("all" if one is None else str(one) for one in value)]
    return [f"{flag}={value}"]


def _is_small(found: Any) -> bool:
    """Whether a file holds no more values than options need, aliases written out."""
    left, count = [found], 0
    while left and count <= _MOST_VALUES:
        value = left.pop()
        count += 1
        if isinstance(value, dict):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            left += value
    return count <= _MOST_VALUES


def _read(path: str) -> dict[Any, Any]:
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise InputError(
            f"--config {path}: can't be read as YAML: {why}; write one option to a line, such as "
            "meta_lr: 0.005"
        ) from error
    if not _is_small(found):
        raise InputError(
            f"--config {path}: holds more than {_MOST_VALUES} values, as aliases of YAML may hide; "
            "write one option to a line, such as meta_lr: 0.005"
        )
    if not isinstance(found, dict):
        raise InputError(
            f"--config {path}: holds no options; write one to a line, such as meta_lr: 0.005"
        )
    return found
