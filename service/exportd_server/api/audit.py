"""Audit records in the contract's words, both ways."""

from __future__ import annotations

from exportd.v1 import audit_pb2, export_service_pb2
from exportd_server.api.requests import Reader, enum_name, query_digest
from exportd_server.api.status import duration
from exportd_server.api.timestamps import timestamp
from exportd_server.jobs.audit import AuditMethod, AuditOutcome, AuditQuery, AuditRecord


def read_audit_query(
    reader: Reader, request: export_service_pb2.ListAuditRecordsRequest
) -> AuditQuery:
    """The conditions of a request; what is wrong with them is noted."""
    methods = set()
    for index, name in enumerate(request.methods):
        if name in set(AuditMethod):
            methods.add(AuditMethod(name))
        else:
            reader.complain(f"methods[{index}]", f"is none of {', '.join(AuditMethod)}")
    outcomes = set()
    for index, number in enumerate(request.outcomes):
        outcome = enum_name(audit_pb2.AuditOutcome, number)
        if outcome in set(AuditOutcome):
            outcomes.add(AuditOutcome(str(outcome)))
        else:
            reader.complain(f"outcomes[{index}]", f"{number} is no outcome")
    return AuditQuery(
        tenant=reader.text("tenant", request.tenant),
        subject=reader.text("subject", request.subject),
        job_id=reader.uuid("job_id", request.job_id, required=False),
        methods=frozenset(methods),
        outcomes=frozenset(outcomes),
        from_time=reader.moment(
            "from_time", request.from_time, present=request.HasField("from_time")
        ),
        before_time=reader.moment(
            "before_time", request.before_time, present=request.HasField("before_time")
        ),
    )


def audit_query_digest(query: AuditQuery) -> str:
    """Equal for equal conditions; page tokens hold it."""
    return query_digest(
        "audit",
        query.tenant,
        query.subject,
        query.job_id,
        sorted(query.methods),
        sorted(query.outcomes),
        query.from_time,
        query.before_time,
    )


def audit_message(record: AuditRecord) -> audit_pb2.AuditRecord:
    """A record as an admin sees it."""
    return audit_pb2.AuditRecord(
        record_id=record.record_id,
        time=timestamp(record.time),
        duration=duration(record.duration),
        method=record.method,
        outcome=audit_pb2.AuditOutcome.Value(f"AUDIT_OUTCOME_{record.outcome}"),
        code=record.code,
        reason=record.reason,
        tenant=record.tenant,
        subject=record.subject,
        identity=record.identity,
        peer=record.peer,
        job_id=record.job_id,
        dataset=record.dataset,
        part_index=record.part,
        error_part_index=record.error_part,
        sinks=record.sinks,
        queue=record.queue,
        delivery_id=record.delivery_id,
        key_id=record.key_id,
        validate_only=record.validate_only,
        bytes_sent=record.bytes_sent,
    )
