"""The ledger against a small model of it, under whatever Hypothesis comes up with.

The model is lists and loops, without SQL, indexes or threads. `make long` tries
more histories, and as many as `EXAMPLES` says.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from exportd_server.errors import ErrorReason, ErrorRecord
from exportd_server.jobs.ledger.base import (
    ClaimLimits,
    DeliveryFailure,
    DeliveryQuery,
    EndpointDisabled,
    JobQuery,
    LastPart,
    Lease,
    LeaseLost,
    NewJob,
    RequestIdConflict,
    TaskKind,
    TooManyActiveJobs,
)
from exportd_server.jobs.ledger.postgres import open_postgres_ledger
from exportd_server.jobs.ledger.sql import SqlLedger
from exportd_server.jobs.ledger.sqlite import open_sqlite_ledger
from exportd_server.jobs.ledger.statements.working import MOST_GENERATIONS
from exportd_server.jobs.model import (
    TRANSITIONS,
    CancelOutcome,
    DeliveryRecord,
    DeliveryState,
    Job,
    JobState,
    Manifest,
    OnFull,
    QueuePolicy,
)
from exportd_server.sinks.base import Takes
from tests.support.deliveries import sink
from tests.support.ledger import (
    COLUMNS,
    FakeClock,
    LedgerDatabase,
    copy_of,
    empty_sqlite_file,
    part,
    shards,
    spec,
)

T = TypeVar("T")

MAX_ATTEMPTS = 3
LEASE = 15.0
GRACE = 5.0
TTL = 60.0
ERROR = ErrorRecord(ErrorReason.SOURCE_FAILED, "down")
EXPORT = {TaskKind.PLAN, TaskKind.SHARD}
DELIVER = {TaskKind.DELIVER}

POLICIES = {
    "b": QueuePolicy("b", concurrency=2, depth=2, on_full=OnFull.BLOCK),
    # A tenant's own, which its failures may disable; the other one is shared.
    "d": QueuePolicy("d", concurrency=1, depth=1, on_full=OnFull.DROP, tenant="a"),
}
SINKS = {
    "parts": sink("parts", "b"),
    "drops": sink("drops", "d"),
    "whole": sink("whole", "b", Takes.WHOLE),
}

PENDING = DeliveryState.PENDING
DELIVERED = DeliveryState.DELIVERED
DROPPED = DeliveryState.DROPPED
DEAD = DeliveryState.DEAD_LETTERED


@cache
def _empty() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="exportd-model-"))
    atexit.register(shutil.rmtree, folder)
    return folder


# --- the model


@dataclass(eq=False)
class ModelTask:
    kind: TaskKind
    tenant: str
    job: ModelJob | None
    priority: int
    since: float
    run_at: float
    shard: int | None = None
    forget: bool = False
    state: str = "waiting"
    attempts: int = 0
    token: int = 0
    expires: float = 0.0
    parts: list[int] = field(default_factory=list)
    delivery: ModelDelivery | None = None
    ready: bool = True
    """Of a delivery that waits: whether a claim has seen that it is due."""

    @property
    def queue(self) -> str:
        return self.delivery.queue if self.delivery else ""


@dataclass(eq=False)
class ModelDelivery:
    job: ModelJob
    sink: str
    part: tuple[int, int] | None
    state: DeliveryState = PENDING
    attempts: int = 0
    task: ModelTask | None = None
    delivery_id: str = ""
    former: list[str] = field(default_factory=list)

    @property
    def queue(self) -> str:
        return SINKS[self.sink].queue

    def tried(self) -> int:
        return self.attempts + (self.task.attempts if self.task else 0)


@dataclass(eq=False)
class ModelQueue:
    failing_since: float | None = None
    disabled: bool = False


@dataclass(eq=False)
class ModelJob:
    job_id: str
    tenant: str
    priority: int
    created: float
    request_id: str
    fingerprint: str
    state: JobState = JobState.PENDING
    generation: int = 1
    hidden: bool = False
    expire: float | None = None
    late: float = 0.0
    untidy: bool = False
    error: ErrorReason | None = None
    last_error: ErrorReason | None = None
    published: int = 0
    manifest: int | None = None
    pins: dict[str, float] = field(default_factory=dict)
    sinks: tuple[str, ...] = ()
    drops: bool = False
    dropped: bool = False
    deliveries: list[ModelDelivery] = field(default_factory=list)

    def of(self, name: str, *states: DeliveryState) -> list[ModelDelivery]:
        """The deliveries of parts to a sink that are in one of the states."""
        return [
            each
            for each in self.deliveries
            if each.sink == name and each.part is not None and each.state in states
        ]

    def completion(self, name: str) -> ModelDelivery | None:
        for each in self.deliveries:
            if each.sink == name and each.part is None:
                return each
        return None

    def pinned(self, now: float, reader: str = "") -> bool:
        return any(
            until > now and reader in ("", name) for name, until in self.pins.items()
        )


# Some thousand transactions, on a machine that may have more to do.
pytestmark = pytest.mark.timeout(600)


class Model:
    def __init__(self) -> None:
        self.now = 0.0
        self.token = 0
        self.jobs: dict[str, ModelJob] = {}
        self.served: dict[str, int] = {}
        self.delivered: dict[str, int] = {}
        self.queues = {name: ModelQueue() for name in POLICIES}
        self.tasks = [
            ModelTask(kind, "", None, 1000, -1.0, -1.0)
            for kind in (TaskKind.REAP, TaskKind.SWEEP)
        ]

    def visible(self, tenant: str, job_id: str) -> ModelJob | None:
        job = self.jobs.get(job_id)
        return job if job and not job.hidden and job.tenant == tenant else None

    def work(self, job: ModelJob) -> list[ModelTask]:
        """Plans and shards, in the order they were made."""
        return [t for t in self.tasks if t.job is job and t.kind in EXPORT]

    def attempt(self, job: ModelJob) -> int:
        return max(t.attempts for t in self.work(job))

    def manifest(self, job: ModelJob) -> list[tuple[int, int, int]]:
        return sorted(
            (t.shard, sequence, token)
            for t in self.work(job)
            if t.shard is not None
            for sequence, token in enumerate(t.parts)
        )

    def position(self, job: ModelJob) -> int:
        def due(other: ModelJob) -> float:
            return min(t.run_at for t in self.work(other) if t.state == "waiting")

        def key(other: ModelJob) -> tuple[int, float, str]:
            return (-other.priority, other.created, other.job_id)

        horizon = max(self.now, due(job))
        return sum(
            key(other) < key(job) and due(other) <= horizon
            for other in self.jobs.values()
            if other.tenant == job.tenant and other.state is JobState.PENDING
        )

    def holds(self, lease: Lease) -> ModelTask | None:
        for task in self.tasks:
            if task.token == lease.token and task.state == "leased":
                return task
        return None

    def settle(self, job: ModelJob) -> None:
        leased = any(t.state == "leased" for t in self.work(job))
        job.state = JobState.RUNNING if leased else JobState.PENDING

    def fence(self, job: ModelJob) -> None:
        expiries = [t.expires for t in self.work(job) if t.state == "leased"]
        if expiries:
            job.late = max(job.late, max(*expiries, self.now) + GRACE)

    def cleanup(self, job: ModelJob, at: float, *, forget: bool = False) -> None:
        task = ModelTask(TaskKind.CLEANUP, job.tenant, job, 1000, self.now, at)
        task.forget = forget
        self.tasks.append(task)

    def end(self, job: ModelJob, state: JobState, error: ErrorReason | None = None) -> None:
        self.fence(job)
        job.state, job.error, job.expire = state, error, self.now + TTL
        for task in self.work(job):
            if task.state != "done":
                task.state = "closed"
        if state is not JobState.SUCCEEDED:
            for each in job.deliveries:
                if each.state is PENDING:
                    self.close(each, DeliveryState.FAILED)
        if state is JobState.SUCCEEDED:
            job.published += 1
            if job.untidy:
                self.cleanup(job, job.late)
            for name in job.sinks:
                job.deliveries.append(ModelDelivery(job, name, None))
                self.follow(job, name)
        else:
            self.cleanup(job, self.now)
            if job.late > self.now:
                self.cleanup(job, job.late)

    def hide(self, job: ModelJob) -> None:
        job.hidden = True
        self.undeliver(job)
        if job.late > self.now:
            self.cleanup(job, self.now)
        self.cleanup(job, job.late, forget=True)

    # --- deliveries

    def undeliver(self, job: ModelJob) -> None:
        for each in job.deliveries:
            if each.task:
                self.tasks.remove(each.task)
        job.deliveries.clear()

    def close(self, delivery: ModelDelivery, state: DeliveryState) -> None:
        delivery.state = state
        self.take_back(delivery)

    def take_back(self, delivery: ModelDelivery) -> None:
        if delivery.task:
            delivery.attempts += delivery.task.attempts
            self.tasks.remove(delivery.task)
            delivery.task = None

    def make_due(self, delivery: ModelDelivery) -> None:
        job = delivery.job
        task = ModelTask(
            TaskKind.DELIVER, job.tenant, job, job.priority, self.now, self.now
        )
        task.delivery, delivery.task, delivery.state = delivery, task, PENDING
        self.tasks.append(task)

    def follow(self, job: ModelJob, name: str) -> None:
        completion = job.completion(name)
        if (
            completion is None
            or completion.state is not PENDING
            or completion.task
            or job.of(name, PENDING)
        ):
            return
        if job.of(name, DEAD):
            completion.state = DEAD
        else:
            self.make_due(completion)

    def add_part(
        self, job: ModelJob, shard: int, sequence: int, *, drop: bool = False
    ) -> list[int]:
        without = []
        for index, name in enumerate(job.sinks):
            if SINKS[name].takes is Takes.WHOLE:
                continue
            delivery = ModelDelivery(job, name, (shard, sequence))
            lacking = bool(job.of(name, DROPPED))
            job.deliveries.append(delivery)
            drops = POLICIES[delivery.queue].on_full is OnFull.DROP
            if (drops or drop or lacking) and self.full(delivery.queue, job.tenant):
                delivery.state = DROPPED
                without.append(index)
            else:
                self.make_due(delivery)
        return without

    def full(self, queue: str, tenant: str) -> bool:
        standing = [
            task
            for task in self.tasks
            if (task.queue, task.tenant) == (queue, tenant)
            and (task.ready or task.state == "leased")
        ]
        return len(standing) >= POLICIES[queue].depth

    def promote(self) -> None:
        for task in self.tasks:
            if task.state == "waiting" and task.run_at <= self.now:
                task.ready = True

    def choose_delivery(self, left: str) -> ModelTask | None:
        leased = [task for task in self.tasks if task.queue and task.state == "leased"]
        busy = Counter(task.queue for task in leased)
        lanes = Counter((task.queue, task.tenant) for task in leased)

        def may(task: ModelTask) -> bool:
            if task.tenant == left:
                return False
            if task.state == "leased":
                return task.expires <= self.now
            room = busy[task.queue] < POLICIES[task.queue].concurrency
            return room and task.run_at <= self.now

        return min(
            (task for task in self.tasks if task.queue and may(task)),
            key=lambda task: (
                task.state != "leased",
                busy[task.queue],
                lanes[task.queue, task.tenant],
                self.delivered.get(task.tenant, 0),
                -task.priority,
                task.since,
                self.tasks.index(task),
            ),
            default=None,
        )

    def deliver(self, delivery: ModelDelivery) -> None:
        job = delivery.job
        self.close(delivery, DELIVERED)
        self.queues[delivery.queue].failing_since = None
        if job.state is not JobState.SUCCEEDED:
            return
        if delivery.part is not None:
            self.follow(job, delivery.sink)
        elif job.drops and all(each.state is DELIVERED for each in job.deliveries):
            job.dropped = True
            self.cleanup(job, self.now)

    def fail_delivery(
        self,
        delivery: ModelDelivery,
        retry: float | None,
        disable_after: float | None,
        *,
        gone: bool,
    ) -> DeliveryFailure:
        queue, job = self.queues[delivery.queue], delivery.job
        by_this = False
        if not queue.disabled:
            if queue.failing_since is None:
                queue.failing_since = self.now
            failed_for = self.now - queue.failing_since
            tired = disable_after is not None and failed_for >= disable_after
            own = bool(POLICIES[delivery.queue].tenant)
            queue.disabled = by_this = own and (gone or tired)
        if by_this:
            for task in self.tasks:
                if task.queue == delivery.queue and task.state == "waiting":
                    task.run_at, task.ready = min(task.run_at, self.now), True
        if retry is not None and not queue.disabled:
            assert delivery.task is not None
            delivery.task.state = "waiting"
            delivery.task.run_at = self.now + retry
            delivery.task.ready = retry == 0
            return DeliveryFailure(dead=False, disabled=False)
        self.close(delivery, DEAD)
        if job.state is JobState.SUCCEEDED and delivery.part is not None:
            self.follow(job, delivery.sink)
        return DeliveryFailure(dead=True, disabled=by_this)

    def redrive(self, tenant: str, job_id: str, states: set[DeliveryState]) -> int:
        count = 0
        for job in self.jobs.values():
            ended = job.state in (JobState.FAILED, JobState.CANCELLED)
            expired = job.expire is not None and job.expire <= self.now
            if job.tenant != tenant or job_id not in ("", job.job_id):
                continue
            if ended or expired or job.hidden or job.dropped:
                continue
            wanted = [
                each
                for each in job.deliveries
                if (not states or each.state in states)
                and (
                    each.state in (DEAD, DROPPED)
                    or (each.task and each.task.state == "waiting" and not each.task.ready)
                )
            ]
            # Parts come before completions.
            wanted.sort(key=lambda each: each.part is None)
            count += sum([self.redriven(job, each) for each in wanted])
            if job.state is JobState.SUCCEEDED:
                for name in job.sinks:
                    self.follow(job, name)
        return count

    def redriven(self, job: ModelJob, delivery: ModelDelivery) -> bool:
        if self.queues[delivery.queue].disabled:
            return False
        if delivery.state is PENDING:
            if delivery.task is None:
                return False
            delivery.task.run_at, delivery.task.ready = self.now, True
            return True
        if delivery.part is None:
            if job.of(delivery.sink, DEAD):
                return False
            delivery.state = PENDING
            return True
        self.make_due(delivery)
        completion = job.completion(delivery.sink)
        if completion is not None:
            told = completion.state is DELIVERED or (
                completion.task is not None and completion.tried() > 0
            )
            self.take_back(completion)
            completion.state = PENDING
            if told:
                completion.former.append(completion.delivery_id)
                completion.delivery_id = ""
        return True

    # ---

    def exhausted(self, tasks: list[ModelTask]) -> list[ModelJob]:
        return [
            task.job
            for task in tasks
            if task.job and task.kind in EXPORT and task.attempts >= MAX_ATTEMPTS
        ]

    def fail_exhausted(self, jobs: list[ModelJob]) -> None:
        for job in jobs:
            if not job.state.terminal:
                error = job.last_error or ErrorReason.ATTEMPTS_EXHAUSTED
                self.end(job, JobState.FAILED, error)

    def expire(self) -> None:
        lost = [t for t in self.tasks if t.state == "leased" and t.expires <= self.now]
        self.fail_exhausted(self.exhausted(lost))

    def recover(self) -> None:
        dead = [task for task in self.tasks if task.state == "leased"]
        for task in dead:
            task.state, task.run_at, task.ready = "waiting", self.now, True
            if task.job and task.kind in EXPORT:
                task.job.untidy = True
                task.job.state = JobState.PENDING
        self.fail_exhausted(self.exhausted(dead))

    def choose(
        self, kinds: set[TaskKind], limit: int | None, left: str
    ) -> ModelTask | None:
        self.promote()
        chosen = self.choose_other(kinds - DELIVER, limit)
        if chosen is None and TaskKind.DELIVER in kinds:
            chosen = self.choose_delivery(left)
        return chosen

    def choose_other(self, kinds: set[TaskKind], limit: int | None) -> ModelTask | None:
        running: dict[str, int] = {}
        for job in self.jobs.values():
            if job.state is JobState.RUNNING:
                running[job.tenant] = running.get(job.tenant, 0) + 1

        at_work = Counter(
            task.tenant
            for task in self.tasks
            if task.state == "leased" and task.kind in EXPORT
        )

        def may(task: ModelTask) -> bool:
            if task.kind not in kinds:
                return False
            if task.state == "leased":
                return task.expires <= self.now
            if task.state != "waiting" or task.run_at > self.now:
                return False
            free = limit is None or running.get(task.tenant, 0) < limit
            return (
                free
                or task.job is None
                or task.kind not in EXPORT
                or (task.job.state is JobState.RUNNING)
            )

        return min(
            filter(may, self.tasks),
            key=lambda task: (
                at_work.get(task.tenant, 0),
                self.served.get(task.tenant, 0),
                -task.priority,
                task.since,
                task.job.job_id if task.job else "",
                self.tasks.index(task),
            ),
            default=None,
        )

    def lease(self, task: ModelTask) -> None:
        self.token += 1
        job = task.job
        if task.kind is TaskKind.DELIVER:
            self.delivered[task.tenant] = self.token
        if job and task.kind in EXPORT:
            self.served[task.tenant] = self.token
            if task.state == "leased":
                job.untidy = True
                job.late = max(job.late, self.now + GRACE)
            job.state = JobState.RUNNING
        task.state, task.token, task.expires = "leased", self.token, self.now + LEASE
        task.attempts += 1

    def forget(self, job: ModelJob) -> None:
        self.tasks = [task for task in self.tasks if task.job is not job]
        del self.jobs[job.job_id]
        if not any(other.tenant == job.tenant for other in self.jobs.values()):
            self.served.pop(job.tenant, None)
            self.delivered.pop(job.tenant, None)


# --- the machine

TENANTS = st.sampled_from(["a", "b"])
READERS = st.sampled_from(["r", "s"])
KINDS = st.sampled_from(
    [
        EXPORT,
        EXPORT,
        EXPORT,
        {TaskKind.PLAN},
        {TaskKind.SHARD},
        {TaskKind.CLEANUP},
        DELIVER,
        {TaskKind.REAP, TaskKind.CLEANUP},
        set(TaskKind),
    ]
)


class LedgerMachine(RuleBasedStateMachine):
    leases: Bundle[Lease] = Bundle("leases")
    created: Bundle[tuple[str, str]] = Bundle("created")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = tempfile.TemporaryDirectory(prefix="exportd-model-")
        self.model = Model()
        self.clock = FakeClock()
        self.numbers = 0
        self.seen: dict[str, Job] = {}
        self.ledger: SqlLedger

    def run(self, work: Awaitable[T]) -> T:
        async def awaited() -> T:
            return await work

        return self.runner.run(awaited())

    @initialize()
    def begin(self) -> None:
        self.make()
        self.ledger = self.run(self.open())

    def make(self) -> None:
        """An empty ledger."""
        raise NotImplementedError

    async def open(self) -> SqlLedger:
        raise NotImplementedError

    def reopened(self) -> None:
        """What the model must know of a ledger that was closed and opened."""

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            self.run(self.ledger.close())
        self.runner.close()
        self.folder.cleanup()

    # --- callers

    @rule(
        target=created,
        tenant=TENANTS,
        priority=st.sampled_from([0, 0, 1]),
        request_id=st.sampled_from(["", "", "r"]),
        fingerprint=st.sampled_from(["x", "x", "y"]),
        max_active=st.sampled_from([None, None, 2]),
        sinks=st.sampled_from(
            [(), ("parts",), ("drops",), ("whole",), ("parts", "drops", "whole")]
        ),
        drops=st.booleans(),
    )
    def create(
        self,
        tenant: str,
        priority: int,
        request_id: str,
        fingerprint: str,
        max_active: int | None,
        sinks: tuple[str, ...],
        *,
        drops: bool,
    ) -> Any:
        self.numbers += 1
        new = NewJob(
            str(UUID(int=self.numbers)),
            tenant,
            spec(
                priority=priority,
                ttl=timedelta(seconds=TTL),
                sinks=tuple(SINKS[name] for name in sinks),
                drop_after_delivery=drops,
            ),
            request_id,
            fingerprint,
            tuple(POLICIES[SINKS[name].queue] for name in sinks),
        )
        disabled = [self.model.queues[policy.queue].disabled for policy in new.queues]
        mine = [
            job
            for job in self.model.jobs.values()
            if job.tenant == tenant and not job.hidden
        ]
        known = [job for job in mine if request_id and job.request_id == request_id]
        active = [job for job in mine if not job.state.terminal]
        try:
            job, is_new = self.run(self.ledger.create_job(new, max_active=max_active))
        except RequestIdConflict as conflict:
            refusal = (conflict.job_id, True)
            assert [(k.job_id, k.fingerprint != fingerprint) for k in known] == [refusal]
            return multiple()
        except TooManyActiveJobs:
            assert not known
            assert max_active is not None
            assert len(active) >= max_active
            return multiple()
        except EndpointDisabled as refused:
            first = (refused.sink, refused.queue)
            assert not known
            places = [at for at, is_disabled in enumerate(disabled) if is_disabled]
            assert (places[0], new.queues[places[0]].queue) == first
            return multiple()
        if known:
            assert (job.job_id, is_new) == (known[0].job_id, False)
            assert known[0].fingerprint == fingerprint
            return multiple()
        assert is_new
        assert not any(disabled)
        assert max_active is None or len(active) < max_active
        now = self.model.now
        made = ModelJob(job.job_id, tenant, priority, now, request_id, fingerprint)
        made.sinks, made.drops = sinks, drops
        self.model.jobs[job.job_id] = made
        self.model.tasks.append(ModelTask(TaskKind.PLAN, tenant, made, priority, now, now))
        return (tenant, job.job_id)

    @rule(job=created, tenant=st.sampled_from(["own", "own", "a"]))
    def cancel(self, job: tuple[str, str], tenant: str) -> None:
        tenant = job[0] if tenant == "own" else tenant
        known = self.model.visible(tenant, job[1])
        answer = self.run(self.ledger.cancel_job(tenant, job[1]))
        if known is None:
            assert answer is None
            return
        assert answer is not None
        if known.state is JobState.CANCELLED:
            assert answer[1] is CancelOutcome.ALREADY_CANCELLED
        elif known.state.terminal:
            assert answer[1] is CancelOutcome.ALREADY_FINISHED
        else:
            assert answer[1] is CancelOutcome.CANCELLED
            self.model.end(known, JobState.CANCELLED)

    @rule(job=created)
    def delete(self, job: tuple[str, str]) -> None:
        known = self.model.visible(*job)
        state = self.run(self.ledger.delete_job(*job))
        assert state == (known.state if known else None)
        if known and known.state.terminal:
            self.model.hide(known)
            known.pins.clear()

    # --- readers of outputs

    @rule(job=created, reader=READERS, seconds=st.sampled_from([1.0, 20.0, 90.0]))
    def pin(self, job: tuple[str, str], reader: str, seconds: float) -> None:
        known, now = self.model.jobs.get(job[1]), self.model.now
        pinned = self.run(
            self.ledger.pin_output(*job, reader, length=timedelta(seconds=seconds))
        )
        may = (
            known is not None
            and known.state is JobState.SUCCEEDED
            and known.expire is not None
            and (
                (not known.hidden and not known.dropped and now < known.expire)
                or known.pinned(now, reader)
            )
        )
        assert pinned == may
        if known is not None and pinned:
            known.pins[reader] = now + seconds

    @rule(job=created, reader=READERS)
    def unpin(self, job: tuple[str, str], reader: str) -> None:
        self.run(self.ledger.unpin_output(job[1], reader))
        if known := self.model.jobs.get(job[1]):
            known.pins.pop(reader, None)

    # --- time and crashes

    @rule(seconds=st.sampled_from([0.5, 5.0, 15.0, 15.0, 20.0, 60.0]))
    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.model.now += seconds

    @rule()
    def reopen(self) -> None:
        self.run(self.ledger.close())
        self.ledger = self.run(self.open())
        self.reopened()

    # --- workers

    @rule(
        target=leases,
        kinds=KINDS,
        limit=st.sampled_from([None, None, 1, 2]),
        left=st.sampled_from(["", "", "a", "b"]),
    )
    def claim(self, kinds: set[TaskKind], limit: int | None, left: str) -> Any:
        return self.claimed(kinds, limit, left)

    @rule(target=leases, number=st.integers(1, 3))
    def claim_and_plan(self, number: int) -> Any:
        """The usual way, so that histories get far."""
        got = self.claimed(EXPORT, None)
        if isinstance(got, Lease) and got.kind is TaskKind.PLAN:
            return self.planned(got, number)
        return got

    @rule(target=leases, parts=st.integers(1, 3))
    def export_whole(self, parts: int) -> Any:
        """A whole shard at once, so that deliveries get far, too."""
        got = self.claimed(EXPORT, None)
        if isinstance(got, Lease) and got.kind is TaskKind.PLAN:
            got = self.planned(got, 1)
        if isinstance(got, Lease):
            for _ in range(parts):
                self.add_part(got)
            # No state is passed over unseen.
            self.ledger_and_model_agree()
            self.complete(got, manifest=False)
        return got

    def claimed(self, kinds: set[TaskKind], limit: int | None, left: str = "") -> Any:
        self.model.expire()
        expected = self.model.choose(kinds, limit, left)
        lease = self.run(
            self.ledger.claim(
                "w",
                kinds,
                lease=timedelta(seconds=LEASE),
                limits=ClaimLimits(limit, frozenset({left} - {""})),
            )
        )
        if expected is None:
            assert lease is None
            return multiple()
        assert lease is not None
        self.model.lease(expected)
        assert (lease.kind, lease.tenant) == (expected.kind, expected.tenant)
        assert lease.job_id == (expected.job.job_id if expected.job else "")
        assert (lease.shard.index if lease.shard else None) == expected.shard
        assert (lease.token, lease.attempt) == (expected.token, expected.attempts)
        assert lease.forget == expected.forget
        return lease

    def attempt(self, lease: Lease, work: Awaitable[T]) -> tuple[ModelTask, T] | None:
        """Do what the lease may; where it is lost nothing may have happened, which the
        comparison after each step sees."""
        task = self.model.holds(lease)
        try:
            result = self.run(work)
        except LeaseLost:
            assert task is None, "the lease was good"
            return None
        assert task is not None, "the lease was lost"
        return task, result

    @rule(one=leases, two=leases)
    def renew(self, one: Lease, two: Lease) -> None:
        some = [one, two]
        lost = self.run(self.ledger.renew(some, timedelta(seconds=LEASE)))
        assert lost == [lease for lease in some if self.model.holds(lease) is None]
        for lease in some:
            task = self.model.holds(lease)
            if task is not None:
                task.expires = self.model.now + LEASE

    @rule(lease=leases)
    def release(self, lease: Lease) -> None:
        if done := self.attempt(lease, self.ledger.release(lease)):
            task, _ = done
            task.state, task.run_at, task.ready = "waiting", self.model.now, True
            task.attempts -= 1
            if task.job and task.kind in EXPORT:
                task.job.untidy = True
                self.model.settle(task.job)

    @rule(target=leases, lease=leases, number=st.integers(1, 3))
    def plan(self, lease: Lease, number: int) -> Any:
        if lease.kind is not TaskKind.PLAN:
            return multiple()
        return self.planned(lease, number)

    def planned(self, lease: Lease, number: int) -> Any:
        done = self.attempt(
            lease,
            self.ledger.record_plan(lease, shards(number), COLUMNS, estimated_rows=7),
        )
        if done is None:
            return multiple()
        task, first = done
        task.state = "done"
        self.model.token += 1
        for index in range(number):
            shard = ModelTask(
                TaskKind.SHARD,
                task.tenant,
                task.job,
                task.priority,
                task.since,
                self.model.now,
                shard=index,
            )
            if index == 0:
                shard.state, shard.token = "leased", self.model.token
                shard.expires, shard.attempts = task.expires, task.attempts
            self.model.tasks.append(shard)
        assert (first.token, first.attempt) == (self.model.token, task.attempts)
        return first

    @rule(lease=leases, drop=st.sampled_from([False, False, True]), last=st.booleans())
    def add_part(self, lease: Lease, *, drop: bool = False, last: bool = False) -> None:
        if lease.kind is not TaskKind.SHARD:
            return
        task = self.model.holds(lease)
        sequence = len(task.parts) if task else 0
        add = self.ledger.add_last_part if last else self.ledger.add_part
        if done := self.attempt(lease, add(lease, part(lease, sequence), drop=drop)):
            task, added = done
            assert task.job is not None
            assert task.shard is not None
            task.parts.append(lease.token)
            expected = self.model.add_part(task.job, task.shard, sequence, drop=drop)
            without = added
            if isinstance(added, LastPart):
                without = added.dropped
                self.told(task, added.manifest)
            assert list(without) == expected

    @rule(lease=leases)
    def progress(self, lease: Lease) -> None:
        if lease.kind is TaskKind.SHARD:
            self.attempt(
                lease,
                self.ledger.record_progress(lease, rows=1, bytes_=1, rows_per_second=1),
            )

    @rule(lease=leases, manifest=st.booleans())
    def complete(self, lease: Lease, *, manifest: bool) -> None:
        if lease.kind is not TaskKind.SHARD:
            return
        complete = self.ledger.complete_shard(lease, manifest=manifest)
        if done := self.attempt(lease, complete):
            task, published = done
            assert self.completed(task) == published
            if task.job and published and manifest:
                task.job.manifest = lease.token

    @rule(lease=leases, drop=st.sampled_from([False, False, True]))
    def complete_only_shard(self, lease: Lease, *, drop: bool) -> None:
        if lease.kind is not TaskKind.SHARD:
            return
        task = self.model.holds(lease)
        if task is not None:
            assert task.job is not None
            others = [other for other in self.model.work(task.job) if other is not task]
            if any(other.state != "done" for other in others):
                return
        sequence = len(task.parts) if task else 0
        complete = self.ledger.complete_only_shard(lease, part(lease, sequence), drop=drop)
        if any(
            job.state is JobState.SUCCEEDED and job.manifest == lease.token
            for job in self.model.jobs.values()
        ):
            assert self.run(complete) == [], "it was done before"
            return
        if done := self.attempt(lease, complete):
            task, without = done
            assert task.job is not None
            assert task.shard is not None
            task.parts.append(lease.token)
            expected = self.model.add_part(task.job, task.shard, sequence, drop=drop)
            assert list(without) == expected
            assert self.completed(task)
            task.job.manifest = lease.token

    @rule(lease=leases)
    def complete_unless_last(self, lease: Lease) -> None:
        if lease.kind is not TaskKind.SHARD:
            return
        if done := self.attempt(lease, self.ledger.complete_unless_last(lease)):
            task, manifest = done
            self.told(task, manifest)
            if manifest is None:
                assert not self.completed(task)

    def told(self, task: ModelTask, manifest: Manifest | None) -> None:
        """What the end of a shard would publish is all, and told of the last one alone."""
        assert task.job is not None
        others = (other for other in self.model.work(task.job) if other is not task)
        last = all(other.state == "done" for other in others)
        assert (manifest is not None) == last
        if manifest is not None:
            found = [(p.shard, p.sequence, p.token) for p in manifest.parts]
            assert found == self.model.manifest(task.job)

    def completed(self, task: ModelTask) -> bool:
        job = task.job
        assert job is not None
        task.state = "done"
        last = all(other.state == "done" for other in self.model.work(job))
        if last:
            self.model.end(job, JobState.SUCCEEDED)
        else:
            self.model.settle(job)
        return last

    @rule(lease=leases)
    def restart(self, lease: Lease) -> None:
        if lease.kind not in EXPORT:
            return
        if done := self.attempt(lease, self.ledger.restart_output(lease)):
            job = done[0].job
            assert job is not None
            attempts = self.model.attempt(job)
            if job.generation >= MOST_GENERATIONS:
                self.model.end(job, JobState.FAILED, ErrorReason.SOURCE_CHANGED)
                return
            self.model.fence(job)
            self.model.undeliver(job)
            self.model.tasks = [t for t in self.model.tasks if t.job is not job]
            plan = ModelTask(
                TaskKind.PLAN, job.tenant, job, job.priority, job.created, self.model.now
            )
            plan.attempts = max(0, attempts - 1)
            self.model.tasks.append(plan)
            job.generation += 1
            job.untidy = True
            self.model.settle(job)

    @rule(lease=leases, retry=st.sampled_from([None, 0.0, 20.0]))
    def fail(self, lease: Lease, retry: float | None) -> None:
        if lease.kind is TaskKind.DELIVER:
            return
        pause = None if retry is None else timedelta(seconds=retry)
        done = self.attempt(lease, self.ledger.fail_attempt(lease, ERROR, retry_in=pause))
        if done is None:
            return
        task, failed = done
        task.state = "waiting"
        task.run_at = self.model.now + (retry or 0.0)
        job = task.job
        if job is None or task.kind not in EXPORT:
            assert not failed
            task.run_at += 10.0 if retry is None else 0.0
            return
        assert failed == (retry is None or task.attempts >= MAX_ATTEMPTS)
        if failed:
            self.model.end(job, JobState.FAILED, ERROR.reason)
        else:
            job.untidy = True
            job.last_error = ERROR.reason
            self.model.settle(job)

    # --- deliveries

    @rule(target=leases)
    def claim_delivery(self) -> Any:
        return self.claimed(DELIVER, None)

    @rule(lease=leases)
    def deliver(self, lease: Lease) -> None:
        if lease.kind is TaskKind.DELIVER:
            self.delivered(lease)

    @rule(most=st.integers(1, 6))
    def deliver_some(self, most: int) -> None:
        """So that histories get far."""
        for _ in range(most):
            lease = self.claimed(DELIVER, None)
            if not isinstance(lease, Lease):
                return
            self.delivered(lease)

    def delivered(self, lease: Lease) -> None:
        done = self.attempt(lease, self.ledger.delivery_work(lease))
        if done is None:
            return
        delivery = done[0].delivery
        assert delivery is not None
        work, job = done[1], delivery.job
        assert work.delivery_id not in delivery.former
        assert work.attempt == delivery.tried()
        assert work.completion == (delivery.part is None)
        assert work.disabled == self.model.queues[delivery.queue].disabled
        told = {(p.shard, p.sequence) for p in work.parts}
        if delivery.part is not None:
            assert told == {delivery.part}
        else:
            missing = {each.part for each in job.of(delivery.sink, DROPPED)}
            every = {(shard, at) for shard, at, _ in self.model.manifest(job)}
            assert told == every - missing
            assert work.dropped == len(missing)
            if SINKS[delivery.sink].takes is Takes.PARTS:
                arrived = {each.part for each in job.of(delivery.sink, DELIVERED)}
                assert told == arrived, "it tells of what the sink has, and of no more"
        if self.attempt(lease, self.ledger.complete_delivery(lease, work.delivery_id)):
            self.model.deliver(delivery)

    @rule(
        lease=leases,
        retry=st.sampled_from([None, 0.0, 20.0, 20.0]),
        gone=st.sampled_from([False, False, False, True]),
        disable_after=st.sampled_from([None, None, 30.0]),
    )
    def fail_delivery(
        self, lease: Lease, retry: float | None, disable_after: float | None, *, gone: bool
    ) -> None:
        if lease.kind is not TaskKind.DELIVER:
            return
        failing = self.ledger.fail_delivery(
            lease,
            ERROR,
            retry_in=None if retry is None else timedelta(seconds=retry),
            disable_after=None if disable_after is None else timedelta(0, disable_after),
            gone=gone,
        )
        if done := self.attempt(lease, failing):
            delivery = done[0].delivery
            assert delivery is not None
            came_to = self.model.fail_delivery(delivery, retry, disable_after, gone=gone)
            assert done[1] == came_to

    @rule(lease=leases)
    def has_room(self, lease: Lease) -> None:
        if lease.kind in EXPORT and (
            done := self.attempt(lease, self.ledger.has_room(lease))
        ):
            job = done[0].job
            assert job is not None
            waits = "parts" in job.sinks and not job.of("parts", DROPPED)
            assert done[1] == (not (waits and self.model.full("b", job.tenant)))

    @rule(
        tenant=TENANTS,
        job=st.one_of(st.none(), created),
        states=st.sampled_from([set(), {DEAD}, {DROPPED}, {PENDING}]),
    )
    def redrive(
        self, tenant: str, job: tuple[str, str] | None, states: set[DeliveryState]
    ) -> None:
        job_id = job[1] if job else ""
        query = DeliveryQuery(job_id=job_id, states=frozenset(states))
        count = self.run(self.ledger.redrive_deliveries(tenant, query))
        assert count == self.model.redrive(tenant, job_id, states)

    @rule(tenant=TENANTS, queue=st.sampled_from(list(POLICIES)))
    def enable(self, tenant: str, queue: str) -> None:
        mine = any(
            each.queue == queue
            for job in self.model.jobs.values()
            if job.tenant == tenant
            for each in job.deliveries
        )
        assert self.run(self.ledger.enable_queue(tenant, queue)) == mine
        if mine:
            self.model.queues[queue] = ModelQueue()

    # --- housekeeping

    @rule(lease=leases)
    def clean(self, lease: Lease) -> None:
        if lease.kind is not TaskKind.CLEANUP:
            return
        kept = self.attempt(lease, self.ledger.kept_parts(lease))
        if kept is not None:
            job = kept[0].job
            assert job is not None
            assert job.expire is not None
            gone = job.hidden or job.dropped
            good = not gone and self.model.now < job.expire
            read = not good and job.pinned(self.model.now)
            stays = job.state is JobState.SUCCEEDED and (good or read)
            assert (kept[1] is not None) == stays
            if kept[1] is not None:
                assert kept[1].read == read
                assert kept[1].manifest == (None if read else job.manifest)
                found = [(p.shard, p.sequence, p.token) for p in kept[1].parts]
                assert found == ([] if read else self.model.manifest(job))
        if done := self.attempt(lease, self.ledger.complete_cleanup(lease)):
            task = done[0]
            self.model.tasks.remove(task)
            if task.forget and task.job:
                self.model.forget(task.job)

    @rule(lease=leases, limit=st.sampled_from([1, 10]))
    def reap(self, lease: Lease, limit: int) -> None:
        if lease.kind is not TaskKind.REAP:
            return
        if done := self.attempt(lease, self.ledger.expire_jobs(lease, limit=limit)):
            expired = sorted(
                (job.expire, job.job_id)
                for job in self.model.jobs.values()
                if not job.hidden
                and job.expire is not None
                and job.expire <= self.model.now
            )[:limit]
            assert done[1] == len(expired)
            # Equal moments may go in any order: ask which went.
            for job in list(self.model.jobs.values()):
                gone = self.run(self.ledger.get_job(job.tenant, job.job_id)) is None
                if gone and not job.hidden:
                    assert job.expire is not None
                    assert job.expire <= expired[-1][0]
                    self.model.hide(job)
        again = self.ledger.complete_reap(lease, again_in=timedelta(seconds=30))
        if done2 := self.attempt(lease, again):
            task = done2[0]
            task.state, task.attempts = "waiting", 0
            task.run_at = self.model.now + 30.0

    @rule(lease=leases)
    def sweep(self, lease: Lease) -> None:
        if lease.kind is not TaskKind.SWEEP:
            return
        again = self.ledger.complete_sweep(lease, again_in=timedelta(seconds=30))
        if done := self.attempt(lease, again):
            task = done[0]
            task.state, task.attempts = "waiting", 0
            task.run_at = self.model.now + 30.0

    # --- what always holds

    @invariant()
    def ledger_and_model_agree(self) -> None:
        if not hasattr(self, "ledger"):
            return
        listed = {
            job.job_id
            for tenant in ("a", "b")
            for job in self.run(self.ledger.list_jobs(tenant, JobQuery(), limit=1000))
        }
        visible = {job.job_id for job in self.model.jobs.values() if not job.hidden}
        assert listed == visible
        ever = [str(UUID(int=number + 1)) for number in range(self.numbers)]
        assert self.run(self.ledger.known_jobs(ever)) == set(self.model.jobs)
        records: dict[str, list[DeliveryRecord]] = {}
        for tenant in ("a", "b"):
            listing = self.ledger.list_deliveries(tenant, DeliveryQuery(), limit=10_000)
            for record in self.run(listing):
                assert record.tenant == tenant
                records.setdefault(record.job_id, []).append(record)
            self.compare_queues(tenant)
        for known in self.model.jobs.values():
            job = self.run(self.ledger.get_job(known.tenant, known.job_id))
            cut = known.state in (JobState.CANCELLED, JobState.FAILED) or (
                known.hidden and not known.pinned(self.model.now, "r")
            )
            assert self.run(self.ledger.is_cut(known.job_id, "r")) == cut
            if known.hidden:
                assert job is None
                assert known.job_id not in records
                continue
            assert job is not None
            self.compare(known, job)
            self.compare_deliveries(known, job, records.get(known.job_id, []))
            self.check_history(job)

    def compare(self, known: ModelJob, job: Job) -> None:
        assert job.state is known.state
        assert job.generation == known.generation
        assert job.attempt == self.model.attempt(known)
        assert (job.error.reason if job.error else None) == known.error
        parts = self.model.manifest(known)
        assert job.progress.parts_done == len(parts)
        assert known.published == (job.state is JobState.SUCCEEDED)
        if job.state is JobState.SUCCEEDED:
            assert job.manifest is not None
            found = [(p.shard, p.sequence, p.token) for p in job.manifest.parts]
            assert found == parts
        else:
            assert job.manifest is None
        waits = job.state is JobState.PENDING
        assert job.progress.queue_position == (
            self.model.position(known) if waits else None
        )
        leased = any(task.state == "leased" for task in self.model.work(known))
        assert (job.state is JobState.RUNNING) == leased

    def compare_deliveries(
        self, known: ModelJob, job: Job, records: list[DeliveryRecord]
    ) -> None:
        assert (job.drop_time is not None) == known.dropped
        found = {(record.sink, record.part): record for record in records}
        assert len(found) == len(records) == len(known.deliveries)
        for each in known.deliveries:
            record = found[each.sink, each.part]
            assert (record.state, record.attempts) == (each.state, each.tried())
            each.delivery_id = each.delivery_id or record.delivery_id
            assert record.delivery_id == each.delivery_id
            assert record.delivery_id not in each.former
            later = each.task and each.task.state == "waiting" and not each.task.ready
            assert (record.next_attempt_time is not None) == bool(later)
            assert (record.finish_time is None) == (each.state is PENDING)
            if each.part is None and each.task:
                assert not known.of(each.sink, PENDING, DEAD), "it comes last"
        assert [told.sink for told in job.deliveries] == list(known.sinks)
        for told in job.deliveries:
            mine = [each for each in known.deliveries if each.sink == told.sink]
            count = Counter(each.state for each in mine)
            assert (told.pending, told.delivered) == (count[PENDING], count[DELIVERED])
            assert (told.dropped, told.dead_lettered) == (count[DROPPED], count[DEAD])
            assert told.attempts == sum(each.tried() for each in mine)

    def compare_queues(self, tenant: str) -> None:
        mine = {
            each.queue
            for job in self.model.jobs.values()
            if job.tenant == tenant
            for each in job.deliveries
        }
        found = self.run(self.ledger.list_queues(tenant, limit=10))
        assert [each.queue for each in found] == sorted(mine)
        for each in found:
            known = self.model.queues[each.queue]
            assert (each.disabled_time is not None) == known.disabled
            assert (each.failing_since is None) == (known.failing_since is None)
            tasks = [task for task in self.model.tasks if task.queue == each.queue]
            under_way = sum(task.state == "leased" for task in tasks)
            assert under_way <= POLICIES[each.queue].concurrency
            standing = [
                task.tenant == tenant
                for task in tasks
                if task.ready or task.state == "leased"
            ]
            assert each.waiting == sum(standing)
            theirs = [task for task in tasks if task.tenant == tenant]
            assert each.waiting + each.retrying == len(theirs)

    def check_history(self, job: Job) -> None:
        before = self.seen.get(job.job_id)
        if before is not None:
            assert job.revision >= before.revision
            if job.state is not before.state:
                assert job.state in TRANSITIONS[before.state]
            if before.state.terminal:
                ended = replace(before, expired=job.expired)
                if job.spec.sinks:
                    ended = replace(
                        ended,
                        revision=job.revision,
                        deliveries=job.deliveries,
                        drop_time=job.drop_time,
                    )
                assert job == ended, "what has ended never changes, but is delivered"
            if job.revision == before.revision:
                assert job.state is before.state
                assert job.generation == before.generation
                # An attempt counts when it begins, and changes nothing until it ends.
                assert [replace(each, attempts=0) for each in job.deliveries] == [
                    replace(each, attempts=0) for each in before.deliveries
                ]
        self.seen[job.job_id] = job


class SqliteMachine(LedgerMachine):
    def make(self) -> None:
        empty = _empty() / "empty.db"
        if not empty.exists():
            self.run(empty_sqlite_file(_empty()))
        self.path = copy_of(empty, Path(self.folder.name), "ledger.db")

    async def open(self) -> SqlLedger:
        return await open_sqlite_ledger(self.path, self.clock, max_attempts=MAX_ATTEMPTS)

    def reopened(self) -> None:
        """Nobody else can have held a lease."""
        self.model.recover()


class PostgresMachine(LedgerMachine):
    database: LedgerDatabase

    def make(self) -> None:
        self.database.reset()

    async def open(self) -> SqlLedger:
        return await open_postgres_ledger(
            self.database.url,
            max_attempts=MAX_ATTEMPTS,
            connections=2,
            clock=self.clock,
        )


@pytest.fixture(scope="module", autouse=True)
def database(ledger_database: LedgerDatabase) -> None:
    PostgresMachine.database = ledger_database


def _settings(examples: int) -> settings:
    return settings(
        max_examples=examples,
        stateful_step_count=50,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


TestSqliteLedger = SqliteMachine.TestCase
TestSqliteLedger.settings = _settings(8)
TestPostgresLedger = PostgresMachine.TestCase
# Ten times as slow.
TestPostgresLedger.settings = _settings(4)


@pytest.mark.minutes
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("machine", [SqliteMachine, PostgresMachine])
def test_the_ledger_does_what_the_model_does_for_longer(
    machine: type[LedgerMachine],
) -> None:
    examples = int(os.environ.get("MODEL_EXAMPLES", "100"))
    run_state_machine_as_test(machine, settings=_settings(examples))
