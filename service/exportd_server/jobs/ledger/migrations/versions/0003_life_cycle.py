"""Who reads what is about to be deleted, whose outputs these are, and which of them no
job has; and where the manifest of a job lies in the store.

Frozen: later changes are migrations of their own.
"""

from __future__ import annotations

import uuid

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Make them."""
    op.add_column("jobs", sa.Column("manifest_token", sa.BigInteger(), nullable=True))
    op.create_table(
        "pins",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("reader", sa.Text(), nullable=False),
        sa.Column("expires", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "reader"),
    )
    op.create_table(
        "orphans",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("seen_time", sa.BigInteger(), nullable=False),
        sa.Column("look", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "job_id"),
    )
    identity = op.create_table(
        "identity",
        sa.Column("ledger_id", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("ledger_id"),
    )
    op.bulk_insert(identity, [{"ledger_id": str(uuid.uuid4())}])
    # The one sweep task, which returns for ever as the reap task does.
    op.execute(
        sa.text(
            "INSERT INTO tasks (kind, tenant, generation, state, priority, since, run_at) "
            "VALUES ('sweep', '', 1, 'ready', 1000, 0, 0)"
        )
    )
