"""Threads that were given up on: they hang in a source, and nothing can end them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

MOST = 16
"""So many may be left behind in one process before it takes no more work in their stead."""
_LOOK = 0.5


class Strays:
    """Counts the threads that were left behind and have not ended. From any thread."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self.lock = threading.Lock()
        self.count = 0

    async def room(self) -> None:
        """Wait until there are fewer than that: whoever left one more behind takes no new
        work as long."""
        while self.count >= self._most:  # noqa: ASYNC110 - threads end in no loop
            await asyncio.sleep(_LOOK)


class Strayable(Generic[T]):
    """Work for a thread that may have to be left behind."""

    def __init__(self, strays: Strays, work: Callable[[], T]) -> None:
        self._strays = strays
        self._work = work
        self._left = False
        self._ended = False

    def __call__(self) -> T:
        """Do the work."""
        try:
            return self._work()
        finally:
            with self._strays.lock:
                self._ended = True
                if self._left:
                    self._strays.count -= 1

    def leave(self) -> None:
        """Nobody waits for it any more. Idempotent."""
        with self._strays.lock:
            if not (self._left or self._ended):
                self._left = True
                self._strays.count += 1
