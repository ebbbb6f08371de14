"""What callers change: create, cancel, delete."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import sqlalchemy as sa

from exportd_server.jobs.ledger import codec
from exportd_server.jobs.ledger.base import (
    EndpointDisabled,
    NewJob,
    RequestIdConflict,
    TaskKind,
    TooManyActiveJobs,
    TooManyQueuedJobs,
)
from exportd_server.jobs.ledger.prepared import Prepared
from exportd_server.jobs.ledger.signals import Created
from exportd_server.jobs.ledger.statements import (
    delivering,
    lifecycle,
    pinning,
    reading,
)
from exportd_server.jobs.ledger.tables import TaskState, jobs, labels, tasks
from exportd_server.jobs.ledger.transaction import Transaction
from exportd_server.jobs.model import CancelOutcome, Job, JobState

_UNFINISHED = [state.value for state in JobState if not state.terminal]
_QUEUED = [JobState.PENDING.value]

# Built once, as in `reading` and `lifecycle`.
_ADD_JOB = Prepared(sa.insert(jobs))
_ADD_LABEL = Prepared(sa.insert(labels))
_ADD_TASK = Prepared(sa.insert(tasks))
_OF_REQUEST = Prepared(
    sa.select(jobs).where(
        jobs.c.tenant == sa.bindparam("tenant"),
        jobs.c.request_id == sa.bindparam("request_id"),
    )
)


def create_job(
    tx: Transaction, new: NewJob, max_active: int | None, max_queued: int | None
) -> tuple[Job, bool]:
    """Record a job and its plan, unless the request was recorded before."""
    tx.dialect.ensure_tenant(tx, new.tenant)
    active = _counted(tx, new.tenant, _UNFINISHED, max_active)
    queued = _counted(tx, new.tenant, _QUEUED, max_queued)
    known = (
        tx.first(_OF_REQUEST, tenant=new.tenant, request_id=new.request_id)
        if new.request_id
        else None
    )
    tx.flush()
    if known is not None:
        if known.fingerprint not in {new.fingerprint, *new.older_fingerprints}:
            raise RequestIdConflict(known.job_id)
        return reading.to_job(tx, known), False
    for most, found, states, error in (
        (max_active, active, _UNFINISHED, TooManyActiveJobs),
        (max_queued, queued, _QUEUED, TooManyQueuedJobs),
    ):
        if most is not None and found[0].jobs >= most:
            raise error(f"{most} jobs are {' or '.join(states).lower()}")
    spec = new.spec
    disabled = delivering.disabled_among(tx, new.queues)
    if disabled is not None:
        raise EndpointDisabled(disabled, new.queues[disabled].queue)
    tx.later(
        _ADD_JOB,
        job_id=new.job_id,
        tenant=new.tenant,
        state=JobState.PENDING.value,
        dataset=spec.dataset,
        spec=codec.dump_spec(spec),
        priority=spec.priority,
        ttl=codec.span_to_micros(spec.ttl),
        request_id=new.request_id or None,
        fingerprint=new.fingerprint,
        create_time=tx.now,
        due_time=tx.now,
        generation=1,
        revision=1,
        untidy=0,
        writers_until=0,
        sinks=len(spec.sinks),
        trace_context=new.trace_context or None,
    )
    for name, value in spec.labels.items():
        tx.later(
            _ADD_LABEL,
            job_id=new.job_id,
            name=name,
            value=value,
            tenant=new.tenant,
            create_time=tx.now,
        )
    tx.later(
        _ADD_TASK,
        kind=TaskKind.PLAN.value,
        tenant=new.tenant,
        job_id=new.job_id,
        generation=1,
        state=TaskState.READY.value,
        priority=spec.priority,
        since=tx.now,
        run_at=tx.now,
    )
    tx.changes.work = True
    tx.changes.created.append(Created(spec.dataset, spec.output.format.value))
    job = reading.get_job(tx, new.tenant, new.job_id)
    if job is None:
        raise RuntimeError("a job that was just made is missing")
    return job, True


def _counted(
    tx: Transaction, tenant: str, states: list[str], enough: int | None
) -> list[Any]:
    """Will have the number of jobs of the tenant in these states, counted no further than
    `enough`, once that has run; None: nothing is counted."""
    counted: list[Any] = []
    if enough is not None:
        tx.later(_counting(tuple(states), enough), counted.extend, tenant=tenant)
    return counted


@lru_cache
def _counting(states: tuple[str, ...], enough: int) -> Prepared:
    some = (
        sa.select(jobs.c.job_id)
        .where(
            jobs.c.tenant == sa.bindparam("tenant"),
            jobs.c.state.in_(lifecycle.literals(states)),
        )
        .limit(enough)
        .subquery()
    )
    return Prepared(sa.select(sa.func.count().label("jobs")).select_from(some))


def cancel_job(
    tx: Transaction, tenant: str, job_id: str
) -> tuple[Job, CancelOutcome] | None:
    """End an unfinished job; say what was found."""
    job = lifecycle.lock_job(tx, job_id)
    if job is None or job.tenant != tenant or job.hidden_time is not None:
        return None
    state = JobState(job.state)
    if not state.terminal:
        lifecycle.end(tx, job, JobState.CANCELLED)
        outcome = CancelOutcome.CANCELLED
    elif state is JobState.CANCELLED:
        outcome = CancelOutcome.ALREADY_CANCELLED
    else:
        outcome = CancelOutcome.ALREADY_FINISHED
    after = reading.get_job(tx, tenant, job_id)
    return None if after is None else (after, outcome)


def delete_job(tx: Transaction, tenant: str, job_id: str) -> JobState | None:
    """Hide a finished job; an unfinished one stays."""
    job = lifecycle.lock_job(tx, job_id)
    if job is None or job.tenant != tenant or job.hidden_time is not None:
        return None
    state = JobState(job.state)
    if state.terminal:
        lifecycle.hide(tx, [job])
        pinning.cut(tx, job_id)
    return state
