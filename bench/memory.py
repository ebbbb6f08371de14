"""Peak resident memory of the server: over the size of an export, over the number of
downloads, and when exports come one after the other and together.

Each figure is a server of its own, with the default settings. Readers take their download
as fast as it comes; where there are several, one of them takes nothing after its first
message.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import grpc

import exportd
from bench.contest import forget_peak
from bench.machine import CACHE, Measured, sample_data, scaled, server
from bench.report import Result, smaller_is_better
from exportd.v1 import export_service_pb2 as pb
from exportd.v1 import export_service_pb2_grpc

SIZES = (scaled(1_000_000), scaled(10_000_000), scaled(50_000_000))
DOWNLOADS = (1, 8, 50)
IN_A_ROW = 6
GOAL_MIB = 350
Fmt = Literal["csv", "parquet"]
FORMATS: tuple[Fmt, ...] = ("csv", "parquet")


def results() -> Iterator[Result]:
    """Measure."""
    small = SIZES[0]
    base: dict[Fmt, float] = {}
    for rows in SIZES:
        with _samples(rows, keep=rows != SIZES[-1]) as catalogue:
            for fmt in FORMATS:
                peak = _exports(catalogue, [[fmt]])
                base.setdefault(fmt, peak)
                yield smaller_is_better(
                    f"peak memory, {fmt}, {rows:,} rows",
                    peak,
                    "MiB",
                    peer=f"{small:,} rows",
                    peer_value=base[fmt],
                    goal=f"<= {GOAL_MIB}",
                )
    catalogue = sample_data(small)
    for name, batches in (
        (f"{IN_A_ROW} exports in a row", [[fmt] for fmt in FORMATS * (IN_A_ROW // 2)]),
        ("2 exports at once", [list(FORMATS)]),
    ):
        yield Result(
            f"peak memory, {name}, {small:,} rows",
            _exports(catalogue, batches),
            "MiB",
            goal=f"<= {GOAL_MIB}",
        )
    yield from _downloads(catalogue)


@contextlib.contextmanager
def _samples(rows: int, *, keep: bool) -> Iterator[Path]:
    """A catalogue of a size; what was made for it alone goes again, unless it is kept."""
    there = (CACHE / f"samples-{rows}").exists()
    catalogue = sample_data(rows)
    try:
        yield catalogue
    finally:
        if not (there or keep):
            shutil.rmtree(catalogue.parent)


@contextlib.contextmanager
def _server(catalogue: Path) -> Iterator[Measured]:
    with (
        tempfile.TemporaryDirectory(dir=CACHE) as data,
        server(Path(data), catalogue) as measured,
    ):
        yield measured


def _exports(catalogue: Path, batches: Sequence[Sequence[Fmt]]) -> float:
    """Peak of a server, in MiB, that works off one batch of exports after the other, the
    exports of a batch at once."""
    with _server(catalogue) as measured, exportd.Client(measured.address) as client:
        for batch in batches:
            jobs = [client.export("token_transfers", format=fmt) for fmt in batch]
            for job in jobs:
                manifest = job.wait(timeout=1800).manifest
                assert manifest is not None
                assert manifest.rows
                job.delete()
        return measured.memory_mib()


def _downloads(catalogue: Path) -> Iterator[Result]:
    """Of one finished export of CSV; the export's own peak is not in it."""
    for count in DOWNLOADS:
        with _server(catalogue) as measured:
            with exportd.Client(measured.address) as client:
                manifest = client.export("token_transfers", format="csv").wait().manifest
                (job,) = client.jobs()
            assert manifest is not None
            forget_peak(measured.pid)
            stalled = 1 if count > 1 else 0
            with contextlib.ExitStack() as stack:
                for _ in range(stalled):
                    channel = stack.enter_context(grpc.insecure_channel(measured.address))
                    stub = export_service_pb2_grpc.ExportServiceStub(channel)
                    stream = stub.StreamDownload(pb.StreamDownloadRequest(job_id=job.id))
                    next(stream)
                    stack.callback(stream.cancel)
                with ThreadPoolExecutor(count) as threads:
                    readers = [
                        threads.submit(_read, measured.address, job.id)
                        for _ in range(count - stalled)
                    ]
                    read = [reader.result() for reader in readers]
                peak = measured.memory_mib()
            assert read == [manifest.size] * (count - stalled)
        yield Result(
            f"peak memory, downloads at once: {count}, stalled: {stalled}",
            peak,
            "MiB",
            goal=f"<= {GOAL_MIB}",
        )


def _read(address: str, job_id: str) -> int:
    """Download over a connection of its own, and keep nothing; returns its bytes."""
    with grpc.insecure_channel(address) as channel:
        stub = export_service_pb2_grpc.ExportServiceStub(channel)
        request = pb.StreamDownloadRequest(job_id=job_id)
        return sum(len(message.data) for message in stub.StreamDownload(request))
