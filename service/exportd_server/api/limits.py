"""How much of one process callers may take: so many requests a second of a tenant, and so
many streams at a time, of a tenant and of all together.

For the event loop's thread only. Counts are those of this process; a fleet of N processes
lets a tenant have N times as much.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

from prometheus_client import Gauge

from exportd_server.errors import QuotaExceeded
from exportd_server.platform.buckets import TokenBuckets

RETRY_AFTER = timedelta(seconds=2)
"""When to ask again for a stream: nobody knows when another one ends."""
_SHORTEST = 0.001


class RequestRates:
    """A token bucket for each tenant: it holds `burst` requests and is filled with `rate`
    of them a second."""

    def __init__(
        self, rate: float, burst: int, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._buckets = TokenBuckets(rate, burst, now)

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, tenant: str) -> None:
        """Count a request; raises `QuotaExceeded`, and counts nothing, when the tenant has
        none left."""
        buckets = self._buckets
        if wait := buckets.take(tenant):
            raise QuotaExceeded(
                f"tenant:{tenant}/requests",
                f"more than {buckets.rate:g} requests a second, after {buckets.burst} at "
                f"once; try again in {wait:.3f} s, and watch a job instead of asking for "
                "it",
                timedelta(seconds=max(_SHORTEST, wait)),
            )


class Slots:
    """Places for what lasts, such as downloads: `per_tenant` and `total` at a time.
    `gauge` tells how many are taken."""

    def __init__(
        self, what: str, per_tenant: int, total: int, gauge: Gauge | None = None
    ) -> None:
        self._what = what
        self._gauge = gauge
        self._per_tenant = per_tenant
        self._total = total
        self._taken: Counter[str] = Counter()
        self.taken = 0
        """How many places are taken."""

    @contextmanager
    def hold(self, tenant: str) -> Iterator[None]:
        """Take a place for as long as the context is open; raises `QuotaExceeded`."""
        self._take(tenant)
        try:
            yield
        finally:
            self._give_back(tenant)

    def hold_for(self, tenant: str, task: asyncio.Task[Any]) -> None:
        """Take a place until the task has ended; raises `QuotaExceeded`."""
        self._take(tenant)
        task.add_done_callback(partial(self._give_back, tenant))

    def _take(self, tenant: str) -> None:
        if self._taken[tenant] >= self._per_tenant:
            self._drop_if_none(tenant)
            raise QuotaExceeded(
                f"tenant:{tenant}/{self._what}",
                f"{self._per_tenant} {self._what} are under way already; end one, or "
                "wait for one to end",
                RETRY_AFTER,
            )
        if self.taken >= self._total:
            self._drop_if_none(tenant)
            raise QuotaExceeded(
                f"server/{self._what}",
                f"this server has {self._total} {self._what} under way already; try "
                "again, perhaps at another one",
                RETRY_AFTER,
            )
        self._count(tenant, 1)

    def _give_back(self, tenant: str, _task: object = None) -> None:
        self._count(tenant, -1)
        self._drop_if_none(tenant)

    def _count(self, tenant: str, places: int) -> None:
        self._taken[tenant] += places
        self.taken += places
        if self._gauge is not None:
            self._gauge.inc(places)

    def _drop_if_none(self, tenant: str) -> None:
        if not self._taken[tenant]:
            del self._taken[tenant]


@dataclass(frozen=True, slots=True)
class CallerLimits:
    """What the API holds its callers to."""

    rates: RequestRates | None
    """Of requests over gRPC and HTTP together."""
    calls: Slots
    """Over gRPC, each until its answer has been taken."""
    watches: Slots
    downloads: Slots
    """Over gRPC and HTTP together."""
    stall_timeout: float = 60.0
    """Seconds in which a watcher must take a message."""
