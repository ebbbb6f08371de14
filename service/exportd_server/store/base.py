"""The seam between exportd and where the bytes of outputs lie.

A store knows keys and bytes. It knows nothing of jobs' states: what may be read is
decided by the ledger's manifest, never by what happens to lie here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol, runtime_checkable

from exportd_server.store.key import JobPrefix, OutputKey

Buffer = bytes | bytearray | memoryview


class PartWriter(Protocol):
    """Writes one part; for one thread at a time, off the event loop.

    Nothing can be read under the key before `finalize`, which brings everything there at
    once, durably when it returns: no reader ever sees a piece. A key that has a part
    already is refused and keeps it. After `finalize`, `abort` or an error the writer is
    done, and used again it raises `ValueError` or the error; `abort` is idempotent, never
    raises, and leaves nothing behind. A writer whose job was deleted meanwhile fails
    instead of bringing it back.
    """

    def write(self, data: Buffer, /) -> int:
        """Append all of `data`; raises `StoreFailed`, `full` when there is no room."""
        ...

    def finalize(self) -> None:
        """Make the part readable and durable; raises `StoreFailed`, and then nothing is
        left under the key."""
        ...

    def abort(self) -> None:
        """Throw away what was written."""
        ...


class PartReader(Protocol):
    """Reads one finalized part from an offset on. Deleting the part does not disturb a
    reader that is open, where the store can promise it."""

    async def readinto(self, buffer: memoryview, /) -> int:
        """Fill `buffer` from its start with the next bytes; returns how many, fewer than
        asked at will, 0 only at the end. Never blocks the event loop."""
        ...

    async def close(self) -> None:
        """Free what is held; idempotent."""
        ...


class OutputStore(Protocol):
    """Keeps finalized parts until they are deleted."""

    def create(self, key: OutputKey) -> PartWriter:
        """Begin a part; blocks, for worker threads. Raises `StoreFailed`."""
        ...

    async def open(self, key: OutputKey, offset: int = 0) -> PartReader:
        """Open a finalized part at a byte offset. Raises `KeyError` when there is none,
        `StoreFailed` when the store does not answer."""
        ...

    async def size(self, key: OutputKey) -> int:
        """Bytes of a finalized part. Raises `KeyError` when there is none."""
        ...

    async def delete(self, key: OutputKey) -> None:
        """Delete one part; a missing one is fine."""
        ...

    async def delete_job(self, prefix: JobPrefix) -> int:
        """Delete everything of a job, unfinished writes included; returns how many
        objects went, and more where several delete at once and the store cannot tell
        what went by whom. Idempotent; a missing job is fine; never touches another's."""
        ...

    def list_job(self, prefix: JobPrefix) -> AsyncIterator[OutputKey]:
        """The finalized parts of a job, in no order."""
        ...

    def list_jobs(self) -> AsyncIterator[JobPrefix]:
        """Every job that has anything here, unfinished writes included, in no order."""
        ...

    async def sweep_unfinished(self, prefix: JobPrefix) -> int:
        """Delete writes of a job that never finished and whose writer is gone; returns
        how many. Call it when no lease on the job is held: a store that cannot tell
        whether a writer lives takes it for gone."""
        ...

    async def claim(self, owner: str) -> str:
        """Note durably that what lies here is the owner's, unless that was noted before;
        returns whose it is. Of several at once all are told the same. `owner` is a UUID.
        Raises `StoreFailed`."""
        ...

    async def close(self) -> None:
        """Free what is held."""
        ...


@dataclass(frozen=True, slots=True)
class SignedUrl:
    """A URL that gives one part to whoever has it, and when it stops doing so."""

    url: str
    expire_time: datetime


@runtime_checkable
class UrlSigner(Protocol):
    """What a store can do besides, whose parts others may fetch from it by HTTP."""

    async def signed_url(
        self,
        key: OutputKey,
        *,
        lifetime: timedelta,
        content_type: str,
        content_disposition: str,
    ) -> SignedUrl | None:
        """A URL of a finalized part that works for `lifetime`, or less where what signs
        it does not last as long, and whose answer has these headers; None when that is
        less than the store can sign. Nobody looks whether the part is there. Raises
        `StoreFailed`."""
        ...
