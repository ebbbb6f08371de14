"""Who is downloading what: expiry does not cut a download in progress, whichever process
reaps, and a cancel or a delete cuts it, whichever process took the call.

A download that is far from its job's expiry costs the ledger nothing. One that is near it
has the output pinned there, for a minute at a time, so that the pins of a process that
died run out.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import Context
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count

import structlog

from exportd_server.errors import LedgerUnavailable
from exportd_server.jobs.ledger.base import Ledger
from exportd_server.jobs.model import Job

log = structlog.get_logger(__name__)

_PIN = timedelta(seconds=60)
"""How long a pin is in force. A process that dies holds up a deletion no longer."""
_AGAIN = 1.0
"""Seconds until a ledger that was out of reach is asked again."""
_LAST_WORDS = 2.0
"""Seconds that the end of the process gives pins to be taken back; else they run out."""


class Cut(Exception):
    """The job was cancelled or deleted, or its output may be gone: send no more of it."""


@dataclass(eq=False, slots=True)
class _Read:
    """What this process reads of one job, by how many downloads."""

    job_id: str
    reader: str
    """Whose pins these are in the ledger."""
    downloads: int = 0
    cut: bool = False
    doubted: bool = False
    """The ledger said that the job may have been cut."""
    job: Job | None = None
    pinned: bool = False
    pin_at: float | None = None
    """When to pin, or to prolong the pin, by the monotonic clock; None: not known yet."""
    again_at: float = 0.0
    """Not to be minded before then."""
    scopes: set[asyncio.Timeout] = field(default_factory=set)

    def due_at(self) -> float | None:
        """When it is to be minded next; None: when something happens."""
        if self.cut or not (self.doubted or self.pin_at is not None):
            return None
        return max(self.again_at, 0.0 if self.doubted else self.pin_at or 0.0)


class Readers:
    """Downloads of this process, by job. For the event loop's thread only."""

    def __init__(self, ledger: Ledger, *, pin: timedelta = _PIN) -> None:
        self._ledger = ledger
        self._name = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._numbers = count(1)
        self._pin = pin
        self._renewal = pin.total_seconds() / 3
        self._margin = 2 * self._renewal
        self._reads: dict[str, _Read] = {}
        self._ended: list[_Read] = []
        self._due = asyncio.Event()
        self._minding: asyncio.Task[None] | None = None

    # --- for downloads

    @contextmanager
    def reading(self, job_id: str) -> Iterator[None]:
        """Mark a download for as long as it runs."""
        read = self._reads.get(job_id)
        if read is None:
            reader = f"{self._name}:{next(self._numbers)}"
            read = self._reads[job_id] = _Read(job_id, reader)
        read.downloads += 1
        try:
            with self._ledger.on_cut(job_id, lambda: self._doubt(read)):
                yield
        finally:
            read.downloads -= 1
            if not read.downloads:
                del self._reads[job_id]
                if read.pinned:
                    self._ended.append(read)
                    self._mind()

    async def keep(self, job: Job) -> None:
        """Have the output of a job that is being read here outlast its expiry. `job` was
        read from the ledger a moment ago. Raises `Cut` when it is too late and the output
        may go at any moment, and `LedgerUnavailable`."""
        read = self._reads[job.job_id]
        if read.cut:
            raise Cut
        if job.expire_time is None or job.read_time is None or read.pin_at is not None:
            return
        left = (job.expire_time - job.read_time).total_seconds()
        read.job = job
        read.pin_at = time.monotonic() + left - self._margin
        # So near that it may expire before anybody else gets to pin it.
        if left <= self._margin and not await self._prolong(read, job):
            self._cut(read)
            raise Cut
        self._mind()

    def cut(self, job_id: str) -> None:
        """End the job's downloads in this process, which has just cancelled or deleted it;
        the others hear of it from the ledger."""
        if read := self._reads.get(job_id):
            self._cut(read)

    def is_cut(self, job_id: str) -> bool:
        """Whether a running download of the job must end now."""
        read = self._reads.get(job_id)
        return read is not None and read.cut

    @asynccontextmanager
    async def until_cut(self, job_id: str) -> AsyncIterator[None]:
        """Within `reading`: raises `Cut` in the block, whatever it waits for, as soon as
        the job's downloads must end."""
        read = self._reads[job_id]
        if read.cut:
            raise Cut
        scope = asyncio.timeout(None)
        try:
            async with scope:
                read.scopes.add(scope)
                try:
                    yield
                finally:
                    read.scopes.discard(scope)
        except TimeoutError:
            if scope.expired():
                raise Cut from None
            raise

    async def close(self) -> None:
        """Take pins back; no download runs any more."""
        self._due.set()
        if self._minding is not None:
            await asyncio.wait({self._minding}, timeout=_LAST_WORDS)
            self._minding.cancel()

    # --- minding them

    def _doubt(self, read: _Read) -> None:
        read.doubted = True
        self._mind()

    def _cut(self, read: _Read) -> None:
        # For good: neither a cancelled job nor a deleted or expired one ever comes back.
        if read.cut:
            return  # by another's news, and its scopes are ending
        read.cut = True
        for scope in read.scopes:
            scope.reschedule(asyncio.get_running_loop().time())

    def _mind(self) -> None:
        self._due.set()
        if self._minding is None or self._minding.done():
            # It serves all callers, so it takes nothing over from the one of now.
            self._minding = asyncio.create_task(self._run(), context=Context())

    async def _run(self) -> None:
        """Runs while there is something to mind, one task for all downloads."""
        while True:
            self._due.clear()
            now = time.monotonic()
            ended, self._ended = self._ended, []
            moments = {read: read.due_at() for read in self._reads.values()}
            due = [read for read, at in moments.items() if at is not None and at <= now]
            await asyncio.gather(*map(self._attend, due), *map(self._unpin, ended))
            waits = [at for read in self._reads.values() if (at := read.due_at())]
            if not waits and not self._due.is_set():
                return
            pause = min(waits, default=0.0) - time.monotonic()
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, pause)):
                    await self._due.wait()

    async def _attend(self, read: _Read) -> None:
        try:
            if read.doubted:
                read.doubted = False
                if await self._ledger.is_cut(read.job_id, read.reader):
                    self._cut(read)
                    return
            if read.job is not None and not await self._prolong(read, read.job):
                self._cut(read)
        except Exception as error:
            known = isinstance(error, LedgerUnavailable)
            log.warning("a download could not be minded", exc_info=None if known else error)
            read.doubted = True
            read.again_at = time.monotonic() + _AGAIN

    async def _prolong(self, read: _Read, job: Job) -> bool:
        """Pin the output if it is time to; False when it is too late."""
        begun = time.monotonic()
        if read.pin_at is None or read.pin_at > begun:
            return True
        # Before the call: its answer may be lost, and the pin be there.
        read.pinned = True
        if not await self._ledger.pin_output(
            job.tenant, job.job_id, read.reader, length=self._pin
        ):
            return False
        read.pin_at = begun + self._renewal
        return True

    async def _unpin(self, read: _Read) -> None:
        try:
            await self._ledger.unpin_output(read.job_id, read.reader)
        except Exception as error:
            known = isinstance(error, LedgerUnavailable)
            log.warning("a pin is left to run out", exc_info=None if known else error)
