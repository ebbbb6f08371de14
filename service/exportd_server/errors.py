"""Every error exportd raises, and the one table that says how a caller sees it.

    Exception
    ├── ConfigurationError          the operator's mistake, told at start
    └── ExportdError                a caller may read its message
        ├── InvalidRequest          with one violation for each bad field
        ├── QuotaExceeded           with the quota that is used up
        ├── JobNotFinished          with when to ask again
        ├── LedgerUnavailable       with when to ask again
        ├── Unauthenticated         nobody knows who calls
        ├── PermissionDenied        with the scope that the caller lacks
        ├── DeliveryFailed          ends a delivery, or one attempt at it
        └── ExportFailed            ends a job, or one attempt at it
            ├── SourceFailed
            ├── ValueNotEncodable
            ├── ExportTooLarge
            ├── TooManyRowErrors
            └── StoreFailed

Internal causes travel as `__cause__`, go to the log and never to the caller. Messages
given here must therefore be free of paths, SQL, addresses and driver texts.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from types import MappingProxyType


class Code(enum.IntEnum):
    """The canonical codes of `google.rpc.Code` that exportd uses."""

    CANCELLED = 1
    INVALID_ARGUMENT = 3
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class ErrorReason(enum.StrEnum):
    """Reasons as the contract names them, without the `ERROR_REASON_` prefix."""

    INVALID_REQUEST = "INVALID_REQUEST"
    INVALID_PAGE_TOKEN = "INVALID_PAGE_TOKEN"  # noqa: S105 - a reason, no secret
    JOB_NOT_FOUND = "JOB_NOT_FOUND"
    DATASET_NOT_FOUND = "DATASET_NOT_FOUND"
    DATASET_NOT_EXPORTABLE = "DATASET_NOT_EXPORTABLE"
    REQUEST_ID_CONFLICT = "REQUEST_ID_CONFLICT"
    JOB_NOT_FINISHED = "JOB_NOT_FINISHED"
    JOB_FAILED = "JOB_FAILED"
    JOB_CANCELLED = "JOB_CANCELLED"
    OUTPUT_EXPIRED = "OUTPUT_EXPIRED"
    OFFSET_OUT_OF_RANGE = "OFFSET_OUT_OF_RANGE"
    PART_NOT_FOUND = "PART_NOT_FOUND"
    GENERATION_MISMATCH = "GENERATION_MISMATCH"
    PARTS_NOT_JOINABLE = "PARTS_NOT_JOINABLE"
    QUOTA_EXCEEDED = "QUOTA_EXCEEDED"
    EXPORT_TOO_LARGE = "EXPORT_TOO_LARGE"
    CHECKSUM_MISMATCH = "CHECKSUM_MISMATCH"
    DRAINING = "DRAINING"
    SOURCE_FAILED = "SOURCE_FAILED"
    VALUE_NOT_ENCODABLE = "VALUE_NOT_ENCODABLE"
    STORE_FULL = "STORE_FULL"
    STORE_FAILED = "STORE_FAILED"
    ATTEMPTS_EXHAUSTED = "ATTEMPTS_EXHAUSTED"
    INTERNAL = "INTERNAL"
    READER_STALLED = "READER_STALLED"
    SOURCE_CHANGED = "SOURCE_CHANGED"
    LEDGER_UNAVAILABLE = "LEDGER_UNAVAILABLE"
    DOWNLOAD_URLS_UNAVAILABLE = "DOWNLOAD_URLS_UNAVAILABLE"
    TOO_MANY_ROW_ERRORS = "TOO_MANY_ROW_ERRORS"
    DELIVERY_FAILED = "DELIVERY_FAILED"
    DELIVERY_REFUSED = "DELIVERY_REFUSED"
    ENDPOINT_GONE = "ENDPOINT_GONE"
    ENDPOINT_DISABLED = "ENDPOINT_DISABLED"
    PARTS_NOT_DELIVERED = "PARTS_NOT_DELIVERED"
    SINK_UNAVAILABLE = "SINK_UNAVAILABLE"
    OUTPUT_DROPPED = "OUTPUT_DROPPED"
    DELIVERY_NOT_FOUND = "DELIVERY_NOT_FOUND"
    SINK_QUEUE_NOT_FOUND = "SINK_QUEUE_NOT_FOUND"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"


@dataclass(frozen=True, slots=True)
class Answer:
    """How a reason reaches the caller: its code, and its text when none is given."""

    code: Code
    text: str


TABLE: Mapping[ErrorReason, Answer] = MappingProxyType(
    {
        ErrorReason.INVALID_REQUEST: Answer(
            Code.INVALID_ARGUMENT, "the request has bad fields"
        ),
        ErrorReason.INVALID_PAGE_TOKEN: Answer(
            Code.INVALID_ARGUMENT,
            "page_token was not issued for this query; begin again without one",
        ),
        ErrorReason.JOB_NOT_FOUND: Answer(Code.NOT_FOUND, "there is no such job"),
        ErrorReason.DATASET_NOT_FOUND: Answer(
            Code.NOT_FOUND, "there is no such dataset; ListDatasets names them"
        ),
        ErrorReason.DATASET_NOT_EXPORTABLE: Answer(
            Code.FAILED_PRECONDITION, "the dataset may not be exported"
        ),
        ErrorReason.REQUEST_ID_CONFLICT: Answer(
            Code.ALREADY_EXISTS,
            "request_id was used with another payload; use a fresh UUID",
        ),
        ErrorReason.JOB_NOT_FINISHED: Answer(
            Code.FAILED_PRECONDITION, "the job has not finished"
        ),
        ErrorReason.JOB_FAILED: Answer(
            Code.FAILED_PRECONDITION, "the job failed and has no output"
        ),
        ErrorReason.JOB_CANCELLED: Answer(
            Code.FAILED_PRECONDITION, "the job was cancelled and has no output"
        ),
        ErrorReason.OUTPUT_EXPIRED: Answer(
            Code.NOT_FOUND, "the output has expired; create the export anew"
        ),
        ErrorReason.OFFSET_OUT_OF_RANGE: Answer(
            Code.OUT_OF_RANGE, "read_offset lies outside the output"
        ),
        ErrorReason.PART_NOT_FOUND: Answer(
            Code.NOT_FOUND, "the job has no part with that index"
        ),
        ErrorReason.GENERATION_MISMATCH: Answer(
            Code.FAILED_PRECONDITION,
            "the output was made anew; begin the download again",
        ),
        ErrorReason.PARTS_NOT_JOINABLE: Answer(
            Code.FAILED_PRECONDITION,
            "the parts of this format do not join; download each by part_index",
        ),
        ErrorReason.QUOTA_EXCEEDED: Answer(Code.RESOURCE_EXHAUSTED, "a quota is used up"),
        ErrorReason.EXPORT_TOO_LARGE: Answer(
            Code.RESOURCE_EXHAUSTED, "the export passed its size cap"
        ),
        ErrorReason.CHECKSUM_MISMATCH: Answer(
            Code.DATA_LOSS, "stored bytes do not match their checksum"
        ),
        ErrorReason.DRAINING: Answer(
            Code.UNAVAILABLE, "the server is shutting down; try again"
        ),
        ErrorReason.SOURCE_FAILED: Answer(
            Code.UNAVAILABLE, "the source of the dataset failed"
        ),
        ErrorReason.VALUE_NOT_ENCODABLE: Answer(
            Code.DATA_LOSS, "the source holds a value that cannot be exported"
        ),
        ErrorReason.STORE_FULL: Answer(Code.RESOURCE_EXHAUSTED, "the output store is full"),
        ErrorReason.STORE_FAILED: Answer(Code.UNAVAILABLE, "the output store failed"),
        ErrorReason.ATTEMPTS_EXHAUSTED: Answer(
            Code.ABORTED, "every attempt was lost to a worker that died"
        ),
        ErrorReason.INTERNAL: Answer(Code.INTERNAL, "internal error"),
        ErrorReason.READER_STALLED: Answer(
            Code.RESOURCE_EXHAUSTED,
            "no data was taken for too long; resume from the last offset",
        ),
        ErrorReason.SOURCE_CHANGED: Answer(
            Code.FAILED_PRECONDITION,
            "the source changed during the export; create it anew",
        ),
        ErrorReason.LEDGER_UNAVAILABLE: Answer(
            Code.UNAVAILABLE,
            "the service cannot reach its database; try again, a CreateExport with the "
            "same request_id",
        ),
        ErrorReason.DOWNLOAD_URLS_UNAVAILABLE: Answer(
            Code.FAILED_PRECONDITION,
            "this server gives no download URLs, for its outputs are not on S3 and it has "
            "no HTTP port; use StreamDownload, or have the operator set http.listen",
        ),
        ErrorReason.TOO_MANY_ROW_ERRORS: Answer(
            Code.DATA_LOSS, "too many rows cannot be exported"
        ),
        ErrorReason.DELIVERY_FAILED: Answer(
            Code.UNAVAILABLE, "the sink could not be delivered to"
        ),
        ErrorReason.DELIVERY_REFUSED: Answer(
            Code.FAILED_PRECONDITION, "the sink refused the delivery"
        ),
        ErrorReason.ENDPOINT_GONE: Answer(
            Code.FAILED_PRECONDITION, "the endpoint wants no more deliveries"
        ),
        ErrorReason.ENDPOINT_DISABLED: Answer(
            Code.FAILED_PRECONDITION,
            "the endpoint is disabled because it failed for too long; mend it, then "
            "enable it with EnableSinkQueue",
        ),
        ErrorReason.PARTS_NOT_DELIVERED: Answer(
            Code.FAILED_PRECONDITION,
            "parts of the export could not be delivered; redrive them, and this follows",
        ),
        ErrorReason.SINK_UNAVAILABLE: Answer(
            Code.FAILED_PRECONDITION, "the sink is not configured on this server"
        ),
        ErrorReason.OUTPUT_DROPPED: Answer(
            Code.NOT_FOUND,
            "the output was dropped once every sink had it, as the request asked",
        ),
        ErrorReason.DELIVERY_NOT_FOUND: Answer(
            Code.NOT_FOUND, "there is no such delivery; ListDeliveries names them"
        ),
        ErrorReason.SINK_QUEUE_NOT_FOUND: Answer(
            Code.NOT_FOUND, "there is no such sink queue; ListSinkQueues names them"
        ),
        ErrorReason.UNAUTHENTICATED: Answer(
            Code.UNAUTHENTICATED, "the credentials are not valid"
        ),
        ErrorReason.PERMISSION_DENIED: Answer(
            Code.PERMISSION_DENIED, "the caller may not do that"
        ),
    }
)


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One bad field: its path in the request, and what to do about it."""

    field: str
    description: str


class ServerLost(Exception):
    """The gRPC server ended without being told to; the log tells why."""


class ConfigurationError(Exception):
    """The operator's configuration is wrong: where, what, and the mend, in one line."""


class ExportdError(Exception):
    """An error whose message and metadata the caller may read."""

    def __init__(
        self,
        reason: ErrorReason,
        message: str | None = None,
        *,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.reason = reason
        self.message = message or TABLE[reason].text
        self.metadata = dict(metadata or {})
        super().__init__(self.message)

    @property
    def code(self) -> Code:
        """The canonical code that goes with the reason."""
        return TABLE[self.reason].code


_MOST_TOLD = 1_800
"""How much of a request's faults is told, in bytes as a trailer has them."""
_OVERHEAD = 8


def _clip(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _weight(text: str) -> int:
    """Size in a trailer, where a byte that is no printable ASCII becomes three."""
    return sum(1 if 0x20 <= byte < 0x7F else 3 for byte in text.encode())


class InvalidRequest(ExportdError):
    """At least one field of the request is wrong.

    A status travels in HTTP/2 trailers, in text and again in its details, and clients
    refuse trailers above 8 KiB: `told` is what fits, and the rest is told by number.
    """

    def __init__(self, violations: Sequence[FieldViolation]) -> None:
        told: list[FieldViolation] = []
        room = _MOST_TOLD
        for violation in violations:
            short = FieldViolation(
                _clip(violation.field, 100), _clip(violation.description, 300)
            )
            room -= _weight(short.field) + _weight(short.description) + _OVERHEAD
            if told and room < 0:
                break
            told.append(short)
        self.violations = tuple(violations)
        self.told = tuple(told)
        text = "; ".join(f"{v.field}: {v.description}" for v in told)
        if len(told) < len(violations):
            text += f"; and {len(violations) - len(told)} more"
        super().__init__(ErrorReason.INVALID_REQUEST, text or None)

    @classmethod
    def of(cls, field_path: str, description: str) -> InvalidRequest:
        """One violation."""
        return cls([FieldViolation(field_path, description)])


class QuotaExceeded(ExportdError):
    """A quota of the caller is used up."""

    def __init__(self, subject: str, message: str, retry_after: timedelta) -> None:
        self.subject = subject
        self.retry_after = retry_after
        super().__init__(ErrorReason.QUOTA_EXCEEDED, message)


class JobNotFinished(ExportdError):
    """The call needs a job that has ended."""

    def __init__(self, message: str, retry_after: timedelta) -> None:
        self.retry_after = retry_after
        super().__init__(ErrorReason.JOB_NOT_FINISHED, message)


class LedgerUnavailable(ExportdError):
    """The ledger did not answer. Whether the change was made is not known."""

    retry_after = timedelta(seconds=1)

    def __init__(self) -> None:
        super().__init__(ErrorReason.LEDGER_UNAVAILABLE)


class Unauthenticated(ExportdError):
    """The call has no credentials, or none that are valid. `cause` is for the log: callers
    who have proven nothing are not told what was wrong."""

    def __init__(self, message: str | None = None, *, cause: str = "") -> None:
        self.cause = cause or message or ""
        super().__init__(ErrorReason.UNAUTHENTICATED, message)


class PermissionDenied(ExportdError):
    """The caller lacks a scope; without one, nobody may make the call."""

    def __init__(self, scope: str | None) -> None:
        super().__init__(
            ErrorReason.PERMISSION_DENIED,
            None if scope is None else f"the call needs scope {scope}, which you lack",
            metadata=None if scope is None else {"scope": scope},
        )


class ExportFailed(ExportdError):
    """An attempt at a job failed; `retryable` says whether another one may do better."""

    retryable: bool = False


class SourceFailed(ExportFailed):
    """The source failed. Retryable: it may be back in a moment."""

    retryable = True

    def __init__(self, message: str | None = None) -> None:
        super().__init__(ErrorReason.SOURCE_FAILED, message)


class ValueNotEncodable(ExportFailed):
    """The source holds a value that cannot be read or written losslessly."""

    def __init__(self, message: str, *, column: str | None = None) -> None:
        super().__init__(
            ErrorReason.VALUE_NOT_ENCODABLE,
            message,
            metadata={"column": column} if column else None,
        )


class ExportTooLarge(ExportFailed):
    """The export passed a cap. `cap` is `max_rows`, `max_bytes`, `max_parts` or
    `max_seconds`."""

    def __init__(self, cap: str, limit: int, count: int) -> None:
        super().__init__(
            ErrorReason.EXPORT_TOO_LARGE,
            f"the export passed {cap} = {limit}: it had reached {count}; "
            "narrow it by filters, a time range or a limit",
            metadata={"cap": cap, "limit": str(limit), "count": str(count)},
        )


class TooManyRowErrors(ExportFailed):
    """More rows than may be left out cannot be exported."""

    def __init__(self, limit: int, count: int) -> None:
        super().__init__(
            ErrorReason.TOO_MANY_ROW_ERRORS,
            f"the export passed max_row_errors = {limit}: {count} rows could not be "
            "written already; allow more, leave a column out, or choose another format",
            metadata={
                "cap": "max_row_errors",
                "limit": str(limit),
                "count": str(count),
            },
        )


class StoreFailed(ExportFailed):
    """The output store failed; `full` when it has no room, which no retry mends."""

    def __init__(self, *, full: bool = False) -> None:
        super().__init__(ErrorReason.STORE_FULL if full else ErrorReason.STORE_FAILED)
        self.retryable = not full


class DeliveryFailed(ExportdError):
    """An attempt at a delivery failed. `retryable`: another one may do better, not before
    `retry_after` where the receiver said so. `gone`: the receiver wants nothing more,
    ever."""

    def __init__(
        self,
        message: str,
        *,
        retryable: bool,
        retry_after: timedelta | None = None,
        gone: bool = False,
    ) -> None:
        reason = ErrorReason.DELIVERY_FAILED if retryable else ErrorReason.DELIVERY_REFUSED
        super().__init__(ErrorReason.ENDPOINT_GONE if gone else reason, message)
        self.retryable = retryable and not gone
        self.retry_after = retry_after
        self.gone = gone


@dataclass(frozen=True, slots=True)
class ErrorRecord:
    """A caller-safe error as the ledger keeps it."""

    reason: ErrorReason
    message: str
    metadata: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, error: ExportdError) -> ErrorRecord:
        """What the ledger keeps of an error."""
        return cls(error.reason, error.message, error.metadata)
