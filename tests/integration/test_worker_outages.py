"""A ledger that is out of reach costs an export time and nothing else."""

from __future__ import annotations

import asyncio
import re
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from exportd_server.errors import SourceFailed, StoreFailed
from exportd_server.jobs.manifest import store_manifest
from exportd_server.jobs.model import JobState
from exportd_server.platform import metrics_exports
from exportd_server.sources.base import SourceChanged
from tests.support.faults import Faults
from tests.support.fleet import TENANT, Fleet, fleet_in
from tests.support.gate import BATCH_ROWS, GateSource, GateStream
from tests.support.server import until

LEASE = 0.6
"""Seconds: short, because a lease that nobody knows of is waited for."""


class EventfulSource(GateSource):
    """Breaks off in the middle, then changes in the middle, then goes through, once the
    worker has told of its progress: it has to say everything there is to say to the
    ledger."""

    def __init__(self, faults: Faults, *events: type[Exception]) -> None:
        super().__init__(wide=True)
        self._faults = faults
        self._events = [event() for event in events or (SourceFailed, SourceChanged)]
        self._turns: dict[GateStream, int] = {}

    def wait_for_turn(self, stream: GateStream) -> None:
        turn = self._turns[stream] = self._turns.get(stream, 0) + 1
        if turn == 3 and self._events:
            raise self._events.pop(0)
        while "record_progress" in self._faults.pending and turn == 3:
            if stream.cancelled:
                break
            time.sleep(0.001)
        super().wait_for_turn(stream)


async def right_and_once(
    fleet: Fleet, source: GateSource, faults: Faults, **what: Any
) -> None:
    """Export, and find every row once and in order."""
    job = await fleet.create(**what)
    async with fleet.worker(
        source, ledger=faults.ledger, lease=LEASE, poll=0.2, progress_interval=0.02
    ):
        done = await fleet.finished(job)
        assert done.state is JobState.SUCCEEDED
        await until(lambda: not faults.pending)
        assert [row["id"] for row in await fleet.rows(job)] == list(range(10 * BATCH_ROWS))
    after = await fleet.job(job)
    assert (after.revision, after.manifest) == (done.revision, done.manifest)


CALLS = (
    "claim",
    "get_job",
    "shard_parts",
    "record_plan",
    "record_progress",
    "add_part",
    "complete_unless_last",
    "complete_shard",
    "fail_attempt",
    "restart_output",
    "expire_jobs",
    "complete_reap",
    "wait_for_work",
)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("method", CALLS)
async def test_a_call_whose_answer_is_lost_leaves_the_output_right(
    tmp_path: Path, method: str, *, after: bool
) -> None:
    async with fleet_in(tmp_path, max_rows=10**9) as fleet:
        faults = Faults(fleet.ledger)
        faults.fail(method, 1 if after else 3, after=after)
        source = EventfulSource(faults)
        await right_and_once(fleet, source, faults)
        assert source.opened >= 3


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("method", "events"),
    [
        # Who plans a job knows that there is no other shard; who resumes one does not.
        ("complete_only_shard", (SourceFailed, SourceChanged)),
        ("add_last_part", (SourceChanged, SourceFailed)),
    ],
    ids=["planned", "resumed"],
)
async def test_the_last_part_whose_answer_is_lost_is_there_once(
    tmp_path: Path, method: str, events: tuple[type[Exception], ...], *, after: bool
) -> None:
    async with fleet_in(tmp_path, max_rows=10**9) as fleet:
        faults = Faults(fleet.ledger)
        faults.fail(method, 1 if after else 3, after=after)
        # Three batches are not ten: more is to come when the rows are at an end.
        await right_and_once(
            fleet, EventfulSource(faults, *events), faults, max_part_rows=3 * BATCH_ROWS
        )


async def test_every_call_may_fail_at_once(tmp_path: Path) -> None:
    async with fleet_in(tmp_path, max_rows=10**9) as fleet:
        faults = Faults(fleet.ledger)
        for method in CALLS:
            faults.fail(method, after=False)
            faults.fail(method, after=True)
        await right_and_once(fleet, EventfulSource(faults), faults)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("method", ["kept_parts", "complete_cleanup"])
async def test_a_cleanup_whose_answer_is_lost_is_done_all_the_same(
    tmp_path: Path, gate: GateSource, method: str, *, after: bool
) -> None:
    async with fleet_in(tmp_path) as fleet:
        faults = Faults(fleet.ledger)
        faults.fail(method, after=after)
        job = await fleet.create()
        async with fleet.worker(gate, ledger=faults.ledger, lease=LEASE):
            gate.allow(3)
            await fleet.parts(job, 3)
            await fleet.ledger.cancel_job(TENANT, job.job_id)
            await fleet.tidied(job)
            await until(lambda: not faults.pending)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_a_lease_is_given_back_although_the_first_try_is_lost(
    tmp_path: Path, gate: GateSource, *, after: bool
) -> None:
    async with fleet_in(tmp_path) as fleet:
        faults = Faults(fleet.ledger)
        faults.fail("release", after=after)
        job = await fleet.create()
        async with fleet.worker(gate, ledger=faults.ledger, grace=0.1):
            gate.allow(3)
            await fleet.parts(job, 3)
        assert not faults.pending
        assert (await fleet.job(job)).state is JobState.PENDING
        gate.open_wide()
        async with fleet.worker(gate):
            done = await fleet.finished(job)
        assert done.attempt == 1
        assert gate.skipped == [0, 3 * BATCH_ROWS]


async def test_an_outage_longer_than_the_lease_is_sat_out_in_the_middle_of_an_export(
    tmp_path: Path, gate: GateSource
) -> None:
    """When the ledger is back, the lease has run out, and the first to claim would have
    the job: the worker renews before it claims."""
    async with fleet_in(tmp_path) as fleet:
        faults = Faults(fleet.ledger)
        job = await fleet.create()
        async with fleet.worker(gate, ledger=faults.ledger, lease=LEASE, poll=0.05):
            gate.allow(3)
            await fleet.parts(job, 3)
            faults.cut_off.add("renew")
            faults.out_of_reach = True
            gate.allow(2)
            added, renewed = faults.calls["add_part"], faults.calls["renew"]
            await until(lambda: faults.calls["add_part"] > added + 3)
            await until(lambda: faults.calls["renew"] > renewed + 3)
            await asyncio.sleep(2 * LEASE)
            faults.log.clear()
            faults.out_of_reach = False
            # Claims alone would go through now, and none is made before a renewal is.
            await until(lambda: "renew" in faults.log and "add_part" in faults.log)
            await asyncio.sleep(LEASE)
            assert "claim" not in faults.log
            faults.cut_off.clear()
            gate.open_wide()
            done = await fleet.finished(job)
        assert (done.state, done.attempt) == (JobState.SUCCEEDED, 1)
        assert gate.opened == 1
        assert [row["id"] for row in await fleet.rows(job)] == list(range(10 * BATCH_ROWS))


async def test_an_outage_is_told_once_and_not_at_every_try(
    tmp_path: Path, gate: GateSource, capfd: pytest.CaptureFixture[str]
) -> None:
    async with fleet_in(tmp_path) as fleet:
        faults = Faults(fleet.ledger)
        job = await fleet.create()
        async with fleet.worker(
            gate, ledger=faults.ledger, lease=LEASE, progress_interval=0.02
        ):
            gate.allow(1)
            await fleet.parts(job, 1)
            faults.cut_off |= {"record_progress", "renew"}
            faults.calls.clear()
            await until(lambda: min(faults.calls[m] for m in faults.cut_off) > 5)
            # Before it ends: on a machine that is busy there may be another one after.
            # One before it has ended, which is told as well.
            out = capfd.readouterr().out
            faults.cut_off.clear()
            gate.open_wide()
            await fleet.finished(job)
    assert out.count("progress could not be recorded") == 1
    told = re.findall("leases (could not be renewed|are renewed again)", out)
    assert told[-1] == "could not be renewed"
    assert all(one != other for one, other in pairwise(told))
    out += capfd.readouterr().out
    assert "Traceback" not in out


def counted_rows() -> float:
    """Rows that exports of this process have been counted with."""
    samples = [sample for one in metrics_exports.rows.collect() for sample in one.samples]
    return sum(one.value for one in samples if one.name.endswith("_total"))


async def test_a_job_whose_end_got_no_answer_is_counted_once(tmp_path: Path) -> None:
    async with fleet_in(tmp_path, max_rows=10**9) as fleet:
        faults = Faults(fleet.ledger)
        faults.fail("complete_only_shard", after=True)
        before = counted_rows()
        job = await fleet.create(max_part_rows=10**6)
        async with fleet.worker(GateSource(10, wide=True), ledger=faults.ledger):
            done = await fleet.finished(job)
        assert done.state is JobState.SUCCEEDED
        assert not faults.pending
        assert counted_rows() - before == 10 * BATCH_ROWS


async def test_the_part_of_a_job_whose_manifest_fails_is_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [StoreFailed(), StoreFailed()]

    def fails(*arguments: Any) -> None:
        if failures:
            raise failures.pop()
        store_manifest(*arguments)

    monkeypatch.setattr("exportd_server.jobs.exporting.store_manifest", fails)
    async with fleet_in(tmp_path, max_rows=10**9) as fleet:
        before = counted_rows()
        job = await fleet.create(max_part_rows=10**6)
        async with fleet.worker(GateSource(10, wide=True)):
            done = await fleet.finished(job)
        assert (done.state, done.attempt) == (JobState.SUCCEEDED, 3)
        assert done.manifest is not None
        assert [part.rows for part in done.manifest.parts] == [10 * BATCH_ROWS]
        assert counted_rows() - before == 10 * BATCH_ROWS
