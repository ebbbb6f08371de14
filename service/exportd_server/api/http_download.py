"""`GET /v1/download/<token>`: one file of an output to whoever has its signed URL, with
conditions and ranges as RFC 9110 has them."""

from __future__ import annotations

import asyncio
import base64
import fcntl
import re
import sys
import termios
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from datetime import timedelta
from http import HTTPStatus

from aiohttp import web

from exportd_server.api.chunks import ChunkBuffer
from exportd_server.api.download import DownloadOptions
from exportd_server.api.http import ABOUT, BrokenOff, Refusal
from exportd_server.api.limits import CallerLimits
from exportd_server.api.link import BadLink, Link, LinkKeys
from exportd_server.api.reading import (
    OutputReader,
    Piece,
    check_generation,
    choose_file,
)
from exportd_server.api.urls import DOWNLOAD_PATH
from exportd_server.errors import ErrorReason, ExportdError
from exportd_server.jobs import audit
from exportd_server.jobs.manager import JobManager
from exportd_server.jobs.model import Job
from exportd_server.jobs.output import (
    Layout,
    content_disposition,
)
from exportd_server.jobs.readers import Cut, Readers
from exportd_server.platform import metrics_service as metrics
from exportd_server.platform.clock import Clock
from exportd_server.store.base import OutputStore

_GONE = frozenset(
    {
        ErrorReason.JOB_NOT_FOUND,
        ErrorReason.JOB_CANCELLED,
        ErrorReason.JOB_FAILED,
        ErrorReason.JOB_NOT_FINISHED,
        ErrorReason.OUTPUT_EXPIRED,
        ErrorReason.GENERATION_MISMATCH,
        ErrorReason.PART_NOT_FOUND,
        ErrorReason.PARTS_NOT_JOINABLE,
    }
)
"""The URL was right once, since it is signed: what it led to is no more."""

_RANGE = re.compile(r"bytes=[ \t]*(\d{0,18})-(\d{0,18})[ \t]*\Z", re.ASCII)


class HttpDownloads:
    """Serves the service's own download URLs."""

    def __init__(
        self,
        manager: JobManager,
        store: OutputStore,
        readers: Readers,
        keys: LinkKeys,
        options: DownloadOptions,
        clock: Clock,
        limits: CallerLimits,
    ) -> None:
        self._manager = manager
        self._output = OutputReader(manager, store)
        self._readers = readers
        self._keys = keys
        self._options = options
        self._clock = clock
        self._limits = limits

    def add_routes(self, app: web.Application) -> None:
        """Serve below `/v1/download`, GET and HEAD. The file's name at the end is for
        tools that look there; it may be left out and must not be another."""
        path = DOWNLOAD_PATH + "/{token:[A-Za-z0-9_-]{1,400}}"
        app.router.add_get(path, self._serve)
        app.router.add_get(path + "/{name:[A-Za-z0-9._-]{1,200}}", self._serve)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        link = self._link(request.match_info["token"])
        request[ABOUT].update(job_id=link.job_id, part=link.part, tenant=link.tenant)
        if self._limits.rates is not None:
            self._limits.rates.take(link.tenant)
        if link.expire_time <= self._clock.now():
            raise Refusal(
                HTTPStatus.GONE, "URL_EXPIRED", "the URL has expired; ask for a new one"
            )
        with self._readers.reading(link.job_id):
            try:
                with self._limits.downloads.hold(link.tenant):
                    async with self._readers.until_cut(link.job_id):
                        return await self._send(request, link)
            except Cut:
                # Deleted, cancelled or expired: the job says which.
                try:
                    await self._job(link)
                except ExportdError as error:
                    raise _gone(error) from None
                raise _gone(ExportdError(ErrorReason.JOB_NOT_FOUND)) from None
            except ExportdError as error:
                raise _gone(error) from error

    def _link(self, token: str) -> Link:
        try:
            link = self._keys.read(token)
        except BadLink:
            raise Refusal(
                HTTPStatus.FORBIDDEN,
                "URL_INVALID",
                "this URL was not given by this service, or was changed on its way",
            ) from None
        if (entry := audit.current()) is not None:
            entry.tenant, entry.identity = link.tenant, audit.BY_URL
            entry.job_id, entry.part = link.job_id, link.part
        return link

    async def _job(self, link: Link) -> Job:
        """The job as it stands now, whatever the URL promised."""
        job = await self._manager.output(link.tenant, link.job_id)
        check_generation(job, link.generation)
        return job

    async def _send(self, request: web.Request, link: Link) -> web.StreamResponse:
        job = await self._job(link)
        layout, name = choose_file(job, link.part)
        if request.match_info.get("name", name) != name:
            raise Refusal(HTTPStatus.NOT_FOUND, "NOT_FOUND", "the file has another name")
        etag = _etag(job, layout)
        headers = {
            "ETag": etag,
            "Cache-Control": self._cache_control(link, job),
            "Accept-Ranges": "bytes",
        }
        if not _allowed(request.headers.getall("If-Match", []), etag):
            raise Refusal(
                HTTPStatus.PRECONDITION_FAILED, "ETAG_MISMATCH", "the file is another one"
            )
        if _has(request.headers.getall("If-None-Match", []), etag):
            return web.Response(status=HTTPStatus.NOT_MODIFIED, headers=headers)
        headers["Content-Type"] = job.spec.output.file_content_type
        headers["Content-Disposition"] = content_disposition(name)
        if layout.sha256:
            digest = base64.b64encode(layout.sha256).decode()
            headers["Repr-Digest"] = f"sha-256=:{digest}:"
        status, first, end = HTTPStatus.OK, 0, layout.bytes
        asked = _asked_range(request, etag)
        if asked is not None:
            first, end = _within(asked, layout.bytes)
            status = HTTPStatus.PARTIAL_CONTENT
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{layout.bytes}"
        response = web.StreamResponse(status=status, headers=headers)
        response.content_length = end - first
        if request.method == "HEAD":
            await response.prepare(request)
            return response
        await self._readers.keep(job)
        request[ABOUT].update(first=first, bytes=end - first)
        with self._options.memory.download() as buffer:
            async with aclosing(
                self._output.pieces(
                    job, layout.segments, first, end, lambda _, wanted: buffer.room(wanted)
                )
            ) as pieces:
                await self._stream(request, response, pieces, buffer)
        return response

    def _cache_control(self, link: Link, job: Job) -> str:
        left = link.expire_time - self._clock.now()
        if job.expire_time is not None and job.read_time is not None:
            left = min(left, job.expire_time - job.read_time)
        # Recompressed on its way it would have another size and checksum.
        return f"private, no-transform, max-age={max(0, left // timedelta(seconds=1))}"

    async def _stream(
        self,
        request: web.Request,
        response: web.StreamResponse,
        pieces: AsyncGenerator[Piece],
        buffer: ChunkBuffer,
    ) -> None:
        # The first bytes are read before the answer begins, so that what is wrong with
        # them can still be told.
        piece = await anext(pieces, None)
        if request.transport is not None:
            # What is written has been taken by the kernel when `drain` returns.
            request.transport.set_write_buffer_limits(high=0)
        await response.prepare(request)
        audit.note_sent(0)
        while piece is not None:
            count = len(piece.data)
            writing = _write(request, response, buffer.chunk(piece.data))
            await self._taken(request, writing)
            metrics.http_bytes.inc(count)
            audit.note_sent(count)
            piece = await anext(pieces, None)
        await response.write_eof()

    async def _taken(self, request: web.Request, writing: Awaitable[None]) -> None:
        """Wait until bytes are taken; cut off a reader that takes none for too long,
        however few it takes otherwise."""
        task = asyncio.ensure_future(writing)
        waiting, patience = -1, 0.0
        try:
            while True:
                done, _ = await asyncio.wait({task}, timeout=patience)
                if done:
                    return task.result()
                before, waiting = waiting, _waiting(request)
                if waiting == before:
                    raise BrokenOff(ErrorReason.READER_STALLED)
                patience = self._options.stall_timeout
        finally:
            task.cancel()


async def _write(request: web.Request, response: web.StreamResponse, data: bytes) -> None:
    await response.write(data)
    del data
    await request.writer.drain()


def _waiting(request: web.Request) -> int:
    """How many bytes the other side has not taken: here, and in the kernel, which takes
    more from here only once a good part of what it has is gone."""
    transport = request.transport
    if transport is None:
        return 0
    queued = bytearray(4)
    fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, queued)
    return transport.get_write_buffer_size() + int.from_bytes(queued, sys.byteorder)


def _gone(error: ExportdError) -> Refusal:
    return Refusal.of(error, HTTPStatus.GONE if error.reason in _GONE else None)


def _etag(job: Job, layout: Layout) -> str:
    """Strong: equal only for equal bytes. Another URL of the same file has it, too, so
    that a download goes on with a new URL."""
    digest = layout.sha256.hex()[:32]
    return (
        f'"{job.generation}-{layout.bytes:x}-{layout.crc32c:08x}{digest and "-"}{digest}"'
    )


def _tags(values: list[str]) -> list[str]:
    return [tag.strip() for value in values for tag in value.split(",")]


def _allowed(if_match: list[str], etag: str) -> bool:
    return not if_match or bool({etag, "*"} & set(_tags(if_match)))


def _has(if_none_match: list[str], etag: str) -> bool:
    """The weak comparison: whether the caller has the file already."""
    tags = {tag.removeprefix("W/") for tag in _tags(if_none_match)}
    return bool({etag, "*"} & tags)


def _asked_range(request: web.Request, etag: str) -> tuple[int | None, int | None] | None:
    """The one range that was asked for: first and last byte, or None and how many of the
    last bytes. None: the whole file, also for several ranges and for what is no range at
    all, as RFC 9110 allows; and when `If-Range` names another file."""
    match = _RANGE.match(request.headers.get("Range", ""))
    if match is None or request.method != "GET":
        return None
    if request.headers.get("If-Range", etag) != etag:
        return None
    first, last = (int(text) if text else None for text in match.groups())
    if first is None and last is None:
        return None
    if first is not None and last is not None and last < first:
        return None
    return first, last


def _within(asked: tuple[int | None, int | None], size: int) -> tuple[int, int]:
    """The first byte of a range and the one after its last."""
    first, last = asked
    if first is None:
        begin, end = max(0, size - (last or 0)), size
    else:
        begin, end = first, size if last is None else min(size, last + 1)
    if begin >= end:
        raise Refusal(
            HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
            ErrorReason.OFFSET_OUT_OF_RANGE,
            f"the file has {size} bytes",
            {"Content-Range": f"bytes */{size}"},
        )
    return begin, end
