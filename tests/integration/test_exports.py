"""The main job, end to end, over a real socket."""

from __future__ import annotations

import asyncio
import csv
import gzip
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exportd.v1 import dataset_pb2, job_pb2
from exportd.v1 import export_service_pb2 as pb
from tests.support import rpc
from tests.support.samples import SAMPLE_ROWS
from tests.support.server import Server, serve, settings
from tests.support.waits import ENOUGH

SIX = {
    "token_transfers",
    "native_balance_deltas",
    "decoded_events",
    "hl_fills",
    "hl_funding",
    "positions",
}


@pytest.fixture
async def server(tmp_path: Path, sample_catalogue: Path) -> AsyncIterator[Server]:
    async with serve(settings(tmp_path, catalogue=sample_catalogue)) as running:
        yield running


async def test_the_six_sample_datasets_are_listed_with_their_columns(
    server: Server,
) -> None:
    response = await server.stub.ListDatasets(pb.ListDatasetsRequest())
    assert {dataset.name for dataset in response.datasets} == SIX
    transfers = (
        await server.stub.GetDataset(pb.GetDatasetRequest(name="token_transfers"))
    ).dataset
    assert transfers.exportable
    assert transfers.estimated_rows == SAMPLE_ROWS
    types = {column.type for column in transfers.columns}
    assert {"int64", "decimal128(38, 18)", "timestamp[us, tz=UTC]"} <= types
    assert transfers.time_column
    assert transfers.network_column
    assert transfers.target_column


async def test_datasets_come_in_pages(server: Server) -> None:
    names: list[str] = []
    token = ""
    for _ in range(10):
        page = await server.stub.ListDatasets(
            pb.ListDatasetsRequest(page_size=4, page_token=token)
        )
        names += [dataset.name for dataset in page.datasets]
        token = page.next_page_token
        if not token:
            break
    assert names == sorted(SIX)


@pytest.mark.parametrize("dataset", sorted(SIX))
async def test_each_sample_dataset_exports_in_every_format(
    server: Server, dataset: str
) -> None:
    rows = set()
    for number in (
        dataset_pb2.FORMAT_CSV,
        dataset_pb2.FORMAT_JSONL,
        dataset_pb2.FORMAT_PARQUET,
        dataset_pb2.FORMAT_ARROW,
    ):
        job = await rpc.export(server.stub, dataset, format=number)
        data = await rpc.download(server.stub, job.job_id)
        rows.add(job.manifest.rows)
        match number:
            case dataset_pb2.FORMAT_CSV:
                table = list(csv.reader(io.StringIO(data.decode(), newline="")))
                assert table[0] == [column.name for column in job.manifest.columns]
                rows.add(len(table) - 1)
            case dataset_pb2.FORMAT_JSONL:
                records = [json.loads(line) for line in data.splitlines()]
                rows.add(len(records))
                assert list(records[0]) == [c.name for c in job.manifest.columns]
            case dataset_pb2.FORMAT_PARQUET:
                rows.add(pq.read_table(io.BytesIO(data)).num_rows)
            case _:
                rows.add(pa.ipc.open_stream(data).read_all().num_rows)
    assert len(rows) == 1


async def test_a_job_goes_from_pending_to_succeeded_and_says_what_it_did(
    server: Server,
) -> None:
    created = await rpc.create(server.stub, "token_transfers", labels={"team": "data"})
    assert created.state in (job_pb2.JOB_STATE_PENDING, job_pb2.JOB_STATE_RUNNING)
    job = await rpc.finish(server.stub, created.job_id)
    assert job.state == job_pb2.JOB_STATE_SUCCEEDED
    assert job.progress.rows == job.manifest.rows == SAMPLE_ROWS
    assert job.progress.fraction == 1.0
    assert job.progress.parts_total == len(job.manifest.parts) == 1
    assert job.attempt == 1
    assert job.generation == 1
    assert job.request.labels == {"team": "data"}
    assert job.request.ttl.seconds == 86_400
    finish, expire = job.finish_time.ToDatetime(), job.expire_time.ToDatetime()
    assert (expire - finish).total_seconds() == 86_400
    assert job.create_time.ToDatetime() <= job.start_time.ToDatetime() <= finish


async def test_many_parts_join_into_one_valid_file(server: Server) -> None:
    whole = await rpc.export(server.stub, "token_transfers")
    expected = await rpc.download(server.stub, whole.job_id)
    job = await rpc.export(server.stub, "token_transfers", max_part_rows=3000)
    assert [part.rows for part in job.manifest.parts] == [3000] * 6 + [2000]
    assert await rpc.download(server.stub, job.job_id) == expected
    header = expected.split(b"\n", 1)[0]
    for part in job.manifest.parts:
        data = await rpc.download(server.stub, job.job_id, part_index=part.index)
        assert len(data) == part.bytes
        assert data.split(b"\n", 1)[0] == header
        rows = list(csv.reader(io.StringIO(data.decode(), newline="")))
        assert len(rows) == part.rows + 1


async def test_parts_by_bytes_stay_near_their_limit(server: Server) -> None:
    job = await rpc.export(server.stub, "token_transfers", max_part_bytes=500_000)
    sizes = [part.bytes for part in job.manifest.parts]
    assert len(sizes) > 5
    assert all(400_000 < size < 1_000_000 for size in sizes[:-1])
    assert sum(part.rows for part in job.manifest.parts) == SAMPLE_ROWS


async def test_compressed_parts_join_too(server: Server) -> None:
    plain = await rpc.export(server.stub, "hl_fills", limit=5000)
    expected = await rpc.download(server.stub, plain.job_id)
    job = await rpc.export(
        server.stub,
        "hl_fills",
        limit=5000,
        max_part_rows=1000,
        compression=job_pb2.COMPRESSION_GZIP,
    )
    assert job.manifest.content_encoding == "gzip"
    assert job.manifest.file_name.endswith(".csv.gz")
    data = await rpc.download(server.stub, job.job_id)
    assert gzip.decompress(data) == expected


async def test_parquet_of_several_parts_is_fetched_part_by_part(server: Server) -> None:
    job = await rpc.export(
        server.stub,
        "token_transfers",
        format=dataset_pb2.FORMAT_PARQUET,
        max_part_rows=7000,
    )
    assert not job.manifest.joinable
    refused = await rpc.refusal(
        server.stub.StreamDownload(pb.StreamDownloadRequest(job_id=job.job_id))
    )
    assert refused.code is grpc.StatusCode.FAILED_PRECONDITION
    assert refused.reason == "PARTS_NOT_JOINABLE"
    tables = [
        pq.read_table(
            io.BytesIO(await rpc.download(server.stub, job.job_id, part_index=part.index))
        )
        for part in job.manifest.parts
    ]
    assert pa.concat_tables(tables).num_rows == SAMPLE_ROWS


async def test_filters_projection_and_limit_reach_the_rows(server: Server) -> None:
    job = await rpc.export(
        server.stub,
        "token_transfers",
        columns=["block_number", "network"],
        network="ethereum",
        filters=[
            job_pb2.Filter(
                column="block_number",
                operator=dataset_pb2.FILTER_OPERATOR_IS_NOT_NULL,
            )
        ],
        limit=100,
    )
    data = await rpc.download(server.stub, job.job_id)
    rows = list(csv.DictReader(io.StringIO(data.decode())))
    assert len(rows) == 100
    assert {row["network"] for row in rows} == {"ethereum"}
    assert list(rows[0]) == ["block_number", "network"]


async def test_a_filter_that_matches_nothing_gives_a_file_with_a_header(
    server: Server,
) -> None:
    job = await rpc.export(server.stub, "token_transfers", network="no'such; DROP --")
    data = await rpc.download(server.stub, job.job_id)
    assert data.count(b"\n") == 1
    assert job.manifest.rows == 0


async def test_validate_only_estimates_and_records_nothing(server: Server) -> None:
    job = await rpc.create(server.stub, "token_transfers", limit=7, validate_only=True)
    assert not job.job_id
    assert job.progress.estimated_rows == 7
    listed = await server.stub.ListJobs(pb.ListJobsRequest())
    assert not listed.jobs


async def test_a_request_id_makes_creation_safe_to_repeat(server: Server) -> None:
    key = "01890a5d-ac96-774b-bcce-b302099a8057"
    first = await rpc.create(server.stub, "hl_fills", request_id=key)
    again = await rpc.create(server.stub, "hl_fills", request_id=key)
    assert again.job_id == first.job_id
    refused = await rpc.refusal(
        server.stub.CreateExport(rpc.request("positions", request_id=key))
    )
    assert refused.code is grpc.StatusCode.ALREADY_EXISTS
    assert refused.reason == "REQUEST_ID_CONFLICT"
    assert refused.metadata["job_id"] == first.job_id


async def test_any_range_of_the_output_can_be_read(server: Server) -> None:
    job = await rpc.export(server.stub, "token_transfers", max_part_rows=4000)
    whole = await rpc.download(server.stub, job.job_id)
    size = len(whole)
    first = job.manifest.parts[0].bytes
    for offset, limit in (
        (0, 1),
        (first - 10, 20),
        (first, 1),
        (size - 1, 0),
        (size // 2, size),
        (1, size - 2),
    ):
        expected = whole[offset : offset + limit] if limit else whole[offset:]
        data = await rpc.download(
            server.stub, job.job_id, read_offset=offset, read_limit=limit
        )
        assert data == expected
    assert await rpc.download(server.stub, job.job_id, read_offset=size) == b""
    for offset in (-1, size + 1):
        refused = await rpc.refusal(
            server.stub.StreamDownload(
                pb.StreamDownloadRequest(job_id=job.job_id, read_offset=offset)
            )
        )
        assert refused.code is grpc.StatusCode.OUT_OF_RANGE
        assert refused.reason == "OFFSET_OUT_OF_RANGE"


async def test_a_download_is_pinned_to_its_generation(server: Server) -> None:
    job = await rpc.export(server.stub, "positions")
    data = await rpc.download(server.stub, job.job_id, if_generation_match=1)
    assert data == await rpc.download(server.stub, job.job_id)
    refused = await rpc.refusal(
        server.stub.StreamDownload(
            pb.StreamDownloadRequest(job_id=job.job_id, if_generation_match=2)
        )
    )
    assert refused.reason == "GENERATION_MISMATCH"


async def test_the_file_name_is_safe_in_a_header(server: Server) -> None:
    job = await rpc.export(server.stub, "positions")
    call = server.stub.StreamDownload(pb.StreamDownloadRequest(job_id=job.job_id))
    first = await call.read()
    assert isinstance(first, pb.StreamDownloadResponse)
    name = f"positions-{job.job_id}.csv"
    assert first.metadata.file_name == name
    expected = f'attachment; filename="{name}"'
    assert first.metadata.content_disposition == expected
    call.cancel()


async def test_jobs_are_listed_newest_first_in_pages_and_by_conditions(
    server: Server,
) -> None:
    made = [
        (await rpc.create(server.stub, name, labels={"n": str(number)})).job_id
        for number, name in enumerate(("positions", "hl_fills") * 3)
    ]
    for job_id in made:
        await rpc.finish(server.stub, job_id)
    listed: list[str] = []
    token = ""
    for _ in range(10):
        page = await server.stub.ListJobs(pb.ListJobsRequest(page_size=4, page_token=token))
        listed += [job.job_id for job in page.jobs]
        token = page.next_page_token
        if not token:
            break
    assert listed == made[::-1]
    by_dataset = await server.stub.ListJobs(pb.ListJobsRequest(dataset="positions"))
    assert [job.job_id for job in by_dataset.jobs] == made[-2::-2]
    by_label = await server.stub.ListJobs(pb.ListJobsRequest(labels={"n": "3"}))
    assert [job.job_id for job in by_label.jobs] == [made[3]]
    running = await server.stub.ListJobs(
        pb.ListJobsRequest(states=[job_pb2.JOB_STATE_RUNNING])
    )
    assert not running.jobs
    refused = await rpc.refusal(
        server.stub.ListJobs(
            pb.ListJobsRequest(page_size=2, page_token=await page_token(server))
        )
    )
    assert refused.reason == "INVALID_PAGE_TOKEN"


async def page_token(server: Server) -> str:
    """A token of another query."""
    page = await server.stub.ListJobs(pb.ListJobsRequest(page_size=1, dataset="positions"))
    return page.next_page_token


async def test_deleting_a_job_removes_its_output_and_itself(server: Server) -> None:
    job = await rpc.export(server.stub, "positions")
    assert server.files()
    await server.stub.DeleteJob(pb.DeleteJobRequest(job_id=job.job_id))
    refused = await rpc.refusal(
        server.stub.StreamDownload(pb.StreamDownloadRequest(job_id=job.job_id))
    )
    assert refused.reason == "JOB_NOT_FOUND"
    async with asyncio.timeout(ENOUGH):
        while server.files():
            await asyncio.sleep(0.01)
