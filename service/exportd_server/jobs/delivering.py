"""Deliveries: takes what is due to its sink, and records how that ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import timedelta

import structlog

from exportd_server.delivery.retry import pause
from exportd_server.delivery.sinks import KeptSink, Sinks
from exportd_server.errors import (
    DeliveryFailed,
    ErrorReason,
    ErrorRecord,
    ExportdError,
)
from exportd_server.jobs.housekeeping import part_key
from exportd_server.jobs.leases import GivenBack, Held, Leases
from exportd_server.jobs.ledger.base import DeliveryWork, LeaseLost, Ledger
from exportd_server.jobs.model import Job, ManifestColumn, PartRecord
from exportd_server.jobs.output import delivered_file_name, file_stem
from exportd_server.platform import metrics
from exportd_server.sinks.base import Batching, Delivery, Export, ExportColumn, Link, Part
from exportd_server.store.base import OutputStore, PartReader
from exportd_server.store.key import JobPrefix, OutputKey

log = structlog.get_logger(__name__)

LinkMaker = Callable[[Job], Awaitable[Sequence[Link]]]
"""Makes links to the parts of a succeeded job."""

_DISABLED = ExportdError(ErrorReason.ENDPOINT_DISABLED)
_EXHAUSTED = ExportdError(ErrorReason.ATTEMPTS_EXHAUSTED)


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


class _Batch:
    """Deliveries that are made together."""

    def __init__(self, most: int) -> None:
        self.members: list[tuple[Held, DeliveryWork]] = []
        self.recorded: set[Held] = set()
        """Of whom it is known what became of them."""
        self.done = asyncio.Event()
        self._most = most
        self._full = asyncio.Event()

    @classmethod
    def alone(cls, held: Held, work: DeliveryWork) -> _Batch:
        """One by itself."""
        batch = cls(1)
        batch.add(held, work)
        return batch

    def add(self, held: Held, work: DeliveryWork) -> None:
        """Take one along."""
        self.members.append((held, work))
        if len(self.members) >= self._most:
            self._full.set()

    @property
    def full(self) -> bool:
        """Whether it takes no more."""
        return self._full.is_set()

    async def full_within(self, seconds: float) -> None:
        """Return once it is full, or after so many seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._full.wait()


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
        self._collecting: dict[tuple[str, str], _Batch] = {}

    async def deliver(self, held: Held) -> None:
        """Make one attempt, and record its outcome. Raises `LeaseLost` or `GivenBack`."""
        lease = held.lease
        async with self._leases.fenced(held):
            work = await held.insist(lambda: self._ledger.delivery_work(lease))
            with structlog.contextvars.bound_contextvars(
                sink=work.sink.name, queue=work.sink.queue, delivery_id=work.delivery_id
            ):
                held.span.set(
                    {
                        "exportd.sink": work.sink.name,
                        "exportd.dataset": work.job.spec.dataset,
                        "exportd.format": work.job.spec.output.format.value,
                        "exportd.attempt": work.attempt,
                        "exportd.delivers": _what(work),
                    }
                )
                limits = self._sinks.limits(work.sink.type, work.sink.connection)
                if work.disabled:
                    await self._failed(held, work, _DISABLED)
                elif lease.attempt > limits.retry.max_attempts:
                    # Each time so far the process died at it.
                    await self._failed(held, work, _EXHAUSTED)
                elif work.completion or limits.batching is None:
                    await self._attempt(_Batch.alone(held, work))
                else:
                    await self._attempt_together(held, work, limits.batching)

    async def _attempt_together(
        self, held: Held, work: DeliveryWork, batching: Batching
    ) -> None:
        """Deliver together with what else this process takes up for the sink meanwhile.
        The first of them waits for the others, and delivers all."""
        key = (work.job.job_id, work.sink.name)
        batch = self._collecting.get(key)
        if batch is not None and not batch.full:
            batch.add(held, work)
            await held.unless_stopped(batch.done.wait())
            if held not in batch.recorded:
                # The first of them was stopped.
                raise GivenBack
            return
        batch = self._collecting[key] = _Batch(batching.most)
        batch.add(held, work)
        try:
            try:
                await held.unless_stopped(batch.full_within(batching.wait))
            finally:
                # Whoever comes from now on begins the next one.
                if self._collecting.get(key) is batch:
                    del self._collecting[key]
            await self._attempt(batch)
        finally:
            batch.done.set()

    async def _attempt(self, batch: _Batch) -> None:
        held, work = batch.members[0]
        labels = (work.sink.type, work.sink.connection)
        begun = time.monotonic()
        outcomes: Sequence[str | ExportdError] = ()

        async def deliver() -> None:
            nonlocal outcomes
            deliveries = [self._delivery(one) for _, one in batch.members]
            outcomes = await self._sinks.deliver_batch(_kept(work), deliveries)

        try:
            await held.unless_stopped(deliver())
        except GivenBack:
            metrics.deliveries.labels(*labels, "given_back").inc(len(batch.members))
            raise
        except LeaseLost:
            raise
        except ExportdError as failed:
            outcomes = [failed] * len(batch.members)
        except KeyError as gone:
            # The job has expired or was deleted, and its lease is about to be lost: the
            # ledger says so when it is told.
            error = ExportdError(ErrorReason.OUTPUT_EXPIRED)
            error.__cause__ = gone
            outcomes = [error] * len(batch.members)
        if held.lost:
            raise LeaseLost
        # A sink may take it for a failure that it was told to stop.
        held.check()
        metrics.delivery_seconds.labels(*labels).observe(time.monotonic() - begun)
        # The first one last: while it holds its lease, nobody gives up waiting for it.
        for (mine, one), outcome in reversed(
            list(zip(batch.members, outcomes, strict=True))
        ):
            batch.recorded.add(mine)
            if mine is held:
                await self._record(mine, one, outcome)
            else:
                with suppress(LeaseLost):
                    await self._record(mine, one, outcome)

    async def _record(
        self, held: Held, work: DeliveryWork, outcome: str | ExportdError
    ) -> None:
        if isinstance(outcome, ExportdError):
            await self._failed(held, work, outcome)
            return
        lease = held.lease
        await held.insist(lambda: self._ledger.complete_delivery(lease, outcome))
        labels = (work.sink.type, work.sink.connection)
        metrics.deliveries.labels(*labels, "delivered").inc()
        if not work.completion:
            metrics.delivered_bytes.labels(*labels).inc(sum(p.bytes for p in work.parts))
        log.info("delivered", what=_what(work), attempt=work.attempt, receipt=outcome)

    async def _failed(self, held: Held, work: DeliveryWork, error: ExportdError) -> None:
        """Record a failure."""
        lease = held.lease
        labels = (work.sink.type, work.sink.connection)
        limits = self._sinks.limits(*labels)
        record = ErrorRecord.of(error)
        held.span.fail(record.reason.value)
        retry_in: timedelta | None = None
        disable_after: timedelta | None = None
        gone = False
        if isinstance(error, DeliveryFailed):
            gone = error.gone
            if limits.disable_after is not None:
                disable_after = timedelta(seconds=limits.disable_after)
            if error.retryable:
                retry_in = pause(limits.retry, lease.attempt, error.retry_after)
        elif error not in (_DISABLED, _EXHAUSTED):
            # The service's own fault, or nobody's: another attempt may do better.
            retry_in = pause(limits.retry, lease.attempt)
        came_to = await held.insist(
            lambda: self._ledger.fail_delivery(
                lease,
                record,
                retry_in=retry_in,
                disable_after=disable_after,
                gone=gone,
                # What the service fails at is no fault of the endpoint's.
                blame=isinstance(error, DeliveryFailed),
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
            # Only its kind: drivers put values of rows into their texts.
            cause=None if error.__cause__ is None else type(error.__cause__).__name__,
            sqlstate=getattr(error.__cause__, "sqlstate", None),
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
