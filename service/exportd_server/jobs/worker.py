"""Does the work: claims tasks, keeps their leases alive, runs them, records the end.

A worker may die at any moment. It therefore owns nothing but its leases: what it did is
in the ledger and in the store, and what it had not finished another one does again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import structlog

from exportd_server.errors import (
    ErrorReason,
    ErrorRecord,
    ExportdError,
    ExportFailed,
    ExportTooLarge,
)
from exportd_server.jobs.housekeeping import Housekeeping
from exportd_server.jobs.ledger.base import (
    ClaimLimits,
    Lease,
    LeaseLost,
    Ledger,
    TaskKind,
)
from exportd_server.jobs.lower import schema_of, to_query
from exportd_server.jobs.manager import Policy
from exportd_server.jobs.model import Job, ManifestColumn, PartRecord
from exportd_server.pipeline.run import (
    FinishedPart,
    PartLimits,
    ShardRun,
    ShardTask,
    Stopped,
)
from exportd_server.sources.base import ColumnKind, SourceChanged
from exportd_server.sources.catalogue import Catalogue, Dataset
from exportd_server.store.base import OutputStore
from exportd_server.store.key import JobPrefix

log = structlog.get_logger(__name__)

_EXPORT_KINDS = (TaskKind.PLAN, TaskKind.SHARD)
_HOUSEKEEPING_KINDS = (TaskKind.CLEANUP, TaskKind.REAP)
_RATE_WINDOW = 5.0
MAX_PARTS = 10_000
"""Most parts of one shard: a manifest must stay a message that clients take."""


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """How a worker works; times in seconds."""

    concurrency: int = 2
    lease: float = 15.0
    poll: float = 5.0
    progress_interval: float = 0.5
    retry_base: float = 1.0
    retry_cap: float = 60.0
    running_per_tenant: int | None = None
    max_bytes_in_flight: int = 8 * 2**20


class Worker:
    """Works off the ledger's tasks until it is told to drain."""

    def __init__(
        self,
        ledger: Ledger,
        store: OutputStore,
        catalogue: Catalogue,
        housekeeping: Housekeeping,
        policy: Policy,
        options: WorkerOptions,
    ) -> None:
        self._ledger = ledger
        self._store = store
        self._catalogue = catalogue
        self._housekeeping = housekeeping
        self._policy = policy
        self._options = options
        self._owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._draining = asyncio.Event()
        self._finished = asyncio.Event()
        self._active: dict[int, _Active] = {}
        self._threads = ThreadPoolExecutor(
            options.concurrency, thread_name_prefix="exportd-shard"
        )

    async def run(self) -> None:
        """Work until `drain`; returns once everything has ended or was given back."""
        heartbeat = asyncio.create_task(self._renew_leases())
        slots = [
            asyncio.create_task(self._slot(_EXPORT_KINDS))
            for _ in range(self._options.concurrency)
        ]
        slots.append(asyncio.create_task(self._slot(_HOUSEKEEPING_KINDS)))
        try:
            await asyncio.gather(*slots)
        finally:
            self._finished.set()
            for task in (*slots, heartbeat):
                task.cancel()
            await asyncio.gather(*slots, heartbeat, return_exceptions=True)
            # Not on the loop, which a run that ends may still want a word with.
            await asyncio.to_thread(self._threads.shutdown)

    async def drain(self, grace: float) -> None:
        """Claim nothing more; after `grace` seconds stop what still runs and give its
        lease back."""
        self._draining.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._finished.wait()
        for active in list(self._active.values()):
            active.give_back()

    # --- claiming

    async def _slot(self, kinds: tuple[TaskKind, ...]) -> None:
        failures = 0
        draining = asyncio.create_task(self._draining.wait())
        try:
            while not self._draining.is_set():
                try:
                    lease = await self._ledger.claim(
                        self._owner,
                        kinds,
                        lease=timedelta(seconds=self._options.lease),
                        limits=ClaimLimits(self._options.running_per_tenant),
                    )
                    if lease is None:
                        await self._wait_for_work(draining)
                    else:
                        await self._work(lease)
                    failures = 0
                except Exception:
                    # The ledger may be out of reach for a while; the work is not lost.
                    failures += 1
                    log.exception("worker slot failed", failures=failures)
                    await asyncio.wait((draining,), timeout=self._backoff(failures))
        finally:
            draining.cancel()

    async def _wait_for_work(self, draining: asyncio.Task[Literal[True]]) -> None:
        waiting = asyncio.create_task(self._ledger.wait_for_work(self._options.poll))
        try:
            await asyncio.wait((waiting, draining), return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                waiting.result()
        finally:
            waiting.cancel()

    def _backoff(self, failures: int) -> float:
        """Capped exponential backoff, half of it jitter, in seconds."""
        options = self._options
        ceiling = min(options.retry_cap, options.retry_base * 2 ** min(failures - 1, 30))
        return random.uniform(ceiling / 2, ceiling)  # noqa: S311 - spreads, hides nothing

    async def _renew_leases(self) -> None:
        lease = timedelta(seconds=self._options.lease)
        while True:
            await asyncio.sleep(self._options.lease / 3)
            held = [active.lease for active in self._active.values()]
            if not held:
                continue
            try:
                for lost in await self._ledger.renew(held, lease):
                    active = self._active.get(lost.token)
                    if active is not None:
                        active.lose()
            except Exception:
                log.exception("leases could not be renewed")

    # --- working

    async def _work(self, lease: Lease) -> None:
        context = {
            "job_id": lease.job_id,
            "tenant": lease.tenant,
            "task": lease.kind.value,
            "attempt": lease.attempt,
        }
        with structlog.contextvars.bound_contextvars(**context):
            try:
                if lease.kind is TaskKind.CLEANUP:
                    await self._hold(lease, self._housekeeping.cleanup)
                elif lease.kind is TaskKind.REAP:
                    await self._hold(lease, self._housekeeping.reap)
                else:
                    await self._export(lease)
            except LeaseLost:
                log.info("lease lost")

    async def _hold(self, lease: Lease, work: Callable[[Lease], Awaitable[None]]) -> None:
        """Run housekeeping with the lease kept alive."""
        active = _Active(lease)
        self._active[lease.token] = active
        try:
            await work(lease)
        except LeaseLost:
            raise
        except Exception as error:  # noqa: BLE001 - housekeeping is tried again
            reference = _log_unforeseen(error)
            await self._ledger.fail_attempt(
                lease,
                _internal(reference),
                retry_in=timedelta(seconds=self._backoff(lease.attempt)),
            )
        finally:
            del self._active[lease.token]

    async def _export(self, lease: Lease) -> None:
        active = _Active(lease)
        self._active[lease.token] = active
        try:
            await self._plan_and_run(active)
        except LeaseLost:
            raise
        except _GivenBack:
            await self._ledger.release(active.lease)
            log.info("lease given back")
        except SourceChanged:
            log.info("source changed, output begins anew")
            await self._ledger.restart_output(active.lease)
        except ExportdError as error:
            await self._fail(active.lease, error)
        except Exception as error:  # noqa: BLE001 - whatever it is, the job must end
            reference = _log_unforeseen(error)
            await self._ledger.fail_attempt(
                active.lease, _internal(reference), retry_in=None
            )
        finally:
            del self._active[active.key]

    async def _fail(self, lease: Lease, error: ExportdError) -> None:
        retryable = isinstance(error, ExportFailed) and error.retryable
        retry_in = timedelta(seconds=self._backoff(lease.attempt)) if retryable else None
        failed = await self._ledger.fail_attempt(
            lease, ErrorRecord.of(error), retry_in=retry_in
        )
        log.warning(
            "attempt failed",
            reason=error.reason.value,
            message=error.message,
            job_failed=failed,
            exc_info=error.__cause__,
        )

    async def _plan_and_run(self, active: _Active) -> None:
        job = await self._ledger.get_job(active.lease.tenant, active.lease.job_id)
        if job is None:
            raise LeaseLost
        dataset = self._catalogue.get(job.spec.dataset)
        if dataset is None or not dataset.exportable:
            raise ExportdError(ErrorReason.DATASET_NOT_EXPORTABLE)
        query = to_query(dataset, job.spec)
        resumes = active.lease.kind is TaskKind.SHARD
        if not resumes:
            plan = await asyncio.to_thread(dataset.source.plan, query)
            active.move_to(
                await self._ledger.record_plan(
                    active.lease,
                    plan.shards,
                    _manifest_columns(dataset, query.columns),
                    estimated_rows=plan.estimated_rows,
                ),
                self._active,
            )
        # A plan that was just recorded has no parts of an earlier attempt.
        await self._run_shard(active, job, dataset, resumes=resumes)

    async def _run_shard(
        self, active: _Active, job: Job, dataset: Dataset, *, resumes: bool
    ) -> None:
        lease = active.lease
        if lease.shard is None:
            raise RuntimeError("a shard task without a shard")
        done = await self._ledger.shard_parts(lease) if resumes else []
        if done:
            log.info("shard resumes", parts=len(done), rows=sum(p.rows for p in done))
        loop = asyncio.get_running_loop()
        caps = _Caps(
            self._policy.row_cap(dataset),
            self._policy.byte_cap(dataset),
            own_rows=sum(part.rows for part in done),
            own_bytes=sum(part.bytes for part in done),
        )

        def commit(part: FinishedPart) -> None:
            if part.key.sequence >= MAX_PARTS:
                raise ExportTooLarge("max_parts", MAX_PARTS, part.key.sequence + 1)
            recorded = self._ledger.add_part(lease, _part_record(part))
            asyncio.run_coroutine_threadsafe(recorded, loop).result()

        run = ShardRun(
            ShardTask(
                source=dataset.source,
                query=to_query(dataset, job.spec),
                shard=lease.shard,
                output=job.spec.output,
                limits=PartLimits(job.spec.max_part_rows, job.spec.max_part_bytes),
                prefix=JobPrefix(lease.tenant, lease.job_id),
                token=lease.token,
                done_parts=len(done),
                done_rows=sum(part.rows for part in done),
                done_bytes=sum(part.bytes for part in done),
            ),
            self._store,
            commit=commit,
            check=caps.check,
            max_bytes_in_flight=self._options.max_bytes_in_flight,
        )
        active.run = run
        if active.stopping:
            raise active.why_stopped()
        progress = asyncio.create_task(self._report_progress(active, run, caps))
        try:
            await self._run_in_thread(active, run)
        finally:
            progress.cancel()
            active.run = None
        if caps.bounded:
            await self._settle_caps(lease, run, caps)
        if await self._ledger.complete_shard(lease):
            log.info("job succeeded", rows=run.rows, bytes=run.bytes)

    async def _run_in_thread(self, active: _Active, run: ShardRun) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._threads, run)
        except Stopped:
            raise active.why_stopped() from None
        except LeaseLost:
            raise
        except asyncio.CancelledError:
            # The thread does not end with the task that waits for it.
            run.cancel()
            raise
        except BaseException:
            # What a lost lease makes fail is no failure of the job.
            if active.lost:
                raise LeaseLost from None
            raise

    async def _settle_caps(self, lease: Lease, run: ShardRun, caps: _Caps) -> None:
        """Hold the whole job against its caps before the shard counts as complete: other
        shards may have ended since they were last heard of. Each tells before it ends,
        so the last one sees all of them."""
        total = await self._ledger.record_progress(
            lease, rows=run.rows, bytes_=run.bytes, rows_per_second=0.0
        )
        caps.others(*total, own_rows=run.rows, own_bytes=run.bytes)
        caps.check(run.rows, run.bytes)

    async def _report_progress(self, active: _Active, run: ShardRun, caps: _Caps) -> None:
        """Tell the ledger how far the shard is, and learn whether it still matters."""
        history: deque[tuple[float, int]] = deque([(time.monotonic(), run.rows)])
        while True:
            await asyncio.sleep(self._options.progress_interval)
            now, rows = time.monotonic(), run.rows
            history.append((now, rows))
            while len(history) > 2 and now - history[0][0] > _RATE_WINDOW:
                history.popleft()
            begun, rows_then = history[0]
            rate = max(0.0, (rows - rows_then) / (now - begun))
            try:
                total = await self._ledger.record_progress(
                    active.lease, rows=rows, bytes_=run.bytes, rows_per_second=rate
                )
            except LeaseLost:
                active.lose()
                return
            except Exception:
                log.exception("progress could not be recorded")
            else:
                caps.others(*total, own_rows=rows, own_bytes=run.bytes)


class _GivenBack(Exception):
    """The worker drains and gives its lease back."""


class _Active:
    """A lease at work, and how to stop it. For the event loop's thread only."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.key = lease.token
        self.run: ShardRun | None = None
        self.lost = False
        self._given_back = False

    def move_to(self, lease: Lease, table: dict[int, _Active]) -> None:
        """The work goes on under the next lease."""
        del table[self.key]
        self.lease = lease
        self.key = lease.token
        table[self.key] = self

    def lose(self) -> None:
        """The lease is gone: stop at once."""
        self.lost = True
        if self.run is not None:
            self.run.cancel()

    def give_back(self) -> None:
        """Stop, so that another worker can go on."""
        self._given_back = True
        if self.run is not None:
            self.run.cancel()

    @property
    def stopping(self) -> bool:
        """Whether the work is to stop."""
        return self.lost or self._given_back

    def why_stopped(self) -> Exception:
        """What a stopped run means."""
        return _GivenBack() if self._given_back and not self.lost else LeaseLost()


class _Caps:
    """The job's caps, checked in the pipeline's thread against this shard's own count
    and what the other shards had when they last told."""

    def __init__(
        self,
        max_rows: int | None,
        max_bytes: int | None,
        *,
        own_rows: int,
        own_bytes: int,
    ) -> None:
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._others = (0, 0)
        self.check(own_rows, own_bytes)

    @property
    def bounded(self) -> bool:
        """Whether there is a cap at all."""
        return self._max_rows is not None or self._max_bytes is not None

    def others(self, rows: int, bytes_: int, *, own_rows: int, own_bytes: int) -> None:
        """Learn the job's total at a moment when this shard had so much of it."""
        self._others = (max(0, rows - own_rows), max(0, bytes_ - own_bytes))

    def check(self, rows: int, bytes_: int) -> None:
        """Raise `ExportTooLarge` when a cap is passed."""
        rows += self._others[0]
        bytes_ += self._others[1]
        if self._max_rows is not None and rows > self._max_rows:
            raise ExportTooLarge("max_rows", self._max_rows, rows)
        if self._max_bytes is not None and bytes_ > self._max_bytes:
            raise ExportTooLarge("max_bytes", self._max_bytes, bytes_)


def _internal(reference: str) -> ErrorRecord:
    return ErrorRecord(
        ErrorReason.INTERNAL,
        f"internal error; the operator finds it by reference {reference}",
        {"reference": reference},
    )


def _log_unforeseen(error: BaseException) -> str:
    reference = secrets.token_hex(6)
    log.error("unforeseen error", reference=reference, exc_info=error)
    return reference


def _manifest_columns(
    dataset: Dataset, names: tuple[str, ...]
) -> tuple[ManifestColumn, ...]:
    by_name = {column.name: column for column in dataset.columns}
    schema = schema_of(by_name[name] for name in names)
    return tuple(
        ManifestColumn(
            field.name, ColumnKind.of(field.type), str(field.type), field.nullable
        )
        for field in schema
    )


def _part_record(part: FinishedPart) -> PartRecord:
    digest = part.digest
    return PartRecord(
        shard=part.key.shard,
        sequence=part.key.sequence,
        token=part.key.token,
        rows=part.rows,
        bytes=digest.bytes,
        prefix_bytes=digest.prefix_bytes,
        suffix_bytes=digest.suffix_bytes,
        crc32c=digest.crc32c,
        prefix_crc32c=digest.prefix_crc32c,
        body_crc32c=digest.body_crc32c,
        suffix_crc32c=digest.suffix_crc32c,
        sha256=digest.sha256,
    )
