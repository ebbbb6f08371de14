"""What sinks may rely on of a ledger: what is due to them, when, and what became of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from exportd_server.errors import ErrorReason, ErrorRecord
from exportd_server.jobs.ledger import schema
from exportd_server.jobs.ledger.base import (
    ClaimLimits,
    DeliveryQuery,
    EndpointDisabled,
    Kept,
    Lease,
    LeaseLost,
)
from exportd_server.jobs.ledger.postgres import open_postgres_ledger
from exportd_server.jobs.ledger.sql import SqlLedger
from exportd_server.jobs.ledger.sqlite import open_sqlite_ledger
from exportd_server.jobs.ledger.statements import lifecycle
from exportd_server.jobs.ledger.tables import deliveries, jobs, tasks
from exportd_server.jobs.ledger.transaction import Transaction
from exportd_server.jobs.model import (
    DeliveryState,
    DeliveryStatus,
    Job,
    JobState,
    OnFull,
)
from tests.support.deliveries import DELIVER, DOWN, SOON, Deliveries, sink, whole
from tests.support.ledger import (
    BACKENDS,
    CLEANUP,
    LEASE,
    REAP,
    Backend,
    LedgerDatabase,
    World,
    part,
)
from tests.support.waits import ENOUGH

LONG = 600.0
GONE = ErrorRecord(ErrorReason.ENDPOINT_GONE, "410")
MAX_ATTEMPTS = 5

PENDING = DeliveryState.PENDING
DELIVERED = DeliveryState.DELIVERED
DROPPED = DeliveryState.DROPPED
DEAD = DeliveryState.DEAD_LETTERED
FAILED = DeliveryState.FAILED


@pytest.fixture(params=list(BACKENDS.values()), ids=list(BACKENDS))
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    backend: Backend = request.param
    async with backend(tmp_path, request) as world:
        yield world


@pytest.fixture
def on(world: World) -> Deliveries:
    return Deliveries(world)


async def wakes(waiting: Awaitable[object]) -> None:
    async with asyncio.timeout(ENOUGH):
        await waiting


# --- what becomes due


async def test_a_job_without_sinks_shows_nothing_about_delivery(
    world: World, on: Deliveries
) -> None:
    job = await world.succeeded()
    assert job.deliveries == ()
    assert job.delivery_status is None
    assert job.settled
    assert (job.drop_time, job.spec.sinks) == (None, ())
    assert await on.claim() is None
    assert await on.all() == []
    assert await on.ledger.list_queues("acme", limit=10) == []
    dump = world.dump()
    assert (dump["deliveries"], dump["queues"]) == ([], [])


async def test_a_part_is_due_once_to_each_sink_that_takes_parts(on: Deliveries) -> None:
    job, lease = await on.running(sink("a"), whole(), sink("b", "other"))
    assert await on.all() == []
    for _ in range(3):
        await on.ledger.add_part(lease, part(lease))
    due = {(each.sink, each.part, each.queue) for each in await on.all()}
    assert due == {("a", (0, 0), "q"), ("b", (0, 0), "other")}
    await on.ledger.add_part(lease, part(lease, 1))
    found = await on.all()
    assert len(found) == len({each.delivery_id for each in found}) == 4
    for each in found:
        assert UUID(each.delivery_id).version == 7
        assert (each.tenant, each.job_id, each.generation) == ("acme", job.job_id, 1)
        assert (each.state, each.attempts) == (PENDING, 0)
        assert each.create_time == on.clock.now()
        assert (each.finish_time, each.next_attempt_time) == (None, None)
        assert (each.last_error, each.receipt) == (None, "")
    after = await on.world.job(job)
    assert [(s.sink, s.pending, s.status) for s in after.deliveries] == [
        ("a", 2, DeliveryStatus.PENDING),
        ("whole", 0, DeliveryStatus.PENDING),
        ("b", 2, DeliveryStatus.PENDING),
    ]
    assert after.delivery_status is DeliveryStatus.PENDING
    assert not after.settled


async def test_a_part_and_its_deliveries_are_recorded_together_or_not_at_all(
    on: Deliveries, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, lease = await on.running(sink())
    before = on.world.dump()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("half way")

    with monkeypatch.context() as patch:
        patch.setattr(lifecycle, "touch", fail)
        with pytest.raises(RuntimeError, match="half way"):
            await on.ledger.add_part(lease, part(lease))
    assert on.world.dump() == before
    await on.ledger.add_part(lease, part(lease))
    assert len(await on.all()) == 1


async def test_a_sink_that_takes_the_whole_gets_it_when_the_job_has_succeeded(
    on: Deliveries,
) -> None:
    job, lease = await on.running(whole(), parts=2)
    assert await on.all() == []
    assert await on.claim() is None
    await on.ledger.complete_shard(lease)
    delivery = await on.lease()
    assert (delivery.job_id, delivery.tenant, delivery.attempt) == (job.job_id, "acme", 1)
    work = await on.ledger.delivery_work(delivery)
    assert work.completion
    assert [p.sequence for p in work.parts] == [0, 1]
    assert (work.dropped, work.attempt, work.disabled) == (0, 1, False)
    assert work.sink == job.spec.sinks[0]
    assert [column.name for column in work.columns] == ["id", "paid"]
    await on.ledger.complete_delivery(delivery, "table t")
    done = await on.world.job(job)
    assert done.settled
    assert done.delivery_status is DeliveryStatus.DELIVERED
    (told,) = done.deliveries
    assert (told.delivered, told.pending, told.attempts) == (1, 0, 1)
    assert told.receipt == "table t"


async def test_the_work_of_a_part_is_that_part(on: Deliveries) -> None:
    job, lease = await on.running(sink(), parts=2)
    work = await on.ledger.delivery_work(await on.lease())
    assert work.parts == (part(lease, 0),)
    assert (work.completion, work.job.job_id) == (False, job.job_id)
    assert (await on.ledger.delivery_work(await on.lease())).parts == (part(lease, 1),)


async def test_a_completion_follows_the_last_part(on: Deliveries) -> None:
    job, lease = await on.running(sink(), parts=3)
    await on.deliver()
    assert await on.ledger.complete_shard(lease)
    assert await on.states(job) == [DELIVERED, PENDING, PENDING, PENDING]
    one, two = await on.lease(), await on.lease()
    assert await on.claim() is None, "the completion waits"
    await on.ledger.complete_delivery(two, "2")
    assert await on.claim() is None
    assert not (await on.ledger.fail_delivery(one, DOWN, retry_in=SOON)).dead
    assert await on.claim() is None
    on.clock.advance(30)
    await on.deliver()
    last = await on.lease()
    assert (await on.ledger.delivery_work(last)).completion
    await on.ledger.complete_delivery(last, "all of it")
    assert await on.claim() is None
    (told,) = (await on.world.job(job)).deliveries
    assert (told.delivered, told.attempts, told.receipt) == (4, 5, "all of it")


async def test_no_completion_is_due_before_the_job_has_succeeded(on: Deliveries) -> None:
    _, lease = await on.running(sink(), shards=2, parts=1)
    await on.deliver()
    assert not await on.ledger.complete_shard(lease)
    assert await on.claim() is None
    other = await on.world.lease()
    assert await on.ledger.complete_shard(other)
    assert await on.deliver_all() == 1


async def test_sinks_of_one_job_do_not_wait_for_each_other(on: Deliveries) -> None:
    job = await on.succeeded(sink("a", "qa"), sink("b", "qb"))
    while (lease := await on.claim()) is not None:
        work = await on.ledger.delivery_work(lease)
        if work.sink.name == "a":
            await on.ledger.complete_delivery(lease, "ok")
    assert await on.states(job, "a") == [DELIVERED, DELIVERED]
    assert await on.states(job, "b") == [PENDING, PENDING]
    assert (await on.world.job(job)).delivery_status is DeliveryStatus.PENDING


async def test_a_dead_part_takes_the_completion_along_and_brings_it_back(
    on: Deliveries,
) -> None:
    job = await on.succeeded(sink(), parts=2)
    dead = await on.bury()
    assert (await on.of(job))[2].state is PENDING, "another part is on its way"
    await on.deliver()
    records = await on.of(job)
    assert [each.state for each in records] == [DEAD, DELIVERED, DEAD]
    assert records[0].last_error == DOWN
    without = records[2].last_error
    assert without is not None
    assert without.reason is ErrorReason.PARTS_NOT_DELIVERED
    assert records[2].finish_time == on.clock.now()
    failed = await on.world.job(job)
    assert failed.state is JobState.SUCCEEDED
    assert failed.settled
    assert failed.delivery_status is DeliveryStatus.FAILED
    (told,) = failed.deliveries
    assert (told.dead_lettered, told.delivered, told.attempts) == (2, 1, 2)
    assert told.last_error == DOWN, "that of the part tells more"

    assert await on.redrive(delivery_id=records[2].delivery_id) == 0, "it follows parts"
    assert await on.redrive(delivery_id=dead) == 1
    records = await on.of(job)
    assert [each.state for each in records] == [PENDING, DELIVERED, PENDING]
    assert (records[2].last_error, records[2].finish_time) == (None, None)
    assert await on.deliver() == dead
    assert await on.deliver() == records[2].delivery_id
    (told,) = (await on.world.job(job)).deliveries
    assert (told.status, told.attempts) == (DeliveryStatus.DELIVERED, 4)
    assert told.last_error is None


async def test_a_part_that_dies_again_takes_the_completion_along_again(
    on: Deliveries,
) -> None:
    job = await on.succeeded(sink())
    for _ in range(2):
        await on.bury()
        assert await on.states(job) == [DEAD, DEAD]
        assert await on.redrive(job_id=job.job_id) == 1
        assert await on.states(job) == [PENDING, PENDING]


async def test_a_dead_completion_is_sent_again_under_its_own_id(on: Deliveries) -> None:
    job = await on.succeeded(whole())
    dead = await on.bury()
    assert await on.redrive(job_id=job.job_id) == 1
    lease = await on.lease()
    work = await on.ledger.delivery_work(lease)
    assert (work.delivery_id, work.attempt, lease.attempt) == (dead, 2, 1)


# --- a part that comes late


async def drop_one(on: Deliveries) -> tuple[Job, str]:
    """A succeeded job whose second part was dropped; returns its delivery, too."""
    on.allow("q", depth=1, on_full=OnFull.DROP)
    job, lease = await on.running(sink())
    assert list(await on.ledger.add_part(lease, part(lease, 0))) == []
    assert list(await on.ledger.add_part(lease, part(lease, 1))) == [0]
    assert list(await on.ledger.add_part(lease, part(lease, 1))) == []
    assert await on.ledger.complete_shard(lease)
    await on.deliver()
    records = await on.of(job)
    assert [each.state for each in records] == [DELIVERED, DROPPED, PENDING]
    assert (records[1].attempts, records[1].finish_time) == (0, on.clock.now())
    return job, records[1].delivery_id


async def test_a_completion_tells_of_what_was_dropped(on: Deliveries) -> None:
    job, _ = await drop_one(on)
    lease = await on.lease()
    work = await on.ledger.delivery_work(lease)
    assert ([p.sequence for p in work.parts], work.dropped) == ([0], 1)
    await on.ledger.complete_delivery(lease, "ok")
    told = await on.world.job(job)
    assert told.delivery_status is DeliveryStatus.DROPPED
    assert told.settled
    assert told.deliveries[0].dropped == 1


async def test_a_completion_is_sent_anew_after_a_dropped_part_that_comes_late(
    on: Deliveries,
) -> None:
    job, dropped = await drop_one(on)
    first = await on.deliver("without")
    assert await on.redrive(delivery_id=dropped) == 1
    again = (await on.of(job))[2]
    assert again.delivery_id != first, "a receiver would take it for the one it has"
    assert (again.state, again.receipt, again.finish_time) == (PENDING, "", None)
    assert (await on.world.job(job)).deliveries[0].receipt == ""
    assert await on.deliver() == dropped
    lease = await on.lease()
    work = await on.ledger.delivery_work(lease)
    assert work.delivery_id == again.delivery_id
    assert ([p.sequence for p in work.parts], work.dropped) == ([0, 1], 0)
    await on.ledger.complete_delivery(lease, "with")
    assert (await on.world.job(job)).deliveries[0].receipt == "with"
    assert (await on.world.job(job)).delivery_status is DeliveryStatus.DELIVERED


@pytest.mark.parametrize("stage", ["due", "under way", "to be tried again"])
async def test_a_completion_that_is_due_waits_for_a_part_that_comes_late(
    on: Deliveries, stage: str
) -> None:
    """Else it would tell of a part that the sink has not got."""
    job, dropped = await drop_one(on)
    before = (await on.of(job))[2].delivery_id
    held: Lease | None = None
    if stage != "due":
        held = await on.lease()
        assert (await on.ledger.delivery_work(held)).completion
    if stage == "to be tried again":
        assert held is not None
        await on.ledger.fail_delivery(held, DOWN, retry_in=SOON)
    assert await on.redrive(job_id=job.job_id) == 1
    if held is not None:
        with pytest.raises(LeaseLost):
            await on.ledger.complete_delivery(held, "without")
    assert await on.states(job) == [DELIVERED, PENDING, PENDING]
    on.clock.advance(30)
    assert await on.deliver() == dropped
    lease = await on.lease()
    work = await on.ledger.delivery_work(lease)
    assert work.completion
    assert (work.delivery_id == before) == (stage == "due"), "it may have told before"
    assert work.attempt == (1 if stage == "due" else 2)
    await on.ledger.complete_delivery(lease, "with")
    assert await on.claim() is None
    assert (await on.world.job(job)).delivery_status is DeliveryStatus.DELIVERED


# --- who goes first


async def test_no_more_of_a_queue_are_under_way_than_it_allows(on: Deliveries) -> None:
    on.allow("q", concurrency=2)
    await on.running(sink(), parts=5)
    one, two = await on.lease(), await on.lease()
    assert await on.claim() is None
    await on.ledger.complete_delivery(one, "ok")
    three = await on.lease()
    assert await on.claim() is None
    await on.ledger.fail_delivery(two, DOWN, retry_in=SOON)
    four = await on.lease()
    assert await on.claim() is None
    await on.ledger.release(three)
    again = await on.lease()
    assert again.task_id == three.task_id
    on.clock.advance(15)
    taken = [await on.lease(), await on.lease()]
    assert {each.task_id for each in taken} == {again.task_id, four.task_id}
    assert await on.claim() is None, "lost leases were taken over, no more"


async def test_what_the_operator_allows_now_holds_at_once(on: Deliveries) -> None:
    on.allow("q", concurrency=1)
    await on.running(sink(), parts=3)
    held = await on.lease()
    assert await on.claim() is None
    on.allow("q", concurrency=2)
    waiting = asyncio.create_task(on.ledger.wait_for_work(LONG))
    await on.create(sink())
    await wakes(waiting)
    await on.lease()
    on.allow("q", concurrency=1)
    await on.create(sink())
    await on.ledger.complete_delivery(held, "ok")
    assert await on.claim() is None


async def queue_of(on: Deliveries, lease: Lease) -> str:
    return (await on.ledger.delivery_work(lease)).sink.queue


async def test_the_queue_with_the_fewest_under_way_goes_first(on: Deliveries) -> None:
    await on.running(sink("a", "slow"), parts=4, priority=100)
    await on.running(sink("b", "fast"), parts=3)
    order = [await queue_of(on, await on.lease()) for _ in range(7)]
    assert order == ["slow", "fast", "slow", "fast", "slow", "fast", "slow"]


async def test_in_a_queue_the_tenant_with_the_fewest_under_way_goes_first(
    on: Deliveries,
) -> None:
    await on.running(sink(), tenant="greedy", parts=5, priority=100)
    await on.running(sink(), tenant="modest", parts=2)
    order = [(await on.lease()).tenant for _ in range(7)]
    assert order == ["greedy", "modest", "greedy", "modest", *["greedy"] * 3]


async def test_one_at_a_time_tenants_take_turns_in_a_queue(on: Deliveries) -> None:
    """However much and however urgent what one of them sends, the other gets through."""
    on.allow("q", concurrency=1)
    await on.running(sink(), tenant="greedy", parts=5, priority=100)
    await on.running(sink(), tenant="modest", parts=2)
    order = []
    while (lease := await on.claim()) is not None:
        order.append(lease.tenant)
        await on.ledger.complete_delivery(lease, "ok")
    assert order == ["greedy", "modest", "greedy", "modest", *["greedy"] * 3]


async def test_of_one_tenants_priority_goes_first_and_then_age(on: Deliveries) -> None:
    jobs = [
        (await on.running(sink(), parts=1, priority=priority))[0].job_id
        for priority in (0, -1, 0, 1)
    ]
    order = [jobs.index((await on.lease()).job_id) for _ in range(4)]
    assert order == [3, 0, 2, 1]


async def test_a_lost_lease_is_taken_over_before_anything_else(on: Deliveries) -> None:
    """It counts as under way, so that an endless flow elsewhere would go first for
    ever."""
    await on.running(sink("a", "quiet"), parts=1)
    lost = await on.lease()
    await on.running(sink("b", "busy"), parts=3)
    on.clock.advance(14)
    assert await queue_of(on, await on.lease()) == "busy"
    on.clock.advance(1)
    taken = await on.lease()
    assert (taken.task_id, taken.attempt) == (lost.task_id, 2)


async def test_deliveries_come_after_what_a_claim_asks_for_besides(on: Deliveries) -> None:
    _, lease = await on.running(sink(), shards=2, parts=1, priority=100)
    await on.create()
    kinds = (*DELIVER, lease.kind)
    got = [(await on.world.lease(kinds)).kind for _ in range(2)]
    assert got == [lease.kind, *DELIVER]


# --- full queues


async def test_a_full_queue_that_blocks_has_no_room(on: Deliveries) -> None:
    on.allow("q", depth=2)
    job, lease = await on.running(sink(), whole(queue="q"))
    for sequence in range(2):
        assert await on.ledger.has_room(lease)
        await on.ledger.add_part(lease, part(lease, sequence))
    assert not await on.ledger.has_room(lease)
    held = await on.lease()
    assert not await on.ledger.has_room(lease), "what is under way stands in it, too"
    await on.ledger.fail_delivery(held, DOWN, retry_in=SOON)
    assert await on.ledger.has_room(lease), "what waits to be tried again does not"
    await on.ledger.add_part(lease, part(lease, 2))
    assert not await on.ledger.has_room(lease)
    on.clock.advance(30)
    for _ in range(2):
        await on.deliver()
        assert (await on.world.job(job)).deliveries[0].dropped == 0
    assert await on.ledger.has_room(lease)


async def test_another_jobs_deliveries_fill_a_queue_too(on: Deliveries) -> None:
    on.allow("q", depth=1)
    await on.running(sink(), parts=1)
    _, lease = await on.running(sink("x", "free"), sink())
    assert not await on.ledger.has_room(lease)
    assert await on.deliver_all() == 1
    assert await on.ledger.has_room(lease)


@pytest.mark.parametrize("on_full", list(OnFull))
async def test_a_queue_that_is_full_of_one_tenants_has_room_for_anothers(
    on: Deliveries, on_full: OnFull
) -> None:
    on.allow("q", depth=2, owner="", on_full=on_full)
    _, theirs = await on.running(sink(), tenant="other", parts=2)
    job, lease = await on.running(sink())
    for sequence in range(2):
        assert await on.ledger.has_room(lease)
        assert not await on.ledger.add_part(lease, part(lease, sequence))
    blocks = on_full is OnFull.BLOCK
    for one in (theirs, lease):
        assert await on.ledger.has_room(one) != blocks
    held = [await on.lease() for _ in range(4)]
    for one in (theirs, lease):
        assert await on.ledger.has_room(one) != blocks, "what is under way stands in it"
    mine = next(each for each in held if each.tenant == job.tenant)
    await on.ledger.complete_delivery(mine, "ok")
    assert await on.ledger.has_room(lease)
    assert await on.ledger.has_room(theirs) != blocks


async def test_a_full_queue_that_is_not_waited_for_any_more_drops(on: Deliveries) -> None:
    on.allow("q", depth=1)
    sinks = (sink(), sink("x", "free"))
    job, lease = await on.running(*sinks, parts=1, shards=2)
    assert not await on.ledger.has_room(lease)
    assert list(await on.ledger.add_part(lease, part(lease, 1), drop=True)) == [0]
    assert await on.states(job) == [PENDING, DROPPED]
    assert await on.states(job, "x") == [PENDING, PENDING], "one with room has room"
    other = await on.world.lease()
    assert await on.ledger.has_room(other), "it cannot have all of the job any more"
    assert list(await on.ledger.add_part(other, part(other, 0))) == [0]
    await on.deliver_all()
    assert list(await on.ledger.add_part(other, part(other, 1))) == [], "there is room"
    assert await on.redrive(job_id=job.job_id) == 2
    assert not await on.ledger.has_room(other), "it can again"


async def test_a_claim_leaves_the_deliveries_of_some_tenants_to_others(
    on: Deliveries,
) -> None:
    for tenant in ("acme", "other", "third"):
        await on.succeeded(sink(queue=f"q-{tenant}"), tenant=tenant, parts=2)

    async def claimed(*left: str) -> str | None:
        lease = await on.ledger.claim(
            "w", DELIVER, lease=LEASE, limits=ClaimLimits(None, frozenset(left))
        )
        return None if lease is None else lease.tenant

    assert await claimed("acme", "other") == "third"
    assert await claimed("acme", "other") == "third"
    assert await claimed("acme", "other") is None, "those that are due are others'"
    assert await claimed("acme", "third") == "other"
    on.clock.advance(2 * LEASE.total_seconds())
    assert await claimed("third", "other", "acme") is None, "nor what a lost lease left"
    assert {await claimed() for _ in range(6)} == {"acme", "other", "third"}


async def test_who_takes_the_whole_never_holds_up_an_export(on: Deliveries) -> None:
    on.allow("w", depth=1)
    await on.succeeded(whole())
    _, lease = await on.running(whole())
    assert await on.ledger.has_room(lease)


async def test_a_full_queue_that_drops_drops_and_has_room(on: Deliveries) -> None:
    on.allow("q", depth=2, on_full=OnFull.DROP)
    job, lease = await on.running(sink())
    dropped = []
    for sequence in range(4):
        assert await on.ledger.has_room(lease)
        dropped.append(list(await on.ledger.add_part(lease, part(lease, sequence))))
    assert dropped == [[], [], [0], [0]]
    assert await on.states(job) == [PENDING, PENDING, DROPPED, DROPPED]
    held = await on.lease()
    await on.ledger.fail_delivery(held, DOWN, retry_in=SOON)
    assert list(await on.ledger.add_part(lease, part(lease, 4))) == []
    assert (await on.world.job(job)).deliveries[0].dropped == 2


# --- leases, retries, fencing


async def reopened(
    on: Deliveries, request: pytest.FixtureRequest, tmp_path: Path
) -> SqlLedger:
    """The same ledger, as the next process sees it."""
    await on.ledger.close()
    if request.node.callspec.id == "sqlite":
        return await open_sqlite_ledger(tmp_path / "ledger.db", on.clock)
    database: LedgerDatabase = request.getfixturevalue("ledger_database")
    return await open_postgres_ledger(database.url, clock=on.clock)


async def test_a_retry_waits_its_time_even_if_the_ledger_is_closed_meanwhile(
    on: Deliveries, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    job, _ = await on.running(sink(), parts=2)
    failing, fine = await on.lease(), await on.lease()
    told = await on.ledger.fail_delivery(failing, DOWN, retry_in=SOON)
    assert (told.dead, told.disabled) == (False, False)
    due = on.clock.now() + SOON
    record = (await on.of(job))[0]
    assert (record.state, record.attempts) == (PENDING, 1)
    assert (record.last_error, record.next_attempt_time) == (DOWN, due)
    (told_sink,) = (await on.world.job(job)).deliveries
    assert (told_sink.last_error, told_sink.attempts) == (DOWN, 2)
    await on.ledger.complete_delivery(fine, "holds up no other")
    ledger = await reopened(on, request, tmp_path)
    try:
        on.clock.advance(29.999_999)
        assert await ledger.claim("w", DELIVER, lease=LEASE) is None
        on.clock.advance(0.000_001)
        lease = await ledger.claim("w", DELIVER, lease=LEASE)
        assert lease is not None
        assert (lease.task_id, lease.attempt) == (failing.task_id, 2)
        work = await ledger.delivery_work(lease)
        assert (work.delivery_id, work.attempt) == (record.delivery_id, 2)
    finally:
        await ledger.close()


async def test_a_pause_of_nothing_makes_a_delivery_due_at_once(on: Deliveries) -> None:
    job, _ = await on.running(sink(), parts=1)
    await on.ledger.fail_delivery(await on.lease(), DOWN, retry_in=timedelta(0))
    assert (await on.of(job))[0].next_attempt_time is None
    assert (await on.lease()).attempt == 2


async def test_a_release_is_no_attempt_and_a_lost_lease_is_one(on: Deliveries) -> None:
    job, _ = await on.running(sink(), parts=1)
    for _ in range(2 * MAX_ATTEMPTS):
        lease = await on.lease()
        assert lease.attempt == 1
        await on.ledger.release(lease)
        assert (await on.of(job))[0].attempts == 0
    lost = await on.lease()
    on.clock.advance(10)
    assert await on.ledger.renew([lost], LEASE) == []
    on.clock.advance(14)
    assert await on.claim() is None
    on.clock.advance(1)
    taken = await on.lease()
    assert (taken.task_id, taken.attempt) == (lost.task_id, 2)
    assert taken.token > lost.token
    assert (await on.ledger.delivery_work(taken)).attempt == 2
    assert await on.ledger.renew([lost, taken], LEASE) == [lost]
    await on.ledger.complete_delivery(taken, "ok")
    record = (await on.of(job))[0]
    assert (record.state, record.attempts, record.receipt) == (DELIVERED, 2, "ok")


async def test_a_lost_lease_that_nobody_took_over_is_still_good(on: Deliveries) -> None:
    job, _ = await on.running(sink(), parts=1)
    lease = await on.lease()
    on.clock.advance(3600)
    await on.ledger.complete_delivery(lease, "late")
    assert await on.states(job) == [DELIVERED]


STALE: dict[str, Callable[[Deliveries, Lease], Awaitable[object]]] = {
    "delivery_work": lambda on, lease: on.ledger.delivery_work(lease),
    "complete_delivery": lambda on, lease: on.ledger.complete_delivery(lease, "stale"),
    "dead": lambda on, lease: on.ledger.fail_delivery(lease, DOWN, retry_in=None),
    "retry": lambda on, lease: on.ledger.fail_delivery(lease, DOWN, retry_in=SOON),
    "gone": lambda on, lease: on.ledger.fail_delivery(
        lease, GONE, retry_in=None, gone=True
    ),
    "release": lambda on, lease: on.ledger.release(lease),
}


@pytest.mark.parametrize("operation", STALE)
async def test_who_lost_a_delivery_changes_nothing_and_is_told(
    on: Deliveries, operation: str
) -> None:
    await on.succeeded(sink())
    stale = await on.lease()
    on.clock.advance(15)
    await on.lease()
    before = on.world.dump()
    with pytest.raises(LeaseLost):
        await STALE[operation](on, stale)
    assert on.world.dump() == before


@pytest.mark.parametrize("operation", STALE)
async def test_what_was_delivered_is_over(on: Deliveries, operation: str) -> None:
    await on.succeeded(sink())
    lease = await on.lease()
    await on.ledger.complete_delivery(lease, "ok")
    before = on.world.dump()
    with pytest.raises(LeaseLost):
        await STALE[operation](on, lease)
    assert on.world.dump() == before
    completion = await on.lease()
    assert completion.token > lease.token
    with pytest.raises(LeaseLost):
        await STALE[operation](on, replace(completion, token=lease.token))


async def test_a_lease_of_another_kind_delivers_nothing(on: Deliveries) -> None:
    _, export = await on.running(sink(), parts=1)
    delivery = await on.lease()
    for attempt in (
        on.ledger.delivery_work(export),
        on.ledger.complete_delivery(export, "x"),
        on.ledger.fail_delivery(export, DOWN, retry_in=None),
        on.ledger.complete_shard(delivery),
        on.ledger.restart_output(delivery),
        on.ledger.complete_cleanup(delivery),
    ):
        with pytest.raises(ValueError, match="kind"):
            await attempt


async def test_an_export_that_lost_its_lease_is_not_told_of_room(on: Deliveries) -> None:
    _, stale = await on.running(sink())
    on.clock.advance(15)
    taken = await on.world.lease()
    assert await on.ledger.has_room(taken)
    with pytest.raises(LeaseLost):
        await on.ledger.has_room(stale)


# --- the job ends, or begins anew


async def cancel(on: Deliveries, job: Job, _: Lease) -> None:
    assert await on.ledger.cancel_job("acme", job.job_id) is not None


async def fail(on: Deliveries, _: Job, lease: Lease) -> None:
    error = ErrorRecord(ErrorReason.SOURCE_FAILED, "down")
    assert await on.ledger.fail_attempt(lease, error, retry_in=None)


@pytest.mark.parametrize("end", [cancel, fail])
async def test_the_deliveries_of_a_job_that_ends_badly_fail_with_it(
    on: Deliveries, end: Callable[[Deliveries, Job, Lease], Awaitable[None]]
) -> None:
    job, lease = await on.running(sink(), sink("slow", "s"), whole(), parts=2)
    held = []
    while (delivery := await on.claim()) is not None:
        held.append(delivery)
    assert len(held) == 4
    works = [await on.ledger.delivery_work(each) for each in held]
    slow = [at for at, work in enumerate(works) if work.sink.name == "slow"]
    quick = [at for at, work in enumerate(works) if work.sink.name == "sink"]
    await on.ledger.complete_delivery(held[quick[0]], "ok")
    await on.ledger.fail_delivery(held[quick[1]], DOWN, retry_in=None)
    await on.ledger.fail_delivery(held[slow[0]], DOWN, retry_in=SOON)
    other = held[slow[1]]
    with on.ledger.fence(other) as fenced:
        await end(on, job, lease)
        async with asyncio.timeout(ENOUGH):
            await fenced.wait()
    assert await on.ledger.renew([other], LEASE) == [other]
    before = on.world.dump()
    for operation in STALE.values():
        with pytest.raises(LeaseLost):
            await operation(on, other)
    assert on.world.dump() == before
    assert sorted(await on.states(job)) == [DEAD, DELIVERED]
    assert await on.states(job, "slow") == [FAILED, FAILED]
    assert await on.states(job, "whole") == []
    assert {each.attempts for each in await on.of(job, "slow")} == {1}
    after = await on.world.job(job)
    assert after.state.terminal
    assert after.settled
    assert after.delivery_status is DeliveryStatus.FAILED
    assert {s.status for s in after.deliveries} == {DeliveryStatus.FAILED}
    assert [s.attempts for s in after.deliveries] == [2, 2, 0]
    on.clock.advance(1000)
    assert await on.claim() is None
    assert await on.redrive() == 0
    assert [q.waiting + q.retrying for q in await on.ledger.list_queues("acme", limit=9)]
    for queue in await on.ledger.list_queues("acme", limit=9):
        assert (queue.waiting, queue.retrying) == (0, 0)


@pytest.mark.parametrize("expires", [False, True], ids=["deleted", "expired"])
async def test_a_job_with_open_deliveries_is_forgotten_with_them(
    on: Deliveries, *, expires: bool
) -> None:
    job = await on.succeeded(sink(), whole(), parts=2)
    await on.bury()
    held, retried = await on.lease(), await on.lease()
    await on.ledger.fail_delivery(retried, DOWN, retry_in=SOON)
    assert not (await on.world.job(job)).settled
    if expires:
        on.clock.advance(job.spec.ttl.total_seconds())
        reap = await on.world.lease(REAP)
        assert await on.ledger.expire_jobs(reap, limit=10) == 1
        await on.ledger.complete_reap(reap, again_in=timedelta(hours=1))
    else:
        assert await on.ledger.delete_job("acme", job.job_id) is JobState.SUCCEEDED
    for operation in STALE.values():
        with pytest.raises(LeaseLost):
            await operation(on, held)
    on.clock.advance(60)
    assert await on.claim() is None
    assert await on.all() == []
    assert await on.redrive() == 0
    assert await on.ledger.list_queues("acme", limit=10) == [], "nor what it left dead"
    assert not await on.ledger.enable_queue("acme", "q")
    await on.world.work_off()
    dump = on.world.dump()
    kept = {"queues", "tasks", "counters", "identity", "alembic_version"}
    assert {name for name, rows in dump.items() if rows} <= kept
    assert len(dump["tasks"]) == 2, "those of housekeeping"
    assert {row[0] for row in dump["queues"]} == {"q", "w"}


async def test_an_output_that_begins_anew_is_delivered_anew(on: Deliveries) -> None:
    job, lease = await on.running(sink(), parts=3)
    await on.deliver()
    await on.bury()
    stale = await on.lease()
    await on.ledger.restart_output(lease)
    assert await on.all() == []
    assert on.world.dump()["deliveries"] == []
    for operation in STALE.values():
        with pytest.raises(LeaseLost):
            await operation(on, stale)
    assert await on.claim() is None
    (told,) = (await on.world.job(job)).deliveries
    assert told == replace(told, pending=0, delivered=0, dead_lettered=0, attempts=0)
    again = await on.world.plan(await on.world.lease())
    assert await on.world.finish(again)
    assert {each.generation for each in await on.all()} == {2}
    assert await on.deliver_all() == 2
    assert (await on.world.job(job)).delivery_status is DeliveryStatus.DELIVERED


# --- the job's own life


async def test_deliveries_do_not_keep_a_job_from_its_end(on: Deliveries) -> None:
    _, lease = await on.running(sink(), shards=2, parts=1)
    delivery = await on.lease()
    second = await on.world.lease()
    assert await on.ledger.complete_unless_last(second) is None
    manifest = await on.ledger.complete_unless_last(lease)
    assert manifest is not None
    assert manifest.parts == (part(lease),)
    assert await on.ledger.complete_shard(lease)
    assert await on.ledger.finished_parts("acme", lease.job_id) == [part(lease)]
    await on.ledger.complete_delivery(delivery, "ok")


async def test_a_job_that_is_only_delivered_waits_for_a_worker(on: Deliveries) -> None:
    job, lease = await on.running(sink(), parts=1)
    other = await on.create()
    delivery = await on.lease()
    await on.ledger.release(lease)
    waiting = await on.world.job(job)
    assert (waiting.state, waiting.progress.queue_position) == (JobState.PENDING, 0)
    assert (await on.world.job(other)).progress.queue_position == 1
    await on.ledger.fail_delivery(delivery, DOWN, retry_in=timedelta(hours=9))
    assert (await on.world.job(job)).progress.queue_position == 0
    assert (await on.world.lease()).job_id == job.job_id
    assert (await on.world.job(job)).progress.parts_done == 1


async def test_attempts_of_deliveries_are_not_the_jobs(on: Deliveries) -> None:
    job, lease = await on.running(sink(), parts=1)
    for attempt in range(1, 2 * MAX_ATTEMPTS):
        assert (await on.lease()).attempt == attempt
        on.clock.advance(15)
        assert await on.ledger.renew([lease], LEASE) == []
    after = await on.world.job(job)
    assert (after.state, after.attempt) == (JobState.RUNNING, 1)
    assert await on.ledger.complete_shard(lease)


async def test_who_delivers_is_no_writer_that_a_cleanup_waits_for(on: Deliveries) -> None:
    job, lease = await on.running(sink(), parts=1)
    await on.ledger.release(lease)
    await on.lease()
    await on.ledger.cancel_job("acme", job.job_id)
    assert len(await on.world.work_off()) == 1
    on.clock.advance(60)
    assert await on.world.work_off() == []


async def test_deliveries_count_for_no_limit_of_exports(on: Deliveries) -> None:
    await on.succeeded(sink(), parts=2)
    for _ in range(2):
        await on.lease()
    assert await on.ledger.create_job(on.new(), max_active=1)
    await on.create(tenant="modest")
    lease = await on.world.claim(limit=1)
    assert lease is not None
    assert lease.tenant == "modest", "served longest ago, and equal at work"
    taken = await on.world.claim(limit=1)
    assert taken is not None
    assert taken.tenant == "acme"


async def test_a_cleanup_of_strays_leaves_what_is_still_to_be_delivered(
    on: Deliveries,
) -> None:
    job, lease = await on.running(sink(), parts=1)
    await on.ledger.release(lease)
    assert await on.world.finish(await on.world.lease(), 1)
    cleanup = await on.world.lease(CLEANUP)
    kept = await on.ledger.kept_parts(cleanup)
    assert kept is not None
    assert len(kept.parts) == 2
    await on.ledger.complete_cleanup(cleanup)
    assert await on.deliver_all() == 3
    assert (await on.world.job(job)).delivery_status is DeliveryStatus.DELIVERED


# --- endpoints that are disabled


async def test_an_endpoint_that_is_gone_is_disabled_once(on: Deliveries) -> None:
    job, _ = await on.running(sink(), sink("other", "fine"), parts=3)
    held = [await on.lease() for _ in range(6)]
    works = {each: await on.ledger.delivery_work(each) for each in held}
    retried, gone, late = (each for each in held if works[each].sink.queue == "q")
    elsewhere = [each for each in held if works[each].sink.queue == "fine"]
    await on.ledger.fail_delivery(retried, DOWN, retry_in=timedelta(hours=9))
    await on.ledger.fail_delivery(elsewhere[0], DOWN, retry_in=timedelta(hours=9))
    on.clock.advance(1)
    assert await on.claim() is None
    waiting = asyncio.create_task(on.ledger.wait_for_work(LONG))
    await asyncio.sleep(0)
    told = await on.ledger.fail_delivery(gone, GONE, retry_in=None, gone=True)
    assert (told.dead, told.disabled) == (True, True)
    await wakes(waiting)
    disabled_at = on.clock.now()
    on.clock.advance(1)
    # Whoever failed meanwhile does not disable it again, nor waits for it.
    told = await on.ledger.fail_delivery(late, GONE, retry_in=SOON, gone=True)
    assert (told.dead, told.disabled) == (True, False)
    (queue,) = await on.ledger.list_queues("acme", limit=9, queue="q")
    assert (queue.disabled_time, queue.disabled_reason) == (disabled_at, GONE)
    assert (queue.dead_lettered, queue.waiting, queue.retrying) == (2, 1, 0)
    # What waited is due at once, to be told.
    lease = await on.lease()
    work = await on.ledger.delivery_work(lease)
    assert work.disabled
    assert (work.sink.queue, work.attempt) == ("q", 2)
    await on.ledger.fail_delivery(lease, GONE, retry_in=None)
    assert await on.claim() is None, "the other queue's waits its time"
    (fine,) = await on.ledger.list_queues("acme", limit=9, queue="fine")
    assert (fine.retrying, fine.disabled_time) == (1, None)
    assert (await on.world.job(job)).state is JobState.RUNNING


async def test_a_job_for_a_disabled_endpoint_is_refused_and_not_recorded(
    on: Deliveries,
) -> None:
    await on.running(sink(), parts=1)
    known = on.new(sink(), request_id="again", tenant="other")
    await on.ledger.create_job(known)
    await on.ledger.fail_delivery(await on.lease(), GONE, retry_in=None, gone=True)
    before = on.world.dump()
    with pytest.raises(EndpointDisabled) as refused:
        await on.ledger.create_job(on.new(whole("first", "fine"), sink(), tenant="new"))
    assert (refused.value.sink, refused.value.queue) == (1, "q")
    assert on.world.dump() == before
    _, created = await on.ledger.create_job(known)
    assert not created, "what was accepted before is still answered"
    await on.create(whole("first", "fine"))

    assert await on.redrive() == 0, "it would not be tried"
    assert not await on.ledger.enable_queue("nobody", "q")
    assert not await on.ledger.enable_queue("acme", "nothing")
    assert await on.ledger.enable_queue("acme", "q")
    (queue,) = await on.ledger.list_queues("acme", limit=9, queue="q")
    assert (queue.disabled_time, queue.disabled_reason) == (None, None)
    assert queue.failing_since is None
    await on.create(sink())
    assert await on.redrive() == 1
    work = await on.ledger.delivery_work(await on.lease())
    assert (work.disabled, work.attempt) == (False, 2)


async def test_an_endpoint_that_fails_for_too_long_is_disabled(on: Deliveries) -> None:
    job = await on.succeeded(whole(queue="q"))
    day = timedelta(days=1)

    async def attempt() -> tuple[bool, bool]:
        lease = await on.lease()
        return await on.ledger.fail_delivery(
            lease, DOWN, retry_in=timedelta(0), disable_after=day
        )

    async def failing_since() -> object:
        (queue,) = await on.ledger.list_queues("acme", limit=9, queue="q")
        return queue.failing_since

    assert await failing_since() is None
    began = on.clock.now()
    assert await attempt() == (False, False)
    assert await failing_since() == began
    on.clock.advance(86_399)
    assert await attempt() == (False, False)
    assert await failing_since() == began
    # A success is a new beginning.
    await on.deliver()
    assert await failing_since() is None
    on.clock.advance(86_400)
    await on.succeeded(whole(queue="q"))
    assert await attempt() == (False, False)
    on.clock.advance(86_400)
    assert await attempt() == (True, True), "nobody tries it again, so it is dead"
    assert await on.claim() is None
    assert await on.states(job, "whole") == [DELIVERED]


async def test_without_a_limit_an_endpoint_may_fail_for_ever(on: Deliveries) -> None:
    await on.running(sink(), parts=1)
    for _ in range(3):
        lease = await on.lease()
        told = await on.ledger.fail_delivery(lease, DOWN, retry_in=timedelta(0))
        assert (told.dead, told.disabled) == (False, False)
        on.clock.advance(10**7)


# --- dropping the stored copy


async def test_the_output_is_dropped_once_every_sink_has_all_of_it(on: Deliveries) -> None:
    job = await on.succeeded(sink(), whole(), drop_after_delivery=True)
    assert await on.ledger.pin_output("acme", job.job_id, "reader", length=SOON)
    await on.deliver()
    held = [await on.lease(), await on.lease()]
    await on.ledger.complete_delivery(held[0], "ok")
    assert (await on.world.job(job)).drop_time is None
    on.clock.advance(1)
    await on.ledger.complete_delivery(held[1], "ok")
    dropped = await on.world.job(job)
    assert dropped.drop_time == on.clock.now()
    assert dropped.state is JobState.SUCCEEDED
    assert not await on.ledger.pin_output("acme", job.job_id, "late", length=SOON)
    assert not await on.ledger.is_cut(job.job_id, "reader")
    cleanup = await on.world.lease(CLEANUP)
    assert not cleanup.forget
    assert await on.ledger.kept_parts(cleanup) == Kept(read=True)
    assert await on.ledger.pin_output("acme", job.job_id, "reader", length=SOON)
    await on.ledger.unpin_output(job.job_id, "reader")
    assert await on.ledger.kept_parts(cleanup) is None
    await on.ledger.complete_cleanup(cleanup)
    assert await on.redrive() == 0
    assert await on.world.job(job) == dropped
    on.clock.advance(job.spec.ttl.total_seconds())
    reap = await on.world.lease(REAP)
    assert await on.ledger.expire_jobs(reap, limit=10) == 1


async def test_an_output_that_a_sink_has_not_got_stays(on: Deliveries) -> None:
    job = await on.succeeded(sink(), whole(), drop_after_delivery=True)
    dead = await on.bury()
    await on.deliver_all()
    kept = await on.world.job(job)
    assert (kept.delivery_status, kept.drop_time) == (DeliveryStatus.FAILED, None)
    assert await on.world.claim(CLEANUP) is None
    assert await on.redrive(delivery_id=dead) == 1
    assert await on.deliver_all() == 2
    assert (await on.world.job(job)).drop_time == on.clock.now()
    assert len(await on.world.work_off()) == 1


async def test_an_output_that_a_full_queue_kept_from_a_sink_stays(on: Deliveries) -> None:
    on.allow("q", depth=1, on_full=OnFull.DROP)
    job = await on.succeeded(sink(), parts=2, drop_after_delivery=True)
    assert await on.deliver_all() == 2
    kept = await on.world.job(job)
    assert (kept.delivery_status, kept.drop_time) == (DeliveryStatus.DROPPED, None)
    assert await on.redrive() == 1
    assert await on.deliver_all() == 2
    assert (await on.world.job(job)).drop_time is not None


async def test_nothing_is_dropped_unasked(on: Deliveries) -> None:
    job = await on.succeeded(sink())
    assert await on.deliver_all() == 2
    assert (await on.world.job(job)).drop_time is None
    assert await on.world.claim(CLEANUP) is None
    assert await on.ledger.pin_output("acme", job.job_id, "reader", length=SOON)


# --- lists


async def pages(on: Deliveries, query: DeliveryQuery, limit: int) -> list[str]:
    found: list[str] = []
    before = None
    while page := await on.ledger.list_deliveries(
        "acme", query, limit=limit, before=before
    ):
        assert len(page) <= limit
        found += [each.delivery_id for each in page]
        before = (page[-1].create_time, page[-1].delivery_id)
    return found


async def test_deliveries_are_listed_by_every_condition_newest_first(
    on: Deliveries,
) -> None:
    jobs = []
    for _ in range(3):
        jobs.append(await on.succeeded(sink("a", "qa"), sink("b", "qb"), parts=2))
        on.clock.advance(1)
    mine = await on.succeeded(sink("a", "qa"), tenant="other")
    for _ in range(4):
        await on.deliver()
        await on.bury()
    everything = await on.all()
    assert len(everything) == 18
    times = [(each.create_time, each.delivery_id) for each in everything]
    assert times == sorted(times)
    first = jobs[0].job_id
    queries = {
        DeliveryQuery(): 18,
        DeliveryQuery(job_id=first): 6,
        DeliveryQuery(job_id=first, sink="b"): 3,
        DeliveryQuery(job_id=first, sink="c"): 0,
        DeliveryQuery(sink="a"): 0,
        DeliveryQuery(queue="qa"): 9,
        DeliveryQuery(queue="qa", job_id=first): 3,
        DeliveryQuery(delivery_id=everything[7].delivery_id): 1,
        DeliveryQuery(delivery_id=everything[7].delivery_id, queue="none"): 0,
        DeliveryQuery(job_id=mine.job_id): 0,
        DeliveryQuery(job_id="no such"): 0,
    }
    for query, count in queries.items():
        for states in ((), (DEAD,), (DELIVERED, DEAD), (PENDING,), (FAILED,)):
            wanted = replace(query, states=frozenset(states))
            expected = [
                each.delivery_id
                for each in reversed(everything)
                if (not states or each.state in states)
                and query.job_id in ("", each.job_id)
                and query.queue in ("", each.queue)
                and query.delivery_id in ("", each.delivery_id)
                and (not query.sink or (query.job_id and query.sink == each.sink))
            ]
            if not states:
                assert len(expected) == count
            for limit in (2, 100):
                assert await pages(on, wanted, limit) == expected
    assert {each.state for each in everything} == {PENDING, DELIVERED, DEAD}
    theirs = await on.all(tenant="other")
    assert {each.job_id for each in theirs} == {mine.job_id}
    assert await on.all(DeliveryQuery(job_id=first), "other") == []
    stolen = DeliveryQuery(delivery_id=everything[0].delivery_id)
    assert await on.all(stolen, "other") == []


async def test_queues_are_those_the_tenant_has_deliveries_in(on: Deliveries) -> None:
    await on.running(sink("a", "q1"), sink("b", "q2"), parts=3)
    await on.running(sink("a", "q1"), sink("c", "q3"), tenant="other", parts=1)
    while (lease := await on.claim()) is not None:
        work = await on.ledger.delivery_work(lease)
        at = work.parts[0].sequence
        if work.sink.queue == "q1" and lease.tenant == "acme":
            if at == 0:
                await on.ledger.fail_delivery(lease, DOWN, retry_in=None)
            elif at == 1:
                await on.ledger.fail_delivery(lease, DOWN, retry_in=SOON)
    queues = await on.ledger.list_queues("acme", limit=9)
    counted = [(q.queue, q.waiting, q.retrying, q.dead_lettered) for q in queues]
    assert counted == [("q1", 1, 1, 1), ("q2", 3, 0, 0)]
    assert [q.queue for q in await on.ledger.list_queues("other", limit=9)] == ["q1", "q3"]
    assert [q.queue for q in await on.ledger.list_queues("acme", limit=1)] == ["q1"]
    rest = await on.ledger.list_queues("acme", limit=9, after="q1")
    assert [q.queue for q in rest] == ["q2"]
    assert await on.ledger.list_queues("acme", limit=9, queue="q3") == []
    (one,) = await on.ledger.list_queues("acme", limit=9, queue="q2")
    assert one == queues[1]
    assert await on.ledger.list_queues("nobody", limit=9) == []
    assert not await on.ledger.enable_queue("acme", "q3")
    assert await on.ledger.enable_queue("acme", "q1")


# --- sending again


async def test_redriving_takes_what_is_asked_for_and_leaves_the_rest(
    on: Deliveries,
) -> None:
    one = await on.succeeded(sink("a", "qa"), sink("b", "qb"), parts=2)
    two = await on.succeeded(sink("a", "qa"), parts=2)
    other = await on.succeeded(sink("a", "qa"), tenant="other", parts=2)
    assert await on.bury_all() == 8

    async def dead() -> list[int]:
        return [
            (await on.states(job, name)).count(DEAD)
            for job, name in ((one, "a"), (one, "b"), (two, "a"), (other, "a"))
        ]

    assert await dead() == [3, 3, 3, 3], "two parts each, and the completion"
    first = (await on.of(one, "a"))[0].delivery_id
    assert await on.redrive(delivery_id=first, job_id=two.job_id) == 0
    assert await on.redrive("other", delivery_id=first) == 0
    assert await on.redrive(sink="a") == 0, "a sink's name is the job's own"
    assert await on.redrive(states=frozenset({DELIVERED})) == 0
    assert await dead() == [3, 3, 3, 3]
    assert await on.redrive(delivery_id=first) == 1
    assert await on.redrive(delivery_id=first) == 0
    assert await dead() == [1, 3, 3, 3]
    assert await on.redrive(job_id=one.job_id, sink="b") == 2
    assert await dead() == [1, 0, 3, 3]
    assert await on.redrive(queue="qa", states=frozenset({DEAD})) == 3
    assert await dead() == [0, 0, 0, 3]
    assert await on.redrive() == 0
    assert await on.redrive("other") == 2
    assert await on.deliver_all() == 12
    for job in (one, two, other):
        status = (await on.world.job(job)).delivery_status
        assert status is DeliveryStatus.DELIVERED


async def test_redriving_hurries_what_waits_to_be_tried_again(on: Deliveries) -> None:
    job = await on.succeeded(sink(), parts=2)
    await on.ledger.fail_delivery(await on.lease(), DOWN, retry_in=SOON)
    held = await on.lease()
    assert await on.claim() is None
    assert await on.redrive() == 1, "not what is under way"
    assert (await on.of(job))[0].next_attempt_time is None
    lease = await on.lease()
    assert lease.attempt == 2
    await on.ledger.complete_delivery(held, "ok")
    await on.ledger.complete_delivery(lease, "ok")
    await on.ledger.fail_delivery(await on.lease(), DOWN, retry_in=SOON)
    assert await on.redrive(job_id=job.job_id) == 1
    assert (await on.ledger.delivery_work(await on.lease())).completion


async def test_parts_are_redriven_while_the_job_runs(on: Deliveries) -> None:
    job, lease = await on.running(sink(), parts=1)
    await on.bury()
    assert await on.redrive(job_id=job.job_id) == 1
    assert await on.deliver_all() == 1
    assert await on.ledger.complete_shard(lease)
    assert await on.deliver_all() == 1


async def test_what_has_no_output_any_more_is_not_redriven(on: Deliveries) -> None:
    job = await on.succeeded(sink())
    await on.bury()
    on.clock.advance(job.spec.ttl.total_seconds())
    assert await on.redrive() == 0
    assert await on.states(job) == [DEAD, DEAD]


@pytest.mark.minutes
async def test_a_thousand_deliveries_of_three_hundred_jobs_are_redriven(
    on: Deliveries,
) -> None:
    first = await on.succeeded(sink(), parts=3)
    assert await on.bury_all() == 3
    template = await on.of(first)
    assert isinstance(on.ledger, SqlLedger)

    def copy(tx: Transaction) -> None:
        def rows(table: sa.Table) -> list[dict[str, object]]:
            found = tx.connection.execute(sa.select(table)).mappings()
            return [dict(row) for row in found]

        (job,) = rows(jobs)
        known = rows(deliveries)
        work = [row for row in rows(tasks) if row["job_id"]]
        for row in work:
            del row["task_id"]
        ids = [str(UUID(int=2**100 + number)) for number in range(299)]
        tx.connection.execute(sa.insert(jobs), [job | {"job_id": each} for each in ids])
        tx.connection.execute(
            sa.insert(tasks), [row | {"job_id": each} for each in ids for row in work]
        )
        tx.connection.execute(
            sa.insert(deliveries),
            [
                row | {"job_id": each, "delivery_id": f"{each}-{at}"}
                for each in ids
                for at, row in enumerate(known)
            ],
        )

    await on.ledger._database.write(copy)
    assert len(template) == 4
    assert len(await on.all()) == 1200
    assert await on.redrive() == 900
    states = [(each.state, each.part is None) for each in await on.all()]
    assert states.count((PENDING, False)) == 900
    assert states.count((PENDING, True)) == 300
    (queue,) = await on.ledger.list_queues("acme", limit=9)
    assert (queue.waiting, queue.dead_lettered) == (900, 0)
    assert await on.redrive() == 0


# --- waiting


async def part_added(on: Deliveries, lease: Lease) -> None:
    await on.ledger.add_part(lease, part(lease, 3))


async def part_delivered(on: Deliveries, _: Lease) -> None:
    await on.deliver()


async def part_to_be_tried_again(on: Deliveries, _: Lease) -> None:
    await on.ledger.fail_delivery(await on.lease(), DOWN, retry_in=SOON)


async def part_dead(on: Deliveries, _: Lease) -> None:
    await on.bury()


async def part_redriven(on: Deliveries, _: Lease) -> None:
    assert await on.redrive() == 1


async def job_succeeded(on: Deliveries, lease: Lease) -> None:
    await on.ledger.complete_shard(lease)


async def job_cancelled(on: Deliveries, lease: Lease) -> None:
    await on.ledger.cancel_job("acme", lease.job_id)


@pytest.mark.parametrize(
    "change",
    [
        part_added,
        part_delivered,
        part_to_be_tried_again,
        part_dead,
        part_redriven,
        job_succeeded,
        job_cancelled,
    ],
)
async def test_every_change_of_a_delivery_is_one_of_its_job(
    on: Deliveries, change: Callable[[Deliveries, Lease], Awaitable[None]]
) -> None:
    job, lease = await on.running(sink(), whole(), parts=3)
    await on.bury()
    seen = await on.world.job(job)
    waiting = asyncio.create_task(
        on.ledger.wait_for_change(job.job_id, seen.revision, LONG)
    )
    await asyncio.sleep(0)
    await change(on, lease)
    await wakes(waiting)
    after = await on.world.job(job)
    assert after.revision > seen.revision
    assert after.deliveries != seen.deliveries


async def test_a_change_after_the_jobs_end_is_one_too(on: Deliveries) -> None:
    job = await on.succeeded(sink(), drop_after_delivery=True)
    seen = job
    for _ in range(2):
        waiting = asyncio.create_task(
            on.ledger.wait_for_change(job.job_id, seen.revision, LONG)
        )
        await asyncio.sleep(0)
        await on.deliver()
        await wakes(waiting)
        before, seen = seen, await on.world.job(job)
        assert seen.revision > before.revision
    assert seen.settled
    assert seen.drop_time is not None


PLACE: dict[str, Callable[[Deliveries, Lease], Awaitable[object]]] = {
    "delivered": lambda on, lease: on.ledger.complete_delivery(lease, "ok"),
    "dead": lambda on, lease: on.ledger.fail_delivery(lease, DOWN, retry_in=None),
    "retried": lambda on, lease: on.ledger.fail_delivery(
        lease, DOWN, retry_in=timedelta(hours=1)
    ),
    "released": lambda on, lease: on.ledger.release(lease),
    "cancelled": lambda on, lease: on.ledger.cancel_job("acme", lease.job_id),
    "restarted": lambda on, lease: on.ledger.cancel_job("acme", lease.job_id),
}


@pytest.mark.parametrize("cause", PLACE)
async def test_a_place_that_comes_free_in_a_queue_wakes_the_waiting(
    on: Deliveries, cause: str
) -> None:
    on.allow("q", concurrency=1)
    await on.running(sink(), parts=1)
    held = await on.lease()
    await on.running(sink(), tenant="other", parts=1)
    assert await on.claim() is None
    waiting = asyncio.create_task(on.ledger.wait_for_work(LONG))
    await asyncio.sleep(0)
    await PLACE[cause](on, held)
    await wakes(waiting)
    assert await on.claim() is not None


async def test_a_deleted_jobs_place_in_a_queue_is_free(on: Deliveries) -> None:
    on.allow("q", concurrency=1)
    job = await on.succeeded(sink())
    await on.lease()
    await on.running(sink(), tenant="other", parts=1)
    assert await on.claim() is None
    waiting = asyncio.create_task(on.ledger.wait_for_work(LONG))
    await asyncio.sleep(0)
    await on.ledger.delete_job("acme", job.job_id)
    await wakes(waiting)
    assert (await on.lease()).tenant == "other"


async def test_what_is_new_redriven_or_enabled_wakes_the_waiting(on: Deliveries) -> None:
    _, lease = await on.running(sink())
    causes: list[Callable[[], Awaitable[object]]] = [
        lambda: on.ledger.add_part(lease, part(lease)),
        on.redrive,
        lambda: on.ledger.enable_queue("acme", "q"),
    ]
    for cause in causes:
        assert await on.claim() is None
        waiting = asyncio.create_task(on.ledger.wait_for_work(LONG))
        await asyncio.sleep(0)
        await cause()
        await wakes(waiting)
        await on.bury_all()


async def test_a_delivery_that_is_due_again_wakes_the_waiting(on: Deliveries) -> None:
    await on.running(sink(), parts=1)
    soon = timedelta(milliseconds=50)
    await on.ledger.fail_delivery(await on.lease(), DOWN, retry_in=soon)
    assert await on.claim() is None
    waiting = asyncio.create_task(on.ledger.wait_for_work(LONG))
    on.clock.advance(0.05)
    await wakes(waiting)
    assert await on.claim() is not None


async def test_a_delivery_whose_lease_runs_out_wakes_the_waiting(on: Deliveries) -> None:
    await on.running(sink(), parts=1)
    short = timedelta(milliseconds=50)
    assert await on.ledger.claim("dying", DELIVER, lease=short) is not None
    assert await on.claim() is None
    waiting = asyncio.create_task(on.ledger.wait_for_work(LONG))
    on.clock.advance(0.05)
    await wakes(waiting)
    assert await on.claim() is not None


# --- from the version before


@pytest.mark.parametrize("database", list(BACKENDS))
async def test_a_ledger_of_before_goes_on_with_its_jobs(
    database: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Made by 0004, with a job at work and one that has succeeded, then upgraded."""
    backend = BACKENDS[database]
    async with backend(tmp_path, request) as world:
        running, lease = await world.running()
        done = await world.succeeded()
        dump = world.dump()
    config = Config()
    config.set_main_option("script_location", str(schema.MIGRATIONS))
    old = tmp_path / "old.db"
    url = f"sqlite:///{old}"
    if database == "postgresql":
        plain = request.getfixturevalue("postgres_url")
        url = plain.replace("postgresql:", "postgresql+psycopg:", 1)
    connect = {"options": "-c search_path=exportd"} if database == "postgresql" else {}
    engine = sa.create_engine(url, connect_args=connect)
    with engine.begin() as connection:
        if database == "postgresql":
            connection.exec_driver_sql("CREATE SCHEMA exportd")
        config.attributes["connection"] = connection
        command.upgrade(config, "0004")
        for name in ("tenants", "jobs", "tasks", "parts", "counters"):
            rows = dump[name]
            connection.exec_driver_sql(f"DELETE FROM {name}")
            table = sa.Table(name, sa.MetaData(), autoload_with=connection)
            # Later columns came at the end.
            names = table.columns.keys()
            connection.execute(
                sa.insert(table),
                [dict(zip(names, row, strict=False)) for row in rows],
            ) if rows else None
        if database == "postgresql":
            connection.exec_driver_sql("SELECT setval('fencing_tokens', 100)")
            connection.exec_driver_sql("SELECT setval('tasks_task_id_seq', 100)")
    with engine.begin() as connection:
        schema.upgrade(connection, "the test's")
        assert schema.version(connection, "the test's") == schema.HEAD
    engine.dispose()
    opened = (
        open_sqlite_ledger(old, world.clock)
        if database == "sqlite"
        else open_postgres_ledger(plain, clock=world.clock)
    )
    ledger = await opened
    try:
        on = Deliveries(World(ledger, world.clock, dict))
        found = await on.world.job(done)
        assert (found.state, found.deliveries) == (JobState.SUCCEEDED, ())
        assert found.manifest == done.manifest
        assert found.drop_time is None
        if database == "sqlite":
            lease = await on.world.lease()
        assert lease.job_id == running.job_id
        assert await on.world.finish(lease)
        assert (await on.world.job(running)).delivery_status is None
        await on.succeeded(sink())
        assert await on.deliver_all() == 2
    finally:
        await ledger.close()


async def test_a_failure_that_is_not_the_endpoints_does_not_count_against_it(
    on: Deliveries,
) -> None:
    await on.succeeded(whole())
    lease = await on.lease()
    told = await on.ledger.fail_delivery(
        lease, DOWN, retry_in=SOON, disable_after=timedelta(0), blame=False
    )
    assert (told.dead, told.disabled) == (False, False)
    (queue,) = await on.ledger.list_queues("acme", limit=10)
    assert queue.failing_since is None
