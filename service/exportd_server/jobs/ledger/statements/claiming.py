"""Which task is next, and whose it becomes.

The cost follows the number of tenants that wait and of leases held, not the backlog:
each waiting tenant contributes the one task at the head of its queue, found by index.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Row

from exportd_server.errors import TABLE, ErrorReason, ErrorRecord
from exportd_server.jobs.ledger import codec
from exportd_server.jobs.ledger.base import ClaimLimits, Lease, TaskKind
from exportd_server.jobs.ledger.prepared import Prepared
from exportd_server.jobs.ledger.statements import lifecycle
from exportd_server.jobs.ledger.statements.lifecycle import EXPORT_KINDS
from exportd_server.jobs.ledger.tables import (
    RUNNING,
    TaskState,
    jobs,
    queues,
    tasks,
    tenants,
)
from exportd_server.jobs.ledger.transaction import Transaction
from exportd_server.jobs.model import JobState
from exportd_server.sources.base import Shard

_EXHAUSTED = ErrorRecord(
    ErrorReason.ATTEMPTS_EXHAUSTED, TABLE[ErrorReason.ATTEMPTS_EXHAUSTED].text
)

# Built once, as in `reading` and `lifecycle`.
_TAKE = Prepared(
    sa.update(tasks)
    .where(tasks.c.task_id == sa.bindparam("chosen"), tasks.c.token == sa.bindparam("seen"))
    .values(
        state=TaskState.LEASED.value,
        attempts=tasks.c.attempts + 1,
        # What an earlier attempt had begun is done again.
        rows=tasks.c.part_rows,
        bytes=tasks.c.part_bytes,
        rows_per_second=None,
    )
    .returning(tasks)
)
_PROMOTE = Prepared(
    sa.update(tasks)
    .where(tasks.c.state == TaskState.SCHEDULED.sql, tasks.c.run_at <= sa.bindparam("now"))
    .values(state=TaskState.READY.value)
    .returning(tasks.c.task_id)
)
_EXHAUSTED_JOBS = sa.select(tasks.c.job_id).where(
    tasks.c.state == TaskState.LEASED.sql,
    tasks.c.lease_expires <= sa.bindparam("now"),
    tasks.c.kind.in_(lifecycle.literals(EXPORT_KINDS)),
    tasks.c.attempts >= sa.bindparam("most"),
)
_LOST_FOR_GOOD = Prepared(_EXHAUSTED_JOBS)
_CHANGE_TENANT = Prepared(
    sa.update(tenants).where(tenants.c.tenant == sa.bindparam("of_tenant"))
)


def claim(
    tx: Transaction,
    owner: str,
    kinds: Collection[TaskKind],
    *,
    lease: int,
    limits: ClaimLimits,
) -> Lease | None:
    """Lease the next task for `lease` microseconds. On PostgreSQL functions of the server
    do this: see the migrations."""
    _promote(tx)
    fail_exhausted(tx)
    chosen = _choose(tx, frozenset(kinds), limits)
    if chosen is None:
        return None
    # The job first, then its task: the order in which everybody locks them.
    job = lifecycle.lock_job(tx, chosen.job_id) if chosen.job_id else None
    token = tx.dialect.next_token(tx)
    (taken,) = tx.rows(
        _TAKE,
        chosen=chosen.task_id,
        seen=chosen.token,
        owner=owner,
        token=token,
        lease_expires=tx.now + lease,
    )
    if job is not None and taken.kind in EXPORT_KINDS:
        _take_up(tx, job, token, takeover=chosen.state == TaskState.LEASED)
    elif taken.kind == TaskKind.DELIVER:
        tx.later(_CHANGE_TENANT, of_tenant=taken.tenant, delivered=token)
    return replace(to_lease(taken, job), takeover=chosen.state == TaskState.LEASED)


def _choose(
    tx: Transaction, kinds: frozenset[TaskKind], limits: ClaimLimits
) -> Row[Any] | None:
    """The next task: a delivery only when there is nothing else."""
    running_per_tenant = limits.running_per_tenant
    limited = running_per_tenant is not None
    chosen = None
    if others := kinds - {TaskKind.DELIVER}:
        values = {"running_limit": running_per_tenant} if limited else {}
        chosen = tx.first(_prepared_choice(others, limited=limited), now=tx.now, **values)
    if chosen is None and TaskKind.DELIVER in kinds:
        left = json.dumps(sorted(limits.no_deliveries_of))
        chosen = tx.first(_prepared_delivery_choice(), now=tx.now, left=left)
    return chosen


def _take_up(tx: Transaction, job: Row[Any], token: int, *, takeover: bool) -> None:
    """Note on the job and its tenant that a worker is at it."""
    tx.later(_CHANGE_TENANT, of_tenant=job.tenant, served=token)
    values: dict[str, Any] = {"start_time": job.start_time or tx.now}
    if takeover:
        # The former holder may have stored parts that it never recorded, and may be at
        # it still.
        values["untidy"] = 1
        values["writers_until"] = max(
            job.writers_until, tx.now + lifecycle.LATE_WRITER_GRACE
        )
    if job.state == JobState.RUNNING:
        lifecycle.touch(tx, job.job_id, **values)
    else:
        lifecycle.move(tx, job.job_id, JobState.RUNNING, **values)


def to_lease(task: Row[Any], job: Row[Any] | None) -> Lease:
    """The lease that a leased task's row stands for, and its job's, if it has one."""
    return Lease(
        task_id=task.task_id,
        kind=TaskKind(task.kind),
        token=task.token,
        owner=task.owner,
        expires_at=codec.to_moment(task.lease_expires),
        attempt=task.attempts,
        tenant=task.tenant,
        job_id=task.job_id or "",
        generation=task.generation,
        shard=None if task.shard is None else Shard(task.shard, task.shard_state),
        forget=bool(task.forget),
        trace_context="" if job is None else job.trace_context or "",
    )


def _promote(tx: Transaction) -> None:
    """Make the tasks ready whose time has come. Others may be waiting for them too."""
    if tx.rows(_PROMOTE, now=tx.now):
        tx.changes.work = True


def fail_exhausted(tx: Transaction) -> None:
    """Fail the jobs whose last attempt was lost."""
    for job_id in exhausted_jobs(tx):
        bury(tx, job_id)


def exhausted_jobs(tx: Transaction) -> list[str]:
    """The jobs whose last attempt was lost."""
    found = tx.rows(_LOST_FOR_GOOD, now=tx.now, most=tx.max_attempts)
    return sorted({row.job_id for row in found})


def bury(tx: Transaction, job_id: str) -> None:
    """Fail such a job, unless that has changed or somebody else is at it."""
    job = lifecycle.lock_job(tx, job_id, wait=False)
    # Now that nothing changes any more: the lease may have been renewed meanwhile.
    again = _EXHAUSTED_JOBS.where(tasks.c.job_id == job_id).limit(1)
    which = {"now": tx.now, "most": tx.max_attempts}
    if job is not None and tx.connection.execute(again, which).first() is not None:
        fail_exhausted_job(tx, job)


def fail_exhausted_job(tx: Transaction, job: Row[Any]) -> None:
    """Fail a job that has no attempt left, with the last error an attempt told."""
    error = job.last_error or codec.dump_error(_EXHAUSTED)
    lifecycle.end(tx, job, JobState.FAILED, error=error)


@lru_cache(maxsize=64)
def _prepared_choice(kinds: frozenset[TaskKind], *, limited: bool) -> Prepared:
    return Prepared(choice(kinds, limited=limited))


def choice(kinds: frozenset[TaskKind], *, limited: bool) -> sa.Select[Any]:
    """The next task of these kinds at `now`; with `limited` only such that no tenant
    gets more than `running_limit` running jobs."""
    names = sorted(kind.value for kind in kinds)
    now = sa.bindparam("now", type_=sa.BigInteger)

    wanted = sa.union_all(
        *(
            sa.select(sa.literal_column(f"'{name}'", sa.Text).label("kind"))
            for name in names
        )
    ).cte("wanted")
    running = (
        sa.select(jobs.c.tenant, sa.func.count().label("jobs"))
        .where(jobs.c.state == RUNNING)
        .group_by(jobs.c.tenant)
        .cte("running")
    )

    at_work = (
        sa.select(tasks.c.tenant, sa.func.count().label("tasks"))
        .where(
            tasks.c.state == TaskState.LEASED.sql,
            tasks.c.kind.in_(lifecycle.literals(EXPORT_KINDS)),
        )
        .group_by(tasks.c.tenant)
        .cte("at_work")
    )

    # Every (kind, tenant) that has a ready task, by hopping along the index.
    ready = tasks.alias("ready")
    first = (
        sa.select(sa.func.min(ready.c.tenant))
        .where(ready.c.state == TaskState.READY.sql, ready.c.kind == wanted.c.kind)
        .correlate(wanted)
        .scalar_subquery()
    )
    waiting = sa.select(wanted.c.kind, first.label("tenant")).cte("waiting", recursive=True)
    following = (
        sa.select(sa.func.min(ready.c.tenant))
        .where(
            ready.c.state == TaskState.READY.sql,
            ready.c.kind == waiting.c.kind,
            ready.c.tenant > waiting.c.tenant,
        )
        .correlate(waiting)
        .scalar_subquery()
    )
    waiting = waiting.union_all(
        sa.select(waiting.c.kind, following).where(waiting.c.tenant.is_not(None))
    )

    head = (
        sa.select(ready.c.task_id)
        .where(
            ready.c.state == TaskState.READY.sql,
            ready.c.kind == waiting.c.kind,
            ready.c.tenant == waiting.c.tenant,
        )
        .order_by(*_order(ready))
        .limit(1)
        .correlate(waiting)
        .scalar_subquery()
    )
    heads = sa.select(head.label("task_id")).where(waiting.c.tenant.is_not(None))
    # A lease that ran out: its job is running already, whatever the limit.
    expired = sa.select(tasks.c.task_id).where(
        tasks.c.state == TaskState.LEASED.sql,
        tasks.c.lease_expires <= now,
        tasks.c.kind.in_(lifecycle.literals(names)),
    )
    candidates = [heads, expired]
    if limited:
        candidates[0] = heads.outerjoin(
            running, running.c.tenant == waiting.c.tenant
        ).where(
            sa.or_(
                waiting.c.kind.not_in(lifecycle.literals(EXPORT_KINDS)),
                sa.func.coalesce(running.c.jobs, 0) < sa.bindparam("running_limit"),
            )
        )
        # A tenant at its limit may still put more workers on the jobs that run.
        shard = (
            sa.select(sa.func.min(ready.c.task_id))
            .where(
                ready.c.job_id == jobs.c.job_id,
                ready.c.state == TaskState.READY.sql,
                ready.c.kind.in_(lifecycle.literals(names)),
            )
            .correlate(jobs)
            .scalar_subquery()
        )
        candidates.append(sa.select(shard.label("task_id")).where(jobs.c.state == RUNNING))
    found = sa.union_all(*candidates).cte("found")

    return (
        sa.select(tasks.c.task_id, tasks.c.token, tasks.c.job_id, tasks.c.state)
        .select_from(found)
        .join(tasks, tasks.c.task_id == found.c.task_id)
        .outerjoin(at_work, at_work.c.tenant == tasks.c.tenant)
        .outerjoin(tenants, tenants.c.tenant == tasks.c.tenant)
        .order_by(
            sa.func.coalesce(at_work.c.tasks, 0),
            sa.func.coalesce(tenants.c.served, 0),
            *_order(tasks),
        )
        .limit(1)
    )


@lru_cache(maxsize=1)
def _prepared_delivery_choice() -> Prepared:
    return Prepared(delivery_choice())


def delivery_choice() -> sa.Select[Any]:
    """The next delivery at `now`: of the queue with the fewest under way, and there of
    the tenant with the fewest, of several the one served longest ago; never more of one
    queue than it allows, and none of the tenants in `left`, a list in JSON."""
    now = sa.bindparam("now", type_=sa.BigInteger)
    # By kind: that they have a queue would send SQLite through all that stands in queues.
    at_work = (
        sa.select(tasks.c.queue, tasks.c.lane, sa.func.count().label("tasks"))
        .where(
            tasks.c.state == TaskState.LEASED.sql,
            tasks.c.kind == TaskKind.DELIVER.value,
        )
        .group_by(tasks.c.queue, tasks.c.lane)
        .cte("at_work")
    )
    busy = (
        sa.select(at_work.c.queue, sa.func.sum(at_work.c.tasks).label("tasks"))
        .group_by(at_work.c.queue)
        .cte("busy")
    )

    # Every lane that has a ready task, by hopping along the index.
    ready = tasks.alias("ready")
    due = (ready.c.state == TaskState.READY.sql, ready.c.lane.is_not(None))
    waiting = sa.select(
        sa.select(sa.func.min(ready.c.lane)).where(*due).scalar_subquery().label("lane")
    ).cte("waiting", recursive=True)
    following = (
        sa.select(sa.func.min(ready.c.lane))
        .where(*due, ready.c.lane > waiting.c.lane)
        .correlate(waiting)
        .scalar_subquery()
    )
    waiting = waiting.union_all(sa.select(following).where(waiting.c.lane.is_not(None)))
    head = (
        sa.select(ready.c.task_id)
        .where(*due, ready.c.lane == waiting.c.lane)
        .order_by(ready.c.priority.desc(), ready.c.since, ready.c.task_id)
        .limit(1)
        .correlate(waiting)
        .scalar_subquery()
    )
    heads = sa.select(head.label("task_id")).where(waiting.c.lane.is_not(None))
    expired = sa.select(tasks.c.task_id).where(
        tasks.c.state == TaskState.LEASED.sql,
        tasks.c.lease_expires <= now,
        tasks.c.kind == TaskKind.DELIVER.value,
    )
    found = sa.union_all(heads, expired).cte("found")
    left = sa.func.json_each(sa.bindparam("left", type_=sa.Text)).table_valued("value")
    under_way = sa.func.coalesce(busy.c.tasks, 0)
    return (
        sa.select(tasks.c.task_id, tasks.c.token, tasks.c.job_id, tasks.c.state)
        .select_from(found)
        .join(tasks, tasks.c.task_id == found.c.task_id)
        .join(queues, queues.c.queue == tasks.c.queue)
        .outerjoin(busy, busy.c.queue == tasks.c.queue)
        .outerjoin(at_work, at_work.c.lane == tasks.c.lane)
        .outerjoin(tenants, tenants.c.tenant == tasks.c.tenant)
        .where(
            sa.or_(tasks.c.state == TaskState.LEASED.sql, under_way < queues.c.concurrency),
            tasks.c.tenant.not_in(sa.select(left.c.value)),
        )
        .order_by(
            # What a lost lease left counts as under way, so it is taken over first: else
            # a busier queue would never get its turn.
            sa.case((tasks.c.state == TaskState.LEASED.sql, 0), else_=1),
            under_way,
            sa.func.coalesce(at_work.c.tasks, 0),
            sa.func.coalesce(tenants.c.delivered, 0),
            tasks.c.priority.desc(),
            tasks.c.since,
            tasks.c.task_id,
        )
        .limit(1)
    )


def _order(table: sa.FromClause) -> tuple[sa.ColumnElement[Any], ...]:
    """The order inside one tenant's queue."""
    return (
        table.c.priority.desc(),
        table.c.since,
        table.c.job_id,
        table.c.task_id,
    )
