"""The output store in memory, for tests and trials: the promises of the others, but
nothing outlives the process."""

from __future__ import annotations

import threading
import weakref
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from exportd_server.errors import StoreFailed
from exportd_server.store.base import Buffer
from exportd_server.store.key import JobPrefix, OutputKey


@dataclass(eq=False, slots=True)
class _Unfinished:
    """What a writer has written so far. The store owns it; the writer comes and goes."""

    key: OutputKey
    data: bytearray = field(default_factory=bytearray)


class MemoryStore:
    """Keeps parts in a dictionary."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._parts: dict[OutputKey, bytes] = {}
        self._unfinished: dict[_Unfinished, weakref.ref[MemoryPartWriter]] = {}
        self._owner: str | None = None

    def create(self, key: OutputKey) -> MemoryPartWriter:
        """Begin a part."""
        unfinished = _Unfinished(key)
        writer = MemoryPartWriter(self, unfinished)
        with self._lock:
            self._unfinished[unfinished] = weakref.ref(writer)
        return writer

    async def open(self, key: OutputKey, offset: int = 0) -> MemoryPartReader:
        """Open a finalized part at a byte offset."""
        if offset < 0:
            raise ValueError("an offset is not negative")
        with self._lock:
            return MemoryPartReader(self._part(key), offset)

    async def size(self, key: OutputKey) -> int:
        """Bytes of a finalized part."""
        with self._lock:
            return len(self._part(key))

    async def delete(self, key: OutputKey) -> None:
        """Delete one part."""
        with self._lock:
            self._parts.pop(key, None)

    async def delete_job(self, prefix: JobPrefix) -> int:
        """Delete everything of a job."""
        with self._lock:
            parts = [key for key in self._parts if key.prefix == prefix]
            begun = [some for some in self._unfinished if some.key.prefix == prefix]
            for key in parts:
                del self._parts[key]
            for unfinished in begun:
                del self._unfinished[unfinished]
        return len(parts) + len(begun)

    async def list_job(self, prefix: JobPrefix) -> AsyncIterator[OutputKey]:
        """The finalized parts of a job."""
        with self._lock:
            found = [key for key in self._parts if key.prefix == prefix]
        for key in found:
            yield key

    async def list_jobs(self) -> AsyncIterator[JobPrefix]:
        """Every job that has anything here."""
        with self._lock:
            found = {key.prefix for key in self._parts}
            found |= {unfinished.key.prefix for unfinished in self._unfinished}
        for prefix in found:
            yield prefix

    async def sweep_unfinished(self, prefix: JobPrefix) -> int:
        """Delete writes whose writer was collected without having finished."""
        with self._lock:
            abandoned = [
                unfinished
                for unfinished, writer in self._unfinished.items()
                if unfinished.key.prefix == prefix and writer() is None
            ]
            for unfinished in abandoned:
                del self._unfinished[unfinished]
        return len(abandoned)

    async def claim(self, owner: str) -> str:
        """Note whose this is, unless it is somebody's."""
        with self._lock:
            self._owner = self._owner or owner
            return self._owner

    async def close(self) -> None:
        """Nothing is held but the parts, and those are there for the next one."""

    def _part(self, key: OutputKey) -> bytes:
        try:
            return self._parts[key]
        except KeyError:
            raise KeyError(str(key)) from None

    # --- for the writer

    def _finalize(self, unfinished: _Unfinished) -> None:
        with self._lock:
            deleted = self._unfinished.pop(unfinished, None) is None
            if deleted or unfinished.key in self._parts:
                raise StoreFailed
            self._parts[unfinished.key] = bytes(unfinished.data)

    def _discard(self, unfinished: _Unfinished) -> None:
        with self._lock:
            self._unfinished.pop(unfinished, None)


class MemoryPartWriter:
    """Writes one part."""

    def __init__(self, store: MemoryStore, unfinished: _Unfinished) -> None:
        self._store = store
        self._unfinished: _Unfinished | None = unfinished

    def write(self, data: Buffer, /) -> int:
        """Append all of `data`."""
        view = memoryview(data).cast("B")
        self._open().data.extend(view)
        return len(view)

    def finalize(self) -> None:
        """Make the part readable."""
        unfinished, self._unfinished = self._open(), None
        self._store._finalize(unfinished)  # noqa: SLF001 - one backend, two classes

    def abort(self) -> None:
        """Throw away what was written."""
        if self._unfinished is not None:
            self._store._discard(self._unfinished)  # noqa: SLF001 - as above
            self._unfinished = None

    def _open(self) -> _Unfinished:
        if self._unfinished is None:
            raise ValueError("the part is finalized or aborted")
        return self._unfinished


class MemoryPartReader:
    """Reads one part."""

    def __init__(self, data: bytes, offset: int) -> None:
        self._rest: memoryview | None = memoryview(data)[offset:]

    async def readinto(self, buffer: memoryview, /) -> int:
        """Fill `buffer` from its start."""
        if self._rest is None:
            raise ValueError("the reader is closed")
        buffer = buffer.cast("B")
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    async def close(self) -> None:
        """Let go of the bytes."""
        self._rest = None
