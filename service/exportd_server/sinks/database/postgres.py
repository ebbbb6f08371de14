"""PostgreSQL as a sink.

The target is locked for as long as the database takes to load the rows, and never for as
long as they take to come. So they are brought together first: on this machine's disk, if
they can then go straight into the target by COPY, and else by COPY in a temporary table,
which locks nothing of anybody's, for an INSERT out of that. Two attempts at one delivery
therefore never wait for each other's network, and the second to get there finds the note
that they were delivered.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import psycopg
from psycopg import conninfo, sql
from psycopg.rows import namedtuple_row

from exportd_server.encoders.base import Buffer
from exportd_server.errors import ConfigurationError, DeliveryFailed
from exportd_server.platform.urls import parse_postgres_url
from exportd_server.sinks.base import BadSinkRequest, Delivery, Export
from exportd_server.sinks.database import postgres_errors as errors
from exportd_server.sinks.database.postgres_target import (
    RIGHTS,
    Plan,
    Session,
    Target,
    find,
    may_create,
    one,
    plan_for,
    target_of,
)
from exportd_server.sinks.database.postgres_types import (
    Carrier,
    over,
)
from exportd_server.sinks.database.request import (
    DatabaseConnection,
    DatabaseRequest,
    parse_table,
)
from exportd_server.sinks.database.rows import Feed, csv_lines, csv_options, spooled
from exportd_server.sinks.database.running import Call, run

OLDEST = 14
"""Of the major versions, the oldest that will do."""

_LINK: Mapping[str, Any] = {
    "connect_timeout": 10,
    "application_name": "exportd",
    "client_encoding": "UTF8",
    # A host that is gone is noticed within a minute.
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}
_SETTINGS = {
    # When it says that it is done, it is.
    "synchronous_commit": "on",
    "lock_timeout": "60s",
    # A process that was stopped in the short stretch lets others on.
    "idle_in_transaction_session_timeout": "60s",
    # A server waits for what is copied, and looks at none of its limits meanwhile: so one
    # whose client's machine is gone has to notice by itself.
    "tcp_keepalives_idle": "30",
    "tcp_keepalives_interval": "10",
    "tcp_keepalives_count": "3",
}
_MADE_MEANWHILE = (
    psycopg.errors.DuplicateTable,
    # Of its type, or in the database's own catalogue, when both make it at once.
    psycopg.errors.DuplicateObject,
    psycopg.errors.UniqueViolation,
)
_CHECK_CLIENT = "SELECT set_config('client_connection_check_interval', '1s', true)"


class _Noted(Exception):
    """Another attempt has delivered."""


class PostgresSink:
    """A PostgreSQL database that exports are written to. Each call has a connection of
    its own."""

    def __init__(self, connection: DatabaseConnection) -> None:
        url = connection.address
        try:
            given = conninfo.conninfo_to_dict(url)
        except psycopg.ProgrammingError as error:
            said = parse_postgres_url(url).said(error)
            raise ConfigurationError(f"url is no URL of PostgreSQL: {said}") from None
        self._parameters = {**_LINK, **given}
        self._connection = connection
        self._ledger_name = parse_table(connection.deliveries_table)

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
        with self._session(call) as session, session.transaction(force_rollback=True):
            _settle(session, self._connection.statement_timeout)
            plan_for(self._connection, session, request, export)
            rights = one(session, RIGHTS)
            if not rights.temporary:
                raise DeliveryFailed(
                    "the connection's role may not make temporary tables; have the "
                    "operator grant it TEMPORARY on the database",
                    retryable=False,
                )
            if find(session, self._ledger_name) is None and not self._ledger_can_be_made(
                session, rights
            ):
                raise self._no_ledger()

    def _deliver(
        self, call: Call, request: DatabaseRequest, delivery: Delivery, feed: Feed
    ) -> str:
        connection = self._connection
        lines = csv_lines(feed, delivery.export, delivery.parts, connection.spool_directory)
        with contextlib.ExitStack() as stack:
            # What it holds open of a part is not to outlast a failure.
            stack.enter_context(contextlib.closing(lines))
            checked = _until_stopped(call, lines)
            straight = self._goes_straight(call, request, delivery)
            if straight:
                # No session is open meanwhile.
                spool = spooled(checked, connection.spool_directory, connection.spool_bytes)
                checked, straight = stack.enter_context(spool)
            return self._load(call, request, delivery, checked, straight=straight)

    def _goes_straight(
        self, call: Call, request: DatabaseRequest, delivery: Delivery
    ) -> bool:
        """Whether rows could go into the target at once, as it is now. False where that
        is not seen; why, the loading tells."""
        if request.mode != "APPEND" or self._connection.always_stage:
            return False
        with self._session(call) as session, session.transaction(force_rollback=True):
            _settle(session, self._connection.statement_timeout)
            name = find(session, self._ledger_name)
            if name is not None and _receipt(
                session, sql.Identifier(name.schema, name.name), delivery
            ):
                return False
            with contextlib.suppress(BadSinkRequest):
                plan = plan_for(self._connection, session, request, delivery.export)
                return plan.straight
        return False

    def _load(
        self,
        call: Call,
        request: DatabaseRequest,
        delivery: Delivery,
        lines: Iterator[Buffer],
        *,
        straight: bool,
    ) -> str:
        loading: _Loading | None = None
        with self._session(call) as session:
            try:
                ledger = self._ledger(session)
                with session.transaction():
                    _settle(session, self._connection.statement_timeout)
                    receipt = _receipt(session, ledger, delivery)
                    if receipt is not None:
                        return receipt
                    plan = plan_for(self._connection, session, request, delivery.export)
                    kind = _Straight if straight and plan.straight else _Staged
                    loading = kind(
                        self._connection, session, request, delivery, lines, plan
                    )
                    loading.load()
                    call.check()
                    _note(session, ledger, plan.target, delivery)
                    loading.finish()
                    call.check()
                    return _told(_rows(delivery), str(plan.target))
            except _Noted:
                return cast("str", _receipt(session, ledger, delivery))
            except BadSinkRequest as error:
                raise DeliveryFailed(error.description, retryable=False) from error
            except psycopg.Error as error:
                call.check()
                copied = None if loading is None else loading.copied
                raise errors.failure(error, copied) from error

    @contextlib.contextmanager
    def _session(self, call: Call) -> Iterator[Session]:
        call.check()
        try:
            session: Session = psycopg.connect(
                **self._parameters, autocommit=True, row_factory=namedtuple_row
            )
        except psycopg.Error as error:
            raise errors.unreachable(error) from error
        with contextlib.closing(session):
            call.cut_by(lambda: _cut(session))
            try:
                call.check()
                if session.info.server_version < OLDEST * 10_000:
                    raise DeliveryFailed(
                        f"the database is older than PostgreSQL {OLDEST}", retryable=False
                    )
                session.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
                session.read_only = False
                yield session
            except psycopg.Error as error:
                call.check()
                raise errors.failure(error) from error
            finally:
                call.cut_by(None)

    # What has been delivered.

    def _ledger(self, session: Session) -> sql.Identifier:
        """The table of deliveries, made when it is missing, in a transaction of its own:
        nobody else's first delivery is to wait for this one."""
        for _ in range(2):
            found = find(session, self._ledger_name)
            if found is not None:
                return sql.Identifier(found.schema, found.name)
            rights = one(session, RIGHTS)
            if not self._ledger_can_be_made(session, rights):
                raise self._no_ledger()
            name = sql.Identifier(
                self._ledger_name.schema or rights.schema, self._ledger_name.name
            )
            with (
                contextlib.suppress(*_MADE_MEANWHILE),
                session.transaction(),
            ):
                session.execute(
                    sql.SQL(
                        "CREATE TABLE {} (delivery_id text PRIMARY KEY, "
                        "job_id text NOT NULL, target text NOT NULL, "
                        "rows bigint NOT NULL, "
                        "delivered_at timestamptz NOT NULL DEFAULT now())"
                    ).format(name)
                )
        raise DeliveryFailed(
            "the table of deliveries was made and dropped meanwhile", retryable=True
        )

    def _ledger_can_be_made(self, session: Session, rights: Any) -> bool:
        if not self._ledger_name.schema:
            return bool(rights.creates)
        return may_create(session, self._ledger_name.schema)

    def _no_ledger(self) -> DeliveryFailed:
        return DeliveryFailed(
            f"the table {self._ledger_name} is missing, and the connection's role may not "
            "make it; have the operator make it",
            retryable=False,
        )


class _Loading(ABC):
    """How the rows of one attempt get into the target."""

    def __init__(
        self,
        connection: DatabaseConnection,
        session: Session,
        request: DatabaseRequest,
        delivery: Delivery,
        lines: Iterator[Buffer],
        plan: Plan,
    ) -> None:
        self._connection = connection
        self._session = session
        self._request = request
        self._delivery = delivery
        self._lines = lines
        self._plan = plan
        self.copied: errors.Copied | None = None
        """What the server means when it tells where a COPY failed."""

    @abstractmethod
    def load(self) -> None:
        """Take the rows into the database."""

    @abstractmethod
    def finish(self) -> None:
        """What is left to do once the delivery is noted."""

    def _lock(self, lock: str) -> None:
        """Lock the target, which must be what was planned for."""
        target = self._plan.target
        self._session.execute(
            sql.SQL("LOCK TABLE {} IN {} MODE").format(target.identifier, _trusted(lock))
        )
        found = target_of(
            self._connection, self._session, self._request, self._delivery.export
        )
        if found != target:
            raise DeliveryFailed(
                f"{target} was changed while rows were loaded", retryable=True
            )

    def _copy(self, schema: str, relation: str, names: Sequence[str]) -> None:
        """All rows into columns of a table, in the order of the export's."""
        shown = [(each.name, each.type.shown) for each in self._plan.columns]
        self.copied = errors.Copied(relation, dict(zip(names, shown, strict=True)))
        options = csv_options(self._delivery.export)
        statement = sql.SQL(
            "COPY {} ({}) FROM STDIN (FORMAT csv, DELIMITER {}, NULL {}, ENCODING 'UTF8')"
        ).format(
            sql.Identifier(schema, relation),
            sql.SQL(", ").join(map(sql.Identifier, names)),
            sql.Literal(options.delimiter),
            sql.Literal(options.null_marker),
        )
        with self._session.cursor() as cursor:
            with cursor.copy(statement) as copy:
                for piece in self._lines:
                    copy.write(piece)
            count = cursor.rowcount
        if count != _rows(self._delivery):
            raise DeliveryFailed(
                f"{count} rows were read of the {_rows(self._delivery)} that the export "
                "has",
                retryable=False,
            )


class _Straight(_Loading):
    """Into the target itself."""

    def load(self) -> None:
        target = self._plan.target
        self._lock("ROW EXCLUSIVE")
        self._copy(target.schema, target.name, [each.name for each in self._plan.columns])

    def finish(self) -> None:
        """Nothing."""


class _Staged(_Loading):
    """Through a temporary table."""

    def load(self) -> None:
        plan = self._plan
        name = f"exportd_{secrets.token_hex(8)}"
        self._staging = sql.Identifier("pg_temp", name)
        columns: list[sql.Composable] = [
            sql.SQL("{} {}").format(sql.Identifier(_staged(index)), _trusted(each.staging))
            for index, each in enumerate(plan.carriers)
        ]
        if plan.keys:
            # Which row came last, for those with the same key.
            columns.append(sql.SQL("place bigint GENERATED ALWAYS AS IDENTITY"))
        self._session.execute(
            sql.SQL("CREATE TEMPORARY TABLE {} ({}) ON COMMIT DROP").format(
                self._staging, sql.SQL(", ").join(columns)
            )
        )
        self._copy("pg_temp", name, [_staged(n) for n in range(len(plan.carriers))])
        _require_fitting(self._session, plan, self._staging)

    def finish(self) -> None:
        target = self._plan.target
        if not target.oid:
            _make(self._session, self._plan)
        else:
            # REPLACE keeps other writers away, so that what another one added meanwhile
            # does not stay beside these rows. Readers go on with what was there.
            replaces = self._request.mode == "REPLACE"
            self._lock("SHARE ROW EXCLUSIVE" if replaces else "ROW EXCLUSIVE")
            if replaces:
                self._session.execute(sql.SQL("DELETE FROM {}").format(target.identifier))
        self._session.execute(_insert(self._plan, self._staging))


def _insert(plan: Plan, staging: sql.Identifier) -> sql.Composed:
    names = [sql.Identifier(column.name) for column in plan.columns]
    values = [_value(index, each) for index, each in enumerate(plan.carriers)]
    comma = sql.SQL(", ")
    parts: list[sql.Composable] = [
        sql.SQL("INSERT INTO {} ({})").format(plan.target.identifier, comma.join(names))
    ]
    if not plan.keys:
        parts.append(sql.SQL("SELECT {} FROM {}").format(comma.join(values), staging))
        return sql.SQL(" ").join(parts)
    keys = comma.join(names[index] for index in plan.keys)
    distinct = comma.join(values[index] for index in plan.keys)
    parts.append(
        sql.SQL("SELECT DISTINCT ON ({}) {} FROM {} ORDER BY {}, place DESC").format(
            distinct, comma.join(values), staging, distinct
        )
    )
    others = [name for index, name in enumerate(names) if index not in plan.keys]
    if others:
        new = comma.join(sql.SQL("{0} = EXCLUDED.{0}").format(name) for name in others)
        parts.append(sql.SQL("ON CONFLICT ({}) DO UPDATE SET {}").format(keys, new))
    else:
        parts.append(sql.SQL("ON CONFLICT ({}) DO NOTHING").format(keys))
    return sql.SQL(" ").join(parts)


def _make(session: Session, plan: Plan) -> None:
    target = plan.target
    columns = [
        sql.SQL("{} {}").format(sql.Identifier(column.name), _trusted(column.type.shown))
        for column in target.columns
    ]
    if plan.keys:
        keys = [sql.Identifier(plan.columns[index].name) for index in plan.keys]
        columns.append(sql.SQL("PRIMARY KEY ({})").format(sql.SQL(", ").join(keys)))
    try:
        session.execute(
            sql.SQL("CREATE TABLE {} ({})").format(
                target.identifier, sql.SQL(", ").join(columns)
            )
        )
    except _MADE_MEANWHILE as error:
        raise DeliveryFailed(
            f"{target} was made while rows were loaded", retryable=True
        ) from error


def _require_fitting(session: Session, plan: Plan, staging: sql.Identifier) -> None:
    """Raises `DeliveryFailed` for values that the target would change, and for keys that
    are missing, which would meet no row ever."""
    found = [
        (over(each.misfit, _staged(index)), plan.columns[index].name, each.why)
        for index, each in enumerate(plan.carriers)
        if each.misfit
    ]
    lack = "is missing, and it is a key"
    found += [
        (f"{_staged(index)} IS NULL", plan.columns[index].name, lack) for index in plan.keys
    ]
    if not found:
        return
    asked = sql.SQL(", ").join(
        sql.SQL("bool_or({})").format(_trusted(condition)) for condition, _, _ in found
    )
    answers = (
        session.cursor(row_factory=psycopg.rows.tuple_row)
        .execute(sql.SQL("SELECT {} FROM {}").format(asked, staging))
        .fetchone()
    )
    for (_, name, why), wrong in zip(found, answers or (), strict=True):
        if wrong:
            raise DeliveryFailed(f"column {name!r}: a value {why}", retryable=False)


def _until_stopped(call: Call, lines: Iterator[Buffer]) -> Iterator[Buffer]:
    for piece in lines:
        call.check()
        yield piece


def _note(
    session: Session, ledger: sql.Identifier, target: Target, delivery: Delivery
) -> None:
    """Note the delivery. Another attempt that has noted it and not ended is waited for;
    raises `_Noted` when it is there then."""
    done = session.execute(
        sql.SQL(
            "INSERT INTO {} (delivery_id, job_id, target, rows) "
            "VALUES (%s, %s, %s, %s) ON CONFLICT (delivery_id) DO NOTHING"
        ).format(ledger),
        (delivery.delivery_id, delivery.export.job_id, str(target), _rows(delivery)),
    )
    if not done.rowcount:
        raise _Noted


def _receipt(session: Session, ledger: sql.Identifier, delivery: Delivery) -> str | None:
    row = session.execute(
        sql.SQL("SELECT rows, target FROM {} WHERE delivery_id = %s").format(ledger),
        (delivery.delivery_id,),
    ).fetchone()
    return None if row is None else _told(row.rows, row.target)


def _told(rows: int, target: str) -> str:
    return f"{rows} rows in {target}"


def _rows(delivery: Delivery) -> int:
    return sum(part.rows for part in delivery.parts)


def _settle(session: Session, timeout: float) -> None:
    """What a role or a database has set otherwise must not decide what rows become."""
    wanted = {**_SETTINGS, "statement_timeout": str(int(timeout * 1000))}
    for name, value in wanted.items():
        session.execute("SELECT set_config(%s, %s, true)", (name, value))
    # A server that cannot look whether its client is there goes without.
    with contextlib.suppress(psycopg.DataError), session.transaction():
        session.execute(_CHECK_CLIENT)


def _cut(session: Session) -> None:
    """End a session under its thread, from another one."""
    with (
        contextlib.suppress(OSError, psycopg.Error),
        socket.socket(fileno=os.dup(session.fileno())) as link,
    ):
        link.shutdown(socket.SHUT_RDWR)


def _staged(index: int) -> str:
    return f"c{index}"


def _value(index: int, each: Carrier) -> sql.SQL:
    return _trusted(over(each.value, _staged(index)))


def _trusted(text: str) -> sql.SQL:
    """SQL that was written here, or quoted by the database itself."""
    return sql.SQL(text)
