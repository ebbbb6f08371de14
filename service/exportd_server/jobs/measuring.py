"""Keeps the figures that nobody counts by the way: how the ledger and the disks stand.

Every process asks for itself, every few seconds and whether or not anybody reads its
metrics. The longer the answer takes the more seldom it asks, so that many processes and a
long queue do not cost the ledger what it needs for work.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

import structlog

from exportd_server.errors import LedgerUnavailable
from exportd_server.jobs.ledger.base import Ledger
from exportd_server.platform import metrics, metrics_exports, metrics_service

log = structlog.get_logger(__name__)

INTERVAL = 5.0
"""Seconds between questions, at the least."""
_SHARE = 50
"""How many times as long as the last questions took nothing is asked."""
_LONGEST = 60.0
"""But no longer than this: older figures are of no use."""

Pair = tuple[str, str]


class Measuring:
    """Measures until it is cancelled: `sinks` are types and connections, `places` the
    directories whose disks are told, by the name they have in the metrics."""

    def __init__(
        self, ledger: Ledger, sinks: Collection[Pair], places: Mapping[str, Path]
    ) -> None:
        self._ledger = ledger
        self._sinks = frozenset(sinks)
        self._places = dict(places)
        self._silent = False

    async def run(self) -> None:
        """Measure again and again."""
        while True:
            begun = time.monotonic()
            await self.measure()
            took = time.monotonic() - begun
            pause = INTERVAL if self._silent else min(_LONGEST, _SHARE * took)
            await asyncio.sleep(max(INTERVAL, pause))

    async def measure(self) -> None:
        """Measure once."""
        await asyncio.to_thread(self._disks)
        try:
            backlog = await self._ledger.backlog()
            depths = await self._ledger.queue_depths()
        except Exception as error:
            # Whatever it is, old figures must not be taken for new ones.
            metrics_service.ledger_up.set(0)
            metrics_exports.forget_backlog()
            if not self._silent:
                known = isinstance(error, LedgerUnavailable)
                log.warning(
                    "the ledger could not be measured", exc_info=None if known else error
                )
            self._silent = True
            return
        self._silent = False
        metrics_service.ledger_up.set(1)
        metrics_exports.set_backlog(
            {state.value: count for state, count in backlog.jobs.items()},
            {(kind.value, state): count for (kind, state), count in backlog.tasks.items()},
            {kind.value: seconds for kind, seconds in backlog.waiting.items()},
        )
        standing: Counter[tuple[str, str, str]] = Counter()
        for queue, (waiting, retrying) in depths.items():
            pair = self._pair(queue)
            standing[*pair, "waiting"] += waiting
            standing[*pair, "retrying"] += retrying
        metrics.set_queue_depths(standing)
        metrics.set_disabled(Counter(self._pair(queue) for queue in backlog.disabled))

    def _pair(self, queue: str) -> Pair:
        """Type and connection of a queue, as labels have them."""
        type_, _, rest = queue.partition("/")
        connection = rest.partition("/")[0]
        pair = (type_, connection)
        return pair if pair in self._sinks else (type_, "")

    def _disks(self) -> None:
        for place, directory in self._places.items():
            try:
                found = os.statvfs(directory)
            except OSError as error:
                log.warning("a disk could not be measured", place=place, error=str(error))
                continue
            size, free = found.f_blocks, found.f_bavail
            metrics_service.disk_size_bytes.labels(place).set(size * found.f_frsize)
            metrics_service.disk_free_bytes.labels(place).set(free * found.f_frsize)
