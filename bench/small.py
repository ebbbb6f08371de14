"""Small exports, from the call that creates one until its verified file is there: one
after the other, and many at once, with the ledger in SQLite and in PostgreSQL."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.contest import ROUNDS, cpu_seconds
from bench.machine import CACHE, Measured, sample_data, scaled, server
from bench.report import Result
from exportd_server.jobs.ledger.postgres import migrate_postgres_ledger
from tests.support.postgres import running_postgres

ROWS = 1000
JOBS = {1: 40, 32: 200}
"""How many jobs by how many callers in each round."""
GOALS_MS = {"SQLite": 30, "PostgreSQL": 40}


def results() -> Iterator[Result]:
    """Measure; both servers in turns, so that what the machine does meanwhile falls on
    each of them alike."""
    catalogue = sample_data(scaled(1_000_000))
    with contextlib.ExitStack() as run:
        directory = Path(run.enter_context(tempfile.TemporaryDirectory(dir=CACHE)))
        url = _ledger(run)
        servers = {
            "SQLite": run.enter_context(server(directory / "sqlite", catalogue)),
            "PostgreSQL": run.enter_context(
                server(
                    directory / "postgres",
                    catalogue,
                    {
                        "EXPORTD_LEDGER__URL": url,
                        "EXPORTD_STORE__URL": f"file://{directory / 'out'}",
                    },
                )
            ),
        }
        rounds: dict[tuple[str, int], list[_Round]] = {}
        for number in range(ROUNDS + 1):
            for ledger, served in servers.items():
                for callers in JOBS:
                    taken = _Round.of(served, callers)
                    if number:  # the first fills caches
                        rounds.setdefault((ledger, callers), []).append(taken)
    for (ledger, callers), each in rounds.items():
        yield from _told(ledger, callers, each)


def _told(ledger: str, callers: int, each: list[_Round]) -> Iterator[Result]:
    who = f"{callers} caller{'s' if callers > 1 else ''}"
    name = f"small export, {ledger}, {who}"
    for percent in (50, 99):
        goal = f"<= {GOALS_MS[ledger]}" if (callers, percent) == (1, 50) else ""
        value = statistics.median(taken.percentile(percent) for taken in each)
        yield Result(f"{name}, p{percent}", 1000 * value, "ms", goal=goal)
    if callers > 1:
        rate = statistics.median(len(taken.times) / taken.seconds for taken in each)
        yield Result(f"{name}, rate", rate, "jobs/s")
    cpu = statistics.median(taken.cpu / len(taken.times) for taken in each)
    yield Result(f"{name}, server's CPU", 1000 * cpu, "CPU ms/job")


class _Round:
    """What a round of jobs took, in seconds."""

    def __init__(self, seconds: float, times: list[float], cpu: float) -> None:
        self.seconds = seconds
        self.times = sorted(times)
        self.cpu = cpu

    @classmethod
    def of(cls, served: Measured, callers: int) -> _Round:
        """Run one."""
        jobs = scaled(JOBS[callers])
        before = cpu_seconds(served.pid)
        done = subprocess.run(
            [
                *(sys.executable, "-m", "bench.load", "small", served.address),
                *(str(ROWS), str(jobs), str(callers)),
            ],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        told = json.loads(done.stdout)
        assert len(told["times"]) == jobs
        return cls(told["seconds"], told["times"], cpu_seconds(served.pid) - before)

    def percentile(self, percent: int) -> float:
        """The time that so many jobs of a hundred did not exceed."""
        return self.times[len(self.times) * percent // 100]


def _ledger(run: contextlib.ExitStack) -> str:
    postgres = run.enter_context(running_postgres(durable=True))
    url = postgres.url(postgres.create_database())
    migrate_postgres_ledger(url)
    return url
