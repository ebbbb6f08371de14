"""What an operator may rely on of a ledger: it tells who holds which lease."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from exportd_server.jobs.ledger.base import HeldLease, TaskKind
from tests.support.ledger import BACKENDS, LEASE, REAP, Backend, World


@pytest.fixture(params=list(BACKENDS.values()), ids=list(BACKENDS))
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    backend: Backend = request.param
    async with backend(tmp_path, request) as world:
        yield world


async def listed(world: World) -> list[HeldLease]:
    return await world.ledger.list_leases(limit=1000)


async def test_a_lease_is_listed_for_as_long_as_it_is_held(world: World) -> None:
    assert await listed(world) == []
    job = await world.create("acme")
    assert await listed(world) == []
    lease = await world.lease(owner="one")
    (held,) = await listed(world)
    assert held == HeldLease(
        task_id=lease.task_id,
        kind=TaskKind.PLAN,
        owner="one",
        tenant="acme",
        job_id=job.job_id,
        attempt=1,
        expires_at=lease.expires_at,
        expired=False,
    )
    shard = await world.plan(lease)
    (held,) = await listed(world)
    assert (held.kind, held.owner) == (TaskKind.SHARD, "one")
    await world.finish(shard)
    assert await listed(world) == []


async def test_a_lease_that_ran_out_says_so_until_somebody_takes_it_over(
    world: World,
) -> None:
    await world.create()
    await world.lease(owner="one")
    world.clock.advance(LEASE.total_seconds())
    (held,) = await listed(world)
    assert (held.owner, held.attempt, held.expired) == ("one", 1, True)
    await world.lease(owner="two")
    (held,) = await listed(world)
    assert (held.owner, held.attempt, held.expired) == ("two", 2, False)


async def test_leases_of_every_tenant_come_by_worker_and_in_pages(world: World) -> None:
    for tenant in ("a", "b", "c"):
        await world.create(tenant)
    for owner in ("two", "one", "two"):
        await world.lease(owner=owner)
    await world.lease(REAP, owner="three")
    everything = await listed(world)
    assert [held.owner for held in everything] == ["one", "three", "two", "two"]
    assert {held.tenant for held in everything} >= {"a", "b", "c"}
    (reap,) = (held for held in everything if held.kind is TaskKind.REAP)
    assert reap.job_id == ""
    paged: list[HeldLease] = []
    after = None
    while found := await world.ledger.list_leases(limit=1, after=after):
        paged += found
        after = found[-1].owner, found[-1].task_id
    assert paged == everything
