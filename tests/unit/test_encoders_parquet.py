"""Parquet: row groups, logical types, and what other readers see."""

from __future__ import annotations

import gc
import io
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exportd_server.encoders import parquet
from exportd_server.encoders.base import (
    Format,
    OutputFormat,
    ParquetCompression,
    ParquetOptions,
)
from exportd_server.encoders.registry import open_encoder
from tests.support.tables import Collector, encode, query


def file_of(batches: list[pa.RecordBatch], **options: Any) -> pq.ParquetFile:
    output = OutputFormat(Format.PARQUET, parquet=ParquetOptions(**options))
    return pq.ParquetFile(io.BytesIO(encode(output, batches[0].schema, batches).data))


def groups_of(file: pq.ParquetFile) -> list[int]:
    return [
        file.metadata.row_group(index).num_rows
        for index in range(file.metadata.num_row_groups)
    ]


@pytest.mark.parametrize("size", [1, 7, 100, 1000, 1001, 3000])
def test_row_groups_have_the_rows_asked_for_however_batches_come(size: int) -> None:
    whole = pa.record_batch({"v": range(2500)})
    batches = [whole.slice(start, size) for start in range(0, 2500, size)]
    file = file_of(batches, row_group_rows=1000)
    assert groups_of(file) == [1000, 1000, 500]
    assert file.read()["v"].to_pylist() == list(range(2500))


def test_wide_rows_end_a_row_group_by_their_bytes() -> None:
    wide = 1 << 18
    most = parquet._GROUP_BYTES // wide
    rows = 2 * most + most // 2
    whole = pa.record_batch({"i": range(rows), "v": ["x" * wide] * rows})
    for batches in ([whole], [whole.slice(i, 11) for i in range(0, rows, 11)]):
        groups = groups_of(file_of(batches))
        assert sum(groups) == rows
        assert len(groups) == 3
        assert max(groups) <= most


def test_a_row_wider_than_a_row_group_is_written_alone() -> None:
    wide = pa.record_batch({"v": ["x" * (parquet._GROUP_BYTES + 1), "y", "z"]})
    file = file_of([wide.slice(1, 1), wide.slice(0, 1), wide.slice(1, 2)])
    assert sum(groups_of(file)) == 4


def test_what_waits_is_estimated_by_the_groups_before() -> None:
    batch = pa.record_batch({"v": [f"{row:>1000}" for row in range(1000)]})
    sink = Collector()
    output = OutputFormat(Format.PARQUET, parquet=ParquetOptions(row_group_rows=1000))
    encoder = open_encoder(output, batch.schema, sink)
    encoder.write(batch.slice(0, 500))
    # Before anything is stored, the size in memory.
    assert encoder.buffered_bytes == pytest.approx(502_000, rel=0.01)
    encoder.write(batch.slice(500))
    assert encoder.buffered_bytes == 0
    stored = len(sink.data)
    encoder.write(batch.slice(0, 500))
    assert encoder.buffered_bytes == pytest.approx(stored / 2, rel=0.1)


@pytest.mark.parametrize("compression", list(ParquetCompression))
def test_pages_are_compressed_as_asked(compression: ParquetCompression) -> None:
    file = file_of([pa.record_batch({"v": [1, 2, 3]})], compression=compression)
    assert file.metadata.row_group(0).column(0).compression == compression


def test_only_columns_that_repeat_themselves_get_a_dictionary() -> None:
    rows = 20_000
    batch = pa.record_batch(
        {
            "unique": [f"{row:064x}" for row in range(rows)],
            "few": [f"{row % 7}" for row in range(rows)],
            "nested.few": pa.array([[row % 7] for row in range(rows)]),
        }
    )
    file = file_of([batch])
    has = {}
    for index in range(3):
        column = file.metadata.row_group(0).column(index)
        has[column.path_in_schema] = column.has_dictionary_page
    assert has == {"unique": False, "few": True, "nested.few.list.element": True}


def test_logical_types_and_nullability_survive() -> None:
    schema = pa.schema(
        [
            pa.field("id", pa.int64(), nullable=False),
            pa.field("when", pa.timestamp("us", "UTC")),
            pa.field("naive", pa.timestamp("us")),
            pa.field("money", pa.decimal128(38, 18)),
            pa.field("day", pa.date32()),
            pa.field("clock", pa.time64("us")),
            pa.field("tags", pa.list_(pa.field("element", pa.string(), nullable=False))),
            pa.field("map", pa.map_(pa.string(), pa.int64())),
            pa.field("unsigned", pa.uint64()),
            pa.field("lasting", pa.duration("us")),
        ],
        metadata={"origin": "here"},
    )
    file = file_of([_row(schema)])
    assert file.schema_arrow.remove_metadata().equals(schema.remove_metadata())
    logical = {
        file.schema.column(i).path: str(file.schema.column(i).logical_type)
        for i in range(len(file.schema))
    }
    assert "isAdjustedToUTC=true, timeUnit=microseconds" in logical["when"]
    assert "isAdjustedToUTC=false, timeUnit=microseconds" in logical["naive"]
    assert logical["money"] == "Decimal(precision=38, scale=18)"
    assert logical["day"] == "Date"
    assert logical["unsigned"] == "Int(bitWidth=64, isSigned=false)"
    assert file.schema.column(0).max_definition_level == 0


def _row(schema: pa.Schema) -> pa.RecordBatch:
    values = [1, 0, 0, Decimal(1), 0, 0, ["a"], [("k", 1)], 2**64 - 1, -5]
    arrays = [
        pa.array([value], field.type) for value, field in zip(values, schema, strict=True)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def test_types_that_parquet_lacks_are_carried_by_others() -> None:
    runs = pa.RunEndEncodedArray.from_arrays([2], ["x"])
    batch = pa.record_batch(
        {
            "interval": pa.array([(1, 2, 3), None], pa.month_day_nano_interval()),
            "runs": runs,
            "coarse": pa.array([Decimal(1000), None], pa.decimal128(5, -3)),
            "views": pa.array([["é"], None], pa.list_view(pa.string_view())),
        }
    )
    assert file_of([batch]).read().to_pylist() == [
        {
            "interval": "P1M2DT0.000000003S",
            "runs": "x",
            "coarse": Decimal(1000),
            "views": ["é"],
        },
        {"interval": None, "runs": "x", "coarse": None, "views": None},
    ]


def test_duckdb_and_polars_read_what_was_written(tmp_path: Path) -> None:
    batch = pa.record_batch(
        {
            "whole": pa.array([2**63 - 1, None]),
            "number": pa.array([float("nan"), None]),
            "money": pa.array([Decimal("1e-18"), None], pa.decimal128(38, 18)),
            "text": pa.array(["é\n", None]),
            "bytes": pa.array([b"\xff\x00", None]),
            "when": pa.array([1, None], pa.timestamp("us", "UTC")),
            "nested": pa.array([{"a": [1, None]}, None]),
        }
    )
    path = tmp_path / "x.parquet"
    path.write_bytes(encode(OutputFormat(Format.PARQUET), batch.schema, [batch]).data)
    frame = pl.read_parquet(path)
    moment = datetime(1970, 1, 1, 0, 0, 0, 1, UTC)
    assert frame["when"].to_list() == [moment, None]
    first, second = query(
        'SELECT whole, isnan(number), money, text, bytes, epoch_us("when"), nested '
        f"FROM '{path}'"
    )
    assert first == (
        2**63 - 1,
        True,
        Decimal("0.000000000000000001"),
        "é\n",
        b"\xff\x00",
        1,
        {"a": [1, None]},
    )
    assert set(second) == {None}
    for name in ("whole", "money", "text", "bytes", "nested"):
        assert frame[name].to_list() == batch[name].to_pylist(), name


def test_a_file_that_is_given_up_gets_no_footer() -> None:
    # Arrow's writer closes itself when it goes; a long footer is not held back by
    # the gathering of small writes.
    sink = Collector()
    output = OutputFormat(Format.PARQUET, parquet=ParquetOptions(row_group_rows=1))
    batch = pa.record_batch({"v": range(2000)})
    encoder = open_encoder(output, batch.schema, sink)
    encoder.write(batch)
    written = bytes(sink.data)
    del encoder
    gc.collect()
    assert sink.data == written
    assert not written.endswith(b"PAR1")
