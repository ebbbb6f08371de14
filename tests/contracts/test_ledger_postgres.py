"""What is PostgreSQL's own: several processes, a server that goes away, its errors."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, closing, contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar, cast
from uuid import UUID

import psutil
import psycopg
import pytest
import sqlalchemy as sa
from psycopg.pq import TransactionStatus

from exportd_server.errors import ConfigurationError, ErrorReason, LedgerUnavailable
from exportd_server.jobs.ledger import lanes, news, schema
from exportd_server.jobs.ledger.base import (
    ClaimLimits,
    DeliveryQuery,
    JobQuery,
    Lease,
    LeaseLost,
    NewJob,
    TaskKind,
)
from exportd_server.jobs.ledger.postgres import (
    migrate_postgres_ledger,
    open_postgres_ledger,
)
from exportd_server.jobs.ledger.postgres_server import OLDEST, Address, require_version
from exportd_server.jobs.ledger.prepared import Prepared
from exportd_server.jobs.ledger.signals import Changes
from exportd_server.jobs.ledger.sql import SqlLedger
from exportd_server.jobs.ledger.statements import lifecycle, reading
from exportd_server.jobs.ledger.tables import jobs
from exportd_server.jobs.ledger.transaction import Transaction
from exportd_server.jobs.model import (
    DeliveryState,
    DeliveryStatus,
    JobState,
    QueuePolicy,
)
from tests.support.deliveries import DELIVER, DOWN, sink
from tests.support.ledger import (
    CLEANUP,
    COLUMNS,
    EXPORT,
    LEASE,
    LedgerDatabase,
    pages_read,
    part,
    shards,
    spec,
)
from tests.support.postgres import PostgresServer, running_postgres
from tests.support.server import until
from tests.support.waits import ENOUGH

LONG = 600.0

T = TypeVar("T")


def new(number: int, tenant: str = "acme", **what: Any) -> NewJob:
    request_id = what.pop("request_id", "")
    return NewJob(str(UUID(int=number)), tenant, spec(**what), request_id, "same")


async def claim(ledger: SqlLedger, limit: int | None = None) -> Lease | None:
    return await ledger.claim("w", EXPORT, lease=LEASE, limits=ClaimLimits(limit))


@pytest.fixture
async def fleet(ledger_database: LedgerDatabase) -> AsyncIterator[list[SqlLedger]]:
    """Four processes' ledgers on one database, by the server's clock."""
    ledger_database.reset()
    async with AsyncExitStack() as stack:
        ledgers = []
        for _ in range(4):
            ledger = await open_postgres_ledger(ledger_database.url, connections=4)
            stack.push_async_callback(ledger.close)
            ledgers.append(ledger)
        yield ledgers


# --- several processes


async def test_no_task_is_ever_given_to_two(fleet: list[SqlLedger]) -> None:
    for number in range(1, 41):
        await fleet[0].create_job(new(number, f"tenant-{number % 5}"))

    async def work(ledger: SqlLedger) -> list[Lease]:
        leases = []
        while (lease := await claim(ledger)) is not None:
            leases.append(lease)
        return leases

    taken = await asyncio.gather(*(work(ledger) for ledger in fleet for _ in range(3)))
    leases = [lease for some in taken for lease in some]
    assert len({lease.token for lease in leases}) == len(leases)
    assert sorted(lease.job_id for lease in leases) == [
        str(UUID(int=n)) for n in range(1, 41)
    ]


async def test_what_only_prepared_statements_wrote_is_committed(
    fleet: list[SqlLedger],
) -> None:
    one, other, *_ = fleet
    await one.create_job(new(1))
    priority = Prepared(sa.update(jobs))

    def write(tx: Transaction) -> None:
        priority.rows(tx.connection, priority=7)

    await one._database.write(write)
    (job,) = await other.list_jobs("acme", JobQuery(), limit=2)
    found = await other._database.read(
        lambda tx: reading.visible_job(tx, "acme", job.job_id)
    )
    assert found is not None
    assert found.priority == 7


async def test_a_limit_of_running_jobs_is_exact_however_many_claim_at_once(
    fleet: list[SqlLedger],
) -> None:
    for number in range(1, 41):
        await fleet[0].create_job(new(number, f"tenant-{number % 2}"))
    for _ in range(3):
        claims = [claim(ledger, limit=3) for ledger in fleet for _ in range(4)]
        taken = [lease for lease in await asyncio.gather(*claims) if lease]
        assert Counter(lease.tenant for lease in taken) == {"tenant-0": 3, "tenant-1": 3}
        for lease in taken:
            await fleet[0].cancel_job(lease.tenant, lease.job_id)


@pytest.mark.parametrize("quota", ["max_active", "max_queued"])
async def test_a_quota_is_exact_however_many_create_at_once(
    fleet: list[SqlLedger], quota: str
) -> None:
    made = await asyncio.gather(
        *(
            fleet[number % 4].create_job(new(number), **{quota: 5})
            for number in range(1, 21)
        ),
        return_exceptions=True,
    )
    assert sum(isinstance(one, tuple) for one in made) == 5


async def test_one_request_id_makes_one_job_however_many_send_it(
    fleet: list[SqlLedger],
) -> None:
    made = await asyncio.gather(
        *(
            fleet[number % 4].create_job(new(number, request_id="r"))
            for number in range(1, 17)
        )
    )
    assert len({job.job_id for job, _ in made}) == 1
    assert [created for _, created in made].count(True) == 1


async def test_work_created_by_one_process_wakes_another(fleet: list[SqlLedger]) -> None:
    here, there = fleet[:2]
    assert await claim(there) is None
    waiting = asyncio.create_task(there.wait_for_work(LONG))
    await asyncio.wait((waiting,), timeout=0.1)
    assert not waiting.done()
    await here.create_job(new(1))
    async with asyncio.timeout(ENOUGH):
        await waiting
    assert await claim(there) is not None


async def test_a_watcher_hears_of_changes_made_elsewhere(fleet: list[SqlLedger]) -> None:
    here, there = fleet[:2]
    job, _ = await here.create_job(new(1))
    waiting = asyncio.create_task(there.wait_for_change(job.job_id, job.revision, LONG))
    await asyncio.wait((waiting,), timeout=0.1)
    assert not waiting.done()
    await claim(here)
    async with asyncio.timeout(ENOUGH):
        await waiting
    found = await there.get_job("acme", job.job_id)
    assert found is not None
    assert found.state is JobState.RUNNING


async def test_a_cancel_elsewhere_sets_the_fence(fleet: list[SqlLedger]) -> None:
    here, there = fleet[:2]
    job, _ = await here.create_job(new(1))
    lease = await claim(there)
    assert lease is not None
    with there.fence(lease) as lost:
        await here.cancel_job("acme", job.job_id)
        async with asyncio.timeout(ENOUGH):
            await lost.wait()
    assert await there.renew([lease], LEASE) == [lease]


async def test_one_publishes_however_many_complete_their_shards_at_once(
    fleet: list[SqlLedger],
) -> None:
    job, _ = await fleet[0].create_job(new(1))
    plan = await claim(fleet[0])
    assert plan is not None
    leases = [await fleet[0].record_plan(plan, shards(4), COLUMNS, estimated_rows=None)]
    for ledger in fleet[1:]:
        lease = await claim(ledger)
        assert lease is not None
        leases.append(lease)

    async def finish(ledger: SqlLedger, lease: Lease) -> bool:
        await ledger.add_part(lease, part(lease))
        return await ledger.complete_shard(lease)

    ended = await asyncio.gather(*map(finish, fleet, leases))
    assert sorted(ended) == [False, False, False, True]
    found = await fleet[2].get_job("acme", job.job_id)
    assert found is not None
    assert found.manifest is not None
    assert [one.shard for one in found.manifest.parts] == [0, 1, 2, 3]


async def test_operations_on_one_job_from_everywhere_never_deadlock(
    fleet: list[SqlLedger],
) -> None:
    """Renewals, progress, parts, claims and a cancel of many-sharded jobs at once."""
    for number in range(1, 5):
        await fleet[0].create_job(new(number))

    async def work(ledger: SqlLedger) -> None:
        for _ in range(12):
            lease = await claim(ledger)
            if lease is None:
                return
            with suppress(LeaseLost):
                if lease.kind is TaskKind.PLAN:
                    lease = await ledger.record_plan(
                        lease, shards(4), COLUMNS, estimated_rows=None
                    )
                await asyncio.gather(
                    ledger.renew([lease], LEASE),
                    ledger.record_progress(lease, rows=1, bytes_=1, rows_per_second=1),
                    ledger.add_part(lease, part(lease)),
                )
                await ledger.complete_shard(lease)

    async with asyncio.timeout(ENOUGH):
        await asyncio.gather(
            *(work(ledger) for ledger in fleet for _ in range(2)),
            fleet[0].cancel_job("acme", str(UUID(int=4))),
        )


async def test_a_renewal_may_come_from_another_threads_loop(
    fleet: list[SqlLedger],
) -> None:
    await fleet[0].create_job(new(1))
    lease = await claim(fleet[0])
    assert lease is not None
    lost = await asyncio.to_thread(
        lambda: asyncio.run(fleet[0].renew([lease], timedelta(seconds=60)))
    )
    assert lost == []


# --- deliveries


async def deliveries_of(
    ledger: SqlLedger,
    queues: dict[str, int],
    *,
    parts: int,
    tenants: int = 1,
    owner: str = "",
) -> Lease:
    """So many parts due to each queue, which allows so many under way; returns the lease
    of the last job."""
    sinks = tuple(sink(name, name) for name in queues)
    policies = tuple(
        QueuePolicy(name, owner, concurrency=most) for name, most in queues.items()
    )
    lease = None
    for number in range(tenants):
        one = new(1000 + number, f"tenant-{number}", sinks=sinks)
        await ledger.create_job(replace(one, queues=policies))
        plan = await claim(ledger)
        assert plan is not None
        lease = await ledger.record_plan(plan, shards(1), COLUMNS, estimated_rows=None)
        for sequence in range(parts):
            await ledger.add_part(lease, part(lease, sequence))
    assert lease is not None
    return lease


def under_way(database: LedgerDatabase) -> dict[str, int]:
    return dict(
        database.ask(
            "SELECT queue, count(*)::int FROM tasks WHERE state = 'leased' AND "
            "queue IS NOT NULL GROUP BY queue"
        )
    )


async def test_no_more_of_a_queue_are_under_way_however_many_claim_at_once(
    fleet: list[SqlLedger], ledger_database: LedgerDatabase
) -> None:
    await deliveries_of(fleet[0], {"one": 1, "three": 3, "seven": 7}, parts=8, tenants=3)
    for _ in range(3):
        claims = [
            ledger.claim("w", DELIVER, lease=LEASE) for ledger in fleet for _ in range(10)
        ]
        taken = [lease for lease in await asyncio.gather(*claims) if lease]
        assert len(taken) == len({lease.task_id for lease in taken}) == 11
        assert under_way(ledger_database) == {"one": 1, "three": 3, "seven": 7}
        await asyncio.gather(
            *(
                fleet[at % 4].complete_delivery(lease, "ok")
                for at, lease in enumerate(taken)
            )
        )
        assert under_way(ledger_database) == {}


async def test_every_delivery_is_made_once_while_queues_are_always_at_their_limit(
    fleet: list[SqlLedger], ledger_database: LedgerDatabase
) -> None:
    """Twelve deliverers of four processes claim, complete, fail, release and renew, all at
    once, while others look how many are under way."""
    export = await deliveries_of(fleet[0], {"two": 2, "five": 5}, parts=12)
    assert await fleet[0].complete_shard(export)
    made: list[str] = []
    looks = 0

    async def deliver(ledger: SqlLedger, number: int) -> None:
        while len(made) < 26:
            lease = await ledger.claim("w", DELIVER, lease=LEASE)
            if lease is None:
                await ledger.wait_for_work(0.2)
                continue
            work = await ledger.delivery_work(lease)
            assert await ledger.renew([lease], LEASE) == []
            if number % 3 == 0 and lease.attempt == 1:
                again = timedelta(milliseconds=20)
                await ledger.fail_delivery(lease, DOWN, retry_in=again)
            elif number % 3 == 1 and lease.attempt == 1 and len(made) % 2:
                await ledger.release(lease)
            else:
                await ledger.complete_delivery(lease, "ok")
                made.append(work.delivery_id)

    async def watch() -> None:
        nonlocal looks
        while len(made) < 26:
            found = await asyncio.to_thread(under_way, ledger_database)
            assert found.get("two", 0) <= 2
            assert found.get("five", 0) <= 5
            looks += 1

    async with asyncio.timeout(ENOUGH):
        await asyncio.gather(
            watch(), *(deliver(fleet[number % 4], number) for number in range(12))
        )
    assert looks > 3
    assert len(set(made)) == 26
    job = await fleet[3].get_job(export.tenant, export.job_id)
    assert job is not None
    assert job.delivery_status is DeliveryStatus.DELIVERED


async def test_deliveries_of_one_job_that_end_at_once_bring_one_completion(
    fleet: list[SqlLedger],
) -> None:
    export = await deliveries_of(fleet[0], {"q": 100}, parts=16)
    held = [await fleet[0].claim("w", DELIVER, lease=LEASE) for _ in range(16)]
    ends = [
        fleet[at % 4].complete_delivery(lease, "ok")
        for at, lease in enumerate(held)
        if lease
    ]
    await asyncio.gather(fleet[1].complete_shard(export), *ends)
    completion = await fleet[2].claim("w", DELIVER, lease=LEASE)
    assert completion is not None
    assert (await fleet[2].delivery_work(completion)).completion
    assert await fleet[3].claim("w", DELIVER, lease=LEASE) is None


async def test_an_endpoint_is_disabled_once_however_many_see_it_gone(
    fleet: list[SqlLedger],
) -> None:
    await deliveries_of(fleet[0], {"q": 100}, parts=12, owner="tenant-0")
    held = [await fleet[0].claim("w", DELIVER, lease=LEASE) for _ in range(12)]
    async with asyncio.timeout(ENOUGH):
        told = await asyncio.gather(
            *(
                fleet[at % 4].fail_delivery(
                    lease, DOWN, retry_in=timedelta(hours=1), gone=True
                )
                for at, lease in enumerate(held)
                if lease
            )
        )
    assert [each.disabled for each in told].count(True) == 1
    assert all(each.dead for each in told)


async def test_one_process_redrives_while_others_deliver_and_cancel(
    fleet: list[SqlLedger],
) -> None:
    await deliveries_of(fleet[0], {"q": 100}, parts=6, tenants=5)

    async def bury(ledger: SqlLedger) -> None:
        for _ in range(20):
            lease = await ledger.claim("w", DELIVER, lease=LEASE)
            if lease is not None:
                with suppress(LeaseLost):
                    await ledger.fail_delivery(lease, DOWN, retry_in=None)

    async def redrive(tenant: str) -> None:
        for _ in range(5):
            await fleet[3].redrive_deliveries(tenant, DeliveryQuery())

    async with asyncio.timeout(ENOUGH):
        await asyncio.gather(
            *(bury(ledger) for ledger in fleet[:3]),
            *(redrive(f"tenant-{number}") for number in range(5)),
            fleet[1].cancel_job("tenant-2", str(UUID(int=1002))),
        )
    for number in range(5):
        tenant = f"tenant-{number}"
        await fleet[3].redrive_deliveries(tenant, DeliveryQuery())
        found = await fleet[0].list_deliveries(tenant, DeliveryQuery(), limit=100)
        states = {each.state for each in found}
        if number == 2:
            assert states <= {DeliveryState.FAILED, DeliveryState.DEAD_LETTERED}
        else:
            assert states == {DeliveryState.PENDING}
    due = 0
    while await fleet[0].claim("w", DELIVER, lease=LEASE) is not None:
        due += 1
    assert due == 24


async def test_deliveries_that_come_due_together_wake_more_than_one_process(
    fleet: list[SqlLedger], ledger_database: LedgerDatabase
) -> None:
    """The first to look makes all of them ready, so the second, who slept until then,
    would find nothing that is still to come due."""
    here, there = fleet[:2]
    await deliveries_of(here, {"q": 100}, parts=2)
    soon = timedelta(milliseconds=300)
    for _ in range(2):
        lease = await here.claim("w", DELIVER, lease=LEASE)
        assert lease is not None
        await here.fail_delivery(lease, DOWN, retry_in=soon)
    ledger_database.execute(
        "UPDATE tasks SET run_at = (SELECT max(run_at) FROM tasks) "
        "WHERE state = 'scheduled'"
    )
    assert await there.claim("w", DELIVER, lease=LEASE) is None
    waiting = asyncio.create_task(there.wait_for_work(LONG))
    # Sleeps by a clock that is not the server's, and a little longer than that.
    with pytest.MonkeyPatch.context() as patch:
        due = reading.next_due
        patch.setattr(
            reading,
            "next_due",
            lambda tx, since: None if (at := due(tx, since)) is None else at + 700_000,
        )
        await asyncio.wait((waiting,), timeout=0.1)
        async with asyncio.timeout(ENOUGH):
            while await here.claim("w", DELIVER, lease=LEASE) is None:
                await asyncio.sleep(0.02)
            await waiting
    assert await there.claim("w", DELIVER, lease=LEASE) is not None


# The server counts its tables when it gets round to it.
COUNTED = pytest.mark.parametrize("counted", ["never", "when empty", "when few", "since"])


@COUNTED
async def test_a_claim_of_a_delivery_reads_no_more_at_twenty_thousand_queued(
    fleet: list[SqlLedger], ledger_database: LedgerDatabase, counted: str
) -> None:
    """Pages of tables and indexes that the server looks at, whatever it has counted."""
    count = Counting(ledger_database, counted)
    count("when empty")
    await deliveries_of(fleet[0], {"q": 100, "full": 1}, parts=2)
    assert await fleet[0].claim("w", DELIVER, lease=LEASE) is not None
    count("when few")
    columns = "kind, tenant, job_id, generation, state, priority, since, run_at, queue"

    def fill(number: int) -> None:
        ledger_database.execute(
            f"INSERT INTO tasks ({columns}, lane) SELECT {columns}, queue || E'\\n' || "
            f"'t' || n % 5 FROM tasks, generate_series(1, {number}) n WHERE task_id IN "
            "(SELECT min(task_id) FROM tasks WHERE state = 'ready' AND queue IS NOT NULL "
            "GROUP BY queue)"
        )

    ask = "SELECT * FROM claim_delivery(NULL, 'w', 0, 1, 'me', '{}')"
    fill(500)
    few = pages_read(ledger_database, ask)
    assert few < 500
    fill(9_500)
    count("since")
    assert pages_read(ledger_database, ask) < 2 * few


@COUNTED
async def test_a_claim_of_a_shard_reads_no_more_at_ten_thousand_queued(
    fleet: list[SqlLedger], ledger_database: LedgerDatabase, counted: str
) -> None:
    count = Counting(ledger_database, counted)
    count("when empty")
    for number in range(1, 6):
        await fleet[0].create_job(new(number, f"tenant-{number}"))
    count("when few")
    columns = "kind, tenant, job_id, generation, state, priority, since, run_at"

    def fill(number: int) -> None:
        ledger_database.execute(
            f"INSERT INTO tasks ({columns}) SELECT {columns} FROM tasks, "
            f"generate_series(1, {number}) n WHERE task_id IN "
            "(SELECT min(task_id) FROM tasks WHERE state = 'ready' AND tenant <> '' "
            "GROUP BY tenant)"
        )

    kinds = "ARRAY['plan', 'shard']"
    ask = f"SELECT * FROM claim_task(NULL, 'w', {kinds}, 0, NULL, 5, 1, 0, 'me')"
    fill(100)
    few = pages_read(ledger_database, ask)
    assert few < 500
    fill(1_900)
    count("since")
    assert pages_read(ledger_database, ask) < 2 * few


class Counting:
    """Has the server count the rows of its tables at that time of a test alone."""

    def __init__(self, database: LedgerDatabase, when: str) -> None:
        self._database, self._when = database, when
        database.execute("ALTER TABLE tasks SET (autovacuum_enabled = false)")
        # What earlier tests deleted stands in the way until the server has cleaned up.
        database.execute("VACUUM (FULL) tasks")

    def __call__(self, when: str) -> None:
        if when == self._when:
            self._database.execute("ANALYZE")


# --- peers that stop


@contextmanager
def held(url: str, statement: str) -> Iterator[psycopg.Connection[Any]]:
    """A transaction that a peer opened and does not end, as one that is frozen would."""
    options = "-c search_path=exportd -c idle_in_transaction_session_timeout=60s"
    with closing(psycopg.connect(url, options=options)) as connection:
        connection.execute(statement.encode())
        yield connection
        # Closing alone would give the locks free when the server has noticed.
        connection.rollback()


async def test_a_claim_passes_by_what_a_frozen_peer_has_locked(
    fleet: list[SqlLedger], ledger_database: LedgerDatabase
) -> None:
    for number in range(1, 4):
        await fleet[0].create_job(new(number))
    first = str(UUID(int=1))
    with held(
        ledger_database.url, f"SELECT * FROM jobs WHERE job_id = '{first}' FOR UPDATE"
    ):
        taken = [await claim(fleet[1]), await claim(fleet[2])]
        assert [lease and lease.job_id for lease in taken] == [
            str(UUID(int=2)),
            str(UUID(int=3)),
        ]
        # What is locked is not there, and is looked for again soon.
        assert await claim(fleet[3]) is None
        async with asyncio.timeout(ENOUGH):
            await fleet[3].wait_for_work(LONG)
    lease = await claim(fleet[3])
    assert lease is not None
    assert lease.job_id == first


async def test_what_a_frozen_peer_holds_is_given_free_within_seconds(
    fleet: list[SqlLedger],
) -> None:
    """A transaction that does nothing is undone by the server."""
    job, _ = await fleet[0].create_job(new(1))
    holding, frozen = threading.Event(), threading.Event()

    def freeze(tx: Any) -> None:
        tx.connection.exec_driver_sql("UPDATE jobs SET priority = 99")
        holding.set()
        frozen.wait(ENOUGH)

    stuck = asyncio.create_task(fleet[0]._database.write(freeze))
    async with asyncio.timeout(ENOUGH):
        await asyncio.to_thread(holding.wait)
        cancelled = await fleet[1].cancel_job("acme", job.job_id)
    assert cancelled is not None
    assert cancelled[0].spec.priority == 0
    frozen.set()
    with pytest.raises(LedgerUnavailable):
        await stuck


async def test_more_calls_than_connections_stand_in_line(
    ledger_database: LedgerDatabase,
) -> None:
    ledger_database.reset()
    ledger = await open_postgres_ledger(ledger_database.url, connections=1)
    try:
        made = await asyncio.gather(
            *(ledger.create_job(new(number)) for number in range(1, 51))
        )
        assert len(made) == 50
    finally:
        await ledger.close()


async def test_a_job_without_attempts_that_is_locked_holds_up_no_claim(
    fleet: list[SqlLedger], ledger_database: LedgerDatabase
) -> None:
    ledger_database.execute("UPDATE tasks SET state = 'done'")
    for number in range(1, 4):
        await fleet[0].create_job(new(number))
    dead = str(UUID(int=1))
    for _ in range(5):
        lease = await claim(fleet[0])
        assert lease is not None
        assert lease.job_id == dead
        ledger_database.execute("UPDATE tasks SET lease_expires = 0 WHERE state = 'leased'")
    with held(
        ledger_database.url, f"SELECT * FROM jobs WHERE job_id = '{dead}' FOR UPDATE"
    ):
        async with asyncio.timeout(ENOUGH):
            lease = await claim(fleet[1])
        assert lease is not None
        assert lease.job_id != dead
    assert await claim(fleet[2]) is not None
    job = await fleet[0].get_job("acme", dead)
    assert job is not None
    assert job.state is JobState.FAILED


async def test_calls_that_wait_for_one_job_hold_up_no_other(
    fleet: list[SqlLedger], ledger_database: LedgerDatabase
) -> None:
    for number in (1, 2):
        await fleet[0].create_job(new(number))
    locked, other = str(UUID(int=1)), str(UUID(int=2))
    with held(
        ledger_database.url, f"SELECT * FROM jobs WHERE job_id = '{locked}' FOR UPDATE"
    ):
        cancels = [
            asyncio.create_task(fleet[0].cancel_job("acme", locked)) for _ in range(8)
        ]
        await asyncio.sleep(0.1)
        async with asyncio.timeout(ENOUGH):
            assert await fleet[0].get_job("acme", other) is not None
            assert await fleet[0].cancel_job("acme", other) is not None
    assert all(await asyncio.gather(*cancels))


async def test_a_locked_task_costs_no_other_lease(
    fleet: list[SqlLedger], ledger_database: LedgerDatabase
) -> None:
    leases = []
    for number in range(1, 4):
        await fleet[0].create_job(new(number))
        lease = await claim(fleet[0])
        assert lease is not None
        leases.append(lease)
    first = leases[0].task_id
    with held(
        ledger_database.url, f"SELECT * FROM tasks WHERE task_id = {first} FOR UPDATE"
    ):
        async with asyncio.timeout(ENOUGH):
            assert await fleet[0].renew(leases, timedelta(hours=1)) == []
    ((count,),) = ledger_database.ask(
        "SELECT count(*) FROM tasks WHERE lease_expires > "
        "(extract(epoch FROM now()) + 1800) * 1000000"
    )
    assert count == 2


async def test_what_waited_for_a_lock_goes_by_the_time_it_got_it(
    fleet: list[SqlLedger], ledger_database: LedgerDatabase
) -> None:
    job, _ = await fleet[0].create_job(new(1))
    assert await claim(fleet[0]) is not None
    with held(
        ledger_database.url, f"SELECT * FROM jobs WHERE job_id = '{job.job_id}' FOR UPDATE"
    ) as peer:
        cancelling = asyncio.create_task(fleet[0].cancel_job("acme", job.job_id))
        await asyncio.wait((cancelling,), timeout=0.5)
        assert not cancelling.done()
        ((released,),) = ledger_database.ask("SELECT clock_timestamp()")
        peer.rollback()
    cancelled = await cancelling
    assert cancelled is not None
    assert cancelled[0].finish_time is not None
    assert cancelled[0].finish_time >= released


# --- a server that goes away


@pytest.fixture(scope="module")
def fragile() -> Iterator[PostgresServer]:
    """A server that tests may stop."""
    with running_postgres(durable=True) as server:
        yield server


@pytest.fixture
def fragile_url(fragile: PostgresServer) -> str:
    url = fragile.url(fragile.create_database())
    migrate_postgres_ledger(url)
    return url


async def test_a_server_that_is_away_is_told_and_forgotten_once_it_is_back(
    fragile: PostgresServer, fragile_url: str
) -> None:
    ledger = await open_postgres_ledger(fragile_url)
    try:
        job, _ = await ledger.create_job(new(1))
        await asyncio.to_thread(fragile.stop, "immediate")
        for call in (
            ledger.get_job("acme", job.job_id),
            ledger.create_job(new(2)),
            claim(ledger),
        ):
            with pytest.raises(LedgerUnavailable) as told:
                await call
            assert told.value.reason is ErrorReason.LEDGER_UNAVAILABLE
            assert "127.0.0.1" not in str(told.value)
        await asyncio.to_thread(fragile.start)
        lease = await claim(ledger)
        assert lease is not None
        assert lease.job_id == job.job_id
        assert await ledger.get_job("acme", job.job_id) is not None
    finally:
        await ledger.close()


async def test_connections_that_broke_while_idle_are_replaced_unnoticed(
    fragile: PostgresServer, fragile_url: str
) -> None:
    ledger = await open_postgres_ledger(fragile_url)
    try:
        await asyncio.gather(*(ledger.create_job(new(number)) for number in range(1, 9)))
        await asyncio.to_thread(fragile.stop)
        await asyncio.to_thread(fragile.start)
        await asyncio.gather(*(ledger.create_job(new(number)) for number in range(9, 17)))
        assert await claim(ledger) is not None
    finally:
        await ledger.close()


async def test_the_news_comes_back_and_nothing_is_missed(
    fragile: PostgresServer, fragile_url: str
) -> None:
    here = await open_postgres_ledger(fragile_url)
    there = await open_postgres_ledger(fragile_url)
    try:
        job, _ = await here.create_job(new(1))
        watching = asyncio.create_task(
            there.wait_for_change(job.job_id, job.revision, LONG)
        )
        await asyncio.wait((watching,), timeout=0.1)
        await asyncio.to_thread(fragile.stop, "immediate")
        await asyncio.to_thread(fragile.start)
        # Changed while perhaps nobody hears: who comes back wakes everybody.
        await here.cancel_job("acme", job.job_id)
        async with asyncio.timeout(ENOUGH):
            await watching
        found = await there.get_job("acme", job.job_id)
        assert found is not None
        assert found.state is JobState.CANCELLED
        while await there.claim("w", CLEANUP, lease=LEASE) is not None:
            pass
        waiting = asyncio.create_task(there.wait_for_work(LONG))
        await asyncio.wait((waiting,), timeout=0.1)
        await here.create_job(new(2))
        async with asyncio.timeout(ENOUGH):
            await waiting
    finally:
        await here.close()
        await there.close()


async def test_a_server_that_hangs_is_given_up_and_holds_up_no_end(
    fragile: PostgresServer, fragile_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers nothing and closes nothing."""
    monkeypatch.setattr(lanes, "CALL_SECONDS", 1.0)
    ledger = await open_postgres_ledger(fragile_url, connections=2)
    job, _ = await ledger.create_job(new(1))
    await asyncio.gather(*(ledger.get_job("acme", job.job_id) for _ in range(4)))
    monkeypatch.setattr(lanes, "_CLOSE_SECONDS", 0.5)
    with frozen(fragile):
        async with asyncio.timeout(ENOUGH):
            with pytest.raises(LedgerUnavailable):
                await ledger.get_job("acme", job.job_id)
            stuck = asyncio.create_task(ledger.get_job("acme", job.job_id))
            await asyncio.sleep(0)
            await ledger.close()
            with pytest.raises((LedgerUnavailable, asyncio.CancelledError)):
                await stuck


@contextmanager
def frozen(server: PostgresServer) -> Iterator[None]:
    """Stop every process of the server for as long as the context is open."""
    main = psutil.Process(server.pid)
    stopped = [main, *main.children(recursive=True)]
    for process in stopped:
        process.suspend()
    try:
        yield
    finally:
        for process in stopped:
            process.resume()


async def test_a_claim_whose_answer_is_lost_is_not_made_again(
    fleet: list[SqlLedger], ledger_database: LedgerDatabase
) -> None:
    """A task that nobody knows to have is one too many, and not eight."""
    for number in range(1, 9):
        await fleet[0].create_job(new(number))
    assert await claim(fleet[0]) is not None
    ask = lanes.Lane._execute

    def losing(lane: Any, connection: Any, text: str, parameters: Any) -> Any:
        row = ask(lane, connection, text, parameters)
        if "claim_task" in text:
            lanes._raw(connection).close()
            raise psycopg.OperationalError("the answer is lost")
        return row

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes.Lane, "_execute", losing)
        with pytest.raises(LedgerUnavailable):
            await claim(fleet[0])
    ((leased,),) = ledger_database.ask("SELECT count(*) FROM tasks WHERE state = 'leased'")
    assert leased == 2


async def test_odd_news_does_not_end_the_listening(
    fleet: list[SqlLedger], ledger_database: LedgerDatabase
) -> None:
    for text in ('{"from":"x","jobs":{"a":Infinity}}', "[" * 7000, '{"from":1}', "x"):
        ledger_database.execute(f"SELECT pg_notify('exportd', '{text}')")
    await test_work_created_by_one_process_wakes_another(fleet)


# --- versions


def test_many_may_migrate_at_once(postgres: PostgresServer, postgres_url: str) -> None:
    with ThreadPoolExecutor(6) as threads:
        told = list(threads.map(migrate_postgres_ledger, [postgres_url] * 6))
    assert sorted(told, key=repr) == [(schema.HEAD, schema.HEAD)] * 5 + [
        (None, schema.HEAD)
    ]


async def test_a_database_without_a_ledger_says_how_to_make_one(postgres_url: str) -> None:
    with pytest.raises(ConfigurationError, match="no ledger yet; run `exportd-server mig"):
        await open_postgres_ledger(postgres_url)


@pytest.mark.parametrize(
    ("version", "mend"), [("0001", "exportd-server migrate"), ("9999", "a later one")]
)
async def test_another_version_is_refused_with_the_mend(
    postgres_url: str, version: str, mend: str
) -> None:
    migrate_postgres_ledger(postgres_url)
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(
            "UPDATE exportd.alembic_version SET version_num = %s", (version,)
        )
        # None of the releases that this one could know works on them.
        connection.execute("UPDATE exportd.counters SET value = 9999")
    with pytest.raises(ConfigurationError, match=mend):
        await open_postgres_ledger(postgres_url)
    if version == "9999":
        with pytest.raises(ConfigurationError, match=mend):
            migrate_postgres_ledger(postgres_url)


async def test_other_tables_of_the_database_are_nobodys_business(
    postgres_url: str,
) -> None:
    """The ledger has a schema of its own."""
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("CREATE TABLE public.jobs (mine text)")
        migrate_postgres_ledger(postgres_url)
        ledger = await open_postgres_ledger(postgres_url)
        try:
            await ledger.create_job(new(1))
        finally:
            await ledger.close()
        assert connection.execute("SELECT * FROM public.jobs").fetchall() == []


# --- bad input


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("postgresql://nobody@127.0.0.1:1/x", "is it up, and are host and port"),
        ("postgresql://postgres@127.0.0.1:{port}/missing", "create the database"),
        ("postgresql://stranger@127.0.0.1:{port}/postgres", "mend user or password"),
        ("postgresql://127.0.0.1:{port}/x?nonsense=1", "postgresql://USER:PASSWORD@HOST"),
        ("postgresql://app:x@[::1x:{port}/x", "postgresql://USER:PASSWORD@HOST"),
        ("", "postgresql://USER:PASSWORD@HOST"),
    ],
)
async def test_a_wrong_url_is_one_line_that_says_what_to_do(
    postgres: PostgresServer, url: str, told: str
) -> None:
    with pytest.raises(ConfigurationError, match=told) as error:
        await open_postgres_ledger(url.format(port=postgres.port))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://stranger:hunter2@127.0.0.1:{port}/postgres",
        "postgresql://app:hunter2%et@127.0.0.1:{port}/x",
        "postgresql://app:hunter2@[::1]x:{port}/x",
        "postgresql://app:hun/hunter2@127.0.0.1:{port}/x",
        "postgresql://app:hun@hunter2@127.0.0.1:{port}/x",
        "postgresql://app:hun#hunter2@127.0.0.1:{port}/x",
        "postgresql://app:hun?hunter2@127.0.0.1:{port}/x",
        "host=127.0.0.1 port={port} password=hunter2",
    ],
)
async def test_a_password_is_never_told(postgres: PostgresServer, url: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        await open_postgres_ledger(url.format(port=postgres.port))
    assert "hunter2" not in str(error.value)


async def test_a_connection_that_drops_its_settings_is_refused(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As poolers do that ignore what they do not know."""
    migrate_postgres_ledger(postgres_url)
    connect = Address.connect

    def pooled(address: Address) -> psycopg.Connection[Any]:
        kept = {k: v for k, v in address.parameters.items() if k != "options"}
        return connect(replace(address, parameters=kept))

    monkeypatch.setattr(Address, "connect", pooled)
    for act in (migrate_postgres_ledger, lambda url: Address.parse(url).check()):
        with pytest.raises(ConfigurationError, match="without a pooler in between"):
            act(postgres_url)


async def test_a_server_without_connections_left_says_so(
    postgres: PostgresServer, postgres_database: str
) -> None:
    user = f"u_{postgres_database}"
    postgres.sql(f"CREATE USER {user} CONNECTION LIMIT 0")
    try:
        with pytest.raises(ConfigurationError, match="raise max_connections"):
            await open_postgres_ledger(
                f"postgresql://{user}@127.0.0.1:{postgres.port}/{postgres_database}"
            )
    finally:
        postgres.sql(f"DROP USER {user}")


def test_an_old_server_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=f"PostgreSQL 13 and must be {OLDEST} or"):
        require_version("postgresql://x/y", 130_021)
    require_version("postgresql://x/y", OLDEST * 10_000)


async def test_missing_rights_are_named_with_the_grant_that_mends_them(
    postgres: PostgresServer, postgres_database: str
) -> None:
    user = f"u_{postgres_database}"
    url = f"postgresql://{user}@127.0.0.1:{postgres.port}/{postgres_database}"
    postgres.sql(f"CREATE USER {user}")
    try:
        with pytest.raises(ConfigurationError, match="GRANT CREATE ON DATABASE"):
            migrate_postgres_ledger(url)
        migrate_postgres_ledger(postgres.url(postgres_database))
        with pytest.raises(ConfigurationError, match="GRANT USAGE ON SCHEMA exportd"):
            await open_postgres_ledger(url)
        as_owner = {"database": postgres_database}
        postgres.sql(f"GRANT USAGE ON SCHEMA exportd TO {user}", **as_owner)
        with pytest.raises(ConfigurationError, match="GRANT "):
            await open_postgres_ledger(url)
        postgres.sql(f"GRANT ALL ON ALL TABLES IN SCHEMA exportd TO {user}", **as_owner)
        with pytest.raises(ConfigurationError, match="fencing_tokens"):
            await open_postgres_ledger(url)
        postgres.sql(f"GRANT ALL ON ALL SEQUENCES IN SCHEMA exportd TO {user}", **as_owner)
        ledger = await open_postgres_ledger(url)
        try:
            await ledger.create_job(new(1))
            assert await claim(ledger) is not None
        finally:
            await ledger.close()
    finally:
        postgres.sql(f"DROP OWNED BY {user}; DROP USER {user}", database=postgres_database)


# --- news


def test_much_news_goes_in_pieces_that_the_server_carries() -> None:
    ids = [str(UUID(int=n)) for n in range(1000)]
    changes = Changes(
        revisions=dict.fromkeys(ids, 2**53), gone=set(ids), fenced=set(ids[:5]), work=True
    )
    pieces = list(news.pieces("me", changes))
    assert max(map(len, pieces)) < 8000
    told = [news.parse(piece) for piece in pieces]
    heard = Changes()
    for piece in told:
        assert piece is not None
        assert piece.sender == "me"
        heard.revisions |= piece.changes.revisions
        heard.gone |= piece.changes.gone
        heard.fenced |= piece.changes.fenced
        heard.work |= piece.changes.work
    assert heard == changes
    assert list(news.pieces("me", Changes())) == []


@pytest.mark.parametrize("text", ["", "x", "{}", "[]", '{"from":"a","jobs":[1]}', "null"])
def test_what_others_say_on_the_channel_is_ignored(text: str) -> None:
    assert news.parse(text) is None


async def test_what_a_job_asks_takes_few_round_trips(
    fleet: list[SqlLedger], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a network they are most of the time that each call takes."""
    # On a busy machine a lock may be waited for so long that the clock is asked again.
    monkeypatch.setattr(lifecycle, "_WAITED", ENOUGH)
    ledger = fleet[0]
    round_trips = 0

    def counting(call: Callable[..., Any], takes: Callable[[Any], bool]) -> Any:
        def counted(self: Any, *arguments: Any, **options: Any) -> Any:
            nonlocal round_trips
            round_trips += takes(self)
            return call(self, *arguments, **options)

        return counted

    pipelines = psycopg.Pipeline.__exit__
    monkeypatch.setattr(psycopg.Pipeline, "__exit__", counting(pipelines, lambda _: True))
    monkeypatch.setattr(
        psycopg.Cursor,
        "execute",
        counting(psycopg.Cursor.execute, lambda cursor: not cursor.connection._pipeline),
    )
    monkeypatch.setattr(
        psycopg.Connection,
        "commit",
        counting(
            psycopg.Connection.commit,
            lambda link: link.info.transaction_status != TransactionStatus.IDLE,
        ),
    )
    taken: dict[str, int] = {}

    async def idle(ledger: SqlLedger) -> None:
        assert await claim(ledger) is None
        nonlocal round_trips
        round_trips = 0
        waiting = asyncio.create_task(ledger.wait_for_work(ENOUGH))
        await until(lambda: round_trips)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    async def of(name: str, call: Awaitable[T]) -> T:
        nonlocal round_trips
        round_trips = 0
        result = await call
        taken[name] = round_trips
        return result

    # The first call looks at the server as well.
    assert await ledger.get_job("acme", "none") is None
    await of("create", ledger.create_job(new(1), max_active=9, max_queued=9))
    lease = await of("claim", claim(ledger))
    assert lease is not None
    await of("get", ledger.get_job("acme", lease.job_id))
    lease = await of(
        "plan", ledger.record_plan(lease, shards(1), COLUMNS, estimated_rows=None)
    )
    progress = ledger.record_progress(lease, rows=1, bytes_=1, rows_per_second=1.0)
    await of("progress", progress)
    await of("part", ledger.add_part(lease, part(lease)))
    await of("end", ledger.complete_only_shard(lease, part(lease, 1)))
    await of("get done", ledger.get_job("acme", lease.job_id))
    await of("idle", idle(ledger))
    # Of each that writes, but for a claim, the last one commits.
    assert taken == {
        "create": 4,
        "claim": 1,
        "get": 1,
        "plan": 4,
        "progress": 3,
        "part": 3,
        "end": 4,
        "get done": 1,
        "idle": 1,
    }


# --- errors in the middle of a round trip

_ONE = Prepared(sa.text("SELECT 1 AS one"))
_OVER = Prepared(sa.text("SELECT 1 / CAST(:by AS int) AS one"))
_TEXT = Prepared(sa.text("SELECT CAST(:text AS text) AS text"))


def _raises(rows: list[Any]) -> None:
    raise KeyError(rows[0].one)


@pytest.mark.parametrize("begun", [False, True], ids=["first", "later"])
@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (lambda tx: tx.later(_OVER, by=0), sa.exc.DBAPIError),
        (lambda tx: tx.later(_TEXT, text="\0"), sa.exc.DBAPIError),
        (lambda tx: tx.later(_TEXT, text="\ud800"), UnicodeEncodeError),
        (lambda tx: tx.later(_TEXT), sa.exc.DBAPIError),
        (lambda tx: tx.later(_ONE, _raises), KeyError),
    ],
    ids=["refused", "zero", "surrogate", "missing", "then"],
)
async def test_an_error_among_statements_that_go_together_leaves_a_good_connection(
    ledger_database: LedgerDatabase,
    wrong: Callable[[Transaction], None],
    error: type[Exception],
    *,
    begun: bool,
) -> None:
    ledger_database.reset()
    ledger = await open_postgres_ledger(ledger_database.url, connections=1)

    def work(tx: Transaction) -> None:
        if begun:
            assert tx.scalar(_ONE) == 1
        tx.later(_ONE)
        wrong(tx)
        tx.later(_ONE)

    database = cast("Any", ledger._database)
    try:
        for _ in range(7):  # the driver prepares what it has seen five times
            for call in (database.write, database.read):
                with pytest.raises(error):
                    await call(work)
                assert database._pool._engine.pool.checkedout() == 0
                assert await call(lambda tx: tx.scalar(_OVER, by=1)) == 1
                assert await call(lambda tx: tx.scalar(_TEXT, text="good")) == "good"
    finally:
        await ledger.close()


@pytest.mark.parametrize("begun", [False, True], ids=["first", "later"])
async def test_an_error_in_a_read_that_ends_with_it_leaves_a_good_connection(
    ledger_database: LedgerDatabase, *, begun: bool
) -> None:
    ledger_database.reset()
    ledger = await open_postgres_ledger(ledger_database.url, connections=1)

    def work(by: int, then: Callable[[Transaction], object]) -> Callable[..., Any]:
        def read(tx: Transaction) -> Any:
            if begun:
                assert tx.scalar(_ONE) == 1
            (ones, overs) = tx.last((_ONE, {}), (_OVER, {"by": by}))
            then(tx)
            return [*ones, *overs], tx.now

        return read

    def fail(_tx: Transaction) -> None:
        raise KeyError

    database = cast("Any", ledger._database)
    try:
        for _ in range(7):  # the driver prepares what it has seen five times
            with pytest.raises(sa.exc.DBAPIError):
                await database.read(work(0, lambda _: None))
            with pytest.raises(KeyError):
                await database.read(work(1, fail))
            rows, now = await database.read(work(1, lambda _: None))
            assert rows == [(1,), (1,)]
            assert now > 0
            assert database._pool._engine.pool.checkedout() == 0
        for more in (
            lambda tx: tx.scalar(_ONE),
            lambda tx: tx.last((_ONE, {})),
            lambda tx: tx.connection,
            lambda tx: (tx.later(_ONE), tx.flush()),
            lambda tx: tx.later(_ONE),
        ):
            with pytest.raises(RuntimeError, match="ended"):
                await database.read(work(1, more))
        with pytest.raises(RuntimeError, match="commits"):
            await database.write(work(1, lambda _: None))
        assert database._pool._engine.pool.checkedout() == 0
    finally:
        await ledger.close()


async def test_a_read_that_ends_at_once_leaves_no_transaction_open(
    ledger_database: LedgerDatabase,
) -> None:
    ledger_database.reset()
    ledger = await open_postgres_ledger(ledger_database.url, connections=1)
    try:
        for _ in range(7):
            assert await ledger.get_job("acme", "none") is None
            assert ledger_database.ask(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                "AND state LIKE 'idle in transaction%'"
            ) == [(0,)]
    finally:
        await ledger.close()


async def test_a_deadlock_that_commit_finds_is_tried_again(
    fleet: list[SqlLedger], monkeypatch: pytest.MonkeyPatch
) -> None:
    end = lanes.Lane.end
    ends: list[str] = []

    def once(connection: Any, text: str, parameters: Any) -> None:
        ends.append(text)
        if len(ends) == 1:
            raise psycopg.errors.DeadlockDetected
        end(connection, text, parameters)

    monkeypatch.setattr(lanes.Lane, "end", staticmethod(once))
    _, created = await fleet[0].create_job(new(1))
    assert created, "the first try was undone"
    assert len(ends) == 2


async def test_a_call_that_was_given_up_writes_nothing_once_it_has_connected(
    ledger_database: LedgerDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger_database.reset()
    ledger = await open_postgres_ledger(ledger_database.url, connections=1)
    lane = cast("Any", ledger._database)._pool
    engine, go_on = lane._engine, threading.Event()

    class Late:
        def connect(self) -> Any:
            assert go_on.wait(ENOUGH)
            return engine.connect()

    try:
        monkeypatch.setattr(lanes, "CALL_SECONDS", 0.2)
        lane._engine = Late()
        with pytest.raises(LedgerUnavailable):
            await ledger.create_job(new(1))
        (call,) = lane._calls.values()
        go_on.set()
        with pytest.raises(LedgerUnavailable):
            await asyncio.wrap_future(call)
        assert ledger_database.ask("SELECT count(*) FROM jobs") == [(0,)]
    finally:
        lane._engine = engine
        await ledger.close()


async def test_a_failover_leaves_nothing_behind_that_later_calls_stumble_over() -> None:
    """A standby refuses to begin what may write, and with it all that goes along."""
    with running_postgres() as server:
        migrate_postgres_ledger(server.url())
        ledger = await open_postgres_ledger(server.url(), connections=1)
        try:
            await ledger.create_job(new(1))
            server.stop()
            (server._data / "standby.signal").touch()
            server.start()
            for _ in range(6):
                assert await ledger.get_job("acme", new(1).job_id) is not None
                with pytest.raises(LedgerUnavailable):
                    await ledger.create_job(new(2))
            server.sql("SELECT pg_promote(true, 30)")
            for number in range(2, 9):
                _, created = await ledger.create_job(new(number))
                assert created
        finally:
            await ledger.close()


async def test_a_call_that_is_given_up_between_two_tries_cuts_no_other(
    ledger_database: LedgerDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger_database.reset()
    ledger = await open_postgres_ledger(ledger_database.url, connections=1)
    database, tried, go_on = (
        cast("Any", ledger._database),
        threading.Event(),
        threading.Event(),
    )

    def deadlocks(tx: Transaction) -> None:
        assert tx.scalar(_ONE) == 1
        raise psycopg.errors.DeadlockDetected

    def pause(_seconds: float) -> None:
        tried.set()
        assert go_on.wait(ENOUGH)

    monkeypatch.setattr(time, "sleep", pause)
    try:
        first = asyncio.create_task(database.write(deadlocks))
        assert await asyncio.to_thread(tried.wait, ENOUGH)
        (call,) = database._pool._calls
        with database._pool._engine.connect() as connection:
            call.cut()
            assert connection.scalar(sa.text("SELECT 1")) == 1
        go_on.set()
        with pytest.raises(LedgerUnavailable):
            await first
    finally:
        await ledger.close()


async def test_a_wrong_statement_is_no_outage(fleet: list[SqlLedger]) -> None:
    """PostgreSQL has one code for what it cannot do and for what a standby cannot."""
    wrong = Prepared(sa.text("SELECT count(*) FROM jobs FOR UPDATE"))
    with pytest.raises(sa.exc.NotSupportedError):
        await fleet[0]._database.write(lambda tx: tx.rows(wrong))
