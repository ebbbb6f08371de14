"""A real server over a real socket, for tests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from exportd.v1 import export_service_pb2_grpc
from exportd_server.app import Running, serving
from exportd_server.settings import Settings
from exportd_server.sinks.registry import SinkTypes
from exportd_server.sources.catalogue import Catalogue
from tests.support.waits import ENOUGH

ROOT = Path(__file__).resolve().parents[2]


def settings(data_dir: Path, **values: Any) -> Settings:
    """Settings of a test server: a port of the system's choice."""
    return Settings(listen="127.0.0.1:0", data_dir=data_dir, **values)


@dataclass
class Server:
    """A server in this process, and a stub that talks to it over loopback."""

    running: Running
    channel: grpc.aio.Channel
    stub: export_service_pb2_grpc.ExportServiceAsyncStub
    data_dir: Path

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.running.port}"

    def files(self) -> list[Path]:
        """Every file of the output store but the one that tells whose it is."""
        # Unlike a glob, a walk does not mind what is deleted meanwhile.
        found = os.walk(self.data_dir / "outputs")
        files = (Path(folder, name) for folder, _, names in found for name in names)
        return sorted(file for file in files if file.name != ".owner")


@contextlib.asynccontextmanager
async def serve(
    options: Settings,
    catalogue: Catalogue | None = None,
    sink_types: SinkTypes | None = None,
    *,
    credentials: grpc.ChannelCredentials | None = None,
) -> AsyncIterator[Server]:
    """Run a server in this process; with credentials, it is called as `localhost`."""
    async with serving(options, catalogue=catalogue, sink_types=sink_types) as running:
        limit = (("grpc.max_receive_message_length", 8 * 2**20),)
        async with (
            grpc.aio.insecure_channel(f"127.0.0.1:{running.port}", options=limit)
            if credentials is None
            else grpc.aio.secure_channel(
                f"localhost:{running.port}", credentials, options=limit
            )
        ) as channel:
            stub = export_service_pb2_grpc.ExportServiceStub(channel)
            yield Server(running, channel, stub, options.data_dir)


@dataclass
class Process:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    port: int
    log: Path

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        self.process.wait()

    def terminate(self) -> int:
        """End it as an operator would; returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(ENOUGH)


@contextlib.contextmanager
def server_process(
    data_dir: Path, *arguments: str, env: dict[str, str] | None = None
) -> Iterator[Process]:
    """Run `exportd-server serve` until it listens, and end it after."""
    data_dir.mkdir(parents=True, exist_ok=True)
    log = data_dir / f"server-{len(list(data_dir.glob('server-*.log')))}.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "exportd_server", "serve"),
                *("--listen", "127.0.0.1:0", "--data-dir", str(data_dir), *arguments),
            ],
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            env={**os.environ, **(env or {})},
            cwd=ROOT,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"the server did not start: {log.read_text()[-2000:]}"
        yield Process(process, int(line.rsplit(":", 1)[1]), log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


async def until(condition: Callable[[], object], timeout: float = ENOUGH) -> None:
    """Wait until `condition()` holds; fails after `timeout` seconds."""
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.01)
