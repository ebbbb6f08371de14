"""The ledger against a small model of it, under whatever Hypothesis comes up with.

The model is lists and loops, without SQL, indexes or threads. `EXPORTD_MODEL_EXAMPLES`
sets how many histories are tried.
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
)

from exportd_server.errors import ErrorReason, ErrorRecord
from exportd_server.jobs.ledger.base import (
    ClaimLimits,
    JobQuery,
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
from exportd_server.jobs.model import TRANSITIONS, CancelOutcome, Job, JobState
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

_empty = Path(tempfile.mkdtemp(prefix="exportd-model-"))
atexit.register(shutil.rmtree, _empty)


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

    def pinned(self, now: float, reader: str = "") -> bool:
        return any(
            until > now and reader in ("", name) for name, until in self.pins.items()
        )


class Model:
    def __init__(self) -> None:
        self.now = 0.0
        self.token = 0
        self.jobs: dict[str, ModelJob] = {}
        self.served: dict[str, int] = {}
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
        if state is JobState.SUCCEEDED:
            job.published += 1
            if job.untidy:
                self.cleanup(job, job.late)
        else:
            self.cleanup(job, self.now)
            if job.late > self.now:
                self.cleanup(job, job.late)

    def hide(self, job: ModelJob) -> None:
        job.hidden = True
        if job.late > self.now:
            self.cleanup(job, self.now)
        self.cleanup(job, job.late, forget=True)

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
            task.state, task.run_at = "waiting", self.now
            if task.job and task.kind in EXPORT:
                task.job.untidy = True
                task.job.state = JobState.PENDING
        self.fail_exhausted(self.exhausted(dead))

    def choose(self, kinds: set[TaskKind], limit: int | None) -> ModelTask | None:
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
    )
    def create(
        self,
        tenant: str,
        priority: int,
        request_id: str,
        fingerprint: str,
        max_active: int | None,
    ) -> Any:
        self.numbers += 1
        new = NewJob(
            str(UUID(int=self.numbers)),
            tenant,
            spec(priority=priority, ttl=timedelta(seconds=TTL)),
            request_id,
            fingerprint,
        )
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
        if known:
            assert (job.job_id, is_new) == (known[0].job_id, False)
            assert known[0].fingerprint == fingerprint
            return multiple()
        assert is_new
        assert max_active is None or len(active) < max_active
        now = self.model.now
        made = ModelJob(job.job_id, tenant, priority, now, request_id, fingerprint)
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
            and ((not known.hidden and now < known.expire) or known.pinned(now, reader))
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

    @rule(target=leases, kinds=KINDS, limit=st.sampled_from([None, None, 1, 2]))
    def claim(self, kinds: set[TaskKind], limit: int | None) -> Any:
        return self.claimed(kinds, limit)

    @rule(target=leases, number=st.integers(1, 3))
    def claim_and_plan(self, number: int) -> Any:
        """The usual way, so that histories get far."""
        got = self.claimed(EXPORT, None)
        if isinstance(got, Lease) and got.kind is TaskKind.PLAN:
            return self.planned(got, number)
        return got

    def claimed(self, kinds: set[TaskKind], limit: int | None) -> Any:
        self.model.expire()
        expected = self.model.choose(kinds, limit)
        lease = self.run(
            self.ledger.claim(
                "w",
                kinds,
                lease=timedelta(seconds=LEASE),
                limits=ClaimLimits(limit),
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
            task.state, task.run_at = "waiting", self.model.now
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

    @rule(lease=leases)
    def add_part(self, lease: Lease) -> None:
        if lease.kind is not TaskKind.SHARD:
            return
        task = self.model.holds(lease)
        sequence = len(task.parts) if task else 0
        if self.attempt(lease, self.ledger.add_part(lease, part(lease, sequence))) and task:
            task.parts.append(lease.token)

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

    @rule(lease=leases)
    def complete_unless_last(self, lease: Lease) -> None:
        if lease.kind is not TaskKind.SHARD:
            return
        if done := self.attempt(lease, self.ledger.complete_unless_last(lease)):
            task, manifest = done
            assert task.job is not None
            others = (other for other in self.model.work(task.job) if other is not task)
            last = all(other.state == "done" for other in others)
            assert (manifest is not None) == last
            if manifest is None:
                assert not self.completed(task)
                return
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
            good = not job.hidden and self.model.now < job.expire
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
        for known in self.model.jobs.values():
            job = self.run(self.ledger.get_job(known.tenant, known.job_id))
            cut = known.state in (JobState.CANCELLED, JobState.FAILED) or (
                known.hidden and not known.pinned(self.model.now, "r")
            )
            assert self.run(self.ledger.is_cut(known.job_id, "r")) == cut
            if known.hidden:
                assert job is None
                continue
            assert job is not None
            self.compare(known, job)
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

    def check_history(self, job: Job) -> None:
        before = self.seen.get(job.job_id)
        if before is not None:
            assert job.revision >= before.revision
            if job.state is not before.state:
                assert job.state in TRANSITIONS[before.state]
            if before.state.terminal:
                ended = replace(before, expired=job.expired)
                assert job == ended, "what has ended never changes"
            if job.revision == before.revision:
                assert job.state is before.state
                assert job.generation == before.generation
        self.seen[job.job_id] = job


class SqliteMachine(LedgerMachine):
    def make(self) -> None:
        empty = _empty / "empty.db"
        if not empty.exists():
            self.run(empty_sqlite_file(_empty))
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


_SETTINGS = settings(
    max_examples=int(os.environ.get("EXPORTD_MODEL_EXAMPLES", "40")),
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestSqliteLedger = SqliteMachine.TestCase
TestSqliteLedger.settings = _SETTINGS
TestPostgresLedger = PostgresMachine.TestCase
TestPostgresLedger.settings = _SETTINGS
