"""What callers ask about deliveries, and how they have them sent again."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa
import uuid_utils
from sqlalchemy.engine import Row

from exportd_server.jobs.ledger import codec
from exportd_server.jobs.ledger.base import DeliveryQuery
from exportd_server.jobs.ledger.statements import delivering, lifecycle, reading
from exportd_server.jobs.ledger.tables import TaskState, deliveries, jobs, queues, tasks
from exportd_server.jobs.ledger.transaction import Transaction
from exportd_server.jobs.model import (
    DeliveryRecord,
    DeliveryState,
    ExportSpec,
    JobState,
    SinkQueue,
    SinkSpec,
)
from exportd_server.jobs.output import delivered_name

_DELIVERABLE = (JobState.PENDING.value, JobState.RUNNING.value, JobState.SUCCEEDED.value)
_AGAIN = (DeliveryState.DEAD_LETTERED.value, DeliveryState.DROPPED.value)


def _conditions(
    tx: Transaction, tenant: str, query: DeliveryQuery
) -> list[sa.ColumnElement[bool]]:
    found = [deliveries.c.tenant == tenant]
    if query.delivery_id:
        found.append(deliveries.c.delivery_id == query.delivery_id)
    if query.job_id:
        found.append(deliveries.c.job_id == query.job_id)
    if query.queue:
        found.append(deliveries.c.queue == query.queue)
    if query.sink:
        spec = _spec_of(tx, tenant, query.job_id)
        names = [] if spec is None else [sink.name for sink in spec.sinks]
        index = names.index(query.sink) if query.sink in names else -1
        found.append(deliveries.c.sink == index)
    if query.states:
        found.append(deliveries.c.state.in_(sorted(each.value for each in query.states)))
    return found


def _spec_of(tx: Transaction, tenant: str, job_id: str) -> ExportSpec | None:
    row = reading.visible_job(tx, tenant, job_id)
    return None if row is None else codec.load_spec(row.spec)


def list_deliveries(
    tx: Transaction,
    tenant: str,
    query: DeliveryQuery,
    *,
    limit: int,
    before: tuple[datetime, str] | None,
) -> list[DeliveryRecord]:
    """A page, newest first."""
    place = (deliveries.c.create_time, deliveries.c.delivery_id)
    statement = (
        sa.select(
            deliveries,
            tasks.c.attempts.label("task_attempts"),
            tasks.c.state.label("task_state"),
            tasks.c.run_at,
            jobs.c.spec,
        )
        .join(jobs, jobs.c.job_id == deliveries.c.job_id)
        .outerjoin(tasks, tasks.c.task_id == deliveries.c.task_id)
        .where(*_conditions(tx, tenant, query), jobs.c.hidden_time.is_(None))
        .order_by(*(column.desc() for column in place))
        .limit(limit)
    )
    if before is not None:
        moment, delivery_id = before
        statement = statement.where(
            sa.tuple_(*place) < sa.tuple_(codec.to_micros(moment), delivery_id)
        )
    specs: dict[str, ExportSpec] = {}
    found = []
    for row in tx.connection.execute(statement):
        if row.job_id not in specs:
            specs[row.job_id] = codec.load_spec(row.spec)
        found.append(_to_record(row, specs[row.job_id]))
    return found


def _to_record(row: Row[Any], spec: ExportSpec) -> DeliveryRecord:
    later = row.task_state == TaskState.SCHEDULED
    return DeliveryRecord(
        delivery_id=row.delivery_id,
        tenant=row.tenant,
        job_id=row.job_id,
        sink=spec.sinks[row.sink].name,
        queue=row.queue,
        generation=row.generation,
        part=None if row.shard is None else (row.shard, row.sequence),
        file_name=""
        if row.shard is None
        else delivered_name(spec, row.job_id, row.generation, row.shard, row.sequence),
        state=DeliveryState(row.state),
        attempts=row.attempts + (row.task_attempts or 0),
        create_time=codec.to_moment(row.create_time),
        last_error=codec.load_error(row.last_error),
        receipt=row.receipt,
        finish_time=codec.to_moment_or_none(row.finish_time),
        next_attempt_time=codec.to_moment(row.run_at) if later else None,
    )


Place = tuple[str, int, str]
"""Of a delivery in the order in which they are redriven: parts before completions."""


def redrive(
    tx: Transaction, tenant: str, query: DeliveryQuery, *, limit: int, after: Place | None
) -> tuple[int, Place | None]:
    """Make up to `limit` deliveries due that come after a place; returns how many, and
    the place of the last one that was looked at, None at the end."""
    completion = sa.case((delivering.IS_COMPLETION, 1), else_=0)
    place = (deliveries.c.job_id, completion, deliveries.c.delivery_id)
    statement = (
        sa.select(*place)
        .outerjoin(tasks, tasks.c.task_id == deliveries.c.task_id)
        .where(
            *_conditions(tx, tenant, query),
            sa.or_(
                deliveries.c.state.in_(_AGAIN), tasks.c.state == TaskState.SCHEDULED.sql
            ),
        )
        .order_by(*place)
        .limit(limit)
    )
    if after is not None:
        statement = statement.where(sa.tuple_(*place) > sa.tuple_(*after))
    found = tx.connection.execute(statement).all()
    redriven = 0
    touched: dict[tuple[str, int], tuple[Row[Any], SinkSpec]] = {}
    for job_id in dict.fromkeys(row[0] for row in found):
        job = lifecycle.lock_job(tx, job_id)
        if job is None or not _is_deliverable(tx, job):
            continue
        spec = codec.load_spec(job.spec)
        for row in found:
            if row[0] == job_id:
                index = _redrive(tx, job, spec, row[2])
                if index is not None:
                    redriven += 1
                    touched[job_id, index] = (job, spec.sinks[index])
    for (job_id, index), (job, sink) in touched.items():
        if job.state == JobState.SUCCEEDED:
            delivering.follow(tx, job, index, sink)
        lifecycle.bump(tx, job_id)
    return redriven, (found[-1][0], found[-1][1], found[-1][2]) if found else None


def _is_deliverable(tx: Transaction, job: Row[Any]) -> bool:
    return (
        job.state in _DELIVERABLE
        and job.hidden_time is None
        and job.drop_time is None
        and (job.expire_time is None or job.expire_time > tx.now)
    )


def _redrive(
    tx: Transaction, job: Row[Any], spec: ExportSpec, delivery_id: str
) -> int | None:
    """Make one delivery due; returns its sink, None when it stays as it is."""
    found = tx.connection.execute(
        sa.select(deliveries).where(deliveries.c.delivery_id == delivery_id)
    ).first()
    if found is None:
        return None
    sink = spec.sinks[found.sink]
    queue = delivering.find_queue(tx, sink.queue)
    if queue is None or queue.disabled_time is not None:
        return None
    if found.state == DeliveryState.PENDING:
        return found.sink if _hurry(tx, found.task_id) else None
    if found.state not in _AGAIN:
        return None
    if found.shard is not None:
        delivering.make_due(tx, job, delivery_id, sink)
        _reopen(tx, job, found)
    elif delivering.has_part(tx, job, found.sink, DeliveryState.DEAD_LETTERED):
        return None
    else:
        _wait_for_parts(tx, delivery_id)
    return int(found.sink)


def _hurry(tx: Transaction, task_id: int | None) -> bool:
    if task_id is None:
        return False
    hurried = tx.connection.execute(
        sa.update(tasks)
        .where(tasks.c.task_id == task_id, tasks.c.state == TaskState.SCHEDULED.sql)
        .values(state=TaskState.READY.value, run_at=tx.now)
    ).rowcount
    tx.changes.work = True
    return bool(hurried)


def _reopen(tx: Transaction, job: Row[Any], part: Row[Any]) -> None:
    """Have the completion follow a part that is delivered again."""
    completion = delivering.find_completion(tx, job.job_id, part.sink)
    if completion is None:
        return
    # One that was tried may have arrived, although nobody heard of it.
    told = completion.state == DeliveryState.DELIVERED or bool(completion.attempts)
    if completion.task_id is not None:
        # Its turn comes again after the part. Whoever is at it just now is fenced, but
        # may have told all the same.
        told = _take_back(tx, completion)
        tx.changes.fenced.add(job.job_id)
    delivery_id = completion.delivery_id
    if told:
        # It told of one part less. What is told now is another message, so it has another
        # name: else a receiver would take it for the one it has.
        delivery_id = str(uuid_utils.uuid7())
        tx.connection.execute(
            sa.update(deliveries)
            .where(deliveries.c.delivery_id == completion.delivery_id)
            .values(delivery_id=delivery_id, receipt="")
        )
    _wait_for_parts(tx, delivery_id)


def _take_back(tx: Transaction, completion: Row[Any]) -> bool:
    """Take the task from a completion; returns whether it was ever tried."""
    attempts: int = tx.connection.execute(
        sa.delete(tasks)
        .where(tasks.c.task_id == completion.task_id)
        .returning(tasks.c.attempts)
    ).scalar_one()
    tx.connection.execute(
        sa.update(deliveries)
        .where(deliveries.c.delivery_id == completion.delivery_id)
        .values(attempts=deliveries.c.attempts + attempts, task_id=None)
    )
    return bool(completion.attempts or attempts)


def _wait_for_parts(tx: Transaction, delivery_id: str) -> None:
    tx.connection.execute(
        sa.update(deliveries)
        .where(deliveries.c.delivery_id == delivery_id)
        .values(state=DeliveryState.PENDING.value, finish_time=None, last_error=None)
    )


def list_queues(
    tx: Transaction, tenant: str, *, limit: int, after: str, queue: str
) -> list[SinkQueue]:
    """The tenant's queues by name, hopping from one to the next along the index."""
    names: list[str] = []
    while len(names) < limit:
        last = names[-1] if names else after
        found = [
            tx.connection.execute(
                sa.select(sa.func.min(table.c.queue)).where(
                    table.c.tenant == tenant,
                    table.c.queue == queue if queue else table.c.queue > last,
                    *conditions,
                )
            ).scalar_one()
            # One of the tenant's own may be disabled when its deliveries are forgotten.
            for table, conditions in (
                (deliveries, ()),
                (queues, (queues.c.disabled_time.is_not(None),)),
            )
        ]
        name = min((each for each in found if each is not None), default=None)
        if name is None:
            break
        names.append(name)
        if queue:
            break
    return [_to_queue(tx, tenant, name) for name in names]


def _to_queue(tx: Transaction, tenant: str, name: str) -> SinkQueue:
    counted = tx.connection.execute(
        sa.select(tasks.c.state, sa.func.count())
        .where(tasks.c.queue == name, tasks.c.tenant == tenant)
        .group_by(tasks.c.state)
    )
    states: dict[str, int] = {row[0]: row[1] for row in counted}
    dead = tx.connection.execute(
        sa.select(sa.func.count()).where(
            deliveries.c.tenant == tenant,
            deliveries.c.queue == name,
            deliveries.c.state == DeliveryState.DEAD_LETTERED.value,
        )
    ).scalar_one()
    row = delivering.find_queue(tx, name)
    return SinkQueue(
        queue=name,
        waiting=states.get(TaskState.READY, 0) + states.get(TaskState.LEASED, 0),
        retrying=states.get(TaskState.SCHEDULED, 0),
        dead_lettered=dead,
        failing_since=None if row is None else codec.to_moment_or_none(row.failing_since),
        disabled_time=None if row is None else codec.to_moment_or_none(row.disabled_time),
        disabled_reason=None if row is None else codec.load_error(row.disabled_reason),
    )


def queue_depths(tx: Transaction) -> dict[str, tuple[int, int]]:
    """How much stands in every queue, and how much waits to be tried again."""
    later = sa.case((tasks.c.state == TaskState.SCHEDULED.sql, 1), else_=0)
    found = tx.connection.execute(
        sa.select(tasks.c.queue, sa.func.count(), sa.func.sum(later))
        .where(
            tasks.c.queue.is_not(None),
            tasks.c.state.in_(
                (TaskState.READY.sql, TaskState.LEASED.sql, TaskState.SCHEDULED.sql)
            ),
        )
        .group_by(tasks.c.queue)
    )
    return {queue: (total - int(late), int(late)) for queue, total, late in found}


def enable_queue(tx: Transaction, tenant: str, name: str) -> bool:
    """Let it be tried again."""
    if not list_queues(tx, tenant, limit=1, after="", queue=name):
        return False
    tx.connection.execute(
        sa.update(queues)
        .where(queues.c.queue == name)
        .values(disabled_time=None, disabled_reason=None, failing_since=None)
    )
    tx.changes.work = True
    return True
