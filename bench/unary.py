"""GetJob beside an empty method on a bare grpc.aio server: what the service adds to what
a call costs in Python anyway. Several callers ask for as many jobs, in turns, all of which
have ended, as is polled most; they are one process, the same for both servers, which works
with bytes."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from json import loads
from pathlib import Path

import exportd
from bench.contest import Contestant, Run, beside, contest, cpu_seconds
from bench.machine import CACHE, Measured, listening, sample_data, scaled, server
from bench.report import Result, smaller_is_better
from exportd.v1 import export_service_pb2 as pb

CALLS = 4000
CALLERS = (1, 16, 64)
GOAL = 0.6
_EMPTY = "empty grpc.aio method"
_UNLIMITED = {"EXPORTD_LIMITS__REQUEST_BURST": "1000000"}
"""One caller may not send as many calls as are measured here at full speed."""


def results() -> Iterator[Result]:
    """Measure."""
    catalogue = sample_data(scaled(1_000_000))
    with (
        tempfile.TemporaryDirectory(dir=CACHE) as directory,
        server(Path(directory), catalogue, _UNLIMITED) as served,
        listening(
            [sys.executable, "-m", "bench.peers.empty"], Path(directory) / "empty.log"
        ) as empty,
    ):
        with exportd.Client(served.address) as client:
            jobs = [
                client.export("token_transfers", format="csv", limit=1000)
                for _ in range(max(CALLERS))
            ]
            for job in jobs:
                job.wait(timeout=600)
        requests = [pb.GetJobRequest(job_id=job.id).SerializeToString() for job in jobs]
        for callers in CALLERS:
            yield from _compare(served, empty, requests[:callers], callers)


def _compare(
    served: Measured, empty: Measured, requests: Sequence[bytes], callers: int
) -> Iterator[Result]:
    calls = scaled(CALLS)
    name = f"GetJob, {callers} caller{'s' if callers > 1 else ''}"
    latencies: dict[str, list[list[float]]] = {name: [], _EMPTY: []}
    runs = contest(
        {
            name: _calls(served, requests, calls, callers, latencies[name]),
            _EMPTY: _calls(empty, requests, calls, callers, latencies[_EMPTY]),
        }
    )
    yield from beside(
        name,
        runs[name],
        _EMPTY,
        runs[_EMPTY],
        amount=calls,
        unit="calls/s",
        goal=GOAL,
    )
    for percent in (50, 99):
        ours, theirs = (
            1000 * statistics.median(times[calls * percent // 100] for times in each[1:])
            for each in (latencies[name], latencies[_EMPTY])
        )
        yield smaller_is_better(
            f"{name}, p{percent}", ours, "ms", peer=_EMPTY, peer_value=theirs, goal=""
        )


def _calls(
    served: Measured,
    requests: Sequence[bytes],
    calls: int,
    callers: int,
    latencies: list[list[float]],
) -> Contestant:
    def call() -> Run:
        before = cpu_seconds(served.pid)
        done = subprocess.run(
            [
                *(sys.executable, "-m", "bench.load", "unary", served.address),
                *(str(calls), str(callers), *(each.hex() for each in requests)),
            ],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        told = loads(done.stdout)
        assert len(told["times"]) == calls
        latencies.append(sorted(told["times"]))
        return Run(told["seconds"], cpu_seconds(served.pid) - before)

    return call
