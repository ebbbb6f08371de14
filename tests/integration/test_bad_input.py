"""Bad input gets a clear answer that names the field and the mend."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from exportd.v1 import dataset_pb2, job_pb2
from exportd.v1 import export_service_pb2 as pb
from exportd_server.sources.catalogue import Catalogue, Dataset
from tests.support import rpc
from tests.support.gate import GateSource
from tests.support.samples import catalogue_of
from tests.support.server import Server, serve, settings

Op = dataset_pb2.FilterOperator
NO_HEX = "+1890a5d-ac96-774b-bcce-b302099a8057"


@pytest.fixture
async def server(tmp_path: Path, sample_catalogue: Path) -> AsyncIterator[Server]:
    async with serve(settings(tmp_path, catalogue=sample_catalogue)) as running:
        yield running


def where(column: str, operator: int, *values: Any) -> job_pb2.Filter:
    messages = []
    for value in values:
        kind = {bool: "bool", int: "int", float: "double", str: "string"}[type(value)]
        messages.append(job_pb2.FilterValue(**{f"{kind}_value": value}))
    return job_pb2.Filter(column=column, operator=operator, values=messages)  # type: ignore[arg-type]


def time_range(start: int | None, end: int | None) -> job_pb2.TimeRange:
    message = job_pb2.TimeRange()
    if start is not None:
        message.start_time.FromSeconds(start)
    if end is not None:
        message.end_time.FromSeconds(end)
    return message


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"format": 0}, "format"),
    ({"format": 99}, "format"),
    ({"compression": 99}, "compression"),
    ({"format": dataset_pb2.FORMAT_PARQUET, "compression": 2}, "compression"),
    ({"parquet_options": job_pb2.ParquetOptions()}, "parquet_options"),
    ({"arrow_options": job_pb2.ArrowOptions()}, "arrow_options"),
    ({"csv_options": job_pb2.CsvOptions(delimiter=";;")}, "csv_options.delimiter"),
    ({"csv_options": job_pb2.CsvOptions(delimiter='"')}, "csv_options.delimiter"),
    ({"csv_options": job_pb2.CsvOptions(null_marker="a,b")}, "csv_options.null_marker"),
    ({"csv_options": job_pb2.CsvOptions(dialect=9)}, "csv_options.dialect"),  # type: ignore[arg-type]
    ({"columns": ["no_such"]}, "columns[0]"),
    ({"columns": ["network", "network"]}, "columns[1]"),
    ({"limit": 0}, "limit"),
    ({"limit": -5}, "limit"),
    ({"max_part_rows": 0}, "max_part_rows"),
    ({"max_part_bytes": 1}, "max_part_bytes"),
    ({"priority": 1000}, "priority"),
    ({"labels": {"Bad Key": "x"}}, "labels['Bad Key']"),
    ({"labels": {"key": "a\0b"}}, "labels['key']"),
    ({"labels": {"key": "x" * 257}}, "labels['key']"),
    ({"request_id": "no uuid"}, "request_id"),
    ({"ttl": timedelta(0)}, "ttl"),
    ({"ttl": timedelta(days=8)}, "ttl"),
    ({"ttl": timedelta(seconds=-1)}, "ttl"),
    ({"time_range": time_range(200, 100)}, "time_range.end_time"),
    ({"time_range": time_range(100, 100)}, "time_range.end_time"),
    ({"filters": [where("no_such", Op.FILTER_OPERATOR_EQUAL, 1)]}, "filters[0].column"),
    ({"filters": [where("", Op.FILTER_OPERATOR_EQUAL, 1)]}, "filters[0].column"),
    ({"filters": [where("block_number", 0, 1)]}, "filters[0].operator"),
    ({"filters": [where("block_number", 77, 1)]}, "filters[0].operator"),
    (
        {"filters": [where("block_number", Op.FILTER_OPERATOR_CONTAINS, "1")]},
        "filters[0].operator",
    ),
    (
        {"filters": [where("block_number", Op.FILTER_OPERATOR_EQUAL, "one")]},
        "filters[0].values[0]",
    ),
    (
        {"filters": [where("network", Op.FILTER_OPERATOR_EQUAL, 1)]},
        "filters[0].values[0]",
    ),
    (
        {"filters": [where("block_number", Op.FILTER_OPERATOR_EQUAL, 1, 2)]},
        "filters[0].values",
    ),
    ({"filters": [where("block_number", Op.FILTER_OPERATOR_IN)]}, "filters[0].values"),
    (
        {"filters": [where("network", Op.FILTER_OPERATOR_IS_NULL, "x")]},
        "filters[0].values",
    ),
    ({"filters": [where("network", Op.FILTER_OPERATOR_IS_NULL)] * 101}, "filters"),
]


@pytest.mark.parametrize(
    ("fields", "bad"), BAD_FIELDS, ids=[f"{n}-{b}" for n, (_, b) in enumerate(BAD_FIELDS)]
)
async def test_a_bad_field_is_named(
    server: Server, fields: dict[str, Any], bad: str
) -> None:
    ttl = fields.pop("ttl", None) if "ttl" in (fields := dict(fields)) else None
    message = rpc.request("token_transfers", **fields)
    if ttl is not None:
        message.ttl.FromTimedelta(ttl)
    refused = await rpc.refusal(server.stub.CreateExport(message))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.reason == "INVALID_REQUEST"
    assert refused.fields == [bad]
    assert bad in refused.message


async def test_every_bad_field_is_named_at_once(server: Server) -> None:
    refused = await rpc.refusal(
        server.stub.CreateExport(
            rpc.request("token_transfers", format=0, limit=-1, columns=["nope"])
        )
    )
    assert refused.fields == ["format", "limit", "columns[0]"]


async def test_an_unknown_dataset_and_one_not_exportable_differ(tmp_path: Path) -> None:
    source = GateSource(wide=True)
    catalogue = Catalogue(
        {
            "internal": Dataset(
                name="internal",
                columns=source.columns(),
                source=source,
                exportable=False,
            )
        }
    )
    async with serve(settings(tmp_path), catalogue) as server:
        unknown = await rpc.refusal(server.stub.CreateExport(rpc.request("nothing")))
        assert unknown.code is grpc.StatusCode.NOT_FOUND
        assert unknown.reason == "DATASET_NOT_FOUND"
        closed = await rpc.refusal(server.stub.CreateExport(rpc.request("internal")))
        assert closed.code is grpc.StatusCode.FAILED_PRECONDITION
        assert closed.reason == "DATASET_NOT_EXPORTABLE"
        described = await server.stub.GetDataset(pb.GetDatasetRequest(name="internal"))
        assert not described.dataset.exportable
        assert not described.dataset.columns
        missing = await rpc.refusal(server.stub.CreateExport(rpc.request("")))
        assert missing.fields == ["dataset"]


async def test_target_network_and_time_need_a_column_of_the_dataset(
    tmp_path: Path,
) -> None:
    async with serve(
        settings(tmp_path), catalogue_of(gated=GateSource(wide=True))
    ) as server:
        refused = await rpc.refusal(
            server.stub.CreateExport(
                rpc.request(
                    "gated",
                    target_id="x",
                    network="y",
                    time_range=time_range(1, None),
                )
            )
        )
        assert refused.fields == ["target_id", "network", "time_range"]


async def test_jobs_that_do_not_exist_and_ids_that_are_none_differ(
    server: Server,
) -> None:
    for method, request_class in (
        ("GetJob", pb.GetJobRequest),
        ("WatchJob", pb.WatchJobRequest),
        ("CancelJob", pb.CancelJobRequest),
        ("DeleteJob", pb.DeleteJobRequest),
        ("StreamDownload", pb.StreamDownloadRequest),
    ):
        call = getattr(server.stub, method)
        missing = await rpc.refusal(call(request_class(job_id=str(uuid.uuid4()))))
        assert missing.code is grpc.StatusCode.NOT_FOUND, method
        assert missing.reason == "JOB_NOT_FOUND"
        for nonsense in (
            "",
            "42",
            "../../etc/passwd",
            "x" * 36,
            "{" + "0" * 34 + "}",
            NO_HEX,
        ):
            refused = await rpc.refusal(call(request_class(job_id=nonsense)))
            assert refused.code is grpc.StatusCode.INVALID_ARGUMENT, method
            assert refused.fields == ["job_id"]


@pytest.mark.parametrize("token", ["nonsense", "W10", "äöü", "e30", "WzEsMl0", "A" * 5000])
async def test_page_sizes_and_tokens_that_are_nonsense(server: Server, token: str) -> None:
    calls: list[tuple[Any, Any]] = [
        (server.stub.ListJobs, pb.ListJobsRequest),
        (server.stub.ListDatasets, pb.ListDatasetsRequest),
    ]
    for call, request_class in calls:
        refused = await rpc.refusal(call(request_class(page_token=token)))
        assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
        assert refused.reason == "INVALID_PAGE_TOKEN"
        for size in (-1, 1001):
            refused = await rpc.refusal(call(request_class(page_size=size)))
            assert refused.fields == ["page_size"]


async def test_bad_download_fields_are_named(server: Server) -> None:
    job_id = str(uuid.uuid4())
    for fields, bad in (
        ({"read_limit": -1}, "read_limit"),
        ({"part_index": -1}, "part_index"),
        ({"if_generation_match": -1}, "if_generation_match"),
        ({"follow": True, "read_limit": 5}, "read_limit"),
        ({"follow": True, "part_index": 0}, "part_index"),
    ):
        refused = await rpc.refusal(
            server.stub.StreamDownload(
                pb.StreamDownloadRequest(job_id=job_id, **fields)  # type: ignore[arg-type]
            )
        )
        assert refused.fields == [bad]


async def test_a_part_that_does_not_exist(server: Server) -> None:
    job = await rpc.export(server.stub, "positions")
    refused = await rpc.refusal(
        server.stub.StreamDownload(
            pb.StreamDownloadRequest(job_id=job.job_id, part_index=5)
        )
    )
    assert refused.code is grpc.StatusCode.NOT_FOUND
    assert refused.reason == "PART_NOT_FOUND"


async def test_sql_in_a_filter_value_is_data(server: Server) -> None:
    for text in ("' OR 1=1 --", "x'; DROP TABLE t; --", "\\", "%", "_"):
        job = await rpc.export(
            server.stub,
            "token_transfers",
            filters=[where("network", Op.FILTER_OPERATOR_EQUAL, text)],
        )
        assert job.manifest.rows == 0
        job = await rpc.export(
            server.stub,
            "token_transfers",
            filters=[where("network", Op.FILTER_OPERATOR_CONTAINS, text)],
        )
        assert job.manifest.rows == 0


async def test_a_timestamp_beyond_the_calendar_is_refused(server: Server) -> None:
    message = rpc.request("token_transfers")
    message.time_range.start_time.seconds = 2**62
    refused = await rpc.refusal(server.stub.CreateExport(message))
    assert refused.fields == ["time_range.start_time"]
    message.time_range.start_time.seconds = 0
    message.time_range.start_time.nanos = -1
    refused = await rpc.refusal(server.stub.CreateExport(message))
    assert refused.fields == ["time_range.start_time"]


@pytest.mark.parametrize("count", [60, 150])
async def test_so_many_bad_fields_that_no_answer_holds_them_are_told_by_number(
    server: Server, count: int
) -> None:
    """A client refuses trailers that are too long, and would never see the answer."""
    for name in ("no_such_column", "é" * 60, "x" * 5_000):
        refused = await rpc.refusal(
            server.stub.CreateExport(rpc.request("token_transfers", columns=[name] * count))
        )
        assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
        told = len(refused.fields)
        assert told > 1 or len(name) > 14
        assert refused.message.endswith(f"; and {count - told} more")


@pytest.mark.parametrize("method", ["GetJob", "CreateExport", "StreamDownload"])
async def test_bytes_that_are_no_message_are_an_invalid_request(
    server: Server, method: str
) -> None:
    path = f"/exportd.v1.ExportService/{method}"
    call: Any
    if method == "StreamDownload":
        call = server.channel.unary_stream(path)
    else:
        call = server.channel.unary_unary(path)
    for wire in (b"\xff\xff\xff", b"\x0a\x02\xff\xfe"):
        refused = await rpc.refusal(call(wire))
        assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
        assert refused.reason == "INVALID_REQUEST"
        assert "Error" not in refused.message


@pytest.mark.parametrize("path", ["/", "/foo", "/a/b/c", "/exportd.v1.ExportService/No"])
async def test_a_method_that_does_not_exist_is_unimplemented(
    server: Server, path: str
) -> None:
    call: Any = server.channel.unary_unary(path)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call(b"")
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_page_token_with_half_a_character_is_refused(server: Server) -> None:
    await rpc.export(server.stub, "positions")
    await rpc.export(server.stub, "positions")
    page = await server.stub.ListJobs(pb.ListJobsRequest(page_size=1))
    padded = page.next_page_token + "=" * (-len(page.next_page_token) % 4)
    position = json.loads(base64.urlsafe_b64decode(padded))
    position[-1] = "\ud800"
    token = base64.urlsafe_b64encode(json.dumps(position).encode()).decode()
    refused = await rpc.refusal(server.stub.ListJobs(pb.ListJobsRequest(page_token=token)))
    assert refused.reason == "INVALID_PAGE_TOKEN"


async def test_more_labels_than_a_job_has_are_refused(server: Server) -> None:
    labels = {f"k{number}": "v" for number in range(33)}
    refused = await rpc.refusal(server.stub.ListJobs(pb.ListJobsRequest(labels=labels)))
    assert refused.fields == ["labels"]


async def test_text_that_not_every_database_keeps_is_refused(server: Server) -> None:
    for field, asked in (
        ("dataset", pb.ListJobsRequest(dataset="a\0")),
        ("labels['k']", pb.ListJobsRequest(labels={"k": "\0"})),
    ):
        refused = await rpc.refusal(server.stub.ListJobs(asked))
        assert refused.fields == [field]
        assert "NUL" in refused.message
