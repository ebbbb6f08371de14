"""What SQLite needs: its session, its types, its SQL.

A SQLite column may hold values of any type, and the driver takes a column's type from
the first batch, so that a late value of another type would fail or come out as another
one. Therefore each value is read by an expression that gives the column's type or NULL;
one more column tells the position of the first column whose value was of another type;
and a first row of well-typed values fixes what the driver sees. That row is dropped.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pat
from sqlglot import exp

from exportd_server.errors import SourceFailed
from exportd_server.sources import query as sql
from exportd_server.sources.adbc import Misfit, Session
from exportd_server.sources.base import Column, Query
from exportd_server.sources.query import Dialect, Field
from exportd_server.sources.types import MAX_PRECISION, NAIVE_MICROS

_BATCH_ROWS = 8_192
_VIEW = "exportd_probe"
_SAMPLE_ROWS = 1_000
_BUSY_MILLISECONDS = 500
_MAX_PARAMETERS = 32_766
_SETTLED_SECONDS = 1.0
_SQLITE_HEADER = 100
_DIGITS = re.compile(r"\(\s*([0-9]+)\s*(?:,\s*([0-9]+)\s*)?\)")


def _number(value: float, parameters: list[float]) -> exp.Expr:
    """A parameter: SQLite's own reading of digits may miss by the last bit."""
    if len(parameters) == _MAX_PARAMETERS:
        raise ValueError(f"at most {_MAX_PARAMETERS} floating point values")
    parameters.append(value)
    return exp.Placeholder()


def _starts_with(operand: exp.Expr, value: exp.Expr) -> exp.Expr:
    length = sql.function("length", value.copy())
    head = sql.function("substr", operand, exp.Literal.number(1), length)
    return exp.EQ(this=_binary(head), expression=value)


def _binary(operand: exp.Expr) -> exp.Expr:
    return exp.Collate(this=exp.paren(operand), expression=exp.Var(this="BINARY"))


SQLITE = Dialect(
    name="sqlite",
    number=_number,
    boolean=lambda value: exp.Literal.number(int(value)),
    binary=lambda value: sql.function("unhex", exp.Literal.string(value.hex())),
    starts_with=_starts_with,
    contains=lambda operand, value: exp.GT(
        this=sql.function("instr", operand, value), expression=exp.Literal.number(0)
    ),
    # SQLite has no repeat().
    stars=lambda count: sql.function(
        "replace",
        sql.function("hex", sql.function("zeroblob", count)),
        exp.Literal.string("00"),
        exp.Literal.string("*"),
    ),
    typed_moments=False,
)


@dataclass(frozen=True, slots=True)
class SqliteField(Field):
    """With a condition that a value of the column's type meets, and a value that fixes
    the type for the driver."""

    good: exp.Expr
    sample: exp.Expr

    def masked(
        self,
        column: Column,
        value: exp.Expr,
        *,
        loose: exp.Expr | None = None,
        misfit: exp.Expr | None = None,
    ) -> Self:
        """A column that becomes text is text to the driver; where nothing is a misfit,
        everything is good."""
        changed = column.type != self.column.type
        return replace(
            self,
            column=column,
            value=value,
            loose=loose,
            misfit=misfit,
            good=exp.true() if misfit is None else self.good,
            sample=exp.Literal.string("") if changed else self.sample,
        )


class Sqlite:
    """A SQLite file, opened read-only."""

    driver = "sqlite"
    library: str | None = None
    dialect = SQLITE
    interruptible = False
    heading = 1
    stream_options: Mapping[str, str] = {"adbc.sqlite.query.batch_rows": str(_BATCH_ROWS)}

    def __init__(self, path: Path) -> None:
        self._path = path
        self.uri = f"file:{quote(str(path))}?mode=ro"

    def begin(self, session: Session) -> None:
        """Wait a little for a writer, and take the snapshot."""
        session.fetch(f"PRAGMA busy_timeout = {_BUSY_MILLISECONDS}")
        (row,) = session.fetch("PRAGMA encoding")
        if row["encoding"] != "UTF-8":
            # Its order of texts would be another one.
            raise SourceFailed("only databases in UTF-8 can be read")
        session.fetch("SELECT COUNT(*) AS n FROM sqlite_master")

    def describe(
        self, session: Session, relation: exp.Expr, types: Mapping[str, pa.DataType]
    ) -> tuple[Field, ...]:
        """The columns, by their declared types; those without one by the first rows."""
        if isinstance(relation, exp.Table):
            name = relation.name
        else:
            name = _VIEW
            body = exp.select("*").from_(relation.copy())
            session.run(f'CREATE TEMP VIEW "{name}" AS {sql.render(SQLITE, body)}')
        info = sql.function("pragma_table_xinfo", sql.text(name))
        listed = session.fetch(
            sql.render(
                SQLITE, exp.select("name", "type", "hidden", '"notnull"').from_(info)
            )
        )
        listed = [row for row in listed if row["hidden"] != 1]
        if not listed:
            raise SourceFailed("there is no such table")
        declared = {row["name"]: _declared(row["type"] or "") for row in listed}
        open_names = [n for n, kind in declared.items() if kind is None and n not in types]
        seen = self._seen(session, relation, open_names) if open_names else {}
        return tuple(
            _field(
                Column(
                    row["name"],
                    types.get(row["name"]) or declared[row["name"]] or seen[row["name"]],
                    nullable=not row["notnull"],
                ),
                native=row["name"] not in types and declared[row["name"]] is not None,
            )
            for row in listed
        )

    def _seen(
        self, session: Session, relation: exp.Expr, names: Sequence[str]
    ) -> dict[str, pa.DataType]:
        inner = exp.select(*[sql.identifier(n) for n in names]).from_(relation.copy())
        kinds = [
            exp.alias_(
                sql.function(
                    "group_concat",
                    exp.Distinct(expressions=[sql.function("typeof", sql.identifier(n))]),
                ),
                f"c{index}",
            )
            for index, n in enumerate(names)
        ]
        probe = exp.select(*kinds).from_(inner.limit(_SAMPLE_ROWS).subquery("t"))
        (row,) = session.fetch(sql.render(SQLITE, probe))
        return {
            name: _SEEN.get(frozenset((found or "").split(",")) - {"null", ""}, pa.string())
            for name, found in zip(names, row.values(), strict=True)
        }

    def estimate(self, session: Session, statement: str, query: Query) -> int | None:
        """None: SQLite would have to count."""
        del session, statement, query
        return None

    def statement(
        self, tree: exp.Select, fields: Sequence[Field], *, loose: bool = False
    ) -> exp.Expr:
        """The tree with its guard column, after the row that fixes the types."""
        guard = exp.Case()
        samples: list[exp.Expr] = [exp.Literal.number(0)]
        for index, field in enumerate(fields, 1):
            if not isinstance(field, SqliteField):
                raise TypeError(type(field).__name__)
            bad = exp.Not(this=exp.paren(field.good.copy()))
            guard = guard.when(bad, exp.Literal.number(index))
            samples.append(field.sample.copy())
        guard = guard.else_(exp.Literal.number(0))
        if loose:
            # Each column tells for itself.
            guard = exp.Case().when(exp.false(), exp.Literal.number(1))
            guard = guard.else_(exp.Literal.number(0))
            samples += [exp.Literal.string("") for each in fields if each.misfit]
        body = tree.copy()
        body.set("expressions", [exp.alias_(guard, "_bad"), *body.expressions])
        names = ["_bad", *(f"_{index}" for index in range(len(samples) - 1))]
        head = exp.select(*[exp.alias_(s, n) for s, n in zip(samples, names, strict=True)])
        rows = exp.select("*").from_(body.subquery("rows_"))
        return exp.union(head, rows, distinct=False)

    def unpack(
        self, batch: pa.RecordBatch, fields: Sequence[Field], *, first: bool
    ) -> list[pa.Array]:
        """The columns in their types, once the guard says that all values have one."""
        if first:
            batch = batch.slice(1)
        worst = pc.max(batch.column(0)).as_py()
        if worst:
            raise Misfit(fields[worst - 1].column.name)
        arrays = []
        for array, field in zip(batch.columns[1:], fields, strict=True):
            try:
                arrays.append(_typed(array, field.column.type))
            except pa.ArrowInvalid as error:
                raise Misfit(field.column.name) from error
        return arrays

    def typed(self, array: pa.Array, kind: pa.DataType) -> pa.Array:
        """Moments, which are read from their text."""
        return _typed(array, kind)

    def fingerprint(self) -> Mapping[str, Any] | None:
        """Of the file and its write-ahead log: sizes, modification times, and the header
        with its change counter."""
        digest = hashlib.sha256()
        newest = 0.0
        try:
            for path in (self._path, Path(f"{self._path}-wal")):
                try:
                    stat = path.stat()
                    with path.open("rb") as file:
                        header = file.read(_SQLITE_HEADER)
                except FileNotFoundError:
                    continue
                if stat.st_size == 0:  # a reader may make an empty log
                    continue
                digest.update(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
                digest.update(header)
                newest = max(newest, stat.st_mtime)
        except OSError as error:
            raise SourceFailed from error
        settled = time.time() - newest > _SETTLED_SECONDS
        return {"digest": digest.hexdigest(), "settled": settled}


_SEEN: dict[frozenset[str], pa.DataType] = {
    frozenset({"integer"}): pa.int64(),
    frozenset({"real"}): pa.float64(),
    frozenset({"integer", "real"}): pa.float64(),
    frozenset({"blob"}): pa.binary(),
}


def _declared(name: str) -> pa.DataType | None:
    """The type of a declared type's name, by SQLite's own rules of affinity; None where
    the name leaves it open."""
    upper = name.upper()
    if "INT" in upper:
        return pa.int64()
    if "CHAR" in upper or "CLOB" in upper or "TEXT" in upper:
        return pa.string()
    if "BLOB" in upper:
        return pa.binary()
    if "REAL" in upper or "FLOA" in upper or "DOUB" in upper:
        return pa.float64()
    if upper.startswith("BOOL"):
        return pa.bool_()
    digits = _DIGITS.search(upper)
    if upper.startswith(("DEC", "NUM")) and digits:
        precision, scale = int(digits[1]), int(digits[2] or 0)
        if 1 <= precision <= MAX_PRECISION and scale <= precision:
            return pa.decimal128(precision, scale)
    return None


def _call(name: str, *arguments: exp.Expr | str | int) -> exp.Expr:
    """A function of expressions, texts and whole numbers."""
    return sql.function(
        name,
        *[
            each.copy()
            if isinstance(each, exp.Expr)
            else exp.Literal.number(each)
            if isinstance(each, int)
            else exp.Literal.string(each)
            for each in arguments
        ],
    )


def _is(value: exp.Expr, *kinds: str) -> exp.Expr:
    return exp.In(
        this=_call("typeof", value),
        expressions=[exp.Literal.string(kind) for kind in (*kinds, "null")],
    )


def _when(good: exp.Expr, value: exp.Expr) -> exp.Expr:
    return exp.Case().when(good.copy(), value.copy())


def _like(value: exp.Expr, pattern: str) -> exp.Expr:
    return exp.Glob(this=value.copy(), expression=exp.Literal.string(pattern))


_DATE_GLOB = "[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]"
_CLOCK_GLOB = "[0-9][0-9]:[0-9][0-9]:[0-9][0-9]"


def _is_text(value: exp.Expr) -> exp.Expr:
    return exp.EQ(this=_call("typeof", value), expression=exp.Literal.string("text"))


def _without_zone(value: exp.Expr) -> exp.Expr:
    """ISO text without its zone, where that is UTC."""
    return _call("replace", _call("rtrim", value, "Z"), "+00:00", "")


def _canonical(value: exp.Expr, glob: str, width: int) -> exp.Expr:
    """ISO text with up to six digits of a second, in UTC, in the one form of it whose
    order is that of time; NULL for anything else."""
    bare = _without_zone(value)
    head = _call("substr", bare, 1, width)
    tail = _call("substr", bare, width + 1)
    fraction = exp.and_(
        _like(tail, ".[0-9]*"),
        exp.Not(this=_like(_call("substr", tail, 2), "*[^0-9]*")),
        exp.LTE(this=_call("length", tail), expression=exp.Literal.number(7)),
    )
    whole = exp.EQ(this=tail.copy(), expression=exp.Literal.string(""))
    good = exp.and_(_is_text(value), _like(head, glob), exp.paren(exp.or_(whole, fraction)))
    digits = exp.DPipe(
        this=_call("ltrim", tail, "."), expression=exp.Literal.string("000000"), safe=True
    )
    point = exp.DPipe(
        this=_call("replace", head, "T", " "),
        expression=exp.Literal.string("."),
        safe=True,
    )
    canon = exp.DPipe(this=point, expression=_call("substr", digits, 1, 6), safe=True)
    return _when(good, canon)


def _lossless_text(value: exp.Expr) -> exp.Expr:
    """A number as text that reads back as the same number."""
    short = sql.cast(value.copy(), "TEXT")
    same = exp.EQ(this=sql.cast(short.copy(), "REAL"), expression=value.copy())
    exact = _call("printf", "%!.17g", value)
    real = exp.EQ(this=_call("typeof", value), expression=exp.Literal.string("real"))
    return (
        exp.Case().when(exp.and_(real, exp.Not(this=exp.paren(same))), exact).else_(short)
    )


def _field(column: Column, *, native: bool) -> SqliteField:
    """How to read a column. `native`: its declared type is the one it is read as, so it
    can be compared as it is, by its indexes."""
    name: exp.Expr = sql.identifier(column.name)
    good: exp.Expr
    value: exp.Expr
    sample: exp.Expr = exp.Literal.string("")
    kind = column.type
    null = exp.Is(this=name.copy(), expression=exp.Null())
    if pat.is_integer(kind):
        good, value, sample = _is(name, "integer"), name, exp.Literal.number(0)
        if not pat.is_int64(kind):
            native = False
    elif pat.is_boolean(kind):
        bit = exp.In(
            this=name.copy(), expressions=[exp.Literal.number(0), exp.Literal.number(1)]
        )
        typed = exp.EQ(this=_call("typeof", name), expression=exp.Literal.string("integer"))
        good, value = exp.or_(null, exp.and_(typed, bit)), name
        sample = exp.Literal.number(0)
    elif pat.is_floating(kind):
        value = sql.cast(name, "REAL")
        back = exp.EQ(this=sql.cast(value.copy(), "BIGINT"), expression=name.copy())
        whole = exp.EQ(this=_call("typeof", name), expression=exp.Literal.string("integer"))
        good = exp.or_(_is(name, "real"), exp.and_(whole, back))
        sample = exp.Literal.number("0.0")
    elif pat.is_binary(kind):
        good, value, sample = _is(name, "blob"), name, _call("zeroblob", 0)
    elif pat.is_string(kind):
        good, value = _is(name, "text", "integer", "real"), _lossless_text(name)
        if native:
            good, value = _is(name, "text"), name
    elif pat.is_decimal(kind):
        # A float is read to the 15 digits that SQLite keeps of a decimal: more of them
        # would be digits that nobody wrote.
        good, value = _is(name, "text", "integer", "real"), sql.cast(name, "TEXT")
        column = Column(
            column.name, kind, column.nullable, column.description, filterable=False
        )
    else:
        # Arrow reads it, and refuses what is no moment.
        width, canonical = _temporal(name, kind)
        long = exp.GTE(this=_call("length", name), expression=exp.Literal.number(width))
        good = exp.or_(null, exp.and_(_is_text(name), long))
        value = name if pat.is_date(kind) else _without_zone(name)
        read = _when(good, value)
        misfit = _misfit(good, name)
        return SqliteField(column, read, canonical, canonical, good, sample, misfit=misfit)
    value = _when(good, value)
    operand = name if native else value
    text = _binary(operand.copy()) if pat.is_string(kind) else operand
    return SqliteField(column, value, text, text, good, sample, misfit=_misfit(good, name))


def _misfit(good: exp.Expr, name: exp.Expr) -> exp.Expr:
    blob = exp.EQ(this=_call("typeof", name), expression=exp.Literal.string("blob"))
    shown = exp.Case().when(blob, _call("quote", name)).else_(sql.cast(name.copy(), "TEXT"))
    return exp.Case().when(exp.Not(this=exp.paren(good.copy())), shown)


def _temporal(name: exp.Expr, kind: pa.DataType) -> tuple[int, exp.Expr]:
    """The fewest characters of such a text, and what is compared."""
    if pat.is_date(kind):
        return 10, _when(exp.and_(_is_text(name), _like(name, _DATE_GLOB)), name)
    if pat.is_time(kind):
        return 8, _canonical(name, _CLOCK_GLOB, 8)
    return 19, _canonical(name, f"{_DATE_GLOB}[ T]{_CLOCK_GLOB}", 19)


def _typed(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """Text as the types that Arrow does not read it as: timestamps are written without
    their zone, which is UTC, and a time of day is read as one of the first day."""
    if pat.is_timestamp(kind):
        return array.cast(NAIVE_MICROS).cast(kind)
    if pat.is_time(kind):
        day = pc.binary_join_element_wise("1970-01-01", array, " ")
        return day.cast(NAIVE_MICROS).view(pa.int64()).view(kind)
    return array
