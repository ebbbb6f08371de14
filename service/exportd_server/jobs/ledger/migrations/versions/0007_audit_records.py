"""Audit records.

Frozen: later changes are migrations of their own.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "audit_records",
        sa.Column("record_id", sa.Text(), nullable=False),
        sa.Column("time", sa.BigInteger(), nullable=False),
        sa.Column("duration", sa.BigInteger(), nullable=False),
        sa.Column("method", sa.Text(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("code", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("identity", sa.Text(), nullable=False),
        sa.Column("peer", sa.Text(), nullable=False),
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("dataset", sa.Text(), nullable=False),
        sa.Column("part", sa.BigInteger(), nullable=True),
        sa.Column("error_part", sa.BigInteger(), nullable=True),
        sa.Column("sinks", sa.Text(), nullable=False),
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("delivery_id", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("validate_only", sa.SmallInteger(), nullable=False),
        sa.Column("bytes_sent", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("record_id"),
    )
    op.create_index("audit_records_time", "audit_records", ["time", "record_id"])
    for name in ("tenant", "subject", "job_id", "method", "outcome"):
        op.create_index(
            f"audit_records_{name}", "audit_records", [name, "time", "record_id"]
        )
