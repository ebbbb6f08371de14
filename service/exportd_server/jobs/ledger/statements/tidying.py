"""Cleanups and the reaper."""

from __future__ import annotations

import sqlalchemy as sa

from exportd_server.jobs.ledger.base import Lease, TaskKind
from exportd_server.jobs.ledger.statements import lifecycle, reading
from exportd_server.jobs.ledger.statements.working import holding
from exportd_server.jobs.ledger.tables import jobs, tasks, tenants
from exportd_server.jobs.ledger.transaction import Transaction
from exportd_server.jobs.model import JobState, PartRecord


def kept_parts(tx: Transaction, lease: Lease) -> list[PartRecord] | None:
    """What the cleanup must leave; None when nothing."""
    _, job = holding(tx, lease, TaskKind.CLEANUP)
    if (
        job is None
        or job.state != JobState.SUCCEEDED
        or job.hidden_time is not None
        or job.expire_time <= tx.now
    ):
        return None
    return reading.parts_of(tx, job.job_id, job.generation)


def complete_cleanup(tx: Transaction, lease: Lease) -> None:
    """Drop the task, or everything that is left of the job."""
    task, job = holding(tx, lease, TaskKind.CLEANUP)
    if not task.forget or job is None:
        tx.connection.execute(sa.delete(tasks).where(tasks.c.task_id == task.task_id))
        return
    # Takes the job's tasks, parts and labels along.
    tx.connection.execute(sa.delete(jobs).where(jobs.c.job_id == job.job_id))
    tx.connection.execute(
        sa.delete(tenants).where(
            tenants.c.tenant == job.tenant,
            ~sa.exists().where(jobs.c.tenant == job.tenant),
        )
    )
    tx.changes.gone.add(job.job_id)


def expire_jobs(tx: Transaction, lease: Lease, limit: int) -> int:
    """Hide jobs whose time has passed, the longest expired first."""
    holding(tx, lease, TaskKind.REAP)
    expired = tx.connection.execute(
        sa.select(jobs)
        .where(jobs.c.hidden_time.is_(None), jobs.c.expire_time <= tx.now)
        .order_by(jobs.c.expire_time)
        .limit(limit)
        .with_for_update()
    ).all()
    lifecycle.hide(tx, expired)
    return len(expired)


def complete_reap(tx: Transaction, lease: Lease, again_in: int) -> None:
    """Schedule the next round."""
    task, _ = holding(tx, lease, TaskKind.REAP)
    tx.connection.execute(
        sa.update(tasks)
        .where(tasks.c.task_id == task.task_id)
        .values(
            owner="",
            lease_expires=None,
            attempts=0,
            **lifecycle.due(tx, tx.now + again_in),
        )
    )
    # Whoever sleeps until then has to learn of it.
    tx.changes.work = True
