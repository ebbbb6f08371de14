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
            found = _footer(path)
            if found is None:
                return None
            footer, schema = found
            if not all(_is_plain(footer, schema, column) for column in columns):
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
                # Beyond the last row nothing is decoded.
                most = min(BATCH_BYTES // max(widest, 1), _BATCH_ROWS, end - first)
                at_once = max(1, most)
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


def plain_columns(path: str) -> tuple[Column, ...] | None:
    """The columns of a file, of the types that the engine gives them; nothing unless Arrow
    reads each of them as the engine does."""
    found = _footer(path)
    if found is None:
        return None
    footer, schema = found
    columns = tuple(Column(field.name, _engines(field.type)) for field in schema)
    plain = columns and all(_is_plain(footer, schema, column) for column in columns)
    return columns if plain else None


def row_count(path: str) -> int:
    """The rows of a file, as its footer tells. Raises `OSError` and Arrow's errors."""
    return int(pq.read_metadata(path).num_rows)


def _footer(path: str) -> tuple[pq.FileMetaData, pa.Schema] | None:
    """What a file tells of itself, if it can be read and its names mean one column each,
    letter case aside, as the engine has it."""
    try:
        with pa.OSFile(path) as file:
            reader = pq.ParquetFile(file)
            footer, schema = reader.metadata, reader.schema_arrow
    except (pa.ArrowException, OSError):
        return None
    names = schema.names
    return (footer, schema) if len({*map(str.casefold, names)}) == len(names) else None


def _is_plain(footer: pq.FileMetaData, schema: pa.Schema, column: Column) -> bool:
    """Whether a file has a column just as it is declared, and that is the same to both."""
    place = schema.get_field_index(column.name)
    if place < 0 or schema.field(place).type != column.type:
        return False
    wanted = {*_paths(column.type, column.name)} if _clear([column.name]) else {""}
    inside = f"{column.name}."
    leaves = [
        leaf
        for leaf in map(footer.schema.column, range(len(footer.schema)))
        if leaf.path == column.name or leaf.path.startswith(inside)
    ]
    return {leaf.path for leaf in leaves} == wanted and all(
        leaf.physical_type != "INT96" and leaf.logical_type.type in _LOGICAL
        for leaf in leaves
    )


_LOGICAL = frozenset({"NONE", "STRING", "INT", "DECIMAL", "DATE", "TIMESTAMP"})
"""Not JSON and the like, of which the engine makes types of its own."""


def _paths(kind: pa.DataType, path: str) -> Iterator[str]:
    """Where the values of a column lie in a file, as the format has it since lists have
    one layout; for what is not the same to both, a path that no file has.

    https://github.com/apache/parquet-format/blob/master/LogicalTypes.md#lists
    """
    if pat.is_list(kind):
        yield from _paths(kind.value_type, f"{path}.list.element")
    elif pat.is_struct(kind):
        if not _clear([field.name for field in kind]):
            yield ""
        for field in kind:
            yield from _paths(field.type, f"{path}.{field.name}")
    else:
        yield path if _the_same_to_both(kind) else ""


def _clear(names: Sequence[str]) -> bool:
    """Whether each name means one thing: the engine tells them apart without letter case,
    and Arrow takes a dot for a step into a nested column."""
    whole = all(name and "." not in name for name in names)
    return whole and len({*map(str.casefold, names)}) == len(names) > 0


def _engines(kind: pa.DataType) -> pa.DataType:
    """The type that the engine gives what Arrow calls so."""
    if pat.is_list(kind):
        return pa.list_(pa.field("l", _engines(kind.value_type)))
    if pat.is_struct(kind):
        return pa.struct([(field.name, _engines(field.type)) for field in kind])
    return kind


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
        or (pat.is_timestamp(kind) and kind.unit == "us" and kind.tz in (None, "UTC"))
    )
