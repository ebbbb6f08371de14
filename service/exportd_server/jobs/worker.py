"""Does the work: claims tasks, has them done, and drains.

A worker may die at any moment. It therefore owns nothing but its leases: what it did is
in the ledger and in the store, and what it had not finished another one does again.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import time
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from datetime import timedelta

import structlog

from exportd_server.delivery.sinks import Sinks
from exportd_server.errors import LedgerUnavailable
from exportd_server.jobs.anchors import Anchors
from exportd_server.jobs.delivering import Deliverer, LinkMaker
from exportd_server.jobs.exporting import (
    Exporter,
    ExportOptions,
    traced_as,
    unforeseen,
)
from exportd_server.jobs.housekeeping import Housekeeping
from exportd_server.jobs.leases import GivenBack, Held, Leases
from exportd_server.jobs.ledger.base import (
    ClaimLimits,
    Lease,
    LeaseLost,
    Ledger,
    TaskKind,
)
from exportd_server.jobs.manager import Policy
from exportd_server.jobs.model import JobState
from exportd_server.platform import metrics_exports as metrics
from exportd_server.platform import tracing
from exportd_server.platform.shares import Shares
from exportd_server.platform.tracing import NO_TRACER, Kind, Span, TraceContext, Tracer
from exportd_server.platform.waits import Backoff, first
from exportd_server.sources.catalogue import Catalogue
from exportd_server.store.base import OutputStore

log = structlog.get_logger(__name__)

_EXPORT_KINDS = (TaskKind.PLAN, TaskKind.SHARD)
_HOUSEKEEPING_KINDS = (TaskKind.CLEANUP, TaskKind.REAP)
_SWEEP_KINDS = (TaskKind.SWEEP,)
_DELIVERY_KINDS = (TaskKind.DELIVER,)
_LAST_WORDS = 3.0
"""Seconds that work has to give its leases back once the grace of a drain is over."""
_OUTAGE = Backoff(0.1, 5.0)
"""Between claims that fail."""


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """How a worker works; times in seconds. Of its `deliveries` at a time one tenant has
    at most half, and less the more others have."""

    concurrency: int = 2
    deliveries: int = 64
    lease: float = 15.0
    poll: float = 5.0
    running_per_tenant: int | None = None
    export: ExportOptions = field(default_factory=ExportOptions)


@dataclass(slots=True)
class _Slots:
    """How many tasks of some kinds are done at a time, and those that are."""

    kinds: tuple[TaskKind, ...]
    size: int
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


class Worker:
    """Works off the ledger's tasks until it is told to drain."""

    def __init__(
        self,
        ledger: Ledger,
        store: OutputStore,
        catalogue: Catalogue,
        housekeeping: Housekeeping,
        policy: Policy,
        sinks: Sinks,
        options: WorkerOptions,
        *,
        links: LinkMaker | None = None,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self._ledger = ledger
        self._tracer = tracer
        self._housekeeping = housekeeping
        self._options = options
        self._owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._draining = asyncio.Event()
        self._over = asyncio.Event()
        self._finished = asyncio.Event()
        self._vacated = asyncio.Event()
        self._slots = (
            _Slots(_EXPORT_KINDS, options.concurrency),
            _Slots(_HOUSEKEEPING_KINDS, 1),
            # On its own: it may take long, and deletions are not to wait for it.
            _Slots(_SWEEP_KINDS, 1),
            # They mostly wait, and must not keep exports from running, nor these them.
            _Slots(_DELIVERY_KINDS, options.deliveries),
        )
        self._delivering = Shares(options.deliveries)
        self._leases = Leases(ledger, options.lease)
        self._anchors = Anchors(ledger, self._draining, poll=options.poll)
        self._deliverer = Deliverer(ledger, store, sinks, self._leases, links)
        self._exporter = Exporter(
            ledger,
            store,
            catalogue,
            policy,
            self._leases,
            self._anchors,
            options.export,
            tracer,
        )

    async def run(self) -> None:
        """Work until `drain`; returns once everything has ended or was given back."""
        self._leases.start()
        working = asyncio.create_task(self._claim_until_drained())
        try:
            await first(working, self._leases.ended(), self._over.wait())
        finally:
            working.cancel()
            tasks = self._tasks()
            for task in tasks:
                task.cancel()
            # What does not let itself be cancelled is left behind: its lease runs out.
            await asyncio.wait({working, *tasks}, timeout=_LAST_WORDS)
            await self._anchors.close()
            await self._leases.stop()
            self._finished.set()

    async def drain(self, grace: float) -> None:
        """Claim nothing more; after `grace` seconds stop what still runs and give its
        lease back. Returns a few seconds later at most, whatever blocks."""
        self._draining.set()
        if await self._ends_within(grace):
            return
        for held in self._leases.held():
            held.give_back()
        self._anchors.release()
        if not await self._ends_within(_LAST_WORDS):
            log.warning("work did not end in time; its leases run out")
            self._over.set()
            await self._ends_within(_LAST_WORDS)

    async def _ends_within(self, seconds: float) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._finished.wait()
        return self._finished.is_set()

    def _tasks(self) -> list[asyncio.Task[None]]:
        return [task for slots in self._slots for task in slots.tasks]

    # --- claiming

    async def _claim_until_drained(self) -> None:
        """One claim at a time for the whole process, so that news of work in a fleet is
        answered by one claim from each process and not by one from each slot."""
        failures = 0
        while not self._draining.is_set():
            self._vacated.clear()
            kinds = [
                kind
                for slots in self._slots
                if len(slots.tasks) < slots.size
                for kind in slots.kinds
            ]
            try:
                if failures:
                    # Else work that goes on here could be claimed by another one.
                    await self._leases.renew()
                await self._claim_or_wait(kinds)
            except Exception as error:
                failures += 1
                known = isinstance(error, LedgerUnavailable)
                log.warning(
                    "claiming failed", failures=failures, exc_info=None if known else error
                )
                with suppress(TimeoutError):
                    async with asyncio.timeout(_OUTAGE.pause(failures)):
                        await self._draining.wait()
            else:
                failures = 0
        while tasks := self._tasks():
            await asyncio.wait(tasks)
        await self._anchors.idle()

    async def _claim_or_wait(self, kinds: list[TaskKind]) -> None:
        lease = None
        if kinds:
            lease = await self._claim(kinds)
        if lease is not None:
            self._start(lease)
        elif kinds:
            await first(
                self._ledger.wait_for_work(self._options.poll),
                self._vacated.wait(),
                self._draining.wait(),
            )
        else:
            await first(self._vacated.wait(), self._draining.wait())

    async def _claim(self, kinds: list[TaskKind]) -> Lease | None:
        begun = time.perf_counter()
        try:
            lease = await self._ledger.claim(
                self._owner,
                kinds,
                lease=timedelta(seconds=self._options.lease),
                limits=ClaimLimits(
                    self._options.running_per_tenant, self._delivering.full()
                ),
            )
        except Exception:
            metrics.claims.labels("failed").inc()
            raise
        metrics.claim_seconds.observe(time.perf_counter() - begun)
        metrics.claims.labels("nothing" if lease is None else "claimed").inc()
        if lease is not None and lease.takeover:
            metrics.takeovers.labels(lease.kind.value).inc()
            with tracing.continued(TraceContext.of_text(lease.trace_context)):
                log.warning(
                    "lease taken over",
                    job_id=lease.job_id,
                    task=lease.kind.value,
                    attempt=lease.attempt,
                )
        return lease

    def _start(self, lease: Lease) -> None:
        (slots,) = (slots for slots in self._slots if lease.kind in slots.kinds)
        task = asyncio.create_task(self._work(lease))
        slots.tasks.add(task)
        delivers = lease.kind in _DELIVERY_KINDS
        if delivers:
            self._delivering.take(lease.tenant)

        def ended(task: asyncio.Task[None]) -> None:
            slots.tasks.discard(task)
            if delivers:
                self._delivering.give(lease.tenant)
            self._vacated.set()

        task.add_done_callback(ended)

    # --- working

    async def _work(self, lease: Lease) -> None:
        context = {
            "job_id": lease.job_id,
            "tenant": lease.tenant,
            "task": lease.kind.value,
            "attempt": lease.attempt,
        }
        with (
            structlog.contextvars.bound_contextvars(**context),
            self._traced(lease) as span,
            self._leases.hold(lease) as held,
        ):
            held.span = span
            try:
                outcome = await self._do(held)
            except LeaseLost:
                outcome = "lost"
                cause = await self._why_lost(held.lease)
                metrics.leases_lost.labels(lease.kind.value, cause).inc()
                log.info("lease lost", cause=cause)
            except Exception:
                outcome = "broken_off"
                span.fail(outcome)
                log.exception("work broke off; its lease runs out")
            if lease.kind not in _DELIVERY_KINDS:
                metrics.attempts.labels(lease.kind.value, outcome).inc()
            if outcome in ("lost", "given_back"):
                span.set({"exportd.outcome": outcome})

    def _traced(self, lease: Lease) -> AbstractContextManager[Span]:
        """Work on a lease within its job's trace. An export is several steps, which have a
        span each; anything else is one."""
        job = TraceContext.of_text(lease.trace_context)
        if not lease.job_id or lease.kind in _EXPORT_KINDS:
            return tracing.continued(job)
        return self._tracer.span(
            lease.kind.value,
            parent=job,
            kind=Kind.CLIENT if lease.kind in _DELIVERY_KINDS else Kind.INTERNAL,
            attributes=traced_as(lease),
        )

    async def _why_lost(self, lease: Lease) -> str:
        """Whether the job ended under a lease, or somebody else has its task."""
        if lease.kind in _HOUSEKEEPING_KINDS + _SWEEP_KINDS:
            return "taken_over"
        try:
            job = await self._ledger.get_job(lease.tenant, lease.job_id)
        except LedgerUnavailable:
            return "unknown"
        if job is None or job.generation != lease.generation:
            return "job_ended"
        delivers = lease.kind in _DELIVERY_KINDS and job.state is JobState.SUCCEEDED
        return "job_ended" if job.state.terminal and not delivers else "taken_over"

    async def _do(self, held: Held) -> str:
        """Work on a task; returns what that came to. Raises `LeaseLost`."""
        # A claim may have been under way when the drain began.
        begun = not self._draining.is_set()
        try:
            if not begun:
                raise GivenBack  # noqa: TRY301 - one way to give back
            if held.lease.kind in _EXPORT_KINDS:
                return await self._exporter.export(held)
            if held.lease.kind in _DELIVERY_KINDS:
                await self._deliverer.deliver(held)
                return "done"
            return await self._keep_house(held)
        except GivenBack:
            lease = held.lease
            await held.insist(lambda: self._ledger.release(lease))
            if begun:
                log.info("lease given back")
            return "given_back"

    async def _keep_house(self, held: Held) -> str:
        lease = held.lease
        work = {
            TaskKind.CLEANUP: self._housekeeping.cleanup,
            TaskKind.REAP: self._housekeeping.reap,
            TaskKind.SWEEP: self._housekeeping.sweep,
        }[lease.kind]
        try:
            # All of it may be done twice, so all of it is done again after an outage.
            await held.unless_stopped(held.insist(lambda: work(lease)))
        except (LeaseLost, GivenBack):
            raise
        except Exception as error:  # noqa: BLE001 - housekeeping is tried again
            record = unforeseen(error)
            held.span.fail(record.reason.value)
            retry_in = timedelta(seconds=self._options.export.retry.pause(lease.attempt))
            await held.insist(
                lambda: self._ledger.fail_attempt(lease, record, retry_in=retry_in)
            )
            return "retried"
        return "done"
