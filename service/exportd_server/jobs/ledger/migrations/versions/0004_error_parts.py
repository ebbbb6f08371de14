"""Parts have a kind: those of the output, and those that tell the rows it lacks.

Frozen: later changes are migrations of their own.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_KEY = ["job_id", "generation", "shard", "sequence", "kind"]


def upgrade() -> None:
    """Make them."""
    for name, kind in (
        ("row_errors", sa.BigInteger()),
        ("error_parts", sa.Integer()),
        ("part_row_errors", sa.BigInteger()),
    ):
        op.add_column("tasks", sa.Column(name, kind, server_default="0", nullable=False))
    kind_column = sa.Column("kind", sa.Text(), server_default="output", nullable=False)
    if op.get_bind().dialect.name == "postgresql":
        op.add_column("parts", kind_column)
        op.drop_constraint("parts_pkey", "parts", type_="primary")
        op.create_primary_key("parts_pkey", "parts", _KEY)
        return
    # SQLite changes no key of a table that is there.
    op.rename_table("parts", "old_parts")
    op.create_table(
        "parts",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("shard", sa.Integer(), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("token", sa.BigInteger(), nullable=False),
        sa.Column("rows", sa.BigInteger(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("prefix_bytes", sa.BigInteger(), nullable=False),
        sa.Column("suffix_bytes", sa.BigInteger(), nullable=False),
        sa.Column("crc32c", sa.BigInteger(), nullable=False),
        sa.Column("prefix_crc32c", sa.BigInteger(), nullable=False),
        sa.Column("body_crc32c", sa.BigInteger(), nullable=False),
        sa.Column("suffix_crc32c", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.LargeBinary(), nullable=False),
        kind_column,
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint(*_KEY),
    )
    op.execute(sa.text("INSERT INTO parts SELECT *, 'output' FROM old_parts"))
    op.drop_table("old_parts")
