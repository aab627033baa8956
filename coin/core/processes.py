"""Distributed processes: rank zero, and results that it computes for all of them."""

import atexit
import os
import sys
from collections.abc import Callable
from contextvars import ContextVar
from datetime import timedelta
from functools import cache
from typing import TypeVar

from torch import distributed

from coin.errors import CoinError, first_line

T = TypeVar("T")

# With the first process: it may merge for hours, and NCCL gives up within minutes.
_PATIENCE = timedelta(days=7)
# Whether it is at work for all, and the others wait.
_alone: ContextVar[bool] = ContextVar("alone", default=False)


def _has_group() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def process_count() -> int:
    """Return the number of processes, 1 without a process group."""
    return distributed.get_world_size() if _has_group() else 1


def is_rank_zero() -> bool:
    """Return whether this process writes files and messages: it is rank zero."""
    return not _has_group() or _alone.get() or distributed.get_rank() == 0


def rank_zero_info(text: str) -> None:
    """Print a progress message to standard error, on rank zero only."""
    if is_rank_zero():
        print(text, file=sys.stderr, flush=True)


def on_rank_zero(compute: Callable[[], T]) -> T:
    """Run `compute` on rank zero only, and return its result, which must be picklable, on all processes.

    Within `compute` rank zero runs alone: nested calls do not wait for others. Where it raises an error or ends, a
    CoinError is raised on all other processes.
    """
    if process_count() == 1 or _alone.get():
        return compute()
    result: T | None = None
    failed: BaseException | None = None
    if distributed.get_rank() == 0:
        token = _alone.set(True)
        try:
            result = compute()
        except BaseException as error:
            failed = error
        finally:
            _alone.reset(token)
    outcome = [result, failed and first_line(failed)]
    try:
        distributed.broadcast_object_list(outcome, src=0, group=_control())
    except RuntimeError as error:  # a connection is closed
        raise failed or CoinError("another process has ended; see what it has printed") from error
    if failed is not None:
        raise failed
    made, line = outcome
    if line is not None:
        raise CoinError(f"another process has stopped: {line}")
    return made  # type: ignore[return-value]


@cache
def _control() -> distributed.ProcessGroup:
    """Return a gloo group for results: waiting in it keeps no GPU busy."""
    return distributed.new_group(backend="gloo", timeout=_PATIENCE)  # type: ignore[no-any-return]


@cache
def leave_processes_at_exit() -> None:
    """Have the process group destroyed before the interpreter ends, as Lightning does for NCCL alone."""
    # A thread of gloo that still held a tensor would abort the process: https://github.com/pytorch/pytorch/pull/179291.
    atexit.register(lambda: distributed.destroy_process_group() if _has_group() else None)


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
