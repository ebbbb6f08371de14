"""Claims that walk along an index whatever the server has counted.

A server that counted the tasks while there were few expects a bitmap of all lanes after one
to be short, and reads every queued delivery for each lane once there are many: 5 000 pages
instead of 400 at 20 000 queued, until it has counted again.

Frozen: later changes are migrations of their own.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"

_FUNCTIONS = (
    "claim_task",
    "claim_delivery(bigint, text, bigint, int, text)",
    "claim_delivery(bigint, text, bigint, int, text, text[])",
)


def upgrade() -> None:
    """Tell the planner; the other ledger has none."""
    if op.get_context().dialect.name != "postgresql":
        return
    for function in _FUNCTIONS:
        op.execute(sa.text(f"ALTER FUNCTION {function} SET enable_bitmapscan = off"))
