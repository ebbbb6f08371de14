"""Keeps audit records: a line in the log at once, a row of the ledger soon after."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from typing import Any

import structlog

from exportd_server.errors import LedgerUnavailable
from exportd_server.jobs.audit import AuditMethod, AuditRecord, Ending, Entry, auditing
from exportd_server.jobs.audit_queue import FairQueue
from exportd_server.jobs.ledger.base import Ledger
from exportd_server.platform import metrics
from exportd_server.platform.buckets import TokenBuckets
from exportd_server.platform.clock import Clock
from exportd_server.platform.logging import AUDIT
from exportd_server.platform.metrics_service import audit_waiting

log = structlog.get_logger(__name__)

# Not held back by any level: it is no message of more or less weight.
_lines = structlog.wrap_logger(
    logging.getLogger(AUDIT), wrapper_class=structlog.stdlib.BoundLogger
)

Classify = Callable[[BaseException], Ending]

BATCH = 100
CAPACITY = 20_000
"""Records that wait in memory while the ledger is away: some 20 MiB at the most."""
REFUSALS = 1000
_REFUSALS_PER_SECOND = 10.0
"""Rows of a tenant's refused operations, and of all callers that nobody knows: so many at
once, and so many a second. What is refused costs a caller nothing: it shall not fill the
ledger."""
_STRANGERS = ""
"""Stands for the tenant of callers that nobody knows."""
_GATHERING = 0.1
"""Seconds that a record may wait for others to be kept with: a commit for each call would
have what callers wait for stand in line behind it."""
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 5.0


def write_line(record: AuditRecord) -> None:
    """Write the record's line of the log."""
    told: dict[str, Any] = {
        name: value for name in _NAMES if (value := getattr(record, name)) not in _NOTHING
    }
    told |= {
        "time": record.time.isoformat(),
        "duration": record.duration.total_seconds(),
        "method": record.method.value,
        "outcome": record.outcome.value,
        "tenant": record.tenant,
        "subject": record.subject,
    }
    _lines.info("audit", **told)


_NAMES = tuple(each.name for each in fields(AuditRecord))
_NOTHING: tuple[object, ...] = ("", None, (), False)


class AuditLog:
    """Takes records from calls, which never wait for it, and appends them to the ledger in
    batches. What it cannot keep it counts; the line in the log stands in any case."""

    def __init__(
        self,
        ledger: Ledger,
        clock: Clock,
        *,
        capacity: int = CAPACITY,
        refusals: int = REFUSALS,
    ) -> None:
        self._ledger = ledger
        self._clock = clock
        self._waiting = FairQueue(capacity)
        self._batch: list[AuditRecord] = []
        """On its way to the ledger."""
        self._refusals = TokenBuckets(_REFUSALS_PER_SECOND, refusals)
        self._told = asyncio.Event()
        self._hurry = asyncio.Event()
        self._flushing = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False
        self._failing = False
        self._task = asyncio.create_task(self._run())

    @contextmanager
    def auditing(
        self, method: AuditMethod, peer: str, classify: Classify
    ) -> Iterator[Entry]:
        """See `audit.auditing`."""
        entry = Entry(method, peer)
        with auditing(entry, self._clock, self.add, classify):
            yield entry

    def add(self, record: AuditRecord) -> None:
        """Log a record now, and have it kept."""
        write_line(record)
        if self._closing:
            metrics.audit_dropped.labels("shutdown").inc()
            return
        owner = record.tenant if record.identity else _STRANGERS
        if (record.refused or owner == _STRANGERS) and self._refusals.take(owner):
            cause = "unidentified" if owner == _STRANGERS else "refusals"
            metrics.audit_dropped.labels(cause).inc()
            return
        if not self._waiting.add(owner, record):
            metrics.audit_dropped.labels("full").inc()
            self._complain("the queue is full")
        self._measure()
        self._idle.clear()
        self._told.set()
        if len(self._waiting) >= BATCH:
            self._hurry.set()

    async def flushed(self) -> None:
        """Wait until everything that was added is in the ledger, or counted as lost, and
        what is added meanwhile, too."""
        if not self._idle.is_set():
            self._flushing = True
            self._hurry.set()
        await self._idle.wait()

    async def close(self, within: float) -> None:
        """Append what waits, for `within` seconds at the most; what is left is counted.
        Nothing is kept that comes after. Idempotent."""
        self._closing = True
        with suppress(TimeoutError):
            async with asyncio.timeout(within):
                await self.flushed()
        self._task.cancel()
        await asyncio.wait({self._task})
        lost = len(self._batch) + len(self._waiting)
        if lost:
            self._batch, self._waiting = [], FairQueue(0)
            self._measure()
            metrics.audit_dropped.labels("shutdown").inc(lost)
            log.error("audit records are in this log only", records=lost)

    async def _run(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            await self._told.wait()
            self._told.clear()
            while self._batch or self._waiting:
                if not self._batch:
                    await self._gather()
                    self._batch = self._waiting.take(BATCH)
                try:
                    await self._ledger.append_audit(self._batch)
                except LedgerUnavailable:
                    # It may be there nevertheless; the same rows again change nothing.
                    self._complain("the ledger is away")
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, _LONGEST_PAUSE)
                    continue
                except Exception:
                    # These records would fail for ever, and hold up those after them.
                    lost = len(self._batch)
                    log.exception("audit records are in this log only", records=lost)
                    metrics.audit_dropped.labels("refused").inc(lost)
                else:
                    if self._failing:
                        log.info("audit records are kept again")
                    self._failing, pause = False, _FIRST_PAUSE
                self._batch = []
                self._measure()
            self._flushing = False
            self._hurry.clear()
            self._idle.set()

    async def _gather(self) -> None:
        """Wait until a batch is full, wanted, or has waited for long enough."""
        if len(self._waiting) < BATCH:
            with suppress(TimeoutError):
                async with asyncio.timeout(_GATHERING):
                    await self._hurry.wait()
        if not self._flushing:
            self._hurry.clear()

    def _measure(self) -> None:
        audit_waiting.set(len(self._batch) + len(self._waiting))

    def _complain(self, cause: str) -> None:
        if not self._failing:
            # They wait; what is lost in the end is counted, and an error then.
            log.warning("audit records cannot be kept now", cause=cause)
        self._failing = True
