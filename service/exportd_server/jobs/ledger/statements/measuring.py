"""What metrics tell of a ledger: how many jobs and tasks are open, and for how long work
has waited. Every question goes by an index of what is open."""

from __future__ import annotations

from collections import Counter
from typing import Any

import sqlalchemy as sa

from exportd_server.jobs.ledger.base import Backlog, TaskKind
from exportd_server.jobs.ledger.tables import (
    PENDING,
    RUNNING,
    TaskState,
    jobs,
    queues,
    tasks,
)
from exportd_server.jobs.ledger.transaction import Transaction
from exportd_server.jobs.model import JobState

_SINCE = {
    TaskState.READY: tasks.c.run_at,
    # Nobody claims while all workers are gone, and only a claim makes them ready.
    TaskState.SCHEDULED: tasks.c.run_at,
    TaskState.LEASED: tasks.c.lease_expires,
}
"""By the state of a task: from when on, once that has passed, it waits for a worker."""


def backlog(tx: Transaction) -> Backlog:
    """How the ledger stands now."""
    found: Counter[tuple[TaskKind, str]] = Counter()
    waiting: dict[TaskKind, float] = {}
    for name, state, count, since in tx.connection.execute(_open_tasks()):
        kind = TaskKind(name)
        found[kind, state] = count
        if since is not None:
            waiting[kind] = max(waiting.get(kind, 0.0), (tx.now - since) / 1e6)
    return Backlog(
        jobs={
            JobState(state): count
            for state, count in tx.connection.execute(_unfinished_jobs())
        },
        tasks=found,
        waiting=waiting,
        disabled=tx.connection.scalars(
            sa.select(queues.c.queue).where(queues.c.disabled_time.is_not(None))
        ).all(),
    )


def _open_tasks() -> sa.CompoundSelect[Any]:
    return sa.union_all(
        *(
            sa.select(
                tasks.c.kind,
                sa.literal(state.value),
                sa.func.count(),
                # Housekeeping that was never done is due at 0, which is no age.
                sa.func.min(sa.func.nullif(since, 0)),
            )
            .where(tasks.c.state == state.sql)
            .group_by(tasks.c.kind)
            for state, since in _SINCE.items()
        )
    )


def _unfinished_jobs() -> sa.CompoundSelect[Any]:
    return sa.union_all(
        *(
            sa.select(jobs.c.state, sa.func.count())
            .where(jobs.c.state == state)
            .group_by(jobs.c.state)
            for state in (PENDING, RUNNING)
        )
    )
