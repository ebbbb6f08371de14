"""The ledger on a relational database, whichever: the shared statements, each in one
transaction of the database's own making."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Sequence
from contextlib import AbstractContextManager, suppress
from datetime import datetime, timedelta
from functools import partial
from typing import Any, TypeVar

from exportd_server.errors import ErrorRecord, LedgerUnavailable
from exportd_server.jobs.audit import AuditQuery, AuditRecord
from exportd_server.jobs.ledger.base import (
    Backlog,
    ClaimLimits,
    DeliveryFailure,
    DeliveryQuery,
    DeliveryWork,
    HeldLease,
    JobQuery,
    JobWatch,
    Kept,
    LastPart,
    Lease,
    LeaseLost,
    NewJob,
    TaskKind,
    Totals,
)
from exportd_server.jobs.ledger.codec import span_to_micros
from exportd_server.jobs.ledger.keys import LedgerKeys
from exportd_server.jobs.ledger.recent import RecentJobs
from exportd_server.jobs.ledger.statements import (
    auditing,
    delivering,
    leasing,
    measuring,
    pinning,
    reading,
    redriving,
    submitting,
    tidying,
    working,
)
from exportd_server.jobs.ledger.together import Together
from exportd_server.jobs.ledger.transaction import Database, Transaction
from exportd_server.jobs.model import (
    CancelOutcome,
    DeliveryRecord,
    Job,
    JobState,
    Manifest,
    ManifestColumn,
    PartRecord,
    SinkQueue,
)
from exportd_server.sources.base import Shard
from exportd_server.store.key import JobPrefix

_NO_LIMITS = ClaimLimits()

_RENEWALS = 5
_LOCKED_PAUSE = 0.02
"""Seconds until a lease is tried again whose task somebody has locked for a moment."""

_REDRIVEN = 200
"""Deliveries that one transaction makes due again, and with them as many jobs at most."""

_JOBS_AT_ONCE = 16
"""Jobs that are read for callers at a time."""

L = TypeVar("L", Lease, Lease | None)


class SqlLedger:
    """A `Ledger`; the promises are told there."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._giving_back: set[asyncio.Task[None]] = set()
        self.keys = LedgerKeys(database)
        self._recent = RecentJobs()
        quick = database.reads_at_a_time
        self._jobs = Together(
            self._get_jobs, at_once=_JOBS_AT_ONCE // quick, quick=quick, looks=quick + 1
        )

    # --- callers

    async def create_job(
        self,
        new: NewJob,
        *,
        max_active: int | None = None,
        max_queued: int | None = None,
    ) -> tuple[Job, bool]:
        """See `Ledger`."""
        return await self._database.write(
            lambda tx: submitting.create_job(tx, new, max_active, max_queued),
            line=new.tenant,
        )

    async def get_job(self, tenant: str, job_id: str) -> Job | None:
        """See `Ledger`."""
        asked = (tenant, job_id)
        seen = self._database.version_here()
        if seen is None:
            return await self._jobs.find(asked)
        version, now = seen
        if (recent := self._recent.find(asked, version, now)) is not None:
            return recent
        found = self._database.read_here(lambda tx: reading.get_quick_jobs(tx, [asked]))
        if found is None or asked not in found:
            return await self._jobs.find(asked)
        if (job := found[asked]) is not None:
            self._recent.keep(asked, version, job)
        return job

    async def _get_jobs(
        self, asked: Sequence[tuple[str, str]]
    ) -> dict[tuple[str, str], Job | None]:
        found: dict[tuple[str, str], Job | None] = {}
        if self._database.is_far:
            found = await self._database.read(lambda tx: reading.get_plain_jobs(tx, asked))
        if rest := [each for each in asked if each not in found]:
            alone = len(asked) == 1
            found |= await self._database.read(
                lambda tx: reading.get_jobs(tx, rest, large=alone)
            )
        return found

    async def list_jobs(
        self,
        tenant: str,
        query: JobQuery,
        *,
        limit: int,
        before: tuple[datetime, str] | None = None,
    ) -> list[Job]:
        """See `Ledger`."""
        return await self._database.read(
            lambda tx: reading.list_jobs(tx, tenant, query, limit=limit, before=before)
        )

    async def cancel_job(
        self, tenant: str, job_id: str
    ) -> tuple[Job, CancelOutcome] | None:
        """See `Ledger`."""
        return await self._database.write(
            lambda tx: submitting.cancel_job(tx, tenant, job_id), line=job_id
        )

    async def delete_job(self, tenant: str, job_id: str) -> JobState | None:
        """See `Ledger`."""
        return await self._database.write(
            lambda tx: submitting.delete_job(tx, tenant, job_id), line=job_id
        )

    async def finished_parts(self, tenant: str, job_id: str) -> list[PartRecord]:
        """See `Ledger`."""
        return await self._database.read(
            lambda tx: reading.finished_parts(tx, tenant, job_id)
        )

    # --- workers

    async def claim(
        self,
        owner: str,
        kinds: Collection[TaskKind],
        *,
        lease: timedelta,
        limits: ClaimLimits = _NO_LIMITS,
    ) -> Lease | None:
        """See `Ledger`."""
        signals = self._database.signals
        news = signals.news()
        claimed, now = await self._leasing(
            self._database.claim(
                owner,
                kinds,
                lease=span_to_micros(lease),
                limits=limits,
            )
        )
        if claimed is None:
            signals.found_nothing(news, now)
        return claimed

    async def renew(self, leases: Sequence[Lease], lease: timedelta) -> list[Lease]:
        """See `Ledger`."""
        length = span_to_micros(lease)

        def renew(one: Lease) -> Callable[[Transaction], bool | None]:
            return lambda tx: working.renew(tx, one, length)

        # Each on its own: whoever ends a job locks several of its tasks, in another order
        # perhaps.
        lost, left = [], list(leases)
        for _ in range(_RENEWALS):
            locked = []
            for one in left:
                renewed = await self._database.write_apart(renew(one))
                if renewed is None:
                    locked.append(one)
                elif not renewed:
                    lost.append(one)
            if not locked:
                break
            left = locked
            await asyncio.sleep(_LOCKED_PAUSE)
        # What is locked still is not known to be lost, and is renewed next time.
        return [one for one in leases if one in lost]

    async def release(self, lease: Lease) -> None:
        """See `Ledger`."""
        await self._database.write(lambda tx: working.release(tx, lease), line=lease.job_id)

    async def record_plan(
        self,
        lease: Lease,
        shards: Sequence[Shard],
        columns: Sequence[ManifestColumn],
        *,
        estimated_rows: int | None,
    ) -> Lease:
        """See `Ledger`."""
        first, _ = await self._leasing(
            self._database.write(
                lambda tx: (
                    working.record_plan(tx, lease, shards, columns, estimated_rows),
                    tx.now,
                ),
                line=lease.job_id,
            )
        )
        return first

    async def record_progress(
        self,
        lease: Lease,
        *,
        rows: int,
        bytes_: int,
        rows_per_second: float,
        row_errors: int = 0,
    ) -> Totals:
        """See `Ledger`."""
        return await self._database.write(
            lambda tx: working.record_progress(
                tx, lease, rows, bytes_, row_errors, rows_per_second
            ),
            line=lease.job_id,
        )

    async def shard_parts(self, lease: Lease) -> list[PartRecord]:
        """See `Ledger`."""
        return await self._database.write(
            lambda tx: working.shard_parts(tx, lease), line=lease.job_id
        )

    async def add_part(
        self,
        lease: Lease,
        part: PartRecord,
        errors: PartRecord | None = None,
        *,
        drop: bool = False,
    ) -> Sequence[int]:
        """See `Ledger`."""
        return await self._database.write(
            lambda tx: working.add_part(tx, lease, part, errors, drop=drop),
            line=lease.job_id,
        )

    async def add_last_part(
        self,
        lease: Lease,
        part: PartRecord,
        errors: PartRecord | None = None,
        *,
        drop: bool = False,
    ) -> LastPart:
        """See `Ledger`."""
        return await self._database.write(
            lambda tx: working.add_last_part(tx, lease, part, errors, drop=drop),
            line=lease.job_id,
        )

    async def complete_unless_last(self, lease: Lease) -> Manifest | None:
        """See `Ledger`."""
        return await self._database.write(
            lambda tx: working.complete_unless_last(tx, lease), line=lease.job_id
        )

    async def complete_shard(self, lease: Lease, *, manifest: bool = False) -> bool:
        """See `Ledger`."""
        return await self._database.write(
            lambda tx: working.complete_shard(tx, lease, manifest=manifest),
            line=lease.job_id,
        )

    async def complete_only_shard(
        self,
        lease: Lease,
        part: PartRecord,
        errors: PartRecord | None = None,
        *,
        drop: bool = False,
    ) -> Sequence[int]:
        """See `Ledger`."""
        return await self._database.write(
            lambda tx: working.complete_only_shard(tx, lease, part, errors, drop=drop),
            line=lease.job_id,
        )

    async def restart_output(self, lease: Lease) -> None:
        """See `Ledger`."""
        await self._database.write(
            lambda tx: working.restart_output(tx, lease), line=lease.job_id
        )

    async def fail_attempt(
        self, lease: Lease, error: ErrorRecord, *, retry_in: timedelta | None
    ) -> bool:
        """See `Ledger`."""
        return await self._database.write(
            lambda tx: working.fail_attempt(tx, lease, error, _micros_or_none(retry_in)),
            line=lease.job_id,
        )

    async def list_leases(
        self, *, limit: int, after: tuple[str, int] | None = None
    ) -> list[HeldLease]:
        """See `Ledger`."""
        return await self._database.read(
            lambda tx: leasing.list_leases(tx, limit=limit, after=after)
        )

    async def backlog(self) -> Backlog:
        """See `Ledger`."""
        return await self._database.read(measuring.backlog)

    # --- housekeeping

    async def kept_parts(self, lease: Lease) -> Kept | None:
        """See `Ledger`."""
        return await self._database.write(
            lambda tx: tidying.kept_parts(tx, lease), line=lease.job_id
        )

    async def complete_cleanup(self, lease: Lease) -> None:
        """See `Ledger`."""
        await self._database.write(
            lambda tx: tidying.complete_cleanup(tx, lease), line=lease.job_id
        )

    async def expire_jobs(self, lease: Lease, *, limit: int) -> int:
        """See `Ledger`."""
        return await self._database.write(
            lambda tx: tidying.expire_jobs(tx, lease, limit), line=lease.job_id
        )

    async def complete_reap(self, lease: Lease, *, again_in: timedelta) -> None:
        """See `Ledger`."""
        await self._database.write(
            lambda tx: tidying.complete_reap(tx, lease, span_to_micros(again_in)),
            line=lease.job_id,
        )

    async def known_jobs(self, job_ids: Collection[str]) -> set[str]:
        """See `Ledger`."""
        return await self._database.read(lambda tx: reading.known_jobs(tx, list(job_ids)))

    async def note_orphans(
        self, lease: Lease, found: Collection[JobPrefix], *, after: timedelta
    ) -> list[JobPrefix]:
        """See `Ledger`."""
        return await self._database.write(
            lambda tx: tidying.note_orphans(tx, lease, list(found), span_to_micros(after)),
            line=lease.job_id,
        )

    async def complete_sweep(self, lease: Lease, *, again_in: timedelta) -> None:
        """See `Ledger`."""
        await self._database.write(
            lambda tx: tidying.complete_sweep(tx, lease, span_to_micros(again_in)),
            line=lease.job_id,
        )

    async def identity(self) -> str:
        """See `Ledger`."""
        return await self._database.read(reading.ledger_id)

    # --- deliveries

    async def has_room(self, lease: Lease) -> bool:
        """See `Ledger`."""
        return await self._database.read(lambda tx: delivering.has_room(tx, lease))

    async def delivery_work(self, lease: Lease) -> DeliveryWork:
        """See `Ledger`."""
        return await self._database.write(
            lambda tx: delivering.delivery_work(tx, lease), line=lease.job_id
        )

    async def complete_delivery(self, lease: Lease, receipt: str) -> None:
        """See `Ledger`."""
        await self._database.write(
            lambda tx: delivering.complete_delivery(tx, lease, receipt), line=lease.job_id
        )

    async def fail_delivery(
        self,
        lease: Lease,
        error: ErrorRecord,
        *,
        retry_in: timedelta | None,
        disable_after: timedelta | None = None,
        gone: bool = False,
        blame: bool = True,
    ) -> DeliveryFailure:
        """See `Ledger`."""
        return await self._database.write(
            lambda tx: delivering.fail_delivery(
                tx,
                lease,
                error,
                retry_in=_micros_or_none(retry_in),
                disable_after=_micros_or_none(disable_after),
                gone=gone,
                blame=blame,
            ),
            line=lease.job_id,
        )

    async def list_deliveries(
        self,
        tenant: str,
        query: DeliveryQuery,
        *,
        limit: int,
        before: tuple[datetime, str] | None = None,
    ) -> list[DeliveryRecord]:
        """See `Ledger`."""
        return await self._database.read(
            lambda tx: redriving.list_deliveries(
                tx, tenant, query, limit=limit, before=before
            )
        )

    async def redrive_deliveries(self, tenant: str, query: DeliveryQuery) -> int:
        """See `Ledger`."""
        redriven = 0
        place: redriving.Place | None = None
        while True:
            redrive = partial(
                redriving.redrive,
                tenant=tenant,
                query=query,
                limit=_REDRIVEN,
                after=place,
            )
            some, place = await self._database.write(redrive)
            redriven += some
            if place is None:
                return redriven

    async def queue_depths(self) -> dict[str, tuple[int, int]]:
        """See `Ledger`."""
        return await self._database.read(redriving.queue_depths)

    async def list_queues(
        self, tenant: str, *, limit: int, after: str = "", queue: str = ""
    ) -> list[SinkQueue]:
        """See `Ledger`."""
        return await self._database.read(
            lambda tx: redriving.list_queues(
                tx, tenant, limit=limit, after=after, queue=queue
            )
        )

    async def enable_queue(self, tenant: str, queue: str) -> bool:
        """See `Ledger`."""
        return await self._database.write(
            lambda tx: redriving.enable_queue(tx, tenant, queue)
        )

    # --- readers of outputs

    async def pin_output(
        self, tenant: str, job_id: str, reader: str, *, length: timedelta
    ) -> bool:
        """See `Ledger`."""
        return await self._database.write(
            lambda tx: pinning.pin_output(
                tx, tenant, job_id, reader, span_to_micros(length)
            ),
            line=job_id,
        )

    async def unpin_output(self, job_id: str, reader: str) -> None:
        """See `Ledger`."""
        await self._database.write(
            lambda tx: pinning.unpin_output(tx, job_id, reader), line=job_id
        )

    async def is_cut(self, job_id: str, reader: str) -> bool:
        """See `Ledger`."""
        return await self._database.read(lambda tx: pinning.is_cut(tx, job_id, reader))

    def on_cut(self, job_id: str, tell: Callable[[], None]) -> AbstractContextManager[None]:
        """See `Ledger`."""
        return self._database.signals.on_cut(job_id, tell)

    # --- audit records

    async def append_audit(self, records: Sequence[AuditRecord]) -> None:
        """See `Ledger`."""
        await self._database.write(lambda tx: auditing.append(tx, records))

    async def list_audit(
        self,
        query: AuditQuery,
        *,
        limit: int,
        before: tuple[datetime, str] | None = None,
    ) -> list[AuditRecord]:
        """See `Ledger`."""
        return await self._database.read(
            lambda tx: auditing.list_records(tx, query, limit=limit, before=before)
        )

    async def forget_audit(self, lease: Lease, *, keep: timedelta, limit: int) -> int:
        """See `Ledger`."""
        return await self._database.write(
            lambda tx: auditing.forget(tx, lease, span_to_micros(keep), limit),
            line=lease.job_id,
        )

    # --- waiting

    async def wait_for_work(self, timeout: float) -> None:
        """See `Ledger`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._work()

    async def _work(self) -> None:
        signals = self._database.signals
        ticket = signals.take_ticket()
        if ticket is not None:
            news, since = ticket
        else:
            news = signals.news()
            since = await self._database.read(reading.moment)
        with signals.idle(news) as told:
            while not told.is_set():
                pause = await self._database.read(lambda tx: reading.next_due(tx, since))
                if pause is not None and pause <= 0:
                    return
                with suppress(TimeoutError):
                    async with asyncio.timeout(None if pause is None else pause / 1e6):
                        await told.wait()

    async def wait_for_change(self, job_id: str, revision: int, timeout: float) -> None:
        """See `Ledger`."""
        # Registered before the look, so that no change falls between the two.
        with self._database.signals.watch(job_id) as watcher, suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                reached = await self._database.read(
                    lambda tx: reading.revision_of(tx, job_id)
                )
                if reached is not None and reached <= revision:
                    await watcher.passed(revision)

    def watching(self, job_id: str) -> AbstractContextManager[JobWatch]:
        """See `Ledger`."""
        return self._database.signals.watch(job_id)

    def fence(self, lease: Lease) -> AbstractContextManager[asyncio.Event]:
        """See `Ledger`."""
        return self._database.signals.fence(lease.job_id)

    async def close(self) -> None:
        """See `Ledger`."""
        try:
            await asyncio.gather(*self._giving_back, return_exceptions=True)
        finally:
            await self._database.close()

    # --- leases that nobody waits for any more

    async def _leasing(self, work: Coroutine[Any, Any, tuple[L, int]]) -> tuple[L, int]:
        """Run a transaction that ends with a lease. If the caller is cancelled while it
        runs, the lease would be nobody's until it ran out: give it back."""
        running = asyncio.ensure_future(work)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            task = asyncio.create_task(self._give_back(running))
            self._giving_back.add(task)
            task.add_done_callback(self._giving_back.discard)
            raise

    async def _give_back(self, running: asyncio.Future[tuple[Any, int]]) -> None:
        await asyncio.wait([running])
        if running.cancelled() or running.exception() is not None:
            return
        lease, _ = running.result()
        if lease is not None:
            # What cannot be told runs out by itself.
            with suppress(LeaseLost, LedgerUnavailable):
                await self.release(lease)


def _micros_or_none(span: timedelta | None) -> int | None:
    return None if span is None else max(0, span_to_micros(span))
