"""A ledger under test, with a clock that the test turns."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest

from exportd_server.encoders.base import Format, OutputFormat
from exportd_server.jobs.ledger.base import ClaimLimits, Lease, Ledger, NewJob, TaskKind
from exportd_server.jobs.ledger.postgres import (
    migrate_postgres_ledger,
    open_postgres_ledger,
)
from exportd_server.jobs.ledger.sqlite import open_sqlite_ledger
from exportd_server.jobs.ledger.tables import METADATA
from exportd_server.jobs.model import ExportSpec, Job, ManifestColumn, PartRecord
from exportd_server.sources.base import Shard
from exportd_server.store.key import OutputKind
from tests.support.postgres import PostgresServer

EXPORT = (TaskKind.PLAN, TaskKind.SHARD)
CLEANUP = (TaskKind.CLEANUP,)
REAP = (TaskKind.REAP,)
SWEEP = (TaskKind.SWEEP,)
LEASE = timedelta(seconds=15)
COLUMNS = (
    ManifestColumn("id", "INTEGER", "int64", nullable=False),
    ManifestColumn("paid", "DECIMAL", "decimal128(38, 18)", nullable=True),
)

_job_numbers = count(1)


class FakeClock:
    """Stands still until the test turns it."""

    def __init__(self) -> None:
        self.time = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)

    def now(self) -> datetime:
        return self.time

    def advance(self, seconds: float) -> None:
        self.time += timedelta(seconds=seconds)


def spec(**changes: Any) -> ExportSpec:
    """A request; only what matters to the test is given."""
    changes.setdefault("dataset", "token_transfers")
    changes.setdefault("output", OutputFormat(Format.CSV))
    return ExportSpec(**changes)


def part(lease: Lease, sequence: int = 0, *, rows: int = 10, size: int = 100) -> PartRecord:
    """A part as its writer would describe it."""
    assert lease.shard is not None
    return PartRecord(
        shard=lease.shard.index,
        sequence=sequence,
        token=lease.token,
        rows=rows,
        bytes=size,
        prefix_bytes=3,
        suffix_bytes=0,
        crc32c=0xFFFFFFFF - sequence,
        prefix_crc32c=1,
        body_crc32c=2,
        suffix_crc32c=3,
        sha256=bytes(range(32)),
    )


def errors(lease: Lease, sequence: int = 0, *, rows: int = 3, size: int = 40) -> PartRecord:
    """The error part beside `part`."""
    told = part(lease, sequence, rows=rows, size=size)
    return replace(told, kind=OutputKind.ERROR, prefix_bytes=0)


def shards(number: int) -> list[Shard]:
    return [Shard(index, f'{{"from":{index}}}') for index in range(number)]


@dataclass
class World:
    """A ledger, its clock, and short words for what tests do all the time."""

    ledger: Ledger
    clock: FakeClock
    dump: Callable[[], dict[str, list[tuple[Any, ...]]]]
    """Everything that is in the database, table by table."""

    def new(
        self, tenant: str = "acme", request_id: str = "", fingerprint: str = "", **what: Any
    ) -> NewJob:
        job_id = str(UUID(int=next(_job_numbers)))
        return NewJob(job_id, tenant, spec(**what), request_id, fingerprint)

    async def create(self, tenant: str = "acme", **what: Any) -> Job:
        job, created = await self.ledger.create_job(self.new(tenant, **what))
        assert created
        return job

    async def job(self, job: Job) -> Job:
        """The job as it stands now."""
        found = await self.ledger.get_job(job.tenant, job.job_id)
        assert found is not None
        return found

    async def claim(
        self,
        kinds: Collection[TaskKind] = EXPORT,
        *,
        owner: str = "worker",
        limit: int | None = None,
    ) -> Lease | None:
        return await self.ledger.claim(
            owner, kinds, lease=LEASE, limits=ClaimLimits(running_per_tenant=limit)
        )

    async def lease(
        self, kinds: Collection[TaskKind] = EXPORT, *, owner: str = "worker"
    ) -> Lease:
        """Claim, and be sure that there is something."""
        lease = await self.claim(kinds, owner=owner)
        assert lease is not None
        return lease

    async def plan(self, lease: Lease, number: int = 1) -> Lease:
        return await self.ledger.record_plan(
            lease, shards(number), COLUMNS, estimated_rows=None
        )

    async def running(self, number: int = 1, tenant: str = "acme") -> tuple[Job, Lease]:
        """A job of so many shards, and the lease on its first."""
        job = await self.create(tenant)
        lease = await self.lease()
        assert lease.job_id == job.job_id
        return await self.job(job), await self.plan(lease, number)

    async def finish(self, lease: Lease, sequence: int = 0) -> bool:
        await self.ledger.add_part(lease, part(lease, sequence))
        return await self.ledger.complete_shard(lease)

    async def succeeded(self, tenant: str = "acme") -> Job:
        job, lease = await self.running(tenant=tenant)
        assert await self.finish(lease)
        return await self.job(job)

    async def work_off(self, kinds: Sequence[TaskKind] = CLEANUP) -> list[Lease]:
        """Do every cleanup that is due."""
        done = []
        while (lease := await self.claim(kinds)) is not None:
            await self.ledger.complete_cleanup(lease)
            done.append(lease)
        return done


Backend = Callable[[Path, pytest.FixtureRequest], AbstractAsyncContextManager[World]]


@asynccontextmanager
async def sqlite_world(
    folder: Path, _request: pytest.FixtureRequest | None = None
) -> AsyncIterator[World]:
    clock = FakeClock()
    path = folder / "ledger.db"
    ledger = await open_sqlite_ledger(path, clock)
    try:
        yield World(ledger, clock, lambda: dump_sqlite(path))
    finally:
        await ledger.close()


@asynccontextmanager
async def postgres_world(
    _folder: Path, request: pytest.FixtureRequest
) -> AsyncIterator[World]:
    database: LedgerDatabase = request.getfixturevalue("ledger_database")
    database.reset()
    clock = FakeClock()
    ledger = await open_postgres_ledger(database.url, clock=clock)
    try:
        yield World(ledger, clock, database.dump)
    finally:
        await ledger.close()


BACKENDS: dict[str, Backend] = {"sqlite": sqlite_world, "postgresql": postgres_world}
"""The databases that the contract is tested on."""


class LedgerDatabase:
    """A ledger in PostgreSQL that is emptied instead of made anew, which takes longer."""

    def __init__(self, server: PostgresServer) -> None:
        self.name = server.create_database()
        self.url = server.url(self.name)
        migrate_postgres_ledger(self.url)
        self._connection = psycopg.connect(
            self.url, autocommit=True, options="-c search_path=exportd"
        )

    def execute(self, script: str) -> None:
        """Change the tables."""
        self._connection.execute(script.encode())

    def ask(self, query: str) -> list[tuple[Any, ...]]:
        """Ask the tables."""
        return self._connection.execute(query.encode()).fetchall()

    def reset(self) -> None:
        """Back to what a migration leaves."""
        self.execute("""
            TRUNCATE jobs, labels, parts, pins, tasks, tenants, orphans, deliveries, queues,
                audit_records
                RESTART IDENTITY;
            ALTER SEQUENCE fencing_tokens RESTART;
            INSERT INTO tasks (kind, tenant, generation, state, priority, since, run_at)
            VALUES ('reap', '', 1, 'ready', 1000, 0, 0),
                   ('sweep', '', 1, 'ready', 1000, 0, 0);
        """)

    def dump(self) -> dict[str, list[tuple[Any, ...]]]:
        """Everything that is in the tables."""
        return {
            name: sorted(self._connection.execute(f"SELECT * FROM {name}"), key=repr)
            for name in METADATA.tables
        }

    def close(self) -> None:
        self._connection.close()


def pages_read(database: LedgerDatabase, ask: str) -> int:
    """How many pages PostgreSQL reads to answer a question, from the cache or not."""
    explain = f"EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) {ask}"
    with psycopg.connect(database.url, options="-c search_path=exportd") as connection:
        rows = []
        for _ in range(8):
            rows.append(connection.execute(explain.encode()).fetchone())
            connection.rollback()
    tops = [row[0][0]["Plan"] for row in rows if row is not None]
    # Now and then the server puts its own house in order meanwhile.
    return min(
        int(top["Shared Hit Blocks"]) + int(top["Shared Read Blocks"]) for top in tops
    )


@pytest.fixture(scope="session")
def ledger_database(postgres: PostgresServer) -> Iterator[LedgerDatabase]:
    """A ledger in PostgreSQL, with whatever the last test left in it."""
    database = LedgerDatabase(postgres)
    yield database
    database.close()


def dump_sqlite(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        names = [
            name
            for (name,) in connection.execute(
                "SELECT name FROM sqlite_master WHERE type = 'table' "
                "AND name NOT LIKE 'sqlite%' AND name <> 'alembic_version'"
            )
        ]
        return {
            name: sorted(connection.execute(f"SELECT * FROM {name}"), key=repr)
            for name in names
        }
    finally:
        connection.close()


async def empty_sqlite_file(folder: Path) -> Path:
    """A ledger's file without jobs, to be copied where many are needed."""
    path = folder / "empty.db"
    await (await open_sqlite_ledger(path, FakeClock())).close()
    return path


def copy_of(empty: Path, folder: Path, name: str) -> Path:
    return Path(shutil.copyfile(empty, folder / name))
