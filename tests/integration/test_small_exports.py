"""What a small export asks of the ledger, counted without a clock: each question is a
thread's turn, and with PostgreSQL a round trip or more."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any, cast

from exportd_server.jobs.ledger.sql import SqlLedger
from exportd_server.jobs.manager import JobManager, Policy
from exportd_server.jobs.model import JobState
from exportd_server.jobs.readers import Readers
from tests.support.fleet import TENANT, fleet_in
from tests.support.gate import GateSource
from tests.support.samples import catalogue_of
from tests.support.sinks import no_sinks
from tests.support.waits import ENOUGH


def counted(ledger: SqlLedger) -> Counter[str]:
    """What the ledger is asked from now on, by name."""
    asked: Counter[str] = Counter()
    database = cast("Any", ledger._database)

    def noting(call: Any) -> Any:
        async def noted(work: Any, **options: Any) -> Any:
            asked[work.__qualname__.split(".")[1]] += 1
            return await call(work, **options)

        return noted

    def here(work: Any) -> Any:
        asked[work.__qualname__.split(".")[1]] += 1
        return read_here(work)

    for name in ("read", "write", "write_apart"):
        setattr(database, name, noting(getattr(database, name)))
    read_here, database.read_here = database.read_here, here
    return asked


async def test_an_export_of_one_part_asks_the_ledger_only_what_it_must(
    tmp_path: Path, gate: GateSource
) -> None:
    gate.open_wide()
    # So long a lease that the clock renews none meanwhile.
    async with fleet_in(tmp_path) as fleet, fleet.worker(gate, lease=10 * ENOUGH):
        asked = counted(cast("SqlLedger", fleet.ledger))
        job = await fleet.create(max_part_rows=None)
        manager = JobManager(
            fleet.ledger,
            catalogue_of(gated=gate),
            Policy(),
            Readers(fleet.ledger),
            no_sinks(),
        )
        async with asyncio.timeout(ENOUGH):
            seen = [now.state async for now in manager.watch(TENANT, job.job_id)]
        assert seen[-1] is JobState.SUCCEEDED
    work = {
        name: asked[name]
        for name in (
            "create_job",
            "record_plan",
            "add_part",
            "add_last_part",
            "complete_unless_last",
            "complete_shard",
            "complete_only_shard",
            "renew",
            "wait_for_change",
        )
    }
    assert work == {
        "create_job": 1,
        "record_plan": 1,
        "add_part": 0,
        "add_last_part": 0,
        "complete_unless_last": 0,
        "complete_shard": 0,
        "complete_only_shard": 1,
        # Its own end is no news to it, and whoever watches is told.
        "renew": 0,
        "wait_for_change": 0,
    }
    # The worker looks at the job once, the watcher at each change; and in a thread only
    # while the job has a place in the queue.
    assert len(seen) <= asked["get_job"] <= len(seen) + 1
    assert asked["_get_jobs"] <= seen.count(JobState.PENDING) + 1
