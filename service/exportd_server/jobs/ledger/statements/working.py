"""What the holder of a lease may do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Row

from exportd_server.errors import TABLE, ErrorReason, ErrorRecord
from exportd_server.jobs.ledger import codec
from exportd_server.jobs.ledger.base import LastPart, Lease, LeaseLost, TaskKind, Totals
from exportd_server.jobs.ledger.prepared import Prepared
from exportd_server.jobs.ledger.statements import delivering, lifecycle, reading
from exportd_server.jobs.ledger.statements.claiming import fail_exhausted_job, to_lease
from exportd_server.jobs.ledger.statements.holding import holding
from exportd_server.jobs.ledger.statements.lifecycle import EXPORT_KINDS, due
from exportd_server.jobs.ledger.tables import TaskState, deliveries, jobs, parts, tasks
from exportd_server.jobs.ledger.transaction import Transaction
from exportd_server.jobs.model import JobState, Manifest, ManifestColumn, PartRecord
from exportd_server.sources.base import Shard
from exportd_server.store.key import OutputKind

MOST_GENERATIONS = 20
"""How often an output may be begun: a source that changes each time is no source."""

_HOUSEKEEPING_RETRY = 10_000_000
"""Microseconds until housekeeping that failed without a word is tried again."""

_UNFINISHED = (TaskState.READY.sql, TaskState.SCHEDULED.sql, TaskState.LEASED.sql)

# Built once, as in `reading` and `lifecycle`.
_GOOD = sa.select(tasks.c.task_id).where(
    tasks.c.task_id == sa.bindparam("task_id"),
    tasks.c.token == sa.bindparam("token"),
    tasks.c.state == TaskState.LEASED.sql,
)
_GOOD_UNLOCKED = _GOOD.with_for_update(skip_locked=True)
_CHANGE = Prepared(sa.update(tasks).where(tasks.c.task_id == sa.bindparam("of_task")))
_ADD_AND_TELL = Prepared(sa.insert(tasks).returning(tasks))
_ADD_PART = Prepared(sa.insert(parts))
_TOTALS = Prepared(
    sa.select(
        sa.func.sum(tasks.c.rows),
        sa.func.sum(tasks.c.bytes),
        sa.func.sum(tasks.c.row_errors),
    ).where(tasks.c.job_id == sa.bindparam("job_id"), tasks.c.kind == TaskKind.SHARD.value)
)
_OTHERS = Prepared(
    sa.select(tasks.c.task_id)
    .where(
        tasks.c.job_id == sa.bindparam("job_id"),
        tasks.c.task_id != sa.bindparam("task_id"),
        tasks.c.state.in_(_UNFINISHED),
        tasks.c.kind.in_(lifecycle.literals(EXPORT_KINDS)),
    )
    .limit(1)
)

_PUBLISHED = Prepared(
    sa.select(jobs.c.job_id).where(
        jobs.c.job_id == sa.bindparam("job_id"),
        jobs.c.state == JobState.SUCCEEDED.value,
        jobs.c.manifest_token == sa.bindparam("token"),
    )
)
_END = Prepared(
    sa.update(tasks)
    .where(tasks.c.task_id == sa.bindparam("of_task"))
    .values(
        # What it has beyond its parts was a guess.
        rows=tasks.c.part_rows,
        bytes=tasks.c.part_bytes,
        row_errors=tasks.c.part_row_errors,
    )
)

_GIVEN_UP: dict[str, Any] = {"owner": "", "lease_expires": None, "rows_per_second": None}


def _exporting(
    tx: Transaction, lease: Lease, *kinds: TaskKind
) -> tuple[Row[Any], Row[Any]]:
    task, job = holding(tx, lease, *kinds)
    if job is None:
        raise LeaseLost
    return task, job


def renew(tx: Transaction, held: Lease, lease: int) -> bool | None:
    """Extend to `lease` microseconds from now; False when it is lost, None when the task
    is locked by somebody, who must not hold up the other leases."""
    which = {"task_id": held.task_id, "token": held.token}
    if tx.connection.execute(_GOOD_UNLOCKED, which).first() is None:
        return False if tx.connection.execute(_GOOD, which).first() is None else None
    _change(tx, held.task_id, lease_expires=tx.now + lease)
    return True


def release(tx: Transaction, lease: Lease) -> None:
    """Give the task back as if it had not been taken."""
    task, job = holding(tx, lease)
    _give_up(tx, task, at=tx.now, attempts=task.attempts - 1)
    if job is None or task.kind not in EXPORT_KINDS:
        tx.changes.work = True
    else:
        lifecycle.settle(tx, job.job_id, untidy=1)


def _give_up(tx: Transaction, task: Row[Any], *, at: int, attempts: int) -> None:
    _change(tx, task.task_id, attempts=attempts, **_GIVEN_UP, **due(tx, at))


def _change(tx: Transaction, task_id: int, **values: Any) -> None:
    tx.later(_CHANGE, of_task=task_id, **values)


def record_plan(
    tx: Transaction,
    lease: Lease,
    shards: Sequence[Shard],
    columns: Sequence[ManifestColumn],
    estimated_rows: int | None,
) -> Lease:
    """Turn a plan into shards; the first is the planner's under a token of its own, so
    that a token never stands for two tasks."""
    task, job = _exporting(tx, lease, TaskKind.PLAN)
    if not shards:
        raise ValueError("a plan has at least one shard")
    if len({shard.index for shard in shards}) != len(shards):
        raise ValueError("two shards have the same index")
    _change(tx, task.task_id, state=TaskState.DONE.value, **_GIVEN_UP)
    common = {
        "kind": TaskKind.SHARD.value,
        "tenant": task.tenant,
        "job_id": task.job_id,
        "generation": task.generation,
        "priority": task.priority,
        "since": task.since,
        "run_at": tx.now,
    }
    lifecycle.touch(
        tx,
        job.job_id,
        columns=codec.dump_columns(columns),
        estimated_rows=estimated_rows,
    )
    first = tx.first(
        _ADD_AND_TELL,
        **common,
        shard=shards[0].index,
        shard_state=shards[0].state,
        state=TaskState.LEASED.value,
        owner=task.owner,
        token=tx.dialect.next_token(tx),
        lease_expires=task.lease_expires,
        # Going on with what was planned is the same attempt.
        attempts=task.attempts,
    )
    if len(shards) > 1:
        tx.connection.execute(
            sa.insert(tasks).values(state=TaskState.READY.value),
            [
                {**common, "shard": shard.index, "shard_state": shard.state}
                for shard in shards[1:]
            ],
        )
        tx.changes.work = True
    return to_lease(first, job)


def record_progress(
    tx: Transaction,
    lease: Lease,
    rows: int,
    bytes_: int,
    row_errors: int,
    rows_per_second: float,
) -> Totals:
    """Note how far the shard is; sum up the job."""
    task, job = _exporting(tx, lease, TaskKind.SHARD)
    _change(
        tx,
        task.task_id,
        rows=rows,
        bytes=bytes_,
        row_errors=row_errors,
        rows_per_second=rows_per_second,
    )
    lifecycle.touch(tx, job.job_id)
    total = tx.first(_TOTALS, job_id=job.job_id)
    return Totals(*map(int, total))


def shard_parts(tx: Transaction, lease: Lease) -> list[PartRecord]:
    """The parts that the lease's shard has already."""
    task, job = _exporting(tx, lease, TaskKind.SHARD)
    return reading.parts_of_shard(tx, job.job_id, task.generation, task.shard)


def add_part(
    tx: Transaction,
    lease: Lease,
    part: PartRecord,
    errors: PartRecord | None,
    *,
    drop: bool,
) -> list[int]:
    """Record the shard's next part, with its error part, unless they are the ones
    recorded last."""
    dropped, _, _ = _record_part(tx, lease, part, errors, drop=drop)
    return dropped


def add_last_part(
    tx: Transaction,
    lease: Lease,
    part: PartRecord,
    errors: PartRecord | None,
    *,
    drop: bool,
) -> LastPart:
    """Record the shard's last part, and tell what its end would publish."""
    dropped, task, job = _record_part(tx, lease, part, errors, drop=drop)
    manifest = reading.manifest_of(tx, job) if _is_last(tx, task) else None
    return LastPart(dropped, manifest)


def _record_part(
    tx: Transaction,
    lease: Lease,
    part: PartRecord,
    errors: PartRecord | None,
    *,
    drop: bool,
) -> tuple[list[int], Row[Any], Row[Any]]:
    """Also returns the shard's task and its job, as they were before."""
    task, job = _exporting(tx, lease, TaskKind.SHARD)
    new = [part] if errors is None else [errors, part]
    _check_kinds(part, errors)
    if part.sequence == task.parts - 1:
        had = reading.parts_of_shard(tx, job.job_id, task.generation, task.shard)
        if [each for each in had if each.sequence == part.sequence] == new:
            return [], task, job
    if (part.shard, part.sequence, part.token) != (task.shard, task.parts, task.token):
        raise ValueError(
            f"part {part.shard}/{part.sequence} of token {part.token} is not the next "
            f"one: that is {task.shard}/{task.parts} of token {task.token}"
        )
    common = {"job_id": job.job_id, "generation": task.generation}
    for each in new:
        tx.later(_ADD_PART, **common, **{**asdict(each), "kind": each.kind.value})
    part_rows = task.part_rows + part.rows
    part_bytes = task.part_bytes + sum(each.bytes for each in new)
    part_row_errors = task.part_row_errors + (0 if errors is None else errors.rows)
    _change(
        tx,
        task.task_id,
        parts=task.parts + 1,
        part_rows=part_rows,
        part_bytes=part_bytes,
        error_parts=task.error_parts + len(new) - 1,
        part_row_errors=part_row_errors,
        rows=max(task.rows, part_rows),
        bytes=max(task.bytes, part_bytes),
        row_errors=max(task.row_errors, part_row_errors),
    )
    dropped = delivering.add_part(tx, job, part, drop=drop)
    lifecycle.touch(tx, job.job_id)
    return dropped, task, job


def _check_kinds(part: PartRecord, errors: PartRecord | None) -> None:
    if part.kind is not OutputKind.OUTPUT:
        raise ValueError("an error part is recorded together with its output part")
    if errors is None:
        return
    if errors.kind is not OutputKind.ERROR or (
        (errors.shard, errors.sequence, errors.token)
        != (part.shard, part.sequence, part.token)
    ):
        raise ValueError("the error part is not that of the output part")


def complete_unless_last(tx: Transaction, lease: Lease) -> Manifest | None:
    """End the shard; of the last one only tell what it will publish."""
    task, job = _exporting(tx, lease, TaskKind.SHARD)
    if _is_last(tx, task):
        return reading.manifest_of(tx, job)
    complete_shard(tx, lease)
    return None


def complete_shard(tx: Transaction, lease: Lease, *, manifest: bool = False) -> bool:
    """End the shard, and with the last one the job."""
    task, job = _exporting(tx, lease, TaskKind.SHARD)
    last = _end_shard(tx, task)
    if last:
        _publish(tx, job, lease.token if manifest else None)
    else:
        lifecycle.settle(tx, job.job_id)
    return last


def complete_only_shard(
    tx: Transaction,
    lease: Lease,
    part: PartRecord,
    errors: PartRecord | None,
    *,
    drop: bool,
) -> list[int]:
    """Record the last part of a job's only shard, and end it and the job."""
    try:
        dropped, task, job = _record_part(tx, lease, part, errors, drop=drop)
    except LeaseLost:
        if tx.first(_PUBLISHED, job_id=lease.job_id, token=lease.token) is None:
            raise
        # Its answer was lost: this has been done.
        return []
    if not _end_shard(tx, task):
        raise ValueError("another shard of the job is unfinished")
    _publish(tx, job, lease.token)
    return dropped


def _end_shard(tx: Transaction, task: Row[Any]) -> bool:
    """Returns whether it was the last."""
    tx.later(_END, of_task=task.task_id, state=TaskState.DONE.value, **_GIVEN_UP)
    return _is_last(tx, task)


def _publish(tx: Transaction, job: Row[Any], manifest_token: int | None) -> None:
    lifecycle.end(tx, job, JobState.SUCCEEDED, manifest_token=manifest_token)
    delivering.add_completions(tx, job)


def _is_last(tx: Transaction, task: Row[Any]) -> bool:
    """Whether no other task of the job's export is left."""
    found = tx.first(_OTHERS, job_id=task.job_id, task_id=task.task_id)
    return found is None


def restart_output(tx: Transaction, lease: Lease) -> None:
    """Begin the job anew under its next generation."""
    _, job = _exporting(tx, lease, TaskKind.PLAN, TaskKind.SHARD)
    attempts: int = tx.connection.execute(
        sa.select(sa.func.max(tasks.c.attempts)).where(
            tasks.c.job_id == job.job_id, tasks.c.kind.in_(EXPORT_KINDS)
        )
    ).scalar_one()
    if job.generation >= MOST_GENERATIONS:
        changed = ErrorRecord(
            ErrorReason.SOURCE_CHANGED, TABLE[ErrorReason.SOURCE_CHANGED].text
        )
        lifecycle.end(tx, job, JobState.FAILED, error=codec.dump_error(changed))
        return
    writers_until = lifecycle.last_writer(tx, job)
    for table in (parts, tasks, deliveries):
        tx.connection.execute(sa.delete(table).where(table.c.job_id == job.job_id))
    tx.connection.execute(
        sa.insert(tasks).values(
            kind=TaskKind.PLAN.value,
            tenant=job.tenant,
            job_id=job.job_id,
            generation=job.generation + 1,
            state=TaskState.READY.value,
            priority=job.priority,
            since=job.create_time,
            run_at=tx.now,
            # Nobody failed: whoever plans anew makes the same attempt. An attempt that a
            # dead worker cost stays counted, so a job that kills them comes to its end.
            attempts=max(0, attempts - 1),
        )
    )
    tx.changes.fenced.add(job.job_id)
    lifecycle.settle(
        tx,
        job.job_id,
        generation=job.generation + 1,
        columns=None,
        estimated_rows=None,
        untidy=1,
        writers_until=writers_until,
    )


def fail_attempt(
    tx: Transaction, lease: Lease, error: ErrorRecord, retry_in: int | None
) -> bool:
    """End an attempt, and the job when no other may follow."""
    task, job = holding(tx, lease)
    if job is None or task.kind not in EXPORT_KINDS:
        pause = _HOUSEKEEPING_RETRY if retry_in is None else retry_in
        _give_up(tx, task, at=tx.now + pause, attempts=task.attempts)
        tx.changes.work = True
        return False
    told = codec.dump_error(error)
    again = retry_in is not None and task.attempts < tx.max_attempts
    # Also when the job ends: this holder has stopped, so nobody need wait for it.
    _give_up(tx, task, at=tx.now + (retry_in or 0), attempts=task.attempts)
    if not again:
        lifecycle.end(tx, job, JobState.FAILED, error=told)
        return True
    lifecycle.settle(tx, job.job_id, last_error=told, untidy=1)
    return False


def recover(tx: Transaction) -> None:
    """Make every leased task due: their holders are known to be dead."""
    leased = tx.connection.execute(
        sa.select(tasks).where(tasks.c.state == TaskState.LEASED.sql)
    ).all()
    if not leased:
        return
    tx.connection.execute(
        sa.update(tasks)
        .where(tasks.c.state == TaskState.LEASED.sql)
        .values(state=TaskState.READY.value, run_at=tx.now, **_GIVEN_UP)
    )
    exports = [task for task in leased if task.kind in EXPORT_KINDS]
    exhausted = {t.job_id for t in exports if t.attempts >= tx.max_attempts}
    for job_id in {task.job_id for task in exports}:
        lifecycle.settle(tx, job_id, untidy=1)
    for job_id in exhausted:
        job = lifecycle.lock_job(tx, job_id)
        if job is not None:
            fail_exhausted_job(tx, job)
