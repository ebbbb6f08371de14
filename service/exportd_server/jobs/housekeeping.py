"""Deletes what a job must not have, and finds the jobs that have expired."""

from __future__ import annotations

from datetime import timedelta

import structlog

from exportd_server.errors import ErrorReason, ErrorRecord
from exportd_server.jobs.ledger.base import Lease, Ledger
from exportd_server.jobs.model import PartRecord
from exportd_server.jobs.readers import Readers
from exportd_server.store.base import OutputStore
from exportd_server.store.key import JobPrefix, OutputKey, OutputKind

log = structlog.get_logger(__name__)

_EXPIRY_BATCH = 500
_WHILE_READ = timedelta(seconds=5)
"""How soon to look again at expired output that is still being downloaded."""


class Housekeeping:
    """The work of cleanup and reap tasks. Everything here may be done twice."""

    def __init__(
        self,
        ledger: Ledger,
        store: OutputStore,
        readers: Readers,
        *,
        reap_interval: timedelta,
    ) -> None:
        self._ledger = ledger
        self._store = store
        self._readers = readers
        self._reap_interval = reap_interval

    async def cleanup(self, lease: Lease) -> None:
        """Delete the output that the job must not have; then, if the task says so,
        forget the job."""
        prefix = JobPrefix(lease.tenant, lease.job_id)
        kept = await self._ledger.kept_parts(lease)
        if kept is None and self._readers.in_use(lease.job_id):
            busy = ErrorRecord(ErrorReason.JOB_NOT_FINISHED, "being downloaded")
            await self._ledger.fail_attempt(lease, busy, retry_in=_WHILE_READ)
            return
        if kept is None:
            deleted = await self._store.delete_job(prefix)
        else:
            deleted = await self._delete_unnamed(prefix, kept)
        await self._ledger.complete_cleanup(lease)
        if deleted or lease.forget:
            log.info("output deleted", objects=deleted, forgotten=lease.forget)

    async def _delete_unnamed(self, prefix: JobPrefix, kept: list[PartRecord]) -> int:
        """Delete what no manifest names: parts of attempts that were lost."""
        named = {part_key(prefix, part) for part in kept}
        strays = [key async for key in self._store.list_job(prefix) if key not in named]
        for key in strays:
            await self._store.delete(key)
        return len(strays) + await self._store.sweep_unfinished(prefix)

    async def reap(self, lease: Lease) -> None:
        """Hide the jobs that have expired; their cleanups delete and forget them."""
        total = 0
        while True:
            expired = await self._ledger.expire_jobs(lease, limit=_EXPIRY_BATCH)
            total += expired
            if expired < _EXPIRY_BATCH:
                break
        await self._ledger.complete_reap(lease, again_in=self._reap_interval)
        if total:
            log.info("jobs expired", jobs=total)


def part_key(prefix: JobPrefix, part: PartRecord) -> OutputKey:
    """The key a recorded part lies under."""
    return OutputKey(prefix, OutputKind.OUTPUT, part.shard, part.sequence, part.token)
