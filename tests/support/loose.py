"""Rows that cannot be exported, and a source that has some."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

from exportd_server.sources.base import Column, Plan, Query, Shard
from exportd_server.sources.loose import LooseBatch, Shape

SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        ("text", pa.string()),
        ("small", pa.int32()),
        ("at", pa.timestamp("us")),
        ("texts", pa.list_(pa.string())),
        ("what", pa.int64()),
    ]
)
"""What the rows are declared to be. They come with a wider `small`, and with the text of
a `what` that is no number beside it."""

SHAPE = Shape(SCHEMA, first=1, misfits={"what": 7}, check_text=True)

BAD = ("text", "small", "at", "texts", "what")
"""Columns whose value may be made bad, so that the row cannot be exported whatever the
format is."""


def raw(first: int, bad: Sequence[str | None]) -> pa.RecordBatch:
    """As many rows as `bad` has entries, numbered from `first`; an entry names the column
    that is bad in its row, if one is."""
    numbers = range(first, first + len(bad))
    texts = [
        b"\xff\xfe" if column == "text" else f"text {number}".encode()
        for number, column in zip(numbers, bad, strict=True)
    ]
    items = [
        [b"fine", b"\xff"] if column == "texts" else [b"fine", str(number).encode()]
        for number, column in zip(numbers, bad, strict=True)
    ]
    offsets = pa.array(range(0, 2 * len(items) + 1, 2), pa.int32())
    flat = pa.array([item for each in items for item in each], pa.binary())
    return pa.RecordBatch.from_arrays(
        [
            pa.array([0] * len(bad), pa.int8()),
            pa.array(numbers, pa.int64()),
            pa.array(texts, pa.binary()).view(pa.string()),
            pa.array([2**31 if column == "small" else 7 for column in bad], pa.int64()),
            pa.array(
                [2**63 - 1 if column == "at" else 10**15 for column in bad], pa.int64()
            ).view(pa.timestamp("us")),
            pa.ListArray.from_arrays(offsets, flat.view(pa.string())),
            pa.array([None if column == "what" else 5 for column in bad], pa.int64()),
            pa.array(["five" if column == "what" else None for column in bad]),
        ],
        names=["_head", *SCHEMA.names, "_misfit"],
    )


def loose(first: int, bad: Sequence[str | None]) -> LooseBatch:
    """The rows of `raw`."""
    return LooseBatch(raw(first, bad), SHAPE)


def good(first: int, bad: Sequence[str | None]) -> pa.RecordBatch:
    """Those of them that can be exported."""
    rows = [index for index, column in enumerate(bad) if column is None]
    return loose(first, bad).take(rows).fit()


@dataclass
class LooseSource:
    """A source whose shards are lists of batches, told by what is bad in them."""

    shards: Sequence[Sequence[Sequence[str | None]]]
    skipped: list[int] = field(default_factory=list)

    def columns(self) -> tuple[Column, ...]:
        return tuple(Column(f.name, f.type, nullable=f.nullable) for f in SCHEMA)

    def count(self) -> int | None:
        return None

    def plan(self, query: Query, *, shard_rows: int | None = None) -> Plan:
        return Plan(tuple(Shard(index) for index in range(len(self.shards))))

    def open(self, query: Query, shard: Shard, *, skip_rows: int = 0) -> LooseStream:
        self.skipped.append(skip_rows)
        return LooseStream(self.shards[shard.index], skip_rows, shard.index * 1_000_000)


class LooseStream:
    """Batches of one shard."""

    def __init__(
        self, batches: Sequence[Sequence[str | None]], skip: int, first: int
    ) -> None:
        self._batches = batches
        self._skip = skip
        self._first = first
        self.schema = SCHEMA

    def loose(self) -> Iterator[LooseBatch]:
        first, skip = self._first, self._skip
        for bad in self._batches:
            batch = loose(first, bad)
            first += batch.num_rows
            cut = min(skip, batch.num_rows)
            skip -= cut
            if cut < batch.num_rows:
                yield batch.slice(cut)

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        for batch in self.loose():
            yield batch.fit()

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
        return None


def lines(data: bytes) -> list[dict[str, Any]]:
    """The rows of an error part."""
    assert data.endswith(b"\n")
    rows = [json.loads(line) for line in data.splitlines()]
    for row in rows:
        assert set(row) == {
            *("shard", "row", "column", "reason", "message"),
            *("values", "base64", "truncated"),
        }
        assert row["reason"] == "VALUE_NOT_ENCODABLE"
    return rows
