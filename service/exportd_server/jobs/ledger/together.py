"""Reads that many ask for at the same time, done in one transaction."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from itertools import chain, islice
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")
Waiting = asyncio.Future[V]

_PATIENCE = 0.05
"""Seconds after which those who wait no longer wait for the look before them."""


class Together(Generic[K, V]):
    """Looks up what callers ask for: alone while nobody else asks, and otherwise all that
    was asked for while others were looked up, at one go.

    The way to a thread, a transaction and the way back cost many times what reading a
    job's rows does, and are shared so. What a caller gets is read after it has asked:
    whoever asks while a look is under way is part of the next one.
    """

    def __init__(
        self,
        look: Callable[[Sequence[K]], Awaitable[Mapping[K, V]]],
        *,
        at_once: int,
        looks: int,
    ) -> None:
        """`look` finds every key that it is given, of which there are at most `at_once`. A
        look begins when the one before has ended or has taken long; `looks` is how many
        may be under way then."""
        self._look = look
        self._at_once = at_once
        self._looks = looks
        self._under_way = 0
        self._waiting: dict[K, list[Waiting[V]]] = {}
        self._impatience: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def find(self, key: K) -> V:
        """What is found under the key. Raises what `look` raises for it alone."""
        if not self._under_way:
            self._under_way += 1
            try:
                return (await self._look([key]))[key]
            finally:
                self._ended()
        loop = asyncio.get_running_loop()
        future: Waiting[V] = loop.create_future()
        self._waiting.setdefault(key, []).append(future)
        if self._impatience is None:
            self._impatience = loop.call_later(_PATIENCE, self._begin)
        return await future

    def _ended(self) -> None:
        self._under_way -= 1
        if self._waiting and not self._under_way:
            self._begin()

    def _begin(self) -> None:
        if self._impatience is not None:
            self._impatience.cancel()
            self._impatience = None
        if self._waiting and self._under_way < self._looks:
            self._under_way += 1
            keys = list(islice(self._waiting, self._at_once))
            asked = {key: self._waiting.pop(key) for key in keys}
            task = asyncio.create_task(self._look_for(asked))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if self._waiting:
            loop = asyncio.get_running_loop()
            self._impatience = loop.call_later(_PATIENCE, self._begin)

    async def _look_for(self, asked: Mapping[K, Sequence[Waiting[V]]]) -> None:
        try:
            found: Mapping[K, V] = {}
            # What one of them fails by is no failure of the others.
            with suppress(Exception):
                found = await self._look([*asked])
            for key, futures in asked.items():
                await self._tell(key, futures, found)
        finally:
            for future in chain.from_iterable(asked.values()):
                future.cancel()  # only if this was itself: the others are done
            self._ended()

    async def _tell(
        self, key: K, futures: Sequence[Waiting[V]], found: Mapping[K, V]
    ) -> None:
        if all(future.done() for future in futures):
            return
        try:
            value = found[key] if found else (await self._look([key]))[key]
        except Exception as error:  # noqa: BLE001 - told to whoever waits
            for future in futures:
                if not future.done():
                    future.set_exception(error)
        else:
            for future in futures:
                if not future.done():
                    future.set_result(value)
