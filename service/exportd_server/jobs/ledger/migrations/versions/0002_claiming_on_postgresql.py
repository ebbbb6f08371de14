"""The claim as one statement of PostgreSQL's own, and where its tokens come from.

A claim holds a lock that all claims of the ledger share, so nothing of it may depend on
a client that could be stopped halfway: the function runs, and commits, as one statement.
It never waits for a row that somebody else has locked; it passes it by and says so.

Frozen: later changes are migrations of their own.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_CLAIM = """
CREATE FUNCTION claim_task(
    p_now bigint,           -- microseconds since 1970; NULL: the server's clock
    p_owner text,
    p_kinds text[],
    p_lease bigint,         -- microseconds
    p_running_limit int,    -- most running jobs of a tenant; NULL: no limit
    p_max_attempts int,
    p_depth int,            -- how many tasks of each queue to look at
    p_grace bigint,         -- microseconds a late writer may take to stop
    p_instance text,        -- who tells others of this claim
    OUT o_now bigint,
    OUT o_busy boolean,     -- something was passed by because it was locked
    OUT o_exhausted boolean,-- some job has lost its last attempt
    OUT o_promoted boolean, -- tasks have come due
    OUT o_revision bigint,  -- of the job
    OUT o_task_id bigint,
    OUT o_kind text,
    OUT o_token bigint,
    OUT o_lease_expires bigint,
    OUT o_attempts int,
    OUT o_tenant text,
    OUT o_job_id text,
    OUT o_generation int,
    OUT o_shard int,
    OUT o_shard_state text,
    OUT o_forget smallint
) LANGUAGE plpgsql AS $claim$
#variable_conflict use_column
DECLARE
    candidate record;
    task record;
    exports constant text[] := ARRAY['plan', 'shard'];
BEGIN
    -- One claim at a time: what it counts stays true until it has counted itself in.
    PERFORM pg_advisory_xact_lock('tasks'::regclass::oid::int, 1);
    -- Read once the lock is had, so that time never runs backwards from claim to claim.
    o_now := coalesce(p_now, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint);

    WITH come AS (
        SELECT task_id FROM tasks WHERE state = 'scheduled' AND run_at <= o_now
        FOR UPDATE SKIP LOCKED
    )
    UPDATE tasks SET state = 'ready' FROM come WHERE tasks.task_id = come.task_id;
    o_promoted := FOUND;
    -- One that is locked at the moment comes due all the same.
    o_busy := EXISTS (
        SELECT FROM tasks WHERE state = 'scheduled' AND run_at <= o_now
    );

    o_exhausted := EXISTS (
        SELECT FROM tasks
        WHERE state = 'leased' AND lease_expires <= o_now
          AND kind = ANY (exports) AND attempts >= p_max_attempts
    );

    FOR candidate IN
        WITH RECURSIVE running AS MATERIALIZED (
            SELECT tenant, count(*)::int AS jobs FROM jobs
            WHERE state = 'RUNNING' GROUP BY tenant
        ), at_work AS MATERIALIZED (
            SELECT tenant, count(*)::int AS tasks FROM tasks
            WHERE state = 'leased' AND kind = ANY (exports) GROUP BY tenant
        ), waiting AS (
            -- Every (kind, tenant) that has a ready task, by hopping along the index.
            SELECT wanted.kind, (
                SELECT min(r.tenant) FROM tasks r
                WHERE r.state = 'ready' AND r.kind = wanted.kind
            ) AS tenant
            FROM unnest(p_kinds) AS wanted (kind)
            UNION ALL
            SELECT w.kind, (
                SELECT min(r.tenant) FROM tasks r
                WHERE r.state = 'ready' AND r.kind = w.kind AND r.tenant > w.tenant
            )
            FROM waiting w WHERE w.tenant IS NOT NULL
        ), found AS (
            SELECT head.task_id
            FROM waiting w
            LEFT JOIN running ON running.tenant = w.tenant
            CROSS JOIN LATERAL (
                SELECT r.task_id FROM tasks r
                WHERE r.state = 'ready' AND r.kind = w.kind AND r.tenant = w.tenant
                ORDER BY r.priority DESC, r.since, r.job_id, r.task_id
                LIMIT p_depth
            ) AS head
            WHERE w.tenant IS NOT NULL AND (
                p_running_limit IS NULL OR w.kind <> ALL (exports)
                OR coalesce(running.jobs, 0) < p_running_limit
            )
            UNION
            -- A lease that ran out: its job is running already, whatever the limit.
            SELECT task_id FROM tasks
            WHERE state = 'leased' AND lease_expires <= o_now AND kind = ANY (p_kinds)
              AND (kind <> ALL (exports) OR attempts < p_max_attempts)
            UNION
            -- A tenant at its limit may put more workers on the jobs that run.
            SELECT more.task_id FROM jobs
            CROSS JOIN LATERAL (
                SELECT r.task_id FROM tasks r
                WHERE r.job_id = jobs.job_id AND r.state = 'ready'
                  AND r.kind = ANY (p_kinds)
                ORDER BY r.task_id LIMIT 1
            ) AS more
            WHERE jobs.state = 'RUNNING' AND p_running_limit IS NOT NULL
        )
        SELECT t.task_id, t.token, t.job_id, t.state
        FROM found
        JOIN tasks t ON t.task_id = found.task_id
        LEFT JOIN at_work ON at_work.tenant = t.tenant
        LEFT JOIN tenants ON tenants.tenant = t.tenant
        ORDER BY coalesce(at_work.tasks, 0), coalesce(tenants.served, 0),
                 t.priority DESC, t.since, t.job_id, t.task_id
        LIMIT 64
    LOOP
        -- The job first, then its task: the order in which everybody locks them.
        IF candidate.job_id IS NOT NULL THEN
            PERFORM FROM jobs WHERE job_id = candidate.job_id FOR UPDATE SKIP LOCKED;
            IF NOT FOUND THEN
                o_busy := true;
                CONTINUE;
            END IF;
        END IF;
        -- Its holder may have renewed it, or its job have ended, a moment ago.
        PERFORM FROM tasks
        WHERE task_id = candidate.task_id AND token = candidate.token
          AND state = candidate.state AND (state <> 'leased' OR lease_expires <= o_now)
        FOR UPDATE SKIP LOCKED;
        IF NOT FOUND THEN
            o_busy := true;
            CONTINUE;
        END IF;

        UPDATE tasks SET
            state = 'leased', owner = p_owner, token = nextval('fencing_tokens'),
            lease_expires = o_now + p_lease, attempts = attempts + 1,
            -- What an earlier attempt had begun is done again.
            rows = part_rows, bytes = part_bytes, rows_per_second = NULL
        WHERE task_id = candidate.task_id
        RETURNING * INTO task;

        IF task.kind = ANY (exports) THEN
            UPDATE jobs SET
                state = 'RUNNING',
                revision = revision + 1,
                start_time = coalesce(start_time, o_now),
                -- The former holder may have stored parts that it never recorded, and
                -- may be at it still.
                untidy = CASE candidate.state WHEN 'leased' THEN 1 ELSE untidy END,
                writers_until = CASE candidate.state
                    WHEN 'leased' THEN greatest(writers_until, o_now + p_grace)
                    ELSE writers_until END
            WHERE job_id = task.job_id AND state IN ('PENDING', 'RUNNING')
            RETURNING revision INTO STRICT o_revision;
            PERFORM FROM tenants WHERE tenant = task.tenant FOR UPDATE SKIP LOCKED;
            IF FOUND THEN
                UPDATE tenants SET served = task.token WHERE tenant = task.tenant;
            END IF;
        END IF;

        o_task_id := task.task_id;
        o_kind := task.kind;
        o_token := task.token;
        o_lease_expires := task.lease_expires;
        o_attempts := task.attempts;
        o_tenant := task.tenant;
        o_job_id := task.job_id;
        o_generation := task.generation;
        o_shard := task.shard;
        o_shard_state := task.shard_state;
        o_forget := task.forget;
        EXIT;
    END LOOP;

    IF o_promoted OR o_revision IS NOT NULL THEN
        PERFORM pg_notify('exportd', json_build_object(
            'from', p_instance,
            'work', o_promoted,
            'jobs', CASE WHEN o_revision IS NULL THEN '{}'::json
                    ELSE json_build_object(o_job_id, o_revision) END
        )::text);
    END IF;
END
$claim$
"""


def upgrade() -> None:
    """Make them, where the ledger is on PostgreSQL."""
    if op.get_context().dialect.name != "postgresql":
        return
    op.execute(sa.text("CREATE SEQUENCE fencing_tokens"))
    # The settings hold for the function alone. Its plans are made while the tables are
    # empty and used when they are not, so that it goes by index, row by row, is not left
    # to statistics.
    op.get_bind().exec_driver_sql(_CLAIM)
    for setting in (
        "search_path FROM CURRENT",
        "enable_seqscan = off",
        "enable_hashjoin = off",
        "enable_mergejoin = off",
        "plan_cache_mode = force_generic_plan",
        "jit = off",
    ):
        op.execute(sa.text(f"ALTER FUNCTION claim_task SET {setting}"))
