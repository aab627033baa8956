"""Options: numbers in a range, whole numbers, and names that are nearly known."""

import math
from enum import StrEnum

import pytest

from coin.core.choices import check_integer, check_number, parse_enum
from coin.errors import ConfigurationError

Fruit = StrEnum("Fruit", "apple pear")

TAKEN = [
    (0, {"low": 0}),
    (0.1, {"low": 0, "strict": True}),
    (1, {"low": 0, "most": 1}),
]
REFUSED = {
    "found x=-0.1, expected a number at least 0": (-0.1, {"low": 0}),
    "expected a number above 0": (0, {"low": 0, "strict": True}),
    "expected a number at least 0 and below 1": (1, {"low": 0, "high": 1}),
    "expected a number at least 0 and at most 1": (1.1, {"low": 0, "most": 1}),
    "found x=nan": (math.nan, {"low": 0}),
    "found x=inf": (math.inf, {"low": 0}),
    "found x=True": (True, {"low": 0}),
    "found x='1'": ("1", {"low": 0}),
}


@pytest.mark.parametrize(("value", "bounds"), TAKEN)
def test_numbers_in_the_range_are_taken(value, bounds):
    check_number("x", value, **bounds)


@pytest.mark.parametrize("message", REFUSED)
def test_other_numbers_are_refused(message):
    value, bounds = REFUSED[message]
    with pytest.raises(ConfigurationError, match=message):
        check_number("x", value, **bounds)


@pytest.mark.parametrize("value", [0, 1.0, True, "1"])
def test_what_is_no_whole_number_of_at_least_one_is_refused(value):
    message = f"found n={value!r}, expected a whole number of at least 1"
    with pytest.raises(ConfigurationError, match=message):
        check_integer("n", value, 1)


def test_a_name_that_is_nearly_known_is_told():
    assert parse_enum(Fruit, "fruit", "pear") is Fruit.pear
    message = r"found fruit='Appel' \(did you mean apple\?\), expected one of apple, pear"
    with pytest.raises(ConfigurationError, match=message):
        parse_enum(Fruit, "fruit", "Appel")
