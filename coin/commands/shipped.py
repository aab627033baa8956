"""The YAML files of ``configs/``, which come with the package: ``coin run -c quickstart`` finds them by name."""

import re
from collections.abc import Sequence
from pathlib import Path

import coin
from coin.core.choices import did_you_mean
from coin.errors import FileError

_PACKAGE = Path(coin.__file__).parent
CONFIGS = next(folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir())
"""In a wheel they lie in the package, in a repository beside it."""
SWEEPS = "sweep's file"
_FOLDERS = {
    "run": ("experiment", "cluster"),
    "fit": ("expert", "logger", "cluster"),
    "evaluate": ("evaluate", "logger", "cluster"),
    "merge": ("merge",),
    "simulate": ("simulate",),
    SWEEPS: ("study", "sweep"),
}
"""The folders of a command's files."""


def shipped(command: str, name: str) -> str:
    """Return a file's path: of a shipped one by its name, ``quickstart``, or its path in ``configs/``; else as it is.

    Raises:
        FileError: No shipped file has this name, which has no path or ending.
    """
    if Path(name).is_file():
        return name
    inside = CONFIGS / name.removeprefix("configs/")
    if name.startswith("configs/") and inside.is_file():
        return str(inside)
    if not re.fullmatch(r"[\w-]+", name):
        return name
    folders = [CONFIGS / folder for folder in _FOLDERS.get(command, ("logger", "cluster"))]
    files = [path for folder in folders for path in (*sorted(folder.glob("*.yaml")), *sorted(folder.glob("*/*.yaml")))]
    known = {path.stem: str(path) for path in files}
    if name not in known:
        meant = did_you_mean(name, known) or f"; there are {', '.join(known)}"
        raise FileError(f"found no configuration '{name}', expected a file, or the name of one in configs/{meant}")
    return known[name]


def config_file(arguments: Sequence[str], place: int) -> Path | None:
    """Return the file that an argument names, if it is ``-c`` or ``--config``; none of options written out."""
    option, given, path = arguments[place].partition("=")
    path = path if given else next(iter(arguments[place + 1 :]), "")
    return Path(path) if option in ("-c", "--config") and path and not path.lstrip().startswith("{") else None


def with_shipped(command: str, arguments: Sequence[str]) -> list[str]:
    """Return a command's arguments with the path of every shipped file that ``-c`` names."""
    found = list(arguments)
    for place, argument in enumerate(arguments):
        if (path := config_file(arguments, place)) is not None:
            option, given, _ = argument.partition("=")
            file = shipped(command, str(path))
            found[place if given else place + 1] = f"{option}={file}" if given else file
    return found
