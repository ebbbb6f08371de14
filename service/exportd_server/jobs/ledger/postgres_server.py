"""A PostgreSQL server that holds a ledger: how to reach it, what it must be, and how its
tables are brought up to date."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import psycopg
import sqlalchemy as sa
from psycopg import conninfo, sql

from exportd_server.errors import ConfigurationError
from exportd_server.jobs.ledger import schema
from exportd_server.jobs.ledger.tables import METADATA
from exportd_server.platform.urls import BadUrl, Url, parse_postgres_url

SCHEMA = "exportd"
OLDEST = 14
"""Of the major versions, the oldest that will do."""

_AS = "postgresql://USER:PASSWORD@HOST:PORT/DATABASE"
_CONNECT_SECONDS = 5
_IDLE_SECONDS = 5
"""How long a transaction may do nothing before the server undoes it: its process was
stopped, and others wait for what it has locked."""

_KEPT = {
    "search_path": SCHEMA,
    "idle_in_transaction_session_timeout": f"{_IDLE_SECONDS}s",
    # Longer than that, so that those who wait for such a one get their turn.
    "lock_timeout": "15s",
    "statement_timeout": "30s",
    "TimeZone": "UTC",
    "default_transaction_isolation": "read committed",
    "default_transaction_read_only": "off",
}
_SESSION = {
    **_KEPT,
    # A process that is stopped takes no news, and the server keeps it for all.
    "tcp_user_timeout": "30s",
}
_LINK: Mapping[str, Any] = {
    "connect_timeout": _CONNECT_SECONDS,
    "application_name": "exportd",
    "client_encoding": "UTF8",
    # A server that is gone without a word is noticed within half a minute.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
_ANY_LEDGER = 0x6578706F
"""The lock of those who migrate: no number of a table, as other locks are."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where the ledger is, and what the library is told of it."""

    parameters: Mapping[str, Any] = field(repr=False)
    url: Url

    @classmethod
    def parse(cls, url: str) -> Address:
        """Read a `postgresql://` URL; raises `ConfigurationError`."""
        try:
            read = parse_postgres_url(url)
            given = conninfo.conninfo_to_dict(url)
        except BadUrl as error:
            raise ConfigurationError(
                f"ledger.url: is no URL of PostgreSQL: it {error}; give it as {_AS}"
            ) from None
        except psycopg.ProgrammingError as error:
            raise ConfigurationError(
                f"ledger.url: is no URL of PostgreSQL: {read.said(error)}; give it as {_AS}"
            ) from None
        session = " ".join(f"-c {name}={_escaped(v)}" for name, v in _SESSION.items())
        options = f"{given.pop('options', '') or ''} {session}".strip()
        return cls({**_LINK, **given, "options": options}, read)

    @property
    def shown(self) -> str:
        """For people: without user, password and options."""
        return self.url.shown(5432)

    def connect(self) -> psycopg.Connection[Any]:
        """A connection without a transaction. Raises `psycopg.Error`."""
        return psycopg.connect(**self.parameters, autocommit=True)

    async def connect_async(self) -> psycopg.AsyncConnection[Any]:
        """The same for an event loop."""
        # The library looks names up in a thread, and waits for the loop otherwise.
        async with asyncio.timeout(2 * _CONNECT_SECONDS):
            return await psycopg.AsyncConnection.connect(**self.parameters, autocommit=True)

    def check(self) -> str:
        """Make sure that a ledger that this release works on is there and may be used;
        blocks. Returns the version of its tables. Raises `ConfigurationError`."""
        with self._told(), self._reach() as connection:
            self._require_server(connection)
            if not _has_ledger(connection):
                raise ConfigurationError(
                    f"ledger {self.shown}: the database has no ledger yet; run "
                    "`exportd-server migrate`"
                )
            self._require_rights(connection)
            version = str(_one(connection, "SELECT version_num FROM alembic_version"))
            if version == schema.HEAD:
                return version
            if version not in schema.known():
                if schema.is_compatible(_one(connection, schema.COMPATIBLE)):
                    return version
                raise ConfigurationError(schema.too_new(self.shown, version))
            pause = (
                "processes that run may go on meanwhile"
                if version >= schema.COMPATIBLE_FROM
                else "end all processes of the release before first"
            )
            raise ConfigurationError(
                f"ledger {self.shown}: its tables have version {version} and this release "
                f"needs {schema.HEAD}; run `exportd-server migrate`; {pause}"
            )

    def migrate(self) -> tuple[str | None, str]:
        """Bring the tables to this release's version; blocks. Returns the version before,
        None when there was no ledger, and the version now. Raises `ConfigurationError`.
        Two at once are fine: the second finds nothing to do. So does a release of before
        where it may work on the later tables: deployments run it at every start."""
        with self._told(), self._reach() as connection:
            self._require_server(connection)
            user, database = connection.info.user, connection.info.dbname
        engine = sa.create_engine(
            "postgresql+psycopg://", creator=self.connect, poolclass=sa.NullPool
        )
        try:
            with engine.begin() as bind:
                bind.exec_driver_sql("BEGIN")
                bind.exec_driver_sql("SET LOCAL lock_timeout = '10min'")
                bind.exec_driver_sql("SET LOCAL statement_timeout = 0")
                bind.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")
                bind.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_ANY_LEDGER})")
                if not _has_schema(bind):
                    bind.exec_driver_sql(f"CREATE SCHEMA {SCHEMA}")
                before = schema.version(bind, self.shown)
                if (
                    before is not None
                    and before not in schema.known()
                    and schema.is_compatible(bind.scalar(sa.text(schema.COMPATIBLE)))
                ):
                    return before, before
                schema.upgrade(bind, self.shown)
                return before, schema.HEAD
        except sa.exc.ProgrammingError as error:
            if not isinstance(error.orig, psycopg.errors.InsufficientPrivilege):
                raise ConfigurationError(
                    f"ledger {self.shown}: {self.url.said(str(error.orig))}; nothing was "
                    "changed"
                ) from error
            raise ConfigurationError(
                f"ledger {self.shown}: {self.url.said(str(error.orig))}; have its owner "
                f"run: GRANT CREATE ON DATABASE {database} TO {user}, or: CREATE SCHEMA "
                f"{SCHEMA} AUTHORIZATION {user}"
            ) from error
        except sa.exc.DBAPIError as error:
            raise ConfigurationError(
                f"ledger {self.shown}: {self.url.said(str(error.orig))}; nothing was "
                "changed"
            ) from error
        finally:
            engine.dispose()

    def _reach(self) -> psycopg.Connection[Any]:
        try:
            return self.connect()
        except psycopg.Error as error:
            said = self.url.said(error)
            raise ConfigurationError(
                f"ledger {self.shown}: {said}; {_mend(said)}"
            ) from error

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Whatever else the server refuses, in one line."""
        try:
            yield
        except psycopg.Error as error:
            said = self.url.said(error) or type(error).__name__
            raise ConfigurationError(f"ledger {self.shown}: {said}") from error

    def _require_server(self, connection: psycopg.Connection[Any]) -> None:
        require_version(self.shown, connection.info.server_version)
        for name, value in _KEPT.items():
            if _one(connection, "SELECT current_setting(%s)", (name,)) != value:
                raise ConfigurationError(
                    f"ledger {self.shown}: the connection does not keep the setting "
                    f"{name} that it is opened with; connect to the server directly, "
                    "without a pooler in between"
                )
        if _one(connection, "SELECT pg_is_in_recovery()"):
            raise ConfigurationError(
                f"ledger {self.shown}: the server is a standby, which cannot be written "
                "to; name the primary"
            )

    def _require_rights(self, connection: psycopg.Connection[Any]) -> None:
        lacking = self._lacking(connection)
        if lacking:
            user = connection.info.user
            raise ConfigurationError(
                f"ledger {self.shown}: user {user} lacks {lacking[0]}"
                + (f" and {len(lacking) - 1} more rights" if lacking[1:] else "")
                + f"; have the owner run: GRANT ALL ON ALL TABLES IN SCHEMA {SCHEMA} TO "
                f"{user}; GRANT ALL ON ALL SEQUENCES IN SCHEMA {SCHEMA} TO {user}"
            )

    def _lacking(self, connection: psycopg.Connection[Any]) -> list[str]:
        if not _one(connection, "SELECT has_table_privilege('alembic_version', 'SELECT')"):
            return [f"SELECT on {SCHEMA}.alembic_version"]
        lacking = [
            f"{right} on {SCHEMA}.{table}"
            for table in METADATA.tables
            for right in ("SELECT", "INSERT", "UPDATE", "DELETE")
            if not _one(connection, "SELECT has_table_privilege(%s, %s)", (table, right))
        ]
        if not _one(connection, "SELECT has_sequence_privilege('fencing_tokens', 'USAGE')"):
            lacking.append(f"USAGE on {SCHEMA}.fencing_tokens")
        return lacking


def require_version(shown: str, version: int) -> None:
    """Refuse a server that is too old; `version` as the server writes it: 140003."""
    if version < OLDEST * 10_000:
        raise ConfigurationError(
            f"ledger {shown}: the server is PostgreSQL {version // 10_000} and must be "
            f"{OLDEST} or later; upgrade it"
        )


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace(" ", "\\ ")


def _one(connection: psycopg.Connection[Any], text: str, parameters: Any = None) -> Any:
    row = connection.execute(sql.SQL(text), parameters).fetchone()
    return row[0] if row else None


def _has_schema(bind: sa.Connection) -> bool:
    found = bind.execute(
        sa.text("SELECT 1 FROM pg_namespace WHERE nspname = :name"), {"name": SCHEMA}
    )
    return found.first() is not None


def _has_ledger(connection: psycopg.Connection[Any]) -> bool:
    usage = "SELECT has_schema_privilege(oid, 'USAGE') FROM pg_namespace "
    if _one(connection, usage + "WHERE nspname = %s", (SCHEMA,)) is False:
        user = connection.info.user
        raise ConfigurationError(
            f"ledger: user {user} may not use schema {SCHEMA}; have the owner run: "
            f"GRANT USAGE ON SCHEMA {SCHEMA} TO {user}"
        )
    return bool(_one(connection, "SELECT to_regclass('alembic_version') IS NOT NULL"))


def _mend(text: str) -> str:
    """What the operator may do about a connection that is refused."""
    if "connection slots" in text or "too many" in text:
        return "raise max_connections, or give ledger.connections a smaller figure"
    if "does not exist" in text and "database" in text:
        return "create the database, or name another one in ledger.url"
    if "authentication" in text or "password" in text or "role" in text:
        return "mend user or password in ledger.url"
    return "is it up, and are host and port in ledger.url right?"
