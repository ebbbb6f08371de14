"""Peak memory of the server over the size of the export.

Each figure is a server of its own that exports token transfers once and then serves the
result to one reader that takes it as fast as it comes and one that takes nothing.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import grpc

import exportd
from bench.machine import CACHE, sample_data, server
from bench.report import Result, smaller_is_better
from exportd.v1 import export_service_pb2 as pb
from exportd.v1 import export_service_pb2_grpc

SMALL, LARGE = 1_000_000, 20_000_000
GOAL_MIB = 350


def results() -> Iterator[Result]:
    """Measure."""
    formats: tuple[Literal["csv", "parquet"], ...] = ("csv", "parquet")
    for fmt in formats:
        small = peak(SMALL, fmt)
        yield Result(
            f"peak memory, {fmt}, {SMALL:,} rows", small, "MiB", goal=f"< {GOAL_MIB}"
        )
        large = peak(LARGE, fmt)
        yield smaller_is_better(
            f"peak memory, {fmt}, {LARGE:,} rows",
            large,
            "MiB",
            peer=f"{SMALL:,} rows",
            peer_value=small,
            goal=f"< {GOAL_MIB}",
        )


def peak(rows: int, fmt: Literal["csv", "parquet"]) -> float:
    """Peak resident memory of one server, in MiB."""
    catalogue = sample_data(rows)
    with (
        tempfile.TemporaryDirectory(dir=CACHE) as data,
        server(Path(data), catalogue) as measured,
    ):
        with exportd.Client(measured.address) as client:
            job = client.export("token_transfers", format=fmt)
            job.wait(timeout=600)
        with grpc.insecure_channel(measured.address) as channel:
            stub = export_service_pb2_grpc.ExportServiceStub(channel)
            parts = len(stub.GetJob(pb.GetJobRequest(job_id=job.id)).job.manifest.parts)
            indices = [None] if fmt == "csv" else list(range(parts))
            stalled = stub.StreamDownload(
                pb.StreamDownloadRequest(job_id=job.id, part_index=indices[0])
            )
            next(stalled)
            reader = threading.Thread(target=_read, args=(stub, job.id, indices))
            reader.start()
            reader.join()
            stalled.cancel()
        return measured.memory_mib()


def _read(
    stub: export_service_pb2_grpc.ExportServiceStub, job_id: str, indices: list[int | None]
) -> None:
    for index in indices:
        for _ in stub.StreamDownload(
            pb.StreamDownloadRequest(job_id=job_id, part_index=index)
        ):
            pass
