"""A store whose writers stand still where the test says so, and what lies in a store."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exportd_server.errors import StoreFailed
from exportd_server.store.base import Buffer, OutputStore, PartReader, PartWriter
from exportd_server.store.key import JobPrefix, OutputKey, OutputKind
from tests.support.seaweed import RawS3, SeaweedServer
from tests.support.server import until
from tests.support.waits import ENOUGH


@dataclass(eq=False)
class Hold:
    """A point that the first writer gets to, and not beyond until it is released."""

    point: str
    kind: OutputKind
    released: threading.Event = field(default_factory=threading.Event)
    keys: list[OutputKey] = field(default_factory=list)
    passed: int = 0

    async def reached(self) -> None:
        """Wait until a writer stands there."""
        await until(lambda: self.keys, ENOUGH)

    def stand(self, key: OutputKey) -> None:
        self.keys.append(key)
        self.released.wait(10 * ENOUGH)
        self.passed += 1


class HoldingStore:
    """Passes everything on to another store. Points: `before finalize` and `after
    finalize`."""

    def __init__(self, inner: OutputStore) -> None:
        self.inner = inner
        self._holds: list[Hold] = []
        self.failed: list[OutputKey] = []
        """Parts that could not be finalized."""

    @contextmanager
    def holding(self, point: str, kind: OutputKind) -> Iterator[Hold]:
        """Have the first writer of that kind that gets there stand still, as long as the
        context is open and the hold is not released."""
        hold = Hold(point, kind)
        self._holds.append(hold)
        try:
            yield hold
        finally:
            self._holds.remove(hold)
            hold.released.set()

    def at(self, point: str, key: OutputKey) -> None:
        for hold in list(self._holds):
            if (hold.point, hold.kind) == (point, key.kind) and not hold.keys:
                hold.stand(key)

    def create(self, key: OutputKey) -> PartWriter:
        return _Writer(self, key, self.inner.create(key))

    async def open(self, key: OutputKey, offset: int = 0) -> PartReader:
        return await self.inner.open(key, offset)

    async def size(self, key: OutputKey) -> int:
        return await self.inner.size(key)

    async def delete(self, key: OutputKey) -> None:
        await self.inner.delete(key)

    async def delete_job(self, prefix: JobPrefix) -> int:
        return await self.inner.delete_job(prefix)

    def list_job(self, prefix: JobPrefix) -> AsyncIterator[OutputKey]:
        return self.inner.list_job(prefix)

    def list_jobs(self) -> AsyncIterator[JobPrefix]:
        return self.inner.list_jobs()

    async def sweep_unfinished(self, prefix: JobPrefix) -> int:
        return await self.inner.sweep_unfinished(prefix)

    async def claim(self, owner: str) -> str:
        return await self.inner.claim(owner)

    async def close(self) -> None:
        await self.inner.close()


class _Writer:
    def __init__(self, store: HoldingStore, key: OutputKey, inner: PartWriter) -> None:
        self._store = store
        self._key = key
        self._inner = inner

    def write(self, data: Buffer, /) -> int:
        return self._inner.write(data)

    def finalize(self) -> None:
        self._store.at("before finalize", self._key)
        try:
            self._inner.finalize()
        except StoreFailed:
            self._store.failed.append(self._key)
            raise
        self._store.at("after finalize", self._key)

    def abort(self) -> None:
        self._inner.abort()


@dataclass(frozen=True)
class Place:
    """Somewhere to store outputs, and a look at all that lies there past the store."""

    settings: dict[str, Any]
    remains: Callable[[], list[str]]
    """Every file, object and unfinished upload but the mark of the owner."""


def local_place(directory: Path) -> Place:
    """A directory of its own."""

    def remains() -> list[str]:
        # Unlike a glob, a walk does not mind what is deleted meanwhile.
        walk = os.walk(directory)
        files = (Path(folder, name) for folder, _, names in walk for name in names)
        found = sorted(str(file.relative_to(directory)) for file in files)
        return [name for name in found if name != ".owner"]

    return Place({"url": f"file://{directory}"}, remains)


def s3_place(seaweed: SeaweedServer) -> Place:
    """A prefix of its own."""
    options = seaweed.options()
    raw = RawS3(seaweed.raw, options)

    def remains() -> list[str]:
        unfinished = [f"{name} unfinished" for name in raw.uploads()]
        return sorted([name for name in raw.objects() if name != ".owner"] + unfinished)

    return Place(
        {
            "url": f"s3://{options.bucket}/{options.prefix}",
            "s3": {
                "endpoint_url": options.endpoint_url,
                "region": options.region,
                "path_style": True,
                "access_key_id": options.access_key_id,
                "secret_access_key": options.secret_access_key,
            },
        },
        remains,
    )
