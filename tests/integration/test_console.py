"""The console as a browser without script sees it, over a real socket."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import struct_pb2

from exportd.v1 import export_service_pb2 as pb
from exportd.v1 import job_pb2, sink_pb2
from exportd_server.errors import ConfigurationError, DeliveryFailed
from exportd_server.identity.base import Scope
from exportd_server.identity.file import FileKeyStore
from exportd_server.platform.sealing import Sealer
from exportd_server.settings import load_settings
from exportd_server.sinks.registry import SinkTypes
from tests.support import rpc
from tests.support.gate import BATCH_ROWS, GateSource
from tests.support.identity import AUDIENCE, ISSUER, Issuer, api_key, bearer
from tests.support.samples import catalogue_of
from tests.support.scripted_sink import ScriptedSink
from tests.support.server import Server, serve, settings
from tests.support.visitor import Page, Visitor
from tests.support.waits import ENOUGH

KEY = "a-key-for-tests-and-nothing-else-"
NOWHERE = "01890a5d-ac96-774b-bcce-b302099a8057"
HOSTILE = "<img src=x onerror=alert(1)>\"'&<script>alert(2)</script>"
PAGES = (
    *("/jobs", "/live/jobs", "/deliveries", "/queues", "/workers", "/live/workers"),
    *("/datasets", "/datasets/held"),
)
CALLERS: Mapping[str, tuple[str, Scope]] = {
    "admin": ("acme", Scope.ADMIN),
    "writer": ("acme", Scope.WRITE),
    "reader": ("acme", Scope.READ),
    "stranger": ("other", Scope.ADMIN),
}


@dataclass
class World:
    """A server with a console. Without identity, `keys` are empty."""

    server: Server
    sink: ScriptedSink
    held: GateSource
    keys: dict[str, str]
    key_ids: dict[str, str]

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server.running.http_port}"

    def by(self, caller: str) -> Any:
        return bearer(self.keys[caller]) if self.keys else ()

    async def create(self, dataset: str, caller: str = "admin", **fields: Any) -> str:
        made = await self.server.stub.CreateExport(
            rpc.request(dataset, **fields), metadata=self.by(caller)
        )
        return str(made.job.job_id)

    async def settle(self, job_id: str, caller: str = "admin") -> job_pb2.Job:
        """Wait until the job and its deliveries have ended."""
        watch = pb.WatchJobRequest(job_id=job_id, until_delivered=True)
        job = job_pb2.Job()
        async with asyncio.timeout(ENOUGH):
            async for answer in self.server.stub.WatchJob(watch, metadata=self.by(caller)):
                job = answer.job
        return job

    async def running(self, job_id: str, caller: str = "admin") -> None:
        watch = pb.WatchJobRequest(job_id=job_id)
        async with asyncio.timeout(ENOUGH):
            async for answer in self.server.stub.WatchJob(watch, metadata=self.by(caller)):
                if answer.job.state == job_pb2.JOB_STATE_RUNNING:
                    return

    async def state(self, job_id: str, caller: str = "admin") -> str:
        answer = await self.server.stub.GetJob(
            pb.GetJobRequest(job_id=job_id), metadata=self.by(caller)
        )
        return job_pb2.JobState.Name(answer.job.state).removeprefix("JOB_STATE_")

    async def dead_letters(self, message: str = "not this", **more: Any) -> str:
        """A job whose deliveries to `scripted` are all dead letters."""
        error = DeliveryFailed(message, retryable=False, gone=more.pop("gone", False))
        self.sink.behaviour["a"] = lambda _delivery: error
        config = struct_pb2.Struct()
        config.update({"label": "a", "endpoint": more.pop("endpoint", "")})
        sink = sink_pb2.Sink(
            name="a", plugin=sink_pb2.PluginSink(type="scripted", config=config)
        )
        job_id = await self.create("wide", sinks=[sink], **more)
        await self.settle(job_id)
        return job_id

    async def records(self, count: int, **conditions: Any) -> list[Any]:
        """Wait until there are so many audit records; the oldest first."""
        request = pb.ListAuditRecordsRequest(page_size=1000, **conditions)
        async with asyncio.timeout(ENOUGH):
            while True:
                found = await self.server.stub.ListAuditRecords(
                    request, metadata=self.by("admin")
                )
                if len(found.records) >= count:
                    assert len(found.records) == count, found
                    return list(found.records)[::-1]
                await asyncio.sleep(0.02)


@asynccontextmanager
async def world(
    directory: Path, *, identity: bool = True, **values: Any
) -> AsyncIterator[World]:
    sink, held = ScriptedSink(), GateSource(4)
    http = {
        "listen": "127.0.0.1:0",
        "console": True,
        "signing_keys": [KEY],
        **values.pop("http", {}),
    }
    keys, ids = {}, {}
    if identity:
        for name, (tenant, scope) in CALLERS.items():
            keys[name], key = await api_key(directory, tenant, [scope])
            ids[name] = key.key_id
        # A writer reads, too.
        keys["writer"], key = await api_key(directory, "acme", [Scope.READ, Scope.WRITE])
        ids["writer"] = key.key_id
        values.setdefault("identity", {"api_keys": True})
    values.setdefault("drain_timeout", 2.0)
    catalogue = catalogue_of(
        **{
            "held": held,
            "wide": GateSource(2, wide=True),
            HOSTILE: GateSource(1, wide=True),
        }
    )
    async with serve(
        settings(directory, http=http, **values),
        catalogue,
        SinkTypes.installed().with_type(sink),
    ) as server:
        try:
            yield World(server, sink, held, keys, ids)
        finally:
            held.open_wide()


@asynccontextmanager
async def signed_in(world: World, caller: str) -> AsyncIterator[Visitor]:
    async with Visitor(world.base) as visitor:
        page = await visitor.sign_in(world.keys[caller])
        assert page.status == 200, page.text
        yield visitor


def rows(page: Page) -> int:
    return page.text.count('<tr role="row">') - page.text.count("<thead")


# --- pages


async def test_every_page_is_there_and_tells_browsers_to_keep_and_frame_nothing(
    tmp_path: Path,
) -> None:
    async with world(tmp_path, identity=False) as here, Visitor(here.base) as visitor:
        job_id = await here.create("wide")
        await here.settle(job_id)
        for path in (*PAGES, f"/jobs/{job_id}", f"/live/jobs/{job_id}", "/nowhere"):
            page = await visitor.get(path)
            assert page.status == (404 if path == "/nowhere" else 200), path
            headers = page.headers
            assert headers["Cache-Control"] == "no-store"
            assert headers["X-Frame-Options"] == "DENY"
            assert headers["Referrer-Policy"] == "no-referrer"
            assert headers["X-Content-Type-Options"] == "nosniff"
            policy = dict(
                each.strip().split(" ", 1)
                for each in headers["Content-Security-Policy"].split(";")
            )
            assert policy["default-src"] == "'none'"
            assert policy["script-src"] == policy["style-src"] == "'self'"
            assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
            assert "unsafe" not in headers["Content-Security-Policy"]
            assert "style" not in page.names
            assert not [name for name in page.names if name.startswith("on")]
            assert not re.search(r"<script(?! src=)", page.text)


async def test_the_root_leads_to_the_jobs_and_there_is_no_console_unless_it_is_wanted(
    tmp_path: Path,
) -> None:
    async with world(tmp_path / "a", identity=False) as here, Visitor(here.base) as visitor:
        for path in ("", "/"):
            page = await visitor.get(path)
            assert (page.url, page.title) == ("/console/jobs", "Jobs")
    off = {"console": False}
    async with (
        world(tmp_path / "b", identity=False, http=off) as here,
        Visitor(here.base) as visitor,
    ):
        for path in ("", "/jobs", "/static/x/console.css"):
            assert (await visitor.get(path)).status == 404


async def test_a_job_is_shown_with_its_parts_timeline_and_request(tmp_path: Path) -> None:
    async with world(tmp_path, identity=False) as here, Visitor(here.base) as visitor:
        job_id = await here.create(
            "wide", max_part_rows=BATCH_ROWS, labels={"team": "blue"}, limit=1500
        )
        job = await here.settle(job_id)
        await here.records(1, job_id=job_id)
        page = await visitor.get(f"/jobs/{job_id}")
        for part in job.manifest.parts:
            assert part.file_name in page.text
            assert part.sha256.hex() in page.text
        assert "1\u202f500" in page.text
        assert "team=blue" in page.text
        assert "CreateExport by anybody: succeeded" in page.text
        for word in ("created", "started", "succeeded", "output expires"):
            assert f"<span>{word}</span>" in page.text
        assert page.forms("cancel") == []
        live = await visitor.get(f"/live/jobs/{job_id}")
        assert live.headers["Exportd-Settled"] == "true"


async def test_a_running_job_loads_anew_by_itself_and_shows_the_parts_it_has(
    tmp_path: Path,
) -> None:
    async with world(tmp_path, identity=False) as here, Visitor(here.base) as visitor:
        job_id = await here.create("held", max_part_rows=BATCH_ROWS)
        await here.running(job_id)
        page = await visitor.get(f"/jobs/{job_id}")
        assert '<noscript><meta http-equiv="refresh" content="5"></noscript>' in page.text
        assert "None is finished yet." in page.text
        here.held.allow(2)
        async with asyncio.timeout(ENOUGH):
            while "part-00000" not in page.text:
                page = await visitor.get(f"/live/jobs/{job_id}")
                assert "Exportd-Settled" not in page.headers
        assert ">running<" in page.text


async def test_a_failed_job_tells_its_error(tmp_path: Path) -> None:
    async with world(tmp_path, identity=False, limits={"max_rows": 500}) as here:
        job_id = await here.create("wide")
        await here.settle(job_id)
        async with Visitor(here.base) as visitor:
            for path in ("/jobs", f"/jobs/{job_id}"):
                page = await visitor.get(path)
                assert "EXPORT_TOO_LARGE" in page.text
            assert "the export passed max_rows = 500" in page.text


async def test_long_lists_come_in_pages_and_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("jobs.PER_PAGE", "deliveries.PER_PAGE", "job.PARTS_PER_PAGE"):
        monkeypatch.setattr(f"exportd_server.api.console.views.{place}", 2)
    for place in ("datasets.PER_PAGE", "queues.PER_PAGE"):
        monkeypatch.setattr(f"exportd_server.api.console.views.{place}", 1)
    async with world(tmp_path, identity=False) as here, Visitor(here.base) as visitor:
        here.held.open_wide()
        jobs = [
            await here.dead_letters(endpoint="one"),
            await here.dead_letters(endpoint="two"),
            await here.create("held", max_part_rows=BATCH_ROWS),
        ]
        await here.settle(jobs[-1])

        async def walk(path: str, pattern: str) -> list[str]:
            found: list[str] = []
            while True:
                page = await visitor.get(path)
                assert page.status == 200, page.text
                found += re.findall(pattern, page.text)
                more = re.search(r'href="/console(/[^"]+)">(?:Older|More|Next) ', page.text)
                if more is None:
                    return found
                path = more[1].replace("&amp;", "&")

        listed = await walk("/jobs", r'class="id"><a href="/console/jobs/([^"]+)"')
        assert listed == jobs[::-1]
        parts = await walk(f"/jobs/{jobs[-1]}", r"part-\d{5}")
        assert parts == [f"part-{number:05d}" for number in range(4)]
        assert len(await walk("/datasets", r'href="/console/datasets/')) == 3
        queues = await walk("/queues", r">(scripted/[^<]+)</a>")
        assert queues == ["scripted/default/one", "scripted/default/two"]
        # The one part and the completion of each.
        dead = await walk("/deliveries?state=DEAD_LETTERED", r'name="delivery_id"')
        assert len(dead) == 4


async def test_jobs_are_filtered_by_state_and_dataset(tmp_path: Path) -> None:
    async with world(tmp_path, identity=False) as here, Visitor(here.base) as visitor:
        done, active = await here.create("wide"), await here.create("held")
        await here.settle(done)
        for query, expected in {
            "": {done, active},
            "?state=ACTIVE": {active},
            "?state=SUCCEEDED": {done},
            "?state=FAILED": set(),
            "?dataset=held": {active},
            "?dataset=held&state=SUCCEEDED": set(),
        }.items():
            for path in ("/jobs", "/live/jobs"):
                page = await visitor.get(path + query)
                shown = {each for each in (done, active) if each in page.text}
                assert shown == expected, query


@pytest.mark.parametrize(
    "path",
    [
        "/jobs?state=GONE",
        "/jobs?before=1",
        "/jobs?before=99999999999999999-x",
        "/jobs?dataset=%00",
        f"/jobs?dataset={'x' * 1001}",
        "/jobs/no-uuid",
        "/deliveries?job=no-uuid",
        "/deliveries?state=GONE",
        "/queues?after=%00",
        f"/jobs/{NOWHERE}?parts_from=-1",
    ],
)
async def test_what_cannot_be_asked_for_is_told_on_a_page(
    tmp_path: Path, path: str
) -> None:
    async with world(tmp_path, identity=False) as here, Visitor(here.base) as visitor:
        page = await visitor.get(path)
        expected = 404 if NOWHERE in path else 400
        assert page.status == expected
        assert page.title in {"Bad Request", "Not Found"}


async def test_bytes_that_are_no_text_find_nothing_and_break_nothing(
    tmp_path: Path,
) -> None:
    async with world(tmp_path, identity=False) as here, Visitor(here.base) as visitor:
        page = await visitor.get("/jobs?dataset=%ff%fe")
        assert page.status == 200
        assert rows(page) == 0


async def test_what_callers_and_sinks_say_stays_text(tmp_path: Path) -> None:
    async with world(tmp_path, identity=False) as here, Visitor(here.base) as visitor:
        odd = await here.create(HOSTILE, labels={"note": HOSTILE})
        await here.settle(odd)
        dead = await here.dead_letters(HOSTILE, endpoint=HOSTILE, labels={"n": HOSTILE})
        name = (
            "%3Cimg%20src=x%20onerror=alert(1)%3E%22'&%3Cscript%3Ealert(2)%3C%2Fscript%3E"
        )
        for path in (
            *PAGES,
            f"/jobs/{odd}",
            f"/jobs/{dead}",
            f"/live/jobs/{dead}",
            f"/deliveries?job={dead}",
            f"/deliveries?queue={name.replace('&', '%26')}",
            f"/jobs?dataset={name.replace('&', '%26')}",
            "/jobs?notice=<script>&count=<script>",
            "/datasets/" + name.replace("&", "%26").replace("'", "%27"),
            "/<script>",
        ):
            page = await visitor.get(path)
            assert "<img src=x" not in page.text, path
            assert "<script>" not in page.text, path
        shown = await visitor.get(f"/jobs/{dead}")
        assert shown.text.count("&lt;img src=x onerror=alert(1)&gt;") >= 3


# --- signing in


async def test_nothing_but_the_way_in_is_shown_to_whoever_has_not_signed_in(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as here, Visitor(here.base) as visitor:
        job_id = await here.create("wide")
        for path in (*PAGES, f"/jobs/{job_id}", "/jobs/" + NOWHERE):
            page = await visitor.get(path)
            assert page.status == 401
            assert page.title == "Sign in"
            assert "acme" not in page.text
            assert 'role="alert"' not in page.text
        # What anybody has: files that are the same for everybody.
        (style,) = re.findall(r'href="/console(/static/[^"]+\.css)"', page.text)
        static = await visitor.get(style)
        assert (static.status, static.headers["Content-Type"]) == (200, "text/css")
        assert "immutable" in static.headers["Cache-Control"]
        assert (await visitor.get("/static/other/console.css")).status == 404
        assert (await visitor.get("/static/x/..%2f..%2frouting.py")).status == 404


async def test_a_key_signs_in_leads_on_and_is_kept_where_nobody_can_read_it(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as here, Visitor(here.base) as visitor:
        asked = await visitor.get("/deliveries?state=FAILED")
        (form,) = asked.forms("sign-in")
        came = await visitor.send(form, follow=False, credential=here.keys["reader"])
        assert came.status == 303
        assert came.headers["Location"] == "/console/deliveries?state=FAILED"
        assert "HttpOnly" in came.cookies
        assert "SameSite=Lax" in came.cookies
        assert "Path=/" in came.cookies
        assert re.search(r"Max-Age=(3600|359\d)\b", came.cookies), came.cookies
        # Over loopback, in plain text.
        assert "Secure" not in came.cookies
        assert here.keys["reader"].split("_")[2] not in came.cookies
        assert set(visitor.cookies) == {"exportd-console", "exportd-console-form"}
        page = await visitor.get("/jobs")
        assert "acme" in page.text
        (out,) = page.forms("sign-out")
        left = await visitor.send(out, follow=False)
        assert left.headers["Location"] == "/console/sign-in"
        assert visitor.cookies == {}
        assert (await visitor.get("/jobs")).status == 401


async def test_a_token_signs_in_as_well(tmp_path: Path) -> None:
    issuer = Issuer()
    issuer.add("one")
    jwks = tmp_path / "jwks.json"
    jwks.write_bytes(issuer.jwks())
    identity = {"jwt": {"issuer": ISSUER, "audience": AUDIENCE, "jwks_file": jwks}}
    async with world(tmp_path, identity=True) as keyed:
        assert keyed.keys
    values = {"identity": identity}
    http = {"listen": "127.0.0.1:0", "console": True}
    async with (
        serve(settings(tmp_path / "b", http=http, **values), catalogue_of()) as server,
        Visitor(f"http://127.0.0.1:{server.running.http_port}") as visitor,
    ):
        page = await visitor.sign_in(issuer.token(scope="exports.read"))
        assert page.title == "Jobs"
        await visitor.get("/jobs")
        visitor.set_cookie("x", "y")
        refused = await visitor.sign_in(issuer.token(lifetime=-1000))
        assert refused.status == 401
        # A browser would not keep it: said instead of lost.
        visitor.set_cookie("x", "y")
        long = await visitor.sign_in(issuer.token(scope="exports.read", more="x" * 3000))
        assert long.status == 400
        assert "too long for a cookie" in long.text


async def test_a_credential_that_is_not_valid_lets_nobody_in(tmp_path: Path) -> None:
    async with world(tmp_path) as here, Visitor(here.base) as visitor:
        for credential in ("x", here.keys["admin"][:-1] + "!", "ä\u202e", "\0"):
            page = await visitor.sign_in(credential, "/queues")
            assert page.status == 401
            assert 'role="alert"' in page.text
            (form,) = page.forms("sign-in")
            assert form.fields["next"] == "/queues"
        assert (await visitor.sign_in(" ")).status == 400


async def test_a_key_that_is_revoked_is_out_at_once(tmp_path: Path) -> None:
    async with world(tmp_path) as here, signed_in(here, "writer") as visitor:
        job_id = await here.create("held")
        page = await visitor.get(f"/jobs/{job_id}")
        (cancel,) = page.forms("cancel")
        await FileKeyStore(tmp_path).revoke(here.key_ids["writer"], datetime.now(UTC))
        async with asyncio.timeout(ENOUGH):
            while page.status == 200:
                page = await visitor.get("/live/jobs")
        assert page.status == 401
        assert (await visitor.send(cancel)).status == 401
        assert await here.state(job_id) != "CANCELLED"


async def test_whoever_was_signed_in_and_is_no_more_is_told_why(tmp_path: Path) -> None:
    async with world(tmp_path) as here, signed_in(here, "writer") as visitor:
        await FileKeyStore(tmp_path).revoke(here.key_ids["writer"], datetime.now(UTC))
        page = await visitor.get("/jobs")
        async with asyncio.timeout(ENOUGH):
            while page.status == 200:
                page = await visitor.get("/jobs")
        assert f"API key {here.key_ids['writer']} was revoked" in page.text


@pytest.mark.parametrize("kind", ["garbage", "of another purpose", "of another key", "old"])
async def test_a_cookie_that_is_not_a_session_is_none(tmp_path: Path, kind: str) -> None:
    async with world(tmp_path) as here, Visitor(here.base) as visitor:
        purpose = b"exportd: sessions of the console"
        content = json.dumps(["csrf", here.keys["admin"], 2**40])
        cookie = {
            "garbage": "x" * 300,
            "of another purpose": Sealer([KEY.encode()]).seal(content),
            "of another key": Sealer([b"x" * 32], purpose).seal(content),
            "old": Sealer([KEY.encode()], purpose).seal(
                json.dumps(["csrf", here.keys["admin"], 1_700_000_000])
            ),
        }[kind]
        visitor.set_cookie("exportd-console", cookie)
        assert (await visitor.get("/jobs")).status == 401
        # While this one is.
        visitor.set_cookie("exportd-console", Sealer([KEY.encode()], purpose).seal(content))
        assert (await visitor.get("/jobs")).status == 200


async def test_behind_what_encrypts_the_cookie_is_for_this_host_alone(
    tmp_path: Path,
) -> None:
    http = {"public_url": "https://exports.example/data", "console_session": 60}
    async with world(tmp_path, http=http) as here, Visitor(here.base) as visitor:
        asked = await visitor.get("/jobs")
        (form,) = asked.forms("sign-in")
        # A path of the proxy's stands before every address.
        assert form.action == "/data/console/sign-in"
        name, _, rest = asked.cookies.partition("=")
        assert name == "__Host-exportd-form"
        visitor.set_cookie(name, rest.partition(";")[0])
        came = await visitor.send(form, follow=False, credential=here.keys["admin"])
        assert came.headers["Location"] == "/data/console/jobs"
        assert "__Host-exportd=" in came.cookies
        assert "Secure" in came.cookies
        assert "Max-Age=60" in came.cookies
        assert "Domain" not in came.cookies


@pytest.mark.parametrize(
    "to", ["https://evil.example/", "evil", "/\r\nX: y", "/ä", "x" * 2000]
)
async def test_signing_in_leads_nowhere_else(tmp_path: Path, to: str) -> None:
    async with world(tmp_path) as here, Visitor(here.base) as visitor:
        (form,) = (await visitor.get("/jobs")).forms("sign-in")
        came = await visitor.send(
            form, follow=False, credential=here.keys["reader"], next=to
        )
        assert came.headers["Location"] == "/console/jobs"


async def test_a_strange_name_for_this_address_gets_nothing_while_nobody_signs_in(
    tmp_path: Path,
) -> None:
    async with world(tmp_path, identity=False) as here, Visitor(here.base) as visitor:
        for host in ("localhost:1", "127.0.0.1", "[::1]:80"):
            assert (await visitor.get("/jobs", Host=host)).status == 200
        for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example"):
            page = await visitor.get("/jobs", Host=host)
            assert page.status == 421
            assert "WRONG_HOST" in page.text


# --- rights


async def test_a_reader_looks_and_changes_nothing(tmp_path: Path) -> None:
    async with world(tmp_path) as here, signed_in(here, "reader") as visitor:
        job_id = await here.create("held")
        dead = await here.dead_letters(endpoint="x", gone=True)
        for path in (f"/jobs/{job_id}", f"/deliveries?job={dead}", "/queues"):
            page = await visitor.get(path)
            assert page.status == 200
            for action in ("cancel", "redrive", "enable"):
                assert page.forms(action) == []
        (out,) = page.forms("sign-out")
        csrf = out.fields["csrf"]
        for action, fields in {
            "/cancel": {"job_id": job_id},
            "/redrive": {"job_id": dead},
            "/enable": {"queue": "scripted/acme/x"},
        }.items():
            refused = await visitor.post(action, csrf=csrf, **fields)
            assert refused.status == 403
            assert "exports.write" in refused.text
        assert await here.state(job_id) != "CANCELLED"


async def test_workers_and_audit_records_are_for_admins(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        job_id = await here.create("held")
        await here.running(job_id)
        await here.records(1, job_id=job_id)
        async with signed_in(here, "writer") as visitor:
            page = await visitor.get("/workers")
            assert page.status == 403
            assert "admin" in page.text
            job = await visitor.get(f"/jobs/{job_id}")
            assert "/workers" not in job.text
            assert "CreateExport by" not in job.text
        async with signed_in(here, "admin") as visitor:
            assert job_id in (await visitor.get("/workers")).text
            page = await visitor.get(f"/jobs/{job_id}")
            assert f"CreateExport by key:{here.key_ids['admin']}: succeeded" in page.text
        async with signed_in(here, "stranger") as visitor:
            page = await visitor.get("/workers")
            assert "of another tenant" in page.text
            assert job_id not in page.text


async def test_what_is_another_tenants_is_not_there(tmp_path: Path) -> None:
    async with world(tmp_path) as here, signed_in(here, "stranger") as visitor:
        dead = await here.dead_letters(endpoint="x", gone=True)
        active = await here.create("held")
        for path in ("/jobs/{}", "/live/jobs/{}", "/deliveries?job={}"):
            for job_id in (dead, active, NOWHERE):
                page = await visitor.get(path.format(job_id))
                assert page.status == 404
                assert "JOB_NOT_FOUND" in page.text
        for path in ("/jobs", "/live/jobs", "/deliveries", "/queues"):
            page = await visitor.get(path)
            assert page.status == 200
            assert rows(page) == 0
            assert dead not in page.text
        (out,) = page.forms("sign-out")
        for action, fields in (
            ("/cancel", {"job_id": active}),
            ("/cancel", {"job_id": NOWHERE}),
            ("/redrive", {"job_id": dead}),
            ("/redrive", {"queue": "scripted/acme/x"}),
            ("/enable", {"queue": "scripted/acme/x"}),
        ):
            page = await visitor.post(action, csrf=out.fields["csrf"], **fields)
            assert page.status == 404, (action, fields)
        assert await here.state(active) != "CANCELLED"


async def test_requests_over_the_tenants_rate_are_refused(tmp_path: Path) -> None:
    limits = {"requests_per_second": 0.001, "request_burst": 8}
    async with world(tmp_path, limits=limits) as here:
        async with signed_in(here, "writer") as visitor:
            job_id = await here.create("held")
            page = await visitor.get(f"/jobs/{job_id}")
            (cancel,) = page.forms("cancel")
            for _ in range(8):
                page = await visitor.get("/live/jobs")
            assert page.status == 429
            assert int(page.headers["Retry-After"]) > 0
            assert (await visitor.send(cancel)).status == 429
        # Of this tenant, and of no other.
        async with signed_in(here, "stranger"):
            pass


# --- changes


async def test_a_job_is_cancelled_and_the_record_says_by_whom(tmp_path: Path) -> None:
    async with world(tmp_path) as here, signed_in(here, "writer") as visitor:
        job_id = await here.create("held")
        (form,) = (await visitor.get(f"/jobs/{job_id}")).forms("cancel")
        page = await visitor.send(form)
        assert page.url == f"/console/jobs/{job_id}?notice=CANCELLED"
        assert "The job is cancelled." in page.text
        assert await here.state(job_id) == "CANCELLED"
        page = await visitor.send(form)
        assert "was cancelled already" in page.text
        for record in await here.records(2, methods=["CancelJob"]):
            assert record.code == "OK"
            assert record.job_id == job_id
            assert record.tenant == "acme"
            assert record.subject == f"key:{here.key_ids['writer']}"
            assert record.identity == "api_key"
            assert record.peer.startswith("127.0.0.1:")
            assert record.dataset == "held"


async def test_dead_letters_are_sent_again_one_all_of_a_job_or_all_of_a_queue(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as here, signed_in(here, "writer") as visitor:
        jobs = [await here.dead_letters(endpoint="x") for _ in range(4)]
        queue = "scripted/acme/x"
        dead = await visitor.get("/deliveries?state=DEAD_LETTERED")
        assert dead.title == "Dead letters"
        assert rows(dead) == 8
        assert "not this" in dead.text
        here.sink.behaviour.clear()

        one = (await visitor.get(f"/deliveries?state=DEAD_LETTERED&job={jobs[0]}")).forms(
            "redrive"
        )
        part = next(form for form in one[:0:-1] if form.fields["delivery_id"])
        page = await visitor.send(part)
        assert "1 delivery is sent again" in page.text
        await here.sink.arrived("a", 1)

        all_of_job, *_ = (await visitor.get(f"/deliveries?job={jobs[1]}")).forms("redrive")
        assert all_of_job.fields["job_id"] == jobs[1]
        page = await visitor.send(all_of_job)
        assert page.url.startswith(f"/console/deliveries?job={jobs[1]}")
        assert (await here.settle(jobs[1])).deliveries[0].dead_lettered == 0

        (all_of_queue,) = (
            form
            for form in (await visitor.get("/queues")).forms("redrive")
            if form.fields["queue"] == queue
        )
        await visitor.send(all_of_queue)
        for job_id in jobs:
            assert (await here.settle(job_id)).deliveries[0].dead_lettered == 0
        assert rows(await visitor.get("/deliveries?state=DEAD_LETTERED")) == 0
        records = await here.records(3, methods=["RedriveDeliveries"])
        assert records[0].delivery_id == part.fields["delivery_id"]
        assert records[1].job_id == jobs[1]
        assert records[2].queue == queue


async def test_an_endpoint_that_was_disabled_is_enabled(tmp_path: Path) -> None:
    async with world(tmp_path) as here, signed_in(here, "writer") as visitor:
        await here.dead_letters(endpoint="x", gone=True)
        page = await visitor.get("/queues")
        assert ">disabled<" in page.text
        assert "ENDPOINT_GONE" in page.text
        (form,) = page.forms("enable")
        page = await visitor.send(form)
        assert page.forms("enable") == []
        assert "The queue is enabled" in page.text
        (record,) = await here.records(1, methods=["EnableSinkQueue"])
        assert (record.queue, record.code) == ("scripted/acme/x", "OK")


async def test_a_form_from_elsewhere_changes_nothing(tmp_path: Path) -> None:
    async with world(tmp_path) as here, signed_in(here, "admin") as visitor:
        job_id = await here.create("held")
        async with signed_in(here, "admin") as other:
            (foreign,) = (await other.get(f"/jobs/{job_id}")).forms("cancel")
        for csrf in ("", "x", "ä", foreign.fields["csrf"]):
            page = await visitor.post("/cancel", csrf=csrf, job_id=job_id)
            assert page.status == 403
            assert "page is too old" in page.text
        page = await visitor.post("/cancel", job_id=job_id)
        assert page.status == 403
        # A link does nothing either.
        for path in ("/cancel", "/redrive", "/enable", "/sign-out"):
            assert (await visitor.get(f"{path}?job_id={job_id}")).status == 405
        assert await here.state(job_id) != "CANCELLED"
        for record in await here.records(5, methods=["CancelJob"]):
            assert record.code == "PERMISSION_DENIED"
            assert record.job_id == ""


async def test_of_two_pages_to_sign_in_on_both_can_be_used(tmp_path: Path) -> None:
    async with world(tmp_path) as here, Visitor(here.base) as visitor:
        (first,) = (await visitor.get("/jobs")).forms("sign-in")
        (second,) = (await visitor.get("/queues")).forms("sign-in")
        for form, title in ((first, "Jobs"), (second, "Queues of sinks")):
            page = await visitor.send(form, credential=here.keys["reader"])
            assert page.title == title


async def test_nobody_is_signed_in_by_a_form_from_elsewhere(tmp_path: Path) -> None:
    async with world(tmp_path) as here, Visitor(here.base) as visitor:
        assert (await visitor.post("/sign-in", credential=here.keys["admin"])).status == 403
        await visitor.get("/jobs")
        page = await visitor.post("/sign-in", csrf="x", credential=here.keys["admin"])
        assert page.status == 403
        assert (await visitor.get("/jobs")).status == 401


async def test_without_identity_forms_are_guarded_all_the_same(tmp_path: Path) -> None:
    async with world(tmp_path, identity=False) as here, Visitor(here.base) as visitor:
        job_id = await here.create("held")
        assert (await visitor.post("/cancel", job_id=job_id)).status == 403
        page = await visitor.get(f"/jobs/{job_id}")
        assert page.forms("sign-out") == []
        (form,) = page.forms("cancel")
        assert (await visitor.send(form)).status == 200
        assert await here.state(job_id) == "CANCELLED"


async def test_a_refused_change_is_recorded_and_tells_nothing_of_what_was_asked(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as here, Visitor(here.base) as visitor:
        job_id = await here.create("held")
        assert (await visitor.post("/cancel", job_id=job_id)).status == 401
        (record,) = await here.records(1, methods=["CancelJob"])
        assert (record.code, record.tenant, record.job_id) == ("UNAUTHENTICATED", "", "")


@pytest.mark.parametrize(
    ("body", "type_"),
    [
        (b"csrf=x", "text/plain"),
        (b'{"csrf": "x"}', "application/json"),
        (b"csrf=\xff", "application/x-www-form-urlencoded"),
        (b"a=" + b"x" * 9000, "application/x-www-form-urlencoded"),
        (b"a&" * 1000, "application/x-www-form-urlencoded"),
    ],
)
async def test_what_is_no_form_is_refused(tmp_path: Path, body: bytes, type_: str) -> None:
    async with world(tmp_path) as here, signed_in(here, "admin") as visitor:
        for path in ("/cancel", "/sign-out"):
            page = await visitor.post_bytes(path, body, type_)
            assert page.status == 400
            assert "form:" in page.text
        (record,) = await here.records(1, methods=["CancelJob"])
        assert record.code == "INVALID_ARGUMENT"


async def test_a_form_with_bad_fields_says_which(tmp_path: Path) -> None:
    async with world(tmp_path) as here, signed_in(here, "admin") as visitor:
        (out,) = (await visitor.get("/jobs")).forms("sign-out")
        csrf = out.fields["csrf"]
        for path, fields, said in (
            ("/cancel", {}, "job_id: is required"),
            ("/cancel", {"job_id": "x"}, "job_id: must be a UUID"),
            ("/redrive", {}, "job_id: is required"),
            ("/redrive", {"delivery_id": "x"}, "delivery_id: must be a UUID"),
            ("/enable", {}, "queue: is required"),
            ("/enable", {"queue": "\0"}, "queue: must not contain"),
        ):
            page = await visitor.post(path, csrf=csrf, **fields)
            assert page.status == 400
            assert said in page.text


async def test_an_error_that_nobody_foresaw_is_a_page_with_a_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, identity=False) as here, Visitor(here.base) as visitor:

        def broken(*_: object) -> None:
            raise RuntimeError("postgresql://user:secret@host")

        monkeypatch.setattr("exportd_server.jobs.manager.JobManager.list_jobs", broken)
        page = await visitor.get("/jobs")
        assert page.status == 500
        assert "by reference" in page.text
        assert "secret" not in page.text


# --- settings


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("[http]\nconsole = true", "http.console: needs a port"),
        (
            (
                '[http]\nconsole = true\nlisten = "127.0.0.1:0"\n'
                'public_url = "https://exports.example"'
            ),
            "http.console: exports.example is reachable from elsewhere",
        ),
        (
            (
                '[http]\nconsole = true\nlisten = "127.0.0.1:0"\n'
                'public_url = "http://exports.example"\n'
                "[identity]\napi_keys = true\n[tls]\nallow_plaintext = true"
            ),
            "http.console: browsers keep a sign-in only",
        ),
        (
            (
                '[http]\nconsole = true\nlisten = "127.0.0.1:0"\n'
                '[[identity.mtls]]\ncn = "x"\ntenant = "t"\nscopes = ["admin"]\n'
                '[tls]\ncert_file = "c"\nkey_file = "k"\nclient_ca_file = "a"\n'
                "require_client_cert = true"
            ),
            "http.console: browsers sign in with an API key or a token",
        ),
        ("[http]\nconsole_session = 59", "console_session"),
    ],
)
def test_a_console_that_would_be_open_is_refused_at_start(
    tmp_path: Path, lines: str, said: str
) -> None:
    file = tmp_path / "exportd.toml"
    file.write_text(lines)
    with pytest.raises(ConfigurationError, match=said):
        load_settings(file, {}, {})
