"""The RPCs: read the request, ask the manager, write the answer."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

from exportd.v1 import export_service_pb2 as pb
from exportd.v1 import job_pb2
from exportd_server.api import answers, requests, sinks
from exportd_server.api.audit import (
    audit_message,
    audit_query_digest,
    read_audit_query,
)
from exportd_server.api.download import Context, Downloads
from exportd_server.api.requests import Reader
from exportd_server.api.urls import DownloadUrls, UrlQuery
from exportd_server.errors import ErrorReason, ExportdError
from exportd_server.jobs.changes import to_its_end
from exportd_server.jobs.manager import JobManager
from exportd_server.platform.sealing import Fingerprints
from exportd_server.sources.catalogue import Dataset

DATASET_PAGE = 100
JOB_PAGE = 50
DELIVERY_PAGE = 100
AUDIT_PAGE = 100
MAX_PAGE = 1000


class ExportService:
    """One method for each RPC of `exportd.v1.ExportService`, by its name. `tenant` says
    whose call it is."""

    def __init__(
        self,
        manager: JobManager,
        downloads: Downloads,
        urls: DownloadUrls,
        tenant: Callable[[Any], str],
        fingerprints: Fingerprints,
    ) -> None:
        self._manager = manager
        self._downloads = downloads
        self._urls = urls
        self._tenant = tenant
        self._fingerprints = fingerprints
        self._jobs = answers.JobAnswers()

    async def ListDatasets(  # noqa: N802 - the contract's name
        self, request: pb.ListDatasetsRequest, context: object
    ) -> pb.ListDatasetsResponse:
        """See the contract."""
        reader = Reader()
        size = _page_size(reader, request.page_size, DATASET_PAGE)
        reader.check()
        tenant = self._tenant(context)
        names = self._manager.dataset_names(tenant)
        after = (
            str(_read_token(request.page_token, "datasets", str)[0])
            if (request.page_token)
            else ""
        )
        rest = [name for name in names if name > after]
        page = [self._manager.dataset(tenant, name) for name in rest[:size]]
        more = len(rest) > size
        return pb.ListDatasetsResponse(
            datasets=[self._dataset(dataset) for dataset in page],
            next_page_token=_token("datasets", page[-1].name) if more else "",
        )

    async def GetDataset(  # noqa: N802 - the contract's name
        self, request: pb.GetDatasetRequest, context: object
    ) -> pb.GetDatasetResponse:
        """See the contract."""
        if not request.name:
            reader = Reader()
            reader.complain("name", "is required; ListDatasets names the datasets")
            reader.check()
        tenant = self._tenant(context)
        dataset = self._manager.dataset(tenant, request.name)
        count = await self._manager.count(tenant, dataset)
        return pb.GetDatasetResponse(dataset=self._dataset(dataset, count))

    def _dataset(self, dataset: Dataset, count: int | None = None) -> Any:
        policy = self._manager.policy
        return answers.dataset_message(
            dataset,
            max_rows=policy.row_cap(dataset),
            max_bytes=policy.byte_cap(dataset),
            estimated_rows=count,
        )

    async def CreateExport(  # noqa: N802 - the contract's name
        self, request: job_pb2.CreateExportRequest, context: object
    ) -> pb.CreateExportResponse:
        """See the contract."""
        self._manager.refuse_while_draining()
        tenant = self._tenant(context)
        spec, request_id, reader = requests.read_create(
            request, self._manager.policy.default_ttl
        )
        asked = sinks.read_sinks(reader, request.sinks)
        accepted = self._manager.accept(tenant, spec, asked, reader.violations)
        if request.validate_only:
            job = await self._manager.preview(tenant, accepted)
        else:
            job = await to_its_end(
                self._manager.create(
                    tenant,
                    accepted,
                    request_id=request_id,
                    fingerprints=self._fingerprints.of(requests.payload(request)),
                )
            )
        return pb.CreateExportResponse(job=self._jobs.job(job))

    async def GetJob(  # noqa: N802 - the contract's name
        self, request: pb.GetJobRequest, context: object
    ) -> pb.GetJobResponse:
        """See the contract."""
        job_id = _job_id(request)
        job = await self._manager.get(self._tenant(context), job_id)
        return self._jobs.get_job(job)

    async def ListJobs(  # noqa: N802 - the contract's name
        self, request: pb.ListJobsRequest, context: object
    ) -> pb.ListJobsResponse:
        """See the contract."""
        reader = Reader()
        size = _page_size(reader, request.page_size, JOB_PAGE)
        query = requests.read_job_query(reader, request)
        reader.check()
        digest = requests.query_digest(
            sorted(query.states),
            query.dataset,
            sorted(query.labels.items()),
            query.created_from,
            query.created_before,
        )
        before = None
        if request.page_token:
            micros, job_id = _read_token(request.page_token, digest, int, str)
            before = (_from_micros(micros), job_id)
        jobs = await self._manager.list_jobs(
            self._tenant(context), query, limit=size + 1, before=before
        )
        page = jobs[:size]
        token = ""
        if len(jobs) > size:
            last = page[-1]
            token = _token(digest, _micros(last.create_time), last.job_id)
        return pb.ListJobsResponse(
            jobs=[answers.job_message(job) for job in page], next_page_token=token
        )

    async def WatchJob(  # noqa: N802 - the contract's name
        self, request: pb.WatchJobRequest, context: object
    ) -> AsyncIterator[pb.WatchJobResponse]:
        """See the contract."""
        job_id = _job_id(request)
        watch = self._manager.watch(
            self._tenant(context), job_id, until_delivered=request.until_delivered
        )
        async with aclosing(watch) as jobs:
            async for job in jobs:
                yield pb.WatchJobResponse(job=self._jobs.job(job))

    async def CancelJob(  # noqa: N802 - the contract's name
        self, request: pb.CancelJobRequest, context: object
    ) -> pb.CancelJobResponse:
        """See the contract."""
        job_id = _job_id(request)
        tenant = self._tenant(context)
        job, outcome = await to_its_end(self._manager.cancel(tenant, job_id))
        return pb.CancelJobResponse(
            job=self._jobs.job(job), outcome=answers.CANCEL_OUTCOMES[outcome]
        )

    async def DeleteJob(  # noqa: N802 - the contract's name
        self, request: pb.DeleteJobRequest, context: object
    ) -> pb.DeleteJobResponse:
        """See the contract."""
        job_id = _job_id(request)
        await to_its_end(self._manager.delete(self._tenant(context), job_id))
        return pb.DeleteJobResponse()

    async def StreamDownload(  # noqa: N802 - the contract's name
        self, request: pb.StreamDownloadRequest, context: Context
    ) -> None:
        """See the contract."""
        await self._downloads.stream(self._tenant(context), request, context)

    async def GetDownloadUrls(  # noqa: N802 - the contract's name
        self, request: pb.GetDownloadUrlsRequest, context: object
    ) -> pb.GetDownloadUrlsResponse:
        """See the contract."""
        reader = Reader()
        job_id = reader.uuid("job_id", request.job_id, required=True)
        size = _page_size(reader, request.page_size, MAX_PAGE)
        lifetime = requests.read_lifetime(reader, request, self._urls.options)
        part = request.part_index if request.HasField("part_index") else None
        if part is not None and part < 0:
            reader.complain("part_index", "must not be negative")
        if part is not None and request.page_token:
            reader.complain("page_token", "does not go with part_index; leave it out")
        reader.check()
        digest = requests.query_digest("urls", job_id)
        first = _read_token(request.page_token, digest, int)[0] if request.page_token else 0
        if first < 0:
            raise ExportdError(ErrorReason.INVALID_PAGE_TOKEN)
        response, following = await self._urls.of(
            self._tenant(context), UrlQuery(job_id, part, lifetime, first, size)
        )
        if following is not None:
            response.next_page_token = _token(digest, following)
        return response

    async def ListDeliveries(  # noqa: N802 - the contract's name
        self, request: pb.ListDeliveriesRequest, context: object
    ) -> pb.ListDeliveriesResponse:
        """See the contract."""
        reader = Reader()
        size = _page_size(reader, request.page_size, DELIVERY_PAGE)
        query = sinks.read_delivery_query(reader, request)
        reader.check()
        digest = requests.query_digest(
            "deliveries", query.job_id, query.sink, query.queue, sorted(query.states)
        )
        before = None
        if request.page_token:
            micros, delivery_id = _read_token(request.page_token, digest, int, str)
            before = (_from_micros(micros), delivery_id)
        found = await self._manager.list_deliveries(
            self._tenant(context), query, limit=size + 1, before=before
        )
        page = found[:size]
        token = ""
        if len(found) > size:
            last = page[-1]
            token = _token(digest, _micros(last.create_time), last.delivery_id)
        return pb.ListDeliveriesResponse(
            deliveries=[sinks.delivery_message(record) for record in page],
            next_page_token=token,
        )

    async def RedriveDeliveries(  # noqa: N802 - the contract's name
        self, request: pb.RedriveDeliveriesRequest, context: object
    ) -> pb.RedriveDeliveriesResponse:
        """See the contract."""
        reader = Reader()
        query = sinks.read_redrive(reader, request)
        reader.check()
        tenant = self._tenant(context)
        redriven = await to_its_end(self._manager.redrive(tenant, query))
        return pb.RedriveDeliveriesResponse(redriven=redriven)

    async def ListSinkQueues(  # noqa: N802 - the contract's name
        self, request: pb.ListSinkQueuesRequest, context: object
    ) -> pb.ListSinkQueuesResponse:
        """See the contract."""
        reader = Reader()
        size = _page_size(reader, request.page_size, DELIVERY_PAGE)
        reader.check()
        after = ""
        if request.page_token:
            (after,) = _read_token(request.page_token, "queues", str)
        found = await self._manager.list_queues(
            self._tenant(context), limit=size + 1, after=after
        )
        page = found[:size]
        return pb.ListSinkQueuesResponse(
            queues=[sinks.queue_message(queue) for queue in page],
            next_page_token=_token("queues", page[-1].queue) if len(found) > size else "",
        )

    async def EnableSinkQueue(  # noqa: N802 - the contract's name
        self, request: pb.EnableSinkQueueRequest, context: object
    ) -> pb.EnableSinkQueueResponse:
        """See the contract."""
        reader = Reader()
        name = reader.text("queue", request.queue)
        if not name:
            reader.complain("queue", "is required; ListSinkQueues names the queues")
        reader.check()
        tenant = self._tenant(context)
        queue = await to_its_end(self._manager.enable_queue(tenant, name))
        return pb.EnableSinkQueueResponse(queue=sinks.queue_message(queue))

    async def ListAuditRecords(  # noqa: N802 - the contract's name
        self, request: pb.ListAuditRecordsRequest, _context: object
    ) -> pb.ListAuditRecordsResponse:
        """See the contract."""
        reader = Reader()
        size = _page_size(reader, request.page_size, AUDIT_PAGE)
        query = read_audit_query(reader, request)
        reader.check()
        digest = audit_query_digest(query)
        before = None
        if request.page_token:
            micros, record_id = _read_token(request.page_token, digest, int, str)
            before = (_from_micros(micros), record_id)
        found = await self._manager.list_audit(query, limit=size + 1, before=before)
        page = found[:size]
        token = ""
        if len(found) > size:
            token = _token(digest, _micros(page[-1].time), page[-1].record_id)
        return pb.ListAuditRecordsResponse(
            records=[audit_message(record) for record in page], next_page_token=token
        )


def _job_id(
    request: pb.GetJobRequest
    | pb.WatchJobRequest
    | pb.CancelJobRequest
    | pb.DeleteJobRequest,
) -> str:
    reader = Reader()
    job_id = reader.uuid("job_id", request.job_id, required=True)
    reader.check()
    return job_id


def _page_size(reader: Reader, asked: int, default: int) -> int:
    if not 0 <= asked <= MAX_PAGE:
        reader.complain(
            "page_size", f"must lie between 1 and {MAX_PAGE}, or be 0 for {default}"
        )
    return asked or default


def _token(query: str, *position: object) -> str:
    text = json.dumps([query, *position], separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _read_token(token: str, query: str, *types: type) -> list[Any]:
    """The position in a page token that `_token` made for the same query."""
    try:
        padded = token.encode("ascii") + b"=" * (-len(token) % 4)
        text = base64.b64decode(padded, altchars=b"-_", validate=True)
        issued_for, *position = json.loads(text)
        for value in position:
            # JSON can name half a character, and NUL, which databases do not take.
            if b"\0" in str(value).encode():
                raise ExportdError(ErrorReason.INVALID_PAGE_TOKEN)
    except (ValueError, TypeError, RecursionError):
        raise ExportdError(ErrorReason.INVALID_PAGE_TOKEN) from None
    if issued_for != query or [type(value) for value in position] != list(types):
        raise ExportdError(ErrorReason.INVALID_PAGE_TOKEN)
    return list(position)


def _micros(moment: datetime) -> int:
    return int(moment.timestamp()) * 10**6 + moment.microsecond


def _from_micros(micros: int) -> datetime:
    try:
        whole = datetime.fromtimestamp(micros // 10**6, UTC)
    except (ValueError, OverflowError, OSError):
        raise ExportdError(ErrorReason.INVALID_PAGE_TOKEN) from None
    return whole.replace(microsecond=micros % 10**6)
