"""One object through the store's own adapter, in a process of its own: `python -m
bench.store_run upload|download OPTIONS PATH`."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bench.contest import peak_mib
from exportd_server.platform.malloc import keep_large_buffers
from exportd_server.store.key import JobPrefix, OutputKey, OutputKind
from exportd_server.store.s3 import S3Store
from exportd_server.store.s3_client import S3Options

BLOCK = 2**20
"""Bytes read or written at a time."""
KEY = OutputKey(
    JobPrefix("bench", "01890000-0000-7000-8000-000000000001"), OutputKind.OUTPUT, 0, 0, 1
)
OBJECT = str(KEY)


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """Where the object lies; what both sides are told."""

    bucket: str
    prefix: str
    endpoint_url: str
    region: str
    access_key_id: str
    secret_access_key: str

    def text(self) -> str:
        """For the command line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def read(cls, text: str) -> Options:
        """From the command line."""
        return cls(**json.loads(text))


@contextlib.contextmanager
def timed() -> Iterator[None]:
    """Measure what is done meanwhile, once connected, and print it as a line of JSON:
    seconds, CPU seconds and the process's peak memory in MiB."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    started = time.perf_counter()
    yield
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    # Not what rusage tells: that begins with the memory of whoever started the process.
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": peak_mib(os.getpid())}))


def main() -> None:
    """Do it once."""
    keep_large_buffers()  # as the server does
    what, options, path = sys.argv[1], Options.read(sys.argv[2]), Path(sys.argv[3])
    work = {"upload": upload, "download": download}[what]
    asyncio.run(work(S3Options(**dataclasses.asdict(options), path_style=True), path))


async def upload(options: S3Options, path: Path) -> None:
    """Write a part, as a pipeline's thread does."""
    store = await S3Store.connect(options)

    def write() -> None:
        buffer = memoryview(bytearray(BLOCK))
        with path.open("rb", buffering=0) as data:
            writer = store.create(KEY)
            while count := data.readinto(buffer):
                writer.write(buffer[:count])
            writer.finalize()

    try:
        with timed():
            await asyncio.to_thread(write)
    finally:
        await store.close()


async def download(options: S3Options, path: Path) -> None:
    """Read a part, as a download does."""
    store = await S3Store.connect(options)
    buffer = memoryview(bytearray(BLOCK))
    try:
        with path.open("wb", buffering=0) as file, timed():
            reader = await store.open(KEY)
            while count := await reader.readinto(buffer):
                file.write(buffer[:count])
            await reader.close()
    finally:
        await store.close()


if __name__ == "__main__":
    main()
