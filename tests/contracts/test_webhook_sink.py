"""The webhook sink, against real receivers on loopback."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import ssl
import tracemalloc
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpcore
import pytest
from crc32c import crc32c
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError
from standardwebhooks import Webhook
from standardwebhooks.webhooks import WebhookVerificationError

from exportd_server.encoders.base import Compression, Format, OutputFormat
from exportd_server.errors import ConfigurationError, DeliveryFailed, StoreFailed
from exportd_server.platform.egress import GuardedBackend, system_resolver
from exportd_server.sinks.base import (
    BadSinkRequest,
    Delivery,
    Link,
    Sink,
    SinkPlan,
    SinkType,
    Takes,
)
from exportd_server.sinks.webhook import WebhookConnection, WebhookRequest, WebhookType
from exportd_server.sinks.webhook.payload import MOST_PARTS
from tests.support.receiver import (
    Receiver,
    Script,
    certificates,
    drip,
    hang,
    raw,
    reply,
    reset,
)
from tests.support.sinks import (
    JOB_ID,
    BytesContent,
    a_part,
    an_export,
    deliver_part,
    deliver_whole,
)
from tests.support.waits import ENOUGH

SECRET, OTHER, THIRD = (
    f"whsec_{base64.b64encode(bytes([n]) * 32).decode()}" for n in range(3)
)
EXPORT = an_export()
DATA = b"id,name\n1,one\n2,two\n"
LOOPBACK: dict[str, Any] = {"allow_http": True, "allow_private": ["127.0.0.0/8"]}


def connection(**fields: Any) -> WebhookConnection:
    return WebhookConnection.model_validate(LOOPBACK | fields)


def request_to(url: str, **fields: Any) -> WebhookRequest:
    return WebhookRequest.model_validate({"url": url, "secret": SECRET} | fields)


@asynccontextmanager
async def opened(
    config: WebhookConnection | None = None, kind: WebhookType | None = None
) -> AsyncIterator[Sink[WebhookRequest]]:
    sink = await (kind or WebhookType()).open(config or connection())
    try:
        yield sink
    finally:
        await sink.close()


def refused(fields: dict[str, Any], config: WebhookConnection | None = None) -> str:
    """The field and text of what check says."""
    with pytest.raises(BadSinkRequest) as told:
        WebhookType().check(WebhookRequest.model_validate(fields), config, EXPORT)
    return f"{told.value.field}: {told.value.description}"


class TestTheSeam:
    def test_it_is_a_sink_type(self) -> None:
        def told(kind: SinkType[WebhookRequest, WebhookConnection]) -> tuple[str, bool]:
            return kind.name, kind.needs_connection

        assert told(WebhookType()) == ("webhook", False)

    def test_its_defaults_are_those_of_standard_webhooks(self) -> None:
        defaults = WebhookType.defaults
        minute, hour = 60.0, 3600.0
        hours = (n * hour for n in (2, 5, 10, 14, 20, 24))
        pauses = (5.0, 5 * minute, 30 * minute, *hours)
        assert defaults.retry.schedule == pauses
        assert defaults.retry.max_attempts == len(pauses) + 1
        assert defaults.timeout == 30
        assert defaults.disable_after == 5 * 86_400

    def test_a_mode_says_what_is_taken_and_the_endpoint_tells_no_secret(self) -> None:
        kind = WebhookType()
        url = "HTTPS://Hooks.Example:443/a/b?token=hidden"
        plan = kind.check(request_to(url), None, EXPORT)
        assert plan == SinkPlan(Takes.WHOLE, "https://hooks.example/#d860b9a2bde8")
        plan = kind.check(request_to(url, mode="PUSH_PARTS"), None, EXPORT)
        assert plan.takes is Takes.PARTS

    @pytest.mark.parametrize("model", [WebhookRequest, WebhookConnection])
    def test_unknown_fields_are_refused_without_repeating_them(
        self, model: type[WebhookRequest | WebhookConnection]
    ) -> None:
        with pytest.raises(ValidationError) as told:
            model.model_validate({"tokn": "hunter2"})
        assert "hunter2" not in str(told.value)


class TestNotify:
    async def test_a_completion_is_posted_and_its_signature_verifies(self) -> None:
        parts = (a_part(DATA, rows=2), a_part(b"3,three\n", sequence=1))
        export = replace(EXPORT, labels={"team": "Büro"})
        delivery = deliver_whole(export, *parts)
        async with Receiver(reply(202)).listen() as receiver, opened() as sink:
            request = request_to(receiver.url + "?a=b%20c")
            assert await sink.deliver(request, delivery) == "HTTP 202"
        (got,) = receiver.requests
        assert got.line == "POST /hook?a=b%20c HTTP/1.1"
        assert got.header("host") == f"127.0.0.1:{receiver.port}"
        assert got.header("content-type") == "application/json"
        assert got.header("webhook-id") == delivery.delivery_id
        assert got.header("x-exportd-job-id") == JOB_ID
        event = Webhook(SECRET).verify(got.body, got.webhook_headers())
        assert event["type"] == "export.completed"
        sent = datetime.fromisoformat(event["timestamp"])
        assert abs(datetime.now(UTC) - sent) < timedelta(minutes=1)
        assert event["data"] == {
            "job_id": JOB_ID,
            "tenant": "default",
            "dataset": "orders",
            "generation": 1,
            "labels": {"team": "Büro"},
            "format": "CSV",
            "content_type": "text/csv",
            "content_encoding": "",
            "joinable": True,
            "rows": 3,
            "bytes": len(DATA) + 8,
            "dropped": 0,
            "columns": [
                {"name": "id", "kind": "INTEGER", "type": "int64", "nullable": False},
                {"name": "name", "kind": "STRING", "type": "string", "nullable": True},
            ],
            "parts_total": 2,
            "parts_omitted": 0,
            "parts": [
                {
                    "file_name": part.file_name,
                    "rows": part.rows,
                    "bytes": part.bytes,
                    "prefix_bytes": 0,
                    "suffix_bytes": 0,
                    "crc32c": f"{part.crc32c:08x}",
                    "sha256": part.sha256.hex(),
                }
                for part in parts
            ],
        }

    async def test_links_stand_at_their_parts(self) -> None:
        part = a_part(DATA)
        expires = datetime(2026, 1, 2, tzinfo=UTC)
        url = "https://files.example/x?signature=y"

        async def links() -> Sequence[Link]:
            return [Link(part.file_name, url, expires, part.bytes, part.sha256)]

        delivery = replace(deliver_whole(EXPORT, part), links=links)
        async with Receiver().listen() as receiver, opened() as sink:
            await sink.deliver(request_to(receiver.url), delivery)
        (told,) = json.loads(receiver.requests[0].body)["data"]["parts"]
        assert told["url"] == url
        assert told["url_expire_time"] == "2026-01-02T00:00:00.000000Z"

    async def test_links_that_cannot_be_made_are_the_services_failure(self) -> None:
        async def links() -> Sequence[Link]:
            raise StoreFailed

        delivery = replace(deliver_whole(EXPORT, a_part(DATA)), links=links)
        async with Receiver().listen() as receiver, opened() as sink:
            with pytest.raises(StoreFailed):
                await sink.deliver(request_to(receiver.url), delivery)
            assert receiver.connections == 0

    async def test_very_many_parts_are_counted_and_the_rest_said_to_be_left_out(
        self,
    ) -> None:
        part = a_part(DATA)
        parts = [replace(part, sequence=n) for n in range(MOST_PARTS + 44)]
        delivery = replace(deliver_whole(EXPORT, *parts), dropped=3)
        async with Receiver().listen() as receiver, opened() as sink:
            await sink.deliver(request_to(receiver.url), delivery)
        data = json.loads(receiver.requests[0].body)["data"]
        assert (data["parts_total"], data["parts_omitted"]) == (len(parts), 44)
        assert len(data["parts"]) == MOST_PARTS
        assert data["rows"] == len(parts)
        assert data["dropped"] == 3

    async def test_the_keys_of_a_connection_all_sign_and_those_of_others_fail(self) -> None:
        config = connection(signing_keys=[SECRET, OTHER])
        async with Receiver().listen() as receiver, opened(config) as sink:
            request = WebhookRequest(url=receiver.url)
            await sink.deliver(request, deliver_whole(EXPORT))
            # The caller's own key signs instead of them.
            own = request_to(receiver.url, secret=THIRD)
            await sink.deliver(own, deliver_whole(EXPORT))
        rotated, own_key = receiver.requests
        for key in (SECRET, OTHER):
            Webhook(key).verify(rotated.body, rotated.webhook_headers())
            with pytest.raises(WebhookVerificationError):
                Webhook(key).verify(own_key.body, own_key.webhook_headers())
        Webhook(THIRD).verify(own_key.body, own_key.webhook_headers())
        with pytest.raises(WebhookVerificationError):
            Webhook(THIRD).verify(rotated.body, rotated.webhook_headers())

    async def test_another_attempt_has_the_same_id_and_a_fresh_timestamp(self) -> None:
        @dataclass
        class Turned:
            moment: datetime

            def now(self) -> datetime:
                return self.moment

        clock = Turned(datetime.now(UTC) - timedelta(seconds=90))
        kind = WebhookType(clock=clock)
        delivery = deliver_whole(EXPORT, a_part(DATA))
        async with (
            Receiver(reply(503), reply(200)).listen() as receiver,
            opened(kind=kind) as sink,
        ):
            request = request_to(receiver.url)
            with pytest.raises(DeliveryFailed):
                await sink.deliver(request, delivery)
            clock.moment += timedelta(seconds=60)
            await sink.deliver(request, replace(delivery, attempt=2))
        first, second = receiver.requests
        assert first.header("webhook-id") == second.header("webhook-id")
        times = [int(got.header("webhook-timestamp")) for got in (first, second)]
        assert times[1] - times[0] == 60
        for got in (first, second):
            Webhook(SECRET).verify(got.body, got.webhook_headers())


class TestPush:
    async def test_a_part_arrives_byte_for_byte_with_what_is_told_of_it(self) -> None:
        part = a_part(DATA, sequence=7, rows=2)
        delivery = deliver_part(EXPORT, part)
        async with Receiver(reply(200)).listen() as receiver, opened() as sink:
            request = request_to(receiver.url, mode="PUSH_PARTS")
            assert await sink.deliver(request, delivery) == "HTTP 200"
        (got,) = receiver.requests
        assert got.body == DATA
        told = {name: text for name, text in got.headers if name.startswith("x-exportd-")}
        assert told == {
            "x-exportd-job-id": JOB_ID,
            "x-exportd-dataset": "orders",
            "x-exportd-format": "CSV",
            "x-exportd-generation": "1",
            "x-exportd-part": "0-7",
            "x-exportd-file-name": part.file_name,
            "x-exportd-rows": "2",
            "x-exportd-bytes": str(len(DATA)),
            "x-exportd-sha256": hashlib.sha256(DATA).hexdigest(),
            "x-exportd-crc32c": f"{crc32c(DATA):08x}",
        }
        assert got.header("content-type") == "text/csv"
        # Text verifies with the reference verifier, too.
        Webhook(SECRET).verify(got.body, got.webhook_headers(), json_parse=False)

    async def test_a_compressed_part_is_told_as_the_file_it_is(self) -> None:
        export = an_export(OutputFormat(Format.JSONL, Compression.GZIP))
        body = bytes(range(256)) * 3
        async with Receiver().listen() as receiver, opened() as sink:
            request = request_to(receiver.url, mode="PUSH_PARTS")
            await sink.deliver(request, deliver_part(export, a_part(body)))
        (got,) = receiver.requests
        assert got.header("content-type") == "application/gzip"
        assert "content-encoding" not in dict(got.headers)
        signed = f"{got.header('webhook-id')}.{got.header('webhook-timestamp')}.".encode()
        key = base64.b64decode(SECRET.removeprefix("whsec_"))
        mac = base64.b64encode(_hmac(key, signed + got.body)).decode()
        assert got.header("webhook-signature") == f"v1,{mac}"

    async def test_an_empty_part_is_an_empty_body(self) -> None:
        async with Receiver().listen() as receiver, opened() as sink:
            request = request_to(receiver.url, mode="PUSH_PARTS")
            await sink.deliver(request, deliver_part(EXPORT, a_part(b"", rows=0)))
        assert receiver.requests[0].size == 0
        assert receiver.requests[0].header("content-length") == "0"

    async def test_the_completion_follows_as_a_notification_does(self) -> None:
        async with Receiver().listen() as receiver, opened() as sink:
            headers = {"Content-Type": "application/x-orders"}
            request = request_to(receiver.url, mode="PUSH_PARTS", headers=headers)
            part = a_part(DATA)
            await sink.deliver(request, deliver_part(EXPORT, part))
            await sink.deliver(request, deliver_whole(EXPORT, part))
            await sink.deliver(
                request.model_copy(update={"mode": "NOTIFY"}), deliver_whole(EXPORT, part)
            )
        pushed, completed, notified = receiver.requests
        assert pushed.header("content-type") == "application/x-orders"
        assert completed.header("content-type") == "application/json"
        assert json.loads(completed.body)["data"]["parts_total"] == 1
        assert notified.header("content-type") == "application/x-orders"

    @pytest.mark.minutes
    async def test_a_part_of_200_mib_is_sent_within_8_mib(self) -> None:
        content = Generated(200 * 2**20)
        part = replace(
            a_part(b""), bytes=content.size, sha256=content.sha256(), content=content
        )
        async with Receiver(keep=False).listen() as receiver, opened() as sink:
            request = request_to(receiver.url, mode="PUSH_PARTS")
            # Connect first: what stays for good is not what is measured.
            await sink.deliver(request, deliver_part(EXPORT, a_part(DATA)))
            tracemalloc.start()
            try:
                await sink.deliver(request, deliver_part(EXPORT, part))
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
        got = receiver.requests[1]
        assert (got.size, got.sha256) == (part.bytes, part.sha256)
        # 0.8 MiB when it was written.
        assert peak < 8 * 2**20, peak

    async def test_a_part_that_does_not_match_its_checksum_is_not_sent(self) -> None:
        part = replace(a_part(DATA), content=BytesContent(DATA.replace(b"1", b"2")))
        await self._not_sent(part.content, part)

    async def test_a_part_of_another_length_is_not_sent(self) -> None:
        for data in (DATA + b"3", DATA[:-1], b""):
            await self._not_sent(BytesContent(data), a_part(DATA))

    async def _not_sent(self, content: Any, part: Any) -> None:
        async with Receiver().listen() as receiver, opened() as sink:
            request = request_to(receiver.url, mode="PUSH_PARTS")
            with pytest.raises(DeliveryFailed, match="checksum") as failed:
                await sink.deliver(
                    request, deliver_part(EXPORT, replace(part, content=content))
                )
            assert failed.value.retryable
            assert receiver.connections == 0

    async def test_a_part_that_changes_between_signing_and_sending_never_ends(self) -> None:
        content = Changing(DATA, DATA.replace(b"two", b"TWO"))
        part = replace(a_part(DATA), content=content)
        async with Receiver().listen() as receiver, opened() as sink:
            request = request_to(receiver.url, mode="PUSH_PARTS")
            with pytest.raises(DeliveryFailed, match="checksum"):
                await sink.deliver(request, deliver_part(EXPORT, part))
            await asyncio.wait_for(receiver.cut_short.wait(), ENOUGH)
            assert receiver.requests == []

    async def test_a_part_that_is_gone_or_a_store_that_fails_is_left_to_the_caller(
        self,
    ) -> None:
        async with Receiver().listen() as receiver, opened() as sink:
            request = request_to(receiver.url, mode="PUSH_PARTS")
            gone = a_part(DATA, content=BytesContent(DATA, gone=True))
            with pytest.raises(KeyError):
                await sink.deliver(request, deliver_part(EXPORT, gone))
            failing = a_part(DATA, content=BytesContent(DATA, fails=StoreFailed()))
            with pytest.raises(StoreFailed):
                await sink.deliver(request, deliver_part(EXPORT, failing))
            # While the body is under way, after it was signed.
            late = a_part(DATA, content=Changing(DATA, StoreFailed()))
            with pytest.raises(StoreFailed):
                await sink.deliver(request, deliver_part(EXPORT, late))
            assert receiver.requests == []
            await sink.deliver(request, deliver_part(EXPORT, a_part(DATA)))

    async def test_a_cancelled_delivery_stops_and_the_sink_goes_on(self) -> None:
        async with Receiver(hang, reply()).listen() as receiver, opened() as sink:
            request = request_to(receiver.url, mode="PUSH_PARTS")
            content = BytesContent(DATA)
            delivery = deliver_part(EXPORT, a_part(DATA, content=content))
            task = asyncio.create_task(sink.deliver(request, delivery))
            await asyncio.wait_for(receiver.arrived.wait(), ENOUGH)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: receiver.open == 0)
            await sink.deliver(request, delivery)


def _hmac(key: bytes, data: bytes) -> bytes:
    # By RFC 2104's definition, to compare with.
    block = key.ljust(64, b"\0")
    inner = hashlib.sha256(bytes(x ^ 0x36 for x in block) + data).digest()
    return hashlib.sha256(bytes(x ^ 0x5C for x in block) + inner).digest()


async def until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(ENOUGH):
        while not done():
            await asyncio.sleep(0.005)


class Generated(BytesContent):
    """Bytes that are made as they are read."""

    BLOCK = bytes(range(256)) * 256

    def __init__(self, size: int) -> None:
        super().__init__(b"")
        self.size = size

    def sha256(self) -> bytes:
        digest = hashlib.sha256()
        for _ in range(self.size // len(self.BLOCK)):
            digest.update(self.BLOCK)
        return digest.digest()

    @asynccontextmanager
    async def open(self, offset: int = 0) -> AsyncIterator[Any]:
        yield GeneratedReader(self.size)


class GeneratedReader:
    def __init__(self, size: int) -> None:
        self.left = size

    async def readinto(self, buffer: memoryview, /) -> int:
        block = Generated.BLOCK
        count = min(len(buffer), len(block), self.left)
        buffer[:count] = block[:count]
        self.left -= count
        return count

    async def close(self) -> None:
        pass


class Changing(BytesContent):
    """Another content, or an error half-way, when it is read again."""

    def __init__(self, data: bytes, then: bytes | Exception) -> None:
        super().__init__(data)
        self.then = then

    @asynccontextmanager
    async def open(self, offset: int = 0) -> AsyncIterator[Any]:
        async with super().open(offset) as reader:
            yield reader
        if isinstance(self.then, bytes):
            self.data = self.then
        else:
            self.fails = self.then


# What a receiver does, and what becomes of the delivery: "delivered", "again", "refused"
# or "gone"; and a pause in seconds.
TABLE: list[tuple[str, Script, str, int | None]] = [
    *((f"{status}", reply(status), "delivered", None) for status in (200, 201, 202, 204)),
    *(
        (f"{status}", reply(status), "again", None)
        for status in (408, 425, 429, 500, 501, 502, 503, 504, 507, 599)
    ),
    *(
        (f"{status}", reply(status, [("location", "/elsewhere")]), "refused", None)
        for status in (300, 301, 302, 303, 304, 307, 308)
    ),
    *(
        (f"{status}", reply(status), "refused", None)
        for status in (400, 401, 402, 403, 404, 405, 409, 411, 413, 415, 418, 422, 451)
    ),
    ("600", reply(600), "refused", None),
    # It was not asked to change the protocol.
    ("101", raw(b"HTTP/1.1 101 Switching\r\nupgrade: x\r\n\r\n"), "again", None),
    ("410", reply(410), "gone", None),
    (
        "100 first",
        raw(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 OK\r\n\r\n"),
        "delivered",
        None,
    ),
    ("429 in seconds", reply(429, [("Retry-After", "120")]), "again", 120),
    ("503 in seconds", reply(503, [("retry-after", "7")]), "again", 7),
    ("503 too far", reply(503, [("retry-after", "1" * 9)]), "again", 86_400),
    ("503 unreadable", reply(503, [("retry-after", "soon")]), "again", None),
    ("410 in seconds", reply(410, [("retry-after", "7")]), "gone", None),
    ("reset", reset, "again", None),
    ("closed", raw(b"", close=True), "again", None),
    ("half a head", raw(b"HTTP/1.1 200 OK\r\nx", close=True), "again", None),
    ("no http", raw(b"SSH-2.0-OpenSSH_9.9\r\n", close=True), "again", None),
    ("no status", raw(b"HTTP/1.1 2x0 OK\r\n\r\n", close=True), "again", None),
    ("endless head", drip(b"HTTP/1.1 200 OK\r\nx: ", b"x" * 65_536, 0), "again", None),
    ("no answer", hang, "again", None),
    ("slow head", drip(b"HTTP/1.1 200 OK\r\nx: "), "again", None),
    ("endless 1xx", drip(b"", b"HTTP/1.1 102 Wait\r\n\r\n"), "again", None),
    # The status says all; what follows is left.
    (
        "slow body",
        drip(b"HTTP/1.1 200 OK\r\ncontent-length: 9999\r\n\r\n"),
        "delivered",
        None,
    ),
    (
        "endless body",
        drip(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65_536, 0),
        "delivered",
        None,
    ),
    (
        "broken body",
        raw(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nx", close=True),
        "delivered",
        None,
    ),
    (
        "broken chunks",
        raw(b"HTTP/1.1 500 X\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", close=True),
        "again",
        None,
    ),
]


WAITS = {"no answer", "slow head", "endless 1xx"}


class Hasty(httpcore.AsyncNetworkStream):
    """Takes the head, breaks on the body, and has an answer all the same."""

    taken = False

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if self.taken:
            raise httpcore.WriteError
        self.taken = True

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"

    async def aclose(self) -> None:
        pass

    def get_extra_info(self, info: str) -> object:
        return None


async def outcome(delivering: Coroutine[Any, Any, str]) -> tuple[str, int | None, str]:
    try:
        return "delivered", None, await delivering
    except DeliveryFailed as failed:
        pause = failed.retry_after
        kind = "gone" if failed.gone else "again" if failed.retryable else "refused"
        return kind, None if pause is None else round(pause.total_seconds()), str(failed)


class TestAnswers:
    @pytest.fixture(autouse=True)
    def impatient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("exportd_server.sinks.webhook.client.ANSWER_SECONDS", 0.2)

    @pytest.mark.parametrize("mode", ["NOTIFY", "PUSH_PARTS"])
    @pytest.mark.parametrize(
        ("name", "answer", "kind", "pause"),
        [pytest.param(*row, id=row[0]) for row in TABLE],
    )
    async def test_an_answer_has_its_outcome(
        self, name: str, answer: Script, kind: str, pause: int | None, mode: str
    ) -> None:
        part = a_part(DATA)
        delivery = (
            deliver_part(EXPORT, part)
            if mode == "PUSH_PARTS"
            else deliver_whole(EXPORT, part)
        )
        # Only who is to be waited for in vain is given little time.
        config = connection(read_timeout=0.3 if name in WAITS else 30)
        async with Receiver(answer).listen() as receiver, opened(config) as sink:
            request = request_to(receiver.url + "?token=hidden", mode=mode)
            async with asyncio.timeout(ENOUGH):
                told = await outcome(sink.deliver(request, delivery))
            assert told[:2] == (kind, pause), told
            for secret in ("hidden", "127.0.0.1", str(receiver.port), "elsewhere", SECRET):
                assert secret not in told[2]
            assert receiver.connections == 1

    async def test_of_a_long_answer_only_the_beginning_is_read(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("exportd_server.sinks.webhook.client.ANSWER_SECONDS", 600)
        answer = drip(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65_536, 0)
        async with Receiver(answer).listen() as receiver, opened() as sink:
            async with asyncio.timeout(ENOUGH):
                await sink.deliver(request_to(receiver.url), deliver_whole(EXPORT))
            await until(lambda: receiver.open == 0)

    async def test_a_date_in_retry_after_is_a_pause_until_then(self) -> None:
        then = (datetime.now(UTC) + timedelta(seconds=90)).strftime(
            "%a, %d %b %Y %H:%M:%S GMT"
        )
        answer = reply(503, [("retry-after", then)])
        async with Receiver(answer).listen() as receiver, opened() as sink:
            kind, pause, _ = await outcome(
                sink.deliver(request_to(receiver.url), deliver_whole(EXPORT))
            )
        assert kind == "again"
        assert pause is not None
        assert 85 <= pause <= 90

    async def test_a_refused_connection_is_tried_again(self) -> None:
        async with Receiver().listen() as receiver:
            url = receiver.url
        async with opened() as sink:
            told = await outcome(sink.deliver(request_to(url), deliver_whole(EXPORT)))
        assert told[0] == "again"
        assert "could not be connected to" in told[2]

    async def test_a_name_that_is_not_found_is_tried_again(self) -> None:
        async def fails(host: str, port: int) -> Sequence[str]:
            raise OSError(-2, "Name or service not known")

        async with opened(kind=WebhookType(resolve=fails)) as sink:
            told = await outcome(
                sink.deliver(request_to("https://no.example/"), deliver_whole(EXPORT))
            )
        assert told[0] == "again"

    async def test_a_lookup_or_handshake_that_hangs_is_tried_again(self) -> None:
        async def never(host: str, port: int) -> Sequence[str]:
            await asyncio.Event().wait()
            return ()

        config = connection(connect_timeout=0.1)
        async with opened(config, WebhookType(resolve=never)) as sink:
            told = await outcome(
                sink.deliver(request_to("https://slow.example/"), deliver_whole(EXPORT))
            )
            assert told[0] == "again"
            assert "in time" in told[2]
            # It takes the handshake for the beginning of a request.
            async with Receiver().listen() as receiver:
                url = receiver.url.replace("http:", "https:")
                told = await outcome(sink.deliver(request_to(url), deliver_whole(EXPORT)))
        assert told[0] == "again"
        assert "in time" in told[2]

    async def test_a_receiver_that_stops_reading_is_tried_again(self) -> None:
        content = Generated(64 * 2**20)
        part = replace(
            a_part(b""), bytes=content.size, sha256=content.sha256(), content=content
        )
        config = connection(read_timeout=0.3)
        async with Receiver(hang, early=True).listen() as receiver, opened(config) as sink:
            request = request_to(receiver.url, mode="PUSH_PARTS")
            told = await outcome(sink.deliver(request, deliver_part(EXPORT, part)))
        assert told[0] == "again"
        assert "took nothing" in told[2]

    async def test_a_receiver_that_refuses_before_it_has_read_all_is_heard(self) -> None:
        async def refuse(writer: asyncio.StreamWriter) -> None:
            await reply(413)(writer)
            # The end of its side only, as servers do that linger for the answer's sake.
            writer.write_eof()
            await asyncio.Event().wait()

        part = a_part(DATA * 10)
        async with Receiver(refuse, early=True).listen() as receiver, opened() as sink:
            request = request_to(receiver.url, mode="PUSH_PARTS")
            told = await outcome(sink.deliver(request, deliver_part(EXPORT, part)))
        assert told[::2] == ("refused", "the receiver answered HTTP 413")

    async def test_a_success_before_the_whole_request_was_sent_is_none(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def connect(*_args: Any, **_kwargs: Any) -> Hasty:
            return Hasty()

        monkeypatch.setattr(GuardedBackend, "connect_tcp", connect)
        async with opened() as sink:
            request = request_to("http://127.0.0.1/", mode="PUSH_PARTS")
            told = await outcome(sink.deliver(request, deliver_part(EXPORT, a_part(DATA))))
        expected = "the receiver answered before it had the whole request"
        assert told[::2] == ("again", expected)

    async def test_a_redirect_is_not_followed_and_the_message_says_so(self) -> None:
        async with Receiver().listen() as inside, opened() as sink:
            answer = reply(307, [("location", inside.url)])
            async with Receiver(answer).listen() as receiver:
                told = await outcome(
                    sink.deliver(request_to(receiver.url), deliver_whole(EXPORT))
                )
        assert told[0] == "refused"
        assert "redirects are not followed" in told[2]
        assert inside.connections == 0

    async def test_connections_are_used_again_and_cookies_are_not_kept(self) -> None:
        answer = reply(200, [("set-cookie", "session=1; Path=/")], b"thanks")
        async with Receiver(answer).listen() as receiver:
            async with opened() as sink:
                for _ in range(3):
                    await sink.deliver(request_to(receiver.url), deliver_whole(EXPORT))
                assert receiver.connections == 1
                assert receiver.open == 1
            await until(lambda: receiver.open == 0)
        names = {name for got in receiver.requests for name, _ in got.headers}
        assert "cookie" not in names

    async def test_a_slow_receiver_holds_up_no_other(self) -> None:
        async with (
            Receiver(hang).listen() as slow,
            Receiver().listen() as quick,
            opened() as sink,
        ):
            waiting = [
                asyncio.create_task(
                    sink.deliver(request_to(slow.url), deliver_whole(EXPORT))
                )
                for _ in range(100)
            ]
            await until(lambda: slow.connections == len(waiting))
            await sink.deliver(request_to(quick.url), deliver_whole(EXPORT))
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def test_no_proxy_of_the_environment_is_used(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with Receiver().listen() as proxy, Receiver().listen() as receiver:
            for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
                monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
            async with opened() as sink:
                await sink.deliver(request_to(receiver.url), deliver_whole(EXPORT))
        assert (proxy.connections, receiver.connections) == (0, 1)

    async def test_nothing_secret_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        async with Receiver(reply(500)).listen() as receiver, opened() as sink:
            request = request_to(
                f"{receiver.url}?token=hidden", headers={"authorization": "Bearer canary"}
            )
            await outcome(sink.deliver(request, deliver_whole(EXPORT)))
        assert receiver.requests[0].header("authorization") == "Bearer canary"
        for secret in ("hidden", "canary", SECRET.removeprefix("whsec_")):
            assert secret not in caplog.text
            assert secret not in repr(request)


async def loopback(host: str, port: int) -> Sequence[str]:
    return ("127.0.0.1",)


class TestTls:
    async def test_a_receiver_is_known_by_its_name_and_not_its_address(
        self, tmp_path: Path
    ) -> None:
        ca_file, server = certificates(tmp_path, "good.test")
        names: list[str | None] = []
        server.sni_callback = lambda _ssl, name, _ctx: names.append(name)
        config = connection(ca_file=str(ca_file), allow_http=False)
        kind = WebhookType(resolve=loopback)
        async with Receiver().listen(tls=server) as receiver, opened(config, kind) as sink:
            url = f"https://good.test:{receiver.port}/hook"
            await sink.probe(request_to(url), EXPORT)
            await sink.deliver(request_to(url), deliver_whole(EXPORT))
            (got,) = receiver.requests
            assert got.header("host") == f"good.test:{receiver.port}"
            assert names == ["good.test", "good.test"]
            # The same server, by a name that its certificate does not have.
            told = await outcome(
                sink.deliver(
                    request_to(url.replace("good", "other")), deliver_whole(EXPORT)
                )
            )
            assert told[0] == "again"
            assert "certificate that is not trusted" in told[2]
            assert len(receiver.requests) == 1

    async def test_a_certificate_of_an_unknown_authority_is_not_trusted(
        self, tmp_path: Path
    ) -> None:
        _, server = certificates(tmp_path, "127.0.0.1")
        async with Receiver().listen(tls=server) as receiver, opened() as sink:
            url = f"https://127.0.0.1:{receiver.port}/"
            for attempt in (
                sink.deliver(request_to(url), deliver_whole(EXPORT)),
                _as_text(sink.probe(request_to(url), EXPORT)),
            ):
                told = await outcome(attempt)
                assert told[0] == "again"
                assert "certificate that is not trusted" in told[2]
            assert receiver.requests == []

    async def test_a_receiver_without_tls_is_told_so(self) -> None:
        async def plain(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            writer.close()

        server = await asyncio.start_server(plain, "127.0.0.1", 0)
        async with server, opened() as sink:
            url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
            told = await outcome(sink.deliver(request_to(url), deliver_whole(EXPORT)))
        assert told[::2] == ("again", "the receiver could not agree on TLS")

    async def test_a_receiver_that_wants_a_certificate_is_tried_again(
        self, tmp_path: Path
    ) -> None:
        ca_file, server = certificates(tmp_path, "127.0.0.1")
        server.load_verify_locations(ca_file)
        server.verify_mode = ssl.CERT_REQUIRED
        config = connection(ca_file=str(ca_file))
        async with Receiver().listen(tls=server) as receiver, opened(config) as sink:
            url = f"https://127.0.0.1:{receiver.port}/"
            # With TLS 1.3 the refusal comes after the client's side of the handshake.
            told = await outcome(sink.deliver(request_to(url), deliver_whole(EXPORT)))
        assert told[0] == "again"

    @pytest.mark.parametrize("text", [None, "no certificate"])
    async def test_an_authority_file_that_cannot_be_read_is_the_operators_to_mend(
        self, tmp_path: Path, text: str | None
    ) -> None:
        path = tmp_path / "ca.pem"
        if text is not None:
            path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigurationError, match=r"ca\.pem"):
            await WebhookType().open(connection(ca_file=str(path)))


async def _as_text(probing: Coroutine[Any, Any, None]) -> str:
    await probing
    return ""


class TestProbe:
    async def test_it_connects_and_sends_no_request(self) -> None:
        async with Receiver().listen() as receiver, opened() as sink:
            await sink.probe(request_to(receiver.url), EXPORT)
            await until(lambda: receiver.connections == 1 and receiver.open == 0)
            assert receiver.requests == []

    async def test_a_receiver_that_is_down_is_its_own_failure(self) -> None:
        async with Receiver().listen() as receiver:
            url = receiver.url
        async with opened() as sink:
            with pytest.raises(DeliveryFailed):
                await sink.probe(request_to(url), EXPORT)

    async def test_a_name_that_leads_inside_is_the_callers_to_mend(self) -> None:
        async with Receiver().listen() as receiver:
            config = WebhookConnection(allow_http=True)
            async with opened(config, WebhookType(resolve=loopback)) as sink:
                url = f"http://inside.test:{receiver.port}/"
                with pytest.raises(BadSinkRequest) as told:
                    await sink.probe(request_to(url), EXPORT)
            assert told.value.field == "url"
            assert "127" not in str(told.value)
            assert receiver.connections == 0


# Each is refused by check, or else leads nowhere when it is dialled. PORT is that of a
# listener on loopback, which counts who comes.
SSRF = [
    "http://127.0.0.1:PORT/",
    "http://127.0.0.1.:PORT/",
    "http://127.1:PORT/",
    "http://127.0.1:PORT/",
    "http://2130706433:PORT/",
    "http://0x7f000001:PORT/",
    "http://0x7f.1:PORT/",
    "http://0X7F.0.0.0x1:PORT/",
    "http://0177.0.0.1:PORT/",
    "http://017700000001:PORT/",
    "http://127.0.0.01:PORT/",
    "http://0.0.0.0:PORT/",
    "http://0:PORT/",
    "http://localhost:PORT/",
    "http://LOCALHOST:PORT/",
    "http://localhost.:PORT/",
    "http://ip6-localhost:PORT/",
    "http://a.localhost:PORT/",
    "http://[::1]:PORT/",
    "http://[::]:PORT/",
    "http://[0:0:0:0:0:0:0:1]:PORT/",
    "http://[::ffff:127.0.0.1]:PORT/",
    "http://[::ffff:7f00:1]:PORT/",
    "http://[::127.0.0.1]:PORT/",
    "http://[64:ff9b::7f00:1]:PORT/",
    "http://[64:ff9b:1::7f00:1]:PORT/",
    "http://[2002:7f00:1::]:PORT/",
    "http://[2001:0:7f00:1::]:PORT/",
    "http://[fe80::1%25lo]:PORT/",
    "http://[fe80::1%lo]:PORT/",
    "http://[::1%25lo]:PORT/",
    "http://[fec0::1]:PORT/",
    "http://[127.0.0.1]:PORT/",
    "http://[::1:PORT/",
    "http://::1:PORT/",
    "http://①②⑦.⓪.⓪.①:PORT/",
    "http://127。0。0。1:PORT/",
    "http://١٢٧.0.0.1:PORT/",
    "http://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ:PORT/",
    "http://%31%32%37.0.0.1:PORT/",
    "http://127%2e0%2e0%2e1:PORT/",
    "http://localhos%74:PORT/",
    "http://good.example@127.0.0.1:PORT/",
    "http://good.example:80@127.0.0.1:PORT/",
    "http://good.example%40127.0.0.1:PORT/",
    "http://@127.0.0.1:PORT/",
    "http://127.0.0.1:PORT\\@good.example/",
    "http://good.example\\@127.0.0.1:PORT/",
    "http:\\\\127.0.0.1:PORT\\",
    "http:/127.0.0.1:PORT/",
    "http:127.0.0.1:PORT/",
    "http:///127.0.0.1:PORT/",
    "//127.0.0.1:PORT/",
    "127.0.0.1:PORT/",
    " http://127.0.0.1:PORT/",
    "http://127.0.0.1:PORT/\r\nHost: good.example",
    "http://127.0.0.1\t:PORT/",
    "http://127.0.0.1#@good.example:PORT/",
    "http://good.example#@127.0.0.1:PORT/",
    "http://127.0.0.1:PORT:80/",
    "http://127.0.0.1:0PORT/",
    "http://127.0.0.1:+PORT/",
    "http://127.0.0.1: PORT/",
    "http://127.0.0.1:0/",
    "http://127.0.0.1:65536/",
    "http://127.0.0.1:4294967376/",
    "http://127.0.0.1:/",
    "http://:PORT/",
    "ftp://127.0.0.1:PORT/",
    "file:///etc/passwd",
    "gopher://127.0.0.1:PORT/_",
    "unix:///run/any.sock",
    "javascript://127.0.0.1:PORT/",
    "http+unix://127.0.0.1:PORT/",
    "http://10.0.0.1:PORT/",
    "http://100.64.0.1:PORT/",
    "http://169.254.169.254/latest/meta-data/",
    "http://168.63.129.16/",
    "http://100.100.100.200/",
    "http://[fd00:ec2::254]/",
    "http://224.0.0.1:PORT/",
    "http://255.255.255.255:PORT/",
    "http://198.18.0.1:PORT/",
    "http://240.0.0.1:PORT/",
    "http://rebind.test:PORT/",
    "http://mapped.test:PORT/",
    "http://nat64.test:PORT/",
    "http://zone.test:PORT/",
    "http://all.test:PORT/",
]
RESOLVED = {
    "rebind.test": ["127.0.0.1"],
    "mapped.test": ["::ffff:127.0.0.1"],
    "nat64.test": ["64:ff9b::7f00:1"],
    "zone.test": ["::1%lo", "fe80::1%lo"],
    "all.test": ["::1", "127.0.0.1", "0.0.0.0", "::ffff:0:7f00:1"],  # noqa: S104
}


async def resolved(host: str, port: int) -> Sequence[str]:
    """The names above, and others as the machine has them."""
    return RESOLVED.get(host) or await system_resolver(host, port)


@asynccontextmanager
async def inside() -> AsyncIterator[tuple[Receiver, Receiver]]:
    """Receivers on loopback by IPv4 and, where the machine has it, IPv6."""
    others = Receiver()
    async with AsyncExitStack() as stack:
        receiver = await stack.enter_async_context(Receiver().listen())
        with suppress(OSError):
            await stack.enter_async_context(others.listen("::1", port=receiver.port))
        yield receiver, others


def url_fault(
    request: WebhookRequest, config: WebhookConnection, kind: WebhookType
) -> bool:
    """Whether check finds fault with the URL."""
    try:
        kind.check(request, config, EXPORT)
    except BadSinkRequest as told:
        return told.field == "url"
    return False


class TestEgress:
    @pytest.mark.parametrize("url", SSRF)
    async def test_no_url_leads_inside(self, url: str) -> None:
        kind = WebhookType(resolve=resolved)
        config = WebhookConnection(allow_http=True, connect_timeout=2)
        async with inside() as (receiver, others):
            url = url.replace("PORT", str(receiver.port))
            request = request_to(url)
            checked = url_fault(request, config, kind)
            async with opened(config, kind) as sink:
                with pytest.raises(DeliveryFailed) as failed:
                    await sink.deliver(request, deliver_whole(EXPORT))
                with pytest.raises((BadSinkRequest, DeliveryFailed)):
                    await sink.probe(request, EXPORT)
            # What check lets through is a name: it leads inside, or nowhere.
            text = str(failed.value)
            assert checked or "no public address" in text or "connected to" in text
            assert receiver.connections + others.connections == 0

    async def test_the_listeners_count_who_comes(self) -> None:
        # So that the counts of 0 above mean something.
        kind = WebhookType(resolve=resolved)
        config = connection(allow_private=["127.0.0.0/8", "::1/128"])
        async with inside() as (receiver, others), opened(config, kind) as sink:
            for host in ("127.0.0.1", "localhost", "rebind.test"):
                url = f"http://{host}:{receiver.port}/"
                await sink.deliver(request_to(url), deliver_whole(EXPORT))
            assert receiver.connections + others.connections == 3
            if others.port:
                await sink.deliver(request_to(others.url), deliver_whole(EXPORT))
                assert others.requests[-1].header("host") == f"[::1]:{others.port}"

    async def test_a_name_that_flips_once_it_was_checked_does_not_get_through(self) -> None:
        answers = iter((["127.0.0.2"], ["127.0.0.1"]))

        async def flips(host: str, port: int) -> Sequence[str]:
            return next(answers)

        config = connection(allow_private=["127.0.0.2/32"])
        async with (
            Receiver().listen("127.0.0.1") as inside,
            Receiver().listen("127.0.0.2", port=inside.port) as good,
            opened(config, WebhookType(resolve=flips)) as sink,
        ):
            request = request_to(f"http://flip.test:{inside.port}/")
            await sink.probe(request, EXPORT)
            told = await outcome(sink.deliver(request, deliver_whole(EXPORT)))
            await until(lambda: good.connections == 1)
        assert told[0] == "refused"
        assert inside.connections == 0


class TestCheck:
    @pytest.mark.parametrize(
        ("url", "told"),
        [
            ("", "is missing"),
            ("ftp://a.example/", "begin it with https://"),
            ("http://a.example/", "use https://"),
            ("https://", "has no host"),
            ("https://me:pass@a.example/", "credentials in headers"),
            ("https://a.example/#x", "fragment"),
            ("https://a.example:0/", "1 to 65535"),
            ("https://a.example:99999/", "1 to 65535"),
            ("https://a.example/" + "x" * 2048, "at most 2048"),
            ("https://a.example/ä", "percent-encode"),
            ("https://bücher.example/", "xn--"),
            ("https://a.example/%zz", "percent-encoded"),
            ("https://a.example/<x>", "percent-encoded"),
            ("https://a.example/a/../b", "path it comes to"),
            ("https://a.example/a/%2e%2E/b", "path it comes to"),
            ("https://a.example/..%2fb", "path it comes to"),
            ("https://a..example/", "no name"),
            ("https://-a.example/", "no name"),
            ("https://a.example./", "no dot at the end"),
            ("https://127.1/", "four decimal"),
            ("https://2130706433/", "four decimal"),
            ("https://0X7f.0.0.0x1/", "four decimal"),
            ("https://a.example.0x/", "four decimal"),
            ("https://127.0.0.01/", "four decimal"),
            ("https://10.0.0.1/", "an address that is private"),
            ("https://[::1]/", "an address that is loopback"),
            ("https://[fe80::1%25eth0]/", "without an IPv6 address|zone"),
        ],
    )
    def test_a_bad_url_is_refused_with_the_mend(self, url: str, told: str) -> None:
        text = refused({"url": url, "secret": SECRET})
        assert text.startswith("url: ")
        assert any(choice in text for choice in told.split("|"))
        assert "pass" not in text

    @pytest.mark.parametrize(
        ("url", "endpoint"),
        [
            ("https://a.example", "https://a.example/"),
            ("https://a.example:8443/x", "https://a.example:8443/#b3d1db318671"),
            ("https://xn--bcher-kva.example/", "https://xn--bcher-kva.example/"),
            ("https://1.1.1.1/x", "https://1.1.1.1/#b3d1db318671"),
            (
                "https://[2606:4700:4700::1111]:8443/",
                "https://[2606:4700:4700::1111]:8443/",
            ),
            (
                "https://_dmarc.a-b.example/?q=a%20b&c",
                "https://_dmarc.a-b.example/#d622e3a42bec",
            ),
        ],
    )
    def test_a_good_url_is_taken(self, url: str, endpoint: str) -> None:
        plan = WebhookType().check(request_to(url), None, EXPORT)
        assert plan.endpoint == endpoint

    @pytest.mark.parametrize(
        ("name", "value", "told"),
        [
            ("x-a", "1\r\nx-b: 2", "line break"),
            ("x-a", "1\nx-b: 2", "line break"),
            ("x-a", "1\0", "control character"),
            ("x-a", " 1", "whitespace around"),
            ("x-a", "世界", "Latin-1"),
            ("x-a", "1" * 4097, "at most 4096"),
            ("x a", "1", "no header name"),
            ("x-a:", "1", "no header name"),
            ("", "1", "no header name"),
            ("x-a\r\nx-b", "1", "no header name"),
            ("ä", "1", "no header name"),
            ("Host", "a", "leave it out"),
            ("content-length", "1", "leave it out"),
            ("Transfer-Encoding", "chunked", "leave it out"),
            ("content-encoding", "gzip", "leave it out"),
            ("Connection", "close", "leave it out"),
            ("TE", "trailers", "leave it out"),
            ("Trailer", "x", "leave it out"),
            ("Upgrade", "h2c", "leave it out"),
            ("expect", "100-continue", "leave it out"),
            ("Keep-Alive", "1", "leave it out"),
            ("Proxy-Authorization", "1", "leave it out"),
            ("Webhook-Id", "1", "leave it out"),
            ("webhook-anything", "1", "leave it out"),
            ("X-Exportd-Rows", "1", "leave it out"),
            ("content-type", "text", "media type"),
        ],
    )
    def test_a_header_that_would_break_the_request_is_refused(
        self, name: str, value: str, told: str
    ) -> None:
        text = refused(
            {"url": "https://a.example/", "secret": SECRET, "headers": {name: value}}
        )
        assert text.startswith(f"headers[{name!r}]: ")
        assert told in text
        assert len(value) < 3 or value not in text.removeprefix(f"headers[{name!r}]")

    def test_too_many_or_too_long_headers_and_doubles_are_refused(self) -> None:
        good = {"url": "https://a.example/", "secret": SECRET}
        many = {f"x-{n}": "" for n in range(33)}
        assert refused(good | {"headers": many}).startswith("headers: are too many")
        long = {f"x-{n}": "1" * 4096 for n in range(4)}
        assert refused(good | {"headers": long}).startswith("headers: are too long")
        doubled = {"x-a": "1", "X-A": "2"}
        assert refused(good | {"headers": doubled}).startswith("headers['X-A']: is there")

    def test_a_missing_or_bad_secret_is_refused_and_not_repeated(self) -> None:
        url = {"url": "https://a.example/"}
        assert refused(url).startswith("secret: is missing")
        assert refused(url | {"secret": ""}).startswith("secret: is missing")
        assert refused(url, connection()).startswith("secret: is missing")
        text = refused(url | {"secret": "whsec_hunter2"})
        assert text.startswith("secret: is no signing key")
        assert "hunter2" not in text
        config = connection(signing_keys=[SECRET])
        WebhookType().check(WebhookRequest(**url), config, EXPORT)

    def test_a_request_stays_with_the_url_of_its_connection(self) -> None:
        kind = WebhookType()
        config = connection(url="https://a.example/hooks", signing_keys=[SECRET])
        for url, endpoint in (
            ("", "https://a.example/#435632a419dd"),
            ("https://A.example:443/hooks", "https://a.example/#435632a419dd"),
            ("https://a.example/hooks/b?c", "https://a.example/#d2fc52e632ec"),
        ):
            plan = kind.check(WebhookRequest(url=url), config, EXPORT)
            assert plan.endpoint == endpoint
        for url in (
            "https://a.example/",
            "https://a.example/hooks2",
            "https://a.example:8443/hooks",
            "http://a.example/hooks",
            "https://b.example/hooks",
            "https://a.example.evil.example/hooks",
        ):
            assert "is not the connection's" in refused({"url": url}, config)
        fixed = connection(url="https://a.example/?key=1", signing_keys=[SECRET])
        kind.check(WebhookRequest(), fixed, EXPORT)
        assert "url" in refused({"url": "https://a.example/?key=2"}, fixed)
        assert "url" in refused({"url": "https://a.example/x?key=1"}, fixed)

    async def test_the_connections_headers_are_sent_and_cannot_be_replaced(self) -> None:
        async with Receiver().listen() as receiver:
            config = connection(
                url=receiver.url, headers={"Authorization": "x"}, signing_keys=[SECRET]
            )
            text = refused({"headers": {"AUTHORIZATION": "y"}}, config)
            assert text == (
                "headers['AUTHORIZATION']: is set by the connection; leave it out"
            )
            async with opened(config) as sink:
                request = WebhookRequest(headers={"x-own": SecretStr("z")})
                await sink.deliver(request, deliver_whole(EXPORT))
        (got,) = receiver.requests
        assert (got.header("authorization"), got.header("x-own")) == ("x", "z")

    async def test_a_connection_that_was_narrowed_fails_what_it_had_accepted(self) -> None:
        async with Receiver().listen() as receiver:
            async with opened(WebhookConnection()) as sink:
                told = await outcome(
                    sink.deliver(request_to(receiver.url), deliver_whole(EXPORT))
                )
            assert receiver.connections == 0
        assert told[0] == "refused"
        assert "does not take the request any more" in told[2]

    @pytest.mark.parametrize(
        ("fields", "told"),
        [
            ({"url": "https://me:hunter2@a.example"}, "credentials in headers"),
            ({"url": "http://a.example", "allow_http": False}, "use https://"),
            ({"url": "https://10.0.0.1/"}, "private"),
            ({"headers": {"authorization": "hunter2"}}, "headers need url"),
            ({"url": "https://a.example", "headers": {"host": "hunter2"}}, "leave it out"),
            ({"signing_keys": [SECRET, "hunter2"]}, "signing_keys[1] is no signing key"),
            ({"signing_keys": [SECRET] * 5}, "at most 4"),
            ({"allow_private": ["10.0.0.1/8"]}, "IPv4 or IPv6 network"),
            ({"read_timeout": 0}, "greater than 0"),
        ],
    )
    def test_a_connection_that_cannot_work_is_refused_without_repeating_secrets(
        self, fields: dict[str, Any], told: str
    ) -> None:
        with pytest.raises(ValidationError) as refusal:
            connection(**fields)
        assert told in str(refusal.value)
        assert "hunter2" not in str(refusal.value)


# What breaks headers, among enough that does not: more than half is accepted.
TAME = st.text("aZ09-_.=;,/?&()", max_size=8)
WILD = st.one_of(
    st.text(
        st.sampled_from("aZ09-_.:;, \t\r\n\0\x7f\x1f/\\%?#&='\"()<>@[]é世\x85\u2028"),
        max_size=8,
    ),
    st.text(st.characters(codec="latin-1"), max_size=8),
    st.sampled_from(["x-a", "X-A", "content-type", "text/csv", "webhook-id", "%0d%0a"]),
)
SELDOM = st.integers(0, 4).map(lambda n: n == 4)
PIECES = SELDOM.flatmap(lambda wild: WILD if wild else TAME)
NAMES = SELDOM.flatmap(
    lambda wild: WILD if wild else st.builds("x-{}".format, st.text("ab-_", max_size=5))
)


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def target(loop: asyncio.Runner) -> Iterator[tuple[Receiver, Sink[WebhookRequest]]]:
    receiver = Receiver()
    listening, sending = receiver.listen(), opened()
    loop.run(listening.__aenter__())
    sink = loop.run(sending.__aenter__())
    yield receiver, sink
    loop.run(sending.__aexit__(None, None, None))
    loop.run(listening.__aexit__(None, None, None))


@settings(max_examples=300, deadline=None)
@example(path="", headers={"x-a": "é\x85ÿ", "content-type": "a/b; c=d"})
@example(path="x?a=%0d%0ab", headers={"user-agent": "me", "accept": "a"})
@given(path=PIECES, headers=st.dictionaries(NAMES, PIECES, max_size=3))
def test_no_url_and_no_header_that_is_accepted_changes_another(
    loop: asyncio.Runner,
    target: tuple[Receiver, Sink[WebhookRequest]],
    path: str,
    headers: dict[str, str],
) -> None:
    receiver, sink = target
    url = f"{receiver.url}/{path}"
    request = request_to(url, headers=headers)
    try:
        WebhookType().check(request, connection(), EXPORT)
    except BadSinkRequest:
        return
    delivery = deliver_whole(EXPORT, a_part(DATA))
    loop.run(_delivered(sink, request, delivery))
    (got,) = receiver.requests
    receiver.requests.clear()
    assert got.line == f"POST {url.partition(str(receiver.port))[2]} HTTP/1.1"
    assert json.loads(got.body)["data"]["job_id"] == JOB_ID
    ours = {
        "host": f"127.0.0.1:{receiver.port}",
        "user-agent": "exportd",
        "accept": "*/*",
        "content-type": "application/json",
        "content-length": str(len(got.body)),
        "x-exportd-job-id": JOB_ID,
        "x-exportd-dataset": "orders",
        "x-exportd-format": "CSV",
        "x-exportd-generation": "1",
        "webhook-id": delivery.delivery_id,
    }
    signed = got.webhook_headers()
    del signed["webhook-id"]
    assert set(signed) == {"webhook-timestamp", "webhook-signature"}
    expected = ours | {name.lower(): value for name, value in headers.items()} | signed
    assert sorted(got.headers) == sorted(expected.items())


async def _delivered(
    sink: Sink[WebhookRequest], request: WebhookRequest, delivery: Delivery
) -> None:
    async with asyncio.timeout(ENOUGH):
        await sink.deliver(request, delivery)
