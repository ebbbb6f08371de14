"""The output store on a local file system; `docs/store.md` tells what it promises.

    <root>/<tenant>/<job_id>/<kind>/<shard>-<sequence>.<token>            a part
    <root>/<tenant>/<job_id>/<kind>/.<shard>-<sequence>.<token>.<random>  being written
    <root>/<tenant>/.<job_id>/                                            being deleted
    <root>/.owner                                                         whose all this is

A name with a leading dot is never taken for a part, a job or a tenant.
"""

from __future__ import annotations

import asyncio
import errno
import re
import secrets
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from typing import ParamSpec, TypeVar

from exportd_server.errors import ConfigurationError, StoreFailed
from exportd_server.platform.files import Directory, File
from exportd_server.store.base import Buffer
from exportd_server.store.key import JobPrefix, OutputKey, OutputKind

_UNFINISHED = re.compile(r"\.\d{6}-\d{6}\.\d{1,19}\.[0-9a-f]{16}\Z")
OWNER = ".owner"
"""Name of the file that tells whose a store is."""
_OWNER_BYTES = 200
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_TAKEN = frozenset({errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR})
_NO_NOWAIT = frozenset({errno.EOPNOTSUPP, errno.ENOSYS})

_THREADS = 8
"""Reads that wait for a device, and calls that look at directories, at one time."""
_READ_BYTES = 1 << 20
"""Most bytes in one read: a longer copy would hold up the event loop noticeably."""
_WRITE_OUT_BYTES = 8 << 20
"""So much of a part is sent on to the device at a time while it is written: otherwise all
of it would wait in memory for the end, and the writer then for all of it."""
_PAGE = 1000
"""Directory entries that are fetched at one go."""
_ATTEMPTS = 100
"""Each attempt but the last lost its directory to somebody else's deletion."""

_T = TypeVar("_T")
_P = ParamSpec("_P")


class LocalStore:
    """Keeps parts under one directory, for any number of processes on this machine."""

    def __init__(self, root: Path) -> None:
        """Open the directory, made with mode 0700 if it is missing.

        Raises `ConfigurationError` when it cannot be used, or when its file system lacks
        hard links or file locks.
        """
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory = Directory.at(root)
            probe(directory)
        except OSError as error:
            raise ConfigurationError(
                f"output store: cannot keep files in {str(root)!r} ({error.strerror}); "
                "name a directory that this user may write to, on a file system with "
                "hard links and file locks"
            ) from error
        self._tree = _Tree(directory)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="store")

    def create(self, key: OutputKey) -> LocalPartWriter:
        """Begin a part."""
        lost: OSError | None = None
        for _ in range(_ATTEMPTS):
            try:
                writer = self._tree.begin(key)
            except FileNotFoundError as error:
                lost = error  # an empty directory was pruned, or the job deleted
            except OSError as error:
                self._tree.prune(key.prefix)
                raise _failed(error) from error
            else:
                if writer is not None:
                    return writer
        raise StoreFailed from lost

    async def open(self, key: OutputKey, offset: int = 0) -> LocalPartReader:
        """Open a finalized part at a byte offset."""
        if offset < 0:
            raise ValueError("an offset is not negative")
        # When this is cancelled the thread may yet open the file, for nobody: it is then
        # collected, and by that closed.
        file = await self._run(self._tree.open, key)
        return LocalPartReader(file, offset, self._threads)

    async def size(self, key: OutputKey) -> int:
        """Bytes of a finalized part."""
        return await self._run(self._tree.size, key)

    async def delete(self, key: OutputKey) -> None:
        """Delete one part."""
        await self._run(self._tree.delete, key)

    async def delete_job(self, prefix: JobPrefix) -> int:
        """Delete everything of a job. Its parts are gone at once, all together, while
        the deletion still goes on."""
        return await self._run(self._tree.delete_job, prefix)

    def list_job(self, prefix: JobPrefix) -> AsyncIterator[OutputKey]:
        """The finalized parts of a job."""
        return self._paged(self._tree.parts(prefix))

    def list_jobs(self) -> AsyncIterator[JobPrefix]:
        """Every job that has a directory, be it empty or half deleted."""
        return self._paged(self._tree.jobs())

    async def sweep_unfinished(self, prefix: JobPrefix) -> int:
        """Delete writes whose file no living writer has locked, and finish a deletion
        that was broken off."""
        return await self._run(self._tree.sweep, prefix)

    async def claim(self, owner: str) -> str:
        """Note whose this is, unless it is somebody's."""
        return await self._run(self._tree.claim, owner)

    async def close(self) -> None:
        """Wait for calls that are under way, and let go of the directory. Writers and
        readers are closed before."""
        await asyncio.to_thread(self._threads.shutdown)
        self._tree.close()

    async def _run(self, call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return await _outcome(self._threads.submit(call, *args, **kwargs))

    async def _paged(self, items: Generator[_T, None, None]) -> AsyncIterator[_T]:
        page: Future[list[_T]] | None = None
        try:
            while True:
                page = self._threads.submit(lambda: list(islice(items, _PAGE)))
                found = await _outcome(page)
                if not found:
                    return
                for item in found:
                    yield item
        finally:
            # A page that nobody waits for any more may still be under way.
            if page is not None:
                page.add_done_callback(lambda _: items.close())


class LocalPartWriter:
    """Writes one part beside its final name.

    The open directory is the place where the writer began. When the job is deleted, that
    place goes away with it, and whatever a later one of the same path may be, it is not
    this writer's.
    """

    def __init__(
        self, tree: _Tree, key: OutputKey, directory: Directory, name: str, file: File
    ) -> None:
        self._tree = tree
        self._key = key
        self._directory = directory
        self._name = name
        self._file = file
        self._size = 0
        self._written_out = 0
        self._failure: OSError | None = None
        self._done = False

    def write(self, data: Buffer, /) -> int:
        """Append all of `data`; returns how many bytes that were."""
        self._require_open()
        try:
            count = self._file.write(data)
        except OSError as error:
            self._failure = error
            self.abort()
            raise _failed(error) from error
        self._size += count
        waiting = self._size - self._written_out
        if waiting >= _WRITE_OUT_BYTES:
            self._file.write_out(self._written_out, waiting)
            self._written_out = self._size
        return count

    def finalize(self) -> None:
        """Make the part durable, then visible, then its name durable."""
        self._require_open()
        try:
            self._file.sync()
            self._publish()
        except OSError as error:
            # A sync that failed is not tried again: the kernel reports lost pages once
            # and would call the second one a success.
            self._failure = error
            self.abort()
            raise _failed(error) from error
        self._done = True
        self._close()

    def abort(self) -> None:
        """Throw away what was written."""
        if self._done:
            return
        self._done = True
        _unlink_quietly(self._directory, self._name)
        self._close()
        self._tree.prune(self._key.prefix)

    def _publish(self) -> None:
        try:
            self._directory.link(self._name, self._key.name)
            self._directory.unlink(self._name)
            self._directory.sync()
            # The directory may have been moved away to be deleted, with us in it.
            self._tree.require_in_place(self._key, self._file)
        except BaseException:
            self._take_back()
            raise

    def _take_back(self) -> None:
        """Remove the final name if it is this file's: a link that was reported as failed
        may exist all the same, and one that was refused is somebody else's."""
        with suppress(OSError):
            if self._directory.identity(self._key.name) == self._file.identity:
                self._directory.unlink(self._key.name)

    def _require_open(self) -> None:
        if self._failure is not None:
            raise _failed(self._failure) from self._failure
        if self._done:
            raise ValueError("the part is finalized or aborted")

    def _close(self) -> None:
        self._file.close()
        self._directory.close()


class LocalPartReader:
    """Reads one part: what the page cache holds at once, the rest in a thread.

    The open file outlives its name.
    """

    def __init__(self, file: File, offset: int, threads: ThreadPoolExecutor) -> None:
        self._file = file
        self._offset = offset
        self._threads = threads
        self._cache_tells = True
        self._closed = False
        # A read at the current offset that waits for the device. When the call that
        # began it is cancelled it stays, and the next call takes it over.
        self._waiting: Future[bytes] | None = None

    async def readinto(self, buffer: memoryview, /) -> int:
        """Fill `buffer` from its start; at most 1 MiB at a time."""
        if self._closed:
            raise ValueError("the reader is closed")
        buffer = buffer.cast("B")[:_READ_BYTES]
        count = None
        if self._waiting is None and self._cache_tells:
            count = self._read_cached(buffer)
        if count is None:
            count = await self._read_waiting(buffer)
        self._offset += count
        return count

    async def close(self) -> None:
        """Close the file, once no thread reads from it any more."""
        if self._closed:
            return
        self._closed = True
        if self._waiting is None:
            self._file.close()
        else:
            self._waiting.add_done_callback(lambda _: self._file.close())

    def _read_cached(self, buffer: memoryview) -> int | None:
        try:
            return self._file.read_cached_into(buffer, self._offset)
        except OSError as error:
            if error.errno not in _NO_NOWAIT:
                raise _failed(error) from error
            self._cache_tells = False
            return None

    async def _read_waiting(self, buffer: memoryview) -> int:
        # The thread has a buffer of its own: the caller's is the caller's again as soon
        # as the call is cancelled.
        if self._waiting is None:
            self._waiting = self._threads.submit(
                self._file.read_at, self._offset, len(buffer)
            )
        try:
            # Shielded, because a cancel would take a read that waits for its turn with it.
            data = await asyncio.shield(asyncio.wrap_future(self._waiting))
        except OSError as error:
            self._waiting = None
            raise _failed(error) from error
        self._waiting = None
        count = min(len(data), len(buffer))
        buffer[:count] = data[:count]
        return count


class _Tree:
    """What the store does to its directories and files. Every call blocks, raises
    `OSError`, and may run in several threads and processes at once."""

    def __init__(self, root: Directory) -> None:
        self._root = root

    def close(self) -> None:
        self._root.close()

    def begin(self, key: OutputKey) -> LocalPartWriter | None:
        """A writer, or None when its file was lost before it could be locked."""
        with ExitStack() as undo, ExitStack() as parents:
            tenant = parents.enter_context(self._root.make_child(key.prefix.tenant))
            job = parents.enter_context(tenant.make_child(key.prefix.job_id))
            directory = undo.enter_context(job.make_child(key.kind))
            name = f".{key.name}.{secrets.token_hex(8)}"
            # Before the call, because one that fails may have made the file all the same.
            undo.callback(_unlink_quietly, directory, name)
            file = undo.enter_context(directory.create(name))
            if not (file.try_lock() and file.linked):
                return None  # a sweep came in between and took its writer for dead
            # The directories are in use from here on, so nobody prunes them. Somebody
            # else may have made them a moment ago and not have got to this yet.
            for parent in (job, tenant, self._root):
                parent.sync()
            undo.pop_all()
            return LocalPartWriter(self, key, directory, name, file)

    def require_in_place(self, key: OutputKey, file: File) -> None:
        """Raise `FileNotFoundError` unless the file is what lies under the key now."""
        with self._kind(key.prefix, key.kind) as directory:
            found = directory.identity(key.name)
        if found != file.identity:
            raise FileNotFoundError(errno.ENOENT, "another file lies under the key")

    def open(self, key: OutputKey) -> File:
        try:
            with self._kind(key.prefix, key.kind) as directory:
                return directory.open(key.name)
        except FileNotFoundError:
            raise KeyError(str(key)) from None

    def size(self, key: OutputKey) -> int:
        try:
            with self._kind(key.prefix, key.kind) as directory:
                return directory.size(key.name)
        except FileNotFoundError:
            raise KeyError(str(key)) from None

    def delete(self, key: OutputKey) -> None:
        with suppress(FileNotFoundError):
            with self._kind(key.prefix, key.kind) as directory:
                directory.unlink(key.name)
                directory.sync()
            self.prune(key.prefix)

    def delete_job(self, prefix: JobPrefix) -> int:
        """Move the job out of the way, so that all of it is gone at once and nobody can
        enter it any more, then remove what was moved."""
        moved = _moved(prefix)
        found, removed = False, 0
        with suppress(FileNotFoundError), self._root.child(prefix.tenant) as tenant:
            while True:
                try:
                    tenant.rename(prefix.job_id, moved)
                except FileNotFoundError:
                    break
                except OSError as error:
                    if error.errno not in _TAKEN:
                        raise
                    # An earlier deletion was broken off, or another one is at work.
                    removed += tenant.remove_tree(moved)
                else:
                    found = True
                    break
            # Ends: only those who entered the job before it was moved can still add to
            # it, each of them one file.
            removed += tenant.remove_tree(moved)
            tenant.sync()
        if found or removed:
            self.prune(prefix)
        return removed

    def sweep(self, prefix: JobPrefix) -> int:
        removed = 0
        with suppress(FileNotFoundError), self._root.child(prefix.tenant) as tenant:
            tenant.remove_tree(_moved(prefix))
            for kind in OutputKind:
                with suppress(FileNotFoundError), self._kind(prefix, kind) as directory:
                    names = (name for name, _ in directory.entries())
                    removed += sum(
                        _remove_if_abandoned(directory, name)
                        for name in names
                        if _UNFINISHED.match(name)
                    )
        if removed:
            self.prune(prefix)
        return removed

    def parts(self, prefix: JobPrefix) -> Generator[OutputKey, None, None]:
        for kind in OutputKind:
            with suppress(FileNotFoundError), self._kind(prefix, kind) as directory:
                for name, _ in directory.entries():
                    with suppress(ValueError):
                        yield OutputKey.parse(f"{prefix}/{kind}/{name}")

    def jobs(self) -> Generator[JobPrefix, None, None]:
        for tenant_name, is_directory in self._root.entries():
            if not is_directory or tenant_name.startswith("."):
                continue
            with suppress(FileNotFoundError), self._root.child(tenant_name) as tenant:
                for name, _ in tenant.entries():
                    try:
                        prefix = JobPrefix(tenant_name, name.removeprefix("."))
                    except ValueError:
                        continue
                    # A job that is begun anew while it is deleted is there twice.
                    if name == prefix.job_id or not tenant.has(prefix.job_id):
                        yield prefix

    def claim(self, owner: str) -> str:
        """Whole under a hidden name first, and linked, so that the first one has it."""
        name = f"{OWNER}.{secrets.token_hex(8)}"
        while True:
            with suppress(FileNotFoundError), self._root.open(OWNER) as file:
                # Whoever noted it may have died before its name was durable.
                self._root.sync()
                return file.read_at(0, _OWNER_BYTES).decode(errors="replace").strip()
            try:
                with self._root.create(name) as file:
                    file.write(f"{owner}\n".encode())
                    file.sync()
                with suppress(FileExistsError):
                    self._root.link(name, OWNER)
            finally:
                _unlink_quietly(self._root, name)

    def prune(self, prefix: JobPrefix) -> None:
        """Remove those directories of the job, and of its tenant, that are empty.

        Whoever is about to write into one of them begins again from the root, so this is
        safe at any time; only those call it who have removed something, so that nobody
        begins again for ever. What cannot be removed stays for the next one.
        """
        with suppress(OSError), self._root.child(prefix.tenant) as tenant:
            with suppress(OSError), tenant.child(prefix.job_id) as job:
                for kind in OutputKind:
                    with suppress(OSError):
                        job.rmdir(kind)
            with suppress(OSError):
                tenant.rmdir(prefix.job_id)
            self._root.rmdir(prefix.tenant)

    def _kind(self, prefix: JobPrefix, kind: OutputKind) -> Directory:
        with self._root.child(prefix.tenant) as tenant, tenant.child(prefix.job_id) as job:
            return job.child(kind)


def _failed(error: OSError) -> StoreFailed:
    return StoreFailed(full=error.errno in _FULL)


def _moved(prefix: JobPrefix) -> str:
    """Where in its tenant's directory a job lies while it is deleted."""
    return f".{prefix.job_id}"


def _remove_if_abandoned(directory: Directory, name: str) -> bool:
    """Remove an unfinished file unless a living writer has it locked."""
    try:
        # Writable, because some network file systems want that for an exclusive lock.
        with directory.open(name, writable=True) as file:
            if not file.try_lock():
                return False
            directory.unlink(name)
    except FileNotFoundError:
        return False  # its writer has just finished or aborted
    return True


def _unlink_quietly(directory: Directory, name: str) -> None:
    with suppress(OSError):
        directory.unlink(name)


def probe(root: Directory) -> None:
    """Find out at start, not at the end of the first export, what is not supported. Raises
    `OSError`; what was made is removed."""
    name = f".probe.{secrets.token_hex(8)}"
    second = f"{name}.link"
    try:
        with root.create(name) as file:
            file.try_lock()
            root.link(name, second)
    except OSError as error:
        # A full disk must not keep the server from starting: it frees room.
        if error.errno not in _FULL:
            raise
    finally:
        _unlink_quietly(root, name)
        _unlink_quietly(root, second)


async def _outcome(future: Future[_T]) -> _T:
    try:
        return await asyncio.wrap_future(future)
    except OSError as error:
        raise _failed(error) from error
