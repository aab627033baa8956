"""Checks of options: an entry of an enum, a number in a range, a list of names."""

import difflib
from collections.abc import Iterable
from enum import StrEnum
from math import inf, isfinite
from typing import Any, TypeVar

from coin.errors import ConfigurationError

E = TypeVar("E", bound=StrEnum)


def parse_enum(kind: type[E], name: str, value: Any) -> E:
    """Return the entry of an enum that the option `name` gives, or raise a ConfigurationError."""
    try:
        return kind(value)
    except ValueError as error:
        meant = did_you_mean(str(value), kind)
        expected = ", ".join(kind)
        raise ConfigurationError(
            f"found {name}={value!r}{meant}, expected one of {expected}"
        ) from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean …?)" with the nearest of the known names, whatever their case; "" where none is near."""
    lower = {each.lower(): each for each in known if each != name}
    for near in difflib.get_close_matches(name.lower(), lower, n=1):
        return f" (did you mean {lower[near]}?)"
    return ""


def check_integer(name: str, value: Any, least: int) -> None:
    """Raise ConfigurationError unless a value is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigurationError(
            f"found {name}={value!r}, expected a whole number of at least {least}"
        )


def check_number(
    name: str,
    value: Any,
    *,
    low: float = -inf,
    high: float = inf,
    most: float = inf,
    strict: bool = False,
) -> None:
    """Raise ConfigurationError unless a number is finite, ≥ `low` (or >, if strict), < `high` and ≤ `most`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and isfinite(value):
        is_above = value > low if strict else value >= low
        if is_above and value < high and value <= most:
            return
    bounds = {"above" if strict else "at least": low, "below": high, "at most": most}
    told = [f"{side} {limit:g}" for side, limit in bounds.items() if isfinite(limit)]
    expected = " and ".join(told) or "that is finite"
    raise ConfigurationError(f"found {name}={value!r}, expected a number {expected}")


def is_list_of_names(value: Any) -> bool:
    """Return whether a value is a list of at least one string."""
    if not isinstance(value, list):
        return False
    return len(value) > 0 and all(isinstance(each, str) for each in value)
