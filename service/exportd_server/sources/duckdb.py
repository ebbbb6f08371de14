"""Parquet, CSV and JSON files as a source, read by DuckDB in this process.

The one file that knows DuckDB. Each stream has an engine of its own with one thread
and a memory limit, so that an export costs what it costs and no more, and an interrupt
reaches nobody else. The engine may open the dataset's files and nothing else.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import duckdb
import pyarrow as pa
import pyarrow.types as pat
from sqlglot import exp

from exportd_server.errors import SourceFailed, ValueNotEncodable
from exportd_server.sources import query as sql
from exportd_server.sources.base import Column, Plan, Query, Shard, SourceChanged
from exportd_server.sources.batches import Stop, conform, gather, not_fitting
from exportd_server.sources.query import Dialect, Field
from exportd_server.sources.types import sql_type

FileFormat = Literal["parquet", "csv", "json"]

_MEMORY_LIMIT = "192MB"
_ENGINE_ROWS = 8_192
"""Rows the engine hands over at a time; `gather` joins them up to a bound in bytes."""

_SETTLED_SECONDS = 1.0
"""A file younger than this when it was looked at may change again without its
modification time moving, the clock of file systems being coarse."""

_TEXT_TYPES = re.compile(r"\b(BIT|INTERVAL|TIME WITH TIME ZONE|ENUM|UNION|BIGNUM)\b")
_INTEGERS = frozenset(
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
_INTEGER_LEAF = re.compile(rf"\b({'|'.join(sorted(_INTEGERS))})\b")
_MARK = re.compile(r"exportd:((?:[0-9a-f]{2})*):")
_MISFITS = ("Conversion Error", "Invalid Input Error", "Out of Range Error")

_DIALECT = Dialect(
    name="duckdb",
    number=lambda value, _: sql.cast(exp.Literal.string(repr(value)), "DOUBLE"),
    boolean=lambda value: exp.true() if value else exp.false(),
    binary=lambda value: sql.function("unhex", exp.Literal.string(value.hex())),
    starts_with=lambda operand, value: sql.function("starts_with", operand, value),
    contains=lambda operand, value: sql.function("contains", operand, value),
)


class _Misfit(Exception):
    """A value is not of its column's type; `name` is the column's, None when the engine
    does not say which one."""

    def __init__(self, name: str | None) -> None:
        self.name = name
        super().__init__(name)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """The engine's errors, as exportd's. Those of a stream come as `OSError`."""
    try:
        yield
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        text = str(error)
        if marked := _MARK.search(text):
            raise _Misfit(bytes.fromhex(marked[1]).decode()) from error
        if text.startswith(_MISFITS):
            raise _Misfit(None) from error
        raise SourceFailed from error


@dataclass(frozen=True, slots=True)
class _Listing:
    """The files of a pattern at one moment."""

    paths: tuple[str, ...]
    digest: str
    settled: bool


def _list_files(pattern: str) -> _Listing:
    """The files that a pattern means now, in the order they are read in."""
    digest = hashlib.sha256()
    newest = 0.0
    found = glob.glob(pattern, recursive=True)  # noqa: PTH207 - the pattern is absolute
    paths = sorted(path for path in found if Path(path).is_file())
    try:
        for path in paths:
            stat = os.stat(path)  # noqa: PTH116 - one call for each of many files
            digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
            newest = max(newest, stat.st_mtime)
    except OSError as error:
        raise SourceFailed from error
    settled = time.time() - newest > _SETTLED_SECONDS
    return _Listing(tuple(paths), digest.hexdigest(), settled)


def _engine(paths: Sequence[str]) -> duckdb.DuckDBPyConnection:
    """An engine that can read these files, and do nothing else outside itself."""
    engine = duckdb.connect(
        config={
            "threads": 1,
            "memory_limit": _MEMORY_LIMIT,
            "temp_directory": "",
            "enable_external_file_cache": "false",
            "preserve_insertion_order": "true",
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "python_enable_replacements": "false",
        }
    )
    allowed = exp.Array(expressions=[sql.text(path) for path in paths])
    engine.execute(f"SET allowed_paths = {sql.render(_DIALECT, allowed)}")
    engine.execute("SET enable_external_access = false")
    engine.execute("SET TimeZone = 'UTC'")
    engine.execute("SET lock_configuration = true")
    return engine


def _option(name: str, value: exp.Expr) -> exp.Expr:
    return exp.EQ(this=exp.to_identifier(name), expression=value)


def _reader(
    file_format: FileFormat,
    paths: Sequence[str],
    types: Mapping[str, str] | None,
    delimiter: str,
) -> exp.Expr:
    """The table function that reads files; `types` pins the columns' types, so that no
    file is guessed at anew."""
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
        case "json" if types:
            options["columns"] = pinned
    return sql.function(
        f"read_{file_format}",
        files,
        *[_option(name, value) for name, value in options.items()],
    )


def _guarded(name: str, kind: str) -> exp.Expr:
    """Text as a whole number, or an error that names the column: the engine's own
    conversion would round 2.5 in silence."""
    column = sql.identifier(name)
    trimmed = sql.function("trim", column)
    whole = sql.function("regexp_full_match", trimmed, exp.Literal.string("[+-]?[0-9]+"))
    return (
        exp.Case()
        .when(exp.EQ(this=trimmed.copy(), expression=exp.Literal.string("")), exp.Null())
        .when(
            exp.or_(whole, exp.Is(this=column.copy(), expression=exp.Null())),
            sql.cast(trimmed.copy(), kind),
        )
        .else_(sql.function("error", exp.Literal.string(f"exportd:{name.encode().hex()}:")))
    )


class FileSource:
    """The rows of files that match a pattern, file after file in the order of their
    names.

    `pattern` is absolute; `FileNotFoundError` says that no file matches it. `types`
    declares columns whose type is not to be guessed. `delimiter` separates the cells of
    CSV. A plan's state is a digest of the files' names, sizes and modification times:
    reading begins only while it holds, and goes on after a crash only while it holds.
    """

    def __init__(
        self,
        file_format: FileFormat,
        pattern: str,
        types: Mapping[str, pa.DataType] | None = None,
        *,
        delimiter: str = ",",
    ) -> None:
        self._format: FileFormat = file_format
        self._delimiter = delimiter
        self._pattern = pattern
        self._declared = dict(types or {})
        self._lock = threading.Lock()
        self._verified = ""
        self._counted: tuple[str, int | None] = ("", None)
        listing = _list_files(pattern)
        if not listing.paths:
            raise FileNotFoundError(pattern)
        with _translated_misfit(), contextlib.closing(_engine(listing.paths)) as engine:
            self._names, self._pinned = self._describe(engine, listing.paths)
            self._fields = self._build(engine, listing.paths)
        self._nested = {
            name
            for name, kind in self._pinned.items()
            if file_format == "json" and ("(" in kind or "[" in kind)
            if _INTEGER_LEAF.search(kind) and not kind.startswith("DECIMAL")
        }

    def columns(self) -> tuple[Column, ...]:
        """All columns, in the order of the first file."""
        return tuple(field.column for field in self._fields.values())

    def count(self) -> int | None:
        """Exact for Parquet, from the files' footers; None for text files."""
        return self._count(_list_files(self._pattern))

    def plan(self, query: Query, *, shard_rows: int | None = None) -> Plan:
        """One shard; exact rows where nothing is filtered and the files are Parquet."""
        del shard_rows
        listing = _list_files(self._pattern)
        if not listing.paths:
            raise SourceFailed("the dataset has no files any more")
        self._verify(listing, query)
        estimate = None if query.filters else self._count(listing)
        if estimate is not None and query.limit is not None:
            estimate = min(estimate, query.limit)
        state = {
            "files": len(listing.paths),
            "digest": listing.digest,
            "settled": listing.settled,
            "engine": duckdb.__version__,
        }
        return Plan((Shard(0, json.dumps(state)),), estimate)

    def open(self, query: Query, shard: Shard, *, skip_rows: int = 0) -> FileStream:
        """Read it. Raises `SourceChanged` when a file changed since the plan, or, with
        rows to skip, may have."""
        state = json.loads(shard.state)
        listing = _list_files(self._pattern)
        if listing.digest != state["digest"]:
            raise SourceChanged
        if skip_rows and not (state["settled"] and state["engine"] == duckdb.__version__):
            raise SourceChanged
        tree, _ = sql.select(
            _DIALECT,
            self._relation(listing.paths),
            self._fields,
            query,
            skip_rows=skip_rows,
        )
        return FileStream(
            self._pattern,
            listing,
            sql.render(_DIALECT, tree),
            [self._fields[name].column for name in query.columns],
        )

    def _relation(self, paths: Sequence[str]) -> exp.Expr:
        types = self._pinned if self._format != "parquet" else None
        return _reader(self._format, paths, types, self._delimiter)

    def _describe(
        self,
        engine: duckdb.DuckDBPyConnection,
        paths: Sequence[str],
        *,
        whole: bool = False,
    ) -> tuple[dict[str, str], dict[str, str]]:
        """The engine's type of each column, and the type that its file is read as."""
        reader = _reader(self._format, paths, None, self._delimiter)
        if whole:
            reader.append("expressions", _option("sample_size", exp.Literal.number(-1)))
        relation = engine.sql(
            sql.render(_DIALECT, exp.select("*").from_(reader)), alias="described"
        )
        names = {
            name: str(kind)
            for name, kind in zip(relation.columns, relation.types, strict=True)
        }
        pinned = {}
        for name, kind in names.items():
            # Whole numbers are read as text and checked: see `_guarded`.
            text = kind in _INTEGERS or kind == '"NULL"' or name in self._declared
            pinned[name] = "VARCHAR" if text else kind
        return names, pinned

    def _build(
        self, engine: duckdb.DuckDBPyConnection, paths: Sequence[str]
    ) -> dict[str, Field]:
        values = {name: self._value(name, kind) for name, kind in self._names.items()}
        # Asking for no rows tells the exact Arrow types.
        tree = exp.Select(
            expressions=[exp.alias_(v, n, quoted=True) for n, v in values.items()]
        )
        probe = tree.from_(self._relation(paths)).limit(0)
        relation = engine.sql(sql.render(_DIALECT, probe), alias="probed")
        schema = relation.to_arrow_reader(_ENGINE_ROWS).schema
        fields = {}
        for (name, value), arrow in zip(values.items(), schema, strict=True):
            column = Column(name, arrow.type)
            fields[name] = Field(column, value, value, value)
        return fields

    def _value(self, name: str, kind: str) -> exp.Expr:
        column = sql.identifier(name)
        declared = self._declared.get(name)
        if declared is not None:
            to = sql_type(declared)
            if pat.is_integer(declared) and self._format != "parquet":
                return _guarded(name, to)
            return sql.cast(column, to)
        if self._format != "parquet" and kind in _INTEGERS:
            return _guarded(name, kind)
        if _TEXT_TYPES.search(kind):
            nested = "(" in kind.partition("ENUM")[0] or kind.endswith("]")
            return sql.cast(sql.function("to_json", column) if nested else column, "TEXT")
        return column

    def _count(self, listing: _Listing) -> int | None:
        if self._format != "parquet" or not listing.paths:
            return None
        files = exp.Array(expressions=[sql.text(path) for path in listing.paths])
        known, rows = self._counted
        if known == listing.digest:
            return rows
        footers = sql.function("parquet_file_metadata", files)
        total = exp.select(sql.function("sum", sql.identifier("num_rows"))).from_(footers)
        with _translated(), contextlib.closing(_engine(listing.paths)) as engine:
            row = engine.execute(sql.render(_DIALECT, total)).fetchone()
        rows = int(row[0]) if row and row[0] is not None else None
        self._counted = (listing.digest, rows)
        return rows

    def _verify(self, listing: _Listing, query: Query) -> None:
        """Make sure that the types of nested JSON columns hold for every row: the engine
        guesses them from the first ones and would cut 2.5 down to 2 later on."""
        if self._nested.isdisjoint(query.columns):
            return
        with self._lock:
            if self._verified == listing.digest:
                return
            with _translated_misfit(), contextlib.closing(_engine(listing.paths)) as engine:
                found, _ = self._describe(engine, listing.paths, whole=True)
            for name in sorted(self._nested):
                if found.get(name) != self._names[name]:
                    raise ValueNotEncodable(
                        f"column {name} holds values of other types than its first rows",
                        column=name,
                    )
            self._verified = listing.digest


@contextlib.contextmanager
def _translated_misfit() -> Iterator[None]:
    """As `_translated`, where there is no column to name yet."""
    try:
        with _translated():
            yield
    except _Misfit as error:
        raise SourceFailed from error.__cause__


class FileStream:
    """Batches of a query over files."""

    def __init__(
        self,
        pattern: str,
        listing: _Listing,
        text: str,
        columns: Sequence[Column],
    ) -> None:
        self._pattern = pattern
        self._listing = listing
        self._text = text
        self._schema = pa.schema(
            [pa.field(each.name, each.type, each.nullable) for each in columns]
        )
        self._stop = Stop()
        self._open = contextlib.ExitStack()

    @property
    def schema(self) -> pa.Schema:
        """Schema of every batch."""
        return self._schema

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None:
        self._open.close()

    def cancel(self) -> None:
        """Stop soon, from any thread."""
        self._stop.stop()

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        for batch in gather(self._read()):
            yield conform(batch.columns, self._schema)

    def _read(self) -> Iterator[pa.RecordBatch]:
        try:
            with _translated():
                engine = self._open.enter_context(
                    contextlib.closing(_engine(self._listing.paths))
                )
                reader: Any = None
            while True:
                with self._stop.interrupting(engine.interrupt), _translated():
                    if reader is None:
                        relation = engine.sql(self._text, alias="exported")
                        reader = relation.to_arrow_reader(_ENGINE_ROWS)
                        self._open.callback(reader.close)
                    try:
                        batch = reader.read_next_batch()
                    except StopIteration:
                        break
                yield batch
        except _Misfit as error:
            raise not_fitting(error.name) from error.__cause__
        if _list_files(self._pattern).digest != self._listing.digest:
            raise SourceFailed("the dataset's files changed while they were read")


def write_parquet(values: str, relation: str, target: Path) -> None:
    """Write expressions over generated rows to a Parquet file, row group by row group,
    the same bytes each time. For the sample data; the SQL is its own."""
    # A reader of the file holds a row group, so small ones keep readers small.
    engine = duckdb.connect(config={"threads": 1, "memory_limit": "512MB"})
    tree = exp.select(sql.raw(values)).from_(sql.raw(relation))
    with contextlib.closing(engine):
        engine.execute("SET TimeZone = 'UTC'")
        text = sql.render(_DIALECT, tree)
        path = sql.render(_DIALECT, sql.text(str(target)))
        engine.execute(
            f"COPY ({text}) TO {path} (FORMAT parquet, COMPRESSION zstd, "
            "ROW_GROUP_SIZE 32768)"
        )


def engine_version() -> str:
    """Version of DuckDB: another one may write other bytes."""
    return duckdb.__version__
