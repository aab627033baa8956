"""How this process gets memory from the system."""

import ctypes
import os
import sys
from contextlib import suppress


def keep_freed_memory() -> None:
    """Have glibc give back what is free now, and keep large blocks that are freed from now on, for the next ones.

    A pass that asks the kernel for fresh pages time and again spends up to half its time there. Environment variables
    that the user has set stand; nothing happens where the C library is not glibc.
    """
    if sys.platform == "linux" and not os.environ.keys() & {"MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"}:
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.malloc_trim(0)
            libc.mallopt(-4, 0)  # M_MMAP_MAX
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
