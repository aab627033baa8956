"""The parser of the commands that are plain functions: YAML files, dotted overrides, ``--print_config``."""

import re
from argparse import ArgumentError
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from coin.commands import COMMANDS
from coin.commands.shipped import config_file
from coin.core.choices import did_you_mean
from coin.errors import ConfigurationError, FileError
from coin.files.yaml import read_yaml

_WHOLE = {"methods": "[]", "tasks": "{}"}
"""Options whose entries are objects, and what they are without any."""
_UNKNOWN = re.compile(r"unrecognized arguments: --([\w.+-]+).*|(?:Group '(.+)' does not accept o|O)ption '([^']+)'.*")
_OF_A_CLASS = {"class_path", "init_args", "dict_kwargs"}


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
        if (unknown := _UNKNOWN.fullmatch(str(error))) is None:
            raise
        name = unknown[1] or ".".join(filter(None, unknown.groups()))
        known = [each.dest for each in parser._actions if not each.dest.endswith(("help", "config"))]
        raise ConfigurationError(
            f"found option '{name}'{did_you_mean(name, known)}, expected one that {parser.prog} --help lists; check it"
        ) from error
    if empty := [name for name in parser.groups or () if found.get(name, "") is None]:
        raise ConfigurationError(f"found no options in {empty[0]}, expected 'option: value' lines; or leave it out")
    options: dict[str, Any] = parser.instantiate(found).as_dict()
    options.pop("config", None)
    return options


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
    if not Path(options["folder"]).is_dir():
        raise FileError(f"found no folder '{options['folder']}', expected an experiment's; make it with coin run")
    for argument, kind in sections.items():
        options[argument] = kind(**{each.name: options.pop(each.name) for each in fields(kind)})
    return options


def checked_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the arguments, after reading every YAML file that they name, with errors in one line.

    Options that replace a whole list are preceded by an empty one; otherwise an entry would inherit the options of the
    entry that it replaces, even if that is of another class.
    """
    found: list[str] = []
    for place, argument in enumerate(arguments):
        option = argument.partition("=")[0]
        keys: Collection[str] = [option.removeprefix("--")] if option.startswith("--") else []
        if (path := config_file(arguments, place)) is not None:
            document = read_yaml(path)
            _check_classes(document)
            keys = document if isinstance(document, dict) else []
        found += [f"--{key}={empty}" for key, empty in _WHOLE.items() if key in keys]
        found.append(argument)
    return found


def _check_classes(value: Any) -> None:
    """Raise ConfigurationError where options stand beside a ``class_path``: jsonargparse would name another class."""
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_classes(each)
    if isinstance(value, dict) and "class_path" in value and (stray := value.keys() - _OF_A_CLASS):
        told = f"found '{min(stray)}' beside class_path: {value['class_path']}, expected options under init_args"
        raise ConfigurationError(f"{told}; write init_args: {{{min(stray)}: …}}")
