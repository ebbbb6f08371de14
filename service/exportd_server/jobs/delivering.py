"""Deliveries: takes what is due to its sink, and records how that ended."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta

import structlog

from exportd_server.delivery.retry import pause
from exportd_server.delivery.sinks import KeptSink, Sinks
from exportd_server.errors import (
    TABLE,
    DeliveryFailed,
    ErrorReason,
    ErrorRecord,
    ExportdError,
    StoreFailed,
)
from exportd_server.jobs.housekeeping import part_key
from exportd_server.jobs.leases import GivenBack, Held, Leases
from exportd_server.jobs.ledger.base import DeliveryWork, LeaseLost, Ledger
from exportd_server.jobs.model import Job, ManifestColumn, PartRecord
from exportd_server.jobs.output import delivered_file_name, file_stem
from exportd_server.platform import metrics
from exportd_server.sinks.base import Delivery, Export, ExportColumn, Link, Part
from exportd_server.store.base import OutputStore, PartReader
from exportd_server.store.key import JobPrefix, OutputKey

log = structlog.get_logger(__name__)

LinkMaker = Callable[[Job], Awaitable[Sequence[Link]]]
"""Makes links to the parts of a succeeded job."""

_DISABLED = ErrorRecord(
    ErrorReason.ENDPOINT_DISABLED, TABLE[ErrorReason.ENDPOINT_DISABLED].text
)


class StoredContent:
    """A part in the output store, as sinks read it."""

    def __init__(self, store: OutputStore, key: OutputKey) -> None:
        self._store = store
        self._key = key

    @asynccontextmanager
    async def open(self, offset: int = 0) -> AsyncIterator[PartReader]:
        """See `Content`."""
        reader = await self._store.open(self._key, offset)
        try:
            yield reader
        finally:
            await reader.close()


class Deliverer:
    """Does the work of delivery tasks."""

    def __init__(
        self,
        ledger: Ledger,
        store: OutputStore,
        sinks: Sinks,
        leases: Leases,
        links: LinkMaker | None = None,
    ) -> None:
        self._ledger = ledger
        self._store = store
        self._sinks = sinks
        self._leases = leases
        self._links = links

    async def deliver(self, held: Held) -> None:
        """Make one attempt, and record its outcome. Raises `LeaseLost` or `GivenBack`."""
        lease = held.lease
        async with self._leases.fenced(held):
            work = await held.insist(lambda: self._ledger.delivery_work(lease))
            with structlog.contextvars.bound_contextvars(
                sink=work.sink.name, queue=work.sink.queue, delivery_id=work.delivery_id
            ):
                await self._attempt(held, work)

    async def _attempt(self, held: Held, work: DeliveryWork) -> None:
        if work.disabled:
            await self._failed(held, work, None)
            return
        labels = (work.sink.type, work.sink.connection)
        begun = time.monotonic()
        receipt = ""
        error: ExportdError | None = None

        async def deliver() -> None:
            nonlocal receipt
            receipt = await self._sinks.deliver(_kept(work), self._delivery(work))

        try:
            await held.unless_stopped(deliver())
        except GivenBack:
            metrics.deliveries.labels(*labels, "given_back").inc()
            raise
        except LeaseLost:
            raise
        except (DeliveryFailed, StoreFailed) as failed:
            error = failed
        except KeyError as gone:
            # The job has expired or was deleted, and its lease is about to be lost: the
            # ledger says so when it is told.
            error = DeliveryFailed("the output is gone", retryable=True)
            error.__cause__ = gone
        if held.lost:
            raise LeaseLost
        metrics.delivery_seconds.labels(*labels).observe(time.monotonic() - begun)
        if error is not None:
            await self._failed(held, work, error)
            return
        lease = held.lease
        await held.insist(lambda: self._ledger.complete_delivery(lease, receipt))
        metrics.deliveries.labels(*labels, "delivered").inc()
        if not work.completion:
            metrics.delivered_bytes.labels(*labels).inc(sum(p.bytes for p in work.parts))
        log.info("delivered", what=_what(work), attempt=work.attempt, receipt=receipt)

    async def _failed(
        self, held: Held, work: DeliveryWork, error: ExportdError | None
    ) -> None:
        """Record a failure; without an error the endpoint was disabled before."""
        lease = held.lease
        labels = (work.sink.type, work.sink.connection)
        limits = self._sinks.limits(*labels)
        record = _DISABLED if error is None else ErrorRecord.of(error)
        retry_in: timedelta | None = None
        disable_after: timedelta | None = None
        gone = False
        if isinstance(error, DeliveryFailed):
            gone = error.gone
            if limits.disable_after is not None:
                disable_after = timedelta(seconds=limits.disable_after)
            if error.retryable:
                retry_in = pause(limits.retry, lease.attempt, error.retry_after)
        elif isinstance(error, StoreFailed):
            # Ours, and no fault of the endpoint's.
            retry_in = pause(limits.retry, lease.attempt)
        came_to = await held.insist(
            lambda: self._ledger.fail_delivery(
                lease,
                record,
                retry_in=retry_in,
                disable_after=disable_after,
                gone=gone,
            )
        )
        outcome = "dead_lettered" if came_to.dead else "retried"
        metrics.deliveries.labels(*labels, outcome).inc()
        log.warning(
            "delivery dead-lettered" if came_to.dead else "delivery failed",
            what=_what(work),
            attempt=work.attempt,
            reason=record.reason.value,
            message=record.message,
            retry_in=None if retry_in is None else round(retry_in.total_seconds(), 3),
            exc_info=error.__cause__ if error is not None else None,
        )
        if came_to.disabled:
            metrics.endpoints_disabled.labels(*labels).inc()
            log.error("endpoint disabled", reason=record.reason.value)

    def _delivery(self, work: DeliveryWork) -> Delivery:
        job = work.job
        parts = tuple(self._part(job, part) for part in work.parts)
        links = self._links
        return Delivery(
            delivery_id=work.delivery_id,
            attempt=work.attempt,
            export=export_of(job, work.columns),
            part=None if work.completion else parts[0],
            parts=parts if work.completion else (),
            dropped=work.dropped,
            links=None if links is None or not work.completion else lambda: links(job),
        )

    def _part(self, job: Job, part: PartRecord) -> Part:
        key = part_key(JobPrefix(job.tenant, job.job_id), part)
        return Part(
            shard=part.shard,
            sequence=part.sequence,
            file_name=delivered_file_name(job, part.shard, part.sequence),
            rows=part.rows,
            bytes=part.bytes,
            prefix_bytes=part.prefix_bytes,
            suffix_bytes=part.suffix_bytes,
            crc32c=part.crc32c,
            sha256=part.sha256,
            content=StoredContent(self._store, key),
        )


def export_of(job: Job, columns: Sequence[ManifestColumn]) -> Export:
    """What sinks are told of a job."""
    return Export(
        tenant=job.tenant,
        dataset=job.spec.dataset,
        output=job.spec.output,
        columns=tuple(ExportColumn(c.name, c.kind, c.type, c.nullable) for c in columns),
        job_id=job.job_id,
        file_stem=file_stem(job),
        generation=job.generation,
        create_time=job.create_time,
        labels=job.spec.labels,
    )


def _kept(work: DeliveryWork) -> KeptSink:
    sink = work.sink
    return KeptSink(sink.type, sink.connection, sink.config, sink.sealed)


def _what(work: DeliveryWork) -> str:
    if work.completion:
        return "completion"
    part = work.parts[0]
    return delivered_file_name(work.job, part.shard, part.sequence)
