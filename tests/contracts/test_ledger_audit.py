"""What an auditor may rely on of a ledger: records are kept, found, and forgotten late."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from exportd_server.jobs.audit import (
    AuditMethod,
    AuditOutcome,
    AuditQuery,
    AuditRecord,
    new_record_id,
)
from exportd_server.jobs.ledger.base import LeaseLost
from tests.support.ledger import BACKENDS, EXPORT, REAP, Backend, World

DAY = timedelta(days=1)
EVERYTHING = AuditQuery()


@pytest.fixture(params=list(BACKENDS.values()), ids=list(BACKENDS))
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    backend: Backend = request.param
    async with backend(tmp_path, request) as world:
        yield world


def record(world: World, **fields: Any) -> AuditRecord:
    """A record of now; only what matters to the test is given."""
    given: dict[str, Any] = {
        "record_id": new_record_id(),
        "time": world.clock.now(),
        "duration": timedelta(microseconds=1234),
        "method": AuditMethod.GET_DOWNLOAD_URLS,
        "outcome": AuditOutcome.SUCCEEDED,
        "code": "OK",
        "tenant": "acme",
        "subject": "key:a",
    }
    return AuditRecord(**(given | fields))


async def listed(world: World, query: AuditQuery = EVERYTHING) -> list[AuditRecord]:
    return await world.ledger.list_audit(query, limit=1000)


async def kept(world: World, *fields: dict[str, Any]) -> list[AuditRecord]:
    """Records, a second apart, the oldest first."""
    made = []
    for each in fields:
        world.clock.advance(1)
        made.append(record(world, **each))
    await world.ledger.append_audit(made)
    return made


async def test_a_record_comes_back_as_it_was_kept(world: World) -> None:
    plain = record(world)
    full = record(
        world,
        time=world.clock.now() + timedelta(microseconds=1),
        duration=timedelta(days=3),
        method=AuditMethod.STREAM_DOWNLOAD,
        outcome=AuditOutcome.BROKEN_OFF,
        code="RESOURCE_EXHAUSTED",
        reason="READER_STALLED",
        identity="certificate",
        subject="spiffe://example.com/ns/ä 'x' \"y\" ; --",
        peer="[::1]:65535",
        job_id="01890a5d-ac96-774b-bcce-b302099a8057",
        dataset="d",
        part=2**31,
        error_part=0,
        sinks=("a", 'b"', "…"),
        queue="webhook/q",
        delivery_id="x",
        key_id="k",
        validate_only=True,
        bytes_sent=2**62,
    )
    await world.ledger.append_audit([plain, full])
    assert await listed(world) == [full, plain]


async def test_nothing_and_the_same_again_change_nothing(world: World) -> None:
    await world.ledger.append_audit([])
    one, two = record(world), record(world)
    await world.ledger.append_audit([one])
    await world.ledger.append_audit([replace(one, tenant="other"), two, two])
    assert await listed(world) == [two, one]


async def test_many_records_are_kept_at_once(world: World) -> None:
    many = [record(world, part=number) for number in range(700)]
    await world.ledger.append_audit(many)
    assert await listed(world) == many[::-1]


async def test_pages_go_from_the_newest_to_the_oldest_without_a_gap(world: World) -> None:
    made = await kept(world, *[{}] * 3)
    # Several of one moment, in the order of their ids.
    made += sorted(
        (record(world, time=made[-1].time) for _ in range(4)),
        key=lambda each: each.record_id,
    )
    await world.ledger.append_audit(made)
    pages, before = [], None
    while page := await world.ledger.list_audit(EVERYTHING, limit=2, before=before):
        pages.append(page)
        before = (page[-1].time, page[-1].record_id)
    assert [each for page in pages for each in page] == made[::-1]
    assert [len(page) for page in pages] == [2, 2, 2, 1]


async def test_every_condition_holds_and_all_of_them_together(world: World) -> None:
    job = "01890a5d-ac96-774b-bcce-b302099a8057"
    first, second, third = await kept(
        world,
        {"tenant": "acme", "subject": "key:a", "job_id": job},
        {"tenant": "globex", "subject": "key:a", "method": AuditMethod.DELETE_JOB},
        {"tenant": "acme", "subject": "key:b", "outcome": AuditOutcome.FAILED},
    )
    cases = {
        AuditQuery(tenant="acme"): [third, first],
        AuditQuery(subject="key:a"): [second, first],
        AuditQuery(job_id=job): [first],
        AuditQuery(methods=frozenset({AuditMethod.DELETE_JOB})): [second],
        AuditQuery(methods=frozenset(AuditMethod)): [third, second, first],
        AuditQuery(outcomes=frozenset({AuditOutcome.FAILED})): [third],
        AuditQuery(from_time=second.time): [third, second],
        AuditQuery(before_time=second.time): [first],
        AuditQuery(from_time=second.time, before_time=third.time): [second],
        AuditQuery(tenant="acme", subject="key:a"): [first],
        AuditQuery(tenant="globex", job_id=job): [],
        AuditQuery(tenant="acm"): [],
        AuditQuery(tenant="acme' OR '1'='1"): [],
    }
    for query, expected in cases.items():
        assert await listed(world, query) == expected, query


async def test_records_outlive_the_jobs_that_they_are_about(world: World) -> None:
    job = await world.succeeded()
    [made] = await kept(world, {"job_id": job.job_id})
    await world.ledger.delete_job("acme", job.job_id)
    await world.work_off()
    assert await world.ledger.known_jobs([job.job_id]) == set()
    assert await listed(world) == [made]


async def test_records_are_forgotten_after_their_time_the_oldest_first(
    world: World,
) -> None:
    made = await kept(world, *[{}] * 5)
    lease = await world.lease(REAP)
    ledger = world.ledger
    # The first two are just older than a day.
    world.clock.time = made[2].time + DAY
    assert await ledger.forget_audit(lease, keep=DAY, limit=1) == 1
    assert await listed(world) == made[:0:-1]
    assert await ledger.forget_audit(lease, keep=DAY, limit=100) == 1
    assert await listed(world) == made[:1:-1]
    assert await ledger.forget_audit(lease, keep=DAY, limit=100) == 0
    assert await ledger.forget_audit(lease, keep=timedelta(0), limit=100) == 3
    assert await listed(world) == []


async def test_only_the_reaper_forgets_and_only_while_it_holds_its_lease(
    world: World,
) -> None:
    made = await kept(world, {})
    stale = await world.lease(REAP)
    world.clock.advance(60)
    await world.lease(REAP, owner="another")
    await world.create()
    for lease in (stale, await world.lease(EXPORT)):
        with pytest.raises((LeaseLost, ValueError)):
            await world.ledger.forget_audit(lease, keep=timedelta(0), limit=100)
    assert await listed(world) == made
