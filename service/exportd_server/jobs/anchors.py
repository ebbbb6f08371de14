"""Holds the anchors of plans until nobody opens their shards any more."""

from __future__ import annotations

import asyncio

import structlog

from exportd_server.errors import LedgerUnavailable
from exportd_server.jobs.ledger.base import Lease, Ledger
from exportd_server.jobs.model import JobState
from exportd_server.platform.threads import in_daemon_thread
from exportd_server.platform.waits import Backoff, first
from exportd_server.sources.base import Anchor

log = structlog.get_logger(__name__)

_BETWEEN_LOOKS = 0.25
"""Seconds. A running job changes several times a second, and its anchor may well be held
for a moment longer."""
_CLOSING = 2.0
"""Seconds that the worker's end waits for anchors to close."""
_OUTAGE = Backoff(0.1, 5.0)


class Anchors:
    """The anchors that this process holds. Each has a task of its own, which takes no
    slot from exports: the shards may run anywhere."""

    def __init__(self, ledger: Ledger, draining: asyncio.Event, *, poll: float) -> None:
        self._ledger = ledger
        self._draining = draining
        self._poll = poll
        self._holding: set[asyncio.Task[None]] = set()
        self._closing: set[asyncio.Future[None]] = set()

    def hold(self, anchor: Anchor, lease: Lease) -> asyncio.Task[None]:
        """Hold the anchor of what was planned under `lease` until the job ends, goes, or
        begins anew. Cancel the task to let go before."""
        holding = asyncio.create_task(self._until_over(lease))
        self._holding.add(holding)

        # Not the task's own last step: one that is cancelled early takes no step at all.
        def close(ended: asyncio.Task[None]) -> None:
            self._holding.discard(ended)
            if not ended.cancelled() and ended.exception() is not None:
                log.error("anchor no longer held", exc_info=ended.exception())
            self.close_in_thread(anchor)

        holding.add_done_callback(close)
        return holding

    def close_in_thread(self, anchor: Anchor) -> None:
        """Close an anchor, which may block; returns at once."""
        closing = in_daemon_thread(anchor.close, "anchor")
        self._closing.add(closing)

        def closed(ended: asyncio.Future[None]) -> None:
            self._closing.discard(ended)
            if not ended.cancelled() and ended.exception() is not None:
                log.warning("anchor could not be closed", exc_info=ended.exception())

        closing.add_done_callback(closed)

    async def idle(self) -> None:
        """Wait until none is held. While the worker drains, those of jobs that nobody
        runs are let go."""
        while self._holding:
            await asyncio.wait(self._holding)

    def release(self) -> None:
        """Let go of all of them; returns at once."""
        for holding in self._holding:
            holding.cancel()

    async def close(self) -> None:
        """Let go of all of them, and see them closed."""
        self.release()
        await self.idle()
        if self._closing:
            await asyncio.wait(self._closing, timeout=_CLOSING)

    async def _until_over(self, lease: Lease) -> None:
        failures = 0
        while True:
            try:
                job = await self._ledger.get_job(lease.tenant, lease.job_id)
                if job is None or job.state.terminal or job.generation != lease.generation:
                    return
                if self._draining.is_set() and job.state is not JobState.RUNNING:
                    return
                await first(
                    self._ledger.wait_for_change(job.job_id, job.revision, self._poll),
                    self._draining.wait(),
                )
            except LedgerUnavailable:
                failures += 1
                await asyncio.sleep(_OUTAGE.pause(failures))
            else:
                failures = 0
                await asyncio.sleep(_BETWEEN_LOOKS)
