"""One delivery by the database sink, in a process of its own: `python -m
bench.delivery_run`, told by JSON on standard input what to deliver."""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from bench.store_run import timed
from exportd_server.encoders.base import Format, OutputFormat
from exportd_server.platform.malloc import keep_large_buffers
from exportd_server.sinks.base import Delivery, Export, ExportColumn, Part
from exportd_server.sinks.database import (
    DatabaseConnection,
    DatabaseRequest,
    DatabaseSink,
)


class FileReader:
    """Reads a file; see `PartReader`."""

    def __init__(self, path: Path, offset: int) -> None:
        self._file = path.open("rb", buffering=0)
        self._file.seek(offset)

    async def readinto(self, buffer: memoryview, /) -> int:
        """From the page cache, as the local store does."""
        return self._file.readinto(buffer)

    async def close(self) -> None:
        """Close the file."""
        self._file.close()


class FileContent:
    """The bytes of a part; see `Content`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @asynccontextmanager
    async def open(self, offset: int = 0) -> AsyncIterator[FileReader]:
        """From an offset on."""
        reader = FileReader(self._path, offset)
        try:
            yield reader
        finally:
            await reader.close()


async def deliver(told: dict[str, Any]) -> None:
    """Deliver the whole once; prints what it took as JSON."""
    job_id = str(uuid.uuid4())
    export = Export(
        tenant="default",
        dataset="token_transfers",
        output=OutputFormat(Format.CSV),
        columns=tuple(ExportColumn(**column) for column in told["columns"]),
        job_id=job_id,
        file_stem=f"token_transfers-{job_id}",
    )
    parts = tuple(
        Part(
            shard=0,
            sequence=index,
            suffix_bytes=0,
            content=FileContent(Path(part.pop("path"))),
            sha256=bytes.fromhex(part.pop("sha256")),
            **part,
        )
        for index, part in enumerate(told["parts"])
    )
    request = DatabaseRequest.model_validate(
        {"table": told["table"], "mode": "APPEND", "create_table": told["create_table"]}
    )
    sink = await DatabaseSink().open(
        DatabaseConnection.model_validate({"url": told["url"]})
    )
    try:
        await sink.probe(request, export)
        with timed():
            await sink.deliver(request, Delivery(str(uuid.uuid4()), 1, export, parts=parts))
    finally:
        await sink.close()


if __name__ == "__main__":
    keep_large_buffers()  # as the server does
    asyncio.run(deliver(json.load(sys.stdin)))
