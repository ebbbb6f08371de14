"""`exportd-server status`: what an operator sees of a ledger that others work with, and
that they notice nothing of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from exportd_server.errors import ConfigurationError
from exportd_server.jobs.ledger.looking import look_at_file
from exportd_server.jobs.ledger.statements import standing as statements
from exportd_server.operations.glance import glance, size, span
from exportd_server.operations.standing import SinkQueue, Standing, read_standing
from exportd_server.settings import Settings
from tests.support.deliveries import DOWN, SOON, Deliveries, sink
from tests.support.ledger import BACKENDS, World, postgres_world, sqlite_world
from tests.support.server import ROOT, server_process
from tests.support.waits import ENOUGH


@pytest.fixture(params=BACKENDS)
async def world(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[World]:
    async with BACKENDS[request.param](tmp_path, request) as world:
        # Who looks goes by the ledger's own clock.
        world.clock.time = datetime.now(UTC)
        yield world


@pytest.fixture
def read(
    world: World, tmp_path: Path, request: pytest.FixtureRequest
) -> Callable[[], Standing]:
    options: dict[str, Any] = {"data_dir": tmp_path}
    if "postgresql" in request.node.callspec.id:
        options["ledger"] = {"url": request.getfixturevalue("ledger_database").url}
    return lambda: read_standing(Settings(**options))


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file, when it was written, and what is in it."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.iterdir()
        if path.is_file()
    }


# --- what is told


async def test_a_fresh_ledger_has_only_its_housekeeping(
    world: World, read: Callable[[], Standing]
) -> None:
    told = read()
    assert abs(told.time - datetime.now(UTC)) < timedelta(minutes=1)
    assert (told.workers, told.late_leases, told.jobs) == ([], [], [])
    assert (told.sink_queues, told.storage, told.untold) == ([], [], ())
    assert {one.kind for one in told.tasks or ()} == {"reap", "sweep"}


async def test_who_works_and_what_waits_is_told_by_state_and_dataset(
    world: World, read: Callable[[], Standing]
) -> None:
    world.clock.advance(-7200)
    await world.create(dataset="positions")
    world.clock.advance(3600)
    await world.create(dataset="positions")
    await world.create(tenant="beta", dataset="orders")
    world.clock.time = datetime.now(UTC)
    lease = await world.lease(owner="host:1:a")
    told = read()
    (holder,) = told.workers or ()
    assert (holder.owner, holder.kind, holder.leases) == ("host:1:a", "plan", 1)
    assert holder.expires == lease.expires_at
    queues = {(one.state, one.dataset): one for one in told.jobs or ()}
    assert {key: one.jobs for key, one in queues.items()} == {
        ("RUNNING", "positions"): 1,
        ("PENDING", "positions"): 1,
        ("PENDING", "orders"): 1,
    }
    job = await world.ledger.get_job(lease.tenant, lease.job_id)
    assert job is not None
    assert queues["RUNNING", "positions"].oldest == job.create_time
    ages = {key: told.time - one.oldest for key, one in queues.items()}
    assert ages["RUNNING", "positions"] > timedelta(hours=1, minutes=55)
    assert ages["PENDING", "orders"] < timedelta(hours=1, minutes=5)
    counted = {(one.kind, one.state): one.tasks for one in told.tasks or ()}
    assert counted["plan", "ready"] == 2
    assert counted["plan", "leased"] == 1


async def test_a_lease_is_late_once_two_renewals_are_missing(
    world: World, read: Callable[[], Standing]
) -> None:
    await world.create()
    world.clock.advance(60)
    await world.lease(owner="host:2:fresh")
    assert read().late_leases == []
    await world.create()
    world.clock.advance(-71)
    near = await world.lease(owner="host:1:near")
    await world.create()
    world.clock.advance(-7200)
    past = await world.lease(owner="host:3:past")
    told = read()
    assert [(one.owner, one.job_id) for one in told.late_leases or ()] == [
        ("host:3:past", past.job_id),
        ("host:1:near", near.job_id),
    ]
    text = "\n".join(glance(told))
    assert "past by 1h 59m" in text


async def test_sink_queues_tell_what_waits_what_is_dead_and_whether_the_sink_works(
    world: World, read: Callable[[], Standing]
) -> None:
    deliveries = Deliveries(world)
    await deliveries.succeeded(sink(queue="q"), parts=4)
    await deliveries.bury()
    lease = await deliveries.lease()
    await world.ledger.fail_delivery(lease, DOWN, retry_in=SOON)
    await deliveries.lease()
    (told,) = read().sink_queues or ()
    assert (told.queue, told.waiting, told.retrying, told.delivering) == ("q", 1, 1, 1)
    assert told.dead_letters == 1
    assert told.oldest_dead_letter is not None
    assert told.failing_since is not None
    await deliveries.bury_all()
    (after,) = read().sink_queues or ()
    assert (after.waiting, after.dead_letters) == (0, 2)


async def test_storage_is_what_the_ledger_knows_of_finished_parts(
    world: World, read: Callable[[], Standing]
) -> None:
    await world.succeeded()
    await world.succeeded(tenant="beta")
    (stored,) = read().storage or ()
    assert (stored.kind, stored.parts, stored.bytes) == ("output", 2, 200)


# --- nobody notices


async def test_looking_changes_nothing_in_a_ledger_that_nobody_has_open(
    tmp_path: Path,
) -> None:
    async with sqlite_world(tmp_path) as world:
        await world.succeeded()
    before = snapshot(tmp_path)
    (stored,) = read_standing(Settings(data_dir=tmp_path)).storage or ()
    assert stored.parts == 1
    assert snapshot(tmp_path) == before


async def test_a_ledger_whose_process_died_is_read_with_its_journal_and_left_as_it_is(
    tmp_path: Path,
) -> None:
    left = tmp_path / "left"
    left.mkdir()
    async with sqlite_world(tmp_path) as world:
        await world.succeeded()
        for name in ("ledger.db", "ledger.db-wal"):
            shutil.copy(tmp_path / name, left / name)
    before = snapshot(left)
    (stored,) = read_standing(Settings(data_dir=left)).storage or ()
    assert stored.parts == 1
    after = snapshot(left)
    assert {name: after[name] for name in before} == before


async def test_a_ledger_is_written_to_while_somebody_looks_at_it(tmp_path: Path) -> None:
    async with sqlite_world(tmp_path) as world:
        await world.create()
        with look_at_file(tmp_path / "ledger.db") as ledger:
            assert [row.jobs for row in ledger.ask(statements.unfinished_jobs())] == [1]
            await world.create()
            await world.lease()
            found = {
                row.state: row.jobs for row in ledger.ask(statements.unfinished_jobs())
            }
            assert found == {"PENDING": 1, "RUNNING": 1}


@pytest.mark.minutes
def test_a_running_embedded_server_is_looked_at_and_serves_on(tmp_path: Path) -> None:
    with server_process(tmp_path, "--sample-rows", "1000") as server:
        client = [sys.executable, "-m", "exportd.cli", "--server", server.address]
        made = subprocess.run(
            [*client, "create", "positions", "--format", "csv", "--wait"],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert made.returncode == 0, made.stderr
        told = run("status", "--json", "--data-dir", str(tmp_path))
        assert told.returncode == 0, told.stderr
        (line,) = told.stdout.splitlines()
        standing = json.loads(line)
        assert standing["storage"][0]["parts"] == 1
        assert standing["untold"] == []
        text = run("status", "--data-dir", str(tmp_path))
        assert "Jobs: none is pending or running" in text.stdout
        assert "Storage" in text.stdout
        again = subprocess.run(
            [*client, "create", "positions", "--format", "csv", "--wait"],
            capture_output=True,
            check=False,
            timeout=60,
        )
        assert again.returncode == 0
        assert server.terminate() == 0


# --- bounds


async def test_what_postgresql_does_not_tell_in_time_is_named_and_the_rest_is_told(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    async with postgres_world(tmp_path, request) as world:
        await world.create()
        url = request.getfixturevalue("ledger_database").url
        settings = Settings(data_dir=tmp_path, ledger={"url": url})
        with psycopg.connect(url, options="-c search_path=exportd") as other:
            other.execute("LOCK TABLE parts IN ACCESS EXCLUSIVE MODE")
            told = read_standing(settings, seconds=0.5)
        assert told.storage is None
        assert told.untold == ("storage",)
        assert [one.jobs for one in told.jobs or ()] == [1]
        assert "Storage: the ledger did not tell in time" in "\n".join(glance(told))
        assert read_standing(settings).untold == ()


async def test_what_sqlite_does_not_tell_in_time_is_named_and_the_rest_is_told(
    tmp_path: Path,
) -> None:
    async with sqlite_world(tmp_path) as world:
        await world.succeeded()
    with sqlite3.connect(tmp_path / "ledger.db") as raw:
        raw.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 50000) "
            "INSERT INTO parts SELECT job_id, generation, shard, i, token, rows, bytes, "
            "prefix_bytes, suffix_bytes, crc32c, prefix_crc32c, body_crc32c, "
            "suffix_crc32c, sha256, kind FROM parts, n"
        )
    raw.close()
    settings = Settings(data_dir=tmp_path)
    told = read_standing(settings, seconds=0.0)
    assert told.storage is None
    assert told.untold == ("storage",)
    assert told.jobs == []
    (stored,) = read_standing(settings).storage or ()
    assert stored.parts == 50_001


# --- the command


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "exportd_server", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=60,
        env={**os.environ, **environment},
    )


@pytest.fixture
async def one_job(tmp_path: Path) -> None:
    """A ledger with one job, which nobody has open."""
    async with sqlite_world(tmp_path) as world:
        await world.create()


def test_watching_goes_on_until_it_is_interrupted(tmp_path: Path, one_job: None) -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "exportd_server", "status", "--watch", "--json"),
            *("--interval", "0.5", "--data-dir", str(tmp_path)),
        ],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert process.stdout is not None
        looks = [json.loads(process.stdout.readline()) for _ in range(2)]
        assert looks[0]["jobs"] == looks[1]["jobs"]
        assert looks[0]["time"] <= looks[1]["time"]
        process.send_signal(signal.SIGINT)
        assert process.wait(ENOUGH) == 0
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_ledger_that_is_not_there_is_told_in_one_line_and_not_made(
    tmp_path: Path, postgres_url: str
) -> None:
    told = run("status", "--data-dir", str(tmp_path / "none"))
    assert told.returncode == 2
    assert "there is no such file" in told.stderr
    assert not (tmp_path / "none").exists()
    told = run("status", EXPORTD_LEDGER__URL=postgres_url)
    assert told.returncode == 2
    assert "run `exportd-server migrate`" in told.stderr
    assert len(told.stderr.splitlines()) == 1


def test_a_password_is_not_shown_when_the_server_cannot_be_reached(tmp_path: Path) -> None:
    url = "postgresql://exportd:s3cr3tp4ss@127.0.0.1:1/exportd"
    with pytest.raises(ConfigurationError) as refused:
        read_standing(Settings(data_dir=tmp_path, ledger={"url": url}))
    assert "127.0.0.1:1" in str(refused.value)
    assert "s3cr3tp4ss" not in str(refused.value)


# --- the text


def test_a_long_table_says_how_much_of_it_is_left_out() -> None:
    queues = [SinkQueue(f"webhook/t/{number:02}") for number in range(33)]
    standing = Standing(datetime.now(UTC), [], [], [], [], queues, [], ())
    lines = list(glance(standing))
    assert sum("webhook/t/" in line for line in lines) == 30
    assert "  and 3 more; --json tells all" in lines


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59, "59s"), (61, "1m 1s"), (7500, "2h 5m"), (266_400, "3d 2h")],
)
def test_spans_are_told_in_two_units(seconds: int, text: str) -> None:
    assert span(timedelta(seconds=seconds)) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB")]
)
def test_sizes_are_told_in_the_largest_unit(count: int, text: str) -> None:
    assert size(count) == text
