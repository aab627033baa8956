"""Numbers and rows of results in words."""

import math
from typing import Any

import pandas as pd

from coin.coding.decoder_config import REPLICA
from coin.reporting.summary import REFERENCES


def percent(mean: float, spread: float = math.nan, digits: int = 2) -> str:
    """Return ``98.02 ± 0.31`` in percent, without the spread where there is none, ``–`` where there is no number."""
    if math.isnan(mean):
        return "–"
    text = f"{100 * mean:.{digits}f}"
    return text if math.isnan(spread) else f"{text} ± {100 * spread:.{digits}f}"


def percents(means: "pd.Series[float]", spreads: "pd.Series[float]") -> "pd.Series[str]":
    """Return `percent` of every mean and spread."""
    texts = [percent(mean, spread) for mean, spread in zip(means, spreads, strict=True)]
    return pd.Series(texts, index=means.index)


def seconds(value: float) -> str:
    """Return a duration in seconds with about three digits, ``–`` for NaN."""
    if math.isnan(value):
        return "–"
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def mebibytes(value: float) -> str:
    """Return a number of MiB with about three digits."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def counted(number: float, what: str) -> str:
    """Return ``1 expert``, ``2 experts``."""
    return f"{number:g} {what}" if number == 1 else f"{number:g} {what}s"


def read_by(row: "pd.Series[Any]") -> str:
    """Return what a row of `stand_ins` is in words, with its decoder if it has one."""
    name = "the survivors alone" if row["name"] == REFERENCES[0] else str(row["name"])
    return name if row["decoder"] == REPLICA else f"{name} with {row['decoder']}"
