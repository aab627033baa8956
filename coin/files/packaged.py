"""Files that installed packages ship: pretrained weights and texts that arrive by pip."""

from importlib.util import find_spec
from pathlib import Path

from coin.errors import FileError


def packaged_file(package: str, file: str, extra: str = "text") -> Path:
    """Return the path of a file that a package of an extra ships, without importing the package.

    Raises:
        FileError: The package is missing, or has no such file.
    """
    found = find_spec(package)
    path = None if found is None or found.origin is None else Path(found.origin).parent / file
    if path is None or not path.is_file():
        raise FileError(
            f"found no package {package} with a file {file}, expected it installed: pip install 'coded-coin[{extra}]'"
        )
    return path
