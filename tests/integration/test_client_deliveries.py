"""The client and its command line against a real server that delivers to sinks."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from standardwebhooks import Webhook
from structlog.testing import capture_logs

from exportd import (
    AsyncClient,
    Client,
    DeliveryState,
    DeliveryStatus,
    Job,
    JobInfo,
    JobState,
    Sink,
    to_file,
    to_plugin,
)
from exportd import errors as e
from exportd.cli.commands import run
from exportd_server.errors import DeliveryFailed
from exportd_server.sinks.base import Delivery
from exportd_server.sinks.registry import SinkTypes
from tests.support.gate import BATCH_ROWS, GateSource
from tests.support.receiver import Receiver
from tests.support.samples import catalogue_of
from tests.support.scripted_sink import ScriptedSink
from tests.support.server import Server, serve, settings
from tests.support.waits import ENOUGH

PARTS = 3
"""Parts of an export of the dataset `gated`, whose parts have a batch each."""

SECRET = "whsec_" + base64.b64encode(b"k" * 32).decode()
NOBODY = "01890000-0000-7000-8000-000000000000"

MOMENT = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ")

_T = TypeVar("_T")

Serving = Callable[..., AbstractAsyncContextManager[Server]]


@pytest.fixture
def scripted() -> ScriptedSink:
    return ScriptedSink()


@pytest.fixture
def run_server(tmp_path: Path, scripted: ScriptedSink) -> Serving:
    """Runs a server whose dataset `gated` has `PARTS` batches, with a connection
    `reports` to a directory, `warehouse` to a database, and those of `sinks`."""

    @asynccontextmanager
    async def run(
        source: GateSource | None = None, sinks: str = "", **values: Any
    ) -> AsyncIterator[Server]:
        directory = tmp_path / "reports"
        directory.mkdir(exist_ok=True)
        sqlite3.connect(tmp_path / "warehouse.db").close()
        file = tmp_path / "sinks.toml"
        file.write_text(
            f'[connections.reports]\ntype = "local_file"\nroot = "{directory}"\n'
            '[connections.warehouse]\ntype = "database"\n'
            f'url = "sqlite:///{tmp_path / "warehouse.db"}"\n{sinks}'
        )
        async with serve(
            settings(tmp_path / "data", sinks=file, drain_timeout=2.0, **values),
            catalogue_of(gated=source or GateSource(PARTS, wide=True)),
            SinkTypes.installed().with_type(scripted),
        ) as server:
            yield server

    return run


def to(label: str, connection: str = "", **config: Any) -> Sink:
    """The scripted sink."""
    return to_plugin("scripted", connection, name=label, label=label, **config)


def always(error: DeliveryFailed) -> Callable[[Delivery], DeliveryFailed]:
    return lambda _delivery: error


REFUSED = always(DeliveryFailed("not this", retryable=False))
GONE = always(DeliveryFailed("nobody lives here", retryable=False, gone=True))


async def blocking(server: Server, work: Callable[[Client], _T]) -> _T:
    """Have a blocking client do this, beside the server's event loop."""

    def connected() -> _T:
        with Client(server.address) as client:
            return work(client)

    return await asyncio.to_thread(connected)


def export(client: Client, *sinks: Sink, **options: Any) -> Job:
    return client.export(
        "gated", format="csv", max_part_rows=BATCH_ROWS, sinks=sinks, **options
    )


# --- the library


async def test_an_export_is_delivered_to_its_sinks_and_every_delivery_is_told(
    run_server: Serving, tmp_path: Path
) -> None:
    def work(client: Client) -> None:
        job = export(client, to_file("reports", "daily/"), to("other"))
        assert job.wait(until_delivered=True) is job
        assert job.delivery_status is DeliveryStatus.DELIVERED
        assert job.info.delivered_to == ("local_file", "other")
        file, other = job.info.deliveries
        assert (file.sink, file.status) == ("local_file", DeliveryStatus.DELIVERED)
        assert (file.delivered, file.pending, file.attempts) == (PARTS + 1, 0, PARTS + 1)
        assert (other.receipt, other.last_error, other.lacks) == ("got other", None, "")
        folder = tmp_path / "reports" / "daily"
        found = list(client.deliveries(job_id=job.id, page_size=3))
        assert len({each.id for each in found}) == 2 * (PARTS + 1)
        assert {each.state for each in found} == {DeliveryState.DELIVERED}
        arrived = {each.file_name for each in job.deliveries(sink="local_file")}
        manifest = {each.name for each in folder.glob("*.manifest.json")}
        assert arrived - {""} == {each.name for each in folder.iterdir()} - manifest
        one = next(each for each in found if not each.file_name)
        assert (one.job_id, one.attempts, one.last_error) == (job.id, 1, None)
        assert one.finish_time is not None
        assert one.next_attempt_time is None

    async with run_server() as server:
        await blocking(server, work)


async def test_waiting_for_a_delivery_that_fails_tells_which_sink_lacks_what(
    run_server: Serving, scripted: ScriptedSink
) -> None:
    scripted.behaviour["bad-one"] = REFUSED

    def work(client: Client) -> None:
        job = export(client, to("bad-one"), to("good"))
        with pytest.raises(e.NotDelivered) as caught:
            job.wait(until_delivered=True)
        assert job.state is JobState.SUCCEEDED
        assert job.delivery_status is DeliveryStatus.FAILED
        (lacking,) = caught.value.violations
        assert lacking.subject == "bad-one"
        assert lacking.description.startswith(f"{PARTS + 1} failed: ")
        assert "not all of it was delivered (bad-one: 4 failed" in str(caught.value)
        assert caught.value.metadata == {"job_id": job.id}
        # Without asking for the deliveries nothing is wrong.
        job.wait()
        dead = list(client.deliveries(job_id=job.id, states=["DEAD_LETTERED"]))
        assert {each.sink for each in dead} == {"bad-one"}
        part = next(each for each in dead if each.file_name)
        assert isinstance(part.last_error, e.DeliveryFailed)
        assert part.last_error.reason == "DELIVERY_REFUSED"
        assert part.last_error.message == "not this"
        scripted.behaviour.clear()
        assert client.redrive(delivery_id=part.id) == 1
        assert job.redrive(sink="bad-one") >= PARTS - 1
        assert job.wait(until_delivered=True).delivery_status == "DELIVERED"
        assert job.redrive() == 0

    async with run_server() as server:
        await blocking(server, work)


async def test_a_watch_until_delivered_goes_on_after_the_end_of_the_job(
    run_server: Serving, scripted: ScriptedSink
) -> None:
    free = scripted.hold("slow")
    loop = asyncio.get_running_loop()

    def work(client: Client) -> None:
        job = export(client, to("slow", takes="whole"))
        job.wait()
        with pytest.raises(e.TimedOut, match="it goes on"):
            job.wait(until_delivered=True, timeout=0.3)
        with pytest.raises(e.NotDelivered, match="still being delivered"):
            job.info.raise_unless_delivered()
        seen: list[JobInfo] = []
        for info in job.watch(until_delivered=True):
            seen.append(info)
            loop.call_soon_threadsafe(free.set)
        assert (seen[0].state, seen[0].settled) == (JobState.SUCCEEDED, False)
        assert seen[-1].settled
        assert seen[-1].delivery_status is DeliveryStatus.DELIVERED

    async with run_server() as server:
        await blocking(server, work)


async def test_what_a_full_queue_dropped_is_not_delivered(
    run_server: Serving, scripted: ScriptedSink
) -> None:
    free = scripted.hold("slow")
    slow = (
        '[connections.slow]\ntype = "scripted"\nqueue_depth = 1\nconcurrency = 1\n'
        'on_full = "DROP"\n'
    )
    loop = asyncio.get_running_loop()

    def work(client: Client) -> None:
        job = export(client, to("slow", "slow")).wait()
        loop.call_soon_threadsafe(free.set)
        with pytest.raises(e.NotDelivered, match=f"slow: {PARTS - 1} dropped"):
            job.wait(until_delivered=True)
        assert job.delivery_status is DeliveryStatus.DROPPED
        assert job.redrive() == PARTS - 1

    async with run_server(sinks=slow) as server:
        await blocking(server, work)


async def test_a_disabled_endpoint_is_told_enabled_and_delivered_to_again(
    run_server: Serving, scripted: ScriptedSink
) -> None:
    scripted.behaviour["a"] = GONE

    def work(client: Client) -> None:
        job = export(client, to("a", endpoint="https://x"))
        with pytest.raises(e.NotDelivered):
            job.wait(until_delivered=True)
        (queue,) = client.sink_queues()
        assert queue.dead_lettered == PARTS + 1
        assert queue.disabled_time is not None
        assert queue.disabled_reason is not None
        assert queue.disabled_reason.reason == "ENDPOINT_GONE"
        with pytest.raises(e.EndpointDisabled) as caught:
            export(client, to("a", endpoint="https://x"))
        assert caught.value.metadata == {"queue": queue.queue}
        scripted.behaviour.clear()
        enabled = client.enable_sink_queue(queue.queue)
        assert (enabled.queue, enabled.disabled_time) == (queue.queue, None)
        assert client.redrive(queue=queue.queue) >= PARTS
        job.wait(until_delivered=True)
        assert list(client.deliveries(queue=queue.queue, states=["DEAD_LETTERED"])) == []
        with pytest.raises(e.SinkQueueNotFound):
            client.enable_sink_queue("none")
        with pytest.raises(e.DeliveryNotFound):
            client.redrive(delivery_id=NOBODY)
        with pytest.raises(e.InvalidRequest):
            client.redrive()

    async with run_server() as server:
        await blocking(server, work)


async def test_queues_are_listed_page_by_page(run_server: Serving) -> None:
    def work(client: Client) -> None:
        sinks = [to(f"s{number}", endpoint=f"e{number}") for number in range(3)]
        export(client, *sinks).wait(until_delivered=True)
        names = [queue.queue for queue in client.sink_queues(page_size=1)]
        assert names == [f"scripted/default/e{number}" for number in range(3)]

    async with run_server() as server:
        await blocking(server, work)


async def test_output_that_was_dropped_once_delivered_is_an_error_of_its_own(
    run_server: Serving, tmp_path: Path
) -> None:
    def work(client: Client) -> None:
        job = export(client, to_file("reports"), drop_after_delivery=True)
        job.wait(until_delivered=True)
        assert job.info.drop_time is not None
        assert job.wait().manifest is not None
        with pytest.raises(e.OutputDropped):
            job.download(tmp_path / "out.csv")

    async with run_server() as server:
        await blocking(server, work)


async def test_a_job_without_sinks_has_nothing_of_deliveries(run_server: Serving) -> None:
    def work(client: Client) -> None:
        job = export(client).wait(until_delivered=True)
        assert job.delivery_status is None
        assert (job.info.delivered_to, job.info.deliveries) == ((), ())
        assert list(job.deliveries()) == []

    async with run_server() as server:
        await blocking(server, work)


async def test_a_failed_export_is_no_delivery_that_failed(run_server: Serving) -> None:
    source = GateSource(PARTS)

    def work(client: Client) -> None:
        job = export(client, to_file("reports"))
        source.fail()
        with pytest.raises(e.JobFailed):
            job.wait(until_delivered=True)
        assert job.delivery_status is DeliveryStatus.FAILED

    async with run_server(source, worker={"max_attempts": 1}) as server:
        await blocking(server, work)


async def test_the_asyncio_client_has_the_same_shape(
    run_server: Serving, scripted: ScriptedSink
) -> None:
    scripted.behaviour["a"] = GONE
    async with run_server() as server, AsyncClient(server.address) as client:
        job = await client.export(
            "gated",
            format="csv",
            max_part_rows=BATCH_ROWS,
            sinks=[to("a", endpoint="x"), to_file("reports").proto],
        )
        with pytest.raises(e.NotDelivered, match="a: 4 failed"):
            await job.wait(until_delivered=True)
        dead = [
            each
            async for each in client.deliveries(
                job_id=job.id, states=[DeliveryState.DEAD_LETTERED], page_size=2
            )
        ]
        assert len(dead) == PARTS + 1
        queues = [queue async for queue in client.sink_queues(page_size=1)]
        (disabled,) = (each for each in queues if each.disabled_time)
        scripted.behaviour.clear()
        assert not (await client.enable_sink_queue(disabled.queue)).disabled_time
        assert await job.redrive(sink="a") >= PARTS
        states = [info.settled async for info in job.watch(until_delivered=True)]
        assert states[-1]
        await job.wait(until_delivered=True)
        assert job.info.delivered_to == ("a", "local_file")
        assert len([each async for each in job.deliveries(sink="a")]) == PARTS + 1
        assert await client.redrive(queue=disabled.queue) == 0


# --- the command line


class Result:
    """What a run of the command line gave."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err

    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]

    def rows(self) -> list[list[str]]:
        """The cells of a table, its header among them."""
        return [re.split(r" {2,}", line) for line in self.out.splitlines()]


Exportd = Callable[..., Awaitable[Result]]


@pytest.fixture
def exportd(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Exportd:
    """Runs the command line against a server, in a thread beside the server's loop."""
    monkeypatch.delenv("EXPORTD_WEBHOOK_SECRET", raising=False)

    async def call(server: Server, *arguments: str) -> Result:
        capsys.readouterr()
        # The server logs to the stdout of this process, where answers are looked for.
        with capture_logs():
            code = await asyncio.to_thread(run, ["--server", server.address, *arguments])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


CREATE = ("create", "gated", "-f", "csv", "--part-rows", str(BATCH_ROWS))


def plugin(label: str, **config: Any) -> str:
    """The scripted sink as it is typed."""
    return f"plugin:scripted?{json.dumps({'label': label, **config})}"


async def test_create_delivers_and_says_how_it_stands(
    run_server: Serving, exportd: Exportd, tmp_path: Path
) -> None:
    async with run_server() as server:
        created = await exportd(
            server,
            *CREATE,
            *("--to", "file:reports/daily", "--to", "db:warehouse/rows"),
            *("--db-mode", "replace", "--db-create-table"),
            *("--to", plugin("a"), "--until-delivered"),
        )
        assert created.code == 0, created.err
        job_id = created.out.strip()
        assert len(list((tmp_path / "reports" / "daily").glob("*.csv"))) == PARTS
        got = await exportd(server, "get", job_id)
        assert re.search(r"^delivery +DELIVERED$", got.out, re.MULTILINE)
        table = {row[0]: row for row in got.rows()}
        assert table["SINK"][:4] == ["SINK", "STATUS", "DELIVERED", "PENDING"]
        assert table["local_file"][1:4] == ["DELIVERED", str(PARTS + 1), "0"]
        assert table["database"][1:4] == ["DELIVERED", "1", "0"]
        assert table["scripted"][-1] == "got a"
        watched = await exportd(server, "watch", job_id, "--until-delivered")
        assert watched.code == 0
        assert f"{2 * (PARTS + 1) + 1} delivered" in watched.err
        assert "DELIVERED" in watched.out
        plain = await exportd(server, *CREATE, "--wait")
        without = await exportd(server, "get", plain.out.strip())
        assert "deliver" not in without.out.lower()


async def test_deliveries_that_failed_have_an_exit_code_a_table_and_a_way_on(
    run_server: Serving, exportd: Exportd, scripted: ScriptedSink
) -> None:
    scripted.behaviour["a"] = REFUSED
    sinks = ("--to", plugin("a"), "--to", plugin("b"))
    async with run_server() as server:
        created = await exportd(server, *CREATE, *sinks, "--until-delivered")
        job_id = created.out.strip()
        assert created.code == 9
        error = created.err.splitlines()[-1]
        assert error.startswith(f"error: job {job_id} succeeded, but not all of it was")
        assert f"'exportd redrive {job_id}' sends them again" in error

        watched = await exportd(server, "watch", job_id, "--until-delivered")
        assert watched.code == 9
        assert re.search(
            rf"^scripted +FAILED +0 +0 +0 +{PARTS + 1} ", watched.out, re.MULTILINE
        )
        got = await exportd(server, "get", job_id)
        assert f"FAILED: exportd deliveries --job {job_id}\n" in got.out
        assert (await exportd(server, "watch", job_id)).code == 0
        as_json = await exportd(server, "watch", job_id, "--until-delivered", "--json")
        assert as_json.code == 9
        assert as_json.lines()[-1]["delivery_status"] == "DELIVERY_STATUS_FAILED"

        listed = await exportd(server, "deliveries", "--job", job_id)
        header, *rows = listed.rows()
        assert header[:4] == ["STATE", "SINK", "FILE", "ATTEMPTS"]
        assert len(rows) == 2 * (PARTS + 1)
        assert {row[2] for row in rows if "completion" in row[2]} == {"completion"}
        assert "not this [DELIVERY_REFUSED]" in listed.out
        assert "scripted-2" in listed.out
        everywhere = await exportd(server, "deliveries", "-n", "1")
        assert everywhere.rows()[0][0] == "JOB"
        assert everywhere.rows()[1][0] == job_id
        assert len(everywhere.rows()) == 2

        chosen = ("--job", job_id, "--sink", "scripted", "--state", "dead-lettered")
        dead = (await exportd(server, "deliveries", *chosen, "--json")).lines()
        assert len(dead) == PARTS + 1
        assert {each["state"] for each in dead} == {"DELIVERY_STATE_DEAD_LETTERED"}
        part = next(each for each in dead if each["file_name"])
        assert part["last_error"]["details"][0]["reason"] == "DELIVERY_REFUSED"

        scripted.behaviour.clear()
        one = await exportd(server, "redrive", "--delivery", part["delivery_id"])
        assert (one.code, one.out) == (0, "1 delivery is due again\n")
        await scripted.arrived("a", 1)
        rest = await exportd(server, "redrive", job_id, "--sink", "scripted", "--json")
        assert rest.lines() == [{"redriven": str(PARTS - 1)}]
        assert (await exportd(server, "watch", job_id, "--until-delivered")).code == 0
        none = await exportd(server, "redrive", job_id)
        assert none.out == "0 deliveries are due again\n"


async def test_a_delivery_that_waits_to_be_tried_again_says_when(
    run_server: Serving, exportd: Exportd, scripted: ScriptedSink
) -> None:
    scripted.behaviour["a"] = always(DeliveryFailed("try\nagain", retryable=True))
    later = '[connections.later]\ntype = "scripted"\nretry_base_seconds = 3600\n'
    sink = 'plugin:scripted:later?{"label": "a", "takes": "whole"}'
    async with run_server(sinks=later) as server:
        job_id = (await exportd(server, *CREATE, "--to", sink, "--wait")).out.strip()
        await scripted.was_tried("a", 1)

        async def waiting() -> list[str]:
            listed = await exportd(server, "deliveries", "--state", "pending")
            return listed.rows()[1]

        async with asyncio.timeout(ENOUGH):
            while not MOMENT.fullmatch((row := await waiting())[5]):
                await asyncio.sleep(0.02)
        assert row[:5] == [job_id, "PENDING", "scripted", "completion", "1"]
        assert row[-1] == "try again [DELIVERY_FAILED]"
        queues = await exportd(server, "queues")
        name, idle, retrying, dead, state = queues.rows()[1]
        assert (name, idle, retrying, dead) == ("scripted/later", "0", "1", "0")
        assert state.startswith("failing since 20")
        got = await exportd(server, "get", job_id)
        assert "try again [DELIVERY_FAILED]" in got.out


async def test_queues_are_listed_and_enabled(
    run_server: Serving, exportd: Exportd, scripted: ScriptedSink
) -> None:
    scripted.behaviour["a"] = GONE
    queue = "scripted/default/x y"
    sink = ("--to", plugin("a", endpoint="x y"))
    async with run_server() as server:
        assert (await exportd(server, "queues")).rows()[0][:2] == ["QUEUE", "WAITING"]
        assert (await exportd(server, *CREATE, *sink, "--until-delivered")).code == 9
        listed = await exportd(server, "queues")
        assert listed.rows()[1][0] == queue
        assert "disabled since 20" in listed.out
        assert "nobody lives here [ENDPOINT_GONE]" in listed.out
        (told,) = (await exportd(server, "queues", "--json")).lines()
        assert told["dead_lettered"] == str(PARTS + 1)
        refused = await exportd(server, *CREATE, *sink)
        assert refused.code == 7
        assert f"'exportd queues enable '{queue}''" in refused.err
        enabled = await exportd(server, "queues", "enable", queue)
        assert (enabled.code, enabled.out) == (0, f"{queue} is enabled\n")
        again = f"exportd redrive --queue '{queue}'"
        assert f"{PARTS + 1} deliveries failed before: '{again}' sends" in enabled.err
        scripted.behaviour.clear()
        redriven = await exportd(server, "redrive", "--queue", queue)
        assert re.fullmatch(r"\d deliveries are due again\n", redriven.out)
        await scripted.arrived("a", PARTS + 1)
        answer = await exportd(server, "queues", "--json", "enable", queue)
        assert answer.lines()[0]["queue"] == queue
        unknown = await exportd(server, "queues", "enable", "nope")
        assert unknown.code == 3
        assert "'exportd queues' names them" in unknown.err


async def test_a_failed_job_is_code_4_whatever_its_deliveries(
    run_server: Serving, exportd: Exportd
) -> None:
    source = GateSource(PARTS)
    async with run_server(source, worker={"max_attempts": 1}) as server:
        created = await exportd(server, *CREATE, "--to", "file:reports")
        source.fail()
        job_id = created.out.strip()
        assert (await exportd(server, "watch", job_id, "--until-delivered")).code == 4


async def test_a_download_and_its_deliveries_are_both_waited_for(
    run_server: Serving, exportd: Exportd, scripted: ScriptedSink, tmp_path: Path
) -> None:
    scripted.behaviour["a"] = REFUSED
    out = tmp_path / "out.csv"
    asked = ("--download", str(out), "--to", plugin("a"), "--until-delivered")
    async with run_server() as server:
        done = await exportd(server, *CREATE, *asked)
        assert (done.code, done.out) == (9, f"{out}\n")
        assert len(out.read_text().splitlines()) == PARTS * BATCH_ROWS + 1


async def test_dropped_output_is_code_3(
    run_server: Serving, exportd: Exportd, tmp_path: Path
) -> None:
    dropping = ("--to", "file:reports", "--drop-after-delivery")
    async with run_server() as server:
        done = await exportd(server, *CREATE, *dropping, "--until-delivered")
        job_id = done.out.strip()
        assert re.search(
            r"^dropped +20", (await exportd(server, "get", job_id)).out, re.MULTILINE
        )
        refused = await exportd(server, "download", job_id, str(tmp_path / "x.csv"))
        assert refused.code == 3
        assert "[OUTPUT_DROPPED]" in refused.err
        both = await exportd(server, *CREATE, *dropping, "--download", "x.csv")
        assert both.code == 2
        assert "--download does not go with --drop-after-delivery" in both.err


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (("--to", "file:none/x"), "--to file:none/x (connection): there is no connection"),
        (("--to", "file:reports/../x"), "--to file:reports/../x (path): is no path"),
        (
            ("--to", plugin("a"), "--to", "webhook:ftp://h/x"),
            "--to webhook:ftp://h/x (url): ",
        ),
        (
            ("--to", "webhook:https://example.com/in?key=canary"),
            "?... (EXPORTD_WEBHOOK_SECRET or --webhook-secret-file): is missing",
        ),
        (
            ("--to", "db:warehouse/rows", "--db-mode", "merge", "--key", "id"),
            "--to db:warehouse/rows (--db-mode): MERGE needs PostgreSQL",
        ),
        (
            ("--to", "db:warehouse/rows", "--key", "id"),
            "--to db:warehouse/rows (--key): APPEND has none",
        ),
        (
            ("--to", "db:warehouse/rows", "--validate-only"),
            "(table): there is no table 'rows'; set --db-create-table to have it made",
        ),
        (("--to", plugin("bad")), "--to plugin:scripted?... (label): must not be bad"),
        (
            ("--to", 'plugin:scripted?{"mode": 1}'),
            "--to plugin:scripted?... (mode): is not known",
        ),
        (("--to", "plugin:none"), "--to plugin:none (type): this server has no sink type"),
        (("--drop-after-delivery",), "--drop-after-delivery: needs sinks"),
        (("--to", "file:reports") * 11, "--to: at most 10 sinks, not 11"),
    ],
)
async def test_what_the_server_says_of_a_sink_names_what_was_typed(
    run_server: Serving, exportd: Exportd, typed: tuple[str, ...], says: str
) -> None:
    async with run_server() as server:
        refused = await exportd(server, *CREATE, *typed)
        assert (refused.code, refused.out) == (2, "")
        assert refused.err.startswith("error: --")
        assert says in refused.err
        assert "canary" not in refused.err
        assert "sinks[" not in refused.err
        assert len(refused.err.splitlines()) == 1


async def test_a_webhook_is_signed_by_the_secret_of_the_environment_or_of_a_file(
    run_server: Serving,
    exportd: Exportd,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    file = tmp_path / "secret"
    file.write_text(SECRET + "\n")
    async with Receiver().listen() as receiver:
        hook = (
            '[connections.hook]\ntype = "webhook"\nallow_http = true\n'
            f'allow_private = ["127.0.0.0/8"]\nurl = "{receiver.url}"\n'
        )
        async with run_server(sinks=hook) as server:
            asked = (*CREATE, "--to", "webhook:hook", "--until-delivered")
            parts = ("--webhook-mode", "push-parts", "--webhook-secret-file", str(file))
            assert (await exportd(server, *asked, *parts)).code == 0
            assert len(receiver.requests) == PARTS + 1
            monkeypatch.setenv("EXPORTD_WEBHOOK_SECRET", SECRET)
            created = await exportd(server, *asked)
            assert created.code == 0
            assert len(receiver.requests) == PARTS + 2
            got = await exportd(server, "get", created.out.strip(), "--json")
            assert SECRET not in got.out
    for request in (receiver.requests[PARTS], receiver.requests[PARTS + 1]):
        told = Webhook(SECRET).verify(request.body, request.webhook_headers())
        assert told["type"] == "export.completed"
