"""Which of Arrow's types holds the values of which other, exactly.

Databases tell the types of their columns in Arrow's terms, each through its driver. A
column takes an export's when every value either arrives as it is or is refused.
"""

from __future__ import annotations

import re

import pyarrow as pa

from exportd_server.sinks.base import ExportColumn
from exportd_server.sinks.database.arrow_types import plain_kind, plain_type
from exportd_server.sinks.database.values import (
    Convert,
    as_it_is,
    binaries,
    float16s,
    float32s,
)

_DECIMAL = re.compile(r"decimal\d+\((\d+), (-?\d+)\)")
_UNIT = re.compile(r"\[(s|ms|us|ns)")
_ZONED = ", tz="
_FLOATS: dict[str, tuple[int, Convert]] = {
    "halffloat": (16, float16s),
    "float": (32, float32s),
    "double": (64, lambda text: text.cast(pa.float64())),
}
_WIDEST = 38
"""Digits of the decimals that most databases have."""


def made_type(column: ExportColumn) -> pa.DataType:
    """The type of a column that is made for these values: one that most databases have,
    else text."""
    arrow = plain_type(column.type)
    kind = plain_kind(column.kind, arrow)
    if kind == "INTEGER":
        return _made_integer(arrow)
    if kind == "DECIMAL":
        digits, scale = _digits(arrow)
        fits = digits <= _WIDEST and scale >= 0
        return pa.decimal128(digits, scale) if fits else pa.string()
    fine = arrow.endswith("[ns]") or "[ns," in arrow
    if kind == "TIME" and not fine:
        return pa.time64("us")
    if kind == "TIMESTAMP" and not fine:
        return pa.timestamp("us", "UTC" if _ZONED in arrow else None)
    made = {
        "BOOLEAN": pa.bool_(),
        "FLOAT": pa.float64() if arrow == "double" else pa.float32(),
        "BINARY": pa.binary(),
        "DATE": pa.date32(),
    }
    return made.get(kind, pa.string())


def _made_integer(arrow: str) -> pa.DataType:
    if arrow == "uint64":
        return pa.decimal128(20, 0)
    # Few databases have unsigned ones, or any of 8 bits.
    bits = int(arrow.removeprefix("u").removeprefix("int"))
    bits = bits * 2 if arrow.startswith("u") else bits
    return pa.int16() if bits <= 16 else pa.int32() if bits == 32 else pa.int64()


def carrier(given: ExportColumn, taker: pa.DataType) -> Convert | None:
    """What makes values of `taker` of the texts of a column; None when that could change
    them. Single values that do not fit raise an error of Arrow's."""
    if _is_text(taker):
        return lambda text: text.cast(taker)
    arrow = plain_type(given.type)
    read = _reader(plain_kind(given.kind, arrow), arrow, taker)
    if read is None:
        return None
    return lambda text: read(text).cast(taker)


def _is_text(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(
        types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    )


def _reader(kind: str, arrow: str, taker: pa.DataType) -> Convert | None:
    """What reads the texts, in a type that can be cast to `taker` without loss."""
    types = pa.types
    decimal = types.is_decimal(taker) and taker.scale >= 0
    fits = False
    read: Convert = as_it_is
    if kind == "BOOLEAN":
        fits = types.is_boolean(taker)
        read = _cast(pa.bool_())
    elif kind == "INTEGER":
        fits = types.is_integer(taker) or decimal
        read = _cast(pa.uint64() if arrow == "uint64" else pa.int64())
    elif kind == "FLOAT":
        bits, read = _FLOATS[arrow]
        fits = types.is_floating(taker) and taker.bit_width >= bits
    elif kind == "DECIMAL":
        digits, scale = _digits(arrow)
        fits = decimal and taker.scale >= scale
        fits = fits or (types.is_integer(taker) and scale == 0)
        made = pa.decimal128 if digits <= _WIDEST else pa.decimal256
        read = _cast(made(digits, scale))
    elif kind == "BINARY":
        fits, read = _is_binary(taker), binaries
    elif kind == "DATE":
        fits, read = types.is_date(taker), _cast(pa.date32())
    elif kind == "TIME":
        fits, read = types.is_time(taker), _time(arrow)
    elif kind == "TIMESTAMP":
        zoned = _ZONED in arrow
        fits = types.is_timestamp(taker) and (taker.tz is not None) == zoned
        read = _cast(pa.timestamp(_unit(arrow), "UTC" if zoned else None))
    return read if fits else None


def _cast(kind: pa.DataType) -> Convert:
    return lambda text: text.cast(kind)


def _time(arrow: str) -> Convert:
    unit = _unit(arrow)
    day = pa.scalar("1970-01-01T")

    def read(text: pa.Array) -> pa.Array:
        import pyarrow.compute as pc  # noqa: PLC0415 - rarely wanted

        # Arrow reads no times of day, but those of a day.
        moments = pc.binary_join_element_wise(day, text, "")
        return moments.cast(pa.timestamp(unit)).cast(pa.time64(unit))

    return read


def _unit(arrow: str) -> str:
    """In which texts are written: nanoseconds, or microseconds for all others."""
    found = _UNIT.search(arrow)
    return "ns" if found is not None and found[1] == "ns" else "us"


def _digits(arrow: str) -> tuple[int, int]:
    found = _DECIMAL.fullmatch(arrow)
    if found is None:
        raise ValueError(f"{arrow!r} is no decimal")
    return int(found[1]), int(found[2])


def _is_binary(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
        or types.is_fixed_size_binary(kind)
    )
