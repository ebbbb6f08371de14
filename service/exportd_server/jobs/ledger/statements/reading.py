"""Jobs as callers see them.

Statements that calls run all the time are `Prepared`: the library takes many times as
long over one as the database takes to run it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import lru_cache
from itertools import chain
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Row, RowMapping

from exportd_server.jobs.ledger import codec
from exportd_server.jobs.ledger.base import JobQuery
from exportd_server.jobs.ledger.prepared import Prepared
from exportd_server.jobs.ledger.statements.lifecycle import EXPORT_KINDS, literals
from exportd_server.jobs.ledger.tables import (
    PENDING,
    TaskState,
    deliveries,
    identity,
    jobs,
    labels,
    parts,
    tasks,
)
from exportd_server.jobs.ledger.transaction import Transaction
from exportd_server.jobs.model import (
    DeliveryState,
    DeliveryStatus,
    Job,
    JobState,
    Manifest,
    PartRecord,
    Progress,
    SinkDelivery,
)
from exportd_server.store.key import OutputKind

_MOST_VARIABLES = 10_000
_FEW_PARTS = 100
"""Read in about a millisecond."""

_SHORT_TEXTS = 16_384
"""Characters, of all that is JSON in a job's row. Read, they take up several times that in
memory."""

_PART_COLUMNS = tuple(
    parts.c[name]
    for name in (
        "shard",
        "sequence",
        "token",
        "rows",
        "bytes",
        "prefix_bytes",
        "suffix_bytes",
        "crc32c",
        "prefix_crc32c",
        "body_crc32c",
        "suffix_crc32c",
        "sha256",
        "kind",
    )
)
"""In the order of `PartRecord`."""

_PARTS = sa.select(*_PART_COLUMNS).order_by(parts.c.shard, parts.c.sequence, parts.c.kind)
_BEGINNING = Prepared(
    _PARTS.where(
        parts.c.job_id == sa.bindparam("job_id"),
        parts.c.generation == sa.bindparam("generation"),
        parts.c.shard <= sa.bindparam("last"),
        parts.c.kind == OutputKind.OUTPUT.value,
    )
)

_VISIBLE = (
    jobs.c.job_id == sa.bindparam("job_id"),
    jobs.c.tenant == sa.bindparam("tenant"),
    jobs.c.hidden_time.is_(None),
)
_VISIBLE_JOB = Prepared(sa.select(jobs).where(*_VISIBLE))
_REVISION = Prepared(
    sa.select(jobs.c.revision).where(
        jobs.c.job_id == sa.bindparam("job_id"), jobs.c.hidden_time.is_(None)
    )
)

_SUMS_COLUMNS = (
    sa.func.sum(tasks.c.rows).label("rows"),
    sa.func.sum(tasks.c.bytes).label("bytes"),
    sa.func.sum(tasks.c.parts).label("parts"),
    sa.func.sum(tasks.c.row_errors).label("row_errors"),
    sa.func.sum(tasks.c.error_parts).label("error_parts"),
    sa.func.sum(tasks.c.rows_per_second).label("rows_per_second"),
    sa.func.max(tasks.c.attempts).label("attempts"),
)
_SUMS = (
    sa.select(tasks.c.job_id, *_SUMS_COLUMNS)
    .where(tasks.c.kind.in_(literals(EXPORT_KINDS)))
    .group_by(tasks.c.job_id)
)
"""A restart drops the tasks of the generation before, so these are the current ones."""
_SUMS_OF_ONE = Prepared(_SUMS.where(tasks.c.job_id == sa.bindparam("job_id")))
_OF_VISIBLE = (
    sa.select(*_SUMS_COLUMNS)
    .where(
        tasks.c.job_id == sa.bindparam("job_id"), tasks.c.kind.in_(literals(EXPORT_KINDS))
    )
    .subquery()
)
_VISIBLE_JOB_WITH_SUMS = Prepared(sa.select(jobs, _OF_VISIBLE).where(*_VISIBLE))
"""In one statement what is asked for all the time."""
_SUMS_OF_MANY = _SUMS.where(tasks.c.job_id.in_(sa.bindparam("job_ids", expanding=True)))
_FEW_PUBLISHED_PARTS = Prepared(
    _PARTS.where(
        parts.c.job_id == sa.bindparam("job_id"),
        parts.c.generation
        == sa.select(jobs.c.generation)
        .where(*_VISIBLE, jobs.c.state == JobState.SUCCEEDED.value)
        .scalar_subquery(),
    ).limit(_FEW_PARTS)
)
"""Of a job that has succeeded: its first parts."""

_SENT = (
    sa.select(
        deliveries.c.job_id,
        deliveries.c.sink,
        deliveries.c.state,
        sa.func.count().label("deliveries"),
        sa.func.sum(deliveries.c.attempts + sa.func.coalesce(tasks.c.attempts, 0)).label(
            "attempts"
        ),
        sa.func.max(
            sa.case((deliveries.c.shard.is_(None), deliveries.c.receipt), else_="")
        ).label("receipt"),
    )
    .outerjoin(tasks, tasks.c.task_id == deliveries.c.task_id)
    .where(deliveries.c.job_id.in_(sa.bindparam("job_ids", expanding=True)))
    .group_by(deliveries.c.job_id, deliveries.c.sink, deliveries.c.state)
)
_NOT_THERE = tuple(
    state.value for state in DeliveryState if state is not DeliveryState.DELIVERED
)

_AHEAD = (
    jobs.c.tenant == sa.bindparam("tenant"),
    jobs.c.state == PENDING,
    jobs.c.due_time <= sa.bindparam("due"),
)
_POSITION = Prepared(
    sa.select(
        sa.select(sa.func.count())
        .where(*_AHEAD, jobs.c.priority > sa.bindparam("priority"))
        .scalar_subquery()
        + sa.select(sa.func.count())
        .where(
            *_AHEAD,
            jobs.c.priority == sa.bindparam("priority"),
            sa.tuple_(jobs.c.create_time, jobs.c.job_id)
            < sa.tuple_(sa.bindparam("create_time"), sa.bindparam("job_id")),
        )
        .scalar_subquery()
    )
)
_RANKED = (
    sa.select(
        jobs.c.job_id,
        sa.func.row_number()
        .over(order_by=(jobs.c.priority.desc(), jobs.c.create_time, jobs.c.job_id))
        .label("place"),
    )
    .where(*_AHEAD)
    .subquery()
)
_POSITIONS = sa.select(_RANKED.c.job_id, (_RANKED.c.place - 1).label("position")).where(
    _RANKED.c.job_id.in_(sa.bindparam("job_ids", expanding=True))
)


_NEXT_DUE = Prepared(
    sa.select(
        sa.select(sa.func.min(tasks.c.run_at))
        .where(
            tasks.c.state == TaskState.SCHEDULED.sql,
            tasks.c.run_at > sa.bindparam("since"),
        )
        .scalar_subquery(),
        sa.select(sa.func.min(tasks.c.lease_expires))
        .where(
            tasks.c.state == TaskState.LEASED.sql,
            tasks.c.lease_expires > sa.bindparam("since"),
        )
        .scalar_subquery(),
    )
)


def visible_job(tx: Transaction, tenant: str, job_id: str) -> Row[Any] | None:
    """The job's row unless it is another tenant's or hidden."""
    found: Row[Any] | None = tx.first(_VISIBLE_JOB, job_id=job_id, tenant=tenant)
    return found


def get_jobs(
    tx: Transaction, asked: Sequence[tuple[str, str]], *, large: bool
) -> dict[tuple[str, str], Job | None]:
    """Jobs as they stand, with their manifests, by tenant and id. Unless `large` those are
    left out whose many parts would keep the others waiting."""
    return _get_jobs(tx, asked, _any if large else _is_small)


def get_quick_jobs(
    tx: Transaction, asked: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], Job | None]:
    """The same without those that take longer than a few rows: of many parts, with a
    place among those that wait, or whose request is long."""
    return _get_jobs(tx, asked, _is_quick)


def get_plain_jobs(
    tx: Transaction, asked: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], Job | None]:
    """The same at one go, with nothing more to be asked of the transaction. Those are left
    out of which more would have to be asked: of many parts, with a place among those that
    wait, or with deliveries."""
    calls = [
        (statement, {"job_id": job_id, "tenant": tenant})
        for tenant, job_id in asked
        for statement in (_VISIBLE_JOB_WITH_SUMS, _FEW_PUBLISHED_PARTS)
    ]
    rows = iter(tx.last(*calls))
    found: dict[tuple[str, str], Job | None] = {}
    for key, jobs_found, parts_found in zip(asked, rows, rows, strict=True):
        if not jobs_found:
            found[key] = None
            continue
        (row,) = jobs_found
        if row.state == JobState.PENDING or row.sinks:
            continue
        manifest = None
        if row.state == JobState.SUCCEEDED:
            if len(parts_found) != row.parts + row.error_parts:
                continue  # there are more
            published = _part_records(parts_found)
            manifest = Manifest.of(codec.load_columns(row.columns), published)
        found[key] = _to_job(tx.now, row, row, None, manifest, [])
    return found


def _get_jobs(
    tx: Transaction, asked: Sequence[tuple[str, str]], wanted: Callable[[Row[Any]], bool]
) -> dict[tuple[str, str], Job | None]:
    found: dict[tuple[str, str], Job | None] = {}
    for tenant, job_id in asked:
        row = tx.first(_VISIBLE_JOB_WITH_SUMS, job_id=job_id, tenant=tenant)
        if row is None:
            found[tenant, job_id] = None
        elif wanted(row):
            found[tenant, job_id] = _whole(tx, row, {job_id: row})
    return found


def _any(_row: Row[Any]) -> bool:
    return True


def _is_small(row: Row[Any]) -> bool:
    # Only these have a manifest.
    return row.state != JobState.SUCCEEDED or _has_few_parts(row)


def _is_quick(row: Row[Any]) -> bool:
    if row.state == JobState.PENDING or not _has_few_parts(row):
        return False
    # A caller may send a MiB of filters.
    texts = len(row.spec) + len(row.columns or "") + len(row.error or "")
    return texts <= _SHORT_TEXTS


def _has_few_parts(row: Row[Any]) -> bool:
    return int(row.parts + row.error_parts) <= _FEW_PARTS


def get_job(tx: Transaction, tenant: str, job_id: str) -> Job | None:
    """The job as it stands, with its manifest."""
    return get_jobs(tx, [(tenant, job_id)], large=True)[tenant, job_id]


def to_job(tx: Transaction, row: Row[Any]) -> Job:
    """The whole job of a row."""
    return _whole(tx, row, _sums(tx, [row.job_id]))


def _whole(tx: Transaction, row: Row[Any], sums: Mapping[str, Row[Any]]) -> Job:
    manifest = manifest_of(tx, row) if row.state == JobState.SUCCEEDED else None
    job = _to_jobs(tx, row.tenant, [row], sums, manifest)[0]
    return _with_last_errors(tx, job) if job.deliveries else job


def to_job_without_manifest(tx: Transaction, row: Row[Any]) -> Job:
    """The job of a row, for those who need no parts of it."""
    return _to_jobs(tx, row.tenant, [row], _sums(tx, [row.job_id]), None)[0]


def manifest_of(tx: Transaction, row: Row[Any]) -> Manifest:
    """What the job publishes, or has published."""
    found = parts_of(tx, row.job_id, row.generation)
    return Manifest.of(codec.load_columns(row.columns), found)


def _sums(tx: Transaction, job_ids: Sequence[str]) -> dict[str, Row[Any]]:
    """What the tasks of jobs come to."""
    found: Iterable[Row[Any]]
    if len(job_ids) == 1:
        found = tx.rows(_SUMS_OF_ONE, job_id=job_ids[0])
    else:
        found = tx.connection.execute(_SUMS_OF_MANY, {"job_ids": job_ids})
    return {row.job_id: row for row in found}


def _to_jobs(
    tx: Transaction,
    tenant: str,
    rows: Sequence[Row[Any]],
    sums: Mapping[str, Row[Any]],
    manifest: Manifest | None,
) -> list[Job]:
    places = _places(tx, tenant, [row for row in rows if row.state == JobState.PENDING])
    sent = _deliveries(tx, [row.job_id for row in rows if row.sinks])
    return [
        _to_job(
            tx.now,
            row,
            sums[row.job_id],
            places.get(row.job_id),
            manifest,
            sent.get(row.job_id, []),
        )
        for row in rows
    ]


def _to_job(
    now: int,
    row: Row[Any],
    sums: Row[Any],
    place: int | None,
    manifest: Manifest | None,
    sent: Sequence[RowMapping],
) -> Job:
    state = JobState(row.state)
    spec = codec.load_spec(row.spec)
    return Job(
        job_id=row.job_id,
        tenant=row.tenant,
        state=state,
        spec=spec,
        request_id=row.request_id or "",
        create_time=codec.to_moment(row.create_time),
        start_time=codec.to_moment_or_none(row.start_time),
        finish_time=codec.to_moment_or_none(row.finish_time),
        expire_time=codec.to_moment_or_none(row.expire_time),
        expired=row.expire_time is not None and row.expire_time <= now,
        read_time=codec.to_moment(now),
        generation=row.generation,
        attempt=sums.attempts,
        revision=row.revision,
        progress=Progress(
            rows=int(sums.rows),
            bytes=int(sums.bytes),
            parts_done=int(sums.parts),
            parts_total=int(sums.parts) if state is JobState.SUCCEEDED else None,
            estimated_rows=row.estimated_rows,
            queue_position=place,
            rows_per_second=sums.rows_per_second if state is JobState.RUNNING else None,
            row_errors=int(sums.row_errors),
            error_parts=int(sums.error_parts),
        ),
        error=codec.load_error(row.error),
        manifest=manifest,
        deliveries=tuple(
            _sink_delivery(sink.name, state, [each for each in sent if each["sink"] == at])
            for at, sink in enumerate(spec.sinks)
        ),
        drop_time=codec.to_moment_or_none(row.drop_time),
    )


def _deliveries(tx: Transaction, job_ids: Sequence[str]) -> dict[str, list[RowMapping]]:
    """What has become of the deliveries of jobs, counted."""
    found: dict[str, list[RowMapping]] = {}
    if job_ids:
        for row in tx.connection.execute(_SENT, {"job_ids": job_ids}).mappings():
            found.setdefault(row["job_id"], []).append(row)
    return found


def _sink_delivery(name: str, state: JobState, rows: Sequence[RowMapping]) -> SinkDelivery:
    count = dict.fromkeys(DeliveryState, 0)
    for row in rows:
        count[DeliveryState(row["state"])] += row["deliveries"]
    if state in (JobState.FAILED, JobState.CANCELLED):
        status = DeliveryStatus.FAILED
    elif state is not JobState.SUCCEEDED or count[DeliveryState.PENDING]:
        status = DeliveryStatus.PENDING
    elif count[DeliveryState.DEAD_LETTERED]:
        status = DeliveryStatus.FAILED
    elif count[DeliveryState.DROPPED]:
        status = DeliveryStatus.DROPPED
    else:
        status = DeliveryStatus.DELIVERED
    return SinkDelivery(
        sink=name,
        status=status,
        pending=count[DeliveryState.PENDING],
        delivered=count[DeliveryState.DELIVERED],
        dropped=count[DeliveryState.DROPPED],
        dead_lettered=count[DeliveryState.DEAD_LETTERED],
        attempts=sum(int(row["attempts"]) for row in rows),
        receipt=max((row["receipt"] or "" for row in rows), default=""),
    )


def _with_last_errors(tx: Transaction, job: Job) -> Job:
    """The job, telling why deliveries to its sinks are not there."""
    told = []
    for index, sink in enumerate(job.deliveries):
        error = tx.connection.execute(
            sa.select(deliveries.c.last_error)
            .where(
                deliveries.c.job_id == job.job_id,
                deliveries.c.sink == index,
                deliveries.c.state.in_(_NOT_THERE),
                deliveries.c.last_error.is_not(None),
            )
            # That of a part before that of a completion, which only follows.
            .order_by(deliveries.c.shard.is_(None), deliveries.c.create_time.desc())
            .limit(1)
        ).scalar_one_or_none()
        told.append(replace(sink, last_error=codec.load_error(error)))
    return replace(job, deliveries=tuple(told))


def _places(tx: Transaction, tenant: str, pending: Sequence[Row[Any]]) -> dict[str, int]:
    """How many pending jobs of the tenant would be claimed before each of these. Jobs
    that wait for a retry stand in nobody's way before their time."""
    due = [row for row in pending if row.due_time <= tx.now]
    places: dict[str, int] = {}
    if len(due) > 1:
        parameters = {
            "tenant": tenant,
            "due": tx.now,
            "job_ids": [row.job_id for row in due],
        }
        ranked = tx.connection.execute(_POSITIONS, parameters)
        places = {row.job_id: row.position for row in ranked}
    for row in pending:
        if row.job_id not in places:
            places[row.job_id] = tx.scalar(
                _POSITION,
                tenant=tenant,
                due=max(tx.now, row.due_time),
                priority=row.priority,
                create_time=row.create_time,
                job_id=row.job_id,
            )
    return places


def list_jobs(
    tx: Transaction,
    tenant: str,
    query: JobQuery,
    *,
    limit: int,
    before: tuple[datetime, str] | None,
) -> list[Job]:
    """A page of jobs, each index walked from the page's first row and no further than
    the page is long."""
    states: Iterable[JobState | None] = sorted(query.states) or [None]
    found = chain.from_iterable(
        tx.connection.execute(_page(tenant, query, state, limit, before))
        for state in states
    )
    rows = sorted(found, key=lambda row: (row.create_time, row.job_id), reverse=True)
    page = rows[:limit]
    return _to_jobs(tx, tenant, page, _sums(tx, [row.job_id for row in page]), None)


def _page(
    tenant: str,
    query: JobQuery,
    state: JobState | None,
    limit: int,
    before: tuple[datetime, str] | None,
) -> sa.Select[Any]:
    wanted = sorted(query.labels.items())
    statement = sa.select(jobs).where(jobs.c.tenant == tenant, jobs.c.hidden_time.is_(None))
    at: tuple[sa.Column[Any], sa.Column[Any]] = (jobs.c.create_time, jobs.c.job_id)
    if wanted:
        # The first label's index has the jobs in the page's order.
        name, value = wanted[0]
        at = (labels.c.create_time, labels.c.job_id)
        statement = statement.join(labels, labels.c.job_id == jobs.c.job_id).where(
            labels.c.tenant == tenant, labels.c.name == name, labels.c.value == value
        )
    for name, value in wanted[1:]:
        other = labels.alias()
        statement = statement.where(
            sa.exists().where(
                other.c.job_id == jobs.c.job_id,
                other.c.name == name,
                other.c.value == value,
            )
        )
    if state is not None:
        statement = statement.where(jobs.c.state == state.value)
    if query.dataset:
        statement = statement.where(jobs.c.dataset == query.dataset)
    if query.created_from is not None:
        statement = statement.where(at[0] >= codec.to_micros(query.created_from))
    if query.created_before is not None:
        statement = statement.where(at[0] < codec.to_micros(query.created_before))
    if before is not None:
        moment, job_id = before
        statement = statement.where(
            sa.tuple_(*at) < sa.tuple_(codec.to_micros(moment), job_id)
        )
    return statement.order_by(*(column.desc() for column in at)).limit(limit)


def parts_of(tx: Transaction, job_id: str, generation: int) -> list[PartRecord]:
    """Every part of a generation, error parts too, in the order of the output."""
    return _parts(tx, job_id=job_id, generation=generation)


def parts_of_shard(
    tx: Transaction, job_id: str, generation: int, shard: int
) -> list[PartRecord]:
    """The parts of one shard, error parts too, by sequence."""
    return _parts(tx, job_id=job_id, generation=generation, shard=shard)


def parts_of_place(
    tx: Transaction, job_id: str, generation: int, shard: int, sequence: int
) -> list[PartRecord]:
    """The part at a place, and its error part if it has one."""
    return _parts(tx, job_id=job_id, generation=generation, shard=shard, sequence=sequence)


def _parts(tx: Transaction, **values: str | int) -> list[PartRecord]:
    """The parts with these values in these columns."""
    return _part_records(tx.rows(_parts_by(tuple(values)), **values))


@lru_cache
def _parts_by(names: tuple[str, ...]) -> Prepared:
    return Prepared(_PARTS.where(*(parts.c[name] == sa.bindparam(name) for name in names)))


def _part_records(rows: Iterable[Any]) -> list[PartRecord]:
    return [PartRecord(*row._replace(kind=OutputKind(row.kind))) for row in rows]


def finished_parts(tx: Transaction, tenant: str, job_id: str) -> list[PartRecord]:
    """What the beginning of the output is certain to be."""
    job = visible_job(tx, tenant, job_id)
    if job is None or job.state in (JobState.FAILED, JobState.CANCELLED):
        return []
    if job.state == JobState.SUCCEEDED:
        return list(manifest_of(tx, job).parts)
    first_open: int | None = tx.connection.execute(
        sa.select(sa.func.min(tasks.c.shard)).where(
            tasks.c.job_id == job_id,
            tasks.c.state.in_(
                (TaskState.READY.sql, TaskState.SCHEDULED.sql, TaskState.LEASED.sql)
            ),
        )
    ).scalar_one()
    if first_open is None:
        return []
    found = tx.rows(_BEGINNING, job_id=job_id, generation=job.generation, last=first_open)
    return _part_records(found)


def known_jobs(tx: Transaction, job_ids: Sequence[str]) -> set[str]:
    """Those that have a row, hidden or not."""
    known: set[str] = set()
    for start in range(0, len(job_ids), _MOST_VARIABLES):
        chunk = job_ids[start : start + _MOST_VARIABLES]
        known.update(
            tx.connection.scalars(sa.select(jobs.c.job_id).where(jobs.c.job_id.in_(chunk)))
        )
    return known


def ledger_id(tx: Transaction) -> str:
    """Which ledger this is."""
    found: str = tx.connection.execute(sa.select(identity.c.ledger_id)).scalar_one()
    return found


def revision_of(tx: Transaction, job_id: str) -> int | None:
    """The job's revision; None when it is missing or hidden."""
    (rows,) = tx.last((_REVISION, {"job_id": job_id}))
    return rows[0].revision if rows else None


def moment(tx: Transaction) -> int:
    """What the ledger's clock says."""
    tx.last()
    return tx.now


def next_due(tx: Transaction, since: int) -> int | None:
    """Microseconds until the first task comes due after `since`, by its time or because
    its lease runs out; None when there is none."""
    ((moments,),) = tx.last((_NEXT_DUE, {"since": since}))
    found = [moment for moment in moments if moment is not None]
    return min(found) - tx.now if found else None
