"""Real data in real databases, exported through the whole service."""

from __future__ import annotations

import csv
import io
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pandas as pd
import pyarrow.parquet as pq
import pytest

from exportd.v1 import dataset_pb2, job_pb2
from exportd.v1 import export_service_pb2 as pb
from tests.support import rpc
from tests.support.flights import ROWS
from tests.support.postgres import PostgresServer, running_postgres
from tests.support.server import Server, serve, settings, until
from tests.support.waits import ENOUGH

pytestmark = pytest.mark.minutes

CATALOGUE = """
[connections.lite]
url = "sqlite:///{sqlite}"

[connections.warehouse]
url = "{postgres}"

[datasets.from_sqlite]
connection = "lite"
table = "flights"
target_column = "tailnum"

[datasets.from_postgres]
connection = "warehouse"
table = "flights"
target_column = "tailnum"
time_column = "time_hour"

[datasets.from_query]
connection = "warehouse"
query = "SELECT origin, dest, count(*) AS flights FROM flights GROUP BY 1, 2"

[datasets.from_csv]
csv = "flights.csv"
target_column = "tailnum"

[datasets.from_parquet]
parquet = "flights-*.parquet"
target_column = "tailnum"
"""

SAME = ("from_sqlite", "from_postgres", "from_csv", "from_parquet")


@pytest.fixture
async def server(
    tmp_path: Path, flights: pd.DataFrame, flights_sqlite: Path, flights_postgres: str
) -> AsyncIterator[Server]:
    flights.to_csv(tmp_path / "flights.csv", index=False)
    half = len(flights) // 2
    flights[:half].to_parquet(tmp_path / "flights-1.parquet")
    flights[half:].to_parquet(tmp_path / "flights-2.parquet")
    catalogue = tmp_path / "datasets.toml"
    catalogue.write_text(CATALOGUE.format(sqlite=flights_sqlite, postgres=flights_postgres))
    async with serve(settings(tmp_path / "data", catalogue=catalogue)) as running:
        yield running


@pytest.mark.parametrize("dataset", SAME)
async def test_every_flight_is_exported_whatever_holds_it(
    server: Server, flights: pd.DataFrame, dataset: str
) -> None:
    job = await rpc.export(
        server.stub,
        dataset,
        format=dataset_pb2.FORMAT_PARQUET,
        columns=["tailnum", "flight", "air_time"],
    )
    data = await rpc.download(server.stub, job.job_id)
    exported = pq.read_table(io.BytesIO(data))
    assert exported.num_rows == ROWS
    for name in ("flight", "air_time"):
        found = exported[name].cast("float64").to_pandas().sum()
        assert found == flights[name].sum(), name
    assert exported["tailnum"].null_count == flights["tailnum"].isna().sum()


@pytest.mark.parametrize("dataset", SAME)
async def test_one_planes_flights_are_the_same_whatever_holds_them(
    server: Server, flights: pd.DataFrame, dataset: str
) -> None:
    tail = "N14228"
    job = await rpc.export(
        server.stub,
        dataset,
        target_id=tail,
        columns=["month", "day", "flight", "dest"],
        filters=[
            job_pb2.Filter(
                column="month",
                operator=dataset_pb2.FILTER_OPERATOR_LESS,
                values=[job_pb2.FilterValue(int_value=7)],
            )
        ],
    )
    data = await rpc.download(server.stub, job.job_id)
    rows = sorted(tuple(row) for row in list(csv.reader(io.StringIO(data.decode())))[1:])
    chosen = flights[(flights["tailnum"] == tail) & (flights["month"] < 7)]
    expected = chosen[["month", "day", "flight", "dest"]].astype(str)
    assert rows == sorted(expected.itertuples(index=False, name=None))
    assert rows


async def test_an_hour_and_a_query_come_from_postgres(
    server: Server, flights: pd.DataFrame
) -> None:
    message = rpc.request("from_postgres", columns=["flight"])
    start, end = datetime(2013, 1, 1, 10, tzinfo=UTC), datetime(2013, 1, 1, 12, tzinfo=UTC)
    message.time_range.start_time.FromDatetime(start)
    message.time_range.end_time.FromDatetime(end)
    job = (await server.stub.CreateExport(message)).job
    job = await rpc.finish(server.stub, job.job_id)
    hours = pd.to_datetime(flights["time_hour"], utc=True)
    assert job.manifest.rows == ((hours >= start) & (hours < end)).sum() > 0
    routes = await rpc.export(server.stub, "from_query")
    assert routes.manifest.rows == len(flights[["origin", "dest"]].drop_duplicates())


SLOW = """
[connections.warehouse]
url = "{postgres}"

[datasets.slow]
connection = "warehouse"
query = '''
SELECT n, repeat('x', 20000) AS text, pg_sleep(0.0002)::text AS pause
FROM generate_series(1, 1000000) AS n
'''
"""


async def test_a_database_that_dies_in_the_middle_fails_the_job_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    with running_postgres() as database:
        assert isinstance(database, PostgresServer)
        catalogue = tmp_path / "datasets.toml"
        catalogue.write_text(SLOW.format(postgres=database.url()))
        options = settings(
            tmp_path / "data", catalogue=catalogue, worker={"max_attempts": 1}
        )
        async with serve(options) as server:
            job = await rpc.create(server.stub, "slow", max_part_bytes=2**20)
            await until(lambda: len(server.files()) >= 2, ENOUGH)
            database.kill()
            job = await rpc.finish(server.stub, job.job_id)
            assert job.state == job_pb2.JOB_STATE_FAILED
            assert job.error.code == grpc.StatusCode.UNAVAILABLE.value[0]
            assert "SOURCE_FAILED" in job.error.message
            for secret in ("127.0.0.1", "pg_sleep", "postgres"):
                assert secret not in str(job.error)
            await until(lambda: not server.files())
            refused = await rpc.refusal(
                server.stub.StreamDownload(pb.StreamDownloadRequest(job_id=job.job_id))
            )
            assert refused.reason == "JOB_FAILED"


async def test_cancelling_an_export_that_waits_in_the_database_stops_it_there(
    tmp_path: Path, postgres: PostgresServer
) -> None:
    catalogue = tmp_path / "datasets.toml"
    catalogue.write_text(
        f'[connections.warehouse]\nurl = "{postgres.url()}"\n'
        "[datasets.stuck]\n"
        'connection = "warehouse"\n'
        'query = "SELECT 1 AS one, pg_sleep(600)::text AS pause"\n'
    )

    def running() -> str:
        return postgres.sql(
            "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' "
            "AND query LIKE '%pg_sleep%' AND pid <> pg_backend_pid()"
        ).strip()

    async with serve(settings(tmp_path / "data", catalogue=catalogue)) as server:
        job = await rpc.create(server.stub, "stuck")
        await until(lambda: running() == "1", ENOUGH)
        await server.stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))
        await until(lambda: running() == "0", ENOUGH)
        assert not server.files()
