"""Token buckets: how often something may happen, for each of many."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable


class TokenBuckets:
    """A token bucket for each key: it holds `burst` tokens and is filled with `rate` of
    them a second.

    What is kept of a bucket is when it will be full; one that is full is forgotten, for
    it is as good as new. So memory follows the keys that came within the last
    `burst / rate` seconds, or twice that at most, and never their number over time.
    """

    def __init__(
        self, rate: float, burst: int, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.rate = rate
        self.burst = burst
        self._now = now
        self._full_at: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._full_at)

    def take(self, key: str) -> float:
        """Take a token; 0.0. When there is none it takes nothing, and says in how many
        seconds there will be one."""
        now = self._now()
        self._forget(now)
        full_at = max(now, self._full_at.get(key, now)) + 1 / self.rate
        wait = full_at - now - self.burst / self.rate
        # Sums of fractions: what is due within a microsecond is due.
        if wait > 1e-6:
            return wait
        self._full_at[key] = full_at
        self._full_at.move_to_end(key)
        return 0.0

    def _forget(self, now: float) -> None:
        while self._full_at:
            key, full_at = next(iter(self._full_at.items()))
            if full_at > now:
                return
            del self._full_at[key]
