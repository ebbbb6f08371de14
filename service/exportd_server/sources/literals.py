"""Turns a caller's filter literal into a value of its column's kind.

Strict on purpose: a literal that the column could never hold exactly is refused with
what to send instead, so that no comparison is quietly about another value.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal

from exportd_server.sources.base import Column, ColumnKind, Scalar

_INT64 = range(-(2**63), 2**63)
_FIRST_NS = datetime(1677, 9, 22, tzinfo=UTC)
_LAST_NS = datetime(2262, 4, 11, tzinfo=UTC)
_INTEGER = re.compile(r"[+-]?[0-9]{1,19}")
_DECIMAL = re.compile(r"[+-]?[0-9]{1,80}(?:\.[0-9]{1,80})?")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_TIME = re.compile(r"([0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]{1,9}))?")
_TIMESTAMP = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[Tt ]([0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]{1,9}))?"
    r"(?:([Zz])|([+-])([0-9]{2}):([0-9]{2}))?"
)
_MEMBERS = {
    "string": "string_value",
    "int": "int_value",
    "double": "double_value",
    "bool": "bool_value",
    "timestamp": "timestamp_value",
    "bytes": "bytes_value",
}


def coerce(column: Column, kind: str, text: str) -> Scalar:
    """The value of a literal for a column.

    `kind` is one of string, int, double, bool, timestamp, bytes; `text` the literal's
    canonical text: decimal for int, `repr` for double, `true` or `false`, RFC 3339 for
    timestamp, base64 for bytes. Which kinds suit which column is the contract's
    `ColumnKind`. Raises `ValueError` with a text that tells the caller the mend.
    """
    readers = _READERS.get(column.kind, {})
    if not readers:
        raise ValueError(
            f"column {column.name} ({column.type}) does not compare with values"
        )
    reader = readers.get(kind)
    if reader is None:
        fitting = " or ".join(_MEMBERS[each] for each in readers)
        raise ValueError(
            f"column {column.name} ({column.type}) compares with {fitting}, "
            f"not {_MEMBERS.get(kind, kind)}"
        )
    return reader(column, text)


def _boolean(_: Column, text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError("must be true or false")
    return text == "true"


def _integer(column: Column, text: str) -> int:
    if not _INTEGER.fullmatch(text) or (value := int(text)) not in _INT64:
        raise ValueError(
            f"column {column.name} needs a whole number from -2^63 to 2^63 - 1, like 42"
        )
    return value


def _double(column: Column, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"column {column.name} needs a number, like 1.5") from None
    if math.isnan(value):
        raise ValueError("NaN compares with nothing; use a number")
    return value


def _double_from_integer(column: Column, text: str) -> float:
    whole = _integer(column, text)
    value = float(whole)
    if value != whole:
        raise ValueError(
            f"{whole} has no exact floating point form; send the double_value you mean"
        )
    return value


def _decimal(column: Column, text: str) -> Decimal:
    if not _DECIMAL.fullmatch(text):
        raise ValueError(f"column {column.name} needs a plain decimal, like 12.5")
    whole, _, fraction = text.lstrip("+-").partition(".")
    whole, fraction = whole.lstrip("0"), fraction.rstrip("0")
    precision, scale = column.type.precision, column.type.scale
    if len(fraction) > scale or len(whole) > precision - scale:
        raise ValueError(
            f"column {column.name} holds up to {precision - scale} digits before the "
            f"point and {scale} after it; {text} has more"
        )
    sign = "-" if text.startswith("-") else ""
    return Decimal(f"{sign}{whole or 0}.{fraction or 0}")


def _string(column: Column, text: str) -> str:
    if "\0" in text:
        raise ValueError(f"column {column.name}: text must not contain U+0000")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"column {column.name} needs valid Unicode") from None
    return text


def _bytes(column: Column, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise ValueError(f"column {column.name} needs bytes, as base64") from None


def _date(column: Column, text: str) -> date:
    mend = f"column {column.name} needs a calendar date, like 2026-01-31"
    if not _DATE.fullmatch(text):
        raise ValueError(mend)
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise ValueError(mend) from None


def _microseconds(column: Column, fraction: str | None) -> int:
    digits = (fraction or "").ljust(9, "0")
    if digits[6:] != "000":
        raise ValueError(f"column {column.name} compares to the microsecond, not finer")
    return int(digits[:6])


def _time(column: Column, text: str) -> time:
    found = _TIME.fullmatch(text)
    mend = f"column {column.name} needs a time of day, like 13:45:00.5"
    if found is None:
        raise ValueError(mend)
    micros = _microseconds(column, found[2])
    try:
        return time.fromisoformat(found[1]).replace(microsecond=micros)
    except ValueError:
        raise ValueError(mend) from None


def _timestamp(column: Column, text: str) -> datetime:
    mend = f"column {column.name} needs RFC 3339 with an offset, like 2026-01-31T13:45:00Z"
    found = _TIMESTAMP.fullmatch(text)
    if found is None:
        raise ValueError(mend)
    day, clock, fraction, zulu, sign, hours, minutes = found.groups()
    if zulu is None and sign is None:
        raise ValueError(f"{mend}; {text} has no offset")
    micros = _microseconds(column, fraction)
    try:
        offset = timedelta(hours=int(hours or 0), minutes=int(minutes or 0))
        zone = timezone(-offset if sign == "-" else offset)
        naive = datetime.fromisoformat(f"{day} {clock}")
        value = naive.replace(microsecond=micros, tzinfo=zone).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"{mend}, between the years 1 and 9999") from None
    if column.type.unit == "ns" and not _FIRST_NS <= value <= _LAST_NS:
        raise ValueError(
            f"column {column.name} holds moments from {_FIRST_NS:%Y-%m-%d} "
            f"to {_LAST_NS:%Y-%m-%d}"
        )
    return value


_Reader = Callable[[Column, str], Scalar]
_READERS: dict[ColumnKind, dict[str, _Reader]] = {
    ColumnKind.BOOLEAN: {"bool": _boolean},
    ColumnKind.INTEGER: {"int": _integer},
    ColumnKind.FLOAT: {"double": _double, "int": _double_from_integer},
    ColumnKind.DECIMAL: {"string": _decimal, "int": _decimal},
    ColumnKind.STRING: {"string": _string},
    ColumnKind.BINARY: {"bytes": _bytes},
    ColumnKind.DATE: {"string": _date},
    ColumnKind.TIME: {"string": _time},
    ColumnKind.TIMESTAMP: {"timestamp": _timestamp, "string": _timestamp},
}
