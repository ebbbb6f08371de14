"""An API without workers, workers without an API, and how each of them ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from exportd.v1 import export_service_pb2 as pb
from exportd.v1 import export_service_pb2_grpc, job_pb2
from exportd_server import app, places
from exportd_server.jobs.ledger.base import Ledger
from exportd_server.jobs.ledger.sqlite import open_sqlite_ledger
from exportd_server.platform.clock import SystemClock
from exportd_server.settings import Settings
from tests.support import rpc
from tests.support.faults import Faults
from tests.support.gate import BATCH_ROWS, GateSource
from tests.support.samples import catalogue_of
from tests.support.server import ROOT, serve, settings, until
from tests.support.waits import ENOUGH

# --- apart


@pytest.fixture
async def shared_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Ledger]:
    """A ledger that an API and workers in this process share, as a server's would be."""
    ledger = await open_sqlite_ledger(tmp_path / "ledger.db", SystemClock())
    shared = Faults(ledger)

    async def closed_by_the_test() -> None:
        return None

    monkeypatch.setattr(shared, "close", closed_by_the_test, raising=False)

    async def open_shared(*_: Any) -> Ledger:
        return shared.ledger

    monkeypatch.setattr(app, "_open_ledger", open_shared)
    for module in (app, places):
        monkeypatch.setattr(module, "is_embedded", lambda _: False)
    yield shared.ledger
    await ledger.close()


async def test_an_api_without_workers_leaves_jobs_to_those_that_work_alone(
    tmp_path: Path, shared_ledger: Ledger
) -> None:
    gate = GateSource(wide=True)
    options = settings(
        tmp_path,
        worker={"enabled": False},
        store={"url": f"file://{tmp_path / 'outputs'}"},
    )
    async with serve(options, catalogue_of(gated=gate)) as server:
        job = await rpc.create(server.stub, "gated")
        await asyncio.sleep(0.2)
        waiting = await rpc.get(server.stub, job.job_id)
        assert waiting.state == job_pb2.JOB_STATE_PENDING
        async with app.working(options, catalogue=catalogue_of(gated=gate)) as stop:
            job = await rpc.finish(server.stub, job.job_id)
            assert job.state == job_pb2.JOB_STATE_SUCCEEDED
            assert await rpc.download(server.stub, job.job_id)
            assert not stop.is_set()
        late = await rpc.create(server.stub, "gated")
        await asyncio.sleep(0.2)
        waiting = await rpc.get(server.stub, late.job_id)
        assert waiting.state == job_pb2.JOB_STATE_PENDING


@contextmanager
def process(*command: str) -> Iterator[subprocess.Popen[str]]:
    running = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "EXPORTD_LISTEN": "0.0.0.0:1"},
        cwd=ROOT,
    )
    try:
        yield running
    finally:
        if running.poll() is None:
            running.kill()
        running.communicate()


@pytest.mark.minutes
@pytest.mark.parametrize("arguments", [["worker"], ["serve", "--no-workers"]])
def test_the_embedded_ledger_is_for_one_process_that_does_both(
    tmp_path: Path, sample_catalogue: Path, arguments: list[str]
) -> None:
    if "serve" in arguments:
        arguments = [*arguments, "--listen", "127.0.0.1:0"]
    with process(
        *("-m", "exportd_server", *arguments),
        *("--data-dir", str(tmp_path), "--catalogue", str(sample_catalogue)),
    ) as refused:
        out, err = refused.communicate(timeout=ENOUGH)
    assert (refused.returncode, out) == (2, "")
    (line,) = err.splitlines()
    assert "ledger.url" in line
    assert "EXPORTD_LEDGER__URL=postgresql://" in line


SHARED = "from exportd_server import app; app.refuse_embedded = lambda *_: None; "
"""As if the ledger were a server's."""

MAIN = "from exportd_server.cli import main; main()"


@pytest.mark.minutes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_process_says_when_it_works_and_ends_cleanly(
    tmp_path: Path, sample_catalogue: Path, number: signal.Signals
) -> None:
    """It needs no address: the one in its environment could not be listened on."""
    with process(
        *("-c", SHARED + MAIN, "worker"),
        *("--data-dir", str(tmp_path), "--catalogue", str(sample_catalogue)),
    ) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "working\n"
        worker.send_signal(number)
        out, err = worker.communicate(timeout=ENOUGH)
    assert (worker.returncode, out) == (0, "")
    events = [json.loads(line)["event"] for line in err.splitlines()]
    assert (events[0], events[-1]) == ("working", "stopped")
    assert "draining" in events


BLOCKING = """
import threading
from exportd_server import app
from tests.support.gate import GateSource
from tests.support.samples import catalogue_of

class Blocking(GateSource):
    def {method}(self, *args, **kwargs):
        print("blocked", flush=True)
        threading.Event().wait()

app._open_catalogue = lambda _: catalogue_of(gated=Blocking())
"""


async def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    """Whatever still runs."""
    config = tmp_path / "server.toml"
    config.write_text(f"drain_timeout = {10 * ENOUGH}\n")
    with process(
        *("-c", BLOCKING.format(method="open") + MAIN, "serve"),
        *("--config", str(config), "--listen", "127.0.0.1:0", "--data-dir", str(tmp_path)),
    ) as server:
        assert server.stdout is not None
        port = server.stdout.readline().rsplit(":", 1)[1]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port.strip()}") as channel:
            await rpc.create(export_service_pb2_grpc.ExportServiceStub(channel), "gated")
            assert await asyncio.to_thread(server.stdout.readline) == "blocked\n"
            states = aiter(
                health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            )
            assert (await anext(states)).status == health_pb2.HealthCheckResponse.SERVING
            server.terminate()
            # Both at once would count as one.
            changed = (await anext(states)).status
            assert changed == health_pb2.HealthCheckResponse.NOT_SERVING
            server.terminate()
            await asyncio.to_thread(server.communicate, timeout=ENOUGH)
        assert server.returncode == 128 + signal.SIGTERM


@pytest.mark.minutes
@pytest.mark.parametrize("method", ["plan", "open", "count"])
async def test_a_process_whose_source_blocks_ends_within_its_bound(
    tmp_path: Path, method: str
) -> None:
    config = tmp_path / "server.toml"
    config.write_text("drain_timeout = 0.5\n")
    with process(
        *("-c", BLOCKING.format(method=method) + MAIN, "serve"),
        *("--config", str(config), "--listen", "127.0.0.1:0", "--data-dir", str(tmp_path)),
    ) as server:
        assert server.stdout is not None
        port = server.stdout.readline().rsplit(":", 1)[1]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port.strip()}") as channel:
            stub = export_service_pb2_grpc.ExportServiceStub(channel)
            hanging = stub.GetDataset(pb.GetDatasetRequest(name="gated"))
            if method != "count":
                await rpc.create(stub, "gated")
            assert await asyncio.to_thread(server.stdout.readline) == "blocked\n"
            server.terminate()
            await asyncio.to_thread(server.communicate, timeout=ENOUGH)
            hanging.cancel()
        assert server.returncode == 0


# --- draining


@asynccontextmanager
async def to_be_drained(
    options: Settings, gate: GateSource
) -> AsyncIterator[tuple[grpc.aio.Channel, Callable[[], asyncio.Task[None]]]]:
    """A channel to a server, and what has it drain. The channel outlives the server."""
    serving = app.serving(options, catalogue=catalogue_of(gated=gate))
    running = await serving.__aenter__()
    ending: list[asyncio.Task[None]] = []

    async def end() -> None:
        await serving.__aexit__(None, None, None)

    def drain() -> asyncio.Task[None]:
        ending.append(asyncio.create_task(end()))
        return ending[0]

    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{running.port}") as channel:
            yield channel, drain
    finally:
        gate.open_wide()
        await (ending[0] if ending else end())


@pytest.mark.minutes
async def test_a_drain_sends_those_who_watch_elsewhere_and_lets_downloads_end(
    tmp_path: Path,
) -> None:
    gate = GateSource(2000)
    options = settings(tmp_path, drain_timeout=10 * ENOUGH, download={"chunk_bytes": 4096})
    async with to_be_drained(options, gate) as (channel, drain):
        stub = export_service_pb2_grpc.ExportServiceStub(channel)
        gate.allow(2000)
        finished = await rpc.export(stub, "gated", max_part_rows=900 * BATCH_ROWS)
        gate.allow(1900)
        running = await rpc.create(stub, "gated", max_part_rows=900 * BATCH_ROWS)
        named = pb.StreamDownloadRequest(job_id=running.job_id, follow=True)
        follow = aiter(stub.StreamDownload(named))
        # In the middle of a part: much more of it is ready than was taken.
        await anext(follow)
        await anext(follow)
        watch = aiter(stub.WatchJob(pb.WatchJobRequest(job_id=running.job_id)))
        await anext(watch)
        named = pb.StreamDownloadRequest(job_id=finished.job_id)
        download = aiter(stub.StreamDownload(named))
        await anext(download)
        health = health_pb2_grpc.HealthStub(channel)
        states = aiter(health.Watch(health_pb2.HealthCheckRequest()))
        assert (await anext(states)).status == health_pb2.HealthCheckResponse.SERVING

        drained = drain()
        changed = (await anext(states)).status
        assert changed == health_pb2.HealthCheckResponse.NOT_SERVING
        for call in (watch, follow):
            refused = await rpc.refusal(call)
            assert refused.code is grpc.StatusCode.UNAVAILABLE
            assert refused.reason == "DRAINING"
        assert not drained.done()
        size = 0
        async for message in download:
            size += len(message.data)
        assert size == finished.manifest.bytes
        gate.open_wide()
        # The export comes to its end, and the rest of the grace is not waited for.
        async with asyncio.timeout(ENOUGH):
            await drained
    async with serve(settings(tmp_path), catalogue_of(gated=gate)) as again:
        job = await rpc.get(again.stub, running.job_id)
        assert job.state == job_pb2.JOB_STATE_SUCCEEDED


async def test_new_calls_find_the_server_gone_once_it_drains(
    tmp_path: Path, gate: GateSource
) -> None:
    options = settings(tmp_path, drain_timeout=0.5)
    async with to_be_drained(options, gate) as (channel, drain):
        stub = export_service_pb2_grpc.ExportServiceStub(channel)
        await rpc.create(stub, "gated")
        await until(lambda: gate.opened)
        drained = drain()
        code = grpc.StatusCode.OK
        while code is grpc.StatusCode.OK:
            code = await stub.ListDatasets(pb.ListDatasetsRequest()).code()
        assert code is grpc.StatusCode.UNAVAILABLE
        # At once: it is not quiet yet, and connections are still open.
        told = await rpc.refusal(stub.CreateExport(rpc.request("gated")))
        assert (told.code, told.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert not drained.done()


async def test_calls_that_come_in_just_when_a_server_drains_are_told_to_try_again(
    tmp_path: Path, gate: GateSource
) -> None:
    """The library would cancel what it has taken in and not begun."""
    async with to_be_drained(settings(tmp_path), gate) as (channel, drain):
        stub = export_service_pb2_grpc.ExportServiceStub(channel)
        calls = [stub.ListDatasets(pb.ListDatasetsRequest()) for _ in range(200)]
        await calls[0]
        drained = drain()
        # However many of them are answered by now, some come in later than that.
        calls += [stub.ListDatasets(pb.ListDatasetsRequest()) for _ in range(40)]
        codes = Counter([await call.code() for call in calls])
        await drained
    assert codes.keys() == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
    told = {str(await call.details()).partition("]")[0] for call in calls}
    assert told == {"", "[DRAINING"}
