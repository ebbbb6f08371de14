"""The seam between exportd and whatever holds a dataset's rows.

A source knows columns, queries and batches of Arrow. It knows nothing of jobs, formats
or gRPC.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from types import TracebackType
from typing import Protocol, Self

import pyarrow as pa
import pyarrow.types as pat

from exportd_server.sources.loose import LooseBatch


class ColumnKind(enum.StrEnum):
    """Kinds of column values, as the contract names them."""

    BOOLEAN = "BOOLEAN"
    INTEGER = "INTEGER"
    FLOAT = "FLOAT"
    DECIMAL = "DECIMAL"
    STRING = "STRING"
    BINARY = "BINARY"
    DATE = "DATE"
    TIME = "TIME"
    TIMESTAMP = "TIMESTAMP"
    DURATION = "DURATION"
    NESTED = "NESTED"

    @classmethod
    def of(cls, arrow: pa.DataType) -> ColumnKind:
        """The kind that an Arrow type belongs to."""
        for test, kind in _KINDS:
            if test(arrow):
                return kind
        return cls.NESTED


_KINDS = (
    (pat.is_boolean, ColumnKind.BOOLEAN),
    (pat.is_integer, ColumnKind.INTEGER),
    (pat.is_floating, ColumnKind.FLOAT),
    (pat.is_decimal, ColumnKind.DECIMAL),
    (pat.is_string, ColumnKind.STRING),
    (pat.is_large_string, ColumnKind.STRING),
    (pat.is_string_view, ColumnKind.STRING),
    (pat.is_binary, ColumnKind.BINARY),
    (pat.is_large_binary, ColumnKind.BINARY),
    (pat.is_binary_view, ColumnKind.BINARY),
    (pat.is_fixed_size_binary, ColumnKind.BINARY),
    (pat.is_date, ColumnKind.DATE),
    (pat.is_time, ColumnKind.TIME),
    (pat.is_timestamp, ColumnKind.TIMESTAMP),
    (pat.is_duration, ColumnKind.DURATION),
)


class FilterOperator(enum.StrEnum):
    """Comparisons, as the contract names them."""

    EQUAL = "EQUAL"
    NOT_EQUAL = "NOT_EQUAL"
    LESS = "LESS"
    LESS_OR_EQUAL = "LESS_OR_EQUAL"
    GREATER = "GREATER"
    GREATER_OR_EQUAL = "GREATER_OR_EQUAL"
    IN = "IN"
    NOT_IN = "NOT_IN"
    IS_NULL = "IS_NULL"
    IS_NOT_NULL = "IS_NOT_NULL"
    STARTS_WITH = "STARTS_WITH"
    CONTAINS = "CONTAINS"


_NULLS = (FilterOperator.IS_NULL, FilterOperator.IS_NOT_NULL)
_EQUALITY = (
    FilterOperator.EQUAL,
    FilterOperator.NOT_EQUAL,
    FilterOperator.IN,
    FilterOperator.NOT_IN,
)
_ORDER = (
    FilterOperator.LESS,
    FilterOperator.LESS_OR_EQUAL,
    FilterOperator.GREATER,
    FilterOperator.GREATER_OR_EQUAL,
)
_TEXT = (FilterOperator.STARTS_WITH, FilterOperator.CONTAINS)

OPERATORS: dict[ColumnKind, tuple[FilterOperator, ...]] = {
    ColumnKind.BOOLEAN: (FilterOperator.EQUAL, FilterOperator.NOT_EQUAL, *_NULLS),
    ColumnKind.INTEGER: (*_EQUALITY, *_ORDER, *_NULLS),
    ColumnKind.FLOAT: (*_EQUALITY, *_ORDER, *_NULLS),
    ColumnKind.DECIMAL: (*_EQUALITY, *_ORDER, *_NULLS),
    ColumnKind.STRING: (*_EQUALITY, *_ORDER, *_NULLS, *_TEXT),
    ColumnKind.BINARY: (*_EQUALITY, *_NULLS),
    ColumnKind.DATE: (*_EQUALITY, *_ORDER, *_NULLS),
    ColumnKind.TIME: (*_EQUALITY, *_ORDER, *_NULLS),
    ColumnKind.TIMESTAMP: (*_EQUALITY, *_ORDER, *_NULLS),
    ColumnKind.DURATION: _NULLS,
    ColumnKind.NESTED: _NULLS,
}


@dataclass(frozen=True, slots=True)
class Column:
    """A column as a caller sees it. `type` is the Arrow type the export will carry.
    `masked`: its values are not shown, so no filter may ask about them."""

    name: str
    type: pa.DataType
    nullable: bool = True
    description: str = ""
    filterable: bool = True
    masked: bool = False

    @property
    def kind(self) -> ColumnKind:
        """Kind of its values."""
        return ColumnKind.of(self.type)

    @property
    def operators(self) -> tuple[FilterOperator, ...]:
        """Operators a filter on it may use."""
        open_ = self.filterable and not self.masked
        return OPERATORS[self.kind] if open_ else ()


Scalar = bool | int | float | Decimal | str | bytes | date | time | datetime
"""A filter value, of the Python type that matches the column's kind. Datetimes are
aware and in UTC."""


@dataclass(frozen=True, slots=True)
class Filter:
    """One condition; `values` has as many values as the operator takes, each already of
    the column's kind."""

    column: str
    operator: FilterOperator
    values: tuple[Scalar, ...] = ()


@dataclass(frozen=True, slots=True)
class Query:
    """What to read: columns in order, conditions that must all hold, most rows."""

    columns: tuple[str, ...]
    filters: tuple[Filter, ...] = ()
    limit: int | None = None


MOST_SHARDS = 1000
"""About the most pieces that a query is cut into, however many rows it is thought to
have: what is thought may be wrong by far."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A piece of a query that one worker reads. `state` is the source's own JSON text,
    opaque to everyone else; it outlives the process that planned it."""

    index: int
    state: str = "{}"


class Anchor(Protocol):
    """What keeps the shards of a plan readable as one state of the data, for instance a
    transaction whose snapshot they share. The planner holds it until the output is
    complete. It dies with its process."""

    def close(self) -> None:
        """Let go, from any thread; idempotent. Shards that are open stay readable;
        opening another one raises `SourceChanged` from then on."""
        ...


@dataclass(frozen=True, slots=True)
class Plan:
    """How to read a query. `estimated_rows` counts the result, after filters and limit;
    None when the source cannot tell cheaply. Read in the order of their indexes, 0 and
    up, the shards yield each row of the result once, all of one state of the data."""

    shards: tuple[Shard, ...]
    estimated_rows: int | None = None
    anchor: Anchor | None = None
    """To be closed by whoever asked for the plan; None when the shards need none."""


class BatchStream(Protocol):
    """Batches of one shard, in an order that is the same each time the shard is opened.

    A context manager; leaving it frees everything. Iteration is for one thread at a
    time, releases the GIL while it waits or computes, and raises `SourceFailed` or
    `ValueNotEncodable`. `cancel` may be called from any thread at any time: the
    iteration then ends soon with an error or early, and the caller no longer cares.
    """

    @property
    def schema(self) -> pa.Schema:
        """Schema of every batch: the query's columns with their declared types."""
        ...

    def __iter__(self) -> Iterator[pa.RecordBatch]: ...

    def loose(self) -> Iterator[LooseBatch]:
        """The same rows in the same order, instead of iterating: those with a value that
        is not of its column's type among them, as far as the source can tell the row.
        Where it cannot, this raises `ValueNotEncodable` as iterating would."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None: ...

    def cancel(self) -> None:
        """Stop soon, from any thread."""
        ...


class Source(Protocol):
    """The rows of one dataset.

    Methods block and are called off the event loop, from any thread, several at once.
    They raise `SourceFailed` when the source does not answer, and nothing a caller sent
    ever reaches it as SQL text.
    """

    def columns(self) -> tuple[Column, ...]:
        """All columns, in the source's order."""
        ...

    def count(self) -> int | None:
        """About how many rows there are, where that is cheap to tell."""
        ...

    def plan(self, query: Query, *, shard_rows: int | None = None) -> Plan:
        """Cut a query into shards that read about `shard_rows` rows of the source each,
        filters left aside, where the source can cut itself cheaply: never many more
        shards than that makes, but fewer at will. None, or a query with a limit: one
        shard, and no anchor."""
        ...

    def open(self, query: Query, shard: Shard, *, skip_rows: int = 0) -> BatchStream:
        """Read a shard, leaving out its first `skip_rows` rows, which an earlier
        attempt has finished.

        Raises `SourceChanged` when the rows to skip may no longer be the ones that
        were read then, or when the shard can no longer be read in the state of the data
        that its plan saw: the caller then begins the output anew. Iterating may raise it
        as well, before the first batch.
        """
        ...


class SourceChanged(Exception):
    """What is left of the shard no longer fits what was read of it."""
