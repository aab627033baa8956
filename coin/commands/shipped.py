"""The YAML files of ``configs/``, which come with the package: ``coin run -c quickstart`` finds them by name."""

import re
from pathlib import Path

import coin
from coin.core.choices import did_you_mean
from coin.errors import FileError

# In a wheel they lie in the package, in a repository beside it.
_PLACES = [place / "configs" for place in Path(coin.__file__).parents[:2]]
CONFIGS = next(folder for folder in _PLACES if folder.is_dir())
_FOLDERS = {  # of a command's files
    "run": ("experiment", "cluster"),
    "fit": ("expert", "logger", "cluster"),
    "evaluate": ("evaluate", "logger", "cluster"),
    "merge": ("merge",),
    "serve": ("serve",),
}


def shipped(command: str, name: str) -> str:
    """Return a file's path: of a shipped one by its name, ``quickstart``, or its path in ``configs/``."""
    if Path(name).is_file():
        return name
    inside = CONFIGS / name.removeprefix("configs/")
    if name.startswith("configs/") and inside.is_file():
        return str(inside)
    if not re.fullmatch(r"[\w-]+", name):
        return name
    folders = [CONFIGS / folder for folder in _FOLDERS.get(command, ("logger", "cluster"))]
    known = {path.stem: str(path) for folder in folders for path in sorted(folder.rglob("*.yaml"))}
    if name not in known:
        meant = did_you_mean(name, known) or f"; there are {', '.join(known)}"
        raise FileError(
            f"found no configuration '{name}', expected a file, or the name of one in configs/{meant}"
        )
    return known[name]
