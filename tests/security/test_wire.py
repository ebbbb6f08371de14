"""Bytes that no library would send end no server, and tell its log no secrets."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.http2 import DATA, END_STREAM, HEADERS, Connection, connected
from tests.support.server import Process, server_process
from tests.support.waits import ENOUGH

GET_JOB = "/exportd.v1.ExportService/GetJob"


async def healthy(server: Process) -> bool:
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=ENOUGH)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def ended(connection: Connection) -> bytes:
    """The headers that end the call of stream 1."""
    async with asyncio.timeout(ENOUGH):
        while True:
            frame = await connection.frame()
            if frame.stream == 1 and frame.kind == HEADERS and frame.flags & END_STREAM:
                return frame.body


async def test_a_path_that_is_no_text_names_a_method_that_nobody_serves(
    tmp_path: Path,
) -> None:
    paths = (b"/\xff", b"\xff", b"/exportd.v1.ExportService/Get\xc3", b"/\xed\xa0\x80/x")
    with server_process(tmp_path, "--sample-rows", "1000") as server:
        for path in 3 * paths:
            async with connected(server.port) as connection:
                await connection.begin_call(1, path)
                await connection.send(DATA, END_STREAM, 1, bytes(5))
                # 12 is UNIMPLEMENTED.
                assert b"grpc-status\x0212" in await ended(connection)
        assert await healthy(server)
        assert await asyncio.to_thread(server.terminate) == 0
        assert '"error"' not in server.log.read_text()


async def test_metadata_that_is_no_text_is_not_logged(tmp_path: Path) -> None:
    with server_process(tmp_path, "--sample-rows", "1000") as server:
        for name in ("authorization", "x-note", "traceparent", "tracestate"):
            async with connected(server.port) as connection:
                value = b"Bearer canary-\xff\xfe"
                await connection.begin_call(1, GET_JOB, {name: value})
                await connection.send(DATA, END_STREAM, 1, bytes(5))
                await ended(connection)
        assert await healthy(server)
        assert await asyncio.to_thread(server.terminate) == 0
        text = server.log.read_text()
    assert "canary" not in text
    assert '"error"' not in text


async def test_a_process_whose_server_the_library_has_ended_ends_as_failed(
    tmp_path: Path,
) -> None:
    """So that whoever watches over it starts it anew."""
    # Without the mend, what a path does to the library is to end its server.
    unmended = (
        "import exportd_server.api.accepting as a; a.accept_any_path = lambda: None; "
        "from exportd_server.cli import main; main()"
    )
    command = [
        *(sys.executable, "-c", unmended, "serve", "--listen", "127.0.0.1:0"),
        *("--data-dir", str(tmp_path), "--sample-rows", "1000"),
    ]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), ENOUGH)
        async with connected(int(line.rsplit(b":", 1)[1])) as connection:
            await connection.begin_call(1, b"/\xff")
            # The call, which nobody answers, stays open.
            _, text = await asyncio.wait_for(process.communicate(), ENOUGH)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    # The library may crash as it ends its server.
    assert process.returncode in {1, -6, -11}
    if process.returncode == 1:
        assert b"the gRPC server has ended by itself" in text
