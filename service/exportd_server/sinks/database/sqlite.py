"""SQLite as a sink, through its ADBC driver.

The rows go into a temporary table first, which lies in a file of its own and locks nothing
of anybody's, and from there in one transaction, with the note that they were delivered,
into the target. SQLite keeps a value in whatever type it is given unless its column has
an affinity that changes it: columns whose affinity would are refused.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc

from exportd_server.errors import DeliveryFailed
from exportd_server.sinks.base import BadSinkRequest, Delivery, Export, ExportColumn
from exportd_server.sinks.database.adbc import Driver, Fault, Session, quoted, told
from exportd_server.sinks.database.arrow_types import plain_kind, plain_type
from exportd_server.sinks.database.request import (
    DatabaseConnection,
    DatabaseRequest,
    TableName,
    allow,
    parse_table,
)
from exportd_server.sinks.database.rows import Feed
from exportd_server.sinks.database.running import Call, run
from exportd_server.sinks.database.values import (
    Convert,
    as_it_is,
    batches,
    binaries,
    float16s,
    float32s,
    row_count,
)

_DRIVER = "adbc_driver_sqlite"
_BUSY_MILLISECONDS = 5_000
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


@dataclass(frozen=True, slots=True)
class _Plan:
    """How an export gets into a target."""

    target: _Target
    converts: tuple[Convert, ...]


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
                session.run(_LEDGER.format(quoted(self._ledger)))
                receipt = self._receipt(session, delivery)
                if receipt is not None:
                    return receipt
                plan = self._plan(session, request, delivery.export)
                staging = self._stage(call, session, plan, delivery, feed)
                session.run("BEGIN IMMEDIATE")
                receipt = self._receipt(session, delivery)
                if receipt is None:
                    self._put(call, session, request, delivery, plan, staging)
                    receipt = told(row_count(delivery), plan.target.name)
                session.run("COMMIT")
                return receipt
        except BadSinkRequest as error:
            raise DeliveryFailed(error.description, retryable=False) from error

    def _receipt(self, session: _Session, delivery: Delivery) -> str | None:
        found = session.fetch(
            f"SELECT rows, target FROM {quoted(self._ledger)} "  # noqa: S608 - quoted
            "WHERE delivery_id = ?",
            delivery.delivery_id,
        )
        return told(found[0]["rows"], found[0]["target"]) if found else None

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
        spool = self._connection.spool_directory
        for batch in batches(call, feed, delivery, plan.converts, spool):
            session.ingest(staging, batch, temporary=True)
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
        table = f"main.{quoted(plan.target.name)}"
        if not plan.target.there:
            columns = [
                f"{quoted(column.name)} {column.affinity}" for column in plan.target.columns
            ]
            session.run(f"CREATE TABLE {table} ({', '.join(columns)})")
        session.run(
            f"INSERT INTO main.{quoted(self._ledger)} "  # noqa: S608 - quoted
            "(delivery_id, job_id, target, rows) VALUES (?, ?, ?, ?)",
            delivery.delivery_id,
            export.job_id,
            plan.target.name,
            row_count(delivery),
        )
        if request.mode == "REPLACE":
            session.run(f"DELETE FROM {table}")  # noqa: S608 - quoted
        names = ", ".join(quoted(column.name) for column in export.columns)
        staged = ", ".join(f"c{index}" for index in range(len(export.columns)))
        for start in range(0, row_count(delivery), _SLICE_ROWS):
            call.check()
            session.run(
                f"INSERT INTO {table} ({names}) SELECT {staged} FROM temp.{staging} "  # noqa: S608 - quoted
                "WHERE rowid > ? AND rowid <= ? ORDER BY rowid",
                start,
                start + _SLICE_ROWS,
            )
        call.check()


class _Session(Session):
    """One connection. What is not committed when it is left is undone."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise DeliveryFailed("there is no such database file", retryable=False)
        driver = Driver.of(_DRIVER, {"uri": f"file:{quote(str(path))}?mode=rw"})
        super().__init__(driver, _failure)
        try:
            self.fetch(f"PRAGMA busy_timeout = {_BUSY_MILLISECONDS}")
            for setting in ("temp_store = FILE", "synchronous = FULL", "foreign_keys = ON"):
                self.fetch(f"PRAGMA {setting}")
        except BaseException:
            self.close()
            raise


def _failure(error: Fault) -> DeliveryFailed:
    text = error.text
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


def _boolean(text: pa.Array) -> pa.Array:
    return text.cast(pa.bool_()).cast(pa.int64())


def _integer(text: pa.Array) -> pa.Array:
    return text.cast(pa.int64())


def _double(text: pa.Array) -> pa.Array:
    return _no_nan(text.cast(pa.float64()))


def _float(text: pa.Array) -> pa.Array:
    return _no_nan(float32s(text).cast(pa.float64()))


def _half(text: pa.Array) -> pa.Array:
    return _no_nan(float16s(text).cast(pa.float64()))


def _no_nan(numbers: pa.Array) -> pa.Array:
    if pc.any(pc.is_nan(numbers)).as_py():
        raise pa.ArrowInvalid("SQLite would keep NaN as a missing value")
    return numbers


_NUMBERS: dict[str, Convert] = {"halffloat": _half, "float": _float, "double": _double}
_WHOLE = ("INTEGER", "NUMERIC", "BLOB")
_NEVER_NUMBERS = ("DATE", "TIME", "TIMESTAMP", "DURATION", "NESTED")


def _native(column: ExportColumn) -> tuple[str, tuple[str, ...], Convert]:
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
        return "BLOB", ("BLOB",), binaries
    # A text that reads like a number stays one only without affinity.
    affinities = ("BLOB", "NUMERIC") if kind in _NEVER_NUMBERS else ("BLOB",)
    return "TEXT", affinities, as_it_is


def _made_columns(export: Export) -> tuple[_Column, ...]:
    for column in export.columns:
        if not column.name or "\0" in column.name:
            raise BadSinkRequest("create_table", f"{column.name!r} cannot be a name")
    return tuple(_Column(column.name, _native(column)[0]) for column in export.columns)


def _carrier(given: ExportColumn, column: _Column, table: str) -> Convert:
    made, affinities, convert = _native(given)
    affinity = _affinity(column.affinity)
    if affinity == "TEXT":
        return as_it_is
    if affinity in affinities:
        return convert
    raise BadSinkRequest(
        "table",
        f"column {column.name!r} of {table!r} has the affinity {affinity}, which does not "
        f"keep {given.type} exactly; {made} or TEXT does",
    )
