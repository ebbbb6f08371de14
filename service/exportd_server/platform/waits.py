"""Waiting: for the first of several things, and longer after each failure."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


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


class Patience:
    """`asyncio.timeout` for many that wait equally long, `seconds`: one timer for all of
    them, and hardly any work for one that does not come to its end. For one event loop."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        # In the order in which they end; None for those that were told.
        self._ends: dict[asyncio.Task[Any], float | None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return self._seconds

    async def wait(self, awaitable: Awaitable[T]) -> T:
        """What it gives. Raises `TimeoutError`, with the wait cancelled, after `seconds`.
        A task waits here for one thing at a time."""
        loop = asyncio.get_running_loop()
        task = asyncio.current_task(loop)
        if task is None or task in self._ends:
            raise RuntimeError("patience without a task, or with one that waits already")
        cancelling = task.cancelling()
        end = self._ends[task] = loop.time() + self._seconds
        if self._timer is None:
            self._timer = loop.call_at(end, self._end, loop)
        cancelled: asyncio.CancelledError | None = None
        try:
            return await awaitable
        except asyncio.CancelledError as error:
            cancelled = error
            raise
        finally:
            told = self._ends.pop(task) is None
            if told and task.uncancel() <= cancelling and cancelled is not None:
                raise TimeoutError from cancelled

    def _end(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        for task, end in self._ends.items():
            if end is None:
                continue
            if end > now:
                self._timer = loop.call_at(end, self._end, loop)
                return
            self._ends[task] = None
            task.cancel()
