"""How the file engine's SQL speaks of files and of the values in them.

Trees alone; nothing here runs them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sqlglot import exp

from exportd_server.sources import query as sql

FileFormat = Literal["parquet", "csv", "json"]

INTEGERS = frozenset(
    {
        "TINYINT",
        "SMALLINT",
        "INTEGER",
        "BIGINT",
        "HUGEINT",
        "UTINYINT",
        "USMALLINT",
        "UINTEGER",
        "UBIGINT",
    }
)
MARK = re.compile(r"exportd:((?:[0-9a-f]{2})*):")
"""What the error of `guarded` says: the name of the column, in hexadecimal."""


def option(name: str, value: exp.Expr) -> exp.Expr:
    """A named argument of a table function."""
    return exp.EQ(this=exp.to_identifier(name), expression=value)


def reader(
    file_format: FileFormat,
    paths: Sequence[str],
    types: Mapping[str, str] | None,
    delimiter: str,
    moments: Mapping[str, str] | None = None,
) -> exp.Expr:
    """The table function that reads files; `types` pins the columns' types, `moments`
    how CSV writes dates and timestamps, so that no file is guessed at anew."""
    files = exp.Array(expressions=[sql.text(path) for path in paths])
    options: dict[str, exp.Expr] = {"hive_partitioning": exp.false()}
    pinned = exp.Struct(
        expressions=[
            exp.PropertyEQ(this=sql.text(name), expression=sql.text(kind))
            for name, kind in (types or {}).items()
        ]
    )
    match file_format:
        case "csv":
            # RFC 4180, and nothing taken for a comment or a preamble by its looks. The
            # last one: otherwise "" and nothing would both be missing.
            options |= {
                "delim": sql.text(delimiter),
                "quote": sql.text('"'),
                "escape": sql.text('"'),
                "comment": sql.text(""),
                "skip": exp.Literal.number(0),
                "header": exp.true(),
                "allow_quoted_nulls": exp.false(),
            }
            if types:
                options["types"] = pinned
            for name, form in (moments or {}).items():
                options[name] = sql.text(form)
        case "json" if types:
            options["columns"] = pinned
    return sql.function(
        f"read_{file_format}",
        files,
        *[option(name, value) for name, value in options.items()],
    )


@dataclass(frozen=True, slots=True)
class Reading:
    """How a column is read: as `sources.query.Field` has it."""

    value: exp.Expr
    loose: exp.Expr | None = None
    misfit: exp.Expr | None = None


def guarded(name: str, kind: str) -> Reading:
    """Text as a whole number, or an error that names the column: the engine's own
    conversion would round 2.5 in silence."""
    column = sql.identifier(name)
    trimmed = sql.function("trim", column)
    whole = sql.function("regexp_full_match", trimmed, exp.Literal.string("[+-]?[0-9]+"))
    empty = exp.EQ(this=trimmed.copy(), expression=exp.Literal.string(""))
    value = (
        exp.Case()
        .when(empty, exp.Null())
        .when(
            exp.or_(whole, _is_null(column)),
            sql.cast(trimmed.copy(), kind),
        )
        .else_(sql.function("error", exp.Literal.string(f"exportd:{name.encode().hex()}:")))
    )
    tried = exp.TryCast(this=trimmed.copy(), to=exp.DataType.build(kind))
    loose = exp.Case().when(whole.copy(), tried)
    lost = exp.and_(_lost(column, loose), exp.Not(this=exp.paren(empty.copy())))
    return Reading(value, loose, _told(column, lost))


def converted(name: str, to: exp.DataType) -> Reading:
    """A column in the engine's own conversion to another type."""
    column = sql.identifier(name)
    loose = exp.TryCast(this=column.copy(), to=to.copy())
    value = exp.Cast(this=column, to=to)
    return Reading(value, loose, _told(column, _lost(column, loose)))


def _is_null(value: exp.Expr) -> exp.Expr:
    return exp.Is(this=value.copy(), expression=exp.Null())


def _lost(column: exp.Expr, loose: exp.Expr) -> exp.Expr:
    return exp.and_(exp.Not(this=_is_null(column)), _is_null(exp.paren(loose.copy())))


def _told(column: exp.Expr, lost: exp.Expr) -> exp.Expr:
    return exp.Case().when(lost, sql.cast(column.copy(), "TEXT"))
