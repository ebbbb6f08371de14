"""SQLite as a sink, through its ADBC driver.

The rows go into a temporary table first, which lies in a file of its own and locks nothing
of anybody's, and from there in one transaction, with the note that they were delivered,
into the target. SQLite keeps a value in whatever type it is given unless its column has
an affinity that changes it: columns whose affinity would are refused.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import adbc_driver_manager
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from sqlglot import exp

from exportd_server.encoders.base import Buffer, CsvOptions
from exportd_server.errors import DeliveryFailed
from exportd_server.sinks.base import BadSinkRequest, Delivery, Export, ExportColumn
from exportd_server.sinks.database.arrow_types import plain_kind, plain_type
from exportd_server.sinks.database.request import (
    DatabaseConnection,
    DatabaseRequest,
    TableName,
    allow,
    parse_table,
)
from exportd_server.sinks.database.rows import Feed, csv_lines, csv_options
from exportd_server.sinks.database.running import Call, run

_DRIVER = "adbc_driver_sqlite.dbapi"
"""Loaded when it is wanted: it brings much along."""
_BUSY_MILLISECONDS = 5_000
_PIECE_BYTES = 1 << 20
_SLICE_ROWS = 20_000
"""So many rows at a time are moved: between them it is looked whether to stop."""
_LEDGER = (
    "CREATE TABLE IF NOT EXISTS {} (delivery_id TEXT NOT NULL PRIMARY KEY, "
    "job_id TEXT NOT NULL, target TEXT NOT NULL, rows INTEGER NOT NULL, "
    "delivered_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ')))"
)
_COLUMNS = (
    'SELECT name, type, "notnull" AS required, dflt_value IS NOT NULL AS has_default, '
    "hidden FROM pragma_table_xinfo(?)"
)
_CONSTRAINT = re.compile(r"(UNIQUE|NOT NULL|CHECK|FOREIGN KEY) constraint failed")
_BUSY = ("database is locked", "database table is locked", "database schema is locked")


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of the target."""

    name: str
    affinity: str
    required: bool = False
    generated: bool = False


@dataclass(frozen=True, slots=True)
class _Target:
    """The table, as it is now; `there` is False when it is to be made."""

    name: str
    columns: tuple[_Column, ...]
    there: bool = True


_Convert = Callable[[pa.Array], pa.Array]


@dataclass(frozen=True, slots=True)
class _Plan:
    """How an export gets into a target."""

    target: _Target
    converts: tuple[_Convert, ...]


class SqliteSink:
    """A SQLite file that exports are written to. Each call has a connection of its
    own."""

    def __init__(self, connection: DatabaseConnection) -> None:
        self._connection = connection
        self._path = Path(connection.path)
        self._ledger = parse_table(connection.deliveries_table).name

    async def probe(self, request: DatabaseRequest, export: Export) -> None:
        """See `Sink`."""
        await run(lambda call: self._probe(call, request, export))

    async def deliver(self, request: DatabaseRequest, delivery: Delivery) -> str:
        """See `Sink`."""
        feed = Feed(delivery.parts)
        return await run(lambda call: self._deliver(call, request, delivery, feed), feed)

    async def close(self) -> None:
        """Nothing is held between calls."""

    # All below runs in the call's thread.

    def _probe(self, call: Call, request: DatabaseRequest, export: Export) -> None:
        call.check()
        with _Session(self._path) as session:
            self._plan(session, request, export)
            # Whether it may be written to; one that is busy may.
            try:
                session.run("BEGIN IMMEDIATE")
                session.run("ROLLBACK")
            except DeliveryFailed as error:
                if not error.retryable:
                    raise

    def _deliver(
        self, call: Call, request: DatabaseRequest, delivery: Delivery, feed: Feed
    ) -> str:
        call.check()
        try:
            with _Session(self._path) as session:
                session.run(_LEDGER.format(_quoted(self._ledger)))
                receipt = self._receipt(session, delivery)
                if receipt is not None:
                    return receipt
                plan = self._plan(session, request, delivery.export)
                staging = self._stage(call, session, plan, delivery, feed)
                session.run("BEGIN IMMEDIATE")
                receipt = self._receipt(session, delivery)
                if receipt is None:
                    self._put(call, session, request, delivery, plan, staging)
                    receipt = _told(_rows(delivery), plan.target.name)
                session.run("COMMIT")
                return receipt
        except BadSinkRequest as error:
            raise DeliveryFailed(error.description, retryable=False) from error

    def _receipt(self, session: _Session, delivery: Delivery) -> str | None:
        found = session.fetch(
            f"SELECT rows, target FROM {_quoted(self._ledger)} "  # noqa: S608 - quoted
            "WHERE delivery_id = ?",
            delivery.delivery_id,
        )
        return _told(found[0]["rows"], found[0]["target"]) if found else None

    # What fits where.

    def _plan(self, session: _Session, request: DatabaseRequest, export: Export) -> _Plan:
        target = self._target(session, request, export)
        by_name = {column.name: column for column in target.columns}
        converts = []
        for given in export.columns:
            column = by_name.get(given.name)
            if column is None:
                raise BadSinkRequest(
                    "table",
                    f"{target.name!r} has no column {given.name!r}, which the export has",
                )
            if column.generated:
                raise BadSinkRequest(
                    "table", f"column {column.name!r} of {target.name!r} is generated"
                )
            converts.append(_carrier(given, column, target.name))
        names = {column.name for column in export.columns}
        for column in target.columns:
            if column.required and column.name not in names:
                raise BadSinkRequest(
                    "table",
                    f"column {column.name!r} of {target.name!r} must have a value, and the "
                    "export has no such column",
                )
        return _Plan(target, tuple(converts))

    def _target(
        self, session: _Session, request: DatabaseRequest, export: Export
    ) -> _Target:
        name = parse_table(request.table).name
        found = session.fetch(
            "SELECT name, type FROM main.sqlite_schema WHERE type IN ('table', 'view') "
            "AND lower(name) = lower(?)",
            name,
        )
        if name.lower().startswith("sqlite_"):
            raise BadSinkRequest("table", f"{name!r} is the database's own")
        if not found:
            if not request.create_table:
                raise BadSinkRequest(
                    "table",
                    f"there is no table {name!r}; set create_table to have it made",
                )
            return _Target(name, _made_columns(export), there=False)
        name = found[0]["name"]
        allow(self._connection, TableName("", name))
        if found[0]["type"] != "table":
            raise BadSinkRequest("table", f"{name!r} is no table")
        columns = tuple(
            _Column(
                row["name"],
                _affinity(row["type"] or ""),
                bool(row["required"]) and not row["has_default"],
                row["hidden"] > 0,
            )
            for row in session.fetch(_COLUMNS, name)
        )
        return _Target(name, columns)

    # How the rows get there.

    def _stage(
        self,
        call: Call,
        session: _Session,
        plan: _Plan,
        delivery: Delivery,
        feed: Feed,
    ) -> str:
        staging = f"exportd_{secrets.token_hex(8)}"
        names = [f"c{index}" for index in range(len(plan.converts))]
        session.run(f"CREATE TEMP TABLE {staging} ({', '.join(names)})")
        options = csv_options(delivery.export)
        lines = csv_lines(
            feed, delivery.export, delivery.parts, self._connection.spool_directory
        )
        staged = 0
        for piece in _records(lines):
            call.check()
            texts = _parsed(piece, names, options)
            arrays = []
            for column, convert, text in zip(
                delivery.export.columns, plan.converts, texts.columns, strict=True
            ):
                arrays.append(_converted(column.name, convert, text))
            session.ingest(staging, pa.RecordBatch.from_arrays(arrays, names=names))
            staged += texts.num_rows
        if staged != _rows(delivery):
            raise DeliveryFailed(
                f"{staged} rows were read of the {_rows(delivery)} that the export has",
                retryable=False,
            )
        return staging

    def _put(
        self,
        call: Call,
        session: _Session,
        request: DatabaseRequest,
        delivery: Delivery,
        plan: _Plan,
        staging: str,
    ) -> None:
        export = delivery.export
        if self._target(session, request, export) != plan.target:
            raise DeliveryFailed(
                f"{plan.target.name!r} was changed while rows were loaded", retryable=True
            )
        table = f"main.{_quoted(plan.target.name)}"
        if not plan.target.there:
            columns = [
                f"{_quoted(column.name)} {column.affinity}"
                for column in plan.target.columns
            ]
            session.run(f"CREATE TABLE {table} ({', '.join(columns)})")
        session.run(
            f"INSERT INTO main.{_quoted(self._ledger)} "  # noqa: S608 - quoted
            "(delivery_id, job_id, target, rows) VALUES (?, ?, ?, ?)",
            delivery.delivery_id,
            export.job_id,
            plan.target.name,
            _rows(delivery),
        )
        if request.mode == "REPLACE":
            session.run(f"DELETE FROM {table}")  # noqa: S608 - quoted
        names = ", ".join(_quoted(column.name) for column in export.columns)
        staged = ", ".join(f"c{index}" for index in range(len(export.columns)))
        for start in range(0, _rows(delivery), _SLICE_ROWS):
            call.check()
            session.run(
                f"INSERT INTO {table} ({names}) SELECT {staged} FROM temp.{staging} "  # noqa: S608 - quoted
                "WHERE rowid > ? AND rowid <= ? ORDER BY rowid",
                start,
                start + _SLICE_ROWS,
            )
        call.check()


class _Session:
    """One connection. What is not committed when it is left is undone."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise DeliveryFailed("there is no such database file", retryable=False)
        driver = importlib.import_module(_DRIVER)
        with _translated():
            self._connection = driver.connect(
                f"file:{quote(str(path))}?mode=rw", autocommit=True
            )
        try:
            self.fetch(f"PRAGMA busy_timeout = {_BUSY_MILLISECONDS}")
            for setting in ("temp_store = FILE", "synchronous = FULL", "foreign_keys = ON"):
                self.fetch(f"PRAGMA {setting}")
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(adbc_driver_manager.Error):
            self._connection.close()

    def run(self, statement: str, *values: str | int) -> None:
        """Run a statement without a result; what `execute` runs may end unseen."""
        with _translated(), self._connection.cursor() as cursor:
            cursor.executemany(statement, _bound(values))

    def fetch(self, statement: str, *values: str | int) -> list[dict[str, Any]]:
        """The rows of a small result."""
        with _translated(), self._connection.cursor() as cursor:
            cursor.execute(statement, _bound(values))
            rows: list[dict[str, Any]] = cursor.fetch_arrow_table().to_pylist()
            return rows

    def ingest(self, table: str, batch: pa.RecordBatch) -> None:
        """Add rows to a temporary table."""
        with _translated(), self._connection.cursor() as cursor:
            cursor.adbc_ingest(table, batch, mode="append", temporary=True)


def _bound(values: Sequence[str | int]) -> pa.RecordBatch | None:
    if not values:
        return None
    return pa.record_batch(
        [pa.array([value]) for value in values],
        names=[f"p{position}" for position in range(len(values))],
    )


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """The driver's errors, as exportd's. Their texts hold SQL, and are not passed on."""
    try:
        yield
    except (adbc_driver_manager.Error, pa.ArrowException, OSError) as error:
        raise _failure(str(error)) from error


def _failure(text: str) -> DeliveryFailed:
    if any(mark in text for mark in _BUSY):
        return DeliveryFailed(
            "another one held a lock on the database for too long", retryable=True
        )
    if "disk is full" in text or "disk I/O error" in text:
        return DeliveryFailed("the database has no room, or its disk fails", retryable=True)
    if "readonly database" in text:
        return DeliveryFailed("the database may only be read", retryable=False)
    if found := _CONSTRAINT.search(text):
        # What follows are names of the table's, up to where the driver quotes SQL.
        names = text[found.end() :].split("\n", maxsplit=1)[0].removeprefix(": ")
        about = f" ({names})" if names else ""
        return DeliveryFailed(
            f"a row breaks a {found[1]} constraint of the table{about}", retryable=False
        )
    if "cannot store" in text or "datatype mismatch" in text:
        return DeliveryFailed(
            "a value does not fit the type of its column", retryable=False
        )
    return DeliveryFailed("the database refuses it", retryable=False)


def _quoted(name: str) -> str:
    return exp.to_identifier(name, quoted=True).sql("sqlite")


def _told(rows: int, target: str) -> str:
    return f"{rows} rows in {target}"


def _rows(delivery: Delivery) -> int:
    return sum(part.rows for part in delivery.parts)


# CSV as Arrow.


def _records(lines: Iterable[Buffer]) -> Iterator[bytes]:
    """Whole records, about a MiB of them at a time, or one that is longer."""
    held = bytearray()
    wanted = _PIECE_BYTES
    for piece in lines:
        held += piece
        if len(held) < wanted:
            continue
        end = held.rfind(b"\n") + 1
        # A line end between an odd number of quotes and the rest is inside of a value.
        odd = held.count(b'"', 0, end) & 1
        while end and odd:
            before = held.rfind(b"\n", 0, end - 1) + 1
            odd ^= held.count(b'"', before, end) & 1
            end = before
        wanted = _PIECE_BYTES if end else 2 * len(held)
        if end:
            yield bytes(held[:end])
            del held[:end]
    if held:
        yield bytes(held)


def _parsed(piece: bytes, names: list[str], options: CsvOptions) -> pa.RecordBatch:
    """Each cell as text."""
    from pyarrow import csv  # noqa: PLC0415 - rarely wanted

    try:
        table = csv.read_csv(
            pa.BufferReader(piece),
            read_options=csv.ReadOptions(
                column_names=names, block_size=len(piece) + 1, use_threads=False
            ),
            parse_options=csv.ParseOptions(
                delimiter=options.delimiter,
                newlines_in_values=True,
                ignore_empty_lines=False,
            ),
            convert_options=csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()),
                null_values=[options.null_marker],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        )
    except pa.ArrowInvalid as error:
        raise DeliveryFailed("a part is no valid CSV", retryable=False) from error
    (batch,) = table.combine_chunks().to_batches()
    return batch


def _converted(name: str, convert: _Convert, text: pa.Array) -> pa.Array:
    try:
        return convert(text)
    except (pa.ArrowInvalid, pl.exceptions.PolarsError) as error:
        raise DeliveryFailed(
            f"column {name!r}: a value does not fit the type of its column",
            retryable=False,
        ) from error


# What goes into which column.


def _affinity(declared: str) -> str:
    """https://www.sqlite.org/datatype3.html, section 3.1."""
    declared = declared.upper()
    if "INT" in declared:
        return "INTEGER"
    if any(mark in declared for mark in ("CHAR", "CLOB", "TEXT")):
        return "TEXT"
    if not declared or "BLOB" in declared:
        return "BLOB"
    if any(mark in declared for mark in ("REAL", "FLOA", "DOUB")):
        return "REAL"
    return "NUMERIC"


def _as_it_is(text: pa.Array) -> pa.Array:
    return text


def _boolean(text: pa.Array) -> pa.Array:
    return text.cast(pa.bool_()).cast(pa.int64())


def _integer(text: pa.Array) -> pa.Array:
    return text.cast(pa.int64())


def _double(text: pa.Array) -> pa.Array:
    return _no_nan(text.cast(pa.float64()))


def _float(text: pa.Array) -> pa.Array:
    # The text of a narrow number is exact in its own width only.
    return _no_nan(text.cast(pa.float32()).cast(pa.float64()))


def _half(text: pa.Array) -> pa.Array:
    return _no_nan(text.cast(pa.float64()).cast(pa.float16()).cast(pa.float64()))


def _no_nan(numbers: pa.Array) -> pa.Array:
    if pc.any(pc.is_nan(numbers)).as_py():
        raise pa.ArrowInvalid("SQLite would keep NaN as a missing value")
    return numbers


def _bytes(text: pa.Array) -> pa.Array:
    return pl.Series(text).str.decode("base64").to_arrow().cast(pa.large_binary())


_NUMBERS: dict[str, _Convert] = {"halffloat": _half, "float": _float, "double": _double}
_WHOLE = ("INTEGER", "NUMERIC", "BLOB")
_NEVER_NUMBERS = ("DATE", "TIME", "TIMESTAMP", "DURATION", "NESTED")


def _native(column: ExportColumn) -> tuple[str, tuple[str, ...], _Convert]:
    """The type of a column made for these values, the affinities that keep them as they
    are besides TEXT, and what makes values of texts."""
    arrow = plain_type(column.type)
    kind = plain_kind(column.kind, arrow)
    if kind == "BOOLEAN":
        return "BOOLEAN", _WHOLE, _boolean
    if kind == "INTEGER" and arrow != "uint64":
        return "INTEGER", _WHOLE, _integer
    if kind == "FLOAT":
        return "REAL", ("REAL", "BLOB"), _NUMBERS[arrow]
    if kind == "BINARY":
        return "BLOB", ("BLOB",), _bytes
    # A text that reads like a number stays one only without affinity.
    affinities = ("BLOB", "NUMERIC") if kind in _NEVER_NUMBERS else ("BLOB",)
    return "TEXT", affinities, _as_it_is


def _made_columns(export: Export) -> tuple[_Column, ...]:
    for column in export.columns:
        if not column.name or "\0" in column.name:
            raise BadSinkRequest("create_table", f"{column.name!r} cannot be a name")
    return tuple(_Column(column.name, _native(column)[0]) for column in export.columns)


def _carrier(given: ExportColumn, column: _Column, table: str) -> _Convert:
    made, affinities, convert = _native(given)
    affinity = _affinity(column.affinity)
    if affinity == "TEXT":
        return _as_it_is
    if affinity in affinities:
        return convert
    raise BadSinkRequest(
        "table",
        f"column {column.name!r} of {table!r} has the affinity {affinity}, which does not "
        f"keep {given.type} exactly; {made} or TEXT does",
    )
