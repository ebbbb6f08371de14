"""Exports that are delivered, end to end, over a real socket."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from google.protobuf import struct_pb2

from exportd.v1 import export_service_pb2 as pb
from exportd.v1 import job_pb2, sink_pb2
from exportd_server.errors import DeliveryFailed
from exportd_server.jobs.ledger.base import Lease
from exportd_server.jobs.ledger.sql import SqlLedger
from exportd_server.jobs.manifest import store_manifest
from exportd_server.platform import metrics
from exportd_server.sinks.base import Batching, Delivery
from exportd_server.sinks.registry import SinkTypes
from tests.support import rpc
from tests.support.gate import BATCH_ROWS, GateSource
from tests.support.samples import catalogue_of
from tests.support.scripted_sink import ScriptedSink
from tests.support.server import Server, serve, settings
from tests.support.waits import ENOUGH

S = sink_pb2

PARTS = 5
"""Parts of an export of the dataset `gated`, whose parts have a batch each."""


@pytest.fixture
def scripted() -> ScriptedSink:
    return ScriptedSink()


Serving = Callable[..., AbstractAsyncContextManager[Server]]


@pytest.fixture
def run(tmp_path: Path, scripted: ScriptedSink) -> Serving:
    """Runs a server whose dataset `gated` has `PARTS` batches and whose connections are
    those of `sinks`."""

    @asynccontextmanager
    async def run(
        source: GateSource | None = None, sinks: str = "", **values: Any
    ) -> AsyncIterator[Server]:
        directory = tmp_path / "reports"
        directory.mkdir(exist_ok=True)
        file = tmp_path / "sinks.toml"
        file.write_text(
            f'[connections.reports]\ntype = "local_file"\nroot = "{directory}"\n{sinks}'
        )
        values.setdefault("drain_timeout", 2.0)
        async with serve(
            settings(tmp_path / "data", sinks=file, **values),
            catalogue_of(gated=source or GateSource(PARTS, wide=True)),
            SinkTypes.installed().with_type(scripted),
        ) as server:
            yield server

    return run


def to(label: str = "", connection: str = "", **config: Any) -> sink_pb2.Sink:
    """The scripted sink."""
    message = struct_pb2.Struct()
    message.update({"label": label, **config})
    return S.Sink(
        name=label,
        plugin=S.PluginSink(type="scripted", connection=connection, config=message),
    )


def to_file(path: str = "", connection: str = "reports") -> sink_pb2.Sink:
    return S.Sink(local_file=S.LocalFileSink(connection=connection, path=path))


async def create(server: Server, *sinks: sink_pb2.Sink, **fields: Any) -> job_pb2.Job:
    fields.setdefault("max_part_rows", BATCH_ROWS)
    return await rpc.create(server.stub, "gated", sinks=sinks, **fields)


async def settled(server: Server, job_id: str, timeout: float = ENOUGH) -> job_pb2.Job:
    """Watch a job until its deliveries have ended."""
    job = job_pb2.Job()
    watch = pb.WatchJobRequest(job_id=job_id, until_delivered=True)
    async with asyncio.timeout(timeout):
        async for response in server.stub.WatchJob(watch):
            job = response.job
    return job


async def deliveries(server: Server, **conditions: Any) -> list[sink_pb2.Delivery]:
    found: list[sink_pb2.Delivery] = []
    token = ""
    while True:
        page = await server.stub.ListDeliveries(
            pb.ListDeliveriesRequest(page_size=4, page_token=token, **conditions)
        )
        found += page.deliveries
        token = page.next_page_token
        if not token:
            return found


async def redrive(server: Server, **which: Any) -> int:
    answer = await server.stub.RedriveDeliveries(pb.RedriveDeliveriesRequest(**which))
    return int(answer.redriven)


def always(error: DeliveryFailed) -> Callable[[Delivery], DeliveryFailed]:
    return lambda _delivery: error


def refused() -> DeliveryFailed:
    return DeliveryFailed("not this", retryable=False)


def passing() -> DeliveryFailed:
    return DeliveryFailed("try again", retryable=True)


# --- arriving


async def test_an_export_arrives_in_a_directory_with_a_manifest_that_lists_it(
    run: Serving, tmp_path: Path
) -> None:
    async with run() as server:
        job = await create(server, to_file("daily/flights"))
        done = await settled(server, job.job_id)
        assert done.state == job_pb2.JOB_STATE_SUCCEEDED
        assert done.delivery_status == S.DELIVERY_STATUS_DELIVERED
        assert list(done.delivered_to) == ["local_file"]
        (sink,) = done.deliveries
        assert (sink.delivered, sink.pending, sink.attempts) == (PARTS + 1, 0, PARTS + 1)
        folder = tmp_path / "reports" / "daily" / "flights"
        assert sink.receipt
        (manifest,) = folder.glob("*.manifest.json")
        told = json.loads(manifest.read_text())
        assert told["job_id"] == job.job_id
        names = [part["file_name"] for part in told["parts"]]
        assert sorted(names) == sorted(
            file.name for file in folder.iterdir() if file != manifest
        )
        joined = await rpc.download(server.stub, job.job_id)
        parts = list(done.manifest.parts)
        tail = b"".join(
            (folder / name).read_bytes()[part.prefix_bytes if index else 0 :]
            for index, (name, part) in enumerate(zip(names, parts, strict=True))
        )
        assert tail == joined


async def test_parts_are_delivered_while_the_job_still_runs(
    run: Serving, scripted: ScriptedSink
) -> None:
    source = GateSource(PARTS)
    async with run(source) as server:
        job = await create(server, to("a"), to("b", takes="whole"))
        source.allow(3)
        await scripted.arrived("a", 2)
        now = await rpc.get(server.stub, job.job_id)
        assert now.state == job_pb2.JOB_STATE_RUNNING
        assert now.delivery_status == S.DELIVERY_STATUS_PENDING
        assert "b" not in scripted.tried
        source.open_wide()
        done = await settled(server, job.job_id)
        assert list(done.delivered_to) == ["a", "b"]
        assert scripted.got["a"][-1].part is None, "the completion comes last"
        (whole,) = scripted.got["b"]
        assert [part.file_name for part in whole.parts] == sorted(
            delivery.part.file_name for delivery in scripted.got["a"] if delivery.part
        )
        assert len({delivery.delivery_id for delivery in scripted.got["a"]}) == PARTS + 1


async def test_a_job_without_sinks_shows_nothing_of_deliveries(run: Serving) -> None:
    async with run() as server:
        job = await rpc.export(server.stub, "gated")
        assert job.delivery_status == S.DELIVERY_STATUS_UNSPECIFIED
        assert not job.deliveries
        assert not job.delivered_to
        assert not await deliveries(server, job_id=job.job_id)


# --- failing


async def test_a_failure_that_passes_is_tried_again_and_arrives_once(
    run: Serving, scripted: ScriptedSink
) -> None:
    failed: set[str] = set()

    def once(delivery: Delivery) -> DeliveryFailed | None:
        first = delivery.delivery_id not in failed
        failed.add(delivery.delivery_id)
        return passing() if first else None

    scripted.behaviour["a"] = once
    async with run() as server:
        job = await create(server, to("a"))
        done = await settled(server, job.job_id)
        assert done.delivery_status == S.DELIVERY_STATUS_DELIVERED
        assert done.deliveries[0].attempts == 2 * (PARTS + 1)
        assert not done.deliveries[0].HasField("last_error")
        assert {delivery.attempt for delivery in scripted.got["a"]} == {2}
        ids = [delivery.delivery_id for delivery in scripted.tried["a"]]
        assert len(set(ids)) == PARTS + 1, "the same id at each attempt"


async def test_a_sink_that_fails_for_ever_fails_neither_the_job_nor_another_sink(
    run: Serving, scripted: ScriptedSink
) -> None:
    scripted.behaviour["bad-one"] = always(passing())
    async with run() as server:
        job = await create(server, to("bad-one"), to("good"), to_file())
        done = await settled(server, job.job_id)
        assert done.state == job_pb2.JOB_STATE_SUCCEEDED
        assert await rpc.download(server.stub, job.job_id)
        assert done.delivery_status == S.DELIVERY_STATUS_FAILED
        assert list(done.delivered_to) == ["good", "local_file"]
        bad = done.deliveries[0]
        assert bad.status == S.DELIVERY_STATUS_FAILED
        assert bad.dead_lettered == PARTS + 1
        assert bad.last_error.message == "[DELIVERY_FAILED] try again"
        letters = await deliveries(
            server, job_id=job.job_id, states=[S.DELIVERY_STATE_DEAD_LETTERED]
        )
        assert len(letters) == PARTS + 1
        completion = next(each for each in letters if not each.file_name)
        assert "PARTS_NOT_DELIVERED" in completion.last_error.message
        assert {each.attempts for each in letters if each.file_name} == {3}


async def test_dead_letters_are_sent_again_without_exporting_again(
    run: Serving, scripted: ScriptedSink
) -> None:
    scripted.behaviour["a"] = always(refused())
    source = GateSource(PARTS, wide=True)
    async with run(source) as server:
        job = await create(server, to("a"))
        await settled(server, job.job_id)
        assert len(scripted.tried["a"]) == PARTS, "what is permanent is tried once"
        opened = source.opened
        letters = await deliveries(server, job_id=job.job_id)
        one = next(each for each in letters if each.file_name)
        del scripted.behaviour["a"]
        assert await redrive(server, delivery_id=one.delivery_id) == 1
        await scripted.arrived("a", 1)
        assert scripted.got["a"][0].delivery_id == one.delivery_id
        assert await redrive(server, job_id=job.job_id) == PARTS - 1
        done = await settled(server, job.job_id)
        assert done.delivery_status == S.DELIVERY_STATUS_DELIVERED
        assert len(scripted.got["a"]) == PARTS + 1
        assert source.opened == opened


async def test_all_dead_letters_of_a_queue_are_sent_again(
    run: Serving, scripted: ScriptedSink
) -> None:
    scripted.behaviour["a"] = always(refused())
    scripted.behaviour["b"] = always(refused())
    async with run() as server:
        jobs = [
            await create(server, to("a", endpoint="one"), to("b", endpoint="two"))
            for _ in range(3)
        ]
        for job in jobs:
            await settled(server, job.job_id)
        scripted.behaviour.clear()
        queues = (await server.stub.ListSinkQueues(pb.ListSinkQueuesRequest())).queues
        assert [queue.queue for queue in queues] == [
            "scripted/default/one",
            "scripted/default/two",
        ]
        assert [queue.dead_lettered for queue in queues] == [3 * (PARTS + 1)] * 2
        assert await redrive(server, queue="scripted/default/one") >= 3 * PARTS
        await scripted.arrived("a", 3 * (PARTS + 1))
        assert "b" not in scripted.got


async def test_a_sink_that_breaks_in_an_unforeseen_way_is_tried_again(
    run: Serving, scripted: ScriptedSink
) -> None:
    scripted.behaviour["a"] = lambda _delivery: RuntimeError("secret cause")
    async with run() as server:
        job = await create(server, to("a", takes="whole"))
        done = await settled(server, job.job_id)
        assert len(scripted.tried["a"]) == 3
        assert "secret" not in str(done)


async def test_a_delivery_has_its_own_time_limit(
    run: Serving, scripted: ScriptedSink
) -> None:
    scripted.hold("slow")
    slow = (
        '[connections.slow]\ntype = "scripted"\ntimeout_seconds = 0.1\nmax_attempts = 2\n'
    )
    async with run(sinks=slow + "retry_base_seconds = 0.01\n") as server:
        job = await create(server, to("slow", connection="slow", takes="whole"))
        done = await settled(server, job.job_id)
        assert len(scripted.tried["slow"]) == 2
        assert "longer than 0.1 s" in done.deliveries[0].last_error.message


# --- queues


async def test_a_slow_sink_holds_up_no_other_until_its_queue_is_full_and_then_the_export(
    run: Serving, scripted: ScriptedSink
) -> None:
    free = scripted.hold("slow")
    slow = '[connections.slow]\ntype = "scripted"\nqueue_depth = 3\nconcurrency = 1\n'
    async with run(GateSource(20, wide=True), sinks=slow) as server:
        job = await create(server, to("slow", connection="slow"), to("fast"))
        await scripted.arrived("fast", 3)
        # Three stand in the queue; the fourth part waits for a place.
        await asyncio.sleep(0.5)
        assert len(scripted.got["fast"]) == 3
        now = await rpc.get(server.stub, job.job_id)
        assert now.state == job_pb2.JOB_STATE_RUNNING
        assert now.deliveries[0].pending == 3
        free.set()
        done = await settled(server, job.job_id)
        assert done.delivery_status == S.DELIVERY_STATUS_DELIVERED
        assert scripted.most_at_work <= 5


async def test_a_full_queue_that_drops_stalls_nothing_and_says_what_it_dropped(
    run: Serving, scripted: ScriptedSink
) -> None:
    free = scripted.hold("slow")
    slow = (
        '[connections.slow]\ntype = "scripted"\nqueue_depth = 2\nconcurrency = 1\n'
        'on_full = "DROP"\n'
    )
    async with run(GateSource(12, wide=True), sinks=slow) as server:
        job = await create(server, to("slow", connection="slow"), to("fast"))
        done = await rpc.finish(server.stub, job.job_id)
        assert done.state == job_pb2.JOB_STATE_SUCCEEDED
        free.set()
        done = await settled(server, job.job_id)
        slow_one, fast = done.deliveries
        assert fast.status == S.DELIVERY_STATUS_DELIVERED
        assert slow_one.status == S.DELIVERY_STATUS_DROPPED
        assert slow_one.dropped == 10
        assert scripted.got["slow"][-1].dropped == 10
        assert len(scripted.got["slow"][-1].parts) == 2
        assert await redrive(server, job_id=job.job_id) == 10
        done = await settled(server, job.job_id)
        assert done.delivery_status == S.DELIVERY_STATUS_DELIVERED
        assert len(scripted.got["slow"][-1].parts) == 12
        assert scripted.got["slow"][-1].dropped == 0


async def test_no_more_deliveries_of_one_queue_are_under_way_than_it_allows(
    run: Serving, scripted: ScriptedSink
) -> None:
    free = scripted.hold("a")
    two = '[connections.two]\ntype = "scripted"\nconcurrency = 2\n'
    async with run(GateSource(12, wide=True), sinks=two) as server:
        job = await create(server, to("a", connection="two"))
        await rpc.finish(server.stub, job.job_id)
        await scripted.was_tried("a", 2)
        await asyncio.sleep(0.2)
        assert scripted.most_at_work == 2
        free.set()
        await settled(server, job.job_id)
        assert scripted.most_at_work == 2


async def test_a_sink_that_gains_by_it_is_given_several_parts_together(
    run: Serving, scripted: ScriptedSink
) -> None:
    failed: set[str] = set()

    def third_once(delivery: Delivery) -> DeliveryFailed | None:
        third = delivery.part is not None and delivery.part.sequence == 2
        if third and delivery.delivery_id not in failed:
            failed.add(delivery.delivery_id)
            return passing()
        return None

    scripted.defaults = replace(scripted.defaults, batching=Batching(4, wait=5.0))
    scripted.behaviour["a"] = third_once
    async with run(GateSource(8, wide=True)) as server:
        job = await create(server, to("a"))
        done = await settled(server, job.job_id)
        assert done.delivery_status == S.DELIVERY_STATUS_DELIVERED
        assert done.deliveries[0].attempts == 8 + 1 + 1, "one failed alone"
        assert max(scripted.batches) == 4, "up to its size, and what its queue allows"
        assert scripted.got["a"][-1].part is None, "the completion comes last and alone"
        arrived = [each.part.sequence for each in scripted.got["a"] if each.part]
        assert sorted(arrived) == list(range(8))


async def test_a_batch_waits_no_longer_than_it_is_worth(
    run: Serving, scripted: ScriptedSink
) -> None:
    scripted.defaults = replace(scripted.defaults, batching=Batching(4, wait=0.2))
    source = GateSource(8)
    async with run(source) as server:
        job = await create(server, to("a"))
        source.allow(2)
        await scripted.arrived("a", 1)
        now = await rpc.get(server.stub, job.job_id)
        assert now.state == job_pb2.JOB_STATE_RUNNING
        source.open_wide()
        await settled(server, job.job_id)


# --- ends


async def test_a_restart_sends_again_what_was_under_way_and_waits_as_before(
    run: Serving, tmp_path: Path, scripted: ScriptedSink
) -> None:
    scripted.hold("held")
    scripted.behaviour["later"] = always(passing())
    later = '[connections.later]\ntype = "scripted"\nretry_base_seconds = 3600\n'
    async with run(sinks=later) as server:
        job = await create(
            server,
            to("held", takes="whole"),
            to("later", connection="later", takes="whole"),
        )
        await rpc.finish(server.stub, job.job_id)
        await scripted.was_tried("held", 1)
        await scripted.was_tried("later", 1)
    # The drain has waited its time for what hangs, and not for what waits an hour.
    scripted.held.clear()
    scripted.behaviour.clear()
    async with run(sinks=later) as server:
        await scripted.arrived("held", 1)
        assert [each.attempt for each in scripted.tried["held"]] == [1, 1], "given back"
        now = await rpc.get(server.stub, job.job_id)
        assert now.deliveries[1].pending == 1
        (waiting,) = await deliveries(server, job_id=job.job_id, sink="later")
        assert waiting.HasField("next_attempt_time")
        assert waiting.attempts == 1
        # Who does not want to wait has it tried now.
        assert await redrive(server, job_id=job.job_id, sink="later") == 1
        await settled(server, job.job_id)
        assert [each.attempt for each in scripted.got["later"]] == [2]


async def test_a_delivery_that_kills_its_process_comes_to_an_end(
    run: Serving, scripted: ScriptedSink
) -> None:
    """Each process that takes it up dies: the next one sees that from the attempts."""
    free = scripted.hold("a")
    async with run() as server:
        job = await create(server, to("a", takes="whole"))
        await scripted.was_tried("a", 1)
        ledger = server.data_dir / "ledger.db"
        with sqlite3.connect(ledger) as database:
            database.execute("UPDATE tasks SET attempts = 4 WHERE kind = 'deliver'")
    free.set()
    async with run() as server:
        done = await settled(server, job.job_id)
        assert done.deliveries[0].dead_lettered == 1
        assert "ATTEMPTS_EXHAUSTED" in done.deliveries[0].last_error.message
        assert len(scripted.tried["a"]) == 1


async def test_a_failed_export_marks_its_deliveries_failed(
    run: Serving, scripted: ScriptedSink
) -> None:
    source = GateSource(PARTS)
    scripted.hold("a")
    async with run(source, worker={"max_attempts": 1}) as server:
        job = await create(server, to("a"))
        source.allow(2)
        await scripted.was_tried("a", 1)
        source.fail()
        done = await settled(server, job.job_id)
        assert done.state == job_pb2.JOB_STATE_FAILED
        assert done.delivery_status == S.DELIVERY_STATUS_FAILED
        states = {each.state for each in await deliveries(server, job_id=job.job_id)}
        assert states == {S.DELIVERY_STATE_FAILED}


async def test_a_cancelled_export_stops_its_deliveries(
    run: Serving, scripted: ScriptedSink
) -> None:
    source = GateSource(PARTS)
    scripted.hold("a")
    async with run(source) as server:
        job = await create(server, to("a"))
        source.allow(2)
        await scripted.was_tried("a", 1)
        await server.stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))
        async with asyncio.timeout(ENOUGH):
            while scripted.at_work:
                await asyncio.sleep(0.02)
        done = await settled(server, job.job_id)
        assert done.delivery_status == S.DELIVERY_STATUS_FAILED
        refusal = await rpc.refusal(
            server.stub.RedriveDeliveries(pb.RedriveDeliveriesRequest(job_id=job.job_id))
        )
        assert refusal.reason == "JOB_CANCELLED"


async def test_the_stored_copy_is_dropped_once_every_sink_has_it(
    run: Serving, scripted: ScriptedSink
) -> None:
    free = scripted.hold("late")
    async with run() as server:
        job = await create(
            server, to("a"), to("late", takes="whole"), drop_after_delivery=True
        )
        await rpc.finish(server.stub, job.job_id)
        await scripted.arrived("a", PARTS + 1)
        assert await rpc.download(server.stub, job.job_id), "one sink lacks it still"
        free.set()
        done = await settled(server, job.job_id)
        assert done.state == job_pb2.JOB_STATE_SUCCEEDED
        assert done.HasField("drop_time")
        refusal = await rpc.refusal(
            server.stub.StreamDownload(pb.StreamDownloadRequest(job_id=job.job_id))
        )
        assert refusal.code is grpc.StatusCode.NOT_FOUND
        assert refusal.reason == "OUTPUT_DROPPED"
        async with asyncio.timeout(ENOUGH):
            while server.files():
                await asyncio.sleep(0.02)


async def test_the_stored_copy_stays_while_a_sink_lacks_something(
    run: Serving, scripted: ScriptedSink
) -> None:
    scripted.behaviour["bad-one"] = always(refused())
    async with run() as server:
        job = await create(server, to("a"), to("bad-one"), drop_after_delivery=True)
        done = await settled(server, job.job_id)
        assert not done.HasField("drop_time")
        assert await rpc.download(server.stub, job.job_id)
        scripted.behaviour.clear()
        await redrive(server, job_id=job.job_id)
        assert (await settled(server, job.job_id)).HasField("drop_time")


# --- endpoints


async def test_an_endpoint_that_is_gone_is_disabled_until_it_is_enabled(
    run: Serving, scripted: ScriptedSink
) -> None:
    scripted.behaviour["a"] = always(DeliveryFailed("gone", retryable=False, gone=True))
    async with run() as server:
        job = await create(server, to("a", endpoint="https://x"), to("b"))
        done = await settled(server, job.job_id)
        assert done.deliveries[0].dead_lettered == PARTS + 1
        assert done.deliveries[1].status == S.DELIVERY_STATUS_DELIVERED
        queue = "scripted/default/https://x"
        refusal = await rpc.refusal(
            server.stub.CreateExport(
                rpc.request("gated", sinks=[to("a", endpoint="https://x")])
            )
        )
        assert refusal.reason == "ENDPOINT_DISABLED"
        assert refusal.metadata == {"queue": queue}
        again = pb.RedriveDeliveriesRequest(job_id=job.job_id, queue=queue)
        refusal = await rpc.refusal(server.stub.RedriveDeliveries(again))
        assert refusal.reason == "ENDPOINT_DISABLED"
        queues = (await server.stub.ListSinkQueues(pb.ListSinkQueuesRequest())).queues
        (told,) = (each for each in queues if each.queue == queue)
        assert told.HasField("disabled_time")
        assert "ENDPOINT_GONE" in told.disabled_reason.message
        scripted.behaviour.clear()
        answer = await server.stub.EnableSinkQueue(pb.EnableSinkQueueRequest(queue=queue))
        assert not answer.queue.HasField("disabled_time")
        assert await redrive(server, job_id=job.job_id) == PARTS
        done = await settled(server, job.job_id)
        assert done.delivery_status == S.DELIVERY_STATUS_DELIVERED


async def test_an_endpoint_that_fails_for_too_long_is_disabled(
    tmp_path: Path, run: Serving, scripted: ScriptedSink
) -> None:
    scripted.behaviour["a"] = always(passing())
    weak = (
        '[connections.weak]\ntype = "scripted"\ndisable_after_seconds = 0.2\n'
        "max_attempts = 1000\nretry_base_seconds = 0.05\nretry_cap_seconds = 0.05\n"
    )
    async with run(sinks=weak) as server:
        job = await create(server, to("a", connection="weak", endpoint="x"))
        done = await settled(server, job.job_id)
        assert done.deliveries[0].dead_lettered == PARTS + 1
        (queue,) = (await server.stub.ListSinkQueues(pb.ListSinkQueuesRequest())).queues
        assert queue.HasField("disabled_time")
        assert queue.HasField("failing_since")


# --- bad input


@pytest.mark.parametrize(
    ("sink", "field"),
    [
        (S.Sink(), "sinks[0]"),
        (S.Sink(local_file=S.LocalFileSink()), "sinks[0].local_file.connection"),
        (to_file(connection="none"), "sinks[0].local_file.connection"),
        (to_file(path="../x"), "sinks[0].local_file.path"),
        (
            S.Sink(webhook=S.WebhookSink(url="ftp://example.com", secret="whsec_x")),
            "sinks[0].webhook.url",
        ),
        (
            S.Sink(database=S.DatabaseSink(connection="reports", table="t")),
            "sinks[0].database.connection",
        ),
        (S.Sink(plugin=S.PluginSink(type="none")), "sinks[0].plugin.type"),
        (S.Sink(plugin=S.PluginSink(type="webhook")), "sinks[0].plugin.type"),
        (to("bad"), "sinks[0].plugin.label"),
        (to("x", surprise=1), "sinks[0].plugin.surprise"),
        (
            S.Sink(name="Bad Name", local_file=S.LocalFileSink(connection="reports")),
            "sinks[0].local_file.name",
        ),
    ],
)
async def test_a_bad_sink_is_refused_when_the_job_is_created(
    run: Serving, sink: sink_pb2.Sink, field: str
) -> None:
    async with run() as server:
        refusal = await rpc.refusal(
            server.stub.CreateExport(rpc.request("gated", sinks=[sink]))
        )
        assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
        assert refusal.fields == [field]
        listed = await server.stub.ListJobs(pb.ListJobsRequest())
        assert not listed.jobs


async def test_sinks_of_one_job_are_told_apart(run: Serving) -> None:
    async with run() as server:
        job = await create(server, to_file("a"), to_file("b"), to("x"))
        names = [sink.name for sink in job.request.sinks]
        assert names == ["local_file", "local_file-2", "x"]
        refusal = await rpc.refusal(
            server.stub.CreateExport(rpc.request("gated", sinks=[to("x"), to("x")]))
        )
        assert refusal.fields == ["sinks[1].plugin.name"]
        refusal = await rpc.refusal(
            server.stub.CreateExport(rpc.request("gated", drop_after_delivery=True))
        )
        assert refusal.fields == ["drop_after_delivery"]
        refusal = await rpc.refusal(
            server.stub.CreateExport(
                rpc.request("gated", sinks=[to(f"s{i}") for i in range(11)])
            )
        )
        assert refusal.fields == ["sinks"]


async def test_a_connection_is_for_those_tenants_that_it_names(run: Serving) -> None:
    other = '[connections.other]\ntype = "scripted"\ntenants = ["acme"]\n'
    async with run(sinks=other) as server:
        refusal = await rpc.refusal(
            server.stub.CreateExport(rpc.request("gated", sinks=[to("a", "other")]))
        )
        assert refusal.fields == ["sinks[0].plugin.connection"]
        assert "acme" not in refusal.message


async def test_validate_only_sees_whether_the_sinks_can_be_reached(
    run: Serving, scripted: ScriptedSink, tmp_path: Path
) -> None:
    async with run() as server:
        check = rpc.request("gated", sinks=[to("a"), to_file()], validate_only=True)
        assert (await server.stub.CreateExport(check)).job.state
        assert not list((tmp_path / "reports").iterdir()), "without a trace"
        scripted.unreachable = True
        refusal = await rpc.refusal(server.stub.CreateExport(check))
        assert refusal.fields == ["sinks[0].plugin"]
        assert "not there" in refusal.message


async def test_secrets_of_a_request_are_kept_encrypted_and_never_given_back(
    run: Serving, scripted: ScriptedSink, tmp_path: Path
) -> None:
    secret = "canary-5f2c9d1e"
    async with run() as server:
        job = await create(server, to("a", takes="whole", token=secret))
        done = await settled(server, job.job_id)
        assert scripted.tokens == [secret]
        assert secret not in str(job)
        assert secret not in str(done)
        assert secret not in str(await deliveries(server, job_id=job.job_id))
    for file in (tmp_path / "data").rglob("*"):
        if file.is_file():
            assert secret.encode() not in file.read_bytes(), file


async def test_what_is_asked_about_deliveries_is_checked(run: Serving) -> None:
    async with run() as server:
        refusal = await rpc.refusal(
            server.stub.RedriveDeliveries(pb.RedriveDeliveriesRequest())
        )
        assert refusal.fields == ["job_id"]
        nobody = "01890000-0000-7000-8000-000000000000"
        refusal = await rpc.refusal(
            server.stub.RedriveDeliveries(pb.RedriveDeliveriesRequest(delivery_id=nobody))
        )
        assert refusal.reason == "DELIVERY_NOT_FOUND"
        refusal = await rpc.refusal(
            server.stub.RedriveDeliveries(pb.RedriveDeliveriesRequest(job_id=nobody))
        )
        assert refusal.reason == "JOB_NOT_FOUND"
        refusal = await rpc.refusal(
            server.stub.ListDeliveries(pb.ListDeliveriesRequest(sink="a"))
        )
        assert refusal.fields == ["sink"]
        refusal = await rpc.refusal(
            server.stub.EnableSinkQueue(pb.EnableSinkQueueRequest(queue="none"))
        )
        assert refusal.reason == "SINK_QUEUE_NOT_FOUND"


# --- what operators see


async def test_metrics_of_every_sink_are_there_from_the_start_and_count(
    run: Serving, scripted: ScriptedSink
) -> None:
    def value(name: str, **labels: str) -> float:
        found = metrics.REGISTRY.get_sample_value(name, labels)
        assert found is not None, (name, labels)
        return found

    more = '[connections.counted]\ntype = "scripted"\nmax_attempts = 2\n'
    scripted.behaviour["a"] = always(passing())
    async with run(sinks=more + "retry_base_seconds = 0.01\n") as server:
        sink = {"sink": "scripted", "connection": "counted"}
        for outcome in ("delivered", "retried", "dead_lettered", "given_back"):
            assert value("exportd_sink_deliveries_total", **sink, outcome=outcome) == 0
        assert value("exportd_sink_dropped_total", **sink) == 0
        assert value("exportd_sink_queue_depth", **sink, state="waiting") == 0
        job = await create(server, to("a", connection="counted", takes="whole"))
        await settled(server, job.job_id)
    # An attempt is counted once the ledger has it, so a reader of the ledger may be ahead
    # of the count; a server that has stopped has counted all it did.
    assert value("exportd_sink_deliveries_total", **sink, outcome="retried") == 1
    assert value("exportd_sink_deliveries_total", **sink, outcome="dead_lettered") == 1


async def test_metrics_are_served_and_every_retry_and_dead_letter_is_one_line(
    run: Serving, scripted: ScriptedSink, unused_tcp_port: int
) -> None:
    scripted.behaviour["a"] = always(passing())
    listen = {"listen": f"127.0.0.1:{unused_tcp_port}"}
    merge = structlog.contextvars.merge_contextvars
    with structlog.testing.capture_logs(processors=[merge]) as logged:
        async with run(metrics=listen) as server:
            job = await create(server, to("a", takes="whole"))
            await settled(server, job.job_id)

            def scrape() -> str:
                url = f"http://{listen['listen']}/metrics"
                with urllib.request.urlopen(url, timeout=10) as answer:
                    return str(answer.read().decode())

            text = await asyncio.to_thread(scrape)
    name = 'exportd_sink_deliveries_total{connection="",outcome="retried",sink="scripted"}'
    assert name in text
    lines = [line for line in logged if line.get("delivery_id")]
    events = [line["event"] for line in lines]
    assert events == ["delivery failed", "delivery failed", "delivery dead-lettered"]
    assert {line["sink"] for line in lines} == {"a"}
    assert {line["job_id"] for line in lines} == {job.job_id}


async def test_a_job_of_one_part_shows_how_far_it_is_while_a_queue_is_full(
    run: Serving, scripted: ScriptedSink
) -> None:
    """Its last part waits to be recorded along with its end, and its manifest to be
    stored."""
    go_on = scripted.hold("slow")
    slow = '[connections.slow]\ntype = "scripted"\nqueue_depth = 1\nconcurrency = 1\n'
    rows, batches = 40 * BATCH_ROWS, 40
    async with run(GateSource(batches, wide=True), sinks=slow) as server:
        where = to("slow", connection="slow")
        first = await create(server, where, max_part_rows=2 * rows)
        await rpc.finish(server.stub, first.job_id)
        second = await create(server, where, max_part_rows=2 * rows)

        now = second
        async with asyncio.timeout(ENOUGH):
            while now.progress.rows < rows:
                now = await rpc.get(server.stub, second.job_id)
        assert now.state == job_pb2.JOB_STATE_RUNNING
        kinds = {file.parent.name for file in server.files() if second.job_id in str(file)}
        assert kinds == {"output"}, "its manifest waits, too"
        go_on.set()
        done = await settled(server, second.job_id)
        assert done.progress.rows == rows


async def test_room_that_was_taken_while_a_manifest_was_stored_is_waited_for(
    run: Serving, scripted: ScriptedSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = scripted.hold("slow")
    slow = '[connections.slow]\ntype = "scripted"\nqueue_depth = 1\nconcurrency = 1\n'
    go_on, begun = threading.Event(), threading.Event()

    def slowly(*arguments: Any) -> None:
        first = not begun.is_set()
        begun.set()
        assert not first or go_on.wait(ENOUGH)
        store_manifest(*arguments)

    monkeypatch.setattr("exportd_server.jobs.exporting.store_manifest", slowly)
    async with run(GateSource(4, wide=True), sinks=slow) as server:
        where = to("slow", connection="slow")
        late = await create(server, where, max_part_rows=10**6)
        assert await asyncio.to_thread(begun.wait, ENOUGH)
        quick = await create(server, where, max_part_rows=10**6)
        await rpc.finish(server.stub, quick.job_id)
        looks = asyncio.Event()
        has_room = SqlLedger.has_room

        async def looking(ledger: SqlLedger, lease: Lease) -> bool:
            room = await has_room(ledger, lease)
            looks.set()
            return room

        monkeypatch.setattr(SqlLedger, "has_room", looking)
        go_on.set()
        async with asyncio.timeout(ENOUGH):
            await looks.wait()
        state = (await rpc.get(server.stub, late.job_id)).state
        free.set()
        assert state == job_pb2.JOB_STATE_RUNNING, "it waits for room"
        await settled(server, late.job_id)
