"""Exports to deliver, made of bytes in memory."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from itertools import repeat
from uuid import uuid4

from crc32c import crc32c

from exportd_server.delivery.sinks import Sinks
from exportd_server.encoders.base import Format, OutputFormat
from exportd_server.sinks.base import Content, Delivery, Export, ExportColumn, Part
from exportd_server.sinks.connections import Connections
from exportd_server.sinks.registry import SinkTypes
from exportd_server.store.base import PartReader

JOB_ID = "01890000-0000-7000-8000-000000000001"
COLUMNS = (
    ExportColumn("id", "INTEGER", "int64", nullable=False),
    ExportColumn("name", "STRING", "string", nullable=True),
)


class BytesContent:
    """A part's bytes, which can break off or be gone."""

    def __init__(
        self, data: bytes, *, gone: bool = False, fails: Exception | None = None
    ) -> None:
        self.data = data
        self.gone = gone
        self.fails = fails
        """Raised in the middle of reading."""
        self.opened = 0

    @asynccontextmanager
    async def open(self, offset: int = 0) -> AsyncIterator[BytesReader]:
        """See `Content`."""
        if self.gone:
            raise KeyError("gone")
        self.opened += 1
        yield BytesReader(self.data[offset:], self.fails)


class BytesReader:
    """Reads them, in pieces of its own choosing."""

    def __init__(self, data: bytes, fails: Exception | None) -> None:
        self._left = data
        self._fails = fails
        self._half = len(data) // 2

    async def readinto(self, buffer: memoryview, /) -> int:
        """See `PartReader`."""
        if self._fails is not None and len(self._left) <= self._half:
            raise self._fails
        count = min(len(buffer), len(self._left), max(1, self._half))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    async def close(self) -> None:
        """See `PartReader`."""


def no_sinks() -> Sinks:
    """A server without any sinks."""
    return Sinks(SinkTypes({}), Connections())


def an_export(
    output: OutputFormat | None = None,
    columns: Sequence[ExportColumn] = COLUMNS,
    *,
    tenant: str = "default",
    job_id: str = JOB_ID,
) -> Export:
    """An export of the dataset `orders`."""
    return Export(
        tenant=tenant,
        dataset="orders",
        output=output or OutputFormat(Format.CSV),
        columns=tuple(columns),
        job_id=job_id,
        file_stem=f"orders-{job_id}",
        create_time=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    )


def a_part(
    data: bytes,
    *,
    sequence: int = 0,
    rows: int = 1,
    prefix_bytes: int = 0,
    extension: str = "csv",
    content: Content | None = None,
) -> Part:
    """A part with these bytes."""
    return Part(
        shard=0,
        sequence=sequence,
        file_name=f"orders-{JOB_ID}.part-00000-{sequence:05d}.{extension}",
        rows=rows,
        bytes=len(data),
        prefix_bytes=prefix_bytes,
        suffix_bytes=0,
        crc32c=crc32c(data),
        sha256=hashlib.sha256(data).digest(),
        content=content or BytesContent(data),
    )


def deliver_part(export: Export, part: Part, *, attempt: int = 1) -> Delivery:
    """The delivery of one part."""
    return Delivery(str(uuid4()), attempt, export, part=part)


def deliver_whole(export: Export, *parts: Part, attempt: int = 1) -> Delivery:
    """The completion of an export of these parts."""
    return Delivery(str(uuid4()), attempt, export, parts=parts)


class GeneratedContent:
    """A part's bytes that are never all in memory: a head, then one block many times."""

    def __init__(self, head: bytes, block: bytes, times: int) -> None:
        self._head = head
        self._block = block
        self._times = times
        self.on_read: Callable[[], None] | None = None
        """Called at each read."""

    def pieces(self) -> Iterator[bytes]:
        """All of it, in pieces."""
        yield self._head
        yield from repeat(self._block, self._times)

    def part(self, sequence: int = 0) -> Part:
        """A part that has it."""
        digest, crc, size = hashlib.sha256(), 0, 0
        for piece in self.pieces():
            digest.update(piece)
            crc, size = crc32c(piece, crc), size + len(piece)
        return replace(
            a_part(b"", sequence=sequence),
            bytes=size,
            crc32c=crc,
            sha256=digest.digest(),
            prefix_bytes=len(self._head),
            content=self,
        )

    @asynccontextmanager
    async def open(self, offset: int = 0) -> AsyncIterator[PartReader]:
        """See `Content`."""
        assert offset == 0, "not needed so far"
        yield _PieceReader(self.pieces(), self.on_read)


class _PieceReader:
    def __init__(self, pieces: Iterator[bytes], on_read: Callable[[], None] | None) -> None:
        self._pieces = pieces
        self._on_read = on_read
        self._left = memoryview(b"")

    async def readinto(self, buffer: memoryview, /) -> int:
        if self._on_read is not None:
            self._on_read()
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._left = memoryview(piece)
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    async def close(self) -> None:
        """See `PartReader`."""


class StalledContent:
    """A part's bytes of which the last never come."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.reached = asyncio.Event()
        """Set when all but the last byte were read and that is waited for."""
        self.closed = False

    @asynccontextmanager
    async def open(self, offset: int = 0) -> AsyncIterator[PartReader]:
        """See `Content`."""
        try:
            yield _StalledReader(self, memoryview(self.data)[offset:-1])
        finally:
            self.closed = True


class _StalledReader:
    def __init__(self, content: StalledContent, left: memoryview) -> None:
        self._content = content
        self._left = left

    async def readinto(self, buffer: memoryview, /) -> int:
        if not self._left:
            self._content.reached.set()
            await asyncio.Event().wait()
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    async def close(self) -> None:
        """See `PartReader`."""
