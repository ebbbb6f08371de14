"""Writes errors as `google.rpc.Status`, with the details AIP-193 asks for."""

from __future__ import annotations

from datetime import timedelta

from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from exportd_server.errors import TABLE as ERROR_TABLE
from exportd_server.errors import (
    ErrorRecord,
    ExportdError,
    InvalidRequest,
    JobNotFinished,
    LedgerUnavailable,
    QuotaExceeded,
)

DOMAIN = "exportd"


def duration(length: timedelta) -> duration_pb2.Duration:
    """A length of time as the contract writes it."""
    message = duration_pb2.Duration()
    message.FromTimedelta(length)
    return message


def record_status(record: ErrorRecord) -> status_pb2.Status:
    """A job's error as `google.rpc.Status`."""
    return _status(
        ERROR_TABLE[record.reason].code,
        record.message,
        error_details_pb2.ErrorInfo(
            reason=record.reason, domain=DOMAIN, metadata=record.metadata
        ),
    )


def error_status(error: ExportdError) -> status_pb2.Status:
    """An error as `google.rpc.Status`, with the details AIP-193 asks for. The reason
    opens the message too, for tools that do not decode details."""
    status = record_status(ErrorRecord.of(error))
    if isinstance(error, InvalidRequest):
        _add(
            status,
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(
                        field=violation.field, description=violation.description
                    )
                    for violation in error.told
                ]
            ),
        )
    if isinstance(error, QuotaExceeded):
        _add(
            status,
            error_details_pb2.QuotaFailure(
                violations=[
                    error_details_pb2.QuotaFailure.Violation(
                        subject=error.subject, description=error.message
                    )
                ]
            ),
        )
    if isinstance(error, JobNotFinished):
        _add(
            status,
            error_details_pb2.PreconditionFailure(
                violations=[
                    error_details_pb2.PreconditionFailure.Violation(
                        type=error.reason, subject="job", description=error.message
                    )
                ]
            ),
        )
    if isinstance(error, QuotaExceeded | JobNotFinished | LedgerUnavailable):
        delay = duration(error.retry_after)
        _add(status, error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def _status(
    code: int, message: str, info: error_details_pb2.ErrorInfo
) -> status_pb2.Status:
    status = status_pb2.Status(code=code, message=f"[{info.reason}] {message}")
    _add(status, info)
    return status


def _add(status: status_pb2.Status, detail: Message) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)
