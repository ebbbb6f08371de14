"""Every error the client raises.

    Exception
    └── ExportdError
        ├── InvalidRequest          a field is wrong; `violations` lists each (ValueError)
        ├── NotFound
        │   ├── JobNotFound
        │   ├── DatasetNotFound
        │   ├── PartNotFound
        │   ├── OutputExpired
        │   ├── OutputDropped       every sink has it (`drop_after_delivery`)
        │   ├── DeliveryNotFound
        │   └── SinkQueueNotFound
        ├── PreconditionFailed
        │   ├── NotFinished         ask again after `retry_after`
        │   ├── DatasetNotExportable
        │   ├── GenerationMismatch
        │   ├── PartsNotJoinable
        │   ├── RequestIdConflict
        │   ├── UrlsUnavailable
        │   ├── EndpointDisabled    mend it, then `enable_sink_queue`
        │   └── OutputExists        a file stands in the way (FileExistsError)
        ├── JobEnded
        │   ├── JobFailed           `job_reason` says why
        │   └── JobCancelled
        ├── NotDelivered            the job succeeded, but a sink lacks something
        ├── DeliveryFailed          why a delivery failed; told, never raised
        ├── QuotaExceeded
        ├── DataLoss                bytes do not match their checksums
        ├── Unavailable             nobody answered, or the server cannot at the moment
        ├── TimedOut                a time limit of the caller's ran out (TimeoutError)
        ├── AccessDenied            the token is missing, wrong, or not enough
        ├── LocalFileError          this machine's disk: full, no permission (OSError)
        ├── MissingExtra            an optional library is not installed (ImportError)
        └── ServerError             anything else; `reference` is for the operator

`reason` is the contract's `ErrorReason` without its prefix, empty for errors that never
reached the server.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol, cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

_DOMAIN = "exportd"
_DETAILS_KEY = "grpc-status-details-bin"


@dataclass(frozen=True, slots=True)
class Violation:
    """One bad field, quota, precondition or sink: what it is, and what is wrong."""

    subject: str
    description: str


class ExportdError(Exception):
    """An error of exportd, from the server or from this client.

    Attributes:
        message: What happened and how to mend it, in one line.
        reason: The contract's reason, such as `JOB_NOT_FOUND`; empty when the error did
            not come from the server.
        code: The gRPC status; None when the error did not come from a call.
        metadata: The reason's details, such as `job_id`.
        retry_after: When to try again, where the server said so.
        violations: The bad fields, used up quotas, unmet preconditions, or sinks that
            lack something.
        reference: What the operator can look up in the server's log; empty if none.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        code: grpc.StatusCode | None = None,
        metadata: Mapping[str, str] | None = None,
        retry_after: timedelta | None = None,
        violations: Sequence[Violation] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.code = code
        self.metadata = dict(metadata or {})
        self.retry_after = retry_after
        self.violations = tuple(violations)

    @property
    def reference(self) -> str:
        """What the operator can look up in the server's log; empty if none."""
        return self.metadata.get("reference", "")

    def __str__(self) -> str:
        text = self.message
        if self.reference and self.reference not in text:
            text = f"{text} (reference {self.reference})"
        return f"{text} [{self.reason}]" if self.reason else text


class InvalidRequest(ExportdError, ValueError):
    """At least one field is wrong; found by the client or by the server."""

    @classmethod
    def of(cls, field: str, description: str) -> InvalidRequest:
        """One bad field, found before anything was sent."""
        violation = Violation(field, description)
        return cls(f"{field}: {description}", violations=[violation])


class NotFound(ExportdError):
    """There is no such thing for this caller."""


class JobNotFound(NotFound):
    """There is no such job, or it is somebody else's."""


class DatasetNotFound(NotFound):
    """There is no such dataset for this caller."""


class PartNotFound(NotFound):
    """The job has no part with that index."""


class OutputExpired(NotFound):
    """The output reached its `expire_time`; create the export anew."""


class OutputDropped(NotFound):
    """The output was dropped once every sink had it, as the export asked."""


class DeliveryNotFound(NotFound):
    """There is no such delivery for this caller."""


class SinkQueueNotFound(NotFound):
    """There is no such sink queue for this caller."""


class PreconditionFailed(ExportdError):
    """The call does not fit the state things are in."""


class NotFinished(PreconditionFailed):
    """The job is pending or running and the call needs one that has ended."""


class DatasetNotExportable(PreconditionFailed):
    """The dataset exists but may not be exported."""


class GenerationMismatch(PreconditionFailed):
    """The output was made anew since the download began."""


class PartsNotJoinable(PreconditionFailed):
    """The parts of this format do not join into one valid file."""


class RequestIdConflict(PreconditionFailed):
    """`request_id` was used with another payload; metadata `job_id` names its job."""


class UrlsUnavailable(PreconditionFailed):
    """The server has no way to give download URLs; `Job.download` does without."""


class EndpointDisabled(PreconditionFailed):
    """The endpoint of a sink is gone or has failed for too long; mend it, then
    `enable_sink_queue` with metadata `queue`."""


class OutputExists(PreconditionFailed, FileExistsError):
    """There is a file under the name the download would get."""


class JobEnded(ExportdError):
    """The job ended without output."""


class JobFailed(JobEnded):
    """The job failed."""

    @property
    def job_reason(self) -> str:
        """Why the job failed, as a reason of the contract; empty when not known."""
        return self.metadata.get("job_reason", "")

    def __str__(self) -> str:
        reasons = ": ".join(r for r in (self.reason, self.job_reason) if r)
        return f"{self.message} [{reasons}]" if reasons else self.message


class JobCancelled(JobEnded):
    """The job was cancelled."""


class NotDelivered(ExportdError):
    """The job succeeded, but not everything has reached its sinks; `violations` names
    each sink that lacks something. The output is there all the same."""


class DeliveryFailed(ExportdError):
    """Why a delivery to a sink failed. It is what `last_error` and `disabled_reason`
    hold, and is never raised."""


class QuotaExceeded(ExportdError):
    """A quota of the caller is used up; `violations` names it."""


class DataLoss(ExportdError):
    """Bytes do not match their checksums, at the server or after a download."""


class Unavailable(ExportdError):
    """Nobody answered at the address, or the server is shutting down or cannot reach its
    database: try again."""


class TimedOut(ExportdError, TimeoutError):
    """A time limit of the caller's ran out."""


class AccessDenied(ExportdError):
    """The token is missing, wrong, or not enough for this call."""


class LocalFileError(ExportdError, OSError):
    """This machine could not write or read a file; `errno` says why."""

    @classmethod
    def of(cls, error: OSError, doing: str, mend: str = "") -> LocalFileError:
        """Wrap what the operating system said."""
        text = f"{doing}: {error.strerror or error}"
        wrapped = cls(f"{text}; {mend}" if mend else text)
        wrapped.errno = error.errno
        return wrapped


class MissingExtra(ExportdError, ImportError):
    """An optional library is not installed."""


class ServerError(ExportdError):
    """Anything the client has no better name for."""


_BY_REASON: Mapping[str, type[ExportdError]] = {
    "INVALID_REQUEST": InvalidRequest,
    "INVALID_PAGE_TOKEN": InvalidRequest,
    "OFFSET_OUT_OF_RANGE": InvalidRequest,
    "JOB_NOT_FOUND": JobNotFound,
    "DATASET_NOT_FOUND": DatasetNotFound,
    "PART_NOT_FOUND": PartNotFound,
    "OUTPUT_EXPIRED": OutputExpired,
    "DATASET_NOT_EXPORTABLE": DatasetNotExportable,
    "REQUEST_ID_CONFLICT": RequestIdConflict,
    "JOB_NOT_FINISHED": NotFinished,
    "GENERATION_MISMATCH": GenerationMismatch,
    "PARTS_NOT_JOINABLE": PartsNotJoinable,
    "DOWNLOAD_URLS_UNAVAILABLE": UrlsUnavailable,
    "OUTPUT_DROPPED": OutputDropped,
    "DELIVERY_NOT_FOUND": DeliveryNotFound,
    "SINK_QUEUE_NOT_FOUND": SinkQueueNotFound,
    "ENDPOINT_DISABLED": EndpointDisabled,
    "JOB_FAILED": JobFailed,
    "JOB_CANCELLED": JobCancelled,
    "QUOTA_EXCEEDED": QuotaExceeded,
    "UNAUTHENTICATED": AccessDenied,
    "PERMISSION_DENIED": AccessDenied,
    "CHECKSUM_MISMATCH": DataLoss,
    "DRAINING": Unavailable,
    "LEDGER_UNAVAILABLE": Unavailable,
    # The reader was too slow; the server is fine, and asking again goes on.
    "READER_STALLED": Unavailable,
}

# For answers without a reason: proxies, other versions, and gRPC itself.
_BY_CODE: Mapping[grpc.StatusCode, type[ExportdError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.FAILED_PRECONDITION: PreconditionFailed,
    grpc.StatusCode.ALREADY_EXISTS: PreconditionFailed,
    grpc.StatusCode.RESOURCE_EXHAUSTED: QuotaExceeded,
    grpc.StatusCode.DATA_LOSS: DataLoss,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    # Of a server that ended before it began the call.
    grpc.StatusCode.CANCELLED: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: TimedOut,
    grpc.StatusCode.UNAUTHENTICATED: AccessDenied,
    grpc.StatusCode.PERMISSION_DENIED: AccessDenied,
}

_CLOSED = "Channel closed!"
"""What gRPC tells of a call whose channel was closed on this side."""


class _FailedCall(Protocol):
    """What the errors of the blocking and of the asyncio gRPC have in common."""

    def code(self) -> grpc.StatusCode | None: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


def from_rpc_error(error: grpc.RpcError, address: str) -> ExportdError:
    """The error that a failed call stands for. `address` is named when nobody answers."""
    call = cast("_FailedCall", error)
    code = call.code() or grpc.StatusCode.UNKNOWN
    details = call.details() or ""
    status = _status_of(call)
    if status is not None:
        return _from_status(status, code, details, address)
    reason, message = _split_reason(details)
    return _make(reason, code, message, address, _Details())


def from_job_error(status: status_pb2.Status, job_id: str) -> JobFailed:
    """The error of a job that failed, from `Job.error`."""
    details = _Details.of(status)
    reason, message = _split_reason(status.message)
    metadata = {"job_id": job_id, **details.metadata}
    if details.reason or reason:
        metadata["job_reason"] = details.reason or reason
    return JobFailed(
        message or f"job {job_id} failed",
        reason="JOB_FAILED",
        metadata=metadata,
        violations=details.violations,
    )


def from_delivery_error(status: status_pb2.Status) -> DeliveryFailed:
    """The error of a delivery or of a queue, from its `google.rpc.Status`."""
    details = _Details.of(status)
    reason, message = _split_reason(status.message)
    return DeliveryFailed(
        message or "the delivery failed",
        reason=details.reason or reason,
        metadata=details.metadata,
        violations=details.violations,
    )


@dataclass(slots=True)
class _Details:
    """The standard details of a `google.rpc.Status`, flattened."""

    reason: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    retry_after: timedelta | None = None
    violations: tuple[Violation, ...] = ()

    @classmethod
    def of(cls, status: status_pb2.Status) -> _Details:
        found = cls()
        info = error_details_pb2.ErrorInfo()
        bad = error_details_pb2.BadRequest()
        quota = error_details_pb2.QuotaFailure()
        unmet = error_details_pb2.PreconditionFailure()
        retry = error_details_pb2.RetryInfo()
        for detail in status.details:
            try:
                if detail.Unpack(info) and info.domain == _DOMAIN:
                    found.reason = info.reason
                    found.metadata = dict(info.metadata)
                elif detail.Unpack(bad):
                    found.violations += tuple(
                        Violation(v.field, v.description) for v in bad.field_violations
                    )
                elif detail.Unpack(quota):
                    found.violations += tuple(
                        Violation(v.subject, v.description) for v in quota.violations
                    )
                elif detail.Unpack(unmet):
                    found.violations += tuple(
                        Violation(v.subject, v.description) for v in unmet.violations
                    )
                elif detail.Unpack(retry):
                    found.retry_after = retry.retry_delay.ToTimedelta()
            except DecodeError:
                continue  # a detail that cannot be read must not hide the error
        return found


def _status_of(call: _FailedCall) -> status_pb2.Status | None:
    for key, value in call.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                return None
    return None


def _from_status(
    status: status_pb2.Status, code: grpc.StatusCode, text: str, address: str
) -> ExportdError:
    details = _Details.of(status)
    reason, message = _split_reason(status.message or text)
    return _make(details.reason or reason, code, message, address, details)


def _make(
    reason: str,
    code: grpc.StatusCode,
    message: str,
    address: str,
    details: _Details,
) -> ExportdError:
    kind = _BY_REASON.get(reason) or _BY_CODE.get(code, ServerError)
    if _CLOSED in message:
        kind = ServerError
    if kind is Unavailable and not reason:
        message = (
            f"cannot reach exportd at {address}: {message or 'no answer'}; "
            "check the address, and that the server runs"
        )
    elif kind is TimedOut:
        message = f"exportd at {address} did not answer in time; allow more by timeout"
    return kind(
        message or code.name.lower().replace("_", " "),
        reason=reason,
        code=code,
        metadata=details.metadata,
        retry_after=details.retry_after,
        violations=details.violations,
    )


def _split_reason(text: str) -> tuple[str, str]:
    """Take the `[REASON] ` off a message, where it opens with one."""
    head, bracket, rest = text.partition("]")
    if bracket and head.startswith("[") and head[1:].replace("_", "").isupper():
        return head[1:], rest.lstrip(" :")
    return "", text
