"""Looks at a ledger that others work with, and gets in nobody's way: nothing is locked,
nothing is written, and no question takes long.

An embedded ledger belongs to one process, whose lock says so; a reader needs no lock and
takes none. Where that process runs, or died, its journal is there, and is read along.
Without a journal all is in the file, which is then read as it lies: SQLite would make a
journal for a reader otherwise, and leave it behind.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from exportd_server.errors import ConfigurationError
from exportd_server.jobs.ledger import schema
from exportd_server.jobs.ledger.codec import to_micros
from exportd_server.jobs.ledger.postgres_server import Address
from exportd_server.platform.clock import SystemClock

QUESTION_SECONDS = 5.0
"""Longest question. A ledger that takes longer has better to do than answer it."""
_BUSY_SECONDS = 2.0
_STEPS = 10_000
"""Steps of SQLite's machine, about a millisecond, between two looks at the time."""
_CLOCK = "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint"


class TookTooLong(Exception):
    """A question was broken off."""


class Look:
    """An open look. Each question sees the ledger as it is at that moment."""

    def __init__(
        self,
        connection: Connection,
        now: Callable[[], int],
        limited: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self._connection = connection
        self._limited = limited
        self.now = now()
        """The ledger's clock when it was opened, in microseconds since 1970."""

    def ask(self, statement: sa.Select[Any] | sa.CompoundSelect[Any]) -> Sequence[Row[Any]]:
        """The rows of a question. Raises `TookTooLong` after `QUESTION_SECONDS`."""
        with self._limited():
            return self._connection.execute(statement).all()


@contextlib.contextmanager
def look_at_file(path: Path, *, seconds: float = QUESTION_SECONDS) -> Iterator[Look]:
    """Look at an embedded ledger, whether a server has it open or not; blocks. Raises
    `ConfigurationError` when there is none that this release can read."""
    if not path.exists():
        raise ConfigurationError(
            f"ledger {path}: there is no such file; a server makes it when it starts"
        )

    with _told(path), _connected("sqlite://", partial(_open, path)) as connection:
        raw = connection.connection.driver_connection
        assert isinstance(raw, sqlite3.Connection)  # noqa: S101 - for the types

        @contextlib.contextmanager
        def limited() -> Iterator[None]:
            end = time.monotonic() + seconds
            raw.set_progress_handler(lambda: time.monotonic() > end, _STEPS)
            try:
                yield
            except sa.exc.OperationalError as error:
                if time.monotonic() > end:
                    raise TookTooLong from error
                raise

        _require_version(connection, path, "start a server of this release")
        yield Look(connection, lambda: to_micros(SystemClock().now()), limited)


def file_version(path: Path) -> str | None:
    """The version of the tables in a file; None when it is empty; blocks. Raises
    `ConfigurationError`."""
    with _told(path), _connected("sqlite://", partial(_open, path)) as connection:
        return schema.version(connection, path)


def _open(path: Path) -> sqlite3.Connection:
    journal = path.with_name(f"{path.name}-wal").exists()
    uri = f"file:{quote(str(path.absolute()))}?mode=ro{'' if journal else '&immutable=1'}"
    return sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except (sa.exc.DatabaseError, sqlite3.Error) as error:
        cause = error.orig if isinstance(error, sa.exc.DatabaseError) else error
        raise ConfigurationError(
            f"ledger {path}: {cause}; it must be a SQLite file that the service made and "
            "that this user may read"
        ) from error


@contextlib.contextmanager
def look_at_server(
    address: Address, *, seconds: float = QUESTION_SECONDS
) -> Iterator[Look]:
    """Look at a ledger in PostgreSQL; blocks. Raises `ConfigurationError` when there is
    none that this release can read."""

    def connect() -> psycopg.Connection[Any]:
        connection = address.connect()
        connection.execute(
            "SELECT set_config('statement_timeout', %s, false), "
            "set_config('default_transaction_read_only', 'on', false)",
            (str(max(1, int(seconds * 1000))),),
        )
        return connection

    @contextlib.contextmanager
    def limited() -> Iterator[None]:
        try:
            yield
        except sa.exc.DBAPIError as error:
            if isinstance(error.orig, psycopg.errors.QueryCanceled):
                raise TookTooLong from error
            raise

    try:
        with _connected("postgresql+psycopg://", connect) as connection:
            _require_version(connection, address.shown, "run `exportd-server migrate`")
            yield Look(
                connection,
                lambda: int(connection.exec_driver_sql(_CLOCK).scalar_one()),
                limited,
            )
    except (sa.exc.DBAPIError, psycopg.Error) as error:
        cause = error.orig if isinstance(error, sa.exc.DBAPIError) else error
        said = address.url.said(str(cause)) or type(cause).__name__
        raise ConfigurationError(
            f"ledger {address.shown}: {said}; `exportd-server check` tells more"
        ) from error


@contextlib.contextmanager
def _connected(url: str, connect: Callable[[], Any]) -> Iterator[Connection]:
    engine = sa.create_engine(url, creator=connect, poolclass=sa.NullPool)
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


def _require_version(connection: Connection, where: object, mend: str) -> None:
    found = schema.version(connection, where)
    if found == schema.HEAD:
        return
    if found is None:
        raise ConfigurationError(f"ledger {where}: there are no tables yet; {mend}")
    if found not in schema.known():
        if schema.is_compatible(connection.scalar(sa.text(schema.COMPATIBLE))):
            return
        raise ConfigurationError(schema.too_new(where, found))
    raise ConfigurationError(
        f"ledger {where}: its tables have version {found} and this release needs "
        f"{schema.HEAD}; {mend}"
    )
