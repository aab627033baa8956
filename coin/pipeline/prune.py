"""Finished steps that no experiment uses any more: the store of steps only grows.

An experiment uses the steps that its links lead to, and all that these were made from.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from coin.errors import CoinError
from coin.pipeline.plan import Planned
from coin.pipeline.step import DONE


def unreferenced(steps: Sequence[Planned]) -> list[Path]:
    """Return the folders of finished steps that neither these steps nor any experiment beside their store uses.

    Folders of unfinished steps are left out: a run may go on from them.
    """
    store = steps[0].step.store
    used = {planned.step.folder.name for planned in steps} | _linked(store)
    made_from = {}
    for path in store.glob(f"*/{DONE}"):
        record = json.loads(path.read_text(encoding="utf-8"))
        made_from[path.parent.name] = record.get("made_from", [])
    for name in used & made_from.keys():
        used = used.union(made_from[name])
    return sorted(store / name for name in made_from.keys() - used)


def _linked(store: Path) -> set[str]:
    """Return the names of the steps to which the experiments beside their store link."""
    inside = store.resolve()
    names = set()
    for path in store.parent.rglob("*"):
        if path.is_symlink() and store not in path.parents:
            target = path.resolve()
            if inside in target.parents:
                names.add(target.relative_to(inside).parts[0])
    return names


def size_mib(folders: Sequence[Path]) -> float:
    """Return the MiB of all files in some folders."""
    size = 0
    for folder in folders:
        size += sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
    return size / 2**20


def remove(folders: Sequence[Path], store: Path) -> None:
    """Remove folders of a store; CoinError while a run is at work there."""
    try:
        for path in (store / ".locks").glob("*"):
            with FileLock(path, blocking=False):
                pass
    except Timeout as error:
        found = f"found a run at work on '{Path(error.lock_file).name}' in '{store}'"
        raise CoinError(f"{found}, expected none; wait until it has ended") from error
    for folder in folders:
        (folder / DONE).unlink()  # without it a folder that is removed in part is no finished step
        shutil.rmtree(folder)
