"""GetDownloadUrls: URLs of the store's own where it signs some, and else of the service's
HTTP port."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from exportd.v1 import export_service_pb2
from exportd_server.api.link import Link, LinkKeys
from exportd_server.api.reading import choose_file, parts_of
from exportd_server.api.timestamps import timestamp
from exportd_server.errors import ErrorReason, ExportdError
from exportd_server.jobs.housekeeping import part_key
from exportd_server.jobs.manager import JobManager
from exportd_server.jobs.model import Job
from exportd_server.jobs.output import (
    content_disposition,
    delivered_file_name,
)
from exportd_server.platform.clock import Clock
from exportd_server.sinks.base import Link as DeliveredLink
from exportd_server.store.base import UrlSigner
from exportd_server.store.key import JobPrefix

DOWNLOAD_PATH = "/v1/download"


class HttpLinks:
    """URLs of the service's own HTTP port, which begin with `base`."""

    def __init__(self, base: str, keys: LinkKeys) -> None:
        self._base = base.rstrip("/")
        self._keys = keys

    def url(self, link: Link, name: str) -> str:
        """The URL of a link. It ends in the file's name, since many tools take a file's
        format and name from there."""
        return f"{self._base}{DOWNLOAD_PATH}/{self._keys.sign(link)}/{name}"


@dataclass(frozen=True, slots=True)
class UrlOptions:
    """How long URLs work when the request does not say, and at most."""

    default_lifetime: timedelta = timedelta(hours=1)
    max_lifetime: timedelta = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class UrlQuery:
    """What URLs are asked for: of the parts from `first` on, at most `count`."""

    job_id: str
    part: int | None
    lifetime: timedelta
    first: int
    count: int


class DownloadUrls:
    """Serves GetDownloadUrls. `signer` is the store, where it can sign URLs; `links` are
    the HTTP port's, where there is one."""

    def __init__(
        self,
        manager: JobManager,
        clock: Clock,
        options: UrlOptions,
        *,
        signer: UrlSigner | None = None,
        links: HttpLinks | None = None,
    ) -> None:
        self._manager = manager
        self._clock = clock
        self._signer = signer
        self._links = links
        self.options = options

    async def of(
        self, tenant: str, query: UrlQuery
    ) -> tuple[export_service_pb2.GetDownloadUrlsResponse, int | None]:
        """A page of URLs, and the part that the next one begins with; raises what the
        contract says."""
        job = await self._manager.output(tenant, query.job_id)
        if not self.available:
            raise ExportdError(ErrorReason.DOWNLOAD_URLS_UNAVAILABLE)
        expires = self._expiry(job, query.lifetime)
        response = export_service_pb2.GetDownloadUrlsResponse(generation=job.generation)
        if query.part is not None:
            response.urls.append(await self._url(job, query.part, expires))
            return response, None
        parts = len(parts_of(job))
        last = min(query.first + query.count, parts)
        for index in range(query.first, last):
            response.urls.append(await self._url(job, index, expires))
            # Signing for S3 takes a fifth of a millisecond; others are to have their turn.
            await asyncio.sleep(0)
        if not query.first:
            joined = await self._joined(job, expires)
            if joined is not None:
                response.joined.CopyFrom(joined)
        return response, last if last < parts else None

    @property
    def available(self) -> bool:
        """Whether there are any to give."""
        return self._signer is not None or self._links is not None

    async def for_delivery(self, job: Job) -> list[DeliveredLink]:
        """Links for a sink to pass on: to each part, named as parts are where they are
        delivered, for as long as links may last."""
        whole = await self._manager.output(job.tenant, job.job_id)
        expires = self._expiry(whole, self.options.max_lifetime)
        found = []
        for index, part in enumerate(parts_of(whole)):
            message = await self._url(whole, index, expires)
            found.append(
                DeliveredLink(
                    file_name=delivered_file_name(whole, part.shard, part.sequence),
                    url=message.url,
                    expire_time=message.expire_time.ToDatetime(UTC),
                    bytes=message.bytes,
                    sha256=message.sha256,
                )
            )
            # Signing for S3 takes a fifth of a millisecond; others are to have their turn.
            await asyncio.sleep(0)
        return found

    def _expiry(self, job: Job, lifetime: timedelta) -> datetime:
        """When URLs of the job that are made now stop working, by this machine's clock."""
        now = self._clock.now()
        if job.expire_time is None or job.read_time is None:
            return now + lifetime
        # What is left is told by the ledger's clock alone; ours may be wrong.
        left = job.expire_time - job.read_time
        return min(now + min(lifetime, left), job.expire_time)

    async def _joined(
        self, job: Job, expires: datetime
    ) -> export_service_pb2.DownloadUrl | None:
        single = len(parts_of(job)) == 1
        if not single and (self._links is None or not job.spec.output.joinable):
            return None
        return await self._url(job, None, expires)

    async def _url(
        self, job: Job, part: int | None, expires: datetime
    ) -> export_service_pb2.DownloadUrl:
        layout, name = choose_file(job, part)
        content_type = job.spec.output.file_content_type
        if self._signer is not None and len(layout.segments) == 1:
            (segment,) = layout.segments
            signed = await self._signer.signed_url(
                part_key(JobPrefix(job.tenant, job.job_id), segment.part),
                lifetime=expires - self._clock.now(),
                content_type=content_type,
                content_disposition=content_disposition(name),
            )
            if signed is None:
                # Not a second is left to it.
                raise ExportdError(ErrorReason.OUTPUT_EXPIRED)
            url, expires = signed.url, min(signed.expire_time, expires)
        else:
            assert self._links is not None  # noqa: S101 - or nothing would sign
            link = Link(job.tenant, job.job_id, job.generation, part, expires)
            url = self._links.url(link, name)
        return export_service_pb2.DownloadUrl(
            part_index=part,
            url=url,
            expire_time=timestamp(expires),
            requires_access_token=False,
            file_name=name,
            bytes=layout.bytes,
            crc32c=layout.crc32c,
            sha256=layout.sha256,
            content_type=content_type,
        )
