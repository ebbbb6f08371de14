"""Deletes what a job must not have, and finds jobs that have expired and output that
belongs to none."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta

import structlog

from exportd_server.errors import ErrorReason, ErrorRecord
from exportd_server.jobs.ledger.base import Kept, Lease, Ledger
from exportd_server.jobs.model import PartRecord
from exportd_server.store.base import OutputStore
from exportd_server.store.key import JobPrefix, OutputKey, OutputKind

log = structlog.get_logger(__name__)

_EXPIRY_BATCH = 50
"""Jobs that are hidden in one transaction, which holds up a claim no longer than this."""
_AUDIT_BATCH = 200
"""Audit records that are deleted in one transaction, likewise."""
_ORPHAN_BATCH = 500
_ORPHAN_AFTER = timedelta(hours=1)
"""How long output must have been without a job before it is deleted."""
_LONGEST_PAUSE = 1.0
_WHILE_READ = timedelta(seconds=5)
"""How soon to look again at expired output that is still being downloaded."""


class Housekeeping:
    """The work of cleanup, reap and sweep tasks. Everything here may be done twice."""

    def __init__(
        self,
        ledger: Ledger,
        store: OutputStore,
        *,
        reap_interval: timedelta,
        orphan_interval: timedelta = timedelta(days=1),
        keep_audit: timedelta = timedelta(days=90),
    ) -> None:
        self._ledger = ledger
        self._store = store
        self._reap_interval = reap_interval
        self._orphan_interval = orphan_interval
        self._keep_audit = keep_audit

    async def cleanup(self, lease: Lease) -> None:
        """Delete the output that the job must not have; then, if the task says so,
        forget the job."""
        begun = time.monotonic()
        prefix = JobPrefix(lease.tenant, lease.job_id)
        kept = await self._ledger.kept_parts(lease)
        if kept is not None and kept.read:
            busy = ErrorRecord(ErrorReason.JOB_NOT_FINISHED, "being downloaded")
            await self._ledger.fail_attempt(lease, busy, retry_in=_WHILE_READ)
            return
        if kept is None:
            deleted = await self._store.delete_job(prefix)
        else:
            deleted = await self._delete_unnamed(prefix, kept)
        if lease.forget:
            # Nobody waits for it, and thousands may be due at once.
            await _give_way(begun)
        await self._ledger.complete_cleanup(lease)
        if deleted or lease.forget:
            log.info("output deleted", objects=deleted, forgotten=lease.forget)

    async def _delete_unnamed(self, prefix: JobPrefix, kept: Kept) -> int:
        """Delete what no manifest names: parts of attempts that were lost."""
        named = {part_key(prefix, part) for part in kept.parts}
        if kept.manifest is not None:
            named.add(manifest_key(prefix, kept.manifest))
        strays = [key async for key in self._store.list_job(prefix) if key not in named]
        for key in strays:
            await self._store.delete(key)
        return len(strays) + await self._store.sweep_unfinished(prefix)

    async def reap(self, lease: Lease) -> None:
        """Hide the jobs that have expired, whose cleanups delete and forget them; then
        delete the audit records whose time is over."""
        total = 0
        while True:
            begun = time.monotonic()
            expired = await self._ledger.expire_jobs(lease, limit=_EXPIRY_BATCH)
            total += expired
            if expired < _EXPIRY_BATCH:
                break
            await _give_way(begun)
        forgotten = await self._forget_audit(lease)
        await self._ledger.complete_reap(lease, again_in=self._reap_interval)
        if total:
            log.info("jobs expired", jobs=total)
        if forgotten:
            log.info("audit records deleted", records=forgotten)

    async def _forget_audit(self, lease: Lease) -> int:
        total = 0
        while True:
            begun = time.monotonic()
            forgotten = await self._ledger.forget_audit(
                lease, keep=self._keep_audit, limit=_AUDIT_BATCH
            )
            total += forgotten
            if forgotten < _AUDIT_BATCH:
                return total
            await _give_way(begun)

    async def sweep(self, lease: Lease) -> None:
        """Delete output that no job has, if it had none an hour ago either: what was
        stored by a writer that stood still until its job was forgotten."""
        # Whoever else calls the place his own may know jobs that this ledger does not.
        mine = await self._ledger.identity()
        if (holder := await self._store.claim(mine)) != mine:
            log.error("the outputs belong to another ledger", mine=mine, holder=holder)
        else:
            page: list[JobPrefix] = []
            async for prefix in self._store.list_jobs():
                page.append(prefix)
                if len(page) == _ORPHAN_BATCH:
                    await self._sweep(lease, page)
                    page = []
            await self._sweep(lease, page)
        await self._ledger.complete_sweep(lease, again_in=self._orphan_interval)

    async def _sweep(self, lease: Lease, page: list[JobPrefix]) -> None:
        known = await self._ledger.known_jobs([prefix.job_id for prefix in page])
        unknown = [prefix for prefix in page if prefix.job_id not in known]
        if not unknown:
            return
        old = await self._ledger.note_orphans(lease, unknown, after=_ORPHAN_AFTER)
        for prefix in old:
            deleted = await self._store.delete_job(prefix)
            log.warning("output without a job deleted", of=str(prefix), objects=deleted)


async def _give_way(begun: float) -> None:
    """Leave the ledger and the machine to others for twice as long as was worked."""
    await asyncio.sleep(min(2 * (time.monotonic() - begun), _LONGEST_PAUSE))


def part_key(prefix: JobPrefix, part: PartRecord) -> OutputKey:
    """The key a recorded part lies under."""
    return OutputKey(prefix, part.kind, part.shard, part.sequence, part.token)


def manifest_key(prefix: JobPrefix, token: int) -> OutputKey:
    """The key that the manifest lies under, as stored under a lease of that token."""
    return OutputKey(prefix, OutputKind.MANIFEST, 0, 0, token)
