"""When a delivery is tried again."""

from __future__ import annotations

import random
from datetime import timedelta

from exportd_server.sinks.base import RetryPolicy

_MOST_DOUBLINGS = 30
_SPREAD = 0.1


def pause(
    policy: RetryPolicy, attempt: int, asked: timedelta | None = None
) -> timedelta | None:
    """How long to wait after the failure of an attempt, which counts from 1; None when
    there is no other one.

    Exponential pauses are spread over their upper half ("equal jitter"), those of a
    schedule by a tenth, so that what failed together does not come back together. The
    receiver is never asked before the moment it named (`asked`).
    """
    if attempt >= policy.max_attempts:
        return None
    if policy.schedule:
        base = policy.schedule[min(attempt, len(policy.schedule)) - 1]
        seconds = base * random.uniform(1.0, 1.0 + _SPREAD)  # noqa: S311 - spreads, hides nothing
    else:
        ceiling = min(policy.cap, policy.base * 2 ** min(attempt - 1, _MOST_DOUBLINGS))
        seconds = random.uniform(ceiling / 2, ceiling)  # noqa: S311 - as above
    if asked is not None:
        least = asked.total_seconds()
        seconds = max(seconds, least * random.uniform(1.0, 1.0 + _SPREAD))  # noqa: S311 - as above
    return timedelta(seconds=seconds)
