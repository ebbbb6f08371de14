"""Threads with a connection each, and who waits for whom.

A server that hangs answers nothing and closes nothing. So each call has a time limit of
this process's own, after which its connection is cut and the thread comes free.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import psycopg
import sqlalchemy as sa
from psycopg import pq
from psycopg.rows import namedtuple_row
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.pool import QueuePool

from exportd_server.errors import LedgerUnavailable
from exportd_server.jobs.ledger.postgres_server import Address
from exportd_server.jobs.ledger.prepared import Call, Prepared, run_all

T = TypeVar("T")

CALL_SECONDS = 40.0
"""Longest call: above the server's own limits for a statement and for a lock, which tell
better what is wrong."""
_CLOSE_SECONDS = 5.0
_FRESH_SECONDS = 1.0
"""A connection used so short a time ago is taken to be good."""


class Lines:
    """Calls that would wait for each other in the database wait here instead, where it
    costs no connection. For one event loop."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    @contextlib.asynccontextmanager
    async def turn(self, line: str) -> AsyncIterator[None]:
        """Wait for the turn in a line; an empty name is none."""
        if not line:
            yield
            return
        lock, users = self._locks.get(line, (asyncio.Lock(), 0))
        self._locks[line] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks[line]
            if users == 1:
                del self._locks[line]
            else:
                self._locks[line] = (lock, users - 1)


class _Call:
    """What a thread is at, and how to end it from outside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection: psycopg.Connection[Any] | None = None
        self.given_up = False

    def uses(self, connection: psycopg.Connection[Any] | None) -> None:
        """The call goes on with this connection, or with none."""
        with self._lock:
            self._connection = connection
            if self.given_up:
                self._cut()

    def cut(self) -> None:
        """Cut the connection under the call, and any other that it takes up after: it
        then fails."""
        with self._lock:
            self.given_up = True
            self._cut()

    def _cut(self) -> None:
        with contextlib.suppress(OSError, psycopg.Error):
            if self._connection is not None and not self._connection.closed:
                with socket.socket(fileno=os.dup(self._connection.fileno())) as link:
                    link.shutdown(socket.SHUT_RDWR)


class Lane:
    """So many threads, each with a connection. Who finds all of them busy waits."""

    def __init__(self, address: Address, connections: int, name: str) -> None:
        self._connections = connections
        self._threads = ThreadPoolExecutor(connections, name)
        self._own = threading.local()
        self._calls: dict[_Call, Any] = {}
        self._engine: Engine = sa.create_engine(
            "postgresql+psycopg://",
            creator=address.connect,
            poolclass=QueuePool,
            pool_size=connections,
            max_overflow=0,
            # A connection comes back as it was lent: outside of any transaction, or it
            # is undone then.
            pool_reset_on_return="rollback",
        )

    async def run(self, call: Callable[..., T], *arguments: Any) -> T:
        """Run in one of the threads. Raises `LedgerUnavailable` when that takes too long;
        the call then ends by itself, and what it does is not known."""
        mark = _Call()
        future = self._threads.submit(self._enter, mark, call, arguments)
        self._calls[mark] = future
        future.add_done_callback(lambda _: self._calls.pop(mark, None))
        try:
            async with asyncio.timeout(CALL_SECONDS):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            mark.cut()
            raise LedgerUnavailable from None

    def _enter(self, mark: _Call, call: Callable[..., T], arguments: Any) -> T:
        self._own.call = mark
        try:
            return call(*arguments)
        finally:
            mark.uses(None)

    # --- in the threads

    def begin(
        self, statements: Sequence[Prepared], calls: Sequence[Call]
    ) -> tuple[Connection, list[list[Any]]]:
        """Begin a transaction with some statements, and run calls in it; returns its
        connection, and the rows of them all."""
        whole = [*((statement, {}) for statement in statements), *calls]

        def run(connection: Connection) -> list[list[Any]]:
            try:
                return run_all(connection, whole)
            except sa.exc.DBAPIError as error:
                not_begun = self._status(connection) == pq.TransactionStatus.IDLE
                if not_begun and isinstance(error.orig, psycopg.errors.FeatureNotSupported):
                    # So a standby refuses to begin what may write.
                    raise psycopg.errors.ReadOnlySqlTransaction(str(error.orig)) from error
                raise

        return self._on_a_good_one(run)

    def _on_a_good_one(self, run: Callable[[Connection], T]) -> tuple[Connection, T]:
        """Run what may be run again for as long as it has not been committed; returns its
        connection, too. One that turns out to be broken, as others may be that nobody used
        for a while, is replaced, unless the call was given up."""
        # Each of them may have broken.
        for left in reversed(range(self._connections + 1)):
            connection = self._engine.connect()
            self._own.call.uses(_raw(connection))
            try:
                result = run(connection)
            except (sa.exc.DBAPIError, psycopg.Error):
                broken = self._broken(connection)
                self._give_up(connection)
                if not left or not broken or self._own.call.given_up:
                    raise
            except BaseException:
                self._give_up(connection)
                raise
            else:
                connection.info["used"] = time.monotonic()
                return connection, result
        raise AssertionError("unreachable")

    @staticmethod
    def end(connection: Connection, text: str, parameters: Any) -> None:
        """Run a transaction's last statement, and commit, as one round trip. Raises
        `psycopg.Error`, and then nothing is committed or that is not known."""
        raw = _raw(connection)
        with raw.pipeline():
            raw.execute(text.encode(), parameters)
            raw.execute("COMMIT")

    def ask_once(self, text: str, parameters: Any) -> list[Any]:
        """Run a statement that must not be repeated without need; returns its rows."""
        connection = self._engine.connect()
        used: float = connection.info.get("used", 0.0)
        if time.monotonic() - used > _FRESH_SECONDS:
            connection.close()
            connection, _ = self._on_a_good_one(
                lambda found: self._execute(found, "SELECT 1", None)
            )
        self._own.call.uses(_raw(connection))
        try:
            rows = self._execute(connection, text, parameters)
        except BaseException:
            self._give_up(connection)
            raise
        self.give_back(connection)
        return rows

    def _execute(self, connection: Connection, text: str, parameters: Any) -> list[Any]:
        raw = _raw(connection)
        with raw.cursor(row_factory=namedtuple_row) as cursor:
            cursor.execute(text.encode(), parameters)
            while cursor.nextset():
                pass
            rows = cursor.fetchall()
        connection.info["used"] = time.monotonic()
        return rows

    @staticmethod
    def _broken(connection: Connection) -> bool:
        raw = _raw(connection)
        # One that breaks in a pipeline may stay in it, and is of no use any more.
        stuck = raw.pgconn.pipeline_status != pq.PipelineStatus.OFF
        return stuck or raw.broken or raw.closed

    @staticmethod
    def _status(connection: Connection) -> pq.TransactionStatus:
        return _raw(connection).info.transaction_status

    def give_back(self, connection: Connection) -> None:
        """Others may have the connection. From here on the call is not cut with it."""
        self._own.call.uses(None)
        connection.close()

    def undo(self, connection: Connection) -> None:
        """Undo what a transaction did, and give its connection back."""
        if not connection.invalidated and self._broken(connection):
            connection.invalidate()
        with contextlib.suppress(sa.exc.DBAPIError, psycopg.Error):
            connection.rollback()
        self.give_back(connection)

    def _give_up(self, connection: Connection) -> None:
        status = self._status(connection)
        if self._broken(connection) or status == pq.TransactionStatus.IDLE:
            # Even a good one: what was refused outside of a transaction the driver takes
            # to be prepared, with all that was sent along, until it undoes one.
            connection.invalidate()
        else:
            with contextlib.suppress(psycopg.Error):
                _raw(connection).rollback()
        self.give_back(connection)

    # ---

    async def close(self) -> None:
        """Let what runs end, but not for long; close the connections."""
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        wait(list(self._calls.values()), _CLOSE_SECONDS)
        for call in list(self._calls):
            call.cut()
        self._threads.shutdown()
        self._engine.dispose()


def _raw(connection: Connection) -> psycopg.Connection[Any]:
    raw: psycopg.Connection[Any] = connection.connection.driver_connection  # type: ignore[assignment] # typed as any driver's
    return raw
