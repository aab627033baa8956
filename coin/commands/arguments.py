"""What every command takes on the command line: files of options by ``-c``, modules by ``--import``."""

from argparse import ArgumentParser
from collections.abc import Collection, Sequence
from importlib import import_module
from pathlib import Path

from coin.commands.shipped import shipped
from coin.errors import ConfigurationError
from coin.files.yaml import read_yaml

_WHOLE = {"methods": "[]", "tasks": "{}"}
"""Options whose entries are objects, and their values without any."""


def complete(command: str, arguments: Sequence[str]) -> list[str]:
    """Import the modules that are named, which no file may choose, and return the other arguments, files first.

    Files are given by their paths, those that come with coin too. Whatever sets all methods or all tasks is preceded by
    an empty value, lest each of them inherits the options of the one that it replaces.
    """
    reader = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    reader.add_argument("--import", dest="modules", action="append", default=[])
    reader.add_argument("-c", "--config", dest="files", action="append", default=[])
    found, options = reader.parse_known_args(arguments)
    for module in found.modules:
        _import(module)
    completed: list[str] = []
    for file in found.files:
        path = shipped(command, file)
        completed += [*_emptied(read_yaml(Path(path)) or ()), f"--config={path}"]
    for option in options:
        name = option.removeprefix("--").partition("=")[0]
        completed += [*_emptied([name]), option]
    return completed


def _emptied(names: Collection[str]) -> list[str]:
    return [f"--{name}={empty}" for name, empty in _WHOLE.items() if name in names]


def _import(module: str) -> None:
    try:
        import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            f"found --import={module}, expected a module ({error}); run where it is, or install it"
        ) from error
