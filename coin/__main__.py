"""``python -m coin``, and the ``coin`` command."""

import ctypes
import os
import signal
import sys
from contextlib import suppress
from typing import NoReturn


def tune_process() -> None:
    """Keep OpenMP's threads from spinning for long and glibc from giving large blocks back.

    Idle threads that spin starve all other processes: three small trainings at once on two cores take six times as
    long. And a training step that asks the kernel for fresh pages time and again spends up to half its time there.
    Environment variables that the user has set stand; where the C library is not glibc, that part is left out.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if sys.platform == "linux" and not os.environ.keys() & {"MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"}:
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(-4, 0)  # M_MMAP_MAX
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def entry_point() -> NoReturn:
    """Run the command line of the process."""
    tune_process()  # which only counts before torch is imported
    if sys.platform != "win32" and sys.argv[1:2] in (["report"], ["choose"], ["simulate"]):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends them quietly
    from coin.cli import main

    sys.exit(main())


if __name__ == "__main__":
    entry_point()
