"""Lookups that are done at one go, and what each caller gets of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from exportd_server.jobs.ledger.together import Together
from tests.support.waits import ENOUGH


class Looks:
    """Looks that end when they are let; what is found under a key is its double."""

    def __init__(self, *, at_once: int = 100, looks: int = 1) -> None:
        self.begun: list[list[int]] = []
        self.open: list[asyncio.Event] = []
        self.broken: set[int] = set()
        self._began = asyncio.Condition()
        self.together = Together(self._look, at_once=at_once, looks=looks)

    async def _look(self, keys: Sequence[int]) -> dict[int, int]:
        gate = asyncio.Event()
        self.open.append(gate)
        async with self._began:
            self.begun.append([*keys])
            self._began.notify_all()
        await gate.wait()
        if bad := self.broken & {*keys}:
            raise ValueError(*bad)
        return {key: 2 * key for key in keys}

    def ask(self, *keys: int) -> list[asyncio.Task[int]]:
        return [asyncio.create_task(self.together.find(key)) for key in keys]

    async def until_begun(self, number: int) -> None:
        async with asyncio.timeout(ENOUGH), self._began:
            await self._began.wait_for(lambda: len(self.begun) >= number)

    def end(self, number: int) -> None:
        self.open[number - 1].set()


async def test_who_asks_while_a_look_is_under_way_is_part_of_the_next_one() -> None:
    looks = Looks()
    first = looks.ask(1)
    await looks.until_begun(1)
    # The same key as well: what is under way may be older than the question.
    others = looks.ask(1, 2, 3, 2)
    await asyncio.sleep(0)
    looks.end(1)
    assert await first[0] == 2
    await looks.until_begun(2)
    assert not any(other.done() for other in others)
    looks.end(2)
    assert await asyncio.gather(*others) == [2, 4, 6, 4]
    assert looks.begun == [[1], [1, 2, 3]]


async def test_one_look_has_so_many_keys_at_most() -> None:
    looks = Looks(at_once=2)
    everyone = looks.ask(0, 1, 2, 3)
    for number in (1, 2, 3):
        await looks.until_begun(number)
        looks.end(number)
    assert await asyncio.gather(*everyone) == [0, 2, 4, 6]
    assert looks.begun == [[0], [1, 2], [3]]


async def test_what_one_key_fails_by_is_no_failure_of_the_others() -> None:
    looks = Looks()
    looks.broken = {2}
    everyone = looks.ask(0, 1, 2, 2, 3)
    # Those who failed at one go are looked up one by one.
    for number in range(1, 6):
        await looks.until_begun(number)
        looks.end(number)
    told = await asyncio.gather(*everyone, return_exceptions=True)
    assert [told[0], told[1], told[4]] == [0, 2, 6]
    assert all(isinstance(each, ValueError) and each.args == (2,) for each in told[2:4])
    assert looks.begun == [[0], [1, 2, 3], [1], [2], [3]]


async def test_whoever_goes_away_takes_nothing_from_the_others() -> None:
    looks = Looks()
    first, second, third = looks.ask(1, 2, 2)
    await looks.until_begun(1)
    await asyncio.sleep(0)
    first.cancel()
    second.cancel()
    await looks.until_begun(2)
    looks.end(2)
    assert await third == 4
    assert looks.begun == [[1], [2]]
    for gone in (first, second):
        with pytest.raises(asyncio.CancelledError):
            await gone


async def test_a_look_that_takes_long_does_not_hold_up_who_comes_after() -> None:
    looks = Looks(looks=2)
    stuck = looks.ask(1)
    await looks.until_begun(1)
    others = looks.ask(2, 3)
    await looks.until_begun(2)
    looks.end(2)
    assert await asyncio.gather(*others) == [4, 6]
    late = looks.ask(4)
    await looks.until_begun(3)
    looks.end(3)
    assert await asyncio.gather(*late) == [8]
    assert not stuck[0].done()
    looks.end(1)
    assert await stuck[0] == 2


async def test_there_are_so_many_looks_at_most() -> None:
    looks = Looks(looks=2)
    everyone = looks.ask(1)
    await looks.until_begun(1)
    everyone += looks.ask(2)
    await looks.until_begun(2)
    everyone += looks.ask(3)
    # Well past the time after which another one would begin.
    await asyncio.sleep(0.3)
    assert looks.begun == [[1], [2]]
    looks.end(1)
    looks.end(2)
    await looks.until_begun(3)
    looks.end(3)
    assert await asyncio.gather(*everyone) == [2, 4, 6]


async def test_a_look_that_is_ended_leaves_nobody_waiting() -> None:
    looks = Looks()
    first = looks.ask(1)
    await looks.until_begun(1)
    others = looks.ask(2, 3)
    await asyncio.sleep(0)
    looks.end(1)
    await first[0]
    await looks.until_begun(2)
    (under_way,) = looks.together._tasks
    under_way.cancel()
    told = await asyncio.gather(*others, return_exceptions=True)
    assert all(isinstance(each, asyncio.CancelledError) for each in told)
    last = looks.ask(4)
    await looks.until_begun(3)
    looks.end(3)
    assert await last[0] == 8
