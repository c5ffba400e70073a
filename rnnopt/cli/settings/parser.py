"""Options of a command line, derived from the fields of a dataclass.

The name of a field is that of its option, its type says what the option takes, its default stands
in the help. A class stands for a group of options, and its docstring is the title.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from types import NoneType
from typing import Any, ClassVar, Literal, NoReturn, get_args, get_origin, get_type_hints

HELP_WIDTH, NAMES_WIDTH = 100, 31  # columns: of a line at most, and of the options' names
GENERAL = "General"  # the group of what a command's own class brings in, and of --help


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a command is told.

    The docstring of a command's class stands in its help; that of a group of settings is its title.

    Attributes:
        command: its name on the command line.
        summary: what it does, in a few words.
        takes_config: whether its options may stand in a file, see `rnnopt.cli.settings.files`.
        home: where the module of the command is.
    """

    command: ClassVar[str]
    summary: ClassVar[str]
    takes_config: ClassVar[bool] = False
    home: ClassVar[str] = "rnnopt.cli"


@dataclass(frozen=True)
class Option:
    """What the command line makes of a field, beside its name, type and default.

    Attributes:
        text: what the help says, without the default.
        flag: the option, where the field has another name.
        aliases: other spellings, with their dashes, which the help does not show.
        metavar: what the help calls the value.
        shown: the default in words.
        parse: reads one value, where the type does not say how.
        advanced: whether only ``--help-all`` shows it.
        positional: whether it is given without its name.
    """

    text: str
    flag: str | None = None
    aliases: tuple[str, ...] = ()
    metavar: str | None = None
    shown: str | None = None
    parse: Callable[[str], Any] | None = None
    advanced: bool = False
    positional: bool = False


def option(text: str, default: Any = MISSING, **about: Any) -> Any:
    """A field of a settings dataclass.

    Args:
        text: what the help says, without the default.
        default: a value; required without one.
        about: the other attributes of `Option`.
    """
    metadata = {"option": Option(text, **about)}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def advanced(text: str, default: Any, **about: Any) -> Any:
    """An `option` that only ``--help-all`` shows."""
    return option(text, default, advanced=True, **about)


def option_of(item: Field[Any]) -> Option:
    """What `option` was told of a field."""
    about: Option = item.metadata["option"]
    return about


def flag_of(item: Field[Any]) -> str:
    """The option of a field, with its dashes."""
    return option_of(item).flag or f"--{item.name.replace('_', '-')}"


def grouped(settings: type[Settings]) -> dict[str, list[Field[Any]]]:
    """The fields of settings by the group that they belong to, in the order of the help."""
    groups: dict[str, list[Field[Any]]] = {GENERAL: []}
    for item in fields(settings):
        # the class that brought it in, to which a subclass may have given another default
        known = [c for c in settings.__mro__ if item.name in getattr(c, "__dataclass_fields__", {})]
        title = GENERAL if known[-1] is settings else (known[-1].__doc__ or "").rstrip(".")
        groups.setdefault(title, []).append(item)
    titles = [(kind.__doc__ or "").rstrip(".") for kind in settings.__mro__]
    order = [*sorted(groups.keys() - {GENERAL}, key=titles.index), GENERAL]
    return {title: sorted(groups[title], key=lambda item: not _required(item)) for title in order}


class Parser(argparse.ArgumentParser):
    """argparse's, with mistakes told in one line, and options written in full."""

    def __init__(self, **words: Any) -> None:
        super().__init__(allow_abbrev=False, add_help=False, formatter_class=_Formatter, **words)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and where to look, and leave with 2."""
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        width = min(HELP_WIDTH, shutil.get_terminal_size((HELP_WIDTH, 0)).columns)
        super().__init__(prog, max_help_position=NAMES_WIDTH, width=width)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs != "+":
            return super()._format_args(action, default_metavar)
        return self._metavar_formatter(action, default_metavar)(1)[0] + " ..."  # not twice


def build_parser(commands: Sequence[type[Settings]], everything: bool, **words: Any) -> Parser:
    """The parser of all commands; it leaves the class of the chosen one in ``settings``.

    Args:
        commands: their settings.
        everything: whether the help shows advanced options.
        words: of `argparse.ArgumentParser`.
    """
    parser = Parser(**words)
    parser.add_argument("-h", "--help", action="help", help="Show this help.")
    parsers = parser.add_subparsers(
        dest="command", required=True, title="commands", metavar="COMMAND", parser_class=Parser
    )
    for settings in commands:
        about = settings.__doc__
        one = parsers.add_parser(settings.command, help=settings.summary, description=about)
        one.set_defaults(settings=settings)
        _add_options(one, settings, everything)
    return parser


def _add_options(parser: Parser, settings: type[Settings], everything: bool) -> None:
    hints, usage = get_type_hints(settings), ["rnnopt", settings.command]
    for title, items in grouped(settings).items():
        group = parser.add_argument_group(title)
        for item in items:
            _add_option(group, item, hints[item.name], everything)
            name = option_of(item).metavar or ""
            if option_of(item).positional:
                usage.append(name if _required(item) else f"[{name}]")
            elif _required(item):
                usage.append(f"{flag_of(item)} {name}")
    parser.usage = " ".join([*usage, "[OPTIONS]"])
    if settings.takes_config:
        text = "YAML file with these options. The command line overrides it."
        group.add_argument("--config", metavar="FILE", help=text)
    group.add_argument("-h", "--help", action="help", help="Show this help.")
    if any(option_of(item).advanced for item in fields(settings)):
        group.add_argument("--help-all", action="help", help="Show all options.")


def _add_option(group: Any, item: Field[Any], hint: Any, everything: bool) -> None:
    about, words = option_of(item), _values(hint, option_of(item))
    shown = everything or not about.advanced
    words["help"] = _help(item) if shown else argparse.SUPPRESS
    if about.positional:
        group.add_argument(item.name, nargs=None if _required(item) else "?", **words)
        return
    words |= {"dest": item.name, "required": _required(item)}
    group.add_argument(flag_of(item), default=_default(item), **words)
    words |= {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS, "required": False}
    for alias in about.aliases:
        group.add_argument(alias, **words)
    if words.get("action") == "store_true":  # to undo what a file says
        group.add_argument(f"--no-{flag_of(item)[2:]}", **{**words, "action": "store_false"})


def _values(hint: Any, about: Option) -> dict[str, Any]:
    """What argparse is to know of an option's values."""
    words: dict[str, Any] = {"metavar": about.metavar}
    while len(kinds := get_args(hint)) and get_origin(hint) is not Literal:  # lists, and X | None
        words |= {"nargs": "+"} if get_origin(hint) is list else {}
        hint = next(kind for kind in kinds if kind is not NoneType)
    if hint is bool:
        return {"action": "store_true"}
    if kinds:
        return {**words, "choices": kinds, "type": type(kinds[0])}
    return {**words, "type": about.parse or hint}


def _required(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _default(item: Field[Any]) -> Any:
    default = item.default if item.default_factory is MISSING else item.default_factory()
    return None if default is MISSING else default


def _help(item: Field[Any]) -> str:
    about, default = option_of(item), _default(item)
    shown = about.shown or " ".join(map(str, default if isinstance(default, list) else [default]))
    return f"{about.text} [{shown}]" if shown not in ("", "None", "False") else about.text
