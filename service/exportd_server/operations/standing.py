"""How the service stands, as its ledger knows it: read at one go, shown as text or JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any, TypeVar

import sqlalchemy as sa

from exportd_server.jobs.ledger.codec import to_moment, to_moment_or_none
from exportd_server.jobs.ledger.looking import (
    QUESTION_SECONDS,
    Look,
    TookTooLong,
    look_at_file,
    look_at_server,
)
from exportd_server.jobs.ledger.postgres_server import Address
from exportd_server.jobs.ledger.statements import standing as statements
from exportd_server.jobs.ledger.tables import TaskState
from exportd_server.places import is_embedded, ledger_file, ledger_url
from exportd_server.settings import Settings

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Holder:
    """A process at work: how many leases of one kind of task it holds, and when the first
    of them ends unless it is renewed."""

    owner: str
    kind: str
    leases: int
    expires: datetime


@dataclass(frozen=True, slots=True)
class LateLease:
    """A lease that should have been renewed by now. `job_id` is empty for housekeeping."""

    owner: str
    kind: str
    job_id: str
    attempt: int
    expires: datetime


@dataclass(frozen=True, slots=True)
class JobQueue:
    """Jobs of one dataset that are in one state; the oldest was created at `oldest`."""

    state: str
    dataset: str
    jobs: int
    oldest: datetime


@dataclass(frozen=True, slots=True)
class TaskQueue:
    """Tasks of one kind that are in one state. Those that are scheduled wait until `due`
    at least. Housekeeping that returns for ever has no age."""

    kind: str
    state: str
    tasks: int
    oldest: datetime | None
    due: datetime


@dataclass(frozen=True, slots=True)
class SinkQueue:
    """Deliveries of one queue. Times are None where there is nothing to tell."""

    queue: str
    waiting: int = 0
    retrying: int = 0
    delivering: int = 0
    oldest: datetime | None = None
    dead_letters: int = 0
    oldest_dead_letter: datetime | None = None
    failing_since: datetime | None = None
    disabled_since: datetime | None = None


@dataclass(frozen=True, slots=True)
class Stored:
    """Finished parts of one kind that the ledger knows, and their bytes in the store."""

    kind: str
    parts: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Standing:
    """How the service stood at `time`, by the ledger's clock. What the ledger did not tell
    in time is None, and named in `untold`."""

    time: datetime
    workers: Sequence[Holder] | None
    late_leases: Sequence[LateLease] | None
    jobs: Sequence[JobQueue] | None
    tasks: Sequence[TaskQueue] | None
    sink_queues: Sequence[SinkQueue] | None
    storage: Sequence[Stored] | None
    untold: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        """The same, for `json.dumps` with `default=str`."""
        return asdict(self)


def look(
    settings: Settings, seconds: float = QUESTION_SECONDS
) -> AbstractContextManager[Look]:
    """Look at the ledger of the settings, whichever it is; blocks. Raises
    `ConfigurationError`."""
    if is_embedded(settings):
        return look_at_file(ledger_file(settings), seconds=seconds)
    return look_at_server(Address.parse(ledger_url(settings)), seconds=seconds)


def read_standing(settings: Settings, seconds: float = QUESTION_SECONDS) -> Standing:
    """Ask the ledger, each question for at most so many seconds; blocks. Raises
    `ConfigurationError` when it cannot be read."""
    with look(settings, seconds) as ledger:
        reader = _Reader(ledger, timedelta(seconds=settings.worker.lease))
        told = {name: reader.ask(name, part) for name, part in reader.parts().items()}
        return Standing(time=to_moment(ledger.now), **told, untold=tuple(reader.untold))


class _Reader:
    def __init__(self, ledger: Look, lease: timedelta) -> None:
        self._ledger = ledger
        # A worker renews at a third of that, so two renewals have failed.
        self._late = ledger.now + int(lease / timedelta(microseconds=3))
        self.untold: list[str] = []

    def parts(self) -> dict[str, Callable[[], Any]]:
        """What there is to be told, by its name in `Standing`."""
        return {
            "workers": self._workers,
            "late_leases": self._late_leases,
            "jobs": self._jobs,
            "tasks": self._tasks,
            "sink_queues": self._sink_queues,
            "storage": self._storage,
        }

    def ask(self, name: str, part: Callable[[], _T]) -> _T | None:
        """A part, or None when it took too long."""
        try:
            return part()
        except TookTooLong:
            self.untold.append(name)
            return None

    def _rows(self, statement: sa.Select[Any] | sa.CompoundSelect[Any]) -> list[Any]:
        return list(self._ledger.ask(statement))

    def _workers(self) -> list[Holder]:
        return [
            Holder(row.owner, row.kind, row.leases, to_moment(row.expires))
            for row in self._rows(statements.holders())
        ]

    def _late_leases(self) -> list[LateLease]:
        return [
            LateLease(
                row.owner, row.kind, row.job_id or "", row.attempts, to_moment(row.expires)
            )
            for row in self._rows(statements.late_leases(self._late))
        ]

    def _jobs(self) -> list[JobQueue]:
        found = [
            JobQueue(row.state, row.dataset, row.jobs, to_moment(row.oldest))
            for row in self._rows(statements.unfinished_jobs())
        ]
        return sorted(found, key=lambda one: (one.state, one.dataset), reverse=True)

    def _tasks(self) -> list[TaskQueue]:
        found = [
            TaskQueue(
                row.kind,
                row.state,
                row.tasks,
                to_moment_or_none(row.oldest or None),
                to_moment(row.due),
            )
            for row in self._rows(statements.open_tasks())
        ]
        return sorted(found, key=lambda one: (one.kind, one.state))

    def _sink_queues(self) -> list[SinkQueue]:
        rows = {row.queue: row for row in self._rows(statements.standing_deliveries())}
        dead = {row.queue: row for row in self._rows(statements.dead_letters())}
        ailing = {row.queue: row for row in self._rows(statements.ailing_queues())}
        return [
            _sink_queue(name, rows.get(name), dead.get(name), ailing.get(name))
            for name in sorted(rows.keys() | dead.keys() | ailing.keys())
        ]

    def _storage(self) -> list[Stored]:
        return [
            Stored(row.kind, row.parts, int(row.bytes))
            for row in self._rows(statements.stored())
        ]


def _sink_queue(name: str, open_: Any, dead: Any, ailing: Any) -> SinkQueue:
    def count(state: TaskState) -> int:
        return 0 if open_ is None else int(getattr(open_, state.value))

    return SinkQueue(
        name,
        waiting=count(TaskState.READY),
        retrying=count(TaskState.SCHEDULED),
        delivering=count(TaskState.LEASED),
        oldest=None if open_ is None else to_moment(open_.oldest),
        dead_letters=0 if dead is None else dead.dead,
        oldest_dead_letter=None if dead is None else to_moment_or_none(dead.oldest),
        failing_since=None if ailing is None else to_moment_or_none(ailing.failing_since),
        disabled_since=None if ailing is None else to_moment_or_none(ailing.disabled_time),
    )
