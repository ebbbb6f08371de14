"""Threads that do short work for one event loop."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class Hands:
    """So many threads, which take up what waits one after the other.

    A pool of the standard library makes a future with locks for each piece of work and
    wakes the loop for each. Here whatever was done while the loop was busy is told at one
    go: what is read takes less time than to be told of it.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._work: SimpleQueue[tuple[asyncio.Future[Any], Callable[[], Any]] | None] = (
            SimpleQueue()
        )
        self._done: deque[tuple[asyncio.Future[Any], Any, BaseException | None]] = deque()
        self._threads = [
            # Left open, they must not keep the process from ending.
            threading.Thread(target=self._run, name=f"{name}_{number}", daemon=True)
            for number in range(threads)
        ]
        self._woken = False
        self._closed = False
        self._closing = threading.Lock()
        for thread in self._threads:
            thread.start()

    async def run(self, call: Callable[[], T]) -> T:
        """Call it in one of the threads. If the caller is cancelled before its turn it is
        not called."""
        future: asyncio.Future[T] = self._loop.create_future()
        with self._closing:
            if self._closed:
                raise RuntimeError("the threads have ended")
            self._work.put((future, call))
        return await future

    def close(self) -> None:
        """Let what waits be done, and end the threads; blocks."""
        with self._closing:
            self._closed = True
            for _ in self._threads:
                self._work.put(None)
        for thread in self._threads:
            thread.join()

    # --- in the threads

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            future, call = item
            if not future.cancelled():
                self._tell(future, call)
            # Held no longer than the caller holds it.
            del item, future, call

    def _tell(self, future: asyncio.Future[T], call: Callable[[], T]) -> None:
        result: T | None = None
        failed: BaseException | None = None
        try:
            result = call()
        except StopIteration as error:
            failed = RuntimeError("a read raised StopIteration")  # no future takes that
            failed.__cause__ = error
        except BaseException as error:  # noqa: BLE001 - told to whoever waits
            failed = error
        # What is added before this looks is taken by the loop, which is to look after that.
        self._done.append((future, result, failed))
        if not self._woken:
            self._woken = True
            # The loop may be closed, with nobody left to tell.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._told)

    # --- in the loop

    def _told(self) -> None:
        self._woken = False
        while self._done:
            future, result, error = self._done.popleft()
            if future.done():
                continue
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)
