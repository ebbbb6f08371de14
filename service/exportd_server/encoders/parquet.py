"""Apache Parquet, in row groups that are bounded by rows and by bytes."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pat

from exportd_server.encoders.base import ByteSink, OutputFormat, ParquetCompression
from exportd_server.encoders.compress import Tap
from exportd_server.encoders.values import (
    conform,
    encoding,
    is_list,
    list_offsets,
    map_entries,
    simple,
)

_GROUP_BYTES = 8 << 20
_SAMPLE_ROWS = 8192
_DECIMAL128 = 38
_CODECS = {
    ParquetCompression.UNCOMPRESSED: "none",
    ParquetCompression.SNAPPY: "snappy",
    ParquetCompression.ZSTD: "zstd",
    ParquetCompression.LZ4: "lz4",
}


class ParquetEncoder:
    """Writes one part as a Parquet file.

    Batches are kept, uncopied, until they fill a row group: as many rows as asked for,
    or 8 MiB of Arrow data if that comes first.
    """

    def __init__(self, output: OutputFormat, schema: pa.Schema, sink: ByteSink) -> None:
        self._schema = schema
        self._carried = pa.schema(
            [field.with_type(carried(field.type)) for field in schema],
            metadata=schema.metadata,
        )
        self._options = output.parquet
        self._tap = Tap(sink)
        self._writer: Any = None
        self._batches: list[pa.RecordBatch] = []
        self._rows = 0
        self._bytes = 0
        self._ratio = 1.0
        self.prefix_bytes = 0
        self.suffix_bytes = 0

    @property
    def buffered_bytes(self) -> int:
        """Stored size of the rows that wait for their row group to fill, going by the
        groups before; before the first one, their size in memory."""
        return int(self._bytes * self._ratio)

    def write(self, batch: pa.RecordBatch) -> None:
        """Encode one batch."""
        self._add(self._carry(conform(batch, self._schema)))

    def stage(self, batch: pa.RecordBatch) -> Callable[[], None]:
        """Make sure of one batch, which is to wait for its row group."""
        batch = self._carry(conform(batch, self._schema))
        for field, column in zip(self._carried, batch.columns, strict=True):
            if _is_converted(field.type):
                with encoding(field.name):
                    _try(field, column)
        return partial(self._add, batch)

    def _add(self, batch: pa.RecordBatch) -> None:
        while batch.num_rows:
            rows = min(batch.num_rows, self._options.row_group_rows - self._rows)
            row_bytes = max(1.0, batch.nbytes / batch.num_rows)
            rows = min(rows, int((_GROUP_BYTES - self._bytes) / row_bytes))
            if rows < 1 and not self._rows:
                rows = 1
            if rows > 0:
                self._batches.append(batch.slice(0, rows))
                self._rows += rows
                self._bytes += int(rows * row_bytes)
                batch = batch.slice(rows)
            if batch.num_rows or self._rows == self._options.row_group_rows:
                self._write_group()

    def flush(self) -> None:
        """Nothing: a row group cut short would cost every later reader."""

    def close(self) -> None:
        """Write the last row group and the footer."""
        if self._rows or self._writer is None:
            self._write_group()
        with self._tap.open(), encoding():
            self._writer.close()

    def _carry(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        columns = []
        for field, column in zip(self._carried, batch.columns, strict=True):
            with encoding(field.name):
                columns.append(carry(column, field.type))
        return pa.RecordBatch.from_arrays(columns, schema=self._carried)

    def _write_group(self) -> None:
        table = pa.Table.from_batches(self._batches, self._carried)
        size, before = self._bytes, self._tap.written
        self._batches, self._rows, self._bytes = [], 0, 0
        with self._tap.open(), encoding():
            if self._writer is None:
                self._writer = pq.ParquetWriter(
                    self._tap.file(),
                    self._carried,
                    compression=_CODECS[self._options.compression],
                    use_dictionary=_repetitive(table),
                )
            if table.num_rows:
                self._writer.write_table(table, row_group_size=table.num_rows)
        self._ratio = (self._tap.written - before) / max(size, 1)


def carried(kind: pa.DataType) -> pa.DataType:
    """The type under which Parquet carries values of a type that it, or Arrow's writer
    of it, does not know. The values are the same, but for intervals, which become text.
    """
    if pat.is_interval(kind):
        return pa.string()
    if pat.is_run_end_encoded(kind):
        return carried(kind.value_type)
    if pat.is_decimal(kind) and kind.scale < 0:
        whole = kind.precision - kind.scale
        return pa.decimal128(whole, 0) if whole <= _DECIMAL128 else pa.decimal256(whole, 0)
    if pat.is_string_view(kind):
        return pa.string()
    if pat.is_binary_view(kind):
        return pa.binary()
    if pat.is_struct(kind):
        return pa.struct([field.with_type(carried(field.type)) for field in kind])
    if pat.is_map(kind):
        value = kind.item_field
        return pa.map_(carried(kind.key_type), value.with_type(carried(value.type)))
    if is_list(kind):
        item = kind.value_field.with_type(carried(kind.value_type))
        if pat.is_fixed_size_list(kind):
            return pa.list_(item, kind.list_size)
        return pa.large_list(item) if _is_large(kind) else pa.list_(item)
    return kind


def carry(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """The values under the type that `carried` gives.

    Arrow's own cast does it for flat columns alone: of lists in views it makes invalid
    ones.
    """
    if array.type == kind:
        return array
    if pat.is_interval(array.type) or pat.is_run_end_encoded(array.type):
        return simple(array).cast(kind)
    if pat.is_struct(kind):
        children = zip(array.flatten(), kind, strict=True)
        return pa.StructArray.from_arrays(
            [carry(child, field.type) for child, field in children],
            fields=list(kind),
            mask=array.is_null(),
        )
    if pat.is_map(kind):
        entries = map_entries(array)
        keys, values = entries.flatten().flatten()
        return pa.MapArray.from_arrays(
            list_offsets(entries),
            carry(keys, kind.key_type),
            carry(values, kind.item_type),
            type=kind,
            mask=array.is_null(),
        )
    if pat.is_fixed_size_list(kind):
        size = kind.list_size
        items = array.values.slice(array.offset * size, len(array) * size)
        return pa.FixedSizeListArray.from_arrays(
            carry(items, kind.value_type), type=kind, mask=array.is_null()
        )
    if is_list(kind):
        make = pa.LargeListArray if pat.is_large_list(kind) else pa.ListArray
        offsets = list_offsets(array)
        return make.from_arrays(
            offsets.cast(pa.int64()) if pat.is_large_list(kind) else offsets,
            carry(array.flatten(), kind.value_type),
            type=kind,
            mask=array.is_null(),
        )
    return array.cast(kind)


def _is_converted(kind: pa.DataType) -> bool:
    """Whether values are of a type that Arrow's writer puts into another one, which may
    not hold them: seconds as milliseconds, for one."""
    if (pat.is_timestamp(kind) and kind.unit == "s") or pat.is_date64(kind):
        return True
    if pat.is_dictionary(kind):
        return _is_converted(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return _is_converted(kind.storage_type)
    return any(_is_converted(kind.field(index).type) for index in range(kind.num_fields))


def _try(field: pa.Field, column: pa.Array) -> None:
    """Write a column to nowhere."""
    table = pa.Table.from_arrays([column], schema=pa.schema([field]))
    with pq.ParquetWriter(io.BytesIO(), table.schema, compression="none") as writer:
        writer.write_table(table)


def _is_large(kind: pa.DataType) -> bool:
    return bool(pat.is_large_list(kind) or pat.is_large_list_view(kind))


def _repetitive(table: pa.Table) -> list[str]:
    """Leaf columns, by their paths in the file, whose first rows repeat themselves.

    A dictionary of values that hardly repeat costs time and memory and saves nothing.
    """
    sample = table.slice(0, _SAMPLE_ROWS)
    various = {
        name
        for name, column in zip(sample.column_names, sample.columns, strict=True)
        if _is_various(column)
    }
    # What the leaves are called is Parquet's affair: ask an empty file.
    empty = io.BytesIO()
    # (`write_table` would set up every file system that Arrow knows, for 40 MiB.)
    pq.ParquetWriter(empty, table.schema).close()
    leaves = pq.ParquetFile(empty).schema
    paths = [leaves.column(index).path for index in range(len(leaves))]
    return [path for path in paths if path not in various]


def _is_various(column: pa.ChunkedArray) -> bool:
    try:
        distinct = pc.count_distinct(column).as_py()
    except pa.ArrowNotImplementedError:
        return False
    return bool(distinct * 2 > len(column))
