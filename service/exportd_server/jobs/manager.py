"""What callers may do with jobs: create, look, watch, cancel, delete.

The manager decides what a request means and what is wrong with it; the ledger decides
what happens.
"""

from __future__ import annotations

import asyncio
import difflib
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import structlog
import uuid_utils

from exportd_server.delivery.sinks import AskedSink, CheckedSink, Sinks
from exportd_server.encoders.base import Format
from exportd_server.errors import (
    ConfigurationError,
    DeliveryFailed,
    ErrorReason,
    ExportdError,
    FieldViolation,
    InvalidRequest,
    JobNotFinished,
    QuotaExceeded,
    SourceFailed,
)
from exportd_server.jobs import audit
from exportd_server.jobs.audit import AuditQuery, AuditRecord
from exportd_server.jobs.ledger.base import (
    DeliveryQuery,
    EndpointDisabled,
    HeldLease,
    JobQuery,
    Ledger,
    NewJob,
    RequestIdConflict,
    TooManyActiveJobs,
    TooManyQueuedJobs,
)
from exportd_server.jobs.lower import output_columns, to_query
from exportd_server.jobs.model import (
    CancelOutcome,
    DeliveryRecord,
    ExportSpec,
    Job,
    JobState,
    OnFull,
    PartRecord,
    Progress,
    QueuePolicy,
    SinkQueue,
    SinkSpec,
)
from exportd_server.jobs.readers import Readers
from exportd_server.platform import tracing
from exportd_server.platform.shares import Shares
from exportd_server.platform.threads import in_daemon_thread
from exportd_server.platform.waits import first
from exportd_server.sinks.base import BadSinkRequest, Export, ExportColumn
from exportd_server.sources.catalogue import Catalogue, Dataset

log = structlog.get_logger(__name__)

MIN_PART_BYTES = 65_536
MAX_ROW_ERRORS = 1_000_000
MAX_LABELS = 32
MAX_LABEL_VALUE = 256
MAX_PRIORITY = 100
MAX_SINKS = 10
RETRY_AFTER = timedelta(seconds=2)
"""When to ask again for a job that is not finished, or with a quota used up."""

_QUESTIONS = 16
"""How many sources are asked at a time on behalf of callers; of one tenant at most half,
and less the more others have asked."""
_ANSWER_SECONDS = 30.0
"""Within which a source must answer a caller's question, its turn among the others
included."""

T = TypeVar("T")

_LABEL_KEY = re.compile(r"[a-z][a-z0-9_.-]{0,62}\Z")


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator allows; sizes in bytes, None: no bound."""

    default_ttl: timedelta = timedelta(days=1)
    max_ttl: timedelta = timedelta(days=7)
    text_part_bytes: int = 256 * 2**20
    parquet_part_bytes: int = 2**30
    max_active_jobs: int | None = 100
    max_rows: int | None = None
    max_bytes: int | None = None
    max_queued_jobs: int | None = None
    max_seconds: int | None = None
    watch_interval: float = 3.0

    def row_cap(self, dataset: Dataset) -> int | None:
        """Most rows of one export of the dataset."""
        return _smaller(dataset.max_rows, self.max_rows)

    def byte_cap(self, dataset: Dataset) -> int | None:
        """Most stored bytes of one export of the dataset."""
        return _smaller(dataset.max_bytes, self.max_bytes)


def _smaller(one: int | None, other: int | None) -> int | None:
    bounds = [bound for bound in (one, other) if bound is not None]
    return min(bounds) if bounds else None


@dataclass(frozen=True, slots=True)
class JobSink:
    """A sink as a request asks for it; `field` is its path there, and `name` empty when
    the caller gave it none."""

    field: str
    name: str
    asked: AskedSink


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request that was found good."""

    spec: ExportSpec
    queues: tuple[QueuePolicy, ...] = ()
    sinks: tuple[JobSink, ...] = ()


class JobManager:
    """The callers' side of jobs."""

    def __init__(
        self,
        ledger: Ledger,
        catalogue: Catalogue,
        policy: Policy,
        readers: Readers,
        sinks: Sinks,
    ) -> None:
        self._ledger = ledger
        self._catalogue = catalogue
        self._sinks = sinks
        self.policy = policy
        self._readers = readers
        self._draining = asyncio.Event()
        self._asking = Shares(_QUESTIONS)

    # --- the end

    def drain(self) -> None:
        """Take no new jobs, and end every watch: another process goes on with it."""
        self._draining.set()

    def refuse_while_draining(self) -> None:
        """Raise DRAINING once `drain` was called."""
        if self._draining.is_set():
            raise ExportdError(ErrorReason.DRAINING)

    # --- datasets

    def dataset_names(self, tenant: str) -> list[str]:
        """Names of the tenant's datasets, in order."""
        return self._catalogue.names_for(tenant)

    def dataset(self, tenant: str, name: str) -> Dataset:
        """A dataset; raises DATASET_NOT_FOUND, for one that is not the tenant's too."""
        dataset = self._catalogue.find(name, tenant)
        if dataset is None:
            known = self.dataset_names(tenant)
            close = difflib.get_close_matches(name[:100], known, n=1)
            hint = f"did you mean {close[0]}?" if close else "ListDatasets names them"
            raise ExportdError(
                ErrorReason.DATASET_NOT_FOUND,
                f"there is no dataset {name[:100]!r}; {hint}",
                metadata={"dataset": name[:100]},
            )
        return dataset

    async def count(self, tenant: str, dataset: Dataset) -> int | None:
        """About how many rows a dataset has, where that is cheap to tell and may be
        told."""
        if not dataset.exportable or not dataset.counted:
            return None
        return await self._ask(tenant, dataset.source.count)

    async def _ask(self, tenant: str, question: Callable[[], T]) -> T:
        """Ask a source, which may hang: neither the others who use threads nor the end
        of the process wait for it. Raises `SourceFailed` when it takes too long."""
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                return await self._ask_in_turn(tenant, question)
        except TimeoutError:
            raise SourceFailed(
                f"the source did not answer within {_ANSWER_SECONDS:g} s"
            ) from None

    async def _ask_in_turn(self, tenant: str, question: Callable[[], T]) -> T:
        await self._asking.wait(tenant)
        asked = in_daemon_thread(question, "question")

        def answered(asked: asyncio.Future[T]) -> None:
            self._asking.give(tenant)
            if not asked.cancelled():
                asked.exception()

        asked.add_done_callback(answered)
        # Whoever goes away does not make room before the thread has ended.
        return await asyncio.shield(asked)

    # --- creation

    async def create(
        self,
        tenant: str,
        accepted: Accepted,
        *,
        request_id: str,
        fingerprints: Sequence[str],
    ) -> Job:
        """Record an export. The first of the fingerprints is kept, and each of them is one
        of the same payload."""
        spec, within = accepted.spec, tracing.current().context
        new = NewJob(
            job_id=str(uuid_utils.uuid7()),
            tenant=tenant,
            spec=spec,
            request_id=request_id,
            fingerprint=fingerprints[0],
            older_fingerprints=frozenset(fingerprints[1:]),
            queues=accepted.queues,
            trace_context="" if within is None else within.text,
        )
        try:
            job, created = await self._ledger.create_job(
                new,
                max_active=self.policy.max_active_jobs,
                max_queued=self.policy.max_queued_jobs,
            )
        except RequestIdConflict as conflict:
            raise ExportdError(
                ErrorReason.REQUEST_ID_CONFLICT,
                metadata={"job_id": conflict.job_id, "request_id": request_id},
            ) from None
        except EndpointDisabled as disabled:
            raise ExportdError(
                ErrorReason.ENDPOINT_DISABLED, metadata={"queue": disabled.queue}
            ) from None
        except TooManyActiveJobs:
            limit = self.policy.max_active_jobs
            raise QuotaExceeded(
                f"tenant:{tenant}/active_jobs",
                f"{limit} jobs are pending or running already; wait for one to end, "
                "or cancel it",
                RETRY_AFTER,
            ) from None
        except TooManyQueuedJobs:
            limit = self.policy.max_queued_jobs
            raise QuotaExceeded(
                f"tenant:{tenant}/queued_jobs",
                f"{limit} jobs are pending already; wait for one to start, or cancel it",
                RETRY_AFTER,
            ) from None
        audit.note_job(job)
        tracing.current().set(
            {
                "exportd.job_id": job.job_id,
                "exportd.dataset": spec.dataset,
                "exportd.format": spec.output.format.value,
            }
        )
        if created:
            log.info(
                "job created",
                job_id=job.job_id,
                tenant=tenant,
                dataset=spec.dataset,
                format=spec.output.format,
                sinks=[sink.name for sink in spec.sinks],
            )
        return job

    def accept(
        self,
        tenant: str,
        spec: ExportSpec,
        sinks: Sequence[JobSink],
        wrong: list[FieldViolation],
    ) -> Accepted:
        """Check a request and fill in the defaults.

        `wrong` is what the reading of the request found; raises `InvalidRequest` with
        that and everything found here, DATASET_NOT_FOUND or DATASET_NOT_EXPORTABLE.
        """
        violations = list(wrong)
        dataset: Dataset | None = None
        if spec.dataset:
            dataset = self.dataset(tenant, spec.dataset)
            if not dataset.exportable:
                raise ExportdError(
                    ErrorReason.DATASET_NOT_EXPORTABLE,
                    metadata={"dataset": spec.dataset},
                )
        violations += self._bad_values(spec)
        sinks, bad = _named(sinks)
        violations += bad
        if spec.drop_after_delivery and not sinks:
            violations.append(
                FieldViolation("drop_after_delivery", "needs sinks; without, leave it out")
            )
        checked: list[CheckedSink] = []
        if dataset is not None:
            try:
                export = _export(tenant, dataset, spec)
            except InvalidRequest as invalid:
                violations += invalid.violations
            else:
                checked, bad = self._check_sinks(tenant, export, sinks)
                violations += bad
        if violations:
            raise InvalidRequest(violations)
        spec = replace(
            self._with_defaults(spec),
            sinks=tuple(
                SinkSpec(
                    name=sink.name,
                    type=found.kept.type,
                    connection=found.kept.connection,
                    config=found.kept.config,
                    queue=found.queue,
                    takes=found.takes,
                    sealed=found.kept.sealed,
                )
                for sink, found in zip(sinks, checked, strict=True)
            ),
        )
        return Accepted(spec, tuple(map(_queue_policy, checked)), tuple(sinks))

    def _check_sinks(
        self, tenant: str, export: Export, sinks: Sequence[JobSink]
    ) -> tuple[list[CheckedSink], list[FieldViolation]]:
        checked: list[CheckedSink] = []
        bad: list[FieldViolation] = []
        for sink in sinks:
            try:
                checked.append(self._sinks.check(tenant, sink.asked, export))
            except BadSinkRequest as error:
                bad.append(_violation(sink, error))
        return checked, bad

    def _with_defaults(self, spec: ExportSpec) -> ExportSpec:
        if spec.max_part_bytes is not None:
            return spec
        parquet = spec.output.format is Format.PARQUET
        size = self.policy.parquet_part_bytes if parquet else self.policy.text_part_bytes
        return replace(spec, max_part_bytes=size)

    def _bad_values(self, spec: ExportSpec) -> list[FieldViolation]:
        bad: list[FieldViolation] = []

        def check(right: object, field: str, description: str) -> None:
            if not right:
                bad.append(FieldViolation(field, description))

        check(spec.dataset, "dataset", "is required; ListDatasets names the datasets")
        check(spec.limit is None or spec.limit >= 1, "limit", "must be at least 1")
        check(
            spec.max_part_rows is None or spec.max_part_rows >= 1,
            "max_part_rows",
            "must be at least 1",
        )
        check(
            spec.max_part_bytes is None or spec.max_part_bytes >= MIN_PART_BYTES,
            "max_part_bytes",
            f"must be at least {MIN_PART_BYTES}",
        )
        check(
            spec.max_row_errors is None or 1 <= spec.max_row_errors <= MAX_ROW_ERRORS,
            "max_row_errors",
            f"must lie between 1 and {MAX_ROW_ERRORS}, or be 0 for the default",
        )
        check(
            timedelta(seconds=1) <= spec.ttl <= self.policy.max_ttl,
            "ttl",
            f"must lie between 1 s and {int(self.policy.max_ttl.total_seconds())} s",
        )
        check(
            abs(spec.priority) <= MAX_PRIORITY,
            "priority",
            f"must lie between -{MAX_PRIORITY} and {MAX_PRIORITY}",
        )
        check(
            len(spec.labels) <= MAX_LABELS,
            "labels",
            f"at most {MAX_LABELS} labels, not {len(spec.labels)}",
        )
        for key, value in list(spec.labels.items())[:MAX_LABELS]:
            check(
                _LABEL_KEY.match(key),
                f"labels[{key[:64]!r}]",
                "a key matches [a-z][a-z0-9_.-]{0,62}",
            )
            check(
                len(value) <= MAX_LABEL_VALUE,
                f"labels[{key[:64]!r}]",
                f"a value has at most {MAX_LABEL_VALUE} characters",
            )
        return bad

    async def preview(self, tenant: str, accepted: Accepted) -> Job:
        """The job that an accepted request would make, with a row estimate where the
        source gives one; nothing is recorded. Raises `InvalidRequest` when a sink could
        not be delivered to."""
        spec = accepted.spec
        dataset = self.dataset(tenant, spec.dataset)
        await self._probe(tenant, _export(tenant, dataset, spec), accepted.sinks)
        query = to_query(dataset, spec, tenant)
        plan = await self._ask(tenant, lambda: dataset.source.plan(query))
        job = Job(
            job_id="",
            tenant=tenant,
            state=JobState.PENDING,
            spec=spec,
            request_id="",
            create_time=datetime.now(UTC),
            progress=Progress(estimated_rows=dataset.told(plan.estimated_rows)),
        )
        audit.note_job(job)
        return job

    async def _probe(self, tenant: str, export: Export, sinks: Sequence[JobSink]) -> None:
        async def one(sink: JobSink) -> FieldViolation | None:
            try:
                await self._sinks.probe(tenant, sink.asked, export)
            except BadSinkRequest as error:
                return _violation(sink, error)
            except (DeliveryFailed, ConfigurationError, TimeoutError) as error:
                log.warning("sink cannot be reached", sink=sink.name, exc_info=error)
                told = error.message if isinstance(error, DeliveryFailed) else ""
                return FieldViolation(sink.field, told or "it cannot be reached now")
            return None

        found = await asyncio.gather(*map(one, sinks))
        if bad := [violation for violation in found if violation is not None]:
            raise InvalidRequest(bad)

    # --- looking

    async def get(self, tenant: str, job_id: str) -> Job:
        """A job; raises JOB_NOT_FOUND, for another tenant's job too."""
        job = await self._ledger.get_job(tenant, job_id)
        if job is None:
            raise ExportdError(ErrorReason.JOB_NOT_FOUND, metadata={"job_id": job_id})
        audit.note_job(job)
        return job

    async def list_jobs(
        self,
        tenant: str,
        query: JobQuery,
        *,
        limit: int,
        before: tuple[datetime, str] | None,
    ) -> list[Job]:
        """A page of jobs, newest first."""
        return await self._ledger.list_jobs(tenant, query, limit=limit, before=before)

    async def watch(
        self, tenant: str, job_id: str, *, until_delivered: bool = False
    ) -> AsyncGenerator[Job]:
        """The job now, at every change and every few seconds, until it has ended, and if
        asked its deliveries too. Raises DRAINING when this process is about to end
        before."""
        with self._ledger.watching(job_id) as changes:
            while True:
                job = await self.get(tenant, job_id)
                yield job
                if job.settled if until_delivered else job.state.terminal:
                    return
                await first(
                    changes.passed(job.revision),
                    asyncio.sleep(self.policy.watch_interval),
                    self._draining.wait(),
                )
                self.refuse_while_draining()

    # --- ending

    async def cancel(self, tenant: str, job_id: str) -> tuple[Job, CancelOutcome]:
        """Cancel a job; raises JOB_NOT_FOUND."""
        found = await self._ledger.cancel_job(tenant, job_id)
        if found is None:
            raise ExportdError(ErrorReason.JOB_NOT_FOUND, metadata={"job_id": job_id})
        job, outcome = found
        audit.note_job(job)
        if outcome is CancelOutcome.CANCELLED:
            self._readers.cut(job_id)
            log.info("job cancelled", job_id=job_id, tenant=tenant)
        return job, outcome

    async def delete(self, tenant: str, job_id: str) -> None:
        """Delete a finished job and its output; raises JOB_NOT_FOUND and
        JOB_NOT_FINISHED."""
        if audit.current() is not None:
            # What the ledger says of a job that it deleted does not tell its dataset.
            await self.get(tenant, job_id)
        state = await self._ledger.delete_job(tenant, job_id)
        if state is None:
            raise ExportdError(ErrorReason.JOB_NOT_FOUND, metadata={"job_id": job_id})
        if not state.terminal:
            raise JobNotFinished(
                f"the job is {state.lower()}; cancel it first, or wait for its end",
                RETRY_AFTER,
            )
        self._readers.cut(job_id)
        log.info("job deleted", job_id=job_id, tenant=tenant)

    # --- deliveries

    async def list_deliveries(
        self,
        tenant: str,
        query: DeliveryQuery,
        *,
        limit: int,
        before: tuple[datetime, str] | None,
    ) -> list[DeliveryRecord]:
        """A page of deliveries, newest first; raises JOB_NOT_FOUND for a job that is asked
        for."""
        if query.job_id:
            await self.get(tenant, query.job_id)
        return await self._ledger.list_deliveries(tenant, query, limit=limit, before=before)

    async def redrive(self, tenant: str, query: DeliveryQuery) -> int:
        """Send deliveries again; returns how many. Raises DELIVERY_NOT_FOUND,
        JOB_NOT_FOUND, SINK_QUEUE_NOT_FOUND, ENDPOINT_DISABLED, and as `output` for a job
        that has none any more."""
        queue = query.queue
        if query.delivery_id:
            found = await self._ledger.list_deliveries(tenant, query, limit=1)
            if not found:
                raise ExportdError(
                    ErrorReason.DELIVERY_NOT_FOUND,
                    metadata={"delivery_id": query.delivery_id},
                )
            self.refuse_unreadable(await self.get(tenant, found[0].job_id))
            queue = found[0].queue
        elif query.job_id:
            self.refuse_unreadable(await self.get(tenant, query.job_id))
        if queue:
            state = await self._queue(tenant, queue)
            if state.disabled_time is not None:
                raise ExportdError(ErrorReason.ENDPOINT_DISABLED, metadata={"queue": queue})
        redriven = await self._ledger.redrive_deliveries(tenant, query)
        log.info("deliveries redriven", tenant=tenant, deliveries=redriven, queue=queue)
        return redriven

    async def list_queues(self, tenant: str, *, limit: int, after: str) -> list[SinkQueue]:
        """A page of the tenant's queues, by name."""
        return await self._ledger.list_queues(tenant, limit=limit, after=after)

    async def enable_queue(self, tenant: str, queue: str) -> SinkQueue:
        """Let deliveries to an endpoint be tried again; raises SINK_QUEUE_NOT_FOUND."""
        before = await self._queue(tenant, queue)
        await self._ledger.enable_queue(tenant, queue)
        if before.disabled_time is not None:
            log.info("endpoint enabled", tenant=tenant, queue=queue)
        return await self._queue(tenant, queue)

    async def _queue(self, tenant: str, name: str) -> SinkQueue:
        found = await self._ledger.list_queues(tenant, limit=1, queue=name)
        if not found:
            raise ExportdError(
                ErrorReason.SINK_QUEUE_NOT_FOUND, metadata={"queue": name[:300]}
            )
        return found[0]

    # --- workers

    async def list_leases(
        self, *, limit: int, after: tuple[str, int] | None
    ) -> list[HeldLease]:
        """A page of the leases on tasks of every tenant, by worker."""
        return await self._ledger.list_leases(limit=limit, after=after)

    # --- audit records

    async def list_audit(
        self,
        query: AuditQuery,
        *,
        limit: int,
        before: tuple[datetime, str] | None,
    ) -> list[AuditRecord]:
        """A page of audit records of every tenant, newest first."""
        return await self._ledger.list_audit(query, limit=limit, before=before)

    # --- output

    async def output(self, tenant: str, job_id: str) -> Job:
        """A job whose output may be read now.

        Raises JOB_NOT_FOUND, JOB_NOT_FINISHED, JOB_FAILED, JOB_CANCELLED or
        OUTPUT_EXPIRED, whether or not the output was reaped already.
        """
        job = await self.get(tenant, job_id)
        if not job.state.terminal:
            raise JobNotFinished(
                f"the job is {job.state.lower()}; watch it until it has succeeded",
                RETRY_AFTER,
            )
        self.refuse_unreadable(job)
        return job

    def refuse_unreadable(self, job: Job) -> None:
        """Raise for a job that has ended and has no output to read."""
        metadata = {"job_id": job.job_id}
        if job.expired:
            raise ExportdError(ErrorReason.OUTPUT_EXPIRED, metadata=metadata)
        if job.drop_time is not None:
            raise ExportdError(ErrorReason.OUTPUT_DROPPED, metadata=metadata)
        if job.state is JobState.CANCELLED:
            raise ExportdError(ErrorReason.JOB_CANCELLED, metadata=metadata)
        if job.state is JobState.FAILED:
            if job.error is not None:
                metadata["job_reason"] = job.error.reason
            raise ExportdError(ErrorReason.JOB_FAILED, metadata=metadata)

    async def follow(
        self, tenant: str, job_id: str
    ) -> AsyncGenerator[tuple[Job, list[PartRecord]]]:
        """Watch a job together with the finished parts of its current generation, in the
        order of the output."""
        async with aclosing(self.watch(tenant, job_id)) as changes:
            async for job in changes:
                if job.state is JobState.SUCCEEDED and job.manifest is not None:
                    parts = list(job.manifest.parts)
                elif job.state.terminal:
                    parts = []
                else:
                    parts = await self._ledger.finished_parts(tenant, job_id)
                yield job, parts


def _named(
    sinks: Sequence[JobSink],
) -> tuple[list[JobSink], list[FieldViolation]]:
    """The sinks with a name each, and what is wrong with their names and number."""
    bad: list[FieldViolation] = []
    if len(sinks) > MAX_SINKS:
        bad.append(FieldViolation("sinks", f"at most {MAX_SINKS} sinks, not {len(sinks)}"))
    taken = {sink.name for sink in sinks if sink.name}
    named: list[JobSink] = []
    for sink in sinks[:MAX_SINKS]:
        name = sink.name
        if not name:
            base = sink.asked.type
            names = (base, *(f"{base}-{number}" for number in range(2, MAX_SINKS * 2)))
            name = next(each for each in names if each not in taken)
            taken.add(name)
        elif not _LABEL_KEY.match(name):
            bad.append(
                FieldViolation(
                    f"{sink.field}.name", "a name matches [a-z][a-z0-9_.-]{0,62}"
                )
            )
        elif name in {each.name for each in named}:
            bad.append(
                FieldViolation(
                    f"{sink.field}.name", f"another sink is called {name!r} already"
                )
            )
        named.append(replace(sink, name=name))
    return named, bad


def _export(tenant: str, dataset: Dataset, spec: ExportSpec) -> Export:
    """What sinks are told of a request. Raises `InvalidRequest`."""
    columns = output_columns(dataset, to_query(dataset, spec, tenant).columns)
    return Export(
        tenant=tenant,
        dataset=spec.dataset,
        output=spec.output,
        columns=tuple(ExportColumn(c.name, c.kind, c.type, c.nullable) for c in columns),
        labels=spec.labels,
    )


def _violation(sink: JobSink, error: BadSinkRequest) -> FieldViolation:
    field = f"{sink.field}.{error.field}" if error.field else sink.field
    return FieldViolation(field, error.description)


def _queue_policy(checked: CheckedSink) -> QueuePolicy:
    limits = checked.limits
    return QueuePolicy(
        checked.queue,
        checked.owner,
        limits.concurrency,
        limits.queue_depth,
        OnFull(limits.on_full),
    )
