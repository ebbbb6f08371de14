"""The SQL that queries become."""

from __future__ import annotations

import sqlite3
from datetime import UTC, datetime
from decimal import Decimal

import duckdb
import pyarrow as pa
import pytest
import sqlglot
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlglot import exp

from exportd_server.sources import query as sql
from exportd_server.sources.base import Column, Filter, FilterOperator, Query, Scalar
from exportd_server.sources.duckdb import _DIALECT as DUCKDB
from exportd_server.sources.postgres import POSTGRES
from exportd_server.sources.query import Dialect, Field
from exportd_server.sources.sqlite import SQLITE

DIALECTS = (DUCKDB, POSTGRES, SQLITE)
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
PIECES = st.lists(
    st.sampled_from(
        [
            "'",
            '"',
            "\\",
            "--",
            ";",
            "/*",
            "*/",
            "$$",
            "%s",
            "?",
            "{x}",
            "\n",
            "\u00a0",
            "E'",
        ]
    ),
    max_size=8,
).map("".join)


def build(
    dialect: Dialect, *conditions: Filter, kind: pa.DataType, limit: int | None = None
) -> tuple[str, tuple[float, ...]]:
    fields = {"c": Field.plain(Column("c", kind))}
    relation = exp.Table(this=exp.to_identifier("t", quoted=True))
    tree, parameters = sql.select(
        dialect, relation, fields, Query(("c",), conditions, limit)
    )
    return sql.render(dialect, tree), parameters


@settings(deadline=None)
@given(value=st.one_of(TEXT, PIECES))
def test_a_text_is_one_literal_whatever_it_says(value: str) -> None:
    for dialect in DIALECTS:
        text, _ = build(
            dialect, Filter("c", FilterOperator.EQUAL, (value,)), kind=pa.string()
        )
        (statement,) = sqlglot.parse(text, dialect=dialect.name)
        assert statement is not None
        literals = [each.this for each in statement.find_all(exp.Literal)]
        assert literals == [value]
        assert len(list(statement.find_all(exp.Column))) == 2


@settings(deadline=None, max_examples=60)
@given(values=st.lists(st.one_of(TEXT, PIECES), min_size=1, max_size=20))
def test_engines_read_back_the_very_text(values: list[str]) -> None:
    for dialect in (DUCKDB, SQLITE):
        tree = exp.select(*[exp.alias_(sql.text(v), f"c{n}") for n, v in enumerate(values)])
        text = sql.render(dialect, tree)
        if dialect is SQLITE:
            with sqlite3.connect(":memory:") as engine:
                (row,) = engine.execute(text).fetchall()
            engine.close()
        else:
            with duckdb.connect() as other:
                (row,) = other.execute(text).fetchall()
        assert list(row) == values


@settings(deadline=None, max_examples=60)
@given(name=st.one_of(TEXT, PIECES).filter(bool))
def test_a_name_is_one_identifier_whatever_it_says(name: str) -> None:
    for dialect in DIALECTS:
        text = sql.render(dialect, exp.select(sql.identifier(name)))
        (statement,) = sqlglot.parse(text, dialect=dialect.name)
        assert statement is not None
        assert [each.name for each in statement.find_all(exp.Column)] == [name]


@settings(deadline=None)
@given(value=st.floats(allow_nan=False))
def test_a_float_reaches_the_engine_bit_by_bit(value: float) -> None:
    condition = Filter("c", FilterOperator.EQUAL, (value,))
    text, parameters = build(SQLITE, condition, kind=pa.float64())
    assert text.count("?") == 1
    assert parameters == (value,)
    for dialect in (DUCKDB, POSTGRES):
        text, parameters = build(dialect, condition, kind=pa.float64())
        assert parameters == ()
        (literal,) = sqlglot.parse_one(text, dialect=dialect.name).find_all(exp.Literal)
        assert float(literal.this) == value


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pa.int64(), "1"),
        (pa.int64(), True),
        (pa.int64(), 1.0),
        (pa.string(), 1),
        (pa.bool_(), 1),
        (pa.float64(), 1),
        (pa.decimal128(4, 2), 1),
        (pa.decimal128(4, 2), Decimal("1.255")),
        (pa.decimal128(4, 2), Decimal(100)),
        (pa.decimal128(4, 2), Decimal("NaN")),
        (pa.date32(), datetime(2020, 1, 1, tzinfo=UTC)),
        (pa.timestamp("us"), datetime(2020, 1, 1)),  # noqa: DTZ001 - it has no zone
        (pa.string(), "a\0b"),
        (pa.string(), "\ud800"),
        (pa.list_(pa.int64()), 1),
    ],
)
def test_a_value_of_another_kind_is_refused(kind: pa.DataType, value: Scalar) -> None:
    for dialect in DIALECTS:
        with pytest.raises(ValueError):
            build(dialect, Filter("c", FilterOperator.EQUAL, (value,)), kind=kind)


@pytest.mark.parametrize("operator", [FilterOperator.IN, FilterOperator.EQUAL])
def test_an_operator_without_its_value_is_refused(operator: FilterOperator) -> None:
    with pytest.raises(ValueError):
        build(DUCKDB, Filter("c", operator), kind=pa.string())


def test_a_column_that_is_not_there_is_refused() -> None:
    with pytest.raises(KeyError):
        build(DUCKDB, Filter("d", FilterOperator.IS_NULL), kind=pa.string())


@pytest.mark.parametrize(
    ("limit", "skip", "expected"),
    [(None, 0, 10), (4, 0, 4), (4, 3, 1), (4, 9, 0), (None, 7, 3), (50, 7, 3)],
)
def test_skipped_rows_count_against_the_limit(
    limit: int | None, skip: int, expected: int
) -> None:
    with sqlite3.connect(":memory:") as engine:
        engine.execute("CREATE TABLE t (c INTEGER)")
        engine.executemany("INSERT INTO t VALUES (?)", [(n,) for n in range(10)])
        fields = {"c": Field.plain(Column("c", pa.int64()))}
        relation = exp.Table(this=exp.to_identifier("t", quoted=True))
        tree, _ = sql.select(
            SQLITE, relation, fields, Query(("c",), limit=limit), skip_rows=skip
        )
        found = engine.execute(sql.render(SQLITE, tree)).fetchall()
    engine.close()
    assert [row[0] for row in found] == list(range(skip, skip + expected))
