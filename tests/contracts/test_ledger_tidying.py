"""What housekeeping may rely on of a ledger: cleanups, expiry, bounded records."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import pytest

from exportd_server.errors import ErrorReason, ErrorRecord
from exportd_server.jobs.ledger.base import JobQuery, Kept, LastPart, Lease, LeaseLost
from exportd_server.jobs.model import Job, JobState
from exportd_server.store.key import JobPrefix
from tests.support.ledger import (
    BACKENDS,
    CLEANUP,
    REAP,
    SWEEP,
    Backend,
    World,
    errors,
    part,
)

DISK_BUSY = ErrorRecord(ErrorReason.STORE_FAILED, "busy")
INTERVAL = timedelta(seconds=300)
PIN = timedelta(seconds=60)
HOUR = timedelta(hours=1)


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
    assert await world.ledger.kept_parts(cleanup) == Kept(job.manifest.parts)


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


# --- the manifest in the store


async def test_of_the_last_shard_it_is_told_what_will_be_published_and_nothing_changes(
    world: World,
) -> None:
    job, first = await world.running(2)
    second = await world.lease()
    for lease in (first, second):
        await world.ledger.add_part(lease, part(lease))
    assert await world.ledger.complete_unless_last(first) is None
    before = world.dump()
    told = await world.ledger.complete_unless_last(second)
    assert world.dump() == before
    assert await world.ledger.complete_shard(second, manifest=True)
    assert (await world.job(job)).manifest == told
    for late in (first, second):
        with pytest.raises(LeaseLost):
            await world.ledger.complete_unless_last(late)


async def test_the_last_part_of_the_last_shard_tells_what_will_be_published(
    world: World,
) -> None:
    job, first = await world.running(2)
    second = await world.lease()
    await world.ledger.add_part(first, part(first, 0))
    added = await world.ledger.add_last_part(first, part(first, 1), errors(first, 1))
    assert added == LastPart([], None), "another shard is unfinished"
    assert await world.ledger.complete_unless_last(first) is None
    for _ in range(2):
        # Of an answer that was lost nobody knows whether it was recorded.
        told = (await world.ledger.add_last_part(second, part(second))).manifest
        before = world.dump()
        assert await world.ledger.complete_unless_last(second) == told
        assert world.dump() == before
    assert told is not None
    assert len(told.parts) == 3
    assert len(told.error_parts) == 1
    assert await world.ledger.complete_shard(second, manifest=True)
    assert (await world.job(job)).manifest == told


async def test_the_last_part_of_the_only_shard_is_recorded_with_the_jobs_end(
    world: World,
) -> None:
    job, lease = await world.running()
    await world.ledger.add_part(lease, part(lease, 0))
    last = (part(lease, 1, rows=7, size=70), errors(lease, 1))
    with pytest.raises(ValueError, match="is not the next one"):
        await world.ledger.complete_only_shard(lease, part(lease, 2))
    await world.ledger.record_progress(lease, rows=999, bytes_=999, rows_per_second=1)
    assert await world.ledger.complete_only_shard(lease, *last) == []
    done = await world.job(job)
    assert done.state is JobState.SUCCEEDED
    assert done.manifest is not None
    assert done.manifest.parts == (part(lease, 0), last[0])
    assert done.manifest.error_parts == (last[1],)
    assert (done.progress.rows, done.progress.bytes) == (17, 210)
    assert (done.progress.row_errors, done.progress.parts_done) == (3, 2)
    before = world.dump()
    assert await world.ledger.complete_only_shard(lease, *last) == [], "an answer is lost"
    assert world.dump() == before
    assert await world.ledger.delete_job(job.tenant, job.job_id) is JobState.SUCCEEDED


async def test_a_part_is_not_recorded_with_a_jobs_end_that_has_not_come(
    world: World,
) -> None:
    _, lease = await world.running(2)
    before = world.dump()
    with pytest.raises(ValueError, match="another shard"):
        await world.ledger.complete_only_shard(lease, part(lease))
    assert world.dump() == before


async def test_the_manifest_that_was_named_stays_and_no_other_one(world: World) -> None:
    job, lease = await world.running()
    await world.ledger.release(lease)
    lease = await world.lease()
    await world.ledger.add_part(lease, part(lease))
    await world.ledger.complete_shard(lease, manifest=True)
    manifest = (await world.job(job)).manifest
    assert manifest is not None
    kept = await world.ledger.kept_parts(await world.lease(CLEANUP))
    assert kept == Kept(manifest.parts, lease.token)


# --- outputs that are being read


async def pinned(world: World, job: Job, reader: str = "r") -> bool:
    return await world.ledger.pin_output(job.tenant, job.job_id, reader, length=PIN)


async def expired_and_pinned(world: World) -> Job:
    """A job that has been hidden since its pin was made a second before it expired."""
    job = await world.succeeded()
    world.clock.advance(job.spec.ttl.total_seconds() - 1)
    assert await pinned(world, job)
    world.clock.advance(1)
    assert await expire(world) == 1
    return job


async def test_a_pinned_output_stays_although_it_has_expired_and_is_refused(
    world: World,
) -> None:
    job = await expired_and_pinned(world)
    assert await world.ledger.get_job(job.tenant, job.job_id) is None
    cleanup = await world.lease(CLEANUP)
    assert await world.ledger.kept_parts(cleanup) == Kept(read=True)
    assert not await world.ledger.is_cut(job.job_id, "r")
    await world.ledger.unpin_output(job.job_id, "r")
    assert await world.ledger.kept_parts(cleanup) is None
    assert await world.ledger.is_cut(job.job_id, "r")


async def test_a_pin_is_prolonged_for_as_long_as_it_takes_and_else_runs_out(
    world: World,
) -> None:
    job = await expired_and_pinned(world)
    for _ in range(5):
        world.clock.advance(20)
        assert await pinned(world, job)
    world.clock.advance(PIN.total_seconds() - 0.000_001)
    cleanup = await world.lease(CLEANUP)
    assert await world.ledger.kept_parts(cleanup) == Kept(read=True)
    world.clock.advance(0.000_001)
    assert await world.ledger.kept_parts(cleanup) is None
    # Once a cleanup was told to delete, nobody can get in its way.
    assert not await pinned(world, job)
    assert await world.ledger.kept_parts(cleanup) is None


async def test_who_comes_after_the_expiry_cannot_pin_beside_one_who_came_before(
    world: World,
) -> None:
    job = await expired_and_pinned(world)
    assert not await pinned(world, job, "late")
    assert await world.ledger.is_cut(job.job_id, "late")
    fresh = await world.succeeded()
    world.clock.advance(fresh.spec.ttl.total_seconds())
    assert not await pinned(world, fresh), "expired, and not hidden yet"


async def test_each_reader_has_a_pin_of_its_own(world: World) -> None:
    job = await world.succeeded()
    assert await pinned(world, job, "r")
    assert await pinned(world, job, "s")
    world.clock.advance(job.spec.ttl.total_seconds())
    assert not await pinned(world, job, "r"), "it has run out"
    job = await world.succeeded()
    world.clock.advance(job.spec.ttl.total_seconds() - 1)
    assert await pinned(world, job, "r")
    assert await pinned(world, job, "s")
    world.clock.advance(1)
    await expire(world)
    await world.ledger.unpin_output(job.job_id, "r")
    assert await pinned(world, job, "s")
    assert not await pinned(world, job, "r")


async def test_only_a_readable_output_of_the_own_tenant_is_pinned(world: World) -> None:
    running, _ = await world.running()
    others = [await cancelled(world), await failed(world), running]
    for job in others:
        assert not await pinned(world, job)
    good = await world.succeeded()
    assert not await world.ledger.pin_output("rival", good.job_id, "r", length=PIN)
    assert not await world.ledger.pin_output("acme", "no-such", "r", length=PIN)
    await world.ledger.unpin_output("no-such", "r")
    assert world.dump()["pins"] == []


async def test_a_pin_holds_up_neither_a_delete_nor_the_cut_of_its_reader(
    world: World,
) -> None:
    job = await world.succeeded()
    assert await pinned(world, job)
    await world.ledger.delete_job("acme", job.job_id)
    assert await world.ledger.is_cut(job.job_id, "r")
    assert not await pinned(world, job)
    assert await world.ledger.kept_parts(await world.lease(CLEANUP)) is None


async def test_what_is_cut_is_told_and_what_expires_is_not(world: World) -> None:
    doomed, _ = await world.running()
    deleted, expiring = await world.succeeded(), await world.succeeded()
    told: list[str] = []
    with (
        world.ledger.on_cut(doomed.job_id, lambda: told.append("doomed")),
        world.ledger.on_cut(deleted.job_id, lambda: told.append("deleted")),
        world.ledger.on_cut(expiring.job_id, lambda: told.append("expiring")),
    ):
        await world.ledger.cancel_job("acme", doomed.job_id)
        await world.ledger.cancel_job("acme", doomed.job_id)
        await world.ledger.delete_job("acme", deleted.job_id)
        await world.ledger.get_job("acme", expiring.job_id)
        assert told == ["doomed", "deleted"]
        assert await world.ledger.is_cut(doomed.job_id, "r")
        assert await world.ledger.is_cut(deleted.job_id, "r")
        world.clock.advance(expiring.spec.ttl.total_seconds())
        assert await expire(world) == 2
        assert told == ["doomed", "deleted"]


async def test_nothing_is_left_of_the_pins_of_dead_readers(world: World) -> None:
    await expired_and_pinned(world)
    world.clock.advance(PIN.total_seconds())
    await world.work_off()
    assert world.dump()["pins"] == []


# --- output without a job


def stray(number: int, tenant: str = "acme") -> JobPrefix:
    return JobPrefix(tenant, str(UUID(int=2**100 + number)))


async def look(world: World, *found: JobPrefix) -> set[JobPrefix]:
    lease = await world.lease(SWEEP)
    old = await world.ledger.note_orphans(lease, found, after=HOUR)
    await world.ledger.complete_sweep(lease, again_in=timedelta(0))
    return set(old)


async def test_an_orphan_is_one_at_two_looks_an_hour_apart(world: World) -> None:
    job = JobPrefix("acme", (await world.create()).job_id)
    one, other = stray(1), stray(2, "rival")
    assert await look(world, one, job) == set()
    world.clock.advance(HOUR.total_seconds() - 1)
    assert await look(world, one, other, job) == set()
    world.clock.advance(1)
    assert await look(world, job, one, other) == {one}
    world.clock.advance(HOUR.total_seconds())
    assert await look(world, job, other) == {other}


async def test_what_was_gone_in_between_is_looked_at_anew(world: World) -> None:
    assert await look(world, stray(1)) == set()
    world.clock.advance(HOUR.total_seconds())
    assert await look(world) == set()
    assert world.dump()["orphans"] == []
    assert await look(world, stray(1)) == set()


async def test_a_hidden_job_is_no_orphan_until_it_is_forgotten(world: World) -> None:
    job = await world.succeeded()
    prefix = JobPrefix(job.tenant, job.job_id)
    await world.ledger.delete_job(job.tenant, job.job_id)
    await look(world, prefix)
    world.clock.advance(HOUR.total_seconds())
    assert await look(world, prefix) == set()
    await world.work_off()
    assert await look(world, prefix) == set()
    world.clock.advance(HOUR.total_seconds())
    assert await look(world, prefix) == {prefix}


async def test_there_is_one_sweep_task_and_who_lost_it_changes_nothing(
    world: World,
) -> None:
    stale = await world.lease(SWEEP)
    assert await world.claim(SWEEP) is None
    world.clock.advance(15)
    lease = await world.lease(SWEEP)
    before = world.dump()
    with pytest.raises(LeaseLost):
        await world.ledger.note_orphans(stale, [stray(1)], after=HOUR)
    with pytest.raises(LeaseLost):
        await world.ledger.complete_sweep(stale, again_in=HOUR)
    assert world.dump() == before
    await world.ledger.complete_sweep(lease, again_in=HOUR)
    world.clock.advance(HOUR.total_seconds() - 1)
    assert await world.claim(SWEEP) is None
    world.clock.advance(1)
    assert await world.claim(SWEEP) is not None


async def test_a_ledger_says_for_ever_which_one_it_is(world: World) -> None:
    identity = await world.ledger.identity()
    assert str(UUID(identity)) == identity
    await world.succeeded()
    assert await world.ledger.identity() == identity
