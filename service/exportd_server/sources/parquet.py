"""Rows of Parquet files as they lie there, read by Arrow.

For a query without conditions the file engine has nothing to add: Arrow reads the same
rows in the same order for half the CPU, and holds a few pages of each column where the
engine holds tens of MiB. It is asked only where both are certain to make the same of a
column; everything else stays with the engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
_MOST_FILES = 200
"""Of more files than that the engine reads a shard: here all their footers are looked at
first, and until then nobody can stop it."""


_KEPT_FOOTER = 256 * 2**10
"""Bytes of a footer that is not read twice."""


class _Groups(NamedTuple):
    """Neighbouring row groups, and how many of their rows to read at a time."""

    indexes: list[int]
    at_once: int


@dataclass(frozen=True, slots=True)
class _Piece:
    """What is wanted of a file: so many rows of some row groups, after the first `skip`."""

    path: str
    groups: tuple[_Groups, ...]
    skip: int
    rows: int
    metadata: pq.FileMetaData | None = None
    """What the file's footer tells, where it was kept."""


class PlainRows:
    """A range of the rows of some files, one file after another."""

    def __init__(self, names: Sequence[str], pieces: Sequence[_Piece]) -> None:
        self._names = list(names)
        self._pieces = pieces

    @classmethod
    def of(
        cls, paths: Sequence[str], columns: Sequence[Column], start: int, stop: int | None
    ) -> PlainRows | None:
        """The rows from `start` up to `stop`, that one left out, None: to the end.
        Nothing where a file is not one that Arrow reads as the engine does, or cannot be
        read at all, which the engine then tells in its own way, and for many files."""
        if len(paths) > _MOST_FILES:
            return None
        pieces: list[_Piece] = []
        seen = 0
        for path in paths:
            if stop is not None and seen >= stop:
                break
            footer = _Footer.of(path)
            if footer is None or not all(map(footer.has, columns)):
                return None
            # Kept, the first rows come sooner; but the footers of many files, or of a long
            # one, may be larger than the rows that are read at a time.
            keep = not pieces and footer.metadata.serialized_size <= _KEPT_FOOTER
            piece, seen = footer.piece(columns, start, stop, seen, keep=keep)
            if piece is not None:
                pieces.append(piece)
        return cls([column.name for column in columns], pieces)

    def batches(self, stop: Stop) -> Iterator[pa.RecordBatch]:
        """The rows. Raises what Arrow does, and `SourceFailed` once stopped."""
        for piece in self._pieces:
            with pa.OSFile(piece.path) as file:
                yield from self._read(file, piece, stop)

    def _read(
        self, file: pa.NativeFile, piece: _Piece, stop: Stop
    ) -> Iterator[pa.RecordBatch]:
        reader = pq.ParquetFile(
            file, metadata=piece.metadata, buffer_size=_BUFFER_BYTES, pre_buffer=False
        )
        skip, left = piece.skip, piece.rows
        for groups in piece.groups:
            for batch in reader.iter_batches(
                groups.at_once,
                row_groups=groups.indexes,
                columns=self._names,
                # Of many steps one is decoded while the one before is used; for a single
                # one everybody waits.
                use_threads=skip + left <= groups.at_once,
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
    footer = _Footer.of(path)
    if footer is None:
        return None
    columns = tuple(Column(field.name, _engines(field.type)) for field in footer.schema)
    return columns if columns and all(map(footer.has, columns)) else None


def row_count(path: str) -> int:
    """The rows of a file, as its footer tells. Raises `OSError` and Arrow's errors."""
    return int(pq.read_metadata(path).num_rows)


class _Footer:
    """What a file tells of itself."""

    def __init__(self, path: str, metadata: pq.FileMetaData, schema: pa.Schema) -> None:
        self._path = path
        self.metadata = metadata
        self.schema = schema
        # The places of the values of each column, by its name.
        self._leaves: dict[str, list[int]] = {}
        for place in range(len(metadata.schema)):
            name, _, _ = metadata.schema.column(place).path.partition(".")
            self._leaves.setdefault(name, []).append(place)

    @classmethod
    def of(cls, path: str) -> _Footer | None:
        """That of a file that can be read and whose names mean one column each, letter
        case aside, as the engine has it."""
        try:
            with pa.OSFile(path) as file:
                reader = pq.ParquetFile(file)
                metadata, schema = reader.metadata, reader.schema_arrow
        except (pa.ArrowException, OSError):
            return None
        if len({*map(str.casefold, schema.names)}) < len(schema.names):
            return None
        return cls(path, metadata, schema)

    def has(self, column: Column) -> bool:
        """Whether it has a column just as it is declared, and that is the same to both."""
        place = self.schema.get_field_index(column.name)
        if place < 0 or self.schema.field(place).type != column.type:
            return False
        wanted = {*_paths(column.type, column.name)} if _clear([column.name]) else {""}
        leaves = [
            self.metadata.schema.column(each) for each in self._leaves.get(column.name, ())
        ]
        return {leaf.path for leaf in leaves} == wanted and all(
            leaf.physical_type != "INT96" and leaf.logical_type.type in _LOGICAL
            for leaf in leaves
        )

    def piece(
        self,
        columns: Sequence[Column],
        start: int,
        stop: int | None,
        seen: int,
        *,
        keep: bool,
    ) -> tuple[_Piece | None, int]:
        """Its part of the rows from `start` to `stop`, `seen` of which came before it, and
        how many have then been seen; with `keep` the part has what the footer tells."""
        leaves = [leaf for column in columns for leaf in self._leaves[column.name]]
        found: list[_Groups] = []
        first = last = seen
        for index in range(self.metadata.num_row_groups):
            group = self.metadata.row_group(index)
            after = seen + group.num_rows
            if group.num_rows and after > start and (stop is None or seen < stop):
                first = first if found else seen
                last = after
                at_once = _at_once(group, leaves)
                if found and found[-1].at_once == at_once:
                    found[-1].indexes.append(index)
                else:
                    found.append(_Groups([index], at_once))
            seen = after
        if not found:
            return None, seen
        begin = max(start, first)
        end = last if stop is None else min(stop, last)
        # Beyond the last row nothing is decoded.
        groups = [each._replace(at_once=min(each.at_once, end - first)) for each in found]
        metadata = self.metadata if keep else None
        piece = _Piece(self._path, tuple(groups), begin - first, end - begin, metadata)
        return piece, seen


def _at_once(group: pq.RowGroupMetaData, leaves: Sequence[int]) -> int:
    """How many rows of a group to read at a time, in few steps, so that most neighbours
    are read alike."""
    size: int = sum(group.column(leaf).total_uncompressed_size for leaf in leaves)
    rows: int = BATCH_BYTES * group.num_rows // max(size, 1)
    return 1 << max(min(rows, _BATCH_ROWS).bit_length() - 1, 0)


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
