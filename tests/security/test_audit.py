"""Who did what: one record and one line for each operation, and nothing secret in them."""

from __future__ import annotations

import asyncio
import getpass
import io
import json
import logging
import socket
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import grpc
import pytest
import structlog
from click.testing import CliRunner
from google.protobuf import struct_pb2
from google.protobuf.message import Message

from exportd import AsyncClient, AuditOutcome, Client
from exportd.cli.commands import cli
from exportd.errors import AccessDenied
from exportd.v1 import audit_pb2, dataset_pb2, job_pb2, sink_pb2
from exportd.v1 import export_service_pb2 as pb
from exportd_server.api.interceptors.audit import peer_address
from exportd_server.cli import main
from exportd_server.errors import DeliveryFailed, LedgerUnavailable
from exportd_server.identity.base import Scope
from exportd_server.jobs.audit import AuditMethod, AuditQuery, AuditRecord, Ending, Entry
from exportd_server.jobs.audit_spool import NAME, AuditSpool
from exportd_server.jobs.ledger.postgres import (
    migrate_postgres_ledger,
    open_postgres_ledger,
)
from exportd_server.jobs.ledger.sqlite import open_sqlite_ledger
from exportd_server.jobs.ledger.statements import redriving, submitting
from exportd_server.platform.clock import SystemClock
from exportd_server.platform.logging import configure_logging
from exportd_server.sinks.registry import SinkTypes
from tests.support import rpc
from tests.support.gate import BATCH_ROWS, GateSource
from tests.support.identity import api_key, bearer
from tests.support.logs import json_log
from tests.support.samples import catalogue_of
from tests.support.scripted_sink import ScriptedSink
from tests.support.server import Server, serve, settings, until
from tests.support.waits import ENOUGH

OK = audit_pb2.AUDIT_OUTCOME_SUCCEEDED
FAILED = audit_pb2.AUDIT_OUTCOME_FAILED
BROKEN_OFF = audit_pb2.AUDIT_OUTCOME_BROKEN_OFF
NO_JOB = str(UUID(int=7, version=4))
CANARY = "canary-7f3a"


def audit_lines(text: str) -> list[dict[str, Any]]:
    """The audit lines; every line must be JSON."""
    lines = [json.loads(line) for line in text.splitlines()]
    return [line for line in lines if line["event"] == "audit"]


@dataclass
class World:
    """A server that asks for API keys, and the keys of its callers."""

    server: Server
    log: io.StringIO
    keys: Mapping[str, str]
    held: GateSource
    sink: ScriptedSink

    def by(self, caller: str) -> Any:
        return bearer(self.keys[caller])

    def subject(self, caller: str) -> str:
        return f"key:{self.keys[caller].split('_')[1]}"

    async def records(self, count: int, **conditions: Any) -> list[audit_pb2.AuditRecord]:
        """Wait until there are so many; there must not be more. The oldest first."""
        request = pb.ListAuditRecordsRequest(page_size=1000, **conditions)
        async with asyncio.timeout(ENOUGH):
            while True:
                found = await self.server.stub.ListAuditRecords(
                    request, metadata=self.by("operator")
                )
                if len(found.records) >= count:
                    assert len(found.records) == count, found
                    return list(found.records)[::-1]
                await asyncio.sleep(0.02)

    async def job(self, caller: str = "acme", **fields: Any) -> str:
        """A job that has ended, its deliveries included."""
        stub, metadata = self.server.stub, self.by(caller)
        made = await stub.CreateExport(rpc.request("wide", **fields), metadata=metadata)
        job_id = str(made.job.job_id)
        watch = pb.WatchJobRequest(job_id=job_id, until_delivered=True)
        async for _ in stub.WatchJob(watch, metadata=metadata):
            pass
        return job_id


@asynccontextmanager
async def audited(
    directory: Path, *, level: str = "info", **more: Any
) -> AsyncIterator[World]:
    callers = {
        "acme": ("acme", (Scope.READ, Scope.WRITE)),
        "acme, reading": ("acme", (Scope.READ,)),
        "globex": ("globex", (Scope.READ, Scope.WRITE)),
        "operator": ("operations", (Scope.ADMIN,)),
    }
    data = directory / "data"
    keys = {name: (await api_key(data, *made))[0] for name, made in callers.items()}
    held, sink = GateSource(20), ScriptedSink()
    options = settings(
        data,
        identity={"api_keys": True},
        http={"listen": "127.0.0.1:0"},
        drain_timeout=1.0,
        **more,
    )
    sources = catalogue_of(wide=GateSource(2, wide=True), held=held)
    types = SinkTypes.installed().with_type(sink)
    with json_log(level) as log:
        async with serve(options, sources, types) as server:
            yield World(server, log, keys, held, sink)
            held.open_wide()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with audited(tmp_path) as world:
        yield world


def to(name: str) -> sink_pb2.Sink:
    config = struct_pb2.Struct()
    config.update({"label": name, "endpoint": name})
    return sink_pb2.Sink(
        name=name, plugin=sink_pb2.PluginSink(type="scripted", config=config)
    )


async def refused(call: Any) -> str:
    return (await rpc.refusal(call)).reason


async def test_each_operation_leaves_one_record_and_one_line(
    world: World, tmp_path: Path
) -> None:
    stub, acme = world.server.stub, world.by("acme")
    world.sink.behaviour["dead"] = lambda _: DeliveryFailed("no", retryable=False)
    begun = datetime.now(UTC)

    job_id = await world.job(sinks=[to("good"), to("dead")])
    output = bytearray()
    async for message in stub.StreamDownload(
        pb.StreamDownloadRequest(job_id=job_id, part_index=0), metadata=acme
    ):
        output += message.data
    urls = await stub.GetDownloadUrls(
        pb.GetDownloadUrlsRequest(job_id=job_id), metadata=acme
    )
    async with aiohttp.ClientSession() as http, http.get(urls.urls[0].url) as answer:
        assert await answer.read() == output
    found = await stub.ListDeliveries(
        pb.ListDeliveriesRequest(job_id=job_id, sink="dead"), metadata=acme
    )
    delivery = found.deliveries[0]
    await stub.RedriveDeliveries(
        pb.RedriveDeliveriesRequest(job_id=job_id, sink="dead"), metadata=acme
    )
    await stub.RedriveDeliveries(
        pb.RedriveDeliveriesRequest(delivery_id=delivery.delivery_id), metadata=acme
    )
    await stub.EnableSinkQueue(
        pb.EnableSinkQueueRequest(queue=delivery.queue), metadata=acme
    )
    created = await stub.CreateExport(rpc.request("held"), metadata=acme)
    await stub.CreateExport(rpc.request("wide", validate_only=True), metadata=acme)
    cancelled = created.job.job_id
    await stub.CancelJob(pb.CancelJobRequest(job_id=cancelled), metadata=acme)
    await stub.DeleteJob(pb.DeleteJobRequest(job_id=cancelled), metadata=acme)

    size = len(output)
    about = {"job_id": job_id, "dataset": "wide"}
    expected: list[tuple[str, dict[str, Any]]] = [
        ("CreateExport", about | {"sinks": ["good", "dead"]}),
        ("StreamDownload", about | {"part_index": 0, "bytes_sent": size}),
        ("GetDownloadUrls", about),
        ("DownloadByUrl", about | {"part_index": 0, "bytes_sent": size}),
        ("RedriveDeliveries", about | {"sinks": ["dead"]}),
        ("RedriveDeliveries", about | {"delivery_id": delivery.delivery_id}),
        ("EnableSinkQueue", {"queue": delivery.queue}),
        ("CreateExport", {"job_id": cancelled, "dataset": "held"}),
        ("CreateExport", {"dataset": "wide", "validate_only": True}),
        ("CancelJob", {"job_id": cancelled, "dataset": "held"}),
        ("DeleteJob", {"job_id": cancelled, "dataset": "held"}),
    ]
    records = await world.records(len(expected))
    for record, (method, facts) in zip(records, expected, strict=True):
        by_url = method == "DownloadByUrl"
        assert (record.method, record.outcome, record.code) == (method, OK, "OK"), record
        assert record.reason == ""
        assert record.tenant == "acme"
        assert record.subject == ("" if by_url else world.subject("acme"))
        assert record.identity == ("url" if by_url else "api_key")
        assert record.peer.startswith("127.0.0.1:")
        moment = record.time.ToDatetime(tzinfo=UTC)
        assert begun <= moment <= datetime.now(UTC)
        assert timedelta(0) < record.duration.ToTimedelta() < timedelta(seconds=60)
        told = {
            field.name: list(value) if field.name == "sinks" else value
            for field, value in record.ListFields()
        }
        for always in ("record_id", "time", "duration", "method", "outcome", "code"):
            told.pop(always)
        for who in ("tenant", "subject", "identity", "peer"):
            told.pop(who, None)
        assert told == facts, method
    assert [r.record_id for r in records] == sorted(r.record_id for r in records)

    lines = audit_lines(world.log.getvalue())
    assert [line["record_id"] for line in lines] == [r.record_id for r in records]
    for line, record in zip(lines, records, strict=True):
        assert line["method"] == record.method
        assert line["outcome"] == "SUCCEEDED"
        assert (line["tenant"], line["subject"]) == (record.tenant, record.subject)
        assert line.get("job_id", "") == record.job_id
        assert line.get("bytes_sent", 0) == record.bytes_sent


async def test_what_is_another_tenants_is_recorded_for_the_caller_and_tells_nothing(
    world: World,
) -> None:
    job_id = await world.job(sinks=[to("good")])
    stub, globex = world.server.stub, world.by("globex")
    for named in (job_id, NO_JOB):
        # One after the other: each begins when it is made.
        calls: tuple[tuple[Any, type[Message]], ...] = (
            (stub.CancelJob, pb.CancelJobRequest),
            (stub.DeleteJob, pb.DeleteJobRequest),
            (stub.GetDownloadUrls, pb.GetDownloadUrlsRequest),
            (stub.StreamDownload, pb.StreamDownloadRequest),
            (stub.RedriveDeliveries, pb.RedriveDeliveriesRequest),
        )
        for method, kind in calls:
            call = method(kind(job_id=named), metadata=globex)
            assert await refused(call) == "JOB_NOT_FOUND"
    records = await world.records(10, tenant="globex")
    for record, missing in zip(records[:5], records[5:], strict=True):
        assert record.job_id == job_id
        assert missing.job_id == NO_JOB
        for each in (record, missing):
            assert (each.outcome, each.code, each.reason) == (
                FAILED,
                "NOT_FOUND",
                "JOB_NOT_FOUND",
            )
            assert each.subject == world.subject("globex")
            assert not each.HasField("bytes_sent")
            for field in ("job_id", "record_id", "time", "duration", "peer"):
                each.ClearField(field)
        assert record == missing
    # The owner's records do not tell of it, either.
    assert [r.method for r in await world.records(1, tenant="acme")] == ["CreateExport"]


async def test_refused_calls_are_recorded_with_who_is_known(world: World) -> None:
    stub = world.server.stub
    reading, acme = world.by("acme, reading"), world.by("acme")
    wrong = bearer(world.keys["acme"][:-1] + "!")
    create = rpc.request("wide")
    assert await refused(stub.CreateExport(create)) == "UNAUTHENTICATED"
    assert await refused(stub.CreateExport(create, metadata=wrong)) == "UNAUTHENTICATED"
    assert await refused(stub.CreateExport(create, metadata=reading)) == "PERMISSION_DENIED"
    nowhere = rpc.request("nowhere", sinks=[to("a")])
    assert await refused(stub.CreateExport(nowhere, metadata=acme)) == "DATASET_NOT_FOUND"
    bad = pb.CancelJobRequest(job_id=world.keys["acme"])
    assert await refused(stub.CancelJob(bad, metadata=acme)) == "INVALID_REQUEST"
    queue = pb.EnableSinkQueueRequest(queue="webhook/none")
    call = stub.EnableSinkQueue(queue, metadata=acme)
    assert await refused(call) == "SINK_QUEUE_NOT_FOUND"
    raw: Any = world.server.channel.unary_unary("/exportd.v1.ExportService/DeleteJob")
    assert await refused(raw(b"\xff\xff", metadata=acme)) == "INVALID_REQUEST"
    told = [
        (r.method, r.code, r.tenant, r.subject, r.identity, r.dataset, r.job_id, r.queue)
        for r in await world.records(7)
    ]
    one, two = world.subject("acme"), world.subject("acme, reading")
    assert told == [
        ("CreateExport", "UNAUTHENTICATED", "", "", "", "", "", ""),
        ("CreateExport", "UNAUTHENTICATED", "", "", "", "", "", ""),
        ("CreateExport", "PERMISSION_DENIED", "acme", two, "api_key", "", "", ""),
        ("CreateExport", "NOT_FOUND", "acme", one, "api_key", "nowhere", "", ""),
        ("CancelJob", "INVALID_ARGUMENT", "acme", one, "api_key", "", "", ""),
        ("EnableSinkQueue", "NOT_FOUND", "acme", one, "api_key", "", "", "webhook/none"),
        ("DeleteJob", "INVALID_ARGUMENT", "acme", one, "api_key", "", "", ""),
    ]
    assert len(audit_lines(world.log.getvalue())) == 7


# --- callers that go away


class HeldWriter:
    """The ledger's writer, which stands still in a transaction, before it runs a
    statement; that ends with `error` if there is one."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        statement: tuple[Any, str],
        error: Exception | None = None,
    ) -> None:
        self.reached = threading.Event()
        self.released = threading.Event()
        module, name = statement
        run = getattr(module, name)

        def held(*arguments: Any, **named: Any) -> Any:
            self.reached.set()
            assert self.released.wait(ENOUGH)
            if error is not None:
                raise error
            return run(*arguments, **named)

        monkeypatch.setattr(module, name, held)


def calls_of(method: str) -> list[asyncio.Task[Any]]:
    """The server's, of this process, that are under way."""
    name = f"[/exportd.v1.ExportService/{method}]"
    return [task for task in asyncio.all_tasks() if name in task.get_name()]


async def gone(call: Any, method: str, writer: HeldWriter) -> None:
    """Have the caller go away while the ledger writes, and the server know of it."""
    await until(writer.reached.is_set, ENOUGH)
    assert calls_of(method)
    call.cancel()
    await until(lambda: all(task.cancelling() for task in calls_of(method)), ENOUGH)


async def dead_letter(world: World) -> Any:
    """A delivery that has failed for good."""
    world.sink.behaviour["dead"] = lambda _: DeliveryFailed("no", retryable=False)
    job_id = await world.job(sinks=[to("dead")])
    listing = pb.ListDeliveriesRequest(job_id=job_id)
    found = await world.server.stub.ListDeliveries(listing, metadata=world.by("acme"))
    return found.deliveries[0]


async def running_job(world: World) -> str:
    created = await world.server.stub.CreateExport(
        rpc.request("held"), metadata=world.by("acme")
    )
    return str(created.job.job_id)


async def creating(_: World) -> Message:
    return rpc.request("wide")


async def cancelling(world: World) -> Message:
    return pb.CancelJobRequest(job_id=await running_job(world))


async def deleting(world: World) -> Message:
    return pb.DeleteJobRequest(job_id=await world.job())


async def deleting_what_runs(world: World) -> Message:
    return pb.DeleteJobRequest(job_id=await running_job(world))


async def redriving_it(world: World) -> Message:
    return pb.RedriveDeliveriesRequest(delivery_id=(await dead_letter(world)).delivery_id)


async def enabling(world: World) -> Message:
    return pb.EnableSinkQueueRequest(queue=(await dead_letter(world)).queue)


UNAVAILABLE = ("UNAVAILABLE", "LEDGER_UNAVAILABLE")


@pytest.mark.parametrize(
    ("method", "statement", "prepare", "error", "ending", "line"),
    [
        (
            *("CreateExport", (submitting, "create_job"), creating, None),
            *(("OK", ""), "job created"),
        ),
        (
            *("CancelJob", (submitting, "cancel_job"), cancelling, None),
            *(("OK", ""), "job cancelled"),
        ),
        (
            *("DeleteJob", (submitting, "delete_job"), deleting, None),
            *(("OK", ""), "job deleted"),
        ),
        (
            *("RedriveDeliveries", (redriving, "redrive"), redriving_it, None),
            *(("OK", ""), "deliveries redriven"),
        ),
        (
            *("EnableSinkQueue", (redriving, "enable_queue"), enabling, None),
            *(("OK", ""), ""),
        ),
        (
            *("DeleteJob", (submitting, "delete_job"), deleting_what_runs, None),
            *(("FAILED_PRECONDITION", "JOB_NOT_FINISHED"), ""),
        ),
        (
            *("CreateExport", (submitting, "create_job"), creating, LedgerUnavailable()),
            *(UNAVAILABLE, ""),
        ),
        (
            *("DeleteJob", (submitting, "delete_job"), deleting, LedgerUnavailable()),
            *(UNAVAILABLE, ""),
        ),
    ],
)
async def test_a_change_whose_caller_went_away_is_recorded_as_what_it_came_to(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    statement: tuple[Any, str],
    prepare: Callable[[World], Any],
    error: Exception | None,
    ending: tuple[str, str],
    line: str,
) -> None:
    request = await prepare(world)
    before = len(audit_lines(world.log.getvalue()))
    writer = HeldWriter(monkeypatch, statement, error)
    call = getattr(world.server.stub, method)(request, metadata=world.by("acme"))
    await gone(call, method, writer)
    assert len(audit_lines(world.log.getvalue())) == before, "nothing has ended yet"
    writer.released.set()
    record = (await world.records(before + 1))[-1]
    assert (record.method, record.code, record.reason) == (method, *ending)
    assert record.outcome == (OK if ending[0] == "OK" else FAILED)
    lines = [json.loads(text)["event"] for text in world.log.getvalue().splitlines()]
    assert (line in lines) == bool(line), "what belongs to the change was done"
    # The ledger is of the record's opinion.
    if method in AFTER:
        done = await state_of(world, record.job_id) == AFTER[method]
        assert done == (ending[0] == "OK")


AFTER = {"CancelJob": "JOB_STATE_CANCELLED", "DeleteJob": "JOB_NOT_FOUND"}


async def state_of(world: World, job_id: str) -> str:
    get = pb.GetJobRequest(job_id=job_id)
    try:
        found = await world.server.stub.GetJob(get, metadata=world.by("acme"))
    except grpc.aio.AioRpcError as error:
        return rpc.Refusal(error).reason
    return job_pb2.JobState.Name(found.job.state)


async def test_a_change_that_a_quota_refused_is_recorded_so_for_a_caller_that_went_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with audited(tmp_path, limits={"max_active_jobs": 1}) as world:
        await running_job(world)
        writer = HeldWriter(monkeypatch, (submitting, "create_job"))
        create = rpc.request("wide")
        call = world.server.stub.CreateExport(create, metadata=world.by("acme"))
        await gone(call, "CreateExport", writer)
        writer.released.set()
        [_, record] = await world.records(2)
        assert (record.outcome, record.reason) == (FAILED, "QUOTA_EXCEEDED")
        assert record.job_id == ""


async def test_a_change_under_way_when_the_server_stops_is_recorded_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with audited(tmp_path) as world:
        job_id = await world.job()
        writer = HeldWriter(monkeypatch, (submitting, "delete_job"))
        call = world.server.stub.DeleteJob(
            pb.DeleteJobRequest(job_id=job_id), metadata=world.by("acme")
        )
        await until(writer.reached.is_set, ENOUGH)
        (task,) = calls_of("DeleteJob")

        async def let_go() -> None:
            # Once the time that calls have for their end is over.
            await until(lambda: task.cancelling() or task.done(), ENOUGH)
            writer.released.set()

        letting_go = asyncio.create_task(let_go())
    await letting_go
    call.cancel()
    ledger = await open_sqlite_ledger(tmp_path / "data/ledger.db", SystemClock())
    try:
        newest = (await ledger.list_audit(AuditQuery(), limit=10))[0]
        assert (newest.method, newest.code) == ("DeleteJob", "OK")
        assert await ledger.get_job("acme", job_id) is None
    finally:
        await ledger.close()


async def test_a_download_that_is_broken_off_says_how_far_it_came(world: World) -> None:
    stub, acme = world.server.stub, world.by("acme")
    made = await stub.CreateExport(
        rpc.request("held", max_part_rows=BATCH_ROWS), metadata=acme
    )
    job_id = made.job.job_id
    world.held.allow(4)
    call = stub.StreamDownload(
        pb.StreamDownloadRequest(job_id=job_id, follow=True), metadata=acme
    )
    got = 0
    async for message in call:
        got += len(message.data)
        if message.data:
            break
    call.cancel()
    [_, record] = await world.records(2)
    assert (record.method, record.outcome, record.code) == (
        "StreamDownload",
        BROKEN_OFF,
        "CANCELLED",
    )
    assert record.bytes_sent >= got > 0
    assert (record.job_id, record.dataset) == (job_id, "held")


async def test_a_download_by_url_that_is_broken_off_says_so(tmp_path: Path) -> None:
    async with audited(tmp_path, download={"chunk_bytes": 65_536}) as world:
        stub, acme = world.server.stub, world.by("acme")
        world.held.batches = 800
        world.held.open_wide()
        made = await stub.CreateExport(rpc.request("held"), metadata=acme)
        job_id = made.job.job_id
        async for _ in stub.WatchJob(pb.WatchJobRequest(job_id=job_id), metadata=acme):
            pass
        urls = await stub.GetDownloadUrls(
            pb.GetDownloadUrlsRequest(job_id=job_id), metadata=acme
        )
        url = urls.urls[0]
        async with aiohttp.ClientSession() as http:
            async with http.get(url.url) as answer:
                await answer.content.readexactly(1000)
                assert answer.connection is not None
                assert answer.connection.transport is not None
                answer.connection.transport.abort()
            async with http.head(url.url) as answer:
                assert answer.status == 200
            async with http.get(url.url, headers={"Range": "bytes=99999999999-"}) as answer:
                assert answer.status == 416
            base, _, rest = url.url.partition("/v1/download/")
            token, _, name = rest.partition("/")
            async with http.get(f"{base}/v1/download/{token[:-4]}AAAA/{name}") as answer:
                assert answer.status == 403
            async with http.get(f"{base}/elsewhere") as answer:
                assert answer.status == 404
        # A request ends when it ends; these came one after the other.
        records = (await world.records(6))[2:]
        told = {
            (r.outcome, r.code, r.reason, r.tenant, r.identity, r.job_id) for r in records
        }
        assert told == {
            (BROKEN_OFF, "CANCELLED", "CLIENT_GONE", "acme", "url", job_id),
            (OK, "OK", "", "acme", "url", job_id),
            (FAILED, "OUT_OF_RANGE", "OFFSET_OUT_OF_RANGE", "acme", "url", job_id),
            (FAILED, "PERMISSION_DENIED", "URL_INVALID", "", "", ""),
        }
        [broken] = [r for r in records if r.outcome == BROKEN_OFF]
        assert 0 < broken.bytes_sent < url.bytes
        assert broken.dataset == "held"
        assert token not in world.log.getvalue()


HOSTILE = {
    "lines": 'x\n{"event": "audit", "tenant": "forged"}\r\n',
    "terminal": "\x1b[2J\x1b]0;owned\x07\x9b31m",
    "bidi": "\u202eabc\u2028\u2029\u200b",
    "nul": "a\0b",
    "long": "A" * 900_000,
    "quotes": '"}{"a":1}\\',
}


@pytest.mark.parametrize("style", ["json", "console"])
@pytest.mark.parametrize("name", HOSTILE)
async def test_whatever_a_caller_sends_is_one_line_that_steers_nothing(
    tmp_path: Path, name: str, style: str
) -> None:
    text = HOSTILE[name]
    async with audited(tmp_path) as world:
        if style == "console":
            configure_logging("info", "console", world.log)
        stub, acme = world.server.stub, world.by("acme")
        for request in (
            rpc.request(text),
            rpc.request("wide", labels={"k": text, text[:50_000]: "v"}),
            rpc.request("wide", sinks=[to("a"), replace_name(to("b"), text)]),
        ):
            assert await refused(stub.CreateExport(request, metadata=acme))
        queue = pb.EnableSinkQueueRequest(queue=text)
        assert await refused(stub.EnableSinkQueue(queue, metadata=acme))
        records = await world.records(4)
        lines = [
            line for line in world.log.getvalue().splitlines() if "CreateExport" in line
        ]
        assert len(lines) == 3
        for line in world.log.getvalue().split("\n"):
            assert line.isprintable(), "nothing that is not printable"
            assert len(line) < 3000
        for record in records:
            assert len(str(record)) < 3000
            for value in (record.dataset, record.queue, *record.sinks):
                assert value.isprintable()
        if style == "json":
            assert len(audit_lines(world.log.getvalue())) == 4


def replace_name(sink: sink_pb2.Sink, name: str) -> sink_pb2.Sink:
    sink.name = name
    return sink


async def test_nothing_secret_is_in_a_record_or_a_line(world: World) -> None:
    stub, acme = world.server.stub, world.by("acme")
    config = struct_pb2.Struct()
    config.update({"label": "a", "password": f"{CANARY}-config"})
    request = rpc.request(
        "wide",
        labels={"note": f"{CANARY}-label"},
        filters=[
            job_pb2.Filter(
                column="text",
                operator=dataset_pb2.FILTER_OPERATOR_EQUAL,
                values=[job_pb2.FilterValue(string_value=f"{CANARY}-filter")],
            )
        ],
        target_id=f"{CANARY}-target",
        sinks=[
            sink_pb2.Sink(
                name="hook",
                webhook=sink_pb2.WebhookSink(
                    url=f"https://example.com/{CANARY}-url",
                    headers={"Authorization": f"{CANARY}-header"},
                    secret=f"{CANARY}-secret",
                ),
            ),
            sink_pb2.Sink(plugin=sink_pb2.PluginSink(type="scripted", config=config)),
        ],
    )
    await refused(stub.CreateExport(request, metadata=acme))
    job_id = await world.job()
    urls = await stub.GetDownloadUrls(
        pb.GetDownloadUrlsRequest(job_id=job_id), metadata=acme
    )
    async with aiohttp.ClientSession() as http, http.get(urls.urls[0].url) as answer:
        assert answer.status == 200
    records = await world.records(4)
    assert list(records[0].sinks) == ["hook", "plugin"]
    told = world.log.getvalue() + "".join(map(str, records))
    assert CANARY not in told
    assert urls.urls[0].url.split("/")[5] not in told
    for text in world.keys.values():
        assert text.rpartition("_")[2] not in told


async def test_without_identity_everybody_is_the_default_tenants_anybody(
    tmp_path: Path,
) -> None:
    options = settings(tmp_path, drain_timeout=1.0)
    async with serve(options, catalogue_of(wide=GateSource(2, wide=True))) as server:
        created = await server.stub.CreateExport(rpc.request("wide"))
        async with asyncio.timeout(ENOUGH):
            while not (
                found := await server.stub.ListAuditRecords(pb.ListAuditRecordsRequest())
            ).records:
                await asyncio.sleep(0.02)
        [record] = found.records
        assert record.job_id == created.job.job_id
        assert (record.tenant, record.subject, record.identity) == (
            "default",
            "anybody",
            "none",
        )


async def test_lines_are_written_whatever_the_level_of_the_log(tmp_path: Path) -> None:
    async with audited(tmp_path, level="error") as world:
        await world.job()
        await world.records(1)
        lines = world.log.getvalue().splitlines()
        assert [json.loads(line)["event"] for line in lines] == ["audit"]


async def test_what_waits_when_the_server_stops_is_kept(tmp_path: Path) -> None:
    async with audited(tmp_path) as world:
        cancel = pb.CancelJobRequest(job_id=NO_JOB)
        calls = (
            refused(world.server.stub.CancelJob(cancel, metadata=world.by("acme")))
            for _ in range(50)
        )
        assert set(await asyncio.gather(*calls)) == {"JOB_NOT_FOUND"}
    ledger = await open_sqlite_ledger(tmp_path / "data/ledger.db", SystemClock())
    try:
        assert len(await ledger.list_audit(AuditQuery(), limit=1000)) == 50
    finally:
        await ledger.close()


async def test_records_are_deleted_once_their_days_are_over(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    entry = Entry(AuditMethod.CANCEL_JOB, "", tenant="acme")
    old, new = (
        entry.record(Ending("OK"), now - timedelta(hours=hours), timedelta(0))
        for hours in (49, 47)
    )
    data = tmp_path / "data"
    ledger = await open_sqlite_ledger(data / "ledger.db", SystemClock())
    many = [replace(old, record_id=str(UUID(int=n))) for n in range(450)]
    await ledger.append_audit([*many, new])
    await ledger.close()
    async with audited(tmp_path, audit={"retention_days": 2}) as world:
        async with asyncio.timeout(ENOUGH):
            while True:
                found = await world.server.stub.ListAuditRecords(
                    pb.ListAuditRecordsRequest(page_size=1000),
                    metadata=world.by("operator"),
                )
                if len(found.records) == 1:
                    break
                await asyncio.sleep(0.02)
        assert found.records[0].record_id == new.record_id


# --- who may ask, and how


async def test_only_an_admin_may_ask_and_sees_every_tenant(world: World) -> None:
    for caller in ("acme", "globex"):
        await world.job(caller)
    await world.records(2)
    stub = world.server.stub
    for caller in ("acme", "acme, reading", "globex"):
        call = stub.ListAuditRecords(
            pb.ListAuditRecordsRequest(tenant="acme"), metadata=world.by(caller)
        )
        refusal = await rpc.refusal(call)
        assert refusal.code == grpc.StatusCode.PERMISSION_DENIED
        assert refusal.metadata == {"scope": "admin"}
    call = stub.ListAuditRecords(pb.ListAuditRecordsRequest())
    assert await refused(call) == "UNAUTHENTICATED"
    assert [r.tenant for r in await world.records(2)] == ["acme", "globex"]
    assert [r.tenant for r in await world.records(1, tenant="acme")] == ["acme"]
    # Asking leaves no record.
    assert len(audit_lines(world.log.getvalue())) == 2


@pytest.mark.parametrize(
    ("fields", "bad"),
    [
        ({"job_id": "x"}, "job_id"),
        ({"methods": ["CreateExport", "Nothing"]}, "methods[1]"),
        ({"outcomes": [1, 99]}, "outcomes[1]"),
        ({"outcomes": [0]}, "outcomes[0]"),
        ({"page_size": 1001}, "page_size"),
        ({"tenant": "a\0"}, "tenant"),
        ({"subject": "a\0"}, "subject"),
    ],
)
async def test_bad_conditions_are_refused_by_name(
    world: World, fields: dict[str, Any], bad: str
) -> None:
    refusal = await rpc.refusal(
        world.server.stub.ListAuditRecords(
            pb.ListAuditRecordsRequest(**fields), metadata=world.by("operator")
        )
    )
    assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.fields == [bad]


async def test_clients_page_through_records_and_filter_them(world: World) -> None:
    job_id = await world.job()
    stub, acme = world.server.stub, world.by("acme")
    for _ in range(3):
        await stub.CancelJob(pb.CancelJobRequest(job_id=job_id), metadata=acme)
    assert await refused(stub.DeleteJob(pb.DeleteJobRequest(job_id=NO_JOB), metadata=acme))
    expected = [r.record_id for r in await world.records(5)][::-1]
    address, token = world.server.address, world.keys["operator"]

    def blocking() -> None:
        with Client(address, token=token) as client:
            found = list(client.audit_records(page_size=2))
            assert [r.id for r in found] == expected
            [deleted] = client.audit_records(methods=["DeleteJob"], outcomes=["FAILED"])
            assert deleted.outcome is AuditOutcome.FAILED
            assert (deleted.reason, deleted.job_id) == ("JOB_NOT_FOUND", NO_JOB)
            assert deleted.part is None
            assert deleted.bytes_sent is None
            since, until = found[3].time, found[1].time
            window = client.audit_records(from_time=since, before_time=until, job_id=job_id)
            assert [r.id for r in window] == expected[2:4]
            assert not list(client.audit_records(tenant="globex"))
            subject = world.subject("acme")
            assert len(list(client.audit_records(subject=subject))) == 5
        with (
            Client(address, token=world.keys["acme"]) as client,
            pytest.raises(AccessDenied),
        ):
            list(client.audit_records())

    await asyncio.to_thread(blocking)
    async with AsyncClient(address, token=token) as client:
        assert [r.id async for r in client.audit_records(page_size=2)] == expected

    def command(*arguments: str, code: int = 0, key: str = "operator") -> str:
        result = CliRunner().invoke(
            cli,
            ["--server", address, "audit", *arguments],
            env={"EXPORTD_TOKEN": world.keys[key]},
        )
        assert (result.exit_code, key) == (code, key), result.output
        return result.stdout

    shown = await asyncio.to_thread(command, "--outcome", "failed")
    assert shown.splitlines()[0].startswith("TIME")
    assert "failed, JOB_NOT_FOUND" in shown
    assert NO_JOB in shown
    assert len(shown.splitlines()) == 2
    lines = await asyncio.to_thread(command, "--json", "--job", job_id, "-n", "2")
    assert [json.loads(line)["record_id"] for line in lines.splitlines()] == expected[1:3]


# --- keys, which another process changes


def keys_command(*arguments: str, code: int = 0) -> tuple[str, list[dict[str, Any]]]:
    """Run `exportd-server keys`; its answer, and the audit lines on standard error."""
    root, before = logging.getLogger(), structlog.get_config()
    handlers, level = root.handlers[:], root.level
    try:
        result = CliRunner().invoke(main, ["keys", *arguments])
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        structlog.configure(**before)
    assert result.exit_code == code, result.output
    lines = [json.loads(x) for x in result.stderr.splitlines() if x.startswith("{")]
    return result.stdout.strip(), lines


def key_facts(record: Any) -> tuple[Any, ...]:
    return (
        record.method,
        record.code,
        record.tenant,
        record.subject,
        record.identity,
        record.peer,
        record.key_id,
    )


def made_and_revoked(*where: str) -> tuple[str, list[tuple[Any, ...]]]:
    """Make a key, revoke it, and revoke what is none; the key, and the records due."""
    text, [created] = keys_command("create", "--tenant", "initech", *where)
    key_id = text.split("_")[1]
    _, [revoked] = keys_command("revoke", key_id, *where)
    _, [unknown] = keys_command("revoke", text, *where, code=1)
    me = (f"os:{getpass.getuser()}", "operator", socket.gethostname())
    assert [line["method"] for line in (created, revoked, unknown)] == [
        "CreateApiKey",
        "RevokeApiKey",
        "RevokeApiKey",
    ]
    secret = text.rpartition("_")[2]
    assert secret not in json.dumps([created, revoked, unknown])
    return secret, [
        ("CreateApiKey", "OK", "initech", *me, key_id),
        ("RevokeApiKey", "OK", "initech", *me, key_id),
        ("RevokeApiKey", "NOT_FOUND", "", *me, ""),
    ]


@pytest.mark.parametrize("running", [True, False])
async def test_changes_of_keys_by_command_reach_the_embedded_ledger(
    tmp_path: Path, *, running: bool
) -> None:
    where = ("--data-dir", str(tmp_path / "data"))
    if not running:
        secret, expected = await asyncio.to_thread(made_and_revoked, *where)
    async with audited(tmp_path) as world:
        if running:
            secret, expected = await asyncio.to_thread(made_and_revoked, *where)
        records = await world.records(3)
        assert list(map(key_facts, records)) == expected
        assert secret not in "".join(map(str, records))
        spool = tmp_path / "data" / NAME
        async with asyncio.timeout(ENOUGH):
            while spool.stat().st_size:
                await asyncio.sleep(0.02)
        assert spool.stat().st_mode & 0o777 == 0o600


async def test_changes_of_keys_by_command_reach_the_ledger_of_a_fleet(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await asyncio.to_thread(migrate_postgres_ledger, postgres_url)
    monkeypatch.setenv("EXPORTD_LEDGER__URL", postgres_url)
    _, expected = await asyncio.to_thread(made_and_revoked)
    ledger = await open_postgres_ledger(postgres_url, connections=1)
    try:
        records = await ledger.list_audit(AuditQuery(), limit=10)
        assert list(map(key_facts, records[::-1])) == expected
    finally:
        await ledger.close()


class Shelf:
    def __init__(self) -> None:
        self.kept: list[AuditRecord] = []

    async def append_audit(self, records: list[AuditRecord]) -> None:
        known = {each.record_id for each in self.kept}
        self.kept += [each for each in records if each.record_id not in known]


async def test_a_spool_survives_torn_and_foreign_lines_and_forgets_nothing(
    tmp_path: Path,
) -> None:
    spool, shelf = AuditSpool(tmp_path), Shelf()
    entry = Entry(AuditMethod.CREATE_API_KEY, "host", key_id="k", sinks=("a",))
    one, two, three = (
        entry.record(Ending("OK"), datetime.now(UTC), timedelta(seconds=1.5))
        for _ in range(3)
    )
    await spool.append(one)
    path = tmp_path / NAME
    whole = path.read_bytes()
    path.write_bytes(whole + b"\xff not a record\n" + whole[: len(whole) // 2])
    await spool.move(shelf)  # type: ignore[arg-type]
    assert shelf.kept == [one]
    # The half of a line stays until more comes, which is kept apart from it.
    assert path.read_bytes() == whole[: len(whole) // 2]
    await spool.append(two)
    await spool.append(three)
    await spool.move(shelf)  # type: ignore[arg-type]
    await spool.move(shelf)  # type: ignore[arg-type]
    assert shelf.kept == [one, two, three]
    assert path.read_bytes() == b""


async def test_a_spool_is_not_written_through_a_link(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"")
    (tmp_path / NAME).symlink_to(target)
    entry = Entry(AuditMethod.CREATE_API_KEY, "host")
    record = entry.record(Ending("OK"), datetime.now(UTC), timedelta(0))
    with pytest.raises(OSError):
        await AuditSpool(tmp_path).append(record)
    assert target.read_bytes() == b""
    text, lines = await asyncio.to_thread(
        keys_command, "create", "--tenant", "acme", "--data-dir", str(tmp_path)
    )
    assert text.startswith("exportd_"), "the key is made all the same"
    assert lines[0]["event"] == "audit"
    assert (tmp_path / NAME).readlink() == target


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:127.0.0.1:5", "127.0.0.1:5"),
        ("ipv6:%5B::1%5D:5", "[::1]:5"),
        ("unix:/tmp/x", "unix:/tmp/x"),
    ],
)
def test_an_address_is_told_as_people_write_it(peer: str, address: str) -> None:
    assert peer_address(peer) == address
