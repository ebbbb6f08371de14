"""A new schema under a fleet that works: what is only added needs no pause."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl
import psycopg
import pytest
import sqlalchemy as sa
from alembic import command

from exportd.v1 import job_pb2
from exportd_server.jobs.ledger import schema
from exportd_server.jobs.ledger.postgres import migrate_postgres_ledger
from tests.support import rpc
from tests.support.processes import Processes, processes

NEWER = "9999"
ADDS = """
    op.add_column("jobs", sa.Column("pretended", sa.Text))
    op.add_column("tasks", sa.Column("weight", sa.Integer, server_default="1"))
    op.create_table("pretences", sa.Column("name", sa.Text, primary_key=True))
"""
TAKES_AWAY = """
    op.drop_column("jobs", "priority")
"""

Migrate = Callable[[str, str], None]


@pytest.fixture
def fleet(postgres_url: str, tmp_path: Path) -> Iterator[Processes]:
    pl.DataFrame({"n": range(1000)}).write_parquet(tmp_path / "numbers.parquet")
    catalogue = tmp_path / "datasets.toml"
    catalogue.write_text('[datasets.numbers]\nparquet = "numbers.parquet"\n')
    with processes(postgres_url, tmp_path, catalogue) as fleet:
        yield fleet


@pytest.fixture
def migrate(postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Migrate:
    """Run the migration of a release to come, which says from which version on releases
    work on its tables."""

    def run(what: str, compatible_from: str) -> None:
        scripts = tmp_path / "migrations"
        shutil.copytree(schema.MIGRATIONS, scripts)
        (scripts / f"versions/{NEWER}_pretended.py").write_text(
            "import sqlalchemy as sa\nfrom alembic import op\n"
            f'revision = "{NEWER}"\ndown_revision = "{schema.HEAD}"\n'
            f"def upgrade() -> None:{what}"
        )
        with monkeypatch.context() as newer:
            newer.setattr(schema, "MIGRATIONS", scripts)
            newer.setattr(schema, "HEAD", NEWER)
            newer.setattr(schema, "COMPATIBLE_FROM", compatible_from)
            assert migrate_postgres_ledger(postgres_url)[1] == NEWER

    return run


@pytest.mark.minutes
async def test_processes_go_on_and_start_on_tables_to_which_something_was_added(
    fleet: Processes, migrate: Migrate
) -> None:
    before = fleet.start("serve", "--listen", "127.0.0.1:0")
    async with fleet.calling(before) as stub:
        job = await rpc.create(stub, "numbers")
        migrate(ADDS, schema.HEAD)
        assert (await rpc.finish(stub, job.job_id)).state == job_pb2.JOB_STATE_SUCCEEDED
        after = await rpc.export(stub, "numbers")
    assert before.terminate() == 0
    again = fleet.start("serve", "--listen", "127.0.0.1:0")
    async with fleet.calling(again) as stub:
        for job_id in (job.job_id, after.job_id):
            assert (await rpc.download(stub, job_id)).count(b"\n") == 1001
        await rpc.export(stub, "numbers")
    assert fleet.command("status").returncode == 0
    assert f"version {NEWER}" in fleet.command("check").stdout


def test_a_release_of_before_has_nothing_to_migrate_on_tables_that_it_works_on(
    fleet: Processes, migrate: Migrate
) -> None:
    migrate(ADDS, schema.HEAD)
    done = fleet.command("migrate")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"version {NEWER} already" in done.stdout
    assert fleet.ledger("SELECT version_num FROM alembic_version") == [(NEWER,)]
    assert fleet.ledger("SELECT value FROM counters WHERE name = 'compatible_from'") == [
        (int(schema.HEAD),)
    ]


@pytest.mark.minutes
def test_nothing_of_a_release_starts_on_tables_from_which_something_was_taken(
    fleet: Processes, migrate: Migrate
) -> None:
    migrate(TAKES_AWAY, NEWER)
    for words in (("worker",), ("status",), ("migrate",)):
        told = fleet.command(*words)
        assert told.returncode == 2
        assert f"version {NEWER}, which this release does not know" in told.stderr
        assert len(told.stderr.splitlines()) == 1


def test_tables_that_say_nothing_of_it_are_refused(fleet: Processes) -> None:
    fleet.change(f"UPDATE alembic_version SET version_num = '{NEWER}'")
    fleet.change("DELETE FROM counters WHERE name = 'compatible_from'")
    assert "does not know" in fleet.command("worker").stderr


@pytest.mark.minutes
def test_tables_of_before_tell_whether_the_migration_needs_a_pause(
    postgres_url: str, tmp_path: Path, fleet: Processes
) -> None:
    for version, told in (
        (schema.COMPATIBLE_FROM, "processes that run may go on meanwhile"),
        ("0001", "end all processes of the release before first"),
    ):
        fleet.change(f"UPDATE alembic_version SET version_num = '{version}'")
        assert told in fleet.command("worker").stderr


# --- what is said of the migrations is true


COLUMNS = """
SELECT table_name || '.' || column_name, data_type, is_nullable = 'NO'
FROM information_schema.columns WHERE table_schema = 'exportd'
"""
FREE = """
SELECT table_name || '.' || column_name FROM information_schema.columns
WHERE table_schema = 'exportd' AND (is_nullable = 'YES' OR column_default IS NOT NULL)
"""
FUNCTIONS = """
SELECT oid::regprocedure::text, pg_get_function_result(oid) FROM pg_proc
WHERE pronamespace = 'exportd'::regnamespace
"""
RULES = """
SELECT conrelid::regclass::text || ': ' || pg_get_constraintdef(oid) FROM pg_constraint
WHERE connamespace = 'exportd'::regnamespace
UNION
SELECT tablename || ': ' || regexp_replace(indexdef, 'INDEX \\S+', 'INDEX')
FROM pg_indexes WHERE schemaname = 'exportd' AND indexdef LIKE 'CREATE UNIQUE%'
"""


class Shape:
    """What of the tables a release of before may lean on."""

    def __init__(self, url: str) -> None:
        with psycopg.connect(url, options="-c search_path=exportd") as peer:
            self.columns = {row[0]: row[1:] for row in peer.execute(COLUMNS).fetchall()}
            self.free = {row[0] for row in peer.execute(FREE).fetchall()}
            self.functions = set(peer.execute(FUNCTIONS).fetchall())
            self.rules = {str(row[0]) for row in peer.execute(RULES).fetchall()}
        self.tables = {name.partition(".")[0] for name in self.columns}

    def taken_by(self, later: Shape) -> list[str]:
        """What is not there any more, or must be given that nobody knew of."""
        return [
            *(
                name
                for name, what in self.columns.items()
                if later.columns.get(name) != what
            ),
            *(str(each) for each in self.functions - later.functions),
            *(
                name
                for name in later.columns.keys() - self.columns.keys() - later.free
                if name.partition(".")[0] in self.tables
            ),
            *(
                rule
                for rule in later.rules ^ self.rules
                if rule.partition(":")[0] in self.tables
            ),
        ]


def upgraded(url: str, version: str) -> Shape:
    """The tables as they are at a version."""
    engine = sa.create_engine(
        url.replace("postgresql:", "postgresql+psycopg:", 1),
        connect_args={"options": "-c search_path=exportd"},
    )
    config = schema._config()
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE SCHEMA IF NOT EXISTS exportd")
        config.attributes["connection"] = connection
        command.upgrade(config, version)
    engine.dispose()
    return Shape(url)


def test_migrations_that_are_said_to_be_compatible_only_add(postgres_url: str) -> None:
    before = upgraded(postgres_url, schema.COMPATIBLE_FROM)
    assert before.columns
    assert before.functions
    assert before.rules
    assert before.taken_by(upgraded(postgres_url, schema.HEAD)) == []


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE jobs DROP COLUMN priority",
        "ALTER TABLE jobs RENAME priority TO urgency",
        "ALTER TABLE jobs ALTER priority TYPE bigint",
        "ALTER TABLE jobs ADD needed int NOT NULL",
        "ALTER TABLE jobs ALTER start_time SET NOT NULL",
        "ALTER TABLE jobs ADD CHECK (priority > 3)",
        "CREATE UNIQUE INDEX one_of_each ON jobs (dataset)",
        "DROP TABLE pins",
        "DROP FUNCTION claim_delivery(bigint, text, bigint, int, text, text[])",
    ],
)
def test_a_migration_that_does_more_is_found(postgres_url: str, change: str) -> None:
    before = upgraded(postgres_url, schema.HEAD)
    with psycopg.connect(postgres_url, options="-c search_path=exportd") as peer:
        peer.execute(change.encode())
    assert before.taken_by(Shape(postgres_url))
