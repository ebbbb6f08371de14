"""Rows of Parquet files as they lie there, read by Arrow.

For a query without conditions the file engine has nothing to add: Arrow reads the same
rows in the same order for half the CPU, and holds a few pages of each column where the
engine holds tens of MiB. It is asked only where both are certain to make the same of a
column; everything else stays with the engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pat

from exportd_server.errors import SourceFailed
from exportd_server.sources.base import Column
from exportd_server.sources.batches import BATCH_BYTES, Stop

_BATCH_ROWS = 8_192
"""Most rows at a time. What a footer tells of a row's size is how it is stored: a long
text that stands in many rows is counted once."""
_BUFFER_BYTES = 256 * 2**10
"""How much of a column of a row group is read at a time. Without such a bound Arrow reads
all of it, however large row groups are."""


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring row groups of a file, which of their rows are wanted, and how many at
    a time."""

    path: str
    groups: tuple[int, ...]
    skip: int
    rows: int
    at_once: int


class PlainRows:
    """A range of the rows of some files, one file after another."""

    def __init__(self, names: Sequence[str], runs: Sequence[_Run]) -> None:
        self._names = list(names)
        self._runs = runs

    @classmethod
    def of(
        cls, paths: Sequence[str], columns: Sequence[Column], start: int, stop: int | None
    ) -> PlainRows | None:
        """The rows from `start` up to `stop`, that one left out, None: to the end.
        Nothing where a file is not one that Arrow reads as the engine does, or cannot be
        read at all, which the engine then tells in its own way."""
        runs = []
        seen = 0
        for path in paths:
            footer = _footer(path, columns)
            if footer is None:
                return None
            every = list(map(footer.row_group, range(footer.num_row_groups)))
            sizes = [group.num_rows for group in every]
            groups: list[int] = []
            first = seen
            for group, size in enumerate(sizes):
                if size and seen + size > start and (stop is None or seen < stop):
                    first = first if groups else seen
                    groups.append(group)
                seen += size
            if groups:
                last = first + sum(sizes[groups[0] : groups[-1] + 1])
                begin = max(start, first)
                end = last if stop is None else min(stop, last)
                widest = max(every[at].total_byte_size // sizes[at] for at in groups)
                at_once = max(1, min(BATCH_BYTES // max(widest, 1), _BATCH_ROWS))
                runs.append(_Run(path, tuple(groups), begin - first, end - begin, at_once))
        return cls([column.name for column in columns], runs)

    def batches(self, stop: Stop) -> Iterator[pa.RecordBatch]:
        """The rows. Raises what Arrow does, and `SourceFailed` once stopped."""
        for run in self._runs:
            with pa.OSFile(run.path) as file:
                yield from self._read(file, run, stop)

    def _read(self, file: pa.NativeFile, run: _Run, stop: Stop) -> Iterator[pa.RecordBatch]:
        reader = pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        skip, left = run.skip, run.rows
        for batch in reader.iter_batches(
            run.at_once,
            row_groups=list(run.groups),
            columns=self._names,
            use_threads=False,
        ):
            stop.check()
            wanted = batch.slice(min(skip, batch.num_rows), left)
            skip -= min(skip, batch.num_rows)
            left -= wanted.num_rows
            if wanted.num_rows:
                yield wanted.select(self._names)
            if not left:
                return
        raise SourceFailed("a file has fewer rows than it says")


def _footer(path: str, columns: Sequence[Column]) -> pq.FileMetaData | None:
    """What a file tells of itself, if Arrow reads these columns as they are declared."""
    try:
        with pa.OSFile(path) as file:
            reader = pq.ParquetFile(file)
            footer, schema = reader.metadata, reader.schema_arrow
    except (pa.ArrowException, OSError):
        return None
    # The engine tells names apart without letter case, and Arrow takes a dot for a step
    # into a nested column.
    if len({name.casefold() for name in schema.names}) < len(schema.names):
        return None
    leaves = {
        leaf.path: leaf.physical_type
        for leaf in map(footer.schema.column, range(len(footer.schema)))
    }
    for column in columns:
        place = schema.get_field_index(column.name)
        if (
            "." in column.name
            or place < 0
            or schema.field(place).type != column.type
            or not _the_same_to_both(column.type)
            or leaves.get(column.name) == "INT96"
        ):
            return None
    return footer


def _the_same_to_both(kind: pa.DataType) -> bool:
    return bool(
        pat.is_boolean(kind)
        or pat.is_integer(kind)
        or pat.is_float32(kind)
        or pat.is_float64(kind)
        or pat.is_string(kind)
        or pat.is_binary(kind)
        or pat.is_decimal128(kind)
        or pat.is_date32(kind)
        or (pat.is_timestamp(kind) and kind.unit == "us")
    )
