"""What the server tells about who did what, as plain values."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Self

from exportd._wire import enum_name, moment
from exportd.v1 import audit_pb2


class AuditOutcome(enum.StrEnum):
    """How an audited operation ended."""

    UNKNOWN = "UNKNOWN"  # an outcome newer than this client
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    BROKEN_OFF = "BROKEN_OFF"


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """One operation that has ended; empty or None where something does not go with it, or
    was not known.

    Attributes:
        id: Later ones are greater.
        time: When it ended, in UTC.
        duration: How long it took.
        method: The RPC by its name; or `DownloadByUrl`, `CreateApiKey`, `RevokeApiKey`.
        outcome: How it ended; `BROKEN_OFF` is a download that began.
        code: Name of the canonical code, `OK` included.
        reason: The contract's, where it did not succeed.
        tenant: The caller's; of a change of keys the key's. Empty: nobody knew who called.
        subject: Who called, such as `key:<id>`.
        identity: How the caller was recognised: `none`, `api_key`, `token`,
            `certificate`, `url` or `operator`.
        peer: The address it came from.
        job_id: The job.
        dataset: The dataset.
        part: The one part of a download.
        error_part: The error part of a download.
        sinks: Names of sinks.
        queue: The queue that was redriven or enabled.
        delivery_id: The delivery that was redriven.
        key_id: The API key that was made or revoked.
        validate_only: Whether an export was only to be checked.
        bytes_sent: Of a download that began.
    """

    id: str
    time: datetime | None
    duration: timedelta
    method: str
    outcome: AuditOutcome
    code: str
    reason: str
    tenant: str
    subject: str
    identity: str
    peer: str
    job_id: str
    dataset: str
    part: int | None
    error_part: int | None
    sinks: tuple[str, ...]
    queue: str
    delivery_id: str
    key_id: str
    validate_only: bool
    bytes_sent: int | None
    proto: audit_pb2.AuditRecord = field(repr=False, compare=False)

    @classmethod
    def of(cls, proto: audit_pb2.AuditRecord) -> Self:
        """From the wire."""
        has = proto.HasField
        return cls(
            proto.record_id,
            moment(proto.time),
            proto.duration.ToTimedelta(),
            proto.method,
            _outcome(proto.outcome),
            proto.code,
            proto.reason,
            proto.tenant,
            proto.subject,
            proto.identity,
            proto.peer,
            proto.job_id,
            proto.dataset,
            proto.part_index if has("part_index") else None,
            proto.error_part_index if has("error_part_index") else None,
            tuple(proto.sinks),
            proto.queue,
            proto.delivery_id,
            proto.key_id,
            proto.validate_only,
            proto.bytes_sent if has("bytes_sent") else None,
            proto,
        )


def _outcome(outcome: int) -> AuditOutcome:
    name = enum_name(audit_pb2.AuditOutcome.DESCRIPTOR, outcome, "AUDIT_OUTCOME_")
    return AuditOutcome.__members__.get(name, AuditOutcome.UNKNOWN)
