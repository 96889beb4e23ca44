"""Has the C library keep memory that was freed, for blocks of many MiB that come and go all the time.

It gives such blocks back to the system at once, and each new one is then filled with zeros page by page, which costs
more than quantizing what is in it. Does nothing with C libraries that have no mallopt.
"""

from __future__ import annotations

import ctypes

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_LARGEST_BLOCK = 32 << 20  # the largest that glibc lets come from its heap
_KEPT_BYTES = 512 << 20


def keep_freed_memory() -> None:
    """For the rest of the process, and for all threads: they share one heap."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_ARENA_MAX, 1)
        mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK)
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
