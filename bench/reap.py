"""What a claim takes while ten thousand expired jobs are reaped, and when none are."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from pathlib import Path

import uuid_utils

from bench.machine import CACHE
from bench.report import Result
from exportd_server.delivery.sinks import Sinks
from exportd_server.encoders.base import Format, OutputFormat
from exportd_server.jobs.housekeeping import Housekeeping
from exportd_server.jobs.ledger.base import Ledger, NewJob, TaskKind
from exportd_server.jobs.ledger.postgres import open_postgres_ledger
from exportd_server.jobs.ledger.sqlite import open_sqlite_ledger
from exportd_server.jobs.ledger.tables import METADATA
from exportd_server.jobs.manager import Policy
from exportd_server.jobs.model import ExportSpec
from exportd_server.jobs.worker import Worker, WorkerOptions
from exportd_server.platform.clock import SystemClock
from exportd_server.platform.logging import configure_logging
from exportd_server.sinks.connections import Connections
from exportd_server.sinks.registry import SinkTypes
from exportd_server.sources.catalogue import Catalogue
from exportd_server.store.memory import MemoryStore
from tests.support.ledger import LedgerDatabase
from tests.support.postgres import running_postgres

EXPIRED = 10_000
WAITING = 100
SECONDS = 10.0
"""Of claims before the reaping, and again after."""
MOST_SECONDS = 40.0
"""Of claims during it; what is left by then is told."""
PAUSE = 0.005
EXPORT = (TaskKind.PLAN, TaskKind.SHARD)
Execute = Callable[[str], None]


def results() -> Iterator[Result]:
    """Measure."""
    configure_logging("warning", "json")
    with tempfile.TemporaryDirectory(dir=CACHE) as directory:
        yield from asyncio.run(_on_sqlite(Path(directory) / "ledger.db"))
    with running_postgres(durable=True) as postgres:
        yield from asyncio.run(_on_postgres(LedgerDatabase(postgres)))


async def _on_sqlite(path: Path) -> list[Result]:
    """As in the embedded default: the reaper and who claims share a process."""

    def execute(script: str) -> None:
        with contextlib.closing(sqlite3.connect(path, timeout=30)) as peer:
            peer.executescript(script)

    ledger = await open_sqlite_ledger(path, SystemClock())
    try:
        number = "printf('%08d-0000-7000-8000-%012d', n, n)"
        return await _measured("SQLite", ledger, execute, number, _reaper(ledger))
    finally:
        await ledger.close()


async def _on_postgres(database: LedgerDatabase) -> list[Result]:
    """As in a fleet: the reaper is another process."""
    database.reset()
    ledger = await open_postgres_ledger(database.url)
    try:
        number = "lpad(n::text, 8, '0') || '-0000-7000-8000-' || lpad(n::text, 12, '0')"
        elsewhere = _elsewhere(database.url)
        return await _measured("PostgreSQL", ledger, database.execute, number, elsewhere)
    finally:
        await ledger.close()
        database.close()


@contextlib.asynccontextmanager
async def _reaper(ledger: Ledger) -> AsyncIterator[None]:
    """A worker that keeps house. It finds nothing to export in an empty catalogue, and is
    not asked to: it has no slot for that."""
    store = MemoryStore()
    house = Housekeeping(ledger, store, reap_interval=timedelta(seconds=300))
    worker = Worker(
        ledger,
        store,
        Catalogue({}),
        house,
        Policy(),
        Sinks(SinkTypes({}), Connections()),
        WorkerOptions(concurrency=0),
    )
    running = asyncio.create_task(worker.run())
    try:
        yield
    finally:
        await worker.drain(5.0)
        await running


@contextlib.asynccontextmanager
async def _elsewhere(url: str) -> AsyncIterator[None]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.reap", url),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert await process.stdout.readline() == b"working\n"
        yield
    finally:
        process.stdin.close()
        await process.wait()


async def _measured(
    name: str,
    ledger: Ledger,
    execute: Execute,
    number: str,
    reaper: contextlib.AbstractAsyncContextManager[None],
) -> list[Result]:
    for _ in range(WAITING):
        await _create(ledger, "waiting")
    await _expired_jobs(ledger, execute, number)
    ids = [f"{n:08d}-0000-7000-8000-{n:012d}" for n in range(1, EXPIRED + 1)]
    idle = await _claims(ledger, until=_after(SECONDS))
    left, began = set(ids), time.monotonic()
    busy: list[float] = []
    async with reaper:
        while left and time.monotonic() - began < MOST_SECONDS:
            busy += await _claims(ledger, until=_after(1.0))
            left = await ledger.known_jobs(ids)
        taken = time.monotonic() - began
    idle += await _claims(ledger, until=_after(SECONDS))
    told = [
        Result(
            f"claim beside reaping, {name}, {title}",
            _quantile(busy, share),
            "ms",
            "idle",
            _quantile(idle, share),
            _quantile(idle, share) / _quantile(busy, share),
            "ratio 0.50" if title == "p99" else "",
        )
        for title, share in (("p50", 0.5), ("p99", 0.99))
    ]
    gone = EXPIRED - len(left)
    rate = Result(f"jobs forgotten, {gone} of {EXPIRED}, {name}", gone / taken, "/s")
    return [*told, rate]


def _after(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


async def _claims(ledger: Ledger, *, until: Callable[[], bool]) -> list[float]:
    """Times of claims, each given back, in milliseconds."""
    times = []
    while not until():
        started = time.perf_counter()
        lease = await ledger.claim("bench", EXPORT, lease=timedelta(seconds=15))
        times.append(1000 * (time.perf_counter() - started))
        assert lease is not None
        await ledger.release(lease)
        await asyncio.sleep(PAUSE)
    return times


def _quantile(times: list[float], share: float) -> float:
    if share == 0.5:
        return statistics.median(times)
    return sorted(times)[int(len(times) * share)]


async def _create(ledger: Ledger, tenant: str) -> NewJob:
    spec = ExportSpec("transfers", OutputFormat(Format.CSV))
    new = NewJob(str(uuid_utils.uuid7()), tenant, spec)
    await ledger.create_job(new)
    return new


async def _expired_jobs(ledger: Ledger, execute: Execute, number: str) -> None:
    """One job that was cancelled, and as many copies of it that expired long ago."""
    job = await _create(ledger, "expired")
    await ledger.cancel_job(job.tenant, job.job_id)
    columns = [column.name for column in METADATA.tables["jobs"].columns]
    changed = {"job_id": number, "expire_time": f"{EXPIRED} + n"}
    values = ", ".join(changed.get(name, name) for name in columns)
    execute(f"""
        INSERT INTO jobs ({", ".join(columns)})
        WITH RECURSIVE numbers(n) AS (
            SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {EXPIRED}
        )
        SELECT {values} FROM jobs, numbers WHERE job_id = '{job.job_id}';
    """)


async def _work(url: str) -> None:
    """Keep house until standard input ends."""
    configure_logging("warning", "json")
    ledger = await open_postgres_ledger(url)
    try:
        async with _reaper(ledger):
            print("working", flush=True)
            await asyncio.to_thread(sys.stdin.read)
    finally:
        await ledger.close()


if __name__ == "__main__":
    asyncio.run(_work(sys.argv[1]))
