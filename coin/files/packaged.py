"""What extras bring: modules, and files that packages ship, such as pretrained weights that arrive by pip."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from coin.errors import ConfigurationError, FileError


def packaged_file(package: str, file: str, extra: str = "text") -> Path:
    """Return the path of a file that a package of an extra ships, without importing it; a FileError without it."""
    found = find_spec(package)
    path = None if found is None or found.origin is None else Path(found.origin).parent / file
    if path is None or not path.is_file():
        raise FileError(
            f"found no package {package} with a file {file}, expected it installed: pip install 'coded-coin[{extra}]'"
        )
    return path


def extra_module(name: str, extra: str) -> Any:
    """Import a module that an extra brings; a ConfigurationError without it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigurationError(
            f"found no package {name}, expected it installed: pip install 'coded-coin[{extra}]'"
        ) from error
