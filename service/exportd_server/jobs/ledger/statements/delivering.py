"""Deliveries: what is due to which sink, what became of it, and when a job has arrived."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
import uuid_utils
from sqlalchemy.engine import Row

from exportd_server.errors import TABLE, ErrorReason, ErrorRecord
from exportd_server.jobs.ledger import codec
from exportd_server.jobs.ledger.base import (
    DeliveryFailure,
    DeliveryWork,
    Lease,
    LeaseLost,
    TaskKind,
)
from exportd_server.jobs.ledger.statements import lifecycle, reading
from exportd_server.jobs.ledger.statements.holding import holding
from exportd_server.jobs.ledger.tables import (
    TaskState,
    deliveries,
    jobs,
    queues,
    tasks,
)
from exportd_server.jobs.ledger.transaction import Transaction
from exportd_server.jobs.model import (
    DeliveryState,
    JobState,
    OnFull,
    PartRecord,
    QueuePolicy,
    SinkSpec,
)
from exportd_server.sinks.base import Takes
from exportd_server.store.key import OutputKind

IS_COMPLETION = deliveries.c.shard.is_(None)

_WITHOUT_PARTS = codec.dump_error(
    ErrorRecord(
        ErrorReason.PARTS_NOT_DELIVERED, TABLE[ErrorReason.PARTS_NOT_DELIVERED].text
    )
)


# --- queues


def set_queue(tx: Transaction, policy: QueuePolicy) -> Row[Any]:
    """Note what the operator allows for a queue; returns how it stands."""
    values = {
        "tenant": policy.tenant,
        "concurrency": policy.concurrency,
        "depth": policy.depth,
        "on_full": policy.on_full.value,
    }
    found = find_queue(tx, policy.queue)
    if found is None:
        tx.dialect.ensure_queue(tx.connection, {"queue": policy.queue, **values})
        found = find_queue(tx, policy.queue)
    if found is None:
        raise RuntimeError("a queue that was just made is missing")
    if any(getattr(found, name) != value for name, value in values.items()):
        tx.connection.execute(
            sa.update(queues).where(queues.c.queue == policy.queue).values(**values)
        )
        tx.changes.work = True
    return found


def disabled_among(tx: Transaction, policies: Sequence[QueuePolicy]) -> int | None:
    """Note the queues of a new job; returns the place of the first that is disabled."""
    for index, policy in enumerate(policies):
        if set_queue(tx, policy).disabled_time is not None:
            return index
    return None


def find_queue(tx: Transaction, name: str) -> Row[Any] | None:
    """The row of a queue."""
    return tx.connection.execute(sa.select(queues).where(queues.c.queue == name)).first()


def _is_full(tx: Transaction, queue: Row[Any], tenant: str) -> bool:
    """Whether it is for a tenant, whom what stands there of others does not hold up.
    Counted no further than its depth, for which there are indexes: on what is under way
    by the queue, on what waits by the lane. Who asks at the same moment sees the same, so
    it may come to hold one more for each export at work."""
    lane = _lane(queue.queue, tenant)
    at_work = sa.select(tasks.c.task_id).where(
        tasks.c.queue == queue.queue,
        tasks.c.state == TaskState.LEASED.sql,
        tasks.c.lane == lane,
    )
    waiting = sa.select(tasks.c.task_id).where(
        tasks.c.state == TaskState.READY.sql,
        tasks.c.lane.is_not(None),
        tasks.c.lane == lane,
    )
    standing = 0
    for some in (at_work, waiting):
        counted = sa.select(sa.func.count()).select_from(some.limit(queue.depth).subquery())
        standing += tx.connection.execute(counted).scalar_one()
    return standing >= int(queue.depth)


def _lane(queue: str, tenant: str) -> str:
    return f"{queue}\n{tenant}"


def has_room(tx: Transaction, lease: Lease) -> bool:
    """Whether no queue of the job's sinks holds it up. One of a sink that lacks a part
    already does not: nothing is gained by waiting for it."""
    job = tx.connection.execute(
        sa.select(jobs)
        .join(tasks, tasks.c.job_id == jobs.c.job_id)
        .where(
            tasks.c.task_id == lease.task_id,
            tasks.c.token == lease.token,
            tasks.c.state == TaskState.LEASED.sql,
        )
    ).one_or_none()
    if job is None:
        raise LeaseLost
    for index, sink in enumerate(codec.load_spec(job.spec).sinks):
        if sink.takes is not Takes.PARTS:
            continue
        queue = find_queue(tx, sink.queue)
        if (
            queue is not None
            and queue.on_full == OnFull.BLOCK
            and _is_full(tx, queue, job.tenant)
            and not has_part(tx, job, index, DeliveryState.DROPPED)
        ):
            return False
    return True


# --- what becomes due


def add_part(tx: Transaction, job: Row[Any], part: PartRecord, *, drop: bool) -> list[int]:
    """A part was recorded: one delivery for each sink that takes parts. Returns the sinks
    that will not get it, because their queue is full and drops, or is not waited for."""
    if not job.sinks:
        return []
    without: list[int] = []
    for index, sink in enumerate(codec.load_spec(job.spec).sinks):
        if sink.takes is not Takes.PARTS:
            continue
        queue = find_queue(tx, sink.queue)
        dropped = (
            queue is not None
            and _is_full(tx, queue, job.tenant)
            and (
                drop
                or queue.on_full == OnFull.DROP
                or has_part(tx, job, index, DeliveryState.DROPPED)
            )
        )
        delivery_id = _add(tx, job, index, sink, part=(part.shard, part.sequence))
        if dropped:
            _close(tx, delivery_id, DeliveryState.DROPPED)
            without.append(index)
        else:
            make_due(tx, job, delivery_id, sink)
    return without


def add_completions(tx: Transaction, job: Row[Any]) -> None:
    """The job has succeeded: one completion for each sink."""
    if not job.sinks:
        return
    for index, sink in enumerate(codec.load_spec(job.spec).sinks):
        _add(tx, job, index, sink, part=None)
        follow(tx, job, index, sink)


def _add(
    tx: Transaction,
    job: Row[Any],
    index: int,
    sink: SinkSpec,
    part: tuple[int, int] | None,
) -> str:
    shard, sequence = part or (None, None)
    delivery_id = str(uuid_utils.uuid7())
    tx.connection.execute(
        sa.insert(deliveries).values(
            delivery_id=delivery_id,
            tenant=job.tenant,
            job_id=job.job_id,
            generation=job.generation,
            sink=index,
            queue=sink.queue,
            shard=shard,
            sequence=sequence,
            state=DeliveryState.PENDING.value,
            create_time=tx.now,
        )
    )
    return delivery_id


def make_due(tx: Transaction, job: Row[Any], delivery_id: str, sink: SinkSpec) -> None:
    """Give a delivery the task that does it."""
    task_id = tx.connection.execute(
        sa.insert(tasks)
        .values(
            kind=TaskKind.DELIVER.value,
            tenant=job.tenant,
            job_id=job.job_id,
            generation=job.generation,
            priority=job.priority,
            since=tx.now,
            queue=sink.queue,
            lane=_lane(sink.queue, job.tenant),
            **lifecycle.due(tx, tx.now),
        )
        .returning(tasks.c.task_id)
    ).scalar_one()
    tx.connection.execute(
        sa.update(deliveries)
        .where(deliveries.c.delivery_id == delivery_id)
        .values(state=DeliveryState.PENDING.value, finish_time=None, task_id=task_id)
    )
    tx.changes.work = True


def _close(
    tx: Transaction,
    delivery_id: str,
    state: DeliveryState,
    *,
    attempts: int = 0,
    receipt: str = "",
    error: str | None = None,
) -> None:
    """End a delivery. Its task, if it had one, is done with."""
    task_id = tx.connection.execute(
        sa.select(deliveries.c.task_id).where(deliveries.c.delivery_id == delivery_id)
    ).scalar_one()
    tx.connection.execute(
        sa.update(deliveries)
        .where(deliveries.c.delivery_id == delivery_id)
        .values(
            state=state.value,
            attempts=deliveries.c.attempts + attempts,
            receipt=receipt,
            last_error=error,
            finish_time=tx.now,
            task_id=None,
        )
    )
    if task_id is not None:
        tx.connection.execute(sa.delete(tasks).where(tasks.c.task_id == task_id))


# --- the join


def has_part(tx: Transaction, job: Row[Any], index: int, state: DeliveryState) -> bool:
    """Whether the sink has a part in that state."""
    found = sa.select(deliveries.c.delivery_id).where(
        deliveries.c.job_id == job.job_id,
        deliveries.c.sink == index,
        deliveries.c.state == state.value,
        ~IS_COMPLETION,
    )
    return tx.connection.execute(found.limit(1)).first() is not None


def find_completion(tx: Transaction, job_id: str, index: int) -> Row[Any] | None:
    """The completion of one of a job's sinks, once it has succeeded."""
    return tx.connection.execute(
        sa.select(deliveries).where(
            deliveries.c.job_id == job_id, deliveries.c.sink == index, IS_COMPLETION
        )
    ).first()


def follow(tx: Transaction, job: Row[Any], index: int, sink: SinkSpec) -> None:
    """See to a completion that waits, after something of its sink has ended."""
    completion = find_completion(tx, job.job_id, index)
    if (
        completion is None
        or completion.state != DeliveryState.PENDING
        or completion.task_id is not None
        or has_part(tx, job, index, DeliveryState.PENDING)
    ):
        return
    if has_part(tx, job, index, DeliveryState.DEAD_LETTERED):
        _close(
            tx,
            completion.delivery_id,
            DeliveryState.DEAD_LETTERED,
            error=_WITHOUT_PARTS,
        )
    else:
        make_due(tx, job, completion.delivery_id, sink)


def _drop_output(tx: Transaction, job: Row[Any]) -> None:
    """Drop what is stored, if every sink has all of it."""
    missing = sa.select(deliveries.c.delivery_id).where(
        deliveries.c.job_id == job.job_id,
        deliveries.c.state != DeliveryState.DELIVERED.value,
    )
    if job.drop_time is None and tx.connection.execute(missing.limit(1)).first() is None:
        lifecycle.drop_output(tx, job)


# --- at work


def _holding(tx: Transaction, lease: Lease) -> tuple[Row[Any], Row[Any], Row[Any]]:
    """The lease's task, job and delivery."""
    task, job = holding(tx, lease, TaskKind.DELIVER)
    found = tx.connection.execute(
        sa.select(deliveries).where(deliveries.c.task_id == task.task_id)
    ).first()
    if job is None or found is None or job.hidden_time is not None:
        raise LeaseLost
    return task, job, found


def delivery_work(tx: Transaction, lease: Lease) -> DeliveryWork:
    """What the delivery needs."""
    task, row, found = _holding(tx, lease)
    job = reading.to_job_without_manifest(tx, row)
    sink = job.spec.sinks[found.sink]
    queue = find_queue(tx, sink.queue)
    dropped: set[tuple[int, int]] = set()
    if found.shard is not None:
        wanted = reading.parts_of_place(
            tx, row.job_id, found.generation, found.shard, found.sequence
        )
    else:
        wanted = reading.parts_of(tx, row.job_id, found.generation)
        if sink.takes is Takes.PARTS:
            dropped = _dropped(tx, row.job_id, found.sink)
    return DeliveryWork(
        delivery_id=found.delivery_id,
        attempt=found.attempts + task.attempts,
        job=job,
        sink=sink,
        parts=tuple(
            part
            for part in wanted
            if part.kind is OutputKind.OUTPUT and (part.shard, part.sequence) not in dropped
        ),
        columns=codec.load_columns(row.columns),
        completion=found.shard is None,
        dropped=len(dropped),
        disabled=queue is not None and queue.disabled_time is not None,
    )


def _dropped(tx: Transaction, job_id: str, index: int) -> set[tuple[int, int]]:
    rows = tx.connection.execute(
        sa.select(deliveries.c.shard, deliveries.c.sequence).where(
            deliveries.c.job_id == job_id,
            deliveries.c.sink == index,
            deliveries.c.state == DeliveryState.DROPPED.value,
            ~IS_COMPLETION,
        )
    )
    return {(row.shard, row.sequence) for row in rows}


def complete_delivery(tx: Transaction, lease: Lease, receipt: str) -> None:
    """The sink has it."""
    task, job, found = _holding(tx, lease)
    _close(
        tx,
        found.delivery_id,
        DeliveryState.DELIVERED,
        attempts=task.attempts,
        receipt=receipt,
    )
    tx.connection.execute(
        sa.update(queues)
        .where(queues.c.queue == found.queue, queues.c.failing_since.is_not(None))
        .values(failing_since=None)
    )
    _ended(tx, job, found)


def _ended(tx: Transaction, job: Row[Any], found: Row[Any]) -> None:
    spec = codec.load_spec(job.spec)
    if job.state == JobState.SUCCEEDED:
        if found.shard is not None:
            follow(tx, job, found.sink, spec.sinks[found.sink])
        elif spec.drop_after_delivery:
            _drop_output(tx, job)
    lifecycle.bump(tx, job.job_id)
    # Another one of the queue may have its place.
    tx.changes.work = True


def fail_delivery(
    tx: Transaction,
    lease: Lease,
    error: ErrorRecord,
    *,
    retry_in: int | None,
    disable_after: int | None,
    gone: bool,
    blame: bool,
) -> DeliveryFailure:
    """End an attempt, and the endpoint if it has failed for too long."""
    task, job, found = _holding(tx, lease)
    told = codec.dump_error(error)
    disabled, by_this = False, False
    if blame:
        disabled, by_this = _endpoint_failed(
            tx, found.queue, told, disable_after, gone=gone
        )
    if retry_in is not None and not disabled:
        tx.connection.execute(
            sa.update(tasks)
            .where(tasks.c.task_id == task.task_id)
            .values(owner="", lease_expires=None, **lifecycle.due(tx, tx.now + retry_in))
        )
        tx.connection.execute(
            sa.update(deliveries)
            .where(deliveries.c.delivery_id == found.delivery_id)
            .values(last_error=told)
        )
    else:
        _close(
            tx,
            found.delivery_id,
            DeliveryState.DEAD_LETTERED,
            attempts=task.attempts,
            error=told,
        )
    _ended(tx, job, found)
    return DeliveryFailure(dead=retry_in is None or disabled, disabled=by_this)


def _endpoint_failed(
    tx: Transaction, name: str, told: str, disable_after: int | None, *, gone: bool
) -> tuple[bool, bool]:
    """Note a failure; returns whether the endpoint is disabled, and whether by it."""
    # Locked: what is scheduled here must not be missed by who disables it.
    queue = tx.connection.execute(
        sa.select(queues).where(queues.c.queue == name).with_for_update()
    ).first()
    if queue is None or queue.disabled_time is not None:
        return queue is not None, False
    since = tx.now if queue.failing_since is None else queue.failing_since
    if not queue.tenant:
        # Shared: one tenant's failures must not shut out the others.
        disable_after, gone = None, False
    tired = disable_after is not None and tx.now - since >= disable_after
    if queue.failing_since is None or gone or tired:
        end = {"disabled_time": tx.now, "disabled_reason": told} if gone or tired else {}
        changed = tx.connection.execute(
            sa.update(queues)
            .where(queues.c.queue == name, queues.c.disabled_time.is_(None))
            .values(failing_since=since, **end)
        ).rowcount
        if not changed:
            return True, False
        if not end:
            return False, False
        # Nobody waits for an endpoint that is not tried any more: whoever takes these up
        # sees that, and ends them.
        tx.connection.execute(
            sa.update(tasks)
            .where(tasks.c.queue == name, tasks.c.state == TaskState.SCHEDULED.sql)
            .values(state=TaskState.READY.value, run_at=tx.now)
        )
        return True, True
    return False, False
