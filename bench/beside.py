"""How long a GetJob takes while the server works as hard as it can: beside one download
after the other, and beside one export after the other, which run at full speed on behalf
of other processes. The peer is the same server when it is idle."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import grpc

import exportd
from bench.contest import ROUNDS
from bench.machine import CACHE, sample_data, scaled, server
from bench.report import Result, smaller_is_better
from exportd.v1 import export_service_pb2 as pb
from exportd.v1 import export_service_pb2_grpc

CALLS = 500
"""In each round."""
GOAL = 3
"""Times what the slowest of a hundred calls takes of an idle server."""
_WARM_UP_SECONDS = 2.0


def results() -> Iterator[Result]:
    """Measure in turns, so that what the machine does meanwhile falls on each alike."""
    catalogue = sample_data(scaled(1_000_000))
    with (
        tempfile.TemporaryDirectory(dir=CACHE) as data,
        server(Path(data), catalogue) as measured,
    ):
        with exportd.Client(measured.address) as client:
            job = client.export("token_transfers", format="csv")
            job.wait(timeout=600)
        loads: dict[str, tuple[str, ...]] = {
            "idle": (),
            "a download": ("download", measured.address, job.id),
            "an export": ("export", measured.address),
        }
        times: dict[str, list[float]] = {name: [] for name in loads}
        for number in range(ROUNDS + 1):
            for name, arguments in loads.items():
                with _load(arguments):
                    taken = _get_job_times(measured.address, job.id, scaled(CALLS))
                if number:  # the first fills caches
                    times[name] += taken
    for each in times.values():
        each.sort()
    idle = times.pop("idle")
    for name, busy in times.items():
        for percent in (50, 99):
            at = len(idle) * percent // 100
            yield smaller_is_better(
                f"GetJob beside {name}, p{percent}",
                busy[at],
                "ms",
                peer="idle",
                peer_value=idle[at],
                goal=f"ratio >= {1 / GOAL:.2f}" if percent == 99 else "",
            )


@contextlib.contextmanager
def _load(arguments: tuple[str, ...]) -> Iterator[None]:
    if not arguments:
        yield
        return
    process = subprocess.Popen([sys.executable, "-m", "bench.load", *arguments])
    try:
        time.sleep(_WARM_UP_SECONDS)
        yield
        assert process.poll() is None, "the load ended by itself"
    finally:
        process.terminate()
        process.wait()


def _get_job_times(address: str, job_id: str, calls: int) -> list[float]:
    """Times of calls, in milliseconds, one every few milliseconds."""
    times = []
    with grpc.insecure_channel(address) as channel:
        stub = export_service_pb2_grpc.ExportServiceStub(channel)
        request = pb.GetJobRequest(job_id=job_id)
        stub.GetJob(request)  # connects
        for _ in range(calls):
            started = time.perf_counter()
            stub.GetJob(request)
            times.append(1000 * (time.perf_counter() - started))
            time.sleep(0.005)
    return times
