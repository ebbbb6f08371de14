"""What workers hold now, for those who run the service."""

from __future__ import annotations

import sqlalchemy as sa

from exportd_server.jobs.ledger import codec
from exportd_server.jobs.ledger.base import HeldLease, TaskKind
from exportd_server.jobs.ledger.tables import TaskState, tasks
from exportd_server.jobs.ledger.transaction import Transaction

_LEASED = tasks.c.state == TaskState.LEASED.sql
_PLACE = (tasks.c.owner, tasks.c.task_id)


def list_leases(
    tx: Transaction, *, limit: int, after: tuple[str, int] | None
) -> list[HeldLease]:
    """A page of them, by worker."""
    statement = sa.select(tasks).where(_LEASED).order_by(*_PLACE).limit(limit)
    if after is not None:
        statement = statement.where(sa.tuple_(*_PLACE) > sa.tuple_(*after))
    return [
        HeldLease(
            task_id=row.task_id,
            kind=TaskKind(row.kind),
            owner=row.owner,
            tenant=row.tenant,
            job_id=row.job_id or "",
            attempt=row.attempts,
            expires_at=codec.to_moment(row.lease_expires),
            expired=row.lease_expires <= tx.now,
        )
        for row in tx.connection.execute(statement)
    ]
