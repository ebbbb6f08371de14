"""Jobs remember the trace that they were created in.

Frozen: later changes are migrations of their own.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"

# Volatile, and so with a snapshot of its own: the claim that it is called beside may have
# waited, and the job have been created meanwhile.
_TRACE = """
CREATE FUNCTION trace_context_of(p_job_id text) RETURNS text
LANGUAGE plpgsql VOLATILE STRICT AS $trace$
BEGIN
    RETURN (SELECT trace_context FROM jobs WHERE job_id = p_job_id);
END
$trace$
"""


def upgrade() -> None:
    """Add the column, and what a claim on PostgreSQL reads it by."""
    op.add_column("jobs", sa.Column("trace_context", sa.Text))
    if op.get_context().dialect.name != "postgresql":
        return
    op.get_bind().exec_driver_sql(_TRACE)
    # As for claim_task.
    for setting in (
        "search_path FROM CURRENT",
        "enable_seqscan = off",
        "plan_cache_mode = force_generic_plan",
        "jit = off",
    ):
        op.execute(sa.text(f"ALTER FUNCTION trace_context_of SET {setting}"))
