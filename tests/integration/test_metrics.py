"""Metrics move with what a real server does, and cannot be made to grow by its callers."""

from __future__ import annotations

import asyncio
import math
import socket
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf import struct_pb2

from exportd.v1 import export_service_pb2 as pb
from exportd.v1 import job_pb2, sink_pb2
from exportd_server.api.http_metrics import MOST_CONNECTIONS
from exportd_server.errors import DeliveryFailed, LedgerUnavailable, SourceFailed
from exportd_server.jobs import measuring
from exportd_server.jobs.ledger.sqlite import open_sqlite_ledger
from exportd_server.jobs.measuring import Measuring
from exportd_server.platform import metrics_exports, metrics_service
from exportd_server.platform.clock import SystemClock
from exportd_server.sinks.base import Delivery
from exportd_server.sinks.registry import SinkTypes
from tests.support import rpc
from tests.support.gate import BATCH_ROWS, GateSource
from tests.support.samples import catalogue_of
from tests.support.scrape import Scrape, scrape
from tests.support.scripted_sink import ScriptedSink
from tests.support.server import Server, serve, settings
from tests.support.waits import ENOUGH

SERVICE = "exportd.v1.ExportService"
BATCHES = 3


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger is asked more often than in production."""
    monkeypatch.setattr(measuring, "INTERVAL", 0.05)
    monkeypatch.setattr(measuring, "_SHARE", 1)


class Measured:
    """A server, and what has moved since it began."""

    def __init__(self, server: Server, address: str, before: Scrape) -> None:
        self.server = server
        self.stub = server.stub
        self.address = address
        self.before = before

    async def moved(self, name: str, **labels: str) -> float:
        """By how much the series with these labels have moved."""
        now = await scrape(self.address)
        return now.total(name, **labels) - self.before.total(name, **labels)

    async def until(
        self, condition: Callable[[float], bool], name: str, **labels: str
    ) -> None:
        """Wait until a figure is so."""
        async with asyncio.timeout(ENOUGH):
            while not condition((await scrape(self.address)).total(name, **labels)):
                await asyncio.sleep(0.05)

    async def until_moved(self, by: float, name: str, **labels: str) -> None:
        """Wait until a counter has moved so far."""
        begun = self.before.total(name, **labels)
        await self.until(lambda value: value - begun >= by, name, **labels)


@asynccontextmanager
async def measured(
    folder: Path,
    port: int,
    *,
    types: SinkTypes | None = None,
    sources: dict[str, GateSource],
    **values: Any,
) -> AsyncIterator[Measured]:
    address = f"127.0.0.1:{port}"
    options = settings(
        folder / "data", metrics={"listen": address}, drain_timeout=2.0, **values
    )
    async with serve(options, catalogue_of(**sources), types) as server:
        yield Measured(server, address, await scrape(address))


@pytest.mark.minutes
async def test_a_job_moves_what_it_touches(tmp_path: Path, unused_tcp_port: int) -> None:
    sources = {"plain": GateSource(BATCHES, wide=True)}
    async with measured(tmp_path, unused_tcp_port, sources=sources) as it:
        job = await rpc.export(it.stub, "plain", max_part_rows=BATCH_ROWS)
        size = len(await rpc.download(it.stub, job.job_id))
        data = {"dataset": "plain", "format": "CSV"}
        # What a transaction did is counted when it is committed: its reader may be ahead.
        await it.until_moved(1, "exportd_job_seconds_count", state="SUCCEEDED")
        await it.until_moved(1, "exportd_attempts_total", kind="plan", outcome="done")
        assert await it.moved("exportd_jobs_created_total", **data) == 1
        assert await it.moved("exportd_jobs_finished_total", **data, state="SUCCEEDED") == 1
        assert await it.moved("exportd_jobs_failed_total") == 0
        assert await it.moved("exportd_rows_exported_total", **data) == BATCHES * BATCH_ROWS
        stored = sum(part.bytes for part in job.manifest.parts)
        assert await it.moved("exportd_bytes_exported_total", **data) == stored
        assert await it.moved("exportd_job_wait_seconds_count") == 1
        assert await it.moved("exportd_job_seconds_count", state="SUCCEEDED") == 1
        for stage in ("source", "encode", "write"):
            assert await it.moved("exportd_stage_seconds_count", stage=stage) == 1
            assert await it.moved("exportd_stage_seconds_sum", stage=stage) > 0
        assert await it.moved("exportd_claims_total", outcome="claimed") >= 1
        assert await it.moved("exportd_claim_seconds_count") >= 1
        # Its parts and its manifest.
        for operation in ("create", "write", "finalize"):
            done = {"operation": operation, "outcome": "ok"}
            assert await it.moved("exportd_store_operations_total", **done) == BATCHES + 1
        for operation in ("open", "read"):
            done = {"operation": operation, "outcome": "ok"}
            assert await it.moved("exportd_store_operations_total", **done) == BATCHES
            name = "exportd_store_operation_seconds_count"
            assert await it.moved(name, operation=operation) == BATCHES
        assert await it.moved("exportd_download_bytes_total", via="grpc") == size
        # A call is counted once its end is on its way, which its caller may see before.
        call = {"grpc_method": "StreamDownload", "grpc_type": "server_stream"}
        await it.until_moved(1, "grpc_server_handled_total", **call, grpc_code="OK")
        assert await it.moved("grpc_server_started_total", **call) == 1
        assert await it.moved("grpc_server_handling_seconds_count", **call) == 1
        now = await scrape(it.address)
        assert now.value("exportd_ledger_up") == 1
        assert now.value("exportd_store_uploads_open") == 0
        assert now.value("exportd_downloads_open") == 0
        for place in ("data", "store"):
            free = now.value("exportd_disk_free_bytes", place=place)
            assert 0 < free < now.value("exportd_disk_size_bytes", place=place)
        assert now.total("exportd_build_info") == 1
        for name in ("resident_memory_bytes", "open_fds", "start_time_seconds"):
            assert now.value(f"process_{name}") > 0
        assert now.value("process_cpu_seconds_total") > 0


async def test_figures_of_now_rise_and_fall(tmp_path: Path, unused_tcp_port: int) -> None:
    gate = GateSource(BATCHES)
    async with measured(
        tmp_path, unused_tcp_port, sources={"gated": gate}, worker={"concurrency": 1}
    ) as it:
        gate.allow()
        job = await rpc.create(it.stub, "gated")
        watch = it.stub.WatchJob(pb.WatchJobRequest(job_id=job.job_id))
        await anext(aiter(watch))
        follow = it.stub.StreamDownload(
            pb.StreamDownloadRequest(job_id=job.job_id, follow=True)
        )
        await anext(aiter(follow))
        await it.until(lambda n: n == 1, "exportd_watches_open")
        await it.until(lambda n: n == 1, "exportd_downloads_open")
        await it.until(lambda n: n == 1, "exportd_store_uploads_open")
        waiting = await rpc.create(it.stub, "gated")
        await it.until(lambda n: n == 1, "exportd_jobs_unfinished", state="RUNNING")
        await it.until(lambda n: n == 1, "exportd_jobs_unfinished", state="PENDING")
        await it.until(lambda n: n == 1, "exportd_tasks_open", kind="plan", state="ready")
        await it.until(lambda age: age > 0, "exportd_queue_oldest_seconds")
        await it.until(lambda age: age > 0, "exportd_task_oldest_seconds", kind="plan")
        gate.open_wide()
        await rpc.finish(it.stub, job.job_id)
        await rpc.finish(it.stub, waiting.job_id)
        for _ in [message async for message in follow]:
            pass
        watch.cancel()
        for name in ("watches_open", "downloads_open", "store_uploads_open"):
            await it.until(lambda n: n == 0, f"exportd_{name}")
        await it.until(lambda n: n == 0, "exportd_jobs_unfinished")
        await it.until(lambda age: age == 0, "exportd_queue_oldest_seconds")


async def test_jobs_that_fail_or_are_cancelled_are_counted_with_the_reason(
    tmp_path: Path, unused_tcp_port: int
) -> None:
    gate = GateSource(BATCHES)
    async with measured(
        tmp_path, unused_tcp_port, sources={"gated": gate}, worker={"max_attempts": 1}
    ) as it:
        gate.fail(SourceFailed())
        job = await rpc.finish(it.stub, (await rpc.create(it.stub, "gated")).job_id)
        assert job.state == job_pb2.JOB_STATE_FAILED
        failed = {"dataset": "gated", "reason": "SOURCE_FAILED"}
        await it.until_moved(1, "exportd_job_seconds_count", state="FAILED")
        await it.until_moved(1, "exportd_attempts_total", kind="plan", outcome="failed")
        assert await it.moved("exportd_jobs_failed_total", **failed) == 1
        gate.allow()
        job = await rpc.create(it.stub, "gated")
        await it.until(lambda n: n == 1, "exportd_store_uploads_open")
        await it.stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))
        await it.until_moved(1, "exportd_job_seconds_count", state="CANCELLED")
        for state in ("FAILED", "CANCELLED"):
            assert await it.moved("exportd_jobs_finished_total", state=state) == 1
        await it.until_moved(1, "exportd_leases_lost_total", kind="plan", cause="job_ended")
        await it.until_moved(1, "exportd_attempts_total", kind="plan", outcome="lost")
        assert await it.moved("exportd_leases_lost_total", cause="taken_over") == 0
        assert await it.moved("exportd_lease_takeovers_total") == 0


async def test_a_lease_that_others_took_and_one_that_ran_out_are_counted(
    tmp_path: Path, unused_tcp_port: int
) -> None:
    gate = GateSource(BATCHES)
    worker = {"lease": 1.0, "poll": 0.1, "concurrency": 1}
    async with measured(
        tmp_path, unused_tcp_port, sources={"gated": gate}, worker=worker
    ) as it:
        gate.allow()
        job = await rpc.create(it.stub, "gated")
        await it.until(lambda n: n == 1, "exportd_store_uploads_open")
        with closing(sqlite3.connect(tmp_path / "data/ledger.db", timeout=30)) as ledger:
            # As if somebody else had taken the task, and then died.
            ledger.execute(
                "UPDATE tasks SET token = token + 100000, owner = 'another' "
                "WHERE kind = 'shard' AND state = 'leased'"
            )
            ledger.commit()
        lost = {"kind": "plan", "cause": "taken_over"}
        await it.until_moved(1, "exportd_leases_lost_total", **lost)
        await it.until_moved(1, "exportd_lease_takeovers_total", kind="shard")
        gate.open_wide()
        await rpc.finish(it.stub, job.job_id)
        await it.until_moved(1, "exportd_attempts_total", kind="shard", outcome="done")


async def test_deliveries_and_disabled_endpoints_are_counted(
    tmp_path: Path, unused_tcp_port: int
) -> None:
    scripted = ScriptedSink()
    scripted.behaviour["refused"] = _refusing
    config = struct_pb2.Struct()
    async with measured(
        tmp_path,
        unused_tcp_port,
        sources={"plain": GateSource(BATCHES, wide=True)},
        types=SinkTypes.installed().with_type(scripted),
    ) as it:
        for label in ("taken", "refused"):
            config.update({"label": label, "takes": "whole"})
            sink = sink_pb2.Sink(
                name=label, plugin=sink_pb2.PluginSink(type="scripted", config=config)
            )
            job = await rpc.create(it.stub, "plain", sinks=[sink])
            watch = pb.WatchJobRequest(job_id=job.job_id, until_delivered=True)
            async for _ in it.stub.WatchJob(watch):
                pass
        name = "exportd_sink_deliveries_total"
        await it.until_moved(1, name, sink="scripted", outcome="delivered")
        await it.until_moved(1, name, sink="scripted", outcome="dead_lettered")
        assert await it.moved("exportd_sink_delivery_seconds_count", sink="scripted") == 2
        with closing(sqlite3.connect(tmp_path / "data/ledger.db", timeout=30)) as ledger:
            ledger.execute("UPDATE queues SET disabled_time = 1")
            ledger.commit()
        await it.until(lambda n: n >= 1, "exportd_sink_queues_disabled", sink="scripted")


def _refusing(_delivery: Delivery) -> DeliveryFailed:
    return DeliveryFailed("refused", retryable=False)


async def test_calls_are_counted_by_how_they_ended(
    tmp_path: Path, unused_tcp_port: int
) -> None:
    gate = GateSource(BATCHES)
    async with measured(tmp_path, unused_tcp_port, sources={"gated": gate}) as it:
        with suppress(grpc.aio.AioRpcError):
            await rpc.get(it.stub, "no uuid")
        job = await rpc.create(it.stub, "gated")
        watch = it.stub.WatchJob(pb.WatchJobRequest(job_id=job.job_id))
        await anext(aiter(watch))
        watch.cancel()
        health: Any = it.server.channel.unary_unary("/grpc.health.v1.Health/Check")
        await health(b"")
        name = "grpc_server_handled_total"
        of = {"grpc_service": SERVICE}
        for method, code in (
            ("GetJob", "InvalidArgument"),
            ("CreateExport", "OK"),
            ("WatchJob", "Canceled"),
        ):
            await it.until_moved(1, name, **of, grpc_method=method, grpc_code=code)
        check = {"grpc_service": "grpc.health.v1.Health", "grpc_method": "Check"}
        await it.until_moved(1, name, **check, grpc_code="OK")
        gate.open_wide()


async def test_a_call_that_is_refused_before_anybody_reads_it_is_counted(
    tmp_path: Path, unused_tcp_port: int
) -> None:
    gate = GateSource(BATCHES)
    async with measured(
        tmp_path, unused_tcp_port, sources={"gated": gate}, limits={"max_calls": 1}
    ) as it:
        job = await rpc.create(it.stub, "gated")
        watch = it.stub.WatchJob(pb.WatchJobRequest(job_id=job.job_id))
        await anext(aiter(watch))
        assert (await rpc.refusal(rpc.get(it.stub, job.job_id))).reason == "QUOTA_EXCEEDED"
        call = {"grpc_method": "GetJob", "grpc_code": "ResourceExhausted"}
        await it.until_moved(1, "grpc_server_handled_total", **call)
        watch.cancel()
        gate.open_wide()


async def test_names_that_callers_invent_make_no_series(
    tmp_path: Path, unused_tcp_port: int
) -> None:
    sources = {"plain": GateSource(BATCHES, wide=True)}
    async with measured(tmp_path, unused_tcp_port, sources=sources) as it:
        await rpc.export(it.stub, "plain")
        before = await scrape(it.address)
        for number in range(20):
            evil = f'evil-{number}"}}\n# '
            for method in (f"/evil{number}.Service/Do", f"/{SERVICE}/Evil{number}"):
                with suppress(grpc.aio.AioRpcError):
                    unknown: Any = it.server.channel.unary_unary(method)
                    await unknown(b"")
            with suppress(grpc.aio.AioRpcError):
                await rpc.create(it.stub, evil)
            with suppress(grpc.aio.AioRpcError):
                await rpc.create(it.stub, "plain", target_id=evil)
            with suppress(grpc.aio.AioRpcError):
                await rpc.get(it.stub, evil)
            await rpc.export(it.stub, "plain", labels={f"evil-{number}": "x"})
        await it.until_moved(40, "grpc_server_started_total", grpc_service="unknown")
        after = await scrape(it.address)
        # How long something takes, and how it ended, is not the callers' to name.
        assert after.series.keys() == before.series.keys()


async def answered(address: str) -> None:
    """Wait until the port has a place."""
    async with (
        asyncio.timeout(ENOUGH),
        httpx.AsyncClient(base_url=f"http://{address}") as client,
    ):
        while (await client.get("/metrics")).is_server_error:
            await asyncio.sleep(0.01)


async def test_those_who_connect_and_say_nothing_have_no_threads_and_are_few(
    tmp_path: Path, unused_tcp_port: int
) -> None:
    async with (
        measured(tmp_path, unused_tcp_port, sources={}) as server,
        AsyncExitStack() as silent,
    ):
        threads = threading.active_count()
        for _ in range(MOST_CONNECTIONS):
            _, writer = await asyncio.open_connection("127.0.0.1", unused_tcp_port)
            silent.callback(writer.close)
        reader, writer = await asyncio.open_connection("127.0.0.1", unused_tcp_port)
        assert (await reader.read()).startswith(b"HTTP/1.1 503 ")
        writer.close()
        assert threading.active_count() - threads < MOST_CONNECTIONS / 2
        await silent.aclose()
        await answered(server.address)


async def test_those_who_ask_and_read_nothing_keep_no_place(
    tmp_path: Path, unused_tcp_port: int
) -> None:
    async with (
        measured(tmp_path, unused_tcp_port, sources={}) as server,
        AsyncExitStack() as asking,
    ):
        for _ in range(MOST_CONNECTIONS):
            # It stops reading after a byte or two.
            _, writer = await asyncio.open_connection("127.0.0.1", unused_tcp_port, limit=1)
            asking.callback(writer.close)
            # One more is asked for than is answered.
            writer.write(2 * b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        await answered(server.address)


async def test_every_address_is_one_of_both_kinds(
    tmp_path: Path, unused_tcp_port: int
) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    where = {"listen": f"[::]:{unused_tcp_port}", "allow_remote": True}
    async with serve(settings(tmp_path / "data", metrics=where), catalogue_of()):
        for address in ("127.0.0.1", "[::1]"):
            now = await scrape(f"{address}:{unused_tcp_port}")
            assert now.total("exportd_build_info") == 1


async def test_metrics_are_given_in_the_format_and_by_the_names_that_are_asked_for(
    tmp_path: Path, unused_tcp_port: int
) -> None:
    async with (
        measured(tmp_path, unused_tcp_port, sources={}) as server,
        httpx.AsyncClient(base_url=f"http://{server.address}") as client,
    ):
        plain = await client.get("/metrics", headers={"accept-encoding": "gzip"})
        assert plain.headers["content-type"].startswith("text/plain; version=")
        assert plain.headers["content-encoding"] == "gzip"
        wanted = {"accept": "application/openmetrics-text; version=1.0.0"}
        named = {"name[]": "exportd_build_info"}
        some = await client.get("/metrics", headers=wanted, params=named)
        assert some.headers["content-type"].startswith("application/openmetrics-text")
        series = [line for line in some.text.splitlines() if not line.startswith("#")]
        assert [line.partition("{")[0] for line in series] == ["exportd_build_info"]
        assert (await client.get("/")).status_code == HTTPStatus.NOT_FOUND
        odd = {"accept": "application/openmetrics-text;version=x"}
        everything = await client.get("/metrics", headers=odd, params={"name[]": ""})
        assert everything.headers["content-type"].startswith("text/plain")
        assert "exportd_ledger_up" in everything.text


async def test_a_dataset_that_is_not_in_the_catalogue_has_no_name() -> None:
    metrics_exports.register_datasets(["served"], ["CSV"])
    assert metrics_exports.known("served") == "served"
    assert metrics_exports.known("evil") == ""


async def test_figures_of_a_ledger_that_is_away_are_unknown_and_not_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = await open_sqlite_ledger(tmp_path / "ledger.db", SystemClock())
    try:
        measuring = Measuring(ledger, [], {})
        await measuring.measure()
        assert metrics_service.ledger_up._value.get() == 1
        assert metrics_exports.queue_oldest_seconds._value.get() == 0

        async def away() -> None:
            raise LedgerUnavailable

        with monkeypatch.context() as patch:
            patch.setattr(ledger, "backlog", away)
            await measuring.measure()
        assert metrics_service.ledger_up._value.get() == 0
        assert math.isnan(metrics_exports.queue_oldest_seconds._value.get())
        await measuring.measure()
        assert metrics_service.ledger_up._value.get() == 1
        assert metrics_exports.queue_oldest_seconds._value.get() == 0
    finally:
        await ledger.close()
