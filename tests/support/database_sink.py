"""Exports to load into databases: real parts, made by exportd's encoders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import date, time
from decimal import Decimal

import pyarrow as pa

from exportd_server.encoders.base import (
    ArrowCompression,
    ArrowOptions,
    Compression,
    CsvOptions,
    Format,
    OutputFormat,
    ParquetCompression,
    ParquetOptions,
)
from exportd_server.sinks.base import Delivery, Export, ExportColumn, Part
from exportd_server.sources.base import ColumnKind
from tests.support.held_content import HeldContent
from tests.support.sinks import BytesContent, a_part, an_export, deliver_whole
from tests.support.tables import encode

CSV = OutputFormat(Format.CSV)
OUTPUTS = [
    *(OutputFormat(Format.CSV, compression) for compression in Compression),
    OutputFormat(Format.CSV, csv=CsvOptions(delimiter="\t", null_marker="NULL")),
    OutputFormat(Format.CSV, csv=CsvOptions(delimiter="1", header=False, null_marker="0")),
    *(
        OutputFormat(Format.PARQUET, parquet=ParquetOptions(compression=compression))
        for compression in ParquetCompression
    ),
    *(
        OutputFormat(Format.ARROW, arrow=ArrowOptions(compression=compression))
        for compression in ArrowCompression
    ),
]


def columns_of(schema: pa.Schema) -> tuple[ExportColumn, ...]:
    """The columns as the delivery is told them."""
    return tuple(
        ExportColumn(f.name, ColumnKind.of(f.type).value, str(f.type), f.nullable)
        for f in schema
    )


def export_of(schema: pa.Schema, output: OutputFormat = CSV) -> Export:
    """An export with these columns."""
    return an_export(output, columns_of(schema))


def part_of(
    batches: Sequence[pa.RecordBatch],
    schema: pa.Schema,
    output: OutputFormat = CSV,
    *,
    sequence: int = 0,
) -> Part:
    """One part with these batches."""
    encoded = encode(output, schema, batches)
    return a_part(
        encoded.data,
        sequence=sequence,
        rows=sum(batch.num_rows for batch in batches),
        prefix_bytes=encoded.prefix_bytes,
        extension=output.extension,
    )


def delivery_of(table: pa.Table, output: OutputFormat = CSV, *, parts: int = 2) -> Delivery:
    """A table's rows in so many parts."""
    each = -(-table.num_rows // parts) if table.num_rows else 0
    made = [
        part_of(
            table.slice(index * each, each).to_batches(),
            table.schema,
            output,
            sequence=index,
        )
        for index in range(parts)
    ]
    return deliver_whole(export_of(table.schema, output), *made)


def held(delivery: Delivery) -> tuple[Delivery, HeldContent]:
    """The same delivery, whose last part stops in its middle."""
    *others, last = delivery.parts
    assert isinstance(last.content, BytesContent)
    content = HeldContent(last.content.data)
    return replace(delivery, parts=(*others, replace(last, content=content))), content


EVERY_KIND = pa.table(
    {
        "bool": pa.array([True, False, None]),
        "i8": pa.array([-128, 127, None], pa.int8()),
        "i16": pa.array([-(2**15), 2**15 - 1, None], pa.int16()),
        "i32": pa.array([-(2**31), 2**31 - 1, None], pa.int32()),
        "i64": pa.array([-(2**63), 2**63 - 1, None], pa.int64()),
        "u32": pa.array([0, 2**32 - 1, None], pa.uint32()),
        "u64": pa.array([0, 2**64 - 1, None], pa.uint64()),
        "f16": pa.array([2.0**-24, 65504.0, None], pa.float16()),
        "f32": pa.array([2.0**-149, 0.1, None], pa.float32()),
        "f64": pa.array([5e-324, 1.7976931348623157e308, None]),
        "infinite": pa.array([float("inf"), float("-inf"), 0.1]),
        "decimal": pa.array(
            [Decimal("0.000000000000000001"), Decimal("-1e19"), None],
            pa.decimal128(38, 18),
        ),
        "wide": pa.array([Decimal(10) ** 59, Decimal(-1), None], pa.decimal256(60, 0)),
        "text": pa.array(["", "\\N", None]),
        "hard": pa.array(['"; DROP', "a\r\nb\n,\t|1", "NULL"]),
        "more": pa.array(["0", "naïve 😀 \u2028", " \\. "], pa.large_string()),
        "dot": pa.array(["\\.", "\n\\.\n", "\\"]),
        "coded": pa.array(["x", "", None]).dictionary_encode(),
        "number": pa.array([7, 8, None], pa.int32()).dictionary_encode(),
        "binary": pa.array([b"", bytes(range(256)), None]),
        "fixed": pa.array([b'\0\xff\n"', b"abcd", None], pa.binary(4)),
        "day": pa.array([date(1, 1, 1), date(9999, 12, 31), None]),
        "clock": pa.array([time(0, 0), time(23, 59, 59, 999999), None]),
        "s": pa.array([-62_135_596_800, 253_402_300_799, None], pa.timestamp("s")),
        "naive": pa.array([0, 1, None], pa.timestamp("us")),
        "utc": pa.array([-1, 1_700_000_000_123_456, None], pa.timestamp("us", "UTC")),
        "tokyo": pa.array([-1, 1_700_000_000_123, None], pa.timestamp("ms", "Asia/Tokyo")),
        "duration": pa.array([-1, 90_061_000_001, None], pa.duration("us")),
        "list": pa.array([[1, None], [], None], pa.list_(pa.int64())),
        "struct": pa.array([{"b": "x\n", "a": 1.5}, {"b": None, "a": float("nan")}, None]),
        "map": pa.array([[("k,", 1)], [], None], pa.map_(pa.string(), pa.int64())),
        "nothing": pa.nulls(3),
    }
)
"""Every kind of column, with values that are hard to carry."""
