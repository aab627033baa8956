"""A progress bar on standard error, removed at the end; nothing without a terminal."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

T = TypeVar("T")


@contextmanager
def progress(what: str, total: float | None) -> Iterator[Callable[..., None]]:
    """Yield a function to call after each of `total` steps, or with a number of them; None if the total is unknown."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    quiet = not console.is_interactive
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, disable=quiet) as display:
        yield partial(display.advance, display.add_task(what, total=total))


def tracked(items: Collection[T], what: str) -> Iterator[T]:
    """Yield the items, and show how many are done."""
    with progress(what, len(items)) as advance:
        for item in items:
            yield item
            advance()
