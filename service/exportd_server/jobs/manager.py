"""What callers may do with jobs: create, look, watch, cancel, delete.

The manager decides what a request means and what is wrong with it; the ledger decides
what happens.
"""

from __future__ import annotations

import asyncio
import difflib
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import structlog
import uuid_utils

from exportd_server.encoders.base import Format
from exportd_server.errors import (
    ErrorReason,
    ExportdError,
    FieldViolation,
    InvalidRequest,
    JobNotFinished,
    QuotaExceeded,
)
from exportd_server.jobs.ledger.base import (
    JobQuery,
    Ledger,
    NewJob,
    RequestIdConflict,
    TooManyActiveJobs,
)
from exportd_server.jobs.lower import to_query
from exportd_server.jobs.model import (
    CancelOutcome,
    ExportSpec,
    Job,
    JobState,
    PartRecord,
    Progress,
)
from exportd_server.jobs.readers import Readers
from exportd_server.platform.threads import in_daemon_thread
from exportd_server.platform.waits import first
from exportd_server.sources.catalogue import Catalogue, Dataset

log = structlog.get_logger(__name__)

MIN_PART_BYTES = 65_536
MAX_ROW_ERRORS = 1_000_000
MAX_LABELS = 32
MAX_LABEL_VALUE = 256
MAX_PRIORITY = 100
RETRY_AFTER = timedelta(seconds=2)
"""When to ask again for a job that is not finished, or with a quota used up."""

_QUESTIONS = 8
"""How many sources are asked at a time on behalf of callers."""

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


class JobManager:
    """The callers' side of jobs."""

    def __init__(
        self,
        ledger: Ledger,
        catalogue: Catalogue,
        policy: Policy,
        readers: Readers,
    ) -> None:
        self._ledger = ledger
        self._catalogue = catalogue
        self.policy = policy
        self._readers = readers
        self._draining = asyncio.Event()
        self._asking = asyncio.Semaphore(_QUESTIONS)

    # --- the end

    def drain(self) -> None:
        """Take no new jobs, and end every watch: another process goes on with it."""
        self._draining.set()

    def refuse_while_draining(self) -> None:
        """Raise DRAINING once `drain` was called."""
        if self._draining.is_set():
            raise ExportdError(ErrorReason.DRAINING)

    # --- datasets

    def dataset_names(self) -> list[str]:
        """Names of the datasets, in order."""
        return list(self._catalogue.names())

    def dataset(self, name: str) -> Dataset:
        """A dataset; raises DATASET_NOT_FOUND."""
        dataset = self._catalogue.get(name)
        if dataset is None:
            close = difflib.get_close_matches(name[:100], self.dataset_names(), n=1)
            hint = f"did you mean {close[0]}?" if close else "ListDatasets names them"
            raise ExportdError(
                ErrorReason.DATASET_NOT_FOUND,
                f"there is no dataset {name[:100]!r}; {hint}",
                metadata={"dataset": name[:100]},
            )
        return dataset

    async def count(self, dataset: Dataset) -> int | None:
        """About how many rows a dataset has, where that is cheap to tell."""
        if not dataset.exportable:
            return None
        return await self._ask(dataset.source.count)

    async def _ask(self, question: Callable[[], T]) -> T:
        """Ask a source, which may hang: neither the others who use threads nor the end
        of the process wait for it."""
        await self._asking.acquire()
        asked = in_daemon_thread(question, "question")

        def answered(asked: asyncio.Future[T]) -> None:
            self._asking.release()
            if not asked.cancelled():
                asked.exception()

        asked.add_done_callback(answered)
        # Whoever goes away does not make room before the thread has ended.
        return await asyncio.shield(asked)

    # --- creation

    async def create(
        self,
        tenant: str,
        spec: ExportSpec,
        *,
        request_id: str,
        fingerprint: str,
    ) -> Job:
        """Record an export. `spec` has passed `accept`."""
        new = NewJob(
            job_id=str(uuid_utils.uuid7()),
            tenant=tenant,
            spec=spec,
            request_id=request_id,
            fingerprint=fingerprint,
        )
        try:
            job, created = await self._ledger.create_job(
                new, max_active=self.policy.max_active_jobs
            )
        except RequestIdConflict as conflict:
            raise ExportdError(
                ErrorReason.REQUEST_ID_CONFLICT,
                metadata={"job_id": conflict.job_id, "request_id": request_id},
            ) from None
        except TooManyActiveJobs:
            limit = self.policy.max_active_jobs
            raise QuotaExceeded(
                f"tenant:{tenant}/active_jobs",
                f"{limit} jobs are pending or running already; wait for one to end, "
                "or cancel it",
                RETRY_AFTER,
            ) from None
        if created:
            log.info(
                "job created",
                job_id=job.job_id,
                tenant=tenant,
                dataset=spec.dataset,
                format=spec.output.format,
            )
        return job

    def accept(self, spec: ExportSpec, wrong: list[FieldViolation]) -> ExportSpec:
        """Check a request and fill in the defaults.

        `wrong` is what the reading of the request found; raises `InvalidRequest` with
        that and everything found here, DATASET_NOT_FOUND or DATASET_NOT_EXPORTABLE.
        """
        violations = list(wrong)
        dataset: Dataset | None = None
        if spec.dataset:
            dataset = self.dataset(spec.dataset)
            if not dataset.exportable:
                raise ExportdError(
                    ErrorReason.DATASET_NOT_EXPORTABLE,
                    metadata={"dataset": spec.dataset},
                )
        violations += self._bad_values(spec)
        if dataset is not None:
            try:
                to_query(dataset, spec)
            except InvalidRequest as invalid:
                violations += invalid.violations
        if violations:
            raise InvalidRequest(violations)
        return self._with_defaults(spec)

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

    async def preview(self, tenant: str, spec: ExportSpec) -> Job:
        """The job that an accepted request would make, with a row estimate where the
        source gives one; nothing is recorded."""
        dataset = self.dataset(spec.dataset)
        query = to_query(dataset, spec)
        plan = await self._ask(lambda: dataset.source.plan(query))
        return Job(
            job_id="",
            tenant=tenant,
            state=JobState.PENDING,
            spec=spec,
            request_id="",
            create_time=datetime.now(UTC),
            progress=Progress(estimated_rows=plan.estimated_rows),
        )

    # --- looking

    async def get(self, tenant: str, job_id: str) -> Job:
        """A job; raises JOB_NOT_FOUND, for another tenant's job too."""
        job = await self._ledger.get_job(tenant, job_id)
        if job is None:
            raise ExportdError(ErrorReason.JOB_NOT_FOUND, metadata={"job_id": job_id})
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

    async def watch(self, tenant: str, job_id: str) -> AsyncGenerator[Job]:
        """The job now, at every change and every few seconds, until it has ended. Raises
        DRAINING when this process is about to end before the job."""
        while True:
            job = await self.get(tenant, job_id)
            yield job
            if job.state.terminal:
                return
            await first(
                self._ledger.wait_for_change(
                    job_id, job.revision, self.policy.watch_interval
                ),
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
        if outcome is CancelOutcome.CANCELLED:
            self._readers.cut(job_id)
            log.info("job cancelled", job_id=job_id, tenant=tenant)
        return job, outcome

    async def delete(self, tenant: str, job_id: str) -> None:
        """Delete a finished job and its output; raises JOB_NOT_FOUND and
        JOB_NOT_FINISHED."""
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
