"""The version of a database's tables, and how it is brought up to date."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from exportd_server.errors import ConfigurationError

if TYPE_CHECKING:
    from alembic.config import Config

MIGRATIONS = Path(__file__).parent / "migrations"

HEAD = "0010"
"""The newest version. Told here so that a database that is up to date, the usual case,
opens without reading the scripts; a test compares it with them."""

COMPATIBLE_FROM = "0009"
"""The oldest version whose release works on tables of `HEAD`, because the migrations since
only added what that release need not know. It is written beside the tables, where a release
of before reads it. Set it to `HEAD` with a migration that takes away or changes what such a
release uses, or whose rows it could not read; a test holds it to the scripts."""

COMPATIBLE = "SELECT value FROM counters WHERE name = 'compatible_from'"
"""Asks tables of a later version for the oldest one whose release works on them."""


def upgrade(connection: Connection, where: object) -> None:
    """Bring the database to `HEAD` within the open transaction. Raises
    `ConfigurationError` when it is none of ours, or a later version made it; `where`
    names it then."""
    before = version(connection, where)
    if before == HEAD:
        return
    if before is not None and before not in known():
        raise ConfigurationError(too_new(where, before))
    # Costs as much as all the rest of opening.
    from alembic import command  # noqa: PLC0415 - see above

    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
    connection.execute(sa.text("DELETE FROM counters WHERE name = 'compatible_from'"))
    connection.execute(
        sa.text("INSERT INTO counters (name, value) VALUES ('compatible_from', :oldest)"),
        {"oldest": int(COMPATIBLE_FROM)},
    )


def version(connection: Connection, where: object) -> str | None:
    """The version of the database's tables; None when it is empty. Raises
    `ConfigurationError` when it holds other tables."""
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


def known() -> set[str]:
    """The versions that this release knows, from its scripts."""
    from alembic.script import ScriptDirectory  # noqa: PLC0415 - as in `upgrade`

    scripts = ScriptDirectory.from_config(_config())
    return {script.revision for script in scripts.walk_revisions()}


def is_compatible(compatible_from: int | None) -> bool:
    """Whether this release works on tables of a version that it does not know, by what
    `COMPATIBLE` tells of them; None when they tell nothing."""
    return compatible_from is not None and compatible_from <= int(HEAD)


def too_new(where: object, found: str) -> str:
    """What to tell about a version that is not known."""
    return (
        f"ledger {where}: its tables have version {found}, which this release does not "
        f"know (it knows up to {HEAD}); run the release that made it, or a later one"
    )


def _config() -> Config:
    from alembic.config import Config  # noqa: PLC0415 - as in `upgrade`

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    return config
