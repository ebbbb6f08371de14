"""StreamDownload: sends stored bytes as they are, checked, and no faster than they are
taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

import grpc

from exportd.v1 import export_service_pb2
from exportd_server.api.chunks import ChunkBuffer, ChunkMemory
from exportd_server.api.framing import data_head, usual_head_length
from exportd_server.api.reading import (
    OutputReader,
    Piece,
    check_generation,
    choose_error_part,
    choose_file,
)
from exportd_server.api.requests import Reader
from exportd_server.api.sending import Messages
from exportd_server.encoders.base import OutputFormat
from exportd_server.errors import ErrorReason, ExportdError
from exportd_server.jobs import audit
from exportd_server.jobs.manager import JobManager
from exportd_server.jobs.model import Job, JobState, PartRecord
from exportd_server.jobs.output import (
    ERROR_OUTPUT,
    Layout,
    Segment,
    content_disposition,
    file_name,
    joined_layout,
    joined_segment,
)
from exportd_server.jobs.readers import Cut, Readers
from exportd_server.platform import metrics_service as metrics
from exportd_server.store.base import OutputStore

Context = grpc.aio.ServicerContext[export_service_pb2.StreamDownloadRequest, bytes]


@dataclass(frozen=True, slots=True)
class DownloadOptions:
    """What all downloads share; times in seconds."""

    memory: ChunkMemory
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
        self._output = OutputReader(manager, store)
        self._readers = readers
        self._options = options

    async def stream(
        self,
        tenant: str,
        request: export_service_pb2.StreamDownloadRequest,
        context: Context,
    ) -> None:
        """Send what was asked for; raises what the contract says."""
        job_id = _checked_job_id(request)
        with (
            self._options.memory.download() as buffer,
            self._readers.reading(job_id),
        ):
            sender = _Sender(context, buffer, self._options.stall_timeout)
            try:
                async with self._readers.until_cut(job_id):
                    if request.follow:
                        await self._follow(tenant, job_id, request, sender)
                    else:
                        job = await self._manager.output(tenant, job_id)
                        await self._readers.keep(job)
                        await self._send(job, request, sender)
            except Cut:
                # Deleted, cancelled or expired: the job says which.
                self._manager.refuse_unreadable(await self._manager.get(tenant, job_id))
                raise ExportdError(ErrorReason.JOB_NOT_FOUND) from None

    async def _send(
        self,
        job: Job,
        request: export_service_pb2.StreamDownloadRequest,
        sender: _Sender,
    ) -> None:
        check_generation(job, request.if_generation_match)
        if request.HasField("error_part_index"):
            layout, name = choose_error_part(job, request.error_part_index)
            metadata = _metadata(job, name, layout, ERROR_OUTPUT)
        else:
            index = request.part_index if request.HasField("part_index") else None
            layout, name = choose_file(job, index)
            metadata = _metadata(job, name, layout)
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
        await sender.metadata(metadata)
        await self._send_segments(job, layout.segments, offset, end, sender)

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
        async with aclosing(
            self._output.pieces(job, segments, offset, end, sender.room, base)
        ) as pieces:
            async for piece in pieces:
                await sender.data(piece)
        sender.release()
        return base + sum(segment.length for segment in segments)

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
                check_generation(job, generation)
                await self._readers.keep(job)
                done = job.state is JobState.SUCCEEDED
                if parts[: len(sent)] != sent:
                    if done:
                        check_generation(job, -1)
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


class _Sender:
    """Sends messages of one call, and gives up on a reader that takes none."""

    def __init__(self, context: Context, buffer: ChunkBuffer, stall_timeout: float) -> None:
        self._messages = Messages(context, stall_timeout)
        self._buffer = buffer
        self.release = buffer.release
        self.before_each: Callable[[], None] = _nothing
        """Raises when no more data is to be sent."""

    def room(self, position: int, wanted: int) -> memoryview:
        """Where to read the data of the next message into."""
        return self._buffer.room(wanted, partial(usual_head_length, position))

    async def metadata(self, message: export_service_pb2.DownloadMetadata) -> None:
        """Send what the bytes are."""
        response = export_service_pb2.StreamDownloadResponse(metadata=message)
        await self._messages.send(response.SerializeToString())
        audit.note_sent(0)

    async def data(self, piece: Piece) -> None:
        """Send a chunk."""
        self.before_each()
        count = len(piece.data)
        head = data_head(piece.position, piece.crc32c, count)
        await self._messages.send(self._buffer.chunk(piece.data, head))
        metrics.grpc_bytes.inc(count)
        audit.note_sent(count)


def _checked_job_id(request: export_service_pb2.StreamDownloadRequest) -> str:
    """The job's id, once the request makes sense."""
    reader = Reader()
    job_id = reader.uuid("job_id", request.job_id, required=True)
    if request.read_limit < 0:
        reader.complain("read_limit", "must not be negative; 0 reads to the end")
    if request.HasField("part_index") and request.part_index < 0:
        reader.complain("part_index", "must not be negative")
    if request.HasField("error_part_index"):
        if request.error_part_index < 0:
            reader.complain("error_part_index", "must not be negative")
        if request.HasField("part_index") or request.follow:
            reader.complain(
                "error_part_index",
                "does not go with part_index or follow; leave it out",
            )
    if request.if_generation_match < 0:
        reader.complain("if_generation_match", "must not be negative; 0 is any")
    if request.follow and request.read_limit:
        reader.complain("read_limit", "does not go with follow; leave it out")
    if request.follow and request.HasField("part_index"):
        reader.complain("part_index", "does not go with follow; leave it out")
    reader.check()
    return job_id


def _nothing() -> None:
    return None


def _metadata(
    job: Job, name: str, layout: Layout | None, output: OutputFormat | None = None
) -> export_service_pb2.DownloadMetadata:
    output = output or job.spec.output
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
