"""A source whose batches come when the test says so."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import pyarrow as pa

from exportd_server.errors import SourceFailed
from exportd_server.sources.base import (
    Column,
    Plan,
    Query,
    Shard,
)
from exportd_server.sources.loose import LooseBatch, Shape

SCHEMA = pa.schema([pa.field("id", pa.int64(), nullable=False), ("text", pa.string())])
BATCH_ROWS = 1000


class GateSource:
    """Gives `batches` batches of 1 000 rows. Each waits for one `allow`; without limit
    once `open_wide` was called. `fail` makes the next batch an error."""

    def __init__(self, batches: int = 10, *, wide: bool = False) -> None:
        self.batches = batches
        self._allowed = 0
        self._wide = wide
        self._error: Exception | None = None
        self.changed = threading.Condition()
        self.given = 0
        self.opened = 0
        self.cancelled = 0
        self.skipped: list[int] = []

    def allow(self, count: int = 1) -> None:
        with self.changed:
            self._allowed += count
            self.changed.notify_all()

    def open_wide(self) -> None:
        with self.changed:
            self._wide = True
            self.changed.notify_all()

    def fail(self, error: Exception | None = None) -> None:
        with self.changed:
            self._error = error or SourceFailed()
            self.changed.notify_all()

    def columns(self) -> tuple[Column, ...]:
        return tuple(Column(f.name, f.type, nullable=f.nullable) for f in SCHEMA)

    def count(self) -> int | None:
        return self.batches * BATCH_ROWS

    def plan(self, query: Query, *, shard_rows: int | None = None) -> Plan:
        return Plan((Shard(0),), self.batches * BATCH_ROWS)

    def open(self, query: Query, shard: Shard, *, skip_rows: int = 0) -> GateStream:
        self.opened += 1
        self.skipped.append(skip_rows)
        return GateStream(self, query, skip_rows)

    def wait_for_turn(self, stream: GateStream) -> None:
        with self.changed:
            while True:
                if stream.cancelled:
                    raise SourceFailed
                if self._error is not None:
                    error, self._error = self._error, None
                    raise error
                if self._wide:
                    break
                if self._allowed:
                    self._allowed -= 1
                    break
                self.changed.wait()
            self.given += 1


class GateStream:
    """Batches of a `GateSource`."""

    def __init__(self, source: GateSource, query: Query, skip_rows: int) -> None:
        self._source = source
        self._query = query
        self._skip = skip_rows
        self.cancelled = False
        self.schema = pa.schema([SCHEMA.field(name) for name in query.columns])

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        for index in range(self._skip // BATCH_ROWS, self._source.batches):
            self._source.wait_for_turn(self)
            first = index * BATCH_ROWS
            ids = pa.array(range(first, first + BATCH_ROWS), pa.int64())
            columns = {"id": ids, "text": ids.cast(pa.string())}
            batch = pa.RecordBatch.from_arrays(
                [columns[name] for name in self._query.columns], schema=self.schema
            )
            yield batch.slice(max(0, self._skip - first))

    def loose(self) -> Iterator[LooseBatch]:
        shape = Shape(self.schema)
        for batch in self:
            yield LooseBatch(batch, shape)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None:
        return None

    def cancel(self) -> None:
        with self._source.changed:
            self.cancelled = True
            self._source.cancelled += 1
            self._source.changed.notify_all()
