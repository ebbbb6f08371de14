"""Wake-ups inside one process. For the event loop's thread only.

Nothing is polled and nothing is missed: a worker's wait begins at the moment of its
claim that found nothing, a watcher is registered before it looks at the job.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

_MOST_TICKETS = 64


@dataclass(slots=True)
class Ticket:
    """The moment at which claims found nothing: how much news there had been by then,
    and the ledger's time in microseconds. `claims` of them have yet to wait."""

    news: int
    now: int
    claims: int = 1


@dataclass(frozen=True, slots=True)
class Created:
    """A job that was recorded."""

    dataset: str
    format: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A job that came to its end; `reason` is empty unless it failed. `waited` seconds
    passed until it was taken up, None when it never was, and `lasted` until its end."""

    dataset: str
    format: str
    state: str
    reason: str
    waited: float | None
    lasted: float


@dataclass(slots=True)
class Changes:
    """What a transaction changed that somebody may wait for, and what is counted of it."""

    revisions: dict[str, int] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    fenced: set[str] = field(default_factory=set)
    """Jobs whose leases are lost."""
    cut: set[str] = field(default_factory=set)
    """Jobs whose output nobody may go on reading."""
    work: bool = False
    created: list[Created] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)


class Watcher:
    """Waits for one job."""

    def __init__(self) -> None:
        self.revision: float = 0
        self._told = asyncio.Event()

    def tell(self, revision: float) -> None:
        """The job has reached this revision; infinity: it is gone, or nobody knows."""
        self.revision = max(self.revision, revision)
        self._told.set()

    async def passed(self, revision: int) -> None:
        """Return once the job is past `revision`, or may be: then somebody has to look,
        and is woken by what comes after that."""
        while self.revision <= revision:
            self._told.clear()
            await self._told.wait()
        if self.revision == math.inf:
            self.revision = 0


class Signals:
    """Who waits for what."""

    def __init__(self) -> None:
        self._news = 0
        self._tickets: deque[Ticket] = deque()
        self._idle: set[asyncio.Event] = set()
        self._watchers: dict[str, set[Watcher]] = {}
        self._fences: dict[str, set[asyncio.Event]] = {}
        self._readers: dict[str, list[Callable[[], None]]] = {}

    # --- telling

    def spread(self, changes: Changes) -> None:
        """Tell of all that a transaction changed."""
        self.jobs(changes.revisions | dict.fromkeys(changes.gone, math.inf))
        self.fenced(changes.fenced)
        self.cut(changes.cut)
        if changes.work:
            self.work()

    def work(self) -> None:
        """A task may be due that was not before."""
        self._news += 1
        for event in self._idle:
            event.set()

    def jobs(self, revisions: Mapping[str, float]) -> None:
        """These jobs have reached these revisions."""
        for job_id, revision in revisions.items():
            for watcher in self._watchers.get(job_id, ()):
                watcher.tell(revision)

    def fenced(self, job_ids: Iterable[str]) -> None:
        """The leases of these jobs are lost."""
        for job_id in job_ids:
            for event in self._fences.get(job_id, ()):
                event.set()

    def cut(self, job_ids: Iterable[str]) -> None:
        """Nobody may go on reading the output of these jobs."""
        for job_id in job_ids:
            for tell in list(self._readers.get(job_id, ())):
                tell()

    def everyone(self) -> None:
        """Wake all who wait: the ledger closes, or news may have been missed."""
        self.work()
        self.jobs(dict.fromkeys(self._watchers, math.inf))
        self.fenced(list(self._fences))
        self.cut(list(self._readers))

    # --- waiting for work

    def news(self) -> int:
        """How much news of work there has been; ask before a claim begins."""
        return self._news

    def found_nothing(self, news: int, now: int) -> None:
        """A claim that began after `news` and looked at `now` found nothing."""
        last = self._tickets[-1] if self._tickets else None
        # Joining two claims under the earlier moment may cost one needless wake-up, and
        # keeps this short when somebody claims and never waits.
        if last and (last.news == news or len(self._tickets) >= _MOST_TICKETS):
            last.claims += 1
        else:
            self._tickets.append(Ticket(news, now))

    def take_ticket(self) -> tuple[int, int] | None:
        """News and time of the earliest claim that found nothing and has yet to wait:
        the caller's own or one before it, so that nothing is missed; each is served
        once, so that nobody spins. None when there is none."""
        if not self._tickets:
            return None
        ticket = self._tickets[0]
        ticket.claims -= 1
        if not ticket.claims:
            self._tickets.popleft()
        return ticket.news, ticket.now

    @contextmanager
    def idle(self, news: int) -> Iterator[asyncio.Event]:
        """An event that is set as soon as there is more than `news`."""
        event = asyncio.Event()
        if self._news > news:
            event.set()
        self._idle.add(event)
        try:
            yield event
        finally:
            self._idle.remove(event)

    def idlers(self) -> int:
        """How many wait for work."""
        return len(self._idle)

    # --- waiting for jobs

    @contextmanager
    def watch(self, job_id: str) -> Iterator[Watcher]:
        """Hear of a job from now on."""
        watcher = Watcher()
        watchers = self._watchers.setdefault(job_id, set())
        watchers.add(watcher)
        try:
            yield watcher
        finally:
            watchers.remove(watcher)
            if not watchers:
                del self._watchers[job_id]

    @contextmanager
    def fence(self, job_id: str) -> Iterator[asyncio.Event]:
        """An event that is set when the job's leases are lost."""
        event = asyncio.Event()
        events = self._fences.setdefault(job_id, set())
        events.add(event)
        try:
            yield event
        finally:
            events.remove(event)
            if not events:
                del self._fences[job_id]

    @contextmanager
    def on_cut(self, job_id: str, tell: Callable[[], None]) -> Iterator[None]:
        """Call `tell` when the job's output must not be read any more."""
        readers = self._readers.setdefault(job_id, [])
        readers.append(tell)
        try:
            yield
        finally:
            readers.remove(tell)
            if not readers:
                del self._readers[job_id]

    def waiting(self) -> Iterable[str]:
        """The jobs that somebody watches."""
        return self._watchers.keys()
