"""How long a GetJob takes while the server works as hard as it can.

One export after the other and one download after the other run at full speed in other
processes' stead; the peer is the same server when it is idle.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import grpc

import exportd
from bench.machine import CACHE, sample_data, server
from bench.report import Result, smaller_is_better
from exportd.v1 import export_service_pb2 as pb
from exportd.v1 import export_service_pb2_grpc

CALLS = 1000
GOAL_MS = 50


def results() -> Iterator[Result]:
    """Measure."""
    catalogue = sample_data(1_000_000)
    with (
        tempfile.TemporaryDirectory(dir=CACHE) as data,
        server(Path(data), catalogue) as measured,
    ):
        with exportd.Client(measured.address) as client:
            job = client.export("token_transfers", format="csv")
            job.wait(timeout=600)
        idle = _get_job_times(measured.address, job.id)
        load = [
            subprocess.Popen([sys.executable, "-m", "bench.load", *arguments])
            for arguments in (
                ("export", measured.address),
                ("download", measured.address, job.id),
            )
        ]
        try:
            time.sleep(2)  # the load is under way
            busy = _get_job_times(measured.address, job.id)
        finally:
            for process in load:
                process.terminate()
                process.wait()
    for name, index in (("p50", CALLS // 2), ("p99", CALLS * 99 // 100)):
        yield smaller_is_better(
            f"GetJob beside an export and a download, {name}",
            busy[index],
            "ms",
            peer="idle",
            peer_value=idle[index],
            goal=f"< {GOAL_MS}" if name == "p99" else "",
        )


def _get_job_times(address: str, job_id: str) -> list[float]:
    """Sorted times of calls, in milliseconds, one every few milliseconds."""
    times = []
    with grpc.insecure_channel(address) as channel:
        stub = export_service_pb2_grpc.ExportServiceStub(channel)
        for _ in range(CALLS):
            started = time.perf_counter()
            stub.GetJob(pb.GetJobRequest(job_id=job_id))
            times.append(1000 * (time.perf_counter() - started))
            time.sleep(0.005)
    return sorted(times)
