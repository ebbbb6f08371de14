"""Files reached through open directories, one path component at a time.

A path given as text is looked up anew at each call, and any of its components may have
become a symbolic link meanwhile. Here a directory is opened once, each further component
is opened relative to it without following links, and what is done to an entry is done
relative to the open directory. Functions raise `OSError`; a link where a directory or a
file is expected is `ELOOP` or `ENOTDIR`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

Buffer = bytes | bytearray | memoryview

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# A planted pipe must not block the open; on a regular file O_NONBLOCK means nothing.
_NO_SURPRISE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NOT_EMPTY = (errno.ENOTEMPTY, errno.EEXIST)
_NOT_A_DIRECTORY = (errno.ENOTDIR, errno.ELOOP)
# In linux/fs.h; see the manual page of sync_file_range.
_SYNC_FILE_RANGE_WRITE = 2


def find_sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """The C library's call; None where it has none."""
    try:
        call = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    found: Callable[[int, int, int, int], int] = call
    return found


_sync_file_range = find_sync_file_range()


class _Descriptor:
    """Owns one open file descriptor; collected unclosed, it is closed then."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def close(self) -> None:
        """Close it; idempotent, and never raises: what had to be durable was synced, and
        after a failed close the descriptor is gone all the same."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with suppress(OSError):
                os.close(fd)

    def sync(self) -> None:
        """Wait until its content is durable."""
        os.fsync(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class File(_Descriptor):
    """An open regular file."""

    __slots__ = ()

    @property
    def identity(self) -> tuple[int, int]:
        """Tells it from every other file that exists at the same time."""
        return _identity(os.fstat(self._fd))

    @property
    def linked(self) -> bool:
        """Whether it still has a name."""
        return os.fstat(self._fd).st_nlink > 0

    def write(self, data: Buffer) -> int:
        """Append all of `data`, in as many writes as it takes."""
        view = memoryview(data).cast("B")
        size = len(view)
        while view:
            view = view[os.write(self._fd, view) :]
        return size

    def write_out(self, offset: int, size: int) -> None:
        """Have the kernel begin to write a range to the device, so that `sync` has less
        to wait for. Promises nothing: where it cannot be asked for, or fails, `sync` does
        all the work, and is told of every error."""
        if _sync_file_range is not None:
            _sync_file_range(self._fd, offset, size, _SYNC_FILE_RANGE_WRITE)

    def try_lock(self) -> bool:
        """Take the exclusive lock, unless another open file has it.

        The lock is `flock`'s: the kernel gives it back when the file is closed, also by
        the death of its process.
        """
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def read_at(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset` on; empty only at the end. Blocks."""
        return os.pread(self._fd, size, offset)

    def read_cached_into(self, buffer: memoryview, offset: int) -> int | None:
        """Fill `buffer` with what the page cache holds from `offset` on, without waiting
        for a device: how many bytes, 0 only at the end, None when it would have to wait.

        Raises `OSError` with EOPNOTSUPP where the file system cannot tell.
        """
        try:
            return os.preadv(self._fd, [buffer], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return None


class Directory(_Descriptor):
    """An open directory. Names are single components of a path."""

    __slots__ = ()

    @classmethod
    def at(cls, path: Path) -> Self:
        """Open a directory by a path that is trusted: links in it are followed."""
        return cls(os.open(path, _DIRECTORY))

    def same_as(self, other: Directory) -> bool:
        """Whether both are one directory, by whatever path they were reached."""
        return _identity(os.fstat(self._fd)) == _identity(os.fstat(other._fd))

    def child(self, name: str) -> Directory:
        """Open a directory in this one."""
        return Directory(
            os.open(_component(name), _DIRECTORY | os.O_NOFOLLOW, dir_fd=self._fd)
        )

    def make_child(self, name: str, mode: int = 0o700) -> Directory:
        """Open a directory in this one, made if it is missing, with the mode that the
        umask leaves of `mode`. Its entry is durable after `sync` of this one."""
        with suppress(FileExistsError):
            os.mkdir(_component(name), mode, dir_fd=self._fd)
        return self.child(name)

    def create(self, name: str, mode: int = 0o600) -> File:
        """Make a file, open for writing, with the mode that the umask leaves of `mode`;
        raises `FileExistsError`."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_SURPRISE
        return File(os.open(_component(name), flags, mode, dir_fd=self._fd))

    def open(self, name: str, *, writable: bool = False) -> File:
        """Open a regular file; anything else is refused with EINVAL."""
        flags = (os.O_RDWR if writable else os.O_RDONLY) | _NO_SURPRISE
        file = File(os.open(_component(name), flags, dir_fd=self._fd))
        try:
            _require_regular(os.fstat(file._fd))  # noqa: SLF001 - of the same module
        except BaseException:
            file.close()
            raise
        return file

    def size(self, name: str) -> int:
        """Bytes of a regular file; anything else is refused with EINVAL."""
        return self._status(name).st_size

    def identity(self, name: str) -> tuple[int, int]:
        """The `File.identity` of a regular file; anything else is refused with EINVAL."""
        return _identity(self._status(name))

    def modified(self, name: str) -> float:
        """When a regular file was last written, in seconds since the epoch; anything else
        is refused with EINVAL."""
        return self._status(name).st_mtime

    def has(self, name: str) -> bool:
        """Whether there is an entry of that name, of whatever kind."""
        try:
            os.stat(_component(name), dir_fd=self._fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def link(self, name: str, new_name: str) -> None:
        """Give a file a second name; raises `FileExistsError` and then changes nothing.

        With `unlink` of the first name this is a rename that never overwrites, on file
        systems that have hard links. (`renameat2` with RENAME_NOREPLACE is the other
        way; Python does not offer it and NFS does not have it.)
        """
        os.link(
            _component(name),
            _component(new_name),
            src_dir_fd=self._fd,
            dst_dir_fd=self._fd,
            follow_symlinks=False,
        )

    def rename(self, name: str, new_name: str) -> None:
        """Rename an entry, over a file or an empty directory if there is one."""
        os.rename(
            _component(name),
            _component(new_name),
            src_dir_fd=self._fd,
            dst_dir_fd=self._fd,
        )

    def replace(
        self, name: str, data: Buffer, prepare: Callable[[str], None] = lambda _: None
    ) -> None:
        """Make a file with this content in place of the one that there may be: as a whole,
        durably, and for its owner only. `prepare` gets the name of the new file before it
        takes the place of the other."""
        made = f"{name}.{secrets.token_hex(8)}"
        try:
            with self.create(made) as file:
                file.write(data)
                file.sync()
            prepare(made)
            self.rename(made, name)
        except BaseException:
            with suppress(OSError):
                self.unlink(made)
            raise
        self.sync()

    def unlink(self, name: str) -> None:
        """Remove an entry that is no directory; a link itself, not what it points to."""
        os.unlink(_component(name), dir_fd=self._fd)

    def rmdir(self, name: str) -> None:
        """Remove an empty directory."""
        os.rmdir(_component(name), dir_fd=self._fd)

    def entries(self) -> Iterator[tuple[str, bool]]:
        """Name of each entry, in no order, and whether it is a directory itself."""
        # The iterator works on a duplicate that shares this descriptor's position and
        # rewinds it when it is closed.
        with os.scandir(self._fd) as scan:
            for entry in scan:
                yield entry.name, entry.is_dir(follow_symlinks=False)

    def remove_tree(self, name: str) -> int:
        """Remove an entry and all that is in it; returns how many files and links went.

        A missing one is fine, links are removed and not followed, and several may remove
        the same tree at once. What is added meanwhile is removed too: the caller sees to
        it that this comes to an end.
        """
        removed = 0
        while True:
            try:
                with self.child(name) as directory:
                    removed += directory._clear()  # noqa: SLF001 - of the same class
                self.rmdir(name)
            except FileNotFoundError:
                return removed
            except OSError as error:
                if error.errno in _NOT_A_DIRECTORY:
                    return removed + self._unlink_if_there(name)
                if error.errno not in _NOT_EMPTY:
                    raise
            else:
                return removed

    def _status(self, name: str) -> os.stat_result:
        status = os.stat(_component(name), dir_fd=self._fd, follow_symlinks=False)
        _require_regular(status)
        return status

    def _clear(self) -> int:
        removed = 0
        for name, is_directory in self.entries():
            if is_directory:
                removed += self.remove_tree(name)
            else:
                removed += self._unlink_if_there(name)
        return removed

    def _unlink_if_there(self, name: str) -> int:
        try:
            self.unlink(name)
        except FileNotFoundError:
            return 0
        return 1


def _component(name: str) -> str:
    """The name, if it is one component of a path and stays in its directory."""
    if name in {"", ".", ".."} or "/" in name or "\0" in name:
        raise ValueError(f"not a single path component: {name!r}")
    return name


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _require_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
