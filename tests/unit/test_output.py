"""Parts become files: safe names, and one joined file whose checksum is known."""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime

from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from exportd_server.encoders.base import Compression, Format, OutputFormat
from exportd_server.jobs.model import ExportSpec, Job, JobState, PartRecord
from exportd_server.jobs.output import (
    content_disposition,
    file_name,
    joined_layout,
    part_file_name,
    part_layout,
)

CSV = OutputFormat(Format.CSV)


def job(dataset: str, output: OutputFormat = CSV) -> Job:
    return Job(
        job_id="01890a5d-ac96-774b-bcce-b302099a8057",
        tenant="default",
        state=JobState.SUCCEEDED,
        spec=ExportSpec(dataset, output),
        request_id="",
        create_time=datetime.now(UTC),
    )


def part(prefix: bytes, body: bytes, suffix: bytes, sequence: int) -> PartRecord:
    whole = prefix + body + suffix
    return PartRecord(
        shard=0,
        sequence=sequence,
        token=1,
        rows=1,
        bytes=len(whole),
        prefix_bytes=len(prefix),
        suffix_bytes=len(suffix),
        crc32c=crc32c(whole),
        prefix_crc32c=crc32c(prefix),
        body_crc32c=crc32c(body),
        suffix_crc32c=crc32c(suffix),
        sha256=hashlib.sha256(whole).digest(),
    )


@given(dataset=st.text(max_size=200), compression=st.sampled_from(Compression))
def test_no_name_can_break_a_header_or_a_path(
    dataset: str, compression: Compression
) -> None:
    made = job(dataset, OutputFormat(Format.CSV, compression))
    for name in (file_name(made), part_file_name(made, 3)):
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}", name)
        assert content_disposition(name) == f'attachment; filename="{name}"'


def test_the_name_tells_dataset_job_format_and_compression() -> None:
    made = job("orders", OutputFormat(Format.JSONL, Compression.GZIP))
    assert file_name(made) == f"orders-{made.job_id}.jsonl.gz"
    assert part_file_name(made, 12) == f"orders-{made.job_id}.part-00012.jsonl.gz"


@given(
    prefix=st.binary(max_size=20),
    bodies=st.lists(st.binary(max_size=40), min_size=1, max_size=6),
    suffix=st.binary(max_size=10),
)
def test_the_joined_file_has_one_prefix_all_bodies_and_one_suffix(
    prefix: bytes, bodies: list[bytes], suffix: bytes
) -> None:
    files = [prefix + body + suffix for body in bodies]
    parts = [part(prefix, body, suffix, n) for n, body in enumerate(bodies)]
    layout = joined_layout(CSV, parts)
    assert layout is not None
    joined = b"".join(
        files[segment.part.sequence][segment.start : segment.start + segment.length]
        for segment in layout.segments
    )
    assert joined == prefix + b"".join(bodies) + suffix
    assert layout.bytes == len(joined)
    assert layout.crc32c == crc32c(joined)
    for segment in layout.segments:
        data = files[segment.part.sequence]
        assert segment.crc32c == crc32c(
            data[segment.start : segment.start + segment.length]
        )
    expected = hashlib.sha256(joined).digest() if len(bodies) == 1 else b""
    assert layout.sha256 == expected


def test_several_parquet_parts_do_not_join_and_one_does() -> None:
    parts = [part(b"", b"PAR1", b"", n) for n in range(2)]
    assert joined_layout(OutputFormat(Format.PARQUET), parts) is None
    assert joined_layout(OutputFormat(Format.PARQUET), parts[:1]) == part_layout(parts[0])
