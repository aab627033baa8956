"""The parser of the commands that are plain functions: YAML files, dotted overrides, ``--print_config``."""

import re
from argparse import ArgumentError
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentParser

from coin.commands import COMMANDS, FUNCTIONS
from coin.commands.shipped import shipped
from coin.core.choices import did_you_mean
from coin.errors import ConfigurationError, FileError
from coin.files.yaml import read_yaml

# Options whose entries are objects, and what they are without any.
_WHOLE = {"methods": "[]", "tasks": "{}"}
_UNKNOWN = re.compile(
    r"unrecognized arguments: --([\w.+-]+)|^Option '(.+)' is not|^Group '(.+)' does not accept option '(.+)'"
)


def command_parser(name: str) -> ArgumentParser:
    """Return a parser of ``coin NAME`` to which the command adds its options."""
    parser = ArgumentParser(
        prog=f"coin {name}", description=COMMANDS[name], exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument(
        "-c", "--config", action="config", help="A YAML file of options; several stack."
    )
    return parser


def add_json_argument(parser: ArgumentParser) -> None:
    """Add the option ``--json``, which prints the summary as JSON."""
    parser.add_argument(
        "--json", action="store_true", help="Print one JSON document, and nothing else, on stdout."
    )


def parsed(
    parser: ArgumentParser, arguments: Sequence[str], given: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return a command's options, instantiated; as plain values, as in a file, they are added to `given`."""
    try:
        command = parser.prog.removeprefix("coin ")
        found = parser.parse_args(checked_arguments(command, arguments))
    except ArgumentError as error:
        unknown = _UNKNOWN.search(str(error))
        if unknown is None:
            raise
        name = ".".join(part for part in unknown.groups() if part)
        options = [action.dest for action in parser._actions]
        known = [option for option in options if not option.endswith(("help", "config"))]
        # As others call them.
        renamed = re.sub("learning_rate$", "lr", re.sub("(num|max)_epochs$", "epochs", name))
        hint = f" (did you mean {renamed}?)" if renamed in known else did_you_mean(name, known)
        raise ConfigurationError(
            f"found option '{name}'{hint}, expected one that {parser.prog} --help lists"
        ) from error
    for name in parser.groups or ():
        if found.get(name, "") is None:
            raise ConfigurationError(
                f"found no options in {name}, expected 'option: value' lines; or leave it out"
            )
    found.pop("config", None)
    if given is not None:
        given |= yaml.safe_load(parser.dump(found, skip_validation=True))
    return dict(parser.instantiate(found).as_dict())


def run_function(command: str, arguments: Sequence[str]) -> None:
    """Run a command that is one function, and print what it returns: files, or an address."""
    module, _, name = FUNCTIONS[command].rpartition(".")
    function = getattr(import_module(module), name)
    parser = command_parser(command)
    parser.add_function_arguments(function, as_positional=command != "merge")
    made = function(**parsed(parser, arguments))
    for each in made if isinstance(made, list) else [made]:
        print(each)


def parse_options(
    name: str, function: Callable[..., Any], arguments: Sequence[str], **sections: type
) -> dict[str, Any]:
    """Return the arguments of a function on an experiment's folder; `sections` are dataclasses of options."""
    parser = command_parser(name)
    parser.add_argument("folder", type=str, help="An experiment's or a seed's folder.")
    for section in sections.values():
        parser.add_class_arguments(section)
    parser.add_function_arguments(function, skip={"folder", *sections})
    options = parsed(parser, arguments)
    if not Path(options["folder"]).is_dir():
        raise FileError(
            f"found no folder '{options['folder']}', expected an experiment's; make it with coin run"
        )
    for argument, kind in sections.items():
        own = {field.name: options.pop(field.name) for field in fields(kind)}
        options[argument] = kind(**own)
    return options


def checked_arguments(command: str, arguments: Sequence[str]) -> list[str]:
    """Return a command's arguments with the path of every YAML file, which is read, with errors in one line.

    Options that replace a whole list are preceded by an empty one, lest entries inherit those of the ones they replace.
    """
    found: list[str] = []
    left = iter(arguments)
    for argument in left:
        option, _, value = argument.partition("=")
        keys: Collection[str] = [option.removeprefix("--")] if option.startswith("--") else []
        if option in ("-c", "--config"):
            file = value or next(left, "")
            if not file.lstrip().startswith("{"):  # options written out
                file = shipped(command, file)
                document = read_yaml(Path(file))
                keys = document if isinstance(document, dict) else []
            argument = f"--config={file}"
        for key, empty in _WHOLE.items():
            if key in keys:
                found.append(f"--{key}={empty}")
        found.append(argument)
    return found
