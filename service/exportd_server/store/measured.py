"""Any output store, with its operations counted and timed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import timedelta

from exportd_server.errors import ErrorReason, StoreFailed
from exportd_server.platform import metrics_service as metrics
from exportd_server.store.base import (
    Buffer,
    OutputStore,
    PartReader,
    PartWriter,
    SignedUrl,
    UrlSigner,
)
from exportd_server.store.key import JobPrefix, OutputKey


def measured(store: OutputStore) -> OutputStore:
    """The store, measured; it signs URLs if the store does."""
    return _Signing(store, store) if isinstance(store, UrlSigner) else _Measured(store)


class _Operation:
    """The series of one operation."""

    def __init__(self, name: str) -> None:
        self._seconds = metrics.store_seconds.labels(name)
        self._outcomes = {
            outcome: metrics.store_operations.labels(name, outcome)
            for outcome in metrics.STORE_OUTCOMES
        }

    def count(self, outcome: str, seconds: float) -> None:
        """One that ended."""
        self._seconds.observe(seconds)
        self._outcomes[outcome].inc()

    @contextmanager
    def measured(self) -> Iterator[None]:
        """One, for as long as the context is open. What its caller gave up, or asked for
        wrongly, is none."""
        begun = time.perf_counter()
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit, ValueError):
            raise
        except BaseException as error:
            self.count(_outcome(error), time.perf_counter() - begun)
            raise
        self.count("ok", time.perf_counter() - begun)


def _outcome(error: BaseException) -> str:
    if isinstance(error, KeyError):
        return "missing"
    full = isinstance(error, StoreFailed) and error.reason is ErrorReason.STORE_FULL
    return "full" if full else "failed"


_OPERATIONS = {name: _Operation(name) for name in metrics.OPERATIONS}


class _Measured:
    """See `OutputStore`."""

    def __init__(self, store: OutputStore) -> None:
        self._store = store

    def create(self, key: OutputKey) -> PartWriter:
        """See `OutputStore`."""
        with _OPERATIONS["create"].measured():
            return _Writer(self._store.create(key))

    async def open(self, key: OutputKey, offset: int = 0) -> PartReader:
        """See `OutputStore`."""
        with _OPERATIONS["open"].measured():
            return _Reader(await self._store.open(key, offset))

    async def size(self, key: OutputKey) -> int:
        """See `OutputStore`."""
        with _OPERATIONS["size"].measured():
            return await self._store.size(key)

    async def delete(self, key: OutputKey) -> None:
        """See `OutputStore`."""
        with _OPERATIONS["delete"].measured():
            await self._store.delete(key)

    async def delete_job(self, prefix: JobPrefix) -> int:
        """See `OutputStore`."""
        with _OPERATIONS["delete_job"].measured():
            return await self._store.delete_job(prefix)

    async def list_job(self, prefix: JobPrefix) -> AsyncIterator[OutputKey]:
        """See `OutputStore`."""
        with _OPERATIONS["list_job"].measured():
            async for key in self._store.list_job(prefix):
                yield key

    async def list_jobs(self) -> AsyncIterator[JobPrefix]:
        """See `OutputStore`."""
        with _OPERATIONS["list_jobs"].measured():
            async for prefix in self._store.list_jobs():
                yield prefix

    async def sweep_unfinished(self, prefix: JobPrefix) -> int:
        """See `OutputStore`."""
        with _OPERATIONS["sweep_unfinished"].measured():
            return await self._store.sweep_unfinished(prefix)

    async def claim(self, owner: str) -> str:
        """See `OutputStore`."""
        with _OPERATIONS["claim"].measured():
            return await self._store.claim(owner)

    async def close(self) -> None:
        """See `OutputStore`."""
        await self._store.close()


class _Signing(_Measured):
    """One that signs URLs."""

    def __init__(self, store: OutputStore, signer: UrlSigner) -> None:
        super().__init__(store)
        self._signer = signer

    async def signed_url(
        self,
        key: OutputKey,
        *,
        lifetime: timedelta,
        content_type: str,
        content_disposition: str,
    ) -> SignedUrl | None:
        """See `UrlSigner`."""
        with _OPERATIONS["signed_url"].measured():
            return await self._signer.signed_url(
                key,
                lifetime=lifetime,
                content_type=content_type,
                content_disposition=content_disposition,
            )


class _Writer:
    """Counts the writes of a part as one operation: there may be one for each row."""

    def __init__(self, writer: PartWriter) -> None:
        self._writer = writer
        self._seconds = 0.0
        self._open = True
        metrics.uploads_open.inc()

    def write(self, data: Buffer, /) -> int:
        """See `PartWriter`."""
        begun = time.perf_counter()
        try:
            return self._writer.write(data)
        except Exception as error:
            self._seconds += time.perf_counter() - begun
            begun = time.perf_counter()
            self._end(_outcome(error))
            raise
        finally:
            self._seconds += time.perf_counter() - begun

    def finalize(self) -> None:
        """See `PartWriter`."""
        self._end("ok")
        with _OPERATIONS["finalize"].measured():
            self._writer.finalize()

    def abort(self) -> None:
        """See `PartWriter`."""
        self._end("ok")
        self._writer.abort()

    def _end(self, outcome: str) -> None:
        if self._open:
            self._open = False
            metrics.uploads_open.dec()
            _OPERATIONS["write"].count(outcome, self._seconds)


class _Reader:
    """Counts the reads of a part as one operation."""

    def __init__(self, reader: PartReader) -> None:
        self._reader = reader
        self._seconds = 0.0
        self._open = True

    async def readinto(self, buffer: memoryview, /) -> int:
        """See `PartReader`."""
        begun = time.perf_counter()
        try:
            count = await self._reader.readinto(buffer)
        except Exception as error:
            self._seconds += time.perf_counter() - begun
            self._end(_outcome(error))
            raise
        self._seconds += time.perf_counter() - begun
        return count

    async def close(self) -> None:
        """See `PartReader`."""
        self._end("ok")
        await self._reader.close()

    def _end(self, outcome: str) -> None:
        if self._open:
            self._open = False
            _OPERATIONS["read"].count(outcome, self._seconds)
