"""How a job's parts become files: their names, and how they join into one."""

from __future__ import annotations

import builtins
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from exportd_server.encoders.base import Format, OutputFormat
from exportd_server.jobs.model import ExportSpec, Job, PartRecord
from exportd_server.platform.checksum import crc32c_combine

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes of one part as they stand in a file: from `start` in the part, `length` of
    them, with their CRC32C."""

    part: PartRecord
    start: int
    length: int
    crc32c: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A file made of segments. `sha256` is known only for a single whole part."""

    segments: tuple[Segment, ...]
    bytes: int
    crc32c: int
    sha256: builtins.bytes


ERROR_OUTPUT = OutputFormat(Format.JSONL)
"""What error parts are written as, whatever the output is."""


def part_layout(part: PartRecord) -> Layout:
    """One part as a file of its own."""
    whole = Segment(part, 0, part.bytes, part.crc32c)
    return Layout((whole,), part.bytes, part.crc32c, part.sha256)


def joined_segment(part: PartRecord, *, first: bool, last: bool) -> Segment:
    """What the joined file takes of a part: the prefix only of the first, the suffix
    only of the last."""
    body = part.bytes - part.prefix_bytes - part.suffix_bytes
    start, length, crc = part.prefix_bytes, body, part.body_crc32c
    if first:
        crc = crc32c_combine(part.prefix_crc32c, crc, length)
        start, length = 0, length + part.prefix_bytes
    if last:
        crc = crc32c_combine(crc, part.suffix_crc32c, part.suffix_bytes)
        length += part.suffix_bytes
    return Segment(part, start, length, crc)


def joined_layout(output: OutputFormat, parts: Sequence[PartRecord]) -> Layout | None:
    """All parts as one file; None when the format does not join."""
    return _joined_layout(output, tuple(parts))


@lru_cache(maxsize=64)
def _joined_layout(output: OutputFormat, parts: tuple[PartRecord, ...]) -> Layout | None:
    # Joining checksums costs some 50 microseconds a part, and a download asks each time.
    if len(parts) == 1:
        return part_layout(parts[0])
    if not output.joinable:
        return None
    final = len(parts) - 1
    segments = tuple(
        joined_segment(part, first=index == 0, last=index == final)
        for index, part in enumerate(parts)
    )
    crc = 0
    for segment in segments:
        crc = crc32c_combine(crc, segment.crc32c, segment.length)
    return Layout(segments, sum(segment.length for segment in segments), crc, b"")


def file_stem(job: Job) -> str:
    """The start of the job's file names. It holds nothing that could break a header or
    a path, whatever the dataset is called."""
    return _stem(job.spec, job.job_id)


def _stem(spec: ExportSpec, job_id: str) -> str:
    dataset = _UNSAFE.sub("_", spec.dataset).strip("._-")[:64] or "export"
    return f"{dataset}-{job_id}"


def part_file_name(job: Job, index: int) -> str:
    """The name of one part as a file."""
    return f"{file_stem(job)}.part-{index:05d}.{job.spec.output.extension}"


def delivered_file_name(job: Job, shard: int, sequence: int) -> str:
    """The name of one part of the job as it stands; see `delivered_name`."""
    return delivered_name(job.spec, job.job_id, job.generation, shard, sequence)


def delivered_name(
    spec: ExportSpec, job_id: str, generation: int, shard: int, sequence: int
) -> str:
    """The name of one part where it is delivered. Its index is not known while the job
    runs, so it is named by its place; and one of a generation that was begun anew never
    stands in for one of the first."""
    made = f"-g{generation}" if generation > 1 else ""
    place = f"{shard:05d}-{sequence:05d}"
    return f"{_stem(spec, job_id)}{made}.part-{place}.{spec.output.extension}"


def error_part_file_name(job: Job, index: int) -> str:
    """The name of one error part as a file."""
    return f"{file_stem(job)}.errors-{index:05d}.{ERROR_OUTPUT.extension}"


def file_name(job: Job) -> str:
    """The name of the joined file."""
    return f"{file_stem(job)}.{job.spec.output.extension}"


def content_disposition(name: str) -> str:
    """A `Content-Disposition` header for a name made here (RFC 6266)."""
    return f'attachment; filename="{name}"'
