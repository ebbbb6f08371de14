"""Any output store, with its operations counted and timed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

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

T = TypeVar("T")


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

    def list_job(self, prefix: JobPrefix) -> AsyncIterator[OutputKey]:
        """See `OutputStore`."""
        return _listed(_OPERATIONS["list_job"], self._store.list_job(prefix))

    def list_jobs(self) -> AsyncIterator[JobPrefix]:
        """See `OutputStore`."""
        return _listed(_OPERATIONS["list_jobs"], self._store.list_jobs())

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


async def _listed(operation: _Operation, items: AsyncIterator[T]) -> AsyncIterator[T]:
    """The items. What their taker does in between is not the store's time."""
    seconds = 0.0
    try:
        while True:
            begun = time.perf_counter()
            try:
                item = await anext(items)
            except StopAsyncIteration:
                operation.count("ok", seconds + time.perf_counter() - begun)
                return
            except Exception as error:
                operation.count(_outcome(error), seconds + time.perf_counter() - begun)
                raise
            seconds += time.perf_counter() - begun
            yield item
    finally:
        if isinstance(items, AsyncGenerator):
            await items.aclose()


class _Writer:
    """Counts the writes of a part as one operation: there may be one for each row."""

    def __init__(self, writer: PartWriter) -> None:
        self._writer = writer
        self._seconds = 0.0
        self._written = False
        self._open = True
        metrics.uploads_open.inc()

    def write(self, data: Buffer, /) -> int:
        """See `PartWriter`."""
        begun = time.perf_counter()
        try:
            count = self._writer.write(data)
        except Exception as error:
            self._seconds += time.perf_counter() - begun
            self._count(_outcome(error))
            raise
        self._seconds += time.perf_counter() - begun
        return count

    def finalize(self) -> None:
        """See `PartWriter`."""
        self._count("ok")
        try:
            with _OPERATIONS["finalize"].measured():
                self._writer.finalize()
        finally:
            self._end()

    def abort(self) -> None:
        """See `PartWriter`."""
        self._count("ok")
        self._writer.abort()
        self._end()

    def _count(self, outcome: str) -> None:
        if not self._written:
            self._written = True
            _OPERATIONS["write"].count(outcome, self._seconds)

    def _end(self) -> None:
        if self._open:
            self._open = False
            metrics.uploads_open.dec()


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
