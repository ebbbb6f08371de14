"""The asyncio client: the same shape as the blocking one.

Calls and watches run on the event loop. Downloads run in a thread, by the same code as
the blocking client's: writing, syncing and hashing files would block the loop anyway.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar, Unpack, cast

import grpc
import grpc.aio

from exportd import _frames, _request
from exportd._audit import AuditOutcome, AuditRecord
from exportd._client import WATCH_SECONDS, watch_delay
from exportd._connection import (
    DEFAULT_ADDRESS,
    Attempts,
    Channels,
    Connection,
    OptionValue,
    Retry,
    WatchProgress,
)
from exportd._deliveries import Delivery, DeliveryState, SinkQueue
from exportd._download import (
    Download,
    Downloader,
    DownloadProgress,
    Plan,
    Report,
    Stop,
)
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
from exportd.errors import ExportdError, JobNotFound, Unavailable, from_rpc_error
from exportd.v1 import export_service_pb2, export_service_pb2_grpc

if TYPE_CHECKING:
    import polars as pl

_Request_contra = TypeVar("_Request_contra", contravariant=True)
_Response_co = TypeVar("_Response_co", covariant=True)
_Result = TypeVar("_Result")


class _Method(Protocol[_Request_contra, _Response_co]):
    def __call__(
        self,
        request: _Request_contra,
        *,
        timeout: float | None = None,
        metadata: tuple[tuple[str, str], ...] | None = None,
    ) -> Awaitable[_Response_co]: ...


class AsyncJob(JobHandle):
    """A job on the server; see `Job`, whose methods these are."""

    def __init__(self, client: AsyncClient, info: JobInfo) -> None:
        super().__init__(info)
        self._client = client

    async def refresh(self) -> Self:
        """Ask where it stands."""
        self._info = await self._client._get_job(self.id)  # noqa: SLF001 - one unit
        return self

    async def watch(
        self, *, timeout: float | None = None, until_delivered: bool = False
    ) -> AsyncIterator[JobInfo]:
        """As `Job.watch`."""
        watch = self._client._watch(self.id, timeout, until_delivered)  # noqa: SLF001 - one unit
        async for info in watch:
            self._info = info
            yield info

    async def wait(
        self,
        *,
        timeout: float | None = None,
        until_delivered: bool = False,
        on_progress: Callable[[JobInfo], object] | None = None,
    ) -> Self:
        """As `Job.wait`."""
        async for info in self.watch(timeout=timeout, until_delivered=until_delivered):
            if on_progress is not None:
                on_progress(info)
        self._info.raise_unless_succeeded()
        if until_delivered:
            self._info.raise_unless_delivered()
        return self

    def deliveries(
        self, *, sink: str = "", states: Iterable[DeliveryState | str] = ()
    ) -> AsyncIterator[Delivery]:
        """As `Job.deliveries`."""
        return self._client.deliveries(job_id=self.id, sink=sink, states=states)

    async def redrive(self, *, sink: str = "") -> int:
        """As `Job.redrive`."""
        return await self._client.redrive(job_id=self.id, sink=sink)

    async def cancel(self) -> CancelOutcome:
        """As `Job.cancel`."""
        outcome, self._info = await self._client._cancel(self.id)  # noqa: SLF001 - one unit
        return outcome

    async def delete(self) -> None:
        """As `Job.delete`."""
        await self._client._delete(self.id)  # noqa: SLF001 - one unit

    async def download(
        self,
        path: str | os.PathLike[str],
        *,
        part: int | None = None,
        parallel: int = 1,
        overwrite: bool = False,
        follow: bool = False,
        on_progress: Callable[[DownloadProgress], object] | None = None,
    ) -> Download:
        """As `Job.download`; `on_progress` is called on the event loop. Cancelling the
        task ends the download, and what is there is kept."""
        plan = Plan(path, part, parallel, overwrite, follow)
        return await self._client._download(self._info, plan, on_progress)  # noqa: SLF001 - one unit

    async def download_errors(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        on_progress: Callable[[DownloadProgress], object] | None = None,
    ) -> Download:
        """As `Job.download_errors`."""
        plan = Plan(path, overwrite=overwrite, errors=True)
        return await self._client._download(self._info, plan, on_progress)  # noqa: SLF001 - one unit

    async def download_urls(
        self, *, lifetime: timedelta | None = None, part: int | None = None
    ) -> DownloadUrls:
        """As `Job.download_urls`."""
        return await self._client._download_urls(self.id, lifetime, part)  # noqa: SLF001 - one unit

    async def to_arrow(self) -> Any:
        """As `Job.to_arrow`."""
        return await self._frame(_frames.to_arrow)

    async def to_polars(self) -> pl.DataFrame:
        """As `Job.to_polars`."""
        return cast("pl.DataFrame", await self._frame(_frames.to_polars))

    async def to_pandas(self) -> Any:
        """As `Job.to_pandas`."""
        return await self._frame(_frames.to_pandas)

    async def _frame(self, build: Callable[[JobInfo, _frames.Fetch], Any]) -> Any:
        def work(downloader: Downloader) -> Any:
            def fetch(directory: Path) -> Download:
                return downloader.download(self._info, Plan(directory))

            return build(self._info, fetch)

        return await self._client._in_thread(work)  # noqa: SLF001 - one unit


class AsyncClient:
    """A client of one exportd server for asyncio; arguments as of `Client`. Make it
    where the event loop runs, and close it there."""

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
        self._channel = self._connection.aio_channel()
        self._channels = Channels(self._connection)
        self._stub = export_service_pb2_grpc.ExportServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls that run are cancelled."""
        self._channels.close()
        await self._channel.close()

    async def datasets(self) -> AsyncIterator[Dataset]:
        """As `Client.datasets`."""
        request = export_service_pb2.ListDatasetsRequest()
        while True:
            page = await self._call(self._stub.ListDatasets, request)
            for proto in page.datasets:
                yield Dataset.of(proto)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def dataset(self, name: str) -> Dataset:
        """As `Client.dataset`."""
        request = export_service_pb2.GetDatasetRequest(name=name)
        return Dataset.of((await self._call(self._stub.GetDataset, request)).dataset)

    async def export(self, dataset: str, **options: Unpack[ExportOptions]) -> AsyncJob:
        """As `Client.export`."""
        request = _request.create_export(dataset, options)
        response = await self._call(self._stub.CreateExport, request)
        return AsyncJob(self, JobInfo.of(response.job))

    async def job(self, job_id: str) -> AsyncJob:
        """As `Client.job`."""
        return AsyncJob(self, await self._get_job(job_id))

    async def jobs(
        self,
        *,
        states: Iterable[JobState | str] = (),
        dataset: str = "",
        labels: Mapping[str, str] | None = None,
        created_from: datetime | None = None,
        created_before: datetime | None = None,
        page_size: int = 0,
    ) -> AsyncIterator[AsyncJob]:
        """As `Client.jobs`."""
        request = _request.list_jobs(
            states=states,
            dataset=dataset,
            labels=labels,
            created_from=created_from,
            created_before=created_before,
            page_size=page_size,
        )
        while True:
            page = await self._call(self._stub.ListJobs, request)
            for proto in page.jobs:
                yield AsyncJob(self, JobInfo.of(proto))
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def deliveries(
        self,
        *,
        job_id: str = "",
        sink: str = "",
        queue: str = "",
        states: Iterable[DeliveryState | str] = (),
        page_size: int = 0,
    ) -> AsyncIterator[Delivery]:
        """As `Client.deliveries`."""
        request = _request.list_deliveries(
            job_id=job_id, sink=sink, queue=queue, states=states, page_size=page_size
        )
        while True:
            page = await self._call(self._stub.ListDeliveries, request)
            for proto in page.deliveries:
                yield Delivery.of(proto)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def redrive(
        self, *, delivery_id: str = "", job_id: str = "", sink: str = "", queue: str = ""
    ) -> int:
        """As `Client.redrive`."""
        request = export_service_pb2.RedriveDeliveriesRequest(
            delivery_id=delivery_id, job_id=job_id, sink=sink, queue=queue
        )
        return (await self._call(self._stub.RedriveDeliveries, request)).redriven

    async def sink_queues(self, *, page_size: int = 0) -> AsyncIterator[SinkQueue]:
        """As `Client.sink_queues`."""
        request = _request.list_sink_queues(page_size)
        while True:
            page = await self._call(self._stub.ListSinkQueues, request)
            for proto in page.queues:
                yield SinkQueue.of(proto)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def enable_sink_queue(self, queue: str) -> SinkQueue:
        """As `Client.enable_sink_queue`."""
        request = export_service_pb2.EnableSinkQueueRequest(queue=queue)
        return SinkQueue.of((await self._call(self._stub.EnableSinkQueue, request)).queue)

    async def audit_records(
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
    ) -> AsyncIterator[AuditRecord]:
        """As `Client.audit_records`."""
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
            page = await self._call(self._stub.ListAuditRecords, request)
            for proto in page.records:
                yield AuditRecord.of(proto)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def _get_job(self, job_id: str) -> JobInfo:
        request = export_service_pb2.GetJobRequest(job_id=job_id)
        return JobInfo.of((await self._call(self._stub.GetJob, request)).job)

    async def _cancel(self, job_id: str) -> tuple[CancelOutcome, JobInfo]:
        request = export_service_pb2.CancelJobRequest(job_id=job_id)
        response = await self._call(self._stub.CancelJob, request)
        return cancel_outcome(response.outcome), JobInfo.of(response.job)

    async def _delete(self, job_id: str) -> None:
        request = export_service_pb2.DeleteJobRequest(job_id=job_id)
        attempts = Attempts(self._connection.retry, self._connection.timeout)
        try:
            await self._call(self._stub.DeleteJob, request, attempts)
        except JobNotFound:
            if not attempts.failures:
                raise
            # The answer to an earlier attempt was lost; the job was not.

    async def _download(
        self,
        job: JobInfo,
        plan: Plan,
        on_progress: Callable[[DownloadProgress], object] | None,
    ) -> Download:
        report: Report | None = None
        if on_progress is not None:
            loop = asyncio.get_running_loop()

            def report(progress: DownloadProgress) -> None:
                loop.call_soon_threadsafe(on_progress, progress)

        return await self._in_thread(lambda d: d.download(job, plan, report))

    async def _download_urls(
        self, job_id: str, lifetime: timedelta | None, part: int | None
    ) -> DownloadUrls:
        request = _request.download_urls(job_id, lifetime, part)
        whole = await self._call(self._stub.GetDownloadUrls, request)
        while whole.next_page_token:
            request.page_token = whole.next_page_token
            page = await self._call(self._stub.GetDownloadUrls, request)
            whole.urls.extend(page.urls)
            whole.next_page_token = page.next_page_token
        return DownloadUrls.of(whole)

    async def _in_thread(self, work: Callable[[Downloader], _Result]) -> _Result:
        """Run a download in a thread; a cancelled task waits until it has stopped, so
        that nothing writes behind the caller's back."""
        loop = asyncio.get_running_loop()
        stop = Stop()

        def get_job(job_id: str) -> JobInfo:
            return asyncio.run_coroutine_threadsafe(self._get_job(job_id), loop).result()

        downloader = Downloader(self._connection, self._channels, get_job, stop)
        running = asyncio.ensure_future(asyncio.to_thread(work, downloader))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            stop.set()
            await asyncio.wait([running])
            if not running.cancelled():
                running.exception()  # looked at, so that nobody complains of it
            raise

    async def _watch(
        self, job_id: str, timeout: float | None, until_delivered: bool
    ) -> AsyncIterator[JobInfo]:
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
                async for response in call:
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
            await asyncio.sleep(watch_delay(attempts, error, deadline, job_id))

    async def _call(
        self,
        method: _Method[_Request_contra, _Response_co],
        request: _Request_contra,
        attempts: Attempts | None = None,
    ) -> _Response_co:
        attempts = attempts or Attempts(self._connection.retry, self._connection.timeout)
        while True:
            try:
                return await method(
                    request,
                    timeout=attempts.remaining(),
                    metadata=self._connection.metadata,
                )
            except grpc.RpcError as raised:
                error = from_rpc_error(raised, self._connection.address)
                delay = attempts.next_delay(error)
            await asyncio.sleep(delay)
