"""Parquet, CSV and JSON files as a source, read by DuckDB in this process.

The one file that knows DuckDB. Each stream has an engine of its own with one thread
and a memory limit, so that an export costs what it costs and no more, and an interrupt
reaches nobody else. The engine may open the dataset's files and nothing else. One whose
stream came to its end waits a while for the next stream over the same files. What it
would only hand on as it lies there is read without it: see `parquet`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.metadata
import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import pyarrow as pa
import pyarrow.types as pat
from sqlglot import exp

from exportd_server.errors import SourceFailed, ValueNotEncodable
from exportd_server.platform.lazy import LazyModule
from exportd_server.sources import file_sql
from exportd_server.sources import query as sql
from exportd_server.sources.base import Column, Plan, Query, Shard, SourceChanged
from exportd_server.sources.batches import Stop, conform, fitted, gather, not_fitting
from exportd_server.sources.file_sql import INTEGERS, MARK, FileFormat, Reading
from exportd_server.sources.files import (
    File,
    Listing,
    Piece,
    cut_rows,
    cut_sizes,
    group_rows,
    least_rows,
    list_files,
    unchanged,
)
from exportd_server.sources.loose import LooseBatch, Shape
from exportd_server.sources.masks import Masks
from exportd_server.sources.parquet import PlainRows, plain_columns, row_count
from exportd_server.sources.query import Dialect, Field
from exportd_server.sources.types import sql_type

if TYPE_CHECKING:
    import duckdb
else:
    # Some 45 MiB that a server without need for it does not take.
    duckdb = LazyModule("duckdb")

_MEMORY_MB = 192
_JSON_FILE_MB = 34
"""What the engine sets aside for each JSON file that it is told of, and hardly touches:
reading twelve large files takes no more memory than three."""

_MOST_IDLE = 2
_LITTLE = 4 * 2**20
"""Bytes of rows up to which an engine that gave them may wait for the next reader. What
more took stays with the engine's allocator, tens of MiB, until an engine is closed; and
beside such a read a new engine costs nothing."""

_ENGINE_ROWS = 8_192
"""Rows the engine hands over at a time; `gather` joins them up to a bound in bytes."""

_PLACES = frozenset({"file_index", "file_row_number"})
"""What the engine calls a file's place in the list and a row's in its file, unless the
data has columns of these names."""

_TEXT_TYPES = re.compile(r"\b(BIT|INTERVAL|TIME WITH TIME ZONE|ENUM|UNION|BIGNUM)\b")
_INTEGER_LEAF = re.compile(rf"\b({'|'.join(sorted(INTEGERS))})\b")
_MISFITS = ("Conversion Error", "Invalid Input Error", "Out of Range Error")

_DIALECT = Dialect(
    name="duckdb",
    number=lambda value, _: sql.cast(exp.Literal.string(repr(value)), "DOUBLE"),
    boolean=lambda value: exp.true() if value else exp.false(),
    binary=lambda value: sql.function("unhex", exp.Literal.string(value.hex())),
    starts_with=lambda operand, value: sql.function("starts_with", operand, value),
    contains=lambda operand, value: sql.function("contains", operand, value),
    stars=lambda count: sql.function("repeat", exp.Literal.string("*"), count),
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
        if marked := MARK.search(text):
            raise _Misfit(bytes.fromhex(marked[1]).decode()) from error
        if text.startswith(_MISFITS):
            raise _Misfit(None) from error
        raise SourceFailed from error


@contextlib.contextmanager
def _translated_arrow() -> Iterator[None]:
    """Arrow's errors, as exportd's. The engine's are not asked for, which would load it."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise SourceFailed from error


def _engine(
    paths: Sequence[str], file_format: FileFormat, *, keep_footers: bool = False
) -> duckdb.DuckDBPyConnection:
    """An engine that can read these files, and do nothing else outside itself. It reads
    a Parquet footer anew at each step unless it is to keep it, which takes memory."""
    aside = _JSON_FILE_MB * len(paths) if file_format == "json" else 0
    engine = duckdb.connect(
        config={
            "threads": 1,
            "memory_limit": f"{_MEMORY_MB + aside}MB",
            "temp_directory": "",
            "enable_external_file_cache": "false",
            "preserve_insertion_order": "true",
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "python_enable_replacements": "false",
        }
    )
    # What takes long would draw its progress on the output of the server.
    engine.execute("SET enable_progress_bar = false")
    engine.execute("SET enable_progress_bar_print = false")
    allowed = exp.Array(expressions=[sql.text(path) for path in paths])
    engine.execute(f"SET allowed_paths = {sql.render(_DIALECT, allowed)}")
    engine.execute("SET enable_external_access = false")
    engine.execute("SET TimeZone = 'UTC'")
    if keep_footers:
        engine.execute("SET parquet_metadata_cache = true")
    engine.execute("SET lock_configuration = true")
    return engine


class _Idle:
    """Engines whose stream came to its end, for whoever reads the same files next: making
    and closing one takes more than a small export does besides. The last few are kept;
    one takes some 5 MiB, and holds no file open. From any thread."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._engines: list[tuple[_Reads, duckdb.DuckDBPyConnection]] = []

    def take(self, reads: _Reads) -> duckdb.DuckDBPyConnection | None:
        """One that may read just that; None when there is none."""
        with self._lock:
            for place, (can_read, engine) in enumerate(self._engines):
                if can_read == reads:
                    del self._engines[place]
                    return engine
        return None

    def keep(self, reads: _Reads, engine: duckdb.DuckDBPyConnection) -> None:
        """Have one wait that nobody uses any more."""
        with self._lock:
            self._engines.append((reads, engine))
            gone = self._engines[: -self._most]
            del self._engines[: -self._most]
        for _, old in gone:
            old.close()


_Reads = tuple[FileFormat, tuple[str, ...]]
"""What an engine can read."""
_idle = _Idle(_MOST_IDLE)


class FileSource:
    """The rows of files that match a pattern, file after file in the order of their
    names.

    `pattern` is absolute; `FileNotFoundError` says that no file matches it. `types`
    declares columns whose type is not to be guessed. `delimiter` separates the cells of
    CSV. A plan's state is a digest of the files' names, sizes and modification times:
    reading begins only while it holds, and goes on after a crash only while it holds.

    Shards are runs of whole files and, of large Parquet files, runs of row groups, as
    their footers tell. Text files do not tell their rows: the bytes of a row are taken
    to be what they are in the largest file, of which a shard's worth of rows is read,
    and no shard is planned smaller than that file.
    Files in which that would change what is read are one shard: Parquet with a column
    that is named like one of `_PLACES`, CSV whose way to write dates is not certain.
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
        self._verified: tuple[str, frozenset[str]] = ("", frozenset())
        self._masks = Masks()
        self._counted: tuple[str, list[int]] = ("", [])
        self._moments: dict[str, str] = {}
        listing = list_files(pattern)
        if not listing.paths:
            raise FileNotFoundError(pattern)
        self._names: dict[str, str] = {}
        self._pinned: dict[str, str] = {}
        certain = True
        columns = None
        if file_format == "parquet" and not self._declared:
            columns = plain_columns(listing.paths[0])
        if columns is not None:
            self._fields = {column.name: Field.plain(column) for column in columns}
        else:
            with (
                _translated_misfit(),
                contextlib.closing(_engine(listing.paths, self._format)) as engine,
            ):
                self._names, self._pinned = self._describe(engine, listing.paths)
                certain = self._pin_moments(engine, listing.paths[0])
                self._fields = self._build(engine, listing.paths)
        places = _PLACES.isdisjoint(map(str.casefold, self._fields))
        self._whole = not (certain and (places or file_format != "parquet"))
        self._nested = {
            name
            for name, kind in self._pinned.items()
            if file_format == "json" and ("(" in kind or "[" in kind)
            if _INTEGER_LEAF.search(kind) and not kind.startswith("DECIMAL")
        }

    def masked(self, masks: Masks) -> FileSource:
        """The same files under masks."""
        other = copy.copy(self)
        other._masks = masks  # noqa: SLF001 - the same class
        other._fields = masks.over(_DIALECT, self._fields)
        return other

    def columns(self) -> tuple[Column, ...]:
        """All columns, in the order of the first file."""
        return tuple(field.column for field in self._fields.values())

    def count(self) -> int | None:
        """Exact for Parquet, from the files' footers; None for text files."""
        return self._count(list_files(self._pattern))

    def plan(self, query: Query, *, shard_rows: int | None = None) -> Plan:
        """Exact rows where nothing is filtered and the files are Parquet. No anchor:
        each shard makes sure of the files itself."""
        listing = list_files(self._pattern)
        if not listing.files:
            raise SourceFailed("the dataset has no files any more")
        self._verify(listing, query)
        estimate = None if query.filters else self._count(listing)
        if estimate is not None and query.limit is not None:
            estimate = min(estimate, query.limit)
        pieces: Sequence[Piece] = (Piece(0, len(listing.files)),)
        if shard_rows is not None and query.limit is None and not self._whole:
            pieces = self._cut(listing, least_rows(shard_rows, len(listing.files)))
        state = {
            "digest": listing.digest,
            "settled": listing.settled,
            "engine": engine_version(),
            "masks": self._masks.stamp,
        }
        shards = [
            Shard(
                index,
                json.dumps(
                    {**state, "files": [piece.first, piece.last], "rows": piece.rows}
                ),
            )
            for index, piece in enumerate(pieces)
        ]
        return Plan(tuple(shards), estimate)

    def open(self, query: Query, shard: Shard, *, skip_rows: int = 0) -> FileStream:
        """Read it. Raises `SourceChanged` when a file or the masks changed since the
        plan, or, with rows to skip, may have."""
        state = json.loads(shard.state)
        if state.get("masks", "") != self._masks.stamp:
            raise SourceChanged
        listing = list_files(self._pattern)
        if listing.digest != state["digest"]:
            raise SourceChanged
        if skip_rows and not (state["settled"] and state["engine"] == engine_version()):
            raise SourceChanged
        first, last = state["files"]
        files = listing.files[first:last]
        conditions: list[exp.Expr] = []
        if first and self._format == "parquet":
            # The first file has a say in how the others are read: their values take on
            # the types of its columns. The engine looks at its footer and no further.
            files = (listing.files[0], *files)
            place = sql.identifier("file_index")
            conditions.append(exp.GT(this=place, expression=exp.Literal.number(0)))
        if state["rows"] is not None:
            row = sql.identifier("file_row_number")
            start, stop = (exp.Literal.number(each) for each in state["rows"])
            # The engine reads no row group that these rule out.
            conditions.append(exp.GTE(this=row, expression=start))
            conditions.append(exp.LT(this=row.copy(), expression=stop))
        relation = self._relation([file.path for file in files])

        def statement(*, loose: bool) -> str:
            tree, _ = sql.select(
                _DIALECT,
                relation.copy(),
                self._fields,
                query,
                skip_rows=skip_rows,
                loose=loose,
            )
            return sql.render(_DIALECT, tree.where(*conditions) if conditions else tree)

        rows = state["rows"] or (0, None)
        plain = self._plain(query, listing.files[first:last], rows, skip_rows)
        return FileStream(
            self._format,
            files,
            statement,
            [self._fields[name] for name in query.columns],
            self._masks,
            keep_footers=state["rows"] is not None,
            plain=plain,
        )

    def _plain(
        self,
        query: Query,
        files: Sequence[File],
        rows: tuple[int, int | None],
        skip_rows: int,
    ) -> PlainRows | None:
        """The rows without the engine, where it would add nothing to them."""
        fields = [self._fields[name] for name in query.columns]
        if (
            self._format != "parquet"
            or query.filters
            or any(field.value != sql.identifier(field.column.name) for field in fields)
        ):
            return None
        start, stop = rows
        if query.limit is not None:
            stop = start + query.limit  # a query with a limit is one shard
        return PlainRows.of(
            [file.path for file in files],
            [field.column for field in fields],
            start + skip_rows,
            stop,
        )

    def _relation(self, paths: Sequence[str]) -> exp.Expr:
        types = self._pinned if self._format != "parquet" else None
        return file_sql.reader(self._format, paths, types, self._delimiter, self._moments)

    def _cut(self, listing: Listing, rows: int) -> Sequence[Piece]:
        if self._format == "parquet":
            files = listing.files
            with _translated_arrow():
                return cut_rows(
                    self._counts(listing), rows, lambda place: group_rows(files[place].path)
                )
        largest = max(listing.files, key=lambda file: file.size)
        some = exp.select(exp.Literal.number(1)).from_(self._relation([largest.path]))
        total = exp.select(sql.function("count", exp.Star())).from_(
            some.limit(rows).subquery("some")
        )
        with (
            _translated_misfit(),
            contextlib.closing(_engine([largest.path], self._format)) as engine,
        ):
            row = engine.execute(sql.render(_DIALECT, total)).fetchone()
        found = int(row[0]) if row else 0
        sizes = [file.size for file in listing.files]
        return cut_sizes(sizes, largest.size * rows / found if found else sum(sizes))

    def _describe(
        self,
        engine: duckdb.DuckDBPyConnection,
        paths: Sequence[str],
        *,
        whole: bool = False,
    ) -> tuple[dict[str, str], dict[str, str]]:
        """The engine's type of each column, and the type that its file is read as."""
        reader = file_sql.reader(self._format, paths, None, self._delimiter)
        if whole:
            reader.append(
                "expressions", file_sql.option("sample_size", exp.Literal.number(-1))
            )
        relation = engine.sql(
            sql.render(_DIALECT, exp.select("*").from_(reader)), alias="described"
        )
        names = {
            name: str(kind)
            for name, kind in zip(relation.columns, relation.types, strict=True)
        }
        pinned = {}
        for name, kind in names.items():
            # Whole numbers are read as text and checked: see `file_sql.guarded`.
            text = kind in INTEGERS or kind == '"NULL"' or name in self._declared
            pinned[name] = "VARCHAR" if text else kind
        return names, pinned

    def _build(
        self, engine: duckdb.DuckDBPyConnection, paths: Sequence[str]
    ) -> dict[str, Field]:
        readings = {name: self._reading(name, kind) for name, kind in self._names.items()}
        values = {name: reading.value for name, reading in readings.items()}
        # Asking for no rows tells the exact Arrow types.
        tree = exp.Select(
            expressions=[exp.alias_(v, n, quoted=True) for n, v in values.items()]
        )
        probe = tree.from_(self._relation(paths)).limit(0)
        relation = engine.sql(sql.render(_DIALECT, probe), alias="probed")
        schema = relation.to_arrow_reader(_ENGINE_ROWS).schema
        fields = {}
        for (name, reading), arrow in zip(readings.items(), schema, strict=True):
            value = reading.value
            fields[name] = Field(
                Column(name, arrow.type),
                value,
                value,
                value,
                loose=reading.loose,
                misfit=reading.misfit,
            )
        return fields

    def _reading(self, name: str, kind: str) -> Reading:
        column = sql.identifier(name)
        declared = self._declared.get(name)
        if declared is not None:
            to = sql_type(declared)
            if pat.is_integer(declared) and self._format != "parquet":
                return file_sql.guarded(name, to)
            return file_sql.converted(name, exp.DataType.build(to))
        if self._format != "parquet" and kind in INTEGERS:
            return file_sql.guarded(name, kind)
        if self._pinned[name] == "VARCHAR" and kind.startswith(("DATE", "TIMESTAMP")):
            return file_sql.converted(name, exp.DataType.build(kind, udt=True))
        if _TEXT_TYPES.search(kind):
            nested = "(" in kind.partition("ENUM")[0] or kind.endswith("]")
            value = sql.function("to_json", column) if nested else column
            return Reading(sql.cast(value, "TEXT"))
        return Reading(column)

    def _pin_moments(self, engine: duckdb.DuckDBPyConnection, path: str) -> bool:
        """Settle how CSV writes dates and timestamps: as its first file does, whichever
        file a shard begins with. False when that cannot be told."""
        moments = {
            name: kind
            for name, kind in self._names.items()
            if kind.startswith(("DATE", "TIMESTAMP")) and name not in self._declared
        }
        if self._format != "csv" or not moments:
            return True  # JSON has ISO 8601 alone
        _, _, *options = file_sql.reader("csv", [path], None, self._delimiter).expressions
        guess = sql.function("sniff_csv", sql.text(path), *options)
        names = ("Columns", "DateFormat", "TimestampFormat")
        tree = exp.select(*[sql.identifier(name) for name in names]).from_(guess)
        try:
            rows = engine.execute(sql.render(_DIALECT, tree)).fetchall()
        except duckdb.Error:
            return False
        ((columns, dates, timestamps),) = rows
        seen = {column["name"]: column["type"] for column in columns}
        if any(seen.get(name) != kind for name, kind in moments.items()):
            return False
        for name, kind in moments.items():
            if kind == "DATE" and dates is not None:
                self._moments["dateformat"] = dates
            elif kind != "DATE" and timestamps is not None:
                self._moments["timestampformat"] = timestamps
            else:
                self._pinned[name] = "VARCHAR"  # plain ISO 8601: see `_value`
        return True

    def _count(self, listing: Listing) -> int | None:
        if self._format != "parquet" or not listing.files:
            return None
        return sum(self._counts(listing))

    def _counts(self, listing: Listing) -> list[int]:
        """The rows of each Parquet file."""
        known, counts = self._counted
        if known == listing.digest:
            return counts
        with _translated_arrow():
            counts = [row_count(path) for path in listing.paths]
        self._counted = (listing.digest, counts)
        return counts

    def _verify(self, listing: Listing, query: Query) -> None:
        """Make sure that the types of nested JSON columns hold for every row: the engine
        guesses them from the first ones and would cut 2.5 down to 2 later on."""
        asked = [
            name
            for name in query.columns
            if name in self._nested and name not in self._masks
        ]
        if not asked:
            return
        with self._lock:
            digest, wrong = self._verified
            if digest != listing.digest:
                with (
                    _translated_misfit(),
                    contextlib.closing(_engine(listing.paths, self._format)) as engine,
                ):
                    found, _ = self._describe(engine, listing.paths, whole=True)
                wrong = frozenset(
                    name for name in self._nested if found.get(name) != self._names[name]
                )
                self._verified = (listing.digest, wrong)
        for name in asked:
            if name in wrong:
                raise ValueNotEncodable(
                    f"column {name} holds values of other types than its first rows",
                    column=name,
                )


@contextlib.contextmanager
def _translated_misfit() -> Iterator[None]:
    """As `_translated`, where there is no column to name yet."""
    try:
        with _translated():
            yield
    except _Misfit as error:
        raise SourceFailed from error.__cause__


class _Statement(Protocol):
    def __call__(self, *, loose: bool) -> str: ...


class FileStream:
    """Batches of a query over files."""

    def __init__(
        self,
        file_format: FileFormat,
        files: Sequence[File],
        statement: _Statement,
        fields: Sequence[Field],
        masks: Masks,
        *,
        keep_footers: bool,
        plain: PlainRows | None,
    ) -> None:
        self._plain = plain
        self._format: FileFormat = file_format
        self._files = files
        self._keep_footers = keep_footers
        self._statement = statement
        self._fields = fields
        self._masks = masks
        columns = [field.column for field in fields]
        self._schema = pa.schema(
            [pa.field(each.name, each.type, each.nullable) for each in columns]
        )
        self._stop = Stop()
        self._open = contextlib.ExitStack()
        self._ended = False
        self._given = 0

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
        if self._plain is None:
            batches = self._read(self._statement(loose=False))
        else:
            batches = self._read_plain(self._plain)
        for batch in gather(batches):
            yield conform(batch.columns, self._schema)

    def loose(self) -> Iterator[LooseBatch]:
        """The same rows, with those whose text is not of a type that it is cast to."""
        shape = Shape(self._schema, misfits=sql.misfits(self._fields))
        for batch in gather(self._read(self._statement(loose=True))):
            yield LooseBatch(batch, shape)

    def _engine(self) -> duckdb.DuckDBPyConnection:
        """An engine for as long as the stream is open."""
        reads = (self._format, tuple(file.path for file in self._files))
        engine = None if self._keep_footers else _idle.take(reads)
        if engine is None:
            engine = _engine(reads[1], self._format, keep_footers=self._keep_footers)

        def leave() -> None:
            # One that failed or was interrupted may be in any state.
            well = self._ended and not self._stop.stopped
            if well and not self._keep_footers and self._given <= _LITTLE:
                _idle.keep(reads, engine)
            else:
                engine.close()

        self._open.callback(leave)
        return engine

    def _read(self, text: str) -> Iterator[pa.RecordBatch]:
        try:
            with _translated():
                engine = self._engine()
                reader: Any = None
            while True:
                with self._stop.interrupting(engine.interrupt), _translated():
                    if reader is None:
                        relation = engine.sql(text, alias="exported")
                        reader = relation.to_arrow_reader(_ENGINE_ROWS)
                        self._open.callback(reader.close)
                    try:
                        batch = reader.read_next_batch()
                    except StopIteration:
                        self._ended = True
                        break
                self._given += batch.nbytes
                yield self._masks.hashed_batch(batch, self._schema.names)
        except _Misfit as error:
            # A column that nobody asked for may be one that nobody is to know of.
            shown = error.name if error.name in self._schema.names else None
            raise not_fitting(shown) from error.__cause__
        self._require_unchanged()

    def _read_plain(self, plain: PlainRows) -> Iterator[pa.RecordBatch]:
        self._stop.check()
        batches = plain.batches(self._stop)
        while True:
            with _translated_arrow():
                batch = next(batches, None)
            if batch is None:
                break
            for column, field in zip(batch.columns, self._schema, strict=True):
                if field.name in self._masks:
                    # Of a hash no encoder can tell any more what it was made of.
                    fitted(column, field.with_type(column.type), check_text=True)
            yield self._masks.hashed_batch(batch, self._schema.names)
        self._require_unchanged()

    def _require_unchanged(self) -> None:
        if not unchanged(self._files):
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


@functools.cache
def engine_version() -> str:
    """Version of DuckDB: another one may write other bytes, and read in another order."""
    return importlib.metadata.version("duckdb")
