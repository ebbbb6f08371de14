"""Builds the SQL of a query, as a syntax tree.

No text of a caller's is ever put into SQL: names come from the catalogue and are
quoted, values become literals or parameters, and the tree's generator escapes both for
its dialect. What each comparison means is fixed here, the same for every dialect:

- A missing value meets `IS_NULL` alone.
- Text compares by code point, with letter case; `%` and `_` are plain characters.
- Timestamps without a zone count as UTC.
- NaN equals itself and is greater than every other number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import Self

import pyarrow as pa
import pyarrow.types as pat
from sqlglot import exp

from exportd_server.sources.base import (
    Column,
    ColumnKind,
    Filter,
    FilterOperator,
    Query,
    Scalar,
)

_COMPARISONS: dict[FilterOperator, Callable[..., exp.Expr]] = {
    FilterOperator.EQUAL: exp.EQ,
    FilterOperator.NOT_EQUAL: exp.NEQ,
    FilterOperator.LESS: exp.LT,
    FilterOperator.LESS_OR_EQUAL: exp.LTE,
    FilterOperator.GREATER: exp.GT,
    FilterOperator.GREATER_OR_EQUAL: exp.GTE,
}
_ORDERED = frozenset(
    {
        FilterOperator.LESS,
        FilterOperator.LESS_OR_EQUAL,
        FilterOperator.GREATER,
        FilterOperator.GREATER_OR_EQUAL,
    }
)


@dataclass(frozen=True, slots=True)
class Field:
    """A column and how SQL speaks of it: `value` is what is read, `operand` what is
    compared, `text` the operand where text is ordered or searched."""

    column: Column
    value: exp.Expr
    operand: exp.Expr
    text: exp.Expr
    loose: exp.Expr | None = field(default=None, kw_only=True)
    """Where reading `value` may fail on one row: the same value, but missing there."""
    misfit: exp.Expr | None = field(default=None, kw_only=True)
    """Text of what `loose` is not; missing everywhere else."""

    @classmethod
    def plain(cls, column: Column) -> Field:
        """A column that is read and compared as it is."""
        name = identifier(column.name)
        return cls(column, name, name, name)

    def masked(
        self,
        column: Column,
        value: exp.Expr,
        *,
        loose: exp.Expr | None = None,
        misfit: exp.Expr | None = None,
    ) -> Self:
        """The same column, of which another value is read."""
        return replace(self, column=column, value=value, loose=loose, misfit=misfit)


@dataclass(frozen=True, slots=True)
class Dialect:
    """What differs between SQL dialects, apart from how sqlglot writes them.

    `number` turns a float into an expression, given the list that collects parameters.
    `boolean`, `binary`, `starts_with` and `contains` build theirs; `stars` builds text of
    so many `*`. Without `typed_moments`, literals of dates and times stay text.
    """

    name: str
    number: Callable[[float, list[float]], exp.Expr]
    boolean: Callable[[bool], exp.Expr]
    binary: Callable[[bytes], exp.Expr]
    starts_with: Callable[[exp.Expr, exp.Expr], exp.Expr]
    contains: Callable[[exp.Expr, exp.Expr], exp.Expr]
    stars: Callable[[exp.Expr], exp.Expr]
    typed_moments: bool = True


def identifier(name: str) -> exp.Column:
    """A quoted column name."""
    return exp.column(exp.to_identifier(name, quoted=True))


def text(value: str) -> exp.Expr:
    """A string literal. Raises `ValueError` for text that SQL cannot carry."""
    if "\0" in value:
        raise ValueError("text must not contain U+0000")
    value.encode()  # a lone surrogate is no text
    return exp.Literal.string(value)


def function(name: str, *arguments: exp.Expr) -> exp.Expr:
    """A function call, written exactly as named."""
    return exp.Anonymous(this=name, expressions=list(arguments))


def cast(value: exp.Expr, to: str) -> exp.Expr:
    """A cast to a type in sqlglot's own notation."""
    return exp.Cast(this=value, to=exp.DataType.build(to))


def raw(sql: str) -> exp.Expr:
    """Text of the operator's own, taken as it is. Never of a caller's."""
    return exp.Var(this=sql)


def select(
    dialect: Dialect,
    relation: exp.Expr,
    fields: Mapping[str, Field],
    query: Query,
    *,
    extra: Sequence[exp.Expr] = (),
    skip_rows: int = 0,
    loose: bool = False,
) -> tuple[exp.Select, tuple[float, ...]]:
    """The tree of a query over a relation, and its parameters.

    `extra` expressions come before the query's columns. A `loose` one does not fail on
    a value that cannot be read but tells it, in further columns after the query's: one
    for each that `misfits` counts. Its conditions fail as ever. Raises `KeyError`
    for a column that `fields` does not have, `ValueError` for a value that does not suit
    its column and for a condition on a masked one.
    """
    parameters: list[float] = []
    values = [
        exp.alias_(_value(fields[name], loose=loose), name, quoted=True)
        for name in query.columns
    ]
    if loose:
        values += [
            exp.alias_(found.copy(), f"exportd_misfit_{name}", quoted=True)
            for name in query.columns
            if (found := fields[name].misfit) is not None
        ]
    tree = exp.Select(expressions=[*extra, *values]).from_(relation)
    for condition in query.filters:
        field = fields[condition.column]
        if field.column.masked:
            raise ValueError(f"column {condition.column} is masked")
        tree = tree.where(_condition(dialect, field, condition, parameters), copy=False)
    if query.limit is not None:
        tree = tree.limit(max(query.limit - skip_rows, 0), copy=False)
    elif skip_rows and dialect.name == "sqlite":
        tree = tree.limit(-1, copy=False)  # SQLite has no OFFSET without LIMIT
    if skip_rows:
        tree = tree.offset(skip_rows, copy=False)
    return tree, tuple(parameters)


def _value(field: Field, *, loose: bool) -> exp.Expr:
    value = field.loose if loose and field.loose is not None else field.value
    return value.copy()


def misfits(fields: Sequence[Field], first: int = 0) -> dict[str, int]:
    """Where in the result of a loose tree for these columns the misfits of each stand,
    for those that have any; `first` is the place of the first column."""
    found = [each.column.name for each in fields if each.misfit is not None]
    return {name: first + len(fields) + index for index, name in enumerate(found)}


def render(dialect: Dialect, tree: exp.Expr) -> str:
    """SQL text of a tree."""
    return tree.sql(dialect=dialect.name, comments=False)


def _condition(
    dialect: Dialect, field: Field, condition: Filter, parameters: list[float]
) -> exp.Expr:
    operator = condition.operator

    def literal(value: Scalar) -> exp.Expr:
        return _literal(dialect, field.column, value, parameters)

    match operator:
        case FilterOperator.IS_NULL:
            return exp.Is(this=field.operand.copy(), expression=exp.Null())
        case FilterOperator.IS_NOT_NULL:
            return exp.Not(this=exp.Is(this=field.operand.copy(), expression=exp.Null()))
        case FilterOperator.IN | FilterOperator.NOT_IN:
            if not condition.values:
                raise ValueError(f"{operator} takes at least one value")
            among = exp.In(
                this=field.operand.copy(),
                expressions=[literal(v) for v in condition.values],
            )
            return among if operator is FilterOperator.IN else exp.Not(this=among)
    if len(condition.values) != 1:
        raise ValueError(f"{operator} takes one value")
    (value,) = condition.values
    if operator in (FilterOperator.STARTS_WITH, FilterOperator.CONTAINS):
        search = (
            dialect.starts_with
            if operator is FilterOperator.STARTS_WITH
            else dialect.contains
        )
        return search(field.text.copy(), literal(value))
    side = field.text if operator in _ORDERED else field.operand
    return _COMPARISONS[operator](this=side.copy(), expression=literal(value))


def _literal(  # noqa: C901 - one arm for each kind of value
    dialect: Dialect, column: Column, value: Scalar, parameters: list[float]
) -> exp.Expr:
    match column.kind, value:
        case ColumnKind.BOOLEAN, bool():
            return dialect.boolean(value)
        case ColumnKind.INTEGER, int() if not isinstance(value, bool):
            wide = pat.is_uint64(column.type) and value > _INT64_MAX
            return cast(
                exp.Literal.string(str(value)), "DECIMAL(20, 0)" if wide else "BIGINT"
            )
        case ColumnKind.FLOAT, float():
            return dialect.number(value, parameters)
        case ColumnKind.DECIMAL, Decimal():
            kind = column.type
            _fits(value, kind)
            return cast(
                exp.Literal.string(f"{value:f}"), f"DECIMAL({kind.precision}, {kind.scale})"
            )
        case ColumnKind.STRING, str():
            return text(value)
        case ColumnKind.BINARY, bytes():
            return dialect.binary(value)
        case ColumnKind.DATE, date() if not isinstance(value, datetime):
            return _moment(dialect, value.isoformat(), "DATE")
        case ColumnKind.TIME, time():
            return _moment(dialect, value.isoformat("microseconds"), "TIME")
        case ColumnKind.TIMESTAMP, datetime() if value.tzinfo is not None:
            plain = (
                value.astimezone(UTC).replace(tzinfo=None).isoformat(" ", "microseconds")
            )
            zoned = column.type.tz is not None
            if zoned and dialect.typed_moments:
                plain += "+00"
            fine = "_NS" if column.type.unit == "ns" else ""
            return _moment(dialect, plain, f"TIMESTAMP{'TZ' if zoned else ''}{fine}")
    raise ValueError(f"{type(value).__name__} does not compare with {column.kind}")


_INT64_MAX = 2**63 - 1


def _moment(dialect: Dialect, iso: str, to: str) -> exp.Expr:
    literal = exp.Literal.string(iso)
    if not dialect.typed_moments:
        return literal
    # Taken as it is: sqlglot does not know each of these names.
    return exp.Cast(this=literal, to=exp.DataType.build(to, udt=True))


def _fits(value: Decimal, kind: pa.DataType) -> None:
    """Raise `ValueError` unless the type holds the value exactly: rounding it would
    change what the comparison means."""
    if not value.is_finite():
        raise ValueError("a decimal must be finite")
    digits = value.as_tuple()
    exponent = int(digits.exponent)
    if (
        -exponent > kind.scale
        or len(digits.digits) + exponent > kind.precision - kind.scale
    ):
        raise ValueError(f"{value} does not fit {kind}")
