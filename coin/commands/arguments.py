"""What every command takes on the command line: files of options by ``-c``, modules by ``--import``."""

from argparse import ArgumentParser
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import coin
from coin.core.choices import did_you_mean
from coin.errors import ConfigurationError, FileError
from coin.files.yaml import read_yaml

# In a wheel they lie in the package, in a repository beside it.
_PLACES = [place / "configs" for place in Path(coin.__file__).parents[:2]]
CONFIGS = next(folder for folder in _PLACES if folder.is_dir())
"""The folder of the YAML files that come with the package."""
_EMPTY = {"--methods": "--methods=[]", "--tasks": "--tasks={}"}
"""What leaves nothing of options whose entries are objects."""


def apply_common_options(arguments: Sequence[str]) -> list[str]:
    """Import the modules that are named, which no file may choose, and return the other arguments, files first.

    Whatever sets all methods or all tasks is preceded by an empty value, lest each of them inherits the options of the
    one that it replaces.
    """
    reader = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    reader.add_argument("--import", dest="modules", action="append", default=[])
    reader.add_argument("-c", "--config", dest="files", action="append", default=[])
    found, options = reader.parse_known_args(arguments)
    for module in found.modules:
        _import(module)
    others: list[str] = []
    for name in found.files:
        file = shipped(name)
        document = read_yaml(Path(file))
        for key in document if isinstance(document, dict) else ():
            others += _emptied(f"--{key}")
        others.append(f"--config={file}")
    for option in options:
        others += _emptied(option.partition("=")[0])
        others.append(option)
    return others


def _emptied(option: str) -> list[str]:
    return [_EMPTY[option]] if option in _EMPTY else []


def _import(module: str) -> None:
    try:
        import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            f"found --import={module}, expected a module ({error}); run where it is, or install it"
        ) from error


def shipped(name: str) -> str:
    """Return a file's path: of one that comes with coin by its name, ``quickstart``, or its path in ``configs/``."""
    if Path(name).is_file():
        return name
    known = {}
    for path in CONFIGS.rglob("*.yaml"):
        known[path.stem] = str(path)
        known[f"configs/{path.relative_to(CONFIGS).as_posix()}"] = str(path)
    if name not in known:
        meant = did_you_mean(name, known)
        raise FileError(
            f"found no configuration '{name}'{meant}, expected a file, or the name of one in {CONFIGS}"
        )
    return known[name]
