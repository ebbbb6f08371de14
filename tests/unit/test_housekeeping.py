"""Cleaning up leaves what must stay, and does not get in the way of downloads."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from unittest.mock import AsyncMock

import pytest

from exportd_server.jobs.housekeeping import Housekeeping, manifest_key
from exportd_server.jobs.ledger.base import Kept, Lease, TaskKind
from exportd_server.store.key import JobPrefix
from exportd_server.store.memory import MemoryStore
from tests.support.store import part_key, put

JOB = "01890a5d-ac96-774b-bcce-b302099a8057"
PREFIX = JobPrefix("acme", JOB)


def lease(*, forget: bool = False) -> Lease:
    now = datetime(2026, 1, 2, tzinfo=UTC)
    return Lease(
        1, TaskKind.CLEANUP, 7, "w", now, 1, tenant="acme", job_id=JOB, forget=forget
    )


def housekeeping(ledger: AsyncMock, store: AsyncMock | MemoryStore) -> Housekeeping:
    return Housekeeping(ledger, store, reap_interval=timedelta(seconds=300))


@pytest.mark.parametrize("forget", [False, True])
async def test_output_that_is_being_downloaded_is_deleted_only_after(
    *, forget: bool
) -> None:
    """A job that has expired may have an earlier cleanup waiting, for a late writer."""
    ledger, store = AsyncMock(), AsyncMock()
    store.delete_job.return_value = 0
    ledger.kept_parts.return_value = Kept(read=True)
    cleanup = lease(forget=forget)
    await housekeeping(ledger, store).cleanup(cleanup)
    store.delete_job.assert_not_awaited()
    ledger.complete_cleanup.assert_not_awaited()
    ledger.fail_attempt.assert_awaited_once()
    ledger.kept_parts.return_value = None
    await housekeeping(ledger, store).cleanup(cleanup)
    store.delete_job.assert_awaited_once()
    ledger.complete_cleanup.assert_awaited_once_with(cleanup)


async def test_of_several_manifests_the_one_that_was_published_stays() -> None:
    ledger, store = AsyncMock(), MemoryStore()
    ledger.kept_parts.return_value = Kept(manifest=7)
    for key in (manifest_key(PREFIX, 6), manifest_key(PREFIX, 7), part_key(PREFIX)):
        put(store, key, b"data")
    await housekeeping(ledger, store).cleanup(lease())
    assert [key async for key in store.list_job(PREFIX)] == [manifest_key(PREFIX, 7)]


@pytest.mark.parametrize("jobs", [0, 1, 49, 50, 51, 150])
async def test_however_many_have_expired_all_are_hidden_and_few_at_a_time(
    jobs: int,
) -> None:
    ledger, left = AsyncMock(), jobs

    async def expire(_lease: Lease, *, limit: int) -> int:
        nonlocal left
        assert limit <= 50
        done = min(limit, left)
        left -= done
        return done

    ledger.expire_jobs.side_effect = expire
    ledger.forget_audit.return_value = 0
    await housekeeping(ledger, AsyncMock()).reap(lease())
    assert left == 0
    ledger.complete_reap.assert_awaited_once()


@pytest.mark.parametrize("records", [0, 1, 199, 200, 201, 700])
async def test_audit_records_are_forgotten_few_at_a_time_before_the_round_ends(
    records: int,
) -> None:
    ledger, left = AsyncMock(), records

    async def forget(_lease: Lease, *, keep: timedelta, limit: int) -> int:
        nonlocal left
        assert keep == timedelta(days=7)
        assert limit <= 200
        ledger.complete_reap.assert_not_awaited()
        done = min(limit, left)
        left -= done
        return done

    ledger.expire_jobs.return_value = 0
    ledger.forget_audit.side_effect = forget
    house = Housekeeping(
        ledger,
        AsyncMock(),
        reap_interval=timedelta(seconds=300),
        keep_audit=timedelta(days=7),
    )
    await house.reap(lease())
    assert left == 0
    ledger.complete_reap.assert_awaited_once()
