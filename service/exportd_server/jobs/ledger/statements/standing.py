"""How a ledger stands: who works at what, what waits and for how long, and how much is
stored. Every question is a count that an index answers, or a scan of one table."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from exportd_server.jobs.ledger.tables import (
    PENDING,
    RUNNING,
    TaskState,
    api_keys,
    deliveries,
    identity,
    jobs,
    parts,
    queues,
    tasks,
)
from exportd_server.jobs.model import DeliveryState

_OPEN = (TaskState.READY, TaskState.SCHEDULED, TaskState.LEASED)


def holders() -> sa.Select[Any]:
    """Who holds how many leases of which kind, and when the first of them ends."""
    return (
        sa.select(
            tasks.c.owner,
            tasks.c.kind,
            sa.func.count().label("leases"),
            sa.func.min(tasks.c.lease_expires).label("expires"),
        )
        .where(tasks.c.state == TaskState.LEASED.sql)
        .group_by(tasks.c.owner, tasks.c.kind)
        .order_by(tasks.c.owner, tasks.c.kind)
    )


def late_leases(before: int) -> sa.Select[Any]:
    """Leases that end before a moment, the first to end first."""
    return (
        sa.select(
            tasks.c.owner,
            tasks.c.kind,
            tasks.c.job_id,
            tasks.c.attempts,
            tasks.c.lease_expires.label("expires"),
        )
        .where(tasks.c.state == TaskState.LEASED.sql, tasks.c.lease_expires < before)
        .order_by(tasks.c.lease_expires)
    )


def unfinished_jobs() -> sa.CompoundSelect[Any]:
    """How many jobs of each dataset are in which state, and since when the oldest."""
    return sa.union_all(
        *(
            sa.select(
                jobs.c.state,
                jobs.c.dataset,
                sa.func.count().label("jobs"),
                sa.func.min(jobs.c.create_time).label("oldest"),
            )
            .where(jobs.c.state == state, jobs.c.hidden_time.is_(None))
            .group_by(jobs.c.state, jobs.c.dataset)
            for state in (RUNNING, PENDING)
        )
    )


def open_tasks() -> sa.CompoundSelect[Any]:
    """How many tasks of each kind are in which state, since when the oldest, and when the
    first of them is due."""
    return sa.union_all(
        *(
            sa.select(
                tasks.c.kind,
                sa.literal(state.value).label("state"),
                sa.func.count().label("tasks"),
                sa.func.min(tasks.c.since).label("oldest"),
                sa.func.min(tasks.c.run_at).label("due"),
            )
            .where(tasks.c.state == state.sql)
            .group_by(tasks.c.kind)
            for state in _OPEN
        )
    )


def standing_deliveries() -> sa.Select[Any]:
    """How many deliveries stand in each queue, by the state of their tasks, and since
    when the oldest."""
    return (
        sa.select(
            tasks.c.queue,
            *(
                sa.func.sum(sa.case((tasks.c.state == state.sql, 1), else_=0)).label(state)
                for state in _OPEN
            ),
            sa.func.min(tasks.c.since).label("oldest"),
        )
        .where(
            tasks.c.queue.is_not(None), tasks.c.state.in_([state.sql for state in _OPEN])
        )
        .group_by(tasks.c.queue)
    )


def dead_letters() -> sa.Select[Any]:
    """How many dead letters each queue has, and since when the oldest."""
    return (
        sa.select(
            deliveries.c.queue,
            sa.func.count().label("dead"),
            sa.func.min(deliveries.c.finish_time).label("oldest"),
        )
        .where(deliveries.c.state == DeliveryState.DEAD_LETTERED.value)
        .group_by(deliveries.c.queue)
    )


def ailing_queues() -> sa.Select[Any]:
    """Queues whose sink fails, or that are disabled."""
    return sa.select(queues.c.queue, queues.c.failing_since, queues.c.disabled_time).where(
        sa.or_(queues.c.failing_since.is_not(None), queues.c.disabled_time.is_not(None))
    )


def stored() -> sa.Select[Any]:
    """Finished parts by kind, and their bytes."""
    return (
        sa.select(
            parts.c.kind,
            sa.func.count().label("parts"),
            sa.func.sum(parts.c.bytes).label("bytes"),
        )
        .group_by(parts.c.kind)
        .order_by(parts.c.kind.desc())
    )


def ledger_id() -> sa.Select[Any]:
    """The ledger's own name, which also stands in its store."""
    return sa.select(identity.c.ledger_id)


def working_keys(now: int) -> sa.Select[Any]:
    """How many API keys work at a moment."""
    return sa.select(sa.func.count()).where(
        api_keys.c.revoke_time.is_(None),
        sa.or_(api_keys.c.expire_time.is_(None), api_keys.c.expire_time > now),
    )
