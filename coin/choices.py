"""Options that name one entry of an enum."""

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
