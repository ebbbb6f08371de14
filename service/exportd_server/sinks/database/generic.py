"""Any database that has an ADBC driver, as a sink.

Little is asked of the driver: transactions, bulk ingest, and to tell the columns of a
table. The rows lie in a file of the server's first, read and in the types of the target,
so that nothing of the database is held while the store is slow. Then they go, with the
note that they were delivered, into the target in one transaction.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO
from uuid import uuid4

import pyarrow as pa

from exportd_server.errors import DeliveryFailed
from exportd_server.sinks.base import BadSinkRequest, Delivery, Export
from exportd_server.sinks.database.adbc import Driver, Fault, Session, quoted, told
from exportd_server.sinks.database.columns import carrier, made_type
from exportd_server.sinks.database.request import (
    DatabaseConnection,
    DatabaseRequest,
    TableName,
    allow,
    parse_table,
)
from exportd_server.sinks.database.rows import Feed
from exportd_server.sinks.database.running import Call, run
from exportd_server.sinks.database.values import Convert, batches, row_count

_INGEST_BYTES = 8 << 20
"""So much is given to the driver at a time. Some hold all of it until its end; between
two it is looked whether to stop."""
_LEDGER = (
    '("delivery_id" VARCHAR(64) NOT NULL PRIMARY KEY, "job_id" VARCHAR(64) NOT NULL, '
    '"target" VARCHAR(2100) NOT NULL, "rows" BIGINT NOT NULL, '
    '"delivered_at" TIMESTAMP NOT NULL)'
)
_NOTED = ("delivery_id", "job_id", "target", "rows", "delivered_at")
_ID = re.compile(r"[0-9A-Za-z-]+")
_TRANSIENT = re.compile(
    r"conflict|deadlock|serializ|could not set lock|database is locked|timed? ?out",
    re.IGNORECASE,
)
_CONSTRAINT = re.compile(r"constraint|duplicate key", re.IGNORECASE)
_TRANSIENT_STATES = ("08", "25", "40", "53", "55", "57", "58")
"""Classes of SQLSTATE that pass: connections, rollbacks, resources, intervention."""
_PERMANENT = {
    "NOT_IMPLEMENTED": "the driver cannot do what this sink needs",
    "NOT_FOUND": "the database lacks something that this sink needs",
    "ALREADY_EXISTS": "something of that name is there already",
    "INVALID_ARGUMENT": "the database refuses it",
    "INVALID_DATA": "a value does not fit the type of its column",
    "INTEGRITY": "a row breaks a constraint of the table",
    "UNAUTHENTICATED": "the credentials of the connection are refused",
    "UNAUTHORIZED": "the connection lacks a right that this takes",
}


def _judge(fault: Fault) -> DeliveryFailed:
    """The driver's error, as exportd's. Not all drivers tell much by the status."""
    shown = f" ({fault.state or fault.status})" if fault.state or fault.status else ""
    if fault.state[:2] in _TRANSIENT_STATES or _TRANSIENT.search(fault.text):
        return DeliveryFailed(
            f"others are in the way, or it is busy{shown}", retryable=True
        )
    if _CONSTRAINT.search(fault.text):
        return DeliveryFailed(f"{_PERMANENT['INTEGRITY']}{shown}", retryable=False)
    text = _PERMANENT.get(fault.status)
    if text is not None:
        return DeliveryFailed(f"{text}{shown}", retryable=False)
    return DeliveryFailed(f"the database or its driver failed{shown}", retryable=True)


@dataclass(frozen=True, slots=True)
class _Target:
    """The table, as it is now; `there` is False when it is to be made."""

    table: TableName
    columns: pa.Schema
    there: bool = True


@dataclass(frozen=True, slots=True)
class _Plan:
    """How an export gets into a target; `converts` in the order of the export."""

    target: _Target
    converts: tuple[Convert, ...]


async def open_generic(connection: DatabaseConnection) -> GenericSink:
    """Make the sink of a connection with a driver, which is loaded. Raises
    `ConfigurationError`."""
    options = {name: value.get_secret_value() for name, value in connection.options.items()}

    def load(_: Call) -> Driver:
        driver = Driver.of(connection.driver or "", options)
        driver.load()
        return driver

    return GenericSink(connection, await run(load))


class GenericSink:
    """A database behind a driver. Each call has connections of its own."""

    def __init__(self, connection: DatabaseConnection, driver: Driver) -> None:
        self._connection = connection
        self._driver = driver
        self._ledger = parse_table(connection.deliveries_table)
        self._keyed = False

    async def probe(self, request: DatabaseRequest, export: Export) -> None:
        """See `Sink`."""
        await run(lambda call: self._probe(call, request, export))

    async def deliver(self, request: DatabaseRequest, delivery: Delivery) -> str:
        """See `Sink`."""
        # In two calls: no part is fetched while the database is open for the first.
        plan = await run(lambda call: self._prepare(call, request, delivery))
        if isinstance(plan, str):
            return plan
        feed = Feed(delivery.parts)
        return await run(
            lambda call: self._deliver(call, request, delivery, plan, feed), feed
        )

    async def close(self) -> None:
        """Nothing is held between calls."""

    # All below runs in the call's thread.

    def _session(self, *, transaction: bool = False) -> Session:
        return Session(self._driver, _judge, transaction=transaction)

    def _probe(self, call: Call, request: DatabaseRequest, export: Export) -> None:
        call.check()
        with self._session() as session:
            plan = self._plan(session, request, export)
            noted = self._columns(session, self._ledger) is not None
        target = plan.target
        with self._session(transaction=True) as session:
            # No rows, and undone: what can be told of rights and of the driver so.
            session.can_ingest(target.table.name)
            if target.there:
                if request.mode == "REPLACE":
                    session.run(f"DELETE FROM {_sql(target.table)} WHERE 1 = 0")  # noqa: S608 - quoted
                none = target.columns.empty_table()
                session.ingest(target.table.name, none, schema=target.table.schema)
        if noted:
            self._check_key()

    def _prepare(
        self, call: Call, request: DatabaseRequest, delivery: Delivery
    ) -> _Plan | str:
        """How the delivery gets there; its receipt when it is there already."""
        call.check()
        if not _ID.fullmatch(delivery.delivery_id):
            raise DeliveryFailed("the delivery has no proper id", retryable=False)
        # One session throughout: opening a database may be dear.
        with _refused(), self._session() as session:
            self._make_ledger()
            receipt = self._receipt(delivery)
            if receipt is not None:
                return receipt
            self._check_key()
            return self._plan(session, request, delivery.export)

    def _deliver(
        self,
        call: Call,
        request: DatabaseRequest,
        delivery: Delivery,
        plan: _Plan,
        feed: Feed,
    ) -> str:
        with (
            _refused(),
            self._spooled(call, plan, delivery, feed) as rows,
            self._session() as session,
        ):
            self._check_target(session, request, delivery.export, plan)
            return self._load(call, request, delivery, plan, rows)

    def _load(
        self,
        call: Call,
        request: DatabaseRequest,
        delivery: Delivery,
        plan: _Plan,
        rows: IO[bytes],
    ) -> str:
        try:
            with self._session(transaction=True) as session:
                self._put(call, session, request, delivery, plan, rows)
                call.check()
                self._commit(session)
        except DeliveryFailed:
            # Another attempt may have come first, or the commit arrived all the same.
            with contextlib.suppress(DeliveryFailed):
                receipt = self._receipt(delivery)
                if receipt is not None:
                    return receipt
            raise
        return told(row_count(delivery), str(plan.target.table))

    def _check_target(
        self, session: Session, request: DatabaseRequest, export: Export, plan: _Plan
    ) -> None:
        if self._target(session, request, export) != plan.target:
            raise DeliveryFailed(
                f"{plan.target.table} was changed while rows were loaded", retryable=True
            )

    @staticmethod
    def _commit(session: Session) -> None:
        try:
            session.commit()
        except DeliveryFailed as error:
            # Databases that look for conflicts now cannot tell yet whose rows will stay.
            raise DeliveryFailed(
                f"it could not be committed: {error.message}", retryable=True
            ) from error

    # What has been delivered.

    def _make_ledger(self) -> None:
        with self._session() as session:
            if self._columns(session, self._ledger) is not None:
                return
        try:
            with self._session() as session:
                session.run(f"CREATE TABLE {_sql(self._ledger)} {_LEDGER}")
        except DeliveryFailed as error:
            with self._session() as session:
                if self._columns(session, self._ledger) is not None:
                    return  # another one made it
            raise DeliveryFailed(
                f"{self._ledger} is missing and cannot be made: {error.message}",
                retryable=error.retryable,
            ) from error

    def _receipt(self, delivery: Delivery) -> str | None:
        with self._session() as session:
            found = session.fetch(
                f'SELECT "rows", "target" FROM {_sql(self._ledger)} '  # noqa: S608 - quoted
                f"WHERE \"delivery_id\" = '{delivery.delivery_id}'"
            )
        return told(found[0]["rows"], found[0]["target"]) if found else None

    def _note(
        self, session: Session, delivery_id: str, job_id: str, target: str, rows: int
    ) -> None:
        columns = self._columns(session, self._ledger)
        if columns is None or tuple(columns.names) != _NOTED:
            raise DeliveryFailed(
                f"{self._ledger} must have the columns {', '.join(_NOTED)}, in this order",
                retryable=False,
            )
        now = datetime.now(UTC).replace(tzinfo=None)
        note = pa.table(
            [[delivery_id], [job_id], [target], [rows], [now]], names=list(_NOTED)
        )
        try:
            note = note.cast(pa.schema([(each.name, each.type) for each in columns]))
        except pa.ArrowException as error:
            raise DeliveryFailed(
                f"{self._ledger} has columns of other types than exportd makes",
                retryable=False,
            ) from error
        session.ingest(self._ledger.name, note, schema=self._ledger.schema)

    def _check_key(self) -> None:
        """Some databases take a primary key for a hint: two attempts at once would both
        load their rows."""
        if self._keyed:
            return
        with self._session(transaction=True) as session:
            twice = str(uuid4())
            self._note(session, twice, "", "", 0)
            try:
                self._note(session, twice, "", "", 0)
            except DeliveryFailed as error:
                if error.retryable:
                    raise
            else:
                raise DeliveryFailed(
                    f"{self._ledger} takes a delivery twice: its delivery_id needs a "
                    "primary key, and a database that enforces it",
                    retryable=False,
                )
        self._keyed = True

    # What fits where.

    def _columns(self, session: Session, table: TableName) -> pa.Schema | None:
        """The columns of a table; None when it is not there."""
        listed = session.listed(table.name, table.schema)
        if listed is not None and not any(
            name.lower() == table.name.lower() for name in listed
        ):
            return None
        found = session.schema(table.name, table.schema)
        if found is not None and listed is not None:
            if table.name not in listed:
                raise BadSinkRequest(
                    "table",
                    f"the database spells {table.name!r} otherwise; do as it does",
                )
            if "VIEW" in listed[table.name].upper():
                raise BadSinkRequest("table", f"{table} is no table")
        return found

    def _target(
        self, session: Session, request: DatabaseRequest, export: Export
    ) -> _Target:
        table = parse_table(request.table)
        allow(self._connection, table)
        found = self._columns(session, table)
        if found is not None:
            return _Target(table, found.remove_metadata())
        if not request.create_table:
            raise BadSinkRequest(
                "table", f"there is no table {table}; set create_table to have it made"
            )
        for column in export.columns:
            if not column.name or "\0" in column.name:
                raise BadSinkRequest("create_table", f"{column.name!r} cannot be a name")
        columns = [(column.name, made_type(column)) for column in export.columns]
        return _Target(table, pa.schema(columns), there=False)

    def _plan(self, session: Session, request: DatabaseRequest, export: Export) -> _Plan:
        target = self._target(session, request, export)
        converts = _converts(export, target)
        names = {column.name for column in export.columns}
        for name in target.columns.names:
            # Drivers fill columns by their order: none can be left out.
            if name not in names:
                raise BadSinkRequest(
                    "table",
                    f"{target.table} has a column {name!r}, which the export lacks, and "
                    "through this driver a row must fill all of them; load into a table "
                    "with the export's columns alone",
                )
        return _Plan(target, converts)

    # How the rows get there.

    @contextlib.contextmanager
    def _spooled(
        self, call: Call, plan: _Plan, delivery: Delivery, feed: Feed
    ) -> Iterator[IO[bytes]]:
        """The rows in a file, each read and found to fit, in the order of the table."""
        columns = plan.target.columns
        spool = self._connection.spool_directory
        given = [column.name for column in delivery.export.columns]
        order = [given.index(name) for name in columns.names]
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with contextlib.ExitStack() as stack:
            with _disk():
                file = stack.enter_context(tempfile.TemporaryFile(dir=spool))
            with pa.ipc.new_stream(file, columns, options=options) as writer:
                for batch in batches(call, feed, delivery, plan.converts, spool):
                    arrays = [batch.column(position) for position in order]
                    with _disk():
                        writer.write_batch(
                            pa.RecordBatch.from_arrays(arrays, schema=columns)
                        )
            with _disk():
                file.seek(0)
            yield file

    def _put(
        self,
        call: Call,
        session: Session,
        request: DatabaseRequest,
        delivery: Delivery,
        plan: _Plan,
        rows: IO[bytes],
    ) -> None:
        export, target = delivery.export, plan.target
        name, schema = target.table.name, target.table.schema
        try:
            self._note(
                session,
                delivery.delivery_id,
                export.job_id,
                str(target.table),
                row_count(delivery),
            )
        except DeliveryFailed as error:
            if not _CONSTRAINT.search(error.message):
                raise
            raise DeliveryFailed(
                "another attempt at this delivery is under way", retryable=True
            ) from error
        columns = target.columns
        if not target.there:
            session.ingest(name, columns.empty_table(), schema=schema, create=True)
            columns = self._made(session, export, target)
        elif request.mode == "REPLACE":
            session.run(f"DELETE FROM {_sql(target.table)}")  # noqa: S608 - quoted
        for piece in _pieces(rows):
            call.check()
            session.ingest(name, piece.cast(columns), schema=schema)

    @staticmethod
    def _made(session: Session, export: Export, target: _Target) -> pa.Schema:
        """The columns of a table that was made just now. Raises `DeliveryFailed` when the
        driver took other types, and values could change in them."""
        found = session.schema(target.table.name, target.table.schema)
        if found is None or found.names != target.columns.names:
            raise DeliveryFailed("the driver made another table", retryable=False)
        try:
            _converts(export, _Target(target.table, found))
        except BadSinkRequest as error:
            raise DeliveryFailed(
                f"the driver makes columns that do not fit: {error.description}",
                retryable=False,
            ) from error
        return found.remove_metadata()


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    try:
        yield
    except BadSinkRequest as error:
        raise DeliveryFailed(error.description, retryable=False) from error


def _converts(export: Export, target: _Target) -> tuple[Convert, ...]:
    """Raises `BadSinkRequest` for a column that is missing or does not fit."""
    converts = []
    for given in export.columns:
        if given.name not in target.columns.names:
            raise BadSinkRequest(
                "table",
                f"{target.table} has no column {given.name!r}, which the export has",
            )
        kind = target.columns.field(given.name).type
        convert = carrier(given, kind)
        if convert is None:
            raise BadSinkRequest(
                "table",
                f"column {given.name!r} of {target.table} is of type {kind}, which does "
                f"not keep {given.type} exactly; {made_type(given)} or string does",
            )
        converts.append(convert)
    return tuple(converts)


def _sql(table: TableName) -> str:
    return ".".join(quoted(name) for name in (table.schema, table.name) if name)


def _pieces(file: IO[bytes]) -> Iterator[pa.Table]:
    """The rows again, some MiB at a time."""
    held: list[pa.RecordBatch] = []
    size = 0
    with _disk():
        reader = pa.ipc.open_stream(file)
    while True:
        with _disk():
            batch = next(reader, None)
        if batch is not None:
            held.append(batch)
            size += batch.nbytes
        if held and (batch is None or size >= _INGEST_BYTES):
            yield pa.Table.from_batches(held)
            held, size = [], 0
        if batch is None:
            return


@contextlib.contextmanager
def _disk() -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise DeliveryFailed(
            "rows cannot be kept on the server's disk until they are loaded", retryable=True
        ) from error
