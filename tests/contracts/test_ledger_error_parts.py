"""Error parts in the ledger: each comes and goes with its output part."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from exportd_server.jobs.ledger import schema
from exportd_server.jobs.ledger.base import LeaseLost, Totals
from tests.support.ledger import BACKENDS, CLEANUP, Backend, World, errors, part


@pytest.fixture(params=list(BACKENDS.values()), ids=list(BACKENDS))
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    backend: Backend = request.param
    async with backend(tmp_path, request) as world:
        yield world


async def test_an_error_part_is_recorded_with_its_output_part(world: World) -> None:
    job, lease = await world.running()
    await world.ledger.add_part(lease, part(lease, 0))
    await world.ledger.add_part(lease, part(lease, 1), errors(lease, 1))
    assert await world.ledger.shard_parts(lease) == [
        part(lease, 0),
        errors(lease, 1),
        part(lease, 1),
    ]
    assert await world.ledger.finished_parts("acme", job.job_id) == [
        part(lease, 0),
        part(lease, 1),
    ], "what is downloaded as it is made is the output alone"
    await world.ledger.complete_shard(lease)
    done = await world.job(job)
    assert done.manifest is not None
    assert done.manifest.parts == (part(lease, 0), part(lease, 1))
    assert done.manifest.error_parts == (errors(lease, 1),)
    assert await world.ledger.finished_parts("acme", job.job_id) == [
        part(lease, 0),
        part(lease, 1),
    ]


async def test_recording_both_again_changes_nothing(world: World) -> None:
    _, lease = await world.running()
    await world.ledger.add_part(lease, part(lease, 0), errors(lease, 0))
    before = world.dump()
    await world.ledger.add_part(lease, part(lease, 0), errors(lease, 0))
    assert world.dump() == before
    for other in (None, errors(lease, 0, rows=4)):
        with pytest.raises(ValueError, match="not the next"):
            await world.ledger.add_part(lease, part(lease, 0), other)
    assert world.dump() == before


async def test_an_error_part_is_its_output_parts_or_refused(world: World) -> None:
    _, lease = await world.running()
    good = errors(lease)
    before = world.dump()
    for bad in (
        part(lease),
        replace(good, sequence=1),
        replace(good, shard=1),
        replace(good, token=lease.token + 1),
    ):
        with pytest.raises(ValueError, match="error part"):
            await world.ledger.add_part(lease, part(lease), bad)
    with pytest.raises(ValueError, match="error part"):
        await world.ledger.add_part(lease, good)
    assert world.dump() == before


async def test_a_lost_lease_records_neither(world: World) -> None:
    _, dead = await world.running()
    world.clock.advance(15)
    heir = await world.lease()
    before = world.dump()
    with pytest.raises(LeaseLost):
        await world.ledger.add_part(dead, part(dead), errors(dead))
    assert world.dump() == before
    await world.ledger.add_part(heir, part(heir), errors(heir))


async def test_who_takes_a_shard_over_learns_of_both(world: World) -> None:
    job, dead = await world.running(2)
    other = await world.lease()
    await world.ledger.add_part(dead, part(dead, 0), errors(dead, 0))
    await world.ledger.add_part(other, part(other, 0), errors(other, 0))
    await world.ledger.complete_shard(other)
    world.clock.advance(15)
    heir = await world.lease()
    assert await world.ledger.shard_parts(heir) == [errors(dead, 0), part(dead, 0)]
    await world.ledger.add_part(heir, part(heir, 1), errors(heir, 1))
    await world.ledger.complete_shard(heir)
    manifest = (await world.job(job)).manifest
    assert manifest is not None
    assert manifest.parts == (part(dead, 0), part(heir, 1), part(other, 0))
    assert manifest.error_parts == (errors(dead, 0), errors(heir, 1), errors(other, 0))


async def test_progress_counts_the_rows_left_out_and_their_bytes(world: World) -> None:
    job, one = await world.running(2)
    two = await world.lease()
    await world.ledger.record_progress(
        one, rows=5, bytes_=50, row_errors=1, rows_per_second=1
    )
    total = await world.ledger.record_progress(
        two, rows=7, bytes_=70, row_errors=2, rows_per_second=1
    )
    assert total == Totals(rows=12, bytes=120, row_errors=3)
    await world.ledger.add_part(one, part(one), errors(one))
    progress = (await world.job(job)).progress
    assert (progress.rows, progress.bytes, progress.row_errors) == (17, 210, 5)
    assert (progress.parts_done, progress.error_parts) == (1, 1)
    await world.ledger.complete_shard(one)
    await world.finish(two)
    progress = (await world.job(job)).progress
    assert (progress.rows, progress.bytes, progress.row_errors) == (20, 240, 3)
    assert (progress.parts_done, progress.parts_total, progress.error_parts) == (2, 2, 1)


async def test_a_restart_forgets_error_parts_too(world: World) -> None:
    job, lease = await world.running()
    await world.ledger.add_part(lease, part(lease), errors(lease))
    await world.ledger.restart_output(lease)
    progress = (await world.job(job)).progress
    assert (progress.rows, progress.row_errors, progress.error_parts) == (0, 0, 0)
    again = await world.plan(await world.lease())
    assert await world.ledger.shard_parts(again) == []


async def test_a_cleanup_leaves_the_error_parts_of_the_manifest(world: World) -> None:
    _, lease = await world.running()
    await world.ledger.add_part(lease, part(lease, 0), errors(lease, 0))
    await world.ledger.release(lease)
    again = await world.lease()
    await world.ledger.complete_shard(again)
    world.clock.advance(30)
    kept = await world.ledger.kept_parts(await world.lease(CLEANUP))
    assert kept is not None
    assert set(kept.parts) == {part(lease, 0), errors(lease, 0)}


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_parts_of_before_are_output_parts(
    database: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if database == "sqlite":
        url = f"sqlite:///{tmp_path / 'old.db'}"
    else:
        url = request.getfixturevalue("postgres_url").replace(
            "postgresql:", "postgresql+psycopg:", 1
        )
    engine = sa.create_engine(url)
    config = Config()
    config.set_main_option("script_location", str(schema.MIGRATIONS))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0003")
        connection.execute(
            sa.text(
                "INSERT INTO jobs (job_id, tenant, state, dataset, spec, priority, ttl, "
                "fingerprint, create_time, due_time, generation, revision, untidy, "
                "writers_until) VALUES ('j', 't', 'RUNNING', 'd', '{}', 0, 1, '', 1, 1, 1, "
                "1, 0, 0)"
            )
        )
        old = sa.text(
            "INSERT INTO parts VALUES ('j', 1, 0, 0, 7, 10, 100, 1, 2, 3, 4, 5, 6, :hash)"
        )
        connection.execute(old, {"hash": b"\x07" * 32})
    with engine.begin() as connection:
        schema.upgrade(connection, "the test's")
        rows = connection.execute(sa.text("SELECT * FROM parts")).all()
        assert [tuple(row) for row in rows] == [
            ("j", 1, 0, 0, 7, 10, 100, 1, 2, 3, 4, 5, 6, b"\x07" * 32, "output")
        ]
        beside = sa.text(
            "INSERT INTO parts SELECT job_id, generation, shard, sequence, token, rows, "
            "bytes, 0, 0, 0, 0, 0, 0, sha256, 'error' FROM parts"
        )
        connection.execute(beside)
    with engine.begin() as connection, pytest.raises(sa.exc.IntegrityError):
        connection.execute(beside)
    with engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM parts"))
    engine.dispose()
