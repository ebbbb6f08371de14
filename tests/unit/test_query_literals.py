"""Filter literals of callers, as values of their columns."""

from __future__ import annotations

import base64
from datetime import UTC, date, datetime, time
from decimal import Decimal

import pyarrow as pa
import pytest

from exportd_server.sources.base import Column, Scalar
from exportd_server.sources.literals import coerce

UTC_TIME = pa.timestamp("us", "UTC")
GOOD: list[tuple[pa.DataType, str, str, Scalar]] = [
    (pa.bool_(), "bool", "true", True),
    (pa.bool_(), "bool", "false", False),
    (pa.int64(), "int", "-9223372036854775808", -(2**63)),
    (pa.int16(), "int", "70000", 70000),
    (pa.float64(), "double", "1e-320", 1e-320),
    (pa.float64(), "double", "-inf", float("-inf")),
    (pa.float64(), "int", "-3", -3.0),
    (pa.decimal128(10, 2), "string", "12.50", Decimal("12.5")),
    (pa.decimal128(10, 2), "string", "-0012.5000", Decimal("-12.5")),
    (pa.decimal128(10, 2), "int", "12345678", Decimal(12345678)),
    (pa.decimal128(38, 18), "string", "0." + "0" * 17 + "1", Decimal("1e-18")),
    (pa.string(), "string", "", ""),
    (pa.string(), "string", "'; --", "'; --"),
    (pa.binary(), "bytes", base64.b64encode(b"\0\xff").decode(), b"\0\xff"),
    (pa.date32(), "string", "2024-02-29", date(2024, 2, 29)),
    (pa.time64("us"), "string", "13:45:00.5", time(13, 45, 0, 500_000)),
    (UTC_TIME, "string", "2026-01-31T13:45:00Z", datetime(2026, 1, 31, 13, 45, tzinfo=UTC)),
    (
        UTC_TIME,
        "string",
        "2026-01-31t13:45:00.000001-02:30",
        datetime(2026, 1, 31, 16, 15, 0, 1, tzinfo=UTC),
    ),
    (
        UTC_TIME,
        "timestamp",
        "2026-01-31T00:00:00.000000000Z",
        datetime(2026, 1, 31, tzinfo=UTC),
    ),
    (
        pa.timestamp("us"),
        "timestamp",
        "2026-01-31T00:00:00Z",
        datetime(2026, 1, 31, tzinfo=UTC),
    ),
]


@pytest.mark.parametrize(("kind", "member", "text", "value"), GOOD)
def test_a_literal_becomes_the_exact_value(
    kind: pa.DataType, member: str, text: str, value: Scalar
) -> None:
    found = coerce(Column("c", kind), member, text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("kind", "member", "text", "mend"),
    [
        (pa.bool_(), "string", "true", "bool_value"),
        (pa.bool_(), "bool", "True", "true or false"),
        (pa.int64(), "string", "5", "int_value"),
        (pa.int64(), "double", "5.0", "int_value"),
        (pa.int64(), "int", "9223372036854775808", "2^63"),
        (pa.int64(), "int", "five", "like 42"),
        (pa.int64(), "int", "\uff11", "like 42"),
        (pa.int64(), "int", "", "like 42"),
        (pa.float64(), "double", "nan", "NaN"),
        (pa.float64(), "double", "x", "like 1.5"),
        (pa.float64(), "string", "1.5", "double_value or int_value"),
        (pa.float64(), "int", "9007199254740993", "double_value"),
        (pa.decimal128(4, 2), "double", "1.5", "string_value or int_value"),
        (pa.decimal128(4, 2), "string", "1.255", "2 after it"),
        (pa.decimal128(4, 2), "string", "100", "2 digits before"),
        (pa.decimal128(4, 2), "string", "1e1", "like 12.5"),
        (pa.decimal128(4, 2), "string", "NaN", "like 12.5"),
        (pa.decimal128(4, 2), "string", "", "like 12.5"),
        (pa.string(), "int", "5", "string_value"),
        (pa.string(), "string", "a\0b", "U+0000"),
        (pa.string(), "string", "\ud800", "Unicode"),
        (pa.binary(), "string", "abc", "bytes_value"),
        (pa.binary(), "bytes", "***", "base64"),
        (pa.date32(), "string", "2023-02-29", "like 2026-01-31"),
        (pa.date32(), "string", "20230101", "like 2026-01-31"),
        (pa.date32(), "timestamp", "2023-01-01T00:00:00Z", "string_value"),
        (pa.time64("us"), "string", "24:00:00", "like 13:45"),
        (pa.time64("us"), "string", "13:45", "like 13:45"),
        (pa.time64("us"), "string", "13:45:00.1234567", "microsecond"),
        (UTC_TIME, "string", "2026-01-31T13:45:00", "no offset"),
        (UTC_TIME, "string", "2026-01-31", "RFC 3339"),
        (UTC_TIME, "string", "2026-02-30T00:00:00Z", "RFC 3339"),
        (UTC_TIME, "string", "2026-01-31T00:00:60Z", "RFC 3339"),
        (UTC_TIME, "string", "0001-01-01T00:00:00+01:00", "years 1 and 9999"),
        (UTC_TIME, "string", "2026-01-31T00:00:00+24:00", "RFC 3339"),
        (UTC_TIME, "timestamp", "2026-01-31T00:00:00.000000001Z", "microsecond"),
        (UTC_TIME, "int", "5", "timestamp_value or string_value"),
        (pa.timestamp("ns"), "timestamp", "1600-01-01T00:00:00Z", "1677"),
        (pa.duration("s"), "int", "5", "does not compare"),
        (pa.list_(pa.int64()), "int", "5", "does not compare"),
    ],
)
def test_a_literal_that_does_not_fit_is_refused_with_the_mend(
    kind: pa.DataType, member: str, text: str, mend: str
) -> None:
    with pytest.raises(ValueError) as refused:
        coerce(Column("c", kind), member, text)
    assert mend in str(refused.value)
