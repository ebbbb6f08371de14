"""One trace from the caller's CreateExport to each sink, whichever processes work on it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import polars as pl
import pytest
from opentelemetry import trace as otel

import exportd
from exportd.v1 import dataset_pb2, export_service_pb2_grpc, job_pb2, sink_pb2
from exportd.v1 import export_service_pb2 as pb
from exportd_server.operations.check import check
from tests.support import rpc
from tests.support.gate import GateSource
from tests.support.processes import Member, Processes, processes
from tests.support.receiver import Receiver, reply
from tests.support.samples import catalogue_of
from tests.support.server import ROOT, serve, server_process, settings, until
from tests.support.traces import (
    CALLER,
    TRACE,
    TRACEPARENT,
    Seen,
    TraceReceiver,
    trace_receiver,
)
from tests.support.waits import ENOUGH

ROWS = 100_000
GROUP = 10_000
CANARY = 73_519
"""A value in a filter, which is nobody's business."""
CREATE = "exportd.v1.ExportService/CreateExport"


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalogue with one dataset, large enough to be cut."""
    directory = tmp_path_factory.mktemp("numbers")
    pl.DataFrame({"n": range(ROWS)}).with_columns(
        text=pl.col("n").cast(pl.String).repeat_by(4).list.join("-")
    ).write_parquet(directory / "numbers.parquet", row_group_size=GROUP)
    catalogue = directory / "datasets.toml"
    catalogue.write_text('[datasets.numbers]\nparquet = "numbers.parquet"\n')
    return catalogue


@pytest.fixture
def traces() -> Iterator[TraceReceiver]:
    with trace_receiver() as receiver:
        yield receiver


@pytest.fixture
def fleet(postgres_url: str, tmp_path: Path, numbers: Path) -> Iterator[Processes]:
    with processes(postgres_url, tmp_path, numbers) as fleet:
        yield fleet


def traced_to(endpoint: str) -> dict[str, Any]:
    """Settings of a server in this process."""
    return {"tracing": {"endpoint": endpoint}}


async def create(stub: Any, dataset: str = "numbers", **fields: Any) -> job_pb2.Job:
    """An export whose caller is in a trace."""
    answer = await stub.CreateExport(
        rpc.request(dataset, **fields), metadata=(("traceparent", TRACEPARENT),)
    )
    return answer.job  # type: ignore[no-any-return]


async def delivered(stub: Any, job_id: str) -> job_pb2.Job:
    job = job_pb2.Job()
    watch = pb.WatchJobRequest(job_id=job_id, until_delivered=True)
    async with asyncio.timeout(ENOUGH):
        async for response in stub.WatchJob(watch):
            job = response.job
    assert job.state == job_pb2.JOB_STATE_SUCCEEDED, job.error
    return job


def lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def resolved(traces: TraceReceiver) -> None:
    """Every parent is a span that was sent, or the caller's."""
    spans = traces.of_trace()
    known = {span.span for span in spans} | {CALLER}
    assert {span.parent for span in spans} <= known


@pytest.mark.minutes
async def test_one_trace_leads_from_the_call_through_all_processes_to_each_sink(
    fleet: Processes, traces: TraceReceiver, tmp_path: Path
) -> None:
    reports = tmp_path / "reports"
    reports.mkdir()
    fleet.environment["EXPORTD_TRACING__ENDPOINT"] = traces.endpoint
    fleet.environment["EXPORTD_TRACING__HEADERS"] = "authorization=Bearer%20secret"
    async with Receiver(reply()).listen() as receiver:
        fleet.environment["EXPORTD_SINKS"] = str(tmp_path / "sinks.toml")
        (tmp_path / "sinks.toml").write_text(
            f'[connections.reports]\ntype = "local_file"\nroot = "{reports}"\n'
            '[connections.hook]\ntype = "webhook"\nallow_http = true\n'
            f'allow_private = ["127.0.0.0/8"]\nurl = "{receiver.url}"\n'
            f'signing_keys = ["whsec_{"A" * 32}"]\n'
        )
        api, worker = fleet.api(), fleet.worker()
        async with fleet.calling(api) as stub:
            job = await create(
                stub,
                filters=[
                    job_pb2.Filter(
                        column="n",
                        operator=dataset_pb2.FILTER_OPERATOR_GREATER_OR_EQUAL,
                        values=[job_pb2.FilterValue(int_value=CANARY)],
                    )
                ],
                sinks=[
                    sink_pb2.Sink(local_file=sink_pb2.LocalFileSink(connection="reports")),
                    sink_pb2.Sink(webhook=sink_pb2.WebhookSink(connection="hook")),
                ],
            )
            await delivered(stub, job.job_id)
        # What waits to be sent is sent before they end.
        for member in (worker, api):
            assert await asyncio.to_thread(member.terminate) == 0
    spans = traces.of_trace()
    assert {"plan", "shard", "publish", "deliver", CREATE} <= {s.name for s in spans}
    assert {s.trace for s in traces.spans if "exportd.job_id" in s.attributes} == {TRACE}
    resolved(traces)
    assert {s.process for s in spans} == {api.process.pid, worker.process.pid}
    assert len({s.instance for s in spans}) == 2
    assert {s.service for s in spans} == {"exportd"}
    assert not [s for s in spans if s.error]

    (call,) = traces.named(CREATE)
    assert (call.parent, call.kind, call.process) == (CALLER, "SERVER", api.process.pid)
    assert call.attributes == {
        "rpc.system": "grpc",
        "rpc.service": "exportd.v1.ExportService",
        "rpc.method": "CreateExport",
        "rpc.grpc.status_code": 0,
        "exportd.job_id": job.job_id,
        "exportd.dataset": "numbers",
        "exportd.format": "CSV",
    }
    steps = [s for s in spans if s.name != CREATE]
    assert {s.parent for s in steps} == {call.span}
    assert {s.attributes["exportd.job_id"] for s in steps} == {job.job_id}
    assert {s.attributes["exportd.attempt"] for s in steps if s.name != "cleanup"} == {1}
    names = {each.sink for each in job.deliveries}
    assert len(names) == 2
    assert {s.attributes["exportd.sink"] for s in traces.named("deliver")} == names

    # The receiver may go on with the trace.
    (hook,) = (s for s in traces.named("deliver") if "hook" in s.attributes["exportd.sink"])
    (request,) = receiver.requests
    assert request.header("traceparent") == f"00-{TRACE}-{hook.span}-01"

    for member, event in ((api, "job created"), (worker, "job succeeded")):
        (line,) = (line for line in lines(member.log) if line["event"] == event)
        assert line["trace_id"] == TRACE
        assert line["span_id"] in {s.span for s in spans}
    told = [line for line in lines(worker.log) if line["event"] == "delivered"]
    assert {line["span_id"] for line in told} == {s.span for s in traces.named("deliver")}

    assert {each["authorization"] for each in traces.metadata} == {"Bearer secret"}
    assert str(CANARY).encode() not in traces.raw
    assert b"secret" not in traces.raw


@pytest.mark.minutes
async def test_who_takes_over_from_a_killed_process_goes_on_with_the_trace(
    fleet: Processes, traces: TraceReceiver
) -> None:
    fleet.environment |= {
        "EXPORTD_TRACING__ENDPOINT": traces.endpoint,
        # What a killed process had not sent is lost.
        "OTEL_BSP_SCHEDULE_DELAY": "50",
    }
    api = fleet.api()
    options = {
        "worker__shard_rows": GROUP,
        "worker__concurrency": 1,
        "worker__lease": 1,
    }
    first = fleet.worker(**options)
    async with fleet.calling(api) as stub:
        job = await create(stub, max_part_rows=1000)
        await until(lambda: traces.named("shard"), ENOUGH)
        await asyncio.to_thread(fleet.kill_a_holder)
        assert first.process.poll() is not None
        left = fleet.ledger(
            "SELECT shard FROM tasks WHERE kind = 'shard' AND state <> 'done'"
        )
        second = fleet.worker(**options)
        await delivered(stub, job.job_id)
    for member in (second, api):
        assert await asyncio.to_thread(member.terminate) == 0
    resolved(traces)
    one, other = (_of(traces, member) for member in (first, second))
    assert {"plan", "shard"} <= {s.name for s in one}
    taken = [s for s in other if s.attributes.get("exportd.takeover")]
    assert [(s.name, s.attributes["exportd.attempt"]) for s in taken] == [("shard", 2)]
    assert [s.process for s in traces.named("publish")] == [second.process.pid]
    # Of those that were done by then, the last may not have been told of any more.
    shards = [s.attributes["exportd.shard"] for s in other if s.name == "shard"]
    assert sorted(shards) == sorted(shard for (shard,) in left)
    (line,) = (e for e in lines(second.log) if e["event"] == "lease taken over")
    assert line["trace_id"] == TRACE


@pytest.mark.parametrize("receiver", ["hangs", "is down"])
@pytest.mark.minutes
async def test_a_receiver_that_takes_nothing_neither_fails_work_nor_holds_up_the_end(
    fleet: Processes, receiver: str
) -> None:
    with trace_receiver(hangs=True) as traces:
        down = "http://127.0.0.1:9"
        endpoint = traces.endpoint if receiver == "hangs" else down
        fleet.environment |= {
            "EXPORTD_TRACING__ENDPOINT": endpoint,
            "OTEL_BSP_SCHEDULE_DELAY": "50",
        }
        api, worker = fleet.api(), fleet.worker(worker__shard_rows=GROUP)
        async with fleet.calling(api) as stub:
            job = await create(stub)
            await delivered(stub, job.job_id)
            if receiver == "hangs":
                await asyncio.to_thread(traces.held.wait, ENOUGH)
            job = await create(stub)
            await delivered(stub, job.job_id)
        for member in (worker, api):
            assert await asyncio.to_thread(member.terminate) == 0
        assert traces.spans == []


OFF = """
import asyncio, sys
from pathlib import Path
from tests.support import rpc
from tests.support.gate import GateSource
from tests.support.samples import catalogue_of
from tests.support.server import serve, settings

async def main():
    catalogue = catalogue_of(gated=GateSource(1, wide=True))
    async with serve(settings(Path(sys.argv[1])), catalogue) as it:
        await rpc.export(it.stub, "gated")

asyncio.run(main())
print(sorted(name for name in sys.modules if name.startswith("opentelemetry")))
"""


def test_nothing_of_it_is_loaded_while_it_is_off(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OFF, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=ENOUGH,
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_without_the_extra_a_start_says_which_setting_needs_it_and_how_to_get_it(
    tmp_path: Path,
) -> None:
    missing = tmp_path / "missing/opentelemetry"
    missing.mkdir(parents=True)
    text = "raise ModuleNotFoundError(\"No module named 'opentelemetry'\")\n"
    (missing / "__init__.py").write_text(text)
    environment = {
        **os.environ,
        "PYTHONPATH": str(missing.parent),
        "EXPORTD_TRACING__ENDPOINT": "http://127.0.0.1:4317",
    }
    command = (sys.executable, "-m", "exportd_server")
    place = ("--data-dir", str(tmp_path / "data"))
    for name in ("serve", "check"):
        done = subprocess.run(
            [*command, name, *place, "--listen", "127.0.0.1:0"],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            cwd=ROOT,
            timeout=ENOUGH,
        )
        told = done.stderr.splitlines() if name == "serve" else done.stdout.splitlines()
        told = [line for line in told if "tracing" in line]
        assert done.returncode == (2 if name == "serve" else 1)
        assert len(told) == 1
        assert "tracing.endpoint: needs what the extra `tracing` brings" in told[0]
        assert "pip install 'exportd-server[tracing]'" in told[0]


@pytest.mark.parametrize(
    "metadata",
    [
        (("traceparent", f"00-{TRACE}-{'0' * 16}-01"),),
        (("traceparent", f"ff-{TRACE}-{CALLER}-01"),),
        (("traceparent", f"{TRACEPARENT}-more"),),
        (("traceparent", TRACEPARENT.upper()),),
        (("traceparent", "0" * 4000),),
    ],
)
async def test_a_traceparent_that_is_none_is_ignored(
    tmp_path: Path, traces: TraceReceiver, metadata: tuple[tuple[str, str], ...]
) -> None:
    source = catalogue_of(gated=GateSource(1, wide=True))
    async with serve(settings(tmp_path, **traced_to(traces.endpoint)), source) as server:
        await server.stub.CreateExport(rpc.request("gated"), metadata=metadata)
    (call,) = (span for span in traces.spans if span.name == CREATE)
    assert call.trace != TRACE
    assert call.parent == ""


async def test_a_tracestate_goes_on_to_a_webhook_unless_it_is_none(
    tmp_path: Path, traces: TraceReceiver
) -> None:
    async with Receiver(reply()).listen() as receiver:
        options = _with_hook(tmp_path, receiver.url, **traced_to(traces.endpoint))
        async with serve(options, catalogue_of(gated=GateSource(1, wide=True))) as server:
            for state in ("vendor=some thing,other=1", "vendor=1,vendor=2", "x" * 600):
                answer = await server.stub.CreateExport(
                    rpc.request("gated", sinks=[_hook()]),
                    metadata=(("traceparent", TRACEPARENT), ("tracestate", state)),
                )
                await delivered(server.stub, answer.job.job_id)
    states = [
        [value for key, value in request.headers if key.lower() == "tracestate"]
        for request in receiver.requests
    ]
    assert states == [["vendor=some thing,other=1"], [], []]
    parents = [request.header("traceparent") for request in receiver.requests]
    assert {parent.split("-")[1] for parent in parents} == {TRACE}


async def test_what_fails_is_an_error_by_its_reason_and_nothing_else_is_told(
    tmp_path: Path, traces: TraceReceiver
) -> None:
    async with Receiver(reply(410)).listen() as receiver:
        options = _with_hook(tmp_path, receiver.url, **traced_to(traces.endpoint))
        async with serve(
            options,
            catalogue_of(gated=GateSource(1, wide=True), broken=_Broken(1, wide=True)),
        ) as server:
            job = await create(server.stub, "gated", sinks=[_hook()])
            await delivered(server.stub, job.job_id)
            job = await create(server.stub, "broken")
            assert (await rpc.finish(server.stub, job.job_id)).state == (
                job_pb2.JOB_STATE_FAILED
            )
            await rpc.refusal(create(server.stub, "nowhere"))
    (delivery,) = traces.named("deliver")
    assert delivery.error == delivery.attributes["error.type"] == "ENDPOINT_GONE"
    (shard,) = (s for s in traces.named("shard") if s.error)
    assert shard.error == "ValueError"
    # A caller that is refused is no failure of the server's.
    refused = [s for s in traces.named(CREATE) if s.attributes["rpc.grpc.status_code"]]
    assert [(s.attributes["rpc.grpc.status_code"], s.error) for s in refused] == [(5, "")]
    assert b"canary" not in traces.raw


@pytest.mark.parametrize(
    ("flags", "recorded"), [("00", False), ("01", True), (None, False)]
)
async def test_whether_a_trace_is_recorded_is_the_callers_to_say_and_else_the_ratios(
    tmp_path: Path, traces: TraceReceiver, flags: str | None, recorded: bool
) -> None:
    tracing = {"tracing": {"endpoint": traces.endpoint, "sample_ratio": 0.0}}
    catalogue = catalogue_of(gated=GateSource(1, wide=True))
    async with serve(settings(tmp_path, **tracing), catalogue) as server:
        parent = TRACEPARENT[:-2] + (flags or "")
        answer = await server.stub.CreateExport(
            rpc.request("gated"),
            metadata=(("traceparent", parent),) if flags else (),
        )
        await delivered(server.stub, answer.job.job_id)
    names = {span.name for span in traces.spans}
    assert names == ({CREATE, "plan", "shard", "publish"} if recorded else set())


async def test_log_lines_tell_the_callers_trace_even_while_none_is_recorded(
    tmp_path: Path, numbers: Path
) -> None:
    with server_process(tmp_path, "--catalogue", str(numbers)) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = export_service_pb2_grpc.ExportServiceStub(channel)
            job = await create(stub, "numbers", limit=10)
            await delivered(stub, job.job_id)
            other = await rpc.create(stub, "numbers", limit=10)
            await delivered(stub, other.job_id)
    told = [line for line in lines(server.log) if line.get("job_id") == job.job_id]
    assert {line["event"] for line in told} >= {"job created", "job succeeded"}
    assert {(e["trace_id"], e["span_id"]) for e in told} == {(TRACE, CALLER)}
    rest = [line for line in lines(server.log) if line.get("job_id") == other.job_id]
    assert rest
    assert not [line for line in rest if "trace_id" in line]


@pytest.mark.parametrize("by", ["span", "metadata", "asyncio"])
async def test_the_python_client_passes_on_the_trace_that_its_program_is_in(
    tmp_path: Path, traces: TraceReceiver, by: str
) -> None:
    within = otel.NonRecordingSpan(
        otel.SpanContext(
            int(TRACE, 16), int(CALLER, 16), is_remote=False, trace_flags=otel.TraceFlags(1)
        )
    )

    def export(address: str) -> None:
        own = (lambda: [("traceparent", TRACEPARENT)]) if by == "metadata" else None
        with exportd.Client(address, metadata=own) as client:
            if own:
                client.export("gated", format="csv").wait().download(tmp_path / "a.csv")
            else:
                with otel.use_span(within):
                    client.export("gated", format="csv").wait().download(tmp_path / "a.csv")

    catalogue = catalogue_of(gated=GateSource(1, wide=True))
    options = settings(tmp_path / "data", **traced_to(traces.endpoint))
    async with serve(options, catalogue) as server:
        if by == "asyncio":
            async with exportd.AsyncClient(server.address) as client:
                with otel.use_span(within):
                    job = await client.export("gated", format="csv")
                    await job.wait()
                    await job.download(tmp_path / "a.csv")
        else:
            await asyncio.to_thread(export, server.address)
    calls = {s.attributes["rpc.method"] for s in traces.of_trace() if s.parent == CALLER}
    assert calls >= {"CreateExport", "WatchJob", "StreamDownload"}
    assert {s.trace for s in traces.spans} == {TRACE}


@pytest.mark.minutes
@pytest.mark.parametrize(
    ("there", "level", "told"),
    [
        ("takes", "ok", "takes traces"),
        ("nobody", "warning", "mend tracing.endpoint"),
        ("another", "warning", "takes no traces"),
    ],
)
async def test_a_check_says_whether_somebody_takes_traces(
    tmp_path: Path, traces: TraceReceiver, there: str, level: str, told: str
) -> None:
    async with Receiver(reply()).listen() as http:
        endpoints = {
            "takes": traces.endpoint,
            "nobody": "http://127.0.0.1:9",
            "another": f"http://127.0.0.1:{http.port}",
        }
        file = tmp_path / "server.toml"
        file.write_text(
            f'data_dir = "{tmp_path / "data"}"\nlisten = "127.0.0.1:0"\n'
            f'[tracing]\nendpoint = "{endpoints[there]}"\n'
            'headers = "authorization=canary"\n'
        )
        found = [each async for each in check(file, {}, seconds=ENOUGH)]
    (one,) = (each for each in found if each.area == "tracing")
    assert one.level == level, one
    assert told in one.text
    assert "canary" not in one.text
    assert traces.spans == []


class _Broken(GateSource):
    """Fails with words that nobody may read."""

    def open(self, *_arguments: Any, **_more: Any) -> Any:
        raise ValueError("canary")


def _hook() -> sink_pb2.Sink:
    return sink_pb2.Sink(webhook=sink_pb2.WebhookSink(connection="hook"))


def _with_hook(folder: Path, url: str, **values: Any) -> Any:
    sinks = folder / "sinks.toml"
    sinks.write_text(
        '[connections.hook]\ntype = "webhook"\nallow_http = true\n'
        f'allow_private = ["127.0.0.0/8"]\nurl = "{url}"\n'
        f'signing_keys = ["whsec_{"A" * 32}"]\n'
    )
    return settings(folder / "data", sinks=sinks, **values)


def _of(traces: TraceReceiver, member: Member) -> list[Seen]:
    """The spans of one process."""
    return [span for span in traces.of_trace() if span.process == member.process.pid]
