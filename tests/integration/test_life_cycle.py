"""What is written goes again: after a cancel at whatever moment, a delete, an expiry; but
not under the hands of somebody who downloads it. On a disk, on S3, in a fleet."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import psycopg
import pytest

from exportd.v1 import export_service_pb2 as pb
from exportd.v1 import job_pb2
from exportd_server import app
from exportd_server.errors import ConfigurationError, LedgerUnavailable, StoreFailed
from exportd_server.jobs.housekeeping import Housekeeping
from exportd_server.jobs.ledger.base import Lease, NewJob
from exportd_server.jobs.ledger.postgres import (
    migrate_postgres_ledger,
    open_postgres_ledger,
)
from exportd_server.jobs.ledger.sql import SqlLedger
from exportd_server.jobs.ledger.statements import lifecycle
from exportd_server.jobs.manager import Policy
from exportd_server.jobs.model import JobState
from exportd_server.jobs.worker import Worker, WorkerOptions
from exportd_server.platform.clock import SystemClock
from exportd_server.settings import Settings
from exportd_server.sources.base import Plan, Query
from exportd_server.store.base import OutputStore
from exportd_server.store.key import JobPrefix, OutputKind
from exportd_server.store.local import LocalStore
from exportd_server.store.memory import MemoryStore
from exportd_server.store.s3 import S3Store
from tests.support import rpc
from tests.support.faults import Faults
from tests.support.faulty_store import FAILS, FaultyStore, on
from tests.support.fleet import at_work, fleet_in
from tests.support.gate import BATCH_ROWS, GateSource
from tests.support.holds import HoldingStore, Place, local_place, s3_place
from tests.support.ledger import (
    CLEANUP,
    REAP,
    SWEEP,
    World,
    dump_sqlite,
    spec,
    sqlite_world,
)
from tests.support.readers import Downloads
from tests.support.samples import catalogue_of
from tests.support.server import Server, serve, settings, until
from tests.support.sinks import no_sinks
from tests.support.store import part_key, put
from tests.support.waits import ENOUGH

LEASE = 0.5
GRACE = 0.2
CANCELS = int(os.environ.get("EXPORTD_CANCELS", "25"))
"""Exports that are cancelled at random moments, on each store."""
BIG = 1500
"""Batches of an output that no connection buffers as a whole."""


class StandingSource(GateSource):
    """A gate that can stop plans, too."""

    def __init__(self, batches: int = 10, *, wide: bool = False) -> None:
        super().__init__(batches, wide=wide)
        self.planning = 0
        self.plans_wait = False

    def plan(self, query: Query, *, shard_rows: int | None = None) -> Plan:
        self.planning += 1
        with self.changed:
            while self.plans_wait:
                self.changed.wait()
        return super().plan(query, shard_rows=shard_rows)

    def let_plan(self) -> None:
        with self.changed:
            self.plans_wait = False
            self.changed.notify_all()


@dataclass
class Stand:
    """A server on an embedded ledger, and all that it keeps."""

    server: Server
    store: HoldingStore
    place: Place
    source: StandingSource

    @property
    def stub(self) -> Any:
        return self.server.stub

    def rows(self) -> dict[str, int]:
        """How many rows of jobs there are in each table."""
        rows = dump_sqlite(self.server.data_dir / "ledger.db")
        # What is audited outlives its job.
        for name in ("counters", "identity", "audit_records"):
            rows.pop(name)
        rows["tasks"] = [row for row in rows["tasks"] if not {"reap", "sweep"} & {*row}]
        return {name: len(found) for name, found in rows.items() if found}

    async def nothing_is_left(self) -> None:
        """Wait until neither bytes nor rows are left."""
        async with asyncio.timeout(ENOUGH):
            while self.rows():
                await asyncio.sleep(0.05)
            while await asyncio.to_thread(self.place.remains):
                await asyncio.sleep(0.05)


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "local":
        return local_place(tmp_path / "outputs")
    return s3_place(request.getfixturevalue("seaweed"))


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> list[HoldingStore]:
    """The stores of the servers that the test starts, in order."""
    opened: list[HoldingStore] = []
    really_open = app._open_store

    async def open_store(settings: Settings) -> OutputStore:
        opened.append(HoldingStore(await really_open(settings)))
        return opened[-1]

    monkeypatch.setattr(app, "_open_store", open_store)
    return opened


@asynccontextmanager
async def standing(
    directory: Path,
    place: Place,
    stores: list[HoldingStore],
    lease: float = LEASE,
    **values: Any,
) -> AsyncIterator[Stand]:
    """A server whose late writers are reckoned with for a short time only."""
    source = StandingSource()
    worker = {"lease": lease, "concurrency": 2}
    options = settings(directory / "data", store=place.settings, worker=worker, **values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lifecycle, "LATE_WRITER_GRACE", int(GRACE * 1e6))
        async with serve(options, catalogue_of(gated=source)) as server:
            try:
                yield Stand(server, stores[-1], place, source)
            finally:
                source.let_plan()
                source.open_wide()


# --- a cancel at every stage

STAGES = (
    "pending",
    "planning",
    "reading",
    "encoding",
    "uploading",
    "between parts",
    "before the manifest is stored",
    "before it is published",
)


HOLDS = {
    "uploading": ("before finalize", OutputKind.OUTPUT),
    "before the manifest is stored": ("before finalize", OutputKind.MANIFEST),
    "before it is published": ("after finalize", OutputKind.MANIFEST),
}
PARTS = {"encoding": 1, "between parts": 3}


@asynccontextmanager
async def at_stage(stand: Stand, stage: str) -> AsyncIterator[job_pb2.Job]:
    """An export that stands still at a stage; it goes on in the end."""
    source, stub = stand.source, stand.stub
    async with AsyncExitStack() as stack:
        source.plans_wait = stage == "planning"
        if stage == "pending":
            for _ in range(2):
                first = await rpc.create(stub, "gated")
                stack.push_async_callback(rpc.finish, stub, first.job_id)
            await until(lambda: source.opened == 2)
        hold = None
        if stage in HOLDS:
            hold = stack.enter_context(stand.store.holding(*HOLDS[stage]))
            source.open_wide()
        part_rows = 2 * BATCH_ROWS if stage == "encoding" else BATCH_ROWS
        job = await rpc.create(stub, "gated", max_part_rows=part_rows)
        if hold is not None:
            await hold.reached()
        elif stage in ("planning", "reading"):
            await until(lambda: source.planning)
            await until(lambda: source.opened or stage == "planning")
        elif stage in PARTS:
            opened = 0
            async with asyncio.timeout(ENOUGH):
                while (
                    source.given < 3
                    or (await rpc.get(stub, job.job_id)).progress.parts_done < PARTS[stage]
                ):
                    if source.opened > opened:
                        # Who is taken over, as on a machine that stood still, was given
                        # in vain what it had not recorded.
                        opened = source.opened
                        source.allow(3)
                    await asyncio.sleep(0.01)
        yield job
        source.let_plan()
        source.open_wide()


@pytest.mark.parametrize("stage", STAGES)
async def test_a_cancel_at_any_stage_leaves_nothing_to_read_and_nothing_behind(
    tmp_path: Path, place: Place, stores: list[HoldingStore], stage: str
) -> None:
    async with standing(tmp_path, place, stores) as stand:
        async with at_stage(stand, stage) as job:
            answer = await stand.stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))
            assert answer.outcome == pb.CANCEL_OUTCOME_CANCELLED
            refused = await rpc.refusal(rpc.download(stand.stub, job.job_id))
            assert refused.reason == "JOB_CANCELLED"
        # Whoever stood still has gone on by now, and had what he did be in vain.
        found = await rpc.get(stand.stub, job.job_id)
        assert found.state == job_pb2.JOB_STATE_CANCELLED
        assert not found.HasField("manifest")
        again = await stand.stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))
        assert again.outcome == pb.CANCEL_OUTCOME_ALREADY_CANCELLED
        for one in await jobs_of(stand):
            await stand.stub.DeleteJob(pb.DeleteJobRequest(job_id=one.job_id))
        await stand.nothing_is_left()


@pytest.mark.parametrize("stage", ["uploading", "before it is published"])
async def test_a_writer_that_goes_on_after_the_job_was_deleted_brings_nothing_back(
    tmp_path: Path, place: Place, stores: list[HoldingStore], stage: str
) -> None:
    async with standing(tmp_path, place, stores) as stand:
        async with at_stage(stand, stage) as job:
            await stand.stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))
            await stand.stub.DeleteJob(pb.DeleteJobRequest(job_id=job.job_id))
            await stand.nothing_is_left()
        await until(lambda: stage != "uploading" or stand.store.failed)
        assert stand.rows() == {}
        assert await asyncio.to_thread(place.remains) == []
        assert (await rpc.refusal(rpc.finish(stand.stub, job.job_id))).code is (
            grpc.StatusCode.NOT_FOUND
        )


async def jobs_of(stand: Stand) -> list[job_pb2.Job]:
    answer = await stand.stub.ListJobs(pb.ListJobsRequest(page_size=1000))
    return list(answer.jobs)


@pytest.mark.minutes
async def test_exports_cancelled_at_random_moments_leave_nothing(
    tmp_path: Path, place: Place, stores: list[HoldingStore]
) -> None:
    rng = random.Random(CANCELS)
    limits = {"max_active_jobs": 1000}
    async with standing(tmp_path, place, stores, limits=limits) as stand:
        stand.source.open_wide()
        begun = time.monotonic()
        done = await rpc.export(stand.stub, "gated", max_part_rows=BATCH_ROWS)
        usual = time.monotonic() - begun
        await stand.stub.DeleteJob(pb.DeleteJobRequest(job_id=done.job_id))
        outcomes = []

        async def one() -> None:
            job = await rpc.create(stand.stub, "gated", max_part_rows=BATCH_ROWS)
            await asyncio.sleep(rng.uniform(0, 1.5 * usual))
            answer = await stand.stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))
            outcomes.append(answer.outcome)
            if answer.outcome == pb.CANCEL_OUTCOME_CANCELLED:
                refused = await rpc.refusal(rpc.download(stand.stub, job.job_id))
                assert refused.reason == "JOB_CANCELLED"
            await stand.stub.DeleteJob(pb.DeleteJobRequest(job_id=job.job_id))

        for _ in range(0, CANCELS, 2):
            await asyncio.gather(one(), one())
        assert pb.CANCEL_OUTCOME_CANCELLED in outcomes
        await stand.nothing_is_left()
        assert await jobs_of(stand) == []


# --- the manifest in the store


async def test_the_manifest_is_stored_before_the_job_says_that_it_succeeded(
    tmp_path: Path, place: Place, stores: list[HoldingStore]
) -> None:
    # Who was taken over may leave a part that is cleaned up later: nobody is, here.
    async with standing(tmp_path, place, stores, lease=60.0) as stand:
        stand.source.open_wide()
        with stand.store.holding("before finalize", OutputKind.MANIFEST) as hold:
            job = await rpc.create(stand.stub, "gated", max_part_rows=3 * BATCH_ROWS)
            await hold.reached()
            waiting = await rpc.get(stand.stub, job.job_id)
            assert waiting.state == job_pb2.JOB_STATE_RUNNING
            refused = await rpc.refusal(rpc.download(stand.stub, job.job_id))
            assert refused.reason == "JOB_NOT_FINISHED"
        job = await rpc.finish(stand.stub, job.job_id)
        assert job.state == job_pb2.JOB_STATE_SUCCEEDED, job.error
        [key] = hold.keys
        reader = await stand.store.open(key)
        buffer = memoryview(bytearray(await stand.store.size(key)))
        assert await reader.readinto(buffer) == len(buffer)
        await reader.close()
        told = json.loads(bytes(buffer))
        assert (told["manifest_version"], told["job_id"]) == (1, job.job_id)
        assert (told["generation"], told["rows"]) == (job.generation, 10 * BATCH_ROWS)
        assert [column["name"] for column in told["columns"]] == ["id", "text"]
        parts = [
            (one.file_name, one.rows, one.bytes, one.crc32c, one.sha256.hex())
            for one in job.manifest.parts
        ]
        fields = ("file_name", "rows", "bytes", "crc32c", "sha256")
        assert [tuple(one[name] for name in fields) for one in told["parts"]] == parts
        stored = await asyncio.to_thread(place.remains)
        assert stored == sorted([str(key), *(one["key"] for one in told["parts"])])


async def test_a_manifest_that_cannot_be_stored_costs_an_attempt_and_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty: list[FaultyStore] = []
    really_open = app._open_store

    async def open_store(settings: Settings) -> OutputStore:
        # The only part, and then its manifest.
        plan = on("finalize", FAILS, first=1, times=1)
        faulty.append(FaultyStore(await really_open(settings), plan))
        return faulty[0]

    monkeypatch.setattr(app, "_open_store", open_store)
    source = StandingSource(wide=True)
    async with serve(settings(tmp_path), catalogue_of(gated=source)) as server:
        job = await rpc.export(server.stub, "gated")
        assert job.attempt == 2
        assert faulty[0].counts["finalize"] == 3, "the part was not written again"
        assert sorted(file.parent.name for file in server.files()) == ["manifest", "output"]


async def test_a_worker_that_lost_its_lease_neither_publishes_nor_spoils_the_next_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands still with its manifest, is taken over, and goes on when the job has
    succeeded without it."""
    monkeypatch.setattr(lifecycle, "LATE_WRITER_GRACE", 1_000_000)
    source = StandingSource(wide=True)
    async with fleet_in(tmp_path) as fleet:
        store = HoldingStore(fleet.store)
        fleet.store = store
        faults = Faults(fleet.ledger)
        job = await fleet.create()
        with store.holding("before finalize", OutputKind.MANIFEST) as hold:
            async with fleet.worker(source, ledger=faults.ledger, lease=LEASE):
                await hold.reached()
                # What it hears of its lease from now on is nothing.
                faults.cut_off |= {"renew", "claim"}
                async with fleet.worker(source, poll=0.2):
                    done = await fleet.finished(job)
                    assert done.state is JobState.SUCCEEDED
                    hold.released.set()
                    await until(lambda: hold.passed)
                    await fleet.tidied(job)
        [zombie] = hold.keys
        assert done.attempt == 2
        assert await fleet.job(job) == done
        manifests = [
            key for key in await fleet.stored(job) if key.kind is OutputKind.MANIFEST
        ]
        assert len(manifests) == 1
        assert manifests[0].token > zombie.token
        assert len(await fleet.rows(job)) == 10 * BATCH_ROWS


# --- downloads, in a fleet


@dataclass
class Pair:
    """Two processes' worth of servers on one ledger, and who else is at work."""

    here: Server
    there: Server
    place: Place
    url: str

    def ask(self, query: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.url, options="-c search_path=exportd") as peer:
            return peer.execute(query.encode()).fetchall()

    def expires_in(self, job_id: str, seconds: float) -> None:
        """Turn the job's time forward."""
        with psycopg.connect(self.url, options="-c search_path=exportd") as peer:
            peer.execute(
                "UPDATE jobs SET expire_time = (extract(epoch FROM clock_timestamp()) "
                "* 1000000)::bigint + %s WHERE job_id = %s",
                (int(seconds * 1e6), job_id),
            )


@asynccontextmanager
async def pair(
    url: str, directory: Path, source: StandingSource, **values: Any
) -> AsyncIterator[Pair]:
    """`here` answers calls only; `there` answers, works, reaps and cleans up as well."""
    migrate_postgres_ledger(url)
    place = local_place(directory / "outputs")
    common = {"store": place.settings, "ledger": {"url": url, "connections": 4}, **values}
    retention = {"reap_interval": 1.0, **values.get("retention", {})}
    common["retention"] = retention
    api = settings(directory / "here", **common, worker={"enabled": False})
    both = settings(directory / "there", **common)
    catalogue = catalogue_of(gated=source)
    async with serve(api, catalogue) as here, serve(both, catalogue) as there:
        try:
            yield Pair(here, there, place, url)
        finally:
            source.open_wide()


class SlowDownload:
    """A download whose reader takes one message and waits."""

    def __init__(self, server: Server, job_id: str, **fields: Any) -> None:
        request = pb.StreamDownloadRequest(job_id=job_id, **fields)
        self.call = aiter(server.stub.StreamDownload(request))
        self.data = bytearray()

    async def begin(self) -> None:
        """Return once there is data, and more than was taken is on its way."""
        while not self.data:
            self.data += (await anext(self.call)).data

    async def rest(self) -> bytes:
        """Take all that is left."""
        async for message in self.call:
            self.data += message.data
        return bytes(self.data)

    async def reason(self) -> str:
        """Why it was ended, after whatever came before."""
        return (await rpc.refusal(self.call)).reason


async def begun(server: Server, job_id: str, **fields: Any) -> SlowDownload:
    download = SlowDownload(server, job_id, **fields)
    await download.begin()
    return download


@pytest.mark.minutes
async def test_a_download_goes_on_although_its_job_expires_and_another_process_reaps(
    postgres_url: str, tmp_path: Path
) -> None:
    source = StandingSource(BIG, wide=True)
    async with pair(postgres_url, tmp_path, source) as two:
        job = await rpc.export(two.there.stub, "gated", max_part_rows=BIG * BATCH_ROWS // 4)
        other = await rpc.export(two.there.stub, "gated", limit=1000)
        whole = await rpc.download(two.here.stub, job.job_id)
        two.expires_in(job.job_id, 4)
        slow = await begun(two.here, job.job_id)
        assert len(two.ask("SELECT * FROM pins")) == 1
        # The other process hides it, and would delete it.
        await gone(two.there, job.job_id)
        await until(
            lambda: two.ask("SELECT 1 FROM tasks WHERE attempts > 0 AND forget = 1")
        )
        for server in (two.here, two.there):
            refused = await rpc.refusal(rpc.download(server.stub, job.job_id))
            assert refused.code is grpc.StatusCode.NOT_FOUND
        assert sum(job.job_id in name for name in two.place.remains()) == 4 + 1
        assert await slow.rest() == whole
        # Once it is done nothing holds the output any more.
        await until(lambda: not two.ask("SELECT 1 FROM pins"))
        await until(lambda: job.job_id not in str(two.place.remains()), ENOUGH)
        assert other.job_id in str(two.place.remains())
        assert await rpc.download(two.here.stub, other.job_id)


async def test_a_download_far_from_its_jobs_expiry_costs_the_ledger_no_pin(
    postgres_url: str, tmp_path: Path
) -> None:
    source = StandingSource(BIG, wide=True)
    async with pair(postgres_url, tmp_path, source) as two:
        job = await rpc.export(two.there.stub, "gated")
        slow = await begun(two.here, job.job_id)
        assert two.ask("SELECT * FROM pins") == []
        assert len(await slow.rest()) == job.manifest.bytes


@pytest.mark.minutes
@pytest.mark.parametrize("stalled", [False, True], ids=["reading", "stalled"])
async def test_a_delete_through_one_process_cuts_the_downloads_of_the_others_at_once(
    postgres_url: str, tmp_path: Path, downloads: Downloads, *, stalled: bool
) -> None:
    source = StandingSource(BIG, wide=True)
    async with pair(postgres_url, tmp_path, source) as two:
        job = await rpc.export(two.there.stub, "gated")
        slow = await begun(two.here, job.job_id)
        await two.there.stub.DeleteJob(pb.DeleteJobRequest(job_id=job.job_id))
        await until(lambda: not two.place.remains())
        if stalled:
            # The server has dropped it although its reader takes nothing.
            await downloads.over()
        assert await slow.reason() == "JOB_NOT_FOUND"


async def test_a_cancel_through_one_process_ends_the_follow_streams_of_the_others(
    postgres_url: str, tmp_path: Path
) -> None:
    source = StandingSource(BIG)
    async with pair(postgres_url, tmp_path, source) as two:
        job = await rpc.create(two.there.stub, "gated", max_part_rows=BATCH_ROWS)
        source.allow(3)
        following = await begun(two.here, job.job_id, follow=True)
        await two.there.stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))
        assert await following.reason() == "JOB_CANCELLED"


async def gone(server: Server, job_id: str) -> None:
    """Wait until a job has been hidden."""
    async with asyncio.timeout(ENOUGH):
        while True:
            with suppress(AssertionError):
                refused = await rpc.refusal(
                    server.stub.GetJob(pb.GetJobRequest(job_id=job_id))
                )
                assert refused.reason == "JOB_NOT_FOUND"
                return
            await asyncio.sleep(0.05)


# --- expiry


async def test_expiry_goes_by_the_ledgers_clock_however_wrong_the_process_clock_is(
    postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = SystemClock.now
    for wrong in (timedelta(days=2), timedelta(days=-2)):
        monkeypatch.setattr(SystemClock, "now", lambda self, w=wrong: right(self) + w)
        async with pair(postgres_url, tmp_path, StandingSource(wide=True)) as two:
            job = await rpc.export(two.here.stub, "gated", ttl=timedelta(seconds=600))
            told = job.expire_time.ToNanoseconds() // 1000
            [(expire_time,)] = two.ask("SELECT expire_time FROM jobs")
            assert told == expire_time
            assert abs(told / 1e6 - time.time() - 600) < ENOUGH
            assert await rpc.download(two.here.stub, job.job_id)
            two.expires_in(job.job_id, 0)
            refused = await rpc.refusal(rpc.download(two.here.stub, job.job_id))
            assert refused.reason in ("OUTPUT_EXPIRED", "JOB_NOT_FOUND")
            await until(lambda: not two.ask("SELECT * FROM jobs"), ENOUGH)


class CountingHousekeeping(Housekeeping):
    """Counts how many reap at a time, over all instances."""

    now = most = rounds = 0

    async def reap(self, lease: Lease) -> None:
        count = CountingHousekeeping
        count.now += 1
        count.rounds += 1
        count.most = max(count.most, count.now)
        try:
            await super().reap(lease)
        finally:
            count.now -= 1


class NotingStore(MemoryStore):
    """Notes which jobs were deleted."""

    def __init__(self) -> None:
        super().__init__()
        self.deleted: Counter[JobPrefix] = Counter()

    async def delete_job(self, prefix: JobPrefix) -> int:
        self.deleted[prefix] += 1
        return await super().delete_job(prefix)


@pytest.mark.minutes
async def test_the_reaper_runs_once_for_a_whole_fleet_and_spares_what_has_not_expired(
    postgres_url: str,
) -> None:
    """Three processes' worth of workers, more expired jobs than one transaction takes,
    and another job of one of the tenants among them."""
    migrate_postgres_ledger(postgres_url)
    store = NotingStore()
    async with AsyncExitStack() as stack:
        ledgers = [await open_postgres_ledger(postgres_url) for _ in range(3)]
        for ledger in ledgers:
            stack.push_async_callback(ledger.close)
        expiring = [new_job(f"t{number % 3}", ttl=1) for number in range(150)]
        spared = new_job("t0", ttl=3600)
        for one in (*expiring, spared):
            await ledgers[0].create_job(one)
            await ledgers[0].cancel_job(one.tenant, one.job_id)
        for ledger in ledgers:
            worker = Worker(
                ledger,
                store,
                catalogue_of(),
                CountingHousekeeping(ledger, store, reap_interval=timedelta(seconds=1)),
                Policy(),
                no_sinks(),
                WorkerOptions(poll=0.5),
            )
            await stack.enter_async_context(at_work(worker, 5.0))
        ids = [job.job_id for job in expiring]
        async with asyncio.timeout(2 * ENOUGH):
            while await ledgers[0].known_jobs(ids):
                await asyncio.sleep(0.1)
        assert CountingHousekeeping.most == 1, "never two at a time"
        assert CountingHousekeeping.rounds >= 2
        assert await ledgers[1].get_job(spared.tenant, spared.job_id) is not None
    # Once for the cancel, once for the expiry.
    times = {JobPrefix(job.tenant, job.job_id): 2 for job in expiring}
    assert store.deleted == times | {JobPrefix(spared.tenant, spared.job_id): 1}


def new_job(tenant: str, *, ttl: float) -> NewJob:
    return NewJob(str(uuid4()), tenant, spec(ttl=timedelta(seconds=ttl)))


# --- delete first, forget after


async def expired_output(world: World, store: OutputStore) -> JobPrefix:
    """A job that has expired and is hidden, with its output stored."""
    job = await world.succeeded()
    prefix = JobPrefix(job.tenant, job.job_id)
    put(store, part_key(prefix), b"data")
    world.clock.advance(job.spec.ttl.total_seconds())
    await housekeeping(world, store).reap(await world.lease(REAP))
    return prefix


def housekeeping(world: World, store: OutputStore) -> Housekeeping:
    return Housekeeping(world.ledger, store, reap_interval=timedelta(seconds=300))


async def test_a_job_is_not_forgotten_while_its_output_cannot_be_deleted(
    tmp_path: Path,
) -> None:
    store = FaultyStore(MemoryStore())
    async with sqlite_world(tmp_path) as world:
        prefix = await expired_output(world, store)
        store.plan = on("delete_job", FAILS, times=1)
        with pytest.raises(StoreFailed):
            await housekeeping(world, store).cleanup(await world.lease(CLEANUP))
        assert await world.ledger.known_jobs([prefix.job_id]) == {prefix.job_id}
        world.clock.advance(15)
        await housekeeping(world, store).cleanup(await world.lease(CLEANUP))
        assert await world.ledger.known_jobs([prefix.job_id]) == set()
        assert [key async for key in store.list_job(prefix)] == []


async def test_who_dies_between_deleting_and_forgetting_is_followed_by_one_who_forgets(
    tmp_path: Path,
) -> None:
    store = LocalStore(tmp_path / "outputs")
    async with sqlite_world(tmp_path) as world:
        prefix = await expired_output(world, store)
        lease = await world.lease(CLEANUP)
        assert await world.ledger.kept_parts(lease) is None
        assert await store.delete_job(prefix) == 1  # and its process dies
        world.clock.advance(15)
        again = await world.lease(CLEANUP)
        assert (again.job_id, again.forget) == (prefix.job_id, True)
        await housekeeping(world, store).cleanup(again)
        assert await world.ledger.known_jobs([prefix.job_id]) == set()
    await store.close()


# --- orphans


@asynccontextmanager
async def some_store(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> AsyncIterator[OutputStore]:
    store: OutputStore
    if kind == "s3":
        store = S3Store(request.getfixturevalue("s3_options"))
    else:
        store = LocalStore(tmp_path / "outputs") if kind == "local" else MemoryStore()
    try:
        yield store
    finally:
        await store.close()


@pytest.mark.parametrize("kind", ["local", "s3", "memory"])
async def test_output_without_a_job_is_deleted_at_the_second_look(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    async with (
        some_store(kind, tmp_path, request) as store,
        sqlite_world(tmp_path) as world,
    ):
        known = await world.succeeded()
        mine = JobPrefix(known.tenant, known.job_id)
        finished, unfinished = (JobPrefix("gone", str(uuid4())) for _ in range(2))
        put(store, part_key(mine), b"data")
        put(store, part_key(finished), b"data")
        writer = store.create(part_key(unfinished))
        writer.write(b"da")
        for left in ({mine, finished, unfinished}, {mine}):
            await housekeeping(world, store).sweep(await world.lease(SWEEP))
            assert {prefix async for prefix in store.list_jobs()} == left
            world.clock.advance(86_400)
        with pytest.raises(StoreFailed):
            writer.finalize()
        assert {prefix async for prefix in store.list_jobs()} == {mine}


async def test_nothing_is_swept_where_another_ledger_keeps_its_outputs(
    tmp_path: Path,
) -> None:
    store = MemoryStore()
    theirs = JobPrefix("acme", str(uuid4()))
    put(store, part_key(theirs), b"data")
    await store.claim(str(uuid4()))
    async with sqlite_world(tmp_path) as world:
        for _ in range(3):
            await housekeeping(world, store).sweep(await world.lease(SWEEP))
            world.clock.advance(2 * 86_400)
    assert {prefix async for prefix in store.list_jobs()} == {theirs}


async def test_a_ledger_that_goes_away_during_the_start_ends_it_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cut(_: SqlLedger) -> str:
        raise LedgerUnavailable

    monkeypatch.setattr(SqlLedger, "identity", cut)
    with pytest.raises(ConfigurationError, match=r"^ledger: .* \(ledger\.url\) or"):
        async with serve(settings(tmp_path), catalogue_of(gated=GateSource())):
            pass


async def test_a_second_ledger_on_the_same_outputs_does_not_start(
    tmp_path: Path, place: Place
) -> None:
    catalogue = catalogue_of(gated=GateSource(wide=True))
    first = settings(tmp_path / "first", store=place.settings)
    second = settings(tmp_path / "second", store=place.settings)
    async with serve(first, catalogue) as server:
        await rpc.export(server.stub, "gated")
    before = place.remains()
    with pytest.raises(ConfigurationError, match="belong to another ledger") as told:
        async with serve(second, catalogue):
            pass
    assert "name another directory or prefix" in str(told.value)
    assert len(str(told.value).splitlines()) == 1
    assert place.remains() == before
    async with serve(first, catalogue) as server:
        await rpc.export(server.stub, "gated")
