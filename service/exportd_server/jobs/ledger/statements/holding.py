"""Whether a lease is still good."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Row

from exportd_server.jobs.ledger.base import Lease, LeaseLost, TaskKind
from exportd_server.jobs.ledger.prepared import Prepared
from exportd_server.jobs.ledger.statements import lifecycle
from exportd_server.jobs.ledger.tables import TaskState, tasks
from exportd_server.jobs.ledger.transaction import Transaction

_HELD = Prepared(
    sa.select(tasks)
    .where(
        tasks.c.task_id == sa.bindparam("task_id"),
        tasks.c.token == sa.bindparam("token"),
        tasks.c.kind == sa.bindparam("kind"),
        tasks.c.state == TaskState.LEASED.sql,
    )
    .with_for_update()
)


def holding(
    tx: Transaction, lease: Lease, *kinds: TaskKind
) -> tuple[Row[Any], Row[Any] | None]:
    """The lease's task and job, ours until the transaction ends; the job is None for
    the reap task. Raises `LeaseLost`, and ValueError for a task of another kind."""
    if kinds and lease.kind not in kinds:
        raise ValueError(f"not for a task of kind {lease.kind}")
    which = {"task_id": lease.task_id, "token": lease.token, "kind": lease.kind.value}
    if lease.job_id:
        job, task = lifecycle.lock_job_and(tx, lease.job_id, _HELD, **which)
    else:
        job, task = None, tx.first(_HELD, **which)
    if task is None or (task.job_id or "") != lease.job_id:
        raise LeaseLost
    return task, job
