"""Whatever call of the output store fails, once or for good, a job ends as it should,
nobody is served a byte that is wrong, and in the end nothing is left behind.

The whole service runs, over a store that spoils calls, and over S3 that answers amiss.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import pytest
from botocore.retries import standard
from structlog.testing import capture_logs

from exportd.v1 import export_service_pb2 as pb
from exportd.v1 import job_pb2
from exportd_server import app
from exportd_server.errors import ConfigurationError, StoreFailed
from exportd_server.jobs.exporting import ExportOptions
from exportd_server.jobs.housekeeping import Housekeeping
from exportd_server.jobs.ledger.statements import lifecycle
from exportd_server.platform.waits import Backoff
from exportd_server.settings import Settings
from exportd_server.store import s3_read
from exportd_server.store.base import OutputStore
from exportd_server.store.key import JobPrefix, OutputKey, OutputKind
from exportd_server.store.memory import MemoryStore
from tests.support import rpc
from tests.support.faulty_store import FAILS, FULL, Fault, FaultyStore, Plan, any_of, on
from tests.support.gate import BATCH_ROWS, GateSource
from tests.support.holds import Place, local_place, s3_place
from tests.support.ledger import SWEEP, dump_sqlite, sqlite_world
from tests.support.s3_proxy import Call, S3Proxy, error, s3_proxy
from tests.support.s3_proxy import Fault as Answer
from tests.support.s3_proxy import Plan as Answers
from tests.support.samples import catalogue_of
from tests.support.seaweed import SeaweedServer
from tests.support.server import serve, settings, until
from tests.support.store import part_key, put
from tests.support.waits import ENOUGH

BATCHES = 6
PARTS = 3
RIGHT = b"id,text\n" + b"".join(b"%d,%d\n" % (n, n) for n in range(BATCHES * BATCH_ROWS))
"""What every export here is, when it is anything."""
OUTPUT, MANIFEST = OutputKind.OUTPUT, OutputKind.MANIFEST
SUCCEEDED, FAILED = job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another attempt follows at once, and late writers are soon reckoned with no more."""
    monkeypatch.setattr(
        app, "ExportOptions", partial(ExportOptions, retry=Backoff(0.01, 0.05))
    )
    monkeypatch.setattr(lifecycle, "LATE_WRITER_GRACE", 100_000)
    monkeypatch.setattr(standard.ExponentialBackoff, "delay_amount", lambda *_: 0.01)
    monkeypatch.setattr(s3_read, "_FIRST_PAUSE", 0.01)


@pytest.fixture(autouse=True)
def logs() -> Iterator[list[Any]]:
    """What was logged. Thousands of tracebacks are not to be drawn, which takes longer
    than all the rest."""
    with capture_logs() as logs:
        yield logs


@dataclass
class Stand:
    """A server, and all that it keeps."""

    stub: Any
    store: FaultyStore
    place: Place
    ledger: Path
    kept: list[job_pb2.Job] = field(default_factory=list)
    """Jobs that succeeded and were not deleted."""

    async def create(self) -> job_pb2.Job:
        part_rows = BATCHES * BATCH_ROWS // PARTS
        return await rpc.create(self.stub, "gated", max_part_rows=part_rows)

    async def export(self) -> job_pb2.Job:
        """An export to its end, which somebody follows from its beginning."""
        job = await self.create()
        following = asyncio.create_task(self.followed(job.job_id))
        job = await rpc.finish(self.stub, job.job_id)
        data, told = await following
        assert RIGHT.startswith(data)
        assert (told is None) == (job.state == SUCCEEDED)
        assert told in (None, "JOB_FAILED")
        assert told or data == RIGHT
        return job

    async def followed(self, job_id: str) -> tuple[bytes, str | None]:
        """All that is served of a job while it runs, and the reason that ended it."""
        data = bytearray()
        call = self.stub.StreamDownload(
            pb.StreamDownloadRequest(job_id=job_id, follow=True)
        )

        async def read() -> AsyncIterator[None]:
            async for message in call:
                assert message.HasField("metadata") or message.offset == len(data)
                data.extend(message.data)
                yield

        try:
            async for _ in read():
                pass
        except grpc.aio.AioRpcError as failure:
            return bytes(data), rpc.Refusal(failure).reason
        return bytes(data), None

    async def has_failed(self, job: job_pb2.Job, reason: str) -> None:
        """It says why, and nothing of it can be read."""
        told = await rpc.get(self.stub, job.job_id)
        assert told.state == FAILED
        assert reason in str(told.error)
        assert not told.HasField("manifest")
        for fields in ({}, {"part_index": 0}):
            refused = await rpc.refusal(rpc.download(self.stub, job.job_id, **fields))
            assert refused.reason == "JOB_FAILED"

    async def has_succeeded(self, job: job_pb2.Job) -> None:
        """All of it can be read."""
        assert job.state == SUCCEEDED, job.error
        assert await rpc.download(self.stub, job.job_id) == RIGHT
        assert len(job.manifest.parts) == PARTS
        self.kept.append(job)

    async def only_the_right_is_left(self) -> None:
        """Nothing lies there but the parts and manifests of jobs that succeeded, and
        nothing at all once all jobs were deleted."""
        await self.lies_there(([OUTPUT] * PARTS + [MANIFEST]) * len(self.kept))
        for job in self.kept:
            assert await rpc.download(self.stub, job.job_id) == RIGHT
        answer = await self.stub.ListJobs(pb.ListJobsRequest(page_size=1000))
        for job in answer.jobs:
            await self.delete(job)
        await self.nothing_is_left()

    async def lies_there(self, kinds: list[OutputKind]) -> None:
        """Wait until that is all there is, and nothing is left to be done about it."""
        async with asyncio.timeout(ENOUGH):
            while (left := await self.remains()) != sorted(kinds) or self.open_tasks():
                await asyncio.sleep(0.02)
        assert len(left) == len(kinds)

    async def remains(self) -> list[str]:
        """The kind of everything that lies in the store; a name that is no part's."""
        found = []
        for name in await asyncio.to_thread(self.place.remains):
            try:
                found.append(str(OutputKey.parse(name).kind))
            except ValueError:
                found.append(name)
        return sorted(found)

    def tables(self) -> dict[str, int]:
        """How many rows of jobs each table has."""
        rows = dump_sqlite(self.ledger)
        # What is audited outlives its job.
        del rows["counters"], rows["identity"], rows["audit_records"]
        rows["tasks"] = [row for row in rows["tasks"] if not {"reap", "sweep"} & {*row}]
        return {name: len(found) for name, found in rows.items() if found}

    def open_tasks(self) -> int:
        states = {"ready", "scheduled", "leased"}
        return sum(
            bool(states & {*row}) and not {"reap", "sweep"} & {*row}
            for row in dump_sqlite(self.ledger)["tasks"]
        )

    async def delete(self, job: job_pb2.Job) -> None:
        await self.stub.DeleteJob(pb.DeleteJobRequest(job_id=job.job_id))

    async def nothing_is_left(self) -> None:
        """Neither bytes nor rows, once all jobs were deleted."""
        await self.lies_there([])
        async with asyncio.timeout(ENOUGH):
            while self.tables():
                await asyncio.sleep(0.02)


Standing = Callable[..., Any]


# S3 takes as long as both others, several times.
@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.minutes)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "s3":
        return s3_place(request.getfixturevalue("seaweed"))
    if request.param == "local":
        return local_place(tmp_path / "outputs")
    return Place({}, list)


@asynccontextmanager
async def standing(
    tmp_path: Path, place: Place, plan: Plan | None = None, *, lease: float = 15.0
) -> AsyncIterator[Stand]:
    """A server over a store that spoils what it is told to spoil. Its leases last, so that
    no attempt is lost to a machine that is busy."""
    stores: list[FaultyStore] = []
    really_open = app._open_store

    async def open_store(options: Settings) -> OutputStore:
        inner = await really_open(options) if place.settings else MemoryStore()
        stores.append(FaultyStore(inner) if plan is None else FaultyStore(inner, plan))
        return stores[-1]

    options = settings(
        tmp_path / "data",
        store=place.settings,
        worker={"lease": lease, "concurrency": 2},
        retention={"reap_interval": 1.0},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "_open_store", open_store)
        source = GateSource(BATCHES, wide=True)
        async with serve(options, catalogue_of(gated=source)) as server:
            (store,) = stores
            if not place.settings:
                place = memory_place(store.inner)
            try:
                yield Stand(server.stub, store, place, tmp_path / "data" / "ledger.db")
            finally:
                store.heal()


def memory_place(store: OutputStore) -> Place:
    assert isinstance(store, MemoryStore)

    def remains() -> list[str]:
        unfinished = [f"{some.key} unfinished" for some in store._unfinished]
        return sorted([*map(str, store._parts), *unfinished])

    return Place({}, remains)


# --- writing

ONCE_MORE = {
    "is throttled": FAILS,
    "loses its writer": Fault(fails=True, lost=True),
    "fails after it was done": Fault(fails=True, late=True, lost=True),
}
"""Faults that another attempt mends, if they do not last."""
STEPS = ("create", "write", "finalize")


@pytest.mark.minutes
@pytest.mark.parametrize("kind", [OUTPUT, MANIFEST], ids=str)
async def test_a_write_that_fails_once_costs_an_attempt_and_for_good_the_job(
    tmp_path: Path, place: Place, kind: OutputKind
) -> None:
    first = 1 if kind is OUTPUT else 0
    async with standing(tmp_path, place) as stand:
        for step in STEPS:
            for name, fault in ONCE_MORE.items():
                stand.store.plan = on(step, fault, kind=kind, first=first, times=1)
                job = await stand.export()
                assert (job.state, job.attempt) == (SUCCEEDED, 2), (step, name)
                await stand.has_succeeded(job)
            for fault, attempts, reason in (
                (ONCE_MORE["loses its writer"], 3, "STORE_FAILED"),
                (FULL, 1, "STORE_FULL"),
            ):
                stand.store.plan = on(step, fault, kind=kind, first=first)
                job = await stand.export()
                assert (job.state, job.attempt) == (FAILED, attempts), (step, reason)
                await stand.has_failed(job, reason)
        await stand.only_the_right_is_left()


async def test_a_write_that_stands_still_holds_up_nothing_but_its_job(
    tmp_path: Path, place: Place
) -> None:
    async with standing(tmp_path, place) as stand:
        for step, kind in product(STEPS, (OUTPUT, MANIFEST)):
            slow = Fault(holds=True)
            stand.store.plan = on(step, slow, kind=kind, times=1)
            job = await stand.create()
            await until(lambda: stand.store.held == 1, ENOUGH)
            refused = await rpc.refusal(rpc.download(stand.stub, job.job_id))
            assert refused.reason == "JOB_NOT_FINISHED"
            await stand.has_succeeded(await stand.export())
            stand.store.heal()
            job = await rpc.finish(stand.stub, job.job_id)
            assert (job.state, job.attempt) == (SUCCEEDED, 1)
            await stand.has_succeeded(job)
        await stand.only_the_right_is_left()


async def test_what_could_not_even_be_aborted_is_found_by_the_cleanup(
    tmp_path: Path, place: Place
) -> None:
    """The store is down from the middle of a part on, also for the abort."""
    async with standing(tmp_path, place) as stand:
        lost = Fault(fails=True, lost=True)
        stand.store.plan = any_of(on("write", lost, first=2), on("abort", lost))
        job = await stand.export()
        await stand.has_failed(job, "STORE_FAILED")
        assert stand.store.spoilt["abort"] > 0
        await stand.only_the_right_is_left()


# --- reading


async def outcome(download: Awaitable[bytes]) -> str:
    """`right`, or why a download ended; wrong bytes are no outcome."""
    try:
        data = await download
    except grpc.aio.AioRpcError as failure:
        refused = rpc.Refusal(failure)
        return f"{refused.code.name} {refused.reason}"
    assert data == RIGHT
    return "right"


READS: dict[str, tuple[str, Fault, str]] = {
    "an open that is throttled": ("open", FAILS, "UNAVAILABLE STORE_FAILED"),
    "a read that is throttled": ("readinto", FAILS, "UNAVAILABLE STORE_FAILED"),
    "a read that ends": ("readinto", Fault(ends=True), "DATA_LOSS CHECKSUM_MISMATCH"),
    "a flipped bit": ("readinto", Fault(flipped=True), "DATA_LOSS CHECKSUM_MISMATCH"),
}


async def test_a_read_that_fails_is_told_and_never_served_as_something_else(
    tmp_path: Path, place: Place
) -> None:
    async with standing(tmp_path, place) as stand:
        job = await stand.export()
        for name, (step, fault, told) in READS.items():
            for first in range(PARTS):
                stand.store.plan = on(step, fault, first=first, times=1)
                download = partial(rpc.download, stand.stub, job.job_id)
                assert await outcome(download()) == told, (name, first)
                assert await outcome(download()) == "right", (name, first)
            stand.store.plan = on(step, fault)
            for _ in range(2):
                assert await outcome(download()) == told, name
            stand.store.heal()
            assert await outcome(download()) == "right"
        await stand.has_succeeded(job)
        await stand.only_the_right_is_left()


async def test_short_and_slow_reads_are_served_as_they_come(
    tmp_path: Path, place: Place
) -> None:
    async with standing(tmp_path, place) as stand:
        job = await stand.export()
        stand.store.plan = on("readinto", Fault(short=True), times=40)
        assert await rpc.download(stand.stub, job.job_id) == RIGHT
        assert stand.store.counts["readinto"] > 40
        for step in ("open", "readinto"):
            stand.store.plan = on(step, Fault(holds=True), first=1, times=1)
            download = asyncio.create_task(rpc.download(stand.stub, job.job_id))
            await until(lambda: stand.store.held == 1, ENOUGH)
            assert (await rpc.get(stand.stub, job.job_id)).state == SUCCEEDED
            stand.store.heal()
            assert await download == RIGHT


async def test_a_part_that_has_vanished_is_data_loss_and_not_an_empty_file(
    tmp_path: Path, place: Place
) -> None:
    async with standing(tmp_path, place) as stand:
        job = await stand.export()
        names = await asyncio.to_thread(stand.place.remains)
        parts = [key for key in map(OutputKey.parse, names) if key.kind is OUTPUT]
        await stand.store.delete(max(parts, key=lambda key: key.sequence))
        told = await outcome(rpc.download(stand.stub, job.job_id))
        assert told == "DATA_LOSS CHECKSUM_MISMATCH"
        told = await outcome(rpc.download(stand.stub, job.job_id, part_index=PARTS - 1))
        assert told == "DATA_LOSS CHECKSUM_MISMATCH"
        await stand.delete(job)
        await stand.nothing_is_left()


# --- deleting


async def more_than(least: int, count: Callable[[], int]) -> None:
    """Wait until there were more calls than that."""
    await until(lambda: count() > least, ENOUGH)


DELETES = {
    "fails": FAILS,
    "fails after it was done": Fault(fails=True, late=True),
    "is full": FULL,
}


@pytest.mark.minutes
@pytest.mark.parametrize("end", ["delete", "cancel"])
async def test_a_deletion_that_fails_is_done_again_until_nothing_is_left(
    tmp_path: Path, place: Place, end: str
) -> None:
    # Whoever stands still when his job is cancelled may write for as long as his lease.
    async with standing(tmp_path, place, lease=1.0) as stand:
        for name, fault in DELETES.items():
            if end == "delete":
                job = await stand.export()
            else:
                stand.store.plan = on("finalize", Fault(holds=True), kind=MANIFEST)
                job = await stand.create()
                await until(lambda: stand.store.held == 1, ENOUGH)
            before = stand.store.counts["delete_job"]
            failing = on("delete_job", fault)
            stand.store.plan = failing
            if end == "delete":
                await stand.delete(job)
            else:
                request = pb.CancelJobRequest(job_id=job.job_id)
                await stand.stub.CancelJob(request)
            # Whatever the store does, nobody gets to it from here on.
            refused = await rpc.refusal(rpc.download(stand.stub, job.job_id))
            assert refused.reason in ("JOB_NOT_FOUND", "JOB_CANCELLED"), name
            await more_than(before + 3, lambda: stand.store.counts["delete_job"])
            assert stand.tables()["jobs"] == 1, "it is not forgotten before"
            stand.store.heal()
            if end == "cancel":
                await stand.delete(job)
            await stand.nothing_is_left()


async def test_strays_of_a_job_that_succeeded_go_however_often_that_fails(
    tmp_path: Path, place: Place
) -> None:
    """Of its first attempts a part and a half are left."""
    late = Fault(fails=True, late=True, lost=True)
    lost = Fault(fails=True, lost=True)
    faults = (FAILS, Fault(fails=True, late=True))
    async with standing(tmp_path, place) as stand:
        for step, fault in product(("list_job", "delete", "sweep_unfinished"), faults):
            stand.store.spoilt.clear()
            stand.store.plan = any_of(
                on("finalize", late, first=1, times=1),
                on("finalize", lost, first=2, times=1),
                on(step, fault, times=3),
            )
            job = await stand.export()
            assert job.attempt == 3
            await stand.has_succeeded(job)
            await stand.lies_there(([OUTPUT] * PARTS + [MANIFEST]) * len(stand.kept))
            # The one stray that is a whole part can be deleted only once.
            once = step == "delete" and fault.late
            assert stand.store.spoilt[step] == (1 if once else 3)
        await stand.only_the_right_is_left()


@pytest.mark.parametrize("step", ["claim", "list_jobs", "delete_job"])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
async def test_a_sweep_for_orphans_that_fails_takes_them_the_next_time(
    tmp_path: Path, step: str, *, late: bool
) -> None:
    store = FaultyStore(MemoryStore())
    orphan = JobPrefix("gone", str(uuid4()))
    put(store, part_key(orphan), b"data")
    async with sqlite_world(tmp_path) as world:
        house = Housekeeping(world.ledger, store, reap_interval=timedelta(seconds=300))
        known = await world.succeeded()
        put(store, part_key(JobPrefix(known.tenant, known.job_id)), b"data")
        await house.sweep(await world.lease(SWEEP))
        world.clock.advance(86_400)
        store.plan = on(step, Fault(fails=True, late=late), times=1)
        lease = await world.lease(SWEEP)
        with pytest.raises(StoreFailed):
            await house.sweep(lease)
        await house.sweep(lease)
    left = {prefix async for prefix in store.list_jobs()}
    assert left == {JobPrefix(known.tenant, known.job_id)}


async def test_a_store_that_does_not_say_whose_it_is_at_start_is_told_or_warned_of(
    tmp_path: Path, place: Place, logs: list[Any]
) -> None:
    with pytest.raises(ConfigurationError, match="does not answer") as told:
        async with standing(tmp_path, place, on("claim", FAILS)):
            pass
    assert len(str(told.value).splitlines()) == 1
    # One that is full frees room, for which it must run.
    async with standing(tmp_path, place, on("claim", FULL)) as stand:
        job = await stand.export()
        await stand.has_succeeded(job)
        await stand.only_the_right_is_left()
    assert any("is full" in entry["event"] for entry in logs)


# --- S3 that answers amiss

CUT = Answer(cut=True)
AMISS = {
    "500": error(500, "InternalError"),
    "500 after it was done": error(500, "InternalError", forward=True),
    "503": error(503, "SlowDown"),
    "200 with an error": error(200, "InternalError"),
    "200 with an error after it was done": error(200, "InternalError", forward=True),
    "a cut": CUT,
    "a cut after it was done": Answer(forward=True, cut=True),
}
TRIES = 2


@pytest.fixture
def proxy(seaweed: SeaweedServer) -> Iterator[S3Proxy]:
    with s3_proxy(seaweed.endpoint) as proxy:
        yield proxy


@pytest.fixture
def s3(seaweed: SeaweedServer, proxy: S3Proxy) -> Place:
    """A place behind the proxy, seen past it."""
    place = s3_place(seaweed)
    amiss = {"endpoint_url": proxy.endpoint, "attempts": TRIES, "call_timeout": 10.0}
    url, options = place.settings["url"], place.settings["s3"]
    return Place({"url": url, "s3": options | amiss}, place.remains)


def next_ones(operation: str, answer: Answer, times: int | None) -> Answers:
    """Spoil the next calls of a kind, all of them with None."""
    seen = 0

    def plan(call: Call) -> Answer | None:
        nonlocal seen
        if call.operation != operation:
            return None
        seen += 1
        return answer if times is None or seen <= times else None

    return plan


@pytest.mark.minutes
@pytest.mark.parametrize("call", ["create", "part", "complete"])
async def test_s3_that_answers_an_upload_amiss_is_asked_again_then_the_attempt_then_the_job(
    tmp_path: Path, s3: Place, proxy: S3Proxy, call: str
) -> None:
    async with standing(tmp_path, s3) as stand:
        for name, answer in AMISS.items():
            done_all_the_same = call == "complete" and "after" in name
            # Once too often for one call, too, but with one answer only, for time's sake.
            for times, attempts in ((1, 1), (TRIES, 2), (None, 3)):
                if times == TRIES and name != "503":
                    continue
                proxy.plan = next_ones(call, answer, times)
                job = await stand.export()
                proxy.plan = lambda _: None
                if done_all_the_same:
                    # It looks what lies there, and finds its own part.
                    assert (job.state, job.attempt) == (SUCCEEDED, 1), name
                else:
                    wanted = SUCCEEDED if times else FAILED
                    assert (job.state, job.attempt) == (wanted, attempts), (name, times)
                if job.state == SUCCEEDED:
                    await stand.has_succeeded(job)
                else:
                    await stand.has_failed(job, "STORE_FAILED")
        await stand.only_the_right_is_left()


async def test_s3_that_answers_a_download_amiss_is_asked_again_and_then_told(
    tmp_path: Path, s3: Place, proxy: S3Proxy
) -> None:
    reads = AMISS | {
        "nothing": Answer(forward=True, truncate=0),
        "a little": Answer(forward=True, truncate=1000),
    }
    async with standing(tmp_path, s3) as stand:
        job = await stand.export()
        for name, answer in reads.items():
            for times in (1, None):
                proxy.plan = next_ones("get", answer, times)
                told = await outcome(rpc.download(stand.stub, job.job_id))
                if name == "a little" or (times and not name.startswith("200")):
                    assert told == "right", name
                else:
                    # The body of an error is no part, whatever its status says.
                    losses = ("UNAVAILABLE STORE_FAILED", "DATA_LOSS CHECKSUM_MISMATCH")
                    assert told in losses, name
                proxy.plan = lambda _: None
        await stand.has_succeeded(job)
        await stand.only_the_right_is_left()


@pytest.mark.parametrize("call", ["list", "uploads", "abort", "delete_many"])
@pytest.mark.minutes
async def test_s3_that_answers_a_deletion_amiss_is_asked_until_nothing_is_left(
    tmp_path: Path, s3: Place, proxy: S3Proxy, call: str
) -> None:
    async with standing(tmp_path, s3) as stand:
        for name in ("500", "503", "200 with an error", "a cut after it was done"):
            proxy.plan = next_ones(call, AMISS[name], None)
            before = proxy.count(call)
            # An upload is left behind too, for there to be something to abort.
            lost = Fault(fails=True, lost=True)
            stand.store.plan = on("finalize", lost, first=1, times=1)
            job = await stand.export()
            assert (job.state, job.attempt) == (SUCCEEDED, 2)
            await stand.delete(job)
            refused = await rpc.refusal(rpc.download(stand.stub, job.job_id))
            assert refused.reason == "JOB_NOT_FOUND"
            if call in ("list", "uploads") or "after it was done" not in name:
                await more_than(before + 2 * TRIES, lambda: proxy.count(call))
                assert stand.tables().get("jobs") == 1, name
            proxy.plan = lambda _: None
            await stand.nothing_is_left()
