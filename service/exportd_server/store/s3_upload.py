"""Writes parts to S3: multipart uploads, made on an event loop of their own.

Pipeline threads write, and they block; the API's event loop must neither wait for them
nor carry the sending and signing of what they write. So uploads have a thread with a
loop and a client of its own.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from contextlib import suppress
from typing import Any, TypeVar

import structlog
from crc32c import crc32c

from exportd_server.errors import StoreFailed
from exportd_server.store.base import Buffer
from exportd_server.store.s3_client import CallFailed, S3Options, open_bucket

log = structlog.get_logger(__name__)

MOST_PARTS = 10_000
"""S3 takes no more parts in one upload."""
_MARK = "exportd-writer"
"""Name of the object's metadata that tells whose it is."""
_CHUNK = 256 << 10
"""Bytes of a body that are handed to the socket at one go."""
_ABORT_SECONDS = 20.0
"""How long an abort is waited for; what it did not get to goes with the job."""

_T = TypeVar("_T")


class Uploads:
    """The thread, its loop and its client. Begins at once; raises `ConfigurationError`.

    `conditional` tells whether S3 itself refuses to complete an upload onto an object
    that exists. Where it does not, the writer looks before it completes.
    """

    def __init__(self, options: S3Options) -> None:
        self.options = options
        self.conditional = True
        self._lock = threading.Lock()
        self._closed = False
        self._ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = threading.Thread(target=self._run, name="store-s3", daemon=True)
        self._thread.start()
        self._loop, self._stop = self._ready.result()

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:  # noqa: BLE001 - crosses to the other thread
            if not self._ready.done():
                self._ready.set_exception(error)

    async def _main(self) -> None:
        stop = asyncio.Event()
        async with open_bucket(self.options) as self.bucket:
            self._ready.set_result((asyncio.get_running_loop(), stop))
            await stop.wait()

    def submit(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Begin work on the loop of the uploads; from any thread. When the thread ends
        before the work does, the work is cancelled."""
        with self._lock:
            if self._closed:
                work.close()
                raise CancelledError
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """Drop what is under way and end the thread; blocks."""
        with self._lock:
            self._closed = True
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()


class Upload:
    """One multipart upload. Everything here runs on the loop of the uploads.

    In the store it begins with the part, even for a few bytes, because it is what fences
    the writer: deleting the job aborts it, and what was aborted cannot be completed. With
    `overwrite` an object that has the name already is replaced, and an abort removes none.
    """

    def __init__(
        self,
        uploads: Uploads,
        name: str,
        *,
        content_type: str = "application/octet-stream",
        overwrite: bool = False,
    ) -> None:
        self._uploads = uploads
        self._bucket = uploads.bucket
        self.name = name
        self._content_type = content_type
        self._overwrite = overwrite
        self._mark = secrets.token_hex(16)
        self._id: str | None = None
        self._parts: dict[int, dict[str, Any]] = {}
        self._sending: set[asyncio.Task[Any]] = set()
        self._completing = False

    @property
    def _conditional(self) -> bool:
        return self._uploads.conditional and not self._overwrite

    async def begin(self) -> None:
        """From here on the job is listed; raises `CallFailed`, as all of these do."""
        answer = await self._bucket.call(
            "create_multipart_upload",
            Key=self.name,
            Metadata={_MARK: self._mark},
            ContentType=self._content_type,
            ChecksumAlgorithm="CRC32C",
        )
        self._id = answer["UploadId"]
        if answer["ResponseMetadata"].get("RetryAttempts") and not self._overwrite:
            await self._abort_others()

    async def _abort_others(self) -> None:
        """An earlier try may have begun an upload too, of which the answer was lost. As
        nobody else has this name, every other one is such a one; a job that succeeds is
        not looked through again until it is deleted."""
        async for page in self._bucket.uploads(self.name):
            for name, upload_id in page:
                if name == self.name and upload_id != self._id:
                    await self._bucket.abort(name, upload_id)

    async def send(self, number: int, body: Body) -> None:
        """Send one part of the upload, with a checksum that S3 compares."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - it is a coroutine that runs
        self._sending.add(task)
        try:
            answer = await self._bucket.call(
                "upload_part",
                Key=self.name,
                UploadId=self._id,
                PartNumber=number,
                Body=body,
                ChecksumCRC32C=body.checksum,
            )
        finally:
            self._sending.discard(task)
        self._parts[number] = {
            "PartNumber": number,
            "ETag": answer["ETag"],
            "ChecksumCRC32C": body.checksum,
        }

    async def complete(self) -> None:
        """Make the object of its parts."""
        self._completing = True
        try:
            await self._complete()
        except CallFailed as error:
            if self._conditional and error.code == "NotImplemented":
                self._uploads.conditional = False
                await self.complete()
                return
            # The first of several tries may have succeeded, and its answer been lost.
            with suppress(CallFailed):
                if await self._is_there():
                    return
            raise

    async def _complete(self) -> None:
        condition = {"IfNoneMatch": "*"} if self._conditional else {}
        if not self._overwrite and not condition and await self._head() is not None:
            raise CallFailed("PreconditionFailed", 412, "there is such an object")
        parts = [self._parts[number] for number in sorted(self._parts)]
        await self._bucket.call(
            "complete_multipart_upload",
            Key=self.name,
            UploadId=self._id,
            MultipartUpload={"Parts": parts},
            **condition,
        )

    async def abort(self) -> None:
        """Leave nothing behind; raises `CallFailed` when that did not succeed."""
        for task in self._sending:
            task.cancel()
        if self._sending:
            await asyncio.wait(self._sending)
        if self._id is None:
            return
        await self._bucket.abort(self.name, self._id)
        # A completion that was given up on may have come through before the abort. It is
        # whole; only where it must not be readable is it removed.
        if self._completing and not self._overwrite and await self._is_there():
            await self._bucket.call("delete_object", Key=self.name)

    async def _is_there(self) -> bool:
        """Whether the object is there, and made by this upload."""
        found = await self._head()
        return found is not None and found.get("Metadata", {}).get(_MARK) == self._mark

    async def _head(self) -> dict[str, Any] | None:
        try:
            return await self._bucket.call("head_object", Key=self.name)
        except CallFailed as error:
            if error.missing:
                return None
            raise


class Body:
    """Bytes to send. A repetition begins at the start, whatever an earlier try that
    nobody waits for any more may still be reading."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._position = 0
        self.checksum = base64.b64encode(crc32c(view).to_bytes(4, "big")).decode()

    def __len__(self) -> int:
        return len(self._view)

    def __bool__(self) -> bool:
        return True

    def read(self, size: int = -1) -> memoryview:
        """What signing reads; without a copy."""
        end = len(self._view) if size < 0 else self._position + size
        data = self._view[self._position : end]
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        """As of a file."""
        self._position = offset + (0, self._position, len(self._view))[whence]
        return self._position

    def tell(self) -> int:
        """As of a file."""
        return self._position

    async def __aiter__(self) -> AsyncIterator[memoryview]:
        """What sending reads."""
        for start in range(0, len(self._view), _CHUNK):
            yield self._view[start : start + _CHUNK]


class S3PartWriter:
    """Writes one part through a few buffers, of which one is filled while the others are
    sent; when all are under way, `write` waits."""

    def __init__(self, uploads: Uploads, name: str) -> None:
        """Begin the upload; raises `StoreFailed`."""
        self._uploads = uploads
        self._upload = Upload(uploads, name)
        self._size = uploads.options.part_bytes
        self._current: memoryview | None = None
        self._filled = 0
        self._number = 0
        self._free: list[memoryview] = []
        self._sending: dict[Future[None], memoryview] = {}
        self._failure: CallFailed | CancelledError | None = None
        self._done = False
        self._guarded(lambda: uploads.submit(self._upload.begin()).result())

    def write(self, data: Buffer, /) -> int:
        """Append all of `data`; returns how many bytes that were."""
        self._require_open()
        view = memoryview(data).cast("B")
        taken = 0
        while taken < len(view):
            if self._filled == self._size:
                self._guarded(self._send)
            if self._current is None:
                self._current = self._guarded(self._buffer)
            end = min(self._filled + len(view) - taken, self._size)
            count = end - self._filled
            self._current[self._filled : end] = view[taken : taken + count]
            self._filled, taken = end, taken + count
        return taken

    def finalize(self) -> None:
        """Send the rest, and make the part readable all at once."""
        self._require_open()
        self._guarded(self._finish)
        self._done = True
        self._release()

    def abort(self) -> None:
        """Throw away what was written."""
        if self._done:
            return
        self._done = True
        try:
            self._uploads.submit(self._upload.abort()).result(_ABORT_SECONDS)
        except Exception:
            log.warning("an upload was not aborted", name=self._upload.name, exc_info=True)
        self._release()

    def _finish(self) -> None:
        if self._filled or not self._number:
            self._send()
        self._collect(list(self._sending))
        self._uploads.submit(self._upload.complete()).result()

    def _send(self) -> None:
        if self._number == MOST_PARTS:
            raise CallFailed("StorageFull", message=f"more than {MOST_PARTS} parts")
        view = self._current if self._current is not None else memoryview(bytearray())
        self._number += 1
        sending = self._uploads.submit(
            self._upload.send(self._number, Body(view[: self._filled]))
        )
        self._sending[sending] = view
        self._current, self._filled = None, 0

    def _buffer(self) -> memoryview:
        """Memory to fill next; waits while all of it is being sent."""
        self._collect([sending for sending in self._sending if sending.done()])
        if len(self._sending) >= self._uploads.options.parts_in_flight:
            done, _ = wait(self._sending, return_when=FIRST_COMPLETED)
            self._collect(list(done))
        return self._free.pop() if self._free else memoryview(bytearray(self._size))

    def _collect(self, sent: list[Future[None]]) -> None:
        for sending in sent:
            sending.result()
            self._free.append(self._sending.pop(sending))

    def _guarded(self, step: Callable[[], _T]) -> _T:
        """Do a step; one that fails ends the writer."""
        try:
            return step()
        except (CallFailed, CancelledError) as error:
            self._failure = error
            self.abort()
            raise _failed(error) from error
        except BaseException:
            self.abort()
            raise

    def _require_open(self) -> None:
        if self._failure is not None:
            raise _failed(self._failure) from self._failure
        if self._done:
            raise ValueError("the part is finalized or aborted")

    def _release(self) -> None:
        self._free.clear()
        self._sending.clear()
        self._current = None


def _failed(error: CallFailed | CancelledError) -> StoreFailed:
    """A call is cancelled when the store is closed below its writer."""
    return error.as_store_failed() if isinstance(error, CallFailed) else StoreFailed()
