"""What those who wait may rely on of a ledger: no wake-up is missed, nothing leaks.

Waits that must end are given a limit far beyond what they take; `asyncio.timeout` below
it turns a missed wake-up into a failure.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from pathlib import Path

import pytest

from exportd_server.errors import ErrorReason, ErrorRecord
from exportd_server.jobs.ledger.base import TaskKind
from exportd_server.jobs.ledger.sql import SqlLedger
from tests.support.ledger import (
    BACKENDS,
    CLEANUP,
    EXPORT,
    LEASE,
    REAP,
    Backend,
    World,
    part,
)
from tests.support.waits import ENOUGH

LONG = 600.0
SOURCE_DOWN = ErrorRecord(ErrorReason.SOURCE_FAILED, "down")


@pytest.fixture(params=list(BACKENDS.values()), ids=list(BACKENDS))
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    backend: Backend = request.param
    async with backend(tmp_path, request) as world:
        yield world


async def wakes(waiting: Awaitable[object]) -> None:
    async with asyncio.timeout(ENOUGH):
        await waiting


async def stays_asleep(world: World) -> bool:
    """Whether a wait for work outlasts a time that a wake-up would not need."""
    waiting = asyncio.create_task(world.ledger.wait_for_work(LONG))
    done, _ = await asyncio.wait([waiting], timeout=0.1)
    waiting.cancel()
    return not done


async def test_new_work_wakes_those_who_wait_for_it(world: World) -> None:
    assert await world.claim() is None
    waiting = [asyncio.create_task(world.ledger.wait_for_work(LONG)) for _ in range(3)]
    await world.create()
    await wakes(asyncio.gather(*waiting))


async def test_work_that_came_between_the_claim_and_the_wait_is_not_missed(
    world: World,
) -> None:
    assert await world.claim() is None
    await world.create()
    await wakes(world.ledger.wait_for_work(LONG))


async def test_another_workers_vain_claim_takes_nobodys_wake_up(world: World) -> None:
    """Workers share the ledger: one looks before the job is there, one after it, for
    another kind of task; both then wait, in either order."""
    assert await world.claim(EXPORT) is None
    await world.create()
    assert await world.claim(CLEANUP) is None
    await wakes(world.ledger.wait_for_work(LONG))
    assert await world.claim(EXPORT) is not None


async def test_nobody_spins_over_work_that_is_not_for_him(world: World) -> None:
    """A job is due and nobody claims it; an expired lease likewise."""
    await world.create()
    await world.lease(REAP)
    world.clock.advance(100)
    for _ in range(2):
        assert await world.claim(CLEANUP) is None
        if await stays_asleep(world):
            break
    else:
        pytest.fail("the wait never slept")


async def test_a_wait_without_work_ends_after_its_time(world: World) -> None:
    assert await world.claim() is None
    await wakes(world.ledger.wait_for_work(0.05))
    await wakes(world.ledger.wait_for_work(0))


@pytest.mark.parametrize(
    "cause", ["release", "failure", "shards", "slot", "cancel", "cleanup", "restart"]
)
async def test_whatever_makes_a_task_due_wakes_the_waiting(
    world: World, cause: str
) -> None:
    job = await world.create()
    lease = await world.lease()
    waiting_job = await world.create()
    causes: dict[str, Callable[[], Awaitable[object]]] = {
        "release": lambda: world.ledger.release(lease),
        "failure": lambda: world.ledger.fail_attempt(
            lease, SOURCE_DOWN, retry_in=timedelta(0)
        ),
        "shards": lambda: world.plan(lease, 2),
        "cancel": lambda: world.ledger.cancel_job("acme", job.job_id),
        "cleanup": lambda: world.ledger.cancel_job("acme", waiting_job.job_id),
        "restart": lambda: world.ledger.restart_output(lease),
    }
    if cause == "slot":
        shard = await world.plan(lease)
        await world.ledger.add_part(shard, part(shard))
        causes["slot"] = lambda: world.ledger.complete_shard(shard)
    assert await world.claim(limit=1) is None
    waiting = asyncio.create_task(world.ledger.wait_for_work(LONG))
    await asyncio.sleep(0)
    await causes[cause]()
    await wakes(waiting)
    kinds = CLEANUP if cause == "cleanup" else EXPORT
    assert await world.claim(kinds, limit=1) is not None


async def test_a_retry_that_comes_due_wakes_the_waiting(world: World) -> None:
    _, lease = await world.running()
    await world.ledger.fail_attempt(lease, SOURCE_DOWN, retry_in=timedelta(milliseconds=50))
    assert await world.claim() is None
    waiting = asyncio.create_task(world.ledger.wait_for_work(LONG))
    world.clock.advance(0.05)
    await wakes(waiting)
    assert await world.claim() is not None


async def test_a_retry_that_came_due_before_the_wait_wakes_it_at_once(
    world: World,
) -> None:
    _, lease = await world.running()
    await world.ledger.fail_attempt(lease, SOURCE_DOWN, retry_in=timedelta(seconds=900))
    assert await world.claim() is None
    world.clock.advance(900)
    await wakes(world.ledger.wait_for_work(LONG))
    assert await world.claim() is not None


async def test_of_several_tasks_that_come_due_together_each_wakes_somebody(
    world: World,
) -> None:
    for _ in range(2):
        _, lease = await world.running()
        await world.ledger.fail_attempt(lease, SOURCE_DOWN, retry_in=timedelta(seconds=9))
    assert await world.claim() is None
    waiting = asyncio.create_task(world.ledger.wait_for_work(LONG))
    await asyncio.sleep(0)
    world.clock.advance(9)
    assert await world.claim() is not None, "the other worker takes one"
    await wakes(waiting)
    assert await world.claim() is not None


async def test_a_lease_that_runs_out_wakes_the_waiting(world: World) -> None:
    await world.create()
    lease = await world.ledger.claim("dying", EXPORT, lease=timedelta(milliseconds=50))
    assert lease is not None
    assert await world.claim() is None
    waiting = asyncio.create_task(world.ledger.wait_for_work(LONG))
    world.clock.advance(0.05)
    await wakes(waiting)
    assert (await world.lease()).task_id == lease.task_id


async def test_a_change_wakes_everybody_who_watches_the_job(world: World) -> None:
    job, other = await world.create(), await world.create("other")
    watching = [
        asyncio.create_task(world.ledger.wait_for_change(job.job_id, job.revision, LONG))
        for _ in range(50)
    ]
    elsewhere = asyncio.create_task(
        world.ledger.wait_for_change(other.job_id, other.revision, LONG)
    )
    await asyncio.sleep(0)
    await world.ledger.cancel_job("acme", job.job_id)
    await wakes(asyncio.gather(*watching))
    assert not elsewhere.done()
    elsewhere.cancel()


async def test_a_change_that_has_been_is_not_waited_for(world: World) -> None:
    job = await world.create()
    await world.lease()
    await wakes(world.ledger.wait_for_change(job.job_id, job.revision, LONG))


async def test_an_old_change_wakes_nobody_who_has_seen_it(world: World) -> None:
    job, lease = await world.running()
    await world.ledger.record_progress(lease, rows=1, bytes_=1, rows_per_second=1)
    seen = await world.job(job)
    waiting = asyncio.create_task(
        world.ledger.wait_for_change(job.job_id, seen.revision, LONG)
    )
    done, _ = await asyncio.wait([waiting], timeout=0.1)
    assert not done
    await world.ledger.record_progress(lease, rows=2, bytes_=2, rows_per_second=1)
    await wakes(waiting)


async def test_waiting_for_a_job_ends_when_it_is_gone(world: World) -> None:
    job = await world.succeeded()
    waiting = asyncio.create_task(
        world.ledger.wait_for_change(job.job_id, job.revision, LONG)
    )
    await asyncio.sleep(0)
    await world.ledger.delete_job("acme", job.job_id)
    await wakes(waiting)
    await wakes(world.ledger.wait_for_change(job.job_id, 10**9, LONG))
    await wakes(world.ledger.wait_for_change("never-was", 0, LONG))


async def test_watching_a_job_ends_after_its_time(world: World) -> None:
    job = await world.create()
    await wakes(world.ledger.wait_for_change(job.job_id, job.revision, 0.05))


async def test_every_change_reaches_a_watcher_that_keeps_up(world: World) -> None:
    """A watcher that waits from what it has read never sleeps through the last change."""
    job, lease = await world.running()

    async def watch() -> int:
        seen = job
        while not seen.state.terminal:
            await world.ledger.wait_for_change(job.job_id, seen.revision, LONG)
            seen = await world.job(job)
        return seen.revision

    watching = asyncio.create_task(watch())
    for rows in range(100):
        await world.ledger.record_progress(lease, rows=rows, bytes_=1, rows_per_second=1)
    await world.finish(lease)
    async with asyncio.timeout(ENOUGH):
        assert await watching == (await world.job(job)).revision


async def test_waits_leave_nothing_behind(world: World) -> None:
    assert isinstance(world.ledger, SqlLedger)
    signals = world.ledger._database.signals
    job = await world.create()
    await world.lease()
    seen = await world.job(job)
    for _ in range(3):
        assert await world.claim() is None
        tasks = [
            asyncio.create_task(world.ledger.wait_for_work(LONG)),
            asyncio.create_task(
                world.ledger.wait_for_change(job.job_id, seen.revision, LONG)
            ),
        ]
        await asyncio.wait(tasks, timeout=0.05)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await world.ledger.wait_for_change(job.job_id, seen.revision, 0)
    assert not list(signals.waiting())
    assert signals.idlers() == 0


async def test_a_claim_that_is_cancelled_half_way_gives_its_lease_back(
    world: World,
) -> None:
    job = await world.create()
    claiming = asyncio.create_task(world.claim())
    await asyncio.sleep(0)
    claiming.cancel()
    with pytest.raises(asyncio.CancelledError):
        await claiming
    # The job changes twice: it is taken up, and given back.
    revision = job.revision
    async with asyncio.timeout(ENOUGH):
        while revision < job.revision + 2:
            await world.ledger.wait_for_change(job.job_id, revision, LONG)
            revision = (await world.job(job)).revision
    lease = await world.lease()
    assert (lease.kind, lease.attempt) == (TaskKind.PLAN, 1)


@pytest.mark.parametrize("backend", list(BACKENDS.values()), ids=list(BACKENDS))
async def test_closing_wakes_everybody(
    backend: Backend, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    async with backend(tmp_path, request) as world:
        job = await world.create()
        assert await world.claim(CLEANUP) is None
        waiting = [
            asyncio.create_task(world.ledger.wait_for_work(LONG)),
            asyncio.create_task(
                world.ledger.wait_for_change(job.job_id, job.revision, LONG)
            ),
        ]
        await asyncio.wait(waiting, timeout=0.1)
    await wakes(asyncio.gather(*waiting))


async def test_a_lease_outlives_the_ledger_that_gave_it(world: World) -> None:
    """Closing releases nothing: leases run out, or were released."""
    _, lease = await world.running()
    before = world.dump()
    await world.ledger.close()
    assert world.dump() == before
    assert lease.expires_at == world.clock.now() + LEASE
