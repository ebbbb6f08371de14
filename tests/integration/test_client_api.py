"""Calls, waits and errors of the client against a real gRPC server."""

from __future__ import annotations

import io
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta

import grpc
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exportd import (
    SERVICE_CONFIG,
    AsyncClient,
    CancelOutcome,
    Client,
    JobInfo,
    JobState,
    Retry,
)
from exportd import errors as e
from exportd.v1 import (
    dataset_pb2,
    error_pb2,
    export_service_pb2,
    export_service_pb2_grpc,
)
from tests.support.scripted_server import (
    JOB,
    Script,
    ScriptedPart,
    ScriptedServer,
    scripted,
)

QUICK = Retry(attempts=4, initial=0.01, maximum=0.05)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted(parts=[ScriptedPart(b"a,b\n1,2\n")]) as running:
        yield running


@pytest.fixture
def client(server: ScriptedServer) -> Iterator[Client]:
    with Client(server.address, retry=QUICK, stream_retry=QUICK) as c:
        yield c


def dead_address() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


def test_datasets_and_jobs_are_paged_through_by_themselves(
    server: ScriptedServer, client: Client
) -> None:
    assert [d.name for d in client.datasets()] == [
        "positions",
        "secrets",
        "token_transfers",
    ]
    server.script.jobs = 5
    jobs = list(client.jobs(states=["SUCCEEDED"], labels={"team": "data"}))
    assert len({j.id for j in jobs}) == 5
    asked = [r for r in server.requests if hasattr(r, "created_from")]
    assert len(asked) == 3
    assert all(dict(r.labels) == {"team": "data"} for r in asked)


def test_a_dataset_tells_its_columns(client: Client) -> None:
    dataset = client.dataset("token_transfers")
    column = dataset.columns[0]
    assert (column.name, column.kind, column.type) == ("block", "INTEGER", "int64")
    assert "EQUAL" in column.operators
    assert dataset.formats == ("csv", "jsonl", "parquet", "arrow")
    assert (dataset.max_rows, dataset.max_bytes) == (100_000, None)


def test_a_create_whose_server_is_away_for_a_moment_is_one_job(
    server: ScriptedServer, client: Client
) -> None:
    server.script.unavailable = Counter(CreateExport=2)
    job = client.export("token_transfers", format="csv", columns=["a"])
    assert job.id == JOB
    assert server.calls["CreateExport"] == 3
    assert len(server.created) == 1  # the same request_id each time


def test_what_a_server_that_ends_has_not_begun_is_asked_again(
    server: ScriptedServer, client: Client
) -> None:
    calls = ("CreateExport", "GetJob", "WatchJob")
    server.script.cancelled = Counter(calls)
    client.export("token_transfers", format="csv", columns=["a"]).wait()
    assert client.job(JOB).state is JobState.SUCCEEDED
    options = [("grpc.service_config", SERVICE_CONFIG)]
    server.script.cancelled = Counter(("GetJob",))
    with grpc.insecure_channel(server.address, options=options) as channel:
        stub = export_service_pb2_grpc.ExportServiceStub(channel)
        answer = stub.GetJob(export_service_pb2.GetJobRequest(job_id=JOB), timeout=60)
        assert answer.job.job_id == JOB
    assert not +server.script.cancelled


def test_a_call_whose_client_is_closed_is_not_asked_again(
    server: ScriptedServer, client: Client
) -> None:
    server.script.watch_stays = True
    server.script.watch = ["RUNNING"]
    watch = client.job(JOB).watch()
    next(watch)
    client.close()
    with pytest.raises(e.ServerError, match="Channel closed"):
        next(watch)


def test_retries_are_bounded_by_number_and_by_time(server: ScriptedServer) -> None:
    server.script.unavailable = Counter(GetJob=1000)
    with Client(server.address, retry=QUICK) as c, pytest.raises(e.Unavailable):
        c.job(JOB)
    assert server.calls["GetJob"] == 4
    patient = Retry(attempts=10_000, initial=0.2, maximum=0.2)
    with (
        Client(server.address, retry=patient, timeout=0.5) as c,
        pytest.raises(e.Unavailable),
    ):
        c.job(JOB)
    # Each pause is of a tenth of a second at least.
    assert server.calls["GetJob"] <= 4 + 6


async def test_calls_about_deliveries_ride_out_a_server_that_is_away_for_a_moment(
    server: ScriptedServer, client: Client
) -> None:
    calls = ("ListDeliveries", "RedriveDeliveries", "ListSinkQueues", "EnableSinkQueue")
    server.script.unavailable = Counter(calls)
    assert list(client.deliveries(job_id=JOB)) == []
    assert client.redrive(job_id=JOB) == 0
    assert list(client.sink_queues()) == []
    assert client.enable_sink_queue("q").queue == "q"
    server.script.unavailable = Counter(calls)
    async with AsyncClient(server.address, retry=QUICK) as c:
        assert [each async for each in c.deliveries(job_id=JOB)] == []
        assert await c.redrive(job_id=JOB) == 0
        assert [each async for each in c.sink_queues()] == []
        assert (await c.enable_sink_queue("q")).queue == "q"
    assert {server.calls[name] for name in calls} == {4}


def test_a_refused_request_is_not_retried(server: ScriptedServer, client: Client) -> None:
    server.script.create_error = (
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        "columns[0]: no such column",
    )
    with pytest.raises(e.InvalidRequest) as caught:
        client.export("token_transfers", format="csv")
    assert caught.value.reason == "INVALID_REQUEST"
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.message == "columns[0]: no such column"
    assert caught.value.violations == (e.Violation("columns[0]", "no such column"),)


@pytest.mark.parametrize(
    ("code", "reason", "kind"),
    [
        ("NOT_FOUND", "DATASET_NOT_FOUND", e.DatasetNotFound),
        ("FAILED_PRECONDITION", "DATASET_NOT_EXPORTABLE", e.DatasetNotExportable),
        ("ALREADY_EXISTS", "REQUEST_ID_CONFLICT", e.RequestIdConflict),
        ("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED", e.QuotaExceeded),
        ("INTERNAL", "INTERNAL", e.ServerError),
        ("NOT_FOUND", "A_REASON_OF_TOMORROW", e.NotFound),
        ("UNAUTHENTICATED", "TOKEN_UNKNOWN", e.AccessDenied),
    ],
)
def test_errors_have_the_class_of_their_reason_or_else_of_their_code(
    server: ScriptedServer,
    client: Client,
    code: str,
    reason: str,
    kind: type[e.ExportdError],
) -> None:
    server.script.create_error = (grpc.StatusCode[code], reason, "so it is")
    with pytest.raises(e.ExportdError) as caught:
        client.export("token_transfers", format="csv")
    assert type(caught.value) is kind
    assert (caught.value.reason, caught.value.message) == (reason, "so it is")
    assert str(caught.value).endswith(f"[{reason}]")
    assert caught.value.reference == ("ref-1" if reason == "INTERNAL" else "")


def test_every_reason_of_the_contract_has_an_error() -> None:
    of_jobs = {  # stand in Job.error, which is a JobFailed whatever the reason
        "EXPORT_TOO_LARGE",
        "TOO_MANY_ROW_ERRORS",
        "SOURCE_FAILED",
        "VALUE_NOT_ENCODABLE",
        "STORE_FULL",
        "STORE_FAILED",
        "ATTEMPTS_EXHAUSTED",
        "SOURCE_CHANGED",
    }
    of_deliveries = {  # stand in last_error, which is a DeliveryFailed whatever the reason
        "DELIVERY_FAILED",
        "DELIVERY_REFUSED",
        "ENDPOINT_GONE",
        "PARTS_NOT_DELIVERED",
        "SINK_UNAVAILABLE",
    }
    plain = {"UNSPECIFIED", "INTERNAL"}
    names = {
        n.removeprefix("ERROR_REASON_")
        for n in error_pb2.ErrorReason.DESCRIPTOR.values_by_name
    }
    assert names - of_jobs - of_deliveries - plain == set(e._BY_REASON)


def test_a_server_that_is_down_is_named_with_the_mend() -> None:
    address = dead_address()
    with Client(address, retry=QUICK) as c, pytest.raises(e.Unavailable) as caught:
        c.job(JOB)
    assert f"cannot reach exportd at {address}" in str(caught.value)
    assert "check the address, and that the server runs" in str(caught.value)


def test_a_call_that_takes_too_long_is_a_timeout() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with Client(address, timeout=0.3) as c, pytest.raises(e.TimedOut):
            c.job(JOB)


def test_waiting_follows_the_job_to_its_end_through_a_broken_watch(
    server: ScriptedServer, client: Client
) -> None:
    server.script.state = "PENDING"
    server.script.watch = ["PENDING", "RUNNING", "RUNNING", "SUCCEEDED"]
    server.script.watch_cuts = 2
    seen: list[JobInfo] = []
    job = client.job(JOB).wait(on_progress=seen.append)
    assert job.state is JobState.SUCCEEDED
    assert job.manifest is not None
    assert seen[0].progress.queue_position == 3
    assert max(i.progress.rows for i in seen) == 3000
    assert server.calls["WatchJob"] == 3


def test_waiting_for_a_job_that_fails_raises_its_reason(
    server: ScriptedServer, client: Client
) -> None:
    server.script.watch = ["RUNNING", "FAILED"]
    with pytest.raises(e.JobFailed) as caught:
        client.job(JOB).wait()
    assert caught.value.job_reason == "EXPORT_TOO_LARGE"
    assert caught.value.metadata["limit"] == "10"
    assert "the export passed max_rows = 10 [JOB_FAILED: EXPORT_TOO_LARGE]" in str(
        caught.value
    )


def test_waiting_ends_after_its_time_and_says_that_the_job_goes_on(
    server: ScriptedServer, client: Client
) -> None:
    server.script.watch = ["RUNNING"]
    server.script.watch_stays = True
    with pytest.raises(e.TimedOut, match="it goes on"):
        client.job(JOB).wait(timeout=0.3)


def test_cancel_tells_what_it_found(server: ScriptedServer, client: Client) -> None:
    server.script.state = "RUNNING"
    job = client.job(JOB)
    assert job.cancel() is CancelOutcome.CANCELLED
    assert job.state is JobState.CANCELLED
    with pytest.raises(e.JobCancelled):
        job.wait()


def test_a_running_job_is_not_deleted_and_says_when_to_ask_again(
    server: ScriptedServer, client: Client
) -> None:
    server.script.state = "RUNNING"
    with pytest.raises(e.NotFinished) as caught:
        client.job(JOB).delete()
    assert caught.value.retry_after == timedelta(seconds=2)


def test_a_delete_whose_answer_is_lost_succeeds(
    server: ScriptedServer, client: Client
) -> None:
    server.script.lose_answers = Counter(DeleteJob=1)
    client.job(JOB).delete()
    assert server.calls["DeleteJob"] == 2
    with pytest.raises(e.JobNotFound):
        client.job(JOB)


def test_deleting_a_job_that_is_not_there_is_an_error(
    server: ScriptedServer, client: Client
) -> None:
    job = client.job(JOB)
    server.script.deleted = True
    with pytest.raises(e.JobNotFound):
        job.delete()


def test_the_token_goes_with_every_call_and_into_no_text(server: ScriptedServer) -> None:
    with Client(server.address, token="s3cret") as c:
        c.job(JOB).wait()
        assert "s3cret" not in repr(c._connection)
    assert {m["authorization"] for m in server.metadata} == {"Bearer s3cret"}
    assert server.calls["WatchJob"] == 1


def test_validating_records_nothing(server: ScriptedServer, client: Client) -> None:
    job = client.export("token_transfers", format="csv", validate_only=True)
    assert (job.id, job.progress.estimated_rows) == ("", 1234)
    assert not server.created


async def test_the_asyncio_client_has_the_same_shape(server: ScriptedServer) -> None:
    server.script.unavailable = Counter(CreateExport=1, ListJobs=1)
    server.script.watch = ["PENDING", "RUNNING", "SUCCEEDED"]
    server.script.watch_cuts = 1
    server.script.jobs = 3
    async with AsyncClient(server.address, retry=QUICK, stream_retry=QUICK) as c:
        assert len([d async for d in c.datasets()]) == 3
        assert (await c.dataset("positions")).exportable
        job = await c.export("token_transfers", format="csv")
        states: list[JobState] = []
        await job.wait(on_progress=lambda i: states.append(i.state))
        assert states[-1] is JobState.SUCCEEDED
        assert len([j async for j in c.jobs()]) == 3
        assert await job.cancel() is CancelOutcome.ALREADY_FINISHED
        await (await job.refresh()).delete()
        with pytest.raises(e.JobNotFound):
            await c.job(JOB)
        with pytest.raises(e.InvalidRequest, match="NaN"):
            await c.export("t", format="csv", filters=[("a", "=", float("nan"))])
    async with AsyncClient(dead_address(), retry=QUICK) as c:
        with pytest.raises(e.Unavailable, match="cannot reach exportd"):
            await c.job(JOB)


def table() -> pa.Table:
    return pa.table(
        {
            "block": pa.array([2**53 + 1, None, 3], pa.int64()),
            "name": pa.array(["a", "", None]),
        }
    )


def parquet_script() -> Script:
    parts = []
    for at in (0, 2):
        file = io.BytesIO()
        pq.write_table(table().slice(at, 2), file)
        parts.append(ScriptedPart(file.getvalue()))
    return Script(
        parts=parts,
        joinable=False,
        file_name="t.parquet",
        format=dataset_pb2.FORMAT_PARQUET,
    )


def arrow_script() -> Script:
    file = io.BytesIO()
    with pa.ipc.new_stream(file, table().schema) as writer:
        writer.write_table(table())
    return Script(
        parts=[ScriptedPart(file.getvalue())],
        file_name="t.arrows",
        format=dataset_pb2.FORMAT_ARROW,
    )


@pytest.mark.parametrize("script", [parquet_script, arrow_script])
def test_outputs_become_frames_without_loss(script: Callable[[], Script]) -> None:
    with ScriptedServer(script()) as server, Client(server.address) as c:
        job = c.job(JOB)
        assert job.to_arrow().equals(table())
        assert job.to_polars()["block"].to_list() == [2**53 + 1, None, 3]
        assert job.to_pandas()["block"].tolist()[0] == 2**53 + 1


async def test_outputs_become_frames_in_asyncio_too() -> None:
    with ScriptedServer(parquet_script()) as server:
        async with AsyncClient(server.address) as c:
            job = await c.job(JOB)
            assert (await job.to_arrow()).equals(table())
            assert (await job.to_polars()).height == 3


def test_a_format_without_types_and_a_missing_library_say_what_to_do(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(e.InvalidRequest, match="export as parquet or arrow"):
        client.job(JOB).to_arrow()
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(e.MissingExtra, match=r"pip install 'exportd\[polars\]'"):
        client.job(JOB).to_polars()
