"""Claims of deliveries that leave some tenants' to other processes.

Frozen: later changes are migrations of their own.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

_ARGUMENTS = "bigint, text, bigint, int, text, text[]"

# The one of before stays beside it, for processes of the release before.
_CLAIM = """
CREATE FUNCTION claim_delivery(
    p_now bigint,           -- microseconds since 1970; NULL: the server's clock
    p_owner text,
    p_lease bigint,         -- microseconds
    p_depth int,            -- how many tasks of each lane to look at
    p_instance text,        -- who tells others of this claim
    p_left text[],          -- tenants whose deliveries are left to others
    OUT o_now bigint,
    OUT o_busy boolean,     -- something was passed by because it was locked
    OUT o_exhausted boolean,
    OUT o_promoted boolean, -- tasks have come due
    OUT o_revision bigint,
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
BEGIN
    -- One claim at a time: what it counts stays true until it has counted itself in.
    PERFORM pg_advisory_xact_lock('tasks'::regclass::oid::int, 2);
    o_now := coalesce(p_now, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint);
    o_exhausted := false;

    WITH come AS (
        SELECT task_id FROM tasks WHERE state = 'scheduled' AND run_at <= o_now
        FOR UPDATE SKIP LOCKED
    )
    UPDATE tasks SET state = 'ready' FROM come WHERE tasks.task_id = come.task_id;
    o_promoted := FOUND;
    o_busy := EXISTS (
        SELECT FROM tasks WHERE state = 'scheduled' AND run_at <= o_now
    );

    FOR candidate IN
        WITH RECURSIVE at_work AS MATERIALIZED (
            SELECT queue, lane, count(*)::int AS tasks FROM tasks
            WHERE state = 'leased' AND kind = 'deliver' GROUP BY queue, lane
        ), busy AS MATERIALIZED (
            SELECT queue, sum(tasks)::int AS tasks FROM at_work GROUP BY queue
        ), waiting AS (
            SELECT (
                SELECT min(r.lane) FROM tasks r
                WHERE r.state = 'ready' AND r.lane IS NOT NULL
            ) AS lane
            UNION ALL
            SELECT (
                SELECT min(r.lane) FROM tasks r
                WHERE r.state = 'ready' AND r.lane IS NOT NULL AND r.lane > w.lane
            )
            FROM waiting w WHERE w.lane IS NOT NULL
        ), found AS (
            SELECT head.task_id
            FROM waiting w
            CROSS JOIN LATERAL (
                SELECT r.task_id, r.queue, r.tenant FROM tasks r
                WHERE r.state = 'ready' AND r.lane IS NOT NULL AND r.lane = w.lane
                ORDER BY r.priority DESC, r.since, r.task_id
                LIMIT p_depth
            ) AS head
            JOIN queues q ON q.queue = head.queue
            LEFT JOIN busy ON busy.queue = head.queue
            WHERE w.lane IS NOT NULL AND coalesce(busy.tasks, 0) < q.concurrency
              AND NOT head.tenant = ANY (p_left)
            UNION
            SELECT task_id FROM tasks
            WHERE state = 'leased' AND lease_expires <= o_now AND kind = 'deliver'
              AND NOT tenant = ANY (p_left)
        )
        SELECT t.task_id, t.token, t.state
        FROM found
        JOIN tasks t ON t.task_id = found.task_id
        LEFT JOIN busy ON busy.queue = t.queue
        LEFT JOIN at_work ON at_work.lane = t.lane
        LEFT JOIN tenants ON tenants.tenant = t.tenant
        -- What a lost lease left counts as under way, so it is taken over first: else a
        -- busier queue would never get its turn.
        ORDER BY (t.state = 'leased') DESC,
                 coalesce(busy.tasks, 0), coalesce(at_work.tasks, 0),
                 coalesce(tenants.delivered, 0), t.priority DESC, t.since, t.task_id
        LIMIT 64
    LOOP
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
            lease_expires = o_now + p_lease, attempts = attempts + 1
        WHERE task_id = candidate.task_id
        RETURNING * INTO task;
        PERFORM FROM tenants WHERE tenant = task.tenant FOR UPDATE SKIP LOCKED;
        IF FOUND THEN
            UPDATE tenants SET delivered = task.token WHERE tenant = task.tenant;
        END IF;

        o_task_id := task.task_id;
        o_kind := task.kind;
        o_token := task.token;
        o_lease_expires := task.lease_expires;
        o_attempts := task.attempts;
        o_tenant := task.tenant;
        o_job_id := task.job_id;
        o_generation := task.generation;
        o_forget := task.forget;
        EXIT;
    END LOOP;

    -- Those who sleep until one of these is due would not see it any more.
    IF o_promoted THEN
        PERFORM pg_notify('exportd', json_build_object(
            'from', p_instance, 'work', true)::text);
    END IF;
END
$claim$
"""


def upgrade() -> None:
    """Make the function; the other ledger has none."""
    if op.get_context().dialect.name != "postgresql":
        return
    op.get_bind().exec_driver_sql(_CLAIM)
    # As for claim_task.
    for setting in (
        "search_path FROM CURRENT",
        "enable_seqscan = off",
        "enable_hashjoin = off",
        "enable_mergejoin = off",
        "plan_cache_mode = force_generic_plan",
        "jit = off",
    ):
        op.execute(sa.text(f"ALTER FUNCTION claim_delivery({_ARGUMENTS}) SET {setting}"))
