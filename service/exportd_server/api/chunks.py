"""The memory that downloads take, bounded however many there are.

A chunk on its way is there twice: as it was read, and in what sends it, until the reader
takes it. A reader that takes nothing keeps it there. So chunks begin small, grow as they
are taken, and are the smaller the more downloads there are.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO

_FIRST = 64 * 1024


class ChunkMemory:
    """What all downloads of a process share; sizes in bytes. For the event loop's thread.

    No chunk is larger than `most`, nor than `in_flight` shared by all downloads, but each
    may have `_FIRST`.
    """

    def __init__(self, most: int = 2**20, in_flight: int = 16 * 2**20) -> None:
        self.most = most
        self._in_flight = in_flight
        self._downloads = 0

    @contextmanager
    def download(self) -> Iterator[ChunkBuffer]:
        """The buffer of a download, for as long as it runs."""
        self._downloads += 1
        try:
            yield ChunkBuffer(self)
        except BaseException as error:
            _forget_rooms(error)
            raise
        finally:
            self._downloads -= 1

    def size(self, grown: int) -> int:
        """How large a chunk may be now, for a download whose last one allows `grown`."""
        share = max(_FIRST, self._in_flight // max(1, self._downloads))
        return min(self.most, grown, share)


def _forget_rooms(error: BaseException) -> None:
    """Take the rooms out of the frames that an error has come through.

    An error may be kept in a cycle of references, and its frames with it. A garbage
    collector that finds the memory of a `BytesIO` lent in such a cycle ends the process in
    Python 3.12 and complains in 3.13: https://github.com/python/cpython/issues/111049
    """
    seen: set[int] = set()
    errors: list[BaseException | None] = [error]
    while errors:
        one = errors.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            errors += one.__cause__, one.__context__


def _no_head(_: int) -> int:
    return 0


class ChunkBuffer:
    """Memory that one download reads into, and that is its chunks then.

    What was read is a chunk without being copied: `BytesIO` lends its memory to be read
    into, and gives the same memory away as `bytes`. It has it again once nobody has that
    chunk any more; should somebody have it still, it takes other memory by itself. A chunk
    whose hash somebody asked for would leave that to the next one: nobody does.
    """

    def __init__(self, shared: ChunkMemory) -> None:
        self._shared = shared
        self._memory = BytesIO()
        self._size = 0
        self._head = 0
        self._grown = _FIRST

    def release(self) -> None:
        """Keep no memory until there is something to read again."""
        self._memory, self._size = BytesIO(), 0

    def room(self, wanted: int, head: Callable[[int], int] = _no_head) -> memoryview:
        """Where to read the next bytes into, `wanted` at most, behind a head of the length
        that `head` says for so many bytes. What was given before is void."""
        count = min(wanted, self._shared.size(self._grown))
        self._grown = min(2 * self._grown, self._shared.most)
        self._head = head(count)
        size = self._head + count
        if size != self._size:
            self.release()
            self._memory, self._size = BytesIO(bytes(size)), size
        return self._memory.getbuffer()[self._head :]

    def chunk(self, data: memoryview, head: bytes = b"") -> bytes:
        """`head` and then `data`, which is what was read into the room from its start and
        is void afterwards. They are copied only where they do not fill it."""
        if len(head) != self._head or len(head) + len(data) != self._size:
            chunk = b"".join((head, data))
            data.release()
            self.release()
            return chunk
        # It gives its memory away only when nobody can write to it.
        data.release()
        with self._memory.getbuffer() as memory:
            memory[: self._head] = head
        return self._memory.getvalue()
