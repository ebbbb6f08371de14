"""Keeps audit records: a line in the log at once, a row of the ledger soon after."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta

import structlog

from exportd_server.errors import LedgerUnavailable
from exportd_server.jobs.audit import OK, AuditMethod, AuditRecord, Ending, Entry, under
from exportd_server.jobs.ledger.base import Ledger
from exportd_server.platform import metrics
from exportd_server.platform.clock import Clock
from exportd_server.platform.logging import AUDIT

log = structlog.get_logger(__name__)

# Not held back by any level: it is no message of more or less weight.
_lines = structlog.wrap_logger(
    logging.getLogger(AUDIT), wrapper_class=structlog.stdlib.BoundLogger
)

Classify = Callable[[BaseException], Ending]

BATCH = 100
CAPACITY = 20_000
"""Records that wait in memory while the ledger is away: some 20 MiB at the most."""
_STRANGERS = 1000
_STRANGERS_PER_SECOND = 10.0
"""Rows for callers that nobody knows: so many at once, and so many a second. Whoever has
no credentials shall neither fill the ledger nor crowd out the records of others."""
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 5.0


def write_line(record: AuditRecord) -> None:
    """Write the record's line of the log."""
    told = {name: value for name, value in asdict(record).items() if value not in _NOTHING}
    told |= {
        "time": record.time.isoformat(),
        "duration": record.duration.total_seconds(),
        "method": record.method.value,
        "outcome": record.outcome.value,
        "tenant": record.tenant,
        "subject": record.subject,
    }
    _lines.info("audit", **told)


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
        strangers: int = _STRANGERS,
    ) -> None:
        self._ledger = ledger
        self._clock = clock
        self._capacity = capacity
        self._waiting: deque[AuditRecord] = deque()
        self._told = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False
        self._failing = False
        self._most_strangers = float(strangers)
        self._strangers = float(strangers)
        self._looked = time.monotonic()
        self._task = asyncio.create_task(self._run())

    @contextmanager
    def auditing(
        self, method: AuditMethod, peer: str, classify: Classify
    ) -> Iterator[Entry]:
        """Leave one record of what is done in this context, however it ends. `classify`
        says how by the exception that ends it."""
        entry = Entry(method, peer)
        started = time.monotonic()
        ending = Ending(OK)
        try:
            with under(entry):
                yield entry
        except BaseException as error:
            ending = classify(error)
            raise
        finally:
            duration = timedelta(seconds=time.monotonic() - started)
            self.add(entry.record(ending, self._clock.now(), duration))

    def add(self, record: AuditRecord) -> None:
        """Log a record now, and have it kept."""
        write_line(record)
        if self._closing:
            metrics.audit_dropped.labels("shutdown").inc()
        elif not record.identity and not self._admit_stranger():
            metrics.audit_dropped.labels("unidentified").inc()
        elif len(self._waiting) >= self._capacity:
            metrics.audit_dropped.labels("full").inc()
            self._complain("the queue is full")
        else:
            self._waiting.append(record)
            self._idle.clear()
            self._told.set()

    async def flushed(self) -> None:
        """Wait until everything that was added is in the ledger, or counted as lost."""
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
        if self._waiting:
            lost = len(self._waiting)
            self._waiting.clear()
            metrics.audit_dropped.labels("shutdown").inc(lost)
            log.error("audit records are in this log only", records=lost)

    def _admit_stranger(self) -> bool:
        now = time.monotonic()
        more = (now - self._looked) * _STRANGERS_PER_SECOND
        self._looked = now
        self._strangers = min(self._most_strangers, self._strangers + more)
        if self._strangers < 1:
            return False
        self._strangers -= 1
        return True

    async def _run(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            await self._told.wait()
            self._told.clear()
            while self._waiting:
                batch = [self._waiting[i] for i in range(min(BATCH, len(self._waiting)))]
                try:
                    await self._ledger.append_audit(batch)
                except LedgerUnavailable:
                    # It may be there nevertheless; the same rows again change nothing.
                    self._complain("the ledger is away")
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, _LONGEST_PAUSE)
                    continue
                except Exception:
                    # These records would fail for ever, and hold up those after them.
                    log.exception("audit records are in this log only", records=len(batch))
                    metrics.audit_dropped.labels("refused").inc(len(batch))
                else:
                    if self._failing:
                        log.info("audit records are kept again")
                    self._failing, pause = False, _FIRST_PAUSE
                for _ in batch:
                    self._waiting.popleft()
            self._idle.set()

    def _complain(self, cause: str) -> None:
        if not self._failing:
            # They wait; what is lost in the end is counted, and an error then.
            log.warning("audit records cannot be kept now", cause=cause)
        self._failing = True
