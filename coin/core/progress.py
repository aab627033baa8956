"""A progress bar on standard error, removed at the end; without a terminal a line now and then."""

import math
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from coin.core.processes import rank_zero_info

T = TypeVar("T")

EVERY = 30.0
"""Seconds between two lines."""
SOON = 5.0
"""What takes fewer seconds is not told of."""


class ProgressLines:
    """Says every `EVERY` seconds how far a work is, and how long it will take; call it after each of `total` steps."""

    def __init__(self, what: str, total: float | None) -> None:
        self.what, self.total, self.done = what, total, 0.0
        self.began = self.told = time.monotonic()

    def __call__(self, steps: float = 1) -> None:
        """Count steps that are done, and print a line if it is time for one."""
        self.done += steps
        now = time.monotonic()
        if self.total is not None and math.isfinite(self.total) and now - self.told >= EVERY:
            if (left := (now - self.began) / self.done * (self.total - self.done)) >= SOON:
                rank_zero_info(f"{self.what}: {self.done / self.total:.0%}, about {left:.0f} s left")
            self.told = now


@contextmanager
def progress(what: str, total: float | None) -> Iterator[Callable[..., None]]:
    """Yield a function to call after each of `total` steps, or with a number of them; None if the total is unknown."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    if not console.is_interactive:
        yield ProgressLines(what, total)
        return
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as display:
        yield partial(display.advance, display.add_task(what, total=total))


def tracked(items: Collection[T], what: str) -> Iterator[T]:
    """Yield the items, and show how many are done."""
    with progress(what, len(items)) as advance:
        for item in items:
            yield item
            advance()
