"""What a job is: its request, states, transitions, progress and output.

Everything here is a value. Nothing here knows protobuf, SQL or files.
"""

from __future__ import annotations

import builtins
import enum
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any, Literal

from exportd_server.encoders.base import OutputFormat
from exportd_server.errors import ErrorRecord
from exportd_server.sinks.base import Takes
from exportd_server.sources.base import FilterOperator
from exportd_server.store.key import OutputKind


class JobState(enum.StrEnum):
    """States of a job, as the contract names them."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def terminal(self) -> bool:
        """Whether the state is final."""
        return not TRANSITIONS[self]


TRANSITIONS: Mapping[JobState, frozenset[JobState]] = MappingProxyType(
    {
        JobState.PENDING: frozenset(
            {JobState.RUNNING, JobState.FAILED, JobState.CANCELLED}
        ),
        JobState.RUNNING: frozenset(
            {
                JobState.PENDING,
                JobState.SUCCEEDED,
                JobState.FAILED,
                JobState.CANCELLED,
            }
        ),
        JobState.SUCCEEDED: frozenset(),
        JobState.FAILED: frozenset(),
        JobState.CANCELLED: frozenset(),
    }
)
"""The transition table. RUNNING goes back to PENDING when no worker is left on the job:
its lease was given back, lost, or its attempt failed and another one waits."""


LiteralKind = Literal["string", "int", "double", "bool", "timestamp", "bytes"]


@dataclass(frozen=True, slots=True)
class FilterLiteral:
    """A filter value as the caller sent it. `text` is its canonical text: decimal for
    int, `repr` for double, `true`/`false`, RFC 3339 UTC, base64 for bytes."""

    kind: LiteralKind
    text: str


@dataclass(frozen=True, slots=True)
class FilterSpec:
    """A condition as the caller sent it."""

    column: str
    operator: FilterOperator
    values: tuple[FilterLiteral, ...] = ()


class RowErrorPolicy(enum.StrEnum):
    """What happens to a row that cannot be exported, as the contract names it."""

    FAIL = "FAIL"
    SKIP_AND_REPORT = "SKIP_AND_REPORT"


class OnFull(enum.StrEnum):
    """What happens when a delivery becomes due and its queue is full."""

    BLOCK = "BLOCK"
    """The export waits before its next part, for a while."""
    DROP = "DROP"
    """The delivery is dropped."""


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """What the operator allows for a queue: deliveries under way at a time, over all
    processes, and deliveries of one tenant that stand in it before it is full for that
    one. Those that failed and wait to be tried again do not count. `tenant` is empty for
    a queue that all share."""

    queue: str
    tenant: str = ""
    concurrency: int = 4
    depth: int = 1000
    on_full: OnFull = OnFull.BLOCK


@dataclass(frozen=True, slots=True)
class SinkSpec:
    """A sink of a job as accepted. `config` is what the caller said without its secrets,
    which are in `sealed`, encrypted; empty without any."""

    name: str
    type: str
    connection: str
    config: Mapping[str, Any]
    queue: str
    takes: Takes
    sealed: str = ""


@dataclass(frozen=True, slots=True)
class ExportSpec:
    """A request as accepted: what to export and how, defaults filled in."""

    dataset: str
    output: OutputFormat
    target_id: str = ""
    network: str = ""
    start_time: datetime | None = None
    end_time: datetime | None = None
    columns: tuple[str, ...] = ()
    filters: tuple[FilterSpec, ...] = ()
    limit: int | None = None
    max_part_rows: int | None = None
    max_part_bytes: int | None = None
    max_row_errors: int | None = None
    """Leave out rows that cannot be written, up to so many, and tell them in error parts;
    None: the first one fails the job."""
    ttl: timedelta = timedelta(days=1)
    priority: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    sinks: tuple[SinkSpec, ...] = ()
    drop_after_delivery: bool = False

    @property
    def on_row_error(self) -> RowErrorPolicy:
        """The same in the contract's words."""
        if self.max_row_errors is None:
            return RowErrorPolicy.FAIL
        return RowErrorPolicy.SKIP_AND_REPORT


@dataclass(frozen=True, slots=True)
class PartRecord:
    """A finalized part as the ledger keeps it. (`kind`, `shard`, `sequence`, `token`)
    name its key in the store; an error part has the shard, sequence and token of the
    output part whose missing rows it tells. Checksums are of the part alone,
    `body_crc32c` of what the joined file takes from its middle: without prefix and
    suffix."""

    shard: int
    sequence: int
    token: int
    rows: int
    bytes: int
    prefix_bytes: int
    suffix_bytes: int
    crc32c: int
    prefix_crc32c: int
    body_crc32c: int
    suffix_crc32c: int
    sha256: builtins.bytes
    kind: OutputKind = OutputKind.OUTPUT


@dataclass(frozen=True, slots=True)
class ManifestColumn:
    """A column of the output; `type` in Arrow's notation, `kind` a `ColumnKind`."""

    name: str
    kind: str
    type: str
    nullable: bool


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a succeeded job has to give; parts in the order of the output."""

    columns: tuple[ManifestColumn, ...]
    parts: tuple[PartRecord, ...]
    error_parts: tuple[PartRecord, ...] = ()
    """The rows that were left out, likewise in the order of the output."""

    @classmethod
    def of(cls, columns: Iterable[ManifestColumn], parts: Sequence[PartRecord]) -> Manifest:
        """That of parts of both kinds, in order."""
        output = [part for part in parts if part.kind is OutputKind.OUTPUT]
        errors = [part for part in parts if part.kind is OutputKind.ERROR]
        return cls(tuple(columns), tuple(output), tuple(errors))

    @property
    def all_parts(self) -> tuple[PartRecord, ...]:
        """Both."""
        return (*self.parts, *self.error_parts)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is; None where it is not known."""

    rows: int = 0
    bytes: int = 0
    parts_done: int = 0
    parts_total: int | None = None
    estimated_rows: int | None = None
    queue_position: int | None = None
    rows_per_second: float | None = None
    row_errors: int = 0
    """Rows that were left out."""
    error_parts: int = 0


class DeliveryState(enum.StrEnum):
    """States of a delivery, as the contract names them."""

    PENDING = "PENDING"
    DELIVERED = "DELIVERED"
    DROPPED = "DROPPED"
    DEAD_LETTERED = "DEAD_LETTERED"
    FAILED = "FAILED"


class DeliveryStatus(enum.StrEnum):
    """Where the delivery to a sink, or to all of a job, stands."""

    PENDING = "PENDING"
    DELIVERED = "DELIVERED"
    DROPPED = "DROPPED"
    FAILED = "FAILED"

    @staticmethod
    def joined(statuses: Collection[DeliveryStatus]) -> DeliveryStatus | None:
        """That of several together: the worst of them once all have ended."""
        order = ("PENDING", "FAILED", "DROPPED", "DELIVERED")
        return min(statuses, key=lambda each: order.index(each.value), default=None)


@dataclass(frozen=True, slots=True)
class SinkDelivery:
    """How the delivery to one sink stands; see `sink.proto`."""

    sink: str
    status: DeliveryStatus
    pending: int = 0
    delivered: int = 0
    dropped: int = 0
    dead_lettered: int = 0
    attempts: int = 0
    last_error: ErrorRecord | None = None
    receipt: str = ""


@dataclass(frozen=True, slots=True)
class DeliveryRecord:
    """One delivery at one moment. `part` is (shard, sequence); None: the completion."""

    delivery_id: str
    tenant: str
    job_id: str
    sink: str
    queue: str
    generation: int
    part: tuple[int, int] | None
    file_name: str
    """Of the part; empty for the completion."""
    state: DeliveryState
    attempts: int
    create_time: datetime
    last_error: ErrorRecord | None = None
    receipt: str = ""
    finish_time: datetime | None = None
    next_attempt_time: datetime | None = None
    """Set while it waits to be tried again."""


@dataclass(frozen=True, slots=True)
class SinkQueue:
    """A queue as one tenant sees it."""

    queue: str
    waiting: int = 0
    retrying: int = 0
    dead_lettered: int = 0
    failing_since: datetime | None = None
    disabled_time: datetime | None = None
    disabled_reason: ErrorRecord | None = None


@dataclass(frozen=True)
class Job:
    """A job at one moment."""

    job_id: str
    tenant: str
    state: JobState
    spec: ExportSpec
    request_id: str
    create_time: datetime
    start_time: datetime | None = None
    finish_time: datetime | None = None
    expire_time: datetime | None = None
    expired: bool = False
    """Whether `expire_time` had passed by the ledger's clock when this was read."""
    read_time: datetime | None = field(default=None, compare=False)
    """When this was read, by the ledger's clock."""
    generation: int = 1
    attempt: int = 0
    revision: int = 1
    progress: Progress = field(default_factory=Progress)
    error: ErrorRecord | None = None
    manifest: Manifest | None = None
    deliveries: tuple[SinkDelivery, ...] = ()
    """One for each sink, in the order of the spec."""
    drop_time: datetime | None = None
    """When the output was dropped because every sink had it."""

    @property
    def delivery_status(self) -> DeliveryStatus | None:
        """Where the delivery to all sinks stands; None without sinks."""
        return DeliveryStatus.joined([each.status for each in self.deliveries])

    @property
    def settled(self) -> bool:
        """Whether it has ended and so have its deliveries."""
        return self.state.terminal and self.delivery_status is not DeliveryStatus.PENDING

    def read_at(self, moment: datetime) -> Job:
        """The same job, read at another moment."""
        # `replace` takes some ten times as long, which callers who poll would notice.
        job = object.__new__(Job)
        job.__dict__.update(self.__dict__, read_time=moment)
        return job


class CancelOutcome(enum.StrEnum):
    """What a cancel found."""

    CANCELLED = "CANCELLED"
    ALREADY_CANCELLED = "ALREADY_CANCELLED"
    ALREADY_FINISHED = "ALREADY_FINISHED"
