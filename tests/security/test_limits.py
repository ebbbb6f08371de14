"""Every limit: just under it a call passes, just over it one is refused in a way that a
program can act on, and after the wait it passes. One tenant's limits leave others alone."""

from __future__ import annotations

import asyncio
import math
import re
import struct
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from grpc_health.v1 import health as health_v1
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from exportd.v1 import dataset_pb2, export_service_pb2_grpc, job_pb2
from exportd.v1 import export_service_pb2 as pb
from exportd_server.api.chunks import ChunkMemory
from exportd_server.api.limits import RequestRates, Slots
from exportd_server.errors import ExportTooLarge, QuotaExceeded, SourceFailed
from exportd_server.identity.base import Scope
from exportd_server.jobs.caps import TimeCap
from exportd_server.jobs.strays import Strayable, Strays
from tests.security.stalled import measure
from tests.support import rpc
from tests.support.gate import GateSource
from tests.support.http2 import (
    ACK,
    DATA,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    SETTINGS,
    Connection,
    connected,
)
from tests.support.identity import api_key, bearer
from tests.support.rpc import Refusal, refusal
from tests.support.samples import catalogue_of
from tests.support.server import Server, serve, settings, until
from tests.support.waits import ENOUGH

LIST = "/exportd.v1.ExportService/ListDatasets"
WATCH = "/exportd.v1.ExportService/WatchJob"


@asynccontextmanager
async def serving(
    data_dir: Path, gate: GateSource, **values: object
) -> AsyncIterator[Server]:
    async with serve(settings(data_dir, **values), catalogue_of(gated=gate)) as server:
        try:
            yield server
        finally:
            gate.open_wide()


def check(refused: Refusal, subject: str) -> float:
    """Check a refusal; returns the seconds to wait."""
    assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refused.reason == "QUOTA_EXCEEDED"
    (violation,) = refused.details["QuotaFailure"].violations
    assert violation.subject == subject
    assert violation.description
    wait: float = refused.details["RetryInfo"].retry_delay.ToNanoseconds() / 1e9
    assert 0 < wait <= 60
    return wait


def datasets(server: Server, key: str = "") -> Any:
    return server.stub.ListDatasets(
        pb.ListDatasetsRequest(), metadata=bearer(key) if key else ()
    )


# --- requests a second


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_lets_a_burst_through_and_then_what_its_rate_allows() -> None:
    clock = Clock()
    rates = RequestRates(10, 5, clock)
    for _ in range(5):
        rates.take("acme")
    with pytest.raises(QuotaExceeded) as refused:
        rates.take("acme")
    assert refused.value.retry_after == timedelta(seconds=0.1)
    clock.now += 0.09
    with pytest.raises(QuotaExceeded):
        rates.take("acme")
    clock.now += 0.01
    rates.take("acme")
    with pytest.raises(QuotaExceeded):
        rates.take("acme")
    clock.now += 100
    for _ in range(5):
        rates.take("acme")
    with pytest.raises(QuotaExceeded):
        rates.take("acme")


def test_over_an_hour_a_bucket_lets_through_its_rate_and_one_burst() -> None:
    clock = Clock()
    rates = RequestRates(7, 20, clock)
    passed = 0
    for _ in range(3600 * 20):
        clock.now += 0.05
        try:
            rates.take("acme")
        except QuotaExceeded:
            continue
        passed += 1
    assert passed in range(7 * 3600, 7 * 3600 + 21)


def test_the_bucket_of_one_tenant_leaves_another_alone() -> None:
    rates = RequestRates(1, 1, Clock())
    rates.take("acme")
    rates.take("other")
    with pytest.raises(QuotaExceeded) as refused:
        rates.take("acme")
    assert refused.value.subject == "tenant:acme/requests"


def test_tenants_that_went_away_take_no_memory() -> None:
    clock = Clock()
    rates = RequestRates(100, 200, clock)
    for number in range(50_000):
        clock.now += 0.01
        rates.take(f"tenant-{number}")
        # Those of the last two seconds, at one each hundredth, and as long again.
        assert len(rates) <= 402
    clock.now += 4
    rates.take("last")
    assert len(rates) == 1


async def test_requests_over_the_rate_are_refused_until_the_wait_is_over(
    tmp_path: Path, gate: GateSource
) -> None:
    limits = {"requests_per_second": 1, "request_burst": 5}
    async with serving(tmp_path, gate, limits=limits) as server:
        # Together they come faster than one a second, however slow the machine is.
        answers = await asyncio.gather(
            *(datasets(server) for _ in range(60)), return_exceptions=True
        )
        refused = [each for each in answers if isinstance(each, grpc.aio.AioRpcError)]
        assert 5 <= len(answers) - len(refused) < 60
        wait = check(Refusal(refused[-1]), "tenant:default/requests")
        assert wait <= 1
        # Neither health nor reflection is any tenant's call.
        health = health_pb2_grpc.HealthStub(server.channel)
        reflection = reflection_pb2_grpc.ServerReflectionStub(server.channel)
        for _ in range(10):
            await health.Check(health_pb2.HealthCheckRequest())
            listing = reflection_pb2.ServerReflectionRequest(list_services="")
            assert [
                answer async for answer in reflection.ServerReflectionInfo(iter([listing]))
            ]
        await asyncio.sleep(wait)
        await datasets(server)


async def test_the_rate_of_one_tenant_leaves_another_alone(
    tmp_path: Path, gate: GateSource
) -> None:
    acme, _ = await api_key(tmp_path, "acme")
    other, _ = await api_key(tmp_path, "other")
    limits = {"requests_per_second": 0.05, "request_burst": 2}
    async with serving(
        tmp_path, gate, limits=limits, identity={"api_keys": True}
    ) as server:
        for _ in range(2):
            await datasets(server, acme)
        check(await refusal(datasets(server, acme)), "tenant:acme/requests")
        for _ in range(2):
            await datasets(server, other)
        check(await refusal(datasets(server, other)), "tenant:other/requests")


async def test_calls_without_the_scope_count_and_leave_no_more_records_than_others(
    tmp_path: Path, gate: GateSource
) -> None:
    reading, _ = await api_key(tmp_path, "acme", [Scope.READ])
    operator, _ = await api_key(tmp_path, "operations", [Scope.ADMIN])
    limits = {"requests_per_second": 0.05, "request_burst": 5}
    async with serving(
        tmp_path, gate, limits=limits, identity={"api_keys": True}
    ) as server:
        delete = pb.DeleteJobRequest(job_id="01890a5d-ac96-774b-bcce-b302099a8057")

        async def refused() -> str:
            call = server.stub.DeleteJob(delete, metadata=bearer(reading))
            return (await refusal(call)).reason

        said = [await refused() for _ in range(20)]
        assert said == ["PERMISSION_DENIED"] * 5 + ["QUOTA_EXCEEDED"] * 15
        # And what it may do is counted along.
        check(await refusal(datasets(server, reading)), "tenant:acme/requests")
        await datasets(server, operator)


async def test_downloads_by_url_count_as_requests_of_the_urls_tenant(
    tmp_path: Path, gate: GateSource
) -> None:
    acme, _ = await api_key(tmp_path, "acme")
    other, _ = await api_key(tmp_path, "other")
    gate.open_wide()
    limits = {"requests_per_second": 0.05, "request_burst": 10}
    async with serving(
        tmp_path,
        gate,
        limits=limits,
        identity={"api_keys": True},
        http={"listen": "127.0.0.1:0"},
    ) as server:
        mine = await url_of(server, acme)
        others = await url_of(server, other)
        one_byte = {"Range": "bytes=0-0"}
        async with aiohttp.ClientSession() as http:

            async def fetch(url: str) -> aiohttp.ClientResponse:
                async with http.get(url, headers=one_byte) as answer:
                    await answer.read()
                return answer

            # A job, its watch and its URL took three.
            statuses = [(await fetch(mine)).status for _ in range(20)]
            assert statuses == [206] * 7 + [429] * 13
            refused = await fetch(mine)
            assert 1 <= int(refused.headers["Retry-After"]) <= 20
            # The same bucket, whichever way; and another one for another tenant.
            check(await refusal(datasets(server, acme)), "tenant:acme/requests")
            assert (await fetch(others)).status == 206


async def url_of(server: Server, key: str) -> str:
    """The URL of a finished output of one part."""
    stub, by = server.stub, bearer(key)
    created = await stub.CreateExport(rpc.request("gated"), metadata=by)
    job_id = created.job.job_id
    async for _ in stub.WatchJob(pb.WatchJobRequest(job_id=job_id), metadata=by):
        pass
    urls = await stub.GetDownloadUrls(pb.GetDownloadUrlsRequest(job_id=job_id), metadata=by)
    return str(urls.urls[0].url)


# --- watches and downloads


def test_places_are_given_back_however_their_holder_ends() -> None:
    slots = Slots("downloads", 2, 3)
    with slots.hold("acme"), slots.hold("acme"):
        with pytest.raises(QuotaExceeded) as refused, slots.hold("acme"):
            pass
        assert refused.value.subject == "tenant:acme/downloads"
        with slots.hold("other"):
            with pytest.raises(QuotaExceeded) as refused, slots.hold("third"):
                pass
            assert refused.value.subject == "server/downloads"
            assert slots.taken == 3
    with pytest.raises(ZeroDivisionError), slots.hold("acme"):
        raise ZeroDivisionError
    assert slots.taken == 0


async def begun(call: Any) -> Any:
    """The call, once it has its first message."""
    async with asyncio.timeout(ENOUGH):
        await anext(aiter(call))
    return call


async def broken_off(call: Any) -> grpc.aio.AioRpcError:
    """How a stream ends that the server ends."""
    try:
        async with asyncio.timeout(ENOUGH):
            async for _ in call:
                pass
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the stream ended well")


async def gone(server: Server, call: Any) -> None:
    """End a call, and wait until the server knows."""
    call.cancel()
    await call.code()


async def until_let_in(make: Any) -> Any:
    """Try again until a place is free, as a refused caller would."""
    async with asyncio.timeout(ENOUGH):
        while True:
            try:
                return await begun(make())
            except grpc.aio.AioRpcError as error:
                _is_quota(error)
                await asyncio.sleep(0.02)


def _is_quota(error: grpc.aio.AioRpcError) -> None:
    if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
        raise error


async def test_watches_have_a_limit_for_each_tenant_and_one_for_all(
    tmp_path: Path, gate: GateSource
) -> None:
    keys = {name: (await api_key(tmp_path, name))[0] for name in ("acme", "other", "third")}
    limits = {"max_watches_per_tenant": 2, "max_watches": 3}
    async with serving(
        tmp_path, gate, limits=limits, identity={"api_keys": True}
    ) as server:
        jobs = {}
        for name, key in keys.items():
            response = await server.stub.CreateExport(
                rpc.request("gated"), metadata=bearer(key)
            )
            jobs[name] = response.job.job_id

        def watch(name: str) -> Any:
            return server.stub.WatchJob(
                pb.WatchJobRequest(job_id=jobs[name]), metadata=bearer(keys[name])
            )

        first = await begun(watch("acme"))
        await begun(watch("acme"))
        check(await refusal(watch("acme")), "tenant:acme/watches")
        await begun(watch("other"))
        check(await refusal(watch("third")), "server/watches")
        await gone(server, first)
        await until_let_in(lambda: watch("third"))


async def test_a_watcher_that_takes_nothing_is_dropped(
    tmp_path: Path, gate: GateSource
) -> None:
    limits, download = {"max_watches_per_tenant": 1}, {"stall_timeout": 2.0}
    async with serving(tmp_path, gate, limits=limits, download=download) as server:
        values = [job_pb2.FilterValue(string_value=f"{n:0500}") for n in range(1000)]
        job = await rpc.create(
            server.stub,
            "gated",
            filters=[
                job_pb2.Filter(
                    column="text", operator=dataset_pb2.FILTER_OPERATOR_IN, values=values
                )
            ],
        )

        def watch() -> Any:
            return server.stub.WatchJob(pb.WatchJobRequest(job_id=job.job_id))

        async with connected(server.running.port) as shut:
            # A window that is shut: initial window size 0.
            await shut.send(SETTINGS, body=struct.pack(">HI", 4, 0))
            await shut.begin_call(1, WATCH)
            wire = pb.WatchJobRequest(job_id=job.job_id).SerializeToString()
            framed = b"\0" + len(wire).to_bytes(4, "big") + wire
            await shut.send(DATA, END_STREAM, 1, framed)
            await until(lambda: _calls_under_way(WATCH) == 1)
            check(await refusal(watch()), "tenant:default/watches")
            await until_let_in(watch)


async def test_answers_that_nobody_takes_are_the_limit_of_their_tenant_alone(
    tmp_path: Path, gate: GateSource
) -> None:
    """An answer for which there is no room waits for as long as its connection lives."""
    keys = {name: (await api_key(tmp_path, name))[0] for name in ("acme", "globex")}
    values = {"limits": {"max_calls_per_tenant": 3}, "identity": {"api_keys": True}}
    async with serving(tmp_path, gate, **values) as server:
        async with connected(server.running.port) as shut:
            await shut.send(SETTINGS, body=struct.pack(">HI", 4, 0))
            for stream in (1, 3, 5):
                await shut.begin_call(stream, LIST, dict(bearer(keys["acme"])))
                await shut.send(DATA, END_STREAM, stream, bytes(5))
            await until(lambda: _calls_under_way(LIST) == 3)
            check(await refusal(datasets(server, keys["acme"])), "tenant:acme/calls")
            await datasets(server, keys["globex"])
        async with asyncio.timeout(ENOUGH):
            while True:
                try:
                    await datasets(server, keys["acme"])
                except grpc.aio.AioRpcError as error:
                    _is_quota(error)
                else:
                    break


async def test_downloads_have_a_limit_over_grpc_and_http_together(
    tmp_path: Path, gate: GateSource
) -> None:
    limits = {"max_downloads_per_tenant": 2}
    async with (
        serving(tmp_path, gate, limits=limits, http={"listen": "127.0.0.1:0"}) as server,
        aiohttp.ClientSession() as http,
    ):
        gate.allow(10)
        done = await rpc.export(server.stub, "gated")
        running = await rpc.create(server.stub, "gated")
        urls = await server.stub.GetDownloadUrls(
            pb.GetDownloadUrlsRequest(job_id=done.job_id)
        )
        url = urls.urls[0].url

        def follow() -> Any:
            return server.stub.StreamDownload(
                pb.StreamDownloadRequest(job_id=running.job_id, follow=True)
            )

        first = await begun(follow())
        async with http.get(url) as answer:
            assert answer.status == 200
            assert len(await answer.read()) == urls.urls[0].bytes
        await until_let_in(follow)
        whole = server.stub.StreamDownload(pb.StreamDownloadRequest(job_id=done.job_id))
        check(await refusal(whole), "tenant:default/downloads")
        async with http.get(url) as answer:
            assert answer.status == 429
            assert answer.headers["Retry-After"] == "2"
            assert (await answer.json())["reason"] == "QUOTA_EXCEEDED"
        await gone(server, first)
        async with asyncio.timeout(ENOUGH):
            while True:
                async with http.get(url) as answer:
                    if answer.status == 200:
                        break
                    assert answer.status == 429


# --- jobs


async def test_queued_jobs_have_a_limit_of_their_own(
    tmp_path: Path, gate: GateSource
) -> None:
    limits = {"max_queued_jobs": 1}
    async with serving(tmp_path, gate, limits=limits, worker={"concurrency": 1}) as server:
        running = await rpc.create(server.stub, "gated")
        await until(lambda: gate.opened)
        await rpc.create(server.stub, "gated")
        check(
            await refusal(server.stub.CreateExport(rpc.request("gated"))),
            "tenant:default/queued_jobs",
        )
        gate.open_wide()
        await rpc.finish(server.stub, running.job_id)
        async with asyncio.timeout(ENOUGH):
            while True:
                try:
                    await rpc.create(server.stub, "gated")
                except grpc.aio.AioRpcError as error:
                    _is_quota(error)
                else:
                    break


async def test_a_job_that_runs_too_long_fails_at_once(
    tmp_path: Path, gate: GateSource
) -> None:
    async with serving(tmp_path, gate, limits={"max_seconds": 1}) as server:
        job = await rpc.create(server.stub, "gated")
        job = await rpc.finish(server.stub, job.job_id)
        assert job.state == job_pb2.JOB_STATE_FAILED
        ran = job.finish_time.ToNanoseconds() - job.start_time.ToNanoseconds()
        assert ran / 1e9 >= 1.0
        _check_too_long(job, 1)
        await until(lambda: gate.cancelled)
        # The place is free, and a quick one passes.
        gate.open_wide()
        await rpc.export(server.stub, "gated")


def _check_too_long(job: job_pb2.Job, limit: int) -> None:
    assert "EXPORT_TOO_LARGE" in job.error.message
    info = re.search(r"max_seconds = (\d+): it had reached (\d+)", job.error.message)
    assert info is not None, job.error.message
    assert int(info[1]) == limit
    assert int(info[2]) >= limit


async def test_the_time_of_a_job_goes_on_through_its_attempts(
    tmp_path: Path, gate: GateSource
) -> None:
    limits, worker = {"max_seconds": 6}, {"max_attempts": 50}
    async with serving(tmp_path, gate, limits=limits, worker=worker) as server:
        job = await rpc.create(server.stub, "gated")
        await until(lambda: gate.opened == 1)
        await asyncio.sleep(4)
        gate.fail(SourceFailed())
        # Another attempt, which begins with what the first one left.
        await until(lambda: gate.opened == 2, ENOUGH)
        second = time.time()
        job = await rpc.finish(server.stub, job.job_id)
        assert job.state == job_pb2.JOB_STATE_FAILED
        _check_too_long(job, 6)
        assert job.finish_time.ToNanoseconds() - job.start_time.ToNanoseconds() >= 6e9
        # Counted from the second attempt on, it would be six seconds after that.
        assert job.finish_time.ToNanoseconds() / 1e9 < second + 6


def test_whoever_takes_a_job_over_has_what_is_left_of_its_time() -> None:
    now = datetime.now(UTC)
    job = _job(start_time=now - timedelta(seconds=50), read_time=now)
    left = TimeCap(60, job).left
    assert left is not None
    assert math.isclose(left, 10, abs_tol=1)
    assert TimeCap(60, job).passed() is None
    passed = TimeCap(40, job).passed()
    assert isinstance(passed, ExportTooLarge)
    assert not passed.retryable
    assert passed.metadata == {"cap": "max_seconds", "limit": "40", "count": "50"}
    assert TimeCap(None, job).passed() is None


def _job(**times: datetime) -> Any:
    class Times:
        start_time = times["start_time"]
        read_time = times["read_time"]

    return Times()


async def test_a_source_that_gives_nothing_fails_the_attempt(
    tmp_path: Path, gate: GateSource
) -> None:
    worker = {"source_timeout": 0.5, "max_attempts": 2}
    async with serving(tmp_path, gate, worker=worker) as server:
        gate.allow(3)
        job = await rpc.create(server.stub, "gated")
        job = await rpc.finish(server.stub, job.job_id)
        assert job.state == job_pb2.JOB_STATE_FAILED
        assert "SOURCE_FAILED" in job.error.message
        assert "gave nothing for 0.5 s" in job.error.message
        assert gate.opened == 2
        await until(lambda: gate.cancelled >= 2)
        gate.open_wide()
        await rpc.export(server.stub, "gated")


class MuteSource(GateSource):
    """A source that does not say how many rows it has."""

    def __init__(self) -> None:
        super().__init__(wide=True)
        self.speak = threading.Event()

    def count(self) -> int | None:
        self.speak.wait()
        return super().count()


async def test_a_source_that_does_not_answer_keeps_no_caller_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exportd_server.jobs.manager._ANSWER_SECONDS", 0.3)
    mute = MuteSource()
    async with serving(tmp_path, mute) as server:
        question = pb.GetDatasetRequest(name="gated")
        # More than are asked at a time: those that wait for their turn are told, too.
        refused = await asyncio.gather(
            *(refusal(server.stub.GetDataset(question)) for _ in range(12))
        )
        assert {one.reason for one in refused} == {"SOURCE_FAILED"}
        mute.speak.set()
        async with asyncio.timeout(ENOUGH):
            answer = await server.stub.GetDataset(question)
        assert answer.dataset.estimated_rows == 10_000


async def test_a_slow_source_is_not_a_silent_one(tmp_path: Path, gate: GateSource) -> None:
    worker = {"source_timeout": 2.0, "max_attempts": 1}
    async with serving(tmp_path, gate, worker=worker) as server:
        job = await rpc.create(server.stub, "gated")
        for given in range(1, 11):
            await asyncio.sleep(0.25)
            gate.allow()
            await until(partial(_given, gate, given))
        job = await rpc.finish(server.stub, job.job_id)
        assert job.state == job_pb2.JOB_STATE_SUCCEEDED


def _given(gate: GateSource, batches: int) -> bool:
    return gate.given >= batches


async def test_threads_that_hang_for_good_are_left_behind_up_to_a_number() -> None:
    strays, release = Strays(most=2), threading.Event()
    work = [Strayable(strays, release.wait) for _ in range(2)]
    threads = [threading.Thread(target=each) for each in work]
    for thread in threads:
        thread.start()
    await strays.room()
    for each in work:
        each.leave()
        each.leave()
    assert strays.count == 2
    waiting = asyncio.create_task(strays.room())
    await asyncio.sleep(0)
    assert not waiting.done()
    release.set()
    async with asyncio.timeout(ENOUGH):
        await waiting
    for thread in threads:
        thread.join()
    assert strays.count == 0
    ended = Strayable(strays, release.wait)
    ended()
    ended.leave()
    assert strays.count == 0


# --- gRPC: sizes, connections, pings, calls


async def test_a_request_over_the_size_is_refused(tmp_path: Path, gate: GateSource) -> None:
    async with serving(tmp_path, gate, limits={"max_request_bytes": 10_000}) as server:
        overhead = len(pb.GetDatasetRequest(name="x" * 9000).SerializeToString()) - 9000

        def ask(size: int) -> Any:
            name = "x" * (size - overhead)
            return server.stub.GetDataset(pb.GetDatasetRequest(name=name))

        assert (await refusal(ask(10_000))).reason == "DATASET_NOT_FOUND"
        with pytest.raises(grpc.aio.AioRpcError, match="larger than max") as refused:
            await ask(10_001)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def settings_of(connection: Connection) -> bytes:
    frame = await connection.frame()
    assert frame.kind == SETTINGS
    return frame.body


async def test_connections_have_a_limit(tmp_path: Path, gate: GateSource) -> None:
    async with serving(tmp_path, gate, limits={"max_connections": 3}) as server:
        await datasets(server)
        port = server.running.port
        async with connected(port) as second:
            await settings_of(second)
            async with connected(port) as third:
                await settings_of(third)
                assert await _is_refused(port)
            # Those that are there are served on.
            await datasets(server)
            async with asyncio.timeout(ENOUGH):
                while await _is_refused(port):
                    await asyncio.sleep(0.02)


async def _is_refused(port: int) -> bool:
    try:
        async with asyncio.timeout(ENOUGH), connected(port) as connection:
            await settings_of(connection)
    except (EOFError, ConnectionError):
        return True
    return False


async def test_a_client_that_pings_too_often_is_closed(
    tmp_path: Path, gate: GateSource
) -> None:
    limits = {"min_ping_seconds": 30, "max_ping_strikes": 3}
    async with serving(tmp_path, gate, limits=limits) as server:
        async with connected(server.running.port) as connection:
            # The first counts from the start of the connection, or not at all.
            for _ in range(3):
                await connection.send(PING, body=b"12345678")
            answers = [await _next(connection, PING) for _ in range(3)]
            assert all(answer.flags == ACK for answer in answers)
            for _ in range(3):
                await connection.send(PING, body=b"12345678")
            async with asyncio.timeout(ENOUGH):
                frames = await connection.frames()
            assert frames[-1].kind == GOAWAY
            assert frames[-1].body.endswith(b"too_many_pings")
        await datasets(server)


async def _next(connection: Connection, kind: int) -> Any:
    async with asyncio.timeout(ENOUGH):
        while (frame := await connection.frame()).kind != kind:
            pass
    return frame


async def test_a_connection_that_leaves_a_ping_unanswered_is_closed(
    tmp_path: Path, gate: GateSource
) -> None:
    limits = {"ping_seconds": 1, "ping_timeout": 1}
    async with serving(tmp_path, gate, limits=limits) as server:
        async with connected(server.running.port) as silent:
            async with asyncio.timeout(ENOUGH):
                frames = await silent.frames()
            assert PING in [frame.kind for frame in frames]
        await datasets(server)


async def test_a_connection_without_calls_is_closed_after_a_while(
    tmp_path: Path, gate: GateSource
) -> None:
    limits = {"max_idle_seconds": 1}
    async with serving(tmp_path, gate, limits=limits) as server:
        job = await rpc.create(server.stub, "gated")
        watching = await begun(server.stub.WatchJob(pb.WatchJobRequest(job_id=job.job_id)))
        async with connected(server.running.port) as idle:
            await _next(idle, GOAWAY)
        # One with a call is not idle, and its client's next call finds a way.
        gate.open_wide()
        async with asyncio.timeout(ENOUGH):
            async for _ in watching:
                pass
        await datasets(server)


async def test_an_old_connection_takes_no_new_call_and_ends_those_it_has(
    tmp_path: Path, gate: GateSource
) -> None:
    limits = {"max_age_seconds": 1}
    async with serving(tmp_path, gate, limits=limits) as server:
        job = await rpc.create(server.stub, "gated")
        watching = await begun(server.stub.WatchJob(pb.WatchJobRequest(job_id=job.job_id)))
        async with connected(server.running.port) as old:
            await _next(old, GOAWAY)
        await asyncio.sleep(1)
        await datasets(server)
        gate.open_wide()
        async with asyncio.timeout(ENOUGH):
            states = [response.job.state async for response in watching]
        assert states[-1] == job_pb2.JOB_STATE_SUCCEEDED


async def test_calls_of_one_connection_above_its_streams_wait(
    tmp_path: Path, gate: GateSource
) -> None:
    async with serving(tmp_path, gate, limits={"max_streams_per_connection": 2}) as server:
        async with connected(server.running.port) as connection:
            assert b"\x00\x03\x00\x00\x00\x02" in await settings_of(connection)
        job = await rpc.create(server.stub, "gated")
        watch = pb.WatchJobRequest(job_id=job.job_id)
        first = await begun(server.stub.WatchJob(watch))
        await begun(server.stub.WatchJob(watch))
        third = datasets(server)
        done, _ = await asyncio.wait({asyncio.ensure_future(third)}, timeout=0.3)
        assert not done
        # Another connection has streams of its own.
        own = (("grpc.use_local_subchannel_pool", 1),)
        async with grpc.aio.insecure_channel(server.address, options=own) as channel:
            stub = export_service_pb2_grpc.ExportServiceStub(channel)
            async with asyncio.timeout(ENOUGH):
                await stub.ListDatasets(pb.ListDatasetsRequest())
        first.cancel()
        async with asyncio.timeout(ENOUGH):
            await third


async def test_calls_have_a_limit_that_health_is_exempt_from(
    tmp_path: Path, gate: GateSource
) -> None:
    limits = {"max_calls": 2, "max_calls_per_tenant": 2}
    async with serving(tmp_path, gate, limits=limits) as server:
        job = await rpc.create(server.stub, "gated")
        watch = pb.WatchJobRequest(job_id=job.job_id)
        first = await begun(server.stub.WatchJob(watch))
        await begun(server.stub.WatchJob(watch))
        check(await refusal(datasets(server)), "server/calls")
        health = health_pb2_grpc.HealthStub(server.channel)
        await health.Check(health_pb2.HealthCheckRequest())
        await gone(server, first)
        async with asyncio.timeout(ENOUGH):
            while True:
                try:
                    await datasets(server)
                except grpc.aio.AioRpcError as error:
                    check(Refusal(error), "server/calls")
                else:
                    break


async def test_callers_without_credentials_cannot_take_the_places_of_others(
    tmp_path: Path, gate: GateSource
) -> None:
    async with serving(tmp_path, gate, limits={"max_calls": 20}) as server:
        health = health_pb2_grpc.HealthStub(server.channel)
        for _ in range(2):
            await begun(health.Watch(health_pb2.HealthCheckRequest()))
        refused = await refusal(health.Watch(health_pb2.HealthCheckRequest()))
        check(refused, "server/open_calls")
        await datasets(server)


async def test_a_call_that_needs_no_credentials_does_not_last_for_ever(
    tmp_path: Path, gate: GateSource
) -> None:
    limits = {"max_calls": 20, "max_open_seconds": 2}
    async with serving(tmp_path, gate, limits=limits) as server:
        health = health_pb2_grpc.HealthStub(server.channel)
        reflection = reflection_pb2_grpc.ServerReflectionStub(server.channel)
        silent = asyncio.Event()

        async def nothing() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
            await silent.wait()
            yield reflection_pb2.ServerReflectionRequest()

        async with connected(server.running.port) as connection:
            await connection.begin_call(1, f"/{health_v1.SERVICE_NAME}/Watch")
            await until(lambda: _calls_under_way(f"/{health_v1.SERVICE_NAME}/Watch") == 1)
            watching = await begun(health.Watch(health_pb2.HealthCheckRequest()))
            refused = await refusal(health.Watch(health_pb2.HealthCheckRequest()))
            check(refused, "server/open_calls")
            await _next(connection, HEADERS)  # that it has begun
            ended = await _next(connection, HEADERS)
            assert b"call again" in ended.body, "without a request, too"
        for call in (watching, reflection.ServerReflectionInfo(nothing())):
            error = await broken_off(call)
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert "call again" in str(error.details())
        silent.set()
        # Its places are free again, and the health of the server is told as before.
        again = await begun(health.Watch(health_pb2.HealthCheckRequest()))
        again.cancel()


async def test_one_connection_does_not_take_all_calls_that_need_no_credentials(
    tmp_path: Path, gate: GateSource
) -> None:
    async with serving(tmp_path, gate, limits={"max_calls": 80}) as server:
        health = health_pb2_grpc.HealthStub(server.channel)
        for _ in range(4):
            await begun(health.Watch(health_pb2.HealthCheckRequest()))
        refused = await refusal(health.Watch(health_pb2.HealthCheckRequest()))
        check(refused, "connection/open_calls")
        await health.Check(health_pb2.HealthCheckRequest())
        own = (("grpc.use_local_subchannel_pool", 1),)
        async with grpc.aio.insecure_channel(server.address, options=own) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            asked = reflection_pb2.ServerReflectionRequest(list_services="")
            answers = [answer async for answer in stub.ServerReflectionInfo(iter([asked]))]
        assert len(answers) == 1


async def test_a_call_whose_request_has_not_come_is_a_call_under_way(
    tmp_path: Path, gate: GateSource
) -> None:
    async with (
        serving(tmp_path, gate, limits={"max_calls": 2}) as server,
        connected(server.running.port) as connection,
    ):
        await connection.begin_call(1, LIST)
        await connection.begin_call(3, LIST)
        await until(lambda: _calls_under_way(LIST) == 2)
        check(await refusal(datasets(server)), "server/calls")


async def test_a_call_whose_request_never_comes_is_ended(
    tmp_path: Path, gate: GateSource
) -> None:
    limits = {"max_calls": 2, "request_timeout": 1}
    async with (
        serving(tmp_path, gate, limits=limits) as server,
        connected(server.running.port) as connection,
    ):
        await connection.begin_call(1, LIST)
        await connection.begin_call(3, LIST)
        for stream in (1, 3):
            ended = await _next(connection, HEADERS)
            assert (ended.stream, ended.flags & END_STREAM) == (stream, END_STREAM)
            assert b"INVALID_REQUEST" in ended.body
        # And they are calls under way no more, while the connection stays.
        await until(lambda: _calls_under_way(LIST) == 0)
        await datasets(server)


def _calls_under_way(method: str) -> int:
    names = [task.get_name() for task in asyncio.all_tasks()]
    return sum(f"[{method}]" in name for name in names)


async def test_a_call_without_any_request_is_told_so(
    tmp_path: Path, gate: GateSource
) -> None:
    async with serving(tmp_path, gate) as server, connected(server.running.port) as odd:
        await odd.begin_call(1, LIST)
        await odd.send(DATA, END_STREAM, 1)
        assert b"INVALID_REQUEST" in (await _next(odd, HEADERS)).body


# --- HTTP


async def http_status(port: int) -> tuple[int, str]:
    """Ask for what is not there; the status and the head of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        async with asyncio.timeout(ENOUGH):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
    finally:
        writer.close()
    return int(head.split(" ")[1]), head


async def test_connections_of_the_http_port_have_a_limit(
    tmp_path: Path, gate: GateSource
) -> None:
    limits = {"max_http_connections": 2}
    async with serving(
        tmp_path, gate, limits=limits, http={"listen": "127.0.0.1:0"}
    ) as server:
        port = server.running.http_port
        assert port is not None
        _, first = await asyncio.open_connection("127.0.0.1", port)
        assert (await http_status(port))[0] == 404
        _, second = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(ENOUGH):
            # The end of the one before may not have been noticed, nor this one's start.
            while (answer := await http_status(port))[0] == 404:
                await asyncio.sleep(0.01)
        assert answer[0] == 503
        assert "Retry-After: 2\r\n" in answer[1]
        first.close()
        async with asyncio.timeout(ENOUGH):
            while (await http_status(port))[0] != 404:
                await asyncio.sleep(0.01)
        second.close()


async def test_headers_that_trickle_in_end_the_connection(
    tmp_path: Path, gate: GateSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exportd_server.api.http._FIRST_REQUEST", 0.5)
    async with serving(tmp_path, gate, http={"listen": "127.0.0.1:0"}) as server:
        port = server.running.http_port
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\n")

        async def trickle() -> None:
            while True:
                writer.write(b"X: y\r\n")
                await asyncio.sleep(0.05)

        trickling = asyncio.create_task(trickle())
        async with asyncio.timeout(ENOUGH):
            with suppress(ConnectionError):
                assert await reader.read(1) == b""
        trickling.cancel()
        writer.close()


# --- readers that take nothing


def test_chunks_begin_small_grow_and_shrink_when_there_are_many() -> None:
    memory = ChunkMemory(most=2**20, in_flight=2**21)
    with memory.download() as one:
        sizes = [len(one.room(2**30)) for _ in range(6)]
        assert sizes == [2**16, 2**17, 2**18, 2**19, 2**20, 2**20]
        assert len(one.room(100)) == 100
        with memory.download(), memory.download(), memory.download():
            assert len(one.room(2**30)) == 2**19
        assert len(one.room(2**30)) == 2**20


@pytest.mark.minutes
async def test_a_reader_that_takes_nothing_costs_little(tmp_path: Path) -> None:
    figures = await measure(tmp_path, readers=60, idle=30, asks=100, rows=100_000)
    # 3 MiB when each held its own read buffer and 1 MiB messages.
    assert figures.per_reader < 1.5
