"""What must have arrived where a fleet delivers to: a directory and a database."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from exportd.v1 import dataset_pb2, job_pb2, sink_pb2
from tests.torture.clients import Api, Clients, Tracked
from tests.torture.history import History

_SETTLE_SECONDS = 120.0
_PATIENT = (
    "max_attempts = 100000\nretry_base_seconds = 0.1\nretry_cap_seconds = 1.0\n"
    "timeout_seconds = 30\n"
)


def write_sinks(directory: Path, warehouse_url: str) -> Path:
    """Write the connections of both sinks; returns the file. They never give up, so that
    what is not there in the end was lost."""
    (directory / "delivered").mkdir()
    path = directory / "sinks.toml"
    path.write_text(
        f'[connections.files]\ntype = "local_file"\nroot = "{directory / "delivered"}"\n'
        f"{_PATIENT}"
        f'[connections.warehouse]\ntype = "database"\nurl = "{warehouse_url}"\n{_PATIENT}'
    )
    return path


def sinks_of(request: job_pb2.CreateExportRequest) -> list[sink_pb2.Sink]:
    """A directory, and where the format goes with it a table of the job's own."""
    sinks = [
        sink_pb2.Sink(local_file=sink_pb2.LocalFileSink(connection="files", path="here"))
    ]
    if request.format != dataset_pb2.FORMAT_JSONL:
        sinks.append(
            sink_pb2.Sink(
                database=sink_pb2.DatabaseSink(
                    connection="warehouse", table=_table(request), create_table=True
                )
            )
        )
    return sinks


def _table(request: job_pb2.CreateExportRequest) -> str:
    return f"t_{request.request_id.replace('-', '')}"


class Delivered:
    """Looks at both places once nobody is hurt any more."""

    def __init__(
        self, clients: Clients, history: History, directory: Path, warehouse_url: str
    ) -> None:
        self._clients = clients
        self._history = history
        self._files = directory / "delivered" / "here"
        self._url = warehouse_url
        self.jobs = 0
        self.deliveries = 0
        self.attempts = 0

    async def check(self, api: Api) -> None:
        """Everything has arrived of the jobs that succeeded, and no row of the others."""
        for tracked in self._clients.jobs:
            if not tracked.request.sinks or tracked.deleting or tracked.final is None:
                continue
            job = await self._settled(api, tracked)
            # The product's own client makes some jobs without.
            if job is not None and job.request.sinks:
                await asyncio.to_thread(self._check, tracked, job)

    async def _settled(self, api: Api, tracked: Tracked) -> job_pb2.Job | None:
        deadline = time.monotonic() + _SETTLE_SECONDS
        while True:
            job = await self._clients.look(api, tracked)
            if job is None:
                return None
            if job.delivery_status != sink_pb2.DELIVERY_STATUS_PENDING:
                return job
            if time.monotonic() > deadline:
                self._history.violation(
                    "deliveries do not end",
                    job=tracked.job_id,
                    sinks=[str(sink) for sink in job.deliveries],
                )
                return None
            await asyncio.sleep(0.2)

    def _check(self, tracked: Tracked, job: job_pb2.Job) -> None:
        self.jobs += 1
        self.deliveries += sum(sink.delivered for sink in job.deliveries)
        self.attempts += sum(sink.attempts for sink in job.deliveries)
        rows = self._rows(tracked)
        if job.state != job_pb2.JOB_STATE_SUCCEEDED:
            if rows:
                self._wrong(job, "rows of an export that did not succeed", rows=rows)
            return
        if job.delivery_status != sink_pb2.DELIVERY_STATUS_DELIVERED:
            told = [str(sink) for sink in job.deliveries]
            self._wrong(job, "a healthy sink was given up", sinks=told)
            return
        self._check_files(job)
        if len(tracked.request.sinks) > 1 and rows != job.manifest.rows:
            self._wrong(job, "rows are not there once", rows=rows, of=job.manifest.rows)

    def _check_files(self, job: job_pb2.Job) -> None:
        manifests = list(self._files.glob(f"*{job.job_id}*.manifest.json"))
        if len(manifests) != 1:
            self._wrong(job, "not one manifest was delivered", found=len(manifests))
            return
        told = json.loads(manifests[0].read_text())
        expected = [part.sha256.hex() for part in job.manifest.parts]
        if [part["sha256"] for part in told["parts"]] != expected:
            self._wrong(job, "the delivered manifest is not the job's")
        for part in told["parts"]:
            path = self._files / part["file_name"]
            found = path.read_bytes() if path.exists() else b""
            if hashlib.sha256(found).hexdigest() != part["sha256"]:
                self._wrong(job, "a delivered file is wrong or missing", file=path.name)

    def leftovers(self, jobs: Iterable[Tracked]) -> None:
        """No unfinished file is left under a name that somebody may take for a part."""
        known = {job.job_id for job in jobs}
        for path in self._files.glob("*"):
            if not path.name.startswith(".") and not any(i in path.name for i in known):
                self._history.violation("a delivered file of no job", file=path.name)

    def _rows(self, tracked: Tracked) -> int:
        """Rows in the job's table; it may not be there."""
        table = sql.Identifier(_table(tracked.request))
        with psycopg.connect(self._url, autocommit=True) as connection:
            try:
                counted = connection.execute(
                    sql.SQL("SELECT count(*) FROM {}").format(table)
                ).fetchone()
            except psycopg.errors.UndefinedTable:
                return 0
        return 0 if counted is None else int(counted[0])

    def _wrong(self, job: job_pb2.Job, text: str, **details: Any) -> None:
        self._history.violation(text, job=job.job_id, **details)
