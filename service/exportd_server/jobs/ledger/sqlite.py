"""The ledger in one SQLite file, for one process.

One thread writes, so that writers stand in line without ever meeting a busy database;
a few others read beside it. Every commit is synced to disk before it counts.
"""

from __future__ import annotations

import asyncio
import fcntl
import math
import os
import sqlite3
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
import structlog
from sqlalchemy.dialects import sqlite
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.pool import QueuePool

from exportd_server.errors import ConfigurationError, LedgerUnavailable
from exportd_server.jobs.ledger import codec, schema
from exportd_server.jobs.ledger.base import ClaimLimits, Lease, TaskKind
from exportd_server.jobs.ledger.counting import count
from exportd_server.jobs.ledger.hands import Hands
from exportd_server.jobs.ledger.prepared import Prepared
from exportd_server.jobs.ledger.signals import Signals
from exportd_server.jobs.ledger.sql import SqlLedger
from exportd_server.jobs.ledger.statements import claiming, working
from exportd_server.jobs.ledger.tables import audit_records, counters, queues, tenants
from exportd_server.jobs.ledger.transaction import Transaction
from exportd_server.platform import metrics_service as metrics
from exportd_server.platform.clock import Clock

log = structlog.get_logger(__name__)

T = TypeVar("T")

# Built once, as in `reading`.
_NEXT_TOKEN = Prepared(
    sa.update(counters)
    .where(counters.c.name == sa.literal_column("'token'", sa.Text))
    .values(value=counters.c.value + 1)
    .returning(counters.c.value)
)
_ENSURE_TENANT = Prepared(sqlite.insert(tenants).on_conflict_do_nothing())
_ADD_AUDIT_RECORDS = sqlite.insert(audit_records).on_conflict_do_nothing()

_READERS = 2
_SLOW = 0.05
_NOT_HERE = 10.0
"""Seconds that nothing is read on the loop's thread after a read there failed, or took
longer than `_SLOW`."""
_BUSY_SECONDS = 10
"""How long to wait for a lock that only a foreign tool, say a backup, can hold."""


async def open_sqlite_ledger(
    path: Path, clock: Clock, *, max_attempts: int = 5
) -> SqlLedger:
    """Open the ledger in a file, made with its directory if there is none yet.

    The file is this process's alone until the ledger is closed. Whoever held a lease
    before is therefore dead: leased tasks are due at once, with their attempts counted.

    Raises `ConfigurationError` when another process has the file, when it cannot be
    read or written, or when it is no ledger or one of a newer version.
    """
    database = SqliteDatabase(path, clock, max_attempts)
    await database.open()
    return SqlLedger(database)


class SqliteDialect:
    """What is SQLite's own."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def now(self, connection: Connection) -> int:  # noqa: ARG002 - others ask the server
        """The process's clock is the ledger's: there is only this process."""
        return codec.to_micros(self._clock.now())

    def next_token(self, tx: Transaction) -> int:
        """Count up; the counter is part of the transaction."""
        token: int = tx.scalar(_NEXT_TOKEN)
        return token

    def alone_with_tenant(self, tx: Transaction, tenant: str) -> bool:  # noqa: ARG002 - see below
        """There is one writer."""
        return True

    def ensure_tenant(self, tx: Transaction, tenant: str) -> None:
        """Insert the row unless it is there."""
        tx.later(_ENSURE_TENANT, tenant=tenant)

    def ensure_queue(self, connection: Connection, values: Mapping[str, Any]) -> None:
        """Insert the row unless it is there."""
        connection.execute(sqlite.insert(queues).values(**values).on_conflict_do_nothing())

    def add_audit_records(
        self, connection: Connection, rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Insert those that are not there."""
        connection.execute(_ADD_AUDIT_RECORDS, [*map(dict, rows)])


class SqliteDatabase:
    """Connections, threads and the lock of one file."""

    reads_at_a_time = 1
    """What they read is in memory: more would wait for the interpreter's lock instead."""
    is_far = False

    def __init__(self, path: Path, clock: Clock, max_attempts: int) -> None:
        self.signals = Signals()
        self._path = path
        self._clock = clock
        self._dialect = SqliteDialect(clock)
        self._max_attempts = max_attempts
        self._loop = asyncio.get_running_loop()
        self._lock: int | None = None
        self._write_thread = ThreadPoolExecutor(1, "exportd-ledger-write")
        self._read_threads = Hands(_READERS, "exportd-ledger-read")
        self._writer = _engine(path, 1)
        self._writing: Connection | None = None
        self._readers = _engine(path, _READERS, "PRAGMA query_only = ON")
        self._reading: list[Connection] = []
        self._reader_here = _engine(
            path, 1, "PRAGMA query_only = ON", "PRAGMA busy_timeout = 0"
        )
        self._here: Connection | None = None
        self._here_from = math.inf

    async def open(self) -> None:
        """Take the file. Raises `ConfigurationError`, and then holds nothing."""
        try:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._write_thread, self._open)
        except BaseException:
            await self.close()
            raise

    async def write(
        self,
        work: Callable[[Transaction], T],
        *,
        line: str = "",  # noqa: ARG002 - all stand in one line anyway
    ) -> T:
        """See `Database`."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._write_thread, self._write, work)

    async def read(self, work: Callable[[Transaction], T]) -> T:
        """See `Database`."""
        return await self._read_threads.run(partial(self._read, work))

    def version_here(self) -> tuple[object, datetime] | None:
        """See `Database`."""
        # As of a transaction: its moment is before what it sees.
        now = self._clock.now()
        version = self._do_here(_version)
        return None if version is None else (version, now)

    def read_here(self, work: Callable[[Transaction], T]) -> T | None:
        """See `Database`. Writers do not lock readers out."""

        def read(connection: Connection) -> T:
            with _in_transaction(connection, "BEGIN"):
                return self._transaction(connection).run(work)

        return self._do_here(read)

    def _do_here(self, work: Callable[[Connection], T]) -> T | None:
        """Work on the loop's own connection. A disk may make it wait, and SQLite by itself
        for what somebody holds of its files; then, and after a failure, threads do the
        reading for a while."""
        begun = time.monotonic()
        if begun < self._here_from:
            return None
        connection, self._here = self._here, None
        try:
            if connection is None:
                connection = self._reader_here.connect()
            result = work(connection)
            self._here = connection
        except BaseException as error:
            # There is one, for which the loop must never wait.
            if connection is not None:
                connection.close()
            if not isinstance(error, sa.exc.DBAPIError | sqlite3.Error):
                raise
            # A thread is told what is wrong, or waits.
            self._here_from = time.monotonic() + _NOT_HERE
            return None
        if (now := time.monotonic()) - begun > _SLOW:
            self._here_from = now + _NOT_HERE
        return result

    async def write_apart(self, work: Callable[[Transaction], T]) -> T:
        """See `Database`. There is one writer, and its queue is short."""
        return await self.write(work)

    async def claim(
        self,
        owner: str,
        kinds: Collection[TaskKind],
        *,
        lease: int,
        limits: ClaimLimits,
    ) -> tuple[Lease | None, int]:
        """See `Database`."""
        return await self.write(
            lambda tx: (
                claiming.claim(tx, owner, kinds, lease=lease, limits=limits),
                tx.now,
            )
        )

    async def close(self) -> None:
        """See `Database`."""
        self._here_from = math.inf
        await asyncio.to_thread(self._close)
        # Those who wait see that nothing more will come.
        self.signals.everyone()

    # --- in threads

    def _open(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            # The journal files take their permissions from this one.
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._upgrade()
            connection = self._writer.connect()
            with _in_transaction(connection, "BEGIN IMMEDIATE"):
                tx = self._transaction(connection)
                tx.run(working.recover)
            self._writing = connection
            count(tx.changes)
            self._here = self._reader_here.connect()
            self._here_from = 0.0
        except OSError as error:
            raise ConfigurationError(
                f"ledger {self._path}: {error.strerror}; it must be a file that the "
                "service may read and write"
            ) from error
        except sa.exc.DatabaseError as error:
            raise ConfigurationError(
                f"ledger {self._path}: {error.orig}; it must be a SQLite file that the "
                "service made and may write"
            ) from error

    def _take_lock(self) -> None:
        lock = self._path.with_name(self._path.name + ".lock")
        self._lock = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(
                f"ledger {self._path}: another process has it open; stop that one, or "
                "give this one a file of its own"
            ) from None

    def _upgrade(self) -> None:
        """By the library's own transactions, as that of the migrations needs it."""
        engine = _engine(self._path, 1)
        sa.event.listen(
            engine, "begin", lambda opened: opened.exec_driver_sql("BEGIN IMMEDIATE")
        )
        try:
            with engine.begin() as connection:
                schema.upgrade(connection, self._path)
        finally:
            engine.dispose()

    def _write(self, work: Callable[[Transaction], T]) -> T:
        with _available():
            connection, self._writing = self._writing, None
            if connection is None:
                connection = self._writer.connect()
            with _in_transaction(connection, "BEGIN IMMEDIATE"):
                tx = self._transaction(connection)
                result = tx.run(work)
            self._writing = connection
        count(tx.changes)
        # Told from here, so that the news spreads even if the caller has gone away. The
        # loop may be closing down, with nobody left to tell.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.signals.spread, tx.changes)
        return result

    def _read(self, work: Callable[[Transaction], T]) -> T:
        with _available():
            try:
                connection = self._reading.pop()
            except IndexError:
                connection = self._readers.connect()
            with _in_transaction(connection, "BEGIN"):
                result = self._transaction(connection).run(work)
            self._reading.append(connection)
            return result

    def _transaction(self, connection: Connection) -> Transaction:
        now = self._dialect.now(connection)
        return Transaction(connection, self._dialect, now, self._max_attempts)

    def _close(self) -> None:
        self._write_thread.shutdown()
        self._read_threads.close()
        # What a cancelled `open` was still about is done by now.
        self._here_from = math.inf
        if self._here is not None:
            self._here.close()
            self._here = None
        for connection in self._reading:
            connection.close()
        self._readers.dispose()
        self._reader_here.dispose()
        if self._writing is not None:
            self._writing.close()
        # The last connection to close folds the journal into the file.
        self._writer.dispose()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _version(connection: Connection) -> object:
    driver: Any = connection.connection.driver_connection
    # Only to be compared with what the same connection has told before.
    return connection, driver.execute("PRAGMA data_version").fetchone()


@contextmanager
def _in_transaction(connection: Connection, begin: str) -> Iterator[None]:
    """Commits at the end. After an exception all is undone, and the connection closed.
    What the driver raises is raised as the library does.

    Threads keep their connections, and begin by the driver: a loan from the pool and the
    library's own transaction take as long as a short statement.
    """
    driver: Any = connection.connection.driver_connection
    try:
        driver.execute(begin)
        yield
        # The library may take it to have begun, too.
        if connection.in_transaction():
            connection.commit()
        if driver.in_transaction:
            driver.commit()
    except BaseException as error:
        with suppress(sqlite3.Error):
            # The library forgets to, where it was its commit that failed.
            driver.rollback()
        connection.close()
        if isinstance(error, sqlite3.Error):
            raise sa.exc.DBAPIError.instance(
                begin, None, error, sqlite3.Error, dialect=connection.dialect
            ) from error
        raise


@contextmanager
def _available() -> Iterator[None]:
    """A disk that is full or fails is no fault of the caller's."""
    try:
        yield
    except sa.exc.OperationalError as error:
        metrics.ledger_errors.inc()
        log.warning("ledger failed", error=str(error.orig))
        raise LedgerUnavailable from error


def _engine(path: Path, connections: int, *pragmas: str) -> Engine:
    """Connections that begin no transactions by themselves."""
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=str(path)),
        poolclass=QueuePool,
        pool_size=connections,
        max_overflow=0,
        connect_args={"timeout": _BUSY_SECONDS, "check_same_thread": False},
    )

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, _record: Any) -> None:
        # The module's own BEGIN comes too late for what a transaction reads first.
        connection.isolation_level = None
        for pragma in (
            "PRAGMA journal_mode = WAL",
            "PRAGMA synchronous = FULL",
            "PRAGMA foreign_keys = ON",
            *pragmas,
        ):
            connection.execute(pragma)

    return engine
