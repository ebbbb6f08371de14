"""Cleaning up and downloads do not get in each other's way."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from unittest.mock import AsyncMock

import pytest

from exportd_server.jobs.housekeeping import Housekeeping
from exportd_server.jobs.ledger.base import Lease, TaskKind
from exportd_server.jobs.readers import Readers

JOB = "01890a5d-ac96-774b-bcce-b302099a8057"


def cleanup(*, forget: bool) -> Lease:
    now = datetime(2026, 1, 2, tzinfo=UTC)
    return Lease(
        1, TaskKind.CLEANUP, 7, "w", now, 1, tenant="acme", job_id=JOB, forget=forget
    )


@pytest.mark.parametrize("forget", [False, True])
async def test_output_that_is_being_downloaded_is_deleted_only_after(
    *, forget: bool
) -> None:
    """A job that has expired may have an earlier cleanup waiting, for a late writer."""
    ledger, store, readers = AsyncMock(), AsyncMock(), Readers()
    ledger.kept_parts.return_value = None
    store.delete_job.return_value = 0
    housekeeping = Housekeeping(
        ledger, store, readers, reap_interval=timedelta(seconds=300)
    )
    lease = cleanup(forget=forget)
    with readers.reading(JOB):
        await housekeeping.cleanup(lease)
        store.delete_job.assert_not_awaited()
        ledger.complete_cleanup.assert_not_awaited()
        ledger.fail_attempt.assert_awaited_once()
    await housekeeping.cleanup(lease)
    store.delete_job.assert_awaited_once()
    ledger.complete_cleanup.assert_awaited_once_with(lease)


async def test_a_cut_download_does_not_hold_up_the_deletion() -> None:
    ledger, store, readers = AsyncMock(), AsyncMock(), Readers()
    ledger.kept_parts.return_value = None
    store.delete_job.return_value = 1
    housekeeping = Housekeeping(
        ledger, store, readers, reap_interval=timedelta(seconds=300)
    )
    with readers.reading(JOB):
        readers.cut(JOB)
        await housekeeping.cleanup(cleanup(forget=False))
    store.delete_job.assert_awaited_once()
