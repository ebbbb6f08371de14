"""What tenants share in one process is shared fairly: whoever takes all that it can get
leaves room for the next one."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import struct_pb2
from hypothesis import given
from hypothesis import strategies as st

from exportd.v1 import export_service_pb2 as pb
from exportd.v1 import job_pb2, sink_pb2
from exportd_server.platform.shares import Shares
from exportd_server.sinks.registry import SinkTypes
from tests.support import rpc
from tests.support.gate import BATCH_ROWS, GateSource
from tests.support.identity import api_key, bearer
from tests.support.samples import catalogue_of
from tests.support.scripted_sink import ScriptedSink
from tests.support.server import Server, serve, settings, until
from tests.support.waits import ENOUGH

TENANTS = ("acme", "globex", "initech")
PARTS = 6

# --- the rule


@given(
    size=st.integers(1, 80),
    wishes=st.lists(st.tuples(st.sampled_from("abcdefgh"), st.booleans()), max_size=200),
)
def test_places_are_never_more_than_there_are_nor_one_tenants_alone(
    size: int, wishes: list[tuple[str, bool]]
) -> None:
    shares, held = Shares(size), Counter[str]()
    for tenant, gives in wishes:
        if gives and held[tenant]:
            shares.give(tenant)
            held[tenant] -= 1
        elif held.total() < size and tenant not in shares.full():
            shares.take(tenant)
            held[tenant] += 1
            others = held.total() - held[tenant]
            assert held[tenant] <= (size - others + 1) // 2
        assert held.total() <= size


def test_one_tenant_takes_half_and_the_next_one_half_of_the_rest() -> None:
    shares, took = Shares(64), Counter[str]()
    for tenant in "abcdefgh":
        while took.total() < 64 and tenant not in shares.full():
            shares.take(tenant)
            took[tenant] += 1
    assert list(took.values()) == [32, 16, 8, 4, 2, 1, 1]


@pytest.mark.parametrize("size", [1, 2, 3])
async def test_few_places_go_to_whoever_comes(size: int) -> None:
    shares = Shares(size)
    async with asyncio.timeout(ENOUGH):
        for _ in range(5):
            await shares.wait("a")
            shares.give("a")


async def test_who_waits_gets_a_place_that_is_given_back() -> None:
    shares = Shares(4)
    for _ in range(2):
        await shares.wait("a")
    waiting = asyncio.create_task(shares.wait("a"))
    async with asyncio.timeout(ENOUGH):
        await shares.wait("b")
    assert not waiting.done()
    shares.give("b")
    await asyncio.sleep(0.05)
    assert not waiting.done(), "it has half of them"
    shares.give("a")
    async with asyncio.timeout(ENOUGH):
        await waiting


# --- in the service


class Slow(GateSource):
    """A source that says how many rows it has when it is let to; `asked` are at it."""

    def __init__(self) -> None:
        super().__init__(PARTS, wide=True)
        self.speak = threading.Event()
        self.asked = 0

    def count(self) -> int | None:
        self.asked += 1
        self.speak.wait()
        return super().count()


Serving = Callable[..., AbstractAsyncContextManager[tuple[Server, dict[str, str]]]]


@pytest.fixture
def scripted() -> ScriptedSink:
    return ScriptedSink()


@pytest.fixture
def run(tmp_path: Path, scripted: ScriptedSink) -> Serving:
    """Runs a server with a key for each tenant, whose datasets are `slow`, that does not
    say how many rows it has, and `rows`."""

    @asynccontextmanager
    async def run(
        slow: Slow | None = None, sinks: str = "", **values: Any
    ) -> AsyncIterator[tuple[Server, dict[str, str]]]:
        data, slow = tmp_path / "data", slow or Slow()
        keys = {tenant: (await api_key(data, tenant))[0] for tenant in TENANTS}
        file = tmp_path / "sinks.toml"
        file.write_text(sinks)
        options = settings(
            data, sinks=file, identity={"api_keys": True}, drain_timeout=0.5, **values
        )
        catalogue = catalogue_of(slow=slow, rows=GateSource(PARTS, wide=True))
        types = SinkTypes.installed().with_type(scripted)
        try:
            async with serve(options, catalogue, types) as server:
                yield server, keys
        finally:
            slow.speak.set()

    return run


def to(label: str, *, connection: str = "", **config: Any) -> sink_pb2.Sink:
    message = struct_pb2.Struct()
    message.update({"label": label, **config})
    plugin = sink_pb2.PluginSink(type="scripted", connection=connection, config=message)
    return sink_pb2.Sink(name=label, plugin=plugin)


async def create(server: Server, key: str, *sinks: sink_pb2.Sink) -> str:
    request = rpc.request("rows", sinks=sinks, max_part_rows=BATCH_ROWS)
    created = await server.stub.CreateExport(request, metadata=bearer(key))
    return str(created.job.job_id)


async def ended(
    server: Server, key: str, job_id: str, *, delivered: bool = False
) -> job_pb2.Job:
    watch = pb.WatchJobRequest(job_id=job_id, until_delivered=delivered)
    job = job_pb2.Job()
    async with asyncio.timeout(ENOUGH):
        async for answer in server.stub.WatchJob(watch, metadata=bearer(key)):
            job = answer.job
    return job


async def test_slow_questions_of_one_tenant_do_not_keep_anothers_from_being_asked(
    run: Serving,
) -> None:
    slow = Slow()
    async with run(slow) as (server, keys):

        def ask(tenant: str, dataset: str) -> asyncio.Task[Any]:
            call = server.stub.GetDataset(
                pb.GetDatasetRequest(name=dataset), metadata=bearer(keys[tenant])
            )
            return asyncio.ensure_future(call)

        acme = [ask("acme", "slow") for _ in range(30)]
        await until(lambda: slow.asked == 8)
        globex = [ask("globex", "slow") for _ in range(30)]
        await until(lambda: slow.asked == 12)
        async with asyncio.timeout(ENOUGH):
            answer = await ask("initech", "rows")
        assert answer.dataset.estimated_rows
        assert slow.asked == 12
        slow.speak.set()
        async with asyncio.timeout(ENOUGH):
            await asyncio.gather(*acme, *globex)


async def test_hanging_endpoints_of_one_tenant_do_not_delay_anothers_deliveries(
    run: Serving, scripted: ScriptedSink
) -> None:
    free = scripted.hold("hangs")
    # Four of each endpoint at a time would be all sixteen, and more are due.
    async with run(delivery={"concurrency": 16}) as (server, keys):
        mine = keys["acme"]
        for number in range(5):
            await create(server, mine, to("hangs", endpoint=f"e{number}"))
        await scripted.was_tried("hangs", 8)
        for tenant in ("globex", "initech"):
            job_id = await create(server, keys[tenant], to(tenant, endpoint="e"))
            job = await ended(server, keys[tenant], job_id, delivered=True)
            assert job.delivery_status == sink_pb2.DELIVERY_STATUS_DELIVERED
        assert len(scripted.tried["hangs"]) == 8, "half of them"
        free.set()
        await scripted.arrived("hangs", 5 * (PARTS + 1))


SHARED = (
    '[connections.slow]\ntype = "scripted"\ntenants = "*"\nshared = true\n'
    "queue_depth = 2\nconcurrency = 1\n"
)


async def test_one_tenants_backlog_in_a_shared_queue_does_not_hold_anothers_export(
    run: Serving, scripted: ScriptedSink
) -> None:
    free = scripted.hold("first")
    deep = SHARED.replace("queue_depth = 2", f"queue_depth = {PARTS}")
    async with run(sinks=deep, worker={"concurrency": 4}) as (server, keys):
        theirs = [
            await create(server, keys["acme"], to("first", connection="slow"))
            for _ in range(2)
        ]
        await scripted.was_tried("first", 1)
        job_id = await create(server, keys["globex"], to("second", connection="slow"))
        job = await ended(server, keys["globex"], job_id)
        assert job.state == job_pb2.JOB_STATE_SUCCEEDED
        assert not scripted.got
        free.set()
        await ended(server, keys["globex"], job_id, delivered=True)
        for each in theirs:
            done = await ended(server, keys["acme"], each, delivered=True)
            assert done.delivery_status == sink_pb2.DELIVERY_STATUS_DELIVERED


async def test_an_export_waits_for_a_full_queue_for_a_while_and_then_goes_on_without(
    run: Serving, scripted: ScriptedSink
) -> None:
    free = scripted.hold("stuck")
    delivery = {"block_timeout": 0.3}
    async with run(sinks=SHARED, delivery=delivery) as (server, keys):
        key = keys["acme"]
        job_id = await create(
            server, key, to("stuck", connection="slow"), to("other", endpoint="e")
        )
        job = await ended(server, key, job_id)
        assert job.state == job_pb2.JOB_STATE_SUCCEEDED, "the job does not suffer"
        stuck = next(each for each in job.deliveries if each.sink == "stuck")
        assert stuck.dropped == PARTS - 2
        await scripted.arrived("other", PARTS + 1)
        free.set()
        job = await ended(server, key, job_id, delivered=True)
        assert job.delivery_status == sink_pb2.DELIVERY_STATUS_DROPPED
        redrive = pb.RedriveDeliveriesRequest(job_id=job_id)
        answer = await server.stub.RedriveDeliveries(redrive, metadata=bearer(key))
        assert answer.redriven == PARTS - 2
        job = await ended(server, key, job_id, delivered=True)
        assert job.delivery_status == sink_pb2.DELIVERY_STATUS_DELIVERED


async def test_the_time_of_a_job_goes_on_while_it_waits_for_a_full_queue(
    run: Serving, scripted: ScriptedSink
) -> None:
    scripted.hold("stuck")
    async with run(sinks=SHARED, limits={"max_seconds": 1}) as (server, keys):
        job_id = await create(server, keys["acme"], to("stuck", connection="slow"))
        job = await ended(server, keys["acme"], job_id)
        assert job.state == job_pb2.JOB_STATE_FAILED
        assert "EXPORT_TOO_LARGE" in job.error.message
