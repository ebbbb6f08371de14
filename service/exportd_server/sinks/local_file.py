"""Delivers into a directory of the server; `docs/sinks.md` tells what it promises.

<root>/<path>/<file name>                    a part, or the manifest
<root>/<path>/.<file name>.<random>.tmp      being written
"""

from __future__ import annotations

import asyncio
import enum
import errno
import hashlib
import os
import queue
import re
import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar

import structlog
from pydantic import BaseModel, ConfigDict, field_validator

from exportd_server.errors import ConfigurationError, DeliveryFailed
from exportd_server.platform.files import Buffer, Directory, File
from exportd_server.platform.threads import in_daemon_thread
from exportd_server.sinks.base import (
    PLACE,
    BadSinkRequest,
    Delivery,
    Export,
    Part,
    SinkDefaults,
    SinkPlan,
    Takes,
)
from exportd_server.sinks.manifest import manifest_json, manifest_name
from exportd_server.sinks.names import path_names

log = structlog.get_logger(__name__)

_PIECE = 256 << 10
_LEFT_OVER_SECONDS = 86_400.0
"""A temporary that nobody has written to for so long has no writer any more."""
_CLEANING_SECONDS = 5.0
"""How long a delivery that ended early is held up by a disk that does not answer; what
is left to clean up is done when it does."""
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp\Z")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_IN_THE_WAY = frozenset({errno.ELOOP, errno.ENOTDIR, errno.EISDIR})

_T = TypeVar("_T")


class Access(enum.StrEnum):
    """Who may read what is delivered, as far as the umask of the server allows."""

    OWNER = "owner"
    GROUP = "group"
    EVERYONE = "everyone"

    @property
    def file_mode(self) -> int:
        """The mode of files."""
        return {"owner": 0o600, "group": 0o640, "everyone": 0o644}[self]

    @property
    def directory_mode(self) -> int:
        """The mode of directories that are made."""
        return {"owner": 0o700, "group": 0o750, "everyone": 0o755}[self]


class LocalFileRequest(BaseModel):
    """What a caller says: the directory below that of the connection."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = ""


class LocalFileConnection(BaseModel):
    """What the operator configures. `root` is trusted and must be there, links in its
    path are followed; below it none is. `prefix` is a path below it, made when it is
    missing."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    root: Annotated[Path, PLACE]
    prefix: Annotated[str, PLACE] = ""
    access: Access = Access.OWNER

    @field_validator("root")
    @classmethod
    def _absolute(cls, root: Path) -> Path:
        if not root.is_absolute():
            raise ValueError("must be an absolute path")
        return root

    @field_validator("prefix")
    @classmethod
    def _below_root(cls, prefix: str) -> str:
        try:
            path_names("prefix", prefix)
        except BadSinkRequest as error:
            raise ValueError(error.description) from None
        return prefix


class LocalFileSinkType:
    """Files in a directory of the server."""

    name = "local_file"
    request_model = LocalFileRequest
    connection_model = LocalFileConnection
    needs_connection = True
    defaults = SinkDefaults()

    def check(
        self,
        request: LocalFileRequest,
        connection: LocalFileConnection | None,
        export: Export,
    ) -> SinkPlan:
        """See whether the path stays below the connection's directory."""
        del connection, export
        path_names("path", request.path)
        return SinkPlan(Takes.PARTS)

    async def open(self, connection: LocalFileConnection | None) -> LocalFileSink:
        """Look whether the directory is there."""
        if connection is None:
            raise ConfigurationError(
                f"{self.name}: name a connection; it has the directory"
            )
        sink = LocalFileSink(connection)
        try:
            await sink.look()
        except OSError as error:
            raise ConfigurationError(
                f"{self.name}: cannot open the directory {str(connection.root)!r} "
                f"({error.strerror}); make it, or name another one"
            ) from error
        return sink


class LocalFileSink:
    """Delivers below one directory. That is opened anew for each delivery, so that a file
    system may be mounted there at any time."""

    def __init__(self, connection: LocalFileConnection) -> None:
        self._connection = connection

    async def look(self) -> None:
        """Open the directory once; raises `OSError`."""
        await in_daemon_thread(lambda: Directory.at(self._connection.root).close(), "sink")

    async def probe(self, request: LocalFileRequest, export: Export) -> None:
        """Make a file in the directory, or in the one where it would be made, and remove
        it."""
        del export
        place = _Place(self._connection, request)
        await in_daemon_thread(place.told(place.probe), "sink")

    async def deliver(self, request: LocalFileRequest, delivery: Delivery) -> str:
        """Write beside the final name, sync, rename; the receipt is the path below the
        connection's root."""
        place, part = _Place(self._connection, request), delivery.part
        name = manifest_name(delivery) if part is None else part.file_name
        writer = _Writer(place, name)
        lane = _Lane()
        try:
            if part is None:
                text = manifest_json(delivery)
                await lane.run(place.told(partial(writer.put_last, text)))
            else:
                await _copy(part, writer, lane)
        finally:
            await lane.end(writer.close)
        return "/".join((*place.names, name))

    async def close(self) -> None:
        """Nothing is held."""


async def _copy(part: Part, writer: _Writer, lane: _Lane) -> None:
    told = writer.place.told
    # First, because a part that is gone must not leave a directory behind.
    async with part.content.open() as reader:
        await lane.run(told(writer.begin))
        buffer = memoryview(bytearray(_PIECE))
        while count := await reader.readinto(buffer):
            await lane.run(told(partial(writer.write, buffer[:count])))
    await lane.run(told(partial(writer.finish, part.bytes, part.sha256)))


class _Place:
    """The directory of a request. All but the constructor blocks."""

    def __init__(self, connection: LocalFileConnection, request: LocalFileRequest) -> None:
        self.names = (
            *path_names("prefix", connection.prefix),
            *path_names("path", request.path),
        )
        self.access = connection.access
        self._root = connection.root
        self._text = f"directory {request.path!r}" if request.path else "directory"

    def told(self, step: Callable[[], _T]) -> Callable[[], _T]:
        """The step, with errors that a caller may read."""

        def run() -> _T:
            try:
                return step()
            except OSError as error:
                raise self._failed(error) from error

        return run

    def make(self) -> Directory:
        """Open the directory; those that are missing are made, durably."""
        with ExitStack() as stack:
            directory = self._open_root()
            for name in self.names:
                above = stack.enter_context(directory)
                directory = above.make_child(name, self.access.directory_mode)
                # Also when it was there: whoever made it may have died before this.
                above.sync()
            return directory

    def require_unmoved(self, directory: Directory) -> None:
        """See that the path still leads to the directory. Raises `DeliveryFailed`."""
        with ExitStack() as stack, suppress(OSError):
            found = stack.enter_context(self._open_root())
            for name in self.names:
                found = stack.enter_context(found.child(name))
            if found.same_as(directory):
                return
        raise DeliveryFailed(
            f"{self._text}: it was moved or replaced while a file was written into it",
            retryable=True,
        )

    def probe(self) -> None:
        """Make a file and remove it, as near as there is a directory. Raises
        `BadSinkRequest` for what stands in the way."""
        with ExitStack() as stack:
            directory = stack.enter_context(self._open_root())
            try:
                for name in self.names:
                    directory = stack.enter_context(directory.child(name))
            except FileNotFoundError:
                pass  # it will be made in the last one
            except OSError as error:
                if error.errno not in _IN_THE_WAY:
                    raise
                raise BadSinkRequest(
                    "path", f"{_IS_BLOCKED}; choose another one"
                ) from error
            temporary = _temporary("probe")
            directory.create(temporary).close()
            directory.unlink(temporary)

    def _open_root(self) -> Directory:
        try:
            return Directory.at(self._root)
        except OSError as error:
            raise DeliveryFailed(
                f"the connection's directory cannot be opened: {_reason(error)}",
                retryable=error.errno not in _DENIED,
            ) from error

    def _failed(self, error: OSError) -> DeliveryFailed:
        if error.errno in _FULL:
            return DeliveryFailed(f"{self._text}: no room for the file", retryable=True)
        if error.errno in _DENIED:
            return DeliveryFailed(
                f"{self._text}: the server may not write", retryable=False
            )
        if error.errno in _IN_THE_WAY:
            return DeliveryFailed(f"{self._text}: {_IS_BLOCKED}", retryable=False)
        return DeliveryFailed(
            f"{self._text}: the file cannot be written: {_reason(error)}", retryable=True
        )


_IS_BLOCKED = "a link or a file stands where a directory should be, or the reverse"


def _reason(error: OSError) -> str:
    """Why, without a path."""
    return os.strerror(error.errno) if error.errno else "no reason was given"


def _temporary(name: str) -> str:
    return f".{name}.{secrets.token_hex(8)}.tmp"


class _Writer:
    """Writes one file of a place. Its methods block, and raise `OSError` and
    `DeliveryFailed`; nobody calls two at a time."""

    def __init__(self, place: _Place, name: str) -> None:
        self.place = place
        self._name = name
        self._temporary = _temporary(name)
        self._directory: Directory | None = None
        self._file: File | None = None
        self._bytes = 0
        self._digest = hashlib.sha256()

    def begin(self) -> None:
        """Make the directory and the temporary."""
        self._directory = self.place.make()
        self._file = self._directory.create(self._temporary, self.place.access.file_mode)

    def write(self, data: Buffer) -> None:
        """Append `data`."""
        _, file = self._open()
        self._bytes += file.write(data)
        self._digest.update(data)

    def finish(self, size: int, sha256: bytes) -> None:
        """Give the file its name, if it is what it should be."""
        directory, file = self._open()
        if (self._bytes, self._digest.digest()) != (size, sha256):
            raise DeliveryFailed(
                "the stored part does not have the size and checksum it should have",
                retryable=True,
            )
        file.sync()
        directory.rename(self._temporary, self._name)
        directory.sync()
        self.place.require_unmoved(directory)

    def put_last(self, text: bytes) -> None:
        """Write all of a file that completes an export, and remove what deliveries into
        the same directory left behind that died long ago."""
        self.begin()
        self.write(text)
        self.finish(len(text), hashlib.sha256(text).digest())
        self._sweep()

    def close(self) -> None:
        """Remove the temporary, if it is there. Never raises."""
        file, self._file = self._file, None
        directory, self._directory = self._directory, None
        if file is not None:
            file.close()
        if directory is not None:
            # After the rename there is none, and it is nobody else's.
            with suppress(OSError):
                directory.unlink(self._temporary)
            directory.close()

    def _open(self) -> tuple[Directory, File]:
        if self._directory is None or self._file is None:
            raise ValueError("the writer was not begun, or is closed")
        return self._directory, self._file

    def _sweep(self) -> None:
        directory, _ = self._open()
        oldest = time.time() - _LEFT_OVER_SECONDS
        try:
            found = [name for name, _ in directory.entries() if _TEMPORARY.match(name)]
        except OSError:
            # What was delivered has arrived all the same.
            log.warning("left-over files were not looked for", exc_info=True)
            return
        for name in found:
            # It may be gone by now, or be no file.
            with suppress(OSError):
                if directory.modified(name) < oldest:
                    directory.unlink(name)


class _Lane:
    """Does the steps of one delivery in a thread of its own, in order.

    A step that is under way cannot be cancelled. Whoever stops waiting for it may still
    ask for another one, which follows when it has ended: so no file is closed below a
    write, even one that hangs. The thread is a daemon, because a disk may hang for ever.
    """

    def __init__(self) -> None:
        self._steps: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        in_daemon_thread(self._work, "sink-local-file")

    async def run(self, step: Callable[[], _T]) -> _T:
        """Do a step. When this is cancelled, a step that has begun is still done."""
        return await asyncio.wrap_future(self._put(step))

    async def end(self, step: Callable[[], object]) -> None:
        """Do a last step, and wait for it a little."""
        last = asyncio.wrap_future(self._put(step))
        self._steps.put(None)
        await asyncio.wait({last}, timeout=_CLEANING_SECONDS)

    def _put(self, step: Callable[[], _T]) -> Future[_T]:
        outcome: Future[_T] = Future()

        def run() -> None:
            if not outcome.set_running_or_notify_cancel():
                return
            try:
                result = step()
            except BaseException as error:  # noqa: BLE001 - told to whoever waits
                outcome.set_exception(error)
            else:
                outcome.set_result(result)

        self._steps.put(run)
        return outcome

    def _work(self) -> None:
        while (step := self._steps.get()) is not None:
            step()
