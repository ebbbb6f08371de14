"""`python -m tests.security.stalled --readers 200 --idle 200`: what a server process pays
for readers that take nothing and connections that do nothing, and whether others notice.

A third of the readers leaves the HTTP/2 window shut, a third opens it wide and does not
read the socket, and a third does the latter over HTTP.

Ends with 1 when the server has more than 500 MiB, or another caller's GetJob takes longer
than 100 ms (p99). On a machine that is busy with other work the latter would judge that
work: so the same calls are made before anybody stalls, and where they take longer than
25 ms already, four times what they took is the bound, which is said then.
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
from tests.support.http2 import (
    DATA,
    END_STREAM,
    HEADERS,
    SETTINGS,
    WINDOW_UPDATE,
    connected,
)
from tests.support.rpc import export
from tests.support.samples import write_samples
from tests.support.server import Process, server_process

_MIB = 2**20
_DOWNLOAD = "/exportd.v1.ExportService/StreamDownload"
_WIDE = 2**31 - 1
_WIDER = _WIDE - 65_535
MOST_MEMORY = 500.0
"""MiB of the server with all readers there."""
MOST_MILLISECONDS = 100.0
"""p99 of GetJob meanwhile."""
SLOWER = 4.0
"""Times that GetJob may take what it takes without readers, on a machine that is busy."""


@dataclass(frozen=True)
class Figures:
    """What was measured. Memory in MiB, times in milliseconds."""

    readers: int
    idle: int
    before: float
    with_readers: float
    per_reader: float
    idle_p50: float
    idle_p99: float
    """GetJob before anybody stalls."""
    get_job_p50: float
    get_job_p99: float
    output: float

    @property
    def bound(self) -> float:
        """Milliseconds that GetJob may take."""
        return max(MOST_MILLISECONDS, SLOWER * self.idle_p99)

    def breaches(self) -> list[str]:
        """What is wrong."""
        wrong = []
        if self.with_readers > MOST_MEMORY:
            wrong.append(f"{self.with_readers} MiB, more than {MOST_MEMORY:g}")
        if self.get_job_p99 > self.bound:
            wrong.append(f"p99 of GetJob {self.get_job_p99} ms, more than {self.bound:g}")
        return wrong


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
    while (frame := await connection.frame()).kind != HEADERS or frame.stream != 1:
        pass
    # Its end would be the first thing that comes of one that is refused.
    assert not frame.flags & END_STREAM, "not under way"


async def _stall_http(stack: AsyncExitStack, url: str) -> None:
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=4096)
    stack.callback(writer.close)
    writer.write(f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode())
    await writer.drain()
    assert b" 200 " in await reader.readuntil(b"\r\n"), "not under way"


async def _ask(stub: export_service_pb2_grpc.ExportServiceAsyncStub, job_id: str) -> float:
    started = time.perf_counter()
    await stub.GetJob(pb.GetJobRequest(job_id=job_id))
    return 1000 * (time.perf_counter() - started)


async def _asked(
    stub: export_service_pb2_grpc.ExportServiceAsyncStub, job_id: str, times: int
) -> list[float]:
    taken = []
    for _ in range(times):
        taken.append(await _ask(stub, job_id))
        await asyncio.sleep(0.002)
    return taken


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
        idle_times = await _asked(stub, job.job_id, asks)
        before = await _settled(server)
        for _ in range(idle):
            await stack.enter_async_context(connected(server.port))
        for number in range(readers):
            if number % 3 == 2:
                await _stall_http(stack, urls.urls[0].url)
            else:
                await _stall_grpc(stack, server, job.job_id, wide=number % 3 == 1)
        after = await _settled(server)
        times = await _asked(stub, job.job_id, asks)
        after = max(after, _resident(server))
        return Figures(
            readers,
            idle,
            round(before, 1),
            round(after, 1),
            round((after - before) / max(1, readers), 2),
            round(_quantile(idle_times, 0.5), 2),
            round(_quantile(idle_times, 0.99), 2),
            round(_quantile(times, 0.5), 2),
            round(_quantile(times, 0.99), 2),
            round(job.manifest.bytes / _MIB, 1),
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and judge; 1 when something was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.security.stalled")
    parser.add_argument("--readers", type=int, default=200)
    parser.add_argument("--idle", type=int, default=200)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        figures = asyncio.run(measure(Path(directory), options.readers, options.idle))
    sys.stdout.write(json.dumps(asdict(figures), indent=2) + "\n")
    if figures.bound > MOST_MILLISECONDS:
        sys.stdout.write(
            f"the machine is busy: GetJob took {figures.idle_p99} ms (p99) before anybody "
            f"stalled, so {figures.bound:g} ms are allowed instead of "
            f"{MOST_MILLISECONDS:g}\n"
        )
    wrong = figures.breaches()
    sys.stdout.writelines(f"WRONG {each}\n" for each in wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
