"""Numbers and rows of results in words."""

import math
from typing import Any

import pandas as pd

from coin.coding.decoder_config import REPLICA
from coin.reporting.summary import REFERENCES


def percent(mean: float, spread: float = math.nan, digits: int = 2) -> str:
    """Return ``98.02 ± 0.31`` in percent, without the spread where there is none, ``–`` where there is no number."""
    text = number(100 * mean, digits)
    if math.isnan(mean) or math.isnan(spread):
        return text
    return f"{text} ± {number(100 * spread, digits)}"


def percents(means: "pd.Series[float]", spreads: "pd.Series[float]") -> "pd.Series[str]":
    """Return `percent` of every mean and spread."""
    pairs = zip(means, spreads, strict=True)
    texts = [percent(mean, spread) for mean, spread in pairs]
    return pd.Series(texts, index=means.index)


def number(value: float, digits: int) -> str:
    """Return a number with so many digits after the point, ``–`` for NaN."""
    if math.isnan(value):
        return "–"
    return f"{value:.{digits}f}"


def seconds(value: float) -> str:
    """Return a duration in seconds with about three digits, ``–`` for NaN."""
    if value >= 100:
        return f"{value:,.0f}"
    return number(value, 1)


def mebibytes(value: float) -> str:
    """Return a number of MiB with about three digits."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def counted(number: float, what: str) -> str:
    """Return ``1 expert``, ``2 experts``."""
    plural = "" if number == 1 else "s"
    return f"{number:g} {what}{plural}"


def read_by(row: "pd.Series[Any]") -> str:
    """Return what a row of `stand_ins` is in words, with its decoder if it has one."""
    name = str(row["name"])
    if row["name"] == REFERENCES[0]:
        name = "the survivors alone"
    if row["decoder"] == REPLICA:
        return name
    return f"{name} with {row['decoder']}"
