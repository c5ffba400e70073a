"""Options of a command line, derived from the fields of a dataclass.

The name of a field is that of its option, its type says what the option takes, its default stands
in the help. A class stands for a group of options, and its docstring's first line is the title.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

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
    """

    command: ClassVar[str]
    summary: ClassVar[str]
    takes_config: ClassVar[bool] = False


def option(
    text: str,
    default: Any = MISSING,
    *,
    flag: str | None = None,
    aliases: Sequence[str] = (),
    metavar: str | None = None,
    shown: str | None = None,
    parse: Callable[[str], Any] | None = None,
    advanced: bool = False,
    positional: bool = False,
) -> Any:
    """A field of a settings dataclass.

    Args:
        text: what the help says, without the default.
        default: a value; required without one.
        flag: the option, where the field has another name.
        aliases: other spellings, with their dashes, which the help does not show.
        metavar: what the help calls the value.
        shown: the default in words.
        parse: reads one value, where the type does not say how.
        advanced: whether only ``--help-all`` shows it.
        positional: whether it is given without its name.
    """
    metadata = {
        "text": text, "flag": flag, "aliases": aliases, "metavar": metavar, "shown": shown,
        "parse": parse, "advanced": advanced, "positional": positional,
    }  # fmt: skip
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


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
        if action.nargs == "+":  # argparse writes the name twice
            choices = action.metavar is None and action.choices
            return f"{{{','.join(choices)}}} ..." if choices else f"{action.metavar} ..."
        return super()._format_args(action, default_metavar)


def build_parser(
    commands: Sequence[type[Settings]], everything: bool = False, **words: Any
) -> Parser:
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
        one = parsers.add_parser(
            settings.command,
            usage=_usage(settings),
            help=settings.summary,
            description=settings.__doc__,
        )
        one.set_defaults(settings=settings)
        _add_options(one, settings, everything)
    return parser


def _usage(settings: type[Settings]) -> str:
    """The required options, and that there are others."""
    words = ["rnnopt", settings.command]
    for item in (item for items in grouped(settings).values() for item in items):
        name = item.metadata["metavar"] or item.name.upper()
        if item.metadata["positional"]:
            words.append(name if _required(item) else f"[{name}]")
        elif _required(item):
            words.append(f"{flag_of(item)} {name}")
    return " ".join([*words, "[OPTIONS]"])


def grouped(settings: type[Settings]) -> dict[str, list[Field[Any]]]:
    """The fields of settings by the group that they belong to, in the order of the help."""
    groups: dict[str, list[Field[Any]]] = {}
    for owner in (kind for kind in settings.__mro__ if issubclass(kind, Settings)):
        own = [item for item in fields(settings) if _owner(settings, item.name) is owner]
        title = GENERAL if owner is settings else (owner.__doc__ or "").rstrip(".")
        groups.setdefault(title, []).extend(own)
    groups[GENERAL] = groups.pop(GENERAL)
    return {
        title: sorted(own, key=lambda item: not _required(item))
        for title, own in groups.items()
        if own or title == GENERAL
    }


def _owner(settings: type[Settings], name: str) -> type:
    """The class that brought a field in, which a subclass may have given another default."""
    known = [c for c in settings.__mro__ if name in getattr(c, "__dataclass_fields__", {})]
    return known[-1]


def _add_options(parser: Parser, settings: type[Settings], everything: bool) -> None:
    hints = get_type_hints(settings)
    for title, items in grouped(settings).items():
        group = parser.add_argument_group(title)
        for item in items:
            _add_option(group, item, hints[item.name], everything)
    if settings.takes_config:
        text = "YAML file with these options. The command line overrides it."
        group.add_argument("--config", metavar="FILE", help=text)
    group.add_argument("-h", "--help", action="help", help="Show this help.")
    if any(item.metadata["advanced"] for item in fields(settings)):
        group.add_argument("--help-all", action="help", help="Show all options.")


def _add_option(group: Any, item: Field[Any], hint: Any, everything: bool) -> None:
    about = item.metadata
    words: dict[str, Any] = _value_words(hint, about)
    hidden = about["advanced"] and not everything
    words["help"] = argparse.SUPPRESS if hidden else _help(item)
    if about["positional"]:
        group.add_argument(item.name, nargs=None if _required(item) else "?", **words)
        return
    required = _required(item)
    default = None if required else _default(item)
    group.add_argument(flag_of(item), dest=item.name, required=required, default=default, **words)
    words |= {"dest": item.name, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    for alias in about["aliases"]:
        group.add_argument(alias, **words)
    if words.get("action") == "store_true":  # to undo what a file says
        group.add_argument(f"--no-{flag_of(item)[2:]}", **{**words, "action": "store_false"})


def _value_words(hint: Any, about: Mapping[str, Any]) -> dict[str, Any]:
    """What argparse is to know of an option's values."""
    hint = _without_none(hint)
    if hint is bool:
        return {"action": "store_true"}
    words: dict[str, Any] = {"metavar": about["metavar"]}
    if get_origin(hint) is list:
        words["nargs"] = "+"
        hint = _without_none(get_args(hint)[0])
    if get_origin(hint) is Literal:
        words["choices"] = get_args(hint)
        hint = type(words["choices"][0])
    return {**words, "type": about["parse"] or hint}


def _without_none(hint: Any) -> Any:
    if get_origin(hint) not in (Union, UnionType):
        return hint
    return next(kind for kind in get_args(hint) if kind is not NoneType)


def flag_of(item: Field[Any]) -> str:
    """The option of a field, with its dashes."""
    return item.metadata["flag"] or f"--{item.name.replace('_', '-')}"


def _required(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _default(item: Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _help(item: Field[Any]) -> str:
    shown, default = item.metadata["shown"], _default(item)
    if shown is None and not (default is None or default is False or default is MISSING):
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
    return item.metadata["text"] + (f" [{shown}]" if shown else "")
