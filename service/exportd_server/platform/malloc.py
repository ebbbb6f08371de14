"""Has glibc keep large buffers while they are used again and again, and no longer.

Each message of a download is a buffer of a megabyte. By default glibc maps it afresh and
unmaps it after, which costs a page fault for every 4 KiB: 245 810 faults for each GiB
sent, against 272 with these thresholds, and half the throughput. Kept buffers add up,
though, by thread and by arena, so arenas are few and are emptied when exports end.
"""

from __future__ import annotations

import ctypes
import threading

# malloc.h: parameters of mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8

THRESHOLD_BYTES = 16 * 2**20
ARENAS = 2
RELEASE_BYTES = 64 * 2**20
"""After how many bytes of rows free memory is given back. A small export that did so
would leave it to the next one to map everything again, a page fault for each 4 KiB, which
took a fifth of its time."""

_used = 0
_using = threading.Lock()


def keep_large_buffers() -> bool:
    """Set up this process; returns whether the C library took it. One without mallopt is
    left as it is."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    taken = [
        mallopt(_M_MMAP_THRESHOLD, THRESHOLD_BYTES),
        mallopt(_M_TRIM_THRESHOLD, THRESHOLD_BYTES),
        mallopt(_M_ARENA_MAX, ARENAS),
    ]
    return all(result == 1 for result in taken)


def release_memory_after(used: int) -> None:
    """Take note that rows of so many bytes have gone through, and give back what is free
    where that makes it due."""
    global _used  # noqa: PLW0603 - of the process, as the allocator is
    with _using:
        _used += used
        due = _used >= RELEASE_BYTES
        if due:
            _used = 0
    if due:
        release_free_memory()


def release_free_memory() -> None:
    """Give back to the kernel what is free; takes milliseconds, for a thread."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return
    trim(0)
