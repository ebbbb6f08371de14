"""What is S3's own: how uploads end when calls fail, how reads go on, and what is said
at start. Every test talks to a real service, most through a proxy that spoils calls."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import math
import random
import shutil
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from botocore.retries import standard
from crc32c import crc32c
from structlog.testing import capture_logs

from exportd_server.errors import ConfigurationError, ErrorReason, StoreFailed
from exportd_server.store import s3_read
from exportd_server.store.key import JobPrefix
from exportd_server.store.s3 import S3Store
from exportd_server.store.s3_client import S3Options
from tests.support.s3_proxy import Call, Fault, S3Proxy, error, s3_proxy
from tests.support.seaweed import SECRET, RawS3, SeaweedServer, running_seaweed
from tests.support.store import JOB, drain, jobs, keys, part_key, put, read
from tests.support.waits import ENOUGH

_MIB = 1 << 20
SMALL = b"a part that is smaller than a buffer"
LARGE = random.Random(7).randbytes(12 * _MIB)

Plan = Callable[[Call], Fault | None]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repetitions follow at once."""
    monkeypatch.setattr(standard.ExponentialBackoff, "delay_amount", lambda *_: 0.01)
    monkeypatch.setattr(s3_read, "_FIRST_PAUSE", 0.01)


@pytest.fixture
def proxy(seaweed: SeaweedServer) -> Iterator[S3Proxy]:
    with s3_proxy(seaweed.endpoint) as proxy:
        yield proxy


SILENCE = "no answer in time"


@pytest.fixture
def options(seaweed: SeaweedServer, proxy: S3Proxy) -> S3Options:
    """A fresh place behind the proxy, with few repetitions and small buffers."""
    return seaweed.options(endpoint_url=proxy.endpoint, attempts=2, part_bytes=5 * _MIB)


@pytest.fixture
async def hasty(
    request: pytest.FixtureRequest, options: S3Options
) -> AsyncIterator[S3Store]:
    """The same place, by a store with little patience, where it waits in vain."""
    stalls = not hasattr(request.node, "callspec") or SILENCE in request.node.name
    store = S3Store(replace(options, read_timeout=1.5 if stalls else 60.0))
    yield store
    await store.close()


@pytest.fixture
async def store(options: S3Options) -> AsyncIterator[S3Store]:
    store = S3Store(options)
    yield store
    await store.close()


@pytest.fixture
def raw(seaweed: SeaweedServer, options: S3Options) -> RawS3:
    return RawS3(seaweed.raw, options)


def on(operation: str, fault: Fault, *, first: int = 0, times: int | None = None) -> Plan:
    """Spoil calls of one kind: `times` of them from the one with index `first` on."""

    def plan(call: Call) -> Fault | None:
        late = call.index - first
        meant = call.operation == operation and late >= 0
        return fault if meant and (times is None or late < times) else None

    return plan


# --- writing, whatever call fails

CUT = Fault(cut=True)
CUT_AFTER = Fault(forward=True, cut=True)
FAULTS = {
    "500": error(500, "InternalError"),
    "500 after it was done": error(500, "InternalError", forward=True),
    "503": error(503, "SlowDown"),
    "403": error(403, "AccessDenied"),
    "200 with an error": error(200, "InternalError"),
    "200 with an error after it was done": error(200, "InternalError", forward=True),
    SILENCE: Fault(stall=True),
    "cut": CUT,
    "cut after it was done": CUT_AFTER,
}
WRITING = ("create", "part", "complete")


@pytest.mark.minutes
@pytest.mark.parametrize("times", [1, None], ids=["once", "always"])
@pytest.mark.parametrize("operation", WRITING)
@pytest.mark.parametrize("fault", FAULTS)
async def test_whichever_call_fails_the_part_is_whole_or_nothing_can_be_read(
    hasty: S3Store,
    proxy: S3Proxy,
    raw: RawS3,
    fault: str,
    operation: str,
    times: int | None,
) -> None:
    """And the deletion of the job leaves nothing, neither objects nor uploads."""
    store = hasty
    proxy.plan = on(operation, FAULTS[fault], times=times)
    told: StoreFailed | None = None
    try:
        put(store, part_key(), SMALL)
    except StoreFailed as failure:
        told = failure
    proxy.release()
    proxy.plan = lambda _: None
    if told is None:
        assert await read(store, part_key()) == SMALL
        assert await keys(store) == {part_key()}
    else:
        assert told.reason is ErrorReason.STORE_FAILED
        assert told.retryable
        assert raw.objects() == []
    if times is None:
        done_all_the_same = operation == "complete" and "after it was done" in fault
        assert (told is None) == done_all_the_same
    elif fault != "403":
        assert told is None, "one failure is repeated"
    await store.delete_job(JOB)
    assert raw.objects() == []
    assert raw.uploads() == []


async def test_an_endpoint_that_dies_in_the_middle_fails_the_writer(
    store: S3Store, proxy: S3Proxy, raw: RawS3
) -> None:
    writer = store.create(part_key())
    writer.write(LARGE)
    proxy.plan = lambda _: CUT
    with pytest.raises(StoreFailed):
        writer.finalize()
    with pytest.raises(StoreFailed):
        writer.write(b"more")
    writer.abort()
    proxy.plan = lambda _: None
    assert raw.objects() == []
    assert raw.uploads() == [str(part_key())], "nobody could abort it"
    assert await store.sweep_unfinished(JOB) == 1
    assert raw.uploads() == []


@pytest.mark.parametrize("number", [0, 1, 2])
async def test_one_part_of_the_upload_that_fails_ends_all_of_it(
    store: S3Store, proxy: S3Proxy, raw: RawS3, number: int
) -> None:
    proxy.plan = on("part", error(403, "AccessDenied"), first=number, times=1)
    with pytest.raises(StoreFailed):
        put(store, part_key(), LARGE)
    assert raw.objects() == []
    assert raw.uploads() == []


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
async def test_bytes_that_change_on_the_way_never_become_a_part(
    store: S3Store, proxy: S3Proxy, raw: RawS3, data: bytes
) -> None:
    proxy.plan = on("part", Fault(forward=True, corrupt=True), times=1)
    with pytest.raises(StoreFailed):
        put(store, part_key(), data)
    assert raw.objects() == []
    assert raw.uploads() == []


async def test_every_piece_travels_with_its_crc32c(store: S3Store, proxy: S3Proxy) -> None:
    put(store, part_key(), LARGE)
    pieces = [call for call in proxy.calls if call.operation == "part"]
    assert sorted(len(call.body) for call in pieces) == [2 * _MIB, 5 * _MIB, 5 * _MIB]
    for call in pieces:
        wanted = base64.b64encode(crc32c(call.body).to_bytes(4, "big")).decode()
        assert call.headers["x-amz-checksum-crc32c"] == wanted
        # Without TLS the signature covers the body, too.
        signed = hashlib.sha256(call.body).hexdigest()
        assert call.headers["x-amz-content-sha256"] == signed


async def test_a_full_store_is_told_apart(store: S3Store, proxy: S3Proxy) -> None:
    proxy.plan = on("part", error(507, "XMinioStorageFull"))
    writer = store.create(part_key())
    writer.write(SMALL)
    with pytest.raises(StoreFailed) as failure:
        writer.finalize()
    assert failure.value.reason is ErrorReason.STORE_FULL
    assert not failure.value.retryable


async def test_uploads_run_side_by_side_up_to_the_limit_and_the_writer_waits(
    seaweed: SeaweedServer, proxy: S3Proxy, options: S3Options
) -> None:
    """P4: memory is bounded by the buffers in flight and the one being filled."""
    store = S3Store(replace(options, parts_in_flight=2))
    proxy.plan = on("part", Fault(forward=True, stall=True))
    with ThreadPoolExecutor(1) as thread:
        writer = store.create(part_key())
        proxy.calls.clear()
        writing = thread.submit(writer.write, LARGE + LARGE)
        while proxy.count("part") < 2:
            await asyncio.sleep(0.01)
        # The third buffer is full, and there is no fourth.
        while writer._filled:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert not writing.done()
        assert proxy.count("part") == 2
        proxy.release()
        assert await asyncio.wrap_future(writing) == len(LARGE) * 2
        await asyncio.to_thread(writer.finalize)
    assert proxy.most_at_once["part"] == 2
    proxy.plan = lambda _: None
    assert await read(store, part_key()) == LARGE + LARGE
    await store.close()


async def test_abort_does_not_wait_for_what_is_being_sent(
    proxy: S3Proxy, options: S3Options, raw: RawS3
) -> None:
    store = S3Store(replace(options, parts_in_flight=len(LARGE) // options.part_bytes + 1))
    proxy.plan = on("part", Fault(stall=True))
    writer = store.create(part_key())
    writer.write(LARGE)
    while not proxy.count("part"):
        await asyncio.sleep(0.01)
    async with asyncio.timeout(ENOUGH):
        await asyncio.to_thread(writer.abort)
    assert raw.uploads() == []
    assert raw.objects() == []
    await store.close()


async def test_closing_the_store_below_a_writer_fails_it(
    store: S3Store, proxy: S3Proxy, options: S3Options
) -> None:
    patient = S3Store(options)
    proxy.plan = on("complete", Fault(stall=True))
    writer, late = patient.create(part_key()), patient.create(part_key(sequence=1))
    writer.write(SMALL)
    with ThreadPoolExecutor(1) as thread:
        finishing = thread.submit(writer.finalize)
        while not proxy.count("complete"):
            await asyncio.sleep(0.01)
        await patient.close()
        with pytest.raises(StoreFailed):
            await asyncio.wrap_future(finishing)
    with pytest.raises(StoreFailed):
        late.finalize()
    proxy.plan = lambda _: None
    assert await store.delete_job(JOB) == 2


async def test_a_part_has_at_most_ten_thousand_pieces_and_more_is_told(
    store: S3Store, monkeypatch: pytest.MonkeyPatch, raw: RawS3
) -> None:
    monkeypatch.setattr("exportd_server.store.s3_upload.MOST_PARTS", 2)
    with pytest.raises(StoreFailed) as failure:
        put(store, part_key(), LARGE)
    assert failure.value.reason is ErrorReason.STORE_FULL
    assert raw.uploads() == []


# --- never overwriting


async def test_s3_itself_refuses_to_overwrite(store: S3Store, proxy: S3Proxy) -> None:
    put(store, part_key(), b"the part")
    with pytest.raises(StoreFailed):
        put(store, part_key(), b"late")
    assert proxy.count("head") == 2, "only to see whose the part is"
    assert await read(store, part_key()) == b"the part"


@pytest.mark.parametrize("answer", ["ignores it", "does not implement it"])
async def test_without_conditional_writes_it_is_looked_first(
    options: S3Options, proxy: S3Proxy, raw: RawS3, answer: str
) -> None:
    def plan(call: Call) -> Fault | None:
        if call.operation != "complete" or "if-none-match" not in call.headers:
            return None
        if answer == "does not implement it":
            return error(501, "NotImplemented")
        # The second one at start is onto an object that exists.
        done = (
            "<CompleteMultipartUploadResult><ETag>e</ETag></CompleteMultipartUploadResult>"
        )
        return Fault(status=200, body=done) if call.index == 1 else None

    proxy.plan = plan
    store = await S3Store.connect(options)
    proxy.calls.clear()
    put(store, part_key(), b"the part")
    with pytest.raises(StoreFailed):
        put(store, part_key(), b"late")
    assert await read(store, part_key()) == b"the part"
    assert raw.objects() == [str(part_key())]
    assert raw.uploads() == []
    assert not any("if-none-match" in call.headers for call in proxy.calls)
    await store.close()


# --- reading


@pytest.mark.parametrize("offset", [0, 1, 5 * _MIB])
async def test_a_read_that_is_cut_goes_on_where_it_stopped(
    store: S3Store, proxy: S3Proxy, offset: int
) -> None:
    """P7: by a range, and only from the very object that it began with."""
    put(store, part_key(), LARGE)
    proxy.plan = on("get", Fault(forward=True, truncate=3 * _MIB))
    assert await read(store, part_key(), offset) == LARGE[offset:]
    again = [call for call in proxy.calls if call.operation == "get"][1:]
    assert len(again) >= math.ceil((len(LARGE) - offset) / (3 * _MIB)) - 1
    assert all("if-match" in call.headers and "range" in call.headers for call in again)


async def test_a_read_that_gets_nothing_more_fails_after_some_tries(
    store: S3Store, proxy: S3Proxy
) -> None:
    put(store, part_key(), LARGE)
    proxy.plan = lambda call: (
        Fault(forward=True, truncate=_MIB if call.index == 0 else 0)
        if call.operation == "get"
        else None
    )
    reader = await store.open(part_key())
    with pytest.raises(StoreFailed):
        await drain(reader)
    await reader.close()


@pytest.mark.parametrize("change", ["replaced", "deleted"])
async def test_a_read_never_goes_on_in_another_object(
    store: S3Store, proxy: S3Proxy, raw: RawS3, change: str
) -> None:
    put(store, part_key(), LARGE)
    proxy.plan = on("get", Fault(forward=True, truncate=_MIB), times=1)
    reader = await store.open(part_key())
    if change == "replaced":
        raw.fill([part_key()], LARGE[::-1])
    else:
        await store.delete(part_key())
    with pytest.raises(StoreFailed):
        await drain(reader)
    await reader.close()


async def test_a_read_that_stalls_is_taken_up_again(hasty: S3Store, proxy: S3Proxy) -> None:
    store = hasty
    put(store, part_key(), SMALL)
    proxy.plan = on("get", Fault(stall=True), times=1)
    assert await read(store, part_key()) == SMALL
    assert proxy.count("get") == 2


async def test_a_read_that_was_cancelled_has_lost_nothing(
    store: S3Store, proxy: S3Proxy, options: S3Options
) -> None:
    put(store, part_key(), LARGE)

    def plan(call: Call) -> Fault | None:
        if call.operation != "get":
            return None
        return (
            Fault(forward=True, truncate=_MIB + 5)
            if call.index == 0
            else Fault(forward=True, stall=True)
        )

    proxy.plan = plan
    reader = await store.open(part_key())
    buffer = memoryview(bytearray(len(LARGE)))
    reading = asyncio.create_task(reader.readinto(buffer))
    while proxy.count("get") < 2:
        await asyncio.sleep(0.01)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    buffer[:] = bytes(len(buffer))
    proxy.release()
    assert await drain(reader) == LARGE
    await reader.close()


async def test_closing_early_does_not_read_the_rest(store: S3Store, proxy: S3Proxy) -> None:
    put(store, part_key(), LARGE * 8)
    reader = await store.open(part_key())
    assert await reader.readinto(memoryview(bytearray(1000))) == 1000
    await reader.close()
    await store.close()
    assert proxy.sent < len(LARGE) * 4
    with pytest.raises(ValueError, match="closed"):
        await reader.readinto(memoryview(bytearray(1)))


async def test_a_reader_that_is_slow_holds_back_the_sender(
    store: S3Store, proxy: S3Proxy
) -> None:
    """And its pauses are not taken for a stall of S3."""
    put(store, part_key(), LARGE * 8)
    reader = await store.open(part_key())
    buffer = memoryview(bytearray(_MIB))
    count = await reader.readinto(buffer)
    await asyncio.sleep(1.0)
    assert proxy.sent < len(LARGE) * 4
    assert count + len(await drain(reader)) == len(LARGE) * 8
    assert proxy.count("get") == 1
    await reader.close()


async def test_a_store_that_does_not_answer_is_no_missing_part(
    store: S3Store, proxy: S3Proxy
) -> None:
    put(store, part_key(), SMALL)
    proxy.plan = lambda _: error(503, "SlowDown")
    with pytest.raises(StoreFailed):
        await store.open(part_key())
    with pytest.raises(StoreFailed):
        await store.size(part_key())
    with pytest.raises(StoreFailed):
        await keys(store)
    with pytest.raises(StoreFailed):
        await jobs(store)
    with pytest.raises(StoreFailed):
        await store.delete(part_key())
    with pytest.raises(StoreFailed):
        await store.sweep_unfinished(JOB)


# --- deleting


@pytest.mark.parametrize("operation", ["list", "uploads", "abort", "delete_many"])
async def test_a_deletion_that_fails_says_so_and_is_finished_by_the_next(
    store: S3Store, proxy: S3Proxy, raw: RawS3, operation: str
) -> None:
    """P8."""
    put(store, part_key(), SMALL)
    raw.begin(part_key(sequence=1), SMALL)
    proxy.plan = on(operation, error(500, "InternalError"))
    with pytest.raises(StoreFailed):
        await store.delete_job(JOB)
    proxy.plan = lambda _: None
    await store.delete_job(JOB)
    assert raw.objects() == []
    assert raw.uploads() == []


async def test_one_object_that_cannot_be_deleted_fails_the_deletion(
    store: S3Store, proxy: S3Proxy
) -> None:
    put(store, part_key(), SMALL)
    body = (
        "<DeleteResult><Error><Key>k</Key><Code>AccessDenied</Code></Error></DeleteResult>"
    )
    proxy.plan = on("delete_many", Fault(status=200, body=body))
    with pytest.raises(StoreFailed):
        await store.delete_job(JOB)


async def test_a_deletion_that_never_comes_to_an_end_is_given_up(
    store: S3Store, proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exportd_server.store.s3._PASSES", 3)
    put(store, part_key(), SMALL)
    proxy.plan = on("delete_many", Fault(status=200, body="<DeleteResult/>"))
    with pytest.raises(StoreFailed):
        await store.delete_job(JOB)


async def test_a_writer_in_the_middle_of_completing_loses_against_the_deletion(
    store: S3Store, proxy: S3Proxy, raw: RawS3, options: S3Options
) -> None:
    """L1: its request arrives after the job was deleted."""
    proxy.plan = on("complete", Fault(forward=True, stall=True))
    writer = store.create(part_key())
    writer.write(SMALL)
    with ThreadPoolExecutor(1) as thread:
        finishing = thread.submit(writer.finalize)
        while not proxy.count("complete"):
            await asyncio.sleep(0.01)
        assert await store.delete_job(JOB) == 1
        proxy.release()
        with pytest.raises(StoreFailed):
            await asyncio.wrap_future(finishing)
    assert raw.objects() == []
    assert raw.uploads() == []


async def test_a_sweep_takes_every_unfinished_upload_and_its_writer_is_told(
    store: S3Store, raw: RawS3
) -> None:
    """S3 does not know who lives. Callers sweep when no lease is held any more."""
    put(store, part_key(), SMALL)
    writer = store.create(part_key(sequence=1))
    writer.write(SMALL)
    raw.begin(part_key(sequence=2), SMALL)
    assert await store.sweep_unfinished(JOB) == 2
    with pytest.raises(StoreFailed):
        writer.finalize()
    assert raw.objects() == [str(part_key())]
    assert raw.uploads() == []


async def test_stores_whose_prefixes_begin_alike_do_not_meet(
    seaweed: SeaweedServer, options: S3Options
) -> None:
    base = options.prefix
    other = S3Store(replace(options, prefix=f"{base}-other"))
    within = S3Store(replace(options, prefix=f"{base}/within"))
    store = S3Store(options)
    for each in (store, other, within):
        put(each, part_key(), each._options.prefix.encode())
    assert await jobs(store) == {JOB}
    assert await store.delete_job(JOB) == 1
    assert await jobs(store) == set()
    for each in (other, within):
        assert await read(each, part_key()) == each._options.prefix.encode()
        await each.close()
    await store.close()


async def test_what_somebody_else_put_under_the_prefix_is_not_listed(
    store: S3Store, seaweed: SeaweedServer, options: S3Options
) -> None:
    for name in ("notes.txt", "acme/notes.txt", f"{JOB}/output/notes.txt", "a/b/c/d/e"):
        seaweed.raw.put_object(
            Bucket=options.bucket, Key=f"{options.root}{name}", Body=b"?"
        )
    put(store, part_key(), SMALL)
    assert await keys(store) == {part_key()}
    assert await jobs(store) == {JOB}


async def test_jobs_are_listed_once_whatever_they_have(store: S3Store, raw: RawS3) -> None:
    others = [
        JobPrefix("acme", f"0197c1f0-7a3e-7000-8000-{number:012d}") for number in range(9)
    ]
    for job in others[:6]:
        raw.fill([part_key(job, sequence=number) for number in range(3)], b"x")
    for job in others[3:]:
        raw.begin(part_key(job, sequence=7), b"x")
    assert await jobs(store) == set(others)


# --- at start


async def test_connecting_tries_everything_and_leaves_nothing(
    options: S3Options, raw: RawS3, proxy: S3Proxy
) -> None:
    with capture_logs() as told:
        store = await S3Store.connect(options)
    assert told == []
    assert raw.objects() == []
    assert raw.uploads() == []
    tried = {call.operation for call in proxy.calls}
    assert tried >= {"list", "create", "part", "uploads", "complete", "get", "delete"}
    put(store, part_key(), SMALL)
    assert await read(store, part_key()) == SMALL
    await store.close()


MISTAKES: dict[str, tuple[dict[str, object], str]] = {
    "a bucket that is not there": ({"bucket": "elsewhere"}, "no such bucket"),
    "no right to write": ({"access_key_id": "reader"}, "s3:PutObject"),
    "an unknown key": ({"access_key_id": "nobody"}, "does not know the access key id"),
    "a wrong secret": ({"secret_access_key": "wrong"}, "does not match"),
    "nobody there": ({"endpoint_url": "http://127.0.0.1:1"}, "cannot be reached"),
    "no address": ({"endpoint_url": "nonsense"}, "Invalid endpoint"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
async def test_a_mistake_is_told_at_start_with_its_mend(
    options: S3Options, mistake: str
) -> None:
    changes, text = MISTAKES[mistake]
    with pytest.raises(ConfigurationError) as told:
        await S3Store.connect(replace(options, **changes))  # type: ignore[arg-type]
    assert text in str(told.value)
    assert options.bucket in str(told.value) or "elsewhere" in str(told.value)
    assert "\n" not in str(told.value)
    assert SECRET not in str(told.value)


ANSWERS: dict[str, tuple[Fault, str]] = {
    "another region": (
        error(400, "AuthorizationHeaderMalformed", extra="<Region>eu-west-3</Region>"),
        "set store.s3.region to that",
    ),
    "expired credentials": (error(400, "ExpiredToken"), "have expired"),
    "a wrong clock": (error(403, "RequestTimeTooSkewed"), "clock is wrong"),
    "no S3": (Fault(status=404, body="<html>not here</html>"), "404"),
    "a cut": (CUT, "correct"),
    "silence": (Fault(stall=True), "does not answer in time"),
}


@pytest.mark.parametrize("answer", ANSWERS)
async def test_what_s3_answers_at_start_is_told(
    options: S3Options, proxy: S3Proxy, answer: str
) -> None:
    fault, text = ANSWERS[answer]
    proxy.plan = lambda _: fault
    with pytest.raises(ConfigurationError) as told:
        await S3Store.connect(replace(options, read_timeout=1.5))
    proxy.release()
    assert text in str(told.value)
    if answer == "another region":
        assert "'eu-west-3'" in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("operation", "right"),
    [
        ("list", "s3:ListBucket"),
        ("part", "s3:PutObject"),
        ("uploads", "s3:ListBucketMultipartUploads"),
        ("get", "s3:GetObject"),
        ("delete", "s3:DeleteObject"),
    ],
)
async def test_a_missing_right_is_named_at_start(
    options: S3Options, proxy: S3Proxy, raw: RawS3, operation: str, right: str
) -> None:
    proxy.plan = on(operation, error(403, "AccessDenied"))
    with pytest.raises(ConfigurationError, match=right):
        await S3Store.connect(options)
    assert raw.uploads() == []
    if operation != "delete":
        assert raw.objects() == []


async def test_without_any_credentials_it_says_where_to_put_them(
    options: S3Options, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    nobody = replace(options, access_key_id=None, secret_access_key=None)
    with pytest.raises(ConfigurationError, match="no credentials were found"):
        await S3Store.connect(nobody)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "writer")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    await (await S3Store.connect(nobody)).close()


async def test_a_full_store_does_not_keep_the_server_from_starting(
    options: S3Options, proxy: S3Proxy
) -> None:
    proxy.plan = on("part", error(507, "XMinioStorageFull"))
    with capture_logs() as told:
        store = await S3Store.connect(options)
    assert [entry["event"] for entry in told] == ["the output store is full"]
    await store.close()


async def test_an_endpoint_that_hides_unfinished_uploads_is_warned_of(
    options: S3Options, proxy: S3Proxy
) -> None:
    empty = "<ListMultipartUploadsResult><IsTruncated>false</IsTruncated>"
    proxy.plan = on(
        "uploads", Fault(status=200, body=f"{empty}</ListMultipartUploadsResult>")
    )
    with capture_logs() as told:
        store = await S3Store.connect(options)
    assert len(told) == 1
    assert "lifecycle rule" in told[0]["event"]
    await store.close()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"bucket": "No Bucket"}, "no name of a bucket"),
        ({"prefix": "/a"}, "prefix"),
        ({"prefix": "a/"}, "prefix"),
        ({"prefix": "a//b"}, "prefix"),
        ({"prefix": "a/../b"}, "prefix"),
        ({"prefix": "a\n"}, "prefix"),
        ({"part_bytes": 1 << 20}, "part_bytes"),
        ({"parts_in_flight": 0}, "parts_in_flight"),
        ({"access_key_id": None}, "or neither"),
        ({"ca_file": Path("/nonexistent")}, "ca_file"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    changes: dict[str, object], text: str
) -> None:
    good = S3Options(bucket="exports", access_key_id="a", secret_access_key="b")
    with pytest.raises(ConfigurationError, match=text):
        replace(good, **changes)  # type: ignore[arg-type]
    assert "secret" not in repr(good)


async def test_a_store_that_was_never_used_is_closed_for_nothing(
    options: S3Options, proxy: S3Proxy
) -> None:
    threads = threading.active_count()
    store = S3Store(options)
    await store.close()
    await store.close()
    assert proxy.calls == []
    assert threading.active_count() == threads


# --- over TLS


def make_certificate(directory: Path) -> tuple[Path, Path]:
    """A certificate for the loopback address that signs itself, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    certificate, key = directory / "cert.pem", directory / "key.pem"
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
            "ec_paramgen_curve:P-256", "-nodes", "-days", "1", "-subj", "/CN=localhost",
            "-addext", "subjectAltName=IP:127.0.0.1",
            "-keyout", str(key), "-out", str(certificate),
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return certificate, key


async def test_over_tls_the_certificate_is_checked_and_bodies_are_not_signed(
    tmp_path: Path,
) -> None:
    certificate, key = make_certificate(tmp_path)
    with running_seaweed(tmp_path / "server", certificate=certificate, key=key) as server:
        options = server.options(attempts=1)
        with pytest.raises(ConfigurationError, match="not trusted"):
            await S3Store.connect(options)
        store = await S3Store.connect(replace(options, ca_file=certificate))
        sent: list[bytes] = []

        def note(request: Any, **_: Any) -> None:
            sent.append(request.headers["X-Amz-Content-SHA256"])

        assert store._uploads is not None
        events = store._uploads.bucket._client.meta.events
        events.register("before-send.s3.UploadPart", note)
        put(store, part_key(), LARGE)
        assert sent == [b"UNSIGNED-PAYLOAD"] * 2
        assert await read(store, part_key()) == LARGE
        await store.close()


async def test_plain_http_to_a_port_that_speaks_tls_and_the_reverse_are_told(
    options: S3Options, seaweed: SeaweedServer
) -> None:
    wrong = replace(options, endpoint_url=f"https://127.0.0.1:{seaweed.port}")
    with pytest.raises(ConfigurationError, match="TLS"):
        await S3Store.connect(wrong)


def test_the_writer_is_safe_in_many_threads(
    seaweed: SeaweedServer, s3_options: S3Options
) -> None:
    """Also when the first of them make the store's thread."""

    async def check() -> None:
        store = S3Store(s3_options)
        wanted = [part_key(shard=number) for number in range(24)]
        with ThreadPoolExecutor(8) as threads:
            work = [
                asyncio.wrap_future(threads.submit(put, store, key, str(key).encode()))
                for key in wanted
            ]
            await asyncio.gather(*work)
        assert await keys(store) == set(wanted)
        for key in wanted:
            assert await read(store, key) == str(key).encode()
        with suppress(StoreFailed):
            await store.delete_job(JOB)
        await store.close()

    asyncio.run(check())
