"""What a statement works with, and what each database brings of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol, TypeVar

from sqlalchemy.engine import Connection

from exportd_server.jobs.ledger.base import ClaimLimits, Lease, TaskKind
from exportd_server.jobs.ledger.prepared import Call, Prepared, run_all
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

    def next_token(self, tx: Transaction) -> int:
        """A fencing token above every one that a transaction ended with before."""
        ...

    def alone_with_tenant(self, tx: Transaction, tenant: str) -> bool:
        """Whether nobody creates jobs for the tenant until the transaction ends; False
        when somebody is about to."""
        ...

    def ensure_tenant(self, tx: Transaction, tenant: str) -> None:
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


_Then = Callable[[list[Any]], None]


class Transaction:
    """One transaction at one moment, `now`, in microseconds since 1970.

    A server is a round trip away. Statements whose rows nobody waits for are put off with
    `later`, and go together with the next one whose rows are; each of them sees what those
    before it did, in the order in which they were given.
    """

    __slots__ = ("_late", "_open", "changes", "dialect", "max_attempts", "now")

    def __init__(
        self, connection: Connection | None, dialect: Dialect, now: int, max_attempts: int
    ) -> None:
        self._open = connection
        self._late: list[tuple[Prepared, Mapping[str, Any], _Then | None]] = []
        self.dialect = dialect
        self.now = now
        self.max_attempts = max_attempts
        self.changes = Changes()

    @property
    def connection(self) -> Connection:
        """The connection, with nothing put off."""
        self.flush()
        return self._opened()

    def later(
        self, statement: Prepared, then: _Then | None = None, /, **values: Any
    ) -> None:
        """Run a statement before the next one whose rows are asked for, or before the
        transaction ends; `then` is given its rows."""
        self._late.append((statement, values, then))

    def rows(self, statement: Prepared, /, **values: Any) -> list[Any]:
        """Run a statement now, and what was put off before it; its rows. Raises as the
        library does, and what a `then` raises."""
        if self._open is not None and not self._late:
            return statement.rows(self._open, **values)
        found: list[Any] = []
        self.later(statement, found.extend, **values)
        self.flush()
        return found

    def first(self, statement: Prepared, /, **values: Any) -> Any:
        """As `rows`: the first row, None when there is none."""
        if self._open is not None and not self._late:
            rows = statement.rows(self._open, **values)
        else:
            rows = self.rows(statement, **values)
        return rows[0] if rows else None

    def scalar(self, statement: Prepared, /, **values: Any) -> Any:
        """As `rows`: the first column of the first row, None when there is none."""
        row = self.first(statement, **values)
        return None if row is None else row[0]

    def last(self, *calls: Call) -> list[list[Any]]:
        """Run the last statements of a transaction that writes nothing; the rows of each.
        It has ended then, also for the server. Raises as `rows`."""
        self.flush()
        found = run_all(self._opened(), calls)
        self._open = None
        return found

    def run(self, work: Callable[[Transaction], T]) -> T:
        """Do all of a piece of work, with what it puts off."""
        result = work(self)
        if self._late:
            self.flush()
        return result

    def flush(self) -> None:
        """Run what was put off."""
        if self._open is not None and not self._late:
            return
        late, self._late = self._late, []
        found = self._run([(statement, values) for statement, values, _ in late])
        for (_, _, then), rows in zip(late, found, strict=True):
            if then is not None:
                then(rows)

    def _run(self, calls: Sequence[Call]) -> list[list[Any]]:
        """Run them, on the connection; a transaction that was made without one begins."""
        return run_all(self._opened(), calls)

    def _opened(self) -> Connection:
        if self._open is None:
            raise RuntimeError("the transaction has not begun, or has ended")
        return self._open


class Database(Protocol):
    """Runs transactions off the event loop and spreads the news of what they changed:
    to this process, and to others where there are any."""

    signals: Signals
    reads_at_a_time: int
    """How many reads gain by not waiting for each other."""
    is_far: bool
    """Whether asking again costs more than asking for what may not be needed."""

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

    def version_here(self) -> tuple[object, datetime] | None:
        """What is the same again as long as nothing was committed, by whoever; and the
        ledger's time before it was looked at. On the event loop's own thread; None where
        that cannot be had, as of `read_here`."""
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
