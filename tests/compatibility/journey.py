"""What a program does that was written for a released client: run with that client.

    python journey.py SERVER DIRECTORY

It uses what version 0.1.0 had and nothing newer.
"""

from __future__ import annotations

import csv
import gzip
import json
import sys
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import exportd
from exportd import errors
from exportd.v1 import dataset_pb2, export_service_pb2, export_service_pb2_grpc, job_pb2


def main() -> None:
    """Do everything, and tell where the client came from."""
    address, directory = sys.argv[1], Path(sys.argv[2])
    with exportd.Client(address) as client:
        look(client)
        export(client, directory)
        refuse(client)
        end(client)
    by_stubs(address)
    json.dump({"client": exportd.__file__}, sys.stdout)


def look(client: exportd.Client) -> None:
    """Datasets, with what their columns take."""
    names = [dataset.name for dataset in client.datasets()]
    assert "positions" in names
    assert "token_transfers" in names
    transfers = client.dataset("token_transfers")
    assert transfers.exportable
    columns = {column.name: column for column in transfers.columns}
    assert columns["amount"].kind == "DECIMAL"
    assert "GREATER_OR_EQUAL" in columns["amount"].operators


def export(client: exportd.Client, directory: Path) -> None:
    """With every option that shapes the output; watched, downloaded and read."""
    job = client.export(
        "token_transfers",
        format="csv",
        columns=["block_number", "amount", "network"],
        filters=[("amount", ">=", Decimal("1.5")), ("network", "in", ["base", "ethereum"])],
        limit=5_000,
        compression="gzip",
        max_part_rows=1_000,
        ttl=timedelta(hours=1),
        labels={"made_by": "journey"},
    )
    states = [info.state for info in job.watch(timeout=60)]
    assert states[-1] == exportd.JobState.SUCCEEDED
    done = job.download(directory / "transfers.csv.gz", parallel=2)
    assert done.verified_by == "sha256"
    with gzip.open(done.path, "rt", newline="") as file:
        rows = list(csv.DictReader(file))
    assert job.manifest is not None
    assert len(rows) == job.manifest.rows > 0
    assert len(job.manifest.parts) > 1
    assert set(rows[0]) == {"block_number", "amount", "network"}
    assert all(Decimal(row["amount"]) >= Decimal("1.5") for row in rows)
    (found,) = client.jobs(labels={"made_by": "journey"})
    assert found.id == job.id
    assert client.export("positions", format="parquet", validate_only=True).id == ""
    table = client.export("positions", format="arrow").wait(timeout=60).to_arrow()
    assert table.num_rows > 0
    job.delete()


def refuse(client: exportd.Client) -> None:
    """Errors keep their reasons, and the fields they name."""
    for reason, call in {
        "DATASET_NOT_FOUND": lambda: client.export("nothing", format="csv"),
        "JOB_NOT_FOUND": lambda: client.job("01900000-0000-7000-8000-000000000001"),
        "INVALID_REQUEST": lambda: client.export("positions", format="csv", columns=["no"]),
    }.items():
        error = refusal(call)
        assert error.reason == reason, error
        if isinstance(error, errors.InvalidRequest):
            assert error.violations[0].subject.startswith("columns"), error.violations


def refusal(call: Callable[[], object]) -> exportd.ExportdError:
    """The error that a call ends in."""
    try:
        call()
    except exportd.ExportdError as error:
        return error
    raise AssertionError("it was not refused")


def end(client: exportd.Client) -> None:
    """A job that is cancelled, once ended, says so."""
    job = client.export("positions", format="csv").wait(timeout=60)
    assert job.cancel() == exportd.CancelOutcome.ALREADY_FINISHED
    assert list(client.deliveries()) == []
    assert list(client.sink_queues()) == []


def by_stubs(address: str) -> None:
    """The generated stubs alone."""
    from grpc import insecure_channel  # noqa: PLC0415 - a program that has no Client

    with insecure_channel(address) as channel:
        stub = export_service_pb2_grpc.ExportServiceStub(channel)
        made = stub.CreateExport(
            job_pb2.CreateExportRequest(
                dataset="positions", format=dataset_pb2.FORMAT_JSONL
            )
        )
        watched = stub.WatchJob(
            export_service_pb2.WatchJobRequest(job_id=made.job.job_id), timeout=60
        )
        *_, last = watched
        assert last.job.state == job_pb2.JOB_STATE_SUCCEEDED
        data = b"".join(
            message.data
            for message in stub.StreamDownload(
                export_service_pb2.StreamDownloadRequest(job_id=made.job.job_id)
            )
        )
        assert len(data) == last.job.manifest.bytes
        assert len(data.splitlines()) == last.job.manifest.rows


if __name__ == "__main__":
    main()
