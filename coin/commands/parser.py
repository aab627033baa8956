"""The parser of a command that is a function: YAML files, dotted overrides, ``--print_config``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from coin.commands import COMMANDS
from coin.errors import ConfigurationError
from coin.files.yaml import read_yaml
from coin.safe import check_options


def command_parser(name: str) -> ArgumentParser:
    """Return a parser of ``coin NAME`` to which the command adds its options."""
    parser = ArgumentParser(prog=f"coin {name}", description=COMMANDS[name], exit_on_error=False)
    parser.add_argument("-c", "--config", action="config", help="A YAML file of options; several stack.")
    return parser


def parsed(parser: ArgumentParser, arguments: Sequence[str]) -> dict[str, Any]:
    """Return a command's options, instantiated."""
    check_files(arguments)
    found = parser.parse_args(list(arguments))
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


def check_files(arguments: Sequence[str]) -> None:
    """Refuse YAML files that have a key twice, of which YAML itself would take the last one."""
    for place, argument in enumerate(arguments):
        option, given, path = argument.partition("=")
        if option in ("-c", "--config"):
            path = path if given else next(iter(arguments[place + 1 :]), "")
            if path and not path.lstrip().startswith("{"):
                read_yaml(Path(path))
