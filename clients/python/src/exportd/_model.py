"""What the server tells, as plain values: datasets, jobs, progress, manifests."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Self

from exportd._deliveries import DeliveryStatus, SinkDelivery, delivery_status
from exportd._wire import enum_name, moment
from exportd.errors import (
    JobCancelled,
    JobFailed,
    NotDelivered,
    NotFinished,
    Violation,
    from_job_error,
)
from exportd.v1 import dataset_pb2, export_service_pb2, job_pb2


class JobState(enum.StrEnum):
    """States of a job."""

    UNKNOWN = "UNKNOWN"  # a state newer than this client
    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def final(self) -> bool:
        """Whether the job has ended."""
        return self in {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}


class CancelOutcome(enum.StrEnum):
    """What a cancel found."""

    UNKNOWN = "UNKNOWN"
    CANCELLED = "CANCELLED"
    ALREADY_CANCELLED = "ALREADY_CANCELLED"
    ALREADY_FINISHED = "ALREADY_FINISHED"


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a dataset or of an output.

    Attributes:
        name: As filters and `columns` give it.
        kind: `BOOLEAN`, `INTEGER`, `FLOAT`, `DECIMAL`, `STRING`, `BINARY`, `DATE`,
            `TIME`, `TIMESTAMP`, `DURATION` or `NESTED`.
        type: The exact type in Arrow's notation.
        nullable: Whether a value may be missing.
        operators: Contract names of the operators a filter may use.
        description: For a person.
    """

    name: str
    kind: str
    type: str
    nullable: bool
    operators: tuple[str, ...] = ()
    description: str = ""

    @classmethod
    def of(cls, proto: dataset_pb2.Column) -> Self:
        """From the wire."""
        return cls(
            proto.name,
            enum_name(dataset_pb2.ColumnKind.DESCRIPTOR, proto.kind, "COLUMN_KIND_"),
            proto.type,
            proto.nullable,
            tuple(
                enum_name(dataset_pb2.FilterOperator.DESCRIPTOR, o, "FILTER_OPERATOR_")
                for o in proto.operators
            ),
            proto.description,
        )


@dataclass(frozen=True, slots=True)
class Dataset:
    """What may be exported. `max_rows` and `max_bytes` are None without a cap."""

    name: str
    description: str
    exportable: bool
    columns: tuple[Column, ...]
    formats: tuple[str, ...]
    target_column: str
    network_column: str
    time_column: str
    max_rows: int | None
    max_bytes: int | None
    estimated_rows: int | None
    proto: dataset_pb2.Dataset = field(repr=False, compare=False)

    @classmethod
    def of(cls, proto: dataset_pb2.Dataset) -> Self:
        """From the wire."""
        return cls(
            proto.name,
            proto.description,
            proto.exportable,
            tuple(Column.of(c) for c in proto.columns),
            tuple(_format(f) for f in proto.formats),
            proto.target_column,
            proto.network_column,
            proto.time_column,
            proto.max_rows or None,
            proto.max_bytes or None,
            proto.estimated_rows if proto.HasField("estimated_rows") else None,
            proto,
        )


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is; None where the server does not know.

    Attributes:
        rows: Rows written so far; falls back when work is done again.
        size: Stored bytes written so far; likewise.
        parts_done: Parts that are finished.
        parts_total: Parts in all.
        estimated_rows: About how many rows the export will have.
        fraction: Share that is done, from 0 to 1.
        queue_position: Jobs that stand before this one; only while pending.
        rows_per_second: Over the last few seconds; only while running.
        row_errors: Rows left out so far because they cannot be exported.
    """

    rows: int = 0
    size: int = 0
    parts_done: int = 0
    parts_total: int | None = None
    estimated_rows: int | None = None
    fraction: float | None = None
    queue_position: int | None = None
    rows_per_second: float | None = None
    row_errors: int = 0

    @classmethod
    def of(cls, proto: job_pb2.Progress) -> Self:
        """From the wire."""
        has = proto.HasField
        return cls(
            proto.rows,
            proto.bytes,
            proto.parts_done,
            proto.parts_total if has("parts_total") else None,
            proto.estimated_rows if has("estimated_rows") else None,
            proto.fraction if has("fraction") else None,
            proto.queue_position if has("queue_position") else None,
            proto.rows_per_second if has("rows_per_second") else None,
            proto.row_errors,
        )


@dataclass(frozen=True, slots=True)
class Part:
    """One immutable file of an output; `size` in bytes."""

    index: int
    rows: int
    size: int
    crc32c: int
    sha256: bytes
    file_name: str
    prefix_bytes: int
    suffix_bytes: int

    @classmethod
    def of(cls, proto: job_pb2.Part) -> Self:
        """From the wire."""
        return cls(
            proto.index,
            proto.rows,
            proto.bytes,
            proto.crc32c,
            proto.sha256,
            proto.file_name,
            proto.prefix_bytes,
            proto.suffix_bytes,
        )


@dataclass(frozen=True, slots=True)
class ErrorPart:
    """One immutable file that tells rows which were left out of the output part with
    `part_index`, as JSON Lines; `size` in bytes."""

    index: int
    part_index: int
    rows: int
    size: int
    crc32c: int
    sha256: bytes
    file_name: str

    @classmethod
    def of(cls, proto: job_pb2.ErrorPart) -> Self:
        """From the wire."""
        return cls(
            proto.index,
            proto.part_index,
            proto.rows,
            proto.bytes,
            proto.crc32c,
            proto.sha256,
            proto.file_name,
        )


@dataclass(frozen=True, slots=True)
class Manifest:
    """A finished output of `size` bytes. `crc32c` and `sha256` are of the joined file;
    `crc32c` is 0 when the parts do not join, `sha256` empty when there are several.
    `row_errors` rows were left out, and are told in `error_parts`."""

    columns: tuple[Column, ...]
    parts: tuple[Part, ...]
    rows: int
    size: int
    joinable: bool
    crc32c: int
    sha256: bytes
    content_type: str
    content_encoding: str
    file_name: str
    row_errors: int = 0
    error_parts: tuple[ErrorPart, ...] = ()

    @classmethod
    def of(cls, proto: job_pb2.Manifest) -> Self:
        """From the wire."""
        return cls(
            tuple(Column.of(c) for c in proto.columns),
            tuple(Part.of(p) for p in proto.parts),
            proto.rows,
            proto.bytes,
            proto.joinable,
            proto.crc32c,
            proto.sha256,
            proto.content_type,
            proto.content_encoding,
            proto.file_name,
            proto.row_errors,
            tuple(ErrorPart.of(p) for p in proto.error_parts),
        )


@dataclass(frozen=True, slots=True)
class DownloadUrl:
    """Where any HTTP client can get one file of an output, of `size` bytes.

    Attributes:
        url: Treat it as a secret: who has it has the data.
        part: Index of the part; None for all parts joined.
        expire_time: From then on it is refused; a download that has begun goes on.
        requires_access_token: Whether `authorization: Bearer <token>` must be sent along;
            when False it must not be.
        content_type: That of the compression, where there is one around the file.
    """

    url: str = field(repr=False)
    part: int | None
    expire_time: datetime
    requires_access_token: bool
    file_name: str
    size: int
    crc32c: int
    sha256: bytes
    content_type: str

    @classmethod
    def of(cls, proto: export_service_pb2.DownloadUrl) -> Self:
        """From the wire."""
        return cls(
            proto.url,
            proto.part_index if proto.HasField("part_index") else None,
            proto.expire_time.ToDatetime(tzinfo=UTC),
            proto.requires_access_token,
            proto.file_name,
            proto.bytes,
            proto.crc32c,
            proto.sha256,
            proto.content_type,
        )


@dataclass(frozen=True, slots=True)
class DownloadUrls:
    """URLs of a finished output: of each part in order, and of all parts joined into one
    file, None where the server cannot join them."""

    parts: tuple[DownloadUrl, ...]
    joined: DownloadUrl | None
    proto: export_service_pb2.GetDownloadUrlsResponse = field(repr=False, compare=False)

    @classmethod
    def of(cls, proto: export_service_pb2.GetDownloadUrlsResponse) -> Self:
        """From the wire."""
        return cls(
            tuple(DownloadUrl.of(url) for url in proto.urls),
            DownloadUrl.of(proto.joined) if proto.HasField("joined") else None,
            proto,
        )


@dataclass(frozen=True, slots=True)
class JobInfo:
    """A job at one moment. Times are UTC; `error` is an exception that is not raised.

    Without sinks `delivery_status` is None, and `delivered_to` and `deliveries` are empty.
    Lists of jobs leave out `deliveries`, as they do the manifest.
    """

    id: str
    state: JobState
    dataset: str
    format: str
    progress: Progress
    manifest: Manifest | None
    error: JobFailed | None
    create_time: datetime | None
    start_time: datetime | None
    finish_time: datetime | None
    expire_time: datetime | None
    generation: int
    attempt: int
    revision: int
    labels: dict[str, str]
    delivery_status: DeliveryStatus | None
    delivered_to: tuple[str, ...]
    deliveries: tuple[SinkDelivery, ...]
    drop_time: datetime | None
    proto: job_pb2.Job = field(repr=False, compare=False)

    @classmethod
    def of(cls, proto: job_pb2.Job) -> Self:
        """From the wire."""
        failed = proto.HasField("error")
        return cls(
            proto.job_id,
            job_state(proto.state),
            proto.request.dataset,
            _format(proto.request.format),
            Progress.of(proto.progress),
            Manifest.of(proto.manifest) if proto.HasField("manifest") else None,
            from_job_error(proto.error, proto.job_id) if failed else None,
            moment(proto.create_time),
            moment(proto.start_time),
            moment(proto.finish_time),
            moment(proto.expire_time),
            proto.generation,
            proto.attempt,
            proto.revision,
            dict(proto.request.labels),
            delivery_status(proto.delivery_status),
            tuple(proto.delivered_to),
            tuple(SinkDelivery.of(d) for d in proto.deliveries),
            moment(proto.drop_time),
            proto,
        )

    @property
    def settled(self) -> bool:
        """Whether the job has ended, and its deliveries to sinks, too."""
        return self.state.final and self.delivery_status is not DeliveryStatus.PENDING

    def raise_unless_succeeded(self) -> Manifest:
        """The manifest of a job that succeeded.

        Raises:
            NotFinished, JobFailed, JobCancelled: When there is none.
        """
        if self.state is JobState.FAILED:
            raise self.error or JobFailed(
                f"job {self.id} failed", reason="JOB_FAILED", metadata={"job_id": self.id}
            )
        if self.state is JobState.CANCELLED:
            raise JobCancelled(
                f"job {self.id} was cancelled and has no output",
                reason="JOB_CANCELLED",
                metadata={"job_id": self.id},
            )
        if self.state is not JobState.SUCCEEDED or self.manifest is None:
            raise NotFinished(
                f"job {self.id} is {self.state.lower()}; wait until it has finished",
                reason="JOB_NOT_FINISHED",
                metadata={"job_id": self.id},
            )
        return self.manifest

    def raise_unless_delivered(self) -> None:
        """Return when every sink has everything, or when there are no sinks.

        Raises:
            NotFinished, JobFailed, JobCancelled: There is nothing to deliver.
            NotDelivered: It was not delivered, or not yet; `violations` names each sink.
        """
        self.raise_unless_succeeded()
        status = self.delivery_status
        if status in {None, DeliveryStatus.DELIVERED}:
            return
        metadata = {"job_id": self.id}
        if status is DeliveryStatus.PENDING:
            raise NotDelivered(
                f"job {self.id} succeeded, and is still being delivered", metadata=metadata
            )
        lacking = [Violation(d.sink, d.lacks) for d in self.deliveries if d.lacks]
        sinks = "; ".join(f"{each.subject}: {each.description}" for each in lacking)
        raise NotDelivered(
            f"job {self.id} succeeded, but not all of it was delivered ({sinks})",
            metadata=metadata,
            violations=lacking,
        )


def counted(number: int, noun: str) -> str:
    """So many of something: `1 part`, `2,000 rows`, `3 deliveries`."""
    if number == 1:
        return f"1 {noun}"
    many = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {many}"


def job_state(state: int) -> JobState:
    """The state by its number; `UNKNOWN` for one this client does not know."""
    name = enum_name(job_pb2.JobState.DESCRIPTOR, state, "JOB_STATE_")
    return JobState.__members__.get(name, JobState.UNKNOWN)


def cancel_outcome(outcome: int) -> CancelOutcome:
    """The outcome by its number; `UNKNOWN` for one this client does not know."""
    short = enum_name(
        export_service_pb2.CancelOutcome.DESCRIPTOR, outcome, "CANCEL_OUTCOME_"
    )
    return CancelOutcome.__members__.get(short, CancelOutcome.UNKNOWN)


def _format(number: int) -> str:
    return enum_name(dataset_pb2.Format.DESCRIPTOR, number, "FORMAT_").lower()
