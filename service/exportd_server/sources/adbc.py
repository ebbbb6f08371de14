"""Databases as sources, read through ADBC drivers.

The one file that knows ADBC. What a vendor's SQL and types need is in `postgres.py` and
`sqlite.py`, behind `Vendor`.

A stream reads in a thread of its own that owns its connection, one batch ahead. So a
cancelled reader is let go at once even when the driver cannot be interrupted or the
network is gone; the thread ends, and closes the connection, as soon as the driver
returns to it.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import re
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import adbc_driver_manager
import pyarrow as pa
from sqlglot import exp

from exportd_server.errors import ExportdError, SourceFailed, ValueNotEncodable
from exportd_server.sources import query as sql
from exportd_server.sources.base import (
    Anchor,
    Column,
    Plan,
    Query,
    Shard,
    SourceChanged,
)
from exportd_server.sources.batches import Stop, conform, gather, not_fitting
from exportd_server.sources.loose import LooseBatch, Shape
from exportd_server.sources.masks import Masks
from exportd_server.sources.query import Dialect, Field

MARK = "exportd:"
"""Opens the text of an error that a query raises on purpose, followed by the name of the
column whose value cannot be exported, in hexadecimal, and a colon."""

_MARKED = re.compile(rf"{MARK}((?:[0-9a-f]{{2}})*):")
_DRIVERS = {
    "postgresql": "adbc_driver_postgresql.dbapi",
    "sqlite": "adbc_driver_sqlite.dbapi",
}
"""Loaded when the first connection is made: they bring pyarrow.dataset along, and with it
pandas where that is installed, which cost half a second and 45 MiB."""

_LEAVE_SECONDS = 5.0


class Misfit(Exception):
    """A value of the column called `name` is not of its type."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(name)


class Vendor(Protocol):
    """What differs between databases."""

    driver: str
    library: str | None
    """Path of the driver's shared library; None for the one that is installed along."""
    uri: str
    dialect: Dialect
    stream_options: Mapping[str, str]
    interruptible: bool
    heading: int
    """Columns and rows that `statement` puts before those of the tree."""

    def begin(self, session: Session) -> None:
        """Make a new session read-only and its settings known."""
        ...

    def describe(
        self, session: Session, relation: exp.Expr, types: Mapping[str, pa.DataType]
    ) -> tuple[Field, ...]:
        """The columns of a relation; `types` declares some of them. Raises `SourceFailed`
        when there is no such relation."""
        ...

    def estimate(self, session: Session, statement: str, query: Query) -> int | None:
        """About how many rows a statement gives, where that is cheap to tell."""
        ...

    def statement(
        self, tree: exp.Select, fields: Sequence[Field], *, loose: bool = False
    ) -> exp.Expr:
        """The tree to run for a query's tree, which `loose` says to be a loose one."""
        ...

    def unpack(
        self, batch: pa.RecordBatch, fields: Sequence[Field], *, first: bool
    ) -> list[pa.Array]:
        """The columns of a batch that `statement` gave; raises `Misfit`."""
        ...

    def typed(self, array: pa.Array, kind: pa.DataType) -> pa.Array:
        """A column of a loose batch in its type, where a cast would not do; raises an
        error of Arrow's."""
        ...

    def fingerprint(self) -> Mapping[str, Any] | None:
        """What tells that the data has not changed, as JSON; `settled` is False when
        that is not sure yet. None when nothing tells."""
        ...


@dataclass(frozen=True, slots=True)
class Cut:
    """A query in pieces: what tells each one, as JSON, and what keeps them readable."""

    states: Sequence[Mapping[str, Any]]
    anchor: Anchor


@dataclass(frozen=True, slots=True)
class Piece:
    """How to read a piece. Sessions of `vendor` see the state of the data that was cut,
    or raise `SourceChanged`; `condition` holds for the rows of the piece. `ordered` tells
    whether a statement gives its rows in the same order each time; None: none does."""

    vendor: Vendor
    condition: exp.Expr
    ordered: Callable[[Session, str], bool] | None


@runtime_checkable
class Cutter(Protocol):
    """A vendor that can cut queries."""

    def cut(
        self, relation: exp.Expr, tree: exp.Select, key: Field | None, rows: int
    ) -> Cut | None:
        """Cut a query's tree over a relation into two or more pieces of about `rows`
        rows of the relation, by a key where need be; None where that is not possible or
        does not pay."""
        ...

    def piece(
        self, relation: exp.Expr, fields: Mapping[str, Field], state: Mapping[str, Any]
    ) -> Piece:
        """How to read what `cut` made a state for; raises `SourceChanged`."""
        ...

    def whole(self, relation: exp.Expr) -> Vendor:
        """The same database, whose sessions raise `SourceFailed` when the state that
        they see of the relation is not one that ever was."""
        ...


def sqlstate(error: SourceFailed) -> str | None:
    """The code that the database gave an error; None where it gave none, or was not the
    one to fail."""
    cause = error.__cause__
    return cause.sqlstate if isinstance(cause, adbc_driver_manager.Error) else None


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """The driver's errors, as exportd's. Those of a stream are Arrow's and `OSError`."""
    try:
        yield
    except (adbc_driver_manager.Error, pa.ArrowException, OSError) as error:
        if marked := _MARKED.search(str(error)):
            raise Misfit(bytes.fromhex(marked[1]).decode()) from error
        raise SourceFailed from error


def _connect(vendor: Vendor) -> Any:
    driver = importlib.import_module(_DRIVERS[vendor.driver])
    if vendor.library is None:
        return driver.connect(vendor.uri)
    manager = importlib.import_module("adbc_driver_manager.dbapi")
    return manager.connect(driver=vendor.library, db_kwargs={"uri": vendor.uri})


class Session:
    """One connection with one transaction, which is never committed."""

    def __init__(self, vendor: Vendor, stop: Stop | None = None) -> None:
        self._vendor = vendor
        self._stop = stop or Stop()
        self._open = contextlib.ExitStack()
        self._stop.check()
        with _translated():
            self._connection = _connect(vendor)
        self._open.callback(self._quietly, self._connection.close)
        try:
            vendor.begin(self)
        except BaseException:
            self._open.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @staticmethod
    def _quietly(close: Any) -> None:
        # Closing reports again what has failed before, or that the server is gone.
        with contextlib.suppress(adbc_driver_manager.Error, RuntimeError):
            close()

    def _cursor(self, options: Mapping[str, str], stack: contextlib.ExitStack) -> Any:
        cursor = self._connection.cursor(adbc_stmt_kwargs=dict(options))
        stack.callback(self._quietly, cursor.close)
        return cursor

    def _interrupting(self, cursor: Any) -> contextlib.AbstractContextManager[None]:
        if self._vendor.interruptible:
            return self._stop.interrupting(cursor.adbc_cancel)
        self._stop.check()
        return contextlib.nullcontext()

    def run(self, statement: str) -> None:
        """Run a statement without a result."""
        with contextlib.ExitStack() as stack, _translated():
            self._cursor({}, stack).executemany(statement, None)

    def fetch(self, statement: str, options: Mapping[str, str] | None = None) -> list[Any]:
        """The rows of a small result, as dicts."""
        with contextlib.ExitStack() as stack, _translated():
            cursor = self._cursor(options or {}, stack)
            with self._interrupting(cursor):
                cursor.execute(statement)
                rows: list[Any] = cursor.fetch_arrow_table().to_pylist()
            return rows

    def names(self, statement: str) -> list[str]:
        """The names of a result's columns."""
        with contextlib.ExitStack() as stack, _translated():
            cursor = self._cursor({}, stack)
            with self._interrupting(cursor):
                cursor.execute(statement)
                names: list[str] = cursor.fetch_record_batch().schema.names
            return names

    def stream(
        self, statement: str, parameters: Sequence[float] = ()
    ) -> Iterator[pa.RecordBatch]:
        """The batches of a large result."""
        bound = None
        if parameters:
            bound = pa.record_batch(
                [pa.array([value], pa.float64()) for value in parameters],
                names=[f"p{position}" for position in range(len(parameters))],
            )
        with contextlib.ExitStack() as stack:
            with _translated():
                cursor = self._cursor(self._vendor.stream_options, stack)
                with self._interrupting(cursor):
                    cursor.execute(statement, bound)
                    reader = cursor.fetch_record_batch()
            while True:
                with _translated(), self._interrupting(cursor):
                    try:
                        batch = reader.read_next_batch()
                    except StopIteration:
                        return
                yield batch


class AdbcSource:
    """The rows of a table, a view or an operator's query in a database.

    One shard, where the vendor does not cut it. Every stream of that one has a snapshot
    of its own, so reading goes on after a crash only where the vendor can tell that
    nothing has changed. `partition_key` names a column to cut by.
    """

    def __init__(
        self,
        vendor: Vendor,
        relation: exp.Expr,
        types: Mapping[str, pa.DataType] | None = None,
        *,
        partition_key: str | None = None,
    ) -> None:
        self._vendor = vendor
        self._relation = relation
        with Session(vendor) as session:
            fields = vendor.describe(session, relation, types or {})
        self._fields = {field.column.name: field for field in fields}
        self._key = partition_key
        self._masks = Masks()

    def masked(self, masks: Masks) -> AdbcSource:
        """The same rows under masks."""
        other = copy.copy(self)
        other._masks = masks  # noqa: SLF001 - the same class
        fields = masks.over(self._vendor.dialect, self._fields)
        other._fields = fields
        return other

    def columns(self) -> tuple[Column, ...]:
        """All columns, in the source's order."""
        return tuple(field.column for field in self._fields.values())

    def count(self) -> int | None:
        """The database's own estimate."""
        return self._estimate(Query(tuple(self._fields)))

    def plan(self, query: Query, *, shard_rows: int | None = None) -> Plan:
        """The shards that the vendor cuts, or one, and the database's own estimate of
        their rows."""
        estimate = self._estimate(query)
        if shard_rows is not None and query.limit is None:
            cut = self._cut(query, shard_rows)
            if cut is not None:
                shards = [
                    Shard(index, json.dumps({"piece": state, "masks": self._masks.stamp}))
                    for index, state in enumerate(cut.states)
                ]
                return Plan(tuple(shards), estimate, cut.anchor)
        state = {
            "fingerprint": self._vendor.fingerprint(),
            "masks": self._masks.stamp,
        }
        return Plan((Shard(0, json.dumps(state)),), estimate)

    def open(self, query: Query, shard: Shard, *, skip_rows: int = 0) -> DatabaseStream:
        """Read it. Raises `SourceChanged` under other masks than those of the plan; with
        rows to skip, unless the fingerprint of the plan was sure and still holds, or the
        piece has an order; iterating does so when the state of the data that was cut is
        gone."""
        state = json.loads(shard.state)
        if state.get("masks", "") != self._masks.stamp:
            raise SourceChanged
        if "piece" in state:
            return self._open_piece(query, state["piece"], skip_rows)
        check: _Check | None = None
        if skip_rows:
            expected = state["fingerprint"]
            if expected is None or not expected["settled"]:
                raise SourceChanged
            if differs(self._vendor, expected):
                raise SourceChanged

            def check(session: Session, text: str) -> None:
                del session, text
                # The snapshot is taken by now, so what is looked at is what is read.
                if differs(self._vendor, expected):
                    raise SourceFailed("the dataset changed while it was read")

        vendor = self._vendor
        if isinstance(vendor, Cutter):
            vendor = vendor.whole(self._relation)
        return self._stream(vendor, query, skip_rows, check)

    def _cut(self, query: Query, rows: int) -> Cut | None:
        tree, parameters = self._tree(query, 0)
        if parameters or not isinstance(self._vendor, Cutter):
            return None
        key = None if self._key is None else self._fields[self._key]
        return self._vendor.cut(self._relation, tree, key, rows)

    def _open_piece(
        self, query: Query, state: Mapping[str, Any], skip_rows: int
    ) -> DatabaseStream:
        if not isinstance(self._vendor, Cutter):
            raise SourceChanged  # the catalogue names another database by now
        piece = self._vendor.piece(self._relation, self._fields, state)
        check: _Check | None = None
        if skip_rows:
            ordered = piece.ordered
            if ordered is None:
                raise SourceChanged

            def check(session: Session, text: str) -> None:
                if not ordered(session, text):
                    raise SourceChanged

        return self._stream(piece.vendor, query, skip_rows, check, piece.condition)

    def _stream(
        self,
        vendor: Vendor,
        query: Query,
        skip_rows: int,
        check: _Check | None,
        condition: exp.Expr | None = None,
    ) -> DatabaseStream:
        wanted = [self._fields[name] for name in query.columns]

        def statement(*, loose: bool) -> tuple[str, Sequence[float]]:
            tree, parameters = self._tree(query, skip_rows, loose=loose)
            if condition is not None:
                tree = tree.where(condition.copy(), copy=False)
            whole = vendor.statement(tree, wanted, loose=loose)
            return sql.render(vendor.dialect, whole), parameters

        return DatabaseStream(vendor, statement, wanted, self._masks, check)

    def _tree(
        self, query: Query, skip_rows: int, *, loose: bool = False
    ) -> tuple[exp.Select, tuple[float, ...]]:
        return sql.select(
            self._vendor.dialect,
            self._relation.copy(),
            self._fields,
            query,
            skip_rows=skip_rows,
            loose=loose,
        )

    def _estimate(self, query: Query) -> int | None:
        tree, _ = self._tree(query, 0)
        with Session(self._vendor) as session:
            text = sql.render(self._vendor.dialect, tree)
            return self._vendor.estimate(session, text, query)


def differs(vendor: Vendor, expected: Mapping[str, Any]) -> bool:
    """Whether the data may have changed since a fingerprint was taken."""
    found = vendor.fingerprint()
    return found is None or found["digest"] != expected["digest"]


_Check = Callable[[Session, str], None]
"""Looks, in the session that is about to run a statement, whether it still may."""


class _Statement(Protocol):
    def __call__(self, *, loose: bool) -> tuple[str, Sequence[float]]: ...


class DatabaseStream:
    """Batches of a query over a database."""

    def __init__(
        self,
        vendor: Vendor,
        statement: _Statement,
        fields: Sequence[Field],
        masks: Masks,
        check: _Check | None,
    ) -> None:
        self._vendor = vendor
        self._statement = statement
        self._fields = fields
        self._masks = masks
        self._check = check
        self._schema = pa.schema(
            [
                pa.field(field.column.name, field.column.type, field.column.nullable)
                for field in fields
            ]
        )
        self._stop = Stop()
        self._hand = _Hand()
        self._thread: threading.Thread | None = None

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
        cancelled = self._stop.stopped
        self._hand.leave()
        self._stop.stop()
        if self._thread is not None and not cancelled:
            self._thread.join(_LEAVE_SECONDS)

    def cancel(self) -> None:
        """Stop soon, from any thread. A statement that the driver cannot interrupt runs
        on unheard until its next batch."""
        self._stop.stop()
        self._hand.leave()

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        return self._begin(self._read())

    def loose(self) -> Iterator[LooseBatch]:
        """The same rows, with those whose value the database has and their columns'
        types do not."""
        heading = self._vendor.heading
        shape = Shape(
            self._schema,
            first=heading,
            misfits=sql.misfits(self._fields, heading),
            check_text=True,
            typed=self._vendor.typed,
        )
        for batch in self._begin(self._read_loose()):
            yield LooseBatch(batch, shape)

    def _begin(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        if self._thread is not None:
            raise RuntimeError("a stream is read once")
        self._thread = threading.Thread(
            target=self._produce, args=(batches,), name="database-source", daemon=True
        )
        self._thread.start()
        return iter(self._hand)

    def _produce(self, read: Iterator[pa.RecordBatch]) -> None:
        try:
            with contextlib.closing(gather(read)) as batches:
                for batch in batches:
                    if not self._hand.put(batch):
                        return
        except BaseException as error:  # noqa: BLE001 - raised where it is iterated
            self._hand.end(error)
        else:
            self._hand.end(None)

    def _read(self) -> Iterator[pa.RecordBatch]:
        first = True
        with contextlib.closing(self._run(loose=False)) as batches:
            for batch in batches:
                try:
                    arrays = self._vendor.unpack(batch, self._fields, first=first)
                except Misfit as misfit:
                    raise self._not_fitting(misfit) from misfit.__cause__
                first = first and batch.num_rows == 0
                arrays = self._masks.hashed(self._schema.names, arrays)
                yield conform(arrays, self._schema)

    def _read_loose(self) -> Iterator[pa.RecordBatch]:
        left = self._vendor.heading
        with contextlib.closing(self._run(loose=True)) as batches:
            for batch in batches:
                cut = min(left, batch.num_rows)
                left -= cut
                yield self._masks.hashed_batch(
                    batch.slice(cut), self._schema.names, self._vendor.heading
                )

    def _run(self, *, loose: bool) -> Generator[pa.RecordBatch, None, None]:
        text, parameters = self._statement(loose=loose)
        try:
            with Session(self._vendor, self._stop) as session:
                if self._check is not None:
                    self._check(session, text)
                yield from session.stream(text, parameters)
        except Misfit as misfit:
            raise self._not_fitting(misfit) from misfit.__cause__

    def _not_fitting(self, misfit: Misfit) -> ValueNotEncodable:
        # A column that nobody asked for may be one that nobody is to know of.
        return not_fitting(misfit.name if misfit.name in self._schema.names else None)


class _Hand:
    """Hands batches from one thread to another, one waiting at a time."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[pa.RecordBatch] = deque()
        self._ended = False
        self._error: BaseException | None = None
        self._left = False

    def put(self, batch: pa.RecordBatch) -> bool:
        """Wait until there is room; False when nobody takes it any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._left or not self._waiting)
            if not self._left:
                self._waiting.append(batch)
                self._changed.notify_all()
            return not self._left

    def end(self, error: BaseException | None) -> None:
        """Nothing more comes."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def leave(self) -> None:
        """Nothing more is taken."""
        with self._changed:
            self._left = True
            self._waiting.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._left or self._waiting or self._ended)
                if self._left:
                    raise SourceFailed("reading was cancelled")
                if not self._waiting:
                    if self._error is None:
                        return
                    break
                batch = self._waiting.popleft()
                self._changed.notify_all()
            yield batch
        if isinstance(self._error, ExportdError | SourceChanged):
            raise self._error
        raise SourceFailed from self._error
