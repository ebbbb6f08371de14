"""Lookups that are done at one go, and what each caller gets of them."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence

import pytest

from exportd_server.errors import LedgerUnavailable
from exportd_server.jobs.ledger import together
from exportd_server.jobs.ledger.together import Together
from tests.support.waits import ENOUGH


class Looks:
    """Looks that end when they are let; what is found under a key is its double."""

    def __init__(self, *, at_once: int = 100, quick: int = 1, looks: int = 1) -> None:
        self.begun: list[list[int]] = []
        self.open: list[asyncio.Event] = []
        self.at_once = False
        """Looks need not be let."""
        self.broken: dict[int, Exception] = {}
        self.large: set[int] = set()
        """Left out where there are others."""
        self._began = asyncio.Condition()
        self.together = Together(self._look, at_once=at_once, quick=quick, looks=looks)

    async def _look(self, keys: Sequence[int]) -> dict[int, int]:
        gate = asyncio.Event()
        self.open.append(gate)
        async with self._began:
            self.begun.append([*keys])
            self._began.notify_all()
        if not self.at_once:
            await gate.wait()
        for key in keys:
            if key in self.broken:
                raise self.broken[key]
        return {key: 2 * key for key in keys if len(keys) == 1 or key not in self.large}

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
    looks.broken = {2: ValueError("odd")}
    everyone = looks.ask(0, 1, 2, 2, 3)
    # Those who failed at one go are looked up by themselves.
    for number in range(1, 6):
        await looks.until_begun(number)
        looks.end(number)
    told = await asyncio.gather(*everyone, return_exceptions=True)
    assert [told[0], told[1], told[4]] == [0, 2, 6]
    assert told[2] is told[3] is looks.broken[2]
    assert looks.begun == [[0], [1, 2, 3], [1], [2], [3]]


async def test_a_ledger_that_is_away_is_told_to_all_without_asking_again() -> None:
    looks = Looks()
    looks.broken = dict.fromkeys(range(20), LedgerUnavailable())
    everyone = looks.ask(*range(20))
    await looks.until_begun(1)
    looks.at_once = True
    looks.end(1)
    told = await asyncio.gather(*everyone, return_exceptions=True)
    assert all(isinstance(each, LedgerUnavailable) for each in told)
    assert len(looks.begun) == 2


async def test_what_is_left_out_is_looked_up_by_itself_and_holds_up_nobody() -> None:
    looks = Looks()
    looks.large = {2}
    everyone = looks.ask(0, 1, 2, 3)
    await looks.until_begun(1)
    looks.end(1)
    await looks.until_begun(2)
    looks.end(2)
    assert await asyncio.gather(*everyone[:2], everyone[3]) == [0, 2, 6]
    await looks.until_begun(3)
    later = looks.ask(4)
    await looks.until_begun(4)
    looks.end(4)
    assert await later[0] == 8
    assert not everyone[2].done()
    looks.end(3)
    assert await everyone[2] == 4
    assert looks.begun == [[0], [1, 2, 3], [2], [4]]


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


async def test_nobody_waits_longer_beside_a_look_that_has_taken_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = Looks(looks=2)
    stuck = looks.ask(1)
    await looks.until_begun(1)
    others = looks.ask(2)
    await looks.until_begun(2)
    looks.end(2)
    assert await others[0] == 4
    # From here on nobody's patience ends: what waited for that would wait for ever.
    monkeypatch.setattr(together, "_PATIENCE", 1e6)
    looks.at_once = True
    async with asyncio.timeout(ENOUGH):
        assert [await looks.together.find(key) for key in range(50)] == [*range(0, 100, 2)]
        found = await asyncio.gather(*looks.ask(*range(50)))
        assert [*found] == [*range(0, 100, 2)]
    looks.end(1)
    assert await stuck[0] == 2


async def test_several_looks_may_be_under_way_where_they_gain_by_it() -> None:
    looks = Looks(at_once=2, quick=2, looks=3)
    everyone = looks.ask(0, 1, 2, 3, 4)
    await looks.until_begun(2)
    looks.end(1)
    await looks.until_begun(3)
    looks.at_once = True
    looks.end(2)
    looks.end(3)
    assert [await each for each in everyone] == [0, 2, 4, 6, 8]
    assert looks.begun == [[0], [1], [2, 3], [4]]


async def test_large_ones_are_looked_up_one_after_the_other_and_once_for_all() -> None:
    looks = Looks(looks=2)
    looks.large = {2, 3}
    everyone = looks.ask(0, 1, 2, 3, 3)
    for number in (1, 2):
        await looks.until_begun(number)
        looks.end(number)
    await looks.until_begun(3)
    more = looks.ask(5, 3, 3)
    await looks.until_begun(4)
    looks.at_once = True
    looks.end(4)
    assert await more[0] == 10
    looks.end(3)
    assert [await each for each in everyone + more] == [0, 2, 4, 6, 6, 10, 6, 6]
    # The first look at 3 had not begun when more asked for it.
    assert looks.begun[2:] in ([[2], [5], [3], [3]], [[2], [5, 3], [3]])


async def test_many_who_go_away_at_once_leave_the_others_theirs() -> None:
    looks = Looks(at_once=2)
    first, *others = looks.ask(*range(8))
    await looks.until_begun(1)
    looks.at_once = True
    # All in one turn of the loop: those who wait have not been told yet.
    first.cancel()
    for other in others[:-1]:
        other.cancel()
    async with asyncio.timeout(ENOUGH):
        assert await others[-1] == 14
        assert await looks.together.find(9) == 18
    assert not looks.together._under_way


async def test_what_nobody_waits_for_any_more_is_not_looked_up() -> None:
    looks = Looks()
    first, gone, kept = looks.ask(1, 2, 3)
    await looks.until_begun(1)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert list(looks.together._waiting) == [3]
    looks.at_once = True
    looks.end(1)
    assert [await first, await kept] == [2, 6]
    assert looks.begun == [[1], [3]]


def test_a_loop_that_ends_leaves_nothing_behind(
    caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    gc.collect()  # what others have left
    recwarn.clear()
    caplog.clear()
    looks: list[Looks] = []

    async def left_waiting() -> None:
        looks.append(Looks())
        looks[0].ask(1, 2, 3)
        await looks[0].until_begun(1)

    asyncio.run(left_waiting())
    gc.collect()
    assert not caplog.records
    assert not recwarn.list
    assert not looks[0].together._under_way
    assert looks[0].begun == [[1]]


async def test_there_are_so_many_looks_at_most() -> None:
    looks = Looks(looks=2)
    everyone = looks.ask(1)
    await looks.until_begun(1)
    everyone += looks.ask(2)
    await looks.until_begun(2)
    everyone += looks.ask(3)
    # As it is once both have taken long.
    for look in [*looks.together._under_way]:
        look._has_taken_long()
    await asyncio.sleep(0)
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
