"""Short ways to make calls, for tests."""

from __future__ import annotations

import hashlib
from typing import Any

import grpc
from crc32c import crc32c
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from exportd.v1 import dataset_pb2, job_pb2
from exportd.v1 import export_service_pb2 as pb

TERMINAL = (
    job_pb2.JOB_STATE_SUCCEEDED,
    job_pb2.JOB_STATE_FAILED,
    job_pb2.JOB_STATE_CANCELLED,
)


def request(dataset: str, **fields: Any) -> job_pb2.CreateExportRequest:
    """A request for CSV unless it says otherwise."""
    fields.setdefault("format", dataset_pb2.FORMAT_CSV)
    return job_pb2.CreateExportRequest(dataset=dataset, **fields)


async def create(stub: Any, dataset: str, **fields: Any) -> job_pb2.Job:
    response = await stub.CreateExport(request(dataset, **fields))
    return response.job  # type: ignore[no-any-return]


async def get(stub: Any, job_id: str) -> job_pb2.Job:
    return (await stub.GetJob(pb.GetJobRequest(job_id=job_id))).job  # type: ignore[no-any-return]


async def finish(stub: Any, job_id: str) -> job_pb2.Job:
    """Watch a job to its end."""
    job: job_pb2.Job | None = None
    async for response in stub.WatchJob(pb.WatchJobRequest(job_id=job_id)):
        job = response.job
    assert job is not None
    assert job.state in TERMINAL
    return job


async def export(stub: Any, dataset: str, **fields: Any) -> job_pb2.Job:
    """Create an export and wait until it has succeeded."""
    job = await create(stub, dataset, **fields)
    job = await finish(stub, job.job_id)
    assert job.state == job_pb2.JOB_STATE_SUCCEEDED, job.error
    return job


async def download(stub: Any, job_id: str, **fields: Any) -> bytes:
    """The bytes of an output, every checksum verified."""
    data = bytearray()
    metadata = None
    start = fields.get("read_offset", 0)
    async for message in stub.StreamDownload(
        pb.StreamDownloadRequest(job_id=job_id, **fields)
    ):
        if message.HasField("metadata"):
            metadata = message.metadata
            assert not message.data
            continue
        assert metadata is not None, "the first message carries the metadata"
        assert message.offset == start + len(data)
        assert message.crc32c == crc32c(message.data)
        assert 0 < len(message.data) <= 2 * 2**20
        data += message.data
    assert metadata is not None
    if not start and not fields.get("read_limit"):
        assert metadata.total_bytes == len(data)
        assert metadata.crc32c == crc32c(bytes(data))
        if metadata.sha256:
            assert metadata.sha256 == hashlib.sha256(data).digest()
    return bytes(data)


class Refusal:
    """What a refused call said."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.code = error.code()
        self.message = error.details() or ""
        status = rpc_status.from_call(error)
        assert status is not None, f"no details: {error.code()} {self.message}"
        self.details: dict[str, Any] = {}
        for packed in status.details:
            kind = packed.TypeName().rpartition(".")[2]
            detail = getattr(error_details_pb2, kind)()
            packed.Unpack(detail)
            self.details[kind] = detail
        info = self.details["ErrorInfo"]
        assert info.domain == "exportd"
        self.reason: str = info.reason
        self.metadata = dict(info.metadata)
        assert self.message.startswith(f"[{self.reason}] ")

    @property
    def fields(self) -> list[str]:
        """The bad fields."""
        return [v.field for v in self.details["BadRequest"].field_violations]


async def refusal(call: Any) -> Refusal:
    """Make a call that must be refused."""
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return Refusal(error)
    raise AssertionError("the call was not refused")
