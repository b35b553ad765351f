"""What the C library does with memory that is given back: keep it, for the next iteration."""

import ctypes
import os
import sys
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of options in glibc's malloc.h
_LARGEST_FROM_THE_HEAP = 32 * 2**20  # the most that glibc takes
_SET_BY_THE_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


@cache
def keep_freed_memory() -> bool:
    """Have glibc keep what is freed for later, for this whole process; True where it does.

    An iteration frees its activations at the end and asks for the same again. By default glibc
    gives the end of its heap back to the system as soon as some 64 MB there are free, and every
    page is then faulted in and cleared anew: 12,000 pages in an iteration of MDM with an NFNet at
    64 px. The peak of the process stays what it was. Blocks beyond 32 MB still come and go.
    Nothing happens under other C libraries, or where the environment has options for this one.
    Book: notebooks/14_efficiency.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _SET_BY_THE_USER):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Both: setting one stops glibc from raising the other by itself.
    kept = mallopt(_MMAP_THRESHOLD, _LARGEST_FROM_THE_HEAP)
    return bool(kept and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
