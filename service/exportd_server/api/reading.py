"""Reads the stored bytes of an output, checked, for whoever sends them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import NamedTuple

import structlog
from crc32c import crc32c

from exportd_server.errors import ErrorReason, ExportdError
from exportd_server.jobs.housekeeping import part_key
from exportd_server.jobs.manager import JobManager
from exportd_server.jobs.model import Job, JobState, PartRecord
from exportd_server.jobs.output import (
    Layout,
    Segment,
    error_part_file_name,
    file_name,
    joined_layout,
    part_file_name,
    part_layout,
)
from exportd_server.platform.checksum import crc32c_combine
from exportd_server.store.base import OutputStore, PartReader
from exportd_server.store.key import JobPrefix, OutputKey

log = structlog.get_logger(__name__)

Room = Callable[[int, int], memoryview]
"""Gives memory for what stands at a position of the output: for at most so many bytes, at
least one."""


class Piece(NamedTuple):
    """Some bytes of an output, where they stand in it, and their CRC32C."""

    position: int
    data: memoryview
    crc32c: int


def choose_file(job: Job, part_index: int | None) -> tuple[Layout, str]:
    """One part of a succeeded job, or all of them joined: its layout and name. Raises
    PART_NOT_FOUND or PARTS_NOT_JOINABLE."""
    parts = parts_of(job)
    if part_index is not None:
        if part_index >= len(parts):
            raise ExportdError(
                ErrorReason.PART_NOT_FOUND,
                f"part_index {part_index} is not among the job's {len(parts)} parts",
                metadata={"part_index": str(part_index), "parts": str(len(parts))},
            )
        return part_layout(parts[part_index]), part_file_name(job, part_index)
    layout = joined_layout(job.spec.output, parts)
    if layout is None:
        raise ExportdError(
            ErrorReason.PARTS_NOT_JOINABLE, metadata={"parts": str(len(parts))}
        )
    return layout, file_name(job)


def choose_error_part(job: Job, index: int) -> tuple[Layout, str]:
    """One error part of a succeeded job: its layout and name. Raises PART_NOT_FOUND."""
    parts = job.manifest.error_parts if job.manifest is not None else ()
    if index >= len(parts):
        raise ExportdError(
            ErrorReason.PART_NOT_FOUND,
            f"error_part_index {index} is not among the job's {len(parts)} error parts",
            metadata={"error_part_index": str(index), "error_parts": str(len(parts))},
        )
    return part_layout(parts[index]), error_part_file_name(job, index)


def parts_of(job: Job) -> tuple[PartRecord, ...]:
    """What a job has to give."""
    if job.state is JobState.SUCCEEDED and job.manifest is not None:
        return job.manifest.parts
    return ()


def check_generation(job: Job, wanted: int) -> None:
    """Raise GENERATION_MISMATCH unless the output is of that generation; 0 is any."""
    if wanted and wanted != job.generation:
        raise ExportdError(
            ErrorReason.GENERATION_MISMATCH,
            metadata={"generation": str(job.generation)},
        )


class OutputReader:
    """Reads outputs as they are stored."""

    def __init__(self, manager: JobManager, store: OutputStore) -> None:
        self._manager = manager
        self._store = store

    async def pieces(
        self,
        job: Job,
        segments: Sequence[Segment],
        offset: int,
        end: int,
        room: Room,
        base: int = 0,
    ) -> AsyncGenerator[Piece]:
        """The bytes from `offset` to `end` of segments that begin at `base`, in pieces, in
        the memory that `room` gave for each, which may be taken back when the next piece is
        asked for.

        The last piece of a segment read whole comes only when the segment's checksum is
        right. Raises CHECKSUM_MISMATCH, or why the output is gone meanwhile. Close it.
        """
        for segment in segments:
            after = base + segment.length
            first, last = max(offset, base), min(end, after)
            if first < last:
                start = segment.start + first - base
                whole = segment.crc32c if last - first == segment.length else None
                key = part_key(JobPrefix(job.tenant, job.job_id), segment.part)
                reader = await self._open(job, key, start)
                checked = _Checked(reader, key, last - first, whole)
                try:
                    position = first
                    while position < last:
                        piece = await checked.next(room, position)
                        position += len(piece.data)
                        yield piece
                finally:
                    await reader.close()
            base = after

    async def _open(self, job: Job, key: OutputKey, start: int) -> PartReader:
        try:
            return await self._store.open(key, start)
        except KeyError:
            # The job may rightly have gone meanwhile; this raises why.
            now = await self._manager.output(job.tenant, job.job_id)
            check_generation(now, job.generation)
            log.exception("a part of the manifest is missing", key=str(key))
            raise ExportdError(ErrorReason.CHECKSUM_MISMATCH) from None


class _Checked:
    """Reads `length` bytes of a part; all of them are one segment of that checksum, where
    it is given."""

    def __init__(
        self, reader: PartReader, key: OutputKey, length: int, expected: int | None
    ) -> None:
        self._reader = reader
        self._key = key
        self._left = length
        self._expected = expected
        self._checksum = 0

    async def next(self, room: Room, position: int) -> Piece:
        """The next bytes, which stand there; for as long as some are left."""
        view = room(position, self._left)
        count = await self._reader.readinto(view)
        if count == 0:
            log.error("a part is shorter than recorded", key=str(self._key))
            raise ExportdError(ErrorReason.CHECKSUM_MISMATCH)
        data = view[:count]
        self._left -= count
        checksum = crc32c(data)
        if self._expected is not None:
            # Where that is cheaper than to read the bytes a second time.
            self._checksum = (
                crc32c_combine(self._checksum, checksum, count)
                if count.bit_count() == 1
                else crc32c(data, self._checksum)
            )
            if not self._left and self._checksum != self._expected:
                log.error("stored bytes do not match their checksum", key=str(self._key))
                raise ExportdError(ErrorReason.CHECKSUM_MISMATCH)
        return Piece(position, data, checksum)
