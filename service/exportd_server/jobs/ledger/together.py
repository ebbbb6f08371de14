"""Reads that many ask for at the same time, done in one transaction."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, Generic, TypeVar

from exportd_server.errors import LedgerUnavailable

K = TypeVar("K")
V = TypeVar("V")
Waiting = asyncio.Future[V]

_PATIENCE = 0.05
"""Seconds after which nobody waits for a look any more but those who are part of it."""


class Together(Generic[K, V]):
    """Looks up what callers ask for: alone while nobody else asks, and otherwise all that
    was asked for while others were looked up, at one go.

    The way to a thread, a transaction and the way back cost many times what reading a
    job's rows does, and are shared so. What a caller gets is read after it has asked:
    whoever asks while no more looks may begin is part of the next one. It is the batching
    of https://github.com/graphql/dataloader, by what is under way instead of by the loop's
    turn, and without its cache.

    For callers on one event loop.
    """

    def __init__(
        self,
        look: Callable[[Sequence[K]], Awaitable[Mapping[K, V]]],
        *,
        at_once: int,
        quick: int = 1,
        looks: int = 2,
    ) -> None:
        """`look` is given at most `at_once` keys. One that it is given alone it finds; of
        several it may leave out those that would keep the others waiting, which are then
        looked up by themselves, one after the other. There are `quick` looks at a time, to
        which those are not counted that have taken long, and `looks` with them."""
        self._look = look
        self._at_once = at_once
        self._quick = quick
        self._looks = looks
        self._under_way: set[_Look] = set()
        self._waiting: dict[K, list[Waiting[V]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._large: Together[K, V] | None = None
        if at_once > 1:
            self._large = Together(look, at_once=1, looks=1)

    async def find(self, key: K) -> V:
        """What is found under the key. Raises `LedgerUnavailable` when the look that it is
        part of does, and otherwise what `look` raises for it alone."""
        if self._free() and not self._waiting:
            look = self._begun()
            try:
                return (await self._look([key]))[key]
            finally:
                look.end()
        future: Waiting[V] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, []).append(future)
        self._go_on()
        try:
            return await future
        finally:
            if future.cancelled():
                self._forget(key, future)

    def _free(self) -> bool:
        quick = sum(look.quick for look in self._under_way)
        return quick < self._quick and len(self._under_way) < self._looks

    def _begun(self) -> _Look:
        look = _Look(self._under_way, self._go_on)
        self._under_way.add(look)
        return look

    def _forget(self, key: K, future: Waiting[V]) -> None:
        futures = self._waiting.get(key, [])
        if future in futures:
            futures.remove(future)
            if not futures:
                del self._waiting[key]

    def _go_on(self) -> None:
        """Look for those who wait, if a look may begin."""
        if not self._waiting or not self._free():
            return
        asked: dict[K, list[Waiting[V]]] = {}
        # Some may have been given up a moment ago, and not be forgotten yet.
        while self._waiting and len(asked) < self._at_once:
            key = next(iter(self._waiting))
            if futures := [each for each in self._waiting.pop(key) if not each.done()]:
                asked[key] = futures
        if not asked:
            return
        look = self._begun()
        everyone = [future for futures in asked.values() for future in futures]
        self._start(self._look_for(asked), everyone, look.end)

    def _start(
        self,
        work: Coroutine[Any, Any, None],
        futures: Sequence[Waiting[V]],
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        def done(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if task.cancelled() or task.exception() is not None:
                # The loop or the process ends: nobody is left waiting for ever.
                for future in futures:
                    future.cancel()
            ended()

        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(done)

    async def _look_for(self, asked: Mapping[K, Sequence[Waiting[V]]]) -> None:
        found: Mapping[K, V] = {}
        try:
            found = await self._look([*asked])
        except LedgerUnavailable as error:
            # It is away for one as for all, and who asks again waits again.
            for futures in asked.values():
                _fail(futures, error)
            return
        except Exception as error:  # noqa: BLE001 - what one fails by is no failure of others
            if len(asked) == 1:
                _fail(next(iter(asked.values())), error)
                return
        for key, futures in asked.items():
            if key in found:
                _tell(futures, found[key])
            elif self._large is not None and not all(each.done() for each in futures):
                self._start(_look_alone(self._large, key, futures), futures)


class _Look:
    """A look that is under way. `go_on` is called when it has taken long and when it has
    ended."""

    def __init__(self, under_way: set[_Look], go_on: Callable[[], None]) -> None:
        self.quick = True
        self._under_way = under_way
        self._go_on = go_on
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(_PATIENCE, self._has_taken_long)

    def end(self) -> None:
        self._timer.cancel()
        self._under_way.discard(self)
        self._go_on()

    def _has_taken_long(self) -> None:
        self.quick = False
        self._go_on()


async def _look_alone(large: Together[K, V], key: K, futures: Sequence[Waiting[V]]) -> None:
    try:
        value = await large.find(key)
    except Exception as error:  # noqa: BLE001 - told to whoever waits
        _fail(futures, error)
    else:
        _tell(futures, value)


def _tell(futures: Sequence[Waiting[V]], value: V) -> None:
    for future in futures:
        if not future.done():
            future.set_result(value)


def _fail(futures: Sequence[Waiting[V]], error: Exception) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(error)
