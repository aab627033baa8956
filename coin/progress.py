"""How far long work has come: told by whoever does it, shown where somebody watches.

Whoever works opens `progress` and says what is done; without a terminal that costs nothing and shows nothing::

    with progress("gauss_newton", total=60) as bar:
        for _ in range(60):
            ...
            bar.advance()

The command line opens `shown` around everything: one line a piece of work, with the time left, gone when it is done.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

T = TypeVar("T")


class Bar:
    """One piece of work; where nobody watches, a thing that does nothing."""

    def __init__(self, display: Progress | None = None, task: TaskID | None = None) -> None:
        self._display, self._task = display, task

    def advance(self, steps: float = 1) -> None:
        """Say that so many more of the steps are done."""
        if self._display is not None and self._task is not None:
            self._display.advance(self._task, steps)

    def reach(self, done: float, note: str = "") -> None:
        """Say how many steps are done altogether, and a word on how it goes."""
        if self._display is not None and self._task is not None:
            self._display.update(self._task, completed=done, note=note)


_DISPLAY: ContextVar[Progress | None] = ContextVar("coin_progress", default=None)


@contextmanager
def progress(what: str, total: float | None, done: float = 0) -> Iterator[Bar]:
    """Yield a bar for one piece of work.

    Args:
        what: A few words.
        total: How many steps there are at most; none where nobody knows.
        done: How many are done already.
    """
    display = _DISPLAY.get()
    if display is None:
        yield Bar()
        return
    task = display.add_task(what, total=total, completed=int(done), note="")
    display.start()
    try:
        yield Bar(display, task)
        display.refresh()
    finally:
        display.remove_task(task)
        if not display.tasks:
            display.stop()


def tracked(items: Collection[T], what: str) -> Iterator[T]:
    """Yield items one after the other, and tell how many are done."""
    with progress(what, len(items)) as bar:
        for item in items:
            yield item
            bar.advance()


@contextmanager
def shown(console: Console) -> Iterator[None]:
    """Show the work that is done in this block, if the console is a terminal that can; otherwise stay quiet."""
    if not console.is_interactive or _DISPLAY.get() is not None:
        yield
        return
    display = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("left  {task.fields[note]}", markup=False),
        console=console,
        transient=True,
        redirect_stdout=False,  # what is printed there is the result, and stays there
    )
    token = _DISPLAY.set(display)
    try:
        yield
    finally:
        _DISPLAY.reset(token)
        display.stop()
