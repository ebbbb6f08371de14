"""What a ledger tells of itself for metrics, on every database."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy.dialects import postgresql

from exportd_server.errors import ErrorReason, ErrorRecord
from exportd_server.jobs.ledger.base import NewJob, TaskKind
from exportd_server.jobs.ledger.postgres import open_postgres_ledger
from exportd_server.jobs.ledger.statements import measuring, standing
from exportd_server.jobs.model import JobState
from exportd_server.platform import metrics_exports as metrics
from tests.support.ledger import BACKENDS, LedgerDatabase, World, pages_read, spec

FAILED = ErrorRecord(ErrorReason.SOURCE_FAILED, "the source failed")


@pytest.fixture(params=BACKENDS)
async def world(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[World]:
    async with BACKENDS[request.param](tmp_path, request) as world:
        yield world


async def test_jobs_and_tasks_are_told_by_state_and_work_by_its_age(world: World) -> None:
    before = await world.ledger.backlog()
    assert before.jobs == {}
    assert TaskKind.PLAN not in before.waiting
    await world.running(3)
    await world.create("other")
    world.clock.advance(5)
    found = await world.ledger.backlog()
    assert found.jobs == {JobState.PENDING: 1, JobState.RUNNING: 1}
    assert found.tasks[TaskKind.PLAN, "ready"] == 1
    assert found.tasks[TaskKind.SHARD, "ready"] == 2
    assert found.tasks[TaskKind.SHARD, "leased"] == 1
    assert found.waiting[TaskKind.PLAN] == pytest.approx(5, abs=0.5)
    assert found.waiting[TaskKind.SHARD] == pytest.approx(5, abs=0.5)


async def test_housekeeping_that_was_never_done_has_no_age(world: World) -> None:
    found = await world.ledger.backlog()
    assert found.tasks[TaskKind.REAP, "ready"] == 1
    assert TaskKind.REAP not in found.waiting


async def test_work_that_comes_due_waits_although_nobody_claims(world: World) -> None:
    lease = (await world.running())[1]
    await world.ledger.fail_attempt(lease, FAILED, retry_in=timedelta(seconds=30))
    world.clock.advance(10)
    assert (await world.ledger.backlog()).waiting[TaskKind.SHARD] == 0
    world.clock.advance(60)
    found = await world.ledger.backlog()
    assert found.tasks[TaskKind.SHARD, "scheduled"] == 1
    assert found.waiting[TaskKind.SHARD] == pytest.approx(40, abs=0.5)


async def test_a_lease_that_ran_out_waits_and_is_taken_over(world: World) -> None:
    _, lease = await world.running()
    assert not lease.takeover
    assert (await world.ledger.backlog()).waiting[TaskKind.SHARD] == 0
    world.clock.advance(100)
    assert (await world.ledger.backlog()).waiting[TaskKind.SHARD] > 50
    again = await world.lease(owner="another")
    assert again.task_id == lease.task_id
    assert again.takeover


async def test_what_was_given_back_or_failed_is_no_takeover(world: World) -> None:
    _, lease = await world.running()
    await world.ledger.release(lease)
    again = await world.lease(owner="another")
    assert not again.takeover
    await world.ledger.fail_attempt(again, FAILED, retry_in=timedelta(seconds=1))
    world.clock.advance(2)
    assert not (await world.lease()).takeover


_QUESTIONS = {
    "open tasks": measuring._open_tasks(),
    "unfinished jobs": measuring._unfinished_jobs(),
    "holders": standing.holders(),
    "late leases": standing.late_leases(0),
    "jobs by dataset": standing.unfinished_jobs(),
    "tasks by kind": standing.open_tasks(),
    "sink queues": standing.standing_deliveries(),
}
"""What metrics ask every few seconds, and `exportd-server status`."""


@pytest.mark.minutes
@pytest.mark.parametrize("question", _QUESTIONS)
async def test_how_the_ledger_stands_costs_nothing_for_what_has_ended(
    ledger_database: LedgerDatabase, question: str
) -> None:
    ledger_database.reset()
    ledger = await open_postgres_ledger(ledger_database.url, connections=1)
    await ledger.create_job(NewJob(str(UUID(int=1)), "acme", spec()))
    await ledger.close()
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    ask = str(
        _QUESTIONS[question].compile(
            dialect=dialect, compile_kwargs={"literal_binds": True}
        )
    )
    columns = ", ".join(
        name
        for (name,) in ledger_database.ask(
            "SELECT column_name FROM information_schema.columns "
            "WHERE table_schema = 'exportd' AND table_name = 'jobs' "
            "AND column_name NOT IN ('job_id', 'state')"
        )
    )
    ledger_database.execute(
        f"INSERT INTO jobs (job_id, state, {columns}) SELECT n::text, 'SUCCEEDED', "
        f"{columns} FROM jobs, generate_series(1, 20000) n"
    )
    columns = "kind, tenant, generation, priority, since, run_at"
    ledger_database.execute(
        f"INSERT INTO tasks (state, job_id, {columns}) SELECT 'done', j.job_id, "
        "t.kind, t.tenant, t.generation, t.priority, t.since, t.run_at "
        "FROM jobs j, tasks t WHERE t.kind = 'plan' AND j.state = 'SUCCEEDED'"
    )
    ledger_database.execute("ANALYZE jobs; ANALYZE tasks")
    assert pages_read(ledger_database, "SELECT sum(length(spec)) FROM jobs") > 500
    assert pages_read(ledger_database, ask) < 50


def counting() -> Callable[[], dict[str, float]]:
    """What has been counted of jobs since now."""
    # As labels have it: another test of this process may have served its dataset.
    dataset = metrics.known(spec().dataset)
    names = {
        "created": metrics.created.labels(dataset, "CSV"),
        "failed": metrics.failed.labels(dataset, "SOURCE_FAILED"),
        **{end: metrics.finished.labels(dataset, "CSV", end) for end in metrics.ENDS},
    }
    before = {name: metric._value.get() for name, metric in names.items()}
    return lambda: {
        name: metric._value.get() - before[name] for name, metric in names.items()
    }


async def test_jobs_are_counted_as_they_are_made_and_end(world: World) -> None:
    counted = counting()
    await world.succeeded()
    job = await world.create()
    await world.ledger.cancel_job(job.tenant, job.job_id)
    await world.ledger.cancel_job(job.tenant, job.job_id)
    _, lease = await world.running()
    await world.ledger.fail_attempt(lease, FAILED, retry_in=None)
    assert counted() == {
        "created": 3,
        "failed": 1,
        "SUCCEEDED": 1,
        "CANCELLED": 1,
        "FAILED": 1,
    }


async def test_the_same_request_again_counts_once(world: World) -> None:
    counted = counting()
    new = world.new(request_id="r", fingerprint="f")
    await world.ledger.create_job(new)
    await world.ledger.create_job(new)
    assert counted()["created"] == 1


async def test_a_job_that_lost_its_last_attempt_is_counted_by_who_finds_it(
    world: World,
) -> None:
    counted = counting()
    job = await world.create()
    while (await world.job(job)).state is not JobState.FAILED:
        await world.claim()
        world.clock.advance(100)
    assert counted()["FAILED"] == 1
