"""Column types as an operator may declare them in the catalogue, and as SQL names them."""

from __future__ import annotations

import re

import pyarrow as pa
import pyarrow.types as pat

UTC_MICROS = pa.timestamp("us", "UTC")
NAIVE_MICROS = pa.timestamp("us")

_NAMES: dict[str, pa.DataType] = {
    "bool": pa.bool_(),
    "int16": pa.int16(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float": pa.float32(),
    "double": pa.float64(),
    "string": pa.string(),
    "binary": pa.binary(),
    "date32[day]": pa.date32(),
    "time64[us]": pa.time64("us"),
    "timestamp[us]": NAIVE_MICROS,
    "timestamp[us, tz=UTC]": UTC_MICROS,
    # Shorter names for what nobody remembers how to spell.
    "date": pa.date32(),
    "time": pa.time64("us"),
    "timestamp": UTC_MICROS,
}
_DECIMAL = re.compile(r"decimal(?:128)?\(\s*([0-9]{1,2})\s*,\s*([0-9]{1,2})\s*\)")
_SQL: dict[pa.DataType, str] = {
    pa.bool_(): "BOOLEAN",
    pa.int16(): "SMALLINT",
    pa.int32(): "INT",
    pa.int64(): "BIGINT",
    pa.float32(): "FLOAT",
    pa.float64(): "DOUBLE",
    pa.string(): "TEXT",
    pa.binary(): "VARBINARY",
    pa.date32(): "DATE",
    pa.time64("us"): "TIME",
    NAIVE_MICROS: "TIMESTAMP",
    UTC_MICROS: "TIMESTAMPTZ",
}
MAX_PRECISION = 38


def parse_type(text: str) -> pa.DataType:
    """The Arrow type of a declared name; raises `ValueError` with the names there are."""
    name = text.strip()
    if name in _NAMES:
        return _NAMES[name]
    found = _DECIMAL.fullmatch(name)
    if found and 1 <= int(found[1]) <= MAX_PRECISION and int(found[2]) <= int(found[1]):
        return pa.decimal128(int(found[1]), int(found[2]))
    raise ValueError(f"is none of {', '.join(_NAMES)}, decimal(1 to 38, scale)")


def sql_type(kind: pa.DataType) -> str:
    """A declarable type in sqlglot's notation."""
    if pat.is_decimal(kind):
        return f"DECIMAL({kind.precision}, {kind.scale})"
    return _SQL[kind]
