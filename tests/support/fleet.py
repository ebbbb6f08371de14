"""Workers without a server around them, several on one ledger if the test likes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import uuid_utils

from exportd_server.encoders.base import Format, OutputFormat
from exportd_server.jobs.exporting import ExportOptions
from exportd_server.jobs.housekeeping import Housekeeping, part_key
from exportd_server.jobs.ledger.base import Ledger, NewJob
from exportd_server.jobs.ledger.sqlite import open_sqlite_ledger
from exportd_server.jobs.manager import Policy
from exportd_server.jobs.model import ExportSpec, Job, JobState
from exportd_server.jobs.worker import Worker, WorkerOptions
from exportd_server.platform.clock import SystemClock
from exportd_server.platform.waits import Backoff
from exportd_server.sources.base import Source
from exportd_server.store.base import OutputStore
from exportd_server.store.key import JobPrefix, OutputKey, OutputKind
from exportd_server.store.memory import MemoryStore
from tests.support.gate import BATCH_ROWS
from tests.support.samples import catalogue_of
from tests.support.sinks import no_sinks
from tests.support.waits import ENOUGH

TENANT = "acme"


@dataclass
class Fleet:
    """A ledger and a store that workers share."""

    ledger: Ledger
    path: Path
    store: OutputStore = field(default_factory=MemoryStore)
    policy: Policy = field(default_factory=Policy)

    async def create(self, dataset: str = "gated", **what: Any) -> Job:
        """An export as JSON Lines, in parts of one batch unless it says otherwise."""
        spec = ExportSpec(
            dataset,
            OutputFormat(Format.JSONL),
            **{"max_part_rows": BATCH_ROWS, **what},
        )
        job, _ = await self.ledger.create_job(NewJob(str(uuid_utils.uuid7()), TENANT, spec))
        return job

    async def job(self, job: Job) -> Job:
        """The job as it stands now."""
        found = await self.ledger.get_job(TENANT, job.job_id)
        assert found is not None
        return found

    async def finished(self, job: Job, timeout: float = ENOUGH) -> Job:
        """Wait until the job has ended."""
        async with asyncio.timeout(timeout):
            while not (job := await self.job(job)).state.terminal:
                await self.ledger.wait_for_change(job.job_id, job.revision, 1.0)
        return job

    async def parts(self, job: Job, count: int) -> Job:
        """Wait until the job has so many finished parts."""
        async with asyncio.timeout(ENOUGH):
            while (job := await self.job(job)).progress.parts_done < count:
                await self.ledger.wait_for_change(job.job_id, job.revision, 1.0)
        return job

    async def rows(self, job: Job) -> list[dict[str, Any]]:
        """The records of a job that succeeded, as they would be downloaded."""
        job = await self.job(job)
        assert job.state is JobState.SUCCEEDED, job.error
        assert job.manifest is not None
        data = bytearray()
        for part in job.manifest.parts:
            reader = await self.store.open(part_key(self.prefix(job), part))
            buffer = bytearray(part.bytes)
            assert await reader.readinto(memoryview(buffer)) == part.bytes
            data += buffer
        return [json.loads(line) for line in data.splitlines()]

    async def stored(self, job: Job) -> set[OutputKey]:
        """Everything that the store has of a job."""
        return {key async for key in self.store.list_job(self.prefix(job))}

    async def tidied(self, job: Job) -> None:
        """Wait until nothing is stored but what the manifest names."""
        job = await self.job(job)
        parts = job.manifest.parts if job.manifest is not None else ()
        named = {part_key(self.prefix(job), part) for part in parts}
        manifests = 1 if job.manifest is not None else 0
        async with asyncio.timeout(ENOUGH):
            while not (
                named <= (stored := await self.stored(job))
                and [key.kind for key in stored - named]
                == [OutputKind.MANIFEST] * manifests
            ):
                await asyncio.sleep(0.02)

    @staticmethod
    def prefix(job: Job) -> JobPrefix:
        return JobPrefix(TENANT, job.job_id)

    @asynccontextmanager
    async def worker(
        self,
        source: Source,
        *,
        ledger: Ledger | None = None,
        grace: float = 5.0,
        progress_interval: float = 0.5,
        shard_rows: int = 2_000_000,
        **options: Any,
    ) -> AsyncIterator[Worker]:
        """A worker at work on the dataset `gated`; drains in the end."""
        ledger = ledger or self.ledger
        async with at_work(
            Worker(
                ledger,
                self.store,
                catalogue_of(gated=source),
                Housekeeping(ledger, self.store, reap_interval=timedelta(seconds=300)),
                self.policy,
                no_sinks(),
                WorkerOptions(
                    **options,
                    export=ExportOptions(
                        shard_rows=shard_rows,
                        progress_interval=progress_interval,
                        retry=Backoff(0.01, 0.05),
                    ),
                ),
            ),
            grace,
        ) as worker:
            yield worker


@asynccontextmanager
async def at_work(worker: Worker, grace: float) -> AsyncIterator[Worker]:
    """Run a worker."""
    running = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        await worker.drain(grace)
        await running


@asynccontextmanager
async def fleet_in(folder: Path, **policy: Any) -> AsyncIterator[Fleet]:
    """A ledger in a file; its attempts suffice for a test that breaks a lot."""
    path = folder / "ledger.db"
    ledger = await open_sqlite_ledger(path, SystemClock(), max_attempts=9)
    try:
        yield Fleet(ledger, path, policy=Policy(**policy))
    finally:
        await ledger.close()
