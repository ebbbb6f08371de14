"""A store that spoils the calls that a test tells it to spoil.

A plan looks at every call and says what is to become of it; `on` makes the usual ones.
The real store lies beneath: what a call left there before it failed is really there.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from exportd_server.errors import StoreFailed
from exportd_server.store.base import Buffer, OutputStore, PartReader, PartWriter
from exportd_server.store.key import JobPrefix, OutputKey, OutputKind
from tests.support.waits import ENOUGH

_T = TypeVar("_T")

OPERATIONS = frozenset(
    {
        "create", "write", "finalize", "abort", "open", "readinto", "size", "delete",
        "delete_job", "list_job", "list_jobs", "sweep_unfinished", "claim",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Call:
    """One call; `key` is the part that it is about, if it is about one."""

    operation: str
    key: OutputKey | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """What becomes of a call.

    It stands still first if it `holds`. It `fails`, as when the store is throttled or
    down, or because the store is `full`: before it had any effect, or after all of it
    with `late`. A writer that fails has thrown away what it had, unless it is `lost`:
    then that stays behind, as when its process or its network died, and nothing else that
    this writer does has any effect. An abort never raises, so to it only `lost` does
    anything.

    What is read can be changed: it `ends` here, comes `short`, one byte at a time, or has
    one bit `flipped`.
    """

    fails: bool = False
    full: bool = False
    late: bool = False
    lost: bool = False
    holds: bool = False
    ends: bool = False
    short: bool = False
    flipped: bool = False

    @property
    def error(self) -> StoreFailed | None:
        """What the call raises, made anew each time."""
        return StoreFailed(full=self.full) if self.fails or self.full else None


Plan = Callable[[Call], Fault | None]

FAILS = Fault(fails=True)
FULL = Fault(full=True)


def on(
    operation: str,
    fault: Fault,
    *,
    kind: OutputKind | None = None,
    first: int = 0,
    times: int | None = None,
) -> Plan:
    """Spoil calls of one operation, on parts of one kind if it is given: `times` of them
    from the one with index `first` on, all of them with None."""
    assert operation in OPERATIONS
    lock, seen = threading.Lock(), 0

    def plan(call: Call) -> Fault | None:
        nonlocal seen
        if call.operation != operation:
            return None
        if kind is not None and (call.key is None or call.key.kind is not kind):
            return None
        with lock:
            late, seen = seen - first, seen + 1
        return fault if late >= 0 and (times is None or late < times) else None

    return plan


def any_of(*plans: Plan) -> Plan:
    """Several plans at once; the first that wants to spoil a call does so."""

    def plan(call: Call) -> Fault | None:
        faults = [one(call) for one in plans]
        return next((fault for fault in faults if fault is not None), None)

    return plan


def _nothing(_: Call) -> Fault | None:
    return None


class FaultyStore:
    """Passes everything on to another store, but for what its plan spoils. The plan may
    be changed at any time."""

    def __init__(self, inner: OutputStore, plan: Plan = _nothing) -> None:
        self.inner = inner
        self.plan = plan
        self.counts: Counter[str] = Counter()
        self.spoilt: Counter[str] = Counter()
        """Calls that the plan had something to say about."""
        self.held = 0
        """Calls that stand still at this moment."""
        self._released = threading.Event()
        self._lock = threading.Lock()

    def heal(self) -> None:
        """Spoil nothing from now on, and let go of what stands still."""
        self.plan = _nothing
        self.release()

    def release(self) -> None:
        """Let go of what stands still."""
        self._released.set()
        self._released = threading.Event()

    def create(self, key: OutputKey) -> PartWriter:
        fault = self.spoil(Call("create", key))
        if (error := fault.error) is None:
            return _Writer(self, key, self.inner.create(key))
        if fault.late:
            self.inner.create(key)  # and nobody ever gets to it
        raise error

    async def open(self, key: OutputKey, offset: int = 0) -> PartReader:
        async def call() -> PartReader:
            return _Reader(self, key, await self.inner.open(key, offset))

        return await self._pass("open", call, key)

    async def size(self, key: OutputKey) -> int:
        return await self._pass("size", lambda: self.inner.size(key), key)

    async def delete(self, key: OutputKey) -> None:
        await self._pass("delete", lambda: self.inner.delete(key), key)

    async def delete_job(self, prefix: JobPrefix) -> int:
        return await self._pass("delete_job", lambda: self.inner.delete_job(prefix))

    def list_job(self, prefix: JobPrefix) -> AsyncIterator[OutputKey]:
        return self._list("list_job", self.inner.list_job(prefix))

    def list_jobs(self) -> AsyncIterator[JobPrefix]:
        return self._list("list_jobs", self.inner.list_jobs())

    async def sweep_unfinished(self, prefix: JobPrefix) -> int:
        return await self._pass(
            "sweep_unfinished", lambda: self.inner.sweep_unfinished(prefix)
        )

    async def claim(self, owner: str) -> str:
        return await self._pass("claim", lambda: self.inner.claim(owner))

    async def close(self) -> None:
        await self.inner.close()

    def spoil(self, call: Call) -> Fault:
        """Count a call, have it stand still if it must, and tell what becomes of it."""
        with self._lock:
            self.counts[call.operation] += 1
        fault = self.plan(call)
        if fault is None:
            return Fault()
        with self._lock:
            self.spoilt[call.operation] += 1
        if fault.holds:
            released = self._released
            with self._lock:
                self.held += 1
            try:
                released.wait(10 * ENOUGH)
            finally:
                with self._lock:
                    self.held -= 1
        return fault

    async def spoil_async(self, call: Call) -> Fault:
        """The same for a call on an event loop, which must go on."""
        return await asyncio.to_thread(self.spoil, call)

    async def _pass(
        self,
        operation: str,
        call: Callable[[], Awaitable[_T]],
        key: OutputKey | None = None,
    ) -> _T:
        fault = await self.spoil_async(Call(operation, key))
        if (error := fault.error) is None:
            return await call()
        if fault.late:
            await call()
        raise error

    async def _list(self, operation: str, items: AsyncIterator[_T]) -> AsyncIterator[_T]:
        """A listing that fails late does so after its last item."""
        fault = await self.spoil_async(Call(operation))
        error = fault.error
        if error is not None and not fault.late:
            raise error
        async for item in items:
            yield item
        if error is not None:
            raise error


class _Writer:
    def __init__(self, store: FaultyStore, key: OutputKey, inner: PartWriter) -> None:
        self._store = store
        self._key = key
        # None once the writer is lost. Nobody else refers to the inner one, so a store
        # that knows its writers then takes it for dead.
        self._inner: PartWriter | None = inner

    def write(self, data: Buffer, /) -> int:
        return self._pass("write", lambda inner: inner.write(data))

    def finalize(self) -> None:
        self._pass("finalize", lambda inner: inner.finalize())

    def abort(self) -> None:
        if self._store.spoil(Call("abort", self._key)).lost:
            self._inner = None
        if self._inner is not None:
            self._inner.abort()

    def _pass(self, operation: str, call: Callable[[PartWriter], _T]) -> _T:
        fault = self._store.spoil(Call(operation, self._key))
        if self._inner is None:
            raise StoreFailed
        if (error := fault.error) is None:
            return call(self._inner)
        if fault.late:
            call(self._inner)
        if fault.lost:
            self._inner = None
        else:
            self._inner.abort()
        raise error


class _Reader:
    def __init__(self, store: FaultyStore, key: OutputKey, inner: PartReader) -> None:
        self._store = store
        self._key = key
        self._inner = inner

    async def readinto(self, buffer: memoryview, /) -> int:
        fault = await self._store.spoil_async(Call("readinto", self._key))
        if fault.ends:
            return 0
        count = await self._inner.readinto(buffer[:1] if fault.short else buffer)
        if (error := fault.error) is not None:
            raise error
        if fault.flipped and count:
            buffer[count // 2] ^= 1
        return count

    async def close(self) -> None:
        await self._inner.close()
