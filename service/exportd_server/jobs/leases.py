"""Keeps the leases of a process alive, and stops what runs under one that is lost.

Leases are renewed from a thread with an event loop of its own. The main loop may be busy
for longer than a lease lasts, with a large answer or in a library that keeps the lock of
the interpreter to itself for a while; work must not be taken away for that.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import TypeVar

import structlog

from exportd_server.errors import LedgerUnavailable
from exportd_server.jobs.ledger.base import Lease, LeaseLost, Ledger
from exportd_server.platform.threads import in_daemon_thread
from exportd_server.platform.tracing import NO_SPAN, Span
from exportd_server.platform.waits import Backoff, first

log = structlog.get_logger(__name__)

T = TypeVar("T")

_OUTAGE = Backoff(0.05, 2.0)
_STOPPING = 3.0
"""Seconds that the end of the worker waits for a renewal under way."""


class GivenBack(Exception):
    """The worker ends, and another one is to go on with the work."""


class Held:
    """A lease at work, and how to stop that work. Made in the event loop's thread, and
    for that one alone but where it says otherwise."""

    def __init__(self, lease: Lease) -> None:
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._lease = lease
        self._lost = False
        self._cancel: Callable[[], None] | None = None
        self._steady = asyncio.Event()
        self._steady.set()
        self._stopped = asyncio.Event()
        self._given_back = asyncio.Event()
        self.outages = 0
        """How many calls met a ledger that was out of reach."""
        self.span: Span = NO_SPAN
        """What the work is traced by, where all of it is one step."""

    @property
    def lease(self) -> Lease:
        """The lease as it is now; from any thread."""
        return self._lease

    @property
    def lost(self) -> bool:
        """Whether the lease is known to be lost; from any thread."""
        return self._lost

    # --- stopping

    def lose(self, lease: Lease) -> bool:
        """The ledger says that `lease` is lost: stop; from any thread. Returns False
        when that says nothing, because the work goes on under another one, or is about
        to and will hear of it by itself."""
        with self._lock:
            if lease.token != self._lease.token or not self._steady.is_set():
                return False
            if self._lost:
                return True
            self._lost = True
        self._stop()
        return True

    def give_back(self) -> None:
        """Stop, so that another worker can go on."""
        self._given_back.set()
        self._stop()

    def _stop(self) -> None:
        with self._lock:
            cancel = self._cancel
        if cancel is not None:
            cancel()
        # The loop may have ended, and then nobody waits any more.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stopped.set)

    def end(self) -> None:
        """Nothing is done under the lease any more: what still runs is to stop."""
        self._lost = True
        self._stop()

    @contextmanager
    def stopping(self, cancel: Callable[[], None]) -> Iterator[None]:
        """Have `cancel` called, from any thread and perhaps more than once, when the work
        is to stop. Raises `LeaseLost` or `GivenBack` when it is to stop already."""
        with self._lock:
            self._cancel = cancel
        try:
            self.check()
            yield
        finally:
            with self._lock:
                self._cancel = None

    def check(self) -> None:
        """Raise `LeaseLost` or `GivenBack` when the work is to stop."""
        if self._lost or self._given_back.is_set():
            raise self.why_stopped()

    def why_stopped(self) -> LeaseLost | GivenBack:
        """What it means that the work was told to stop."""
        return LeaseLost() if self._lost else GivenBack()

    async def unless_stopped(self, work: Awaitable[T]) -> T:
        """What `work` comes to; but once it is to stop, cancel it and raise `LeaseLost` or
        `GivenBack`."""
        task = asyncio.ensure_future(work)
        await first(task, self._stopped.wait())
        if task.cancelled():
            self.check()
        return task.result()

    async def given_back(self) -> None:
        """Wait until the lease is to be given back."""
        await self._given_back.wait()

    # --- going on

    @contextmanager
    def changing(self) -> Iterator[Callable[[Lease], None]]:
        """For a call that exchanges the lease for the next one, to be told through what
        this gives, or that ends it. In between the ledger may call it lost already."""
        with self._lock:
            self._steady.clear()
        try:
            yield self._move_to
        finally:
            with self._lock:
                self._steady.set()

    def _move_to(self, lease: Lease) -> None:
        with self._lock:
            self._lease = lease

    async def steady(self) -> Lease:
        """The lease, once it is not about to be exchanged."""
        await self._steady.wait()
        return self._lease

    async def insist(self, call: Callable[[], Awaitable[T]]) -> T:
        """Make a call to the ledger, and make it again for as long as the ledger is out
        of reach. Raises what the call raises else, and `LeaseLost` as soon as that is
        known in another way."""
        failures = 0
        while True:
            try:
                result = await call()
            except LedgerUnavailable as error:
                failures += 1
                if failures == 1:
                    self.outages += 1
                    log.warning("ledger out of reach", cause=repr(error.__cause__))
            else:
                if failures:
                    log.info("ledger is back", failures=failures)
                return result
            if self._lost:
                raise LeaseLost
            await asyncio.sleep(_OUTAGE.pause(failures))


class Leases:
    """The leases that this process holds. `lease` is how long one lasts, in seconds."""

    def __init__(self, ledger: Ledger, lease: float) -> None:
        self._ledger = ledger
        self._seconds = lease
        self._lock = threading.Lock()
        self._held: set[Held] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._ended: asyncio.Future[None] | None = None

    @contextmanager
    def hold(self, lease: Lease) -> Iterator[Held]:
        """Renew a lease for as long as the context is open."""
        held = Held(lease)
        with self._lock:
            self._held.add(held)
        try:
            yield held
        finally:
            with self._lock:
                self._held.remove(held)
            held.end()

    def held(self) -> list[Held]:
        """The leases at work; from any thread."""
        with self._lock:
            return list(self._held)

    async def renew(self) -> None:
        """Renew what is held, from any event loop. Raises what the ledger raises."""
        held = {one.lease.token: one for one in self.held()}
        if held:
            for lost in await self._renew([one.lease for one in held.values()]):
                if lost.token in held:
                    held[lost.token].lose(lost)

    async def _renew(self, leases: list[Lease]) -> list[Lease]:
        return await self._ledger.renew(leases, timedelta(seconds=self._seconds))

    # --- the fence

    @asynccontextmanager
    async def fenced(self, held: Held) -> AsyncIterator[None]:
        """Learn at once when the job's leases are lost, for as long as the context is
        open, and not only at the next call to the ledger."""
        with self._ledger.fence(held.lease) as event:
            minding = asyncio.create_task(self._mind(event, held))
            try:
                yield
            finally:
                minding.cancel()
                await asyncio.wait({minding})

    async def _mind(self, event: asyncio.Event, held: Held) -> None:
        while True:
            await event.wait()
            event.clear()
            # The news may have been false, or about the lease before.
            while True:
                lease = await held.steady()
                try:
                    lost = await held.insist(partial(self._renew, [lease]))
                except LeaseLost:
                    return
                except Exception:
                    log.exception("a lease could not be asked about")
                    break
                if not lost or held.lose(lease):
                    break

    # --- the thread

    def start(self) -> None:
        """Begin to renew, until `stop`."""
        loop = self._loop = asyncio.new_event_loop()

        def run() -> None:
            try:
                loop.run_until_complete(self._keep())
            finally:
                loop.close()

        self._ended = in_daemon_thread(run, "leases")

    async def ended(self) -> None:
        """Wait until renewing has ended, which it does not by itself; raises why."""
        if self._ended is not None:
            await asyncio.wait({self._ended})
            self._ended.result()

    async def stop(self) -> None:
        """End renewing; what is still held runs out."""
        if self._loop is None or self._ended is None:
            return
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stop.set)
        await asyncio.wait({self._ended}, timeout=_STOPPING)

    async def _keep(self) -> None:
        often = self._seconds / 3
        soon = min(1.0, self._seconds / 10)
        failures, pause = 0, often
        while not self._stop.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._stop.wait()
            try:
                async with asyncio.timeout(often):
                    await first(self.renew(), self._stop.wait())
            except Exception as error:
                failures, pause = failures + 1, soon
                if failures == 1:
                    known = isinstance(error, LedgerUnavailable | TimeoutError)
                    log.warning(
                        "leases could not be renewed", exc_info=None if known else error
                    )
            else:
                if failures:
                    log.info("leases are renewed again", failures=failures)
                failures, pause = 0, often
