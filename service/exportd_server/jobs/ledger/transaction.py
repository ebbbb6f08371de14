"""What a statement works with, and what each database brings of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from sqlalchemy.engine import Connection

from exportd_server.jobs.ledger.base import ClaimLimits, Lease, TaskKind
from exportd_server.jobs.ledger.signals import Changes, Signals

T = TypeVar("T")


class Dialect(Protocol):
    """The few statements in which databases differ.

    The others are shared. They first lock the job's row (`FOR UPDATE`, which SQLite
    leaves out because its writers stand in line anyway) and only then look at its
    tasks: so the operations on one job come one after the other on every database.
    """

    def now(self, connection: Connection) -> int:
        """The ledger's clock, in microseconds since 1970."""
        ...

    def next_token(self, connection: Connection) -> int:
        """A fencing token above every one that a transaction ended with before."""
        ...

    def alone_with_tenant(self, connection: Connection, tenant: str) -> bool:
        """Whether nobody creates jobs for the tenant until the transaction ends; False
        when somebody is about to."""
        ...

    def ensure_tenant(self, connection: Connection, tenant: str) -> None:
        """Make sure that the tenant has a row, and that until the transaction ends
        nobody else creates jobs for it."""
        ...

    def ensure_queue(self, connection: Connection, values: Mapping[str, Any]) -> None:
        """Make sure that a delivery queue has a row; one that is there stays as it is."""
        ...

    def add_audit_records(
        self, connection: Connection, rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Insert audit records; those that are there stay as they are."""
        ...


@dataclass(slots=True)
class Transaction:
    """One open transaction at one moment."""

    connection: Connection
    dialect: Dialect
    now: int
    max_attempts: int
    changes: Changes = field(default_factory=Changes)


class Database(Protocol):
    """Runs transactions off the event loop and spreads the news of what they changed:
    to this process, and to others where there are any."""

    signals: Signals
    reads_at_a_time: int
    """How many reads gain by not waiting for each other."""

    async def write(self, work: Callable[[Transaction], T], *, line: str = "") -> T:
        """Run `work` in a transaction that may write. Those of one `line`, say of a job,
        would wait for each other in the database. It is durable when this returns,
        and only then do waiters hear of it. An exception undoes all of it."""
        ...

    async def read(self, work: Callable[[Transaction], T]) -> T:
        """Run `work` in a transaction that sees one state and writes nothing."""
        ...

    def read_here(self, work: Callable[[Transaction], T]) -> T | None:
        """As `read`, on the event loop's own thread: for a few rows, which take less time
        than the way to another thread and back. None where that cannot be had, for the
        network, or for a file that was slow or locked a moment ago."""
        ...

    async def write_apart(self, work: Callable[[Transaction], T]) -> T:
        """As `write`, not held up by what waits there, and from any event loop."""
        ...

    async def claim(
        self,
        owner: str,
        kinds: Collection[TaskKind],
        *,
        lease: int,
        limits: ClaimLimits,
    ) -> tuple[Lease | None, int]:
        """Lease the next task for `lease` microseconds; also returns the moment at which
        it looked."""
        ...

    async def close(self) -> None:
        """Let what runs end; free connections and threads."""
        ...
