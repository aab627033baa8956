"""What nothing refers to in the store of steps, which only grows: finished steps of options that no run shows any more.

Experiments refer to steps by their links, and by their copies of an evaluation's results.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from coin.errors import CoinError, FileError
from coin.files.atomic import sha256_of
from coin.pipeline.plan import Planned
from coin.pipeline.step import DONE

_RESULTS = "results.json"
_KEY = re.compile(r'"([0-9a-f]{64})"')


def unreferenced(steps: Sequence[Planned]) -> list[Path]:
    """Return the folders of finished steps that neither these steps nor any experiment beside their store refers to.

    An experiment refers to what it links to, to evaluations whose results it shows, to the folders that a configuration
    names, and to all that these were made from. Folders of unfinished steps are left out: a run may go on from them.
    """
    store = steps[0].step.store
    made = {path.parent: path.read_text(encoding="utf-8", errors="replace") for path in store.glob(f"*/{DONE}")}
    planned = {planned.step.folder for planned in steps}
    left = {folder: text for folder, text in made.items() if folder not in planned}
    if not left:
        return []
    kept = planned | _shown(store, list(left))
    by_key = {_own_key(text): folder for folder, text in made.items()}
    waiting = [folder for folder in kept if folder in made]
    while waiting:
        needs = {by_key[key] for key in _KEY.findall(made[waiting.pop()]) if key in by_key}
        waiting += needs - kept
        kept |= needs
    return sorted(folder for folder in left if folder not in kept)


def _own_key(text: str) -> str:
    with suppress(ValueError, KeyError, TypeError):
        return str(json.loads(text)["key"])
    return ""


def _shown(store: Path, folders: Sequence[Path]) -> set[Path]:
    """Return which of these folders the experiments beside their store link to, name or have copied results of."""
    evaluations = {sha256_of(folder / _RESULTS): folder for folder in folders if (folder / _RESULTS).is_file()}
    shown = set()
    for path in _entries(store.parent, store):
        if path.is_symlink():
            target = Path(os.path.realpath(path))
            shown |= {folder for folder in folders if target.is_relative_to(folder.resolve())}
        elif path.name == _RESULTS and sha256_of(path) in evaluations:
            shown.add(evaluations[sha256_of(path)])
        elif path.name == "config.yaml":
            text = path.read_text(encoding="utf-8", errors="replace")
            shown |= {folder for folder in folders if folder.name in text}
    return shown


def _entries(folder: Path, store: Path) -> Iterator[Path]:
    """Yield the files and links below a folder, but for those of the store."""
    for place, rooms, names in os.walk(folder):
        if Path(place) == store:
            rooms.clear()
            continue
        yield from (Path(place) / name for name in (*rooms, *names))


def size_mib(folders: Sequence[Path]) -> float:
    """Return the MiB of all files in some folders."""
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files) / 2**20


def remove(folders: Sequence[Path], store: Path) -> None:
    """Remove folders of a store; a CoinError while a run is at work there, a FileError where they cannot be removed."""
    trash = store / ".removed"  # what is renamed is no step any more, even if this is killed then
    if not store.is_dir():
        return
    try:
        for lock in (store / ".locks").glob("*"):
            with FileLock(lock, blocking=False):
                pass
        trash.mkdir(exist_ok=True)
        for folder in folders:
            folder.replace(trash / folder.name)
        shutil.rmtree(trash)
    except Timeout as error:
        told = f"found a run at work on '{Path(error.lock_file).name}' in '{store}'"
        raise CoinError(f"{told}, expected none; wait until it has ended") from error
    except OSError as error:
        told = f"cannot remove '{error.filename}': {error.strerror}"
        raise FileError(f"{told}; choose an output that you can write to") from error
