"""The exceptions that ``coin`` raises for a user's mistake.

Every message is one line: what was found, what was expected, what to do. The command line prints it as
``coin: error: …`` and exits with status 2; a library caller catches `CoinError`.
"""

import errno

_SPACE = "free some space, and run the same command again"
_LOWER = "lower batch sizes or calibration.memory_mib"
_ADVICE = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.ENOMEM: _LOWER,
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    **dict.fromkeys(
        (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
        "choose a folder you can write to, or mend the path",
    ),
}
_WRITING = ("PytorchStreamWriter failed", "unexpected pos ")
_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class CoinError(Exception):
    """Base class of everything that ``coin`` raises on purpose."""

    def __str__(self) -> str:
        """Return the message in one line, whatever lines a value that it quotes has."""
        text = super().__str__()
        if text.startswith("Caught ") and " in DataLoader worker process " in text:
            # The worker hands on its whole traceback, which ends with the error's type and the message.
            text = text.strip().splitlines()[-1].partition(": ")[2]
        return " ".join(text.split())


class ConfigurationError(CoinError, ValueError):
    """An option has a value that cannot be used."""


class DataError(CoinError, ValueError):
    """A data set is missing, unreadable or does not fit the experiment."""


class StateError(CoinError, ValueError):
    """Named tensors that must match do not: a name, a shape, a type, or a value that is not finite."""


class HeadError(StateError):
    """A network has no head of the kind that is needed: one linear layer that gives the logits."""


class FileError(CoinError, OSError):
    """A file of an experiment is missing, damaged or belongs to something else."""


class DecodingError(CoinError, ValueError):
    """A code cannot decode the erasure that is asked of it."""


class NumericalError(CoinError, ArithmeticError):
    """A computation broke down: a singular system, a result that is not finite."""


class ServingError(CoinError):
    """A query got no answer."""


class LostError(ServingError):
    """More servers are lost than the code can replace."""


class DeadlineError(ServingError, TimeoutError):
    """No answer came in time."""


class OverloadedError(ServingError):
    """There are too many queries; try again later."""


class ShortageError(CoinError):
    """A resource of the machine, such as memory, is insufficient or refused."""


class CoinWarning(UserWarning):
    """A warning to the user, in one line like the errors.

    The command line prints it as ``coin: warning: …``.
    """


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message, or the error's type if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def shortage_behind(error: BaseException | None) -> CoinError | None:
    """Return a CoinError for a lack of disk, memory or permissions behind an error or its causes, else None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _ADVICE:
            path = error.filename2 or error.filename  # of a copy, the one that is written
            where = f" at '{path}'" if path is not None else ""
            return FileError(f"found '{error.strerror}'{where}, expected to read or write; {_ADVICE[error.errno]}")
        text = first_line(error)
        if isinstance(error, MemoryError) or (
            isinstance(error, RuntimeError) and any(part in text for part in _MEMORY)
        ):
            return ShortageError(f"found too little memory ({text[:200]}), expected more; {_LOWER}")
        if isinstance(error, RuntimeError) and any(part in text for part in _WRITING):
            return FileError(f"found a file that cannot be written ({text[:200]}); {_SPACE}")
        error = error.__cause__ or error.__context__
    return None
