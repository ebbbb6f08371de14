"""The blocking client."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar, Unpack, cast

import grpc

from exportd import _frames, _request
from exportd._audit import AuditOutcome, AuditRecord
from exportd._connection import (
    DEFAULT_ADDRESS,
    Attempts,
    Channels,
    Connection,
    OptionValue,
    Retry,
    WatchProgress,
    is_passing,
)
from exportd._deliveries import Delivery, DeliveryState, SinkQueue
from exportd._handle import JobHandle
from exportd._model import (
    CancelOutcome,
    Dataset,
    DownloadUrls,
    JobInfo,
    JobState,
    cancel_outcome,
)
from exportd._request import ExportOptions
from exportd.errors import (
    ExportdError,
    JobNotFound,
    TimedOut,
    Unavailable,
    from_rpc_error,
)
from exportd.v1 import export_service_pb2, export_service_pb2_grpc, job_pb2

if TYPE_CHECKING:
    import polars as pl

    from exportd._download import Download, DownloadProgress, Plan

_Request_contra = TypeVar("_Request_contra", contravariant=True)
_Response_co = TypeVar("_Response_co", covariant=True)

WATCH_SECONDS = 120.0
"""A watch stream is opened anew after this long, so that none outlives a dead peer."""


class _Method(Protocol[_Request_contra, _Response_co]):
    def __call__(
        self,
        request: _Request_contra,
        timeout: float | None = None,
        metadata: tuple[tuple[str, str], ...] | None = None,
    ) -> _Response_co: ...


class Job(JobHandle):
    """A job on the server."""

    def __init__(self, client: Client, info: JobInfo) -> None:
        super().__init__(info)
        self._client = client

    def refresh(self) -> Self:
        """Ask where it stands."""
        self._info = self._client._get_job(self.id)  # noqa: SLF001 - one unit
        return self

    def watch(
        self, *, timeout: float | None = None, until_delivered: bool = False
    ) -> Iterator[JobInfo]:
        """The job now, at every change and every few seconds, until it has ended, and
        with `until_delivered` until its deliveries to sinks have, too.

        Rides out restarts of the server. Raises `TimedOut` after `timeout` seconds.
        """
        client = self._client
        for info in client._watch(self.id, timeout, until_delivered):  # noqa: SLF001 - one unit
            self._info = info
            yield info

    def wait(
        self,
        *,
        timeout: float | None = None,
        until_delivered: bool = False,
        on_progress: Callable[[JobInfo], object] | None = None,
    ) -> Self:
        """Wait until it has succeeded, and with `until_delivered` until every sink has
        everything.

        Raises:
            JobFailed, JobCancelled: It ended otherwise.
            NotDelivered: With `until_delivered`: it succeeded, but deliveries failed for
                good or were dropped. The output is there; `redrive` sends them again.
            TimedOut: It did not end within `timeout` seconds; it goes on at the server.
        """
        for info in self.watch(timeout=timeout, until_delivered=until_delivered):
            if on_progress is not None:
                on_progress(info)
        self._info.raise_unless_succeeded()
        if until_delivered:
            self._info.raise_unless_delivered()
        return self

    def deliveries(
        self, *, sink: str = "", states: Iterable[DeliveryState | str] = ()
    ) -> Iterator[Delivery]:
        """Its deliveries to sinks, newest first; see `Client.deliveries`."""
        return self._client.deliveries(job_id=self.id, sink=sink, states=states)

    def redrive(self, *, sink: str = "") -> int:
        """Send its deliveries again that failed or were dropped; see `Client.redrive`."""
        return self._client.redrive(job_id=self.id, sink=sink)

    def cancel(self) -> CancelOutcome:
        """Cancel it; says what was found."""
        outcome, self._info = self._client._cancel(self.id)  # noqa: SLF001 - one unit
        return outcome

    def delete(self) -> None:
        """Delete its output and the job itself. Raises `NotFinished`: cancel first."""
        self._client._delete(self.id)  # noqa: SLF001 - one unit

    def download(
        self,
        path: str | os.PathLike[str],
        *,
        part: int | None = None,
        parallel: int = 1,
        overwrite: bool = False,
        follow: bool = False,
        on_progress: Callable[[DownloadProgress], object] | None = None,
    ) -> Download:
        """Download the output to `path`; the same call again goes on where one ended.

        Args:
            path: A file; or a directory, which gets a file named by the server. Parts
                that do not join (several of Parquet) become files in a directory `path`.
            part: Only this part.
            parallel: Ranges to fetch at a time, each over a connection of its own.
            overwrite: Replace a file that is there.
            follow: For a job that still runs: take its parts as they are finished.
            on_progress: Called on this thread, some ten times a second.

        Raises:
            NotFinished, JobFailed, JobCancelled, OutputExpired, OutputDropped: There is
                nothing to get.
            OutputExists: A file stands in the way.
            DataLoss: The bytes do not match their checksums, whatever was tried.
            LocalFileError: The disk is full or refuses; what is there is kept.
            Unavailable: The server stayed away; what is there is kept.
        """
        from exportd._download import Plan  # noqa: PLC0415 - many never download

        plan = Plan(path, part, parallel, overwrite, follow)
        return self._client._download(self._info, plan, on_progress)  # noqa: SLF001 - one unit

    def download_errors(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        on_progress: Callable[[DownloadProgress], object] | None = None,
    ) -> Download:
        """Download the rows that were left out, as JSON Lines, to `path`: a file, or
        files in a directory `path` when there are several error parts.

        Raises:
            PartNotFound: No row was left out; see `row_errors`.
            ExportdError: As `download`.
        """
        from exportd._download import Plan  # noqa: PLC0415 - many never download

        plan = Plan(path, overwrite=overwrite, errors=True)
        return self._client._download(self._info, plan, on_progress)  # noqa: SLF001 - one unit

    def download_urls(
        self, *, lifetime: timedelta | None = None, part: int | None = None
    ) -> DownloadUrls:
        """URLs that a browser or any HTTP client can download the output by, until they
        expire; keep them as secret as the data.

        Args:
            lifetime: How long they are to work; None: as the server has it. It is less
                where the output expires before.
            part: Only of this part.

        Raises:
            UrlsUnavailable: The server cannot give any.
            NotFinished, JobFailed, JobCancelled, OutputExpired, OutputDropped: There is
                nothing to get.
        """
        return self._client._download_urls(self.id, lifetime, part)  # noqa: SLF001 - one unit

    def to_arrow(self) -> Any:
        """The output as a `pyarrow.Table`. Parquet and Arrow only; needs the extra
        `arrow`. Everything comes into memory."""
        return _frames.to_arrow(self._info, self._fetch)

    def to_polars(self) -> pl.DataFrame:
        """The output as a `polars.DataFrame`; needs the extra `polars`."""
        return cast("pl.DataFrame", _frames.to_polars(self._info, self._fetch))

    def to_pandas(self) -> Any:
        """The output as a `pandas.DataFrame` of Arrow-backed columns; needs the extra
        `pandas`."""
        return _frames.to_pandas(self._info, self._fetch)

    def _fetch(self, directory: Path) -> Download:
        return self.download(directory)


class Client:
    """A client of one exportd server. Threads may share it; close it when done.

    Args:
        address: `host:port`, or any gRPC target.
        tls: True for TLS with the system's roots, or credentials of
            `grpc.ssl_channel_credentials`.
        token: Sent as `authorization: Bearer <token>`. Wants TLS, unless the server is on
            this machine.
        timeout: Seconds that one call may take, its retries included. Downloads and
            waits have no limit of their own.
        retry: How single calls are tried again while the server is unavailable. The
            default rides out a restart of 5 seconds.
        stream_retry: The same for watching and downloading: attempts in a row that bring
            nothing new. The default rides out a restart of some 20 seconds.
        stall_timeout: Seconds without data after which a download takes a new stream.
        options: gRPC channel options, added to the client's own.
        allow_plaintext_token: Send the token without TLS to other machines, too, where
            everybody on the way can read it.
        metadata: Asked at each call for metadata that goes with it, such as a
            `traceparent`. Without, that of the current span goes with it where the
            program uses OpenTelemetry.

    Raises:
        InvalidRequest: The address is empty, or the token would travel in plain text.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        tls: bool | grpc.ChannelCredentials = False,
        token: str | None = None,
        timeout: float = 30.0,
        retry: Retry | None = None,
        stream_retry: Retry | None = None,
        stall_timeout: float = 60.0,
        options: Sequence[tuple[str, OptionValue]] = (),
        allow_plaintext_token: bool = False,
        metadata: Callable[[], Sequence[tuple[str, str]]] | None = None,
    ) -> None:
        self._connection = Connection(
            address,
            tls,
            token,
            timeout,
            retry or Retry(),
            stream_retry or Retry(attempts=10),
            stall_timeout,
            options,
            allow_plaintext_token,
            metadata,
        )
        self._channel = self._connection.channel()
        self._channels = Channels(self._connection)
        self._stub = export_service_pb2_grpc.ExportServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls that run are cancelled."""
        self._channels.close()
        self._channel.close()

    def datasets(self) -> Iterator[Dataset]:
        """The datasets the caller may see, by name; fetched page by page."""
        request = export_service_pb2.ListDatasetsRequest()
        while True:
            page = self._call(self._stub.ListDatasets, request)
            yield from map(Dataset.of, page.datasets)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def dataset(self, name: str) -> Dataset:
        """One dataset. Raises `DatasetNotFound`."""
        request = export_service_pb2.GetDatasetRequest(name=name)
        return Dataset.of(self._call(self._stub.GetDataset, request).dataset)

    def export(self, dataset: str, **options: Unpack[ExportOptions]) -> Job:
        """Start an export; `ExportOptions` lists what there is.

        Safe to repeat: the request carries a UUID, so a retry finds the job that the
        first try made.

        Raises:
            InvalidRequest: `violations` names each bad field.
            DatasetNotFound, DatasetNotExportable: As they say.
            RequestIdConflict: `request_id` was used with another payload.
            EndpointDisabled: A sink's endpoint is; see `enable_sink_queue`.
            QuotaExceeded: Try again after `retry_after`.
        """
        request = _request.create_export(dataset, options)
        return self._create(request)

    def job(self, job_id: str) -> Job:
        """One job. Raises `JobNotFound`."""
        return Job(self, self._get_job(job_id))

    def jobs(
        self,
        *,
        states: Iterable[JobState | str] = (),
        dataset: str = "",
        labels: Mapping[str, str] | None = None,
        created_from: datetime | None = None,
        created_before: datetime | None = None,
        page_size: int = 0,
    ) -> Iterator[Job]:
        """The caller's jobs, newest first, fetched page by page; all conditions hold.
        Manifests are left out: `refresh()` brings one."""
        request = _request.list_jobs(
            states=states,
            dataset=dataset,
            labels=labels,
            created_from=created_from,
            created_before=created_before,
            page_size=page_size,
        )
        while True:
            page = self._call(self._stub.ListJobs, request)
            for proto in page.jobs:
                yield Job(self, JobInfo.of(proto))
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def deliveries(
        self,
        *,
        job_id: str = "",
        sink: str = "",
        queue: str = "",
        states: Iterable[DeliveryState | str] = (),
        page_size: int = 0,
    ) -> Iterator[Delivery]:
        """Deliveries to sinks, newest first, fetched page by page; all conditions hold.

        Args:
            job_id: Only of this job.
            sink: Only to the job's sink of this name; needs `job_id`.
            queue: Only those in this queue.
            states: Only those in one of these states.
            page_size: Most deliveries in one call; 0: as the server has it.

        Raises:
            JobNotFound: There is no such job.
        """
        request = _request.list_deliveries(
            job_id=job_id, sink=sink, queue=queue, states=states, page_size=page_size
        )
        while True:
            page = self._call(self._stub.ListDeliveries, request)
            yield from map(Delivery.of, page.deliveries)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def redrive(
        self, *, delivery_id: str = "", job_id: str = "", sink: str = "", queue: str = ""
    ) -> int:
        """Send deliveries again that failed for good or were dropped, without exporting
        again; what waits to be tried again is tried now. All conditions hold; one of
        `delivery_id`, `job_id` and `queue` is required, and `sink` needs `job_id`.

        Answers how many are due again; that may be fewer than there were when the call
        itself had to be repeated.

        Raises:
            JobNotFound, DeliveryNotFound, OutputExpired: There is nothing to send.
            JobFailed, JobCancelled: There never was.
            EndpointDisabled: Mend the endpoint, then `enable_sink_queue`.
        """
        request = export_service_pb2.RedriveDeliveriesRequest(
            delivery_id=delivery_id, job_id=job_id, sink=sink, queue=queue
        )
        return self._call(self._stub.RedriveDeliveries, request).redriven

    def sink_queues(self, *, page_size: int = 0) -> Iterator[SinkQueue]:
        """The queues that the caller's deliveries stand in, or stood in, by name; fetched
        page by page."""
        request = _request.list_sink_queues(page_size)
        while True:
            page = self._call(self._stub.ListSinkQueues, request)
            yield from map(SinkQueue.of, page.queues)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def enable_sink_queue(self, queue: str) -> SinkQueue:
        """Let deliveries to a disabled endpoint go on; those that were dead-lettered stay
        so until `redrive`. Raises `SinkQueueNotFound`."""
        request = export_service_pb2.EnableSinkQueueRequest(queue=queue)
        return SinkQueue.of(self._call(self._stub.EnableSinkQueue, request).queue)

    def audit_records(
        self,
        *,
        tenant: str = "",
        subject: str = "",
        job_id: str = "",
        methods: Iterable[str] = (),
        outcomes: Iterable[AuditOutcome | str] = (),
        from_time: datetime | None = None,
        before_time: datetime | None = None,
        page_size: int = 0,
    ) -> Iterator[AuditRecord]:
        """Who did what, newest first, fetched page by page; all conditions hold. Of all
        tenants, for those who run the service: needs scope `admin`.

        Args:
            tenant: Only of callers of this tenant.
            subject: Only of this caller; see `AuditRecord.subject`.
            job_id: Only about this job.
            methods: Only of these kinds; see `AuditRecord.method`.
            outcomes: Only what ended in one of these ways.
            from_time: Only what ended at this moment or later.
            before_time: Only what ended before.
            page_size: Most records in one call; 0: as the server has it.

        Raises:
            AccessDenied: The caller is no admin.
        """
        request = _request.list_audit_records(
            tenant=tenant,
            subject=subject,
            job_id=job_id,
            methods=methods,
            outcomes=outcomes,
            from_time=from_time,
            before_time=before_time,
            page_size=page_size,
        )
        while True:
            page = self._call(self._stub.ListAuditRecords, request)
            yield from map(AuditRecord.of, page.records)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def _create(self, request: job_pb2.CreateExportRequest) -> Job:
        response = self._call(self._stub.CreateExport, request)
        return Job(self, JobInfo.of(response.job))

    def _get_job(self, job_id: str) -> JobInfo:
        request = export_service_pb2.GetJobRequest(job_id=job_id)
        return JobInfo.of(self._call(self._stub.GetJob, request).job)

    def _cancel(self, job_id: str) -> tuple[CancelOutcome, JobInfo]:
        request = export_service_pb2.CancelJobRequest(job_id=job_id)
        response = self._call(self._stub.CancelJob, request)
        return cancel_outcome(response.outcome), JobInfo.of(response.job)

    def _delete(self, job_id: str) -> None:
        request = export_service_pb2.DeleteJobRequest(job_id=job_id)
        attempts = Attempts(self._connection.retry, self._connection.timeout)
        try:
            self._call(self._stub.DeleteJob, request, attempts)
        except JobNotFound:
            if not attempts.failures:
                raise
            # The answer to an earlier attempt was lost; the job was not.

    def _download(
        self,
        job: JobInfo,
        plan: Plan,
        on_progress: Callable[[DownloadProgress], object] | None,
    ) -> Download:
        from exportd._download import Downloader, Stop  # noqa: PLC0415 - as above

        downloader = Downloader(self._connection, self._channels, self._get_job, Stop())
        return downloader.download(job, plan, on_progress)

    def _download_urls(
        self, job_id: str, lifetime: timedelta | None, part: int | None
    ) -> DownloadUrls:
        request = _request.download_urls(job_id, lifetime, part)
        whole = self._call(self._stub.GetDownloadUrls, request)
        while whole.next_page_token:
            request.page_token = whole.next_page_token
            page = self._call(self._stub.GetDownloadUrls, request)
            whole.urls.extend(page.urls)
            whole.next_page_token = page.next_page_token
        return DownloadUrls.of(whole)

    def _watch(
        self, job_id: str, timeout: float | None, until_delivered: bool
    ) -> Iterator[JobInfo]:
        request = export_service_pb2.WatchJobRequest(
            job_id=job_id, until_delivered=until_delivered
        )
        attempts = Attempts(self._connection.stream_retry, None)
        progress = WatchProgress(attempts)
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            error: ExportdError = Unavailable("the watch was cut short")
            left = WATCH_SECONDS if deadline is None else deadline - time.monotonic()
            progress.opened()
            call = self._stub.WatchJob(
                request,
                timeout=max(0.001, min(left, WATCH_SECONDS)),
                metadata=self._connection.metadata,
            )
            try:
                for response in call:
                    info = JobInfo.of(response.job)
                    progress.came(info.revision)
                    yield info
                    if info.settled if until_delivered else info.state.final:
                        return
            except grpc.RpcError as raised:
                error = from_rpc_error(raised, self._connection.address)
            finally:
                call.cancel()
            progress.broken()
            delay = watch_delay(attempts, error, deadline, job_id)
            time.sleep(delay)

    def _call(
        self,
        method: _Method[_Request_contra, _Response_co],
        request: _Request_contra,
        attempts: Attempts | None = None,
    ) -> _Response_co:
        attempts = attempts or Attempts(self._connection.retry, self._connection.timeout)
        while True:
            try:
                return method(
                    request,
                    timeout=attempts.remaining(),
                    metadata=self._connection.metadata,
                )
            except grpc.RpcError as raised:
                error = from_rpc_error(raised, self._connection.address)
                delay = attempts.next_delay(error)
            time.sleep(delay)


def watch_delay(
    attempts: Attempts, error: ExportdError, deadline: float | None, job_id: str
) -> float:
    """Seconds until a watch that broke off is taken up again.

    Raises:
        TimedOut: The caller's time is up.
        ExportdError: `error`, when there is no use in trying again.
    """
    if deadline is not None and time.monotonic() >= deadline - 0.002:
        raise TimedOut(f"job {job_id} is not done in the time given; it goes on")
    retryable = (
        is_passing(error)
        or isinstance(error, TimedOut)
        or (not error.reason and error.code is grpc.StatusCode.INTERNAL)
    )
    delay = attempts.next_delay(error, retryable=retryable)
    return delay if deadline is None else min(delay, max(0, deadline - time.monotonic()))
