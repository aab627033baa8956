"""``python -m coin``, and the ``coin`` command."""

import os
import signal
import sys
from typing import NoReturn

from coin.core.memory import keep_freed_memory


def tune_process() -> None:
    """Keep OpenMP's threads from spinning for long and glibc from giving large blocks back (`keep_freed_memory`).

    Idle threads that spin starve all other processes: three small trainings at once on two cores take six times as
    long. Environment variables that the user has set stand.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    keep_freed_memory()


def entry_point() -> NoReturn:
    """Run the command line of the process."""
    tune_process()  # which only counts before torch is imported
    if sys.platform != "win32" and sys.argv[1:2] in (["report"], ["choose"]):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends them quietly
    from coin.cli import main, take_signals

    take_signals()
    sys.exit(main())


if __name__ == "__main__":
    entry_point()
