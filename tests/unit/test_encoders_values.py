"""The canonical texts of docs/formats.md, value by value."""

from __future__ import annotations

import uuid
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from exportd_server.encoders import values
from exportd_server.encoders.base import CsvOptions, Format, OutputFormat
from exportd_server.encoders.values import Slicer
from exportd_server.errors import ValueNotEncodable
from tests.support.tables import days, encode

UTC = "UTC"
FORMS: list[tuple[pa.DataType, Any, str]] = [
    (pa.bool_(), True, "true"),
    (pa.int64(), -(2**63), "-9223372036854775808"),
    (pa.uint64(), 2**64 - 1, "18446744073709551615"),
    (pa.float64(), 0.1, "0.1"),
    (pa.float64(), -0.0, "-0.0"),
    (pa.float64(), 5e-324, "5e-324"),
    (pa.float64(), float("nan"), "NaN"),
    (pa.float64(), float("inf"), "inf"),
    (pa.float64(), float("-inf"), "-inf"),
    (pa.float32(), 0.1, "0.1"),
    (pa.decimal128(38, 18), Decimal("1e-18"), "0.000000000000000001"),
    (pa.decimal128(38, 18), Decimal(0), "0.000000000000000000"),
    (pa.decimal128(38, 0), Decimal(10**38 - 1), "9" * 38),
    (pa.decimal128(5, -3), Decimal("1e5"), "100000"),
    (pa.decimal256(76, 38), Decimal("1e-38"), f"0.{'0' * 37}1"),
    (pa.decimal256(76, 38), Decimal(0), f"0.{'0' * 38}"),
    (pa.decimal64(18, 4), Decimal("1.5"), "1.5000"),
    (pa.decimal32(9, 2), Decimal("-1.5"), "-1.50"),
    (pa.timestamp("us", UTC), 1, "1970-01-01T00:00:00.000001Z"),
    (pa.timestamp("us", UTC), -1, "1969-12-31T23:59:59.999999Z"),
    (pa.timestamp("s", UTC), 1, "1970-01-01T00:00:01.000000Z"),
    (pa.timestamp("ms", UTC), 1, "1970-01-01T00:00:00.001000Z"),
    (pa.timestamp("ns", UTC), 1, "1970-01-01T00:00:00.000000001Z"),
    (pa.timestamp("us", "Asia/Tokyo"), 0, "1970-01-01T00:00:00.000000Z"),
    (pa.timestamp("us"), 0, "1970-01-01T00:00:00.000000"),
    (pa.timestamp("ns"), 0, "1970-01-01T00:00:00.000000000"),
    (pa.timestamp("us", UTC), 253_402_300_800_000_000, "+10000-01-01T00:00:00.000000Z"),
    (pa.timestamp("s", UTC), -62_198_755_200, "-0001-01-01T00:00:00.000000Z"),
    (pa.date32(), 0, "1970-01-01"),
    (pa.date32(), days("+12345-06-07"), "+12345-06-07"),
    (pa.date64(), 86_400_000, "1970-01-02"),
    (pa.time32("s"), 86_399, "23:59:59.000000"),
    (pa.time32("ms"), 1, "00:00:00.001000"),
    (pa.time64("us"), 1, "00:00:00.000001"),
    (pa.time64("ns"), 1, "00:00:00.000000001"),
    (pa.duration("s"), 90_061, "PT90061.000000S"),
    (pa.duration("ms"), -1500, "-PT1.500000S"),
    (pa.duration("us"), 1, "PT0.000001S"),
    (pa.duration("ns"), -(2**63), "-PT9223372036.854775808S"),
    (pa.month_day_nano_interval(), (14, -3, 1_500_000_000), "P14M-3DT1.500000000S"),
    (pa.month_day_nano_interval(), (0, 0, -1), "P0M0DT-0.000000001S"),
    (pa.binary(), b"\x00\xff", "AP8="),
    (pa.binary(2), b"\x00\xff", "AP8="),
    (pa.binary_view(), b"", '""'),
]


@pytest.mark.parametrize(("kind", "value", "text"), FORMS, ids=lambda v: str(v)[:40])
def test_a_value_has_one_text(kind: pa.DataType, value: Any, text: str) -> None:
    # A missing value before and after, and a slice: neither may shift the text.
    schema = pa.schema([("i", pa.int8()), ("v", kind)])
    columns = [pa.array([0, 1, 2, 3]), pa.array([None, value, None, value], kind)]
    columns[0] = columns[0].cast(pa.int8())
    whole = pa.RecordBatch.from_arrays(columns, schema=schema)
    output = OutputFormat(Format.CSV, csv=CsvOptions(header=False))
    part = encode(output, schema, [whole.slice(1)])
    assert part.data.decode() == f"1,{text}\n2,\n3,{text}\n"


STORED: list[tuple[pa.BaseExtensionType, Any, str]] = [
    (pa.uuid(), uuid.UUID(int=2**64 + 5).bytes, str(uuid.UUID(int=2**64 + 5))),
    (pa.json_(pa.string()), '{"a":1}', '"{""a"":1}"'),
    (pa.opaque(pa.string(), "numeric", "PostgreSQL"), "1.50", "1.50"),
    (pa.bool8(), 1, "1"),
]


@pytest.mark.parametrize(("kind", "value", "text"), STORED, ids=lambda v: str(v)[:40])
def test_an_extension_has_the_text_of_what_it_stores(
    kind: pa.BaseExtensionType, value: Any, text: str
) -> None:
    array = pa.ExtensionArray.from_storage(kind, pa.array([value], kind.storage_type))
    batch = pa.record_batch({"v": array})
    output = OutputFormat(Format.CSV, csv=CsvOptions(header=False))
    assert encode(output, batch.schema, [batch]).data.decode() == f"{text}\n"


def test_runs_are_written_out() -> None:
    runs = pa.RunEndEncodedArray.from_arrays([2, 3], ["x", None])
    batch = pa.record_batch({"v": runs, "i": pa.array([1, 2, 3])})
    output = OutputFormat(Format.CSV, csv=CsvOptions(header=False))
    assert encode(output, batch.schema, [batch]).data == b"x,1\nx,2\n,3\n"


@pytest.mark.parametrize("form", [Format.CSV, Format.JSONL])
@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pa.date32(), 2**31 - 1),
        (pa.date32(), -(2**31)),
        (pa.timestamp("us", UTC), 2**63 - 1),
        (pa.timestamp("us"), -(2**63)),
        (pa.timestamp("s"), 2**63 - 1),
    ],
    ids=str,
)
def test_a_year_that_no_text_can_show_is_an_error_with_its_column(
    form: Format, kind: pa.DataType, value: int
) -> None:
    batch = pa.record_batch({"when": pa.array([0, value], kind)})
    with pytest.raises(ValueNotEncodable) as caught:
        encode(OutputFormat(form), batch.schema, [batch])
    assert caught.value.metadata == {"column": "when"}
    assert str(value) not in caught.value.message


def test_slices_follow_the_text_that_rows_make() -> None:
    batch = pa.record_batch({"v": pa.array(range(200_000))})
    slicer = Slicer()
    sizes = []
    for piece in slicer.slices(batch):
        sizes.append(piece.num_rows)
        slicer.learn(piece.num_rows, piece.num_rows * 1024)
    assert sum(sizes) == 200_000
    # The target of text a slice, once it is known that a row makes a KiB.
    assert sizes[0] == 1024
    assert set(sizes[1:-1]) == {values._TARGET_BYTES // 1024}
    sizes = [piece.num_rows for piece in Slicer().slices(batch)]
    assert sum(sizes) == 200_000


def test_a_row_larger_than_any_slice_is_still_written() -> None:
    texts = ["x" * (20 << 20), "y"]
    batch = pa.record_batch({"v": texts})
    output = OutputFormat(Format.CSV, csv=CsvOptions(header=False))
    assert encode(output, batch.schema, [batch]).data.decode().split() == texts
