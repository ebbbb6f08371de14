"""A sink that keeps a journal: one line of JSON for each export that has ended well, in a
file that the operator names.

    [connections.audit]
    type = "journal"
    file = "/var/lib/exports/journal.jsonl"

    "sinks": [{"plugin": {"type": "journal", "connection": "audit",
                          "config": {"note": "for the quarterly report"}}}]
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from exportd_server.errors import DeliveryFailed
from exportd_server.sinks.base import (
    PLACE,
    BadSinkRequest,
    Delivery,
    Export,
    SinkDefaults,
    SinkPlan,
    Takes,
)


class JournalRequest(BaseModel):
    """What a caller says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    note: str = Field("", max_length=200)


class JournalConnection(BaseModel):
    """What the operator says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: Annotated[Path, PLACE]


class JournalType:
    """The sink type `journal`."""

    name = "journal"
    request_model = JournalRequest
    connection_model = JournalConnection
    needs_connection = True
    defaults = SinkDefaults(timeout=10.0, concurrency=1)

    def check(
        self,
        request: JournalRequest,
        connection: JournalConnection | None,  # noqa: ARG002 - the seam's signature
        export: Export,  # noqa: ARG002 - likewise
    ) -> SinkPlan:
        """See `exportd_server.sinks.base.SinkType`."""
        if not request.note.isprintable():
            raise BadSinkRequest("note", "must be printable; leave out line breaks")
        return SinkPlan(Takes.WHOLE)

    async def open(self, connection: JournalConnection | None) -> Journal:
        """See `exportd_server.sinks.base.SinkType`."""
        if connection is None:
            raise DeliveryFailed("a journal needs a connection", retryable=False)
        return Journal(connection.file)


class Journal:
    """One journal."""

    def __init__(self, file: Path) -> None:
        self._file = file

    async def probe(self, request: JournalRequest, export: Export) -> None:  # noqa: ARG002 - the seam's signature
        """See `exportd_server.sinks.base.Sink`."""
        if not os.access(self._file.parent, os.W_OK):
            raise DeliveryFailed("the journal cannot be written", retryable=True)

    async def deliver(self, request: JournalRequest, delivery: Delivery) -> str:
        """See `exportd_server.sinks.base.Sink`."""
        export = delivery.export
        line = {
            "id": delivery.delivery_id,
            "job": export.job_id,
            "dataset": export.dataset,
            "rows": sum(part.rows for part in delivery.parts),
            "note": request.note,
        }
        try:
            return await asyncio.to_thread(self._append, line)
        except OSError as error:
            raise DeliveryFailed("the journal cannot be written", retryable=True) from error

    def _append(self, line: dict[str, object]) -> str:
        with self._file.open("a+b") as journal:
            fcntl.flock(journal, fcntl.LOCK_EX)
            journal.seek(0)
            entries = [json.loads(entry) for entry in journal]
            ids = [entry["id"] for entry in entries]
            # The same delivery may come again after a success that was not heard of.
            if line["id"] in ids:
                return f"line {ids.index(line['id']) + 1}"
            journal.write(json.dumps(line).encode() + b"\n")
            journal.flush()
            os.fsync(journal.fileno())
        return f"line {len(entries) + 1}"

    async def close(self) -> None:
        """See `exportd_server.sinks.base.Sink`."""
