"""A download on disk: a temporary file with a small record of what it holds.

    out.csv.part-<key>         the bytes, written at their offsets
    out.csv.part-<key>.json    which ranges are there, each with its CRC32C

A process may die at any moment. The record is written after the bytes and claims no
more than what was written; the next download reads the claimed bytes back and keeps
those whose checksum holds. The final name appears only once everything was verified.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Self

import crc32c

from exportd.errors import ExportdError, LocalFileError, OutputExists

Identity = Mapping[str, str | int | None]
"""What the bytes are of: job, part, generation, size, checksums."""

_BLOCK = 4 * 1024 * 1024
_NAME_BYTES = 180  # leaves room for the temporary's ending within 255
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})


@dataclass(slots=True)
class Range:
    """A stretch of the file: `done` bytes from `start` on are there, with `crc`.

    `end` is None while nobody knows where the file ends.
    """

    start: int
    end: int | None
    done: int = 0
    crc: int = 0

    @property
    def position(self) -> int:
        """Where the next byte goes."""
        return self.start + self.done

    @property
    def complete(self) -> bool:
        """Whether every byte is there."""
        return self.end is not None and self.position >= self.end


class PartialFile:
    """The temporary file of one download, held by one process at a time."""

    def __init__(self, beside: Path, key: str) -> None:
        self.path = beside.with_name(f"{beside.name}.part-{key}")
        self._state_path = beside.with_name(f"{beside.name}.part-{key}.json")
        self._fresh_state_path = self._state_path.with_suffix(".json~")
        self._fd = -1

    def __enter__(self) -> Self:
        """Open and lock. Raises `LocalFileError` when another process holds it."""
        try:
            self._open()
        except OSError as error:
            raise LocalFileError.of(
                error, f"cannot write {self.path}", "check that its directory is there"
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
        self._fd = -1

    def load(self, identity: Identity) -> list[Range]:
        """Complete ranges, in order, that an earlier download of the same bytes left
        and that are proven to be here still."""
        ranges = [r for r in self._read_state(identity) if self._crc(r) == r.crc]
        if not ranges:
            with self._writing():
                os.ftruncate(self._fd, 0)
        return ranges

    def save(self, identity: Identity, ranges: Sequence[Range]) -> None:
        """Record what is here. A record that is torn, stale or could not be written
        costs time, never correctness."""
        state = {
            "version": 1,
            "identity": dict(identity),
            "ranges": [[r.start, r.done, r.crc] for r in ranges if r.done],
        }
        fresh = self._fresh_state_path
        try:
            fresh.write_text(json.dumps(state), encoding="utf-8")
            fresh.replace(self._state_path)
        except OSError:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of `data` at `offset`. Raises `LocalFileError`."""
        with self._writing():
            while data:
                written = os.pwrite(self._fd, data, offset)
                data = data[written:]
                offset += written

    def reserve(self, size: int) -> None:
        """Raise `LocalFileError` when the disk has no room for `size` more bytes."""
        free = shutil.disk_usage(self.path.parent).free
        if free < size:
            raise self._full(
                OSError(errno.ENOSPC, f"{size:,} bytes to come, {free:,} free")
            )

    def size(self) -> int:
        """Bytes in the file."""
        return os.fstat(self._fd).st_size

    def truncate(self, size: int) -> None:
        """Drop what lies past `size`."""
        with self._writing():
            os.ftruncate(self._fd, size)

    def blocks(self, start: int, end: int) -> Iterator[memoryview]:
        """The bytes from `start` to `end`, or to where the file ends before. Each block
        is overwritten by the next."""
        buffer = memoryview(bytearray(min(_BLOCK, max(end - start, 1))))
        while start < end:
            try:
                count = os.preadv(self._fd, [buffer[: end - start]], start)
            except OSError as error:
                raise LocalFileError.of(error, f"cannot read {self.path}") from error
            if count == 0:
                return
            yield buffer[:count]
            start += count

    def discard(self) -> None:
        """Delete the file and its record."""
        for path in (self.path, self._state_path, self._fresh_state_path):
            path.unlink(missing_ok=True)

    def publish(self, final: Path, *, overwrite: bool) -> None:
        """Give the file its name, durably.

        Raises:
            OutputExists: There is one, and `overwrite` is not set.
            LocalFileError: The disk failed.
        """
        try:
            os.fsync(self._fd)
            if overwrite:
                self.path.replace(final)
            else:
                self._name_anew(final)
            self._state_path.unlink(missing_ok=True)
            directory = os.open(final.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except ExportdError:
            raise
        except OSError as error:
            raise LocalFileError.of(error, f"cannot finish {final}") from error

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        while True:
            self._fd = os.open(self.path, flags, 0o666)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Whoever held the lock may have renamed the file away meanwhile.
                if os.path.samestat(os.fstat(self._fd), self.path.lstat()):
                    return
            except BlockingIOError:
                os.close(self._fd)
                raise LocalFileError(
                    f"another download is writing {self.path}; wait for it, or give "
                    "another path"
                ) from None
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(self._fd)
                raise
            os.close(self._fd)

    def _read_state(self, identity: Identity) -> list[Range]:
        try:
            state = json.loads(self._state_path.read_text(encoding="utf-8"))
            if state["version"] != 1 or state["identity"] != dict(identity):
                return []
            return _ranges(state["ranges"])
        except (OSError, ValueError, TypeError, KeyError):
            return []

    def _crc(self, wanted: Range) -> int | None:
        """CRC32C of the range's bytes on disk; None when some are missing."""
        crc = seen = 0
        for block in self.blocks(wanted.start, wanted.position):
            crc = crc32c.crc32c(block, crc)
            seen += len(block)
        return crc if seen == wanted.done else None

    def _name_anew(self, final: Path) -> None:
        """Rename without replacing: a hard link fails when the name is taken."""
        try:
            os.link(self.path, final)
            self.path.unlink()
        except FileExistsError:
            raise exists(final) from None
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            refuse_existing(final)
            self.path.rename(final)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._full(error) from error

    def _full(self, error: OSError) -> LocalFileError:
        mend = "what is there is kept: make room and run the same again to go on"
        return LocalFileError.of(error, f"cannot write {self.path}", mend)


def exists(path: Path) -> OutputExists:
    """The error for a name that is taken."""
    return OutputExists(f"{path} exists; give another path, or allow overwriting")


def refuse_existing(path: Path) -> None:
    """Raise `OutputExists` when the name is taken, be it by a dangling link."""
    if os.path.lexists(path):
        raise exists(path)


def safe_name(name: str, fallback: str) -> str:
    """A file name that stays in its directory, whatever the server said.

    Only the last component counts; control and format characters (which can hide or
    turn text around) and leading dots go; the length is bounded.
    """
    name = PureWindowsPath(PurePosixPath(name).name).name
    name = "".join(c for c in name if unicodedata.category(c) not in {"Cc", "Cf", "Cs"})
    name = name.strip().lstrip(".")
    while len(name.encode()) > _NAME_BYTES:
        name = name[1:]  # the end carries the extension
    return name or fallback


def free_ranges(
    ranges: Sequence[Range], total: int, wanted: int, least: int
) -> list[Range]:
    """Ranges that cover the file: what is there (`ranges`, complete and in order), and
    the rest cut into at least `wanted` pieces, as far as pieces of `least` bytes
    allow."""
    covered = [r for r in ranges if r.position <= total]
    holes: list[Range] = []
    position = 0
    for there in [*covered, Range(total, total)]:
        if position < there.start:
            holes.append(Range(position, there.start))
        position = there.position
    while holes and len(holes) < wanted:
        largest = max(holes, key=_length)
        if _length(largest) < 2 * least:
            break
        pieces = min(wanted - len(holes) + 1, _length(largest) // least)
        step = -(-_length(largest) // pieces)
        end = largest.start + _length(largest)
        holes.remove(largest)
        holes += [Range(at, min(at + step, end)) for at in range(largest.start, end, step)]
    return sorted([*covered, *holes], key=lambda r: r.start)


def _length(r: Range) -> int:
    return (r.end or r.start) - r.start


def _ranges(recorded: Sequence[Sequence[object]]) -> list[Range]:
    """Ranges from a record. Raises ValueError or TypeError when they make no sense."""
    ranges: list[Range] = []
    position = 0
    for start, done, crc in recorded:
        if not (isinstance(start, int) and isinstance(done, int) and isinstance(crc, int)):
            raise TypeError
        if start < position or done <= 0:
            raise ValueError
        position = start + done
        ranges.append(Range(start, position, done, crc))
    return ranges
