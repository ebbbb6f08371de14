"""What workers may rely on of a ledger: claims, leases, fencing, attempts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from exportd_server.errors import ErrorReason, ErrorRecord
from exportd_server.jobs.ledger.base import Kept, Lease, LeaseLost, TaskKind
from exportd_server.jobs.ledger.statements import reading
from exportd_server.jobs.ledger.statements.working import MOST_GENERATIONS
from exportd_server.jobs.model import JobState, ManifestColumn
from exportd_server.sources.base import Shard
from tests.support.ledger import (
    BACKENDS,
    CLEANUP,
    COLUMNS,
    EXPORT,
    LEASE,
    REAP,
    Backend,
    World,
    part,
    shards,
)

SOURCE_DOWN = ErrorRecord(ErrorReason.SOURCE_FAILED, "the source is down")
SOON = timedelta(seconds=30)
MAX_ATTEMPTS = 5


@pytest.fixture(params=list(BACKENDS.values()), ids=list(BACKENDS))
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    backend: Backend = request.param
    async with backend(tmp_path, request) as world:
        yield world


# --- claiming


async def test_a_claim_takes_up_the_job(world: World) -> None:
    job = await world.create()
    world.clock.advance(1)
    lease = await world.lease(owner="w1")
    assert lease == Lease(
        task_id=lease.task_id,
        kind=TaskKind.PLAN,
        token=lease.token,
        owner="w1",
        expires_at=world.clock.now() + LEASE,
        attempt=1,
        tenant="acme",
        job_id=job.job_id,
        generation=1,
    )
    running = await world.job(job)
    assert running.state is JobState.RUNNING
    assert running.start_time == world.clock.now()
    assert running.attempt == 1
    assert running.revision > job.revision
    assert running.progress.queue_position is None
    assert await world.claim() is None, "it is taken"


async def test_a_claim_takes_only_the_kinds_it_asks_for(world: World) -> None:
    await world.create()
    assert await world.claim((TaskKind.SHARD,)) is None
    assert await world.claim(CLEANUP) is None
    assert (await world.lease((TaskKind.PLAN,))).kind is TaskKind.PLAN


async def test_tokens_rise_over_all_tasks(world: World) -> None:
    tokens = []
    for _ in range(3):
        _, lease = await world.running()
        tokens.append(lease.token)
        await world.ledger.release(lease)
        tokens.append((await world.lease()).token)
    tokens.append((await world.lease(REAP)).token)
    assert tokens == sorted(set(tokens))


async def test_the_tenant_with_the_fewest_tasks_at_work_goes_first(world: World) -> None:
    for tenant in ("greedy", "greedy", "greedy", "modest", "modest"):
        await world.create(tenant, priority=100 if tenant == "greedy" else 0)
    order = [(await world.lease()).tenant for _ in range(5)]
    assert order == ["greedy", "modest", "greedy", "modest", "greedy"]


async def test_many_workers_on_one_job_count_as_many(world: World) -> None:
    """A tenant whose one job is cut does not get every slot."""
    await world.running(9, tenant="wide")
    for _ in range(9):
        await world.create("narrow")
    order = [(await world.lease()).tenant for _ in range(9)]
    assert order == ["narrow", *["wide", "narrow"] * 4]


async def test_of_equal_tenants_the_one_served_longest_ago_goes_first(
    world: World,
) -> None:
    served = []
    for tenant in ("a", "a", "b", "b", "c", "c"):
        await world.create(tenant)
    for _ in range(6):
        lease = await world.lease()
        served.append(lease.tenant)
        await world.finish(await world.plan(lease))
    assert served == ["a", "b", "c", "a", "b", "c"]


async def test_within_a_tenant_priority_goes_first_and_then_age(world: World) -> None:
    old = await world.create()
    low = await world.create(priority=-1)
    young = await world.create()
    high = await world.create(priority=1)
    order = [(await world.lease()).job_id for _ in range(4)]
    assert order == [job.job_id for job in (high, old, young, low)]


async def test_a_jobs_shards_come_before_the_jobs_made_after_it(world: World) -> None:
    first, lease = await world.running(3)
    await world.create()
    assert [(await world.lease()).job_id for _ in range(2)] == [first.job_id] * 2
    assert lease.job_id == first.job_id


async def test_the_limit_of_running_jobs_holds_exactly(world: World) -> None:
    for _ in range(4):
        await world.create("greedy")
    held = [await world.claim(limit=2) for _ in range(4)]
    assert [lease is not None for lease in held] == [True, True, False, False]
    await world.create("modest")
    lease = await world.claim(limit=2)
    assert lease is not None
    assert lease.tenant == "modest"
    assert held[0] is not None
    await world.finish(await world.plan(held[0]))
    assert await world.claim(limit=2) is not None
    assert await world.claim(limit=2) is None


async def test_at_its_limit_a_tenant_may_put_more_workers_on_the_jobs_it_runs(
    world: World,
) -> None:
    running, _ = await world.running(3)
    await world.create(priority=100)
    for _ in range(2):
        lease = await world.claim(limit=1)
        assert lease is not None
        assert lease.job_id == running.job_id
    assert await world.claim(limit=1) is None


async def test_housekeeping_knows_no_limit(world: World) -> None:
    done = await world.create()
    await world.ledger.cancel_job("acme", done.job_id)
    await world.create()
    assert await world.claim(limit=1) is not None
    assert await world.claim(CLEANUP, limit=1) is not None


async def test_cleanups_come_before_a_tenants_jobs(world: World) -> None:
    job = await world.create()
    await world.create(priority=100)
    await world.ledger.cancel_job("acme", job.job_id)
    assert (await world.lease((*EXPORT, *CLEANUP))).kind is TaskKind.CLEANUP


# --- leases and fencing


async def test_an_expired_lease_that_nobody_took_over_is_still_good(world: World) -> None:
    job, lease = await world.running()
    world.clock.advance(3600)
    await world.ledger.add_part(lease, part(lease))
    assert await world.ledger.renew([lease], LEASE) == []
    assert await world.claim() is None, "it was renewed"
    assert await world.ledger.complete_shard(lease)
    assert (await world.job(job)).state is JobState.SUCCEEDED


async def test_a_lease_that_ran_out_is_taken_over(world: World) -> None:
    job, lost = await world.running()
    world.clock.advance(14.999_999)
    assert await world.claim() is None
    world.clock.advance(0.000_001)
    taken = await world.lease(owner="another")
    assert (taken.task_id, taken.shard) == (lost.task_id, lost.shard)
    assert taken.token > lost.token
    assert taken.attempt == 2
    after = await world.job(job)
    assert (after.state, after.attempt) == (JobState.RUNNING, 2)


STALE: dict[str, Callable[[World, Lease], Awaitable[object]]] = {
    "release": lambda w, lease: w.ledger.release(lease),
    "record_progress": lambda w, lease: w.ledger.record_progress(
        lease, rows=9, bytes_=9, rows_per_second=9
    ),
    "shard_parts": lambda w, lease: w.ledger.shard_parts(lease),
    "add_part": lambda w, lease: w.ledger.add_part(lease, part(lease)),
    "add_last_part": lambda w, lease: w.ledger.add_last_part(lease, part(lease)),
    "complete_unless_last": lambda w, lease: w.ledger.complete_unless_last(lease),
    "complete_shard": lambda w, lease: w.ledger.complete_shard(lease),
    "complete_only_shard": lambda w, lease: w.ledger.complete_only_shard(
        lease, part(lease)
    ),
    "restart_output": lambda w, lease: w.ledger.restart_output(lease),
    "fail_attempt": lambda w, lease: w.ledger.fail_attempt(
        lease, SOURCE_DOWN, retry_in=None
    ),
    "retry": lambda w, lease: w.ledger.fail_attempt(lease, SOURCE_DOWN, retry_in=SOON),
}


@pytest.mark.parametrize("operation", STALE)
async def test_a_stale_worker_changes_nothing_and_is_told(
    world: World, operation: str
) -> None:
    _, stale = await world.running()
    world.clock.advance(15)
    new = await world.lease()
    before = world.dump()
    with pytest.raises(LeaseLost):
        await STALE[operation](world, stale)
    assert await world.ledger.renew([stale], LEASE) == [stale]
    assert world.dump() == before
    await STALE[operation](world, new)


@pytest.mark.parametrize("operation", STALE)
async def test_a_lease_is_good_for_nothing_once_its_work_has_ended(
    world: World, operation: str
) -> None:
    _, lease = await world.running()
    await world.finish(lease)
    before = world.dump()
    with pytest.raises(LeaseLost):
        await STALE[operation](world, lease)
    assert world.dump() == before


async def test_a_stale_planner_records_no_plan(world: World) -> None:
    await world.create()
    stale = await world.lease()
    world.clock.advance(15)
    new = await world.lease()
    before = world.dump()
    with pytest.raises(LeaseLost):
        await world.plan(stale)
    assert world.dump() == before
    first = await world.plan(new)
    with pytest.raises(LeaseLost):
        await world.plan(new)
    assert first.token > new.token


async def test_stale_housekeepers_change_nothing(world: World) -> None:
    job = await world.create()
    await world.ledger.cancel_job("acme", job.job_id)
    stale, stale_reap = await world.lease(CLEANUP), await world.lease(REAP)
    world.clock.advance(15)
    new, new_reap = await world.lease(CLEANUP), await world.lease(REAP)
    before = world.dump()
    for attempt in (
        world.ledger.kept_parts(stale),
        world.ledger.complete_cleanup(stale),
        world.ledger.expire_jobs(stale_reap, limit=1),
        world.ledger.complete_reap(stale_reap, again_in=SOON),
    ):
        with pytest.raises(LeaseLost):
            await attempt
    assert world.dump() == before
    await world.ledger.complete_cleanup(new)
    await world.ledger.complete_reap(new_reap, again_in=SOON)


async def test_a_lease_with_a_forged_task_or_job_is_lost(world: World) -> None:
    _, lease = await world.running()
    other, other_lease = await world.running()
    for forged in (
        replace(lease, token=other_lease.token),
        replace(lease, job_id=other.job_id),
        replace(lease, token=lease.token + 100),
    ):
        with pytest.raises(LeaseLost):
            await world.ledger.complete_shard(forged)


async def test_a_lease_does_only_what_its_kind_of_task_is_for(world: World) -> None:
    await world.create()
    lease = await world.lease()
    for attempt in (
        world.ledger.complete_shard(lease),
        world.ledger.add_part(
            replace(lease, shard=Shard(0)), part(replace(lease, shard=Shard(0)))
        ),
        world.ledger.kept_parts(lease),
        world.ledger.expire_jobs(lease, limit=1),
    ):
        with pytest.raises(ValueError, match="kind plan"):
            await attempt


async def test_renewing_extends_from_now_and_names_what_is_lost(world: World) -> None:
    _, one = await world.running()
    job, two = await world.running()
    await world.ledger.cancel_job("acme", job.job_id)
    world.clock.advance(10)
    assert await world.ledger.renew([one, two], LEASE) == [two]
    world.clock.advance(14)
    assert await world.claim() is None
    world.clock.advance(1)
    assert (await world.lease()).task_id == one.task_id


async def test_renewing_nothing_is_fine(world: World) -> None:
    assert await world.ledger.renew([], LEASE) == []


# --- giving up


async def test_a_released_task_is_due_at_once_and_its_attempt_not_counted(
    world: World,
) -> None:
    job = await world.create()
    for _ in range(2 * MAX_ATTEMPTS):
        await world.ledger.release(await world.lease())
        waiting = await world.job(job)
        assert (waiting.state, waiting.attempt) == (JobState.PENDING, 0)
        assert waiting.progress.queue_position == 0
    assert (await world.lease()).attempt == 1


async def test_a_released_shard_keeps_its_parts(world: World) -> None:
    job, lease = await world.running()
    await world.ledger.add_part(lease, part(lease))
    await world.ledger.release(lease)
    again = await world.lease()
    assert again.kind is TaskKind.SHARD
    assert again.attempt == 1
    assert await world.ledger.shard_parts(again) == [part(lease)]
    await world.finish(again, 1)
    manifest = (await world.job(job)).manifest
    assert manifest is not None
    assert manifest.parts == (part(lease), part(again, 1))


async def test_a_failed_attempt_is_repeated_after_its_pause(world: World) -> None:
    job, lease = await world.running()
    assert not await world.ledger.fail_attempt(lease, SOURCE_DOWN, retry_in=SOON)
    waiting = await world.job(job)
    assert (waiting.state, waiting.error) == (JobState.PENDING, None)
    world.clock.advance(29)
    assert await world.claim() is None
    world.clock.advance(1)
    assert (await world.lease()).attempt == 2
    after = await world.job(job)
    assert (after.state, after.attempt) == (JobState.RUNNING, 2)


async def test_a_pause_of_nothing_makes_the_task_due_at_once(world: World) -> None:
    _, lease = await world.running()
    await world.ledger.fail_attempt(lease, SOURCE_DOWN, retry_in=timedelta(0))
    assert (await world.lease()).attempt == 2


async def test_without_a_retry_the_job_fails_with_the_error(world: World) -> None:
    job, lease = await world.running(2)
    other = await world.lease()
    assert await world.ledger.fail_attempt(lease, SOURCE_DOWN, retry_in=None)
    failed = await world.job(job)
    assert failed.state is JobState.FAILED
    assert failed.error == SOURCE_DOWN
    assert failed.finish_time == world.clock.now()
    assert failed.expire_time == world.clock.now() + job.spec.ttl
    with pytest.raises(LeaseLost):
        await world.finish(other)
    cleanups = await world.work_off()
    world.clock.advance(20)
    cleanups += await world.work_off()
    assert len(cleanups) == 2, "now, and after the other shard's worker"


async def test_the_last_attempt_fails_the_job(world: World) -> None:
    job = await world.create()
    for attempt in range(1, MAX_ATTEMPTS + 1):
        lease = await world.lease()
        assert lease.attempt == attempt
        failed = await world.ledger.fail_attempt(lease, SOURCE_DOWN, retry_in=timedelta(0))
        assert failed == (attempt == MAX_ATTEMPTS)
    ended = await world.job(job)
    assert (ended.state, ended.error) == (JobState.FAILED, SOURCE_DOWN)
    assert ended.attempt == MAX_ATTEMPTS


async def test_a_job_whose_workers_all_die_fails_in_the_end(world: World) -> None:
    job = await world.create()
    for _ in range(MAX_ATTEMPTS):
        lease = await world.lease()
        world.clock.advance(15)
    assert (await world.job(job)).state is JobState.RUNNING, "its lease is still good"
    assert await world.claim() is None
    ended = await world.job(job)
    assert ended.state is JobState.FAILED
    assert ended.error is not None
    assert ended.error.reason is ErrorReason.ATTEMPTS_EXHAUSTED
    assert ended.error.message
    with pytest.raises(LeaseLost):
        await world.plan(lease)
    assert len(await world.work_off()) == 1


async def test_a_job_that_ran_out_of_attempts_tells_the_last_error_it_had(
    world: World,
) -> None:
    job = await world.create()
    await world.ledger.fail_attempt(await world.lease(), SOURCE_DOWN, retry_in=timedelta(0))
    for _ in range(MAX_ATTEMPTS - 1):
        await world.lease()
        world.clock.advance(15)
    assert await world.claim() is None
    assert (await world.job(job)).error == SOURCE_DOWN


async def test_a_job_runs_as_long_as_a_worker_is_left_on_it(world: World) -> None:
    job, one = await world.running(3)
    two = await world.lease()
    await world.ledger.release(one)
    assert (await world.job(job)).state is JobState.RUNNING
    await world.finish(two)
    assert (await world.job(job)).state is JobState.PENDING, "one shard was given back"
    await world.lease()
    assert (await world.job(job)).state is JobState.RUNNING


# --- plans and shards


async def test_a_plan_becomes_shards_and_its_worker_goes_on_with_the_first(
    world: World,
) -> None:
    job = await world.create()
    plan = await world.lease(owner="planner")
    world.clock.advance(5)
    assert await world.ledger.renew([plan], LEASE) == []
    first = await world.ledger.record_plan(plan, shards(3), COLUMNS, estimated_rows=1234)
    assert first.kind is TaskKind.SHARD
    assert first.shard == shards(3)[0]
    assert first.owner == "planner"
    assert first.token > plan.token
    assert first.expires_at == world.clock.now() + LEASE
    assert first.attempt == 1, "planning and going on is one attempt"
    assert (await world.job(job)).attempt == 1
    assert (await world.job(job)).progress.estimated_rows == 1234
    others = [await world.lease() for _ in range(2)]
    assert [lease.shard for lease in others] == shards(3)[1:]
    assert await world.claim() is None
    with pytest.raises(LeaseLost):
        await world.ledger.release(plan)


async def test_the_attempts_of_a_plan_count_for_the_shard_that_goes_on_with_it(
    world: World,
) -> None:
    job = await world.create()
    await world.lease()
    world.clock.advance(15)
    first = await world.plan(await world.lease())
    assert first.attempt == 2
    world.clock.advance(15)
    assert (await world.lease()).attempt == 3
    assert (await world.job(job)).attempt == 3


@pytest.mark.parametrize("bad", [[], [Shard(0), Shard(0)]])
async def test_a_plan_needs_shards_that_differ(world: World, bad: list[Shard]) -> None:
    await world.create()
    lease = await world.lease()
    with pytest.raises(ValueError, match="shard"):
        await world.ledger.record_plan(lease, bad, (), estimated_rows=None)
    await world.plan(lease)


async def test_progress_is_the_sum_over_shards_and_what_was_told_last(
    world: World,
) -> None:
    job, one = await world.running(2)
    two = await world.lease()
    assert (await world.job(job)).progress.rows_per_second is None
    total = await world.ledger.record_progress(one, rows=5, bytes_=50, rows_per_second=2.5)
    assert total == (5, 50, 0)
    total = await world.ledger.record_progress(two, rows=7, bytes_=70, rows_per_second=1)
    assert total == (12, 120, 0)
    progress = (await world.job(job)).progress
    assert (progress.rows, progress.bytes, progress.rows_per_second) == (12, 120, 3.5)
    assert (progress.parts_done, progress.parts_total) == (0, None)

    await world.ledger.add_part(one, part(one, rows=10, size=100))
    progress = (await world.job(job)).progress
    assert (progress.rows, progress.bytes, progress.parts_done) == (17, 170, 1)
    await world.ledger.complete_shard(one)
    assert (await world.job(job)).progress.rows_per_second == 1
    await world.finish(two)
    progress = (await world.job(job)).progress
    assert (progress.rows, progress.bytes) == (20, 200)
    assert (progress.parts_done, progress.parts_total) == (2, 2)
    assert progress.rows_per_second is None


async def test_progress_falls_back_when_unfinished_work_is_done_again(
    world: World,
) -> None:
    job, lease = await world.running()
    await world.ledger.add_part(lease, part(lease, rows=10, size=100))
    await world.ledger.record_progress(lease, rows=15, bytes_=150, rows_per_second=1)
    world.clock.advance(15)
    await world.lease()
    progress = (await world.job(job)).progress
    assert (progress.rows, progress.bytes, progress.parts_done) == (10, 100, 1)


async def test_each_change_raises_the_revision(world: World) -> None:
    job = await world.create()
    seen = [job.revision]

    async def rose() -> None:
        seen.append((await world.job(job)).revision)
        assert seen[-1] > seen[-2]

    lease = await world.lease()
    await rose()
    lease = await world.plan(lease)
    await rose()
    await world.ledger.record_progress(lease, rows=1, bytes_=1, rows_per_second=1)
    await rose()
    await world.ledger.add_part(lease, part(lease))
    await rose()
    await world.ledger.release(lease)
    await rose()
    lease = await world.lease()
    await rose()
    await world.ledger.fail_attempt(lease, SOURCE_DOWN, retry_in=timedelta(0))
    await rose()
    lease = await world.lease()
    await rose()
    await world.ledger.restart_output(lease)
    await rose()
    await world.finish(await world.plan(await world.lease()))
    await rose()


async def test_parts_are_added_in_order_and_under_the_leases_token(world: World) -> None:
    _, lease = await world.running()
    await world.ledger.add_part(lease, part(lease, 0))
    before = world.dump()
    good = part(lease, 1)
    for bad in (
        part(lease, 0, rows=11),
        part(lease, 2),
        replace(good, token=lease.token + 1),
        replace(good, shard=1),
    ):
        with pytest.raises(ValueError, match="not the next"):
            await world.ledger.add_part(lease, bad)
    assert world.dump() == before
    await world.ledger.add_part(lease, good)
    assert await world.ledger.shard_parts(lease) == [part(lease, 0), good]


async def test_recording_the_last_part_again_changes_nothing(world: World) -> None:
    """Somebody who does not know whether it was recorded does so again."""
    _, lease = await world.running()
    await world.ledger.add_part(lease, part(lease, 0))
    await world.ledger.add_part(lease, part(lease, 1))
    before = world.dump()
    await world.ledger.add_part(lease, part(lease, 1))
    assert world.dump() == before
    with pytest.raises(ValueError, match="not the next"):
        await world.ledger.add_part(lease, part(lease, 0))


async def test_a_shard_taken_over_goes_on_after_its_finished_parts(world: World) -> None:
    job, dead = await world.running(2)
    other = await world.lease()
    await world.ledger.add_part(dead, part(dead, 0))
    await world.finish(other)
    world.clock.advance(15)
    heir = await world.lease()
    assert await world.ledger.shard_parts(heir) == [part(dead, 0)]
    await world.finish(heir, 1)
    manifest = (await world.job(job)).manifest
    assert manifest is not None
    assert manifest.parts == (part(dead, 0), part(heir, 1), part(other, 0))


async def test_the_last_shard_publishes_the_job_in_the_order_of_the_output(
    world: World,
) -> None:
    job, zero = await world.running(3)
    one, two = await world.lease(), await world.lease()
    world.clock.advance(2)
    assert not await world.finish(two)
    assert not await world.finish(zero)
    before = await world.job(job)
    assert (before.state, before.manifest) == (JobState.RUNNING, None)
    assert await world.finish(one)
    done = await world.job(job)
    assert done.state is JobState.SUCCEEDED
    assert done.finish_time == world.clock.now()
    assert done.expire_time == world.clock.now() + job.spec.ttl
    assert done.manifest is not None
    assert done.manifest.columns == COLUMNS
    assert [p.shard for p in done.manifest.parts] == [0, 1, 2]
    assert done.manifest.parts[1] == part(one)


async def test_a_job_that_went_smoothly_leaves_nothing_to_clean_up(world: World) -> None:
    await world.succeeded()
    world.clock.advance(100)
    assert await world.claim(CLEANUP) is None


@pytest.mark.parametrize("mishap", ["death", "release", "failure", "restart"])
async def test_a_job_that_needed_another_attempt_is_cleaned_up_after_success(
    world: World, mishap: str
) -> None:
    job, lease = await world.running()
    await world.ledger.add_part(lease, part(lease))
    sequence = 1
    if mishap == "death":
        world.clock.advance(15)
    elif mishap == "release":
        await world.ledger.release(lease)
    elif mishap == "failure":
        await world.ledger.fail_attempt(lease, SOURCE_DOWN, retry_in=timedelta(0))
    else:
        await world.ledger.restart_output(lease)
        sequence = 0
    again = await world.lease()
    if again.kind is TaskKind.PLAN:
        again = await world.plan(again)
    assert await world.finish(again, sequence)
    if mishap in ("death", "restart"):
        assert await world.claim(CLEANUP) is None, "the former worker may write still"
    world.clock.advance(20)
    cleanup = await world.lease(CLEANUP)
    assert not cleanup.forget
    done = await world.job(job)
    assert done.manifest is not None
    assert await world.ledger.kept_parts(cleanup) == Kept(done.manifest.parts)
    await world.ledger.complete_cleanup(cleanup)
    assert await world.claim(CLEANUP) is None
    assert await world.job(job) == done


# --- beginning anew


async def test_restarting_throws_away_the_output_and_plans_anew(world: World) -> None:
    job, one = await world.running(2)
    two = await world.lease()
    await world.finish(one)
    await world.ledger.add_part(two, part(two))
    await world.ledger.restart_output(two)
    restarted = await world.job(job)
    assert (restarted.state, restarted.generation) == (JobState.PENDING, 2)
    assert restarted.progress.parts_done == 0
    assert restarted.progress.rows == 0
    assert await world.ledger.finished_parts("acme", job.job_id) == []
    plan = await world.lease()
    assert (plan.kind, plan.generation, plan.attempt) == (TaskKind.PLAN, 2, 1)
    with pytest.raises(LeaseLost):
        await world.ledger.complete_shard(two)
    columns = (ManifestColumn("other", "STRING", "string", nullable=True),)
    lease = await world.ledger.record_plan(plan, shards(1), columns, estimated_rows=None)
    assert (lease.generation, lease.shard) == (2, shards(1)[0])
    assert await world.finish(lease)
    done = await world.job(job)
    assert done.generation == 2
    assert done.manifest is not None
    assert (done.manifest.columns, done.manifest.parts) == (columns, (part(lease),))


async def test_restarting_takes_the_leases_of_all_other_workers(world: World) -> None:
    job, one = await world.running(2)
    two = await world.lease()
    await world.ledger.restart_output(one)
    with pytest.raises(LeaseLost):
        await world.finish(two)
    assert (await world.job(job)).state is JobState.PENDING


async def test_a_source_that_always_changes_fails_the_job_in_the_end(
    world: World,
) -> None:
    job = await world.create()
    for _ in range(MOST_GENERATIONS):
        await world.ledger.restart_output(await world.plan(await world.lease()))
    ended = await world.job(job)
    assert ended.state is JobState.FAILED
    assert ended.error is not None
    assert ended.error.reason is ErrorReason.SOURCE_CHANGED
    assert (ended.attempt, ended.generation) == (1, MOST_GENERATIONS)
    assert await world.claim() is None


async def test_beginning_anew_costs_no_attempt_and_gives_none_back(world: World) -> None:
    """However often workers are told to stop, only those that die are counted."""
    await world.create()
    for _ in range(3):
        lease = await world.plan(await world.lease())
        await world.ledger.release(lease)
        await world.ledger.restart_output(await world.lease())
    plan = await world.lease()
    assert plan.attempt == 1
    world.clock.advance(15)
    second = await world.lease()
    assert second.attempt == 2
    await world.ledger.restart_output(await world.plan(second))
    assert (await world.lease()).attempt == 2


async def test_a_job_of_many_parts_is_told_whole_whoever_else_asks(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = await world.succeeded()
    monkeypatch.setattr(reading, "_FEW_PARTS", 0)
    waiting = await world.create("other")
    asked = [waiting, done, done, waiting, done]
    assert await asyncio.gather(*map(world.job, asked)) == asked
    assert done.manifest is not None
    assert await world.ledger.get_job("other", done.job_id) is None
