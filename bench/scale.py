"""What a long queue and more workers do: the time of a claim over the number of queued
tasks, and exports a second over the number of workers.

A claim is measured at its dearest, with 99 of 100 tenants at their limit and the queue
mostly theirs; claims a second are those of four claimers at once that nothing holds back.

Workers are processes that take one shard at a time, on shards bound by CPU (CSV with
gzip, from Parquet files, so that no database's server takes part). A pipeline has several
threads, so one worker that may use two cores uses more than one: the goal is asked of
workers that have a core each, as they would on machines of their own, and what workers
that share the machine's cores come to is told beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import psutil

import exportd
from bench.machine import CACHE, sample_data, scaled
from bench.report import Result
from exportd_server.jobs.ledger.base import ClaimLimits, Ledger, TaskKind
from exportd_server.jobs.ledger.postgres import open_postgres_ledger
from exportd_server.jobs.ledger.sqlite import open_sqlite_ledger
from exportd_server.platform.clock import SystemClock
from tests.support.ledger import LedgerDatabase
from tests.support.postgres import PostgresServer, running_postgres
from tests.support.processes import processes

QUEUED = (1_000, 100_000, 1_000_000)
TENANTS = 100
CLAIMS = 60
CLAIMERS = 4
AT_ONCE = 400
"""Claims of all claimers."""
GOAL_GROWTH = 2
SHARD_ROWS = scaled(400_000)
ROWS = scaled(4_000_000)
RUNS = 3
GOAL_SECOND = 1.8
EXPORT = (TaskKind.PLAN, TaskKind.SHARD)
Execute = Callable[[str], None]


def results() -> Iterator[Result]:
    """Measure."""
    queued = sorted({max(4 * TENANTS, scaled(each)) for each in QUEUED})
    with running_postgres(durable=True) as server:
        database = LedgerDatabase(server)
        yield from _told(
            "PostgreSQL", {n: asyncio.run(_postgres(database, n)) for n in queued}
        )
        database.close()
        with tempfile.TemporaryDirectory(dir=CACHE) as directory:
            found = {
                n: asyncio.run(_sqlite(Path(directory) / f"{n}.db", n)) for n in queued
            }
        yield from _told("SQLite", found)
        yield from _workers(server)


def _told(name: str, found: dict[int, tuple[float, float]]) -> Iterator[Result]:
    least = min(found)
    base, base_rate = found[least]
    for queued, (median, rate) in found.items():
        yield Result(
            f"claim, {name}, {queued:,} queued, 99 of {TENANTS} tenants at their limit",
            median,
            "ms",
            f"at {least:,}",
            base,
            base / median,
            f"<= {GOAL_GROWTH} x that at {least:,}" if queued == max(found) else "",
        )
        yield Result(
            f"claims by {CLAIMERS} at once, {name}, {queued:,} queued",
            rate,
            "/s",
            f"at {least:,}",
            base_rate,
            rate / base_rate,
        )


async def _postgres(database: LedgerDatabase, queued: int) -> tuple[float, float]:
    """Median time of a claim in ms, and claims a second."""
    database.reset()
    database.execute(_filled("md5(n::text)", queued) + "ANALYZE;")
    ledger = await open_postgres_ledger(database.url)
    try:
        return await _measured(ledger, database.execute, queued)
    finally:
        await ledger.close()


async def _sqlite(path: Path, queued: int) -> tuple[float, float]:
    def execute(script: str) -> None:
        with contextlib.closing(sqlite3.connect(path, timeout=30)) as peer:
            peer.executescript(f"BEGIN; {script} COMMIT;")

    ledger = await open_sqlite_ledger(path, SystemClock())
    try:
        execute(_filled("printf('%032d', n)", queued) + "ANALYZE;")
        return await _measured(ledger, execute, queued)
    finally:
        await ledger.close()


def _filled(number: str, queued: int) -> str:
    """A running job of each tenant but the first, and so many that wait."""
    columns = (
        "job_id, tenant, state, dataset, spec, priority, ttl, fingerprint, create_time, "
        "due_time, generation, revision, untidy, writers_until"
    )

    def numbers(count: int) -> str:
        return (
            "WITH RECURSIVE numbers(n) AS "
            f"(SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {count})"
        )

    return f"""
        INSERT INTO tenants (tenant) {numbers(TENANTS)} SELECT 't' || (n - 1) FROM numbers;
        INSERT INTO jobs ({columns}) {numbers(TENANTS - 1)}
        SELECT 'running' || n, 't' || n, 'RUNNING', 'd', '{{}}', 0, 1, '', n, n, 1, 1, 0, 0
        FROM numbers;
        INSERT INTO jobs ({columns}) {numbers(queued)}
        SELECT {number}, 't' || (n % {TENANTS}), 'PENDING', 'd', '{{}}', 0, 1, '', n, n,
               1, 1, 0, 0
        FROM numbers;
        INSERT INTO tasks (kind, tenant, job_id, generation, state, priority, since, run_at)
        SELECT 'plan', tenant, job_id, 1, 'ready', 0, create_time, create_time
        FROM jobs WHERE state = 'PENDING';
    """


async def _measured(ledger: Ledger, execute: Execute, queued: int) -> tuple[float, float]:
    times = []
    for _ in range(min(CLAIMS, queued // TENANTS)):
        started = time.perf_counter()
        lease = await ledger.claim(
            "bench",
            EXPORT,
            lease=timedelta(seconds=15),
            limits=ClaimLimits(running_per_tenant=1),
        )
        times.append(1000 * (time.perf_counter() - started))
        assert lease is not None
        assert lease.tenant == "t0"
        execute(
            f"UPDATE jobs SET state = 'SUCCEEDED' WHERE job_id = '{lease.job_id}'; "
            f"UPDATE tasks SET state = 'done' WHERE task_id = {lease.task_id};"
        )

    async def claimer(name: str, count: int) -> int:
        for _ in range(count):
            lease = await ledger.claim(name, EXPORT, lease=timedelta(seconds=600))
            assert lease is not None
        return count

    each = min(AT_ONCE, queued // 2) // CLAIMERS
    started = time.perf_counter()
    done = await asyncio.gather(*(claimer(f"c{n}", each) for n in range(CLAIMERS)))
    # The first found nothing in memory.
    return statistics.median(times[1:]), sum(done) / (time.perf_counter() - started)


def _workers(server: PostgresServer) -> Iterator[Result]:
    catalogue = sample_data(ROWS)
    cores = sorted(os.sched_getaffinity(0))
    one = _rate(server, catalogue, [cores[:1]])
    if len(cores) > 1:
        two = _rate(server, catalogue, [cores[:1], cores[1:2]])
        yield Result(
            "two workers on CPU-bound shards, one core each",
            two,
            "Mrow/s",
            "one worker on one core",
            one,
            two / one,
            f"ratio >= {GOAL_SECOND}",
        )
    free = {count: _rate(server, catalogue, [cores] * count) for count in (1, 2, 4)}
    for count, rate in free.items():
        yield Result(
            f"workers on CPU-bound shards that share {len(cores)} cores: {count}",
            rate,
            "Mrow/s",
            "one worker that may use all",
            free[1],
            rate / free[1],
        )


def _rate(server: PostgresServer, catalogue: Path, cores: list[list[int]]) -> float:
    """Millions of rows a second of so many workers, each on the cores it is given."""
    with tempfile.TemporaryDirectory(dir=CACHE) as directory:
        url = server.url(server.create_database())
        with processes(url, Path(directory), catalogue) as fleet:
            api = fleet.api()
            for own in cores:
                member = fleet.worker(worker__shard_rows=SHARD_ROWS, worker__concurrency=1)
                for thread in psutil.Process(member.process.pid).threads():
                    os.sched_setaffinity(thread.id, own)
            with exportd.Client(api.address) as client:
                taken = [_export_time(client) for _ in range(RUNS + 1)][1:]
    return ROWS / statistics.median(taken) / 1e6


def _export_time(client: exportd.Client) -> float:
    started = time.perf_counter()
    job = client.export("token_transfers", format="csv", compression="gzip")
    job.wait(timeout=600)
    seconds = time.perf_counter() - started
    assert job.manifest is not None
    assert job.manifest.rows == ROWS
    job.delete()
    return seconds
