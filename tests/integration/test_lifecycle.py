"""A job's whole life: queued, running, cancelled, failed, resumed, expired, gone."""

from __future__ import annotations

import asyncio
import resource
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from exportd.v1 import dataset_pb2, export_service_pb2_grpc, job_pb2
from exportd.v1 import export_service_pb2 as pb
from exportd_server.errors import SourceFailed, ValueNotEncodable
from exportd_server.jobs import caps
from exportd_server.jobs.ledger.sql import SqlLedger
from exportd_server.jobs.model import Job, PartRecord
from exportd_server.jobs.readers import Readers
from exportd_server.sources.base import Plan, Query, Shard, SourceChanged
from tests.support import rpc
from tests.support.gate import BATCH_ROWS, GateSource
from tests.support.lent import chunk_buffers, kept_for_chunks
from tests.support.readers import Downloads
from tests.support.samples import catalogue_of
from tests.support.server import Server, serve, server_process, settings, until
from tests.support.waits import ENOUGH


@asynccontextmanager
async def serving(
    data_dir: Path, gate: GateSource, **values: object
) -> AsyncIterator[Server]:
    async with serve(settings(data_dir, **values), catalogue_of(gated=gate)) as server:
        try:
            yield server
        finally:
            gate.open_wide()


async def state_of(server: Server, job_id: str, wanted: int) -> job_pb2.Job:
    """Watch a job until it is in a state."""
    async with asyncio.timeout(ENOUGH):
        async for response in server.stub.WatchJob(pb.WatchJobRequest(job_id=job_id)):
            if response.job.state == wanted:
                return response.job
    raise AssertionError("the job never got there")


async def rows_of(server: Server, job_id: str, rows: int) -> job_pb2.Job:
    """Watch a job until it has written so many rows."""
    async with asyncio.timeout(ENOUGH):
        async for response in server.stub.WatchJob(pb.WatchJobRequest(job_id=job_id)):
            if response.job.progress.rows >= rows:
                return response.job
    raise AssertionError("the job never got there")


async def test_a_job_without_a_slot_is_visibly_queued(
    tmp_path: Path, gate: GateSource
) -> None:
    async with serving(tmp_path, gate, worker={"concurrency": 1}) as server:
        first = await rpc.create(server.stub, "gated")
        await state_of(server, first.job_id, job_pb2.JOB_STATE_RUNNING)
        second = await rpc.create(server.stub, "gated")
        third = await rpc.create(server.stub, "gated", priority=5)
        waiting = await rpc.get(server.stub, second.job_id)
        assert waiting.state == job_pb2.JOB_STATE_PENDING
        assert waiting.progress.queue_position == 1
        assert (await rpc.get(server.stub, third.job_id)).progress.queue_position == 0
        gate.open_wide()
        done = [await rpc.finish(server.stub, j.job_id) for j in (first, second, third)]
        assert all(job.state == job_pb2.JOB_STATE_SUCCEEDED for job in done)
        assert done[2].start_time.ToNanoseconds() < done[1].start_time.ToNanoseconds()


async def test_progress_is_honest_while_the_job_runs(
    tmp_path: Path, gate: GateSource
) -> None:
    async with serving(tmp_path, gate) as server:
        job = await rpc.create(server.stub, "gated", max_part_rows=2 * BATCH_ROWS)
        gate.allow(5)
        job = await rows_of(server, job.job_id, 5 * BATCH_ROWS)
        assert job.state == job_pb2.JOB_STATE_RUNNING
        assert job.progress.rows == 5 * BATCH_ROWS
        assert job.progress.estimated_rows == 10 * BATCH_ROWS
        assert job.progress.fraction == 0.5
        assert job.progress.parts_done == 2
        assert job.progress.bytes > 0
        assert not job.progress.HasField("parts_total")


async def test_cancelling_a_running_export_stops_it_at_once_and_leaves_nothing(
    tmp_path: Path, gate: GateSource
) -> None:
    async with serving(tmp_path, gate) as server:
        job = await rpc.create(server.stub, "gated", max_part_rows=BATCH_ROWS)
        gate.allow(3)
        await rows_of(server, job.job_id, 3 * BATCH_ROWS)
        assert server.files()
        response = await server.stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))
        assert response.outcome == pb.CANCEL_OUTCOME_CANCELLED
        assert response.job.state == job_pb2.JOB_STATE_CANCELLED
        await until(lambda: gate.cancelled and not server.files())
        refused = await rpc.refusal(
            server.stub.StreamDownload(pb.StreamDownloadRequest(job_id=job.job_id))
        )
        assert refused.code is grpc.StatusCode.FAILED_PRECONDITION
        assert refused.reason == "JOB_CANCELLED"
        again = await server.stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))
        assert again.outcome == pb.CANCEL_OUTCOME_ALREADY_CANCELLED


async def test_cancelling_a_pending_job_means_it_never_runs(
    tmp_path: Path, gate: GateSource
) -> None:
    async with serving(tmp_path, gate, worker={"concurrency": 1}) as server:
        first = await rpc.create(server.stub, "gated")
        await state_of(server, first.job_id, job_pb2.JOB_STATE_RUNNING)
        second = await rpc.create(server.stub, "gated")
        await server.stub.CancelJob(pb.CancelJobRequest(job_id=second.job_id))
        gate.open_wide()
        await rpc.finish(server.stub, first.job_id)
        assert gate.opened == 1
        job = await rpc.get(server.stub, second.job_id)
        assert job.state == job_pb2.JOB_STATE_CANCELLED
        assert not job.HasField("start_time")


async def test_cancelling_a_finished_job_changes_nothing_and_says_so(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path, GateSource(wide=True)) as server:
        job = await rpc.export(server.stub, "gated")
        response = await server.stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))
        assert response.outcome == pb.CANCEL_OUTCOME_ALREADY_FINISHED
        assert response.job.state == job_pb2.JOB_STATE_SUCCEEDED
        assert await rpc.download(server.stub, job.job_id)


async def test_a_download_too_early_says_when_to_ask_again(
    tmp_path: Path, gate: GateSource
) -> None:
    async with serving(tmp_path, gate) as server:
        job = await rpc.create(server.stub, "gated")
        for call in (
            server.stub.StreamDownload(pb.StreamDownloadRequest(job_id=job.job_id)),
            server.stub.DeleteJob(pb.DeleteJobRequest(job_id=job.job_id)),
        ):
            refused = await rpc.refusal(call)
            assert refused.code is grpc.StatusCode.FAILED_PRECONDITION
            assert refused.reason == "JOB_NOT_FINISHED"
            assert refused.details["RetryInfo"].retry_delay.seconds > 0


async def test_a_source_that_dies_in_the_middle_fails_the_job_with_a_clean_reason(
    tmp_path: Path, gate: GateSource
) -> None:
    async with serving(tmp_path, gate, worker={"max_attempts": 1}) as server:
        job = await rpc.create(server.stub, "gated", max_part_rows=BATCH_ROWS)
        gate.allow(2)
        await rows_of(server, job.job_id, 2 * BATCH_ROWS)
        error = SourceFailed()
        error.__cause__ = RuntimeError("password=hunter2 host=10.0.0.1")
        gate.fail(error)
        job = await rpc.finish(server.stub, job.job_id)
        assert job.state == job_pb2.JOB_STATE_FAILED
        assert job.error.code == grpc.StatusCode.UNAVAILABLE.value[0]
        assert "SOURCE_FAILED" in job.error.message
        assert "hunter2" not in str(job)
        await until(lambda: not server.files())
        refused = await rpc.refusal(
            server.stub.StreamDownload(pb.StreamDownloadRequest(job_id=job.job_id))
        )
        assert refused.reason == "JOB_FAILED"
        assert refused.metadata["job_reason"] == "SOURCE_FAILED"


async def test_an_attempt_that_failed_is_made_again_from_the_last_finished_part(
    tmp_path: Path, gate: GateSource
) -> None:
    async with serving(tmp_path, gate) as server:
        job = await rpc.create(server.stub, "gated", max_part_rows=BATCH_ROWS)
        gate.allow(4)
        await rows_of(server, job.job_id, 4 * BATCH_ROWS)
        gate.fail()
        gate.open_wide()
        job = await rpc.finish(server.stub, job.job_id)
        assert job.state == job_pb2.JOB_STATE_SUCCEEDED
        assert job.attempt == 2
        assert job.generation == 1
        assert gate.skipped == [0, 4 * BATCH_ROWS]
        data = await rpc.download(server.stub, job.job_id)
        assert data.decode().split()[1:] == [f"{n},{n}" for n in range(10 * BATCH_ROWS)]


async def test_a_source_that_changed_begins_the_output_anew(
    tmp_path: Path, gate: GateSource
) -> None:
    async with serving(tmp_path, gate, worker={"lease": 1.0}) as server:
        job = await rpc.create(server.stub, "gated", max_part_rows=BATCH_ROWS)
        gate.allow(2)
        await rows_of(server, job.job_id, 2 * BATCH_ROWS)
        gate.fail(SourceChanged())
        gate.open_wide()
        job = await rpc.finish(server.stub, job.job_id)
        assert job.state == job_pb2.JOB_STATE_SUCCEEDED
        assert job.generation == 2
        assert job.manifest.rows == 10 * BATCH_ROWS
        # The parts, and the manifest.
        await until(lambda: len(server.files()) == 10 + 1)


async def test_a_value_that_cannot_be_exported_fails_the_job_at_once(
    tmp_path: Path, gate: GateSource
) -> None:
    async with serving(tmp_path, gate) as server:
        job = await rpc.create(server.stub, "gated")
        gate.fail(ValueNotEncodable("text holds bytes that are no UTF-8", column="text"))
        job = await rpc.finish(server.stub, job.job_id)
        assert job.state == job_pb2.JOB_STATE_FAILED
        assert job.attempt == 1
        assert "VALUE_NOT_ENCODABLE" in job.error.message


async def test_an_unforeseen_error_reaches_the_caller_as_a_reference_only(
    tmp_path: Path, gate: GateSource
) -> None:
    async with serving(tmp_path, gate) as server:
        job = await rpc.create(server.stub, "gated")
        gate.fail(RuntimeError("secret internals"))
        job = await rpc.finish(server.stub, job.job_id)
        assert job.error.code == grpc.StatusCode.INTERNAL.value[0]
        assert "reference" in job.error.message
        assert "secret" not in str(job)


@pytest.mark.parametrize("cap", ["max_rows", "max_bytes"])
async def test_a_cap_fails_the_job_with_the_cap_and_the_count(
    tmp_path: Path, cap: str
) -> None:
    limits = {cap: 5 * BATCH_ROWS}
    async with serving(tmp_path, GateSource(wide=True), limits=limits) as server:
        described = await server.stub.GetDataset(pb.GetDatasetRequest(name="gated"))
        assert getattr(described.dataset, cap) == 5 * BATCH_ROWS
        job = await rpc.create(server.stub, "gated")
        job = await rpc.finish(server.stub, job.job_id)
        assert job.state == job_pb2.JOB_STATE_FAILED
        assert "EXPORT_TOO_LARGE" in job.error.message
        assert f"{cap} = {5 * BATCH_ROWS}" in job.error.message
        await until(lambda: not server.files())


class TwoShards(GateSource):
    """Gives its batches twice."""

    def plan(self, query: Query, *, shard_rows: int | None = None) -> Plan:
        return Plan((Shard(0), Shard(1)))


@pytest.mark.parametrize("cap", ["max_rows", "max_bytes"])
async def test_a_cap_holds_for_all_shards_together_however_fast_they_end(
    tmp_path: Path, cap: str
) -> None:
    async with serving(tmp_path / "free", TwoShards(wide=True)) as server:
        job = await rpc.export(server.stub, "gated")
        whole: int = getattr(job.manifest, cap.removeprefix("max_"))
    limits = {cap: whole - 1}
    async with serving(tmp_path, TwoShards(wide=True), limits=limits) as server:
        job = await rpc.create(server.stub, "gated")
        job = await rpc.finish(server.stub, job.job_id)
        assert job.state == job_pb2.JOB_STATE_FAILED
        assert "EXPORT_TOO_LARGE" in job.error.message
        await until(lambda: not server.files())


async def test_more_parts_than_a_manifest_can_carry_fail_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caps, "MAX_PARTS", 5)
    async with serving(tmp_path, GateSource(wide=True)) as server:
        fits = await rpc.export(server.stub, "gated", max_part_rows=2 * BATCH_ROWS)
        assert len(fits.manifest.parts) == 5
        job = await rpc.create(server.stub, "gated", max_part_rows=BATCH_ROWS)
        job = await rpc.finish(server.stub, job.job_id)
        assert job.state == job_pb2.JOB_STATE_FAILED
        assert "max_parts = 5" in job.error.message
        await until(lambda: not any(job.job_id in str(p) for p in server.files()))


async def test_a_cap_that_is_met_exactly_is_not_passed(tmp_path: Path) -> None:
    limits = {"max_rows": 10 * BATCH_ROWS}
    async with serving(tmp_path, GateSource(wide=True), limits=limits) as server:
        job = await rpc.export(server.stub, "gated")
        assert job.manifest.rows == 10 * BATCH_ROWS


async def test_too_many_active_jobs_are_refused_with_the_quota(
    tmp_path: Path, gate: GateSource
) -> None:
    async with serving(tmp_path, gate, limits={"max_active_jobs": 2}) as server:
        key = "01890a5d-ac96-774b-bcce-b302099a8057"
        first = await rpc.create(server.stub, "gated", request_id=key)
        await rpc.create(server.stub, "gated")
        refused = await rpc.refusal(server.stub.CreateExport(rpc.request("gated")))
        assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refused.reason == "QUOTA_EXCEEDED"
        assert refused.details["QuotaFailure"].violations
        assert refused.details["RetryInfo"].retry_delay.seconds > 0
        # A repeated call makes nothing, so no quota stands in its way.
        again = await rpc.create(server.stub, "gated", request_id=key)
        assert again.job_id == first.job_id


async def test_expired_output_is_refused_from_that_moment_and_then_forgotten(
    tmp_path: Path,
) -> None:
    retention = {"reap_interval": 1.0}
    async with serving(tmp_path, GateSource(wide=True), retention=retention) as server:
        message = rpc.request("gated")
        message.ttl.FromSeconds(3)
        job = (await server.stub.CreateExport(message)).job
        job = await rpc.finish(server.stub, job.job_id)
        left = job.expire_time.ToNanoseconds() / 1e9 - time.time()
        assert left <= 3
        await asyncio.sleep(max(0.0, left))
        refused = await rpc.refusal(
            server.stub.StreamDownload(pb.StreamDownloadRequest(job_id=job.job_id))
        )
        assert refused.code is grpc.StatusCode.NOT_FOUND
        assert refused.reason in ("OUTPUT_EXPIRED", "JOB_NOT_FOUND")
        await until(lambda: not server.files())
        async with asyncio.timeout(ENOUGH):
            while (await server.stub.ListJobs(pb.ListJobsRequest())).jobs:
                await asyncio.sleep(0.05)


async def test_an_expired_output_that_is_not_reaped_yet_is_refused(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path, GateSource(wide=True)) as server:
        message = rpc.request("gated")
        message.ttl.FromSeconds(3)
        job = (await server.stub.CreateExport(message)).job
        job = await rpc.finish(server.stub, job.job_id)
        assert await rpc.download(server.stub, job.job_id)
        await asyncio.sleep(max(0.0, job.expire_time.ToNanoseconds() / 1e9 - time.time()))
        refused = await rpc.refusal(
            server.stub.StreamDownload(pb.StreamDownloadRequest(job_id=job.job_id))
        )
        assert refused.reason == "OUTPUT_EXPIRED"


async def test_a_download_in_progress_is_not_cut_by_expiry(tmp_path: Path) -> None:
    gate = GateSource(200, wide=True)
    retention = {"reap_interval": 1.0}
    async with serving(
        tmp_path, gate, retention=retention, download={"chunk_bytes": 65_536}
    ) as server:
        message = rpc.request("gated", max_part_rows=20 * BATCH_ROWS)
        message.ttl.FromSeconds(3)
        job = (await server.stub.CreateExport(message)).job
        job = await rpc.finish(server.stub, job.job_id)
        call = aiter(
            server.stub.StreamDownload(pb.StreamDownloadRequest(job_id=job.job_id))
        )
        size = 0
        await anext(call)
        # Past the expiry, and past the round of reaping after it.
        async with asyncio.timeout(ENOUGH):
            while (await server.stub.ListJobs(pb.ListJobsRequest())).jobs:
                await asyncio.sleep(0.1)
        async for chunk in call:
            size += len(chunk.data)
        assert size == job.manifest.bytes
        await until(lambda: not server.files())


async def test_deleting_a_job_cuts_its_downloads(tmp_path: Path) -> None:
    gate = GateSource(1500, wide=True)
    async with serving(tmp_path, gate, download={"chunk_bytes": 4096}) as server:
        job = await rpc.export(server.stub, "gated")
        call = aiter(
            server.stub.StreamDownload(pb.StreamDownloadRequest(job_id=job.job_id))
        )
        await anext(call)
        await server.stub.DeleteJob(pb.DeleteJobRequest(job_id=job.job_id))
        refused = await rpc.refusal(call)
        assert refused.reason == "JOB_NOT_FOUND"


async def test_a_download_that_is_cut_as_it_begins_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moment when its first message is on its way: the library then forgets that it
    has sent the metadata, and its status would never arrive."""
    keep = Readers.keep

    async def keep_and_cut(readers: Readers, job: Job) -> None:
        await keep(readers, job)
        readers.cut(job.job_id)

    async with serving(tmp_path, GateSource(1, wide=True)) as server:
        job = await rpc.export(server.stub, "gated")
        monkeypatch.setattr(Readers, "keep", keep_and_cut)
        request = pb.StreamDownloadRequest(job_id=job.job_id)
        async with asyncio.timeout(ENOUGH):
            refused = await rpc.refusal(server.stub.StreamDownload(request))
        assert refused.reason == "JOB_NOT_FOUND"


async def test_following_a_running_job_gives_the_same_file(
    tmp_path: Path, gate: GateSource
) -> None:
    async with serving(tmp_path, gate) as server:
        for number in (dataset_pb2.FORMAT_CSV, dataset_pb2.FORMAT_ARROW):
            job = await rpc.create(
                server.stub, "gated", max_part_rows=BATCH_ROWS, format=number
            )
            call: Any = aiter(
                server.stub.StreamDownload(
                    pb.StreamDownloadRequest(job_id=job.job_id, follow=True)
                )
            )
            first = await anext(call)
            assert not first.metadata.HasField("total_bytes")
            data = bytearray()
            for _ in range(3):
                gate.allow()
            chunk = await asyncio.wait_for(anext(call), ENOUGH)
            # Data came while the job was running.
            running = await rpc.get(server.stub, job.job_id)
            assert running.state == job_pb2.JOB_STATE_RUNNING
            data += chunk.data
            gate.allow(7)
            last = chunk
            async for last in call:
                data += last.data
            assert last.metadata.total_bytes == len(data)
            assert bytes(data) == await rpc.download(server.stub, job.job_id)


async def test_who_follows_keeps_no_memory_of_chunks_while_waiting_for_parts(
    tmp_path: Path, gate: GateSource
) -> None:
    before = chunk_buffers()
    async with serving(tmp_path, gate) as server:
        job = await rpc.create(server.stub, "gated", max_part_rows=BATCH_ROWS)
        call: Any = aiter(
            server.stub.StreamDownload(
                pb.StreamDownloadRequest(job_id=job.job_id, follow=True)
            )
        )
        await anext(call)
        # The last finished part waits for the next one: two of the three are sent.
        gate.allow(3)
        for _ in range(2):
            assert (await asyncio.wait_for(anext(call), ENOUGH)).data
        await until(lambda: kept_for_chunks(besides=before) == [0])
        gate.allow(7)
        async for _ in call:
            pass


async def test_following_a_job_that_fails_fails_too(
    tmp_path: Path, gate: GateSource
) -> None:
    async with serving(tmp_path, gate, worker={"max_attempts": 1}) as server:
        job = await rpc.create(server.stub, "gated", max_part_rows=BATCH_ROWS)
        call = aiter(
            server.stub.StreamDownload(
                pb.StreamDownloadRequest(job_id=job.job_id, follow=True)
            )
        )
        gate.allow(2)
        await anext(call)
        await anext(call)
        gate.fail()
        assert (await rpc.refusal(call)).reason == "JOB_FAILED"


async def test_following_a_job_that_is_cancelled_says_so_even_in_the_middle_of_a_look(
    tmp_path: Path, gate: GateSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cancel falls between the look at the job and the look at its parts."""
    finished_parts = SqlLedger.finished_parts

    async def after_a_cancel(
        ledger: SqlLedger, tenant: str, job_id: str
    ) -> list[PartRecord]:
        parts = await finished_parts(ledger, tenant, job_id)
        if len(parts) < 3:
            return parts
        await ledger.cancel_job(tenant, job_id)
        return await finished_parts(ledger, tenant, job_id)

    monkeypatch.setattr(SqlLedger, "finished_parts", after_a_cancel)
    async with serving(tmp_path, gate) as server:
        job = await rpc.create(server.stub, "gated", max_part_rows=BATCH_ROWS)
        call = aiter(
            server.stub.StreamDownload(
                pb.StreamDownloadRequest(job_id=job.job_id, follow=True)
            )
        )
        gate.allow(2)
        await anext(call)
        await anext(call)
        gate.allow(8)
        assert (await rpc.refusal(call)).reason == "JOB_CANCELLED"


async def test_cancelling_cuts_those_who_follow_with_the_right_reason(
    tmp_path: Path,
) -> None:
    """The reader is in the middle of a part's data when the job is cancelled."""
    gate = GateSource(2000)
    async with serving(tmp_path, gate, download={"chunk_bytes": 4096}) as server:
        job = await rpc.create(server.stub, "gated", max_part_rows=900 * BATCH_ROWS)
        gate.allow(1900)
        call = aiter(
            server.stub.StreamDownload(
                pb.StreamDownloadRequest(job_id=job.job_id, follow=True)
            )
        )
        await anext(call)
        await anext(call)
        await server.stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))
        refused = await rpc.refusal(call)
        assert refused.code is grpc.StatusCode.FAILED_PRECONDITION
        assert refused.reason == "JOB_CANCELLED"


async def test_following_from_before_the_beginning_is_refused_before_any_data(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path, GateSource(wide=True)) as server:
        job = await rpc.export(server.stub, "gated")
        call = server.stub.StreamDownload(
            pb.StreamDownloadRequest(job_id=job.job_id, follow=True, read_offset=-1)
        )
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await anext(aiter(call))
        assert refused.value.code() is grpc.StatusCode.OUT_OF_RANGE


async def test_a_server_that_is_cancelled_ends_although_a_source_hangs(
    tmp_path: Path, gate: GateSource
) -> None:
    """What a program that embeds it may do at any moment."""
    up: asyncio.Queue[Server] = asyncio.Queue()

    async def run() -> None:
        options = settings(tmp_path, drain_timeout=0.5)
        async with serve(options, catalogue_of(gated=gate)) as server:
            await up.put(server)
            await asyncio.Event().wait()

    running = asyncio.create_task(run())
    server = await up.get()
    job = await rpc.create(server.stub, "gated", max_part_rows=BATCH_ROWS)
    gate.allow(2)
    await rows_of(server, job.job_id, 2 * BATCH_ROWS)
    # A loop that is blocked cannot tell time: a thread ends what it waits for.
    rescue = threading.Timer(ENOUGH, gate.fail)
    rescue.start()
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
    assert rescue.is_alive(), "it needed no rescue"
    assert gate.cancelled
    rescue.cancel()


async def test_a_reader_that_takes_nothing_is_dropped(
    tmp_path: Path, downloads: Downloads
) -> None:
    gate = GateSource(2000, wide=True)
    async with serving(tmp_path, gate, download={"stall_timeout": 2.0}) as server:
        job = await rpc.export(server.stub, "gated")
        assert job.manifest.bytes > 20 * 2**20
        call = aiter(
            server.stub.StreamDownload(pb.StreamDownloadRequest(job_id=job.job_id))
        )
        await anext(call)
        await downloads.over()
        refused = await rpc.refusal(call)
        assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refused.reason == "READER_STALLED"
        assert await rpc.download(server.stub, job.job_id)


async def test_damaged_bytes_are_reported_as_data_loss(tmp_path: Path) -> None:
    async with serving(tmp_path, GateSource(wide=True)) as server:
        for damage in ("flip", "truncate", "remove"):
            job = await rpc.export(server.stub, "gated")
            stored = (p for p in server.files() if job.job_id in str(p))
            file = next(p for p in stored if p.parent.name == "output")
            data = bytearray(file.read_bytes())
            if damage == "remove":
                file.unlink()
            elif damage == "truncate":
                file.write_bytes(data[:-5])
            else:
                data[100] ^= 1
                file.write_bytes(data)
            refused = await rpc.refusal(
                server.stub.StreamDownload(pb.StreamDownloadRequest(job_id=job.job_id))
            )
            assert refused.code is grpc.StatusCode.DATA_LOSS, damage
            assert refused.reason == "CHECKSUM_MISMATCH"


async def test_a_killed_server_resumes_the_export_at_its_last_finished_part(
    tmp_path: Path, sample_catalogue: Path
) -> None:
    arguments = ("--catalogue", str(sample_catalogue))
    fields = {"max_part_rows": 200, "format": dataset_pb2.FORMAT_JSONL}
    with server_process(tmp_path, *arguments) as first:
        async with grpc.aio.insecure_channel(first.address) as channel:
            stub = export_service_pb2_grpc.ExportServiceStub(channel)
            job = await rpc.create(stub, "token_transfers", **fields)
            async for response in stub.WatchJob(pb.WatchJobRequest(job_id=job.job_id)):
                if response.job.progress.parts_done >= 3:
                    break
            assert response.job.state == job_pb2.JOB_STATE_RUNNING
        first.kill()
    survivors = {p.name for p in (tmp_path / "outputs").rglob("*") if p.is_file()}
    with server_process(tmp_path, *arguments) as second:
        async with grpc.aio.insecure_channel(second.address) as channel:
            stub = export_service_pb2_grpc.ExportServiceStub(channel)
            job = await rpc.finish(stub, job.job_id)
            assert job.state == job_pb2.JOB_STATE_SUCCEEDED
            assert job.attempt == 2
            assert job.generation == 1
            resumed = await rpc.download(stub, job.job_id)
            whole = await rpc.export(
                stub, "token_transfers", format=dataset_pb2.FORMAT_JSONL
            )
            assert resumed == await rpc.download(stub, whole.job_id)
            kept = [
                p.name
                for p in (tmp_path / "outputs").rglob("*")
                if p.is_file() and f"{job.job_id}/output" in str(p)
            ]
            # What was finished before the kill was not written again.
            assert len(survivors & set(kept)) >= 3
            async with asyncio.timeout(ENOUGH):
                while len(kept) != len(job.manifest.parts):
                    await asyncio.sleep(0.05)
                    kept = [
                        p.name
                        for p in (tmp_path / "outputs").rglob("*")
                        if p.is_file() and f"{job.job_id}/output" in str(p)
                    ]
        assert second.terminate() == 0


async def test_a_clean_stop_gives_the_work_back_uncounted(tmp_path: Path) -> None:
    gate = GateSource()
    options = {"drain_timeout": 0.2}
    async with serve(settings(tmp_path, **options), catalogue_of(gated=gate)) as server:
        job = await rpc.create(server.stub, "gated", max_part_rows=BATCH_ROWS)
        gate.allow(3)
        await rows_of(server, job.job_id, 3 * BATCH_ROWS)
    gate.open_wide()
    async with serve(settings(tmp_path, **options), catalogue_of(gated=gate)) as server:
        job = await rpc.finish(server.stub, job.job_id)
        assert job.state == job_pb2.JOB_STATE_SUCCEEDED
        assert job.attempt == 1
        assert gate.skipped == [0, 3 * BATCH_ROWS]


async def test_a_part_that_is_gone_before_the_output_is_published_begins_it_anew(
    tmp_path: Path,
) -> None:
    """A ledger that was restored may name parts that were deleted since."""
    gate = GateSource()
    options = {"drain_timeout": 0.2}
    async with serve(settings(tmp_path, **options), catalogue_of(gated=gate)) as server:
        job = await rpc.create(server.stub, "gated", max_part_rows=BATCH_ROWS)
        gate.allow(3)
        await rows_of(server, job.job_id, 3 * BATCH_ROWS)
    server.files()[0].unlink()
    gate.open_wide()
    async with serve(settings(tmp_path, **options), catalogue_of(gated=gate)) as server:
        job = await rpc.finish(server.stub, job.job_id)
        assert job.state == job_pb2.JOB_STATE_SUCCEEDED
        assert job.generation == 2
        assert gate.skipped == [0, 3 * BATCH_ROWS, 0]
        data = await rpc.download(server.stub, job.job_id)
        assert data.decode().split()[1:] == [f"{n},{n}" for n in range(10 * BATCH_ROWS)]


async def test_a_full_disk_fails_the_job_cleanly_and_the_server_lives_on(
    tmp_path: Path,
) -> None:
    """The limit on file size stands in for a full disk, with the same kind of errno."""
    async with serving(tmp_path, GateSource(2000, wide=True)) as server:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8 * 2**20, hard))
        try:
            job = await rpc.create(server.stub, "gated")
            job = await rpc.finish(server.stub, job.job_id)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert job.state == job_pb2.JOB_STATE_FAILED
        assert "STORE_FULL" in job.error.message
        await until(lambda: not server.files())
        await rpc.export(server.stub, "gated")


async def test_a_reader_that_goes_away_is_no_error_of_the_servers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async with serving(tmp_path, GateSource(2000, wide=True)) as server:
        job = await rpc.export(server.stub, "gated")
        for _ in range(20):
            call = server.stub.StreamDownload(pb.StreamDownloadRequest(job_id=job.job_id))
            async for _ in call:
                break
            call.cancel()
        assert await rpc.download(server.stub, job.job_id)
    logged = capfd.readouterr()
    assert "unforeseen" not in logged.out + logged.err
    assert "Traceback" not in logged.out + logged.err
