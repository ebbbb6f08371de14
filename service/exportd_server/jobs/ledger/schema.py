"""The version of a database's tables, and how it is brought up to date."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from exportd_server.errors import ConfigurationError

MIGRATIONS = Path(__file__).parent / "migrations"

HEAD = "0001"
"""The newest version. Told here so that a database that is up to date, the usual case,
opens without reading the scripts; a test compares it with them."""


def upgrade(connection: Connection, where: object) -> None:
    """Bring the database to `HEAD` within the open transaction. Raises
    `ConfigurationError` when it is none of ours, or a later version made it; `where`
    names it then."""
    version = _version(connection, where)
    if version == HEAD:
        return
    # Costs as much as all the rest of opening.
    from alembic import command  # noqa: PLC0415 - see above
    from alembic.config import Config  # noqa: PLC0415 - see above
    from alembic.script import ScriptDirectory  # noqa: PLC0415 - see above

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    known = {
        script.revision for script in ScriptDirectory.from_config(config).walk_revisions()
    }
    if version is not None and version not in known:
        raise ConfigurationError(
            f"ledger {where}: its tables have version {version}, which this release "
            f"does not know (it knows up to {HEAD}); run the release that made it, or a "
            "later one"
        )
    command.upgrade(config, "head")


def _version(connection: Connection, where: object) -> str | None:
    names = sa.inspect(connection).get_table_names()
    if "alembic_version" in names:
        return connection.execute(
            sa.text("SELECT version_num FROM alembic_version")
        ).scalar_one_or_none()
    if names:
        raise ConfigurationError(
            f"ledger {where}: the database holds tables that are not a ledger's; give "
            "the ledger one of its own"
        )
    return None
