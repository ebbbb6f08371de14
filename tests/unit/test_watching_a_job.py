"""Who watches a job hears of each change once, and of none in vain."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from exportd_server.jobs.ledger.signals import Changes, Signals

JOB = "a job"


async def returns(wait: Awaitable[None]) -> bool:
    """Whether it does so by itself: nothing else happens meanwhile."""
    waiting = asyncio.ensure_future(wait)
    for _ in range(10):
        await asyncio.sleep(0)
    done = waiting.done()
    waiting.cancel()
    await asyncio.wait({waiting})
    return done


async def test_what_changed_between_the_look_and_the_wait_is_not_missed() -> None:
    signals = Signals()
    with signals.watch(JOB) as changes:
        signals.spread(Changes(revisions={JOB: 4}))
        assert await returns(changes.passed(3))
        assert not await returns(changes.passed(4))


async def test_news_of_what_was_seen_already_or_of_another_job_wakes_nobody() -> None:
    signals = Signals()
    with signals.watch(JOB) as changes:
        waiting = asyncio.ensure_future(changes.passed(4))
        await asyncio.sleep(0)
        signals.spread(Changes(revisions={JOB: 4, "another": 9}))
        assert not await returns(asyncio.shield(waiting))
        signals.spread(Changes(revisions={JOB: 5}))
        await waiting


async def test_when_nobody_knows_one_look_is_taken_and_then_waited_again() -> None:
    signals = Signals()
    with signals.watch(JOB) as changes, signals.watch(JOB) as other:
        signals.everyone()
        for each in (changes, other):
            assert await returns(each.passed(3))
            assert not await returns(each.passed(3))
        signals.spread(Changes(revisions={JOB: 4}))
        assert await returns(changes.passed(3))


async def test_who_goes_away_leaves_nothing_behind() -> None:
    signals = Signals()
    with signals.watch(JOB):
        with signals.watch(JOB):
            pass
        assert list(signals.waiting()) == [JOB]
    assert list(signals.waiting()) == []
