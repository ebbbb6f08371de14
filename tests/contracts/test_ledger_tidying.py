"""What housekeeping may rely on of a ledger: cleanups, expiry, bounded records."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from exportd_server.errors import ErrorReason, ErrorRecord
from exportd_server.jobs.ledger.base import JobQuery, Lease
from exportd_server.jobs.model import Job, JobState
from tests.support.ledger import BACKENDS, CLEANUP, REAP, Backend, World, part

DISK_BUSY = ErrorRecord(ErrorReason.STORE_FAILED, "busy")
INTERVAL = timedelta(seconds=300)


@pytest.fixture(params=list(BACKENDS.values()), ids=list(BACKENDS))
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    backend: Backend = request.param
    async with backend(tmp_path, request) as world:
        yield world


async def expire(world: World, limit: int = 100) -> int:
    lease = await world.lease(REAP)
    expired = await world.ledger.expire_jobs(lease, limit=limit)
    await world.ledger.complete_reap(lease, again_in=timedelta(0))
    return expired


async def cancelled(world: World) -> Job:
    job = await world.create()
    await world.ledger.cancel_job("acme", job.job_id)
    return job


async def failed(world: World) -> Job:
    job, lease = await world.running()
    await world.ledger.fail_attempt(lease, DISK_BUSY, retry_in=None)
    return job


# --- cleanups


async def cleanup_of_a_disturbed_success(world: World) -> tuple[Job, Lease]:
    job, lease = await world.running()
    await world.ledger.add_part(lease, part(lease))
    await world.ledger.release(lease)
    await world.finish(await world.lease(), 1)
    return await world.job(job), await world.lease(CLEANUP)


async def test_the_parts_of_a_good_output_stay(world: World) -> None:
    job, cleanup = await cleanup_of_a_disturbed_success(world)
    assert job.manifest is not None
    assert await world.ledger.kept_parts(cleanup) == list(job.manifest.parts)


async def test_nothing_of_an_expired_output_stays(world: World) -> None:
    job, cleanup = await cleanup_of_a_disturbed_success(world)
    world.clock.advance(job.spec.ttl.total_seconds())
    assert await world.ledger.kept_parts(cleanup) is None


async def test_nothing_of_a_deleted_output_stays(world: World) -> None:
    job, cleanup = await cleanup_of_a_disturbed_success(world)
    await world.ledger.delete_job("acme", job.job_id)
    assert await world.ledger.kept_parts(cleanup) is None


async def test_nothing_of_a_cancelled_or_failed_output_stays(world: World) -> None:
    await cancelled(world)
    assert await world.ledger.kept_parts(await world.lease(CLEANUP)) is None
    await failed(world)
    assert await world.ledger.kept_parts(await world.lease(CLEANUP)) is None


async def test_a_cleanup_that_failed_is_always_due_again(world: World) -> None:
    await cancelled(world)
    for attempt in range(1, 20):
        lease = await world.lease(CLEANUP)
        assert lease.attempt == attempt
        again_in = timedelta(seconds=5) if attempt % 2 else None
        assert not await world.ledger.fail_attempt(lease, DISK_BUSY, retry_in=again_in)
        assert await world.claim(CLEANUP) is None
        world.clock.advance(10)
    for _ in range(20):
        await world.lease(CLEANUP)  # and its worker dies
        world.clock.advance(15)
    assert len(await world.work_off()) == 1


async def test_a_released_cleanup_is_due_at_once(world: World) -> None:
    await cancelled(world)
    await world.ledger.release(await world.lease(CLEANUP))
    assert (await world.lease(CLEANUP)).attempt == 1


async def test_a_forgotten_job_takes_its_other_cleanups_along(world: World) -> None:
    job = await cancelled(world)
    other = await world.lease(CLEANUP)
    await world.ledger.delete_job("acme", job.job_id)
    [forgot] = await world.work_off()
    assert forgot.forget
    assert await world.ledger.renew([other], timedelta(seconds=15)) == [other]


# --- expiry


async def test_all_final_states_age_alike_and_unfinished_jobs_never(world: World) -> None:
    ended = [await cancelled(world), await failed(world), await world.succeeded()]
    running, _ = await world.running()
    waiting = await world.create()
    ttl = running.spec.ttl.total_seconds()
    world.clock.advance(ttl - 0.000_001)
    assert await expire(world) == 0
    world.clock.advance(0.000_001)
    assert await expire(world) == len(ended)
    assert await expire(world) == 0
    left = await world.ledger.list_jobs("acme", JobQuery(), limit=10)
    assert {job.job_id for job in left} == {running.job_id, waiting.job_id}
    for job in ended:
        assert await world.ledger.get_job("acme", job.job_id) is None
    world.clock.advance(10 * ttl)
    assert await expire(world) == 0


async def test_the_longest_expired_go_first_and_no_more_than_asked(world: World) -> None:
    jobs = []
    for _ in range(5):
        jobs.append(await cancelled(world))
        world.clock.advance(1)
    world.clock.advance(jobs[0].spec.ttl.total_seconds())
    assert await expire(world, limit=2) == 2
    known = [await world.ledger.get_job("acme", job.job_id) for job in jobs]
    assert [job is None for job in known] == [True, True, False, False, False]
    assert await expire(world, limit=2) == 2
    assert await expire(world, limit=2) == 1


async def test_an_expired_jobs_output_goes_before_its_record(world: World) -> None:
    job = await world.succeeded()
    world.clock.advance(job.spec.ttl.total_seconds())
    await expire(world)
    lease = await world.lease(CLEANUP)
    assert (lease.job_id, lease.forget) == (job.job_id, True)
    assert await world.ledger.kept_parts(lease) is None
    assert await world.ledger.known_jobs([job.job_id]) == {job.job_id}
    await world.ledger.complete_cleanup(lease)
    assert await world.ledger.known_jobs([job.job_id]) == set()


async def test_there_is_one_reap_task_and_it_returns_for_ever(world: World) -> None:
    for _ in range(20):
        lease = await world.lease(REAP)
        assert (lease.tenant, lease.job_id) == ("", "")
        assert await world.claim(REAP) is None
        await world.ledger.complete_reap(lease, again_in=INTERVAL)
        world.clock.advance(299)
        assert await world.claim(REAP) is None
        world.clock.advance(1)
    for _ in range(20):
        await world.lease(REAP)  # and its worker dies
        world.clock.advance(15)
    lease = await world.lease(REAP)
    assert not await world.ledger.fail_attempt(lease, DISK_BUSY, retry_in=None)
    world.clock.advance(10)
    await world.ledger.release(await world.lease(REAP))
    assert await world.claim(REAP) is not None


async def test_nothing_is_left_of_jobs_that_were_forgotten(world: World) -> None:
    before = {name: len(rows) for name, rows in world.dump().items()}
    for tenant in ("a", "b"):
        for _ in range(3):
            await world.succeeded(tenant)
    for tenant in ("a", "b"):
        for _ in range(3):
            await world.create(tenant, labels={"k": "v"})
    for job in [
        *await world.ledger.list_jobs("a", JobQuery(), limit=10),
        *await world.ledger.list_jobs("b", JobQuery(), limit=10),
    ]:
        await world.ledger.cancel_job(job.tenant, job.job_id)
    world.clock.advance(timedelta(days=2).total_seconds())
    assert await expire(world) == 12
    await world.work_off()
    assert {name: len(rows) for name, rows in world.dump().items()} == before


async def test_known_jobs_are_those_with_a_record_of_any_tenant(world: World) -> None:
    mine, theirs = await world.create("a"), await world.create("b")
    asked = [mine.job_id, theirs.job_id, *(f"stray-{n}" for n in range(25_000))]
    assert await world.ledger.known_jobs(asked) == {mine.job_id, theirs.job_id}
    assert await world.ledger.known_jobs([]) == set()
    assert mine.state is JobState.PENDING
