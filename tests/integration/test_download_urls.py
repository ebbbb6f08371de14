"""Download URLs as a browser or any HTTP client uses them: over real sockets, without
the service's client."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from aiohttp import web
from crc32c import crc32c
from google.protobuf.duration_pb2 import Duration

from exportd import AsyncClient, Client
from exportd.errors import UrlsUnavailable
from exportd.v1 import dataset_pb2, job_pb2
from exportd.v1 import export_service_pb2 as pb
from exportd.v1.export_service_pb2_grpc import ExportServiceStub
from exportd_server.api.link import Link, LinkKeys
from exportd_server.sources.base import Source
from exportd_server.store.base import SignedUrl
from exportd_server.store.key import JobPrefix, OutputKey, OutputKind
from exportd_server.store.s3 import S3Store
from exportd_server.store.s3_client import S3Options
from tests.support import rpc
from tests.support.gate import BATCH_ROWS, GateSource
from tests.support.processes import Processes, processes
from tests.support.readers import Downloads
from tests.support.samples import catalogue_of
from tests.support.scripted_server import JOB, ScriptedPart, scripted
from tests.support.server import Server, serve, server_process, settings, until
from tests.support.waits import ENOUGH

KEY = "a-key-for-tests-and-nothing-else-"
KEYS = LinkKeys([KEY.encode()])


class Answer:
    """What came back of one request."""

    def __init__(self, response: aiohttp.ClientResponse, body: bytes) -> None:
        self.status = response.status
        self.headers = response.headers
        self.body = body

    @property
    def reason(self) -> str:
        """Of an error; it says no more than it should."""
        told = json.loads(self.body)
        assert set(told) == {"reason", "message"}
        assert self.headers["Cache-Control"] == "no-store"
        return str(told["reason"])


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    # As plain as it gets: no cookies, nothing undone on the way.
    async with aiohttp.ClientSession(
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        timeout=aiohttp.ClientTimeout(total=ENOUGH),
    ) as session:
        yield session


async def fetch(
    http: aiohttp.ClientSession, url: str, method: str = "GET", **headers: str
) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with http.request(method, url, headers=named, allow_redirects=False) as response:
        return Answer(response, await response.read())


@asynccontextmanager
async def serving(data_dir: Path, source: Source, **values: Any) -> AsyncIterator[Server]:
    """A server with an HTTP port whose key is known here."""
    port = {"listen": "127.0.0.1:0", "signing_keys": [KEY], **values.pop("http", {})}
    options = settings(data_dir, http=port, **values)
    async with serve(options, catalogue_of(gated=source)) as server:
        yield server


async def urls_of(server: Server, job_id: str, **fields: Any) -> Any:
    return await server.stub.GetDownloadUrls(
        pb.GetDownloadUrlsRequest(job_id=job_id, **fields)
    )


def base_of(url: str) -> str:
    return url.partition("/v1/download/")[0]


def link_of(url: str) -> Link:
    return KEYS.read(url.split("/")[5])


def url_to(server: Server, link: Link, name: str = "") -> str:
    path = f"http://127.0.0.1:{server.running.http_port}/v1/download/{KEYS.sign(link)}"
    return f"{path}/{name}" if name else path


def small() -> GateSource:
    return GateSource(3, wide=True)


def large() -> GateSource:
    """More than sockets and buffers between hold."""
    return GateSource(2000, wide=True)


async def test_every_part_and_all_joined_download_whole_and_verified(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    async with serving(tmp_path, GateSource(5, wide=True)) as server:
        job = await rpc.export(server.stub, "gated", max_part_rows=BATCH_ROWS)
        response = await urls_of(server, job.job_id)
        assert [url.part_index for url in response.urls] == [0, 1, 2, 3, 4]
        assert response.generation == job.generation
        for url, part in zip(response.urls, job.manifest.parts, strict=True):
            answer = await fetch(http, url.url)
            assert answer.status == 200
            assert hashlib.sha256(answer.body).digest() == url.sha256 == part.sha256
            assert crc32c(answer.body) == url.crc32c == part.crc32c
            assert len(answer.body) == url.bytes == part.bytes
            assert url.file_name == part.file_name
            assert url.url.endswith(f"/{part.file_name}")
            assert not url.requires_access_token
        joined = await fetch(http, response.joined.url)
        assert joined.body == await rpc.download(server.stub, job.job_id)
        assert crc32c(joined.body) == response.joined.crc32c == job.manifest.crc32c
        assert not response.joined.HasField("part_index")


async def test_an_answer_says_what_a_browser_needs_and_lets_nothing_run(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    async with serving(tmp_path, small()) as server:
        job = await rpc.export(server.stub, "gated")
        url = (await urls_of(server, job.job_id)).urls[0]
        answer = await fetch(http, url.url)
        digest = answer.headers["Repr-Digest"]
        expected = {
            "Content-Type": "text/csv",
            "Content-Length": str(url.bytes),
            "Content-Disposition": f'attachment; filename="{url.file_name}"',
            "Accept-Ranges": "bytes",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Server": "exportd",
        }
        assert {name: answer.headers[name] for name in expected} == expected
        assert digest.startswith("sha-256=:")
        assert answer.headers["ETag"].startswith('"')
        private, kept, age = answer.headers["Cache-Control"].split(", ")
        assert (private, kept) == ("private", "no-transform")
        assert 3500 < int(age.removeprefix("max-age=")) <= 3600
        head = await fetch(http, url.url, "HEAD")
        assert (head.status, head.body) == (200, b"")
        same = set(answer.headers) - {"Date", "Cache-Control"}
        assert {n: head.headers[n] for n in same} == {n: answer.headers[n] for n in same}


async def test_compressed_output_is_a_file_and_not_an_encoding(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    async with serving(tmp_path, small()) as server:
        for compression, kind in (
            (job_pb2.COMPRESSION_GZIP, "application/gzip"),
            (job_pb2.COMPRESSION_ZSTD, "application/zstd"),
        ):
            job = await rpc.export(server.stub, "gated", compression=compression)
            url = (await urls_of(server, job.job_id)).urls[0]
            answer = await fetch(http, url.url, Accept_Encoding="gzip, zstd")
            assert answer.headers["Content-Type"] == url.content_type == kind
            assert "Content-Encoding" not in answer.headers
            assert crc32c(answer.body) == url.crc32c
            if compression == job_pb2.COMPRESSION_GZIP:
                assert gzip.decompress(answer.body).startswith(b"id,text\n")
                assert url.file_name.endswith(".csv.gz")


@pytest.mark.parametrize(
    ("asked", "begin", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=10-19", 10, 20),
        ("bytes=10-", 10, None),
        ("bytes=-7", -7, None),
        ("bytes=0-999999999999999", 0, None),
        ("bytes=-999999999999999", 0, None),
        ("bytes= 1-2", 1, 3),
    ],
)
async def test_a_range_is_served_as_asked_for(
    served: Served, asked: str, begin: int, end: int | None
) -> None:
    part = await served.get(served.part, Range=asked)
    assert part.status == 206
    assert part.body == served.data[begin:end]
    first = begin % served.size
    last = first + len(part.body) - 1
    assert part.headers["Content-Range"] == f"bytes {first}-{last}/{served.size}"
    # In the joined file, where a range may run over parts.
    whole = await served.get(served.joined, Range=asked)
    assert whole.status == 206
    assert whole.body == served.whole[begin:end]


@pytest.mark.parametrize(
    "asked",
    ["bytes=2-1", "bytes=0-1,5-6", "bytes=-", "bytes=a-b", "rows=0-5", "", "bytes=٣-٤"],
)
async def test_what_is_no_single_range_gets_the_whole_file(
    served: Served, asked: str
) -> None:
    answer = await served.get(served.part, Range=asked)
    assert (answer.status, answer.body) == (200, served.data)


async def test_a_range_across_parts_of_the_joined_file_is_exact(served: Served) -> None:
    seam = served.size
    for first, last in ((seam - 1, seam), (seam - 3, seam + 4000), (5, len(served.whole))):
        answer = await served.get(served.joined, Range=f"bytes={first}-{last}")
        assert answer.body == served.whole[first : last + 1]


@pytest.mark.parametrize("asked", ["bytes={size}-", "bytes={size}-{size}", "bytes=-0"])
async def test_a_range_past_the_end_is_refused_with_the_size(
    served: Served, asked: str
) -> None:
    answer = await served.get(served.part, Range=asked.format(size=served.size))
    assert answer.status == 416
    assert answer.headers["Content-Range"] == f"bytes */{served.size}"
    assert answer.reason == "OFFSET_OUT_OF_RANGE"


async def test_a_download_resumes_where_it_broke_off_and_only_in_the_same_file(
    served: Served,
) -> None:
    tag = (await served.get(served.part, "HEAD")).headers["ETag"]
    rest = await served.get(served.part, Range="bytes=100-", If_Range=tag)
    assert (rest.status, rest.body) == (206, served.data[100:])
    # With a new URL, too.
    again = (await urls_of(served.server, served.job.job_id)).urls[0].url
    rest = await served.get(again, Range="bytes=100-", If_Range=tag)
    assert (rest.status, rest.body) == (206, served.data[100:])
    for other in ('"1-5-other"', f"W/{tag}", "Sun, 22 Nov 2026 07:00:00 GMT"):
        whole = await served.get(served.part, Range="bytes=100-", If_Range=other)
        assert (whole.status, whole.body) == (200, served.data)


async def test_conditions_compare_the_entity_tag(served: Served) -> None:
    tag = (await served.get(served.part, "HEAD")).headers["ETag"]
    assert tag != (await served.get(served.joined, "HEAD")).headers["ETag"]
    for method in ("GET", "HEAD"):
        for tags in (tag, f'"x", {tag}', f"W/{tag}", "*"):
            known = await served.get(served.part, method, If_None_Match=tags)
            assert (known.status, known.body) == (304, b"")
            assert known.headers["ETag"] == tag
    assert (await served.get(served.part, If_None_Match='"x"')).body == served.data
    assert (await served.get(served.part, If_Match=f'"x", {tag}')).body == served.data
    refused = await served.get(served.part, If_Match=f'"x", W/{tag}')
    assert refused.status == 412
    # A condition comes before the range.
    known = await served.get(served.part, If_None_Match=tag, Range="bytes=0-1")
    assert known.status == 304


class Served:
    """A finished job in two parts, and a way to get at it."""

    def __init__(
        self,
        server: Server,
        http: aiohttp.ClientSession,
        job: job_pb2.Job,
        urls: pb.GetDownloadUrlsResponse,
        whole: bytes,
    ) -> None:
        self.server = server
        self.http = http
        self.job = job
        self.part = urls.urls[0].url
        self.joined = urls.joined.url
        self.whole = whole
        self.size = urls.urls[0].bytes
        self.data = whole[: self.size]
        assert hashlib.sha256(self.data).digest() == urls.urls[0].sha256

    async def get(self, url: str, method: str = "GET", **headers: str) -> Answer:
        return await fetch(self.http, url, method, **headers)


@pytest.fixture
async def served(tmp_path: Path, http: aiohttp.ClientSession) -> AsyncIterator[Served]:
    async with serving(tmp_path, small(), download={"chunk_bytes": 4096}) as server:
        job = await rpc.export(server.stub, "gated", max_part_rows=2 * BATCH_ROWS)
        urls = await urls_of(server, job.job_id)
        yield Served(server, http, job, urls, await rpc.download(server.stub, job.job_id))


async def test_a_url_that_was_changed_or_made_up_is_refused(served: Served) -> None:
    before, token, name = served.part.rsplit("/", 2)
    for other in (
        token[:-2] + ("AA" if token[-2:] != "AA" else "BB"),
        "B" + token[1:],
        token[:40],
        "x",
        LinkKeys([b"k" * 32]).sign(link_of(served.part)),
    ):
        for path in (f"{before}/{other}/{name}", f"{before}/{other}"):
            answer = await served.get(path)
            assert (answer.status, answer.reason) == (403, "URL_INVALID")
    # The name at the end is not signed; it must be right, or missing.
    assert (await served.get(f"{before}/{token}")).body == served.data
    wrong = await served.get(f"{before}/{token}/report.exe")
    assert (wrong.status, wrong.reason) == (404, "NOT_FOUND")


async def test_a_url_works_until_it_expires_and_not_a_moment_longer(
    served: Served,
) -> None:
    link = link_of(served.part)
    now = datetime.now(UTC)
    soon = url_to(served.server, replace(link, expire_time=now + timedelta(seconds=60)))
    assert (await served.get(soon)).body == served.data
    for passed in (timedelta(microseconds=1), timedelta(days=1000)):
        url = url_to(served.server, replace(link, expire_time=now - passed))
        answer = await served.get(url)
        assert (answer.status, answer.reason) == (410, "URL_EXPIRED")


async def test_a_url_gives_no_other_tenants_job_nor_another_generation(
    served: Served,
) -> None:
    link = link_of(served.part)
    for other, reason in (
        (replace(link, tenant="somebody-else"), "JOB_NOT_FOUND"),
        (replace(link, job_id="01890a5d-ac96-774b-bcce-b302099a8057"), "JOB_NOT_FOUND"),
        (replace(link, generation=link.generation + 1), "GENERATION_MISMATCH"),
        (replace(link, part=2), "PART_NOT_FOUND"),
    ):
        answer = await served.get(url_to(served.server, other))
        assert (answer.status, answer.reason) == (410, reason)


async def test_other_paths_and_methods_are_refused_in_the_same_form(
    served: Served,
) -> None:
    base = base_of(served.part)
    for path in ("/", "/v1/download", "/v1/download/", "/v1/download/a/b/c", "/../etc"):
        answer = await served.get(base + path)
        assert (answer.status, answer.reason) == (404, "NOT_FOUND")
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        answer = await served.get(served.part, method)
        assert (answer.status, answer.reason) == (405, "METHOD_NOT_ALLOWED")
        assert answer.headers["Allow"] == "GET,HEAD"


async def test_a_deleted_job_is_gone_at_once(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    async with serving(tmp_path, small()) as server:
        job = await rpc.export(server.stub, "gated")
        url = (await urls_of(server, job.job_id)).urls[0].url
        assert (await fetch(http, url)).status == 200
        await server.stub.DeleteJob(pb.DeleteJobRequest(job_id=job.job_id))
        for method in ("GET", "HEAD"):
            assert (await fetch(http, url, method)).status == 410
        assert (await fetch(http, url)).reason == "JOB_NOT_FOUND"


async def test_deleting_a_job_cuts_a_download_of_it_so_that_the_client_notices(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    async with serving(tmp_path, large()) as server:
        job = await rpc.export(server.stub, "gated")
        url = (await urls_of(server, job.job_id)).joined.url
        async with http.get(url) as response:
            await response.content.readexactly(1000)
            await server.stub.DeleteJob(pb.DeleteJobRequest(job_id=job.job_id))
            with pytest.raises(aiohttp.ClientError):
                await response.read()
        await until(lambda: not server.files())


@pytest.mark.minutes
async def test_expiry_refuses_new_downloads_and_cuts_none_that_has_begun(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    async with serving(tmp_path, large(), retention={"reap_interval": 1}) as server:
        job = await rpc.export(server.stub, "gated", ttl=Duration(seconds=4))
        url = (await urls_of(server, job.job_id)).joined
        # However long a lifetime is asked for.
        assert url.expire_time.ToNanoseconds() <= job.expire_time.ToNanoseconds()
        async with http.get(url.url) as response:
            begun = await response.content.readexactly(1000)
            link = replace(link_of(url.url), expire_time=datetime(2100, 1, 1, tzinfo=UTC))
            async with asyncio.timeout(ENOUGH):
                while (
                    answer := await fetch(http, url_to(server, link), "HEAD")
                ).status != 410:
                    await asyncio.sleep(0.05)
            # The service's own word, whatever the URL says; and the URL's own.
            answer = await fetch(http, url_to(server, link))
            assert answer.reason in {"OUTPUT_EXPIRED", "JOB_NOT_FOUND"}
            assert (await fetch(http, url.url)).reason == "URL_EXPIRED"
            data = begun + await response.read()
        assert len(data) == url.bytes
        assert crc32c(data) == url.crc32c
        # Then it goes.
        await until(lambda: not server.files(), ENOUGH)


async def test_the_lifetime_is_what_was_asked_for_within_bounds(tmp_path: Path) -> None:
    times = {"url_lifetime": 600, "max_url_lifetime": 7200}
    async with serving(tmp_path, small(), download=times) as server:
        job = await rpc.export(server.stub, "gated", ttl=Duration(seconds=3600))

        async def lasts(**fields: Any) -> float:
            before = datetime.now(UTC)
            urls = await urls_of(server, job.job_id, **fields)
            moments = {url.expire_time.ToNanoseconds() for url in [*urls.urls, urls.joined]}
            (moment,) = moments
            return float(moment / 1e9) - before.timestamp()

        assert 600 <= await lasts() < 605
        assert 60 <= await lasts(lifetime=Duration(seconds=60)) < 65
        assert 1.5 <= await lasts(lifetime=Duration(seconds=1, nanos=500_000_000)) < 6
        # What is left of the output's retention bounds it.
        assert 3590 < await lasts(lifetime=Duration(seconds=7200)) <= 3600
        for wrong in (
            Duration(),
            Duration(seconds=-5),
            Duration(seconds=7201),
            Duration(seconds=315_576_000_000),
            Duration(nanos=999_999_999),
        ):
            refused = await rpc.refusal(urls_of(server, job.job_id, lifetime=wrong))
            assert refused.fields == ["lifetime"]
            assert "7200 s" in refused.message


async def test_a_job_without_output_is_refused_as_a_download_is(tmp_path: Path) -> None:
    gate = GateSource()
    async with serving(tmp_path, gate) as server:
        job = await rpc.create(server.stub, "gated")

        async def refused(**fields: Any) -> rpc.Refusal:
            return await rpc.refusal(urls_of(server, job.job_id, **fields))

        early = await refused()
        assert (early.code, early.reason) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "JOB_NOT_FINISHED",
        )
        assert "RetryInfo" in early.details
        await server.stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))
        assert (await refused()).reason == "JOB_CANCELLED"
        job.job_id = "01890a5d-ac96-774b-bcce-b302099a8057"
        assert (await refused()).reason == "JOB_NOT_FOUND"
        job.job_id = "nothing"
        assert (await refused(part_index=-1, page_size=-1)).fields == [
            "job_id",
            "page_size",
            "part_index",
        ]
        gate.open_wide()
        job = await rpc.export(server.stub, "gated")
        assert (await refused(part_index=1)).reason == "PART_NOT_FOUND"
        assert (await refused(page_token="abc")).reason == "INVALID_PAGE_TOKEN"
        assert (await refused(page_token="abc", part_index=0)).fields == ["page_token"]


async def test_without_s3_or_an_http_port_the_mend_is_told(tmp_path: Path) -> None:
    async with serve(settings(tmp_path), catalogue_of(gated=small())) as server:
        assert server.running.http_port is None
        job = await rpc.export(server.stub, "gated")
        refused = await rpc.refusal(urls_of(server, job.job_id))
        assert refused.code is grpc.StatusCode.FAILED_PRECONDITION
        assert refused.reason == "DOWNLOAD_URLS_UNAVAILABLE"
        assert "http.listen" in refused.message
        async with AsyncClient(server.address) as client:
            with pytest.raises(UrlsUnavailable):
                await (await client.job(job.job_id)).download_urls()


async def test_urls_come_in_pages_and_one_by_one(tmp_path: Path) -> None:
    async with serving(tmp_path, GateSource(5, wide=True)) as server:
        job = await rpc.export(server.stub, "gated", max_part_rows=BATCH_ROWS)
        seen: list[int] = []
        joined = 0
        token = ""
        while True:
            page = await urls_of(server, job.job_id, page_size=2, page_token=token)
            seen += [url.part_index for url in page.urls]
            joined += page.HasField("joined")
            token = page.next_page_token
            if not token:
                break
            assert len(page.urls) == 2
        assert (seen, joined) == ([0, 1, 2, 3, 4], 1)
        one = await urls_of(server, job.job_id, part_index=3)
        assert [url.part_index for url in one.urls] == [3]
        assert not one.HasField("joined")
        other = await rpc.export(server.stub, "gated", max_part_rows=BATCH_ROWS)
        page = await urls_of(server, job.job_id, page_size=2)
        strange = urls_of(server, other.job_id, page_token=page.next_page_token)
        assert (await rpc.refusal(strange)).reason == "INVALID_PAGE_TOKEN"


async def test_parts_that_do_not_join_have_a_url_each_and_none_for_all(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    async with serving(tmp_path, small()) as server:
        fields = {"format": dataset_pb2.FORMAT_PARQUET}
        job = await rpc.export(server.stub, "gated", max_part_rows=BATCH_ROWS, **fields)
        urls = await urls_of(server, job.job_id)
        assert len(urls.urls) == 3
        assert not urls.HasField("joined")
        answer = await fetch(http, urls.urls[1].url)
        assert answer.headers["Content-Type"] == "application/vnd.apache.parquet"
        assert hashlib.sha256(answer.body).digest() == urls.urls[1].sha256
        single = await rpc.export(server.stub, "gated", **fields)
        urls = await urls_of(server, single.job_id)
        assert urls.joined.sha256 == urls.urls[0].sha256
        assert (await fetch(http, urls.joined.url)).status == 200


async def test_no_name_can_break_a_header_or_a_url(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    evil = 'x"; filename=evil.exe\r\nSet-Cookie: a=b\r\n\r\n<script>/../ü\u202e%0d%0a'
    options = settings(tmp_path, http={"listen": "127.0.0.1:0"})
    async with serve(options, catalogue_of(**{evil: small()})) as server:
        job = await rpc.export(server.stub, evil, labels={"a": 'b"\r\nX: y'})
        url = (await urls_of(server, job.job_id)).urls[0]
        answer = await fetch(http, url.url)
        assert answer.status == 200
        assert "Set-Cookie" not in answer.headers
        told = answer.headers["Content-Disposition"]
        assert told == f'attachment; filename="{url.file_name}"'
        assert set(url.file_name) <= set(
            "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-"
        )
        assert url.url.endswith(f"/{url.file_name}")


async def test_damaged_bytes_never_make_a_complete_download(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    async with serving(tmp_path, small(), download={"chunk_bytes": 4096}) as server:
        for damage in ("first", "last", "truncate", "remove"):
            job = await rpc.export(server.stub, "gated")
            url = (await urls_of(server, job.job_id)).urls[0].url
            file = next(p for p in server.files() if f"{job.job_id}/output/" in str(p))
            data = bytearray(file.read_bytes())
            data[0 if damage == "first" else -1] ^= 1
            if damage == "remove":
                file.unlink()
            else:
                file.write_bytes(data[:-5] if damage == "truncate" else data)
            if damage == "remove":
                answer = await fetch(http, url)
                assert (answer.status, answer.reason) == (500, "CHECKSUM_MISMATCH")
            else:
                with pytest.raises(aiohttp.ClientError):
                    await fetch(http, url)


@pytest.mark.minutes
async def test_a_reader_that_takes_nothing_is_dropped(
    tmp_path: Path, downloads: Downloads
) -> None:
    async with serving(tmp_path, large(), download={"stall_timeout": 0.5}) as server:
        job = await rpc.export(server.stub, "gated")
        url = (await urls_of(server, job.job_id)).joined
        assert url.bytes > 20 * 2**20
        with stalled(server, url.url) as connection:
            await downloads.begun()
            await downloads.over()
            received = await asyncio.to_thread(drained, connection)
            assert 0 < received < url.bytes


@pytest.mark.minutes
async def test_a_reader_that_is_slow_is_not_dropped(tmp_path: Path) -> None:
    async with serving(tmp_path, large(), download={"stall_timeout": 2.0}) as server:
        job = await rpc.export(server.stub, "gated")
        url = (await urls_of(server, job.job_id)).joined
        with stalled(server, url.url) as connection:
            connection.setblocking(False)
            received = 0
            for _ in range(25):
                await asyncio.sleep(0.1)
                try:
                    received += len(connection.recv(200_000))
                except BlockingIOError:
                    continue
            connection.setblocking(True)
            received += await asyncio.to_thread(drained, connection)
        assert received > url.bytes


class stalled:  # noqa: N801 - reads as a statement
    """A connection that asks for a file and takes next to nothing of it."""

    def __init__(self, server: Server, url: str) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        self._socket.connect(("127.0.0.1", server.running.http_port or 0))
        path = url.removeprefix(base_of(url))
        request = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        self._socket.sendall(request.encode())

    def __enter__(self) -> socket.socket:
        return self._socket

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def drained(connection: socket.socket) -> int:
    """How many bytes are still to come until the connection ends, one way or another."""
    connection.settimeout(ENOUGH)
    received = 0
    try:
        while data := connection.recv(2**20):
            received += len(data)
    except ConnectionResetError:
        pass
    return received


async def test_a_connection_that_asks_for_nothing_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exportd_server.api.http._FIRST_REQUEST", 0.3)
    async with serving(tmp_path, small()) as server:
        port = server.running.http_port
        for said in (b"", b"GET /v1/download/x HTTP/1.1\r\nHost:"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(said)
            async with asyncio.timeout(ENOUGH):
                assert await reader.read() == b""
            writer.close()
            await writer.wait_closed()


@pytest.mark.minutes
async def test_a_drain_lets_downloads_end_and_drops_those_that_do_not(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    stall = {"stall_timeout": 10 * ENOUGH}
    async with serving(tmp_path, large(), drain_timeout=3.0, download=stall) as server:
        job = await rpc.export(server.stub, "gated")
        url = (await urls_of(server, job.job_id)).joined
        stuck = stalled(server, url.url)
        response = await http.get(url.url)
        # More is left than is on its way.
        await response.content.readexactly(url.bytes // 2)
        reading = asyncio.create_task(response.read())
    assert len(await reading) == url.bytes - url.bytes // 2
    with stuck as connection:
        assert await asyncio.to_thread(drained, connection) < url.bytes
    with pytest.raises(aiohttp.ClientConnectionError):
        await fetch(http, url.url)


async def test_urls_outlive_a_restart_of_the_embedded_server(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    options = settings(tmp_path, http={"listen": "127.0.0.1:0"})
    async with serve(options, catalogue_of(gated=small())) as server:
        job = await rpc.export(server.stub, "gated")
        url = (await urls_of(server, job.job_id)).urls[0]
        assert (tmp_path / "download-url.key").stat().st_mode & 0o777 == 0o600
    async with serve(options, catalogue_of(gated=small())) as server:
        again = f"http://127.0.0.1:{server.running.http_port}"
        answer = await fetch(http, url.url.replace(base_of(url.url), again))
        assert crc32c(answer.body) == url.crc32c


async def test_urls_begin_with_what_callers_reach_the_server_by(tmp_path: Path) -> None:
    public = {"public_url": "https://exports.example.com/data/"}
    async with serving(tmp_path, small(), http=public) as server:
        job = await rpc.export(server.stub, "gated")
        url = (await urls_of(server, job.job_id)).urls[0].url
        assert url.startswith("https://exports.example.com/data/v1/download/")


@pytest.mark.minutes
async def test_no_token_reaches_the_log(
    tmp_path: Path, sample_catalogue: Path, http: aiohttp.ClientSession
) -> None:
    with server_process(
        tmp_path,
        *("--catalogue", str(sample_catalogue), "--log-level", "debug"),
        env={"EXPORTD_HTTP__LISTEN": "127.0.0.1:0", "EXPORTD_HTTP__SIGNING_KEYS": KEY},
    ) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub: Any = ExportServiceStub(channel)
            job = await rpc.export(stub, "positions")
            url = (
                (await stub.GetDownloadUrls(pb.GetDownloadUrlsRequest(job_id=job.job_id)))
                .urls[0]
                .url
            )
        assert (await fetch(http, url)).status == 200
        assert (await fetch(http, url + "x")).status == 404
        assert (await fetch(http, url, "POST")).status == 405
        before, token, name = url.rsplit("/", 2)
        assert (await fetch(http, f"{before}/{token[:-1]}/{name}")).status == 403
        host, port = base_of(url).removeprefix("http://").split(":")
        for wrong in (
            f"GET /{token} HTTP/9.9\r\n\r\n",
            f"NONSENSE {token}\r\n\r\n",
            f"GET /{token} HTTP/1.1\r\nHost: x\r\nX: {token}{'y' * 9000}\r\n\r\n",
            f"GET /{token}{'z' * 9000} HTTP/1.1\r\nHost: x\r\n\r\n",
        ):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(wrong.encode())
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            writer.close()
            await writer.wait_closed()
            assert head.split()[1] == b"400"
            assert b"aiohttp" not in head
            assert json.loads(body) == {"reason": "BAD_REQUEST", "message": "bad request"}
        assert server.terminate() == 0
        text = server.log.read_text()
    assert '"path": "/v1/download/{token}/{name}"' in text
    assert token not in text
    assert token[-30:] not in text
    assert KEY not in text


async def test_the_client_and_its_command_give_the_urls(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    async with serving(tmp_path, GateSource(5, wide=True)) as server:
        job = await rpc.export(server.stub, "gated", max_part_rows=2 * BATCH_ROWS)
        async with AsyncClient(server.address) as client:
            urls = await (await client.job(job.job_id)).download_urls(
                lifetime=timedelta(minutes=5)
            )
        assert [url.part for url in urls.parts] == [0, 1, 2]
        for url in urls.parts:
            body = (await fetch(http, url.url)).body
            assert (len(body), hashlib.sha256(body).digest()) == (url.size, url.sha256)
            assert url.url not in repr(urls)
            left = url.expire_time - datetime.now(UTC)
            assert timedelta(minutes=4) < left <= timedelta(minutes=5)
        assert urls.joined is not None

        def blocking() -> None:
            with Client(server.address) as client:
                (one,) = client.job(job.job_id).download_urls(part=1).parts
                assert (one.part, one.sha256) == (1, urls.parts[1].sha256)

        await asyncio.to_thread(blocking)

        async def command(*arguments: str) -> str:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "exportd.cli", "--server", server.address),
                *("urls", job.job_id, *arguments),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            out, err = await process.communicate()
            assert process.returncode == 0, err
            return out.decode()

        lines = (await command()).splitlines()
        assert len(lines) == 3
        bodies = [(await fetch(http, line)).body for line in lines]
        assert [len(body) for body in bodies] == [url.size for url in urls.parts]
        (joined,) = (await command("--joined")).splitlines()
        assert crc32c((await fetch(http, joined)).body) == urls.joined.crc32c
        (one,) = (await command("--part", "2", "--lifetime", "10m")).splitlines()
        assert (await fetch(http, one)).body == bodies[2]
        told = json.loads(await command("--json"))
        assert [url["part_index"] for url in told["urls"]] == [0, 1, 2]


async def test_the_client_pages_through_the_urls_by_itself() -> None:
    with scripted(parts=[ScriptedPart(b"x")] * 3) as server:
        with Client(server.address) as client:
            blocking = client.job(JOB).download_urls(lifetime=timedelta(hours=2))
        async with AsyncClient(server.address) as other:
            awaited = await (await other.job(JOB)).download_urls()
        for urls in (blocking, awaited):
            assert [url.part for url in urls.parts] == [0, 1, 2]
            assert [url.url[-2:] for url in urls.parts] == ["/0", "/1", "/2"]
            assert urls.joined is not None
            assert urls.joined.part is None
        asked = [r for r in server.requests if isinstance(r, pb.GetDownloadUrlsRequest)]
        assert [r.lifetime.seconds for r in asked] == [7200] * 3 + [0] * 3


@pytest.fixture
def fleet(postgres_url: str, tmp_path: Path, sample_catalogue: Path) -> Iterator[Processes]:
    with processes(postgres_url, tmp_path, sample_catalogue) as fleet:
        fleet.environment["EXPORTD_HTTP__LISTEN"] = "127.0.0.1:0"
        yield fleet


@pytest.mark.minutes
async def test_a_fleet_needs_a_key_and_then_accepts_each_others_urls(
    fleet: Processes, http: aiohttp.ClientSession
) -> None:
    refused = fleet.command("serve", "--no-workers", "--listen", "127.0.0.1:0")
    assert refused.returncode == 2
    assert "http.signing_keys" in refused.stderr.splitlines()[-1]
    assert "Traceback" not in refused.stderr
    fleet.environment["EXPORTD_HTTP__SIGNING_KEYS"] = KEY
    here, there = fleet.api(), fleet.api()
    fleet.worker()
    urls: list[pb.DownloadUrl] = []
    for member in (here, there):
        async with fleet.calling(member) as stub:
            if not urls:
                job = await rpc.export(stub, "positions")
            request = pb.GetDownloadUrlsRequest(job_id=job.job_id)
            urls.append((await stub.GetDownloadUrls(request)).urls[0])
    one, other = urls
    crossed = one.url.replace(base_of(one.url), base_of(other.url))
    assert base_of(one.url) != base_of(other.url)
    assert crc32c((await fetch(http, crossed)).body) == one.crc32c
    # Deleted by one, gone at the other.
    async with fleet.calling(here) as stub:
        await stub.DeleteJob(pb.DeleteJobRequest(job_id=job.job_id))
    assert (await fetch(http, other.url)).status == 410
    # No key is made on the side.
    assert not (fleet.directory / "data/download-url.key").exists()


def on_s3(options: S3Options, **more: Any) -> dict[str, Any]:
    """The settings that lead there."""
    keys = {
        "access_key_id": options.access_key_id,
        "secret_access_key": options.secret_access_key,
    }
    return {
        "url": f"s3://{options.bucket}/{options.prefix}",
        "s3": {
            "endpoint_url": options.endpoint_url,
            "region": options.region,
            "path_style": options.path_style,
            **keys,
            **more,
        },
    }


async def test_a_url_of_s3_works_without_credentials_and_says_what_a_browser_needs(
    tmp_path: Path, http: aiohttp.ClientSession, s3_options: S3Options
) -> None:
    options = settings(tmp_path, store=on_s3(s3_options))
    async with serve(options, catalogue_of(gated=small())) as server:
        fields = {"compression": job_pb2.COMPRESSION_GZIP}
        job = await rpc.export(server.stub, "gated", max_part_rows=BATCH_ROWS, **fields)
        urls = await urls_of(server, job.job_id)
        # Nothing of ours is there to join several.
        assert server.running.http_port is None
        assert not urls.HasField("joined")
        assert len(urls.urls) == 3
        for url in urls.urls:
            assert url.url.startswith(f"{s3_options.endpoint_url}/")
            assert not url.requires_access_token
            answer = await fetch(http, url.url)
            assert answer.status == 200
            assert hashlib.sha256(answer.body).digest() == url.sha256
            assert answer.headers["Content-Type"] == url.content_type == "application/gzip"
            told = answer.headers["Content-Disposition"]
            assert told == f'attachment; filename="{url.file_name}"'
            assert "Content-Encoding" not in answer.headers
            some = await fetch(http, url.url, Range="bytes=5-14")
            assert (some.status, some.body) == (206, answer.body[5:15])
        one = urls.urls[0].url
        # It is for this object and for reading.
        assert (
            await fetch(http, one.replace("000000-000000", "000000-000001"))
        ).status == 403
        assert (await fetch(http, one, "DELETE")).status == 403
        assert (await fetch(http, one.partition("?")[0])).status == 403
        await server.stub.DeleteJob(pb.DeleteJobRequest(job_id=job.job_id))
        async with asyncio.timeout(ENOUGH):
            while (await fetch(http, one)).status != 404:
                await asyncio.sleep(0.05)


async def test_a_url_of_s3_dies_when_it_said_and_never_outlives_the_output(
    tmp_path: Path, http: aiohttp.ClientSession, s3_options: S3Options
) -> None:
    options = settings(tmp_path, store=on_s3(s3_options))
    async with serve(options, catalogue_of(gated=small())) as server:
        job = await rpc.export(server.stub, "gated", ttl=Duration(seconds=60))
        whole = (await urls_of(server, job.job_id)).joined
        assert whole.expire_time.ToNanoseconds() <= job.expire_time.ToNanoseconds()
        assert whole.expire_time.seconds >= job.expire_time.seconds - 3
        # A single part is the whole file, under the whole file's name.
        assert whole.file_name == job.manifest.file_name
        brief = (await urls_of(server, job.job_id, lifetime=Duration(seconds=4))).urls[0]
        assert (await fetch(http, brief.url)).status == 200
        async with asyncio.timeout(ENOUGH):
            while (await fetch(http, brief.url)).status == 200:
                await asyncio.sleep(0.1)
        assert datetime.now(UTC).timestamp() >= brief.expire_time.seconds
        assert (await fetch(http, brief.url)).status == 403


async def test_with_an_http_port_parts_on_s3_are_joined_by_it(
    tmp_path: Path, http: aiohttp.ClientSession, s3_options: S3Options
) -> None:
    async with serving(tmp_path, small(), store=on_s3(s3_options)) as server:
        job = await rpc.export(server.stub, "gated", max_part_rows=BATCH_ROWS)
        urls = await urls_of(server, job.job_id)
        assert urls.urls[0].url.startswith(f"{s3_options.endpoint_url}/")
        joined = await fetch(http, urls.joined.url)
        assert crc32c(joined.body) == job.manifest.crc32c
        some = await fetch(http, urls.joined.url, Range="bytes=8000-19999")
        assert some.body == joined.body[8000:20000]


async def test_urls_of_s3_name_it_as_callers_reach_it(
    tmp_path: Path, s3_options: S3Options
) -> None:
    public = {"public_endpoint_url": "https://s3.example.com"}
    options = settings(tmp_path, store=on_s3(s3_options, **public))
    async with serve(options, catalogue_of(gated=small())) as server:
        job = await rpc.export(server.stub, "gated")
        url = (await urls_of(server, job.job_id)).urls[0].url
        assert url.startswith(f"https://s3.example.com/{s3_options.bucket}/")


async def test_a_url_does_not_claim_to_outlive_the_credentials_that_sign_it(
    tmp_path: Path, s3_options: S3Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    expires = datetime.now(UTC).replace(microsecond=0) + timedelta(minutes=40)

    async def credentials(_: web.Request) -> web.Response:
        return web.json_response(
            {
                "AccessKeyId": s3_options.access_key_id,
                "SecretAccessKey": s3_options.secret_access_key,
                "Token": "temporary",
                "Expiration": f"{expires:%Y-%m-%dT%H:%M:%SZ}",
            }
        )

    app = web.Application()
    app.router.add_get("/credentials", credentials)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
            monkeypatch.setenv(name, str(tmp_path / "none"))
        monkeypatch.setenv(
            "AWS_CONTAINER_CREDENTIALS_FULL_URI", f"http://127.0.0.1:{port}/credentials"
        )
        options = replace(s3_options, access_key_id=None, secret_access_key=None)
        store = S3Store(options)
        prefix = JobPrefix("acme", "01890a5d-ac96-774b-bcce-b302099a8057")
        key = OutputKey(prefix, OutputKind.OUTPUT, 0, 0, 1)

        async def sign(lifetime: timedelta) -> SignedUrl | None:
            return await store.signed_url(
                key, lifetime=lifetime, content_type="a/b", content_disposition="inline"
            )

        long = await sign(timedelta(hours=10))
        assert long is not None
        assert expires - timedelta(seconds=2) <= long.expire_time <= expires
        assert "X-Amz-Security-Token=temporary" in long.url
        short = await sign(timedelta(minutes=5))
        assert short is not None
        assert short.expire_time < datetime.now(UTC) + timedelta(minutes=5, seconds=1)
        assert await sign(timedelta(milliseconds=900)) is None
        await store.close()
    finally:
        await runner.cleanup()
