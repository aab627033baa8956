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
    if sys.platform == "linux" and not os.environ.keys() & {
        "MALLOC_MMAP_MAX_",
        "MALLOC_TRIM_THRESHOLD_",
    }:
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.malloc_trim(0)
            libc.mallopt(-4, 0)  # M_MMAP_MAX
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory has run out, on a device or, as a plain RuntimeError, on the CPU."""
    import torch  # not at the top: every command imports this file, and torch takes a second

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(
        error
    )
