"""Exports to deliver, made of bytes in memory."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from uuid import uuid4

from exportd_server.encoders.base import Format, OutputFormat
from exportd_server.platform.checksum import crc32c
from exportd_server.sinks.base import Delivery, Export, ExportColumn, Part

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
        create_time=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    )


def a_part(
    data: bytes,
    *,
    sequence: int = 0,
    rows: int = 1,
    prefix_bytes: int = 0,
    extension: str = "csv",
    content: BytesContent | None = None,
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
