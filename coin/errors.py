"""The exceptions that ``coin`` raises for a user's mistake.

Every message is one line: what was found, what was expected, what to do. The command line prints it as
``coin: error: …`` and exits with status 2; a library caller catches `CoinError`.
"""


class CoinError(Exception):
    """Base class of everything that ``coin`` raises on purpose."""

    def __str__(self) -> str:
        """Return the message in one line; a DataLoader's worker hands on its traceback, which keeps its lines."""
        text = super().__str__()
        return text if "\nOriginal Traceback" in text else " ".join(text.split())


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


class CoinWarning(UserWarning):
    """A warning to the user, which the command line prints in one line, as ``coin: warning: …``."""


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message, or the error's type if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
