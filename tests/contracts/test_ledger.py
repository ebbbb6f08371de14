"""What callers may rely on of a ledger."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

import pytest

from exportd_server.encoders.base import (
    Compression,
    CsvDialect,
    CsvOptions,
    Format,
    OutputFormat,
)
from exportd_server.errors import ErrorReason, ErrorRecord
from exportd_server.jobs.ledger.base import (
    JobQuery,
    LeaseLost,
    RequestIdConflict,
    TooManyActiveJobs,
)
from exportd_server.jobs.ledger.sql import SqlLedger
from exportd_server.jobs.ledger.statements import reading
from exportd_server.jobs.model import (
    CancelOutcome,
    FilterLiteral,
    FilterSpec,
    Job,
    JobState,
    Progress,
)
from exportd_server.sources.base import FilterOperator
from exportd_server.store.key import OutputKind
from tests.support.deliveries import Deliveries, sink
from tests.support.ledger import BACKENDS, CLEANUP, COLUMNS, Backend, World, part, spec

SOURCE_DOWN = ErrorRecord(ErrorReason.SOURCE_FAILED, "down", {"try": "later"})


@pytest.fixture(params=list(BACKENDS.values()), ids=list(BACKENDS))
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    backend: Backend = request.param
    async with backend(tmp_path, request) as world:
        yield world


# --- creating and reading


async def test_a_created_job_waits_and_is_found_again_exactly(world: World) -> None:
    request = spec(
        dataset="decoded_events",
        output=OutputFormat(
            Format.CSV,
            Compression.ZSTD,
            csv=CsvOptions(
                ";", header=False, null_marker="\\N", dialect=CsvDialect.SPREADSHEET_SAFE
            ),
        ),
        target_id="0xAB",
        network="näh",
        start_time=datetime(2024, 2, 29, 23, 59, 59, 999_999, tzinfo=UTC),
        end_time=datetime(2024, 3, 1, tzinfo=UTC),
        columns=("b", "a"),
        filters=(
            FilterSpec(
                "a",
                FilterOperator.IN,
                (FilterLiteral("int", "1"), FilterLiteral("bytes", "/w==")),
            ),
            FilterSpec("b", FilterOperator.IS_NULL),
        ),
        limit=7,
        max_part_rows=1,
        max_part_bytes=65_536,
        ttl=timedelta(days=400, microseconds=1),
        priority=-100,
        labels={"z": "last first", "a": "", "quote'\"": "\t\n"},
    )
    new = world.new(
        request_id="r-1",
        fingerprint="f",
        **{name: getattr(request, name) for name in request.__dataclass_fields__},
    )

    job, created = await world.ledger.create_job(new)

    assert created
    assert job == Job(
        job_id=new.job_id,
        tenant="acme",
        state=JobState.PENDING,
        spec=request,
        request_id="r-1",
        create_time=world.clock.now(),
        progress=Progress(queue_position=0),
    )
    assert await world.job(job) == job
    found = (await world.job(job)).spec
    assert list(found.labels) == ["z", "a", "quote'\""], "the caller's order"
    assert found.start_time is not None
    assert found.start_time.tzinfo is UTC


async def test_another_tenants_job_is_missing(world: World) -> None:
    job = await world.succeeded()
    assert await world.ledger.get_job("other", job.job_id) is None
    assert await world.ledger.cancel_job("other", job.job_id) is None
    assert await world.ledger.delete_job("other", job.job_id) is None
    assert await world.ledger.finished_parts("other", job.job_id) == []
    assert await world.ledger.list_jobs("other", JobQuery(), limit=10) == []
    assert await world.job(job) == job


async def test_a_job_that_never_was_is_missing(world: World) -> None:
    assert await world.ledger.get_job("acme", "no-such") is None
    assert await world.ledger.cancel_job("acme", "no-such") is None
    assert await world.ledger.delete_job("acme", "no-such") is None
    assert await world.ledger.known_jobs(["no-such"]) == set()


async def test_a_repeated_request_answers_with_its_job_whatever_the_quota(
    world: World,
) -> None:
    first = await world.create(request_id="r", fingerprint="same")
    again, created = await world.ledger.create_job(
        world.new(request_id="r", fingerprint="same"), max_active=1
    )
    assert (again, created) == (first, False)


async def test_a_repeated_request_with_another_payload_is_a_conflict(world: World) -> None:
    first = await world.create(request_id="r", fingerprint="one")
    with pytest.raises(RequestIdConflict) as caught:
        await world.ledger.create_job(world.new(request_id="r", fingerprint="two"))
    assert caught.value.job_id == first.job_id
    assert len(await world.ledger.list_jobs("acme", JobQuery(), limit=10)) == 1


async def test_request_ids_are_each_tenants_own(world: World) -> None:
    await world.create("acme", request_id="r", fingerprint="one")
    await world.create("other", request_id="r", fingerprint="two")


async def test_jobs_without_request_id_are_never_the_same(world: World) -> None:
    await world.create()
    await world.create()
    assert len(await world.ledger.list_jobs("acme", JobQuery(), limit=10)) == 2


async def test_of_many_equal_requests_at_once_one_makes_the_job(world: World) -> None:
    answers = await asyncio.gather(
        *(
            world.ledger.create_job(world.new(request_id="r", fingerprint="same"))
            for _ in range(8)
        )
    )
    assert len({job.job_id for job, _ in answers}) == 1
    assert [created for _, created in answers].count(True) == 1


async def test_the_quota_of_unfinished_jobs_is_exact_under_many_calls(world: World) -> None:
    answers = await asyncio.gather(
        *(world.ledger.create_job(world.new(), max_active=3) for _ in range(8)),
        return_exceptions=True,
    )
    refused = [answer for answer in answers if isinstance(answer, TooManyActiveJobs)]
    assert len(refused) == 5
    await world.ledger.create_job(world.new("other"), max_active=3)


async def test_finished_jobs_do_not_count_towards_the_quota(world: World) -> None:
    job = await world.create()
    with pytest.raises(TooManyActiveJobs):
        await world.ledger.create_job(world.new(), max_active=1)
    await world.ledger.cancel_job("acme", job.job_id)
    await world.ledger.create_job(world.new(), max_active=1)


# --- listing


async def test_what_is_read_of_jobs_at_one_go_is_what_is_read_one_by_one(
    world: World,
) -> None:
    async def made(parts: int, shards: int = 1) -> Job:
        job, lease = await world.running(shards)
        for sequence in range(parts - shards):
            await world.ledger.add_part(lease, part(lease, sequence))
        for other in [await world.lease() for _ in range(shards - 1)]:
            await world.finish(other)
        assert await world.finish(lease, parts - shards)
        return job

    few, many = await made(reading._FEW_PARTS, 3), await made(reading._FEW_PARTS + 1)
    with_errors, lease = await world.running()
    error = replace(part(lease), kind=OutputKind.ERROR)
    await world.ledger.add_part(lease, part(lease), error)
    await world.ledger.complete_shard(lease)
    failed, lease = await world.running()
    await world.ledger.add_part(lease, part(lease))
    await world.ledger.fail_attempt(lease, SOURCE_DOWN, retry_in=None)
    deleted = await world.succeeded()
    await world.ledger.delete_job(deleted.tenant, deleted.job_id)
    others = await world.succeeded("another")
    running, lease = await world.running(2)
    await world.ledger.add_part(lease, part(lease))
    waiting = await world.create()
    sent = await Deliveries(world).create(sink("s"))
    every = few, many, with_errors, failed, deleted, others, running, waiting, sent
    asked = [("acme", job.job_id) for job in every]

    database = cast("SqlLedger", world.ledger)._database
    plain = await database.read(lambda tx: reading.get_plain_jobs(tx, asked))
    whole = await database.read(lambda tx: reading.get_jobs(tx, asked, large=True))
    # These need to be asked about once more.
    left = {("acme", job.job_id) for job in (many, waiting, sent)}
    assert plain == {key: job for key, job in whole.items() if key not in left}
    assert whole["acme", others.job_id] is whole["acme", deleted.job_id] is None
    for key in asked:
        assert await world.ledger.get_job(*key) == whole[key]
    for job, parts, errors in ((few, 100, 0), (many, 101, 0), (with_errors, 1, 1)):
        found = whole["acme", job.job_id]
        assert found is not None
        assert found.manifest is not None
        assert len(found.manifest.parts) == parts
        assert len(found.manifest.error_parts) == errors


async def test_lists_are_newest_first_and_pages_neither_skip_nor_repeat(
    world: World,
) -> None:
    # Pairs share their moment, so that only the id tells them apart.
    made = []
    for index in range(9):
        made.append(await world.create())
        if index % 2:
            world.clock.advance(1)
    newest_first = [job.job_id for job in reversed(made)]

    seen: list[str] = []
    before = None
    while page := await world.ledger.list_jobs("acme", JobQuery(), limit=2, before=before):
        seen += [job.job_id for job in page]
        before = (page[-1].create_time, page[-1].job_id)
        await world.create()  # newer than the page: does not disturb it

    assert seen == newest_first


async def test_lists_carry_no_manifest_but_all_the_rest(world: World) -> None:
    job = await world.succeeded()
    [listed] = await world.ledger.list_jobs("acme", JobQuery(), limit=10)
    assert listed.manifest is None
    assert job.manifest is not None
    assert listed.progress == job.progress
    assert listed.finish_time == job.finish_time


async def test_every_condition_of_a_query_must_hold(world: World) -> None:
    done = await world.succeeded()
    world.clock.advance(10)
    blue = await world.create(dataset="positions", labels={"team": "blue", "env": "prod"})
    world.clock.advance(10)
    both = await world.create(labels={"team": "blue", "env": "test"})
    await world.ledger.cancel_job("acme", both.job_id)
    await world.create("other", labels={"team": "blue"})

    async def found(query: JobQuery) -> list[str]:
        jobs = await world.ledger.list_jobs("acme", query, limit=10)
        return [job.job_id for job in jobs]

    assert await found(JobQuery()) == [both.job_id, blue.job_id, done.job_id]
    states = frozenset({JobState.SUCCEEDED, JobState.CANCELLED})
    assert await found(JobQuery(states=states)) == [both.job_id, done.job_id]
    assert await found(JobQuery(states=frozenset({JobState.PENDING}))) == [blue.job_id]
    assert await found(JobQuery(states=frozenset({JobState.FAILED}))) == []
    assert await found(JobQuery(dataset="positions")) == [blue.job_id]
    assert await found(JobQuery(labels={"team": "blue"})) == [both.job_id, blue.job_id]
    prod = {"team": "blue", "env": "prod"}
    assert await found(JobQuery(labels=prod)) == [blue.job_id]
    assert await found(JobQuery(labels={"team": "red"})) == []
    assert await found(JobQuery(labels={"env": "test"}, states=states)) == [both.job_id]
    at = blue.create_time
    assert await found(JobQuery(created_from=at)) == [both.job_id, blue.job_id]
    assert await found(JobQuery(created_before=at)) == [done.job_id]
    window = JobQuery(
        created_from=at, created_before=at + timedelta(microseconds=1), labels=prod
    )
    assert await found(window) == [blue.job_id]


# --- the queue


async def test_the_queue_position_counts_the_tenants_jobs_that_go_first(
    world: World,
) -> None:
    low = await world.create(priority=-1)
    first = await world.create()
    second = await world.create()
    high = await world.create(priority=5)
    await world.create("other", priority=100)

    async def positions() -> list[int | None]:
        got = [
            (await world.job(j)).progress.queue_position for j in (high, first, second, low)
        ]
        listed = {
            job.job_id: job.progress.queue_position
            for job in await world.ledger.list_jobs("acme", JobQuery(), limit=10)
        }
        assert got == [listed[job.job_id] for job in (high, first, second, low)]
        return got

    assert await positions() == [0, 1, 2, 3]
    # The position is what the claims then show.
    order = []
    for _ in range(5):
        lease = await world.lease()
        order += [lease.job_id] if lease.tenant == "acme" else []
        if len(order) == 1:
            assert await positions() == [None, 0, 1, 2]
    assert order == [job.job_id for job in (high, first, second, low)]


async def test_a_job_that_waits_for_a_retry_stands_in_nobodys_way(world: World) -> None:
    early = await world.create()
    lease = await world.lease()
    late = await world.create()
    await world.ledger.fail_attempt(lease, SOURCE_DOWN, retry_in=timedelta(seconds=30))
    assert (await world.job(late)).progress.queue_position == 0
    assert (await world.job(early)).progress.queue_position == 0
    world.clock.advance(30)
    assert (await world.job(late)).progress.queue_position == 1


# --- cancelling


async def test_cancelling_a_waiting_job_ends_it(world: World) -> None:
    job = await world.create(ttl=timedelta(hours=2))
    world.clock.advance(1)
    answer = await world.ledger.cancel_job("acme", job.job_id)
    assert answer is not None
    cancelled, outcome = answer
    assert outcome is CancelOutcome.CANCELLED
    assert cancelled == await world.job(job)
    assert cancelled.state is JobState.CANCELLED
    assert cancelled.finish_time == world.clock.now()
    assert cancelled.expire_time == world.clock.now() + timedelta(hours=2)
    assert cancelled.revision > job.revision
    assert cancelled.start_time is None
    assert await world.claim() is None


async def test_cancelling_a_running_job_takes_its_workers_leases(world: World) -> None:
    job, first = await world.running(2)
    second = await world.lease()
    await world.ledger.cancel_job("acme", job.job_id)
    before = world.dump()
    for lease in (first, second):
        with pytest.raises(LeaseLost):
            await world.finish(lease)
    assert set(await world.ledger.renew([first, second], timedelta(seconds=15))) == {
        first,
        second,
    }
    assert world.dump() == before
    assert await world.ledger.finished_parts("acme", job.job_id) == []


async def test_a_cancelled_job_is_cleaned_up_at_once_and_after_its_last_writer(
    world: World,
) -> None:
    job, _ = await world.running()
    await world.ledger.cancel_job("acme", job.job_id)
    [now] = await world.work_off()
    assert (now.job_id, now.forget) == (job.job_id, False)
    world.clock.advance(15)
    assert await world.work_off() == [], "the lease has only just run out"
    world.clock.advance(5)
    [late] = await world.work_off()
    assert (late.job_id, late.forget) == (job.job_id, False)
    world.clock.advance(1000)
    assert await world.work_off() == []


async def test_a_job_nobody_worked_on_needs_one_cleanup(world: World) -> None:
    job = await world.create()
    await world.ledger.cancel_job("acme", job.job_id)
    assert len(await world.work_off()) == 1
    world.clock.advance(1000)
    assert await world.work_off() == []


async def test_cancelling_twice_or_too_late_changes_nothing_and_says_so(
    world: World,
) -> None:
    job = await world.create()
    await world.ledger.cancel_job("acme", job.job_id)
    done = await world.succeeded()
    failed, lease = await world.running()
    await world.ledger.fail_attempt(lease, SOURCE_DOWN, retry_in=None)
    world.clock.advance(1)
    before = world.dump()
    for known, expected in (
        (job, CancelOutcome.ALREADY_CANCELLED),
        (done, CancelOutcome.ALREADY_FINISHED),
        (failed, CancelOutcome.ALREADY_FINISHED),
    ):
        answer = await world.ledger.cancel_job("acme", known.job_id)
        assert answer is not None
        assert answer == (await world.job(known), expected)
    assert world.dump() == before


# --- deleting


async def test_an_unfinished_job_is_not_deleted(world: World) -> None:
    waiting = await world.create()
    before = world.dump()
    assert await world.ledger.delete_job("acme", waiting.job_id) is JobState.PENDING
    assert world.dump() == before
    await world.lease()
    assert await world.ledger.delete_job("acme", waiting.job_id) is JobState.RUNNING
    assert (await world.job(waiting)).state is JobState.RUNNING


async def test_a_deleted_job_is_gone_at_once_and_forgotten_after_its_cleanup(
    world: World,
) -> None:
    job = await world.succeeded()
    assert await world.ledger.delete_job("acme", job.job_id) is JobState.SUCCEEDED
    assert await world.ledger.get_job("acme", job.job_id) is None
    assert await world.ledger.list_jobs("acme", JobQuery(), limit=10) == []
    assert await world.ledger.finished_parts("acme", job.job_id) == []
    assert await world.ledger.cancel_job("acme", job.job_id) is None
    assert await world.ledger.delete_job("acme", job.job_id) is None
    assert await world.ledger.known_jobs([job.job_id, "x"]) == {job.job_id}

    lease = await world.lease(CLEANUP)
    assert (lease.job_id, lease.forget) == (job.job_id, True)
    assert await world.ledger.kept_parts(lease) is None
    await world.ledger.complete_cleanup(lease)

    assert await world.ledger.known_jobs([job.job_id]) == set()
    rows = world.dump()
    assert rows.pop("tasks"), "the reap and sweep tasks stay"
    assert rows.pop("counters"), "tokens rise for ever"
    assert rows.pop("identity"), "it is the same ledger for ever"
    assert not any(rows.values()), rows


async def test_a_deleted_jobs_request_id_is_free_again(world: World) -> None:
    job = await world.create(request_id="r", fingerprint="one")
    await world.ledger.cancel_job("acme", job.job_id)
    await world.ledger.delete_job("acme", job.job_id)
    new = await world.create(request_id="r", fingerprint="two")
    assert new.job_id != job.job_id
    await world.work_off()
    assert (await world.job(new)).state is JobState.PENDING


async def test_a_job_is_not_forgotten_while_a_late_writer_may_bring_it_back(
    world: World,
) -> None:
    job, _ = await world.running()
    await world.ledger.cancel_job("acme", job.job_id)
    await world.ledger.delete_job("acme", job.job_id)
    assert [lease.forget for lease in await world.work_off()] == [False, False]
    assert await world.ledger.known_jobs([job.job_id]) == {job.job_id}
    world.clock.advance(20)
    assert True in [lease.forget for lease in await world.work_off()]
    assert await world.ledger.known_jobs([job.job_id]) == set()


# --- parts of a running job


async def test_finished_parts_are_the_certain_beginning_of_the_output(
    world: World,
) -> None:
    job, zero = await world.running(3)
    one = await world.lease()
    two = await world.lease()
    await world.ledger.add_part(one, part(one, 0))
    await world.ledger.add_part(two, part(two, 0))

    async def finished() -> list[tuple[int, int]]:
        parts = await world.ledger.finished_parts("acme", job.job_id)
        return [(part.shard, part.sequence) for part in parts]

    assert await finished() == [], "shard 0 may still have parts to come"
    await world.ledger.add_part(zero, part(zero, 0))
    assert await finished() == [(0, 0)]
    await world.finish(zero, 1)
    assert await finished() == [(0, 0), (0, 1), (1, 0)]
    await world.finish(one, 1)
    assert await finished() == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    await world.ledger.complete_shard(two)
    assert await finished() == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    manifest = (await world.job(job)).manifest
    assert manifest is not None
    assert manifest.columns == COLUMNS
    assert list(manifest.parts) == await world.ledger.finished_parts("acme", job.job_id)


async def test_a_job_without_a_plan_has_no_finished_parts(world: World) -> None:
    job = await world.create()
    assert await world.ledger.finished_parts("acme", job.job_id) == []
    await world.lease()
    assert await world.ledger.finished_parts("acme", job.job_id) == []


async def test_parts_of_a_failed_job_are_never_shown(world: World) -> None:
    job, lease = await world.running()
    await world.ledger.add_part(lease, part(lease))
    await world.ledger.fail_attempt(lease, SOURCE_DOWN, retry_in=None)
    failed = await world.job(job)
    assert failed.error == SOURCE_DOWN
    assert failed.manifest is None
    assert await world.ledger.finished_parts("acme", job.job_id) == []
