"""Tables, plots, the HTML report and what goes to W&B, from measured rows alone."""

from coin.reporting.results import (
    COLUMNS,
    Row,
    confusion_key,
    read_configuration,
    read_confusions,
    read_results,
    write_results,
)
from coin.reporting.summary import read_seeds, read_summary, summarise, write_summary

__all__ = [
    "COLUMNS",
    "Row",
    "confusion_key",
    "read_configuration",
    "read_confusions",
    "read_results",
    "read_seeds",
    "read_summary",
    "summarise",
    "write_results",
    "write_summary",
]
