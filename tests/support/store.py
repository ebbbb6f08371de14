"""What tests of output stores, and tests that use one, have in common."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import pytest

from exportd_server.platform import files
from exportd_server.store.base import Buffer, OutputStore, PartReader
from exportd_server.store.key import JobPrefix, OutputKey, OutputKind
from exportd_server.store.local import LocalStore
from exportd_server.store.memory import MemoryStore

JOB = JobPrefix("acme", "0197c1f0-7a3e-7000-8000-000000000001")


def part_key(
    prefix: JobPrefix = JOB,
    *,
    kind: OutputKind = OutputKind.OUTPUT,
    shard: int = 0,
    sequence: int = 0,
    token: int = 1,
) -> OutputKey:
    """A key, of which a test names only what matters to it."""
    return OutputKey(prefix, kind, shard, sequence, token)


def put(store: OutputStore, key: OutputKey, data: Buffer) -> None:
    """Store a part in one piece."""
    writer = store.create(key)
    writer.write(data)
    writer.finalize()


async def drain(reader: PartReader, step: int = 1 << 20) -> bytes:
    """All that is left in a reader."""
    buffer, found = memoryview(bytearray(step)), bytearray()
    while count := await reader.readinto(buffer):
        found += buffer[:count]
    return bytes(found)


async def read(store: OutputStore, key: OutputKey, offset: int = 0) -> bytes:
    """All of a part from an offset on."""
    reader = await store.open(key, offset)
    try:
        return await drain(reader)
    finally:
        await reader.close()


async def keys(store: OutputStore, prefix: JobPrefix = JOB) -> set[OutputKey]:
    """The parts of a job; fails on one that is listed twice."""
    found = [key async for key in store.list_job(prefix)]
    assert len(found) == len(set(found))
    return set(found)


async def jobs(store: OutputStore) -> set[JobPrefix]:
    """All jobs; fails on one that is listed twice."""
    found = [prefix async for prefix in store.list_jobs()]
    assert len(found) == len(set(found))
    return set(found)


# --- one case for each backend that the contract suite runs on


class StoreCase(Protocol):
    """A backend under test, and what the suite must do to it from outside."""

    knows_writers: bool
    """Whether the backend itself tells a living writer from a dead one, and what one
    deletion took from what another one did."""

    @property
    def store(self) -> OutputStore:
        """The store."""
        ...

    def again(self) -> OutputStore:
        """Another client of the same bytes, as another process has it."""
        ...

    def abandon(self, key: OutputKey, data: bytes) -> None:
        """Leave behind a write of `data` whose writer died before it finished."""
        ...

    def fill(self, keys: Sequence[OutputKey], data: bytes) -> None:
        """Store many small parts in the quickest way there is."""
        ...

    def remains(self) -> list[str]:
        """Whatever lies in the backend, finished or not, as text."""
        ...


class LocalCase:
    """The store on a directory."""

    knows_writers = True

    def __init__(self, root: Path) -> None:
        self._root = root
        self.store = LocalStore(root)

    def again(self) -> OutputStore:
        return LocalStore(self._root)

    def abandon(self, key: OutputKey, data: bytes) -> None:
        with writer_elsewhere(self._root, key, data) as process:
            process.send_signal(signal.SIGKILL)
            process.wait()

    def fill(self, keys: Sequence[OutputKey], data: bytes) -> None:
        for key in keys:
            put(self.store, key, data)

    def remains(self) -> list[str]:
        return tree(self._root)


class MemoryCase:
    """The store in memory."""

    knows_writers = True

    def __init__(self) -> None:
        self.store = MemoryStore()

    def again(self) -> OutputStore:
        return self.store

    def abandon(self, key: OutputKey, data: bytes) -> None:
        self.store.create(key).write(data)

    def fill(self, keys: Sequence[OutputKey], data: bytes) -> None:
        for key in keys:
            put(self.store, key, data)

    def remains(self) -> list[str]:
        unfinished = [f"{some.key} unfinished" for some in self.store._unfinished]
        return sorted([*map(str, self.store._parts), *unfinished])


def tree(root: Path) -> list[str]:
    """Every file and directory below a directory."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


_WRITER = """
import sys
from pathlib import Path
from exportd_server.store.key import OutputKey
from exportd_server.store.local import LocalStore
root, key, size = sys.argv[1:]
writer = LocalStore(Path(root)).create(OutputKey.parse(key))
writer.write(sys.stdin.buffer.read(int(size)))
print("written", flush=True)
sys.stdin.buffer.read(1)
writer.finalize()
print("finalized", flush=True)
"""


@contextmanager
def writer_elsewhere(
    root: Path, key: OutputKey, data: bytes
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has written `data` and has not finished the part. It does so when it
    is sent a byte, and says `finalized`."""
    command = [sys.executable, "-c", _WRITER, str(root), str(key), str(len(data))]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(data)
            process.stdin.flush()
            assert process.stdout.readline() == b"written\n"
            yield process
        finally:
            process.kill()


# --- faults of the operating system

Fault = Callable[[str, int], None]
"""Called for each call to the system with its name and its position among all of them;
makes it fail by raising."""

_CALLS = {
    "close", "flock", "fstat", "fsync", "link", "mkdir", "open", "pread", "preadv",
    "rename", "rmdir", "scandir", "stat", "unlink", "write",
}  # fmt: skip


class FaultySystem:
    """Stands in for `os` and `fcntl` in `platform.files`, and notes every call.

    With `late`, a call takes effect before it fails, as one over a network may.
    """

    def __init__(self, fault: Fault | None = None, *, late: bool = False) -> None:
        self.calls: list[str] = []
        self._fault = fault
        self._late = late

    @contextmanager
    def in_place(self) -> Iterator[FaultySystem]:
        """Put it in place of the real system."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("os", "fcntl"):
                real = getattr(files, name)
                patch.setattr(files, name, _FaultyModule(real, self._call))
            yield self

    def _call(self, name: str, real: Callable[..., Any], *args: Any, **named: Any) -> Any:
        self.calls.append(name)
        index = len(self.calls) - 1
        # A descriptor is gone after a close, whatever the close says.
        if not self._late and name != "close":
            self._check(name, index)
            return real(*args, **named)
        result = real(*args, **named)
        try:
            self._check(name, index)
        except OSError:
            if name == "open":
                os.close(result)
            elif name == "scandir":
                result.close()
            raise
        return result

    def _check(self, name: str, index: int) -> None:
        if self._fault is not None:
            self._fault(name, index)


class _FaultyModule:
    def __init__(self, real: ModuleType, call: Callable[..., Any]) -> None:
        self._real = real
        self._call = call

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)
        return partial(self._call, name, real) if name in _CALLS else real


def fail_once(index: int, number: int) -> Fault:
    """The call at one position fails, those after it work again."""

    def fault(name: str, at: int) -> None:
        if at == index:
            raise OSError(number, os.strerror(number))

    return fault


def full_from(index: int) -> Fault:
    """From one position on there is no room: what needs some fails, and goes on failing,
    what frees some works."""

    def fault(name: str, at: int) -> None:
        if at >= index and name in {"mkdir", "write", "fsync", "link"}:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return fault
