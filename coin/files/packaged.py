"""Imports from outside coin: modules and files of optional extras, and a user's classes by import path."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from coin.errors import ConfigurationError, FileError, first_line


def how_to_install(extra: str) -> str:
    """Return the command that installs an optional extra: `coin` is on no package index."""
    return f"pip install '.[{extra}]' in a copy of coin's repository"


def packaged_file(package: str, file: str, extra: str = "text") -> Path:
    """Return the path of a file that a package of an extra ships, without importing it; a FileError without it."""
    found = find_spec(package)
    path = Path(found.origin).parent / file if found and found.origin else None
    if path is None or not path.is_file():
        raise FileError(f"found no package {package} with a file {file}, expected it: {how_to_install(extra)}")
    return path


def extra_module(name: str, extra: str) -> Any:
    """Import a module of an optional extra; raises ConfigurationError without it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigurationError(f"found no package {name}, expected it installed: {how_to_install(extra)}") from error


def imported(option: str, path: str, expected: str) -> Any:
    """Import what an option names by its import path; a ConfigurationError where that is none."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        told = f"found {option} '{path}', expected the import path of {expected} ({first_line(error)})"
        raise ConfigurationError(f"{told}; check the spelling, or run where its module is") from error
