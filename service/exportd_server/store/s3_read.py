"""Reads parts from S3: one streaming GET, taken up again where it breaks."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from typing import Any

import aiohttp

from exportd_server.errors import StoreFailed
from exportd_server.store.s3_client import Bucket, CallFailed

_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 5.0


class S3PartReader:
    """Reads one part.

    What has arrived beyond what is asked for is at most one chunk here and two of 64 KiB
    in the client; then the socket is left unread.
    """

    def __init__(self, bucket: Bucket, name: str, offset: int) -> None:
        self._bucket = bucket
        self._name = name
        self._etag: str | None = None
        self._position = offset
        self._end = offset
        self._body: Any = None
        self._chunks: deque[memoryview] = deque()
        self._held = 0
        self._closed = False

    async def begin(self) -> None:
        """Ask for the part; raises `CallFailed`."""
        try:
            length = await self._connect()
        except CallFailed as error:
            if error.status != 416:
                raise
            # The offset is the end, or lies beyond it.
        else:
            self._end = self._position + length

    async def readinto(self, buffer: memoryview, /) -> int:
        """Fill `buffer` from its start, as far as the part goes."""
        if self._closed:
            raise ValueError("the reader is closed")
        buffer = buffer.cast("B")
        # What has come is kept here until all of it has, since this may be cancelled.
        while self._held < len(buffer) and self._position < self._end:
            chunk = await self._next()
            self._position += len(chunk)
            self._held += len(chunk)
            self._chunks.append(chunk)
        return self._take(buffer)

    async def close(self) -> None:
        """Drop the connection if there is more to come; nothing is read to the end."""
        self._closed = True
        self._chunks.clear()
        self._drop()

    def _take(self, buffer: memoryview) -> int:
        count = 0
        while self._chunks and count < len(buffer):
            chunk = self._chunks.popleft()
            piece = chunk[: len(buffer) - count]
            buffer[count : count + len(piece)] = piece
            count += len(piece)
            if len(piece) < len(chunk):
                self._chunks.appendleft(chunk[len(piece) :])
        self._held -= count
        return count

    async def _next(self) -> memoryview:
        """The bytes that come next, at least one."""
        lost: Exception | None = None
        for attempt in range(self._bucket.options.attempts):
            try:
                if attempt:
                    await asyncio.sleep(_pause(attempt))
                if self._body is None:
                    await self._connect()
                data, _ = await self._body.content.readchunk()
            except CallFailed as error:
                # The client has tried it several times already.
                raise error.as_store_failed() from error
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                lost = error
            else:
                if len(data) > self._end - self._position:
                    raise StoreFailed
                if data:
                    return memoryview(data)
            self._drop()
        raise StoreFailed from lost

    async def _connect(self) -> int:
        """Ask for the rest; returns how long it is."""
        wanted: dict[str, str] = {}
        if self._position:
            wanted["Range"] = f"bytes={self._position}-"
        if self._etag is not None:
            wanted["IfMatch"] = self._etag
        answer = await self._bucket.call("get_object", Key=self._name, **wanted)
        self._body = answer["Body"]
        length: int = answer["ContentLength"]
        begins = answer.get("ContentRange", "bytes 0-")
        wrong = not begins.startswith(f"bytes {self._position}-")
        if self._etag is not None:
            wrong = wrong or self._position + length != self._end
        if wrong:
            self._drop()
            raise CallFailed("Broken", message="another range than was asked for")
        self._etag = answer["ETag"]
        return length

    def _drop(self) -> None:
        if self._body is not None:
            self._body.close()
            self._body = None


def _pause(attempt: int) -> float:
    """Seconds before a repetition: doubling, capped, and spread."""
    longest: float = min(_FIRST_PAUSE * 2 ** (attempt - 1), _LONGEST_PAUSE)
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
