"""The seam between exportd and its durable memory of jobs, tasks and parts.

The ledger decides. A job is what its row says; a worker may act only while it holds a
lease, and every write of a worker carries the lease's fencing token.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import NamedTuple, Protocol

from exportd_server.errors import ErrorRecord
from exportd_server.jobs.audit import AuditQuery, AuditRecord
from exportd_server.jobs.model import (
    CancelOutcome,
    DeliveryRecord,
    DeliveryState,
    ExportSpec,
    Job,
    JobState,
    Manifest,
    ManifestColumn,
    PartRecord,
    QueuePolicy,
    SinkQueue,
    SinkSpec,
)
from exportd_server.sources.base import Shard
from exportd_server.store.key import JobPrefix


class TaskKind(enum.StrEnum):
    """Kinds of work that are claimed."""

    PLAN = "plan"
    """Cut the job into shards."""
    SHARD = "shard"
    """Write one shard's parts."""
    CLEANUP = "cleanup"
    """Delete from the store what a job must not have."""
    REAP = "reap"
    """Find expired jobs; one such task exists, and it returns for ever."""
    SWEEP = "sweep"
    """Find output that belongs to no job; likewise."""
    DELIVER = "deliver"
    """Bring a part, or the completion, to a sink."""


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job to record. `fingerprint` is equal for equal payloads."""

    job_id: str
    tenant: str
    spec: ExportSpec
    request_id: str = ""
    fingerprint: str = ""
    queues: tuple[QueuePolicy, ...] = ()
    """What the operator allows for the queues of its sinks."""
    older_fingerprints: frozenset[str] = frozenset()
    """What earlier releases and keys made of the same payload."""
    trace_context: str = ""
    """The trace that it is created in, as `TraceContext.text` writes it; empty: none."""


@dataclass(frozen=True, slots=True)
class JobQuery:
    """Conditions on jobs that must all hold; empty ones hold always."""

    states: frozenset[JobState] = frozenset()
    dataset: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    created_from: datetime | None = None
    created_before: datetime | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to work on one task until `expires_at` by the ledger's clock. `token`
    is greater than that of every earlier lease of the ledger."""

    task_id: int
    kind: TaskKind
    token: int
    owner: str
    expires_at: datetime
    attempt: int
    tenant: str = ""
    job_id: str = ""
    generation: int = 1
    shard: Shard | None = None
    forget: bool = False
    """Of a cleanup: forget the job once its output is gone."""
    takeover: bool = field(default=False, compare=False)
    """Another lease of the task had run out."""
    trace_context: str = field(default="", compare=False)
    """The one that the job was created with; see `NewJob`."""


@dataclass(frozen=True, slots=True)
class HeldLease:
    """A lease as one who looks on sees it: `expired` when it had run out by the ledger's
    clock, and nobody had taken its task over yet."""

    task_id: int
    kind: TaskKind
    owner: str
    tenant: str
    job_id: str
    attempt: int
    expires_at: datetime
    expired: bool


@dataclass(frozen=True, slots=True)
class ClaimLimits:
    """Limits that hold for the whole ledger at the moment of the claim."""

    running_per_tenant: int | None = None
    """Most jobs of one tenant that are RUNNING. A lease that ran out counts until it is
    taken over, because until then it is still good."""
    no_deliveries_of: frozenset[str] = frozenset()
    """Tenants whose deliveries are left to others."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What a cleanup must leave in the store."""

    parts: tuple[PartRecord, ...] = ()
    """Those that the job's manifest names."""
    manifest: int | None = None
    """The token under which its manifest lies, if it was stored."""
    read: bool = False
    """The output has expired and is still being read: leave all of it and come again."""


@dataclass(frozen=True, slots=True)
class Backlog:
    """What is open in the ledger. `tasks` is by kind and state (`ready`, `scheduled`,
    `leased`); `waiting` for how many seconds the task of a kind has waited that has waited
    longest, since it was due or its lease ran out. What is none is not there."""

    jobs: Mapping[JobState, int]
    tasks: Mapping[tuple[TaskKind, str], int]
    waiting: Mapping[TaskKind, float]
    disabled: Sequence[str]
    """Queues of sinks whose endpoint is disabled."""


@dataclass(frozen=True, slots=True)
class DeliveryQuery:
    """Conditions on deliveries that must all hold; empty ones hold always. `sink` is the
    name inside the job, and needs `job_id`."""

    delivery_id: str = ""
    job_id: str = ""
    sink: str = ""
    queue: str = ""
    states: frozenset[DeliveryState] = frozenset()


@dataclass(frozen=True, slots=True)
class DeliveryWork:
    """What a delivery needs. `parts` is the one part, or for a completion all that the
    sink has been given, in the order of the output; `dropped` were not. `attempt` counts
    from 1, over every drive."""

    delivery_id: str
    attempt: int
    job: Job
    sink: SinkSpec
    parts: tuple[PartRecord, ...]
    columns: tuple[ManifestColumn, ...]
    completion: bool
    dropped: int = 0
    disabled: bool = False
    """The endpoint is disabled: do not try."""


class Totals(NamedTuple):
    """How far a job is: rows written, stored bytes, rows left out."""

    rows: int
    bytes: int
    row_errors: int


class LastPart(NamedTuple):
    """What there is to know once a shard's last part is recorded: which of the job's sinks
    will not get it, and what the shard's end will publish, if it is the job's end, too."""

    dropped: Sequence[int]
    manifest: Manifest | None


class DeliveryFailure(NamedTuple):
    """What a failed attempt came to."""

    dead: bool
    """The delivery is a dead letter."""
    disabled: bool
    """The endpoint was disabled by it."""


class LeaseLost(Exception):
    """The lease is no longer the task's: it ran out and was taken over, or the job was
    cancelled, failed or deleted. Nothing was changed; stop the work."""


class RequestIdConflict(Exception):
    """The request_id was used before with another payload."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        super().__init__(f"request_id belongs to job {job_id}")


class EndpointDisabled(Exception):
    """A sink's endpoint is disabled."""

    def __init__(self, sink: int, queue: str) -> None:
        self.sink = sink
        self.queue = queue
        super().__init__(f"queue {queue} is disabled")


class TooManyActiveJobs(Exception):
    """The tenant has as many unfinished jobs as it may."""


class TooManyQueuedJobs(Exception):
    """The tenant has as many pending jobs as it may."""


class JobWatch(Protocol):
    """Hears of the changes of one job."""

    async def passed(self, revision: int) -> None:
        """Return once the job is past `revision`, is gone, or may be either."""
        ...


class Ledger(Protocol):
    """Jobs, tasks, parts.

    Each method is one transaction: all of it or nothing, durable when it returns. Any of
    them may raise `LedgerUnavailable`: the ledger did not answer, and what was asked for
    may have happened or not. Repeating it is safe: nothing is counted twice, and what a
    lease allowed once and has done is told by `LeaseLost`.
    Time is the ledger's own clock. Methods that take a lease raise `LeaseLost`, and
    change nothing, unless the lease's token is still the task's and the task is leased;
    an expired lease that nobody took over is still good. Tenants never see each other:
    a job of another tenant is as missing as one that does not exist. None blocks the
    event loop.

    States move as `jobs.model.TRANSITIONS` says and no other way; each change to a job
    raises its revision and wakes those who wait for it.
    """

    # --- callers

    async def create_job(
        self,
        new: NewJob,
        *,
        max_active: int | None = None,
        max_queued: int | None = None,
    ) -> tuple[Job, bool]:
        """Record a job with its plan task; the flag says whether it is new.

        With a request_id that the tenant's jobs have: the same fingerprint answers with
        that job, whatever the quota; another one raises `RequestIdConflict`. Else more
        than `max_active` unfinished jobs of the tenant raise `TooManyActiveJobs`, more
        than `max_queued` pending ones `TooManyQueuedJobs`, and a sink whose queue is
        disabled raises `EndpointDisabled`.
        """
        ...

    async def get_job(self, tenant: str, job_id: str) -> Job | None:
        """The job with its progress, and its manifest if it succeeded. None when it is
        missing or deleted."""
        ...

    async def list_jobs(
        self,
        tenant: str,
        query: JobQuery,
        *,
        limit: int,
        before: tuple[datetime, str] | None = None,
    ) -> list[Job]:
        """Jobs, newest first by (create_time, job_id), without manifests; `before` is
        the last of the page before."""
        ...

    async def cancel_job(
        self, tenant: str, job_id: str
    ) -> tuple[Job, CancelOutcome] | None:
        """Cancel an unfinished job: its leases are lost and its output is cleaned up, at
        once and again after the last lost lease has run out."""
        ...

    async def delete_job(self, tenant: str, job_id: str) -> JobState | None:
        """Hide a finished job and have its output deleted and the job forgotten.
        Returns the state it had, None when missing; an unfinished job is left as it
        is."""
        ...

    async def finished_parts(self, tenant: str, job_id: str) -> list[PartRecord]:
        """Finalized parts of the current generation by (shard, sequence), up to the
        first shard that is not complete and including what that one has."""
        ...

    # --- workers

    async def claim(
        self,
        owner: str,
        kinds: Collection[TaskKind],
        *,
        lease: timedelta,
        limits: ClaimLimits = ...,
    ) -> Lease | None:
        """Lease the next task that is due, or whose lease has run out: the tenant with
        the fewest tasks at work first (of several the one served longest ago), then the
        higher priority, then the older job; a tenant's cleanups come before its jobs.
        Counts as an attempt. The job turns RUNNING. Tasks whose lease ran out on their
        last attempt fail the job with ATTEMPTS_EXHAUSTED, or with the last error that
        one of its attempts recorded."""
        ...

    async def renew(self, leases: Sequence[Lease], lease: timedelta) -> list[Lease]:
        """Extend leases; returns those that are lost. Unlike the other methods it may be
        called from an event loop in another thread than the ledger's: leases must outlive
        a busy process."""
        ...

    async def release(self, lease: Lease) -> None:
        """Give a lease back: the task is due at once and the attempt is not counted.
        Parts that were added stay."""
        ...

    async def record_plan(
        self,
        lease: Lease,
        shards: Sequence[Shard],
        columns: Sequence[ManifestColumn],
        *,
        estimated_rows: int | None,
    ) -> Lease:
        """End a plan: record its shards as tasks and lease the first of them to the same
        owner, until the same moment. At least one shard."""
        ...

    async def record_progress(
        self,
        lease: Lease,
        *,
        rows: int,
        bytes_: int,
        rows_per_second: float,
        row_errors: int = 0,
    ) -> Totals:
        """Note how far a shard is, finished parts included; returns how far the whole
        job is, for its caps. Bytes are those of error parts, too."""
        ...

    async def shard_parts(self, lease: Lease) -> list[PartRecord]:
        """The finalized parts of the lease's shard, error parts too, by sequence: what
        an earlier attempt left and this one need not do again. A first attempt may find
        some too, for one that was given back is not counted."""
        ...

    async def add_part(
        self,
        lease: Lease,
        part: PartRecord,
        errors: PartRecord | None = None,
        *,
        drop: bool = False,
    ) -> Sequence[int]:
        """Record a part that is durable in the store, and with it the error part that
        tells the rows it lacks: neither is ever there without the other. Its sequence
        follows the last one; its token is the lease's; the error part's are the same;
        else ValueError. Recording the last ones again changes nothing. Returns which of
        the job's sinks will not get it, because their queue is full and drops; with
        `drop` one that blocks does so, too."""
        ...

    async def add_last_part(
        self,
        lease: Lease,
        part: PartRecord,
        errors: PartRecord | None = None,
        *,
        drop: bool = False,
    ) -> LastPart:
        """As `add_part`, for the last part of a shard, which is not ended by it. If no
        other shard of the job is unfinished, what its end will publish is returned, too,
        as by `complete_unless_last`."""
        ...

    async def complete_unless_last(self, lease: Lease) -> Manifest | None:
        """End a shard, unless it is the only one of its job that is unfinished. Then
        nothing changes, and what its end will publish is returned, to be stored before
        `complete_shard`."""
        ...

    async def complete_shard(self, lease: Lease, *, manifest: bool = False) -> bool:
        """End a shard; the last one publishes the manifest and turns the job SUCCEEDED
        in the same transaction, and returns True. With `manifest` the ledger notes that
        it is in the store, too, under the lease's token. What lies in the store and is
        neither this nor in the manifest is cleaned up after."""
        ...

    async def complete_only_shard(
        self,
        lease: Lease,
        part: PartRecord,
        errors: PartRecord | None = None,
        *,
        drop: bool = False,
    ) -> Sequence[int]:
        """Record the last part, as `add_part` does, of a job's only shard, and end the
        shard with the job, as `complete_shard` does with the manifest in the store: all of
        it or nothing. Once that is done, doing it again changes nothing and tells of no
        sink. ValueError where another shard is unfinished."""
        ...

    async def restart_output(self, lease: Lease) -> None:
        """Throw away what the job has, because the source changed, and plan it anew
        under the next generation. That is no attempt of its own, but those that were
        lost stay counted. After twenty generations the job turns FAILED with
        SOURCE_CHANGED."""
        ...

    async def fail_attempt(
        self, lease: Lease, error: ErrorRecord, *, retry_in: timedelta | None
    ) -> bool:
        """End an attempt: with `retry_in` and attempts left the task is due again after
        it; else the job turns FAILED with the error, and its output is cleaned up.
        Returns whether the job failed. For cleanup and reap tasks there is no job to
        fail: they are always due again, without `retry_in` after a few seconds."""
        ...

    async def list_leases(
        self, *, limit: int, after: tuple[str, int] | None = None
    ) -> list[HeldLease]:
        """Leases of every tenant's tasks, by (owner, task_id); `after` is the last of the
        page before. A worker without a lease is not known here."""
        ...

    async def backlog(self) -> Backlog:
        """How much work of every tenant is open. It costs more the more that is."""
        ...

    # --- housekeeping

    async def kept_parts(self, lease: Lease) -> Kept | None:
        """For a cleanup: what must stay; None when nothing must (the job failed, was
        cancelled or deleted, or expired and nobody has its output pinned). Once it was
        None it stays so."""
        ...

    async def complete_cleanup(self, lease: Lease) -> None:
        """End a cleanup; a forgetting one removes every row of the job."""
        ...

    async def expire_jobs(self, lease: Lease, *, limit: int) -> int:
        """For the reap task: hide up to `limit` jobs past their expire_time, each with a
        forgetting cleanup; returns how many."""
        ...

    async def complete_reap(self, lease: Lease, *, again_in: timedelta) -> None:
        """End this round of reaping; the task is due again after `again_in`."""
        ...

    async def known_jobs(self, job_ids: Collection[str]) -> set[str]:
        """Those of the ids that the ledger has a row for, hidden ones included: what
        the store has beyond them is an orphan."""
        ...

    async def note_orphans(
        self, lease: Lease, found: Collection[JobPrefix], *, after: timedelta
    ) -> list[JobPrefix]:
        """For the sweep task: remember which of the jobs that the store has something of
        the ledger does not know, and return those that it did not know either at a look
        `after` ago or longer."""
        ...

    async def complete_sweep(self, lease: Lease, *, again_in: timedelta) -> None:
        """End this sweep, and forget the orphans that it did not find any more; the task
        is due again after `again_in`."""
        ...

    async def identity(self) -> str:
        """A UUID of this ledger, which no other one has."""
        ...

    # --- deliveries
    #
    # A sink that takes parts has a delivery for each part from the moment it is recorded.
    # Each sink has one more, the completion, from the moment the job succeeds: due once
    # the sink has all its parts, and dead-lettered with them.

    async def has_room(self, lease: Lease) -> bool:
        """Whether the export may go on to its next part: False while a queue of one of
        its sinks is full for its tenant and says `BLOCK`, unless the sink lacks a part of
        it already."""
        ...

    async def delivery_work(self, lease: Lease) -> DeliveryWork:
        """What the delivery of a lease needs."""
        ...

    async def complete_delivery(self, lease: Lease, receipt: str) -> None:
        """The sink has it, durably. The last one of a job that asks for it drops the
        job's output."""
        ...

    async def fail_delivery(
        self,
        lease: Lease,
        error: ErrorRecord,
        *,
        retry_in: timedelta | None,
        disable_after: timedelta | None = None,
        gone: bool = False,
        blame: bool = True,
    ) -> DeliveryFailure:
        """End an attempt: with `retry_in` the delivery is due again after it, else it is
        a dead letter. An endpoint that is `gone`, or has failed for `disable_after` since
        its last success, is disabled: no delivery of its queue is tried any more, nor
        this one again. Only a tenant's own queue is disabled, and none that all share.
        Without `blame` it was not the endpoint's fault."""
        ...

    async def list_deliveries(
        self,
        tenant: str,
        query: DeliveryQuery,
        *,
        limit: int,
        before: tuple[datetime, str] | None = None,
    ) -> list[DeliveryRecord]:
        """Deliveries, newest first by (create_time, delivery_id); `before` is the last
        of the page before."""
        ...

    async def redrive_deliveries(self, tenant: str, query: DeliveryQuery) -> int:
        """Make deliveries due now that were dead-lettered or dropped, or wait to be tried
        again, of jobs whose output is there; returns how many. A completion goes after
        its parts. Those of disabled endpoints stay. It is done in several transactions
        when there are many; each is looked at once."""
        ...

    async def queue_depths(self) -> dict[str, tuple[int, int]]:
        """Of every queue that something stands in: deliveries that wait or are under way,
        and those that are to be tried again."""
        ...

    async def list_queues(
        self, tenant: str, *, limit: int, after: str = "", queue: str = ""
    ) -> list[SinkQueue]:
        """Queues that the tenant has deliveries in, by name, or the one."""
        ...

    async def enable_queue(self, tenant: str, queue: str) -> bool:
        """Let deliveries to an endpoint be tried again; False when the tenant has no such
        queue."""
        ...

    # --- readers of outputs

    async def pin_output(
        self, tenant: str, job_id: str, reader: str, *, length: timedelta
    ) -> bool:
        """Have a succeeded job's output stay for `length` from now even if it expires,
        because `reader`, a process, is at it; again to go on. False, and nothing is
        changed, when the output may be gone: the job is missing, without output or
        deleted, or it has expired and the reader has no pin in force. A pin in force
        holds up the deletion of what has expired, and nothing else."""
        ...

    async def unpin_output(self, job_id: str, reader: str) -> None:
        """End a pin; a missing one is fine."""
        ...

    async def is_cut(self, job_id: str, reader: str) -> bool:
        """Whether those who read the job's output must stop: it was cancelled or deleted,
        or failed, and did not merely expire."""
        ...

    def on_cut(self, job_id: str, tell: Callable[[], None]) -> AbstractContextManager[None]:
        """Call `tell` soon after the job was cancelled or deleted, whichever process saw
        to that, for as long as the context is open. It proves nothing: ask `is_cut`."""
        ...

    # --- audit records

    async def append_audit(self, records: Sequence[AuditRecord]) -> None:
        """Keep records; one whose id is there already stays as it is. Wakes nobody."""
        ...

    async def list_audit(
        self,
        query: AuditQuery,
        *,
        limit: int,
        before: tuple[datetime, str] | None = None,
    ) -> list[AuditRecord]:
        """Records of every tenant, newest first by (time, record_id); `before` is the
        last of the page before."""
        ...

    async def forget_audit(self, lease: Lease, *, keep: timedelta, limit: int) -> int:
        """For the reap task: delete up to `limit` records that are older than `keep`, the
        oldest first; returns how many."""
        ...

    # --- waiting

    async def wait_for_work(self, timeout: float) -> None:
        """Return when a task may be due that was not before, or after `timeout` seconds.
        A wake-up between a failed claim and this call is not missed."""
        ...

    async def wait_for_change(self, job_id: str, revision: int, timeout: float) -> None:
        """Return when the job's revision passes `revision` or the job is gone, or after
        `timeout` seconds."""
        ...

    def watching(self, job_id: str) -> AbstractContextManager[JobWatch]:
        """Hear of a job's changes for as long as the context is open. A job that is read
        after it was opened, and passed on to `passed`, is never waited for in vain."""
        ...

    def fence(self, lease: Lease) -> AbstractContextManager[asyncio.Event]:
        """An event that is set soon after the job's leases were lost because it ended or
        begins anew, whichever process saw to that, for as long as the context is open.
        Being set proves nothing: ask the ledger."""
        ...

    async def close(self) -> None:
        """Free what is held. Leases stay: they run out, or were released."""
        ...
