"""The parser of the commands that are plain functions: YAML files, dotted overrides, ``--print_config``."""

import re
from argparse import ArgumentError
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from typing import Any

from jsonargparse import ArgumentParser

from coin.commands import COMMANDS
from coin.commands.early import config_file, unknown
from coin.commands.safe import check_options
from coin.errors import ConfigurationError
from coin.files.yaml import read_yaml

_WHOLE = {"methods": "[]", "tasks": "{}"}
"""Options whose entries are objects, and what they are without any."""


def command_parser(name: str) -> ArgumentParser:
    """Return a parser of ``coin NAME`` to which the command adds its options."""
    parser = ArgumentParser(prog=f"coin {name}", description=COMMANDS[name], exit_on_error=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="config", help="A YAML file of options; several stack.")
    return parser


def add_json_argument(parser: ArgumentParser) -> None:
    """Add the option ``--json``, which prints the summary as JSON."""
    parser.add_argument(
        "--json", action="store_true", help="Print the summary as one JSON document, and nothing else, on stdout."
    )


def parsed(parser: ArgumentParser, arguments: Sequence[str]) -> dict[str, Any]:
    """Return a command's options, instantiated."""
    try:
        found = parser.parse_args(checked_arguments(arguments))
    except ArgumentError as error:
        if (mistake := _with_nearest(str(error), parser)) is None:
            raise
        raise mistake from error
    check_options(found.as_dict())
    try:
        options: dict[str, Any] = parser.instantiate(found).as_dict()
    except TypeError as error:
        if "must be a mapping" not in str(error):
            raise
        raise ConfigurationError(
            "found a section of options that is null, expected 'key: value'; leave the section out for its defaults"
        ) from error
    options.pop("config", None)
    return options


def _with_nearest(message: str, parser: ArgumentParser) -> ConfigurationError | None:
    """Return the mistake if a parser says that an option does not exist, with the nearest that does."""
    known = [each.dest for each in parser._actions if not each.dest.endswith(("help", "config"))]
    if match := re.fullmatch(r"Group '(.+)' does not accept option '(.+)'", message):
        section, name = match.groups()
        known = [each.removeprefix(f"{section}.") for each in known if each.startswith(f"{section}.")]
        return ConfigurationError(unknown(f"{section} option", name, known))
    if match := re.match(r"unrecognized arguments: (--[\w.+-]+)", message):
        every = [each for action in parser._actions for each in action.option_strings]
        return ConfigurationError(unknown("option", match[1], every, f"one that {parser.prog} --help lists"))
    return None


def parse_options(
    name: str, function: Callable[..., Any], arguments: Sequence[str], **sections: type
) -> dict[str, Any]:
    """Return the arguments of a command's function on an experiment's folder; `sections` are dataclasses of options."""
    parser = command_parser(name)
    parser.add_argument("folder", type=str, help="An experiment's or a seed's folder.")
    for section in sections.values():
        parser.add_class_arguments(section)
    parser.add_function_arguments(function, skip={"folder", *sections})
    options = parsed(parser, arguments)
    for argument, kind in sections.items():
        options[argument] = kind(**{each.name: options.pop(each.name) for each in fields(kind)})
    return options


def checked_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the arguments, after checking that no YAML file has a key twice: YAML would take the last one.

    Options that replace a whole list are preceded by an empty one; otherwise an entry would inherit the options of the
    entry that it replaces, even if that is of another class.
    """
    found: list[str] = []
    for place, argument in enumerate(arguments):
        option = argument.partition("=")[0]
        keys: Collection[str] = [option.removeprefix("--")] if option.startswith("--") else []
        if (path := config_file(arguments, place)) is not None:
            document = read_yaml(path)
            keys = document if isinstance(document, dict) else []
        found += [f"--{key}={empty}" for key, empty in _WHOLE.items() if key in keys]
        found.append(argument)
    return found
