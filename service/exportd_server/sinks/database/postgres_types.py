"""Which columns of an export fit which types of PostgreSQL, and how their text gets there.

Each value arrives as the text that docs/formats.md says. A column of the staging table
takes it, of a type whose own reading of that text is exact; an expression makes the
target's value of it. Where the target could round, cut or pad, a condition finds the
values that it would change, and they fail the delivery.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from exportd_server.sinks.database.arrow_types import plain_kind, plain_type

C = "\0"
"""Stands for the staging table's column in expressions: no name can hold it."""

_TEXTS = frozenset({"text", "varchar", "citext"})
_DECIMAL = re.compile(r"decimal(?:32|64|128|256)\((\d+), (-?\d+)\)")
_FROM_TEXT = ("uuid", "json", "jsonb", "numeric", "inet", "cidr", "macaddr", "xml")
_VAR_HEADER = 4
"""What `varchar(n)` and `numeric(p, s)` add to their modifiers."""


@dataclass(frozen=True, slots=True)
class PgType:
    """A column's type: `name` as the database calls it without its modifier, empty where
    it is not built in; `shown` with all; `base` what a domain is over, else the same."""

    name: str
    shown: str
    typmod: int = -1
    is_enum: bool = False


@dataclass(frozen=True, slots=True)
class Carrier:
    """How a column gets there: its type in the staging table, the value that the target
    is given, as an expression over `C`, and the condition, also over `C`, of values
    that the target would change, with what is then wrong with them. `straight`: the
    target reads the text as exactly by itself, and needs no staging."""

    staging: str
    value: str = C
    misfit: str = ""
    why: str = ""
    straight: bool = False


class Misfit(Exception):
    """No value of the export's type may be put there; `mend` says what would take it."""

    def __init__(self, mend: str) -> None:
        self.mend = mend
        super().__init__(mend)


def own_type(arrow: str) -> PgType:
    """The type that holds every value of a column, for a table that is made for it."""
    arrow = plain_type(arrow)
    if decimal := _DECIMAL.fullmatch(arrow):
        precision, scale = int(decimal[1]), int(decimal[2])
        if scale >= 0:
            shown = f"numeric({precision},{scale})"
            return PgType("numeric", shown, (precision << 16 | scale) + _VAR_HEADER)
        return PgType("numeric", "numeric")
    for pattern, name in _OWN:
        if re.fullmatch(pattern, arrow):
            return PgType(name, name)
    return PgType("json", "json")


_OWN = (
    (r"bool", "bool"),
    (r"u?int8|int16", "int2"),
    (r"uint16|int32", "int4"),
    (r"uint32|int64", "int8"),
    (r"uint64", "numeric"),
    (r"halffloat|float", "float4"),
    (r"double", "float8"),
    (r"(large_|)string(_view|)", "text"),
    (r"(large_|)binary(_view|)|fixed_size_binary\[\d+\]", "bytea"),
    (r"date32\[day\]|date64\[ms\]", "date"),
    (r"time32\[m?s\]|time64\[us\]", "time"),
    (r"timestamp\[(s|ms|us)\]", "timestamp"),
    (r"timestamp\[(s|ms|us), tz=.*\]", "timestamptz"),
    (r"duration\[us\]", "interval"),
    (r"extension<arrow\.uuid>", "uuid"),
    # Finer than microseconds, longer than an interval, or nothing at all.
    (r"(time64|timestamp|duration)\[.*\]|month_day_nano_interval|null", "text"),
)


def carrier(kind: str, arrow: str, target: PgType) -> Carrier:
    """How a column of the export gets into a column of this type. Raises `Misfit`."""
    arrow = plain_type(arrow)
    if arrow == "null":
        # There is no value at all, so any type will do.
        return Carrier("text", "NULL")
    if target.name in _TEXTS:
        return _text(target)
    if arrow == "extension<arrow.uuid>":
        return _only(target, "uuid")
    if arrow == "month_day_nano_interval":
        raise Misfit("text")
    return _KINDS[plain_kind(kind, arrow)](arrow, target)


def _text(target: PgType) -> Carrier:
    if target.typmod < 0:
        return Carrier("text", _cast(target), straight=True)
    # What is too long is an error, but blanks at the end are cut.
    return Carrier(
        "text",
        _cast(target),
        f"char_length({C}) > {target.typmod - _VAR_HEADER}",
        f"is too long for {target.shown}",
    )


def _from_string(target: PgType) -> Carrier:
    if target.name == "bpchar" and target.typmod > 0:
        # What is shorter would be padded.
        return Carrier(
            "text",
            _cast(target),
            f"char_length({C}) <> {target.typmod - _VAR_HEADER}",
            f"has not the length of {target.shown}",
        )
    if target.is_enum or (target.name in _FROM_TEXT and target.typmod < 0):
        staging = "text" if target.is_enum else target.name
        return Carrier(staging, _cast(target), straight=True)
    raise Misfit("text")


def _cast(target: PgType) -> str:
    return f"CAST({C} AS {target.shown})"


def _only(target: PgType, *names: str) -> Carrier:
    if target.name not in names:
        raise Misfit(" or ".join((*names, "text")))
    return Carrier(target.name, _cast(target), straight=True)


def _boolean(arrow: str, target: PgType) -> Carrier:
    del arrow
    return _only(target, "bool")


def _integer(arrow: str, target: PgType) -> Carrier:
    if target.name in ("int2", "int4", "int8"):
        # A number that is too large for it is an error of the database's.
        return Carrier(target.name, straight=True)
    if target.name == "numeric":
        return _numeric(0, target)
    if target.name == "float8" and re.fullmatch(r"u?int(8|16|32)", arrow):
        return Carrier("float8", straight=True)
    raise Misfit("bigint, numeric or text")


def _numeric(scale: int, target: PgType) -> Carrier:
    if target.typmod >= 0:
        # The scale is the lower eleven bits, with a sign.
        kept = ((target.typmod - _VAR_HEADER) & 0x7FF ^ 0x400) - 0x400
        if kept < scale:
            raise Misfit(f"numeric of scale {scale} or text")
    return Carrier(target.shown, straight=True)


def _decimal(arrow: str, target: PgType) -> Carrier:
    found = _DECIMAL.fullmatch(arrow)
    scale = max(0, int(found[2])) if found else 0
    if target.name == "numeric" and found:
        return _numeric(scale, target)
    if target.name in ("int2", "int4", "int8") and found and not scale:
        return Carrier(target.name, straight=True)
    raise Misfit(f"numeric of scale {scale} or text")


def _float(arrow: str, target: PgType) -> Carrier:
    # The text of a narrow number is exact in its own width only.
    own = "float8" if arrow == "double" else "float4"
    if target.name in ("float8", own):
        return Carrier(own, straight=own == target.name)
    raise Misfit("double precision or text" if own == "float8" else "real or text")


def _binary(arrow: str, target: PgType) -> Carrier:
    del arrow
    if target.name != "bytea":
        raise Misfit("bytea or text, which gets base64")
    return Carrier("text", f"decode({C}, 'base64')")


def _date(arrow: str, target: PgType) -> Carrier:
    del arrow
    return _only(target, "date")


def _digits(arrow: str, target: PgType) -> int:
    """How many digits of a second the target keeps, where they may be fewer than the
    export's has; -1 where they are enough."""
    kept = 6 if target.typmod < 0 else target.typmod
    given = {"s": 0, "ms": 3, "us": 6, "ns": 9}[re.findall(r"\[(s|ms|us|ns)\b", arrow)[0]]
    return kept if given > kept else -1


def _moment(arrow: str, target: PgType, *, ending: str = "") -> Carrier:
    kept = _digits(arrow, target)
    if kept < 0:
        return Carrier(target.name, straight=True)
    return Carrier(
        "text",
        _cast(target),
        rf"{C} ~ '\.\d{{{kept}}}\d*[1-9]\d*{ending}$'",
        f"is finer than {target.shown} keeps",
    )


def _time(arrow: str, target: PgType) -> Carrier:
    if target.name != "time":
        raise Misfit("time or text")
    return _moment(arrow, target)


def _timestamp(arrow: str, target: PgType) -> Carrier:
    name = "timestamptz" if "tz=" in arrow else "timestamp"
    if target.name != name:
        raise Misfit(f"{name} or text")
    return _moment(arrow, target, ending="Z" if name == "timestamptz" else "")


def _duration(arrow: str, target: PgType) -> Carrier:
    if target.name != "interval" or target.typmod >= 0:
        raise Misfit("interval or text")
    # PostgreSQL reads a fraction of a whole ISO 8601 duration as floating point, and takes
    # no sign before it; of plain seconds it reads every digit.
    value = f"CAST(replace(replace({C}, 'PT', ''), 'S', ' seconds') AS interval)"
    if _digits(arrow, target) < 0:
        return Carrier("text", value)
    return Carrier(
        "text",
        value,
        rf"{C} ~ '\.\d{{6}}\d*[1-9]\d*S$'",
        "is finer than interval keeps",
    )


def _nested(arrow: str, target: PgType) -> Carrier:
    del arrow
    return _only(target, "jsonb", "json")


_KINDS = {
    "BOOLEAN": _boolean,
    "INTEGER": _integer,
    "FLOAT": _float,
    "DECIMAL": _decimal,
    "STRING": lambda _, target: _from_string(target),
    "BINARY": _binary,
    "DATE": _date,
    "TIME": _time,
    "TIMESTAMP": _timestamp,
    "DURATION": _duration,
    "NESTED": _nested,
}


def over(expression: str, column: str) -> str:
    """An expression of a `Carrier` over a column of the staging table."""
    return expression.replace(C, column)
