"""Settings of the process that make PyTorch fast on CPUs; they only count before torch is imported."""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def tune_process() -> None:
    """Keep OpenMP's threads from spinning and glibc from giving large blocks back.

    Idle OpenMP threads that spin starve every other process on the machine, and a training step that asks the kernel
    for fresh pages time and again spends up to half its time there. Environment variables that the user has set stand;
    where the C library is not glibc, the second part is left out.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if sys.platform == "linux" and "MALLOC_MMAP_MAX_" not in os.environ:
        try:
            libc = ctypes.CDLL(None)
            libc.mallopt(_M_MMAP_MAX, 0)
            libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        except (OSError, AttributeError):
            return
