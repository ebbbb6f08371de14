"""Cuts what PostgreSQL holds into pieces that all read one state of it.

The anchor is a session that has exported its snapshot and keeps it. Each piece is read
by a session of its own, which takes that snapshot up.

A snapshot alone is not enough. Rewriting a table moves its rows to other blocks, and
TRUNCATE empties it for every snapshot there is, so the anchor holds the lock of a reader
on all that is read. It takes its locks first and its snapshot after them: one taken
earlier would see nothing of a table that was emptied and filled while it waited. The
identifier of a snapshot may come up again after a restart and on another server. So each
reader locks as well, and then makes sure that the snapshot is the plan's and that the
anchor has the same locks: so it lives, nobody came in between, and no partition was added
or taken away, which may be done beside a reader's lock.

Tables are cut by block ranges (`ctid`), which cost no more than one scan. Everything
else is cut by ranges of the operator's partition key.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any, Protocol

import structlog
from sqlglot import exp

from exportd_server.errors import SourceFailed
from exportd_server.sources import query as sql
from exportd_server.sources.adbc import Cut, Misfit, Piece, Session, Vendor, sqlstate
from exportd_server.sources.base import MOST_SHARDS, ColumnKind, SourceChanged
from exportd_server.sources.query import Field

log = structlog.get_logger(__name__)

_WHOLE_TABLE_SHARE = 4
"""A cut table is read whole. Where the planner knows a way that costs less than this
part of it, such as an index on what is filtered, that way is better than many hands."""

_LEAST_BLOCKS = 10
"""A table that was never analysed is at least so large, as the planner has it."""

_ANCHOR_SETTINGS = {
    # Idle for as long as the export takes, whatever the role's own settings are.
    "idle_in_transaction_session_timeout": "0",
    # A planner that is gone without a word must not hold the snapshot for hours.
    "tcp_keepalives_idle": "30",
    "tcp_keepalives_interval": "10",
    "tcp_keepalives_count": "3",
    # Costs are compared as those of one process.
    "max_parallel_workers_per_gather": "0",
}
_WITHOUT_END = """
SELECT set_config(name, '0', true) AS value
FROM pg_catalog.pg_settings WHERE name = 'transaction_timeout'
"""
"""Only servers from version 17 on know it."""

READER_SETTINGS = {
    # The anchor has the lock, so only somebody who queues for a table exclusively can be
    # in the way, and waits for the anchor. One of the two must give in.
    "lock_timeout": "10000",
}
_BLOCK_SETTINGS = {
    # Leaves the planner one way to read a block range, in the order of the blocks.
    "enable_tidscan": "on",
    "enable_seqscan": "off",
    "enable_indexscan": "off",
    "enable_indexonlyscan": "off",
    "enable_bitmapscan": "off",
    "max_parallel_workers_per_gather": "0",
}

_INVALID, _NO_SUCH, _ENDED, _NOT_LOCKED = "22023", "42704", "55000", "55P03"
_TRANSIENT = ("08", "53", "57P", "58", "XX")
"""Classes of errors of a server that is not well, not of what it was asked."""

_STORAGE = """
SELECT c.relkind::text AS kind, c.reltuples < 0 AS unknown,
       (pg_relation_size(c.oid) / current_setting('block_size')::int8)::int8 AS blocks
FROM pg_catalog.pg_class c WHERE c.oid = {relation}::regclass
"""
_EXPORT = """
SELECT pg_export_snapshot() AS id,
       concat_ws(' ', pg_postmaster_start_time(), pg_current_snapshot()) AS stamp,
       (SELECT virtualtransaction FROM pg_catalog.pg_locks
        WHERE pid = pg_backend_pid() AND locktype = 'virtualxid' AND granted) AS holder
"""
_CHECK = """
WITH locked AS MATERIALIZED (
    SELECT DISTINCT l.virtualtransaction = {holder} AS anchors, l.relation
    FROM pg_catalog.pg_locks l
    JOIN pg_catalog.pg_database d ON d.oid = l.database
    JOIN pg_catalog.pg_class c ON c.oid = l.relation
    WHERE d.datname = current_database() AND c.oid >= {first}
      AND c.relkind IN ('r', 'm', 'p', 'v', 'f')
      AND l.mode = 'AccessShareLock' AND l.granted
      AND (l.virtualtransaction = {holder} OR l.pid = pg_backend_pid())
)
SELECT concat_ws(' ', pg_postmaster_start_time(), pg_current_snapshot()) AS stamp,
       NOT EXISTS (SELECT FROM locked GROUP BY relation HAVING count(*) < 2) AS same
"""
_REWRITTEN = """
SELECT EXISTS (
    SELECT FROM pg_catalog.pg_locks l
    JOIN pg_catalog.pg_database d ON d.oid = l.database
    JOIN pg_catalog.pg_class c ON c.oid = l.relation
    WHERE d.datname = current_database() AND l.pid = pg_backend_pid()
      AND c.relkind IN ('r', 'm') AND c.relfilenode <> 0
      AND c.relfilenode <> pg_relation_filenode(c.oid)
) AS rewritten
"""
"""The catalogue is read as the snapshot has it, the function tells what is there now."""

_FIRST_USER_OBJECT = 16384
"""Object ids below belong to PostgreSQL itself: FirstNormalObjectId."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_TYPES = {ColumnKind.INTEGER: "BIGINT", ColumnKind.DATE: "DATE"}

KEY_KINDS = (ColumnKind.INTEGER, ColumnKind.DATE, ColumnKind.TIMESTAMP)
"""Kinds of columns that a partition key may be of."""


class Database(Vendor, Protocol):
    """What this file asks of PostgreSQL."""

    def settle(self, session: Session, settings: Mapping[str, str]) -> None:
        """Make settings of the transaction, beside those that every session has."""
        ...

    def begun_by(self, begin: Callable[[Session], None]) -> Vendor:
        """The same database, with another beginning of its sessions."""
        ...


class SnapshotAnchor:
    """A session that keeps its snapshot. Its connection is not used again but to be
    closed."""

    def __init__(self, held: contextlib.ExitStack) -> None:
        self._held = held
        self._lock = threading.Lock()

    def close(self) -> None:
        """Let the snapshot go, from any thread; idempotent."""
        with self._lock:
            self._held.close()


def explain(session: Session, statement: str) -> Mapping[str, Any]:
    """The top of the planner's plan for a statement."""
    rows = session.fetch(
        f"EXPLAIN (FORMAT JSON) {statement}", {"adbc.postgresql.use_copy": "false"}
    )
    (text,) = rows[0].values()
    plan: Mapping[str, Any] = json.loads(text)[0]["Plan"]
    return plan


def cut(
    database: Database, relation: exp.Expr, tree: exp.Select, key: Field | None, rows: int
) -> Cut | None:
    """Cut a query's tree over a relation into pieces of about `rows` rows; None where it
    is better read in one, or where the server does not give what cutting needs."""

    def begin(session: Session) -> None:
        session.run("SET TRANSACTION ISOLATION LEVEL READ COMMITTED, READ ONLY")
        database.settle(session, _ANCHOR_SETTINGS)
        session.fetch(_WITHOUT_END)
        _hold(database, session, relation)

    with contextlib.ExitStack() as stack:
        try:
            session = stack.enter_context(Session(database.begun_by(begin)))
            ranges = _Ranges(database, session, relation, tree, rows).find(key)
            if ranges:
                (snapshot,) = session.fetch(_EXPORT)
                states = tuple({"snapshot": snapshot, "range": each} for each in ranges)
                return Cut(states, SnapshotAnchor(stack.pop_all()))
        except Misfit:
            log.info("dataset not cut", reason="its partition key has an odd value")
        except SourceFailed as error:
            state = sqlstate(error)
            if state is None or state.startswith(_TRANSIENT):
                raise
            log.info("dataset not cut", reason=str(error.__cause__), sqlstate=state)
    return None


def piece(
    database: Database,
    relation: exp.Expr,
    fields: Mapping[str, Field],
    state: Mapping[str, Any],
) -> Piece:
    """How to read what `cut` made a state for. Raises `SourceChanged` when its partition
    key is no longer there."""
    within = state["range"]
    by_blocks = "column" not in within
    if not by_blocks and within["column"] not in fields:
        raise SourceChanged
    settings = {**READER_SETTINGS, **(_BLOCK_SETTINGS if by_blocks else {})}

    def begin(session: Session) -> None:
        _take_up(database, session, state["snapshot"])
        database.settle(session, settings)
        _join(database, session, relation, state["snapshot"])

    condition = (
        _of_blocks(within) if by_blocks else _of_key(fields[within["column"]], within)
    )
    ordered = _ordered if by_blocks else None
    return Piece(database.begun_by(begin), condition, ordered)


def _hold(database: Database, session: Session, relation: exp.Expr) -> None:
    """Lock all that the relation reads until the transaction ends, as any reading does."""
    nothing = exp.select(exp.Literal.number(1)).from_(relation.copy()).limit(0)
    session.fetch(sql.render(database.dialect, nothing))


def require_same_storage(database: Database, session: Session, relation: exp.Expr) -> None:
    """Lock what the relation reads, and raise `SourceFailed` when some of it was rewritten
    since the session's snapshot: a table that was emptied and filled while its reader
    waited would look empty, which it never was."""
    _hold(database, session, relation)
    (found,) = session.fetch(_REWRITTEN)
    if found["rewritten"]:
        raise SourceFailed("a table of the dataset was rewritten just now")


def _take_up(database: Database, session: Session, snapshot: Mapping[str, str]) -> None:
    session.run("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
    name = sql.render(database.dialect, sql.text(snapshot["id"]))
    try:
        session.run(f"SET TRANSACTION SNAPSHOT {name}")
    except SourceFailed as error:
        if sqlstate(error) in (_INVALID, _NO_SUCH, _ENDED):
            raise SourceChanged from error
        raise


def _join(
    database: Database, session: Session, relation: exp.Expr, snapshot: Mapping[str, str]
) -> None:
    try:
        _hold(database, session, relation)
    except SourceFailed as error:
        if sqlstate(error) == _NOT_LOCKED:
            raise SourceChanged from error
        raise
    holder = sql.render(database.dialect, sql.text(snapshot["holder"]))
    (found,) = session.fetch(_CHECK.format(holder=holder, first=_FIRST_USER_OBJECT))
    if found != {"stamp": snapshot["stamp"], "same": True}:
        raise SourceChanged


class _Ranges:
    """Finds where to cut, in the session that is to be the anchor."""

    def __init__(
        self,
        database: Database,
        session: Session,
        relation: exp.Expr,
        tree: exp.Select,
        rows: int,
    ) -> None:
        self._database = database
        self._session = session
        self._relation = relation
        self._tree = tree
        self._rows = rows

    def find(self, key: Field | None) -> Sequence[Mapping[str, Any]]:
        """The ranges in their order, none when there are fewer than two."""
        uncut = self._explain(self._tree)
        ranges = self._blocks(uncut)
        if not ranges and key is not None:
            ranges = self._keys(key, uncut)
        return ranges

    def _render(self, tree: exp.Expr) -> str:
        return sql.render(self._database.dialect, tree)

    def _explain(self, tree: exp.Expr) -> Mapping[str, Any]:
        return explain(self._session, self._render(tree))

    def _blocks(self, uncut: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        if not isinstance(self._relation, exp.Table):
            return ()
        bare = self._relation.copy()
        bare.set("alias", None)
        name = self._render(sql.text(self._render(bare)))
        (storage,) = self._session.fetch(_STORAGE.format(relation=name))
        if storage["kind"] not in ("r", "m"):
            return ()
        one = exp.select(exp.Literal.number(1)).from_(self._relation.copy())
        whole = self._explain(one)
        rows = whole["Plan Rows"]
        if storage["unknown"]:
            rows *= min(storage["blocks"] / _LEAST_BLOCKS, 1)
        count = min(_pieces(rows, self._rows), storage["blocks"])
        if count < 2 or uncut["Total Cost"] * _WHOLE_TABLE_SHARE < whole["Total Cost"]:
            return ()
        edges = [storage["blocks"] * number // count for number in range(1, count)]
        ranges = _between(edges)
        # Row security, children and other kinds of storage show in the plan.
        self._database.settle(self._session, _BLOCK_SETTINGS)
        first = self._tree.copy().where(_of_blocks(ranges[0]), copy=False)
        return ranges if _ordered(self._session, self._render(first)) else ()

    def _keys(self, key: Field, uncut: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        count = _pieces(uncut["Plan Rows"], self._rows)
        if count < 2:
            return ()
        bounds = _bounds(key)
        value = key.operand
        if key.column.kind is ColumnKind.INTEGER:
            value = sql.cast(value, "BIGINT")
        ends = self._tree.copy().select(
            exp.alias_(sql.function("min", value.copy()), "low"),
            exp.alias_(sql.function("max", value.copy()), "high"),
            append=False,
            copy=False,
        )
        for bound in bounds:
            ends = ends.where(bound, copy=False)
        (found,) = self._session.fetch(self._render(ends))
        if found["low"] is None:
            return ()
        low, high = _number(found["low"]), _number(found["high"])
        steps = {low + (high + 1 - low) * number // count for number in range(1, count)}
        edges = [_written(edge, found["low"]) for edge in sorted(steps - {low})]
        return [{"column": key.column.name, **each} for each in _between(edges)]


def _pieces(rows: float, wanted: int) -> int:
    return min(-int(-rows // wanted), MOST_SHARDS)


def _between(edges: Sequence[Any]) -> list[dict[str, Any]]:
    """The ranges that these edges cut, open at both ends; none without an edge."""
    if not edges:
        return []
    return [
        {"from": low, "to": high}
        for low, high in zip([None, *edges], [*edges, None], strict=True)
    ]


def _within(
    low: exp.Expr | None, high: exp.Expr | None, operand: exp.Expr
) -> list[exp.Expr]:
    found: list[exp.Expr] = []
    if low is not None:
        found.append(exp.GTE(this=operand.copy(), expression=low))
    if high is not None:
        found.append(exp.LT(this=operand.copy(), expression=high))
    return found


def _of_blocks(within: Mapping[str, Any]) -> exp.Expr:
    ends = [
        None
        if block is None
        else exp.Cast(
            this=exp.Literal.string(f"({int(block)},0)"),
            to=exp.DataType.build("tid", udt=True),
        )
        for block in (within["from"], within["to"])
    ]
    return exp.and_(*_within(ends[0], ends[1], exp.column("ctid")))


def _of_key(key: Field, within: Mapping[str, Any]) -> exp.Expr:
    """Keys below the first edge come with those that are missing."""
    ends = [
        None if edge is None else _literal(key, edge)
        for edge in (within["from"], within["to"])
    ]
    condition = exp.and_(*_within(ends[0], ends[1], key.operand))
    if within["from"] is None and key.column.nullable:
        missing = exp.Is(this=key.operand.copy(), expression=exp.Null())
        condition = exp.paren(exp.or_(condition, missing))
    return condition


def _type(key: Field) -> str:
    zoned = key.column.kind is ColumnKind.TIMESTAMP and key.column.type.tz is not None
    return _TYPES.get(key.column.kind, "TIMESTAMPTZ" if zoned else "TIMESTAMP")


def _literal(key: Field, edge: str) -> exp.Expr:
    # Taken as it is: sqlglot would write another name for some of these types.
    return exp.Cast(this=sql.text(edge), to=exp.DataType.build(_type(key), udt=True))


def _bounds(key: Field) -> list[exp.Expr]:
    """What keeps the ends of dates and moments within those that Python has, which
    infinities are not. Keys beyond belong to the outer ranges all the same."""
    if key.column.kind is ColumnKind.INTEGER:
        return []
    first, last = "0001-01-01", "9999-12-31"
    return _within(_literal(key, first), _literal(key, last), key.operand)


def _number(value: int | date | datetime) -> int:
    """A key on the axis that is cut: as it is, in days, or in microseconds."""
    match value:
        case datetime():
            return (value.replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND
        case date():
            return value.toordinal()
    return value


def _written(number: int, like: int | date | datetime) -> str:
    match like:
        case datetime():
            moment = _EPOCH + number * _MICROSECOND
            return moment.replace(tzinfo=like.tzinfo).isoformat(" ", "microseconds")
        case date():
            return date.fromordinal(number).isoformat()
    return str(number)


def _ordered(session: Session, statement: str) -> bool:
    """Whether a statement reads one block range in the order of its blocks, or nothing."""
    plan = explain(session, statement)
    if plan["Node Type"] == "Limit":
        (plan,) = plan["Plans"]
    return plan["Node Type"] in ("Tid Range Scan", "Result") and "Plans" not in plan
