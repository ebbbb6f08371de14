"""A fleet of real processes on a ledger in PostgreSQL."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import grpc
import psycopg

from exportd.v1 import export_service_pb2_grpc
from exportd_server.jobs.ledger.postgres import migrate_postgres_ledger
from tests.support.server import ROOT
from tests.support.waits import ENOUGH


@dataclass
class Member:
    """One process of the fleet. `ready` is the line it printed once it was up."""

    process: subprocess.Popen[str]
    log: Path
    ready: str

    @property
    def address(self) -> str:
        """Where its API listens."""
        return self.ready

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        self.process.wait()

    def terminate(self) -> int:
        """End it as an operator would; returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(ENOUGH)


@dataclass
class Processes:
    """What the processes of a fleet share."""

    ledger_url: str
    directory: Path
    environment: dict[str, str]
    members: list[Member] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `exportd-server` to its end."""
        return subprocess.run(
            [sys.executable, "-m", "exportd_server", *arguments],
            check=False,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, **self.environment},
            timeout=60,
        )

    def start(self, *arguments: str, **settings: Any) -> Member:
        """Start `exportd-server` and wait until it is up; settings are named
        `worker__lease`."""
        log = self.directory / f"log-{next(self._numbers)}"
        own = {f"EXPORTD_{name.upper()}": str(value) for name, value in settings.items()}
        with log.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "exportd_server", *arguments],
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                cwd=ROOT,
                env={**os.environ, **self.environment, **own},
            )
        member = Member(process, log, "")
        self.members.append(member)
        member.ready = _output(process).readline().strip()
        assert member.ready, f"it did not start: {log.read_text()[-2000:]}"
        return member

    def api(self, **settings: Any) -> Member:
        """Start a process that answers calls and exports nothing."""
        return self.start("serve", "--no-workers", "--listen", "127.0.0.1:0", **settings)

    def worker(self, **settings: Any) -> Member:
        """Start a process that exports and answers no calls."""
        return self.start("worker", **settings)

    @contextlib.asynccontextmanager
    async def calling(self, member: Member) -> Any:
        """A stub that talks to one of the processes."""
        async with grpc.aio.insecure_channel(member.address) as channel:
            yield export_service_pb2_grpc.ExportServiceStub(channel)

    def ledger(self, query: str) -> list[tuple[Any, ...]]:
        """Ask the ledger's tables."""
        with psycopg.connect(self.ledger_url, options="-c search_path=exportd") as peer:
            return peer.execute(query.encode()).fetchall()

    def change(self, statement: str) -> None:
        """Change the ledger's tables."""
        with psycopg.connect(self.ledger_url, options="-c search_path=exportd") as peer:
            peer.execute(statement.encode())

    def owners(self) -> set[str]:
        """Who holds leases on plans and shards now."""
        return {
            owner
            for (owner,) in self.ledger(
                "SELECT owner FROM tasks WHERE state = 'leased' "
                "AND kind IN ('plan', 'shard')"
            )
        }

    def tokens(self) -> int:
        """The highest fencing token so far."""
        ((last,),) = self.ledger("SELECT max(token) FROM tasks")
        return int(last)

    def kill_a_holder(self, timeout: float = ENOUGH) -> None:
        """Kill a process that holds a lease on a plan or shard. It is stopped first, so
        that it cannot end its work just then."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            for member in self.members:
                if member.process.pid not in self._holding():
                    continue
                member.process.send_signal(signal.SIGSTOP)
                # What it had told the ledger by then has arrived.
                time.sleep(0.05)
                if member.process.pid in self._holding():
                    member.kill()
                    return
                member.process.send_signal(signal.SIGCONT)
        raise AssertionError("no process holds a lease")

    def _holding(self) -> set[int]:
        return {int(owner.split(":")[-2]) for owner in self.owners()}

    def files_of(self, job_id: str) -> list[Path]:
        """Every file that the output store has of a job, whatever its state."""
        stored = (self.directory / "out").rglob(f"*{job_id}/**/*")
        return sorted(path for path in stored if path.is_file())


@contextlib.contextmanager
def processes(ledger_url: str, directory: Path, catalogue: Path) -> Iterator[Processes]:
    """A fleet without members yet, on a ledger that is made here."""
    migrate_postgres_ledger(ledger_url)
    environment = {
        "EXPORTD_LEDGER__URL": ledger_url,
        "EXPORTD_LEDGER__CONNECTIONS": "4",
        "EXPORTD_STORE__URL": f"file://{directory / 'out'}",
        "EXPORTD_DATA_DIR": str(directory / "data"),
        "EXPORTD_CATALOGUE": str(catalogue),
    }
    fleet = Processes(ledger_url, directory, environment)
    try:
        yield fleet
    finally:
        for member in fleet.members:
            if member.process.poll() is None:
                member.process.kill()
            member.process.wait()
            _output(member.process).close()


def _output(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stdout is not None
    return process.stdout
