"""`python -m tests.security.stalled --readers 200 --idle 200`: what a server process pays
for readers that take nothing and connections that do nothing, and whether others notice.

A third of the readers leaves the HTTP/2 window shut, a third opens it wide and does not
read the socket, and a third does the latter over HTTP.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import struct
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import grpc

from exportd.v1 import export_service_pb2 as pb
from exportd.v1 import export_service_pb2_grpc
from tests.support.http2 import DATA, END_STREAM, SETTINGS, WINDOW_UPDATE, connected
from tests.support.rpc import export
from tests.support.samples import write_samples
from tests.support.server import Process, server_process

_MIB = 2**20
_DOWNLOAD = "/exportd.v1.ExportService/StreamDownload"
_WIDE = 2**31 - 1
_WIDER = _WIDE - 65_535


@dataclass(frozen=True)
class Figures:
    """What was measured. Memory in MiB, times in milliseconds."""

    readers: int
    idle: int
    before: float
    with_readers: float
    per_reader: float
    get_job_p50: float
    get_job_p99: float
    output: float


def _resident(server: Process) -> float:
    for line in Path(f"/proc/{server.process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("the server is not there any more")


async def _settled(server: Process) -> float:
    """The memory once it has stopped to grow."""
    before, quiet = _resident(server), 0
    while quiet < 3:
        await asyncio.sleep(0.3)
        now = _resident(server)
        quiet = quiet + 1 if now <= before + 1 else 0
        before = now
    return before


async def _stall_grpc(
    stack: AsyncExitStack, server: Process, job_id: str, *, wide: bool
) -> None:
    connection = await stack.enter_async_context(connected(server.port))
    if wide:
        await connection.send(SETTINGS, body=struct.pack(">HI", 4, _WIDE))
        await connection.send(WINDOW_UPDATE, body=struct.pack(">I", _WIDER))
    request = pb.StreamDownloadRequest(job_id=job_id).SerializeToString()
    await connection.begin_call(1, _DOWNLOAD)
    message = b"\0" + len(request).to_bytes(4, "big") + request
    await connection.send(DATA, END_STREAM, 1, message)


async def _stall_http(stack: AsyncExitStack, url: str) -> None:
    parts = urlsplit(url)
    _, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=4096)
    stack.callback(writer.close)
    writer.write(f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode())
    await writer.drain()


async def _ask(stub: export_service_pb2_grpc.ExportServiceAsyncStub, job_id: str) -> float:
    started = time.perf_counter()
    await stub.GetJob(pb.GetJobRequest(job_id=job_id))
    return 1000 * (time.perf_counter() - started)


async def _all_under_way(
    stub: export_service_pb2_grpc.ExportServiceAsyncStub, job_id: str
) -> None:
    """Wait until one more reader is refused, because all the others are there."""
    byte = pb.StreamDownloadRequest(job_id=job_id, read_limit=1)
    while True:
        try:
            async for _ in stub.StreamDownload(byte):
                pass
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            return
        await asyncio.sleep(0.1)


def _quantile(times: Sequence[float], share: float) -> float:
    return sorted(times)[min(len(times) - 1, int(share * len(times)))]


async def measure(
    directory: Path, readers: int, idle: int, *, asks: int = 500, rows: int = 200_000
) -> Figures:
    """Run a server and measure it."""
    catalogue = write_samples(directory / "samples", rows)
    limits = {
        "EXPORTD_LIMITS__MAX_DOWNLOADS_PER_TENANT": str(readers),
        "EXPORTD_DOWNLOAD__STALL_TIMEOUT": "600",
        "EXPORTD_HTTP__LISTEN": "127.0.0.1:0",
    }
    async with AsyncExitStack() as stack:
        server = stack.enter_context(
            server_process(directory / "server", "--catalogue", str(catalogue), env=limits)
        )
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(server.address))
        stub = export_service_pb2_grpc.ExportServiceStub(channel)
        job = await export(stub, "token_transfers")
        urls = await stub.GetDownloadUrls(pb.GetDownloadUrlsRequest(job_id=job.job_id))
        for _ in range(20):
            await _ask(stub, job.job_id)
        before = await _settled(server)
        for _ in range(idle):
            await stack.enter_async_context(connected(server.port))
        for number in range(readers):
            if number % 3 == 2:
                await _stall_http(stack, urls.urls[0].url)
            else:
                await _stall_grpc(stack, server, job.job_id, wide=number % 3 == 1)
        async with asyncio.timeout(60):
            await _all_under_way(stub, job.job_id)
        after = await _settled(server)
        times = []
        for _ in range(asks):
            times.append(await _ask(stub, job.job_id))
            await asyncio.sleep(0.002)
        after = max(after, _resident(server))
        return Figures(
            readers,
            idle,
            round(before, 1),
            round(after, 1),
            round((after - before) / max(1, readers), 2),
            round(_quantile(times, 0.5), 2),
            round(_quantile(times, 0.99), 2),
            round(job.manifest.bytes / _MIB, 1),
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.security.stalled")
    parser.add_argument("--readers", type=int, default=200)
    parser.add_argument("--idle", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        figures = asyncio.run(measure(Path(directory), options.readers, options.idle))
    sys.stdout.write(json.dumps(asdict(figures), indent=2) + "\n")


if __name__ == "__main__":
    main()
