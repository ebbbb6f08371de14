"""Cleanups and the reaper."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from exportd_server.jobs.ledger.base import Kept, Lease, TaskKind
from exportd_server.jobs.ledger.statements import lifecycle, pinning, reading
from exportd_server.jobs.ledger.statements.holding import holding
from exportd_server.jobs.ledger.tables import jobs, orphans, tasks, tenants
from exportd_server.jobs.ledger.transaction import Transaction
from exportd_server.jobs.model import JobState
from exportd_server.store.key import JobPrefix


def kept_parts(tx: Transaction, lease: Lease) -> Kept | None:
    """What the cleanup must leave; None when nothing."""
    _, job = holding(tx, lease, TaskKind.CLEANUP)
    if job is None or job.state != JobState.SUCCEEDED:
        return None
    dropped = job.hidden_time is not None or job.drop_time is not None
    if dropped or job.expire_time <= tx.now:
        # A job that is deleted has no pins.
        return Kept(read=True) if pinning.is_pinned(tx, job.job_id) else None
    parts = tuple(reading.parts_of(tx, job.job_id, job.generation))
    return Kept(parts, job.manifest_token)


def complete_cleanup(tx: Transaction, lease: Lease) -> None:
    """Drop the task, or everything that is left of the job."""
    task, job = holding(tx, lease, TaskKind.CLEANUP)
    if not task.forget or job is None:
        tx.connection.execute(sa.delete(tasks).where(tasks.c.task_id == task.task_id))
        return
    # Takes the job's tasks, parts and labels along.
    tx.connection.execute(sa.delete(jobs).where(jobs.c.job_id == job.job_id))
    if tx.dialect.alone_with_tenant(tx, job.tenant):
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
    _again(tx, lease, TaskKind.REAP, again_in)


def note_orphans(
    tx: Transaction, lease: Lease, found: Sequence[JobPrefix], after: int
) -> list[JobPrefix]:
    """Remember which of them are unknown; return those that were so long ago, too."""
    holding(tx, lease, TaskKind.SWEEP)
    known = reading.known_jobs(tx, [prefix.job_id for prefix in found])
    old = []
    for prefix in found:
        if prefix.job_id in known:
            continue
        which = (orphans.c.tenant == prefix.tenant, orphans.c.job_id == prefix.job_id)
        seen = tx.connection.execute(
            sa.update(orphans)
            .where(*which)
            .values(look=lease.token)
            .returning(orphans.c.seen_time)
        ).scalar_one_or_none()
        if seen is None:
            tx.connection.execute(
                sa.insert(orphans).values(
                    tenant=prefix.tenant,
                    job_id=prefix.job_id,
                    seen_time=tx.now,
                    look=lease.token,
                )
            )
        elif seen <= tx.now - after:
            old.append(prefix)
    return old


def complete_sweep(tx: Transaction, lease: Lease, again_in: int) -> None:
    """Forget what is gone; schedule the next round."""
    _again(tx, lease, TaskKind.SWEEP, again_in)
    tx.connection.execute(sa.delete(orphans).where(orphans.c.look != lease.token))


def _again(tx: Transaction, lease: Lease, kind: TaskKind, again_in: int) -> None:
    task, _ = holding(tx, lease, kind)
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
