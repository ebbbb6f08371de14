"""What a chunk of a download and a GetJob may cost, counted without a clock.

Each bound is what it takes today. Whoever needs more measures first (`bench/download.py`,
`bench/unary.py`), and then raises it.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, cast
from uuid import UUID

import pytest
import sqlalchemy as sa
from crc32c import crc32c
from sqlalchemy.engine import Engine

import exportd_server
from exportd.v1 import export_service_pb2 as pb
from exportd_server.api.chunks import ChunkMemory
from exportd_server.api.download import Context, DownloadOptions, Downloads
from exportd_server.api.servicer import ExportService
from exportd_server.errors import ErrorReason, ExportdError
from exportd_server.jobs.housekeeping import part_key
from exportd_server.jobs.ledger.base import NewJob
from exportd_server.jobs.ledger.sqlite import open_sqlite_ledger
from exportd_server.jobs.ledger.statements import reading
from exportd_server.jobs.manager import JobManager, Policy
from exportd_server.jobs.model import Job
from exportd_server.jobs.readers import Readers
from exportd_server.platform.clock import SystemClock
from exportd_server.store.key import JobPrefix
from exportd_server.store.local import LocalStore
from tests.support.ledger import COLUMNS, EXPORT, World, part, shards, spec
from tests.support.lent import nothing_lent
from tests.support.samples import catalogue_of
from tests.support.sinks import no_sinks

CHUNK = 2**20
CHUNKS = 8
GROWING = 5
"""Chunks until they are as large as they become: of 64 KiB, twice that, and so on."""

CALLS_OF_A_CHUNK = 21
"""Functions and resumed coroutines of the service from one message to the next."""
CALLS_OF_A_READ = 98
"""Python functions, of libraries too, in which the ledger reads a finished job."""
CALLS_OF_A_READ_AGAIN = 13
"""The same where nothing was written since it was read."""
STATEMENTS_OF_A_READ = 2
"""The job with its tasks' sums, and its parts."""

OURS = str(Path(exportd_server.__file__).parent)


@dataclass
class Service:
    """The service without a server around it, and its only job."""

    manager: JobManager
    downloads: Downloads
    api: ExportService
    job: Job
    reads: list[str]
    """What the ledger was asked to read, by name."""


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    clock = SystemClock()
    store = LocalStore(tmp_path / "out")
    ledger = await open_sqlite_ledger(tmp_path / "ledger.db", clock)
    reads: list[str] = []
    read = ledger._database.read

    async def counted(work: Callable[[Any], Any]) -> Any:
        reads.append(work.__qualname__.split(".")[1])
        return await read(work)

    read_here = ledger._database.read_here

    def counted_here(work: Callable[[Any], Any]) -> Any:
        reads.append(work.__qualname__.split(".")[1])
        return read_here(work)

    ledger._database.read = counted  # type: ignore[method-assign]
    ledger._database.read_here = counted_here  # type: ignore[method-assign]
    world = World(ledger, cast("Any", clock), dict)
    created = await world.create()
    lease = await world.lease(EXPORT)
    lease = await ledger.record_plan(lease, shards(1), COLUMNS, estimated_rows=None)
    data = bytes(range(256)) * (CHUNK // 256 * CHUNKS)
    record = replace(
        part(lease),
        bytes=len(data),
        crc32c=crc32c(data),
        prefix_bytes=0,
        prefix_crc32c=0,
        suffix_crc32c=0,
        body_crc32c=crc32c(data),
    )
    key = part_key(JobPrefix(created.tenant, created.job_id), record)

    def write() -> None:
        writer = store.create(key)
        writer.write(data)
        writer.finalize()

    await asyncio.to_thread(write)
    await ledger.add_part(lease, record)
    assert await ledger.complete_shard(lease)
    readers = Readers(ledger)
    manager = JobManager(ledger, catalogue_of(), Policy(), readers, no_sinks())
    downloads = Downloads(manager, store, readers, DownloadOptions(ChunkMemory(most=CHUNK)))
    api = ExportService(
        manager,
        downloads,
        cast("Any", None),
        tenant=lambda _: created.tenant,
        fingerprints=cast("Any", None),
    )
    job = await world.job(created)
    reads.clear()
    yield Service(manager, downloads, api, job, reads)
    await readers.close()
    await ledger.close()
    await store.close()


@dataclass
class Taker:
    """Takes messages at once, and calls `between` after each of them."""

    between: Callable[[], None]
    sizes: list[int] = field(default_factory=list)

    async def send_initial_metadata(self, metadata: Sequence[tuple[str, str]]) -> None:
        assert not metadata

    async def write(self, message: bytes) -> None:
        self.sizes.append(len(message))
        self.between()


async def _download(service: Service, between: Callable[[], None]) -> None:
    taker = Taker(between)
    request = pb.StreamDownloadRequest(job_id=service.job.job_id)
    await service.downloads.stream(service.job.tenant, request, cast("Context", taker))
    assert sum(taker.sizes) > CHUNK * CHUNKS
    assert max(taker.sizes) < CHUNK + 100


@contextmanager
def _counting(counts: Callable[[FrameType], bool]) -> Iterator[list[int]]:
    """Counts Python functions that are called, and coroutines that go on."""
    count = [0]
    # What it finds may call functions, and no bound knows when it comes by.
    gc.disable()

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and counts(frame):
            count[0] += 1

    sys.setprofile(profile)
    try:
        yield count
    finally:
        sys.setprofile(None)
        gc.enable()


def _is_ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(OURS)


@pytest.fixture
def page_cache_tells(tmp_path: Path) -> None:
    """Of a file system that cannot tell what the page cache holds, each chunk is read in
    a thread, and that is as it should be."""
    (tmp_path / "probe").write_bytes(b"probe")
    with (tmp_path / "probe").open("rb") as file:
        try:
            os.preadv(file.fileno(), [bytearray(5)], 0, os.RWF_NOWAIT)
        except OSError as error:
            pytest.skip(f"the file system of {tmp_path}: {error.strerror}")


@pytest.mark.usefixtures("page_cache_tells")
async def test_a_chunk_takes_no_more_calls_than_it_needs(service: Service) -> None:
    each: list[int] = []
    with _counting(_is_ours) as count:

        def between() -> None:
            each.append(count[0])
            count[0] = 0

        await _download(service, between)
    full = each[1 + GROWING : -1]
    assert len(full) >= CHUNKS // 2
    assert max(full) <= CALLS_OF_A_CHUNK, full


async def test_a_chunk_is_read_into_its_message_and_copied_nowhere(
    service: Service,
) -> None:
    each: list[int] = []
    before = [0]
    tracemalloc.start()
    try:

        def between() -> None:
            _, peak = tracemalloc.get_traced_memory()
            each.append(peak - before[0])
            tracemalloc.reset_peak()
            before[0], _ = tracemalloc.get_traced_memory()

        await _download(service, between)
    finally:
        tracemalloc.stop()
    # The message before is gone by the time that the next one is read into its memory;
    # once it takes new memory, as the offset in the head takes a byte more.
    assert each[-2] < CHUNK // 64, each
    assert sorted(each[1 + GROWING : -1])[-2] < CHUNK // 64, each


async def test_a_download_that_fails_leaves_nothing_lent_in_its_error(
    service: Service, tmp_path: Path
) -> None:
    (path,) = (
        path for path in (tmp_path / "out").rglob("*") if path.stat().st_size > CHUNK
    )
    os.truncate(path, CHUNK * 3)
    with nothing_lent():
        with pytest.raises(ExportdError) as failed:
            await _download(service, lambda: None)
        assert failed.value.reason is ErrorReason.CHECKSUM_MISMATCH


@pytest.mark.usefixtures("page_cache_tells")
async def test_a_download_waits_for_nothing_but_its_reader(service: Service) -> None:
    """What the page cache holds is read at once, and what is taken at once is followed
    by the next: no turn of the event loop in between."""
    loop = asyncio.get_running_loop()
    turns: list[int] = []

    def between() -> None:
        number = len(turns)
        turns.append(0)

        def turned() -> None:
            if len(turns) > number + 1:
                return
            turns[number] += 1
            loop.call_soon(turned)

        loop.call_soon(turned)

    await _download(service, between)
    assert not any(turns[1:-1]), turns


async def test_calls_for_a_job_read_the_ledger_once_until_something_is_written(
    service: Service,
) -> None:
    request = pb.GetJobRequest(job_id=service.job.job_id)
    ledger: Any = service.manager._ledger
    await ledger.create_job(NewJob(str(UUID(int=1)), service.job.tenant, spec()))
    for _ in range(3):
        await service.api.GetJob(request, None)
    assert service.reads == ["get_job"]
    with _counting(lambda _: True) as count:
        await ledger.get_job(service.job.tenant, service.job.job_id)
    assert count[0] <= CALLS_OF_A_READ_AGAIN, count[0]


async def test_a_finished_job_is_read_with_few_statements_that_are_built_already(
    service: Service,
) -> None:
    database = service.manager._ledger._database  # type: ignore[attr-defined]

    def read() -> Job | None:
        job: Job | None = database._read(
            lambda tx: reading.get_job(tx, service.job.tenant, service.job.job_id)
        )
        return job

    read()  # a connection, and what is kept of statements
    texts: list[str] = []
    by_the_library: list[str] = []

    def note(*arguments: Any) -> None:
        by_the_library.append(arguments[2])

    (connection,) = database._reading
    connection.connection.driver_connection.set_trace_callback(texts.append)
    sa.event.listen(Engine, "before_cursor_execute", note)
    try:
        assert read() is not None
    finally:
        sa.event.remove(Engine, "before_cursor_execute", note)
    assert [text.split()[0] for text in texts] == [
        "BEGIN",
        *STATEMENTS_OF_A_READ * ["SELECT"],
        "COMMIT",
    ]
    assert not by_the_library
    with _counting(lambda _: True) as count:
        read()
    assert count[0] <= CALLS_OF_A_READ, count[0]
