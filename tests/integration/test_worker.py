"""Workers on one ledger: claiming, leases, fences, anchors, and the end of a worker."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from exportd_server.jobs import caps
from exportd_server.jobs.ledger.base import TaskKind
from exportd_server.jobs.ledger.sql import SqlLedger
from exportd_server.jobs.model import JobState
from exportd_server.sources.base import Plan, Query, Shard, SourceChanged
from tests.support.faults import Faults
from tests.support.fleet import TENANT, fleet_in
from tests.support.gate import BATCH_ROWS, GateSource, GateStream
from tests.support.server import until
from tests.support.waits import ENOUGH

IDS = list(range(10 * BATCH_ROWS))


# --- claiming


async def test_news_of_work_is_answered_by_one_claim_of_a_process_and_not_of_each_slot(
    tmp_path: Path, gate: GateSource
) -> None:
    async with fleet_in(tmp_path) as fleet:
        faults = Faults(fleet.ledger)
        async with fleet.worker(gate, ledger=faults.ledger, concurrency=16, poll=600.0):
            await until(lambda: faults.log[-1:] == ["wait_for_work"])
            await asyncio.sleep(0.1)
            faults.calls.clear()
            job = await fleet.create()
            gate.allow(1)
            await fleet.parts(job, 1)
            # The claim that finds the job, and the one that finds no other.
            assert faults.calls["claim"] <= 3
            gate.open_wide()
            await fleet.finished(job)


async def test_as_many_exports_run_at_a_time_as_there_are_slots(
    tmp_path: Path, gate: GateSource
) -> None:
    async with fleet_in(tmp_path) as fleet:
        jobs = [await fleet.create() for _ in range(5)]
        async with fleet.worker(gate, concurrency=2):
            await until(lambda: gate.opened == 2)
            await asyncio.sleep(0.2)
            states = [(await fleet.job(job)).state for job in jobs]
            assert states.count(JobState.RUNNING) == 2
            # Full slots for exports leave housekeeping its own.
            await fleet.ledger.cancel_job(TENANT, jobs[4].job_id)
            await fleet.tidied(jobs[4])
            gate.open_wide()
            for job in jobs[:4]:
                assert (await fleet.finished(job)).state is JobState.SUCCEEDED
        assert gate.opened == 4


# --- leases


def until_renewed(path: Path, beyond: float) -> None:
    """Block this thread until the lease of an export lasts for so many seconds more."""
    query = "SELECT lease_expires FROM tasks WHERE kind = ? AND owner <> ''"
    deadline = time.monotonic() + ENOUGH
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as ledger:
        ((first,),) = ledger.execute(query, (TaskKind.SHARD.value,))
        while True:
            ((now,),) = ledger.execute(query, (TaskKind.SHARD.value,))
            if now >= first + beyond * 1e6:
                return
            assert time.monotonic() < deadline
            time.sleep(0.02)


async def test_a_busy_event_loop_loses_no_lease(tmp_path: Path, gate: GateSource) -> None:
    async with fleet_in(tmp_path) as fleet:
        job = await fleet.create()
        async with fleet.worker(gate, lease=1.5):
            gate.allow(1)
            await fleet.parts(job, 1)
            # The loop is blocked meanwhile, for longer than a lease lasts.
            until_renewed(fleet.path, beyond=3.0)
            gate.open_wide()
            done = await fleet.finished(job)
        assert (done.state, done.attempt) == (JobState.SUCCEEDED, 1)


async def test_a_worker_that_fell_silent_is_taken_over_and_can_add_nothing(
    tmp_path: Path,
) -> None:
    """It goes on writing, and never hears from the ledger until it wants to record a
    part."""
    silent_gate, gate = GateSource(), GateSource(wide=True)
    async with fleet_in(tmp_path) as fleet:
        faults = Faults(fleet.ledger)
        faults.cut_off.add("fence")
        job = await fleet.create()
        async with fleet.worker(
            silent_gate, ledger=faults.ledger, lease=2.0, poll=60.0, progress_interval=60
        ):
            silent_gate.allow(3)
            await fleet.parts(job, 3)
            faults.cut_off |= {"renew", "claim"}
            async with fleet.worker(gate, lease=2.0, poll=0.1):
                done = await fleet.finished(job)
                added = faults.calls["add_part"]
                silent_gate.open_wide()
                await until(lambda: faults.calls["add_part"] > added)
        assert (done.state, done.attempt) == (JobState.SUCCEEDED, 2)
        assert gate.skipped == [3 * BATCH_ROWS]
        assert [row["id"] for row in await fleet.rows(job)] == IDS
        after = await fleet.job(job)
        assert (after.revision, after.manifest) == (done.revision, done.manifest)


async def test_a_lost_lease_stops_the_run_from_the_keepers_own_thread(
    tmp_path: Path, gate: GateSource
) -> None:
    """The main loop is blocked when the ledger says that the lease is lost."""
    async with fleet_in(tmp_path) as fleet:
        job = await fleet.create()
        async with fleet.worker(gate, lease=0.6, progress_interval=60):
            gate.allow(1)
            await fleet.parts(job, 1)
            connection = sqlite3.connect(fleet.path)
            connection.execute("UPDATE tasks SET token = token + 1000 WHERE owner <> ''")
            connection.commit()
            connection.close()
            with gate.changed:  # the loop is blocked by this
                assert gate.changed.wait_for(lambda: gate.cancelled, ENOUGH)


# --- the fence


class SlowPlan(GateSource):
    """Plans only when it is told to."""

    def __init__(self) -> None:
        super().__init__(wide=True)
        self.planning = threading.Event()
        self.go_on = threading.Event()

    def plan(self, query: Query, *, shard_rows: int | None = None) -> Plan:
        self.planning.set()
        assert self.go_on.wait(ENOUGH)
        return super().plan(query, shard_rows=shard_rows)


async def test_a_cancelled_export_stops_at_once_and_not_at_its_next_report(
    tmp_path: Path, gate: GateSource
) -> None:
    async with fleet_in(tmp_path) as fleet:
        job = await fleet.create()
        async with fleet.worker(gate, progress_interval=600, lease=3600.0):
            gate.allow(1)
            await fleet.parts(job, 1)
            await fleet.ledger.cancel_job(TENANT, job.job_id)
            await until(lambda: gate.cancelled)


async def test_a_fence_that_means_nothing_stops_nothing(
    tmp_path: Path, gate: GateSource
) -> None:
    """It may be set because news was missed, and then the ledger is asked."""
    async with fleet_in(tmp_path) as fleet:
        job = await fleet.create()
        faults = Faults(fleet.ledger)
        async with fleet.worker(
            gate, ledger=faults.ledger, progress_interval=600, lease=3600.0
        ):
            gate.allow(1)
            await fleet.parts(job, 1)
            assert isinstance(fleet.ledger, SqlLedger)
            for _ in range(3):
                faults.calls.clear()
                fleet.ledger._database.signals.fenced([job.job_id])
                await until(lambda: faults.calls["renew"])
            assert not gate.cancelled
            await fleet.ledger.cancel_job(TENANT, job.job_id)
            await until(lambda: gate.cancelled)


async def test_a_job_cancelled_while_its_source_plans_frees_its_slot_at_once(
    tmp_path: Path,
) -> None:
    async with fleet_in(tmp_path) as fleet:
        slow = SlowPlan()
        job = await fleet.create()
        async with fleet.worker(slow, concurrency=1):
            await asyncio.to_thread(slow.planning.wait, ENOUGH)
            slow.planning.clear()
            await fleet.ledger.cancel_job(TENANT, job.job_id)
            other = await fleet.create()
            # The next one is being planned while the first plan still is.
            assert await asyncio.to_thread(slow.planning.wait, ENOUGH)
            slow.go_on.set()
            assert (await fleet.finished(other)).state is JobState.SUCCEEDED


# --- anchors


@dataclass
class FakeAnchor:
    state: int
    closed: threading.Event = field(default_factory=threading.Event)

    def close(self) -> None:
        self.closed.set()


class AnchoredSource(GateSource):
    """Two shards of one state of the data, readable for as long as the anchor is held.
    Each plan sees a newer state, which each row tells."""

    def __init__(self, *, wide: bool = False) -> None:
        super().__init__(wide=wide)
        self.anchors: list[FakeAnchor] = []
        self.asked: list[int | None] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def plan(self, query: Query, *, shard_rows: int | None = None) -> Plan:
        self.asked.append(shard_rows)
        assert self.go_on.wait(ENOUGH)
        anchor = FakeAnchor(len(self.anchors))
        self.anchors.append(anchor)
        state = f'{{"anchor": {anchor.state}}}'
        return Plan((Shard(0, state), Shard(1, state)), None, anchor)

    def open(self, query: Query, shard: Shard, *, skip_rows: int = 0) -> GateStream:
        number = int(shard.state.split(":")[1].strip(" }"))
        if self.anchors[number].closed.is_set():
            raise SourceChanged
        return super().open(query, shard, skip_rows=skip_rows)


async def test_an_anchor_is_held_until_the_last_shard_is_done_and_then_closed(
    tmp_path: Path,
) -> None:
    source = AnchoredSource()
    async with fleet_in(tmp_path) as fleet:
        job = await fleet.create()
        async with fleet.worker(source, concurrency=1, shard_rows=12_345):
            source.allow(10)
            await fleet.parts(job, 10)
            await until(lambda: source.opened == 2)
            (anchor,) = source.anchors
            assert not anchor.closed.is_set()
            source.open_wide()
            done = await fleet.finished(job)
            await until(anchor.closed.is_set)
        assert done.generation == 1
        assert source.asked == [12_345]
        assert [row["id"] for row in await fleet.rows(job)] == IDS + IDS


async def test_a_job_whose_anchor_died_begins_anew_and_mixes_no_states(
    tmp_path: Path,
) -> None:
    """The holder's process dies while the first shard is read; others go on."""
    source = AnchoredSource()
    async with fleet_in(tmp_path) as fleet:
        job = await fleet.create()
        async with fleet.worker(source, concurrency=1):
            source.allow(5)
            await fleet.parts(job, 5)
            source.anchors[0].close()
            source.open_wide()
            done = await fleet.finished(job)
            assert (done.state, done.generation) == (JobState.SUCCEEDED, 2)
            assert len(source.anchors) == 2
            await until(source.anchors[1].closed.is_set)
        assert [row["id"] for row in await fleet.rows(job)] == IDS + IDS
        assert done.manifest is not None
        # Every part was written after the new plan.
        tokens = {part.token for part in done.manifest.parts}
        assert len(done.manifest.parts) == 20
        assert len(tokens) == 2


async def test_a_worker_that_ends_first_leaves_the_others_its_anchor_within_its_grace(
    tmp_path: Path,
) -> None:
    source, other = AnchoredSource(), AnchoredSource()
    async with fleet_in(tmp_path) as fleet:
        job = await fleet.create()
        async with fleet.worker(source, concurrency=1, grace=ENOUGH):
            source.allow(1)
            await fleet.parts(job, 1)
            other.anchors = source.anchors
            stack = fleet.worker(other, concurrency=1)
            await stack.__aenter__()
            await until(lambda: other.opened == 1)
            # The planner's own shard ends; the other one's goes on while it drains.
            source.open_wide()
            threading.Timer(0.7, other.open_wide).start()
        done = await fleet.finished(job)
        await stack.__aexit__(None, None, None)
        assert (done.state, done.generation) == (JobState.SUCCEEDED, 1)
        assert source.anchors[0].closed.is_set()
        assert [row["id"] for row in await fleet.rows(job)] == IDS + IDS


async def test_an_anchor_is_closed_when_the_worker_ends(tmp_path: Path) -> None:
    source = AnchoredSource()
    async with fleet_in(tmp_path) as fleet:
        job = await fleet.create()
        async with fleet.worker(source, grace=0.1):
            source.allow(1)
            await fleet.parts(job, 1)
        assert source.anchors[0].closed.is_set()
        assert (await fleet.job(job)).state is JobState.PENDING


@pytest.mark.parametrize("when", ["planning", "planned"])
async def test_an_anchor_of_a_plan_that_comes_to_nothing_is_closed(
    tmp_path: Path, when: str
) -> None:
    source = AnchoredSource()
    async with fleet_in(tmp_path) as fleet:
        faults = Faults(fleet.ledger)
        job = await fleet.create()
        source.go_on.clear()
        async with fleet.worker(source, ledger=faults.ledger):
            await until(lambda: source.asked)
            if when == "planning":
                await fleet.ledger.cancel_job(TENANT, job.job_id)
                await until(lambda: "renew" in faults.log)
                await asyncio.sleep(0.05)
                source.go_on.set()
            else:
                connection = sqlite3.connect(fleet.path)
                connection.execute("UPDATE tasks SET token = token + 1 WHERE owner <> ''")
                connection.commit()
                connection.close()
                source.go_on.set()
                await until(lambda: faults.calls["record_plan"])
            await until(lambda: source.anchors and source.anchors[0].closed.is_set())
            assert not source.opened


async def test_an_anchor_is_kept_when_the_plan_may_have_been_recorded(
    tmp_path: Path,
) -> None:
    """Its answer was lost: whoever takes the shards over can still read them."""
    source = AnchoredSource(wide=True)
    async with fleet_in(tmp_path) as fleet:
        faults = Faults(fleet.ledger)
        faults.fail("record_plan", after=True)
        job = await fleet.create()
        async with fleet.worker(source, ledger=faults.ledger, lease=0.5, poll=0.2):
            done = await fleet.finished(job)
            assert (done.state, done.generation) == (JobState.SUCCEEDED, 1)
            await until(source.anchors[0].closed.is_set)
        assert len(source.anchors) == 1


# --- the end


class Blocking(GateSource):
    """Blocks in `plan` or in `open`, and nothing can interrupt it."""

    def __init__(self, where: str) -> None:
        super().__init__(wide=True)
        self._where = where
        self.blocked = threading.Event()
        self.end = threading.Event()

    def _block(self, where: str) -> None:
        if where == self._where:
            self.blocked.set()
            self.end.wait(10 * ENOUGH)

    def plan(self, query: Query, *, shard_rows: int | None = None) -> Plan:
        self._block("plan")
        return super().plan(query, shard_rows=shard_rows)

    def open(self, query: Query, shard: Shard, *, skip_rows: int = 0) -> GateStream:
        self._block("open")
        return super().open(query, shard, skip_rows=skip_rows)


@pytest.mark.parametrize("where", ["plan", "open"])
async def test_a_source_that_blocks_holds_up_neither_the_drain_nor_the_next_worker(
    tmp_path: Path, where: str
) -> None:
    blocking, gate = Blocking(where), GateSource(wide=True)
    async with fleet_in(tmp_path) as fleet:
        job = await fleet.create()
        async with fleet.worker(blocking, grace=0.2, lease=3600.0):
            await asyncio.to_thread(blocking.blocked.wait, ENOUGH)
        async with fleet.worker(gate, lease=3600.0):
            done = await fleet.finished(job)
        # At once, although the lease had most of an hour left; and it was not counted.
        assert (done.state, done.attempt) == (JobState.SUCCEEDED, 1)
        blocking.end.set()
        await until(
            lambda: (
                not any(
                    t.name in ("exportd-plan", "exportd-shard")
                    for t in threading.enumerate()
                )
            )
        )
        assert [row["id"] for row in await fleet.rows(job)] == IDS


async def test_a_drain_lets_what_runs_come_to_its_end_and_claims_nothing_more(
    tmp_path: Path, gate: GateSource
) -> None:
    async with fleet_in(tmp_path) as fleet:
        running = await fleet.create()
        async with fleet.worker(gate, concurrency=1, grace=ENOUGH) as worker:
            gate.allow(1)
            await fleet.parts(running, 1)
            draining = asyncio.create_task(worker.drain(ENOUGH))
            waiting = await fleet.create()
            await asyncio.sleep(0.1)
            gate.open_wide()
            await draining
        assert (await fleet.job(running)).state is JobState.SUCCEEDED
        assert (await fleet.job(waiting)).state is JobState.PENDING
        assert gate.opened == 1


async def test_a_drain_ends_although_the_ledger_is_out_of_reach(
    tmp_path: Path, gate: GateSource
) -> None:
    async with fleet_in(tmp_path) as fleet:
        faults = Faults(fleet.ledger)
        job = await fleet.create()
        async with fleet.worker(gate, ledger=faults.ledger, grace=0.1):
            gate.allow(1)
            await fleet.parts(job, 1)
            faults.out_of_reach = True
        assert gate.cancelled


# --- caps


async def test_the_parts_of_all_shards_together_must_fit_a_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caps, "MAX_PARTS", 19)
    async with fleet_in(tmp_path) as fleet:
        job = await fleet.create()
        async with fleet.worker(AnchoredSource(wide=True)):
            done = await fleet.finished(job)
        assert done.state is JobState.FAILED
        assert done.error is not None
        assert done.error.metadata["cap"] == "max_parts"
