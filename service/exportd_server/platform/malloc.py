"""Has glibc keep large buffers while they are used again and again.

Each message of a download is a buffer of a megabyte. By default glibc maps it afresh and
unmaps it after, which costs a page fault for every 4 KiB: 245 810 faults for each GiB
sent, against 272 with these thresholds, and half the throughput. Kept buffers add up,
though, by thread and by arena, so arenas are few and are emptied when exports end, unless
that was done just before.
"""

from __future__ import annotations

import ctypes
import threading
import time

# malloc.h: parameters of mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8

THRESHOLD_BYTES = 16 * 2**20
ARENAS = 2
RELEASE_BYTES = 64 * 2**20
RELEASE_SECONDS = 10.0
"""Free memory is given back after so many bytes of rows, or when that was so long ago. A
small export that did so each time would leave it to the next one to map everything again,
a page fault for each 4 KiB, which took a quarter of its time."""


class _Releases:
    """When free memory was last given back, and what has gone through since."""

    def __init__(self) -> None:
        self._used = 0
        self._last = 0.0
        self._lock = threading.Lock()

    def due_after(self, used: int) -> bool:
        now = time.monotonic()
        with self._lock:
            self._used += used
            due = self._used >= RELEASE_BYTES or now - self._last >= RELEASE_SECONDS
            if due:
                self._used, self._last = 0, now
        return due


_releases = _Releases()


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
    """Take note that an export has ended of whose rows so many bytes went through here,
    and give back what is free where that makes it due."""
    if _releases.due_after(used):
        release_free_memory()


def release_free_memory() -> None:
    """Give back to the kernel what is free; takes milliseconds, for a thread."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return
    trim(0)
