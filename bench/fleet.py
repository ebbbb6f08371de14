"""A fleet on PostgreSQL: how soon work is taken up and left off, and what an idle fleet
takes."""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import psutil

import exportd
from bench.machine import CACHE, sample_data
from bench.report import Result
from tests.support.postgres import PostgresServer, running_postgres
from tests.support.processes import Member, Processes, processes

SMALL_JOBS = 60
CANCELS = 40
IDLE_SECONDS = 20
KILLS = 8
LEASE = 3.0
ROWS = 4_000_000


def results() -> Iterator[Result]:
    """Measure."""
    catalogue = sample_data(ROWS)
    with running_postgres(durable=True) as server:
        with _fleet(server, catalogue) as fleet:
            members = [fleet.api(), fleet.api(), fleet.worker(), fleet.worker()]
            yield _idle(members)
            with exportd.Client(members[0].address) as client:
                yield from _take_up(client)
                yield from _cancel(client, members[2:])
        with _fleet(server, catalogue) as fleet:
            yield from _take_over(fleet)


@contextlib.contextmanager
def _fleet(server: PostgresServer, catalogue: Path) -> Iterator[Processes]:
    with tempfile.TemporaryDirectory(dir=CACHE) as directory:
        url = server.url(server.create_database())
        with processes(url, Path(directory), catalogue) as fleet:
            yield fleet


def _idle(members: list[Member]) -> Result:
    """The busiest process of a fleet that has nothing to do."""
    time.sleep(3)  # what a start leaves to do
    watched = [psutil.Process(member.process.pid) for member in members]
    before = [sum(process.cpu_times()[:2]) for process in watched]
    time.sleep(IDLE_SECONDS)
    after = [sum(process.cpu_times()[:2]) for process in watched]
    spent = max(b - a for a, b in zip(before, after, strict=True))
    return Result(
        "idle process of four, CPU", 100 * spent / IDLE_SECONDS, "% of a core", goal="< 2"
    )


def _take_up(client: exportd.Client) -> Iterator[Result]:
    """From the job's creation to its start, both by the ledger's clock."""
    waits, whole = [], []
    for _ in range(SMALL_JOBS):
        started = time.perf_counter()
        job = client.export("token_transfers", format="csv", limit=1000)
        job.wait(timeout=60)
        whole.append(1000 * (time.perf_counter() - started))
        info = job.refresh().info
        waits.append((_time(info.start_time) - _time(info.create_time)) * 1000)
        time.sleep(0.05)
    yield _median("create -> running in another process", waits, goal="< 20")
    yield _median("create -> succeeded, 1000 rows, CSV", whole)


def _cancel(client: exportd.Client, workers: list[Member]) -> Iterator[Result]:
    """From a cancel's answer to the worker's own word that it has stopped."""
    cancelled: dict[str, float] = {}
    for _ in range(CANCELS):
        job = client.export("token_transfers", format="jsonl", compression="gzip")
        while not job.refresh().progress.rows:
            time.sleep(0.01)
        job.cancel()
        cancelled[job.id] = time.time()
        time.sleep(0.3)
    times = []
    for worker in workers:
        for line in worker.log.read_text(encoding="utf-8").splitlines():
            event = json.loads(line)
            if event["event"] == "lease lost" and event["job_id"] in cancelled:
                at = datetime.fromisoformat(event["timestamp"]).timestamp()
                times.append(max(0.0, 1000 * (at - cancelled[event["job_id"]])))
    assert len(times) >= CANCELS, f"{len(times)} of {CANCELS} were told"
    yield _median("cancel -> stopped in another process", times)
    yield Result(
        "cancel -> stopped in another process, p99",
        sorted(times)[len(times) * 99 // 100],
        "ms",
        goal="< 200",
    )


def _take_over(fleet: Processes) -> Iterator[Result]:
    """From a worker's kill -9 to the next claim of what it had."""
    api = fleet.api()
    for _ in range(2):
        fleet.worker(worker__lease=LEASE, worker__concurrency=1)
    times = []
    with exportd.Client(api.address) as client:
        for _ in range(KILLS):
            job = client.export("token_transfers", format="jsonl", compression="gzip")
            while not job.refresh().progress.rows:
                time.sleep(0.01)
            tokens = fleet.tokens()
            fleet.kill_a_holder()
            killed = time.perf_counter()
            while fleet.tokens() <= tokens:
                time.sleep(0.01)
            times.append(time.perf_counter() - killed)
            job.cancel()
            fleet.worker(worker__lease=LEASE, worker__concurrency=1)
    yield Result(
        f"kill -9 -> taken over, lease {LEASE:.0f} s, longest",
        max(times),
        "s",
        goal=f"< {LEASE + 2:.0f}",
    )


def _median(name: str, values: list[float], *, goal: str = "") -> Result:
    return Result(f"{name}, median", statistics.median(values), "ms", goal=goal)


def _time(moment: datetime | None) -> float:
    assert moment is not None
    return moment.timestamp()
