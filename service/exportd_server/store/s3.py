"""The output store on S3; `docs/store.md` tells what it promises.

    <prefix>/<tenant>/<job_id>/<kind>/<shard>-<sequence>.<token>   a part
    <prefix>/.owner                                                whose all this is

What is being written is a multipart upload under the part's name, which no reader sees.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import timedelta

from exportd_server.errors import StoreFailed
from exportd_server.store.base import SignedUrl
from exportd_server.store.key import JobPrefix, OutputKey
from exportd_server.store.s3_client import Bucket, CallFailed, S3Options, open_bucket
from exportd_server.store.s3_probe import probe
from exportd_server.store.s3_read import S3PartReader
from exportd_server.store.s3_upload import S3PartWriter, Uploads

_OWNER = ".owner"
_CLAIMS = 5
"""Tries to be the owner; the second finds whoever was faster."""
_PASSES = 100
"""Most looks at a job that is being deleted. Each but the last found something new."""


class S3Store:
    """Keeps parts under a prefix of one bucket, for any number of processes.

    It may be made anywhere and costs nothing until it is used; its coroutines belong to
    the event loop that first calls one, `create` to any thread.
    """

    def __init__(self, options: S3Options) -> None:
        self._options = options
        self._lock = threading.Lock()
        self._uploads: Uploads | None = None
        self._opening = asyncio.Lock()
        self._opened: Bucket | None = None
        self._stack = AsyncExitStack()
        self._conditional = True

    @classmethod
    async def connect(cls, options: S3Options) -> S3Store:
        """A store that has been tried: the bucket is there, and all that will be done
        may be done. Raises `ConfigurationError`."""
        store = cls(options)
        try:
            uploads = await asyncio.to_thread(store._begin_uploads)
            await asyncio.wrap_future(uploads.submit(probe(uploads)))
            await store._bucket()
        except BaseException:
            await store.close()
            raise
        return store

    def create(self, key: OutputKey) -> S3PartWriter:
        """Begin a part."""
        return S3PartWriter(self._begin_uploads(), self._options.name(key))

    async def open(self, key: OutputKey, offset: int = 0) -> S3PartReader:
        """Open a finalized part at a byte offset."""
        if offset < 0:
            raise ValueError("an offset is not negative")
        reader = S3PartReader(await self._bucket(), self._options.name(key), offset)
        try:
            await reader.begin()
        except CallFailed as error:
            raise _told(error, key) from error
        return reader

    async def signed_url(
        self,
        key: OutputKey,
        *,
        lifetime: timedelta,
        content_type: str,
        content_disposition: str,
    ) -> SignedUrl | None:
        """A pre-signed GET, which S3 counts in whole seconds. It ends with the credentials
        that sign it, where these say when they do."""
        bucket = await self._bucket()
        try:
            return await bucket.signed_get(
                self._options.name(key),
                lifetime,
                ResponseContentType=content_type,
                ResponseContentDisposition=content_disposition,
                ResponseCacheControl="private, no-transform, no-store",
            )
        except CallFailed as error:
            raise error.as_store_failed() from error

    async def size(self, key: OutputKey) -> int:
        """Bytes of a finalized part."""
        bucket = await self._bucket()
        try:
            found = await bucket.call("head_object", Key=self._options.name(key))
        except CallFailed as error:
            raise _told(error, key) from error
        return int(found["ContentLength"])

    async def delete(self, key: OutputKey) -> None:
        """Delete one part."""
        bucket = await self._bucket()
        try:
            await bucket.call("delete_object", Key=self._options.name(key))
        except CallFailed as error:
            if not error.missing:
                raise error.as_store_failed() from error

    async def delete_job(self, prefix: JobPrefix) -> int:
        """Delete everything of a job.

        Uploads go first, so that no writer can add to the job, then the parts, and again
        until nothing is found. When several delete at once, each counts what it asked
        S3 to delete.
        """
        bucket = await self._bucket()
        place = self._options.job(prefix)
        total = 0
        try:
            for _ in range(_PASSES):
                found = await _abort_uploads(bucket, place)
                found += await _delete_objects(bucket, place)
                total += found
                if not found:
                    return total
        except CallFailed as error:
            raise error.as_store_failed() from error
        raise StoreFailed

    async def list_job(self, prefix: JobPrefix) -> AsyncIterator[OutputKey]:
        """The finalized parts of a job."""
        async for key in self._keys(self._options.job(prefix)):
            yield key

    async def list_jobs(self) -> AsyncIterator[JobPrefix]:
        """Every job that has a part or an unfinished upload.

        Parts are listed, not directories: some services go on listing those when they
        are empty, and most jobs have a few parts only.
        """
        bucket, root = await self._bucket(), self._options.root
        unfinished: set[JobPrefix] = set()
        try:
            async for page in bucket.uploads(root):
                found = (_parse(name.removeprefix(root)) for name, _ in page)
                unfinished.update(key.prefix for key in found if key is not None)
        except CallFailed as error:
            raise error.as_store_failed() from error
        for prefix in unfinished:
            yield prefix
        last: JobPrefix | None = None
        async for key in self._keys(root):
            if key.prefix != last and key.prefix not in unfinished:
                yield key.prefix
            last = key.prefix

    async def sweep_unfinished(self, prefix: JobPrefix) -> int:
        """Abort every unfinished upload of a job, since S3 does not know whether its
        writer lives: to be called when no lease on the job is held any more."""
        bucket = await self._bucket()
        try:
            return await _abort_uploads(bucket, self._options.job(prefix))
        except CallFailed as error:
            raise error.as_store_failed() from error

    async def claim(self, owner: str) -> str:
        """Note whose this is, unless it is somebody's."""
        bucket, name = await self._bucket(), f"{self._options.root}{_OWNER}"
        try:
            for _ in range(_CLAIMS):
                found = await bucket.text(name)
                if found is not None:
                    return found.strip()
                try:
                    await bucket.call(
                        "put_object",
                        Key=name,
                        Body=f"{owner}\n".encode(),
                        ContentType="text/plain",
                        **({"IfNoneMatch": "*"} if self._conditional else {}),
                    )
                except CallFailed as error:
                    # Somebody else was first; or S3 does not know the condition.
                    if error.code == "NotImplemented":
                        self._conditional = False
                    elif error.status not in (409, 412):
                        raise
        except CallFailed as error:
            raise error.as_store_failed() from error
        raise StoreFailed

    async def close(self) -> None:
        """End uploads and connections. Writers and readers are closed before."""
        with self._lock:
            uploads, self._uploads = self._uploads, None
        if uploads is not None:
            await asyncio.to_thread(uploads.close)
        await self._stack.aclose()
        self._opened = None

    def _begin_uploads(self) -> Uploads:
        with self._lock:
            if self._uploads is None:
                self._uploads = Uploads(self._options)
            return self._uploads

    async def _bucket(self) -> Bucket:
        if self._opened is None:
            async with self._opening:
                if self._opened is None:
                    self._opened = await self._stack.enter_async_context(
                        open_bucket(self._options)
                    )
        return self._opened

    async def _keys(self, place: str) -> AsyncIterator[OutputKey]:
        """The parts whose names begin so, in the order of their names."""
        bucket = await self._bucket()
        try:
            async for page in bucket.objects(place):
                for name in page:
                    key = _parse(name.removeprefix(self._options.root))
                    if key is not None:
                        yield key
        except CallFailed as error:
            raise error.as_store_failed() from error


def _parse(text: str) -> OutputKey | None:
    """The key, or None for what somebody else has put here."""
    try:
        return OutputKey.parse(text)
    except ValueError:
        return None


def _told(error: CallFailed, key: OutputKey) -> Exception:
    return KeyError(str(key)) if error.missing else error.as_store_failed()


async def _abort_uploads(bucket: Bucket, place: str) -> int:
    aborted = 0
    async for page in bucket.uploads(place):
        for name, upload_id in page:
            aborted += await bucket.abort(name, upload_id)
    return aborted


async def _delete_objects(bucket: Bucket, place: str) -> int:
    deleted = 0
    async for page in bucket.objects(place):
        if page:
            await bucket.delete(page)
        deleted += len(page)
    return deleted
