"""Tables of the ledger, the same on every database.

Moments and spans are whole microseconds, moments since 1970 in UTC. Enumerations are
their text. A migration makes these tables; a test holds the two together.
"""

from __future__ import annotations

import enum

import sqlalchemy as sa

METADATA = sa.MetaData()

_Serial = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
"""SQLite numbers rows by itself only in an INTEGER column."""


class TaskState(enum.StrEnum):
    """States of a task."""

    READY = "ready"
    """May be claimed."""
    SCHEDULED = "scheduled"
    """Waits for its `run_at`."""
    LEASED = "leased"
    """A worker has it, or had it when it died."""
    DONE = "done"
    """Ended well."""
    CLOSED = "closed"
    """Its job ended without it."""

    @property
    def sql(self) -> sa.ColumnClause[str]:
        """The state as a literal: a partial index is used only by a condition that
        repeats its own word for word."""
        return sa.literal_column(f"'{self.value}'", sa.Text)


PENDING = sa.literal_column("'PENDING'", sa.Text)
RUNNING = sa.literal_column("'RUNNING'", sa.Text)

counters = sa.Table(
    "counters",
    METADATA,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
)

tenants = sa.Table(
    "tenants",
    METADATA,
    sa.Column("tenant", sa.Text, primary_key=True),
    sa.Column("served", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("delivered", sa.BigInteger, nullable=False, server_default="0"),
)
"""`served` is the token of the tenant's last claim of a plan or shard, `delivered` that of
its last claim of a delivery."""

jobs = sa.Table(
    "jobs",
    METADATA,
    sa.Column("job_id", sa.Text, primary_key=True),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("dataset", sa.Text, nullable=False),
    sa.Column("spec", sa.Text, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("ttl", sa.BigInteger, nullable=False),
    sa.Column("request_id", sa.Text),
    sa.Column("fingerprint", sa.Text, nullable=False),
    sa.Column("create_time", sa.BigInteger, nullable=False),
    sa.Column("start_time", sa.BigInteger),
    sa.Column("finish_time", sa.BigInteger),
    sa.Column("expire_time", sa.BigInteger),
    # When the first task of a pending job is due.
    sa.Column("due_time", sa.BigInteger, nullable=False),
    # Set: nobody sees the job any more, it waits to be forgotten.
    sa.Column("hidden_time", sa.BigInteger),
    sa.Column("generation", sa.Integer, nullable=False),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("estimated_rows", sa.BigInteger),
    sa.Column("columns", sa.Text),
    sa.Column("error", sa.Text),
    # What the last attempt that was to be repeated failed with.
    sa.Column("last_error", sa.Text),
    # 1: the store may hold what no part names.
    sa.Column("untidy", sa.SmallInteger, nullable=False),
    # Until then a worker that lost its lease may still write.
    sa.Column("writers_until", sa.BigInteger, nullable=False),
    # Under which token the manifest of a succeeded job lies in the store.
    sa.Column("manifest_token", sa.BigInteger),
    # How many sinks the spec has: most jobs have none, and nobody reads it to see.
    sa.Column("sinks", sa.SmallInteger, nullable=False, server_default="0"),
    # When the output was dropped because every sink had it.
    sa.Column("drop_time", sa.BigInteger),
    # The trace that the job was created in, as `TraceContext.text` writes it.
    sa.Column("trace_context", sa.Text),
)
sa.Index("jobs_request", jobs.c.tenant, jobs.c.request_id, unique=True)
sa.Index("jobs_created", jobs.c.tenant, jobs.c.create_time, jobs.c.job_id)
# Also tells how many jobs of each tenant run.
sa.Index("jobs_state", jobs.c.state, jobs.c.tenant, jobs.c.create_time, jobs.c.job_id)
sa.Index("jobs_dataset", jobs.c.tenant, jobs.c.dataset, jobs.c.create_time, jobs.c.job_id)
sa.Index(
    "jobs_pending",
    jobs.c.tenant,
    jobs.c.priority.desc(),
    jobs.c.create_time,
    jobs.c.job_id,
    jobs.c.due_time,
    sqlite_where=jobs.c.state == PENDING,
    postgresql_where=jobs.c.state == PENDING,
)
sa.Index(
    "jobs_expiring",
    jobs.c.expire_time,
    sqlite_where=jobs.c.hidden_time.is_(None),
    postgresql_where=jobs.c.hidden_time.is_(None),
)

labels = sa.Table(
    "labels",
    METADATA,
    sa.Column(
        "job_id",
        sa.Text,
        sa.ForeignKey("jobs.job_id", ondelete="CASCADE"),
        primary_key=True,
    ),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("create_time", sa.BigInteger, nullable=False),
)
sa.Index(
    "labels_value",
    labels.c.tenant,
    labels.c.name,
    labels.c.value,
    labels.c.create_time,
    labels.c.job_id,
)

tasks = sa.Table(
    "tasks",
    METADATA,
    sa.Column("task_id", _Serial, primary_key=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("job_id", sa.Text, sa.ForeignKey("jobs.job_id", ondelete="CASCADE")),
    sa.Column("generation", sa.Integer, nullable=False),
    sa.Column("shard", sa.Integer),
    sa.Column("shard_state", sa.Text),
    sa.Column("forget", sa.SmallInteger, nullable=False, server_default="0"),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    # Age: when the job was created, or a cleanup was asked for.
    sa.Column("since", sa.BigInteger, nullable=False),
    sa.Column("run_at", sa.BigInteger, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
    sa.Column("owner", sa.Text, nullable=False, server_default=""),
    sa.Column("token", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("lease_expires", sa.BigInteger),
    # As last told, finished parts included.
    sa.Column("rows", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("bytes", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("rows_per_second", sa.Float),
    # Of finished parts alone.
    sa.Column("parts", sa.Integer, nullable=False, server_default="0"),
    sa.Column("part_rows", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("part_bytes", sa.BigInteger, nullable=False, server_default="0"),
    # Rows left out, as last told; and of finished parts alone, which tell them.
    sa.Column("row_errors", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("error_parts", sa.Integer, nullable=False, server_default="0"),
    sa.Column("part_row_errors", sa.BigInteger, nullable=False, server_default="0"),
    # Of a delivery: where it stands in line, and for whom.
    sa.Column("queue", sa.Text),
    sa.Column("lane", sa.Text),
)
sa.Index(
    "tasks_ready",
    tasks.c.kind,
    tasks.c.tenant,
    tasks.c.priority.desc(),
    tasks.c.since,
    tasks.c.job_id,
    tasks.c.task_id,
    sqlite_where=tasks.c.state == TaskState.READY.sql,
    postgresql_where=tasks.c.state == TaskState.READY.sql,
)
sa.Index(
    "tasks_scheduled",
    tasks.c.run_at,
    sqlite_where=tasks.c.state == TaskState.SCHEDULED.sql,
    postgresql_where=tasks.c.state == TaskState.SCHEDULED.sql,
)
sa.Index(
    "tasks_leased",
    tasks.c.lease_expires,
    sqlite_where=tasks.c.state == TaskState.LEASED.sql,
    postgresql_where=tasks.c.state == TaskState.LEASED.sql,
)
sa.Index("tasks_job", tasks.c.job_id, tasks.c.state, tasks.c.task_id)
sa.Index(
    "tasks_deliveries",
    tasks.c.lane,
    tasks.c.priority.desc(),
    tasks.c.since,
    tasks.c.task_id,
    sqlite_where=(tasks.c.state == TaskState.READY.sql) & tasks.c.lane.is_not(None),
    postgresql_where=(tasks.c.state == TaskState.READY.sql) & tasks.c.lane.is_not(None),
)
sa.Index(
    "tasks_queue",
    tasks.c.queue,
    tasks.c.state,
    sqlite_where=tasks.c.queue.is_not(None),
    postgresql_where=tasks.c.queue.is_not(None),
)

parts = sa.Table(
    "parts",
    METADATA,
    sa.Column(
        "job_id",
        sa.Text,
        sa.ForeignKey("jobs.job_id", ondelete="CASCADE"),
        primary_key=True,
    ),
    sa.Column("generation", sa.Integer, primary_key=True),
    sa.Column("shard", sa.Integer, primary_key=True),
    sa.Column("sequence", sa.Integer, primary_key=True),
    sa.Column("token", sa.BigInteger, nullable=False),
    sa.Column("rows", sa.BigInteger, nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("prefix_bytes", sa.BigInteger, nullable=False),
    sa.Column("suffix_bytes", sa.BigInteger, nullable=False),
    sa.Column("crc32c", sa.BigInteger, nullable=False),
    sa.Column("prefix_crc32c", sa.BigInteger, nullable=False),
    sa.Column("body_crc32c", sa.BigInteger, nullable=False),
    sa.Column("suffix_crc32c", sa.BigInteger, nullable=False),
    sa.Column("sha256", sa.LargeBinary, nullable=False),
    # An `OutputKind`.
    sa.Column("kind", sa.Text, primary_key=True, server_default="output"),
)

pins = sa.Table(
    "pins",
    METADATA,
    sa.Column(
        "job_id",
        sa.Text,
        sa.ForeignKey("jobs.job_id", ondelete="CASCADE"),
        primary_key=True,
    ),
    sa.Column("reader", sa.Text, primary_key=True),
    sa.Column("expires", sa.BigInteger, nullable=False),
)
"""Processes that are reading an output which expires before they may have done."""

orphans = sa.Table(
    "orphans",
    METADATA,
    sa.Column("tenant", sa.Text, primary_key=True),
    sa.Column("job_id", sa.Text, primary_key=True),
    # When it was found first.
    sa.Column("seen_time", sa.BigInteger, nullable=False),
    # The token of the sweep that found it last.
    sa.Column("look", sa.BigInteger, nullable=False),
)
"""What the store holds of jobs that the ledger does not know."""

identity = sa.Table("identity", METADATA, sa.Column("ledger_id", sa.Text, primary_key=True))
"""One row: a UUID, which also stands in the store that holds this ledger's outputs."""

queues = sa.Table(
    "queues",
    METADATA,
    sa.Column("queue", sa.Text, primary_key=True),
    # Whose endpoint it is; empty: the operator's, for everybody.
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("concurrency", sa.Integer, nullable=False),
    sa.Column("depth", sa.Integer, nullable=False),
    sa.Column("on_full", sa.Text, nullable=False),
    # Of the first failure after the last success.
    sa.Column("failing_since", sa.BigInteger),
    sa.Column("disabled_time", sa.BigInteger),
    sa.Column("disabled_reason", sa.Text),
)
"""What deliveries stand in, and what the operator allows for it."""

deliveries = sa.Table(
    "deliveries",
    METADATA,
    sa.Column("delivery_id", sa.Text, primary_key=True),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column(
        "job_id",
        sa.Text,
        sa.ForeignKey("jobs.job_id", ondelete="CASCADE"),
        nullable=False,
    ),
    sa.Column("generation", sa.Integer, nullable=False),
    # The sink's place in the spec.
    sa.Column("sink", sa.SmallInteger, nullable=False),
    sa.Column("queue", sa.Text, nullable=False),
    # Which part; absent: the completion.
    sa.Column("shard", sa.Integer),
    sa.Column("sequence", sa.Integer),
    # A `DeliveryState`.
    sa.Column("state", sa.Text, nullable=False),
    # Of earlier tasks; those of the task that is there are its own.
    sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
    sa.Column("last_error", sa.Text),
    sa.Column("receipt", sa.Text, nullable=False, server_default=""),
    sa.Column("create_time", sa.BigInteger, nullable=False),
    sa.Column("finish_time", sa.BigInteger),
    # What does the work; absent once it has ended, and for a completion that waits.
    sa.Column("task_id", sa.BigInteger),
)
sa.Index("deliveries_job", deliveries.c.job_id, deliveries.c.sink, deliveries.c.state)
sa.Index(
    "deliveries_created",
    deliveries.c.tenant,
    deliveries.c.create_time,
    deliveries.c.delivery_id,
)
sa.Index(
    "deliveries_queue",
    deliveries.c.tenant,
    deliveries.c.queue,
    deliveries.c.state,
    deliveries.c.create_time,
    deliveries.c.delivery_id,
)
sa.Index("deliveries_task", deliveries.c.task_id)

api_keys = sa.Table(
    "api_keys",
    METADATA,
    sa.Column("key_id", sa.Text, primary_key=True),
    sa.Column("tenant", sa.Text, nullable=False),
    # With spaces between.
    sa.Column("scopes", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    # SHA-256 of the secret, in hexadecimal.
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("create_time", sa.BigInteger, nullable=False),
    sa.Column("expire_time", sa.BigInteger),
    sa.Column("revoke_time", sa.BigInteger),
)
"""Empty in the embedded ledger, which the command that makes keys cannot open."""

audit_records = sa.Table(
    "audit_records",
    METADATA,
    sa.Column("record_id", sa.Text, primary_key=True),
    # When the operation ended, and how long it took.
    sa.Column("time", sa.BigInteger, nullable=False),
    sa.Column("duration", sa.BigInteger, nullable=False),
    # An `AuditMethod`, an `AuditOutcome`.
    sa.Column("method", sa.Text, nullable=False),
    sa.Column("outcome", sa.Text, nullable=False),
    sa.Column("code", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("subject", sa.Text, nullable=False),
    sa.Column("identity", sa.Text, nullable=False),
    sa.Column("peer", sa.Text, nullable=False),
    # Not a reference: records outlive jobs.
    sa.Column("job_id", sa.Text, nullable=False),
    sa.Column("dataset", sa.Text, nullable=False),
    sa.Column("part", sa.BigInteger),
    sa.Column("error_part", sa.BigInteger),
    # Names, as a list in JSON.
    sa.Column("sinks", sa.Text, nullable=False),
    sa.Column("queue", sa.Text, nullable=False),
    sa.Column("delivery_id", sa.Text, nullable=False),
    sa.Column("key_id", sa.Text, nullable=False),
    sa.Column("validate_only", sa.SmallInteger, nullable=False),
    sa.Column("bytes_sent", sa.BigInteger),
)
"""What callers and operators did; see `AuditRecord`."""
sa.Index("audit_records_time", audit_records.c.time, audit_records.c.record_id)
for _name in ("tenant", "subject", "job_id", "method", "outcome"):
    sa.Index(
        f"audit_records_{_name}",
        audit_records.c[_name],
        audit_records.c.time,
        audit_records.c.record_id,
    )
