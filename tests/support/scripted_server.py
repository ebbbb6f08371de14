"""A real gRPC server on loopback with scripted jobs, outputs and faults.

It keeps the contract as a server would; each fault is a knob of `Script` that a test
sets. Nothing here shares code with the service or the client.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, NoReturn, Self

import crc32c
import grpc
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2

from exportd.v1 import (
    dataset_pb2,
    export_service_pb2,
    export_service_pb2_grpc,
    job_pb2,
    sink_pb2,
)

JOB = "01900000-0000-7000-8000-000000000001"

STATES = {
    "PENDING": job_pb2.JOB_STATE_PENDING,
    "RUNNING": job_pb2.JOB_STATE_RUNNING,
    "SUCCEEDED": job_pb2.JOB_STATE_SUCCEEDED,
    "FAILED": job_pb2.JOB_STATE_FAILED,
    "CANCELLED": job_pb2.JOB_STATE_CANCELLED,
}


@dataclass
class ScriptedPart:
    """A part's three pieces; the joined file takes the middle, and the outer ones once."""

    body: bytes
    prefix: bytes = b""
    suffix: bytes = b""
    rows: int = 1

    @property
    def data(self) -> bytes:
        return self.prefix + self.body + self.suffix


@dataclass
class Script:
    """One job and what goes wrong with it.

    Attributes:
        chunk: Bytes a message.
        cuts: For each download stream in turn: end it after so many messages; None: no.
        cut_quietly: A cut ends the stream with OK instead of UNAVAILABLE.
        corrupt: Flip a bit of the message that holds this byte, so many times.
        wrong_offset: Give the message that begins at this byte a wrong offset, so often.
        hang_after: Stop sending after so many messages of the first stream.
        pause: Held before each message when given; a test lets it go.
        unavailable: Answer so many calls of a method with UNAVAILABLE, by its name.
        cancelled: Answer so many with CANCELLED, as one that ends does with what it has
            not begun.
        download_error: Answer every download with (code, reason, message).
        error_after_cut: Answer every download but the first with (code, reason, message).
        refuse_once: Answer the second download stream with QUOTA_EXCEEDED and a time to
            wait.
        watch_breaks: Break every watch off after its first message.
        new_generation_at: After so many download streams, make the output anew.
        watch: States that WatchJob goes through, one message each.
        wrong_sha256: Tell a SHA-256 in the manifest that is not the output's.
        wrong_crc32c: Tell a CRC32C in the manifest that is not the output's.
    """

    parts: list[ScriptedPart] = field(default_factory=lambda: [ScriptedPart(b"")])
    joinable: bool = True
    state: str = "SUCCEEDED"
    generation: int = 1
    file_name: str = "token_transfers-1.csv"
    format: dataset_pb2.Format.ValueType = dataset_pb2.FORMAT_CSV
    part_file_names: list[str] | None = None
    chunk: int = 64 * 1024
    cuts: list[int | None] = field(default_factory=list)
    cut_quietly: bool = False
    corrupt: dict[int, int] = field(default_factory=dict)
    wrong_offset: Counter[int] = field(default_factory=Counter)
    hang_after: int | None = None
    pause: threading.Semaphore | None = None
    unavailable: Counter[str] = field(default_factory=Counter)
    cancelled: Counter[str] = field(default_factory=Counter)
    lose_answers: Counter[str] = field(default_factory=Counter)
    download_error: tuple[grpc.StatusCode, str, str] | None = None
    error_after_cut: tuple[grpc.StatusCode, str, str] | None = None
    refuse_once: bool = False
    watch_breaks: bool = False
    new_generation_at: int | None = None
    next_parts: list[ScriptedPart] | None = None
    watch: list[str] = field(default_factory=list)
    watch_cuts: int = 0
    watch_stays: bool = False
    follow_parts: list[ScriptedPart] | None = None
    follow_fails: bool = False
    wrong_sha256: bool = False
    wrong_crc32c: bool = False
    jobs: int = 1
    create_error: tuple[grpc.StatusCode, str, str] | None = None
    deleted: bool = False

    @property
    def joined(self) -> bytes:
        return join(self.parts)


def join(parts: Sequence[ScriptedPart]) -> bytes:
    """The joined file, as the contract words it."""
    pieces = []
    for i, part in enumerate(parts):
        pieces.append(part.prefix if i == 0 else b"")
        pieces.append(part.body)
        pieces.append(part.suffix if i == len(parts) - 1 else b"")
    return b"".join(pieces)


class ScriptedServer(export_service_pb2_grpc.ExportServiceServicer):
    """Serves a `Script`; `calls` counts what was asked, `requests` keeps each."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.calls: Counter[str] = Counter()
        self.requests: list[Any] = []
        self.metadata: list[dict[str, str | bytes]] = []
        self.created: dict[str, str] = {}
        self.peers: set[str] = set()
        self.sending = threading.Event()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._server: grpc.Server | None = None
        self.address = ""

    def start(self, port: int = 0) -> Self:
        self._server = grpc.server(
            futures.ThreadPoolExecutor(32), options=[("grpc.so_reuseport", 0)]
        )
        export_service_pb2_grpc.add_ExportServiceServicer_to_server(self, self._server)
        bound = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.address = f"127.0.0.1:{bound}"
        self._server.start()
        return self

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def stop(self) -> None:
        self._stopping.set()
        if self._server is not None:
            self._server.stop(0).wait()
        self._server = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    # The service.

    def ListDatasets(  # noqa: N802 - gRPC's name
        self, request: export_service_pb2.ListDatasetsRequest, context: Any
    ) -> export_service_pb2.ListDatasetsResponse:
        self._enter("ListDatasets", request, context)
        names = ["positions", "secrets", "token_transfers"]
        at = int(request.page_token or 0)
        return export_service_pb2.ListDatasetsResponse(
            datasets=[dataset(names[at])],
            next_page_token=str(at + 1) if at + 1 < len(names) else "",
        )

    def GetDataset(  # noqa: N802 - gRPC's name
        self, request: export_service_pb2.GetDatasetRequest, context: Any
    ) -> export_service_pb2.GetDatasetResponse:
        self._enter("GetDataset", request, context)
        if request.name == "nothing":
            fail(
                context,
                grpc.StatusCode.NOT_FOUND,
                "DATASET_NOT_FOUND",
                "there is no such dataset; ListDatasets names them",
            )
        return export_service_pb2.GetDatasetResponse(dataset=dataset(request.name))

    def CreateExport(  # noqa: N802 - gRPC's name
        self, request: job_pb2.CreateExportRequest, context: Any
    ) -> export_service_pb2.CreateExportResponse:
        if self.script.create_error is not None:
            fail(context, *self.script.create_error)
        if not request.validate_only:
            self.created.setdefault(request.request_id, JOB)
        self._enter("CreateExport", request, context)
        job = self.job("PENDING")
        job.request.CopyFrom(request)
        if request.validate_only:
            job.job_id = ""
            job.progress.estimated_rows = 1234
        return export_service_pb2.CreateExportResponse(job=job)

    def GetJob(  # noqa: N802 - gRPC's name
        self, request: export_service_pb2.GetJobRequest, context: Any
    ) -> export_service_pb2.GetJobResponse:
        self._enter("GetJob", request, context)
        self._known(request.job_id, context)
        return export_service_pb2.GetJobResponse(job=self.job())

    def ListJobs(  # noqa: N802 - gRPC's name
        self, request: export_service_pb2.ListJobsRequest, context: Any
    ) -> export_service_pb2.ListJobsResponse:
        self._enter("ListJobs", request, context)
        at = int(request.page_token or 0)
        end = min(at + 2, self.script.jobs)
        page = []
        for i in range(at, end):
            job = self.job()
            job.job_id = f"{JOB[:-3]}{i:03d}"
            job.ClearField("manifest")
            page.append(job)
        return export_service_pb2.ListJobsResponse(
            jobs=page, next_page_token=str(end) if end < self.script.jobs else ""
        )

    def WatchJob(  # noqa: N802 - gRPC's name
        self, request: export_service_pb2.WatchJobRequest, context: Any
    ) -> Iterator[export_service_pb2.WatchJobResponse]:
        self._enter("WatchJob", request, context)
        self._known(request.job_id, context)
        states = self.script.watch or [self.script.state]
        for i, state in enumerate(states):
            job = self.job(state)
            if state == "RUNNING":
                job.progress.rows = 1000 * (i + 1)
                job.progress.fraction = (i + 1) / len(states)
                job.progress.rows_per_second = 500.0
            if state == "PENDING":
                job.progress.queue_position = 3
            self.script.state = state
            yield export_service_pb2.WatchJobResponse(job=job)
            if self.script.watch_breaks:
                context.abort(grpc.StatusCode.UNAVAILABLE, "connection reset")
            if self.script.watch_cuts and i == 0:
                self.script.watch_cuts -= 1
                fail(context, grpc.StatusCode.UNAVAILABLE, "DRAINING", "shutting down")
        if self.script.watch_stays:
            self._wait(context)

    def CancelJob(  # noqa: N802 - gRPC's name
        self, request: export_service_pb2.CancelJobRequest, context: Any
    ) -> export_service_pb2.CancelJobResponse:
        self._enter("CancelJob", request, context)
        self._known(request.job_id, context)
        outcome = export_service_pb2.CANCEL_OUTCOME_ALREADY_FINISHED
        if self.script.state in {"PENDING", "RUNNING"}:
            self.script.state = "CANCELLED"
            outcome = export_service_pb2.CANCEL_OUTCOME_CANCELLED
        return export_service_pb2.CancelJobResponse(job=self.job(), outcome=outcome)

    def DeleteJob(  # noqa: N802 - gRPC's name
        self, request: export_service_pb2.DeleteJobRequest, context: Any
    ) -> export_service_pb2.DeleteJobResponse:
        self._enter("DeleteJob", request, context)
        self._known(request.job_id, context)
        if self.script.state in {"PENDING", "RUNNING"}:
            fail(
                context,
                grpc.StatusCode.FAILED_PRECONDITION,
                "JOB_NOT_FINISHED",
                "the job has not finished",
                retry=2,
            )
        self.script.deleted = True
        if self.script.lose_answers["DeleteJob"] > 0:
            self.script.lose_answers["DeleteJob"] -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "connection reset")
        return export_service_pb2.DeleteJobResponse()

    def StreamDownload(  # noqa: N802 - gRPC's name
        self, request: export_service_pb2.StreamDownloadRequest, context: Any
    ) -> Iterator[export_service_pb2.StreamDownloadResponse]:
        script = self.script
        self._enter("StreamDownload", request, context)
        self._known(request.job_id, context)
        if script.download_error is not None:
            fail(context, *script.download_error)
        if script.error_after_cut is not None and self.calls["StreamDownload"] > 1:
            fail(context, *script.error_after_cut)
        if script.refuse_once and self.calls["StreamDownload"] == 2:
            quota = grpc.StatusCode.RESOURCE_EXHAUSTED
            fail(context, quota, "QUOTA_EXCEEDED", "ask less often", retry=1)
        with self._lock:
            if script.new_generation_at == self.calls["StreamDownload"] - 1:
                script.generation += 1
                script.parts = script.next_parts or script.parts
            cut = script.cuts.pop(0) if script.cuts else None
        if request.if_generation_match not in {0, script.generation}:
            fail(
                context,
                grpc.StatusCode.FAILED_PRECONDITION,
                "GENERATION_MISMATCH",
                "the output was made anew; begin the download again",
            )
        if request.follow:
            yield from self._follow(request, context, cut)
            return
        data = (
            script.parts[request.part_index].data
            if request.HasField("part_index")
            else script.joined
        )
        yield export_service_pb2.StreamDownloadResponse(
            metadata=self._download_metadata(data)
        )
        end = len(data)
        if request.read_limit:
            end = min(end, request.read_offset + request.read_limit)
        yield from self._send(data, request.read_offset, end, context, cut)

    def GetDownloadUrls(  # noqa: N802 - gRPC's name
        self, request: export_service_pb2.GetDownloadUrlsRequest, context: Any
    ) -> export_service_pb2.GetDownloadUrlsResponse:
        """One URL a page; of all joined on the first."""
        self._enter("GetDownloadUrls", request, context)
        self._known(request.job_id, context)
        at = int(request.page_token or 0)
        more = at + 1 < len(self.script.parts)
        url = export_service_pb2.DownloadUrl
        return export_service_pb2.GetDownloadUrlsResponse(
            urls=[url(part_index=at, url=f"https://example.com/{at}")],
            joined=None if at else url(url="https://example.com/all"),
            next_page_token=str(at + 1) if more else "",
        )

    def ListDeliveries(  # noqa: N802 - gRPC's name
        self, request: export_service_pb2.ListDeliveriesRequest, context: Any
    ) -> export_service_pb2.ListDeliveriesResponse:
        """None."""
        self._enter("ListDeliveries", request, context)
        return export_service_pb2.ListDeliveriesResponse()

    def RedriveDeliveries(  # noqa: N802 - gRPC's name
        self, request: export_service_pb2.RedriveDeliveriesRequest, context: Any
    ) -> export_service_pb2.RedriveDeliveriesResponse:
        """None."""
        self._enter("RedriveDeliveries", request, context)
        return export_service_pb2.RedriveDeliveriesResponse()

    def ListSinkQueues(  # noqa: N802 - gRPC's name
        self, request: export_service_pb2.ListSinkQueuesRequest, context: Any
    ) -> export_service_pb2.ListSinkQueuesResponse:
        """None."""
        self._enter("ListSinkQueues", request, context)
        return export_service_pb2.ListSinkQueuesResponse()

    def EnableSinkQueue(  # noqa: N802 - gRPC's name
        self, request: export_service_pb2.EnableSinkQueueRequest, context: Any
    ) -> export_service_pb2.EnableSinkQueueResponse:
        """The one asked for."""
        self._enter("EnableSinkQueue", request, context)
        return export_service_pb2.EnableSinkQueueResponse(
            queue=sink_pb2.SinkQueue(queue=request.queue)
        )

    def ListAuditRecords(  # noqa: N802 - gRPC's name
        self, request: export_service_pb2.ListAuditRecordsRequest, context: Any
    ) -> export_service_pb2.ListAuditRecordsResponse:
        """None."""
        self._enter("ListAuditRecords", request, context)
        return export_service_pb2.ListAuditRecordsResponse()

    def _follow(
        self,
        request: export_service_pb2.StreamDownloadRequest,
        context: Any,
        cut: int | None,
    ) -> Iterator[export_service_pb2.StreamDownloadResponse]:
        script = self.script
        yield export_service_pb2.StreamDownloadResponse(
            metadata=self._download_metadata(None)
        )
        data = join(script.follow_parts or script.parts)
        yield from self._send(data, request.read_offset, len(data), context, cut)
        if script.follow_fails:
            script.state = "FAILED"
            fail(
                context,
                grpc.StatusCode.FAILED_PRECONDITION,
                "JOB_FAILED",
                "the job failed and has no output",
            )
        script.state = "SUCCEEDED"
        yield export_service_pb2.StreamDownloadResponse(
            metadata=self._download_metadata(data), offset=len(data)
        )

    def _send(
        self, data: bytes, start: int, end: int, context: Any, cut: int | None
    ) -> Iterator[export_service_pb2.StreamDownloadResponse]:
        script = self.script
        sent = 0
        position = start
        while position < end:
            if cut is not None and sent >= cut:
                if script.cut_quietly:
                    return
                context.abort(grpc.StatusCode.UNAVAILABLE, "connection reset by peer")
            if script.hang_after is not None and sent >= script.hang_after:
                script.hang_after = None
                self._wait(context)
                return
            if (pause := script.pause) is not None:
                self.sending.set()
                while not pause.acquire(timeout=0.05):
                    if self._stopping.is_set() or not context.is_active():
                        return
            chunk = data[position : min(position + script.chunk, end)]
            yield self._message(chunk, position)
            position += len(chunk)
            sent += 1

    def _message(
        self, chunk: bytes, position: int
    ) -> export_service_pb2.StreamDownloadResponse:
        message = export_service_pb2.StreamDownloadResponse(
            offset=position, crc32c=crc32c.crc32c(chunk), data=chunk
        )
        with self._lock:
            for at, times in self.script.corrupt.items():
                if times and position <= at < position + len(chunk):
                    self.script.corrupt[at] -= 1
                    bad = bytearray(chunk)
                    bad[at - position] ^= 0x40
                    message.data = bytes(bad)
            if self.script.wrong_offset[position] > 0:
                self.script.wrong_offset[position] -= 1
                message.offset += 7
        return message

    def job(self, state: str | None = None) -> job_pb2.Job:
        script = self.script
        state = state or script.state
        job = job_pb2.Job(
            job_id=JOB,
            state=STATES[state],
            request=job_pb2.CreateExportRequest(
                dataset="token_transfers", format=script.format, labels={"team": "data"}
            ),
            generation=script.generation,
            attempt=1,
            revision=1,
        )
        job.create_time.FromDatetime(datetime(2026, 1, 1, tzinfo=UTC))
        if state == "FAILED":
            job.error.CopyFrom(
                make_status(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    "EXPORT_TOO_LARGE",
                    "the export passed max_rows = 10",
                    metadata={"cap": "max_rows", "limit": "10"},
                )
            )
        if state == "SUCCEEDED":
            job.manifest.CopyFrom(self._manifest())
        return job

    def _manifest(self) -> job_pb2.Manifest:
        script = self.script
        names = script.part_file_names or [
            f"part-{i}.{script.file_name.rpartition('.')[2]}"
            for i in range(len(script.parts))
        ]
        wrong = 1 if script.wrong_crc32c else 0
        parts = [
            job_pb2.Part(
                index=i,
                rows=p.rows,
                bytes=len(p.data),
                crc32c=crc32c.crc32c(p.data) ^ wrong,
                sha256=self._sha256(p.data),
                file_name=names[i],
                prefix_bytes=len(p.prefix),
                suffix_bytes=len(p.suffix),
            )
            for i, p in enumerate(script.parts)
        ]
        size = len(script.joined) if script.joinable else sum(p.bytes for p in parts)
        return job_pb2.Manifest(
            columns=dataset("token_transfers").columns,
            parts=parts,
            rows=sum(p.rows for p in script.parts),
            bytes=size,
            joinable=script.joinable,
            crc32c=crc32c.crc32c(script.joined) ^ wrong if script.joinable else 0,
            sha256=self._sha256(script.joined) if len(script.parts) == 1 else b"",
            content_type="text/csv",
            file_name=script.file_name,
        )

    def _sha256(self, data: bytes) -> bytes:
        return hashlib.sha256(data + b"!" * self.script.wrong_sha256).digest()

    def _download_metadata(self, data: bytes | None) -> export_service_pb2.DownloadMetadata:
        metadata = export_service_pb2.DownloadMetadata(
            file_name=self.script.file_name,
            content_type="text/csv",
            generation=self.script.generation,
        )
        if data is not None:
            metadata.total_bytes = len(data)
            metadata.crc32c = crc32c.crc32c(data)
        return metadata

    def _enter(self, method: str, request: Any, context: Any) -> None:
        with self._lock:
            self.calls[method] += 1
            self.requests.append(request)
            self.metadata.append(dict(context.invocation_metadata()))
            self.peers.add(context.peer())
            refuse = self.script.unavailable[method] > 0
            self.script.unavailable[method] -= refuse
            cancel = self.script.cancelled[method] > 0
            self.script.cancelled[method] -= cancel
        if refuse:
            context.abort(grpc.StatusCode.UNAVAILABLE, "connection refused")
        if cancel:
            context.abort(grpc.StatusCode.CANCELLED, "CANCELLED")

    def _known(self, job_id: str, context: Any) -> None:
        if self.script.deleted or not job_id.startswith(JOB[:-3]):
            fail(
                context,
                grpc.StatusCode.NOT_FOUND,
                "JOB_NOT_FOUND",
                "there is no such job",
            )

    def _wait(self, context: Any) -> None:
        """Hold the call until the client goes away or the server stops."""
        gone = threading.Event()
        if context.add_callback(gone.set):
            while not gone.wait(0.02) and not self._stopping.is_set():
                pass


def dataset(name: str) -> dataset_pb2.Dataset:
    """A dataset with a column of every kind that a filter can use."""
    kinds = {
        "block": (dataset_pb2.COLUMN_KIND_INTEGER, "int64"),
        "amount": (dataset_pb2.COLUMN_KIND_DECIMAL, "decimal128(38, 18)"),
        "price": (dataset_pb2.COLUMN_KIND_FLOAT, "double"),
        "sender": (dataset_pb2.COLUMN_KIND_STRING, "string"),
        "ok": (dataset_pb2.COLUMN_KIND_BOOLEAN, "bool"),
        "day": (dataset_pb2.COLUMN_KIND_DATE, "date32[day]"),
        "at": (dataset_pb2.COLUMN_KIND_TIME, "time64[us]"),
        "time": (dataset_pb2.COLUMN_KIND_TIMESTAMP, "timestamp[us, tz=UTC]"),
        "hash": (dataset_pb2.COLUMN_KIND_BINARY, "binary"),
        "meta": (dataset_pb2.COLUMN_KIND_NESTED, "struct<a: int64>"),
    }
    exportable = name != "secrets"
    operators = dataset_pb2.FilterOperator.values()[1:]
    return dataset_pb2.Dataset(
        name=name,
        description=f"About {name}",
        exportable=exportable,
        columns=[
            dataset_pb2.Column(
                name=column,
                kind=kind,
                type=arrow,
                nullable=True,
                operators=[] if column == "meta" else operators,
            )
            for column, (kind, arrow) in kinds.items()
        ]
        if exportable
        else [],
        formats=dataset_pb2.Format.values()[1:],
        target_column="sender",
        time_column="time",
        max_rows=100_000,
        estimated_rows=5000,
    )


def make_status(
    code: grpc.StatusCode,
    reason: str,
    message: str,
    *,
    metadata: dict[str, str] | None = None,
    retry: int = 0,
) -> Any:
    """A `google.rpc.Status` as the contract wants it."""
    details: list[Any] = [
        error_details_pb2.ErrorInfo(
            reason=reason, domain="exportd", metadata=metadata or {}
        )
    ]
    if reason == "INVALID_REQUEST":
        details.append(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(
                        field="columns[0]", description="no such column"
                    )
                ]
            )
        )
    if reason == "QUOTA_EXCEEDED":
        details.append(
            error_details_pb2.QuotaFailure(
                violations=[
                    error_details_pb2.QuotaFailure.Violation(
                        subject="active_jobs", description="10 of 10"
                    )
                ]
            )
        )
    if retry:
        details.append(error_details_pb2.RetryInfo(retry_delay=Duration(seconds=retry)))
    packed = []
    for detail in details:
        wrapped = any_pb2.Any()
        wrapped.Pack(detail)
        packed.append(wrapped)
    return status_pb2.Status(
        code=code_pb2.Code.Value(code.name), message=f"[{reason}] {message}", details=packed
    )


def fail(
    context: Any,
    code: grpc.StatusCode,
    reason: str,
    message: str,
    *,
    retry: int = 0,
) -> NoReturn:
    """End a call with the contract's error."""
    metadata = {"reference": "ref-1"} if reason == "INTERNAL" else None
    status = make_status(code, reason, message, metadata=metadata, retry=retry)
    details = (("grpc-status-details-bin", status.SerializeToString()),)
    context.set_trailing_metadata(details)
    context.abort(code, status.message)
    raise AssertionError


@contextlib.contextmanager
def scripted(**script: Any) -> Iterator[ScriptedServer]:
    """A started server with a script of these fields."""
    with ScriptedServer(Script(**script)) as server:
        yield server
