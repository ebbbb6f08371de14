"""The ledger in PostgreSQL, for any number of processes.

The server's clock is the ledger's, its locks put the operations on one job in line, and
LISTEN/NOTIFY carries the news. A process may stop at any point: what it had open the
server undoes, at the latest after a few seconds, and the claim, which others would wait
for, is one statement that the server ends by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any, TypeVar

import psycopg
import sqlalchemy as sa
import structlog
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Connection

from exportd_server.errors import LedgerUnavailable
from exportd_server.jobs.ledger import codec, news
from exportd_server.jobs.ledger.base import ClaimLimits, Lease, TaskKind
from exportd_server.jobs.ledger.counting import count
from exportd_server.jobs.ledger.lanes import Lane, Lines
from exportd_server.jobs.ledger.listener import Listener
from exportd_server.jobs.ledger.postgres_server import Address
from exportd_server.jobs.ledger.prepared import Call, Prepared, run_all
from exportd_server.jobs.ledger.signals import Signals
from exportd_server.jobs.ledger.sql import SqlLedger
from exportd_server.jobs.ledger.statements import claiming, lifecycle
from exportd_server.jobs.ledger.tables import audit_records, queues, tenants
from exportd_server.jobs.ledger.transaction import Transaction
from exportd_server.platform import metrics_service as metrics
from exportd_server.platform.clock import Clock
from exportd_server.sources.base import Shard

log = structlog.get_logger(__name__)

T = TypeVar("T")

_WRITE = Prepared(sa.text("BEGIN ISOLATION LEVEL READ COMMITTED, READ WRITE"))
_READ = Prepared(sa.text("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
_CLOCK = Prepared(
    sa.text("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint")
)
_COMMIT = Prepared(sa.text("COMMIT"))
_NOTIFY = "SELECT pg_notify(%s, piece) FROM unnest(%s::text[]) AS piece"
_TAKEOVER = """SELECT claimed.*, EXISTS (
    SELECT FROM tasks WHERE task_id = claimed.o_task_id AND state = 'leased'
) AS takeover, trace_context_of(claimed.o_job_id) AS trace_context FROM """
"""What goes around a claim. The outer statement sees what was there before it began, and
there a task that is taken over was leased. A job may not have been there yet, so a
function looks for its trace, which sees what is there by then."""
_CLAIM = _TAKEOVER + "claim_task(%s, %s, %s, %s, %s, %s, %s, %s, %s) AS claimed"
_CLAIM_DELIVERY = _TAKEOVER + "claim_delivery(%s, %s, %s, %s, %s, %s::text[]) AS claimed"

# Built once, as in `reading`.
_TRY_TENANT = Prepared(
    sa.text("SELECT pg_try_advisory_xact_lock(hashtextextended(:tenant, 0))")
)
_LOCK_TENANT = Prepared(
    sa.text("SELECT pg_advisory_xact_lock(hashtextextended(:tenant, 0))")
)
_ENSURE_TENANT = Prepared(postgresql.insert(tenants).on_conflict_do_nothing())
_NEXT_TOKEN = Prepared(sa.text("SELECT nextval('fencing_tokens')"))

_IN_THE_WAY = frozenset({"40001", "40P01"})
"""Serialization failure, deadlock: the transaction was undone and may be tried again."""
_AWAY = ("08", "53", "57", "25P03", "55P03", "25006", "58")
"""Classes and codes of a server that cannot do what it otherwise can: connections lost,
resources used up, shutting down or cancelled, idle too long, locked too long, a standby,
its disk failing."""
_TRIES = 8
_DEPTH = 32
"""Tasks of each queue that a claim looks at once the first ones were locked."""
_LOOK_AGAIN = 0.05
"""Seconds until somebody looks again for a task that was locked."""


async def open_postgres_ledger(
    url: str, *, max_attempts: int = 5, connections: int = 8, clock: Clock | None = None
) -> SqlLedger:
    """Open the ledger at a `postgresql://` URL, with so many connections, and two more
    for renewing leases and for news.

    `clock` replaces the server's, for tests.

    Raises `ConfigurationError` when the server cannot be reached or refuses, is too old
    or a standby, or when its tables are not of this release's version: `migrate` makes
    them so.
    """
    address = Address.parse(url)
    await asyncio.to_thread(address.check)
    database = PostgresDatabase(address, clock, max_attempts, connections)
    await database.open()
    return SqlLedger(database)


def migrate_postgres_ledger(url: str) -> tuple[str | None, str]:
    """Make the ledger's tables, or bring them up to date; blocks. Returns their version
    before, None when there were none, and now. Raises `ConfigurationError`."""
    return Address.parse(url).migrate()


class PostgresDialect:
    """What is PostgreSQL's own."""

    def __init__(self, clock: Clock | None) -> None:
        self._clock = clock

    def now(self, connection: Connection) -> int:
        """The server's clock, one for all processes."""
        if self._clock is not None:
            return codec.to_micros(self._clock.now())
        return int(_CLOCK.scalar(connection))

    def next_token(self, tx: Transaction) -> int:
        """The next of a sequence."""
        token: int = tx.scalar(_NEXT_TOKEN)
        return token

    def alone_with_tenant(self, tx: Transaction, tenant: str) -> bool:
        """By the lock that creating takes."""
        return bool(tx.scalar(_TRY_TENANT, tenant=tenant))

    def ensure_tenant(self, tx: Transaction, tenant: str) -> None:
        """Those who create jobs for one tenant stand in line, which also makes the quota
        exact. Not by the tenant's row, which a claim must find unlocked."""
        tx.later(_LOCK_TENANT, tenant=tenant)
        tx.later(_ENSURE_TENANT, tenant=tenant)

    def ensure_queue(self, connection: Connection, values: Mapping[str, Any]) -> None:
        """Insert the row unless it is there."""
        connection.execute(
            postgresql.insert(queues).values(**values).on_conflict_do_nothing()
        )

    def add_audit_records(
        self, connection: Connection, rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Insert those that are not there."""
        connection.execute(
            postgresql.insert(audit_records).on_conflict_do_nothing(), [*map(dict, rows)]
        )


class PostgresDatabase:
    """Connections and threads of one process."""

    reads_at_a_time = 3
    """They wait for the network, and leave connections to those who write."""
    is_far = True

    def __init__(
        self,
        address: Address,
        clock: Clock | None,
        max_attempts: int,
        connections: int,
    ) -> None:
        self.signals = Signals()
        self._clock = clock
        self._dialect = PostgresDialect(clock)
        self._max_attempts = max_attempts
        self._instance = secrets.token_hex(8)
        self._loop = asyncio.get_running_loop()
        self._pool = Lane(address, connections, "exportd-ledger")
        self._apart = Lane(address, 1, "exportd-ledger-apart")
        self._lines = Lines()
        self._listener = Listener(address, self._told, self.signals.everyone)

    async def open(self) -> None:
        """Begin to listen."""
        await self._listener.start()

    async def write(self, work: Callable[[Transaction], T], *, line: str = "") -> T:
        """See `Database`."""
        async with self._lines.turn(line):
            return await self._pool.run(self._write, self._pool, work)

    def version_here(self) -> tuple[object, datetime] | None:
        """There is none that is here."""
        return None

    def read_here(self, work: Callable[[Transaction], T]) -> T | None:  # noqa: ARG002 - see below
        """Every read waits for the network."""
        return None

    async def write_apart(self, work: Callable[[Transaction], T]) -> T:
        """See `Database`."""
        return await self._apart.run(self._write, self._apart, work)

    async def read(self, work: Callable[[Transaction], T]) -> T:
        """See `Database`."""
        return await self._pool.run(self._read, work)

    async def claim(
        self,
        owner: str,
        kinds: Collection[TaskKind],
        *,
        lease: int,
        limits: ClaimLimits,
    ) -> tuple[Lease | None, int]:
        """See `Database`."""
        names = sorted(kind.value for kind in kinds if kind is not TaskKind.DELIVER)
        claimed, now = None, 0
        if names:
            claimed, now = await self._claim_by(
                owner,
                lambda depth: self._claim(
                    owner, names, lease, limits.running_per_tenant, depth
                ),
            )
        if claimed is None and TaskKind.DELIVER in kinds:
            claimed, later = await self._claim_by(
                owner,
                lambda depth: self._claim_delivery(
                    owner, lease, depth, sorted(limits.no_deliveries_of)
                ),
            )
            # What both have looked at.
            now = now or later
        return claimed, now

    async def _claim_by(
        self, owner: str, ask: Callable[[int], Any]
    ) -> tuple[Lease | None, int]:
        """Claim, looking deeper when what was found is locked."""
        depth = 1
        while True:
            row = await self._pool.run(ask, depth)
            if row.o_exhausted:
                await self._bury_exhausted()
            if row.o_task_id is not None or not row.o_busy:
                break
            if depth == _DEPTH:
                self._loop.call_later(_LOOK_AGAIN, self.signals.work)
                break
            depth = _DEPTH
        if row.o_promoted:
            self.signals.work()
        if row.o_revision is not None:
            self.signals.jobs({row.o_job_id: row.o_revision})
        return _to_lease(row, owner), row.o_now

    async def _bury_exhausted(self) -> None:
        """Fail the jobs whose last attempt was lost. A lease may have been won by now, so
        nothing here waits for a lock or gets out."""
        try:
            for job_id in await self.read(claiming.exhausted_jobs):
                await self.write(partial(claiming.bury, job_id=job_id), line=job_id)
        except Exception:
            log.exception("jobs without attempts left could not be failed")

    async def close(self) -> None:
        """See `Database`."""
        await self._listener.stop()
        await asyncio.gather(self._pool.close(), self._apart.close())
        # Those who wait see that nothing more will come.
        self.signals.everyone()

    # --- in threads

    def _write(self, lane: Lane, work: Callable[[Transaction], T]) -> T:
        with _available():
            for tries in range(_TRIES):
                if tries:
                    time.sleep(random.uniform(0, 0.01 * 2**tries))  # noqa: S311 - spreads
                try:
                    return self._write_once(lane, work)
                except (sa.exc.DBAPIError, psycopg.Error) as error:
                    if _state(error) not in _IN_THE_WAY or tries == _TRIES - 1:
                        raise
        raise AssertionError("unreachable")

    def _write_once(self, lane: Lane, work: Callable[[Transaction], T]) -> T:
        with self._transaction(lane, _WRITE) as tx:
            result = tx.run(work)
            if told := list(news.pieces(self._instance, tx.changes)):
                lane.end(tx.connection, _NOTIFY, (news.CHANNEL, told))
        count(tx.changes)
        # Told from here, so that the news spreads even if the caller has gone away. The
        # loop may be closing down, with nobody left to tell.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.signals.spread, tx.changes)
        return result

    def _read(self, work: Callable[[Transaction], T]) -> T:
        with _available(), self._transaction(self._pool, _READ) as tx:
            return tx.run(work)

    @contextlib.contextmanager
    def _transaction(self, lane: Lane, begin: Prepared) -> Iterator[Transaction]:
        tx = _LateTransaction(lane, begin, self._dialect, self._clock, self._max_attempts)
        try:
            yield tx
            tx.commit()
        except BaseException:
            # What cannot be undone for want of a connection the server undoes.
            tx.undo()
            raise
        else:
            tx.close()

    def _claim(
        self, owner: str, kinds: list[str], lease: int, limit: int | None, depth: int
    ) -> Any:
        now = None if self._clock is None else codec.to_micros(self._clock.now())
        parameters = (
            *(now, owner, kinds, lease, limit, self._max_attempts, depth),
            *(lifecycle.LATE_WRITER_GRACE, self._instance),
        )
        with _available():
            return self._pool.ask_once(_CLAIM, parameters)[0]

    def _claim_delivery(self, owner: str, lease: int, depth: int, left: list[str]) -> Any:
        now = None if self._clock is None else codec.to_micros(self._clock.now())
        with _available():
            return self._pool.ask_once(
                _CLAIM_DELIVERY, (now, owner, lease, depth, self._instance, left)
            )[0]

    # --- news

    def _told(self, text: str) -> None:
        piece = news.parse(text)
        if piece is not None and piece.sender != self._instance:
            self.signals.spread(piece.changes)


class _LateTransaction(Transaction):
    """Begins with its first statements, as one round trip with them."""

    __slots__ = ("_begin", "_clock", "_ended", "_lane", "_now")

    def __init__(
        self,
        lane: Lane,
        begin: Prepared,
        dialect: PostgresDialect,
        clock: Clock | None,
        max_attempts: int,
    ) -> None:
        self._lane = lane
        self._begin = begin
        self._clock = clock
        self._ended = False
        super().__init__(None, dialect, 0, max_attempts)

    @property
    def now(self) -> int:
        """The moment at which it began, or that was set since."""
        if self._open is None and not self._ended:
            self.flush()
        return self._now

    @now.setter
    def now(self, now: int) -> None:
        self._now = now

    def last(self, *calls: Call) -> list[list[Any]]:
        """See `Transaction`. All of it is one round trip, if it has not begun before."""
        if self._begin is not _READ:
            raise RuntimeError("what a transaction wrote is told when it commits")
        if self._open is None and not self._late:
            *rows, _ = self._begun([*calls, (_COMMIT, {})])
        else:
            self.flush()
            rows = run_all(self._opened(), calls)
            self._opened().commit()
        self._ended = True
        self.close()
        return rows

    def _run(self, calls: Sequence[Call]) -> list[list[Any]]:
        if self._open is not None:
            return super()._run(calls)
        rows = self._begun(calls)
        # By the library, too: it commits only what it has begun, and does not see what
        # goes to the driver.
        self._opened().begin()
        return rows

    def _begun(self, calls: Sequence[Call]) -> list[list[Any]]:
        if self._ended:
            raise RuntimeError("the transaction has ended")
        self._open, found = self._lane.begin([self._begin, _CLOCK], calls)
        _, ((now,),), *rows = found
        self._now = now if self._clock is None else codec.to_micros(self._clock.now())
        return rows

    def commit(self) -> None:
        """Commit what it did, unless it has ended."""
        if not self._ended:
            self.connection.commit()

    def undo(self) -> None:
        """Undo what it did, if it has begun, and give its connection back."""
        if self._open is not None:
            self._lane.undo(self._open)

    def close(self) -> None:
        """Give its connection back."""
        if self._open is not None:
            self._lane.give_back(self._open)
            self._open = None


def _state(error: BaseException) -> str:
    """SQLSTATE of an error; empty for one that is not the server's."""
    if isinstance(error, sa.exc.DBAPIError):
        return _state(error.orig) if error.orig is not None else ""
    if not isinstance(error, psycopg.Error):
        return ""
    # A pipeline that could not be left says so, and hides what went wrong in it.
    inner = error.__context__
    hidden = inner.sqlstate if isinstance(inner, psycopg.Error) else None
    return error.sqlstate or hidden or ""


@contextlib.contextmanager
def _available() -> Iterator[None]:
    """A server that is away, or a connection that broke, is no fault of the caller's."""
    try:
        yield
    except (sa.exc.DBAPIError, sa.exc.TimeoutError, psycopg.Error) as error:
        cause = error.orig if isinstance(error, sa.exc.DBAPIError) else error
        state = _state(error)
        away = state.startswith(_AWAY) or state in _IN_THE_WAY
        lost = not state and isinstance(
            cause, psycopg.OperationalError | psycopg.InterfaceError | sa.exc.TimeoutError
        )
        if not (away or lost):
            raise
        metrics.ledger_errors.inc()
        log.warning("ledger unavailable", error=str(cause).strip(), sqlstate=state)
        raise LedgerUnavailable from error


def _to_lease(row: Any, owner: str) -> Lease | None:
    if row.o_task_id is None:
        return None
    return Lease(
        task_id=row.o_task_id,
        kind=TaskKind(row.o_kind),
        token=row.o_token,
        owner=owner,
        expires_at=codec.to_moment(row.o_lease_expires),
        attempt=row.o_attempts,
        tenant=row.o_tenant,
        job_id=row.o_job_id or "",
        generation=row.o_generation,
        shard=None if row.o_shard is None else Shard(row.o_shard, row.o_shard_state),
        forget=bool(row.o_forget),
        takeover=row.takeover,
        trace_context=row.trace_context or "",
    )
