"""A progress bar on standard error, removed at the end; without a terminal a line now and then."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

from coin.core.processes import is_rank_zero

T = TypeVar("T")
EVERY = 30.0  # seconds between two lines without a terminal, and before the first


def progress_bar(
    what: str, total: float | None = None, items: Iterable[T] | None = None
) -> "tqdm[T]":
    """Return a bar to update after each of `total` steps and to close, or one to iterate over items by."""
    seldom = {}
    if not sys.stderr.isatty():
        seldom = dict.fromkeys(("mininterval", "maxinterval", "delay"), EVERY)
    return tqdm(
        items,
        desc=what,
        total=total,
        leave=False,
        disable=not is_rank_zero(),
        **seldom,
    )
