"""Exports that leave out what cannot be exported, through the whole service."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import grpc
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exportd import AsyncClient, Client, ErrorPart
from exportd import errors as e
from exportd.v1 import dataset_pb2, export_service_pb2_grpc, job_pb2
from exportd.v1 import export_service_pb2 as pb
from tests.support import rpc
from tests.support.loose import lines
from tests.support.server import Server, serve, server_process, settings, until

ROWS = 20_000
NOT_UTF8 = {7, 9_999, 19_999}
NO_NUMBER = {8, 15_000}
BAD = NOT_UTF8 | NO_NUMBER
GOOD = [row for row in range(ROWS) if row not in BAD]
SKIP = job_pb2.ROW_ERROR_POLICY_SKIP_AND_REPORT

CATALOGUE = """
[connections.lite]
url = "sqlite:///{folder}/source.db"

[datasets.messy]
connection = "lite"
table = "messy"

[datasets.tidy]
connection = "lite"
query = "SELECT id FROM messy"

[datasets.blind]
csv = "blind.csv"
"""


@pytest.fixture
def catalogue(tmp_path: Path) -> Path:
    """A table with text that is no UTF-8, and words among the numbers; and a file whose
    engine cannot tell which row is wrong."""
    with closing(sqlite3.connect(tmp_path / "source.db")) as database:
        database.execute("CREATE TABLE messy (id INTEGER NOT NULL, name TEXT, n INTEGER)")
        database.executemany(
            "INSERT INTO messy VALUES (?, ?, ?)",
            (
                (row, f"name {row}", "many" if row in NO_NUMBER else row)
                for row in range(ROWS)
            ),
        )
        wrong = ", ".join(map(str, NOT_UTF8))
        database.execute(
            f"UPDATE messy SET name = CAST(x'ff41' AS TEXT) WHERE id IN ({wrong})"
        )
        database.commit()
    (tmp_path / "blind.csv").write_text("x\n" + "1.5\n" * 30_000 + "oops\n")
    path = tmp_path / "datasets.toml"
    path.write_text(CATALOGUE.format(folder=tmp_path))
    return path


@pytest.fixture
async def server(tmp_path: Path, catalogue: Path) -> AsyncIterator[Server]:
    async with serve(settings(tmp_path / "data", catalogue=catalogue)) as running:
        yield running


def ids_of(form: dataset_pb2.Format.ValueType, data: bytes) -> list[int]:
    match form:
        case dataset_pb2.FORMAT_CSV:
            return [int(row["id"]) for row in csv.DictReader(io.StringIO(data.decode()))]
        case dataset_pb2.FORMAT_JSONL:
            return [json.loads(line)["id"] for line in data.splitlines()]
        case dataset_pb2.FORMAT_PARQUET:
            return pq.read_table(io.BytesIO(data))["id"].to_pylist()  # type: ignore[no-any-return]
        case _:
            return pa.ipc.open_stream(data).read_all()["id"].to_pylist()  # type: ignore[no-any-return]


async def everything(server: Server, job: job_pb2.Job) -> tuple[list[int], list[int]]:
    """The ids in the output and in the error parts, each in order."""
    output: list[int] = []
    told: list[int] = []
    stub, manifest = server.stub, job.manifest
    for part in manifest.parts:
        data = await rpc.download(stub, job.job_id, part_index=part.index)
        output += ids_of(job.request.format, data)
    for error_part in manifest.error_parts:
        data = await rpc.download(stub, job.job_id, error_part_index=error_part.index)
        assert len(data) == error_part.bytes
        rows = lines(data)
        assert len(rows) == error_part.rows
        told += [int(row["values"]["id"]) for row in rows]
    return output, told


@pytest.mark.parametrize(
    "form",
    [
        dataset_pb2.FORMAT_CSV,
        dataset_pb2.FORMAT_JSONL,
        dataset_pb2.FORMAT_PARQUET,
        dataset_pb2.FORMAT_ARROW,
    ],
)
async def test_the_good_rows_are_exported_and_the_others_told(
    server: Server, form: dataset_pb2.Format.ValueType
) -> None:
    job = await rpc.export(
        server.stub, "messy", format=form, on_row_error=SKIP, max_part_rows=6_000
    )
    assert await everything(server, job) == (GOOD, sorted(BAD))
    manifest, progress = job.manifest, job.progress
    assert (manifest.rows, manifest.row_errors) == (len(GOOD), len(BAD))
    assert (progress.rows, progress.row_errors) == (len(GOOD), len(BAD))
    assert (
        sum(part.bytes for part in manifest.parts)
        + sum(part.bytes for part in manifest.error_parts)
        == progress.bytes
    )
    assert [(part.index, part.part_index) for part in manifest.error_parts] == [
        (0, 0),
        (1, 1),
        (2, 2),
        (3, 3),
    ]
    assert manifest.error_parts[0].file_name == f"messy-{job.job_id}.errors-00000.jsonl"
    assert job.request.on_row_error == SKIP
    assert job.request.max_row_errors == 10_000


async def test_a_row_is_told_with_its_column_and_what_was_there(server: Server) -> None:
    job = await rpc.export(server.stub, "messy", on_row_error=SKIP)
    data = await rpc.download(server.stub, job.job_id, error_part_index=0)
    first, second, *_ = lines(data)
    assert (first["row"], first["column"], first["base64"]) == (7, "name", ["name"])
    assert second["values"] == {"id": "8", "name": "name 8", "n": "many"}
    assert second["column"] == "n"


async def test_what_an_error_part_is_said_to_be(server: Server) -> None:
    job = await rpc.export(
        server.stub,
        "messy",
        on_row_error=SKIP,
        compression=job_pb2.COMPRESSION_GZIP,
    )
    stream = server.stub.StreamDownload(
        pb.StreamDownloadRequest(job_id=job.job_id, error_part_index=0)
    )
    metadata = (await anext(aiter(stream))).metadata
    stream.cancel()
    assert metadata.content_type == "application/jsonl"
    assert metadata.content_encoding == ""
    assert metadata.file_name == job.manifest.error_parts[0].file_name
    whole = await rpc.download(server.stub, job.job_id, error_part_index=0)
    rest = await rpc.download(server.stub, job.job_id, error_part_index=0, read_offset=100)
    assert rest == whole[100:]


async def test_an_export_without_bad_rows_is_the_same_with_either_policy(
    server: Server,
) -> None:
    plain = await rpc.export(server.stub, "tidy")
    skipping = await rpc.export(server.stub, "tidy", on_row_error=SKIP)
    assert skipping.manifest.crc32c == plain.manifest.crc32c
    assert not skipping.manifest.error_parts
    assert plain.request.on_row_error == job_pb2.ROW_ERROR_POLICY_FAIL


async def test_by_default_the_first_bad_row_fails_the_job(server: Server) -> None:
    job = await rpc.create(server.stub, "messy")
    job = await rpc.finish(server.stub, job.job_id)
    assert job.state == job_pb2.JOB_STATE_FAILED
    assert "VALUE_NOT_ENCODABLE" in job.error.message


async def test_one_bad_row_too_many_fails_the_job_and_leaves_nothing(
    server: Server,
) -> None:
    few = len(BAD) - 1
    job = await rpc.create(
        server.stub, "messy", on_row_error=SKIP, max_row_errors=few, max_part_rows=1_000
    )
    job = await rpc.finish(server.stub, job.job_id)
    assert job.state == job_pb2.JOB_STATE_FAILED
    assert "[TOO_MANY_ROW_ERRORS]" in job.error.message
    assert f"max_row_errors = {few}" in job.error.message
    await until(lambda: not server.files())
    job = await rpc.export(server.stub, "messy", on_row_error=SKIP, max_row_errors=len(BAD))
    assert job.manifest.row_errors == len(BAD)


async def test_a_source_that_cannot_tell_the_row_fails_the_job_and_says_so(
    server: Server,
) -> None:
    job = await rpc.create(server.stub, "blind", on_row_error=SKIP)
    job = await rpc.finish(server.stub, job.job_id)
    assert job.state == job_pb2.JOB_STATE_FAILED
    assert "[VALUE_NOT_ENCODABLE]" in job.error.message
    assert "the source cannot tell in which row" in job.error.message


async def test_bad_bounds_are_refused_by_name(server: Server) -> None:
    for fields in (
        {"max_row_errors": 5},
        {"max_row_errors": -1, "on_row_error": SKIP},
        {"max_row_errors": 1_000_001, "on_row_error": SKIP},
    ):
        refused = await rpc.refusal(
            server.stub.CreateExport(rpc.request("messy", **fields))
        )
        assert refused.fields == ["max_row_errors"]
    unknown = rpc.request("messy")
    unknown.on_row_error = 77  # type: ignore[assignment] # a policy of tomorrow
    refused = await rpc.refusal(server.stub.CreateExport(unknown))
    assert refused.fields == ["on_row_error"]


async def test_error_parts_that_are_not_there_are_refused(server: Server) -> None:
    job = await rpc.export(server.stub, "messy", on_row_error=SKIP)

    def ask(**fields: object) -> object:
        request = pb.StreamDownloadRequest(job_id=job.job_id, **fields)  # type: ignore[arg-type]
        return server.stub.StreamDownload(request)

    missing = await rpc.refusal(ask(error_part_index=1))
    assert (missing.code, missing.reason) == (
        grpc.StatusCode.NOT_FOUND,
        "PART_NOT_FOUND",
    )
    for fields in (
        {"error_part_index": -1},
        {"error_part_index": 0, "part_index": 0},
        {"error_part_index": 0, "follow": True},
    ):
        refused = await rpc.refusal(ask(**fields))
        assert refused.fields == ["error_part_index"]


async def test_deleting_the_job_deletes_its_error_parts(server: Server) -> None:
    job = await rpc.export(server.stub, "messy", on_row_error=SKIP)
    assert any("error" in str(file) for file in server.files())
    await server.stub.DeleteJob(pb.DeleteJobRequest(job_id=job.job_id))
    await until(lambda: not server.files())


# --- a crash in the middle


@pytest.mark.minutes
async def test_a_crash_in_the_middle_loses_and_doubles_no_row(
    tmp_path: Path, catalogue: Path
) -> None:
    """The process is killed each time once more parts are finished than before."""
    data = tmp_path / "data"
    arguments = ("--catalogue", str(catalogue))
    job_id, parts, killed = "", 0, 0
    while True:
        with server_process(data, *arguments) as process:
            async with grpc.aio.insecure_channel(process.address) as channel:
                stub = export_service_pb2_grpc.ExportServiceStub(channel)
                if not job_id:
                    job = await rpc.create(
                        stub, "messy", on_row_error=SKIP, max_part_rows=250
                    )
                    job_id = job.job_id
                async for response in stub.WatchJob(pb.WatchJobRequest(job_id=job_id)):
                    job = response.job
                    if killed < 2 and job.progress.parts_done > parts + 5:
                        parts = job.progress.parts_done
                        break
                if job.state not in rpc.TERMINAL:
                    process.kill()
                    killed += 1
                    continue
                assert job.state == job_pb2.JOB_STATE_SUCCEEDED, job.error
                server = Server(None, channel, stub, data)  # type: ignore[arg-type] # not in this process
                assert await everything(server, job) == (GOOD, sorted(BAD))
                break
    assert killed, "it was done before it could be killed"
    assert job.attempt > 1


# --- the client


async def test_the_client_downloads_what_was_left_out(
    server: Server, tmp_path: Path
) -> None:
    def work() -> None:
        with Client(server.address) as client:
            job = client.export("messy", format="csv", on_row_error="skip").wait()
            assert job.row_errors == len(BAD)
            assert job.manifest is not None
            (part,) = job.manifest.error_parts
            assert isinstance(part, ErrorPart)
            assert (part.rows, part.part_index) == (len(BAD), 0)
            done = job.download_errors(tmp_path / "left-out.jsonl")
            assert done.verified_by == "sha256"
            assert len(lines(done.path.read_bytes())) == len(BAD)
            with pytest.raises(e.OutputExists):
                job.download_errors(tmp_path / "left-out.jsonl")
            job.download(tmp_path / "out.csv")
            several = client.export(
                "messy", format="csv", on_row_error="skip", max_part_rows=6_000
            ).wait()
            done = several.download_errors(tmp_path / "errors")
            rows = [row for file in done.files for row in lines(file.read_bytes())]
            assert len(done.files) == 4
            assert {int(row["values"]["id"]) for row in rows} == BAD
            tidy = client.export("tidy", format="csv", on_row_error="skip").wait()
            with pytest.raises(e.PartNotFound, match="left no row out"):
                tidy.download_errors(tmp_path / "none")
            with pytest.raises(e.InvalidRequest, match="on_row_error"):
                client.export("tidy", format="csv", on_row_error="hide")  # type: ignore[arg-type] # the point
            with pytest.raises(e.JobFailed) as caught:
                client.export(
                    "messy", format="csv", on_row_error="skip", max_row_errors=1
                ).wait()
            assert caught.value.job_reason == "TOO_MANY_ROW_ERRORS"

    await asyncio.to_thread(work)


async def test_the_asyncio_client_does_too(server: Server, tmp_path: Path) -> None:
    async with AsyncClient(server.address) as client:
        job = await client.export("messy", format="jsonl", on_row_error="skip")
        await job.wait()
        done = await job.download_errors(tmp_path / "errors.jsonl")
        assert len(lines(done.path.read_bytes())) == job.row_errors == len(BAD)


@pytest.mark.minutes
async def test_the_command_line_shows_what_was_left_out(
    server: Server, tmp_path: Path
) -> None:
    def exportd(*words: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "exportd.cli", "--server", server.address, *words],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    def work() -> None:
        code, out, _ = exportd(
            *("create", "messy", "-f", "csv", "--on-row-error", "skip", "--wait"),
            *("--max-row-errors", "100", "--part-rows", "6000"),
        )
        assert code == 0
        job_id = out.strip()
        code, out, err = exportd("errors", job_id)
        assert code == 0
        assert [json.loads(line)["column"] for line in out.splitlines()] == [
            *("name", "n", "name", "n", "name")
        ]
        assert "5 rows left out" in err
        _, out, _ = exportd("get", job_id)
        assert f"5 rows: exportd errors {job_id}" in out
        target = tmp_path / "saved"
        code, out, _ = exportd("errors", job_id, str(target))
        assert (code, out.strip()) == (0, str(target))
        assert len(list(target.iterdir())) == 4
        code, out, _ = exportd("errors", job_id, str(target), "--json")
        assert len(json.loads(out)["files"]) == 4
        code, out, _ = exportd("create", "tidy", "-f", "csv", "--wait")
        code, out, err = exportd("errors", out.strip())
        assert (code, out) == (0, "")
        assert "0 rows left out" in err

    await asyncio.to_thread(work)
