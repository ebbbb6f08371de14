"""Waiting: for the first of several things, and longer after each failure."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable
from dataclasses import dataclass


async def first(*waits: Awaitable[object]) -> None:
    """Return once one of them is done, and cancel the others. Raises what it raised."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        # Also takes the errors of those that failed beside the first.
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


@dataclass(frozen=True, slots=True)
class Backoff:
    """Pauses in seconds that double from `base` up to `cap`, half of each by chance, so
    that those who failed together do not come back together."""

    base: float
    cap: float

    def pause(self, failures: int) -> float:
        """The pause after so many failures in a row, at least one."""
        ceiling = min(self.cap, self.base * 2 ** min(failures - 1, 30))
        return random.uniform(ceiling / 2, ceiling)  # noqa: S311 - spreads, hides nothing
