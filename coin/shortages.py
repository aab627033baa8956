"""What the machine refuses, other than a file that ``coin`` knows of: disk, memory, permissions, told in one line."""

import errno

from coin.errors import CoinError, FileError, first_line

_ADVICE = {
    errno.ENOSPC: "free some space, and run the same command again",
    errno.EDQUOT: "free some of your quota, and run the same command again",
    errno.EROFS: "choose a folder you can write to",
    errno.EACCES: "choose another path, or mend its permissions",
    errno.EPERM: "choose another path, or mend its permissions",
    errno.ENOTDIR: "choose a folder, not a file",
    errno.EISDIR: "name a file, not a folder",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOMEM: "lower batch sizes or calibration.memory_mib",
}
_WRITING = ("PytorchStreamWriter failed", "unexpected pos ")
_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class ShortageError(CoinError):
    """The machine has not enough of something, or refuses it."""


def shortage_behind(error: BaseException | None) -> CoinError | None:
    """Return the refusal that an error, or one that led to it, comes from; none where it is something else."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _ADVICE:
            path = error.filename2 or error.filename  # of a copy, the one that is written
            where = f" at '{path}'" if path is not None else ""
            return FileError(f"found '{error.strerror}'{where}, expected to read or write; {_ADVICE[error.errno]}")
        text = first_line(error)
        if isinstance(error, MemoryError) or (
            isinstance(error, RuntimeError) and any(part in text for part in _MEMORY)
        ):
            return ShortageError(f"found too little memory ({text[:200]}), expected more; {_ADVICE[errno.ENOMEM]}")
        if isinstance(error, RuntimeError) and any(part in text for part in _WRITING):
            return FileError(f"found a file that cannot be written ({text[:200]}); {_ADVICE[errno.ENOSPC]}")
        error = error.__cause__ or error.__context__
    return None
