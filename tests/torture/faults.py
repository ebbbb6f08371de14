"""What is done to the fleet, and when. The plan follows from the seed alone."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import psycopg

from exportd_server.jobs.ledger.postgres_server import Address
from tests.support.postgres import PostgresServer
from tests.torture import child
from tests.torture.fleet import Fleet, Member
from tests.torture.history import History
from tests.torture.options import Options

_AFTER_OUTAGE = 7.0
"""Seconds after an outage of the database until waits are held against their bounds:
what failed meanwhile is tried again after up to five."""
_FROZEN_ROWS = 4
_LOOK_SECONDS = 5

OF_PROCESSES = {"zombie": 6.0, "hiccup": 5.0, "term": 13.0, "clock": 4.0}
"""Seconds between two faults of a kind, on average."""
OF_THE_DATABASE = {
    "cut some": 8.0,
    "cut all": 20.0,
    "frozen transaction": 25.0,
    "postgres fast": 50.0,
    "postgres immediate": 50.0,
    "postgres kill": 50.0,
}
"""Likewise."""
EVERY = {**OF_PROCESSES, **OF_THE_DATABASE}
_ROUND, _CALM = 25.0, 15.0
"""Of so many seconds the database is left alone for the first ones, so that it can be
seen how soon the work of a killed worker is taken up while nothing else is wrong."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault; `chance` decides the rest of it."""

    at: float
    kind: str
    chance: int


def plan(options: Options) -> list[Fault]:
    """All faults of a run, in order."""
    chosen = random.Random(f"faults {options.seed}")
    kinds = ["kill"] * options.kills
    for kind, every in EVERY.items():
        # At least one of each, however short the run.
        kinds += [kind] * max(1, round(options.seconds / every))
    faults = [
        Fault(_moment(chosen, kind, options.seconds), kind, chosen.getrandbits(64))
        for kind in kinds
    ]
    return sorted(faults, key=lambda fault: fault.at)


def _moment(chosen: random.Random, kind: str, seconds: float) -> float:
    while True:
        at = chosen.uniform(0.5, seconds)
        calm = at % _ROUND < min(_CALM, seconds / 2)
        if kind not in OF_THE_DATABASE or not calm:
            return at


@dataclass(frozen=True, slots=True)
class Orphaned:
    """A lease whose holder was killed, at a moment of the database's clock."""

    at: float
    task_id: int
    job_id: str
    token: int
    generation: int


class Injector:
    """Does what the plan says."""

    def __init__(
        self,
        options: Options,
        fleet: Fleet,
        postgres: PostgresServer,
        url: str,
        history: History,
    ) -> None:
        self._options = options
        self._fleet = fleet
        self._postgres = postgres
        self._url = url
        self._history = history
        self._one_outage = asyncio.Lock()
        self._one_zombie = asyncio.Lock()
        self._outages = 0
        self.orphaned: list[Orphaned] = []
        self.disturbed: list[tuple[float, float]] = []
        """When the database, and not only a worker, was in trouble."""

    async def run(self) -> None:
        """Inject all of them; returns once the last one is over."""
        begun = time.monotonic()
        async with asyncio.TaskGroup() as running:
            for fault in plan(self._options):
                await asyncio.sleep(max(0.0, begun + fault.at - time.monotonic()))
                running.create_task(self._inject(fault))

    async def _inject(self, fault: Fault) -> None:
        chosen = random.Random(fault.chance)
        work = getattr(self, f"_{fault.kind.replace(' ', '_')}")
        try:
            await work(chosen)
        except Exception as error:  # noqa: BLE001 - the harness's own trouble ends it
            self._history.violation(
                "a fault could not be injected", fault=fault.kind, error=repr(error)
            )

    def _aim(self, chosen: random.Random) -> Member | None:
        targets = [member for member in self._fleet.members if member.target]
        # Somebody is left to take over.
        return chosen.choice(targets) if len(targets) > 1 else None

    # --- processes

    async def _kill(self, chosen: random.Random) -> None:
        member = None
        for _ in range(600):
            member = self._aim(chosen)
            if member is not None:
                break
            await asyncio.sleep(0.05)
        if member is None:
            self._history.note("nobody to kill")
            return
        # Stopped first, so that what it holds is what it held when it died.
        self._fleet.freeze(member)
        orphaned = await self._leases(member)
        self._fleet.kill(member)
        self.orphaned += orphaned
        if sum(worker.target for worker in self._fleet.workers) < 2:
            # Those who are left may have their hands full.
            self.disturbed.append((time.time(), time.time() + self._options.lease + 3.0))
        kind = "kill worker" if member.works else "kill api"
        self._history.note(kind, process=member.identity, leases=orphaned)

    async def _leases(self, member: Member) -> list[Orphaned]:
        """What it holds, if the database can tell."""
        try:
            async with asyncio.timeout(_LOOK_SECONDS):
                async with await psycopg.AsyncConnection.connect(
                    self._url, autocommit=True
                ) as connection:
                    cursor = await connection.execute(
                        "SELECT extract(epoch FROM clock_timestamp())::float8, task_id, "
                        "job_id, token, generation FROM exportd.tasks "
                        "WHERE state = 'leased' AND kind IN ('plan', 'shard') "
                        "AND owner LIKE %s",
                        (f"%:{member.pid}:%",),
                    )
                    return [Orphaned(*row) for row in await cursor.fetchall()]
        except (psycopg.Error, OSError, TimeoutError):
            return []

    async def _zombie(self, chosen: random.Random) -> None:
        """Stopped in the middle of an export, and back when another worker has just
        taken that over and is at it. One at a time, so that somebody is left to."""
        async with self._one_zombie:
            await self._one(chosen)

    async def _one(self, chosen: random.Random) -> None:
        for _ in range(20):
            member = self._aim(chosen)
            if member is None:
                return
            number = member.number
            self._fleet.freeze(member)
            held = await self._leases(member)
            if held:
                break
            self._fleet.thaw(member)
            await asyncio.sleep(0.1)
        else:
            self._history.note("nobody at work to freeze")
            return
        self._history.note("zombie", process=member.identity, leases=held)
        taken = await self._taken_over(held)
        await asyncio.sleep(chosen.choice([0.0, chosen.uniform(0, 0.3)]))
        if member.number == number:
            self._fleet.thaw(member)
            self._history.note("goes on", process=member.identity, taken_over=taken)

    async def _taken_over(self, held: list[Orphaned]) -> bool:
        """Wait for the first of these to be taken over, though not for ever."""
        tokens = [lease.token for lease in held]
        deadline = time.monotonic() + self._options.lease + 3.0
        while time.monotonic() < deadline:
            with suppress(psycopg.Error, OSError):
                async with await psycopg.AsyncConnection.connect(
                    self._url, autocommit=True, connect_timeout=5
                ) as connection:
                    while time.monotonic() < deadline:
                        cursor = await connection.execute(
                            "SELECT FROM audit.claims WHERE former = ANY (%s)", (tokens,)
                        )
                        if await cursor.fetchone() is not None:
                            return True
                        await asyncio.sleep(0.02)
            await asyncio.sleep(0.1)
        return False

    async def _hiccup(self, chosen: random.Random) -> None:
        """Stopped for less than its lease, in the middle of a transaction perhaps."""
        await self._stand_still(chosen, 0.05, self._options.lease * 0.9, "hiccup")

    async def _stand_still(
        self, chosen: random.Random, least: float, most: float, kind: str
    ) -> None:
        member = self._aim(chosen)
        if member is None:
            return
        number, seconds = member.number, chosen.uniform(least, most)
        self._fleet.freeze(member)
        self._history.note(kind, process=member.identity, seconds=seconds)
        await asyncio.sleep(seconds)
        if member.number == number:
            self._fleet.thaw(member)
            self._history.note("goes on", process=member.identity)

    async def _term(self, chosen: random.Random) -> None:
        member = self._aim(chosen)
        if member is not None:
            self._history.note("term", process=member.identity)
            await self._fleet.restart(member)

    async def _clock(self, chosen: random.Random) -> None:
        """A process's own clock jumps by an hour, back or forth, and later back."""
        member = self._aim(chosen)
        if member is not None:
            shift = chosen.choice([-3600.0, 3600.0, 0.0])
            child.set_shift(member.clock, shift)
            self._history.note("clock", process=member.identity, shift=shift)

    # --- the database

    @asynccontextmanager
    async def _trouble(self, after: float) -> AsyncIterator[None]:
        begun = time.time()
        try:
            yield
        finally:
            self.disturbed.append((begun, time.time() + after))

    async def _outage(self, kind: str, stop: Callable[[], None], seconds: float) -> None:
        async with self._one_outage, self._trouble(_AFTER_OUTAGE):
            self._history.note(kind, seconds=seconds)
            self._outages += 1
            self._fleet.may_refuse.set()
            try:
                await asyncio.to_thread(stop)
                await asyncio.sleep(seconds)
                await asyncio.to_thread(self._postgres.start)
            finally:
                asyncio.get_running_loop().call_later(_AFTER_OUTAGE, self._outage_over)
            self._history.note("postgres is back")

    def _outage_over(self) -> None:
        self._outages -= 1
        if not self._outages:
            self._fleet.may_refuse.clear()

    async def _postgres_fast(self, chosen: random.Random) -> None:
        await self._outage(
            "postgres fast", lambda: self._postgres.stop("fast"), chosen.uniform(0, 2)
        )

    async def _postgres_immediate(self, chosen: random.Random) -> None:
        await self._outage(
            "postgres immediate",
            lambda: self._postgres.stop("immediate"),
            chosen.uniform(0, 2),
        )

    async def _postgres_kill(self, chosen: random.Random) -> None:
        await self._outage("postgres kill", self._postgres.kill, chosen.uniform(0, 1))

    async def _cut_all(self, chosen: random.Random) -> None:
        await self._cut(share=1.0)

    async def _cut_some(self, chosen: random.Random) -> None:
        await self._cut(share=chosen.uniform(0.1, 0.6))

    async def _cut(self, share: float) -> None:
        """Cut connections, those of the sources and of the mutator among them."""
        self._outages += 1
        self._fleet.may_refuse.set()
        # While the server is away there is nothing to cut.
        async with self._one_outage, self._trouble(_AFTER_OUTAGE):
            asyncio.get_running_loop().call_later(_AFTER_OUTAGE, self._outage_over)
            with suppress(psycopg.Error, OSError):
                async with await psycopg.AsyncConnection.connect(
                    self._postgres.url(), autocommit=True
                ) as connection:
                    cursor = await connection.execute(
                        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
                        "WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
                        " AND random() < %s",
                        (share,),
                    )
                    (count,) = await cursor.fetchone() or (0,)
                    kind = "cut all" if share == 1.0 else "cut some"
                    self._history.note(kind, connections=count)

    async def _frozen_transaction(self, chosen: random.Random) -> None:
        """A peer with the service's own session settings stands still after it has
        locked some rows. It is the server that must end it."""

        def hold() -> str:
            with suppress(OSError):
                try:
                    connection = Address.parse(self._url).connect()
                except psycopg.Error:
                    return "not connected"
                with connection:
                    try:
                        connection.execute("BEGIN")
                        for table in chosen.sample(["jobs", "tasks", "tenants"], 2):
                            connection.execute(
                                f"SELECT FROM {table} ORDER BY random() "
                                f"LIMIT {_FROZEN_ROWS} FOR UPDATE SKIP LOCKED"
                            )
                        time.sleep(8)
                        connection.execute("SELECT 1")
                    except psycopg.Error as error:
                        return error.sqlstate or "cut"
                    return "lived on"
            return "not connected"

        async with self._trouble(_AFTER_OUTAGE):
            end = await asyncio.to_thread(hold)
        self._history.note("frozen transaction", end=end)
        if end == "lived on":
            self._history.violation("a frozen transaction is not ended by the server")
