"""Memory allocator settings for a process that only downloads."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_MIB = 1024 * 1024


def tune() -> None:
    """Let glibc keep freed message buffers. By default each message of a megabyte is
    mapped and faulted in afresh, which halves the speed of a download.

    It concerns the whole process; so it is for a program to decide, not for a library.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # another C library
    # Some versions refuse a threshold above 32 MiB and answer with 0.
    mallopt(_M_MMAP_THRESHOLD, 64 * _MIB) or mallopt(_M_MMAP_THRESHOLD, 32 * _MIB)
    mallopt(_M_TRIM_THRESHOLD, 64 * _MIB)
