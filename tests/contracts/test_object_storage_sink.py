"""What is the object storage sink's own: what becomes of a delivery when calls fail, what
is said then, and what it costs. Every test talks to a real service, most through a proxy
that spoils calls."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from botocore.retries import standard
from pydantic import ValidationError

from exportd_server.encoders.base import Compression, Format, OutputFormat
from exportd_server.errors import ConfigurationError, DeliveryFailed, ErrorReason
from exportd_server.sinks import object_storage
from exportd_server.sinks.base import BadSinkRequest, Part, Takes
from exportd_server.sinks.object_storage import (
    ObjectStorageConnection,
    ObjectStorageRequest,
    ObjectStorageSink,
    ObjectStorageSinkType,
)
from exportd_server.store.s3_client import S3Options
from tests.support.s3_proxy import Call, Fault, S3Proxy, error, s3_proxy
from tests.support.seaweed import BUCKET, RawS3, SeaweedServer
from tests.support.sink_cases import MANIFEST, connection_of
from tests.support.sinks import (
    StalledContent,
    a_part,
    an_export,
    deliver_part,
    deliver_whole,
)
from tests.support.waits import ENOUGH

MIB = 1 << 20
PUT = "other"
"""What the proxy calls a PUT of a whole object."""
SMALL = b"id,name\n1,one\n"
LARGE = SMALL * (12 * MIB // len(SMALL))
PIECE = 5 * MIB
TWO_PIECES = LARGE[: PIECE + 1000]
SINK = ObjectStorageSinkType()
REQUEST = ObjectStorageRequest(prefix="daily")
SIZES = pytest.mark.parametrize("data", [SMALL, TWO_PIECES], ids=["small", "large"])

Plan = Callable[[Call], Fault | None]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repetitions follow at once."""
    monkeypatch.setattr(standard.ExponentialBackoff, "delay_amount", lambda *_: 0.01)


SILENCE = "no answer in time"


@pytest.fixture
def proxy(seaweed: SeaweedServer) -> Iterator[S3Proxy]:
    with s3_proxy(seaweed.endpoint) as proxy:
        yield proxy


@pytest.fixture
def raw(seaweed: SeaweedServer, s3_options: S3Options) -> RawS3:
    return RawS3(seaweed.raw, s3_options)


@pytest.fixture
def connection(
    request: pytest.FixtureRequest, s3_options: S3Options, proxy: S3Proxy
) -> ObjectStorageConnection:
    """A fresh place behind the proxy, with few repetitions, and little patience where an
    answer is to be waited for in vain."""
    patience = 1.5 if SILENCE in request.node.name else 60.0
    return connection_of(
        s3_options, endpoint_url=proxy.endpoint, attempts=2, read_timeout=patience
    )


@pytest.fixture
async def sink(connection: ObjectStorageConnection) -> AsyncIterator[ObjectStorageSink]:
    sink = await SINK.open(connection)
    yield sink
    await sink.close()


async def deliver(sink: ObjectStorageSink, part: Part, *, attempt: int = 1) -> str:
    return await sink.deliver(REQUEST, deliver_part(an_export(), part, attempt=attempt))


def on(operation: str, fault: Fault, *, first: int = 0, times: int | None = None) -> Plan:
    """Spoil calls of one kind: `times` of them from the one with index `first` on."""

    def plan(call: Call) -> Fault | None:
        late = call.index - first
        meant = call.operation == operation and late >= 0
        return fault if meant and (times is None or late < times) else None

    return plan


def untouched(_: Call) -> Fault | None:
    return None


def content(seaweed: SeaweedServer, options: S3Options, name: str) -> dict[str, Any]:
    found = seaweed.raw.get_object(Bucket=BUCKET, Key=f"{options.root}{name}")
    return {"type": found["ContentType"], "data": found["Body"].read()}


# --- whatever call fails

FAULTS = {
    "500": error(500, "InternalError"),
    "500 after it was done": error(500, "InternalError", forward=True),
    "503": error(503, "SlowDown"),
    "403": error(403, "AccessDenied"),
    "200 with an error": error(200, "InternalError"),
    "200 with an error after it was done": error(200, "InternalError", forward=True),
    SILENCE: Fault(stall=True),
    "cut": Fault(cut=True),
    "cut after it was done": Fault(forward=True, cut=True),
}


@pytest.mark.minutes
@pytest.mark.parametrize("times", [1, None], ids=["once", "always"])
@pytest.mark.parametrize(
    ("operation", "fault"),
    [
        (operation, fault)
        for operation in ("put", "create", "part", "complete")
        for fault in FAULTS
        # S3 answers a PUT when it has been done.
        if operation != "put" or not fault.startswith("200")
    ],
)
async def test_whichever_call_fails_the_object_is_whole_or_not_there(
    sink: ObjectStorageSink,
    proxy: S3Proxy,
    raw: RawS3,
    seaweed: SeaweedServer,
    s3_options: S3Options,
    fault: str,
    operation: str,
    times: int | None,
) -> None:
    data = SMALL if operation == "put" else TWO_PIECES
    part = a_part(data)
    name = f"daily/{part.file_name}"
    proxy.plan = on(PUT if operation == "put" else operation, FAULTS[fault], times=times)
    told: DeliveryFailed | None = None
    try:
        await deliver(sink, part)
    except DeliveryFailed as failure:
        told = failure
    proxy.release()
    proxy.plan = untouched
    found = raw.objects()
    if found:
        assert found == [name]
        assert content(seaweed, s3_options, name)["data"] == data
    if told is None:
        assert found
    else:
        assert told.retryable == (fault != "403")
        assert BUCKET in told.message
        assert s3_options.prefix not in told.message
        assert "so it is" not in told.message, "what S3 says is not for callers"
        assert not found or "after it was done" in fault
    if times is None:
        done_all_the_same = operation == "complete" and "after it was done" in fault
        assert (told is None) == done_all_the_same
    elif fault != "403":
        assert told is None, "one failure is repeated"
    if operation != "create":
        # A creation that was not heard of leaves an upload that has no name.
        assert raw.uploads() == []
    await deliver(sink, part, attempt=2)
    assert raw.objects() == [name]
    assert content(seaweed, s3_options, name)["data"] == data
    if told is not None:
        assert raw.uploads() == []


@pytest.mark.parametrize("number", [0, 1, 2])
async def test_one_piece_that_fails_ends_all_of_it(
    sink: ObjectStorageSink, proxy: S3Proxy, raw: RawS3, number: int
) -> None:
    proxy.plan = on("part", error(403, "AccessDenied"), first=number, times=1)
    with pytest.raises(DeliveryFailed) as failed:
        await deliver(sink, a_part(LARGE))
    assert not failed.value.retryable
    assert raw.objects() == []
    assert raw.uploads() == []


@SIZES
async def test_bytes_that_change_on_the_way_never_become_an_object(
    sink: ObjectStorageSink, proxy: S3Proxy, raw: RawS3, data: bytes
) -> None:
    proxy.plan = on(
        PUT if data is SMALL else "part", Fault(forward=True, corrupt=True), times=1
    )
    with pytest.raises(DeliveryFailed) as failed:
        await deliver(sink, a_part(data))
    assert raw.objects() == []
    assert raw.uploads() == []
    proxy.plan = untouched
    assert failed.value.retryable
    await deliver(sink, a_part(data))


REFUSALS = {
    (404, "NoSuchBucket"): (False, "there is no such bucket"),
    (403, "AccessDenied"): (False, "denied"),
    (403, "SomethingNew"): (False, "denied"),
    (403, "InvalidAccessKeyId"): (False, "credentials"),
    (403, "SignatureDoesNotMatch"): (False, "credentials"),
    (400, "ExpiredToken"): (False, "expired"),
    (400, "InvalidToken"): (False, "credentials"),
    (400, "AuthorizationHeaderMalformed"): (False, "another region"),
    (501, "NotImplemented"): (False, "uploads"),
    (403, "RequestTimeTooSkewed"): (True, "clocks"),
    (503, "SlowDown"): (True, "fewer requests"),
    (500, "InternalError"): (True, "500 InternalError"),
    (507, "InsufficientStorage"): (True, "no room"),
    (403, "QuotaExceeded"): (True, "no room"),
    (400, "BadDigest"): (True, "400 BadDigest"),
    (404, "NoSuchUpload"): (True, "404 NoSuchUpload"),
    (400, "<script>"): (True, "answered 400"),
}


@pytest.mark.parametrize(("status", "code"), REFUSALS)
@SIZES
async def test_what_a_retry_does_not_mend_is_told_apart(
    sink: ObjectStorageSink, proxy: S3Proxy, data: bytes, status: int, code: str
) -> None:
    retryable, text = REFUSALS[status, code]
    told = code.replace("<", "&lt;").replace(">", "&gt;")
    proxy.plan = on(PUT if data is SMALL else "part", error(status, told))
    with pytest.raises(DeliveryFailed, match=text) as failed:
        await deliver(sink, a_part(data))
    assert failed.value.retryable == retryable
    assert failed.value.message.startswith(f"bucket '{BUCKET}': ")
    assert "script" not in failed.value.message
    wanted = ErrorReason.DELIVERY_FAILED if retryable else ErrorReason.DELIVERY_REFUSED
    assert failed.value.reason is wanted


@SIZES
async def test_a_bucket_in_another_region_is_not_taken_for_a_cut(
    sink: ObjectStorageSink, proxy: S3Proxy, data: bytes
) -> None:
    """The client cannot follow a redirect with the body of a PUT."""
    redirect = replace(
        error(301, "PermanentRedirect"), headers={"x-amz-bucket-region": "eu-west-1"}
    )
    proxy.plan = lambda _: redirect
    with pytest.raises(DeliveryFailed, match="another region") as failed:
        await deliver(sink, a_part(data))
    assert not failed.value.retryable
    with pytest.raises(DeliveryFailed, match="another region"):
        await sink.probe(REQUEST, an_export())


async def test_the_real_service_tells_the_same(
    s3_options: S3Options, seaweed: SeaweedServer
) -> None:
    dead = {"endpoint_url": "http://127.0.0.1:9", "attempts": 1}
    for changed, text, retryable in (
        ({"bucket": "missing"}, "no such bucket", False),
        ({"access_key_id": "nobody"}, "credentials", False),
        ({"secret_access_key": "wrong"}, "credentials", False),
        ({"access_key_id": "reader"}, "denied", False),
        (dead, "cannot be reached", True),
        ({"endpoint_url": seaweed.endpoint.replace("http", "https")}, "TLS|broke", True),
    ):
        sink = await SINK.open(connection_of(s3_options, **changed))
        try:
            for attempt in (
                sink.probe(REQUEST, an_export()),
                deliver(sink, a_part(SMALL)),
                deliver(sink, a_part(LARGE)),
            ):
                with pytest.raises(DeliveryFailed, match=text) as failed:
                    await attempt
                assert failed.value.retryable == retryable, changed
        finally:
            await sink.close()


# --- cancelling


@pytest.mark.parametrize("operation", ["create", "part", "complete"])
async def test_a_delivery_that_is_cancelled_in_a_call_leaves_no_upload(
    sink: ObjectStorageSink, proxy: S3Proxy, raw: RawS3, operation: str
) -> None:
    """Even in the call that begins the upload: it is waited for."""
    loop, called = asyncio.get_running_loop(), asyncio.Event()

    def plan(call: Call) -> Fault | None:
        if call.operation != operation:
            return None
        loop.call_soon_threadsafe(called.set)
        return Fault(forward=True, stall=True)

    proxy.plan = plan
    task = asyncio.create_task(deliver(sink, a_part(LARGE)))
    await called.wait()
    task.cancel()
    if operation == "create":
        await asyncio.sleep(0)
        proxy.release()
    with pytest.raises(asyncio.CancelledError):
        await task
    proxy.release()
    async with asyncio.timeout(ENOUGH):
        while proxy.active:
            await asyncio.sleep(0.005)
    assert raw.uploads() == []
    assert raw.objects() == []


async def test_a_service_that_hangs_holds_up_a_cancelled_delivery_only_a_little(
    sink: ObjectStorageSink,
    proxy: S3Proxy,
    raw: RawS3,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The abort goes on without it."""
    monkeypatch.setattr(object_storage, "_CLEANING_SECONDS", 0.05)
    stalled = StalledContent(LARGE)
    task = asyncio.create_task(deliver(sink, a_part(LARGE, content=stalled)))
    await stalled.reached.wait()
    proxy.plan = lambda _: Fault(forward=True, stall=True)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert stalled.closed
    proxy.release()
    async with asyncio.timeout(ENOUGH):
        while raw.uploads():
            await asyncio.sleep(0.01)
    assert raw.objects() == []


async def test_what_a_killed_process_left_is_aborted_by_the_next_attempt(
    sink: ObjectStorageSink, raw: RawS3, seaweed: SeaweedServer, s3_options: S3Options
) -> None:
    part = a_part(LARGE)
    for name in (part.file_name, f"{part.file_name}.other"):
        seaweed.raw.create_multipart_upload(
            Bucket=BUCKET, Key=f"{s3_options.root}daily/{name}"
        )
    await deliver(sink, part, attempt=2)
    assert raw.uploads() == [f"daily/{part.file_name}.other"]
    assert raw.objects() == [f"daily/{part.file_name}"]


async def test_who_may_not_list_uploads_can_deliver_all_the_same(
    sink: ObjectStorageSink, proxy: S3Proxy, raw: RawS3
) -> None:
    proxy.plan = on("uploads", error(403, "AccessDenied"))
    await deliver(sink, a_part(LARGE), attempt=2)
    assert proxy.count("uploads") == 1
    assert len(raw.objects()) == 1


# --- what is sent


async def test_a_small_part_is_one_call_and_a_large_one_goes_in_pieces(
    sink: ObjectStorageSink, proxy: S3Proxy
) -> None:
    await deliver(sink, a_part(SMALL))
    assert [call.operation for call in proxy.calls] == [PUT]
    await deliver(sink, a_part(LARGE[:PIECE]))
    assert [call.operation for call in proxy.calls] == [PUT, PUT]
    await deliver(sink, a_part(LARGE))
    assert [proxy.count(name) for name in ("create", "part", "complete")] == [1, 3, 1]
    sizes = sorted(len(call.body) for call in proxy.calls if call.operation == "part")
    assert sizes == [len(LARGE) - 2 * PIECE, PIECE, PIECE]
    for call in proxy.calls:
        if call.operation in {PUT, "part"}:
            assert "x-amz-checksum-crc32c" in call.headers
        assert "if-none-match" not in call.headers


@pytest.mark.parametrize("most", [1, 3])
async def test_no_more_pieces_are_under_way_than_the_operator_says(
    connection: ObjectStorageConnection, proxy: S3Proxy, most: int
) -> None:
    reached = asyncio.Event()
    loop = asyncio.get_running_loop()

    def plan(call: Call) -> Fault | None:
        if call.operation == "part":
            if call.index == most - 1:
                loop.call_soon_threadsafe(reached.set)
            return Fault(forward=True, stall=True)
        return None

    proxy.plan = plan
    patient = connection.model_copy(update={"parts_in_flight": most})
    sink = await SINK.open(patient)
    delivery = asyncio.create_task(deliver(sink, a_part(LARGE * 2)))
    await reached.wait()
    proxy.release()
    await delivery
    await sink.close()
    assert proxy.count("part") == 5
    assert proxy.most_at_once["part"] == most


async def test_a_part_of_too_many_pieces_is_refused(
    sink: ObjectStorageSink, proxy: S3Proxy
) -> None:
    part = replace(a_part(SMALL), bytes=PIECE * 10_000 + 1)
    with pytest.raises(DeliveryFailed, match="part_bytes") as failed:
        await deliver(sink, part)
    assert not failed.value.retryable
    assert proxy.calls == []


@pytest.mark.parametrize(
    ("output", "content_type"),
    [
        (OutputFormat(Format.CSV), "text/csv"),
        (OutputFormat(Format.CSV, Compression.GZIP), "application/gzip"),
        (OutputFormat(Format.JSONL, Compression.ZSTD), "application/zstd"),
        (OutputFormat(Format.PARQUET), "application/vnd.apache.parquet"),
    ],
)
@SIZES
async def test_objects_have_the_type_of_what_is_in_them(
    sink: ObjectStorageSink,
    seaweed: SeaweedServer,
    s3_options: S3Options,
    data: bytes,
    output: OutputFormat,
    content_type: str,
) -> None:
    part, export = a_part(data), an_export(output)
    await sink.deliver(REQUEST, deliver_part(export, part))
    receipt = await sink.deliver(REQUEST, deliver_whole(export, part))
    assert receipt == f"s3://{BUCKET}/{s3_options.root}daily/{MANIFEST}"
    found = content(seaweed, s3_options, f"daily/{part.file_name}")
    assert found["type"] == content_type
    manifest = content(seaweed, s3_options, f"daily/{MANIFEST}")
    assert manifest["type"] == "application/json"
    assert json.loads(manifest["data"])["parts"][0]["sha256"] == part.sha256.hex()


async def test_an_object_that_is_there_is_replaced(
    sink: ObjectStorageSink, seaweed: SeaweedServer, s3_options: S3Options
) -> None:
    for data in (SMALL, LARGE, SMALL):
        part = a_part(data)
        await deliver(sink, part)
        found = content(seaweed, s3_options, f"daily/{part.file_name}")
        assert found["data"] == data


async def test_what_was_delivered_stays_when_a_repetition_fails(
    sink: ObjectStorageSink, proxy: S3Proxy, seaweed: SeaweedServer, s3_options: S3Options
) -> None:
    part = a_part(LARGE)
    await deliver(sink, part)
    proxy.plan = on("complete", error(500, "InternalError", forward=True))
    heads = on("head", error(500, "InternalError"), times=2)
    complete = proxy.plan
    proxy.plan = lambda call: complete(call) or heads(call)
    with pytest.raises(DeliveryFailed):
        await deliver(sink, part)
    found = content(seaweed, s3_options, f"daily/{part.file_name}")
    assert found["data"] == LARGE


async def test_a_probe_makes_no_object_and_leaves_no_upload(
    sink: ObjectStorageSink, proxy: S3Proxy, raw: RawS3
) -> None:
    await sink.probe(REQUEST, an_export())
    assert [call.operation for call in proxy.calls] == ["create", "abort"]
    assert raw.objects() + raw.uploads() == []


# --- what may be said


@pytest.mark.parametrize(
    "prefix",
    [
        *(
            "..",
            "a/../b",
            "/a",
            "a/",
            "a//b",
            "a\\b",
            "a\0",
            "a\n",
            "%2e%2e",
            "\u2025",
            " ",
        ),
        *("a" * 129, "/".join("a" * 17), "/".join(["a" * 128] * 5)),
    ],
    ids=ascii,
)
def test_a_prefix_that_is_no_path_is_refused(
    connection: ObjectStorageConnection, prefix: str
) -> None:
    with pytest.raises(BadSinkRequest) as refused:
        SINK.check(ObjectStorageRequest(prefix=prefix), connection, an_export())
    assert refused.value.field == "prefix"


def test_a_prefix_of_plain_names_is_taken(connection: ObjectStorageConnection) -> None:
    for prefix in ("", "a", "a/b-c/2026.01"):
        plan = SINK.check(ObjectStorageRequest(prefix=prefix), connection, an_export())
        assert plan.takes is Takes.PARTS


async def test_without_prefixes_objects_lie_in_the_bucket_itself(
    s3_options: S3Options, seaweed: SeaweedServer
) -> None:
    sink = await SINK.open(connection_of(s3_options, prefix=""))
    job = "01890000-0000-7000-8000-0000000000ff"
    export = an_export(job_id=job)
    receipt = await sink.deliver(ObjectStorageRequest(), deliver_whole(export))
    await sink.close()
    assert receipt == f"s3://{BUCKET}/orders-{job}.manifest.json"
    seaweed.raw.delete_object(Bucket=BUCKET, Key=f"orders-{job}.manifest.json")


SECRET = "canary-d41d8cd9"


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ({"bucket": "No Bucket"}, "is no name of a bucket"),
        ({"prefix": "../other"}, "prefix"),
        ({"prefix": "a" * 256}, "255"),
        ({"part_bytes": 1}, "part_bytes"),
        ({"parts_in_flight": 0}, "parts_in_flight"),
        ({"attempts": 0}, "attempts"),
        ({"access_key_id": None}, "both access_key_id and secret_access_key"),
        ({"ca_file": "/no/such/file"}, "ca_file"),
        ({"call_timeout": 0}, "greater than 0"),
        ({"other": 1}, "other"),
    ],
)
def test_a_connection_that_cannot_work_is_refused_and_tells_no_secret(
    said: dict[str, Any], text: str
) -> None:
    fine = {
        "bucket": "exports",
        "access_key_id": "key",
        "secret_access_key": SECRET,
        "session_token": SECRET,
    }
    connection = ObjectStorageConnection.model_validate(fine)
    assert SECRET not in f"{connection!r} {connection} {connection.options!r}"
    assert connection.options.secret_access_key == SECRET
    with pytest.raises(ValidationError, match=text) as refused:
        ObjectStorageConnection.model_validate(fine | said)
    assert SECRET not in str(refused.value)
    assert "output store" not in str(refused.value)


async def test_an_endpoint_that_is_none_is_told_to_the_operator(
    s3_options: S3Options,
) -> None:
    with pytest.raises(ConfigurationError, match="object_storage"):
        await SINK.open(connection_of(s3_options, endpoint_url="no url"))
    with pytest.raises(ConfigurationError, match="connection"):
        await SINK.open(None)
