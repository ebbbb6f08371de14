"""Exports: plans a job, runs a shard, and records how it ended."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta

import structlog

from exportd_server.errors import (
    ErrorReason,
    ErrorRecord,
    ExportdError,
    ExportFailed,
    LedgerUnavailable,
    SourceFailed,
)
from exportd_server.jobs.anchors import Anchors
from exportd_server.jobs.caps import Caps, TimeCap, check_parts
from exportd_server.jobs.leases import GivenBack, Held, Leases
from exportd_server.jobs.ledger.base import Lease, LeaseLost, Ledger, TaskKind, Totals
from exportd_server.jobs.lower import output_columns, to_query
from exportd_server.jobs.manager import Policy
from exportd_server.jobs.manifest import missing_parts, store_manifest
from exportd_server.jobs.model import Job, Manifest, ManifestColumn, PartRecord
from exportd_server.jobs.planning import make_plan
from exportd_server.jobs.strays import Strayable, Strays
from exportd_server.pipeline.run import (
    FinishedPart,
    PartLimits,
    ShardRun,
    ShardTask,
    Stopped,
)
from exportd_server.platform import metrics, metrics_exports
from exportd_server.platform.threads import in_daemon_thread
from exportd_server.platform.tracing import NO_TRACER, Attributes, Span, Tracer
from exportd_server.platform.waits import Backoff, first
from exportd_server.sinks.base import Takes
from exportd_server.sources.base import Query, SourceChanged
from exportd_server.sources.catalogue import Catalogue, Dataset
from exportd_server.store.base import OutputStore
from exportd_server.store.key import JobPrefix, OutputKind

log = structlog.get_logger(__name__)

_RATE_WINDOW = 5.0
_RETRY = Backoff(1.0, 60.0)
_FULL_PAUSE = 0.1
"""Seconds between looks at a queue that is full."""
_STOPPING = 1.0
"""Seconds that a run has to stop by itself when its lease is given back."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """How exports are run. Times in seconds, sizes in bytes, `shard_rows` in rows of the
    source."""

    shard_rows: int = 2_000_000
    max_bytes_in_flight: int = 6 * 2**20
    progress_interval: float = 0.5
    source_timeout: float = 900.0
    block_timeout: float = 600.0
    retry: Backoff = _RETRY


class PartsLost(Exception):
    """So many parts that the ledger has recorded are not in the store."""

    def __init__(self, parts: int) -> None:
        self.parts = parts
        super().__init__(f"{parts} parts")


@dataclass(slots=True)
class _Recording:
    """The recording of a run's parts: `patience` is for how many seconds it may yet wait
    for room in queues, and `manifest` what the job will publish once this run has ended,
    where the last part told.

    Of a job that was planned as one shard, with these `columns`, all is known here: its
    `last` part is kept back, to be recorded with the job's end, and `drop` says whether
    the sinks that have no room for it are to go without."""

    patience: float
    columns: Sequence[ManifestColumn] | None = None
    parts: list[PartRecord] = field(default_factory=list)
    last: FinishedPart | None = None
    drop: bool = False
    manifest: Manifest | None = None

    def keep_last(self, last: FinishedPart) -> bool:
        """Keep the last part back if that may be; from the run's thread."""
        if self.columns is None or not last.last:
            return False
        self.last = last
        self.manifest = Manifest.of(self.columns, [*self.parts, *_part_records(last)])
        return True


class Exporter:
    """Does the work of plan and shard tasks. Everything that it tells the ledger is told
    until the ledger has heard it: an outage costs time and nothing else."""

    def __init__(
        self,
        ledger: Ledger,
        store: OutputStore,
        catalogue: Catalogue,
        policy: Policy,
        leases: Leases,
        anchors: Anchors,
        options: ExportOptions,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self._ledger = ledger
        self._store = store
        self._catalogue = catalogue
        self._policy = policy
        self._leases = leases
        self._anchors = anchors
        self._options = options
        self._tracer = tracer
        self._strays = Strays()
        self._first_token = 2**63

    async def export(self, held: Held) -> str:
        """Work on a task until its end is recorded; returns what it came to, as
        `exportd_attempts_total` has it. Raises `LeaseLost` or `GivenBack`."""
        self._first_token = min(self._first_token, held.lease.token)
        try:
            async with self._leases.fenced(held):
                await self._plan_and_run(held)
                return "done"
        except (LeaseLost, GivenBack):
            raise
        except Exception as error:
            if held.lost:
                # What a lost lease makes fail is no failure of the job.
                raise LeaseLost from error
            outcome = await self._record_failure(held, error)
            await first(self._strays.room(), held.given_back())
            return outcome

    async def _record_failure(self, held: Held, error: Exception) -> str:
        lease = held.lease
        if isinstance(error, SourceChanged | PartsLost):
            if isinstance(error, PartsLost):
                log.warning(
                    "recorded parts are gone, output begins anew", parts=error.parts
                )
            else:
                log.info("source changed, output begins anew")
            await held.insist(lambda: self._ledger.restart_output(lease))
            return "restarted"
        record, retry_in = self._judge(lease, error)
        failed = await held.insist(
            lambda: self._ledger.fail_attempt(lease, record, retry_in=retry_in)
        )
        log.warning(
            "attempt failed",
            reason=record.reason.value,
            message=record.message,
            job_failed=failed,
            exc_info=error.__cause__,
        )
        return "failed" if failed else "retried"

    def _judge(
        self, lease: Lease, error: Exception
    ) -> tuple[ErrorRecord, timedelta | None]:
        """What is told of an error, and when to try again if that may help."""
        if not isinstance(error, ExportdError):
            return unforeseen(error), None
        again = isinstance(error, ExportFailed) and error.retryable
        pause = timedelta(seconds=self._options.retry.pause(lease.attempt))
        return ErrorRecord.of(error), pause if again else None

    async def _plan_and_run(self, held: Held) -> None:
        lease = held.lease
        job = await held.insist(lambda: self._ledger.get_job(lease.tenant, lease.job_id))
        if job is None or job.state.terminal or job.generation != lease.generation:
            raise LeaseLost
        dataset = self._catalogue.find(job.spec.dataset, lease.tenant)
        if dataset is None or not dataset.exportable:
            raise ExportdError(ErrorReason.DATASET_NOT_EXPORTABLE)
        time_cap = TimeCap(self._policy.max_seconds, job)
        if (passed := time_cap.passed()) is not None:
            raise passed
        query = to_query(dataset, job.spec, lease.tenant)
        done: list[PartRecord] = []
        recording = _Recording(self._options.block_timeout)
        if lease.kind is TaskKind.PLAN:
            # A plan that was just recorded has no parts of an earlier attempt.
            with self._step("plan", held, job):
                columns = output_columns(dataset, query.columns)
                shards = await self._plan(held, dataset, query, columns, time_cap)
            if shards == 1:
                recording.columns = columns
        else:
            done = await held.insist(lambda: self._ledger.shard_parts(lease))
        await self._run_shard(held, job, dataset, query, done, recording, time_cap)

    # --- planning

    async def _plan(
        self,
        held: Held,
        dataset: Dataset,
        query: Query,
        columns: Sequence[ManifestColumn],
        time_cap: TimeCap,
    ) -> int:
        """Plan, and record it; returns how many shards there are."""
        patience = self._options.source_timeout
        try:
            async with asyncio.timeout(_least(patience, time_cap.left)) as limit:
                plan = await make_plan(
                    dataset.source,
                    query,
                    self._options.shard_rows,
                    held,
                    self._anchors,
                    self._strays,
                )
        except TimeoutError:
            if not limit.expired():
                raise
            raise time_cap.passed() or _silent(patience) from None
        lease, outages = held.lease, held.outages
        # Held before the shards can be claimed, and for longer than this task.
        holding = self._anchors.hold(plan.anchor, lease) if plan.anchor else None
        try:
            with held.changing() as move_to:
                move_to(
                    await held.insist(
                        lambda: self._ledger.record_plan(
                            lease,
                            plan.shards,
                            columns,
                            estimated_rows=dataset.told(plan.estimated_rows),
                        )
                    )
                )
        except BaseException as error:
            # After an outage a lost lease may mean that the plan was recorded, and that
            # others read its shards.
            recorded = isinstance(error, LeaseLost) and held.outages > outages
            if holding is not None and not recorded:
                holding.cancel()
            raise
        log.debug("planned", shards=len(plan.shards), anchored=holding is not None)
        return len(plan.shards)

    # --- running

    async def _run_shard(
        self,
        held: Held,
        job: Job,
        dataset: Dataset,
        query: Query,
        done: list[PartRecord],
        recording: _Recording,
        time_cap: TimeCap,
    ) -> None:
        lease = held.lease
        if lease.shard is None:
            raise RuntimeError("a shard task without a shard")
        done_parts = [part for part in done if part.kind is OutputKind.OUTPUT]
        rows, bytes_ = sum(p.rows for p in done_parts), sum(p.bytes for p in done)
        row_errors = sum(p.rows for p in done) - rows
        if done:
            log.info("shard resumes", parts=len(done_parts), rows=rows)
        caps = Caps(
            self._policy.row_cap(dataset),
            self._policy.byte_cap(dataset),
            job.spec.max_row_errors,
        )
        caps.check(rows, bytes_, row_errors)
        run = ShardRun(
            ShardTask(
                source=dataset.source,
                query=query,
                shard=lease.shard,
                output=job.spec.output,
                limits=PartLimits(job.spec.max_part_rows, job.spec.max_part_bytes),
                prefix=JobPrefix(lease.tenant, lease.job_id),
                token=lease.token,
                done_parts=len(done_parts),
                done_rows=rows,
                done_bytes=bytes_,
                done_row_errors=row_errors,
                skip_errors=job.spec.max_row_errors is not None,
            ),
            self._store,
            commit=self._commit(held, job, time_cap, recording),
            check=caps.check,
            max_bytes_in_flight=self._options.max_bytes_in_flight,
        )
        with self._step("shard", held, job) as span:
            span.set({"exportd.shard": lease.shard.index})
            async with self._progress(held, run, caps):
                await _run_in_thread(held, run, self._strays, self._overdue(run, time_cap))
                if recording.last is not None:
                    recording.drop = await self._find_room(held, job, time_cap, recording)
            last = recording.manifest or await held.insist(
                lambda: self._ledger.complete_unless_last(lease)
            )
            span.set({"exportd.rows": run.rows})
            if last is not None:
                # All shards together may have more than each of them by itself.
                caps.check_whole(last)
                check_parts(len(last.all_parts))
        if last is not None:
            with self._step("publish", held, job):
                await self._publish(held, job, last, recording, time_cap)
            log.info("job succeeded", rows=run.rows, bytes=run.bytes)

    def _step(self, name: str, held: Held, job: Job) -> AbstractContextManager[Span]:
        """A span for a step of a job. Steps stand side by side in the job's trace, because
        one around them might be lost with its process."""
        return self._tracer.span(
            name,
            attributes={
                **traced_as(held.lease),
                "exportd.dataset": job.spec.dataset,
                "exportd.format": job.spec.output.format.value,
            },
            expected=(LeaseLost, GivenBack),
        )

    async def _overdue(self, run: ShardRun, time_cap: TimeCap) -> ExportFailed:
        """Wait until the run has taken too long; returns what that makes of it."""
        patience = self._options.source_timeout
        while True:
            if (passed := time_cap.passed()) is not None:
                return passed
            if (left := patience - run.source_silence) <= 0:
                return _silent(patience)
            await asyncio.sleep(_least(left, time_cap.left))

    async def _publish(
        self,
        held: Held,
        job: Job,
        manifest: Manifest,
        recording: _Recording,
        time_cap: TimeCap,
    ) -> None:
        """Store the manifest, and only then have the job succeed. Raises `PartsLost`."""
        lease = held.lease
        # A restored ledger may name parts that were deleted since the backup. A fleet is
        # stopped to be restored, so they are older than all that this process has held.
        if any(part.token < self._first_token for part in manifest.all_parts):
            missing = await held.unless_stopped(missing_parts(self._store, job, manifest))
            if missing:
                raise PartsLost(len(missing))
        try:
            await held.unless_stopped(
                in_daemon_thread(
                    lambda: store_manifest(self._store, job, manifest, lease.token),
                    "manifest",
                )
            )
        except Exception:
            if recording.last is not None:
                await self._record_last(lease, job, recording.last, drop=recording.drop)
            raise
        # With the job its leases end, this one too, which is no news to anybody here.
        if recording.last is None:
            with held.changing():
                await held.insist(lambda: self._ledger.complete_shard(lease, manifest=True))
            return
        output, *errors = _part_records(recording.last)
        # Others may have taken the room that there was.
        drop = recording.drop or await self._find_room(held, job, time_cap, recording)
        with held.changing():
            dropped = await held.insist(
                lambda: self._ledger.complete_only_shard(lease, output, *errors, drop=drop)
            )
        _count(job, recording.last, dropped)

    async def _record_last(
        self, lease: Lease, job: Job, last: FinishedPart, *, drop: bool
    ) -> None:
        """Record a part without the job's end, so that the next attempt need not write it
        again."""
        try:
            dropped = await self._ledger.add_part(lease, *_part_records(last), drop=drop)
        except LeaseLost:
            return
        except Exception as error:
            # It is what made this necessary that is to be told.
            log.warning("the last part is not recorded", exc_info=error)
            return
        _count(job, last, dropped)

    async def _record(
        self,
        held: Held,
        job: Job,
        time_cap: TimeCap,
        lease: Lease,
        finished: FinishedPart,
        recording: _Recording,
    ) -> None:
        """Record a part, once there is room for it."""
        parts = _part_records(finished)
        drop = await self._find_room(held, job, time_cap, recording)
        if finished.last:
            dropped, recording.manifest = await held.insist(
                lambda: self._ledger.add_last_part(lease, *parts, drop=drop)
            )
        else:
            recording.parts += parts
            dropped = await held.insist(
                lambda: self._ledger.add_part(lease, *parts, drop=drop)
            )
        _count(job, finished, dropped)

    async def _find_room(
        self, held: Held, job: Job, time_cap: TimeCap, recording: _Recording
    ) -> bool:
        """Wait until each sink that must not miss a part has room for it; returns True
        when that was waited for long enough."""
        if not any(sink.takes is Takes.PARTS for sink in job.spec.sinks):
            return False
        lease = held.lease
        while not await held.insist(lambda: self._ledger.has_room(lease)):
            held.check()
            if (passed := time_cap.passed()) is not None:
                raise passed
            # A sink that takes nothing is no reason for the job to fail.
            if recording.patience <= 0:
                return True
            await asyncio.sleep(_FULL_PAUSE)
            recording.patience -= _FULL_PAUSE
        return False

    def _commit(
        self, held: Held, job: Job, time_cap: TimeCap, recording: _Recording
    ) -> Callable[[FinishedPart], None]:
        lease, loop = held.lease, asyncio.get_running_loop()
        parts = job.progress.parts_done + job.progress.error_parts

        def commit(part: FinishedPart) -> None:
            """In the pipeline's thread: record a part before the next one begins."""
            nonlocal parts
            parts += 1 if part.errors is None else 2
            check_parts(parts)
            if recording.keep_last(part):
                return
            recorded = self._record(held, job, time_cap, lease, part, recording)
            asyncio.run_coroutine_threadsafe(recorded, loop).result()

        return commit

    # --- progress

    @asynccontextmanager
    async def _progress(self, held: Held, run: ShardRun, caps: Caps) -> AsyncIterator[None]:
        done = asyncio.Event()
        reporting = asyncio.create_task(self._report_progress(held, run, caps, done))
        try:
            yield
            # A report must not be overtaken by the shard's end.
            done.set()
            await reporting
        finally:
            reporting.cancel()
            await asyncio.wait({reporting})

    async def _report_progress(
        self, held: Held, run: ShardRun, caps: Caps, done: asyncio.Event
    ) -> None:
        """Tell the ledger how far the shard is, and learn whether it still matters."""
        lease = held.lease
        history: deque[tuple[float, int]] = deque([(time.monotonic(), run.rows)])
        silent = False
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._options.progress_interval):
                    await done.wait()
                    return
            now, own = time.monotonic(), Totals(run.rows, run.bytes, run.row_errors)
            history.append((now, own.rows))
            while len(history) > 2 and now - history[0][0] > _RATE_WINDOW:
                history.popleft()
            begun, rows_then = history[0]
            rate = max(0.0, (own.rows - rows_then) / (now - begun))
            try:
                total = await self._ledger.record_progress(
                    lease,
                    rows=own.rows,
                    bytes_=own.bytes,
                    row_errors=own.row_errors,
                    rows_per_second=rate,
                )
            except LeaseLost:
                held.lose(lease)
                return
            except Exception as error:
                if not silent:
                    known = isinstance(error, LedgerUnavailable)
                    log.warning(
                        "progress could not be recorded", exc_info=None if known else error
                    )
                silent = True
            else:
                silent = False
                caps.others(total, own)


def _least(seconds: float, others: float | None) -> float:
    return seconds if others is None else min(seconds, others)


def _silent(seconds: float) -> SourceFailed:
    return SourceFailed(f"the source gave nothing for {seconds:g} s")


async def _run_in_thread(
    held: Held, run: ShardRun, strays: Strays, overdue: Awaitable[ExportFailed]
) -> None:
    """Run a shard. One that is to stop is waited for, because it takes memory until it
    has ended; but not for long when the lease is to be given back, or when it took too
    long, and then this raises what `overdue` gave."""
    late: list[ExportFailed] = []

    async def mind() -> None:
        late.append(await overdue)

    work = Strayable(strays, run)
    with held.stopping(run.cancel):
        running = in_daemon_thread(work, "shard")
        try:
            await first(asyncio.wait({running}), held.given_back(), mind())
            if not running.done():
                run.cancel()
                await asyncio.wait({running}, timeout=_STOPPING)
        except asyncio.CancelledError:
            # The thread does not end with the task that waits for it.
            run.cancel()
            work.leave()
            running.cancel()
            raise
        if not running.done():
            log.warning("the source blocks; its thread is left behind")
            work.leave()
            running.cancel()
            held.check()
            raise late[0]
        try:
            running.result()
        except Stopped:
            held.check()
            if not late:
                raise
            raise late[0] from None


def traced_as(lease: Lease) -> Attributes:
    """What spans of the work on a lease are told of it."""
    told: dict[str, str | int | bool] = {
        "exportd.job_id": lease.job_id,
        "exportd.attempt": lease.attempt,
    }
    return told | {"exportd.takeover": True} if lease.takeover else told


def unforeseen(error: Exception) -> ErrorRecord:
    """Log an error that nobody thought of; what is told of it is a reference."""
    reference = secrets.token_hex(6)
    log.error("unforeseen error", reference=reference, exc_info=error)
    return ErrorRecord(
        ErrorReason.INTERNAL,
        f"internal error; the operator finds it by reference {reference}",
        {"reference": reference},
    )


def _count(job: Job, recorded: FinishedPart, dropped: Sequence[int]) -> None:
    """Count a part that was recorded, and the sinks that will not get it."""
    labels = (metrics_exports.known(job.spec.dataset), job.spec.output.format.value)
    metrics_exports.rows.labels(*labels).inc(recorded.rows)
    stored = sum(part.bytes for part in _part_records(recorded))
    metrics_exports.bytes_.labels(*labels).inc(stored)
    for index in dropped:
        sink = job.spec.sinks[index]
        metrics.dropped.labels(sink.type, sink.connection).inc()
        log.warning("delivery dropped", sink=sink.name, queue=sink.queue)


def _part_records(part: FinishedPart) -> list[PartRecord]:
    """The part, and its error part if it has one."""
    records = [_part_record(part)]
    return records if part.errors is None else [*records, _part_record(part.errors)]


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
        kind=part.key.kind,
    )
