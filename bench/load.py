"""Load for a server, in a process of its own: `python -m bench.load KIND ADDRESS ...`.

    export ADDRESS                          one export after the other, until it is ended
    download ADDRESS JOB                    one download after the other, until it is ended
    small ADDRESS ROWS JOBS CALLERS         small exports from creation to their file
    unary ADDRESS CALLS CALLERS REQUEST...  GetJob, the requests in hex, in turns

The last two tell as one JSON object how long all of it took, and each of it, in seconds.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path

import grpc

import exportd
from exportd.v1 import export_service_pb2 as pb
from exportd.v1 import export_service_pb2_grpc

GET_JOB = "/exportd.v1.ExportService/GetJob"
MEMORY = Path("/dev/shm")  # noqa: S108 - a directory of our own is made in it
_WARM_UP = 100


def export(address: str) -> None:
    """Export again and again."""
    with exportd.Client(address) as client:
        while True:
            job = client.export("token_transfers", format="csv", ttl=timedelta(minutes=1))
            job.wait(timeout=600)
            job.delete()


def download(address: str, job_id: str) -> None:
    """Download a job again and again."""
    with grpc.insecure_channel(address) as channel:
        stub = export_service_pb2_grpc.ExportServiceStub(channel)
        while True:
            for _ in stub.StreamDownload(pb.StreamDownloadRequest(job_id=job_id)):
                pass


async def small(address: str, rows: str, jobs: str, callers: str) -> None:
    """Export and download so many small jobs."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
        async with exportd.AsyncClient(address) as client:

            async def one(number: int) -> None:
                job = await client.export("token_transfers", format="csv", limit=int(rows))
                manifest = (await job.wait()).manifest
                done = await job.download(Path(directory) / str(number))
                assert manifest is not None
                assert (manifest.rows, manifest.size) == (int(rows), done.size)

            await _timed(one, int(jobs), int(callers))


async def unary(address: str, calls: str, callers: str, *requests: str) -> None:
    """Call GetJob so many times. The answers are not read: that is the client's work."""
    wires = [*map(bytes.fromhex, requests)]
    async with grpc.aio.insecure_channel(address) as channel:
        method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            GET_JOB
        )

        async def one(number: int) -> None:
            await method(wires[number % len(wires)])

        for number in range(_WARM_UP):
            await one(number)
        await _timed(one, int(calls), int(callers))


async def _timed(one: Callable[[int], Awaitable[None]], many: int, callers: int) -> None:
    """Do it so many times, by so many at once, and tell."""
    numbers = iter(range(many))
    times: list[float] = []

    async def caller() -> None:
        for number in numbers:
            begun = time.perf_counter()
            await one(number)
            times.append(time.perf_counter() - begun)

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "times": times}))


def main() -> None:
    """Do what was asked for."""
    kind, *arguments = sys.argv[1:]
    if kind == "export":
        export(*arguments)
    elif kind == "download":
        download(*arguments)
    elif kind == "small":
        asyncio.run(small(*arguments))
    else:
        asyncio.run(unary(*arguments))


if __name__ == "__main__":
    main()
