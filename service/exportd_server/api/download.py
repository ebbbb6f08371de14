"""StreamDownload: sends stored bytes as they are, checked, and no faster than they are
taken."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import grpc
import structlog
from crc32c import crc32c

from exportd.v1 import export_service_pb2
from exportd_server.api.framing import data_message
from exportd_server.api.requests import Reader
from exportd_server.errors import ErrorReason, ExportdError
from exportd_server.jobs.housekeeping import part_key
from exportd_server.jobs.manager import JobManager
from exportd_server.jobs.model import Job, JobState, PartRecord
from exportd_server.jobs.output import (
    Layout,
    Segment,
    content_disposition,
    file_name,
    joined_layout,
    joined_segment,
    part_file_name,
    part_layout,
)
from exportd_server.jobs.readers import Readers
from exportd_server.store.base import OutputStore
from exportd_server.store.key import JobPrefix

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[export_service_pb2.StreamDownloadRequest, bytes]


@dataclass(frozen=True, slots=True)
class DownloadOptions:
    """Sizes in bytes, times in seconds. A bigger chunk is a little faster; a smaller one
    is fairer to other calls."""

    chunk_bytes: int = 2**20
    stall_timeout: float = 60.0


class Downloads:
    """Serves StreamDownload."""

    def __init__(
        self,
        manager: JobManager,
        store: OutputStore,
        readers: Readers,
        options: DownloadOptions,
    ) -> None:
        self._manager = manager
        self._store = store
        self._readers = readers
        self._options = options

    async def stream(
        self,
        tenant: str,
        request: export_service_pb2.StreamDownloadRequest,
        context: Context,
    ) -> None:
        """Send what was asked for; raises what the contract says."""
        reader = Reader()
        job_id = reader.uuid("job_id", request.job_id, required=True)
        if request.read_limit < 0:
            reader.complain("read_limit", "must not be negative; 0 reads to the end")
        if request.HasField("part_index") and request.part_index < 0:
            reader.complain("part_index", "must not be negative")
        if request.if_generation_match < 0:
            reader.complain("if_generation_match", "must not be negative; 0 is any")
        if request.follow and request.read_limit:
            reader.complain("read_limit", "does not go with follow; leave it out")
        if request.follow and request.HasField("part_index"):
            reader.complain("part_index", "does not go with follow; leave it out")
        reader.check()
        sender = _Sender(context, self._options, self._readers, job_id)
        with self._readers.reading(job_id):
            try:
                if request.follow:
                    await self._follow(tenant, job_id, request, sender)
                else:
                    job = await self._manager.output(tenant, job_id)
                    await self._send(job, request, sender)
            except _Cut:
                # Deleted or cancelled: the job says which.
                self._manager.refuse_unreadable(await self._manager.get(tenant, job_id))
                raise ExportdError(ErrorReason.JOB_NOT_FOUND) from None

    async def _send(
        self,
        job: Job,
        request: export_service_pb2.StreamDownloadRequest,
        sender: _Sender,
    ) -> None:
        _check_generation(job, request.if_generation_match)
        layout, name = self._choose(job, request)
        offset = request.read_offset
        if not 0 <= offset <= layout.bytes:
            raise ExportdError(
                ErrorReason.OFFSET_OUT_OF_RANGE,
                f"read_offset {offset} lies outside the {layout.bytes} bytes",
                metadata={"read_offset": str(offset), "size": str(layout.bytes)},
            )
        end = layout.bytes
        if request.read_limit:
            end = min(end, offset + request.read_limit)
        await sender.metadata(_metadata(job, name, layout))
        await self._send_segments(job, layout.segments, offset, end, sender)

    def _choose(
        self, job: Job, request: export_service_pb2.StreamDownloadRequest
    ) -> tuple[Layout, str]:
        parts = job.manifest.parts if job.manifest is not None else ()
        if request.HasField("part_index"):
            index = request.part_index
            if index >= len(parts):
                raise ExportdError(
                    ErrorReason.PART_NOT_FOUND,
                    f"part_index {index} is not among the job's {len(parts)} parts",
                    metadata={"part_index": str(index), "parts": str(len(parts))},
                )
            return part_layout(parts[index]), part_file_name(job, index)
        layout = joined_layout(job.spec.output, parts)
        if layout is None:
            raise ExportdError(
                ErrorReason.PARTS_NOT_JOINABLE, metadata={"parts": str(len(parts))}
            )
        return layout, file_name(job)

    async def _send_segments(
        self,
        job: Job,
        segments: Sequence[Segment],
        offset: int,
        end: int,
        sender: _Sender,
        base: int = 0,
    ) -> int:
        """Send the bytes from `offset` to `end` of segments that begin at `base`;
        returns where the segments end."""
        for segment in segments:
            after = base + segment.length
            first, last = max(offset, base), min(end, after)
            if first < last:
                await self._send_segment(job, segment, base, first, last, sender)
            base = after
        return base

    async def _send_segment(
        self,
        job: Job,
        segment: Segment,
        base: int,
        first: int,
        last: int,
        sender: _Sender,
    ) -> None:
        key = part_key(JobPrefix(job.tenant, job.job_id), segment.part)
        try:
            reader = await self._store.open(key, segment.start + first - base)
        except KeyError:
            await self._explain_missing(job)
            log.exception("a part of the manifest is missing", key=str(key))
            raise ExportdError(ErrorReason.CHECKSUM_MISMATCH) from None
        whole = last - first == segment.length
        checksum, position = 0, first
        try:
            while position < last:
                view = sender.room(last - position)
                count = await reader.readinto(view)
                if count == 0:
                    log.error("a part is shorter than recorded", key=str(key))
                    raise ExportdError(ErrorReason.CHECKSUM_MISMATCH)
                data = view[:count]
                if whole:
                    checksum = crc32c(data, checksum)
                await sender.data(position, data)
                position += count
        finally:
            await reader.close()
        if whole and checksum != segment.crc32c:
            log.error("stored bytes do not match their checksum", key=str(key))
            raise ExportdError(ErrorReason.CHECKSUM_MISMATCH)

    async def _explain_missing(self, job: Job) -> None:
        """Raise why a part may rightly be gone: the job was deleted or has expired."""
        now = await self._manager.output(job.tenant, job.job_id)
        _check_generation(now, job.generation)

    async def _follow(
        self,
        tenant: str,
        job_id: str,
        request: export_service_pb2.StreamDownloadRequest,
        sender: _Sender,
    ) -> None:
        """Send parts as they are finished. The last finished part is held back until it
        is known whether another one follows, because only then its suffix is known to
        belong to the joined file or not."""
        generation = request.if_generation_match
        sender.before_each = self._manager.refuse_while_draining
        sent: list[PartRecord] = []
        base, begun = 0, False
        async with aclosing(self._manager.follow(tenant, job_id)) as changes:
            async for job, parts in changes:
                self._manager.refuse_unreadable(job)
                if not job.spec.output.joinable:
                    raise ExportdError(ErrorReason.PARTS_NOT_JOINABLE)
                generation = generation or job.generation
                _check_generation(job, generation)
                done = job.state is JobState.SUCCEEDED
                if parts[: len(sent)] != sent:
                    if done:
                        _check_generation(job, -1)
                    # The job changed after it was looked at; the next look says how.
                    continue
                if not begun:
                    if request.read_offset < 0:
                        raise ExportdError(ErrorReason.OFFSET_OUT_OF_RANGE)
                    begun = True
                    await sender.metadata(_metadata(job, file_name(job), None))
                ready = parts[len(sent) :] if done else parts[len(sent) : -1]
                for part in ready:
                    last = done and part is parts[-1]
                    segment = joined_segment(part, first=not sent, last=last)
                    sent.append(part)
                    end = base + segment.length
                    base = await self._send_segments(
                        job, [segment], request.read_offset, end, sender, base
                    )
                if done:
                    if request.read_offset > base:
                        raise ExportdError(ErrorReason.OFFSET_OUT_OF_RANGE)
                    layout = joined_layout(job.spec.output, parts)
                    await sender.metadata(_metadata(job, file_name(job), layout))


class _Cut(Exception):
    """The job was cancelled or deleted while it was being downloaded."""


class _Sender:
    """Sends messages of one call, and gives up on a reader that takes none."""

    def __init__(
        self, context: Context, options: DownloadOptions, readers: Readers, job_id: str
    ) -> None:
        self._context = context
        self._options = options
        self._readers = readers
        self._job_id = job_id
        self._buffer = memoryview(b"")
        self.before_each: Callable[[], None] = _nothing
        """Raises when no more data is to be sent."""

    def room(self, wanted: int) -> memoryview:
        """Where to read the next data into; the same memory each time, and no more of it
        than a small output needs."""
        size = min(wanted, self._options.chunk_bytes)
        if len(self._buffer) < size:
            self._buffer = memoryview(bytearray(size))
        return self._buffer[:size]

    async def metadata(self, message: export_service_pb2.DownloadMetadata) -> None:
        """Send what the bytes are."""
        response = export_service_pb2.StreamDownloadResponse(metadata=message)
        await self._write(response.SerializeToString())

    async def data(self, offset: int, data: memoryview) -> None:
        """Send a chunk."""
        self.before_each()
        if self._readers.is_cut(self._job_id):
            raise _Cut
        await self._write(data_message(offset, crc32c(data), data))

    async def _write(self, message: bytes) -> None:
        try:
            async with asyncio.timeout(self._options.stall_timeout):
                await self._context.write(message)
        except TimeoutError:
            raise ExportdError(ErrorReason.READER_STALLED) from None


def _nothing() -> None:
    return None


def _check_generation(job: Job, wanted: int) -> None:
    if wanted and wanted != job.generation:
        raise ExportdError(
            ErrorReason.GENERATION_MISMATCH,
            metadata={"generation": str(job.generation)},
        )


def _metadata(
    job: Job, name: str, layout: Layout | None
) -> export_service_pb2.DownloadMetadata:
    output = job.spec.output
    return export_service_pb2.DownloadMetadata(
        file_name=name,
        content_type=output.content_type,
        content_encoding=output.content_encoding,
        total_bytes=None if layout is None else layout.bytes,
        generation=job.generation,
        crc32c=None if layout is None else layout.crc32c,
        sha256=b"" if layout is None else layout.sha256,
        content_disposition=content_disposition(name),
    )
