"""Atomic writes: a file is complete or absent, even if its writer is killed."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from secrets import token_hex

from coin.errors import FileError

_LONGEST_NAME = 200  # bytes; file systems take 255, and what is made of a name is longer than it


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path, renamed onto `path` when the block ends well; a FileError where it cannot be written."""
    temporary = path.with_name(f".{path.name}.{token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except FileError:  # says what it is about
        raise
    except OSError as error:
        reason = error.strerror or error
        raise FileError(
            f"cannot write '{path}': {reason}; free the space or choose a folder you can write to"
        ) from error
    finally:
        with suppress(OSError):  # it was renamed, or never made
            temporary.unlink()


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers have left of `atomic_path` below a folder that no other process writes to."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` by way of a temporary name."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def link(place: Path, target: Path) -> None:
    """Make a place a relative link to a file or folder; a FileError where there is a folder."""
    wanted = os.path.relpath(target, place.parent)
    if place.is_symlink() and str(place.readlink()) == wanted:
        return
    if place.is_dir() and not place.is_symlink():
        raise FileError(
            f"found the folder '{place}', expected coin's own link or nothing; give another name or output"
        )
    with atomic_path(place) as temporary:
        temporary.symlink_to(wanted)


def how_to_redo(path: Path) -> str:
    """Return what to do about a damaged file; a finished step, whose folder has a ``done.json``, is not run again."""
    step = path.resolve().parent
    return (
        f"delete its step's folder '{step}' and run again"
        if (step / "done.json").is_file()
        else "make it again"
    )


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, read once unless it has changed; a FileError where it cannot be read."""
    try:
        found = path.stat()
        return _sha256(path, found.st_ino, found.st_size, found.st_mtime_ns)
    except OSError as error:
        raise FileError(
            f"cannot read '{path}' ({error.strerror}), expected a file; check the path"
        ) from error


@cache
def _sha256(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes(paths: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of files by their paths, for the metadata of what was made of them."""
    return {str(path): sha256_of(path) for path in paths}


def is_folder_name(name: str) -> bool:
    """Return whether a name is a plain, visible folder name: no separators, no ``..``."""
    is_short = len(name.encode()) <= _LONGEST_NAME
    is_plain = name.isprintable() and not set(name) & set("/\\")
    return bool(name) and is_short and is_plain and not name.startswith(".")
