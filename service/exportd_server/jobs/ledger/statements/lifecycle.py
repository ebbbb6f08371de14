"""Changes to a job's state. Nothing else writes `jobs.state`.

Statements are `Prepared`, as in `reading`. One that updates sets, besides what it says
itself, the columns that its parameters name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Row

from exportd_server.jobs.ledger import codec
from exportd_server.jobs.ledger.base import TaskKind
from exportd_server.jobs.ledger.prepared import Prepared
from exportd_server.jobs.ledger.signals import Ended
from exportd_server.jobs.ledger.tables import TaskState, deliveries, jobs, tasks
from exportd_server.jobs.ledger.transaction import Transaction
from exportd_server.jobs.model import TRANSITIONS, DeliveryState, JobState

EXPORT_KINDS = (TaskKind.PLAN.value, TaskKind.SHARD.value)

HOUSEKEEPING_PRIORITY = 1_000
"""Above every job's: what must be deleted does not wait for what is still to export."""

LATE_WRITER_GRACE = timedelta(seconds=5) // timedelta(microseconds=1)
"""How long after its lease a worker may take to stop, in microseconds."""

_WAITED = 0.01
"""Seconds after which a lock was waited for."""

_OPEN = (TaskState.READY.sql, TaskState.SCHEDULED.sql, TaskState.LEASED.sql)


def literals(values: Iterable[str]) -> list[sa.ColumnClause[str]]:
    """Words of ours as they stand in a statement: a list of parameters would be spelled
    out anew each time."""
    return [sa.literal_column(f"'{value}'", sa.Text) for value in values]


_OF_JOB: sa.BindParameter[str] = sa.bindparam("of_job")
_LOCKED = sa.select(jobs).where(jobs.c.job_id == _OF_JOB).with_for_update()
_LOCK = Prepared(_LOCKED)
_LOCK_OR_NOT = Prepared(_LOCKED.with_for_update(skip_locked=True))
_BUMPED = (
    sa.update(jobs)
    .where(jobs.c.job_id == _OF_JOB)
    .values(revision=jobs.c.revision + 1)
    .returning(jobs.c.revision)
)
_BUMP = Prepared(_BUMPED)
_TOUCH = Prepared(
    _BUMPED.where(
        jobs.c.state.in_(literals(state for state in JobState if not state.terminal))
    )
)
_MOVE = {
    to: Prepared(
        _BUMPED.where(
            jobs.c.state.in_(
                literals(state for state in JobState if to in TRANSITIONS[state])
            )
        )
    )
    for to in JobState
    if any(to in TRANSITIONS[state] for state in JobState)
}

_OF_JOB_AT_WORK = (
    tasks.c.job_id == _OF_JOB,
    tasks.c.state == TaskState.LEASED.sql,
    tasks.c.kind.in_(literals(EXPORT_KINDS)),
)
_AT_WORK = Prepared(sa.select(tasks.c.task_id).where(*_OF_JOB_AT_WORK).limit(1))
_LEASES = Prepared(
    sa.select(tasks.c.lease_expires)
    .where(*_OF_JOB_AT_WORK)
    .order_by(tasks.c.task_id)
    .with_for_update()
)
_DUE = Prepared(
    sa.select(sa.func.min(tasks.c.run_at)).where(
        tasks.c.job_id == _OF_JOB,
        tasks.c.state.in_((TaskState.READY.sql, TaskState.SCHEDULED.sql)),
        tasks.c.kind.in_(literals(EXPORT_KINDS)),
    )
)
_ADD_TASKS = sa.insert(tasks)


class IllegalTransition(RuntimeError):
    """A state change that `TRANSITIONS` does not have; the transaction is undone."""


def lock_job(tx: Transaction, job_id: str, *, wait: bool = True) -> Row[Any] | None:
    """The job's row, ours until the transaction ends; without `wait` None as well when
    somebody else has it."""
    lock = _LOCK if wait else _LOCK_OR_NOT
    with _on_time(tx):
        job: Row[Any] | None = tx.first(lock, of_job=job_id)
    return job


def lock_job_and(
    tx: Transaction, job_id: str, statement: Prepared, /, **values: Any
) -> tuple[Row[Any] | None, Any]:
    """As `lock_job`, and then the first row of a statement."""
    locked: list[Row[Any]] = []
    with _on_time(tx):
        tx.later(_LOCK, locked.extend, of_job=job_id)
        row = tx.first(statement, **values)
    return (locked[0] if locked else None), row


@contextmanager
def _on_time(tx: Transaction) -> Iterator[None]:
    """What is decided after a wait is decided then, not when the wait began."""
    began = time.monotonic()
    yield
    if time.monotonic() - began > _WAITED:
        tx.now = tx.dialect.now(tx.connection)


def move(tx: Transaction, job_id: str, to: JobState, **values: Any) -> None:
    """Change a job's state, and other columns with it."""
    changed = _revised(tx, job_id, f"job {job_id} cannot become {to}")
    tx.later(_MOVE[to], changed, of_job=job_id, state=to.value, **values)


def touch(tx: Transaction, job_id: str, **values: Any) -> None:
    """Change an unfinished job without changing its state."""
    changed = _revised(tx, job_id, f"job {job_id} has ended and cannot change")
    tx.later(_TOUCH, changed, of_job=job_id, **values)


def bump(tx: Transaction, job_id: str) -> None:
    """Tell those who watch a job of a change beside it, whatever its state."""
    tx.later(_BUMP, _revised(tx, job_id, f"there is no job {job_id}"), of_job=job_id)


def _revised(tx: Transaction, job_id: str, otherwise: str) -> Callable[[list[Any]], None]:
    def note(rows: list[Any]) -> None:
        if not rows:
            raise IllegalTransition(otherwise)
        tx.changes.revisions[job_id] = rows[0].revision

    return note


def settle(tx: Transaction, job_id: str, **values: Any) -> None:
    """After a task was given up: the job waits again unless a worker is left on it."""
    if tx.first(_AT_WORK, of_job=job_id) is not None:
        touch(tx, job_id, **values)
    else:
        due = tx.scalar(_DUE, of_job=job_id)
        move(tx, job_id, JobState.PENDING, due_time=due, **values)
    tx.changes.work = True


def last_writer(tx: Transaction, job: Row[Any]) -> int:
    """Until when a worker of the job may still write, its leases lost just now."""
    # Locked, so that none of them is renewed any more.
    leased: list[int] = [row[0] for row in tx.rows(_LEASES, of_job=job.job_id)]
    if not leased:
        return int(job.writers_until)
    # A lease that has run out says nothing about when its holder will notice.
    return max(int(job.writers_until), max(*leased, tx.now) + LATE_WRITER_GRACE)


def end(
    tx: Transaction,
    job: Row[Any],
    state: JobState,
    *,
    error: str | None = None,
    manifest_token: int | None = None,
) -> None:
    """Turn a job terminal: fence its workers, set its expiry, have what it must not
    leave behind cleaned up."""
    if state is JobState.SUCCEEDED:
        # It has no task left that anybody could hold.
        writers_until = int(job.writers_until)
    else:
        writers_until = last_writer(tx, job)
    move(
        tx,
        job.job_id,
        state,
        finish_time=tx.now,
        expire_time=tx.now + job.ttl,
        writers_until=writers_until,
        error=error,
        manifest_token=manifest_token,
    )
    _close_tasks(tx, [job.job_id], EXPORT_KINDS)
    if job.sinks and state is not JobState.SUCCEEDED:
        _close_tasks(tx, [job.job_id], (TaskKind.DELIVER.value,))
        tried = (
            sa.select(tasks.c.attempts)
            .where(tasks.c.task_id == deliveries.c.task_id)
            .scalar_subquery()
        )
        tx.connection.execute(
            sa.update(deliveries)
            .where(
                deliveries.c.job_id == job.job_id,
                deliveries.c.state == DeliveryState.PENDING.value,
            )
            .values(
                state=DeliveryState.FAILED.value,
                finish_time=tx.now,
                attempts=deliveries.c.attempts + sa.func.coalesce(tried, 0),
                task_id=None,
            )
        )
    if state is JobState.SUCCEEDED:
        # Nobody can read a stray, so one look once the last writer is gone will do.
        moments = [writers_until] if job.untidy else []
    else:
        moments = [tx.now, writers_until] if writers_until > tx.now else [tx.now]
    _add_tasks(tx, [_cleanup(tx, job, at=moment) for moment in moments])
    tx.changes.fenced.add(job.job_id)
    if state is JobState.CANCELLED:
        tx.changes.cut.add(job.job_id)
    tx.changes.ended.append(_ended(tx, job, state, error))
    # A slot of the tenant is free.
    tx.changes.work = True


def _ended(tx: Transaction, job: Row[Any], state: JobState, error: str | None) -> Ended:
    told = codec.load_error(error)
    return Ended(
        dataset=job.dataset,
        format=codec.load_spec(job.spec).output.format.value,
        state=state.value,
        reason="" if told is None else told.reason.value,
        waited=None
        if job.start_time is None
        else _seconds(job.create_time, job.start_time),
        lasted=_seconds(job.create_time, tx.now),
    )


def _seconds(begin: int, end: int) -> float:
    return max(0, end - begin) / 1e6


def _close_tasks(tx: Transaction, job_ids: Sequence[str], kinds: Sequence[str]) -> None:
    """End what is left of them: the job goes on without."""
    closed = {
        "state": TaskState.CLOSED.value,
        "owner": "",
        "lease_expires": None,
        "rows_per_second": None,
    }
    for job_id in job_ids:
        tx.later(_closing(tuple(kinds)), of_job=job_id, **closed)


@lru_cache
def _closing(kinds: tuple[str, ...]) -> Prepared:
    return Prepared(
        sa.update(tasks).where(
            tasks.c.job_id == _OF_JOB,
            tasks.c.state.in_(_OPEN),
            tasks.c.kind.in_(literals(kinds)),
        )
    )


def hide(tx: Transaction, finished: Sequence[Row[Any]]) -> None:
    """Make finished jobs vanish: their output is deleted, and once nobody can write it
    any more they are forgotten."""
    if not finished:
        return
    tx.connection.execute(
        sa.update(jobs)
        .where(jobs.c.job_id.in_([job.job_id for job in finished]))
        .values(hidden_time=tx.now, request_id=None, revision=jobs.c.revision + 1)
    )
    delivered = [job.job_id for job in finished if job.sinks]
    if delivered:
        _close_tasks(tx, delivered, (TaskKind.DELIVER.value,))
        # Nobody may ask about them, and no queue counts them, from now on.
        tx.connection.execute(
            sa.delete(deliveries).where(deliveries.c.job_id.in_(delivered))
        )
        tx.changes.fenced.update(delivered)
    late = [job for job in finished if job.writers_until > tx.now]
    _add_tasks(
        tx,
        [_cleanup(tx, job, at=tx.now) for job in late]
        + [_cleanup(tx, job, at=job.writers_until, forget=True) for job in finished],
    )
    tx.changes.gone.update(job.job_id for job in finished)


def drop_output(tx: Transaction, job: Row[Any]) -> None:
    """Have the output deleted of a job that stays."""
    tx.connection.execute(
        sa.update(jobs).where(jobs.c.job_id == job.job_id).values(drop_time=tx.now)
    )
    _add_tasks(tx, [_cleanup(tx, job, at=tx.now)])


def _cleanup(
    tx: Transaction, job: Row[Any], *, at: int, forget: bool = False
) -> dict[str, Any]:
    """A task that looks through the job's output at a moment, or now if it has passed."""
    return {
        "kind": TaskKind.CLEANUP.value,
        "tenant": job.tenant,
        "job_id": job.job_id,
        "generation": job.generation,
        "forget": int(forget),
        "priority": HOUSEKEEPING_PRIORITY,
        "since": tx.now,
        **due(tx, at),
    }


def _add_tasks(tx: Transaction, rows: Sequence[dict[str, Any]]) -> None:
    if rows:
        tx.connection.execute(_ADD_TASKS, rows)
        tx.changes.work = True


def due(tx: Transaction, at: int) -> dict[str, Any]:
    """State and time of a task that is to be done at a moment."""
    if at > tx.now:
        return {"state": TaskState.SCHEDULED.value, "run_at": at}
    return {"state": TaskState.READY.value, "run_at": tx.now}
