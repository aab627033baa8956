"""Options that name one entry of an enum, or are a whole number."""

from enum import StrEnum
from typing import Any, TypeVar

from coin.errors import ConfigurationError

E = TypeVar("E", bound=StrEnum)


def chosen(kind: type[E], name: str, value: Any) -> E:
    """Return the entry of an enum that the option `name` gives.

    Raises:
        ConfigurationError: There is none.
    """
    try:
        return kind(value)
    except ValueError as error:
        raise ConfigurationError(f"found {name}={value!r}, expected one of {', '.join(kind)}") from error


def check_integer(name: str, value: Any, least: int) -> None:
    """Refuse what is no whole number of at least `least`.

    Raises:
        ConfigurationError: It is something else.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigurationError(f"found {name}={value!r}, expected a whole number of at least {least}")
