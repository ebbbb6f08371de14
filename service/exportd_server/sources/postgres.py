"""What PostgreSQL needs: its session, its types, its SQL.

The driver decodes the common types fast, but returns infinite dates and times as wrong
values, drops the upper dimensions of arrays and leaves many types as raw bytes. So each
column is read by an expression that makes the database convert, or refuse, what the
driver cannot carry.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

import pyarrow as pa
import pyarrow.types as pat
from sqlglot import exp

from exportd_server.errors import SourceFailed
from exportd_server.sources import postgres_shards as shards
from exportd_server.sources import query as sql
from exportd_server.sources.adbc import MARK, Cut, Piece, Session
from exportd_server.sources.base import Column, Query
from exportd_server.sources.query import Dialect, Field
from exportd_server.sources.types import MAX_PRECISION, NAIVE_MICROS, UTC_MICROS, sql_type

_BATCH_BYTES = 4 * 2**20
_VIEW = "exportd_probe"
_LINK = {
    # A host that is gone is noticed within a minute or so, not after hours.
    "connect_timeout": "10",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "60000",
    "application_name": "exportd",
}
_SETTINGS = {
    "client_encoding": "UTF8",
    "TimeZone": "UTC",
    "DateStyle": "ISO",
    "IntervalStyle": "iso_8601",
    "extra_float_digits": "1",
    "standard_conforming_strings": "on",
}
_COLUMNS = """
WITH RECURSIVE base (number, name, type, typmod, required, collation_) AS (
    {base}
), resolved (number, type, typmod) AS (
    SELECT number, type, typmod FROM base
    UNION ALL
    SELECT r.number, t.typbasetype,
           CASE WHEN t.typtypmod <> -1 THEN t.typtypmod ELSE r.typmod END
    FROM resolved r JOIN pg_catalog.pg_type t ON t.oid = r.type
    WHERE t.typtype = 'd'
)
SELECT b.name::text AS name,
       CASE WHEN n.nspname = 'pg_catalog' THEN t.typname ELSE '' END::text AS type,
       t.typtype::text AS kind, t.typcategory::text AS category,
       r.typmod::int8 AS typmod, b.required AS required,
       COALESCE(c.collisdeterministic, true) AS deterministic
FROM base b
JOIN resolved r ON r.number = b.number
JOIN pg_catalog.pg_type t ON t.oid = r.type AND t.typtype <> 'd'
JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace
LEFT JOIN pg_catalog.pg_collation c ON c.oid = b.collation_
ORDER BY b.number
"""
_ATTRIBUTES = """
    SELECT a.attnum::int4, a.attname::text, a.atttypid, a.atttypmod, a.attnotnull,
           a.attcollation
    FROM pg_catalog.pg_attribute a
    WHERE a.attrelid = {relation}::regclass AND a.attnum > 0 AND NOT a.attisdropped
"""

_PLAIN: dict[str, pa.DataType] = {
    "bool": pa.bool_(),
    "int2": pa.int16(),
    "int4": pa.int32(),
    "int8": pa.int64(),
    "float4": pa.float32(),
    "float8": pa.float64(),
    "bytea": pa.binary(),
}
_FINITE: dict[str, pa.DataType] = {
    "date": pa.date32(),
    "timestamp": NAIVE_MICROS,
    "timestamptz": UTC_MICROS,
}
_MOMENTS = {**_FINITE, "time": pa.time64("us")}
# The driver's numbers end here, some decades before PostgreSQL's.
_LAST_YEAR = "290000-01-01"


def _collated(operand: exp.Expr) -> exp.Expr:
    return exp.Collate(
        this=exp.paren(operand), expression=exp.to_identifier("C", quoted=True)
    )


POSTGRES = Dialect(
    name="postgres",
    # COPY, by which results stream, takes no parameters.
    number=lambda value, _: sql.cast(exp.Literal.string(_float(value)), "DOUBLE"),
    boolean=lambda value: exp.true() if value else exp.false(),
    binary=lambda value: sql.function(
        "decode", exp.Literal.string(value.hex()), exp.Literal.string("hex")
    ),
    starts_with=lambda operand, value: sql.function("starts_with", operand, value),
    contains=lambda operand, value: exp.GT(
        this=sql.function("strpos", operand, value), expression=exp.Literal.number(0)
    ),
    stars=lambda count: sql.function("repeat", exp.Literal.string("*"), count),
)


def _float(value: float) -> str:
    return {"inf": "Infinity", "-inf": "-Infinity"}.get(repr(value), repr(value))


@dataclass(frozen=True, slots=True)
class _Attribute:
    """A column as the catalogue of the database has it; `type` is empty for a type that
    is not built in."""

    name: str
    type: str
    kind: str
    category: str
    typmod: int
    required: bool
    deterministic: bool


class Postgres:
    """A PostgreSQL database. `timeout_seconds` bounds each statement, None for not at
    all; `library` is the driver's, None for the one that is installed along."""

    driver = "postgresql"
    dialect = POSTGRES
    interruptible = True
    heading = 0
    stream_options: Mapping[str, str] = {
        "adbc.postgresql.batch_size_hint_bytes": str(_BATCH_BYTES)
    }

    def __init__(
        self,
        url: str,
        *,
        timeout_seconds: float | None = None,
        library: str | None = None,
    ) -> None:
        self.library = library
        parts = urlsplit(url)
        given = dict(parse_qsl(parts.query, keep_blank_values=True))
        query = urlencode({**_LINK, **given}, quote_via=quote)
        self.uri = urlunsplit(parts._replace(query=query))
        self._timeout = int((timeout_seconds or 0) * 1000)
        self._begin: Callable[[Session], None] = self._take_snapshot

    def begin(self, session: Session) -> None:
        """One read-only snapshot, unless `begun_by` says otherwise."""
        self._begin(session)

    def begun_by(self, begin: Callable[[Session], None]) -> Postgres:
        """The same database, with another beginning of its sessions."""
        other = copy.copy(self)
        other._begin = begin  # noqa: SLF001 - the same class
        return other

    def _take_snapshot(self, session: Session) -> None:
        session.run("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        self.settle(session, {})

    def settle(self, session: Session, settings: Mapping[str, str]) -> None:
        """Make every session's settings and these, whatever the role's own are, until
        the transaction ends."""
        wanted = {**_SETTINGS, "statement_timeout": str(self._timeout), **settings}
        calls = [
            sql.function("set_config", sql.text(name), sql.text(value), exp.true())
            for name, value in wanted.items()
        ]
        session.fetch(sql.render(POSTGRES, exp.select(*calls)))

    def describe(
        self, session: Session, relation: exp.Expr, types: Mapping[str, pa.DataType]
    ) -> tuple[Field, ...]:
        """The columns, by the database's own catalogue."""
        if isinstance(relation, exp.Table):
            attributes = self._of_table(session, relation)
        else:
            attributes = self._of_query(session, relation)
        return tuple(
            _field(attribute, types.get(attribute.name)) for attribute in attributes
        )

    def estimate(self, session: Session, statement: str, query: Query) -> int | None:
        """The planner's estimate."""
        del query
        return int(shards.explain(session, statement)["Plan Rows"])

    def cut(
        self, relation: exp.Expr, tree: exp.Select, key: Field | None, rows: int
    ) -> Cut | None:
        """By blocks, or by the key, under one snapshot."""
        return shards.cut(self, relation, tree, key, rows)

    def piece(
        self, relation: exp.Expr, fields: Mapping[str, Field], state: Mapping[str, Any]
    ) -> Piece:
        """What `cut` made."""
        return shards.piece(self, relation, fields, state)

    def whole(self, relation: exp.Expr) -> Postgres:
        """All of it, unless it was rewritten while its reader waited for its lock."""

        def begin(session: Session) -> None:
            self._take_snapshot(session)
            shards.require_same_storage(self, session, relation)

        return self.begun_by(begin)

    def statement(
        self, tree: exp.Select, fields: Sequence[Field], *, loose: bool = False
    ) -> exp.Expr:
        """The tree as it is."""
        del fields, loose
        return tree

    def unpack(
        self, batch: pa.RecordBatch, fields: Sequence[Field], *, first: bool
    ) -> list[pa.Array]:
        """The columns as they are."""
        del fields, first
        return list(batch.columns)

    def typed(self, array: pa.Array, kind: pa.DataType) -> pa.Array:
        """The column as it is."""
        del kind
        return array

    def fingerprint(self) -> Mapping[str, Any] | None:
        """None: each transaction has a snapshot of its own, and no other can take it
        up once the first has ended."""
        return None

    def _attributes(self, session: Session, base: str) -> list[_Attribute]:
        return [_Attribute(**row) for row in session.fetch(_COLUMNS.format(base=base))]

    def _of_table(self, session: Session, relation: exp.Table) -> list[_Attribute]:
        bare = relation.copy()
        bare.set("alias", None)
        name = sql.render(POSTGRES, sql.text(sql.render(POSTGRES, bare)))
        return self._attributes(session, _ATTRIBUTES.format(relation=name))

    def _of_query(self, session: Session, relation: exp.Expr) -> list[_Attribute]:
        """A temporary view keeps the digits that decimals are declared with. Where none
        may be made, as on a standby, the types are asked for without them."""
        vendor = self.begun_by(lambda session: self.settle(session, {}))
        with contextlib.suppress(SourceFailed), Session(vendor) as writable:
            body = exp.select("*").from_(relation.copy())
            text = sql.render(POSTGRES, body)
            writable.run(f'CREATE TEMPORARY VIEW "{_VIEW}" AS {text}')
            name = f"'pg_temp.{_VIEW}'"
            return self._attributes(writable, _ATTRIBUTES.format(relation=name))
        body = exp.select("*").from_(relation.copy()).limit(0)
        names = session.names(sql.render(POSTGRES, body))
        types = [
            exp.alias_(sql.cast(_type_of(name), "BIGINT"), f"c{index}")
            for index, name in enumerate(names)
        ]
        one = exp.select(exp.Literal.number(1)).subquery("one")
        probe = (
            exp.select(*types)
            .from_(one)
            .join(body.subquery("q"), on=exp.true(), join_type="left")
        )
        (oids,) = session.fetch(sql.render(POSTGRES, probe))
        base = " UNION ALL ".join(
            f"SELECT {index}, {sql.render(POSTGRES, sql.text(name))}::text, "
            f"{int(oid)}::oid, -1, false, 0::oid"
            for index, (name, oid) in enumerate(zip(names, oids.values(), strict=True))
        )
        return self._attributes(session, base)


def _type_of(name: str) -> exp.Expr:
    column = exp.column(exp.to_identifier(name, quoted=True), "q")
    oid = exp.DataType.build("oid", udt=True)
    return exp.Cast(this=sql.function("pg_typeof", column), to=oid)


def _field(attribute: _Attribute, declared: pa.DataType | None) -> Field:
    name = sql.identifier(attribute.name)
    value, kind = (
        _reading(name, attribute)
        if declared is None
        else _declared(name, attribute, declared)
    )
    column = Column(attribute.name, kind, nullable=not attribute.required)
    native = declared is None and (
        not pat.is_string(kind) or attribute.type in ("text", "varchar")
    )
    operand = name if native or pat.is_decimal(kind) else value
    if pat.is_decimal(kind) and declared is not None:
        operand = sql.cast(name, sql_type(kind))
    if declared is None and attribute.type in _FINITE:
        operand = name
    ordered = _collated(operand.copy()) if pat.is_string(kind) else operand
    # A collation that takes different texts for equal must not decide what is equal.
    exact = operand if attribute.deterministic or not pat.is_string(kind) else ordered
    bounded = _bounded(name, attribute, declared)
    if bounded is None:
        return Field(column, value, exact, ordered)
    good, given = _good(*bounded), bounded[0]
    loose = exp.Case().when(good, given.copy())
    misfit = exp.Case().when(exp.Not(this=exp.paren(good.copy())), _text(given))
    return Field(column, value, exact, ordered, loose=loose, misfit=misfit)


def _bounded(
    name: exp.Expr, attribute: _Attribute, declared: pa.DataType | None
) -> tuple[exp.Expr, str] | None:
    """What `_finite` bounds of a column, and the built-in type it then has; None where
    it bounds nothing."""
    if declared is None:
        return (name, attribute.type) if attribute.type in _MOMENTS else None
    for built_in, kind in _MOMENTS.items():
        if declared == kind:
            return sql.cast(name, sql_type(declared)), built_in
    return None


def _text(value: exp.Expr) -> exp.Expr:
    return sql.cast(value.copy(), "TEXT")


def _reading(name: exp.Expr, attribute: _Attribute) -> tuple[exp.Expr, pa.DataType]:
    """What to read of a column, and the type it then has. `numeric` comes as text, which
    Arrow turns into decimals."""
    built_in = attribute.type
    if built_in in _PLAIN:
        return name, _PLAIN[built_in]
    if built_in in _MOMENTS:
        return _finite(attribute.name, name, built_in), _MOMENTS[built_in]
    if built_in == "oid":
        return sql.cast(name, "BIGINT"), pa.int64()
    if built_in == "numeric":
        return _text(name), _decimal(attribute.typmod) or pa.string()
    if built_in in ("text", "varchar"):
        return name, pa.string()
    if built_in == "money":
        return _text(sql.cast(name, "DECIMAL")), pa.string()
    if built_in == "inet":
        # A plain cast writes the mask even where the database itself would not.
        return sql.function("abbrev", name), pa.string()
    if attribute.category == "A" or attribute.kind == "c":
        return _text(sql.function("to_json", name)), pa.string()
    return _text(name), pa.string()


def _declared(
    name: exp.Expr, attribute: _Attribute, declared: pa.DataType
) -> tuple[exp.Expr, pa.DataType]:
    """A column that the operator gave a type: the database casts."""
    if pat.is_string(declared):
        value, kind = _reading(name, attribute)
        return (value if pat.is_string(kind) else _text(name)), declared
    value = sql.cast(name, sql_type(declared))
    if pat.is_decimal(declared):
        return _text(value), declared
    for built_in, kind in _MOMENTS.items():
        if declared == kind:
            return _finite(attribute.name, value, built_in), declared
    return value, declared


def _finite(column: str, value: exp.Expr, built_in: str) -> exp.Expr:
    """The value, or an error that names the column: what the driver makes of an infinity
    is garbage, and Arrow has no 24:00."""
    good = _good(value, built_in)
    to = {"timestamptz": "TIMESTAMPTZ"}.get(built_in, built_in.upper())
    marked = exp.DPipe(
        this=exp.Literal.string(f"{MARK}{column.encode().hex()}:"),
        expression=_text(value),
        safe=True,
    )
    return exp.Case().when(good, value.copy()).else_(sql.cast(exp.paren(marked), to))


def _good(value: exp.Expr, built_in: str) -> exp.Expr:
    if built_in == "time":
        last = sql.cast(exp.Literal.string("24:00:00"), "TIME")
        return exp.LT(this=value.copy(), expression=last)
    good = sql.function("isfinite", value.copy())
    if built_in == "date":
        return good
    last = sql.cast(exp.Literal.string(_LAST_YEAR), "TIMESTAMP")
    return exp.and_(good, exp.LT(this=value.copy(), expression=last))


def _decimal(typmod: int) -> pa.DataType | None:
    """The decimal of a `numeric`'s type modifier, None when it has no digits declared or
    more than Arrow's 38."""
    if typmod < 0:
        return None
    packed = typmod - 4
    precision = packed >> 16 & 0xFFFF
    # Eleven bits with a sign: PostgreSQL 15 and later take scales below zero.
    scale = ((packed & 0x7FF) ^ 1024) - 1024
    if precision > MAX_PRECISION or not 0 <= scale <= precision:
        return None
    return pa.decimal128(precision, scale)
