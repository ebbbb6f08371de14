"""Audit records: appended, listed, and forgotten after their time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Row

from exportd_server.jobs.audit import AuditMethod, AuditOutcome, AuditQuery, AuditRecord
from exportd_server.jobs.ledger import codec
from exportd_server.jobs.ledger.base import Lease, TaskKind
from exportd_server.jobs.ledger.statements.holding import holding
from exportd_server.jobs.ledger.tables import audit_records
from exportd_server.jobs.ledger.transaction import Transaction

_AS_IS = (
    "record_id",
    "code",
    "reason",
    "tenant",
    "subject",
    "identity",
    "peer",
    "job_id",
    "dataset",
    "part",
    "error_part",
    "queue",
    "delivery_id",
    "key_id",
    "bytes_sent",
)
_TIME = audit_records.c.time
_PLACE = (_TIME, audit_records.c.record_id)


def append(tx: Transaction, records: Sequence[AuditRecord]) -> None:
    """Insert those that are not there."""
    if records:
        tx.dialect.add_audit_records(tx.connection, [_row(each) for each in records])


def list_records(
    tx: Transaction,
    query: AuditQuery,
    *,
    limit: int,
    before: tuple[datetime, str] | None,
) -> list[AuditRecord]:
    """A page, newest first."""
    statement = (
        sa.select(audit_records)
        .where(*_conditions(query))
        .order_by(*(column.desc() for column in _PLACE))
        .limit(limit)
    )
    if before is not None:
        moment, record_id = before
        statement = statement.where(
            sa.tuple_(*_PLACE) < sa.tuple_(codec.to_micros(moment), record_id)
        )
    return [_record(row) for row in tx.connection.execute(statement)]


def forget(tx: Transaction, lease: Lease, keep: int, limit: int) -> int:
    """Delete some of what is older, the oldest first; returns how many."""
    holding(tx, lease, TaskKind.REAP)
    old = (
        sa.select(audit_records.c.record_id)
        .where(tx.now - keep > _TIME)
        .order_by(*_PLACE)
        .limit(limit)
    )
    # Read first: the server would look for a subquery's ids in no good order.
    ids = list(tx.connection.execute(old).scalars())
    if ids:
        tx.connection.execute(
            sa.delete(audit_records).where(audit_records.c.record_id.in_(ids))
        )
    return len(ids)


def _conditions(query: AuditQuery) -> list[sa.ColumnElement[bool]]:
    found: list[sa.ColumnElement[bool]] = [
        audit_records.c[name] == value
        for name in ("tenant", "subject", "job_id")
        if (value := getattr(query, name))
    ]
    if query.methods:
        found.append(audit_records.c.method.in_(sorted(query.methods)))
    if query.outcomes:
        found.append(audit_records.c.outcome.in_(sorted(query.outcomes)))
    if query.from_time is not None:
        found.append(codec.to_micros(query.from_time) <= _TIME)
    if query.before_time is not None:
        found.append(codec.to_micros(query.before_time) > _TIME)
    return found


def _row(record: AuditRecord) -> dict[str, Any]:
    return {
        **{name: getattr(record, name) for name in _AS_IS},
        "time": codec.to_micros(record.time),
        "duration": codec.span_to_micros(record.duration),
        "method": record.method.value,
        "outcome": record.outcome.value,
        "sinks": json.dumps(record.sinks),
        "validate_only": int(record.validate_only),
    }


def _record(row: Row[Any]) -> AuditRecord:
    return AuditRecord(
        **{name: getattr(row, name) for name in _AS_IS},
        time=codec.to_moment(row.time),
        duration=timedelta(microseconds=row.duration),
        method=AuditMethod(row.method),
        outcome=AuditOutcome(row.outcome),
        sinks=tuple(json.loads(row.sinks)),
        validate_only=bool(row.validate_only),
    )
