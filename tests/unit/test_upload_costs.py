"""What an upload to S3, and rows on their way into PostgreSQL, cost apart from time: calls
for each part, and memory that is allocated for what is written. A call more, or another
copy of the bytes, is over the bound."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, cast

import pytest

from exportd_server.encoders.base import Format, OutputFormat
from exportd_server.sinks.database.rows import Feed, csv_lines
from exportd_server.store.s3_client import S3Options
from exportd_server.store.s3_upload import Body, S3PartWriter, Uploads
from tests.support.sinks import GeneratedContent, an_export

MIB = 2**20
PART = 8 * MIB
IN_FLIGHT = 4
PARTS = 12
BLOCK = MIB


class CountingBucket:
    """Takes calls as S3 does; reads what is sent, once to sign it and once to send it."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.sent = 0

    async def call(self, operation: str, **parameters: Any) -> dict[str, Any]:
        """See `Bucket`."""
        self.calls[operation] += 1
        await asyncio.sleep(0)
        if operation == "upload_part":
            body = cast("Body", parameters["Body"])
            while body.read(MIB):
                pass
            body.seek(0)
            async for piece in body:
                self.sent += len(piece)
        return {"UploadId": "u", "ETag": "e", "ResponseMetadata": {}}


class CountingUploads:
    """The thread of the uploads, as far as a writer sees it."""

    def __init__(self) -> None:
        self.options = S3Options(
            bucket="bucket", part_bytes=PART, parts_in_flight=IN_FLIGHT
        )
        self.bucket = CountingBucket()
        self.conditional = True

    def submit(self, work: Any) -> Future[Any]:
        """Do it at once."""
        done: Future[Any] = Future()
        done.set_result(asyncio.run(work))
        return done


@contextmanager
def _allocating() -> Iterator[list[int]]:
    """The most that was allocated at a time meanwhile, in bytes."""
    told: list[int] = []
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    try:
        yield told
        told.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()


def test_an_upload_makes_one_call_for_each_part_and_two_besides() -> None:
    """Begin, the parts, complete: nothing is looked for, and nothing is sent twice."""
    uploads = CountingUploads()
    writer = S3PartWriter(cast("Uploads", uploads), "name")
    block = bytes(BLOCK)
    for _ in range(PARTS * PART // BLOCK):
        writer.write(block)
    writer.finalize()
    assert uploads.bucket.calls == {
        "create_multipart_upload": 1,
        "upload_part": PARTS,
        "complete_multipart_upload": 1,
    }
    assert uploads.bucket.sent == PARTS * PART


def test_an_upload_holds_what_it_fills_and_no_copy_of_it() -> None:
    """What is sent before the next is written needs one buffer. A copy for signing or for
    sending, or of what is written, would be seen."""
    uploads = CountingUploads()
    block = bytes(BLOCK)
    with _allocating() as most:
        writer = S3PartWriter(cast("Uploads", uploads), "name")
        for _ in range(PARTS * PART // BLOCK):
            writer.write(block)
        writer.finalize()
    assert most[0] < PART + MIB // 8


@pytest.mark.parametrize("times", [16, 64])
async def test_rows_on_their_way_to_copy_are_held_in_a_few_buffers(times: int) -> None:
    """CSV goes into COPY as it is stored: it is neither parsed nor gathered, so that the
    pieces are large and few and memory does not know the size."""
    content = GeneratedContent(b"id,name\n", b"1,a\n" * (BLOCK // 4), times)
    part = content.part()
    export = an_export(OutputFormat(Format.CSV))

    def load(feed: Feed) -> tuple[int, int]:
        pieces = size = 0
        for piece in csv_lines(feed, export, [part]):
            pieces, size = pieces + 1, size + len(piece)
        return pieces, size

    feed = Feed([part])
    with _allocating() as most:
        pump = asyncio.create_task(feed.pump())
        pieces, size = await asyncio.to_thread(load, feed)
        await pump
    assert size == part.bytes - part.prefix_bytes
    assert pieces <= 2 * times + 2
    assert most[0] < MIB + MIB // 8  # one buffer beside those of the feed
