"""What the embedded ledger adds to the contract: one file, one process, no loss."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy.engine import Connection

from exportd_server.errors import (
    ConfigurationError,
    ErrorReason,
    ErrorRecord,
    LedgerUnavailable,
)
from exportd_server.jobs.ledger import schema
from exportd_server.jobs.ledger import sqlite as sqlite_ledger
from exportd_server.jobs.ledger.base import (
    ClaimLimits,
    DeliveryQuery,
    JobQuery,
    LeaseLost,
)
from exportd_server.jobs.ledger.prepared import Prepared
from exportd_server.jobs.ledger.recent import RecentJobs
from exportd_server.jobs.ledger.sql import SqlLedger
from exportd_server.jobs.ledger.sqlite import SqliteDatabase, open_sqlite_ledger
from exportd_server.jobs.ledger.statements import delivering
from exportd_server.jobs.ledger.tables import METADATA, deliveries, jobs, tasks
from exportd_server.jobs.ledger.transaction import Transaction
from exportd_server.jobs.model import (
    DeliveryState,
    DeliveryStatus,
    Job,
    JobState,
    Manifest,
    OnFull,
    PartRecord,
    SinkDelivery,
)
from exportd_server.store.key import OutputKind
from tests.support.deliveries import DOWN, SOON, Deliveries, sink, whole
from tests.support.ledger import (
    CLEANUP,
    COLUMNS,
    EXPORT,
    LEASE,
    REAP,
    FakeClock,
    World,
    dump_sqlite,
    part,
    spec,
    sqlite_world,
)
from tests.support.waits import ENOUGH

SOURCE_DOWN = ErrorRecord(ErrorReason.SOURCE_FAILED, "down")


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with sqlite_world(tmp_path) as world:
        yield world


def database_of(world: World) -> SqliteDatabase:
    assert isinstance(world.ledger, SqlLedger)
    assert isinstance(world.ledger._database, SqliteDatabase)
    return world.ledger._database


# --- the file is one process's


async def test_a_second_process_on_the_file_is_refused_in_one_clear_line(
    world: World, tmp_path: Path
) -> None:
    job = await world.create()
    code = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from exportd_server.errors import ConfigurationError\n"
        "from exportd_server.jobs.ledger.sqlite import open_sqlite_ledger\n"
        "from exportd_server.platform.clock import SystemClock\n"
        "try:\n"
        "    asyncio.run(open_sqlite_ledger(Path(sys.argv[1]), SystemClock()))\n"
        "except ConfigurationError as error:\n"
        "    print(error)\n"
    )
    second = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", code, str(tmp_path / "ledger.db")],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert "another process has it open" in second.stdout
    assert second.stdout.count("\n") == 1
    assert (await world.job(job)).state is JobState.PENDING


async def test_the_same_process_cannot_open_it_twice_either(
    world: World, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match="has it open"):
        await open_sqlite_ledger(tmp_path / "ledger.db", FakeClock())


async def test_a_closed_ledger_may_be_opened_again(tmp_path: Path) -> None:
    for _ in range(2):
        async with sqlite_world(tmp_path) as world:
            await world.create()
            await world.ledger.close()
            await world.ledger.close()


async def test_opening_makes_leased_tasks_due_and_counts_their_attempts(
    tmp_path: Path,
) -> None:
    async with sqlite_world(tmp_path) as world:
        job, lease = await world.running()
        await world.ledger.add_part(lease, part(lease))
        cancelled = await world.create("other")
        await world.ledger.cancel_job("other", cancelled.job_id)
        await world.lease(CLEANUP)
        await world.lease(REAP)
    async with sqlite_world(tmp_path) as world:
        reopened = await world.job(job)
        assert (reopened.state, reopened.attempt) == (JobState.PENDING, 1)
        with pytest.raises(LeaseLost):
            await world.ledger.complete_shard(lease)
        heir = await world.lease()
        assert (heir.task_id, heir.attempt) == (lease.task_id, 2)
        assert await world.ledger.shard_parts(heir) == [part(lease)]
        assert await world.finish(heir, 1)
        assert len(await world.work_off()) == 2, "and what the dead one left is looked for"
        assert await world.claim(REAP) is not None


async def test_opening_fails_a_job_that_took_down_every_process_it_ran_in(
    tmp_path: Path,
) -> None:
    async with sqlite_world(tmp_path) as world:
        job = await world.create()
    for _ in range(5):
        async with sqlite_world(tmp_path) as world:
            assert (await world.job(job)).state is JobState.PENDING
            await world.lease()
    async with sqlite_world(tmp_path) as world:
        ended = await world.job(job)
        assert ended.error is not None
        assert ended.error.reason is ErrorReason.ATTEMPTS_EXHAUSTED
        assert await world.claim() is None


# --- its tables


async def test_the_migrations_make_the_tables_the_statements_are_written_for(
    world: World, tmp_path: Path
) -> None:
    def shape(path: Path) -> dict[str, str]:
        connection = sqlite3.connect(path)
        rows = connection.execute(
            "SELECT name, sql FROM sqlite_master "
            "WHERE sql IS NOT NULL AND name <> 'alembic_version'"
        ).fetchall()
        connection.close()
        return {name: re.sub(r"\s+", " ", sql) for name, sql in rows}

    declared = sa.create_engine(f"sqlite:///{tmp_path / 'declared.db'}")
    METADATA.create_all(declared)
    declared.dispose()
    assert shape(tmp_path / "ledger.db") == shape(tmp_path / "declared.db")


def test_the_newest_version_is_the_scripts() -> None:
    config = Config()
    config.set_main_option("script_location", str(schema.MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_heads() == [schema.HEAD]


async def test_a_database_of_a_later_release_is_refused(tmp_path: Path) -> None:
    async with sqlite_world(tmp_path) as world:
        await world.create()
    path = tmp_path / "ledger.db"
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    before = dump_sqlite(path)
    with pytest.raises(ConfigurationError, match="version 9999") as caught:
        await open_sqlite_ledger(path, FakeClock())
    assert "\n" not in str(caught.value)
    assert dump_sqlite(path) == before


async def test_somebody_elses_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "theirs.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE jobs (title TEXT)")
    connection.close()
    with pytest.raises(ConfigurationError, match="not a ledger's") as caught:
        await open_sqlite_ledger(path, FakeClock())
    assert "\n" not in str(caught.value)
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("jobs",)]
    connection.close()


async def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("dear diary, " * 100)
    with pytest.raises(ConfigurationError, match="not a database") as caught:
        await open_sqlite_ledger(path, FakeClock())
    assert "\n" not in str(caught.value)
    assert path.read_text() == "dear diary, " * 100


async def test_a_path_that_cannot_be_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "ledger.db"):
        with pytest.raises(ConfigurationError, match="read and write"):
            await open_sqlite_ledger(path, FakeClock())


async def test_what_was_refused_is_not_held(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(ConfigurationError):
        await open_sqlite_ledger(path, FakeClock())
    path.unlink()
    await (await open_sqlite_ledger(path, FakeClock())).close()


async def test_nothing_is_left_of_a_ledger_of_a_later_version_that_was_refused(
    tmp_path: Path,
) -> None:
    def files() -> list[str]:
        return sorted(each.name for each in tmp_path.iterdir())

    path = tmp_path / "ledger.db"
    await (await open_sqlite_ledger(path, FakeClock())).close()
    with closing(sqlite3.connect(path)) as later, later:
        later.execute("UPDATE alembic_version SET version_num = 'later'")
    with pytest.raises(ConfigurationError, match="later") as refused:
        await open_sqlite_ledger(path, FakeClock())
    # Whoever has the error has not yet let go of what it came from.
    assert refused.tb is not None
    assert files() == ["ledger.db", "ledger.db.lock"], "no journal of an open file"


async def test_a_ledger_that_somebody_locks_after_its_upgrade_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.db"
    await (await open_sqlite_ledger(path, FakeClock())).close()
    monkeypatch.setattr(sqlite_ledger, "_BUSY_SECONDS", 0.1)
    upgrade = SqliteDatabase._upgrade
    with closing(
        sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    ) as tool:

        def upgraded(database: SqliteDatabase) -> None:
            upgrade(database)
            tool.execute("BEGIN IMMEDIATE")

        monkeypatch.setattr(SqliteDatabase, "_upgrade", upgraded)
        with pytest.raises(ConfigurationError, match="locked"):
            await open_sqlite_ledger(path, FakeClock())


async def test_a_new_ledger_makes_its_folder_and_is_the_owners_alone(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a" / "b" / "ledger.db"
    ledger = await open_sqlite_ledger(path, FakeClock())
    await ledger.get_job("acme", "x")
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    await ledger.close()


# --- durability


async def test_every_connection_syncs_each_commit_and_minds_foreign_keys(
    world: World,
) -> None:
    def pragmas(tx: Transaction) -> tuple[Any, ...]:
        return tuple(
            tx.connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys", "query_only")
        )

    full = 2
    database = database_of(world)
    assert await database.write(pragmas) == ("wal", full, 1, 0)
    for reading in await asyncio.gather(*(database.read(pragmas) for _ in range(4))):
        assert reading == ("wal", full, 1, 1)


async def test_a_process_killed_in_the_middle_leaves_a_usable_file(
    tmp_path: Path,
) -> None:
    """The child works on jobs without a pause and says what it knows to be durable;
    killed at some moment, nothing it said is lost and nothing is half done."""
    path = tmp_path / "ledger.db"
    promised: list[dict[str, str]] = []
    for round_ in range(3):
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.support.ledger_child",
            str(path),
            str(round_),
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        assert child.stdout is not None
        async with asyncio.timeout(ENOUGH):
            lines = [await child.stdout.readline() for _ in range(40 + 17 * round_)]
        child.kill()
        rest, _ = await child.communicate()
        # A last line may be cut off: then it was not said.
        promised += [json.loads(line) for line in (*lines, *rest.split(b"\n")[:-1])]

    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
    ledger = await open_sqlite_ledger(path, FakeClock())
    states = {
        job.job_id: job for job in await ledger.list_jobs("acme", JobQuery(), limit=100_000)
    }
    final = {entry["job_id"]: entry["said"] for entry in promised}
    assert len(final) > 10
    for job_id, said in final.items():
        job = states[job_id]
        if said in ("SUCCEEDED", "CANCELLED"):
            assert job.state == said
        assert job.state is not JobState.RUNNING, "its worker is dead"
        whole = await ledger.get_job("acme", job_id)
        assert whole is not None
        assert (whole.manifest is not None) == (whole.state is JobState.SUCCEEDED)
        if whole.manifest is not None:
            assert [p.sequence for p in whole.manifest.parts] == [0, 1]
    while await ledger.claim("w", EXPORT, lease=LEASE) is not None:
        pass
    await ledger.close()


async def test_a_full_disk_undoes_the_change_and_spoils_nothing(world: World) -> None:
    database = database_of(world)
    job, lease = await world.running()

    def pages(tx: Transaction, most: int) -> int:
        statement = f"PRAGMA max_page_count = {most}"
        return int(tx.connection.exec_driver_sql(statement).scalar_one())

    await database.write(lambda tx: pages(tx, 1))  # means: no more than there are
    before = world.dump()
    for _ in range(500):
        try:
            await world.create(labels={"much": "x" * 2000})
        except LedgerUnavailable as error:
            assert "full" in str(error.__cause__)  # noqa: PT017 - it is not known which one
            break
        before = world.dump()
    else:
        pytest.fail("the database never was full")
    assert world.dump() == before
    assert (await world.job(job)).state is JobState.RUNNING
    await database.write(lambda tx: pages(tx, 2**30))
    await world.create(labels={"much": "x" * 2000})
    assert await world.finish(lease)


# --- beside the event loop


async def test_a_slow_database_does_not_hold_up_the_event_loop(
    world: World, tmp_path: Path
) -> None:
    """A foreign tool holds the write lock: creating waits, the loop and reads do not."""
    job = await world.create()
    foreign = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
    foreign.execute("BEGIN IMMEDIATE")
    creating = asyncio.create_task(world.create())
    # Were the loop held, the lock would not be let go of before creating gave up.
    for _ in range(100):
        assert (await world.job(job)).state is JobState.PENDING
        await asyncio.sleep(0)
    assert not creating.done()
    foreign.execute("ROLLBACK")
    foreign.close()
    async with asyncio.timeout(ENOUGH):
        await creating


# --- cost


@pytest.mark.parametrize("life", ["jobs", "deliveries"])
async def test_a_long_backlog_costs_no_scan(
    world: World, life: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No statement of a job's whole life, nor of the lists and the reaper, reads a table
    from end to end: SQLite's plan for each statement that was run says how it looks. Nor
    does one of a delivery's."""
    database = database_of(world)
    seen: dict[str, Any] = {}
    for engine in (database._writer, database._readers):

        @sa.event.listens_for(engine, "before_cursor_execute")
        def note(
            _c: Any, _cursor: Any, statement: str, parameters: Any, _x: Any, many: bool
        ) -> None:
            if not many:
                seen[statement] = parameters

    rows = Prepared.rows

    def noted(prepared: Prepared, connection: Connection, /, **values: Any) -> list[Any]:
        found = rows(prepared, connection, **values)
        compiled = prepared._compiled[connection.dialect.name, *values]
        # Plans are made without the values.
        seen[compiled.text] = [None] * len(compiled.names or ())
        return found

    monkeypatch.setattr(Prepared, "rows", noted)
    if life == "jobs":
        await one_of_everything(world)
    else:
        await every_delivery(Deliveries(world))
    scans = {}
    connection = sqlite3.connect(database._path)
    for statement, parameters in seen.items():
        if not re.match(r"SELECT|UPDATE|DELETE|WITH", statement):
            continue
        plan = connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)
        steps = [step for *_, step in plan]
        assert steps or statement.startswith("DELETE") or "INSERT" in statement
        bad = [
            s
            for s in steps
            if re.match(
                r"SCAN (jobs|tasks|ready|parts|labels|tenants|deliveries|queues)", s
            )
            # As long as there are leases, not as the backlog.
            and not s.endswith("USING INDEX tasks_leased")
        ]
        if bad:
            scans[statement] = bad
    connection.close()
    assert len(seen) > 40
    assert scans == {}


async def one_of_everything(world: World) -> None:
    ledger = world.ledger
    job, lease = await world.running(2)
    await world.create(labels={"a": "b", "c": "d"}, request_id="r")
    await world.create(priority=3)
    await ledger.create_job(world.new(request_id="r"), max_active=100)
    await ledger.create_job(world.new(request_id="new"), max_active=100)
    await ledger.record_progress(lease, rows=1, bytes_=1, rows_per_second=1)
    await ledger.add_part(lease, part(lease))
    await ledger.finished_parts("acme", job.job_id)
    await ledger.shard_parts(lease)
    await ledger.renew([lease], LEASE)
    await ledger.release(lease)
    world.clock.advance(1)
    held = [await world.claim(limit=limit) for limit in (1, 1, None, None)]
    for got in held:
        if got is not None and got.job_id == job.job_id:
            await ledger.fail_attempt(got, SOURCE_DOWN, retry_in=timedelta(0))
            await ledger.restart_output(await world.lease())
            break
    else:
        pytest.fail("the job was not claimed")
    world.clock.advance(60)
    await world.plan(await world.lease(), 2)
    await ledger.wait_for_work(0.01)
    await ledger.cancel_job("acme", job.job_id)
    for query in (
        JobQuery(),
        JobQuery(states=frozenset({JobState.PENDING, JobState.FAILED})),
        JobQuery(dataset="token_transfers"),
        JobQuery(labels={"a": "b", "c": "d"}),
        JobQuery(created_from=job.create_time, created_before=world.clock.now()),
    ):
        page = await ledger.list_jobs("acme", query, limit=2)
        if page:
            last = (page[-1].create_time, page[-1].job_id)
            await ledger.list_jobs("acme", query, limit=2, before=last)
    world.clock.advance(10**6)
    reap = await world.lease(REAP)
    assert await ledger.expire_jobs(reap, limit=10) == 1
    await ledger.complete_reap(reap, again_in=LEASE)
    done = await world.work_off()
    assert done
    await ledger.known_jobs([job.job_id])
    await ledger.wait_for_change(job.job_id, 1, 0.01)


async def every_delivery(on: Deliveries) -> None:
    """All that happens to deliveries, and all that is asked about them."""
    ledger = on.ledger
    on.allow("d", depth=1, on_full=OnFull.DROP)
    sinks = (sink(), sink("drops", "d"), whole())
    job, lease = await on.running(*sinks, parts=3, drop_after_delivery=True)
    assert await ledger.has_room(lease)
    await ledger.fail_delivery(await on.lease(), DOWN, retry_in=SOON)
    await ledger.release(await on.lease())
    await on.bury()
    await ledger.fail_delivery(
        await on.lease(), DOWN, retry_in=SOON, disable_after=timedelta(0)
    )
    assert await ledger.complete_shard(lease)
    on.clock.advance(60)
    await on.bury_all()
    for queue in await ledger.list_queues("acme", limit=10):
        assert await ledger.enable_queue("acme", queue.queue)
    record = (await on.all())[0]
    assert await on.redrive(delivery_id=record.delivery_id) <= 1
    assert await on.redrive(job_id=job.job_id, sink="drops") >= 1
    assert await on.redrive(queue="q", states=frozenset({DeliveryState.DEAD_LETTERED}))
    await on.redrive()
    await on.deliver_all()
    assert (await on.world.job(job)).drop_time is not None
    await ledger.list_jobs("acme", JobQuery(), limit=10)
    dead = frozenset({DeliveryState.DEAD_LETTERED, DeliveryState.DROPPED})
    place = (record.create_time, record.delivery_id)
    for query in (
        DeliveryQuery(),
        DeliveryQuery(delivery_id=record.delivery_id),
        DeliveryQuery(job_id=job.job_id, sink="drops"),
        DeliveryQuery(queue="q"),
        DeliveryQuery(queue="q", states=dead),
        DeliveryQuery(states=dead),
    ):
        await ledger.list_deliveries("acme", query, limit=3)
        await ledger.list_deliveries("acme", query, limit=3, before=place)
    anew, lease = await on.running(*sinks, parts=2)
    await ledger.restart_output(lease)
    await ledger.cancel_job("acme", anew.job_id)
    assert await ledger.delete_job("acme", job.job_id) is JobState.SUCCEEDED
    on.clock.advance(60)
    assert await on.world.work_off()


OTHERS = ("acme", "tenant-1", "tenant-2", "tenant-3", "tenant-4")


async def test_a_claim_of_a_delivery_takes_no_longer_at_twenty_thousand_queued(
    world: World,
) -> None:
    """Nor does looking whether a queue is full, or what is in it of a job's."""
    database = database_of(world)
    on = Deliveries(world)
    _, lease = await on.running(sink(), parts=1)
    (record,) = await on.all()

    def fill(tx: Transaction, begin: int, count: int) -> None:
        def like(table: sa.Table, *keys: sa.ColumnElement[bool]) -> dict[str, Any]:
            row = tx.connection.execute(sa.select(table).where(*keys)).mappings().one()
            return dict(row)

        one = like(deliveries, deliveries.c.delivery_id == record.delivery_id)
        task = like(tasks, tasks.c.task_id == one["task_id"])
        numbers = range(begin, begin + count)
        first = 1_000
        tx.connection.execute(
            sa.insert(tasks),
            [task | {"task_id": first + n, "lane": f"q\n{OTHERS[n % 5]}"} for n in numbers],
        )
        tx.connection.execute(
            sa.insert(deliveries),
            [
                one | {"delivery_id": f"x{n}", "task_id": first + n, "sequence": n + 1}
                for n in numbers
            ],
        )

    async def steps() -> int:
        count = 0

        def step() -> int:
            nonlocal count
            count += 1
            return 0

        def install(tx: Transaction, handler: Any) -> None:
            connection = tx.connection.connection.driver_connection
            assert isinstance(connection, sqlite3.Connection)
            connection.set_progress_handler(handler, 10)

        await database.write(lambda tx: install(tx, step))
        await database.write(lambda tx: delivering.has_room(tx, lease))
        held = [await on.lease() for _ in range(3)]
        for each in held:
            await on.ledger.release(each)
        await database.write(lambda tx: install(tx, None))
        return 10 * count

    on.allow("q", depth=100)
    await on.create(sink())
    await database.write(lambda tx: fill(tx, 0, 1_000))
    few = await steps()
    await database.write(lambda tx: fill(tx, 1_000, 19_000))
    many = await steps()
    assert 0 < many < 1.5 * few
    assert few < 40_000
    assert not await on.ledger.has_room(lease)


@pytest.mark.minutes
async def test_a_claim_takes_no_longer_at_a_hundred_thousand_queued_jobs(
    world: World,
) -> None:
    database = database_of(world)
    first = await world.create("tenant-0")

    def fill(tx: Transaction, begin: int, count: int) -> None:
        def like(table: sa.Table, *keys: sa.ColumnElement[bool]) -> dict[str, Any]:
            row = tx.connection.execute(sa.select(table).where(*keys)).mappings().one()
            return dict(row)

        job = like(jobs, jobs.c.job_id == first.job_id)
        task = like(tasks, tasks.c.job_id == first.job_id)
        del task["task_id"]
        numbers = range(begin, begin + count)
        ids = {n: str(UUID(int=2**64 + n)) for n in numbers}
        tenant = {n: f"tenant-{n % 5}" for n in numbers}
        tx.connection.execute(
            sa.insert(jobs),
            [job | {"job_id": ids[n], "tenant": tenant[n]} for n in numbers],
        )
        tx.connection.execute(
            sa.insert(tasks),
            [task | {"job_id": ids[n], "tenant": tenant[n]} for n in numbers],
        )

    async def steps_of_a_claim() -> int:
        """Virtual-machine steps, which unlike time are the same on every run."""
        steps = 0

        def count() -> int:
            nonlocal steps
            steps += 1
            return 0

        def install(tx: Transaction, handler: Any) -> None:
            connection = tx.connection.connection.driver_connection
            assert isinstance(connection, sqlite3.Connection)
            connection.set_progress_handler(handler, 10)

        await database.write(lambda tx: install(tx, count))
        for limits in (ClaimLimits(), ClaimLimits(3)):
            lease = await world.ledger.claim("w", EXPORT, lease=LEASE, limits=limits)
            assert lease is not None
            await world.ledger.release(lease)
        await database.write(lambda tx: install(tx, None))
        return 10 * steps

    await database.write(lambda tx: fill(tx, 0, 1_000))
    few = await steps_of_a_claim()
    await database.write(lambda tx: fill(tx, 1_000, 99_000))
    many = await steps_of_a_claim()
    assert 0 < many < 1.5 * few
    assert few < 20_000


async def test_a_commit_is_one_transaction_and_an_idle_claim_writes_nothing(
    world: World, tmp_path: Path
) -> None:
    await world.claim()
    journal = tmp_path / "ledger.db-wal"
    before = journal.stat().st_size
    for _ in range(10):
        assert await world.claim() is None
    assert journal.stat().st_size == before
    await world.create()
    assert journal.stat().st_size > before


async def test_an_error_half_way_undoes_everything(world: World) -> None:
    _, lease = await world.running()
    before = world.dump()

    def half(tx: Transaction) -> None:
        tx.connection.execute(sa.delete(tasks))
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        await database_of(world).write(half)
    assert world.dump() == before
    await world.ledger.renew([lease], timedelta(seconds=1))
    assert world.dump() != before


@pytest.mark.parametrize("by", ["library", "driver"])
async def test_a_commit_that_fails_undoes_the_change_and_spoils_nothing(
    tmp_path: Path, by: str
) -> None:
    """A reference that is looked at when the transaction ends."""

    def tables(tx: Transaction) -> None:
        run = tx.connection.exec_driver_sql
        run("CREATE TABLE parent (id INTEGER PRIMARY KEY)")
        run("CREATE TABLE child (id REFERENCES parent (id) DEFERRABLE INITIALLY DEFERRED)")

    def orphan(tx: Transaction) -> None:
        text = "INSERT INTO child VALUES (5)"
        if by == "library":
            tx.connection.exec_driver_sql(text)
        else:
            driver: Any = tx.connection.connection.driver_connection
            driver.execute(text)

    def orphans(tx: Transaction) -> object:
        return tx.connection.exec_driver_sql("SELECT count(*) FROM child").scalar()

    async with sqlite_world(tmp_path) as world:
        database = database_of(world)
        await database.write(tables)
        with pytest.raises(sa.exc.IntegrityError):
            await database.write(orphan)
        assert await database.write(orphans) == 0


# --- reads on the event loop's own thread


def _here(world: World) -> object:
    return database_of(world).read_here(lambda tx: tx.now)


async def test_a_closed_ledger_is_not_opened_again_by_a_late_reader(
    tmp_path: Path,
) -> None:
    def journal() -> list[str]:
        return [
            each.name for each in tmp_path.glob("ledger.db-*") if each.suffix != ".lock"
        ]

    async with sqlite_world(tmp_path) as world:
        job = await world.create()
        assert _here(world) is not None
        assert "ledger.db-wal" in journal()
        await database_of(world).close()
        assert _here(world) is None
        with pytest.raises(RuntimeError, match="ended"):
            await world.ledger.get_job(job.tenant, job.job_id)
        assert not journal()


async def test_after_a_slow_read_threads_do_the_reading_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with sqlite_world(tmp_path) as world:
        job = await world.create()
        monkeypatch.setattr(sqlite_ledger, "_SLOW", -1.0)
        assert _here(world) is not None
        assert _here(world) is None
        assert await world.ledger.get_job(job.tenant, job.job_id) is not None
        monkeypatch.setattr(database_of(world), "_here_from", 0.0)
        assert _here(world) is not None


async def test_after_a_failed_read_threads_do_the_reading_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with sqlite_world(tmp_path) as world:
        job = await world.create()

        def fail(tx: Transaction) -> int:
            return int(tx.connection.exec_driver_sql("SELECT * FROM nothing").scalar_one())

        assert database_of(world).read_here(fail) is None
        assert _here(world) is None
        assert await world.ledger.get_job(job.tenant, job.job_id) is not None
        monkeypatch.setattr(database_of(world), "_here_from", 0.0)
        assert _here(world) is not None


# --- jobs that are still as they were read


@pytest.fixture
async def read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[World, list[str]]]:
    """A world, and a list that grows whenever a job's rows are read."""
    # However busy the machine is.
    monkeypatch.setattr(sqlite_ledger, "_SLOW", ENOUGH)
    async with sqlite_world(tmp_path) as world:
        database = database_of(world)
        reads: list[str] = []

        def here(work: Any) -> Any:
            reads.append("here")
            return read_here(work)

        read_here = database.read_here
        database.read_here = here  # type: ignore[method-assign]
        yield world, reads


async def test_a_job_is_not_read_again_until_something_is_written(
    read_again: tuple[World, list[str]],
) -> None:
    world, reads = read_again
    job, lease = await world.running()
    told = await world.job(job)
    reads.clear()
    world.clock.advance(1)
    again = await world.job(job)
    assert again == told
    assert told.read_time is not None
    assert again.read_time == told.read_time + timedelta(seconds=1)
    assert not reads
    await world.ledger.add_part(lease, part(lease))
    assert (await world.job(job)).progress.parts_done == 1
    assert reads == ["here"]


async def test_what_other_hands_write_is_seen_by_the_next_read(
    read_again: tuple[World, list[str]], tmp_path: Path
) -> None:
    world, _ = read_again
    job = await world.succeeded()
    for generation in (2, 3):
        with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection, connection:
            connection.execute("UPDATE jobs SET revision = ?", [100 * generation])
        assert (await world.job(job)).revision == 100 * generation


async def test_a_job_that_was_read_before_expires_when_its_time_comes(
    read_again: tuple[World, list[str]],
) -> None:
    world, _ = read_again
    job = await world.succeeded()
    assert job.expire_time is not None
    world.clock.time = job.expire_time - timedelta(microseconds=1)
    assert not (await world.job(job)).expired
    world.clock.time = job.expire_time
    assert (await world.job(job)).expired
    assert (await world.job(job)).expired


async def test_a_job_that_was_read_before_is_still_its_tenants_alone(
    read_again: tuple[World, list[str]],
) -> None:
    world, _ = read_again
    job = await world.succeeded()
    assert await world.job(job) == job
    assert await world.ledger.get_job("another", job.job_id) is None


async def test_a_job_that_is_deleted_is_gone_for_the_next_read(
    read_again: tuple[World, list[str]],
) -> None:
    world, _ = read_again
    job = await world.succeeded()
    assert await world.job(job) == job
    await world.ledger.delete_job(job.tenant, job.job_id)
    assert await world.ledger.get_job(job.tenant, job.job_id) is None


async def test_a_file_that_does_not_tell_its_version_is_read_in_threads_for_a_while(
    read_again: tuple[World, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    world, reads = read_again
    job = await world.succeeded()
    reads.clear()

    def fail(_connection: Connection) -> object:
        raise sqlite3.OperationalError("locked")

    with monkeypatch.context() as failing:
        failing.setattr(sqlite_ledger, "_version", fail)
        assert await world.job(job) == job
    assert database_of(world).version_here() is None
    assert await world.job(job) == job
    assert not reads
    # Another connection counts by itself: nothing is taken for what it was before.
    monkeypatch.setattr(database_of(world), "_here_from", 0.0)
    assert await world.job(job) == job
    assert reads == ["here"]


async def test_a_job_that_is_written_while_it_is_read_is_read_again(
    read_again: tuple[World, list[str]], tmp_path: Path
) -> None:
    world, reads = read_again
    job = await world.succeeded()
    await world.create()
    database = database_of(world)
    read_here = database.read_here

    def meanwhile(work: Any) -> Any:
        found = read_here(work)
        with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection, connection:
            connection.execute("UPDATE jobs SET revision = 500")
        return found

    database.read_here = meanwhile  # type: ignore[method-assign]
    assert (await world.job(job)).revision < 500
    database.read_here = read_here  # type: ignore[method-assign]
    assert (await world.job(job)).revision == 500
    assert reads


async def test_a_clock_that_is_set_back_does_not_leave_a_job_expired(
    read_again: tuple[World, list[str]],
) -> None:
    world, _ = read_again
    job = await world.succeeded()
    assert job.expire_time is not None
    world.clock.time = job.expire_time
    assert (await world.job(job)).expired
    world.clock.time = job.expire_time - timedelta(seconds=5)
    assert not (await world.job(job)).expired


async def test_an_unforeseen_error_leaves_the_loops_connection_to_the_next(
    read_again: tuple[World, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    world, reads = read_again
    job = await world.succeeded()

    def fail(_connection: Connection) -> object:
        raise MemoryError

    with monkeypatch.context() as failing:
        failing.setattr(sqlite_ledger, "_version", fail)
        for _ in range(3):
            with pytest.raises(MemoryError):
                await world.job(job)
    reads.clear()
    async with asyncio.timeout(ENOUGH):
        assert await world.job(job) == job
    assert reads == ["here"]


async def test_a_long_request_is_read_in_a_thread_and_not_kept(
    read_again: tuple[World, list[str]],
) -> None:
    world, _ = read_again
    job = await world.create(target_id="x" * 20_000)
    await world.ledger.cancel_job(job.tenant, job.job_id)
    ledger: Any = world.ledger
    for _ in range(2):
        assert (await world.job(job)).spec == job.spec
        assert not len(ledger._recent)


async def test_a_read_that_has_ended_is_asked_nothing_more(tmp_path: Path) -> None:
    one = Prepared(sa.text("SELECT 1 AS one"))
    async with sqlite_world(tmp_path) as world:
        database = database_of(world)
        assert await database.read(lambda tx: tx.last((one, {}))) == [[(1,)]]

        def more(tx: Transaction) -> None:
            tx.last()
            assert tx.now > 0
            tx.rows(one)

        with pytest.raises(RuntimeError, match="ended"):
            await database.read(more)


def test_few_and_small_jobs_are_kept() -> None:
    recent = RecentJobs()
    now = FakeClock().now()
    job = Job("id", "acme", JobState.SUCCEEDED, spec(), "", now)
    first = ("acme", "0")
    for number in range(RecentJobs.MOST + 3):
        asked = ("acme", str(number))
        recent.keep(asked, 1, job)
        recent.keep(asked, 1, job)
        assert recent.find(asked, 1, now) == job
        assert recent.find(first, 1, now) == job, "those that are asked for stay"
        assert len(recent) <= RecentJobs.MOST
    assert len(recent) == RecentJobs.MOST
    assert recent.find(("acme", "1"), 1, now) is None
    (column,) = COLUMNS[:1]
    good = PartRecord(0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, b"", OutputKind.OUTPUT)
    bad = replace(good, kind=OutputKind.ERROR)
    for records in ([good] * (RecentJobs.MOST_PARTS + 1), [bad] * 10 + [good] * 7):
        many = replace(job, manifest=Manifest.of((column,), records))
        recent.keep(("acme", "many"), 1, many)
        assert recent.find(("acme", "many"), 1, now) is None
    delivery = SinkDelivery("s", DeliveryStatus.PENDING)
    recent.keep(("acme", "sent"), 1, replace(job, deliveries=(delivery,)))
    assert recent.find(("acme", "sent"), 1, now) is None
    # What is of another version is of no use any more.
    recent.keep(first, 2, job)
    assert len(recent) == 1
