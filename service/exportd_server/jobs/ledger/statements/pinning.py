"""Who reads outputs, and when they must stop."""

from __future__ import annotations

import sqlalchemy as sa

from exportd_server.jobs.ledger.statements import lifecycle
from exportd_server.jobs.ledger.tables import jobs, pins
from exportd_server.jobs.ledger.transaction import Transaction
from exportd_server.jobs.model import JobState


def pin_output(tx: Transaction, tenant: str, job_id: str, reader: str, length: int) -> bool:
    """Pin for `length` microseconds. Cleanups of the job lock its row as well, so none
    decides to delete while a pin is about to be made."""
    job = lifecycle.lock_job(tx, job_id)
    if job is None or job.tenant != tenant or job.state != JobState.SUCCEEDED:
        return False
    valid = job.hidden_time is None and job.drop_time is None and job.expire_time > tx.now
    if not valid and not is_pinned(tx, job_id, reader):
        return False
    expires = tx.now + length
    mine = (pins.c.job_id == job_id, pins.c.reader == reader)
    prolonged = tx.connection.execute(
        sa.update(pins).where(*mine).values(expires=expires)
    ).rowcount
    if not prolonged:
        tx.connection.execute(
            sa.insert(pins).values(job_id=job_id, reader=reader, expires=expires)
        )
    return True


def unpin_output(tx: Transaction, job_id: str, reader: str) -> None:
    """End a pin."""
    tx.connection.execute(
        sa.delete(pins).where(pins.c.job_id == job_id, pins.c.reader == reader)
    )


def is_pinned(tx: Transaction, job_id: str, reader: str | None = None) -> bool:
    """Whether a pin is in force, of anybody or of one reader."""
    found = sa.select(pins.c.reader).where(pins.c.job_id == job_id, pins.c.expires > tx.now)
    if reader is not None:
        found = found.where(pins.c.reader == reader)
    return tx.connection.execute(found.limit(1)).first() is not None


def cut(tx: Transaction, job_id: str) -> None:
    """End all pins of a job that was deleted, and tell those who read it."""
    tx.connection.execute(sa.delete(pins).where(pins.c.job_id == job_id))
    tx.changes.cut.add(job_id)


def is_cut(tx: Transaction, job_id: str, reader: str) -> bool:
    """Whether the reader must stop. Of a hidden job only one with a pin may go on: an
    output that expires is pinned before, and one that is deleted has no pins."""
    job = tx.connection.execute(
        sa.select(jobs.c.state, jobs.c.hidden_time).where(jobs.c.job_id == job_id)
    ).first()
    if job is None or job.state in (JobState.CANCELLED, JobState.FAILED):
        return True
    return job.hidden_time is not None and not is_pinned(tx, job_id, reader)
