"""Files of a dataset at one moment, and how they are cut into pieces of a fair size.

Nothing here knows the engine that reads them.
"""

from __future__ import annotations

import glob
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import pyarrow.parquet as pq

from exportd_server.errors import SourceFailed
from exportd_server.sources.base import MOST_SHARDS

_SETTLED_SECONDS = 1.0
"""A file younger than this when it was looked at may change again without its
modification time moving, the clock of file systems being coarse."""

_FREE = 100
"""So many files, or row groups of a file, are looked through in less time than an
engine takes to start."""

_ROWS_PER_FILE = 200
_ROWS_PER_GROUP = 3_000
"""Beyond that, rows a shard has at least for each file of the dataset, and for each row
group of the file it is cut from. Every shard looks through all the files' names and
times, and through the whole footer; this keeps that at about a tenth of its work."""


class File(NamedTuple):
    """A file as it was when it was looked at: its size in bytes, and its modification
    time in nanoseconds."""

    path: str
    size: int
    modified_ns: int


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a pattern at one moment, in the order they are read in. `digest`
    stands for all that is known of them. `settled`: none of them is so young that it
    might change again unseen."""

    files: tuple[File, ...]
    digest: str
    settled: bool

    @property
    def paths(self) -> list[str]:
        """Where they are."""
        return [file.path for file in self.files]


def list_files(pattern: str) -> Listing:
    """The files that an absolute pattern means now. Raises `SourceFailed`."""
    # The pattern is absolute and may hold `**`.
    files = _look_at(sorted(glob.glob(pattern, recursive=True)))  # noqa: PTH207
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.path}\0{file.size}\0{file.modified_ns}\0".encode())
    newest = max((file.modified_ns for file in files), default=0) / 1e9
    settled = time.time() - newest > _SETTLED_SECONDS
    return Listing(files, digest.hexdigest(), settled)


def unchanged(files: Sequence[File]) -> bool:
    """Whether they still are as they were. Raises `SourceFailed`."""
    return _look_at([file.path for file in files]) == tuple(files)


def _look_at(paths: Sequence[str]) -> tuple[File, ...]:
    files: list[File] = []
    for path in paths:
        try:
            found = os.stat(path)  # noqa: PTH116 - one call for each of many files
        except FileNotFoundError:
            continue  # gone meanwhile, or a link to nothing
        except OSError as error:
            raise SourceFailed from error
        if stat.S_ISREG(found.st_mode):
            files.append(File(path, found.st_size, found.st_mtime_ns))
    return tuple(files)


@dataclass(frozen=True, slots=True)
class Piece:
    """The files from `first` up to `last`, that one left out, by their place in the
    listing. `rows` narrows a single file to a range of its rows, likewise."""

    first: int
    last: int
    rows: tuple[int, int] | None = None


def group_rows(path: str) -> list[int]:
    """The rows of each row group of a Parquet file. Arrow tells them in a tenth of the
    engine's time, which makes a row of every column of every group. Raises `OSError`
    and Arrow's errors."""
    footer = pq.read_metadata(path)
    return [footer.row_group(each).num_rows for each in range(footer.num_row_groups)]


def least_rows(shard_rows: int, files: int) -> int:
    """Rows a shard should have, when there are so many files."""
    return max(shard_rows, _ROWS_PER_FILE * files if files > _FREE else 1)


def cut_rows(
    counts: Sequence[int], rows: int, groups: Callable[[int], Sequence[int]]
) -> tuple[Piece, ...]:
    """Pieces of about so many rows: runs of whole files, and runs of the row groups of
    a file that is much larger than that. `counts` are the files' rows; `groups` tells
    the rows of each row group of a file. A row group is never cut: it costs as much to
    read in part as in whole."""
    pieces: list[Piece] = []
    rows = max(rows, sum(counts) // MOST_SHARDS)
    start = 0
    large = [place for place, count in enumerate(counts) if count > rows * 3 // 2]
    for place in [*large, len(counts)]:
        pieces += _runs_of_files(counts, rows, start, place)
        if place < len(counts):
            pieces += _runs_of_groups(place, groups(place), rows)
        start = place + 1
    return tuple(pieces) or (Piece(0, len(counts)),)


def cut_sizes(sizes: Sequence[int], size: float) -> tuple[Piece, ...]:
    """Pieces of about so many bytes: runs of whole files."""
    pieces = _runs_of_files(sizes, max(size, sum(sizes) / MOST_SHARDS), 0, len(sizes))
    return tuple(pieces) or (Piece(0, len(sizes)),)


def _runs_of_files(
    sizes: Sequence[int], wanted: float, start: int, stop: int
) -> list[Piece]:
    runs = _runs(sizes[start:stop], wanted)
    return [Piece(start + first, start + last) for first, last in runs]


def _runs_of_groups(place: int, groups: Sequence[int], wanted: int) -> Iterator[Piece]:
    least = _ROWS_PER_GROUP * len(groups) if len(groups) > _FREE else 1
    row = 0
    for first, last in _runs(groups, max(wanted, least)):
        count = sum(groups[first:last])
        yield Piece(place, place + 1, (row, row + count))
        row += count


def _runs(sizes: Sequence[int], wanted: float) -> list[tuple[int, int]]:
    """Ranges of neighbours whose sizes add up to about `wanted`, as even as they come.
    None is empty."""
    total = sum(sizes)
    if not total:
        return []
    share = total / max(round(total / wanted), 1)
    starts: list[int] = []
    last_part = -1
    done = 0
    for place, size in enumerate(sizes):
        # Whatever is in the middle of a size decides whose share it is.
        part = int((done + size / 2) / share)
        if size and part > last_part:
            starts.append(place if starts else 0)
            last_part = part
        done += size
    return list(pairwise([*starts, len(sizes)]))
