"""The memory that downloads take, bounded however many there are.

A chunk on its way is there twice: as it was written, and in what sends it, until the
reader takes it. A reader that takes nothing keeps it there. So chunks begin small, grow as
they are taken, and are the smaller the more downloads there are; and memory to read into
is lent only for as long as it is read into.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_FIRST = 64 * 1024
_SPARE = 8
"""Pieces of memory that are kept for the next read."""


class ChunkMemory:
    """What all downloads of a process share; sizes in bytes. For the event loop's thread.

    No chunk is larger than `most`, nor than `in_flight` shared by all downloads, but each
    may have `_FIRST`.
    """

    def __init__(self, most: int = 2**20, in_flight: int = 16 * 2**20) -> None:
        self.most = most
        self._in_flight = in_flight
        self._downloads = 0
        self._spare: list[bytearray] = []

    @contextmanager
    def download(self) -> Iterator[ChunkBuffer]:
        """The buffer of a download, for as long as it runs."""
        self._downloads += 1
        buffer = ChunkBuffer(self)
        try:
            yield buffer
        finally:
            self._downloads -= 1
            buffer.release()

    def size(self, grown: int) -> int:
        """How large a chunk may be now, for a download whose last one allows `grown`."""
        share = max(_FIRST, self._in_flight // max(1, self._downloads))
        return min(self.most, grown, share)

    def lend(self, size: int) -> bytearray:
        """Memory of at least that size."""
        if self._spare and len(self._spare[-1]) >= size:
            return self._spare.pop()
        return bytearray(size)

    def give_back(self, memory: bytearray) -> None:
        """Take memory back that is not read into any more."""
        self._spare.append(memory)
        # The largest last, which fits whoever asks next.
        self._spare.sort(key=len)
        del self._spare[:-_SPARE]


class ChunkBuffer:
    """Memory that one download reads into."""

    def __init__(self, shared: ChunkMemory) -> None:
        self._shared = shared
        self._memory: bytearray | None = None
        self._grown = _FIRST

    def room(self, wanted: int) -> memoryview:
        """Where to read the next bytes into, `wanted` at most; for until `release`. The
        chunk before was taken."""
        self.release()
        size = min(wanted, self._shared.size(self._grown))
        self._grown = min(2 * self._grown, self._shared.most)
        self._memory = self._shared.lend(size)
        return memoryview(self._memory)[:size]

    def release(self) -> None:
        """What was read has been copied. Idempotent."""
        memory, self._memory = self._memory, None
        if memory is not None:
            self._shared.give_back(memory)
