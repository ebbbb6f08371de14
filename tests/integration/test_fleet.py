"""Several processes on one ledger in PostgreSQL, each of which may end at any moment."""

from __future__ import annotations

import asyncio
import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest

from exportd.v1 import export_service_pb2 as pb
from exportd.v1 import job_pb2
from tests.support import rpc
from tests.support.postgres import PostgresServer
from tests.support.processes import Member, Processes, processes
from tests.support.server import until
from tests.support.waits import ENOUGH

ROWS = 200_000
GROUP = 10_000


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalogue with one dataset, large enough to be cut."""
    directory = tmp_path_factory.mktemp("numbers")
    pl.DataFrame({"n": range(ROWS)}).with_columns(
        square=pl.col("n").cast(pl.Int64) ** 2,
        text=pl.col("n").cast(pl.String).repeat_by(4).list.join("-"),
    ).write_parquet(directory / "numbers.parquet", row_group_size=GROUP)
    catalogue = directory / "datasets.toml"
    catalogue.write_text('[datasets.numbers]\nparquet = "numbers.parquet"\n')
    return catalogue


@pytest.fixture
def fleet(postgres_url: str, tmp_path: Path, numbers: Path) -> Iterator[Processes]:
    """A fleet without members, to be hurt."""
    with processes(postgres_url, tmp_path, numbers) as fleet:
        yield fleet


@dataclass
class Standing:
    """Two processes that answer calls and two that export."""

    fleet: Processes
    here: Member
    there: Member


@pytest.fixture(scope="module")
def standing(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory, numbers: Path
) -> Iterator[Standing]:
    database = postgres.create_database()
    directory = tmp_path_factory.mktemp("fleet")
    with processes(postgres.url(database), directory, numbers) as fleet:
        for _ in range(2):
            fleet.worker(worker__shard_rows=GROUP, worker__concurrency=1, worker__lease=2)
        yield Standing(fleet, fleet.api(), fleet.api())
    postgres.drop_database(database)


async def numbers_of(stub: object, job_id: str) -> list[int]:
    data = await rpc.download(stub, job_id)
    return [int(row["n"]) for row in csv.DictReader(io.StringIO(data.decode()))]


@pytest.mark.minutes
async def test_any_process_takes_any_call(standing: Standing) -> None:
    fleet = standing.fleet
    async with fleet.calling(standing.here) as one, fleet.calling(standing.there) as other:
        job = await rpc.create(one, "numbers", limit=1000)
        finished = await rpc.finish(other, job.job_id)
        assert finished.state == job_pb2.JOB_STATE_SUCCEEDED, finished.error
        assert await numbers_of(one, job.job_id) == list(range(1000))
        assert await numbers_of(other, job.job_id) == list(range(1000))
        await other.DeleteJob(pb.DeleteJobRequest(job_id=job.job_id))
        assert (await rpc.refusal(rpc.finish(one, job.job_id))).reason == "JOB_NOT_FOUND"


async def test_a_cancel_through_any_process_stops_the_work_and_leaves_nothing(
    standing: Standing,
) -> None:
    fleet = standing.fleet
    async with fleet.calling(standing.here) as one, fleet.calling(standing.there) as other:
        job = await rpc.create(one, "numbers", max_part_rows=1000)
        watching = asyncio.create_task(rpc.finish(one, job.job_id))
        async with asyncio.timeout(ENOUGH):
            while not (await rpc.get(other, job.job_id)).progress.parts_done:
                await asyncio.sleep(0.01)
        await other.CancelJob(pb.CancelJobRequest(job_id=job.job_id))
        assert (await watching).state == job_pb2.JOB_STATE_CANCELLED
        assert (await rpc.refusal(rpc.download(one, job.job_id))).reason == "JOB_CANCELLED"
        assert fleet.owners() == set()
        await until(lambda: not fleet.files_of(job.job_id), ENOUGH)


async def test_one_export_is_written_by_several_workers_at_once_and_published_once(
    standing: Standing,
) -> None:
    fleet = standing.fleet
    async with fleet.calling(standing.here) as stub:
        job = await rpc.create(stub, "numbers", max_part_rows=2000)
        most = 0
        watching = asyncio.create_task(rpc.finish(stub, job.job_id))
        while not watching.done():
            most = max(most, len(await asyncio.to_thread(fleet.owners)))
        assert most == 2
        job = await watching
        assert job.state == job_pb2.JOB_STATE_SUCCEEDED, job.error
        assert len(job.manifest.parts) == ROWS // 2000
        assert await numbers_of(stub, job.job_id) == list(range(ROWS))
        assert len(fleet.files_of(job.job_id)) == ROWS // 2000 + len(["manifest"])


async def test_the_work_of_a_killed_process_is_taken_over_where_it_stood(
    fleet: Processes,
) -> None:
    api = fleet.api()
    for _ in range(2):
        fleet.worker(worker__shard_rows=GROUP, worker__concurrency=1, worker__lease=1)
    async with fleet.calling(api) as stub:
        job = await rpc.create(stub, "numbers", max_part_rows=1000)
        async with asyncio.timeout(ENOUGH):
            while (await rpc.get(stub, job.job_id)).progress.parts_done < 20:
                await asyncio.sleep(0.01)
        await asyncio.to_thread(fleet.kill_a_holder)
        job = await rpc.finish(stub, job.job_id)
        assert job.state == job_pb2.JOB_STATE_SUCCEEDED, job.error
        assert (job.generation, job.attempt) == (1, 2)
        assert await numbers_of(stub, job.job_id) == list(range(ROWS))
        # What the dead one had stored and not recorded goes, too.
        await until(
            lambda: (
                len(fleet.files_of(job.job_id))
                == len(job.manifest.parts) + len(["manifest"])
            ),
            ENOUGH,
        )


@pytest.mark.minutes
async def test_a_process_that_is_told_to_stop_gives_its_work_to_the_others(
    fleet: Processes,
) -> None:
    api = fleet.api()
    first = fleet.worker(worker__shard_rows=GROUP, worker__concurrency=2, drain_timeout=0.1)
    async with fleet.calling(api) as stub:
        job = await rpc.create(stub, "numbers", max_part_rows=1000)
        async with asyncio.timeout(ENOUGH):
            while (await rpc.get(stub, job.job_id)).progress.parts_done < 20:
                await asyncio.sleep(0.01)
        assert await asyncio.to_thread(first.terminate) == 0
        # Nothing is left to run out first.
        assert fleet.owners() == set()
        fleet.worker()
        job = await rpc.finish(stub, job.job_id)
        assert job.state == job_pb2.JOB_STATE_SUCCEEDED, job.error
        assert job.attempt == 1
        assert await numbers_of(stub, job.job_id) == list(range(ROWS))


@pytest.mark.minutes
def test_nothing_starts_before_the_ledger_is_migrated(
    postgres_url: str, tmp_path: Path, numbers: Path
) -> None:
    with processes(postgres_url, tmp_path, numbers) as fleet:
        fleet.change("DROP SCHEMA exportd CASCADE")
        for command in (("serve", "--listen", "127.0.0.1:0"), ("worker",)):
            told = fleet.command(*command)
            assert told.returncode == 2
            assert "run `exportd-server migrate`" in told.stderr
            assert len(told.stderr.splitlines()) == 1
        for version in ("now", "already"):
            done = fleet.command("migrate")
            assert done.returncode == 0
            assert version in done.stdout
        fleet.worker()


@pytest.mark.minutes
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"EXPORTD_LEDGER__URL": "postgresql://x@127.0.0.1:1/x"}, "is it up"),
        ({"EXPORTD_LEDGER__URL": "mysql://x/y"}, "ledger.url"),
        ({"EXPORTD_STORE__URL": ""}, "store.url: the processes of a fleet need one place"),
    ],
)
def test_a_wrong_setting_is_one_line_and_no_start(
    fleet: Processes, changes: dict[str, str], told: str
) -> None:
    fleet.environment.update(changes)
    ended = fleet.command("worker")
    assert ended.returncode == 2
    assert told in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_migrating_the_embedded_ledger_is_refused(fleet: Processes) -> None:
    fleet.environment["EXPORTD_LEDGER__URL"] = ""
    told = fleet.command("migrate")
    assert told.returncode == 2
    assert "is brought up to date when it is opened" in told.stderr
